"""Scripts and modules on ranks that are forked: what torchrun would start, without a start of Python for each.

Or really started by torchrun, which is forked itself.
"""

from __future__ import annotations

import contextlib
import io
import os
import runpy
import sys
import tempfile
import traceback
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


def run_torchrun(script: str | Path, *options: str, ranks: int = 2, folder: str | Path = ".") -> Done:
    """Have torchrun start a script: its ranks are new interpreters; torchrun itself is forked, not started."""
    words = ["--standalone", f"--nproc-per-node={ranks}", str(script), *options]
    ((code, out, err),) = run_ranks(as_torchrun, 1, words, str(folder), backend=None, timeout_s=200.0)
    return Done(code, out, err)


def as_torchrun(rank: int, words: list[str], folder: str) -> tuple[int, str, str]:
    """What the command `torchrun` does, in a process that is none of its ranks."""
    from torch.distributed.run import main

    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "TORCHELASTIC_USE_AGENT_STORE"):
        del os.environ[name]
    os.chdir(folder)
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        os.dup2(out.fileno(), 1)
        os.dup2(err.fileno(), 2)
        code = 0
        try:
            main(words)
        except BaseException:  # as it would end the command
            traceback.print_exc()
            code = 1
        sys.stdout.flush()
        sys.stderr.flush()
        out.seek(0)
        err.seek(0)
        return code, out.read(), err.read()
