"""What a model will need on a cluster, before anything is started: bytes, memory, transport. Uniform routing."""

from __future__ import annotations

from dataclasses import dataclass
from math import comb
from typing import final

import torch

from moecomm.buffer import Buffer
from moecomm.errors import ConfigError
from moecomm.placement import ExpertPlacement
from moecomm.presets import Preset


@final
@dataclass(frozen=True, kw_only=True, slots=True)
class Cluster:
    """So many nodes with so many ranks each; link_gbit_per_s: of one node to the others, in each direction; 0: unknown.

    >>> Cluster(nodes=2, ranks_per_node=8).ranks
    16
    """

    nodes: int = 1
    ranks_per_node: int = 1
    link_gbit_per_s: float = 0.0

    def __post_init__(self) -> None:
        for name in ("nodes", "ranks_per_node"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is no count", got=getattr(self, name), expected="at least 1")
        if not 0 <= self.link_gbit_per_s < float("inf"):
            raise ConfigError(
                "link_gbit_per_s is no speed", got=self.link_gbit_per_s, expected="Gbit per second, or 0 for unknown"
            )

    @property
    def ranks(self) -> int:
        """W."""
        return self.nodes * self.ranks_per_node


@final
@dataclass(frozen=True, kw_only=True, slots=True)
class Forecast:
    """Bytes that one rank sends for one layer, on average, and what its buffer reserves.

    transport, why: what "auto" takes, if every rank has a GPU or none has and nothing is missing.
    local, same_node, other_nodes: (bytes of a dispatch in layout "expert", deduplicated bytes): to itself, to ranks of
        its node, to other nodes. A combine with reduce "rank" moves the deduplicated bytes the other way.
    once_per_node_bytes: to other nodes with each token once per node, as `hierarchical` sends it.
    reserved_bytes: what a buffer reserves on each rank, address space of which pages are committed when rows arrive.
    received_bytes: what one dispatch gives a rank.
    layer_bytes, model_bytes: what dispatch and combine send between ranks for one layer, for all layers of the model
        (what enters a node is counted again where it is spread inside); a backward pass sends as much again.
    wire_ms: time that dispatch and combine of one layer need on the link of a node at its full speed, or None.
    """

    transport: str
    why: str
    local: tuple[int, int]
    same_node: tuple[int, int]
    other_nodes: tuple[int, int]
    once_per_node_bytes: int
    reserved_bytes: int
    received_bytes: int
    layer_bytes: int
    model_bytes: int
    wire_ms: float | None


def forecast(preset: Preset, cluster: Cluster, *, tokens: int, dtype: torch.dtype = torch.bfloat16) -> Forecast:
    """Compute it.

    Args:
        preset: the model, as in `moecomm.presets.PRESETS`.
        cluster: where it will run.
        tokens: T, tokens of each rank.
        dtype: of the rows.

    Raises:
        ConfigError: the shape is impossible.

    >>> from moecomm.presets import PRESETS
    >>> plan = forecast(PRESETS["deepseek-v3"], Cluster(nodes=4, ranks_per_node=8), tokens=4096)
    >>> plan.transport, round(plan.other_nodes[1] / plan.once_per_node_bytes, 2)
    ('hierarchical', 2.01)
    """
    if tokens < 1:
        raise ConfigError("tokens is no count", got=tokens, expected="at least 1")
    ranks, row_bytes = cluster.ranks, preset.hidden * dtype.itemsize
    placement = ExpertPlacement.uniform(preset.experts, ranks)
    held = placement.experts_per_rank
    hits = [_at_least_one(preset, count) for count in held]
    per_node = cluster.ranks_per_node
    node_hits = [_at_least_one(preset, sum(held[i : i + per_node])) for i in range(0, ranks, per_node)]

    def spread(rows_of_rank: list[float]) -> tuple[float, float, float]:
        """Averages over senders: rows to itself, to its node, to others."""
        total = sum(rows_of_rank)
        own = total / ranks
        node = sum(sum(rows_of_rank[i : i + per_node]) * per_node for i in range(0, ranks, per_node)) / ranks
        return own, node - own, total - node

    entries = spread([preset.top_k * count / preset.experts for count in held])
    pairs = spread(hits)
    local, same_node, other_nodes = (
        (round(tokens * e * row_bytes), round(tokens * p * row_bytes)) for e, p in zip(entries, pairs, strict=True)
    )
    once = round(tokens * row_bytes * sum(node_hits) * (cluster.nodes - 1) / cluster.nodes)
    transport, why = _transport(cluster)
    # What enters a node there is spread over its other ranks, and summed from them.
    layer = sum(same_node) + 2 * once + sum(other_nodes) * (per_node - 1) // per_node
    link_bytes_per_s = cluster.link_gbit_per_s * 1e9 / 8 if cluster.nodes > 1 else 0.0
    reserved = 0
    if transport in ("symmetric", "hierarchical"):
        memory = Buffer.plan_memory(
            num_ranks=ranks,
            num_experts=preset.experts,
            hidden=preset.hidden,
            top_k=preset.top_k,
            max_tokens_per_rank=tokens,
            dtype=dtype,
        )
        reserved = memory.total_bytes
    return Forecast(
        transport=transport,
        why=why,
        local=local,
        same_node=same_node,
        other_nodes=other_nodes,
        once_per_node_bytes=once,
        reserved_bytes=reserved,
        received_bytes=tokens * preset.top_k * row_bytes,
        layer_bytes=layer,
        model_bytes=layer * preset.layers,
        wire_ms=1e3 * per_node * 2 * once / link_bytes_per_s if link_bytes_per_s else None,
    )


def _at_least_one(preset: Preset, held: int) -> float:
    """The probability that a token has one of so many experts among its K."""
    return 1.0 - comb(preset.experts - held, preset.top_k) / comb(preset.experts, preset.top_k)


def _transport(cluster: Cluster) -> tuple[str, str]:
    if cluster.ranks == 1:
        return "local", "one rank: rows are permuted, nothing travels"
    if cluster.nodes == 1:
        return "symmetric", "all ranks share a node: rows go straight into the receiver's memory"
    if cluster.ranks_per_node == 1:
        return "hierarchical", "several nodes: each token crosses once to every node, where it has one rank"
    return "hierarchical", "several nodes: each token crosses once to every node, and is spread and summed inside it"
