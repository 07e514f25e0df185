"""A check that nothing stays behind: shared memory, processes, descriptors, threads, sockets (Linux)."""

from __future__ import annotations

import contextlib
import gc
import os
import stat
import tempfile
import threading
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from moecomm.testing._processes import kept

_POLL_S = 0.02


@dataclass(frozen=True, slots=True)
class Resources:
    """What exists at one moment; each field maps an identity to a description."""

    shared_memory: dict[str, str]
    processes: dict[str, str]
    descriptors: dict[str, str]
    threads: dict[str, str]
    sockets: dict[str, str]


@contextlib.contextmanager
def no_leaks(settle_s: float = 2.0) -> Iterator[None]:
    """Fail if the block leaves something behind that was not there before.

    Compared before and after: entries of /dev/shm, child processes and their children (also those that init adopted),
    open file descriptors of this process, Python threads, and socket files in the temporary folder. What another living
    process of the machine holds open is not counted, nor is the warm process that `run_ranks` forks ranks from. An
    exception of the block passes through unchecked.

    Args:
        settle_s: seconds that threads and processes get to finish ending.

    Raises:
        AssertionError: lists everything left behind.
        NotImplementedError: there is no /proc here.

    >>> with no_leaks():
    ...     open(os.devnull).close()
    >>> with no_leaks(settle_s=0.0):  # doctest: +ELLIPSIS
    ...     kept = open(os.devnull)
    Traceback (most recent call last):
    ...
    AssertionError: left behind: descriptor ... -> /dev/null
    >>> kept.close()
    """
    if not os.path.isdir("/proc/self/fd"):
        raise NotImplementedError("no_leaks reads /proc, which this system does not have: skip this check here")
    mark = f"MOECOMM_LEAK_MARK_{uuid.uuid4().hex}"
    gc.collect()
    before = _look(mark)
    os.environ[mark] = "1"  # inherited by every process started in the block, so orphans that init adopted are found
    try:
        yield
    finally:
        del os.environ[mark]
    deadline = time.monotonic() + settle_s
    while True:
        gc.collect()
        left = _new(before, _look(mark))
        if not left or time.monotonic() >= deadline:
            break
        time.sleep(_POLL_S)
    if left:
        raise AssertionError("left behind: " + "; ".join(left))


def _look(mark: str) -> Resources:
    pids, descriptors = kept()
    return Resources(
        shared_memory=_files(Path("/dev/shm"), want_sockets=False),
        processes={pid: text for pid, text in _processes(mark).items() if int(pid) not in pids},
        descriptors={text: text for fd, text in _descriptors() if fd not in descriptors},
        threads={str(t.ident): t.name for t in threading.enumerate()},
        sockets=_files(Path(tempfile.gettempdir()), want_sockets=True),
    )


def _new(before: Resources, after: Resources) -> list[str]:
    left = []
    for kind, was, now in (
        ("process", before.processes, after.processes),
        ("descriptor", before.descriptors, after.descriptors),
        ("thread", before.threads, after.threads),
    ):
        left += [f"{kind} {now[key]}" for key in sorted(now.keys() - was.keys())]
    files = sorted(after.shared_memory.keys() - before.shared_memory.keys())
    sockets = sorted(after.sockets.keys() - before.sockets.keys())
    if files or sockets:
        foreign = paths_held_by_others(set(after.processes))
        left += [f"shared memory {path}" for path in files if path not in foreign]
        left += [f"socket {path}" for path in sockets if path not in foreign]
    return left


def _files(folder: Path, *, want_sockets: bool) -> dict[str, str]:
    """Files of this user in the folder: all, or the sockets in it and in its direct subfolders."""
    found = {}
    candidates = [*folder.glob("*"), *folder.glob("*/*")] if want_sockets else list(folder.glob("*"))
    for path in candidates:
        with contextlib.suppress(OSError):
            info = path.lstat()
            if info.st_uid == os.getuid() and (not want_sockets or stat.S_ISSOCK(info.st_mode)):
                found[str(path)] = ""
    return found


def _processes(mark: str) -> dict[str, str]:
    """Living descendants of this process, and processes that carry the mark: pid -> command line."""
    parent_of, found = {}, {}
    for entry in os.listdir("/proc"):
        if entry.isdecimal() and (parent := _parent(entry)) is not None:
            parent_of[entry] = parent
    me = str(os.getpid())
    for pid in parent_of:
        ancestor = pid
        while ancestor in parent_of and ancestor != me:
            ancestor = parent_of[ancestor]
        if pid != me and (ancestor == me or mark.encode() in _read(f"/proc/{pid}/environ")):
            command = _read(f"/proc/{pid}/cmdline").replace(b"\0", b" ").decode(errors="replace")[:200]
            found[pid] = f"{pid} {command or '(ended, not waited for)'}"
    return found


def _parent(pid: str) -> str | None:
    fields = _read(f"/proc/{pid}/stat").rpartition(b")")[2].split()
    return fields[1].decode() if len(fields) > 1 else None


def _descriptors() -> Iterator[tuple[int, str]]:
    """Open descriptors; number and target together identify one, as numbers are used again."""
    for fd in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):  # the one that lists the folder is gone by now
            yield int(fd), f"{fd} -> {os.readlink(f'/proc/self/fd/{fd}')}"


def paths_held_by_others(mine: set[str]) -> set[str]:
    """Paths that living processes other than this one and its descendants have mapped, open or bound."""
    inode_paths = {}
    for line in _read("/proc/net/unix").decode(errors="replace").splitlines()[1:]:
        fields = line.split(maxsplit=7)
        if len(fields) == 8:
            inode_paths[f"socket:[{fields[6]}]"] = fields[7]
    held = set()
    for pid in os.listdir("/proc"):
        if not pid.isdecimal() or pid in mine or pid == str(os.getpid()):
            continue
        with contextlib.suppress(OSError):
            for fd in os.listdir(f"/proc/{pid}/fd"):
                with contextlib.suppress(FileNotFoundError):
                    target = os.readlink(f"/proc/{pid}/fd/{fd}")
                    held.add(inode_paths.get(target, target))
        # After the descriptors: what is opened, mapped and closed meanwhile is seen at one place or the other.
        for line in _read(f"/proc/{pid}/maps").decode(errors="replace").splitlines():
            held.add(line.partition("/")[1] + line.partition("/")[2])
    return held


def _read(path: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError:
        return b""
