"""`Buffer`: DeepEP's first API, normal and low-latency modes, on `moecomm.Buffer`.

Rows travel in layout "rank": one per token and destination rank, with the token's number, choices, weights and scales
beside it. The routing is that of `is_token_in_rank`, as there; expert ids are only carried along.

Legend: T tokens, H hidden, K top-k, E experts, R ranks, L experts of this rank, N rows received.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moecomm.deep_ep import config as configs
from moecomm.deep_ep.config import Config
from moecomm.deep_ep.events import EventHandle, EventOverlap, begin_after, finished
from moecomm.deep_ep.handles import LazyTuple, Route, bits_of, internode_handle, nodes_of, normal_handle
from moecomm.deep_ep.low_latency import LowLatencyMode
from moecomm.deep_ep.parcels import Arrived, Parcel, at_least, checked_ids, experts_of, padded_sums, summed_bias
from moecomm.deep_ep.refusals import FLOATS, INDEX_DTYPES, demand, demand_count, demand_streams, demand_tensor
from moecomm.deep_ep.wire import Space, Wire
from moecomm.placement import ExpertPlacement
from moecomm.plan import PlacementTables, plan_send

_NO_EFFECT = ("use_fabric", "num_nvl_peers")  # what forks of DeepEP take


class Buffer(LowLatencyMode):
    """Dispatch and combine as DeepEP's first API has them; any number of ranks, on the CPU or an accelerator.

    Args:
        group: torch.distributed ProcessGroup; None with `comm`, or for the default group or a single rank.
        num_nvl_bytes, num_rdma_bytes: multiples of 128; where memory is that of an accelerator, they say how many
            tokens of a rank there is room for, elsewhere they have no effect.
        low_latency_mode: kept; both modes work either way.
        explicitly_destroy: whether `destroy` will be called.
        enable_shrink: keep a mask of ranks that low-latency operations leave out.
        comm: mpi4py communicator instead of group.
        num_qps_per_rank, allow_nvlink_for_low_latency_mode, allow_mnnvl, use_fabric: no effect.
        num_nvl_peers: how many consecutive ranks form a node; 8.

    Raises:
        ConfigError: a wrong argument.

    >>> buffer = Buffer()
    >>> idx = torch.tensor([[0, 3], [1, -1]])
    >>> per_rank, _, per_expert, in_rank, _ = buffer.get_dispatch_layout(idx, 4)
    >>> x, chosen = torch.ones(2, 8), (idx, torch.ones(2, 2))
    >>> recv_x, recv_idx, recv_weights, counts, handle, _ = buffer.dispatch(
    ...     x, None, per_rank, None, in_rank, per_expert, *chosen
    ... )
    >>> counts, torch.equal(buffer.combine(recv_x, handle)[0], x)
    ([1, 1, 0, 1], True)
    """

    num_sms: int = 20

    def __init__(
        self,
        group: Any = None,
        num_nvl_bytes: int = 0,
        num_rdma_bytes: int = 0,
        low_latency_mode: bool = False,
        num_qps_per_rank: int = 24,
        allow_nvlink_for_low_latency_mode: bool = True,
        allow_mnnvl: bool = False,
        explicitly_destroy: bool = False,
        enable_shrink: bool = False,
        comm: Any = None,
        *,
        use_fabric: bool = False,
        num_nvl_peers: int = configs.NVL_PEERS,
    ) -> None:
        demand(group is None or comm is None, "group and comm are given", got="both", expected="one of them")
        for name, value in (("num_nvl_bytes", num_nvl_bytes), ("num_rdma_bytes", num_rdma_bytes)):
            expected = "a multiple of 128"
            demand(
                isinstance(value, int) and value >= 0 and not value % 128,
                f"{name} is wrong",
                got=value,
                expected=expected,
            )
        demand_count("num_nvl_peers", num_nvl_peers)
        self.group = group
        self.num_nvl_bytes, self.num_rdma_bytes = num_nvl_bytes, num_rdma_bytes
        self.low_latency_mode, self.explicitly_destroy = low_latency_mode, explicitly_destroy
        self._wire = Wire(comm if group is None else group, max(num_nvl_bytes, num_rdma_bytes))
        self.rank, self.group_size = self._wire.group.rank, self._wire.group.size
        self._ranks_per_node = num_nvl_peers
        self._tables: dict[tuple[int, torch.device], PlacementTables] = {}
        self._raw: dict[bool, Tensor] = {}
        self._start_low_latency(enable_shrink)

    # -- what there is -------------------------------------------------------------------------------------------

    @staticmethod
    def is_sm90_compiled() -> bool:
        """Whether rows may be quantised: always."""
        return True

    @staticmethod
    def set_num_sms(new_num_sms: int) -> None:
        """Set `Buffer.num_sms`, an even number; it counts the channels of a handle and has no other effect."""
        even = isinstance(new_num_sms, int) and new_num_sms > 0 and not new_num_sms % 2
        demand(even, "num_sms is wrong", got=repr(new_num_sms), expected="an even number")
        Buffer.num_sms = new_num_sms

    @staticmethod
    def capture() -> EventOverlap:
        """An event on the current stream."""
        return EventOverlap(EventHandle())

    @staticmethod
    def get_low_latency_rdma_size_hint(
        num_max_dispatch_tokens_per_rank: int, hidden: int, num_ranks: int, num_experts: int
    ) -> int:
        """Bytes that DeepEP's low-latency mode needs."""
        return configs.low_latency_size_hint(num_max_dispatch_tokens_per_rank, hidden, num_experts)

    @staticmethod
    def get_dispatch_config(num_ranks: int) -> Config:
        """DeepEP's choice for that number of ranks, or for the next one that it has."""
        return configs.preset(configs.DISPATCH, num_ranks, Buffer.num_sms)

    @staticmethod
    def get_combine_config(num_ranks: int) -> Config:
        """DeepEP's choice for that number of ranks, or for the next one that it has."""
        return configs.preset(configs.COMBINE, num_ranks, Buffer.num_sms)

    def get_comm_stream(self) -> Any:
        """The stream on which rows move: the current one."""
        accelerator = torch.accelerator.current_accelerator()
        return torch.cpu.current_stream() if accelerator is None else torch.accelerator.current_stream()

    def get_local_buffer_tensor(
        self, dtype: torch.dtype, size: torch.Size | None = None, offset: int = 0, use_rdma_buffer: bool = False
    ) -> Tensor:
        """A view of num_rdma_bytes or num_nvl_bytes that belong to the caller: no row travels through them.

        offset: in elements. size: shape; None: all that follows.
        """
        num_bytes = self.num_rdma_bytes if use_rdma_buffer else self.num_nvl_bytes
        if use_rdma_buffer not in self._raw:
            device = torch.accelerator.current_accelerator() or torch.device("cpu")
            zeros = np.zeros(num_bytes, np.uint8)  # pages that nobody writes to cost nothing
            self._raw[use_rdma_buffer] = torch.from_numpy(zeros).to(device)
        flat = self._raw[use_rdma_buffer][: num_bytes // dtype.itemsize * dtype.itemsize].view(dtype)[offset:]
        if size is None:
            return flat
        count = torch.Size(size).numel()
        demand(count <= flat.numel(), "size is too large", got=tuple(size), expected=f"at most {flat.numel()} elements")
        return flat[:count].view(size)

    def destroy(self) -> None:
        """Free everything; waits for nobody."""
        what = "destroy() needs a buffer that was made for it"
        demand(self.explicitly_destroy, what, got="explicitly_destroy=False", expected="explicitly_destroy=True")
        self._wire.close()

    # -- normal mode ---------------------------------------------------------------------------------------------

    @torch.no_grad()
    def get_dispatch_layout(
        self,
        topk_idx: Tensor,
        num_experts: int,
        previous_event: EventOverlap | None = None,
        async_finish: bool = False,
        allocate_on_comm_stream: bool = False,
    ) -> tuple[Tensor, Tensor | None, Tensor, Tensor, EventOverlap]:
        """Count where tokens go; no communication.

        topk_idx: (T, K) global expert ids, -1 for none. Gives (R,) int32 tokens per rank; (nodes,) int32 tokens per
        node, None where there is one; (E,) int32 choices per expert; (T, R) bool; and an event.
        """
        demand_streams(previous_event, async_finish, allocate_on_comm_stream)
        demand_count("num_experts", num_experts)
        idx = checked_ids(demand_tensor("topk_idx", topk_idx, None, None, dtypes=INDEX_DTYPES), num_experts)
        begin_after(previous_event)
        key = num_experts, idx.device
        if key not in self._tables:
            self._tables[key] = PlacementTables(ExpertPlacement.uniform(num_experts, self.group_size), idx.device)
        plan = plan_send(idx, self._tables[key])
        per_expert, per_rank = torch.from_numpy(plan.counts).to(idx.device).split([num_experts, self.group_size])
        in_rank, per_node = plan.pair_pos_TW >= 0, None
        if self.group_size > self._ranks_per_node:
            per_node = nodes_of(in_rank, self._ranks_per_node).sum(0, dtype=torch.int32)
        return per_rank, per_node, per_expert, in_rank, finished(async_finish)

    @torch.no_grad()
    def dispatch(
        self,
        x: Tensor | tuple[Tensor, Tensor],
        handle: LazyTuple | None = None,
        num_tokens_per_rank: Tensor | None = None,
        num_tokens_per_rdma_rank: Tensor | None = None,
        is_token_in_rank: Tensor | None = None,
        num_tokens_per_expert: Tensor | None = None,
        topk_idx: Tensor | None = None,
        topk_weights: Tensor | None = None,
        expert_alignment: int = 1,
        num_worst_tokens: int = 0,
        config: Config | None = None,
        previous_event: EventOverlap | None = None,
        async_finish: bool = False,
        allocate_on_comm_stream: bool = False,
    ) -> tuple[Any, Tensor | None, Tensor | None, list[int] | None, LazyTuple | None, EventOverlap]:
        """Send every token to the ranks of its experts. Collective.

        Args:
            x: (T, H) rows of any dtype, or ((T, H) rows, (T, S) scales of 4 bytes with any strides).
            handle: replay the routing of an earlier dispatch; everything about the routing is then left out.
            is_token_in_rank, num_tokens_per_expert, num_tokens_per_rank: as `get_dispatch_layout` gave them.
            topk_idx, topk_weights: (T, K) to send along, both or neither (which costs a message about the counts).
            expert_alignment: what the counts are rounded up to; the rows are not.
            num_worst_tokens: rows of the result, where N is not to be known on the host; 0: N rows.
            num_tokens_per_rdma_rank, config: no effect, but for the number of channels in a handle.
            previous_event, async_finish, allocate_on_comm_stream: the order on streams, where there are any.

        Returns:
            rows or (rows, scales), sorted by (source rank, token); (N, K) local expert ids, -1 elsewhere; (N, K)
            weights, 0 elsewhere; rows per local expert, [] with num_worst_tokens; the handle; an event. With a
            handle: the rows, four None, an event.

        Raises:
            ConfigError: a wrong argument; nothing was sent. Others as `moecomm.Buffer.dispatch`.
        """
        demand_streams(previous_event, async_finish, allocate_on_comm_stream)
        if handle is not None:
            demand(
                topk_idx is None and topk_weights is None,
                "a handle replays its routing",
                got="topk_idx or topk_weights too",
                expected="handle alone",
            )
            parcel = Parcel.of(x)
            route = self._route(handle)
            begin_after(previous_event)
            return (self._replay(parcel, route), None, None, None, None, finished(async_finish))
        demand(
            (topk_idx is None) == (topk_weights is None),
            "topk_idx and topk_weights belong together",
            got="one of them",
            expected="both or neither",
        )
        channels = (self.num_sms if config is None else config.num_sms) // 2
        parcel = Parcel.of(x, topk_idx, topk_weights, num_channels=max(1, channels))
        demand_tensor("num_tokens_per_rank", num_tokens_per_rank, self.group_size)
        per_expert = demand_tensor("num_tokens_per_expert", num_tokens_per_expert, None)
        in_rank = demand_tensor(
            "is_token_in_rank", is_token_in_rank, len(parcel.x), self.group_size, dtypes=(torch.bool,)
        )
        demand_count("expert_alignment", expert_alignment)
        demand(
            not num_worst_tokens or topk_idx is not None,
            "num_worst_tokens needs topk_idx",
            got="None",
            expected="topk_idx and topk_weights",
        )
        if self.group_size > self._ranks_per_node:
            parcel = replace(parcel, bits=bits_of(in_rank, self._ranks_per_node))
        begin_after(previous_event)
        space = Space(num_experts=self.group_size, top_k=self.group_size)
        ranks = torch.arange(self.group_size, dtype=torch.int32, device=in_rank.device)
        out = self._wire.dispatch(
            space, parcel.x, parcel.beside(), torch.where(in_rank, ranks, -1), None, layout="rank"
        )
        rows, arrived = out.x[0], parcel.unpack(out.x[1])
        worst = num_worst_tokens or None
        recv_x = (
            at_least(rows, worst)
            if arrived.scales is None
            else (at_least(rows, worst), at_least(arrived.scales, worst))
        )
        route = Route(space, out.handle, self.rank, arrived.origin, in_rank, parcel.num_channels, worst or len(rows))
        made = (
            normal_handle(route)
            if self.group_size <= self._ranks_per_node
            else internode_handle(route, self._ranks_per_node)
        )
        idx, weights, counts = self._choices(arrived, per_expert, expert_alignment, worst, topk_idx)
        return recv_x, idx, weights, counts, made, finished(async_finish)

    @torch.no_grad()
    def combine(
        self,
        x: Tensor,
        handle: LazyTuple,
        topk_weights: Tensor | None = None,
        bias: Tensor | tuple[Tensor, Tensor] | None = None,
        config: Config | None = None,
        previous_event: EventOverlap | None = None,
        async_finish: bool = False,
        allocate_on_comm_stream: bool = False,
    ) -> tuple[Tensor, Tensor | None, EventOverlap]:
        """Lead rows home and sum them as they are: bias, then ranks in ascending order, in float32, rounded once.

        Args:
            x: (N, H) rows as dispatch gave them, float32, float16 or bfloat16.
            handle: of that dispatch.
            topk_weights: (N, K) float32, summed over ranks likewise; None for none.
            bias: one or two of (T, H), added first.
            config: no effect.
            previous_event, async_finish, allocate_on_comm_stream: as `dispatch`.

        Returns:
            (T, H) sums, (T, K) sums of topk_weights or None, an event.
        """
        demand_streams(previous_event, async_finish, allocate_on_comm_stream)
        route = self._route(handle)
        rows = self._rows("x", x, route)
        added = summed_bias(bias, len(route.given), x.shape[1])
        weights = None if topk_weights is None else self._rows("topk_weights", topk_weights.float(), route)
        begin_after(previous_event)
        combined = self._wire.combine(route.space, rows, route.handle, bias=added)
        summed = None if weights is None else self._wire.combine(route.space, weights, route.handle)
        if not route.combined:
            route.combined = True
            handle.refresh(len(handle) - 1 if len(handle) == 6 else len(handle) - 2)
        return combined, summed, finished(async_finish)

    def internode_dispatch(self, *args: Any, **kwargs: Any) -> Any:
        """`dispatch`, which goes over several nodes by itself."""
        return self.dispatch(*args, **kwargs)

    def internode_combine(self, *args: Any, **kwargs: Any) -> Any:
        """`combine`, which goes over several nodes by itself."""
        return self.combine(*args, **kwargs)

    def _choices(
        self, arrived: Arrived, per_expert: Tensor, align: int, worst: int | None, topk_idx: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None, list[int]]:
        """Local ids, weights, aligned counts of what arrived; without choices ranks tell each other the counts."""
        first, num_local = experts_of(len(per_expert), self.group_size, self.rank)
        if topk_idx is None:
            told = self._wire.told(per_expert.int())[:, first : first + num_local].sum(0)
            return None, None, padded_sums(told.tolist(), align)[0]
        local, here = arrived.localise(first, num_local)
        assert arrived.topk_weights is not None
        weights = torch.where(local < 0, 0.0, arrived.topk_weights)
        if worst is None:
            return local.to(topk_idx.dtype), weights, padded_sums(here.tolist(), align)[0]
        idx, weights = at_least(local, worst).to(topk_idx.dtype), at_least(weights, worst)
        idx[len(local) :], weights[len(local) :] = -1, 0
        return idx, weights, []

    def _replay(self, parcel: Parcel, route: Route) -> Any:
        """Send rows along a route; in as many rows as its dispatch gave."""
        num_tokens = len(route.given)
        demand(
            len(parcel.x) == num_tokens, "x does not fit the handle", got=f"{len(parcel.x)} tokens", expected=num_tokens
        )
        if parcel.scales is None:
            return at_least(self._wire.replay(route.space, parcel.x, None, route.handle), route.num_rows)
        scales = parcel.scales.contiguous()
        return tuple(
            at_least(part, route.num_rows) for part in self._wire.replay(route.space, parcel.x, scales, route.handle)
        )

    def _route(self, handle: Any) -> Route:
        what, got = "handle is none of a normal dispatch", type(handle).__name__
        demand(isinstance(handle, LazyTuple), what, got=got, expected="what dispatch() gave")
        route: Route = handle.route
        return route

    def _rows(self, name: str, rows: Any, route: Route) -> Tensor:
        """The rows that came, of as many as the caller was given."""
        demand_tensor(name, rows, None, None, dtypes=FLOATS)
        expected = f"({route.num_rows}, any)"
        fits = len(rows) in (route.num_rows, len(route.origin))
        demand(fits, f"{name} does not fit the handle", got=tuple(rows.shape), expected=expected)
        return rows[: len(route.origin)]
