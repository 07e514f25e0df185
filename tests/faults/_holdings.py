"""What a process holds, and whether it holds more and more of it (Linux)."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import re
import sys
import threading
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

# What may stay behind on average, per operation, in a window of operations: less than any leak would leave.
BLOCKS_PER_OPERATION = 0.5
HEAP_BYTES_PER_OPERATION = 64
RESIDENT_BYTES_PER_OPERATION = 256


@dataclass(frozen=True)
class Holdings:
    """What a process holds.

    belongings: descriptors, threads and mappings of shared memory. blocks: of Python's own allocator. heap, resident
    and shared: bytes that malloc has handed out (0 where it does not tell), of memory that is not shared, and of
    memory that is, committed by whomever.
    """

    belongings: Counter[str]
    blocks: int
    heap: int
    resident: int
    shared: int

    @classmethod
    def now(cls) -> Holdings:
        gc.collect()
        return cls(belongings(), sys.getallocatedblocks(), heap_bytes(), resident_bytes(), shared_bytes())

    def grown(self, before: Holdings, num_operations: int) -> list[str]:
        """What has grown more than it may in so many operations."""
        found = [f"{name}: {count} more" for name, count in more(before.belongings, self.belongings).items()]
        for name, allowed in (
            ("blocks", BLOCKS_PER_OPERATION),
            ("heap", HEAP_BYTES_PER_OPERATION),
            ("resident", RESIDENT_BYTES_PER_OPERATION),
            ("shared", 0),
        ):
            growth = getattr(self, name) - getattr(before, name)
            if growth > allowed * num_operations:
                found.append(f"{name}: {growth} more after {num_operations} operations")
        return found


def belongings() -> Counter[str]:
    """Descriptors, threads and mappings of shared memory of this process."""
    gc.collect()
    found: Counter[str] = Counter()
    for fd in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):  # the one that listed the folder
            found["descriptor of " + re.sub(r"\d+", "N", os.readlink(f"/proc/self/fd/{fd}"))] += 1
    found.update(f"thread {thread.name}" for thread in threading.enumerate())
    found["native threads"] = len(os.listdir("/proc/self/task"))
    found.update(line[73:] for line in Path("/proc/self/maps").read_text().splitlines() if "memfd" in line)
    return found


def more(before: Counter[str], after: Counter[str]) -> dict[str, int]:
    """What there is more of than before. (Gloo closes a spare connection whenever it likes.)"""
    return dict(after - before)


def settled(before: Counter[str], patience_s: float = 20.0) -> dict[str, int]:
    """What there is more of than before, and stays: a thread that was told to end is gone a little later."""
    deadline = time.monotonic() + patience_s
    while (found := more(before, belongings())) and time.monotonic() < deadline:
        time.sleep(0.05)
    return found


def resident_bytes() -> int:
    """Memory of this process that is not shared. (What `statm` says is off by up to 32 pages per processor.)"""
    rollup = Path("/proc/self/smaps_rollup").read_text()
    return int(rollup.partition("Anonymous:")[2].split()[0]) * 1024


def shared_bytes() -> int:
    """What is committed of the shared memory that is mapped here, by whomever."""
    total, of_memfd = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
            of_memfd = "memfd:moecomm" in line
        elif of_memfd and line.startswith("Rss:"):
            total += int(line.split()[1]) * 1024
    return total


_MALLINFO = ["arena", "ordblks", "smblks", "hblks", "mapped", "usmblks", "fsmblks", "used", "fordblks", "keepcost"]


class _Mallinfo(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in _MALLINFO]


def heap_bytes() -> int:
    """What malloc has handed out, to the byte; 0 where there is no mallinfo2 (glibc 2.33)."""
    mallinfo = getattr(ctypes.CDLL(None), "mallinfo2", None)
    if mallinfo is None:
        return 0
    mallinfo.restype = _Mallinfo
    info = mallinfo()
    return int(info.used + info.mapped)
