"""The path that a user would otherwise take: what MoE frameworks do on plain torch.distributed.

Sort the (token, expert) entries by expert, exchange counts, `all_to_all_single` one row per entry, regroup the rows by
expert; on the way back regroup, `all_to_all_single`, unsort, and sum the K weighted rows of each token. The same with
MPI's `Alltoallv`, where there is a communicator.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Routing:
    """What the way back needs: the sort, the splits of both directions, and how rows were regrouped."""

    order: Tensor
    send_splits: list[int]
    recv_splits: list[int]
    chunk_rows: list[int]  # rows of each (source rank, local expert), in order of arrival
    num_experts_here: int
    comm: Any = None


def baseline_dispatch(x_TH: Tensor, topk_idx_TK: Tensor, num_experts: int, comm: Any = None) -> tuple[Tensor, Routing]:
    """Bring rows to their experts: (N, H) grouped by local expert, then source rank, then token. E % W must be 0.

    >>> rows, routing = baseline_dispatch(torch.tensor([[1.0], [2.0]]), torch.tensor([[1], [0]]), 2)
    >>> rows.tolist()
    [[2.0], [1.0]]
    """
    world = comm.size if comm is not None else dist.get_world_size() if dist.is_initialized() else 1
    top_k, here = topk_idx_TK.shape[1], num_experts // world
    experts = topk_idx_TK.reshape(-1)
    order = torch.argsort(experts, stable=True)
    sent = torch.bincount(experts, minlength=num_experts).view(world, here)
    received = sent
    if world > 1:
        received = torch.empty_like(sent)
        if comm is None:
            dist.all_to_all_single(received, sent)
        else:
            comm.Alltoall(sent.numpy(), received.numpy())
    routing = Routing(order, sent.sum(1).tolist(), received.sum(1).tolist(), received.view(-1).tolist(), here, comm)
    rows = x_TH.index_select(0, order // top_k)
    rows = _exchange(rows, routing.recv_splits, routing.send_splits, comm)
    chunks = rows.split(routing.chunk_rows)
    by_expert = [chunks[rank * here + e] for e in range(here) for rank in range(world)]
    return torch.cat(by_expert), routing


def baseline_combine(rows_NH: Tensor, topk_weights_TK: Tensor, routing: Routing) -> Tensor:
    """Bring expert outputs home and sum the K weighted rows of each token, in the dtype of the rows.

    >>> rows, routing = baseline_dispatch(torch.tensor([[1.0], [2.0]]), torch.tensor([[1, 0], [0, 1]]), 2)
    >>> baseline_combine(rows, torch.tensor([[0.5, 0.5], [1.0, 2.0]]), routing).tolist()
    [[1.0], [6.0]]
    """
    here = routing.num_experts_here
    world = len(routing.chunk_rows) // here
    by_expert = [routing.chunk_rows[rank * here + e] for e in range(here) for rank in range(world)]
    chunks = rows_NH.split(by_expert)
    rows = torch.cat([chunks[e * world + rank] for rank in range(world) for e in range(here)])
    rows = _exchange(rows, routing.send_splits, routing.recv_splits, routing.comm)
    return weighted_sum(rows, routing.order, topk_weights_TK)


def weighted_sum(rows: Tensor, order: Tensor, topk_weights_TK: Tensor) -> Tensor:
    """Unsort rows that lie in this order of (token, k), and sum the K weighted ones of each token.

    >>> weighted_sum(torch.tensor([[2.0], [1.0]]), torch.tensor([1, 0]), torch.tensor([[1.0, 3.0]])).tolist()
    [[7.0]]
    """
    unsorted = torch.empty_like(rows).index_copy_(0, order, rows)
    per_token = unsorted.view(*topk_weights_TK.shape, rows.shape[1])
    return (per_token * topk_weights_TK.to(rows.dtype).unsqueeze(-1)).sum(1)


def _exchange(rows: Tensor, recv_splits: list[int], send_splits: list[int], comm: Any) -> Tensor:
    if len(send_splits) == 1:
        return rows
    received = rows.new_empty(sum(recv_splits), rows.shape[1])
    if comm is None and rows.requires_grad and torch.is_grad_enabled():
        from torch.distributed._functional_collectives import all_to_all_single_autograd

        world = dist.group.WORLD
        assert world is not None, "asked for more than one rank"
        return all_to_all_single_autograd(rows, recv_splits, send_splits, world)
    if comm is None:
        dist.all_to_all_single(received, rows, recv_splits, send_splits)
        return received
    from mpi4py import MPI

    row = MPI.BYTE.Create_contiguous(rows.shape[1] * rows.element_size()).Commit()
    out, sent = (tensor.reshape(-1).view(torch.uint8).numpy() for tensor in (received, rows.contiguous()))
    comm.Alltoallv([sent, send_splits, None, row], [out, recv_splits, None, row])
    row.Free()
    return received
