"""Progress bar, CSV, picture and comparison of loss curves, for `train_moe_lm.py`."""

from __future__ import annotations

import csv
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import astuple, dataclass, fields
from pathlib import Path


@dataclass(frozen=True)
class Step:
    """A line of the curve: mean loss of the global batch in nats per byte, load-balancing loss (1: even), seconds."""

    step: int
    loss: float
    balance: float
    seconds: float


@dataclass(frozen=True)
class Comparison:
    """Another run, and |loss - other| / other for every step."""

    name: str
    other: Sequence[float]
    differences: Sequence[float]

    @classmethod
    def of(cls, curve: Sequence[Step], name: str, other: Sequence[float]) -> Comparison:
        """Compare a curve with the losses of as many steps."""
        return cls(name, other, [abs(step.loss - loss) / loss for step, loss in zip(curve, other, strict=True)])

    @property
    def largest(self) -> tuple[float, int]:
        """The largest difference, and the first step that has it."""
        step = max(range(len(self.differences)), key=self.differences.__getitem__)
        return self.differences[step], step


def read_losses(path: Path, num_steps: int) -> list[float]:
    """The losses of another run; ValueError if there are none, or not as many."""
    try:
        with open(path, newline="") as file:
            losses = [float(row["loss"]) for row in csv.DictReader(file)]
    except (OSError, KeyError, ValueError) as error:
        raise ValueError(f"{path} is no loss curve: {type(error).__name__}: {error}") from error
    if len(losses) != num_steps:
        raise ValueError(f"{path} has another number of steps: got {len(losses)}; expected {num_steps}")
    return losses


def write_csv(path: Path, curve: Sequence[Step], comparison: Comparison | None) -> None:
    """Write a line per step, with the other run's loss and the difference if there is one."""
    with open(path, "w", newline="") as file:
        writer = csv.writer(file)
        extra = ["other_loss", "relative_difference"] if comparison else []
        writer.writerow([*(f.name for f in fields(Step)), *extra])
        for i, step in enumerate(curve):
            compared = [comparison.other[i], comparison.differences[i]] if comparison else []
            writer.writerow([*astuple(step), *compared])


def write_png(path: Path, curve: Sequence[Step], name: str, comparison: Comparison | None) -> bool:
    """Draw the curve over another's, and their difference below; whether matplotlib is there to do it."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    figure = Figure(figsize=(7, 5.5 if comparison else 4), layout="constrained")
    ratios = [3, 1] if comparison else [1]
    axes = figure.subplots(len(ratios), sharex=True, squeeze=False, height_ratios=ratios)[:, 0]
    axes[0].plot([step.loss for step in curve], label=name)
    axes[0].set(ylabel="loss (nats per byte)", title="MoE language model on the Python standard library")
    if comparison:
        axes[0].plot(comparison.other, "k:", label=comparison.name)
        axes[1].plot(comparison.differences, ".", markersize=3)
        axes[1].set(ylabel="relative difference", ylim=(0, 1.1 * max(1e-7, *comparison.differences)))
    axes[0].legend()
    axes[-1].set(xlabel="step")
    figure.savefig(path, dpi=120)
    return True


@contextmanager
def progress(steps: int, *, shown: bool) -> Iterator[Callable[[int, str], None]]:
    """Show how far training is: a bar on a terminal where rich is installed, a line for every tenth elsewhere."""
    try:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
    except ImportError:
        has_rich = False
    else:
        has_rich = True
    if has_rich and shown and sys.stdout.isatty():
        columns = (MofNCompleteColumn(), BarColumn(), TimeRemainingColumn(), TextColumn("{task.description}"))
        with Progress(*columns) as bar:
            task = bar.add_task("", total=steps)
            yield lambda step, text: bar.update(task, completed=step, description=text)
        return

    def line(step: int, text: str) -> None:
        if shown and (step in (1, steps) or step % max(1, steps // 10) == 0):
            print(f"step {step:>{len(str(steps))}}/{steps}  {text}", flush=True)

    yield line
