"""Machine code that one process has compiled, for all that are forked from the same one: they need the same loops.

The launcher of `moecomm.testing` forks its ranks, hundreds in a run of tests; a loop takes some 30 ms to compile.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import struct
import tempfile
import threading
from collections.abc import Callable, Iterator
from typing import IO, Any

from moecomm._compiled import compiled

__all__ = ["SharedCode", "share"]

_END = struct.Struct("q")  # at the beginning of the file: where the next entry goes
_ENTRY = struct.Struct("q32s")  # before its code: how long that is, and the digest of what was compiled


def share() -> None:
    """From now on this process and what is forked from it compile every loop once; nothing without llvmlite.

    >>> share()
    """
    jit: Any = compiled("moecomm._jit")
    if jit is not None and not isinstance(jit.machine_code, SharedCode):
        jit.machine_code = SharedCode(jit.machine_code)


class SharedCode:
    """Compile what no process has compiled before; all is in a file without a name, which goes with the last of them.

    Ranks come to a loop at the same time: the first compiles it, and the others wait for that.

    >>> shared = SharedCode(lambda text: text.encode())
    >>> shared("a"), shared("b"), shared("a")
    (b'a', b'b', b'a')
    """

    def __init__(self, compile: Callable[[str], bytes]) -> None:
        self._compile, self._known = compile, dict[bytes, tuple[int, int]]()
        self._file: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115  # stays open
        self._read_to = _END.size
        os.pwrite(self._file.fileno(), _END.pack(_END.size), 0)
        self._lock = threading.Lock()  # the one of the file is a process's
        os.register_at_fork(after_in_child=self._renew)

    def _renew(self) -> None:
        self._lock = threading.Lock()

    def __call__(self, text: str) -> bytes:
        """The code of a module."""
        digest, fd = hashlib.sha256(text.encode()).digest(), self._file.fileno()
        with self._locked():
            end = self._catch_up()
            if digest not in self._known:
                code = self._compile(text)
                entry = _ENTRY.pack(len(code), digest) + code
                with contextlib.suppress(OSError):  # where the disk is full everybody compiles for himself
                    if os.pwrite(fd, entry, end) == len(entry):
                        os.pwrite(fd, _END.pack(end + len(entry)), 0)  # who is killed before has written nothing
                return code
        return os.pread(fd, *self._known[digest])

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        with self._lock:
            fcntl.lockf(self._file, fcntl.LOCK_EX)
            try:
                yield
            finally:
                fcntl.lockf(self._file, fcntl.LOCK_UN)

    def _catch_up(self) -> int:
        """Learn what others have added; where the next entry goes."""
        fd = self._file.fileno()
        (end,) = _END.unpack(os.pread(fd, _END.size, 0))
        while self._read_to < end:
            size, digest = _ENTRY.unpack(os.pread(fd, _ENTRY.size, self._read_to))
            self._known[digest] = size, self._read_to + _ENTRY.size
            self._read_to += _ENTRY.size + size
        return int(end)
