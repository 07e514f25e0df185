"""Heat maps of expert load and of traffic between ranks. Needs matplotlib: pip install 'moecomm[viz]'."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from moecomm.buffer import Buffer
from moecomm.errors import ConfigError, UnsupportedError


def gather_load(buffer: Buffer, topk_idx: Tensor) -> Tensor:
    """Count the choices of every expert, over all ranks; collective.

    Args:
        buffer: whose experts they are.
        topk_idx: (T, K) global expert ids of this rank, -1 for none.

    Returns:
        (E,) int64, on the CPU.

    >>> buffer = Buffer(num_experts=3, hidden=1, top_k=1, max_tokens_per_rank=4)
    >>> gather_load(buffer, torch.tensor([[0], [2], [2], [-1]])).tolist()
    [1, 0, 2]
    """
    experts = buffer.config.placement.num_experts
    chosen = topk_idx[topk_idx >= 0].cpu()
    return torch.stack(buffer.group.all_gather_object(torch.bincount(chosen, minlength=experts))).sum(0)


def gather_traffic(buffer: Buffer, topk_idx: Tensor) -> Tensor:
    """Count the tokens that each rank sends to each rank, once per pair; collective.

    Args:
        buffer: whose ranks they are.
        topk_idx: (T, K) global expert ids of this rank, -1 for none.

    Returns:
        (W, W) int64, on the CPU: row = source, column = destination.

    >>> buffer = Buffer(num_experts=3, hidden=1, top_k=2, max_tokens_per_rank=4)
    >>> gather_traffic(buffer, torch.tensor([[0, 1], [-1, -1]])).tolist()
    [[1]]
    """
    ranks = buffer.group.size
    rank_of = torch.tensor([*buffer.config.placement.rank_of_expert, ranks])  # the last one is for -1
    hit = (rank_of[topk_idx.cpu().long()][:, :, None] == torch.arange(ranks)).any(1)
    return torch.stack(buffer.group.all_gather_object(hit.sum(0)))


def expert_load(load: Tensor, *, names: Sequence[str] | None = None) -> Any:
    """Draw how often experts were chosen: one row per layer or step, one column per expert, over the mean.

    Args:
        load: (E,) or (rows, E) counts.
        names: of the rows.

    Returns:
        matplotlib Figure; `savefig` writes it.

    Raises:
        UnsupportedError: matplotlib is not installed.
        ConfigError: the counts have another shape.

    >>> expert_load(torch.tensor([[4, 1, 1, 2], [2, 2, 2, 2]]), names=["layer 0", "layer 1"]).axes[0].get_title()
    'expert load over the mean (1 is balanced), worst 2.00'
    """
    table = _table(load, "load")
    over_mean = table / table.mean(1, keepdim=True).clamp(min=1e-30)
    title = f"expert load over the mean (1 is balanced), worst {float(over_mean.max()):.2f}"
    return _heat_map(over_mean, title, ("expert", ""), names)


def peer_traffic(rows: Tensor, *, row_bytes: int | None = None) -> Any:
    """Draw how much each rank sends to each rank.

    Args:
        rows: (W, W) rows from source (row) to destination (column).
        row_bytes: bytes of one row, to show MB instead of rows.

    Returns:
        matplotlib Figure.

    Raises:
        UnsupportedError, ConfigError: as `expert_load`.

    >>> peer_traffic(torch.tensor([[0, 3], [5, 0]]), row_bytes=1_000_000).axes[0].get_title()
    'MB from rank to rank'
    """
    table = _table(rows, "rows")
    if table.shape[0] != table.shape[1]:
        raise ConfigError("rows is no square table", got=tuple(rows.shape), expected="(W, W)")
    scaled = table if row_bytes is None else table * row_bytes / 1e6
    return _heat_map(
        scaled, f"{'rows' if row_bytes is None else 'MB'} from rank to rank", ("to rank", "from rank"), None
    )


def _table(counts: Tensor, name: str) -> Tensor:
    if counts.dim() not in (1, 2) or not counts.numel():
        raise ConfigError(f"{name} is no table of counts", got=tuple(counts.shape), expected="one or two dimensions")
    return torch.atleast_2d(counts.detach().cpu().double())


def _heat_map(table: Tensor, title: str, labels: tuple[str, str], names: Sequence[str] | None) -> Any:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UnsupportedError(
            "heat maps need matplotlib", got=str(error), remedy="pip install 'moecomm[viz]'"
        ) from error
    rows, columns = table.shape
    figure = Figure(figsize=(min(14.0, 2.5 + 0.3 * columns), min(12.0, 1.8 + 0.3 * rows)), layout="constrained")
    axis = figure.subplots()
    image = axis.imshow(table.numpy(), aspect="auto", cmap="viridis", interpolation="nearest")
    axis.set(title=title, xlabel=labels[0], ylabel=labels[1])
    axis.set_yticks(range(rows), names if names is not None else [str(row) for row in range(rows)])
    if rows * columns <= 256:
        middle = float(table.max() + table.min()) / 2
        for row in range(rows):
            for column in range(columns):
                value = float(table[row, column])
                color = "white" if value < middle else "black"
                axis.text(column, row, f"{value:.3g}", ha="center", va="center", fontsize=7, color=color)
    figure.colorbar(image)
    return figure
