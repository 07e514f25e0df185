"""Two ranks of MPI: one sends the other more bytes in one operation than a C int counts.

mpiexec -n 2 python tests/conformance/_large_payload.py       # 2.2 GB in one operation; takes 7 GB of memory
mpiexec -n 2 python tests/conformance/_large_payload.py 5     # so many rows only; the counts that MPI gets are told
"""

from __future__ import annotations

import sys
import time
from typing import Any

import torch
from mpi4py import MPI

import moecomm

HIDDEN = 1 << 20
TOKENS = int(sys.argv[1]) if len(sys.argv) > 1 else 2100


class Listener:
    """A communicator that remembers how many items of how many bytes it was given to send."""

    def __init__(self, comm: Any) -> None:
        self._comm = comm
        self.sent: list[tuple[int, int]] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._comm, name)

    def Ialltoallv(self, sent: Any, received: Any) -> Any:
        self.sent.append((int(max(sent[1][0])), sent[2].Get_size()))
        return self._comm.Ialltoallv(sent, received)


def main() -> None:
    """Rank 0 sends, rank 1 compares; each says what it saw."""
    torch.set_num_threads(1)
    world = MPI.COMM_WORLD
    sizes: dict[str, Any] = {"num_experts": 2, "hidden": HIDDEN, "top_k": 1, "max_tokens_per_rank": TOKENS}
    with moecomm.Buffer(world, **sizes, dtype=torch.int8, transport="mpi") as buffer:
        x = torch.zeros(TOKENS if world.rank == 0 else 0, HIDDEN, dtype=torch.int8)
        # The number of the row in base 100, at both ends of it.
        digits = torch.stack([torch.arange(len(x)) // 100 + 1, torch.arange(len(x)) % 100 + 1], 1).to(torch.int8)
        x[:, :2] = x[:, -2:] = digits
        transport: Any = buffer._core.transport
        transport.comm = listener = Listener(transport.comm)
        start = time.perf_counter()
        out: Any = buffer.dispatch(x, torch.ones(len(x), 1, dtype=torch.int64), layout="rank")
        took_s = time.perf_counter() - start
    if world.rank == 1:
        row = torch.arange(TOKENS)
        for side in (out.x[:, :2], out.x[:, -2:]):
            assert torch.equal(side[:, 0].long() - 1, row // 100) and torch.equal(side[:, 1].long() - 1, row % 100)
        assert not out.x[:, 2:-2].any(), "something else arrived"
        print(f"{out.x.numel()} bytes arrived in {took_s:.2f} s", flush=True)
    else:
        print(f"{listener.sent[0][0]} items of {listener.sent[0][1]} bytes were sent", flush=True)


if __name__ == "__main__":
    main()
