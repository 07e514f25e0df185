"""`ElasticBuffer`: DeepEP's second API on `moecomm.Buffer`.

Without do_expand rows travel in layout "rank" (an expert stands for a rank with allow_multiple_reduction=False), else
in layout "expert". The source sums in ascending order of the highest choice of each rank, as there.

Legend: T tokens, H hidden, K top-k, E experts, R ranks, L experts of this rank, N tokens received, X rows received.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moecomm.deep_ep import sizes
from moecomm.deep_ep.elastic_handle import EPHandle
from moecomm.deep_ep.elastic_rows import ElasticRows, Plan
from moecomm.deep_ep.events import EventHandle, EventOverlap, begin_after, finished
from moecomm.deep_ep.parcels import Parcel, summed_bias
from moecomm.deep_ep.refusals import INDEX_DTYPES, NotThere, demand, demand_count, demand_tensor
from moecomm.deep_ep.wire import Wire
from moecomm.topology import Topology


class ElasticBuffer(NotThere):
    """Dispatch and combine as DeepEP's second API has them; any number of ranks, on the CPU or an accelerator.

    Args:
        group: torch.distributed ProcessGroup or mpi4py communicator; None: the default group, or a single rank.
        num_bytes: kept, or what `get_buffer_size_hint` says. num_cpu_bytes: no effect.
        num_max_tokens_per_rank, hidden, num_topk, use_fp8_dispatch: what calls will ask for at most; num_bytes follows.
        deterministic: no effect: results always are.
        allow_multiple_reduction: with do_expand, sum the rows of a token where the experts are before they go home.
        prefer_overlap_with_compute: no effect but in `get_theoretical_num_sms`.
        allow_hybrid_mode: no effect but in `get_logical_domain_size`.
        sl_idx, num_allocated_qps, num_gpu_timeout_secs: no effect.
        num_cpu_timeout_secs: deadline of every wait in seconds.
        explicitly_destroy: whether `destroy` will be called.

    Raises:
        ConfigError: neither num_bytes nor a shape, or another wrong argument.

    >>> buffer = ElasticBuffer(num_max_tokens_per_rank=8, hidden=4, num_topk=2)
    >>> idx, weights = torch.tensor([[0, 1], [1, -1]]), torch.ones(2, 2)
    >>> x, _, w, handle, _ = buffer.dispatch(torch.ones(2, 4), idx, weights, num_experts=2, do_expand=True)
    >>> handle.num_recv_tokens_per_expert_list, buffer.combine(x, handle)[0][:, 0].tolist()
    ([1, 2], [2.0, 1.0])
    """

    def __init__(
        self,
        group: Any = None,
        num_bytes: int | None = None,
        num_cpu_bytes: int = 0,
        num_max_tokens_per_rank: int = 0,
        hidden: int = 0,
        num_topk: int = 0,
        use_fp8_dispatch: bool = False,
        deterministic: bool = False,
        allow_hybrid_mode: bool = True,
        allow_multiple_reduction: bool = True,
        prefer_overlap_with_compute: bool = True,
        sl_idx: int = 3,
        num_allocated_qps: int = 0,
        num_cpu_timeout_secs: int = 300,
        num_gpu_timeout_secs: int = 100,
        explicitly_destroy: bool = False,
    ) -> None:
        sized = num_bytes is not None or (num_max_tokens_per_rank > 0 and hidden > 0)
        got = f"num_bytes={num_bytes}, num_max_tokens_per_rank={num_max_tokens_per_rank}, hidden={hidden}"
        demand(sized, "the buffer has no size", got=got, expected="num_bytes, or num_max_tokens_per_rank and hidden")
        self.group, self.deterministic, self.explicitly_destroy = group, deterministic, explicitly_destroy
        self.allow_hybrid_mode, self.allow_multiple_reduction = allow_hybrid_mode, allow_multiple_reduction
        self.prefer_overlap_with_compute = prefer_overlap_with_compute
        self.num_max_tokens_per_rank = num_max_tokens_per_rank
        self._wire = Wire(group, num_bytes or 0, float(num_cpu_timeout_secs))
        self.rank_idx, self.num_ranks = self._wire.group.rank, self._wire.group.size
        if num_bytes is None:
            shape = num_max_tokens_per_rank, hidden, num_topk
            num_bytes = sizes.elastic_bytes(self.num_ranks, *shape, use_fp8_dispatch=use_fp8_dispatch)
        self.num_bytes = num_bytes
        topology = Topology.detect(self._wire.group)
        self.num_rdma_ranks = topology.num_nodes
        self.num_nvlink_ranks = -(-self.num_ranks // topology.num_nodes)
        split = self.num_rdma_ranks if allow_hybrid_mode else 1
        self.num_scaleout_ranks, self.num_scaleup_ranks = split, -(-self.num_ranks // split)
        self.scaleout_rank_idx, self.scaleup_rank_idx = divmod(self.rank_idx, self.num_scaleup_ranks)
        self.num_allocated_qps = num_allocated_qps or (129 if split > 1 else 17)
        self._rows = ElasticRows(self._wire, allow_multiple_reduction)
        self.nccl_comm_handle = self.runtime = None

    # -- what there is -------------------------------------------------------------------------------------------

    def destroy(self) -> None:
        """Free everything; waits for nobody."""
        what = "destroy() needs a buffer that was made for it"
        demand(self.explicitly_destroy, what, got="explicitly_destroy=False", expected="explicitly_destroy=True")
        self._wire.close()

    @staticmethod
    def get_buffer_size_hint(
        group: Any,
        num_max_tokens_per_rank: int,
        hidden: int,
        num_topk: int = 0,
        use_fp8_dispatch: bool = False,
        allow_hybrid_mode: bool = True,
        allow_multiple_reduction: bool = True,
    ) -> int:
        """Bytes that DeepEP needs where all ranks are in one domain; num_topk=0 means 32."""
        shape = num_max_tokens_per_rank, hidden, num_topk
        return sizes.elastic_bytes(sizes.size_of(group), *shape, use_fp8_dispatch=use_fp8_dispatch)

    def barrier(self, use_comm_stream: bool = True, with_cpu_sync: bool = False, sequential: bool = True) -> None:
        """Return when all ranks have called it and what they did before on the current stream is done."""
        if torch.accelerator.current_accelerator() is not None:
            torch.accelerator.current_stream().synchronize()
        self._wire.group.barrier(operation="ElasticBuffer.barrier")

    @staticmethod
    def capture() -> EventHandle:
        """An event on the current stream."""
        return EventHandle()

    def get_comm_stream(self) -> Any:
        """The stream on which rows move: the current one."""
        accelerator = torch.accelerator.current_accelerator()
        return torch.cpu.current_stream() if accelerator is None else torch.accelerator.current_stream()

    def get_physical_domain_size(self) -> tuple[int, int]:
        """Nodes, and ranks of a node."""
        return self.num_rdma_ranks, self.num_nvlink_ranks

    def get_logical_domain_size(self) -> tuple[int, int]:
        """The same; (1, R) without allow_hybrid_mode."""
        return self.num_scaleout_ranks, self.num_scaleup_ranks

    def get_theoretical_num_sms(
        self,
        num_experts: int,
        num_topk: int,
        num_scaleout_topk: int = 0,
        rdma_gbs: float = 0,
        nvlink_gbs: float = 0,
        sm_read_gbs: float = 200,
        sm_write_gbs: float = 50,
    ) -> int:
        """How many multiprocessors DeepEP would use; an even number."""
        links = sizes.Links(rdma_gbs or 45.0, nvlink_gbs or 430.0, sm_read_gbs, sm_write_gbs)
        domain = self.num_ranks, *self.get_logical_domain_size()
        least = 4 if self.prefer_overlap_with_compute else 64
        return sizes.num_sms(domain, num_experts, num_topk, links, least=least)

    def get_theoretical_num_qps(self, num_sms: int) -> int:
        """How many queue pairs DeepEP would use for that many multiprocessors."""
        wanted = 16 * num_sms + 1 if self.num_scaleout_ranks > 1 else min(num_sms, 9)
        return min(wanted, self.num_allocated_qps)

    # -- operations ----------------------------------------------------------------------------------------------

    @torch.no_grad()
    def dispatch(
        self,
        x: Tensor | tuple[Tensor, Tensor],
        topk_idx: Tensor | None = None,
        topk_weights: Tensor | None = None,
        cumulative_local_expert_recv_stats: Tensor | None = None,
        num_experts: int | None = None,
        num_max_tokens_per_rank: int | None = None,
        expert_alignment: int | None = None,
        num_sms: int = 0,
        num_qps: int = 0,
        previous_event: EventOverlap | EventHandle | None = None,
        previous_event_before_epilogue: EventOverlap | EventHandle | None = None,
        async_with_compute_stream: bool = False,
        allocate_on_comm_stream: bool = False,
        handle: EPHandle | None = None,
        do_handle_copy: bool = True,
        do_cpu_sync: bool | None = None,
        do_expand: bool = False,
        do_zero_padding: bool = False,
        use_tma_aligned_col_major_sf: bool = False,
    ) -> tuple[Any, Tensor | None, Tensor | None, EPHandle, EventOverlap]:
        """Send every token to the ranks of its experts. Collective.

        Args:
            x: (T, H) rows of any dtype, or ((T, H) rows, (T, S) scales of 4 bytes with any strides).
            topk_idx, topk_weights: (T, K) global expert ids, -1 for none; and float32 weights, or None.
            cumulative_local_expert_recv_stats: (L,) int32, the rows of each local expert are added.
            num_experts, num_max_tokens_per_rank: E and the most tokens of any rank; the same on all ranks.
            expert_alignment: what the rows (do_expand) and counts of each expert are rounded up to.
            handle: replay an earlier dispatch; topk_weights may be new, the rest of the routing is left out.
            do_handle_copy: keep a copy of topk_idx in the handle, not the tensor itself.
            do_cpu_sync: exact numbers of rows and the list of counts; False: room for the worst case, an empty list.
            do_expand: one row per (token, expert), grouped by expert. do_zero_padding: no effect: padding is zero.
            use_tma_aligned_col_major_sf: scales column-major, columns padded to 16 bytes.
            num_sms: kept in the handle. num_qps: no effect.
            previous_event, previous_event_before_epilogue: what to wait for. async_with_compute_stream: give an event.
            allocate_on_comm_stream: no effect.

        Returns:
            rows or (rows, scales); (N, K) local ids, -1 elsewhere, None with do_expand; (N, K) weights as they were
            sent, or (X,) with do_expand; the handle; an event. Tokens come sorted by (source rank, token), rows of
            do_expand by (expert, source rank, token).

        Raises:
            ConfigError: a wrong argument; nothing was sent. Others as `moecomm.Buffer.dispatch`.
        """
        what = "previous_event needs allocate_on_comm_stream"
        demand(previous_event is None or allocate_on_comm_stream, what, got=False, expected=True)
        begin_after(previous_event)
        begin_after(previous_event_before_epilogue)
        if handle is not None:
            given = topk_idx is not None or do_cpu_sync or cumulative_local_expert_recv_stats is not None
            what = "a handle replays its routing"
            expected = "no topk_idx, do_cpu_sync or cumulative_local_expert_recv_stats"
            demand(not given, what, got="one of them too", expected=expected)
            recv_x, recv_idx, recv_weights = self._rows.replay(Parcel.of(x, None, topk_weights), handle)
            if use_tma_aligned_col_major_sf and isinstance(recv_x, tuple):
                recv_x = recv_x[0], sizes.by_padded_columns(recv_x[1])
            return recv_x, recv_idx, recv_weights, handle, finished(async_with_compute_stream)
        parcel = Parcel.of(x, topk_idx, topk_weights)
        idx = demand_tensor("topk_idx", topk_idx, len(parcel.x), None, dtypes=INDEX_DTYPES)
        room = num_max_tokens_per_rank or self.num_max_tokens_per_rank
        align = 1 if expert_alignment is None else expert_alignment
        for name, value in (
            ("num_experts", num_experts),
            ("num_max_tokens_per_rank", room),
            ("expert_alignment", align),
        ):
            demand_count(name, value)
        if len(idx) > room:
            demand(False, "too many tokens", got=len(idx), expected=f"at most num_max_tokens_per_rank={room}")
        assert num_experts is not None
        plan = Plan(num_experts, room, align, True if do_cpu_sync is None else do_cpu_sync)
        send = self._rows.expanded if do_expand else self._rows.compact
        recv_x, recv_idx, recv_weights, made = send(parcel, idx, plan)
        made.num_sms, made.topk_idx = num_sms, idx.clone() if do_handle_copy else idx
        if cumulative_local_expert_recv_stats is not None:
            num_local = len(made.num_unaligned_recv_tokens_per_expert)
            stats = demand_tensor("cumulative_local_expert_recv_stats", cumulative_local_expert_recv_stats, num_local)
            stats.add_(made.num_unaligned_recv_tokens_per_expert)
        if use_tma_aligned_col_major_sf and isinstance(recv_x, tuple):
            recv_x = recv_x[0], sizes.by_padded_columns(recv_x[1])
        return recv_x, recv_idx, recv_weights, made, finished(async_with_compute_stream)

    @torch.no_grad()
    def combine(
        self,
        x: Tensor,
        handle: EPHandle,
        topk_weights: Tensor | None = None,
        bias: Tensor | tuple[Tensor, Tensor] | None = None,
        num_sms: int = 0,
        num_qps: int = 0,
        previous_event: EventOverlap | EventHandle | None = None,
        previous_event_before_epilogue: EventOverlap | EventHandle | None = None,
        async_with_compute_stream: bool = False,
        allocate_on_comm_stream: bool = False,
    ) -> tuple[Tensor, Tensor | None, EventOverlap]:
        """Lead rows home and sum them as they are: bias, then ranks in ascending order of their highest choice.

        Args:
            x: (N, H) rows as dispatch gave them, (X, H) with do_expand; float32, float16 or bfloat16.
            handle: of that dispatch.
            topk_weights: (N, K) float32, or (X,) with do_expand: each choice gets that of the rank that has it.
            bias: one or two of (T, H), added first.
            others: as `dispatch`; num_sms has no effect.

        Returns:
            (T, H) sums, float32 inside and rounded once at each level; (T, K) weights or None; an event.
        """
        what = "previous_event needs allocate_on_comm_stream"
        demand(previous_event is None or allocate_on_comm_stream, what, got=False, expected=True)
        demand(
            isinstance(handle, EPHandle),
            "handle is no EPHandle",
            got=type(handle).__name__,
            expected="that of dispatch",
        )
        begin_after(previous_event)
        begin_after(previous_event_before_epilogue)
        demand_tensor("x", x, None, None)
        added = summed_bias(bias, len(handle.topk_idx), x.shape[1])
        combined, weights = self._rows.combine(x, handle, topk_weights, added)
        return combined, weights, finished(async_with_compute_stream)
