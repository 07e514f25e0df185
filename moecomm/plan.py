"""Planning: who sends which row where. Pure functions of the routing; no communication.

Shape suffixes: T tokens, K top-k, W ranks, E experts in flat order (sorted by (rank, local id)), S sent (token, k)
entries, P pairs received, Q pairs sent. A *pair* is a (token, destination rank): one row in layout "rank".
Counts are small and live on the host (numpy); per-token tables live on the device of the routing (torch).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moecomm._compiled import compiled
from moecomm.errors import CapacityError
from moecomm.placement import ExpertPlacement


@dataclass(frozen=True)
class PlacementTables:
    """An `ExpertPlacement` as look-up tables; index -1 (no expert) hits the sentinel in the last entry."""

    placement: ExpertPlacement
    device: torch.device
    flat_of_expert: Tensor = field(init=False)  # (E + 1,) int64: global id -> flat id, sentinel E
    rank_of_flat: Tensor = field(init=False)  # (E + 1,) int64, sentinel W
    local_of_flat: Tensor = field(init=False)  # (E + 1,) int32, sentinel -1
    rank_starts: np.ndarray = field(init=False)  # (W + 1,) int64: first flat id of every rank
    rank_starts_at: int = field(init=False)  # their address

    def __post_init__(self) -> None:
        held = self.placement.experts_of_rank
        flat_of = np.empty(self.placement.num_experts + 1, np.int64)
        flat_of[np.asarray(self.placement.flat_experts, np.int64)] = np.arange(self.placement.num_experts)
        flat_of[-1] = self.placement.num_experts
        rank_of = [rank for rank, experts in enumerate(held) for _ in experts] + [len(held)]
        local_of = [i for experts in held for i, _ in enumerate(experts)] + [-1]
        object.__setattr__(self, "flat_of_expert", torch.from_numpy(flat_of).to(self.device))
        object.__setattr__(self, "rank_of_flat", torch.tensor(rank_of, dtype=torch.int64, device=self.device))
        object.__setattr__(self, "local_of_flat", torch.tensor(local_of, dtype=torch.int32, device=self.device))
        starts = np.cumsum([0] + [len(experts) for experts in held], dtype=np.int64)
        object.__setattr__(self, "rank_starts", starts)
        object.__setattr__(self, "rank_starts_at", int(starts.ctypes.data))

    def rank_of_expert(self, topk_idx: Tensor) -> Tensor:
        """int64 rank that holds each global expert id, W for -1."""
        return self.rank_of_flat[self.flat_of_expert[topk_idx.long()]]


@dataclass(eq=False)
class SendPlan:
    """What this rank sends, from its own routing alone.

    counts: (E + W,) int32 on the host: entries per flat expert, then pairs per destination rank.
    flat_TK: (T, K) int64 flat expert of every entry, E for none.
    order_S: (S,) int64 entries `t * K + k` sorted by (destination rank, local expert, token, k).
    pos_TK: (T, K) int32 position of every entry in `order_S`, -1 for none.
    rank_TK: (T, K) int64 destination rank of every entry, W for none.
    pair_tokens_Q, pair_ranks_Q: (Q,) int64 token and destination of every pair, sorted by (destination, token).
    pair_pos_TW: (T, W) int32 position of pair (t, w) in that order, -1 for none.
    """

    counts: np.ndarray
    flat_TK: Tensor
    order_S: Tensor
    pos_TK: Tensor
    rank_TK: Tensor
    pair_tokens_Q: Tensor
    pair_ranks_Q: Tensor
    pair_pos_TW: Tensor


def first_bad_entry(topk_idx_TK: Tensor, num_experts: int) -> int | None:
    """The first entry `t * K + k` of a routing that is neither an expert nor -1.

    >>> first_bad_entry(torch.tensor([[0, -1], [2, 1]]), 2)
    2
    """
    jit = _jit() if topk_idx_TK.is_cpu and topk_idx_TK.is_contiguous() else None
    if jit is not None:
        check = jit.range_kernel(8 * topk_idx_TK.element_size())
        bad = check(topk_idx_TK.numel(), topk_idx_TK.data_ptr(), num_experts)
        return None if bad < 0 else bad
    wrong = ((topk_idx_TK < -1) | (topk_idx_TK >= num_experts)).reshape(-1)
    return int(wrong.nonzero()[0]) if bool(wrong.any()) else None


def plan_send(topk_idx_TK: Tensor, tables: PlacementTables) -> SendPlan:
    """Sort the entries of a routing by destination.

    topk_idx_TK: (T, K) int32 or int64 global expert ids, -1 for none; ids must be valid.

    >>> tables = PlacementTables(ExpertPlacement.uniform(4, 2), torch.device("cpu"))
    >>> plan = plan_send(torch.tensor([[3, 0], [0, 1]]), tables)
    >>> plan.counts.tolist()  # experts 0..3, then pairs for ranks 0 and 1
    [2, 1, 0, 1, 2, 1]
    >>> plan.order_S.tolist(), plan.pair_tokens_Q.tolist(), plan.pair_pos_TW.tolist()
    ([1, 2, 3, 0], [0, 1, 0], [[0, 2], [1, -1]])
    """
    jit = _jit() if topk_idx_TK.is_cpu else None
    if jit is None or not topk_idx_TK.is_contiguous():
        return plan_send_ref(topk_idx_TK, tables)
    (num_tokens, top_k), num_ranks = topk_idx_TK.shape, tables.placement.num_ranks
    num_experts, most_pairs = tables.placement.num_experts, num_tokens * min(top_k, num_ranks)
    longs: dict[str, Any] = {"dtype": torch.int64, "device": "cpu"}  # whatever the default device is
    ints: dict[str, Any] = {"dtype": torch.int32, "device": "cpu"}
    counts, scratch = np.empty(num_experts + num_ranks, np.int32), torch.empty(num_experts + num_ranks + 2, **longs)
    flat_TK, rank_TK = (torch.empty(num_tokens, top_k, **longs) for _ in range(2))
    pos_TK, pair_pos_TW = (torch.empty(num_tokens, n, **ints) for n in (top_k, num_ranks))
    order, pair_tokens, pair_ranks = (torch.empty(n, **longs) for n in (num_tokens * top_k, most_pairs, most_pairs))
    given = topk_idx_TK, tables.flat_of_expert, tables.rank_of_flat
    made = (flat_TK, rank_TK, order, pos_TK, pair_tokens, pair_ranks, pair_pos_TW, scratch)
    bad = jit.plan_kernel(8 * topk_idx_TK.element_size())(
        num_tokens,
        top_k,
        num_experts,
        num_ranks,
        *(t.data_ptr() for t in given),
        counts.ctypes.data,
        *(t.data_ptr() for t in made),
    )
    assert bad < 0, f"entry {bad} of the routing names no expert"
    num_sent, num_pairs = scratch[-2:].tolist()
    return SendPlan(
        counts=counts,
        flat_TK=flat_TK,
        order_S=_first(order, num_sent),
        pos_TK=pos_TK,
        rank_TK=rank_TK,
        pair_tokens_Q=_first(pair_tokens, num_pairs),
        pair_ranks_Q=_first(pair_ranks, num_pairs),
        pair_pos_TW=pair_pos_TW,
    )


def _jit() -> ModuleType | None:
    return compiled("moecomm._plan_jit")


def _first(values: Tensor, count: int) -> Tensor:
    return values if len(values) == count else values[:count].clone()


def plan_send_ref(topk_idx_TK: Tensor, tables: PlacementTables) -> SendPlan:
    """`plan_send` in plain torch."""
    num_tokens, top_k = topk_idx_TK.shape
    num_experts, num_ranks = tables.placement.num_experts, tables.placement.num_ranks
    device = topk_idx_TK.device
    flat_TK = tables.flat_of_expert[topk_idx_TK.long()]
    order = torch.sort(flat_TK.view(-1), stable=True).indices
    expert_counts = torch.bincount(flat_TK.view(-1), minlength=num_experts + 1)[:num_experts]
    rank_TK = tables.rank_of_flat[flat_TK]
    has_TW = torch.zeros(num_tokens, num_ranks + 1, dtype=torch.bool, device=device)
    has_TW.scatter_(1, rank_TK, True)
    has_WT = has_TW[:, :num_ranks].t().contiguous()
    pairs = has_WT.nonzero()
    counts = torch.cat([expert_counts, has_WT.sum(1)]).to("cpu", torch.int32).numpy()
    num_sent = int(counts[:num_experts].sum())
    order_S = order[:num_sent].clone()
    pos_TK = torch.full((num_tokens * top_k,), -1, dtype=torch.int32, device=device)
    pos_TK[order_S] = torch.arange(num_sent, dtype=torch.int32, device=device)
    pair_pos_WT = torch.full((num_ranks, num_tokens), -1, dtype=torch.int32, device=device)
    pair_pos_WT[has_WT] = torch.arange(len(pairs), dtype=torch.int32, device=device)
    return SendPlan(
        counts=counts,
        flat_TK=flat_TK,
        order_S=order_S,
        pos_TK=pos_TK.view(num_tokens, top_k),
        rank_TK=rank_TK,
        pair_tokens_Q=pairs[:, 1].clone(),
        pair_ranks_Q=pairs[:, 0],
        pair_pos_TW=pair_pos_WT.t().contiguous(),
    )


@dataclass(eq=False)
class Counts:
    """The counts of all ranks and what follows from them; the same on every rank but for `rank`.

    expert_counts: (W, E) int32 entries that each source rank sends to each flat expert.
    pair_counts: (W, W) int32 pairs from each source rank to each destination rank.
    """

    expert_counts: np.ndarray
    pair_counts: np.ndarray
    rank_starts: np.ndarray
    rank: int
    align: int

    @classmethod
    def of(cls, gathered: np.ndarray, tables: PlacementTables, rank: int, align: int) -> Counts:
        """Split the gathered (W, E + W) count rows."""
        num_experts = tables.placement.num_experts
        return cls(gathered[:, :num_experts], gathered[:, num_experts:], tables.rank_starts, rank, align)

    @cached_property
    def mine(self) -> slice:
        """My experts in flat order."""
        return slice(int(self.rank_starts[self.rank]), int(self.rank_starts[self.rank + 1]))

    @cached_property
    def padded(self) -> np.ndarray:
        """(E,) rows of every expert group: padded to `align`, or -align."""
        totals = self.expert_counts.sum(0, dtype=np.int64)
        if self.align < 0:
            return np.full_like(totals, -self.align)
        return totals if self.align == 1 else -(-totals // self.align) * self.align

    @cached_property
    def group_starts(self) -> np.ndarray:
        """(E,) first row of every expert group in its rank's output."""
        ends = np.concatenate([[0], np.cumsum(self.padded)])
        return ends[:-1] - np.repeat(ends[self.rank_starts[:-1]], np.diff(self.rank_starts))

    @cached_property
    def run_starts(self) -> np.ndarray:
        """(W, E) first row of the run of each source rank in each expert group."""
        before = np.cumsum(self.expert_counts, 0, dtype=np.int64) - self.expert_counts
        return before + self.group_starts

    @cached_property
    def rows_of_rank(self) -> np.ndarray:
        """(W,) rows in layout "expert" that every rank receives, padding included."""
        ends = np.concatenate([[0], np.cumsum(self.padded)])
        return np.diff(ends[self.rank_starts])

    @cached_property
    def entries(self) -> np.ndarray:
        """(W, W) entries from each source rank to each destination rank."""
        ends = np.zeros((self.expert_counts.shape[0], self.expert_counts.shape[1] + 1), np.int64)
        np.cumsum(self.expert_counts, 1, out=ends[:, 1:])
        return np.diff(ends[:, self.rank_starts], axis=1)

    @cached_property
    def tokens_per_expert(self) -> np.ndarray:
        """(L,) int32 rows of my experts without padding."""
        return self.expert_counts[:, self.mine].sum(0, dtype=np.int32)

    @cached_property
    def expert_offsets(self) -> np.ndarray:
        """(L,) int32 end of each of my padded groups."""
        return np.cumsum(self.padded[self.mine]).astype(np.int32)

    def padding_rows(self) -> np.ndarray:
        """Rows of my output that no rank writes and that are to be zero."""
        if self.align == 1 or self.align < 0:
            return np.empty(0, np.int64)
        ends = self.group_starts[self.mine] + self.padded[self.mine]
        runs = [np.arange(end - pad, end) for end, pad in zip(ends, self._padding(), strict=True) if pad]
        return np.concatenate(runs) if runs else np.empty(0, np.int64)

    def _padding(self) -> np.ndarray:
        return self.padded[self.mine] - self.tokens_per_expert

    def recv_slots(self) -> np.ndarray:
        """Row of every entry that I receive, sorted by (source rank, local expert, token, k).

        >>> tables = PlacementTables(ExpertPlacement.uniform(2, 1), torch.device("cpu"))
        >>> counts = Counts.of(np.array([[2, 1, 2]], np.int32), tables, rank=0, align=4)
        >>> counts.recv_slots().tolist(), counts.padding_rows().tolist(), counts.expert_offsets.tolist()
        ([0, 1, 4], [2, 3, 5, 6, 7], [4, 8])
        """
        runs = self.expert_counts[:, self.mine].ravel()
        starts = self.run_starts[:, self.mine].ravel()
        before = np.cumsum(runs, dtype=np.int64) - runs
        return np.repeat(starts - before, runs) + np.arange(int(runs.sum()))


def send_slots(plan: SendPlan, counts: Counts) -> Tensor:
    """(S,) int32 row of every sent entry in its destination's output, in the order of `plan.order_S`."""
    mine = counts.expert_counts[counts.rank]
    shift = counts.run_starts[counts.rank] - (np.cumsum(mine, dtype=np.int64) - mine)
    slots = np.repeat(shift, mine) + np.arange(len(plan.order_S))
    return torch.from_numpy(slots.astype(np.int32)).to(plan.order_S.device)


def pair_table(plan: SendPlan, value_TK: Tensor, missing: float) -> Tensor:
    """(Q, K) `value_TK` of the entries that go to the pair's rank, `missing` elsewhere.

    >>> tables = PlacementTables(ExpertPlacement.uniform(4, 2), torch.device("cpu"))
    >>> plan = plan_send(torch.tensor([[3, 0], [0, 1]]), tables)
    >>> pair_table(plan, tables.local_of_flat[plan.flat_TK], -1).tolist()
    [[-1, 0], [0, 1], [1, -1]]
    """
    here = plan.rank_TK[plan.pair_tokens_Q] == plan.pair_ranks_Q[:, None]
    return value_TK[plan.pair_tokens_Q].masked_fill_(~here, missing)


def settle(
    plan: SendPlan, gathered: np.ndarray, tables: PlacementTables, rank: int, align: int, *, by_slot: bool
) -> tuple[Counts, Tensor | None, Tensor]:
    """What follows from the counts of all ranks: they, the slots of what this rank sends, and the table of its pairs.

    gathered: (W, E + W) int32, `plan.counts` of every rank. by_slot: layout "expert", which has slots; the table then
    holds them, else local experts; -1 for entries that go elsewhere.

    >>> tables = PlacementTables(ExpertPlacement.uniform(2, 1), torch.device("cpu"))
    >>> plan = plan_send(torch.tensor([[1, 0], [0, -1]]), tables)
    >>> _, slots_S, table_QK = settle(plan, plan.counts[None], tables, rank=0, align=4, by_slot=True)
    >>> slots_S.tolist(), table_QK.tolist()
    ([0, 1, 4], [[4, 0], [1, -1]])
    """
    counts = Counts.of(gathered, tables, rank, align)
    if align < 0 and (most := int(counts.expert_counts.sum(0).max())) > -align:  # known to all ranks
        what, remedy = "more rows came for an expert than its group takes", "make groups larger"
        raise CapacityError(what, got=most, expected=f"at most {-align}", remedy=remedy, rank=rank)
    jit = _jit() if plan.pos_TK.is_cpu else None
    if jit is None:
        slots_S = send_slots(plan, counts) if by_slot else None
        values_TK = tables.local_of_flat[plan.flat_TK] if slots_S is None else slots_of_entries(plan, slots_S)
        return counts, slots_S, pair_table(plan, values_TK, -1)
    gathered = np.ascontiguousarray(gathered, np.int32)
    num_ranks, num_pairs, top_k = len(gathered), len(plan.pair_tokens_Q), plan.pos_TK.shape[1]
    block = np.empty((num_ranks + 1) * num_ranks + counts.mine.stop - counts.mine.start, np.int64)
    totals = block[: (num_ranks + 1) * num_ranks].reshape(-1, num_ranks)  # entries, then rows of every rank
    groups = block[totals.size :].view(np.int32).reshape(2, -1)  # ends of my groups, then their rows without padding
    slots_S, table_QK = (
        torch.empty(n, dtype=torch.int32, device="cpu") for n in (len(plan.order_S), num_pairs * top_k)
    )
    given = gathered.ctypes.data, num_ranks, tables.placement.num_experts, rank, align, tables.rank_starts_at
    jit.settle_kernel()(*given, block.ctypes.data, slots_S.data_ptr())
    by_entry, values = (plan.pos_TK, slots_S) if by_slot else (plan.flat_TK, tables.local_of_flat)
    tensors = plan.pair_tokens_Q, plan.pair_ranks_Q, plan.rank_TK, by_entry, values, table_QK
    jit.table_kernel(8 * by_entry.element_size())(num_pairs, top_k, *(t.data_ptr() for t in tensors))
    known = {"entries": totals[:-1], "rows_of_rank": totals[-1], "expert_offsets": groups[0]}
    vars(counts).update(known | {"tokens_per_expert": groups[1]})  # what its properties would compute
    return counts, slots_S if by_slot else None, table_QK.view(num_pairs, top_k)


def slots_of_entries(plan: SendPlan, slots_S: Tensor) -> Tensor:
    """(T, K) int32 the slot of every entry, -1 for none."""
    slot_TK = torch.full_like(plan.pos_TK, -1)
    slot_TK.view(-1)[plan.order_S] = slots_S
    return slot_TK


def node_places(pair_pos_TW: Tensor, node_of_rank: np.ndarray) -> tuple[Tensor, np.ndarray]:
    """Number the (token, node) that have a pair: per node in ascending token order.

    V: nodes. Gives (T, V) int32 place of the token among those with a pair on that node, -1 for none; and (V,) int64
    how many there are.

    >>> places_TV, counts_V = node_places(torch.tensor([[0, -1, 3], [1, 2, -1]]), np.array([0, 0, 1]))
    >>> places_TV.tolist(), counts_V.tolist()
    ([[0, 0], [1, -1]], [2, 1])
    """
    num_tokens, num_nodes = pair_pos_TW.shape[0], int(node_of_rank.max()) + 1
    node_W = torch.from_numpy(node_of_rank).to(pair_pos_TW.device)
    hits_TV = torch.zeros(num_tokens, num_nodes, dtype=torch.int32, device=pair_pos_TW.device)
    has_TV = hits_TV.index_add_(1, node_W, (pair_pos_TW >= 0).int()) > 0
    places_TV = (has_TV.cumsum(0, dtype=torch.int32) - 1).masked_fill_(~has_TV, -1)
    return places_TV, has_TV.sum(0).cpu().numpy()


def merge_keys(plan: SendPlan, places_TV: Tensor, node_of_rank: np.ndarray) -> Tensor:
    """(Q,) int32 place of each pair's token among those that this rank sends to the pair's node, see `node_places`.

    >>> tables = PlacementTables(ExpertPlacement.uniform(4, 2), torch.device("cpu"))
    >>> plan = plan_send(torch.tensor([[3, 0], [0, 1]]), tables)
    >>> places_TV, _ = node_places(plan.pair_pos_TW, node_of_rank := np.array([0, 0]))
    >>> plan.pair_ranks_Q.tolist(), merge_keys(plan, places_TV, node_of_rank).tolist()
    ([0, 0, 1], [0, 1, 0])
    """
    node_W = torch.from_numpy(node_of_rank).to(places_TV.device)
    return places_TV[plan.pair_tokens_Q, node_W[plan.pair_ranks_Q]]


def node_counts(moved_WW: np.ndarray, rows_WV: np.ndarray, node_of_rank: np.ndarray) -> np.ndarray:
    """(W, 2 V) rows from each rank to each node if each goes once, then all that go from each rank to each node.

    >>> node_counts(np.array([[1, 2], [3, 4]]), np.array([[2], [5]]), np.array([0, 0])).tolist()
    [[2, 3], [5, 7]]
    """
    is_on_WV = node_of_rank[:, None] == np.arange(rows_WV.shape[1])
    return np.concatenate([rows_WV, moved_WW @ is_on_WV], 1)
