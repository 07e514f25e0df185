"""The test kit is tested too: a check that cannot fail is worse than none. The launcher has a file of its own."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import threading
from pathlib import Path

import pytest
import torch

from moecomm import testing
from moecomm.testing import (
    CASES,
    Case,
    RowOrigin,
    assert_bitwise,
    assert_error_bounded,
    decode_provenance,
    no_leaks,
    provenance_rows,
    random_case,
)

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.int8, torch.int64]


# -- leaks -------------------------------------------------------------------------------------------------------


def test_leaked_process_is_found() -> None:
    with pytest.raises(AssertionError, match=r"left behind: process .* sleep 30"), no_leaks(settle_s=0.0):
        sleeper = subprocess.Popen(["sleep", "30"])
    sleeper.kill()
    sleeper.wait()


def test_orphan_adopted_by_init_is_found(tmp_path: Path) -> None:
    note = tmp_path / "pid"
    with pytest.raises(AssertionError, match=r"left behind: process .* sleep 31"), no_leaks(settle_s=0.0):
        subprocess.run(["sh", "-c", f"sleep 31 >/dev/null 2>&1 & echo $! > {note}"], check=True)
    os.kill(int(note.read_text()), signal.SIGKILL)


def test_leaked_shared_memory_is_found() -> None:
    block = Path("/dev/shm") / f"moecomm_test_{os.getpid()}"
    with pytest.raises(AssertionError, match=f"left behind: shared memory {block}"), no_leaks(settle_s=0.0):
        block.write_bytes(b"x")
    block.unlink()


def test_shared_memory_of_others_is_not_blamed_on_us() -> None:
    block = Path("/dev/shm") / f"moecomm_test_{os.getpid()}_theirs"
    opened = subprocess.Popen(
        ["sh", "-c", f"read go; exec 3>{block}; echo made; read end"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert opened.stdin is not None and opened.stdout is not None
    with pytest.raises(AssertionError, match="shared memory"), no_leaks(settle_s=0.0):
        opened.stdin.write(b"go\n")
        opened.stdin.flush()
        opened.stdout.readline()
    opened.communicate(b"end\n")
    block.unlink()


def test_leaked_thread_socket_and_descriptor_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    end = threading.Event()
    with pytest.raises(AssertionError) as caught, no_leaks(settle_s=0.0):
        threading.Thread(target=end.wait, name="straggler").start()
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(str(tmp_path / "rendezvous"))
    end.set()
    listener.close()
    for part in ("thread straggler", f"socket {tmp_path / 'rendezvous'}", "descriptor "):
        assert part in str(caught.value)


def test_what_ends_in_time_is_no_leak() -> None:
    with no_leaks(settle_s=5.0):
        sleeper = subprocess.Popen(["sleep", "0.3"])
        threading.Thread(target=sleeper.wait).start()


# -- provenance --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_provenance_decodes_exactly(dtype: torch.dtype) -> None:
    for hidden in (5, 7, 16, 1000):
        rows = provenance_rows(3, 300, hidden, dtype, round=9)
        assert rows.shape == (300, hidden) and rows.dtype == dtype
        assert decode_provenance(rows) == [RowOrigin(3, token, 9) for token in range(300)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("hidden", [1, 2, 33])
def test_no_payload_element_looks_like_padding_or_poison(dtype: torch.dtype, hidden: int) -> None:
    rows = provenance_rows(0, 260, hidden, dtype)
    assert bool((rows.contiguous().view(torch.uint8).reshape(260, -1) != 0).any(dim=1).all())
    assert decode_provenance(torch.zeros_like(rows)) == [None] * 260


def test_damaged_rows_decode_to_nothing() -> None:
    rows = provenance_rows(1, 4, 12, torch.bfloat16)
    assert decode_provenance(rows.roll(1, dims=1)) == [None] * 4, "shifted columns"
    assert decode_provenance(torch.cat([rows[:2, :6], rows[2:, 6:]], dim=1)) == [None] * 2, "halves of two rows"
    assert decode_provenance(torch.full((1, 12), float("nan"))) == [None], "poison"
    assert decode_provenance(rows + 0.5) == [None] * 4, "no whole numbers"


def test_payloads_differ_between_ranks_tokens_and_rounds() -> None:
    rows = [provenance_rows(rank, 300, 8, torch.float16, round) for rank in range(3) for round in range(3)]
    assert len(torch.cat(rows).unique(dim=0)) == 9 * 300


# -- asserts -----------------------------------------------------------------------------------------------------


def test_bitwise_names_the_first_wrong_coordinate_and_both_origins() -> None:
    expected = provenance_rows(1, 5, 8, torch.bfloat16)
    actual = expected.clone()
    actual[3] = provenance_rows(0, 5, 8, torch.bfloat16)[4]
    with pytest.raises(AssertionError) as caught:
        assert_bitwise(actual, expected, "x", origin=lambda row: f"token {row} of rank 1")
    message = str(caught.value)
    assert message.startswith("x: row 3, column 0: expected 4.0, got 5.0")
    assert "this row should be token 3 of rank 1" in message
    assert "RowOrigin(rank=1, token=3, round=0)" in message and "RowOrigin(rank=0, token=4, round=0)" in message


@pytest.mark.parametrize(
    ("actual", "expected", "message"),
    [
        (torch.zeros(2, 3), torch.zeros(3, 2), r"expected \(3, 2\) torch.float32, got \(2, 3\)"),
        (torch.zeros(2), torch.zeros(2).half(), "expected .*float16, got .*float32"),
        (torch.tensor([0.0, -0.0]), torch.tensor([0.0, 0.0]), "row 1: expected 0.0, got -0.0"),
        (torch.tensor([float("nan")]), torch.tensor([1.0]), "row 0: expected 1.0, got nan"),
        (
            torch.zeros(2, 3, 4),
            torch.zeros(2, 3, 4).index_fill(2, torch.tensor(3), 1.0),
            "axis 0 0, axis 1 0, axis 2 3",
        ),
        (torch.tensor([1], dtype=torch.int8), torch.tensor([2], dtype=torch.int8), "expected 2, got 1"),
    ],
)
def test_bitwise_refuses(actual: torch.Tensor, expected: torch.Tensor, message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        assert_bitwise(actual, expected, "it")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(0, 4), (3, 0), (), (4, 5)])
def test_bitwise_accepts_equal_tensors(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    assert_bitwise(torch.ones(shape).to(dtype), torch.ones(shape).to(dtype), "it")


def test_bitwise_takes_nan_as_nan_whatever_its_payload() -> None:
    bits = torch.tensor([0x7FC00000, 0x7FC00001, -0x400000], dtype=torch.int32)
    assert_bitwise(bits.view(torch.float32), torch.full((3,), float("nan")), "it")


def test_error_bound() -> None:
    exact = torch.linspace(1, 2, 100, dtype=torch.float64) / 3
    baseline = exact.bfloat16()
    assert_error_bounded(baseline, baseline, exact, "same")
    spacing = torch.finfo(torch.bfloat16).eps
    assert_error_bounded(exact.bfloat16(), exact.float(), exact, "one rounding is always allowed")
    with pytest.raises(AssertionError, match="far: max error"):
        assert_error_bounded((exact + 4 * spacing).bfloat16(), baseline, exact, "far")
    with pytest.raises(AssertionError, match="biased: mean error"):
        assert_error_bounded((exact + 0.2 * spacing).float(), baseline, exact, "biased", factor=1.0)
    with pytest.raises(AssertionError, match="shapes differ"):
        assert_error_bounded(baseline[1:], baseline, exact, "short")
    with pytest.raises(AssertionError, match="the baseline is not finite"):
        assert_error_bounded(baseline, baseline / 0, exact, "void")


def test_error_bound_relative_to_what_is_summed() -> None:
    exact = torch.tensor([0.25, 1e6, 0.0], dtype=torch.float64)  # the first of (1000 + 0.25) - 1000, say
    magnitude = torch.tensor([2000.25, 1e6, 0.0], dtype=torch.float64)
    actual = exact + torch.tensor([1e-4, 0.0, 0.0])
    assert_error_bounded(actual.float(), exact.float(), exact, "sum", magnitude=magnitude)
    with pytest.raises(AssertionError, match=r"sum: max error 0\.0001 at \(0,\)"):
        assert_error_bounded(actual[:1].float(), exact[:1].float(), exact[:1], "sum")
    wrong = exact + torch.tensor([1e-3, 0.0, 0.0])
    assert_error_bounded(wrong.float(), exact.float(), exact, "hidden behind the second element")
    with pytest.raises(AssertionError, match=r"sum: max relative error 5e-07 at \(0,\)"):
        assert_error_bounded(wrong.float(), exact.float(), exact, "sum", magnitude=magnitude)
    with pytest.raises(AssertionError, match=r"sum: max relative error .* at \(2,\)"):
        assert_error_bounded(
            exact.float() + torch.tensor([0, 0, 1e-9]), exact.float(), exact, "sum", magnitude=magnitude
        )


def test_error_bound_and_what_is_not_finite() -> None:
    nan, inf = float("nan"), float("inf")
    exact = torch.tensor([1.0, inf, nan], dtype=torch.float64)
    assert_error_bounded(exact.float(), exact.float(), exact, "it")
    with pytest.raises(AssertionError, match=r"at \(1,\): expected inf, got 0.0"):
        assert_error_bounded(torch.tensor([1.0, 0.0, nan]), exact.float(), exact, "it")
    with pytest.raises(AssertionError, match="max error inf at"):
        assert_error_bounded(torch.tensor([nan, inf, nan]), exact.float(), exact, "it")
    assert_error_bounded(torch.empty(0), torch.empty(0), torch.empty(0).double(), "nothing")


# -- cases -------------------------------------------------------------------------------------------------------

STYLE_NAMES = {"empty_rank", "all_to_one", "one_token", "k_equals_e", "masked", "odd_hidden", "uneven_experts"}


def test_the_table_has_the_names_of_the_style_guide() -> None:
    assert STYLE_NAMES | {"ragged_tokens"} <= set(CASES)
    assert all(name == case.name and case.why for name, case in CASES.items())
    assert list(testing.__all__) == sorted(testing.__all__) and len(testing.__all__) <= 20


@pytest.mark.parametrize("case", [*CASES.values(), *map(random_case, range(40))], ids=lambda case: case.name)
def test_cases_are_valid_for_every_world_size(case: Case) -> None:
    for world_size in (1, 2, 3, 4):
        assert case.placement(world_size).num_ranks == world_size
        for rank in range(world_size):
            for round in range(6):
                topk_idx, topk_weights = case.routing(rank, round, world_size)
                assert topk_idx.shape == (case.num_tokens(rank, round), case.top_k)
                assert topk_idx.dtype == case.index_dtype
                assert bool(((topk_idx >= -1) & (topk_idx < case.num_experts)).all())
                assert (topk_weights is None) == (not case.has_weights)
                assert case.payload(rank, round).shape == (len(topk_idx), case.hidden)
                assert len(topk_idx) <= case.max_tokens_per_rank


def routings(name: str, world_size: int = 4, rounds: int = 3) -> list[torch.Tensor]:
    return [CASES[name].routing(r, i, world_size)[0] for i in range(rounds) for r in range(world_size)]


def test_cases_repeat_themselves_and_rounds_differ() -> None:
    for case in CASES.values():
        for made in (lambda i, c=case: c.routing(1, i, 2)[0], lambda i, c=case: c.values("rows", 1, i, 8)):
            assert_bitwise(made(0), made(0), case.name)
        assert not torch.equal(case.values("rows", 1, 0, 8), case.values("rows", 1, 1, 8).nan_to_num())
    first, second = routings("plain", 1, 2)
    assert first.shape != second.shape or not torch.equal(first, second)


def test_cases_are_what_they_say() -> None:
    assert any(len(idx) == 0 for idx in routings("empty_rank")) and any(len(idx) for idx in routings("empty_rank"))
    placement = CASES["all_to_one"].placement(4)
    for round in range(3):
        idx = torch.cat([CASES["all_to_one"].routing(rank, round, 4)[0] for rank in range(4)])
        assert len({placement.rank_of_expert[e] for e in idx.flatten().tolist()}) == 1
    assert all(len(idx) == 1 for idx in routings("one_token"))
    assert all(sorted(row) == list(range(6)) for idx in routings("k_equals_e") for row in idx.tolist())
    assert any((idx == -1).any() and (idx != -1).any() for idx in routings("masked"))
    assert any((idx == -1).all(dim=1).any() for idx in routings("no_expert_tokens"))
    assert any(len(set(row)) < len(row) for idx in routings("duplicate_expert") for row in idx.tolist())
    assert all((idx == -1).all() for idx in routings("all_masked")) and all(map(len, routings("all_masked")))
    assert len({len(idx) for idx in routings("ragged_tokens")}) > 3
    assert CASES["uneven_experts"].num_experts % 4 and CASES["odd_hidden"].hidden % 2
    assert CASES["explicit_placement"].placement(3).flat_experts != tuple(range(9))
    assert [len(e) for e in CASES["rank_without_experts"].placement(4).experts_of_rank] == [0, 4, 0, 4]
    assert CASES["extreme_values"].values("rows", 0, 0, 50).isnan().any()


def test_wrong_cases_are_refused() -> None:
    with pytest.raises(
        ValueError, match=r"Case x: unknown pattern: got 'swirl'; expected one of \['all_to_one_expert'"
    ):
        Case(name="x", why="", pattern="swirl")
    with pytest.raises(ValueError, match="tokens is empty"):
        Case(name="x", why="", tokens=())
