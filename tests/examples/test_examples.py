"""The examples run as a stranger would start them, check themselves, and fail when something is wrong."""

from __future__ import annotations

import contextlib
import csv
import importlib
import io
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import matplotlib.figure
import pytest
import torch
import torch._dynamo

from moecomm.testing import no_leaks, run_ranks
from tests.scripts import run_torchrun

# An optimizer loads torch's compiler, which takes seconds: forked ranks have what this process has imported.
assert torch._dynamo and matplotlib.figure
ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "examples"
pytestmark = pytest.mark.timeout(400)  # seconds where nobody else uses the machine
TINY_LAYER = ["--tokens", "20", "--hidden", "24", "--experts", "5", "--iterations", "2"]
STEPS = 12
CURVE_BOUND = 1e-5
TINY_MODEL = [
    "--steps",
    f"{STEPS}",
    "--batch",
    "8",
    "--context",
    "24",
    "--hidden",
    "32",
    "--heads",
    "2",
    "--experts",
    "6",
]
TINY_MODEL += ["--intermediate", "24", "--text-bytes", "40000", "--sample-bytes", "9", "--warmup", "2"]
TINY_MODEL += ["--learning-rate", "0.01"]


@pytest.fixture(autouse=True)
def nothing_left() -> Iterator[None]:
    """No file of an example lies in the checkout."""
    before = listing()
    yield
    assert listing() == before


def listing() -> set[Path]:
    folders = [path for path in (EXAMPLES, ROOT / "out") if path.is_dir()]
    return {path for folder in folders for path in folder.iterdir() if path.name != "__pycache__"}


def succeed(script: str, *options: str, ranks: int, folder: Path) -> str:
    """What an example prints that torchrun starts."""
    with no_leaks():  # no shared memory, process or socket file
        done = run_torchrun(EXAMPLES / script, *options, ranks=ranks, folder=folder)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def main_of_rank(rank: int, name: str, options: list[str], folder: Path) -> tuple[int, str]:
    """Call an example's main as torchrun would start it; its exit status and what it printed."""
    os.chdir(folder)
    sys.path.insert(0, str(EXAMPLES))
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(sys.stdout):
        code = importlib.import_module(name).main(options)
    return code, printed.getvalue()


def succeed_forked(name: str, *options: str, ranks: int, folder: Path) -> str:
    """As `succeed`, but on ranks that need not import torch: a tenth of the time."""
    with no_leaks():
        results = run_ranks(main_of_rank, ranks, name, list(options), folder, backend=None, timeout_s=200.0)
    printed = "".join(text for _, text in results)
    assert [code for code, _ in results] == [0] * ranks, printed
    return printed


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], Any]]:
    """Import an example, to call its functions in this process."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    threads = torch.get_num_threads()
    yield importlib.import_module
    torch.set_num_threads(threads)


def status(main: Callable[[list[str]], int], options: list[str]) -> int:
    """The exit status of an example, argparse's included."""
    try:
        return main(options)
    except SystemExit as leave:
        assert isinstance(leave.code, int)
        return leave.code


# -- moe_layer -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ranks", "options"),
    [
        (1, []),
        (2, ["--dtype", "bfloat16", "--top-k", "5"]),
        (2, ["--transport", "collective", "--top-k", "1", "--tokens", "0"]),
        (3, ["--dtype", "float16", "--hidden", "7", "--seed", "3"]),
    ],
    ids=str,
)
def test_layer_is_right_and_says_so(ranks: int, options: list[str], tmp_path: Path) -> None:
    if options[:1] == ["--dtype"] and ranks == 2:
        printed = succeed("moe_layer.py", *TINY_LAYER, *options, ranks=ranks, folder=tmp_path)  # really by torchrun
    else:
        printed = succeed_forked("moe_layer", *TINY_LAYER, *options, ranks=ranks, folder=tmp_path)
    assert printed.count("check: outputs and gradients agree with one process, on every rank") == 1
    assert f"{ranks} rank" in printed and "tokens/s" in printed and "MB between ranks" in printed
    transport = "local" if ranks == 1 else "collective" if "collective" in options else "symmetric"
    assert f"transport {transport}" in printed
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("field", "name"),
    [
        ("y", "output"),
        ("aux_loss", "load-balancing loss"),
        ("grad_x", "gradient of the tokens"),
        ("grad_router", "gradient of the router"),
        ("grad_w_in", "gradient of w_in"),
        ("grad_w_out", "gradient of w_out"),
    ],
)
def test_layer_notices_one_wrong_number(
    field: str,
    name: str,
    example: Callable[[str], Any],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    moe_layer = example("moe_layer")
    forward_backward = moe_layer.forward_backward

    def wrong(*args: Any) -> Any:
        result = forward_backward(*args)
        values = getattr(result, field).clone()
        values.view(-1)[-1] += 0.001 * values.abs().max()
        return replace(result, **{field: values})

    monkeypatch.setattr(moe_layer, "forward_backward", wrong)
    assert moe_layer.main([*TINY_LAYER, "--device", "cpu"]) == 1
    captured = capsys.readouterr()
    assert f"WRONG RESULT on rank 0: {name}" in captured.err
    assert "agree" not in captured.out


def main_of_a_wrong_rank(rank: int, folder: Path) -> tuple[int, str]:
    """Rows come home scaled on rank 1."""
    import moecomm

    combine = moecomm.Buffer.combine
    if rank == 1:
        moecomm.Buffer.combine = lambda *args: combine(*args) * 1.001  # type: ignore[method-assign]
    return main_of_rank(rank, "moe_layer", TINY_LAYER, folder)


def test_layer_fails_on_all_ranks_when_one_is_wrong(tmp_path: Path) -> None:
    """The job ends with an error on every rank, and the first says which rank is wrong and in what."""
    (first, printed), (second, _) = run_ranks(main_of_a_wrong_rank, 2, tmp_path, backend=None, timeout_s=100.0)
    assert first != 0 and second != 0
    assert "WRONG RESULT on rank 1: output" in printed
    assert "WRONG RESULT on rank 0: output" not in printed


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--top-k", "6"], "top_k=6; expected at most 5"),
        (["--transport", "pigeon"], "pigeon"),
        (["--tokens", "-1"], "--tokens must be at least 0"),
        (["--dtype", "int8"], "invalid choice: 'int8'"),
    ],
)
def test_layer_refuses_what_cannot_be(
    options: list[str], message: str, example: Callable[[str], Any], capsys: pytest.CaptureFixture[str]
) -> None:
    assert status(example("moe_layer").main, [*TINY_LAYER, *options]) == 2
    assert message in capsys.readouterr().err


def test_table_without_rich(
    example: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "rich.console", None)
    example("moe_layer").print_table(("expert", "load"), [("0", "##"), ("1", "#")])
    assert capsys.readouterr().out == "expert  load\n     0  ##\n     1  #\n"


# -- train_moe_lm ----------------------------------------------------------------------------------------------------


def losses(path: Path) -> list[float]:
    with open(path, newline="") as file:
        return [float(row["loss"]) for row in csv.DictReader(file)]


def test_every_ep_gives_the_same_curve(
    example: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One process, two, and four that use another transport."""
    monkeypatch.chdir(tmp_path)
    assert status(example("train_moe_lm").main, [*TINY_MODEL, "--out", "alone"]) == 0
    printed = capsys.readouterr().out
    alone = tmp_path / "alone/train_moe_lm_ep1.csv"
    first, *_, last = losses(alone)
    assert len(losses(alone)) == STEPS and last < 0.8 * first
    assert alone.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    assert "held-out loss" in printed and "\ndef " in printed

    compared = ["--out", "together", "--compare", str(alone)]
    for ep, options in ((2, []), (4, ["--transport", "collective"])):
        more = [*compared, "--ep", f"{ep}", *options]
        again = succeed_forked("train_moe_lm", *TINY_MODEL, *more, ranks=ep, folder=tmp_path)
        curve = losses(tmp_path / f"together/train_moe_lm_ep{ep}.csv")
        difference = max(abs(a - b) / b for a, b in zip(curve, losses(alone), strict=True))
        assert difference <= CURVE_BOUND
        assert "largest relative difference" in again
        assert again.count("held-out loss") == 1  # rank 0 speaks for all
    assert {path.name for path in tmp_path.iterdir()} == {"alone", "together"}
    assert len(list((tmp_path / "together").iterdir())) == 4


def test_ranks_without_sequences_or_experts_take_part(
    example: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    few = [*TINY_MODEL, "--steps", "3", "--batch", "2", "--experts", "2", "--out", "."]
    assert status(example("train_moe_lm").main, few) == 0
    succeed_forked("train_moe_lm", *few, "--compare", "train_moe_lm_ep1.csv", ranks=3, folder=tmp_path)


def test_another_curve_is_noticed(
    example: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    main = example("train_moe_lm").main
    short = [*TINY_MODEL, "--steps", "2", "--sample-bytes", "0", "--out", "."]
    assert status(main, short) == 0
    curve = tmp_path / "train_moe_lm_ep1.csv"
    header, first, second = curve.read_text().splitlines()
    fields = second.split(",")
    fields[1] = str(float(fields[1]) * (1 + 3 * CURVE_BOUND))
    other = tmp_path / "other.csv"
    other.write_text("\n".join([header, first, ",".join(fields)]) + "\n")
    capsys.readouterr()
    assert status(main, [*short, "--compare", str(other)]) == 1
    captured = capsys.readouterr()
    assert "at step 1; bound" in captured.out and "DIFFER by more than the bound" in captured.err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--ep", "2"], "--ep 2 needs that many processes, not 1: torchrun --nproc-per-node 2"),
        (["--hidden", "33"], "--hidden must be a multiple of --heads"),
        (["--top-k", "7"], "--top-k must be at most --experts"),
        (["--steps", "0"], "--steps must be at least 1"),
        (["--text-bytes", "50"], "too little text: got 50 bytes"),
        (["--compare", "empty.csv"], "another number of steps: got 0"),
        (["--compare", "nowhere.csv"], "nowhere.csv is no loss curve"),
    ],
)
def test_training_refuses_what_cannot_be(
    options: list[str],
    message: str,
    example: Callable[[str], Any],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.csv").write_text("step,loss\n")
    assert status(example("train_moe_lm").main, [*TINY_MODEL, *options]) == 2
    assert message in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["empty.csv"]


def test_curve_without_matplotlib(
    example: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    loss_curve = example("loss_curve")
    curve = [loss_curve.Step(0, 2.0, 1.0, 0.1), loss_curve.Step(1, 1.0, 1.0, 0.1)]
    assert loss_curve.write_png(tmp_path / "a.png", curve, "a", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert not loss_curve.write_png(tmp_path / "b.png", curve, "b", None)
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]
