"""The way home of expert rows: summed per token where they are, or one by one, and pushed to the token's rank.

Legend: P pairs (source, token) received, N rows, K top-k, H hidden, W ranks, M max tokens per rank.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from moecomm.kernels._launch import launch, num_programs
from moecomm.kernels._numeric import element_of, narrow
from moecomm.kernels.reduce import reduce_ref, sum_inputs, sum_rows
from moecomm.kernels.rows import row_at, used
from moecomm.kernels.sync import may_send, signal_ref, signal_when_all_arrived
from moecomm.kernels.wire import ROWS, STALLED, Link, Wire, area_of, view_memory
from torch import Tensor


@triton.jit(do_not_specialize=["num_pairs"])
def _push_reduced_kernel(
    rows,
    table,
    weights,
    wire_row,
    token,
    link,
    num_pairs,
    WIRE: tl.constexpr,
    SUM: tl.constexpr,
    EACH: tl.constexpr,
):
    COLUMNS: tl.constexpr = SUM.columns
    ELEMENT: tl.constexpr = rows.dtype.element_ty
    sequence = tl.load(link.state) + 1
    generation = sequence & 1
    column = tl.program_id(1) * SUM.block + tl.arange(0, SUM.block)
    inside = column < SUM.hidden
    base = rows.to(tl.int64)
    if may_send(link):
        for pair in range(tl.program_id(0), num_pairs, tl.num_programs(0)):
            at = tl.load(wire_row + pair)
            if at >= 0:
                source = at // link.max_tokens
                home = area_of(link, generation, ROWS, source, WIRE)
                if EACH:
                    number = tl.load(token + pair)
                    for k in tl.static_range(0, COLUMNS):
                        row = tl.load(table + tl.cast(pair, tl.int64) * SUM.columns + k)
                        data = row_at(base, row, SUM.row_bytes, ELEMENT, SUM.aligned)
                        value = tl.load(data + column, mask=used(inside, row))  # row access
                        place = tl.cast(number, tl.int64) * SUM.columns + k
                        target = row_at(home, place, WIRE.row_bytes, ELEMENT, SUM.aligned)
                        tl.store(target + column, value, mask=used(inside, row))  # row access
                else:
                    total = tl.full((SUM.block,), 0, tl.float32)
                    total = sum_rows(total, base, table, weights, pair, column, SUM, ELEMENT)
                    slot = at - source * link.max_tokens
                    target = row_at(home, link.rank * link.max_tokens + slot, WIRE.row_bytes, ELEMENT, SUM.aligned)
                    tl.store(target + column, narrow(total, ELEMENT), mask=inside)  # row access
        signal_when_all_arrived(link, sequence, WIRE)


def push_reduced(
    rows: Tensor,
    table: Tensor,
    weights: Tensor | None,
    wire_row: Tensor,
    token: Tensor,
    link: Link,
    *,
    wire: Wire,
    each: bool = False,
    max_programs: int | None = None,
) -> None:
    """Send expert rows home, then signal all ranks.

    Summed per pair (rank r's sum for its slot i of source s lands in row r * M + i of the rows area of s, which is what
    `pair_row` says there), or each row by itself and as it is (entry (t, k) lands in row t * K + k).

    Args:
        rows: (N, H) float32, float16 or bfloat16.
        table: (P, K) int32 row of each entry, -1 for none.
        weights: (N,) float32 by row, (P, K) float32 by entry, or None: no product; None if `each`.
        wire_row, token: (P,) int32 as `receive` gave them.
        link: this rank's end of the wire.
        wire: the shape of the wire.
        each: whether rows travel by themselves; then the rows area needs M * K rows.
        max_programs: upper bound for the grid's first axis; what fits on the GPU unless told.

    >>> from moecomm.kernels.wire import loopback
    >>> wire = Wire.of(world=1, top_k=2, max_local=2, row_bytes=16)
    >>> (link,), memory = loopback(wire, max_tokens=2)
    >>> table, zero = torch.tensor([[1, 0]], dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
    >>> push_reduced(torch.tensor([[1.0], [2.0]]), table, torch.tensor([[0.5, 3.0]]), zero, zero, link, wire=wire)
    >>> view_memory(int(link.peers[1, 0, 0]), (1,), torch.float32).tolist()
    [4.0]
    """
    _check(weights, wire_row, token, each)
    sums = sum_inputs(rows, table, weights)
    geometry = sums.geometry()
    num_pairs = table.shape[0]
    assert sums.form.wire_bytes <= wire.row_bytes, f"rows of {sums.form.wire_bytes} bytes, room for {wire.row_bytes}"
    warps, blocks = sums.warps(geometry), -(-geometry.hidden // geometry.block)
    launch(
        _push_reduced_kernel,
        (num_programs(num_pairs, table, max_programs, warps=warps, columns=blocks), blocks),
        *(sums.rows, sums.table, sums.weights, wire_row, token, link, num_pairs),
        num_warps=warps,
        WIRE=wire,
        SUM=geometry,
        EACH=each,
    )


def push_reduced_ref(
    rows: Tensor,
    table: Tensor,
    weights: Tensor | None,
    wire_row: Tensor,
    token: Tensor,
    link: Link,
    *,
    wire: Wire,
    each: bool = False,
    max_programs: int | None = None,
) -> None:
    """`push_reduced` in plain torch; all ranks' buffers must be CPU memory of this process."""
    _check(weights, wire_row, token, each)
    if int(link.status[int(STALLED)]):
        return
    element_of("rows", rows.dtype)
    generation = (int(link.state[0]) + 1) & 1
    sums = reduce_ref(rows, table, weights)
    row_bytes = rows.shape[1] * rows.element_size()
    for pair, at in enumerate(wire_row.tolist()):
        if at < 0:
            continue
        source, slot = divmod(at, link.max_tokens)
        home = int(link.peers[generation, int(ROWS), source])
        sent = [(link.rank * link.max_tokens + slot, sums[pair])]
        if each:
            first = int(token[pair]) * table.shape[1]
            sent = [(first + k, rows[row].contiguous()) for k, row in enumerate(table[pair].tolist()) if row >= 0]
        for place, row in sent:
            view_memory(home + place * wire.row_bytes, (row_bytes,), torch.uint8).copy_(row.view(torch.uint8))
    signal_ref(link, wire)


def _check(weights: Tensor | None, wire_row: Tensor, token: Tensor, each: bool) -> None:
    assert not (each and weights is not None), "rows that travel by themselves are weighted at their destination"
    for name, places in (("wire_row", wire_row), ("token", token)):
        assert places.dtype == torch.int32 and places.ndim == 1 and places.is_contiguous(), f"{name} is not (P,) int32"
