"""Layout "padded" against its references, step by step: the memory of all ranks byte for byte, and all that is kept."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from moecomm.kernels.padded import padded_receive, padded_receive_ref, padded_send, padded_send_ref
from moecomm.kernels.padded_home import padded_return, padded_return_ref, padded_sum, padded_sum_ref
from moecomm.kernels.slots import FULL, REPEATED, STALE, Slots, loopback_slots
from moecomm.kernels.sync import barrier
from moecomm.kernels.wire import BAD_ID, STALLED, Wire, decode_bad_id
from torch import Tensor

from moecomm.placement import ExpertPlacement
from moecomm.quant import QuantSpec, quantize
from moecomm.testing.asserts import assert_bitwise
from tests.kernels.checks.check_order import ORDERS, ordered
from tests.kernels.checks.worlds import DEVICE

WORLD, E, K, M, AREA_BYTES = 3, 7, 3, 5, 1 << 16
POISON = 0x5A
KEPT = ("topk_idx", "topk_weights", "places", "ranges", "tokens", "totals", "book", "notes")
FP8, POWERS, EXPONENTS, INT8 = 1, 2, 3, 4


class Twins:
    """The same ranks twice: kernels run on the device, references on the CPU, and after every step nothing differs."""

    def __init__(self) -> None:
        placement = ExpertPlacement.uniform(E, WORLD)
        self.wire = Wire.of(WORLD, K, max(placement.experts_per_rank), 16)
        held = placement.experts_of_rank
        rank_of = torch.tensor([next(r for r in range(WORLD) if e in held[r]) for e in range(E)], dtype=torch.int32)
        local_of = torch.tensor([list(held[int(rank_of[e])]).index(e) for e in range(E)], dtype=torch.int32)
        self.ranks, self.memory = loopback_slots(self.wire, M, rank_of.to(DEVICE), local_of.to(DEVICE), AREA_BYTES)
        self.others, self.other_memory = loopback_slots(self.wire, M, rank_of, local_of, AREA_BYTES)
        for memory in (self.memory, self.other_memory):
            memory[:, : 4 * AREA_BYTES] = POISON

    def step(
        self, rank: int, generation: int, kernel: Any, reference: Any, *inputs: Tensor | None, **given: Any
    ) -> None:
        """One operation on both; tensors are given on the CPU, and those that are written come back equal."""
        mine = [None if tensor is None else tensor.clone().to(DEVICE) for tensor in inputs]
        named = {name: v.clone().to(DEVICE) if isinstance(v, Tensor) else v for name, v in given.items()}
        kernel(*mine, self.ranks[rank][generation], wire=self.wire, **named)
        named.pop("max_programs", None)
        reference(*inputs, self.others[rank][generation], wire=self.wire, **given)
        what = f"{kernel.__name__} on rank {rank}"
        assert_bitwise(self.memory, self.other_memory, f"{what}: memory of all ranks")
        for name, (one, other) in self._kept(rank, generation).items():
            assert_bitwise(one, other, f"{what}: {name}")
        for name, value in given.items():
            if isinstance(value, Tensor):
                assert_bitwise(named[name], value, f"{what}: {name}")
        for copied, tensor in zip(mine, inputs, strict=True):
            if copied is not None and tensor is not None:
                assert_bitwise(copied, tensor, f"{what}: a tensor that was given")

    def _kept(self, rank: int, generation: int) -> dict[str, tuple[Tensor, Tensor]]:
        pair: tuple[Slots, Slots] = (self.ranks[rank][generation], self.others[rank][generation])
        found = {name: (getattr(pair[0], name), getattr(pair[1], name)) for name in KEPT}
        for name in ("out", "home"):
            one, other = (getattr(slots, name) for slots in pair)
            found |= {f"{name}.state": (one.state, other.state), "status": (one.status, other.status)}
        return found

    def dispatch(self, xs: list[Tensor], ids: list[Tensor], generation: int, **given: Any) -> None:
        """All ranks send, then all receive."""
        for rank in range(WORLD):
            mine = {name: value[rank] if isinstance(value, list) else value for name, value in given.items()}
            self.step(rank, generation, padded_send, padded_send_ref, xs[rank], ids[rank], **mine)
        for rank in range(WORLD):
            self.step(rank, generation, padded_receive, padded_receive_ref)


def routings(seed: int, tokens: tuple[int, ...] = (4, 0, 5)) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    drawn = [
        torch.stack([torch.randperm(E + 1, generator=generator)[:K] - 1 for _ in range(n)] or [torch.zeros(K)])
        for n in tokens
    ]
    return [ids[:n].long() for n, ids in zip(tokens, drawn, strict=True)]


def rows_for(ids: list[Tensor], hidden: int, dtype: torch.dtype) -> list[Tensor]:
    return [(torch.randn(len(i), hidden) * torch.exp2(torch.randint(-6, 6, (len(i), 1)))).to(dtype) for i in ids]


@pytest.mark.parametrize(
    ("hidden", "dtype"), [(16, torch.float32), (7, torch.bfloat16), (5, torch.uint8), (4100, torch.bfloat16)]
)
def test_padded_send_against_reference(hidden: int, dtype: torch.dtype) -> None:
    ids = routings(hidden, (4, 0, 5) if hidden < 100 else (2, 0, 1))
    twins, xs = Twins(), rows_for(ids, hidden, dtype)
    weights = [torch.rand(len(i), K) for i in ids]
    twins.dispatch(xs, ids, 0, number=4, topk_weights=weights)
    twins.dispatch(xs[::-1], [i.int() for i in ids[::-1]], 1, number=5)


@pytest.mark.parametrize(
    ("quant", "hidden", "dtype"),
    [
        (FP8, 144, torch.float32),
        (FP8, 2100, torch.float16),
        (POWERS, 130, torch.bfloat16),
        (EXPONENTS, 130, torch.bfloat16),
    ],
)
def test_padded_send_quantises(hidden: int, dtype: torch.dtype, quant: int) -> None:
    ids = routings(quant, (2, 0, 1))
    Twins().dispatch(rows_for(ids, hidden, dtype), ids, 0, number=0, quant=quant)


@pytest.mark.parametrize(("columns", "kind"), [(3, torch.float32), (1, torch.uint8), (4, torch.uint8)])
def test_padded_send_with_what_travels_beside(columns: int, kind: torch.dtype) -> None:
    ids = routings(columns, (2, 1, 0))
    beside = [torch.randint(0, 99, (len(i), columns)).to(kind) for i in ids]
    twins = Twins()
    twins.dispatch(rows_for(ids, 9, torch.bfloat16), ids, 0, number=0, beside=beside)
    rows = max(1, len(twins.others[0][0].tokens)) * WORLD * M
    out = torch.full((rows, 9), -1.0).bfloat16(), torch.full((rows, columns), 7).to(kind)
    twins.step(0, 0, padded_receive, padded_receive_ref, out=out[0], out_beside=out[1])


@pytest.mark.parametrize("max_programs", [1, 2, 50])
def test_padded_receive_against_reference(max_programs: int) -> None:
    ids, twins = routings(1), Twins()
    twins.dispatch(rows_for(ids, 16, torch.float32), ids, 0, number=0, max_programs=max_programs)
    for rank in range(WORLD):
        out = torch.full((len(twins.others[rank][0].tokens) * WORLD * M, 16), -1.0)
        twins.step(rank, 0, padded_receive, padded_receive_ref, out=out, max_programs=max_programs)
        assert (out == -1).any() and (out != -1).any(), "rows that came are copied, and no others"


def returned(rank: int, twins: Twins, hidden: int, dtype: torch.dtype) -> Tensor:
    """Made-up rows for all places of a rank; those where nothing came are not a number."""
    slots = twins.others[rank][0]
    rows = torch.full((len(slots.tokens) * WORLD * M, hidden), torch.nan).to(dtype)
    for local, of_rank in enumerate(slots.ranges.tolist()):
        for begin, end in of_rank:
            first = local * WORLD * M
            rows[first + begin : first + end] = (torch.randn(end - begin, hidden) * 3).to(dtype)
    return rows


@pytest.mark.parametrize(
    ("quant", "hidden", "dtype"),
    [
        (0, 144, torch.float32),
        (0, 7, torch.bfloat16),
        (FP8, 130, torch.bfloat16),
        (POWERS, 144, torch.float32),
        (EXPONENTS, 130, torch.bfloat16),
        (INT8, 7, torch.float32),
    ],
)
def test_padded_sum_against_reference(hidden: int, dtype: torch.dtype, quant: int) -> None:
    ids, twins = routings(quant), Twins()
    twins.dispatch(rows_for(ids, hidden, dtype), ids, 0, number=8)
    for rank in range(WORLD):
        rows = returned(rank, twins, hidden, dtype)
        beside: Tensor | None = None
        if quant == INT8:
            rows, scales = quantize(rows, QuantSpec(format="int8"))
            beside = scales.clone(memory_format=torch.contiguous_format)
        options = {"number": 8, "beside": beside, "quant": quant % INT8}
        twins.step(rank, 0, padded_return, padded_return_ref, rows, **options)
    for rank, chosen in enumerate(ids):
        weights = None if rank == 2 else torch.rand(len(chosen), K)
        bias = None if rank == 1 else torch.randn(len(chosen), hidden).to(torch.float32 if rank else dtype)
        y = torch.full((len(chosen), hidden), -7.0).to(dtype)
        twins.step(rank, 0, padded_sum, padded_sum_ref, y, number=8, weights=weights, bias=bias, quant=quant)
        assert y.isfinite().all()


@pytest.mark.parametrize("beside", [None, 3])
def test_padded_return_against_reference(beside: int | None) -> None:
    """Rows with something beside them, and rows that are where they are read."""
    ids, twins = routings(3), Twins()
    twins.dispatch(rows_for(ids, 16, torch.float32), ids, 0, number=0)
    rows = returned(0, twins, 16, torch.float32)
    more = None if beside is None else torch.rand(len(rows), beside)
    twins.step(0, 0, padded_return, padded_return_ref, rows, number=0, beside=more)
    twins.step(1, 0, padded_return, padded_return_ref, None, number=0)
    twins.step(2, 0, padded_return, padded_return_ref, None, number=0)
    twins.step(0, 0, padded_sum, padded_sum_ref, torch.zeros(4, 16), number=0)


def test_what_is_wrong_is_noted_and_left_out() -> None:
    """An id out of range, and more entries than slots: the first of each is kept, the rest goes on."""
    ids, twins = routings(0, (5, 5, 5)), Twins()
    ids[1][1, 2], ids[1][3, 0], ids[2][:] = E + 40, -2, 4
    twins.dispatch(rows_for(ids, 4, torch.float32), ids, 0, number=0)
    first, second = twins.ranks[1][0], twins.ranks[2][0]
    assert decode_bad_id(int(first.out.status[int(BAD_ID)]), K) == (1, 2, E + 40)
    assert decode_bad_id(int(second.notes[int(FULL)]), K) == (1, 2, 4), "five of fifteen entries find a slot"
    assert int((second.places >= 0).sum()) == M and not twins.ranks[0][0].notes.any()


def test_a_dispatch_that_was_overwritten() -> None:
    """Its rows are not sent, its sums are not a number, and peers are not waited for."""
    ids, twins = routings(5), Twins()
    twins.dispatch(rows_for(ids, 4, torch.float32), ids, 0, number=6)
    before = twins.memory.clone()
    twins.step(0, 0, padded_return, padded_return_ref, returned(0, twins, 4, torch.float32), number=4)
    assert_bitwise(twins.memory, before, "memory of all ranks")
    y = torch.zeros(4, 4)
    twins.step(0, 0, padded_sum, padded_sum_ref, y, number=4)
    assert y.isnan().all() and int(twins.ranks[0][0].notes[int(STALE)]) == 5


def test_rows_in_use_are_not_overwritten() -> None:
    """A generation is sent into again only after its combine, or after a round of "free"."""
    ids, twins = routings(6), Twins()
    twins.dispatch(rows_for(ids, 4, torch.float32), ids, 0, number=0)
    before = twins.memory.clone()
    twins.step(0, 0, padded_send, padded_send_ref, torch.randn(4, 4), ids[0], number=2)
    assert_bitwise(twins.memory, before, "memory of all ranks")
    assert int(twins.ranks[0][0].notes[int(REPEATED)]) == 3
    twins.step(0, 0, padded_receive, padded_receive_ref)
    assert not twins.ranks[0][0].tokens.any(), "nothing came"


def test_nothing_is_sent_after_a_stall() -> None:
    ids, twins = routings(7), Twins()
    for ranks in (twins.ranks, twins.others):
        ranks[0][0].out.status[int(STALLED)] = 5
    before = twins.memory.clone()
    twins.step(0, 0, padded_send, padded_send_ref, torch.randn(4, 4), ids[0], number=0)
    twins.step(0, 0, padded_return, padded_return_ref, None, number=0)
    assert_bitwise(twins.memory, before, "memory of all ranks")


@pytest.fixture
def many_programs(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    from moecomm.kernels import _launch

    monkeypatch.setattr(_launch, "_INTERPRETED_PROGRAMS", 7)
    yield


@pytest.mark.parametrize(("order", "quant"), [*((order, 0) for order in ORDERS), (ORDERS[-1], FP8)])
def test_in_any_order(order: str, quant: int, many_programs: None) -> None:
    """Programs of every grid in another order: the references' bits all the same, in three rounds."""
    with ordered(order) if DEVICE == "cpu" else nullcontext():
        twins = Twins()
        for number in range(3):
            ids, g = routings(number), number % 2
            twins.dispatch(rows_for(ids, 144, torch.bfloat16), ids, g, number=number, quant=quant)
            for rank in range(WORLD):
                twins.step(rank, g, padded_return, padded_return_ref, None, number=number)
            for rank in range(WORLD):
                y = torch.zeros(len(ids[rank]), 144).bfloat16()
                twins.step(rank, g, padded_sum, padded_sum_ref, y, number=number)


def test_the_links_do_not_meet() -> None:
    """Six lines of signals, each with numbers of its own; `barrier` works on each."""
    wire, zero = Wire.of(1, K, 1, 16), torch.zeros(1, dtype=torch.int32, device=DEVICE)
    (pair,), _ = loopback_slots(wire, M, zero, zero, AREA_BYTES)
    for link in (pair[0].out, pair[1].out, pair[0].home, pair[1].home):
        for number in (1, 2):
            barrier(link, wire)
            assert link.state.tolist() == [number, 0] and not link.status.any()
