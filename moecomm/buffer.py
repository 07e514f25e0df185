"""`Buffer`: dispatch tokens to their experts and combine what the experts made of them."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from types import TracebackType
from typing import Any, final

import torch
from torch import Tensor

from moecomm import autograd, traced
from moecomm.calls import Calls
from moecomm.checks import BufferConfig, Checker, agree, configure
from moecomm.core import Core
from moecomm.errors import MoECommError
from moecomm.footprint import count_bytes, explain, kernel_shape, memory_plan, plan_memory, with_kernels
from moecomm.group import Group
from moecomm.handle import Dispatched, DispatchHandle, PaddedHandle, Pending
from moecomm.metrics import Stats
from moecomm.placement import ExpertPlacement
from moecomm.plan import PlacementTables
from moecomm.quant import QuantSpec
from moecomm.topology import Topology
from moecomm.transport import build, select
from moecomm.transport.base import NUM_AREAS, TransportOptions

_DEFAULT_TIMEOUT_S = 60.0  # to tell the others of arguments that have none


@final
class Buffer:
    """Move tokens between the ranks of an expert-parallel group.

    Args:
        group: torch.distributed ProcessGroup, mpi4py Comm, or None: the default group if there is one, else one rank.
        num_experts: E, experts in all.
        hidden: H, elements of a row.
        top_k: K, experts per token.
        max_tokens_per_rank: M, most tokens that a rank dispatches at once.
        dtype: dtype of the rows; combine needs float32, float16 or bfloat16.
        transport: "auto", or one of "local", "symmetric", "hierarchical", "mpi", "collective".
        placement: ExpertPlacement or list of expert ids per rank; None: contiguous blocks.
        reduce: "rank" sums the rows of a token on each expert rank, then over ranks; "source" sums all of them at the
            source, which makes results independent of the number of ranks and of the placement, bit for bit.
        timeout_s: deadline of every wait in seconds; None: MOECOMM_TIMEOUT_S, or 60.
        num_segments: receive areas on transport "symmetric"; arrived rows are kept without a copy in all but two.
        device: where the rows live; None: the current accelerator, or the CPU.
        topology: which ranks share a node; None: detected.
        beside_bytes: room for the second of a pair, beside rows of the buffer's dtype.
        check: "off", "cheap" (a tag of every row is compared on arrival) or "full" (and a check sum of all bytes);
            None: MOECOMM_CHECK, or "off". What does not fit raises CorruptionError on all ranks. Sums that are made on
            their way (hierarchical, reduce="rank") are checked inside and between nodes, wherever they arrive.
        engine: with kernels, who moves rows: "kernels", or "copy": kernels pack them and the GPU's copy engines do the
            rest, so that communication occupies no multiprocessor; the host then waits for the packing.
        num_sms: with kernels, multiprocessors that they may fill; None: one for each 128 KiB that a rank sends at most,
            M * min(K, W) rows.
        max_recv_tokens: with kernels, rows that every dispatch gives, whatever comes: those behind the last are zero,
            no operation asks the host, and all can be captured in a CUDA graph. What kernels find wrong is raised by
            `synchronize`. None: as many rows as come.

    Raises:
        ConfigError: an argument is wrong, or ranks were given different ones (which field, which ranks).
        UnsupportedError: the transport does not work here (why).

    >>> import torch, moecomm
    >>> buffer = moecomm.Buffer(num_experts=4, hidden=8, top_k=2, max_tokens_per_rank=16, dtype=torch.float32)
    >>> x, topk_idx = torch.randn(3, 8), torch.tensor([[0, 2], [3, 1], [2, -1]])
    >>> out = buffer.dispatch(x, topk_idx, torch.full((3, 2), 0.5))
    >>> y = buffer.combine(2 * out.x, out.handle)
    >>> torch.equal(y, torch.cat([2 * x[:2], x[2:]]))
    True
    >>> buffer.close()
    """

    _rest: Any = None  # `membership.Rest`, once the buffer shrank

    def __init__(
        self,
        group: object = None,
        *,
        num_experts: int,
        hidden: int,
        top_k: int,
        max_tokens_per_rank: int,
        dtype: torch.dtype = torch.bfloat16,
        transport: str = "auto",
        placement: ExpertPlacement | Sequence[Sequence[int]] | None = None,
        reduce: str = "rank",
        timeout_s: float | None = None,
        num_segments: int = 8,
        device: torch.device | str | None = None,
        topology: Topology | None = None,
        beside_bytes: int = 0,
        check: str | None = None,
        engine: str = "kernels",
        num_sms: int | None = None,
        max_recv_tokens: int | None = None,
    ) -> None:
        arguments = {name: value for name, value in locals().items() if name not in ("self", "group")}
        self._group = Group.resolve(group)
        self._id = secrets.randbits(62)  # no other process has it, so its handles are nobody's here
        given = configure(self._group.rank, self._group.size, **arguments)
        self.config, buffer_ids = self._agree(given)
        self._topology = Topology.detect(self._group, given=topology, timeout_s=self.config.timeout_s)
        wanted = with_kernels(self.config, self._group.rank)
        chosen, self._answers = select(wanted, self._group, self._topology, self.config.device)
        memory = memory_plan(self.config, self._group.size)
        options = TransportOptions(
            device=self.config.device,
            timeout_s=self.config.timeout_s,
            segment_bytes=memory.segment_bytes,
            count_bytes=count_bytes(self.config, self._group.size),
            num_segments=self.config.num_segments,
            buffer_id=buffer_ids[0],
            kernels=kernel_shape(self.config),
            slot_bytes=memory.padded_bytes // NUM_AREAS,
        )
        self._core = Core(
            transport=build(chosen, self._group, self._topology, options),
            tables=PlacementTables(self.config.placement, self.config.device),
            reduce=reduce,
            dtype=dtype,
        )
        self._check = Checker(self.config, self._group.rank, self._id, ids_on_device=self._core.transport.is_fused)
        self._calls = Calls(self._core, self._check)
        autograd.CORES[self._id] = self._core

    def _agree(self, given: BufferConfig | MoECommError) -> tuple[BufferConfig, list[int]]:
        """Compare the arguments of all ranks; they, and the buffer ids of all ranks."""
        timeout_s = given.timeout_s if isinstance(given, BufferConfig) else _DEFAULT_TIMEOUT_S
        told = self._group.all_gather_object((self._id, given), timeout_s=timeout_s, operation="Buffer()")
        return agree(given, [other for _, other in told], self._group.rank), [buffer_id for buffer_id, _ in told]

    # -- operations ----------------------------------------------------------------------------------------------

    def dispatch(
        self,
        x: Tensor | tuple[Tensor, Tensor],
        topk_idx: Tensor | None = None,
        topk_weights: Tensor | None = None,
        *,
        layout: str = "expert",
        align: int = 1,
        handle: DispatchHandle | PaddedHandle | None = None,
        quant: QuantSpec | str | None = None,
        out: Any = None,
    ) -> Dispatched:
        """Send every token to the ranks of its experts. Collective; differentiable in x and topk_weights.

        Args:
            x: (T, H) rows in the buffer's dtype, or a pair ((T, H) rows, (T, ...) scales) of any dtypes, sent as bytes.
                T may differ between ranks and be 0.
            topk_idx: (T, K) int32 or int64 global expert ids, -1 for none; None with a handle.
            topk_weights: (T, K) float32, one weight per choice; None: 1, or those of the handle.
            layout: "expert": one row per choice, grouped by local expert, sorted by (local expert, source rank, token,
                k). "rank": one row per token and rank, sorted by (source rank, token), with local expert ids beside it.
                "padded": one row per choice at a fixed place of static (L, W * M, H), for decoding: no exchange of
                counts, no gradient, rows in memory of the buffer (see `Dispatched`).
            align: rows that each expert group is padded to a multiple of, with zeros; at most 256. Negative, on a CPU:
                each group takes -align rows, of which those behind its own are uninitialised.
            handle: replay the routing of an earlier dispatch (with its layout and align): no planning, no counts.
            quant: quantise x inside the send: a `QuantSpec`, or "fp8", "int8", "logfmt10"; `out.x` is then a pair
                (codes, scales), a pair that was passed travels unchanged. No gradient.
            out: layout "padded": (L, W * M, H) tensor, or pair, that rows are copied to; None: memory of the buffer.

        Returns:
            Dispatched: rows, where each expert's rows end, weights, and the handle that leads rows home.

        Raises:
            ConfigError, RoutingError, CapacityError, UnsupportedError, StaleHandleError: a wrong argument; nothing was
                sent and the buffer goes on.
            DesyncError, StallError, PeerLostError: the ranks did not come together; the buffer is of no more use.

        >>> buffer = Buffer(num_experts=2, hidden=2, top_k=1, max_tokens_per_rank=4, dtype=torch.float32)
        >>> out = buffer.dispatch(torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([[1], [0]]), align=2)
        >>> out.x.tolist(), out.expert_offsets.tolist(), out.tokens_per_expert.tolist()
        ([[3.0, 4.0], [0.0, 0.0], [1.0, 2.0], [0.0, 0.0]], [2, 4], [1, 1])
        """
        if torch.compiler.is_compiling() and layout == "padded":
            return traced.dispatched(x, topk_idx, topk_weights, self._id, handle, quant, out)
        return self._calls.dispatch(x, topk_idx, topk_weights, layout, align, handle, quant, out, wait=True).wait()

    def dispatch_async(
        self,
        x: Tensor | tuple[Tensor, Tensor],
        topk_idx: Tensor | None = None,
        topk_weights: Tensor | None = None,
        *,
        layout: str = "expert",
        align: int = 1,
        handle: DispatchHandle | PaddedHandle | None = None,
        quant: QuantSpec | str | None = None,
        out: Any = None,
    ) -> Pending[Dispatched]:
        """Send as `dispatch` and return; `.wait()` gives what arrived. Waits for counts, padded or replayed never.

        >>> buffer = Buffer(num_experts=2, hidden=1, top_k=1, max_tokens_per_rank=4, dtype=torch.float32)
        >>> pending = buffer.dispatch_async(torch.tensor([[1.0], [2.0]]), torch.tensor([[1], [0]]))
        >>> pending.wait().x.tolist()
        [[2.0], [1.0]]
        """
        return self._calls.dispatch(x, topk_idx, topk_weights, layout, align, handle, quant, out, wait=False)

    def combine(
        self,
        rows: Tensor,
        handle: DispatchHandle | PaddedHandle,
        *,
        weighted: bool | None = None,
        bias: Tensor | None = None,
        quant: QuantSpec | str | None = None,
        out: Tensor | None = None,
    ) -> Tensor:
        """Lead the rows of a dispatch home and sum them per token. Collective; differentiable in rows, weights, bias.

        The sum runs in float32 in a fixed order (see `reduce` of the buffer), each product rounded before it is added,
        and is rounded to the dtype once per level. A token without any expert gets its bias, or zero.

        Args:
            rows: (N, H) expert outputs in the buffer's dtype, in the order in which dispatch gave the rows.
            handle: of that dispatch; any number of combines may use it.
            weighted: multiply each row by its weight. None: yes in layout "expert"; in layout "rank", where a row
                stands for several experts, rows are always summed as they are. False: for callers who applied
                `row_weights` themselves.
            bias: (T, H) in the buffer's dtype or float32, added first.
            quant: layout "padded", or "expert" with reduce="source": rows travel in this format (see `moecomm.quant`).
            out: layout "padded": (T, H) tensor for the sums.

        Returns:
            (T, H) in the buffer's dtype.

        Raises:
            MoECommError: as `dispatch`.

        >>> buffer = Buffer(num_experts=2, hidden=1, top_k=2, max_tokens_per_rank=4, dtype=torch.float32)
        >>> out = buffer.dispatch(torch.tensor([[1.0]]), torch.tensor([[1, 0]]), torch.tensor([[0.5, 2.0]]))
        >>> buffer.combine(out.x, out.handle, bias=torch.tensor([[10.0]])).tolist()
        [[12.5]]
        """
        if torch.compiler.is_compiling() and isinstance(handle, PaddedHandle):
            return traced.combined(rows, handle, weighted, bias, quant, out)
        return self._calls.combine(rows, handle, weighted, bias, quant, out, wait=True).wait()

    def combine_async(
        self,
        rows: Tensor,
        handle: DispatchHandle | PaddedHandle,
        *,
        weighted: bool | None = None,
        bias: Tensor | None = None,
        quant: QuantSpec | str | None = None,
        out: Tensor | None = None,
    ) -> Pending[Tensor]:
        """Send as `combine` does and return; `.wait()` gives the sums. Never waits for a peer's rows.

        >>> buffer = Buffer(num_experts=1, hidden=1, top_k=1, max_tokens_per_rank=4, dtype=torch.float32)
        >>> out = buffer.dispatch(torch.tensor([[3.0]]), torch.tensor([[0]]))
        >>> buffer.combine_async(out.x, out.handle).wait().tolist()
        [[3.0]]
        """
        return self._calls.combine(rows, handle, weighted, bias, quant, out, wait=False)

    def combine_input(self, handle: PaddedHandle) -> Tensor:
        """(L, W * M, H) memory of the buffer: rows written there go home without a copy. Layout "padded".

        Write to it between the dispatch of this handle and its `combine`, to which it is passed.

        >>> buffer = Buffer(num_experts=1, hidden=1, top_k=1, max_tokens_per_rank=4, dtype=torch.float32)
        >>> out = buffer.dispatch(torch.tensor([[3.0]]), torch.tensor([[0]]), layout="padded")
        >>> rows = torch.mul(out.x, 2, out=buffer.combine_input(out.handle))
        >>> buffer.combine(rows, out.handle).tolist()
        [[6.0]]
        """
        return self._calls.padded.combine_input(handle)

    # -- what it is and does -------------------------------------------------------------------------------------

    @property
    def group(self) -> Group:
        """The ranks that share the experts."""
        return self._group

    @property
    def topology(self) -> Topology:
        """Which ranks share a node."""
        return self._topology

    @property
    def transport(self) -> str:
        """Name of the transport in use."""
        return self._core.transport.name

    plan_memory = staticmethod(plan_memory)

    def explain(self) -> str:
        """Say which transport was chosen, what each of them answered, and which ranks share a node.

        >>> print(Buffer(num_experts=1, hidden=1, top_k=1, max_tokens_per_rank=1).explain())
        transport local: the group has one rank
          not symmetric: ...
          not collective: ...
        ranks by node: [0]
        rows on cpu: ...
        """
        return explain(self.transport, self.config, self._answers, self._topology)

    def stats(self) -> Stats:
        """Counters since construction: operations, rows and bytes sent, leases and copies, seconds per phase.

        A dict; `.prometheus(rank=0)` gives the same as text. `rows_of_expert`: (L,) int64 rows that arrived so far;
        `waited_s`: (W,) float64 time that this rank waited for each other, if the transport tells them apart.

        >>> Buffer(num_experts=1, hidden=1, top_k=1, max_tokens_per_rank=1).stats()["dispatches"]
        0
        """
        return Stats(self._core.stats() | {"rows_of_expert": self._calls.padded.rows_of_expert()})

    def synchronize(self) -> None:
        """Wait on the host for what kernels do, and raise what they found wrong; other transports never put that off.

        Raises:
            RoutingError: an expert id was out of range; it was taken for none, and the buffer goes on.
            CapacityError: more rows came than `max_recv_tokens`; some were left out, and the buffer goes on.
            DesyncError, StallError, PeerLostError: the ranks did not come together; the buffer is of no more use.

        >>> Buffer(num_experts=1, hidden=1, top_k=1, max_tokens_per_rank=1).synchronize()
        """
        self._core.check_usable()
        if self._core.fused is not None:
            with self._core.guarded():
                self._core.fused.synchronize()

    @property
    def local_experts(self) -> tuple[int, ...]:
        """Global ids of the experts on this rank, in local order, also after `shrink`, `admit` and `join`."""
        if self._rest is not None:
            return self._rest.survivors.experts[self._group.rank]
        return self.config.placement.experts_of_rank[self._group.rank]

    def shrink(self, *, renormalise: bool = False, timeout_s: float | None = None) -> tuple[int, ...]:
        """Go on without the ranks that died: agree with the other survivors, and build everything anew among them.

        Collective among those that live; on symmetric and simulated, while the store of the process group lives. Ids
        of experts stay. Those of dead ranks move to replicas (`ExpertPlacement.replicas_of_rank`, `local_experts`), or
        are dropped. Ranks are renumbered (`group`), handles are stale, results stay valid.

        Args:
            renormalise: scale the weights that are left to the sum of all of their token.
            timeout_s: to wait for ranks not known to be dead, seconds; None: that of the buffer.

        Returns:
            The ranks that are left, numbered as when the buffer was built.

        Raises:
            UnsupportedError: another transport, or a group without a store.
            PeerLostError: the others went on without this rank, or no expert is left. Another one died meanwhile
                (also StallError): call it again.

        >>> Buffer(num_experts=1, hidden=1, top_k=1, max_tokens_per_rank=1).shrink()
        Traceback (most recent call last):
        moecomm.errors.UnsupportedError: rank 0: a buffer on transport local cannot shrink: ...
        """
        from moecomm import membership

        rest = membership.shrink(self._core, self._check, self._rest, renormalise, timeout_s)
        return membership.build_anew(self, rest)

    def admit(
        self, num_ranks: int | None = None, *, name: str = "moecomm", timeout_s: float | None = None
    ) -> tuple[int, ...]:
        """Take in processes that wait in `join` of that name, for ranks that died; collective, as `shrink`, after it.

        Args:
            num_ranks: most of them; None: one for each dead rank.
            timeout_s: to wait for them and the other ranks, seconds; who is not there then is left out.

        Returns and raises as `shrink`; a replacement has the number and the experts of the rank that it replaces.

        >>> Buffer(num_experts=1, hidden=1, top_k=1, max_tokens_per_rank=1).admit()
        Traceback (most recent call last):
        moecomm.errors.UnsupportedError: rank 0: a buffer on transport local cannot take in ranks: ...
        """
        from moecomm import membership

        rest = membership.take_in(self._core, self._check, self._rest, name, num_ranks, timeout_s)
        return membership.build_anew(self, rest)

    @classmethod
    def join(cls, store: Any, *, name: str = "moecomm", wait_s: float | None = None, **arguments: Any) -> Buffer:
        """Take the place of a rank that died, once the others `admit` it; then load `local_experts`.

        Args:
            store: torch.distributed.Store that the process group of the others uses, such as TCPStore(host, port).
            wait_s: seconds to wait for an invitation; None: MOECOMM_TIMEOUT_S, or 60.
            arguments: those of the buffer as it was built first.

        Raises:
            ConfigError: another argument than the buffer has; StallError: nobody called `admit`.

        >>> store = torch.distributed.HashStore()
        >>> Buffer.join(store, wait_s=0.01, num_experts=1, hidden=1, top_k=1, max_tokens_per_rank=1)
        Traceback (most recent call last):
        moecomm.errors.StallError: join: nobody took this process in within 0.01 s: ...
        """
        from moecomm import membership

        buffer = cls.__new__(cls)
        membership.build_anew(buffer, membership.join(store, name, wait_s, cls, arguments))
        return buffer

    def abort(self, reason: str = "") -> None:
        """Give up and free every rank that waits (AbortedError); from any thread, idempotent, waits for nobody.

        Also those in `shrink` and `admit`, until they have agreed; from then on once all is built anew.

        >>> buffer = Buffer(num_experts=1, hidden=1, top_k=1, max_tokens_per_rank=1)
        >>> buffer.abort("the data loader died")
        """
        self._core.abort(reason)

    def close(self) -> None:
        """Free everything; idempotent, waits for nobody. What was handed out stays valid."""
        if hasattr(self, "_core") and not self._core.closed:
            self._core.closed = True
            self._core.started.clear()
            self._core.transport.close()

    def __enter__(self) -> Buffer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            self._core.abort(f"{type(error).__name__}: {error}")  # the others hear why
        self.close()

    def __del__(self) -> None:
        self.close()
