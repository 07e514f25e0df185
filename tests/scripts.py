"""Scripts and modules on ranks that are forked: what torchrun would start, without a start of Python for each."""

from __future__ import annotations

import contextlib
import io
import runpy
import sys
from pathlib import Path
from typing import NamedTuple

from moecomm.testing import run_ranks


class Done(NamedTuple):
    """How a program ended on one rank, and what it printed."""

    returncode: int
    stdout: str
    stderr: str


def run_forked(program: str | Path, *options: str, ranks: int = 2) -> list[Done]:
    """Run a script (a path) or a module (a name) as the main program of each rank."""
    told = run_ranks(as_main, ranks, str(program), options, backend=None, timeout_s=100.0)
    return [Done(*of_rank) for of_rank in told]


def as_main(rank: int, program: str, options: tuple[str, ...]) -> tuple[int, str, str]:
    """What runs on each rank."""
    out, err = io.StringIO(), io.StringIO()
    sys.argv = [program, *options]
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            if program.endswith(".py"):
                sys.path.insert(0, str(Path(program).parent))
                runpy.run_path(program, run_name="__main__")
            else:
                runpy.run_module(program, run_name="__main__", alter_sys=True)
            code: object = 0
        except SystemExit as end:
            code = end.code
    return code if isinstance(code, int) else int(code is not None), out.getvalue(), err.getvalue()
