"""Memory of a benchmark: what is free before anything is allocated, and the most that a path used."""

from __future__ import annotations

import contextlib
import resource
from pathlib import Path
from types import TracebackType

import torch

_CGROUP = Path("/sys/fs/cgroup")


def free_bytes(device: torch.device) -> int:
    """Bytes that can still be had on this machine (for all its ranks together) or on this GPU."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    bounds = []
    for line in _lines(Path("/proc/meminfo")):
        if line.startswith("MemAvailable:"):
            bounds.append(1024 * int(line.split()[1]))
    limit, used = _lines(_CGROUP / "memory.max"), _lines(_CGROUP / "memory.current")
    if limit and used and limit[0].isdecimal():
        bounds.append(int(limit[0]) - int(used[0]) + _cached_bytes())
    return min(bounds, default=1 << 62)


def _cached_bytes() -> int:
    """File pages that count against the limit of the control group, but go when memory is wanted."""
    stat = dict(line.split() for line in _lines(_CGROUP / "memory.stat"))
    return int(stat.get("inactive_file", 0))


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except OSError:
        return []


class PeakMemory:
    """The most bytes that this rank had resident (CPU) or allocated (GPU) inside a `with` block.

    >>> with PeakMemory(torch.device("cpu")) as peak:
    ...     big = torch.ones(1 << 20)
    >>> peak.bytes >= 4 << 20
    True
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.bytes = 0

    def __enter__(self) -> PeakMemory:
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
        else:
            with contextlib.suppress(OSError):  # where it is refused, the mark is that of the whole process
                Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._device.type == "cuda":
            self.bytes = int(torch.cuda.max_memory_allocated(self._device))
            return
        marks = [1024 * int(line.split()[1]) for line in _lines(Path("/proc/self/status")) if line.startswith("VmHWM:")]
        self.bytes = marks[0] if marks else 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
