"""Run Python programs under mpiexec, with a deadline, and leave nothing behind."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from moecomm.testing.leaks import paths_held_by_others

_GRACE_S = 5.0
_POLL_S = 0.05
_SHARED_MEMORY = Path("/dev/shm")

__all__ = ["mpi_missing", "mpiexec_path", "run_mpi"]


def mpiexec_path() -> str | None:
    """Find mpiexec: beside this interpreter, where the package `mpich` puts it, or else on PATH."""
    beside = os.fspath(Path(sys.executable).parent)
    return shutil.which("mpiexec", path=beside) or shutil.which("mpiexec")


def mpi_missing() -> str:
    """Say why MPI programs cannot be started here; empty if they can.

    >>> isinstance(mpi_missing(), str)
    True
    """
    if importlib.util.find_spec("mpi4py") is None:
        return "mpi4py is not installed: install moecomm[mpi]"
    if mpiexec_path() is None:
        return "there is no mpiexec beside the interpreter or on PATH: install mpich"
    return ""


@contextlib.contextmanager
def segments_unlinked() -> Iterator[None]:
    """Remove what MPICH leaves in /dev/shm where ranks of the block, all ended by then, never came to `MPI_Finalize`.

    >>> with segments_unlinked():
    ...     pass
    """
    before = _segments()
    try:
        yield
    finally:
        _unlink_unheld(_segments() - before)


def run_mpi(
    arguments: Sequence[str],
    num_ranks: int,
    *,
    timeout_s: float = 60.0,
    options: Sequence[str] = (),
    env: Mapping[str, str] | None = None,
) -> subprocess.CompletedProcess[str]:
    """Run `python *arguments` on `num_ranks` ranks and return when mpiexec and all that it started have ended.

    Every process of the job inherits a mark in its environment, by which it is found also when it is no descendant any
    more. At the deadline, and when the launcher has ended without its ranks, they are killed. MPICH unlinks its shared
    memory in `MPI_Finalize`; what ranks that never came there have left in /dev/shm is removed.

    Args:
        arguments: of the interpreter that runs this.
        num_ranks: W.
        timeout_s: deadline in seconds, start included.
        options: of mpiexec.
        env: environment variables on top of this process's; each rank gets one thread unless they say otherwise.

    Returns:
        exit status of mpiexec, and what all ranks printed, in `stdout`: in any order, and whole lines only where a rank
        writes each of them at once.

    Raises:
        AssertionError: the deadline passed, or ranks outlived their launcher; the message has what they printed.

    >>> program = "from mpi4py import MPI; world = MPI.COMM_WORLD; print(end=f'rank {world.rank} of {world.size}\\\\n')"
    >>> done = run_mpi(["-c", program], 2)
    >>> done.returncode, sorted(done.stdout.splitlines())
    (0, ['rank 0 of 2', 'rank 1 of 2'])
    """
    mpiexec = mpiexec_path()
    assert mpiexec is not None, mpi_missing()
    mark = f"MOECOMM_MPI_JOB_{uuid.uuid4().hex}"
    command = [mpiexec, *options, "-n", str(num_ranks), sys.executable, *arguments]
    variables = {"OMP_NUM_THREADS": "1", **os.environ, **(env or {}), mark: "1"}
    deadline = time.monotonic() + timeout_s
    with segments_unlinked(), tempfile.TemporaryFile() as log:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=variables)
        trouble = ""
        try:
            while process.poll() is None and time.monotonic() < deadline:
                time.sleep(_POLL_S)
            if process.poll() is None:
                trouble = f"did not end within {timeout_s:g} s"
            else:
                left_s = min(deadline, time.monotonic() + _GRACE_S)
                while (left := _processes(mark)) and time.monotonic() < left_s:
                    time.sleep(_POLL_S)
                trouble = (
                    f"outlived mpiexec (exit status {process.returncode}): {sorted(left.values())}" if left else ""
                )
        finally:
            _kill(mark)
            process.wait()
        log.seek(0)
        output = log.read().decode(errors="replace")
    if trouble:
        raise AssertionError(f"{' '.join(command)}: {trouble}\n{output[-6000:]}")
    return subprocess.CompletedProcess(command, process.returncode, output, "")


def _processes(mark: str) -> dict[int, str]:
    """Living processes that carry the mark: pid -> command line."""
    found = {}
    for pid in (int(entry) for entry in os.listdir("/proc") if entry.isdecimal()):
        with contextlib.suppress(OSError):
            if mark.encode() in Path(f"/proc/{pid}/environ").read_bytes():
                found[pid] = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    return found


def _kill(mark: str) -> None:
    while left := _processes(mark):
        for pid in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(_POLL_S)


def _segments() -> set[Path]:
    """What MPICH has in /dev/shm for this user."""
    found = set()
    for path in _SHARED_MEMORY.glob("mpich_shm_*"):
        with contextlib.suppress(OSError):
            if path.stat().st_uid == os.getuid():
                found.add(path)
    return found


def _unlink_unheld(paths: set[Path]) -> None:
    """Remove what nobody has open or mapped: other jobs may have started in the meantime."""
    held = paths_held_by_others(set()) if paths else set()
    for path in paths:
        if str(path) not in held:
            path.unlink(missing_ok=True)
