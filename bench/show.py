"""What a benchmark prints: progress while it runs, a table at the end; with rich where that is installed."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict

from bench.record import Measurement

HEADER = ("operation", "path", "p20", "p50", "p80", "p99", "GB/s", "roof", "ratio", "peak MB")


def note(rank: int, text: str) -> None:
    """Say something beside the results, on one rank."""
    if rank == 0:
        print(text, file=sys.stderr, flush=True)


@contextmanager
def progress(rank: int, text: str, total: int) -> Iterator[Callable[[], None]]:
    """Show a bar on a terminal; what is given counts one step."""
    try:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
    except ImportError:
        yield lambda: None
        return
    console = Console(stderr=True)
    if rank or not console.is_terminal:
        yield lambda: None
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task(text, total=total)
        yield lambda: bar.advance(task)


def print_json(rows: Sequence[Measurement]) -> None:
    """Print the rows as one JSON list."""
    print(json.dumps([asdict(row) for row in rows], indent=1))


def print_rows(rows: Sequence[Measurement]) -> None:
    """Print one table per case."""
    for case in dict.fromkeys(row.case for row in rows):
        of_case = [row for row in rows if row.case == case]
        first = of_case[0]
        lines = [_cells(row) for row in of_case]
        header: tuple[str, ...] = HEADER
        if any("tokens_per_s" in row.extras for row in of_case):
            header = (*HEADER, "tokens/s")
            lines = [
                (*line, f"{row.extras.get('tokens_per_s', 0):,}") for line, row in zip(lines, of_case, strict=True)
            ]
        title = f"{case} (us; routing {first.routing_hash}, load {first.max_over_mean} x mean)"
        print_table(title, header, lines)
    if rows:
        last = rows[-1]
        print(f"{last.device}; {last.threads} CPU threads per rank; {last.versions}; commit {last.commit}")
        print(f"again: {last.command}")


def _cells(row: Measurement) -> tuple[str, ...]:
    name = f"{row.path} ({row.transport})" if row.transport else row.path
    times = (row.p20_us, row.p50_us, row.p80_us, row.p99_us)
    return (
        row.operation,
        name,
        *("" if time is None else f"{time:.0f}" if time >= 100 else f"{time:.1f}" for time in times),
        f"{row.gb_per_s:.2f}",
        "" if row.percent_of_roof is None else f"{row.percent_of_roof:.0f} %",
        "" if row.ratio is None else f"{row.ratio:.2f}x",
        "" if row.peak_memory_bytes is None else f"{row.peak_memory_bytes / 1e6:.0f}",
    )


def print_table(title: str, header: Sequence[str], lines: Sequence[Sequence[str]], left: int = 2) -> None:
    """Print a table whose first columns are words and whose others are numbers."""
    try:
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        widths = [max(len(line[i]) for line in (header, *lines)) for i in range(len(header))]
        print(f"\n{title}")
        for line in (header, *lines):
            cells = [c.ljust(w) if i < left else c.rjust(w) for i, (c, w) in enumerate(zip(line, widths, strict=True))]
            print("  ".join(cells).rstrip())
        return
    table = Table(title=title, title_justify="left")
    for number, name in enumerate(header):
        table.add_column(name, justify="left" if number < left else "right", no_wrap=True)
    for line in lines:
        table.add_row(*line)
    console = Console()
    if not console.is_terminal:
        console = Console(width=160)
    console.print(table)
