"""W ranks in one process, whose kernels run one after another: what the checks of single kernels share.

The checks run in Triton's interpreter on the CPU, or on a GPU when the interpreter is off.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import triton
from moecomm.kernels.combine import push_reduced
from moecomm.kernels.layout import SendLayout, layout
from moecomm.kernels.push import push
from moecomm.kernels.receive import Received, receive
from moecomm.kernels.reduce import reduce
from moecomm.kernels.rows import Arriving, RowFormat
from moecomm.kernels.wire import BAD_ID, LATE, ROWS_NEEDED, STALLED, Link, Wire, buffer_bytes, loopback
from torch import Tensor

from moecomm import reference
from moecomm.placement import ExpertPlacement
from moecomm.testing.asserts import assert_bitwise
from moecomm.testing.cases import Case

DEVICE = "cpu" if triton.knobs.runtime.interpret else "cuda"
WORDS_OF_STATUS = {"bad id": BAD_ID, "rows needed": ROWS_NEEDED, "stalled": STALLED, "late": LATE}


@dataclass
class World:
    """W ranks and one operation after another on them."""

    placement: ExpertPlacement
    top_k: int
    max_tokens: int
    row_bytes: int
    source_sums: bool = False  # combine with reduce="source"
    shared: Tensor | None = None  # (bytes,) uint8 memory to use the first bytes of
    max_spins: int = 1000
    wire: Wire = field(init=False)
    links: list[Link] = field(init=False)
    memory: Tensor = field(init=False)
    flat_of_expert: Tensor = field(init=False)
    expert_begin: Tensor = field(init=False)

    def __post_init__(self) -> None:
        held = self.placement.experts_of_rank
        self.wire = Wire.of(len(held), self.top_k, max(map(len, held)), self.row_bytes)
        num_rows = self.max_tokens * max(len(held), self.top_k) if self.source_sums else None
        shape = len(held), buffer_bytes(self.wire, self.max_tokens, num_rows)
        if self.shared is None:
            self.memory = torch.zeros(shape, dtype=torch.uint8, device=DEVICE)
        else:
            self.memory = self.shared[: shape[0] * shape[1]].view(shape)
        self.links, _ = loopback(self.wire, self.max_tokens, num_rows, self.memory, self.max_spins)
        order = torch.tensor(self.placement.flat_experts)
        self.flat_of_expert = torch.empty(len(order), dtype=torch.int32)
        self.flat_of_expert[order] = torch.arange(len(order), dtype=torch.int32)
        self.flat_of_expert = self.flat_of_expert.to(DEVICE)
        begins = [sum(map(len, held[:rank])) for rank in range(len(held) + 1)]
        self.expert_begin = torch.tensor(begins, dtype=torch.int32, device=DEVICE)

    def lay_out(self, rank: int, topk_idx: Tensor, topk_weights: Tensor | None) -> SendLayout:
        """`layout` on one rank."""
        tables = self.flat_of_expert, self.expert_begin
        status, weights = self.links[rank].status, None if topk_weights is None else topk_weights.to(DEVICE)
        return layout(topk_idx.to(DEVICE), weights, *tables, wire=self.wire, max_tokens=self.max_tokens, status=status)

    def experts(self, rank: int) -> tuple[int, int]:
        """First flat id and number of a rank's experts."""
        begin, end = self.expert_begin[rank : rank + 2].tolist()
        return begin, end - begin

    def arriving(self, rank: int, form: RowFormat, wire_row: Tensor | None = None) -> Arriving:
        """Rows that are arriving at a rank."""
        return Arriving(self.links[rank], self.wire, form, wire_row)

    def on_host(self) -> World:
        """The world as it is now in CPU memory, which is what references read and write."""
        world = copy.copy(self)
        world.memory = self.memory.to("cpu", copy=True)
        moved = [to.data_ptr() - at.data_ptr() for at, to in zip(self.memory, world.memory, strict=True)]
        world.links = [
            link._replace(
                peers=link.peers.cpu() + torch.tensor(moved),
                state=link.state.to("cpu", copy=True),
                status=link.status.to("cpu", copy=True),
            )
            for link in self.links
        ]
        return world

    def check_status(self) -> None:
        """Demand that no kernel noted a problem."""
        for link in self.links:
            words = {name: link.status[int(word) :].tolist() for name, word in WORDS_OF_STATUS.items()}
            assert not link.status.any(), f"rank {link.rank}: {words}"


def dispatch_and_combine(case: Case, world: World, round: int, layout_name: str = "expert") -> None:
    """One dispatch and one combine of a case on all ranks, compared with the oracle bit for bit."""
    ranks = range(world.wire.world)
    routings = [case.routing(rank, round, world.wire.world) for rank in ranks]
    xs = [case.payload(rank, round) for rank in ranks]
    scales = given([case.scales(rank, round) for rank in ranks])
    weights = given([w for _, w in routings])
    align = case.align if layout_name == "expert" else 1
    expected = reference.dispatch(
        xs,
        [ids for ids, _ in routings],
        weights,
        placement=world.placement,
        layout=layout_name,
        align=align,
        scales=scales,
    )
    form = RowFormat(case.hidden, case.dtype, case.scale_columns)
    sent = [world.lay_out(rank, *routings[rank]) for rank in ranks]
    for rank in ranks:
        beside = None if scales is None else scales[rank].to(DEVICE)
        push(xs[rank].to(DEVICE), sent[rank], world.links[rank], wire=world.wire, scales=beside)
    got = [
        receive(
            world.arriving(rank, form),
            experts=world.experts(rank),
            num_pairs=num_pairs_of(sent, rank),
            num_rows=expected[rank].x.shape[0],
            layout=layout_name,
            align=align,
        )
        for rank in ranks
    ]
    world.check_status()
    for rank in ranks:
        compare_dispatch(got[rank], expected[rank], f"{case.name}, W {len(ranks)}, round {round}, rank {rank}")
    if layout_name == "expert":
        combine_and_compare(case, world, round, sent, got, expected)


def on_device(tensor: Tensor) -> Tensor:
    """A tensor on the device, with its offset and its gaps in memory."""
    memory = torch.empty(0, dtype=tensor.dtype).set_(tensor.untyped_storage())
    return memory.to(DEVICE).as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())


def given(values: Sequence[Tensor | None]) -> list[Tensor] | None:
    """The values of all ranks, or None if they have none."""
    known = [value for value in values if value is not None]
    assert len(known) in (0, len(values)), "some ranks have values and some have none"
    return known or None


def num_pairs_of(sent: list[SendLayout], rank: int) -> int:
    """Pairs that a rank receives."""
    return sum(int(layout.counts[rank, 0]) for layout in sent)


def compare_dispatch(got: Received, expected: reference.ReferenceDispatched, what: str) -> None:
    """Compare what one rank received with what the oracle says."""
    pairs = {
        "x": (got.x, expected.x),
        "scales": (got.scales, expected.scales),
        "tokens_per_expert": (got.groups[1].cpu(), expected.tokens_per_expert),
    }
    if expected.layout == "expert":
        pairs["expert_offsets"] = got.groups[0].cpu(), expected.expert_offsets
        pairs["row_weights"] = got.weights, expected.row_weights
    else:
        pairs["topk_idx"] = got.table.cpu(), expected.topk_idx
        pairs["topk_weights"] = got.weights, expected.topk_weights
        pairs["token"] = got.token.cpu().long(), expected.source_token
    for name, (value, wanted) in pairs.items():
        assert (value is None) == (wanted is None), f"{what}: {name} is missing on one side"
        if value is not None and wanted is not None:
            assert_bitwise(value, wanted, f"{what}: {name}")


def combine_and_compare(
    case: Case,
    world: World,
    round: int,
    sent: list[SendLayout],
    got: list[Received],
    expected: list[reference.ReferenceDispatched],
) -> None:
    """Bring made-up expert rows home and compare the sums with the oracle's."""
    ranks = range(world.wire.world)
    made = [case.values("rows", rank, round, got[rank].x.shape[0]) for rank in ranks]
    biases = [case.values("bias", rank, round, case.num_tokens(rank, round)) for rank in ranks]
    wanted = reference.combine(made, expected, reduce="source" if world.source_sums else "rank", biases=biases)
    for rank in ranks:
        come, weights = got[rank], None if world.source_sums else got[rank].weights
        home = come.table, weights, come.wire_row, come.token, world.links[rank]
        push_reduced(made[rank].to(DEVICE), *home, wire=world.wire, each=world.source_sums)
    form = RowFormat(case.hidden, case.combine_dtype)
    for rank in ranks:
        table, weights = sent[rank].pair_row, None
        if world.source_sums:
            table, weights = entry_rows(sent[rank], world.top_k)
        y = reduce(world.arriving(rank, form), table, weights, biases[rank].to(DEVICE))
        assert_bitwise(y, wanted[rank], f"{case.name}, W {len(ranks)}, round {round}, rank {rank}: combined")
    world.check_status()


def entry_rows(sent: SendLayout, top_k: int) -> tuple[Tensor, Tensor]:
    """(T, K) row of every entry that travels home by itself, and its weight."""
    flat, weights = sent.meta[:, :top_k], sent.meta[:, 2 * top_k : 3 * top_k].contiguous().view(torch.float32)
    rows = torch.arange(flat.numel(), dtype=torch.int32, device=flat.device).view(flat.shape)
    return torch.where(flat >= 0, rows, -1), weights


def row_bytes_of(case: Case) -> int:
    """Bytes that the wire needs for the rows of a case, both ways."""
    out = RowFormat(case.hidden, case.dtype, case.scale_columns).wire_bytes
    return max(out, RowFormat(case.hidden, case.combine_dtype).wire_bytes)


def world_of(case: Case, world_size: int, source_sums: bool = False) -> World:
    """A world for a case."""
    placement = case.placement(world_size)
    return World(placement, case.top_k, max(case.max_tokens_per_rank, 1), row_bytes_of(case), source_sums)
