"""Functions on the ranks of MPI jobs, without a start of Python with torch for each.

What mpiexec starts are small programs that lend their connection to it to ranks that are forked.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import os
import pickle
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from moecomm.testing import mpi, run_ranks

# It stays as long as its folder: mpiexec ends a job from which a process has gone.
LENDER = """
import os, pickle, socket, sys, time
with socket.socket(socket.AF_UNIX) as rank:
    while rank.connect_ex(f"\\0{sys.argv[1]}/{os.environ['PMI_RANK']}"):
        time.sleep(0.01)
    socket.send_fds(rank, [pickle.dumps(dict(os.environ))], [int(os.environ["PMI_FD"])])
while os.path.isdir(sys.argv[1]):
    time.sleep(0.05)
"""
_LETTER_BYTES = 1 << 20
_START_S = 60.0


def run_under_mpi(
    fn: Callable[..., Any],
    num_ranks: int,
    *args: Any,
    timeout_s: float = 60.0,
    expect_exit: Mapping[int, int] | None = None,
) -> list[Any]:
    """Call `fn(comm, *args)` on the ranks of a job and return the results, as `run_ranks`.

    MPI ends as usual where all ranks live. Where some are expected to die the others end without it.
    """
    finalize = not expect_exit
    with lenders(num_ranks, timeout_s, finalize) as folder:
        return run_ranks(
            play, num_ranks, folder, finalize, fn, args, backend=None, timeout_s=timeout_s, expect_exit=expect_exit
        )


@contextlib.contextmanager
def lenders(num_ranks: int, timeout_s: float, finalize: bool) -> Iterator[str]:
    """Have mpiexec start what lends; nothing of it stays, nor what MPICH leaves where ranks did not end as usual."""
    mpiexec = mpi.mpiexec_path()
    assert mpiexec is not None, mpi.mpi_missing()
    folder = tempfile.mkdtemp()
    command = [mpiexec, "-n", str(num_ranks), sys.executable, "-I", "-S", "-c", LENDER, folder]
    env = os.environ | {"MPIEXEC_TIMEOUT": f"{timeout_s + 2 * _START_S:.0f}"}
    with mpi.segments_unlinked():
        job = subprocess.Popen(command, stdin=subprocess.DEVNULL, env=env)
        try:
            yield folder
        finally:
            shutil.rmtree(folder)
            job.wait(_START_S)
    assert not (finalize and job.returncode), f"mpiexec ended with {job.returncode}: a rank has not left MPI"


def play(rank: int, folder: str, finalize: bool, fn: Callable[..., Any], args: tuple[Any, ...]) -> Any:
    """What runs on each forked rank."""
    with socket.socket(socket.AF_UNIX) as here:
        here.bind(f"\0{folder}/{rank}")  # a name that is no file: other tests look for files that were left behind
        here.listen()
        here.settimeout(_START_S)
        lender, _ = here.accept()
        with lender:
            letter, (pmi,), _, _ = socket.recv_fds(lender, _LETTER_BYTES, 1)
    os.environ.clear()  # of what a rank of `run_ranks` is told by variables, nothing stays
    os.environ.update(pickle.loads(letter), PMI_FD=str(pmi))
    from mpi4py import MPI

    if finalize:
        atexit.register(leave_mpi)
    try:
        return fn(MPI.COMM_WORLD, *args)
    finally:
        if not finalize:
            atexit.register(os._exit, 0)


def leave_mpi() -> None:
    """What ends MPI where an interpreter ends: mpi4py, and the exit handlers of C, in which MPICH leaves its job."""
    from mpi4py import MPI

    MPI.Finalize()
    sys.stdout.flush()
    sys.stderr.flush()
    ctypes.CDLL(None).exit(0)
