"""What a buffer takes on each rank, which of its options need kernels, and how it explains itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import torch

from moecomm.checks import MAX_ALIGN, BufferConfig
from moecomm.errors import UnsupportedError
from moecomm.memory.device import moves_by_kernels
from moecomm.memory.mail import mail_bytes
from moecomm.placement import ExpertPlacement
from moecomm.quant import FORMATS, QuantSpec
from moecomm.rows import backend as rows_backend
from moecomm.topology import Topology
from moecomm.transport.base import NUM_AREAS, SLOT_ALIGN_BYTES, KernelShape, Support

_PAGE_BYTES = 4096
_BYTES_PER_SM = 128 * 1024  # 2048 threads of 64 bytes each


@final
@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """What a buffer allocates on each rank. Pages of host memory are committed when rows first arrive in them.

    segment_bytes: one receive area, for the worst case (every token of every rank comes here).
    num_segments: how many of them; arrived rows may be kept in all but two.
    mail_bytes: what its peers write signals and counts to.
    padded_bytes: the slots of layout "padded", two generations each way; T tokens commit T * K rows of each.
    total_bytes: what is reserved, exactly.
    uniform_bytes: what one dispatch commits when the routing is uniform.

    >>> MemoryPlan(segment_bytes=9, num_segments=2, mail_bytes=6, padded_bytes=8, total_bytes=32, uniform_bytes=1)
    MemoryPlan(segment_bytes=9, num_segments=2, mail_bytes=6, padded_bytes=8, total_bytes=32, uniform_bytes=1)
    """

    segment_bytes: int
    num_segments: int
    mail_bytes: int
    padded_bytes: int
    total_bytes: int
    uniform_bytes: int


def with_kernels(config: BufferConfig, rank: int) -> str:
    """The transport to select: what needs kernels rules out the others, and is refused where there are none."""
    needs = [f"{name}={value!r}" for name, value in config.kernel_options().items()]
    if not needs:
        return config.transport
    if config.transport not in ("auto", "symmetric") or not moves_by_kernels(config.device):
        raise UnsupportedError(
            f"{', '.join(needs)}: only kernels know what that is",
            got=f"transport {config.transport!r} with rows on {config.device}",
            expected='transport "symmetric" on a GPU, or on the CPU with TRITON_INTERPRET=1',
            remedy="leave it out",
            rank=rank,
            operation="Buffer()",
        )
    return "symmetric"


def memory_plan(config: BufferConfig, num_ranks: int) -> MemoryPlan:
    """A segment holds the worst dispatch (everything comes here) or the worst combine, whichever is larger."""
    tokens, top_k = config.max_tokens_per_rank, config.top_k
    most_local = max(config.placement.experts_per_rank)
    tags = config.tag_bytes
    entry_bytes = config.row_bytes + 4 + tags  # the row and its weight
    entries = num_ranks * tokens * top_k
    tables = num_ranks * tokens * (2 * 4 * top_k + tags)
    out_bytes = (entries + most_local * (MAX_ALIGN - 1)) * entry_bytes + tables
    by_entry = config.reduce == "source"
    home_entries, home_row = tokens * (top_k if by_entry else min(top_k, num_ranks)), config.row_bytes
    home_row = _widest_row_bytes(config) if by_entry else home_row  # may be quantised, which pays for wide rows only
    home_bytes = home_entries * (home_row + tags) + tokens * top_k * (4 * top_k + tags)
    segment = -(-(max(out_bytes, home_bytes) + _PAGE_BYTES) // _PAGE_BYTES) * _PAGE_BYTES
    uniform = tokens * top_k * entry_bytes + tables // num_ranks
    mail = mail_bytes(num_ranks, count_bytes(config, num_ranks))
    padded = NUM_AREAS * slot_bytes(config, num_ranks)
    total = segment * config.num_segments + mail + padded
    return MemoryPlan(segment, config.num_segments, mail, padded, total, uniform)


def plan_memory(
    *,
    num_ranks: int,
    num_experts: int,
    hidden: int,
    top_k: int,
    max_tokens_per_rank: int,
    dtype: torch.dtype = torch.bfloat16,
    placement: ExpertPlacement | Sequence[Sequence[int]] | None = None,
    reduce: str = "rank",
    num_segments: int = 8,
    check: str | None = None,
) -> MemoryPlan:
    """Say what a buffer of several ranks on one host reserves on each, before anything is allocated.

    The other transports allocate per operation what it needs; "local" reserves `padded_bytes` too.

    >>> import moecomm
    >>> plan = moecomm.Buffer.plan_memory(num_ranks=4, num_experts=64, hidden=7168, top_k=8, max_tokens_per_rank=1024)
    >>> plan.total_bytes == plan.num_segments * plan.segment_bytes + plan.mail_bytes + plan.padded_bytes
    True
    """
    config = BufferConfig.of(
        num_ranks,
        num_experts=num_experts,
        hidden=hidden,
        top_k=top_k,
        max_tokens_per_rank=max_tokens_per_rank,
        dtype=dtype,
        transport="symmetric",
        placement=placement,
        reduce=reduce,
        timeout_s=1.0,
        num_segments=num_segments,
        check=check,
        device="cpu",
    )
    return memory_plan(config, num_ranks)


def slot_bytes(config: BufferConfig, num_ranks: int) -> int:
    """One area of slots: a row with what travels beside it for every expert, rank and token."""
    rows = max(config.placement.experts_per_rank) * num_ranks * config.max_tokens_per_rank
    return -(-(rows * _widest_row_bytes(config) + SLOT_ALIGN_BYTES) // _PAGE_BYTES) * _PAGE_BYTES


def _widest_row_bytes(config: BufferConfig) -> int:
    """Bytes of a row as it is, or quantised."""
    return max(config.row_bytes, *(QuantSpec.of(name).row_bytes(config.hidden) for name in FORMATS))


def count_bytes(config: BufferConfig, num_ranks: int) -> int:
    """What a rank tells the others before it sends: its entries per expert and its pairs per rank, int32."""
    return 4 * (config.placement.num_experts + num_ranks)


def kernel_shape(config: BufferConfig) -> KernelShape:
    """Rows have what travels behind them at a multiple of 16 bytes; gradients of weights travel as rows of K floats."""
    room = -(-config.row_bytes // 16) * 16 + 16
    on_gpu = config.device.type != "cpu"
    return KernelShape(
        top_k=config.top_k,
        most_local=max(config.placement.experts_per_rank),
        max_tokens=config.max_tokens_per_rank,
        row_bytes=max(room, 4 * config.top_k),
        each=config.reduce == "source",
        num_sms=config.num_sms or (default_num_sms(config) if on_gpu else None),
        copies=config.engine == "copy",
        max_recv_tokens=config.max_recv_tokens,
    )


def default_num_sms(config: BufferConfig) -> int:
    """One multiprocessor for every 128 KiB of a full send, which is what it holds in flight at once.

    M * min(K, W) rows are sent at most. A kernel never takes more than the GPU has.

    >>> import torch
    >>> shape = {"num_experts": 256, "hidden": 7168, "top_k": 8, "reduce": "rank", "num_segments": 2}
    >>> shape |= {"dtype": torch.bfloat16, "transport": "auto", "placement": None, "timeout_s": 1.0, "device": "cpu"}
    >>> [default_num_sms(BufferConfig.of(8, max_tokens_per_rank=tokens, **shape)) for tokens in (1, 16, 128, 4096)]
    [1, 14, 112, 3584]
    """
    pairs = config.max_tokens_per_rank * min(config.top_k, config.placement.num_ranks)
    return -(-pairs * config.row_bytes // _BYTES_PER_SM)


def explain(chosen: str, config: BufferConfig, answers: dict[str, Support], topology: Topology) -> str:
    lines = [f"transport {chosen}: {answers[chosen].reason}"]
    for name, answer in answers.items():
        if name != chosen:
            lines.append(f"  not {name}: {'would work; comes later in the order' if answer.ok else answer.reason}")
    nodes = " ".join(str(list(topology.ranks_of_node(node))) for node in range(topology.num_nodes))
    how = rows_backend() if config.device.type == "cpu" else "torch"
    return "\n".join([*lines, f"ranks by node: {nodes}", f"rows on {config.device}: {how}"])
