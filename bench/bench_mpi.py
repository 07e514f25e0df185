"""The benchmark of dispatch and combine, started by mpiexec: moecomm over MPI, the frameworks' path over gloo.

    mpiexec -n 4 python bench/bench_mpi.py --transport mpi --tokens 16,1024

Everything is as in `bench_dispatch_combine.py`, whose options it takes; only the buffer stands on `MPI.COMM_WORLD`.
torch.distributed is there for the baseline alone.
"""

from __future__ import annotations

import functools
import os
import socket
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import moecomm
from bench import bench_dispatch_combine


def main() -> None:
    """Lend torch.distributed the ranks of MPI, and run."""
    from mpi4py import MPI

    world = MPI.COMM_WORLD
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = world.bcast(probe.getsockname()[1])
    os.environ |= {"RANK": str(world.rank), "WORLD_SIZE": str(world.size), "LOCAL_RANK": str(world.rank)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    if "OMP_NUM_THREADS" not in os.environ:  # as torchrun does
        torch.set_num_threads(1)
    moecomm.Buffer = functools.partial(moecomm.Buffer, world)  # type: ignore[misc,assignment]
    bench_dispatch_combine.main()


if __name__ == "__main__":
    main()
