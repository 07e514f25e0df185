"""Row primitives: copy rows by index, sum rows by table, and the gradient of a weighted sum.

All three work on any device through plain torch (`*_ref`). On a CPU where llvmlite is
installed they run compiled loops that give the same bits, several times as fast; `backend()` says which is in use and
why. Rows are 2-D with a contiguous last dimension; the stride between rows is free, and an output may lie in memory
that is shared with other processes. Nothing here is recorded by autograd.

Legend: N rows, H columns, P sums, J entries per sum.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from types import ModuleType

import numpy as np
import torch
from torch import Tensor

from moecomm._compiled import compiled, why_not
from moecomm.blocks import LINE_BYTES

FLOATS = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16"}
DOT_LANES = 512  # partial sums of a row product
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_CHUNK_BYTES = 1 << 20  # the torch path works in pieces that stay in a cache
_STREAM_BYTES = 2 << 20  # outputs of this size go past the caches (2 processes on a Zen 5 VM, November 2026)
_SORT_ROWS = 4  # sort large copies by source, where there are at most so many source rows per entry
_THREAD_BYTES = 1 << 20  # least work that is worth a thread of its own


def backend() -> str:
    """Say what moves rows on a CPU: "llvmlite", or "torch (reason)".

    >>> backend().split()[0] in ("llvmlite", "torch")
    True
    """
    return "llvmlite" if _jit() is not None else f"torch ({why_not()})"


def _jit() -> ModuleType | None:
    return compiled("moecomm._rows_jit")


def copy_rows(out: Tensor, src: Tensor, src_index: Tensor, out_index: Tensor | None = None) -> None:
    """Copy rows as bytes: out[out_index[i]] = src[src_index[i]].

    Args:
        out: (P, H) any dtype, written.
        src: (N, H) same dtype.
        src_index: (n,) int32 or int64 row of `src`; an entry < 0 is skipped.
        out_index: (n,) int32 or int64 row of `out`, no row twice; an entry < 0 is skipped; None: row i.

    Raises:
        IndexError: an index is too large.

    >>> out = torch.zeros(3, 2)
    >>> copy_rows(out, torch.tensor([[1., 2.], [3., 4.]]), torch.tensor([1, 0]), torch.tensor([0, 2]))
    >>> out.tolist()
    [[3.0, 4.0], [0.0, 0.0], [1.0, 2.0]]
    """
    jit = _jit()
    if jit is None or not (out.is_cpu and src.is_cpu):
        return copy_rows_ref(out, src, src_index, out_index)
    (out_ptr, out_stride), (src_ptr, src_stride) = _rows("out", out), _rows("src", src)
    assert out.dtype == src.dtype and out.shape[1] == src.shape[1], f"rows {_seen(src)} do not fit into {_seen(out)}"
    assert out_index is None or out_index.shape == src_index.shape, f"{_seen(src_index)}, {_seen(out_index)}"
    count, row_bytes = src_index.shape[0], src.shape[1] * src.element_size()
    streaming = _streams(count * row_bytes, out_ptr, out_stride)
    if streaming and src.shape[0] <= _SORT_ROWS * count:
        src_index, out_index = _by_source(jit, src_index, out_index, src.shape[0], out.shape[0])
    kernel = jit.copy_kernel(_index_bits(src_index), _index_bits(out_index), streaming)
    places = out_ptr, out_stride, out.shape[0], src_ptr, src_stride, src.shape[0], row_bytes
    bad = _run(kernel, count, count * row_bytes, *places, src_index.data_ptr(), _address(out_index))
    if bad >= 0:
        raise _out_of_range(bad, src.shape[0], out.shape[0])


def can_scatter(num_bytes: int, sums_of: torch.dtype | None = None) -> bool:
    """Whether `scatter_rows`, or `scatter_sums` of a dtype, works and pays: it uses one thread and all caches.

    >>> can_scatter(1 << 30)
    False
    """
    jit = _jit()
    return num_bytes < _STREAM_BYTES and jit is not None and (sums_of is None or jit.supports(FLOATS[sums_of]))


def scatter_rows(
    outs: np.ndarray, src: Tensor, row_bytes: int, src_index: Tensor | None, every: int, slots: Tensor | None
) -> None:
    """`copy_rows` into several packed outputs on the host at once, section by section.

    Args:
        outs: (4, W) int64, of each of W outputs: its address, how many rows to write (its section of the entries),
            the first of them where slots do not say, and how many rows it has.
        src: (N, ...) rows on the host, contiguous, any dtype.
        row_bytes: bytes of one row.
        src_index: (n,) int32 or int64: `src_index // every` is the row of `src` for every entry of every section; None:
            entry i is row i.
        every: see there.
        slots: (n,) int32 or int64 row in the section's output, or None: they follow each other from `starts` on.

    Raises:
        IndexError: an index is too large, or negative.

    >>> src, out = torch.tensor([[1., 2.], [3., 4.]]), torch.zeros(3, 2)
    >>> scatter_rows(np.array([[out.data_ptr()], [2], [1], [3]]), src, 8, torch.tensor([5, 0]), 4, None)
    >>> out.tolist()
    [[0.0, 0.0], [3.0, 4.0], [1.0, 2.0]]
    """
    jit = _jit()
    assert jit is not None, "no compiler: ask can_scatter"
    kernel = jit.scatter_kernel(_index_bits(src_index), _index_bits(slots))
    assert outs.dtype == np.int64 and outs.flags.c_contiguous, f"outputs {outs.shape} {outs.dtype}"
    given = src.data_ptr(), src.shape[0], row_bytes, _address(src_index), every, _address(slots)
    bad = kernel(outs.shape[1], outs.ctypes.data, *given)
    if bad >= 0:
        raise IndexError(f"scatter_rows: entry {bad} lies outside {src.shape[0]} source or {outs[3]} output rows")


def scatter_sums(outs: np.ndarray, rows: Tensor, table_PJ: Tensor, weights: Tensor | None = None) -> None:
    """`reduce_rows` into several outputs (see `scatter_rows`) at once: section by section the next rows of the table.

    >>> rows, out = torch.tensor([[1., 2.], [10., 20.]]), torch.zeros(2, 2)
    >>> scatter_sums(np.array([[out.data_ptr()], [1], [1], [2]]), rows, torch.tensor([[0, 1]]))
    >>> out.tolist()
    [[0.0, 0.0], [11.0, 22.0]]
    """
    row_bytes, first = rows.shape[1] * rows.element_size(), 0
    call = _reduction(rows.dtype, rows, table_PJ, weights, None, streaming=False)
    for address, count, start, _ in outs.T.tolist():
        call(first, first + count, address + (start - first) * row_bytes, row_bytes)
        first += count


def _by_source(
    jit: ModuleType, src_index: Tensor, out_index: Tensor | None, num_src: int, num_out: int
) -> tuple[Tensor, Tensor]:
    """Sort entries by source row: those that read the same one then find it in a cache; targets may lie anywhere."""
    count = src_index.shape[0]
    starts = torch.zeros(num_src + 1, dtype=torch.int32, device=src_index.device)
    src_sorted, out_sorted = torch.full((2, count), -1, dtype=torch.int32, device=src_index.device)
    sort = jit.sort_kernel(_index_bits(src_index), _index_bits(out_index))
    pointers = (t.data_ptr() for t in (starts, src_sorted, out_sorted))
    bad = sort(count, num_out, num_src, src_index.data_ptr(), _address(out_index), *pointers)
    if bad >= 0:
        raise _out_of_range(bad, num_src, num_out)
    return src_sorted, out_sorted


def _out_of_range(entry: int, num_src: int, num_out: int) -> IndexError:
    return IndexError(f"copy_rows: entry {entry} lies outside {num_src} source or {num_out} output rows")


@torch.no_grad()
def copy_rows_ref(out: Tensor, src: Tensor, src_index: Tensor, out_index: Tensor | None = None) -> None:
    """`copy_rows` in plain torch."""
    integer = _INTEGERS[min(src.element_size(), 8)]
    out, src = out.view(integer), src.view(integer)
    if out_index is None:
        out_index = torch.arange(src_index.shape[0], device=src.device)
    used = (src_index >= 0) & (out_index >= 0)
    if not used.all():
        src_index, out_index = src_index[used], out_index[used]
    step = max(1, _CHUNK_BYTES // max(1, src.shape[1] * src.element_size()))
    for part in (slice(at, at + step) for at in range(0, src_index.shape[0], step)):
        out.index_copy_(0, out_index[part].long(), src.index_select(0, src_index[part]))


def reduce_rows(
    out: Tensor, rows: Tensor, table_PJ: Tensor, weights: Tensor | None = None, bias: Tensor | None = None
) -> None:
    """Sum rows in a fixed order: out[p] = round(bias[p] + sum over ascending j of w * rows[table[p, j]]).

    The sum is float32 and starts from float32(bias[p]) or +0; each product is rounded to float32 before it is added
    (no fused multiply-add); the sum is rounded to nearest even once, at the end. A result that is not a number is
    always the same NaN.

    Args:
        out: (P, H) float32, float16 or bfloat16, written.
        rows: (N, H) float32, float16 or bfloat16.
        table_PJ: (P, J) int32 or int64 row of `rows`; an entry < 0 is skipped: nothing is read or added for it.
        weights: (N,) float32 by row number, or (P, J) float32 by entry, or None: no product.
        bias: (P, H) float32, float16 or bfloat16, or None.

    Raises:
        IndexError: an entry is N or more.

    >>> rows, out = torch.tensor([[1., 2.], [10., 20.]]), torch.empty(2, 2)
    >>> reduce_rows(out, rows, torch.tensor([[0, 1], [-1, 0]]), weights=torch.tensor([0.5, 2.0]))
    >>> out.tolist()
    [[20.5, 41.0], [0.5, 1.0]]
    """
    jit = _jit()
    if jit is None or not (out.is_cpu and rows.is_cpu and _supported(jit, out, rows, bias)):
        return reduce_rows_ref(out, rows, table_PJ, weights, bias)
    assert out.shape == (len(table_PJ), rows.shape[1]), (
        f"rows {_seen(rows)}, table {_seen(table_PJ)} do not give {_seen(out)}"
    )
    assert bias is None or bias.shape == out.shape, f"bias {_seen(bias)} for out {_seen(out)}"
    out_ptr, out_stride = _rows("out", out)
    streaming = _streams(out.numel() * out.element_size(), out_ptr, out_stride)
    call = _reduction(out.dtype, rows, table_PJ, weights, bias, streaming=streaming)
    _run(call, len(out), rows.numel() * rows.element_size(), out_ptr, out_stride)


def _reduction(
    out_dtype: torch.dtype,
    rows: Tensor,
    table_PJ: Tensor,
    weights: Tensor | None,
    bias: Tensor | None,
    *,
    streaming: bool,
) -> Callable[[int, int, int, int], int]:
    """The compiled sum with everything but (begin, end, out, out_stride) filled in."""
    jit = _jit()
    assert jit is not None
    mode, weights_ptr, weights_stride = None, 0, 0
    if weights is not None:
        mode = "row" if weights.ndim == 1 else "entry"
        fits = weights.shape == (rows.shape[:1] if mode == "row" else table_PJ.shape)
        assert fits and weights.dtype == torch.float32, f"weights {_seen(weights)} for table {_seen(table_PJ)}"
        weights_ptr, weights_stride = _rows("weights", weights if mode == "entry" else weights[None])
    bias_name, bias_ptr, bias_stride = None, 0, 0
    if bias is not None:
        bias_name, (bias_ptr, bias_stride) = FLOATS[bias.dtype], _rows("bias", bias)
    variant = FLOATS[rows.dtype], FLOATS[out_dtype], bias_name, _index_bits(table_PJ), mode, streaming
    kernel = jit.reduce_kernel(*variant)
    table = *_rows("table_PJ", table_PJ), table_PJ.shape[1]
    given = *_rows("rows", rows), *rows.shape, *table, weights_ptr, weights_stride, bias_ptr, bias_stride

    def call(begin: int, end: int, out: int, out_stride: int) -> int:
        bad = kernel(begin, end, out, out_stride, *given)
        if bad >= 0:
            raise IndexError(f"reduce_rows: table row {bad} names a row that is not among the {len(rows)}")
        return bad

    return call


@torch.no_grad()
def reduce_rows_ref(
    out: Tensor, rows: Tensor, table_PJ: Tensor, weights: Tensor | None = None, bias: Tensor | None = None
) -> None:
    """`reduce_rows` in plain torch."""
    step = max(1, _CHUNK_BYTES // max(1, 4 * rows.shape[1]))
    for part in (slice(at, at + step) for at in range(0, out.shape[0], step)):
        total = torch.zeros_like(out[part], dtype=torch.float32) if bias is None else bias[part].float()
        for j in range(table_PJ.shape[1] if rows.shape[0] else 0):
            entry = table_PJ[part, j].long()
            row = entry.clamp(min=0)
            value = rows.index_select(0, row).float()
            if weights is not None:
                value = value * (weights[row] if weights.ndim == 1 else weights[part, j])[:, None]
            total = torch.where((entry >= 0)[:, None], total + value, total)
        out[part] = _rounded(total, out.dtype)


def reduce_columns(out: Tensor, sources: Sequence[Tensor], table_PJ: Tensor) -> None:
    """`reduce_rows` of rows that lie apart: out[p] = round(sum over ascending j of sources[j][table[p, j]]).

    Args:
        out: (P, H) float32, float16 or bfloat16, written.
        sources: J of (N_j, H) of one of these dtypes, contiguous.
        table_PJ: (P, J) int64; an entry < 0 is skipped.

    Raises:
        IndexError: an entry of column j is N_j or more.

    >>> out = torch.empty(2, 1)
    >>> reduce_columns(out, [torch.tensor([[1.]]), torch.tensor([[10.], [20.]])], torch.tensor([[0, 1], [-1, 0]]))
    >>> out.tolist()
    [[21.0], [10.0]]
    """
    fits = table_PJ.shape == (len(out), len(sources)) and table_PJ.dtype == torch.int64
    assert fits, f"table {_seen(table_PJ)} of {len(sources)} sources does not give {_seen(out)}"
    for rows in sources:
        alike = rows.shape[1] == out.shape[1] and rows.dtype == sources[0].dtype
        assert alike, f"rows {_seen(rows)} beside {_seen(sources[0])} do not give {_seen(out)}"
    ends = torch.tensor([len(rows) for rows in sources])
    if (table_PJ >= ends).any():
        raise IndexError(f"reduce_columns: a table names a row that is not among the {ends.tolist()} of its column")
    jit = _jit()
    if jit is None or not (out.is_cpu and _supported(jit, out, *sources[:1])):
        table_PJ = torch.where(table_PJ < 0, table_PJ, table_PJ + (ends.cumsum(0) - ends))
        return reduce_rows_ref(out, torch.cat([*sources]), table_PJ)
    places = torch.tensor([_rows("sources", rows) for rows in sources])
    addresses = torch.where(table_PJ < 0, table_PJ, table_PJ * places[:, 1] + places[:, 0])
    out_ptr, out_stride = _rows("out", out)
    streaming = _streams(out.numel() * out.element_size(), out_ptr, out_stride)
    kernel = jit.reduce_kernel(FLOATS[sources[0].dtype], FLOATS[out.dtype], None, 64, None, streaming)
    all_memory = 0, 1, torch.iinfo(torch.int64).max  # rows of which one begins at each byte
    given = out_ptr, out_stride, *all_memory, out.shape[1], *_rows("table", addresses), len(sources), 0, 0, 0, 0
    _run(kernel, len(out), len(sources) * out.numel() * out.element_size(), *given)


def scale_rows_grad(
    grad_rows_out: Tensor | None, grad_weights_out: Tensor | None, grad_NH: Tensor, rows_NH: Tensor, weights_N: Tensor
) -> None:
    """Differentiate weights[n] * rows[n]: grad_rows = weights * grad, grad_weights = dot of grad and rows, by row.

    The dot is float32 in a fixed order: column c belongs to partial sum c mod 512, which adds its products (each
    rounded) in ascending c; then the upper half of the partial sums is added to the lower half until one is left. A
    result that is not a number is always the same NaN.

    Args:
        grad_rows_out: (N, H) float32, float16 or bfloat16, written; None: not wanted.
        grad_weights_out: (N,) float32, written; None: not wanted.
        grad_NH: (N, H) float32, float16 or bfloat16.
        rows_NH: (N, H) float32, float16 or bfloat16.
        weights_N: (N,) float32.

    >>> grad_rows, grad_weights, grad = torch.empty(1, 2), torch.empty(1), torch.tensor([[1., 2.]])
    >>> scale_rows_grad(grad_rows, grad_weights, grad, torch.tensor([[3., 4.]]), torch.tensor([0.5]))
    >>> grad_rows.tolist(), grad_weights.tolist()
    ([[0.5, 1.0]], [11.0])
    """
    jit = _jit()
    if jit is None or not (grad_NH.is_cpu and rows_NH.is_cpu and _supported(jit, grad_NH, rows_NH, grad_rows_out)):
        return scale_rows_grad_ref(grad_rows_out, grad_weights_out, grad_NH, rows_NH, weights_N)
    count, hidden = grad_NH.shape
    assert rows_NH.shape == grad_NH.shape, f"rows {_seen(rows_NH)} for grad {_seen(grad_NH)}"
    for vector in (weights_N,) if grad_weights_out is None else (weights_N, grad_weights_out):
        fits = vector.shape == (count,) and vector.dtype == torch.float32 and vector.is_contiguous()
        assert fits, f"weights or their gradient {_seen(vector)} for grad {_seen(grad_NH)}"
    out_name, out_ptr, out_stride, streaming = None, 0, 0, False
    if grad_rows_out is not None:
        assert grad_rows_out.shape == grad_NH.shape, f"grad_rows_out {_seen(grad_rows_out)} for grad {_seen(grad_NH)}"
        out_name, (out_ptr, out_stride) = FLOATS[grad_rows_out.dtype], _rows("grad_rows_out", grad_rows_out)
        streaming = _streams(count * hidden * grad_rows_out.element_size(), out_ptr, out_stride)
    variant = FLOATS[rows_NH.dtype], FLOATS[grad_NH.dtype], out_name, grad_weights_out is not None, streaming
    inputs = *_rows("grad_NH", grad_NH), *_rows("rows_NH", rows_NH), weights_N.data_ptr(), hidden
    work_bytes = count * hidden * grad_NH.element_size()
    _run(jit.grad_kernel(*variant), count, work_bytes, out_ptr, out_stride, _address(grad_weights_out), *inputs)


@torch.no_grad()
def scale_rows_grad_ref(
    grad_rows_out: Tensor | None, grad_weights_out: Tensor | None, grad_NH: Tensor, rows_NH: Tensor, weights_N: Tensor
) -> None:
    """`scale_rows_grad` in plain torch."""
    step = max(1, _CHUNK_BYTES // max(1, 4 * grad_NH.shape[1]))
    for part in (slice(at, at + step) for at in range(0, grad_NH.shape[0], step)):
        grad = grad_NH[part].float()
        if grad_rows_out is not None:
            grad_rows_out[part] = _rounded(weights_N[part, None] * grad, grad_rows_out.dtype)
        if grad_weights_out is None:
            continue
        product = grad * rows_NH[part].float()
        total = torch.zeros(grad.shape[0], DOT_LANES, dtype=torch.float32, device=grad.device)
        for block in product.split(DOT_LANES, dim=1):
            total[:, : block.shape[1]] += block
        while total.shape[1] > 1:
            low, high = total.chunk(2, dim=1)
            total = low + high
        grad_weights_out[part] = _rounded(total[:, 0], torch.float32)


def _rounded(value: Tensor, dtype: torch.dtype) -> Tensor:
    """Round, and make every NaN the same: torch converts them to one of two, by column and by machine."""
    value = value.to(dtype)
    return torch.where(value.isnan(), torch.nan, value)


def _rows(name: str, tensor: Tensor) -> tuple[int, int]:
    """Address of the first row, and bytes from one row to the next."""
    shaped = tensor.ndim == 2 and (tensor.stride(1) == 1 or tensor.shape[1] <= 1)
    assert shaped and tensor.is_cpu, (
        f"{name} {_seen(tensor)}: expected 2-D on the CPU, contiguous in the last dimension"
    )
    return tensor.data_ptr(), tensor.stride(0) * tensor.element_size()


def _index_bits(index: Tensor | None) -> int:
    if index is None:
        return 0
    packed = index.is_cpu and (index.stride(-1) == 1 or index.shape[-1] <= 1)
    assert packed, f"indices {_seen(index)}: expected them contiguous on the CPU"
    assert index.dtype in (torch.int32, torch.int64), f"indices {_seen(index)}: expected int32 or int64"
    return 32 if index.dtype == torch.int32 else 64


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _seen(tensor: Tensor | None) -> str:
    if tensor is None:
        return "none"
    return f"{tuple(tensor.shape)} {tensor.dtype} strides {tensor.stride()} on {tensor.device}"


def _supported(jit: ModuleType, *tensors: Tensor | None) -> bool:
    return all(jit.supports(FLOATS[tensor.dtype]) for tensor in tensors if tensor is not None)


def _streams(num_bytes: int, ptr: int, stride: int) -> bool:
    """Whether to write past the caches: a large output is read by another core, later."""
    return num_bytes >= _STREAM_BYTES and ptr % LINE_BYTES == 0 and stride % LINE_BYTES == 0


def _run(kernel: Callable[..., int], count: int, num_bytes: int, *args: int) -> int:
    """Call the kernel on entries 0 to count, over as many threads as torch would use and the work is worth."""
    threads = min(count, num_bytes // _THREAD_BYTES, torch.get_num_threads())
    if threads <= 1:
        return kernel(0, count, *args)
    mine, *others = ((count * n // threads, count * (n + 1) // threads) for n in range(threads))
    pool = _pool(os.getpid(), torch.get_num_threads())
    parts = [pool.submit(kernel, *span, *args) for span in others]
    bad = [kernel(*mine, *args), *(part.result() for part in parts)]
    return next((entry for entry in bad if entry >= 0), -1)


@cache
def _pool(pid: int, threads: int) -> ThreadPoolExecutor:  # by process: threads do not survive a fork
    return ThreadPoolExecutor(threads - 1, thread_name_prefix="moecomm-rows")
