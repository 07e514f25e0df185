"""How many bytes an operation must move: the one place that counts them, from the routing alone.

A row *must move* once from where it lies to where it is wanted. Every path is held against the same numbers, whatever
it moves in fact (headers, staging copies, rows sent twice).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from moecomm import ExpertPlacement


@dataclass(frozen=True, slots=True)
class Traffic:
    """Bytes of one operation that one rank accounts for.

    local: rows that this rank sends to itself.
    remote: rows that it sends to other ranks: one per (token, expert) in dispatch with layout "expert", one per
        (token, rank) where rows are deduplicated (layout "rank") or summed before they leave (combine, reduce "rank").
    dedup_local, dedup_remote: the same two with one row per (token, rank), the least that any wire can carry.
    moved: what a memory must read and write, halved: the bytes of a memcpy that reads and writes as much.
    """

    local: int
    remote: int
    dedup_local: int
    dedup_remote: int
    moved: int


def count_rows(topk_idx: Sequence[np.ndarray], placement: ExpertPlacement) -> tuple[np.ndarray, np.ndarray]:
    """Count (W, W) entries (token, expert) and pairs (token, rank), from every source to every destination.

    topk_idx: of every rank (T, K) global expert ids, -1 for none.

    >>> entries, pairs = count_rows([np.array([[0, 1], [2, -1]]), np.array([[3, 2]])], ExpertPlacement.uniform(4, 2))
    >>> entries.tolist(), pairs.tolist()
    ([[2, 1], [0, 2]], [[1, 1], [0, 1]])
    """
    num_ranks = placement.num_ranks
    rank_of = np.array([*placement.rank_of_expert, num_ranks])  # the last one is for -1
    hits = [(rank_of[ids][:, :, None] == np.arange(num_ranks)).sum(1) for ids in topk_idx]
    return np.array([hit.sum(0) for hit in hits]), np.array([(hit > 0).sum(0) for hit in hits])


def traffic(
    topk_idx: Sequence[np.ndarray],
    placement: ExpertPlacement,
    *,
    layout: str,
    reduce: str,
    row_bytes: int,
    wire_row_bytes: int | None = None,
) -> dict[str, list[Traffic]]:
    """Count the bytes of a dispatch and of its combine, for every rank.

    Dispatch reads and writes one row per entry (layout "expert") or pair (layout "rank"). Combine with reduce "rank"
    and layout "expert" reads every expert's row, writes one sum per pair, reads those at the source and writes one row
    per token; otherwise the rows come home as they are, so they are read and written once more.

    wire_row_bytes: of a row that dispatch sends, where that is not row_bytes: it is quantised.

    >>> t = traffic([np.array([[0, 1], [2, -1]]), np.array([[3, 2]])], ExpertPlacement.uniform(4, 2),
    ...             layout="expert", reduce="rank", row_bytes=2)
    >>> t["dispatch"][0]
    Traffic(local=4, remote=2, dedup_local=2, dedup_remote=2, moved=6)
    >>> t["combine"][1]  # 3 rows in, 2 sums out, 1 sum in, 1 token out
    Traffic(local=2, remote=2, dedup_local=2, dedup_remote=2, moved=7)
    """
    entries, pairs = count_rows(topk_idx, placement)
    out = entries if layout == "expert" else pairs
    summed = layout == "expert" and reduce == "rank"
    home = (pairs if summed else out).T  # from expert rank to source rank
    sent_bytes = row_bytes if wire_row_bytes is None else wire_row_bytes
    results: dict[str, list[Traffic]] = {"dispatch": [], "combine": []}
    for rank, ids in enumerate(topk_idx):
        read_here = entries[:, rank].sum() if summed else home[rank].sum()
        rows = int(read_here + home[rank].sum() + home[:, rank].sum() + len(ids))
        for name, size, sent, least, moved in (
            ("dispatch", sent_bytes, out[rank], pairs[rank], int(out[rank].sum()) * (row_bytes + sent_bytes) // 2),
            ("combine", row_bytes, home[rank], pairs[:, rank], rows * row_bytes // 2),
        ):
            here, least_here = int(sent[rank]), int(least[rank])
            rows_remote, least_remote = int(sent.sum()) - here, int(least.sum()) - least_here
            results[name].append(
                Traffic(
                    local=here * size,
                    remote=rows_remote * size,
                    dedup_local=least_here * size,
                    dedup_remote=least_remote * size,
                    moved=moved,
                )
            )
    return results
