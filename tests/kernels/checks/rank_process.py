"""One rank of a world of processes over shared memory, whose kernels wait for real signals.

Every run (a case, or `case/source`) has its own part of the memory. Nothing but the kernels' own signals keeps the
ranks in step. Each rank compares what it got with the oracle.
"""

from __future__ import annotations

import random
import time
from dataclasses import dataclass

import torch
from moecomm.kernels.combine import push_reduced
from moecomm.kernels.push import push
from moecomm.kernels.receive import receive
from moecomm.kernels.reduce import reduce
from moecomm.kernels.rows import RowFormat

from moecomm import reference
from moecomm.testing.asserts import assert_bitwise
from moecomm.testing.cases import Case
from tests.kernels.checks.interpreter import yield_while_polling
from tests.kernels.checks.worlds import World, compare_dispatch, entry_rows, given, row_bytes_of
from tests.kernels.small import small

MAX_SPINS = 1_000_000
FEW_SPINS = 1_000  # a second or more: for a rank that never comes


def play(case: Case, world: World, rank: int, round: int) -> None:
    """One dispatch and one combine, as rank `rank`; the other ranks do theirs in other processes."""
    ranks = range(world.wire.world)
    routings = [case.routing(peer, round, world.wire.world) for peer in ranks]
    xs = [case.payload(peer, round) for peer in ranks]
    weights = given([w for _, w in routings])
    scales = given([case.scales(peer, round) for peer in ranks])
    expected = reference.dispatch(
        xs, [ids for ids, _ in routings], weights, placement=world.placement, align=case.align, scales=scales
    )
    link, what = world.links[rank], f"{case.name}, round {round}, rank {rank}"
    sent = world.lay_out(rank, *routings[rank])
    dawdle()
    push(xs[rank], sent, link, wire=world.wire, scales=None if scales is None else scales[rank])
    got = receive(
        world.arriving(rank, RowFormat(case.hidden, case.dtype, case.scale_columns)),
        experts=world.experts(rank),
        num_pairs=world.wire.world * world.max_tokens,
        num_rows=expected[rank].x.shape[0],
        align=case.align,
    )
    assert not link.status.any(), f"{what}: status {link.status.tolist()}"
    compare_dispatch(got, expected[rank], what)

    made = [case.values("rows", peer, round, expected[peer].x.shape[0]) for peer in ranks]
    biases = [case.values("bias", peer, round, case.num_tokens(peer, round)) for peer in ranks]
    wanted = reference.combine(made, expected, reduce="source" if world.source_sums else "rank", biases=biases)
    dawdle()
    row_weights = None if world.source_sums else got.weights
    home = got.table, row_weights, got.wire_row, got.token, link
    push_reduced(made[rank], *home, wire=world.wire, each=world.source_sums)
    table, by_entry = entry_rows(sent, world.top_k) if world.source_sums else (sent.pair_row, None)
    y = reduce(world.arriving(rank, RowFormat(case.hidden, case.combine_dtype)), table, by_entry, biases[rank])
    assert not link.status.any(), f"{what}: status {link.status.tolist()}"
    assert_bitwise(y, wanted[rank], f"{what}: combined")


def dawdle() -> None:
    """Be late now and then, so that ranks overtake each other."""
    if random.random() < 0.3:
        time.sleep(random.random() * 0.05)


@dataclass(frozen=True)
class Runs:
    """What all ranks of a world play, one run after another, each in its part of `memory`.

    silent_from: the round in which the last rank leaves, and the others wait for it in vain; -1: none.
    """

    world_size: int
    names: list[str]
    rounds: int
    memory: torch.Tensor
    silent_from: int = -1

    def play(self, rank: int) -> None:
        """Play all runs as a rank."""
        torch.set_num_threads(1)
        yield_while_polling()
        random.seed(rank)
        for part, name in zip(self.memory.chunk(len(self.names)), self.names, strict=True):
            case_name, _, source = name.partition("/")
            case = small(case_name)
            sizes = case.top_k, max(case.max_tokens_per_rank, 1), row_bytes_of(case)
            world = World(case.placement(self.world_size), *sizes, bool(source), part, MAX_SPINS)
            for round in range(self.rounds):
                if round == self.silent_from:
                    if rank == self.world_size - 1:
                        return
                    world.links = [link._replace(max_spins=FEW_SPINS) for link in world.links]
                play(case, world, rank, round)
