"""Row primitives: copy rows by index, sum rows by table, and the gradient of a weighted sum.

All three work on any device through plain torch (`*_ref`). On a CPU where llvmlite (which numba brings along) is installed they
run compiled loops with the same bits, several times as fast; `backend()` says which is in use and why. Rows are 2-D with a
contiguous last dimension; the stride between rows is free, and an output may lie in memory shared with other processes.

Legend: N rows, H columns, P summed rows, J entries per summed row.
"""

from __future__ import annotations

from functools import cache
from types import ModuleType

import torch
from torch import Tensor

FLOATS = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16"}
DOT_LANES = 512
_INT_OF_BYTES = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_CHUNK_BYTES = 1 << 20  # the torch path works in pieces that stay in a cache


def backend() -> str:
    """Say what moves rows on a CPU: "llvmlite", or "torch (reason)".

    >>> backend().split()[0] in ("llvmlite", "torch")
    True
    """
    jit, reason = _load_jit()
    return "llvmlite" if jit is not None else f"torch ({reason})"


@cache
def _load_jit() -> tuple[ModuleType | None, str]:
    try:
        from moecomm import _rows_jit
    except ImportError as error:
        return None, f"llvmlite is not installed: {error}"
    return _rows_jit, ""


def copy_rows(out: Tensor, src: Tensor, src_index: Tensor, out_index: Tensor | None = None) -> None:
    """Copy rows as bytes: out[out_index[i]] = src[src_index[i]].

    Args:
        out: (P, H) any dtype, written.
        src: (N, H) same dtype.
        src_index: (n,) int32 or int64 row of `src`; -1 skips the entry.
        out_index: (n,) int32 or int64 row of `out`, no row twice; -1 skips the entry; None: row i.

    Raises:
        IndexError: an index is out of range.

    >>> out = torch.zeros(3, 2)
    >>> copy_rows(out, torch.tensor([[1., 2.], [3., 4.]]), torch.tensor([1, 0]), torch.tensor([0, 2]))
    >>> out.tolist()
    [[3.0, 4.0], [0.0, 0.0], [1.0, 2.0]]
    """
    jit = _load_jit()[0]
    if jit is None or not (out.is_cpu and src.is_cpu):
        return copy_rows_ref(out, src, src_index, out_index)
    _check_rows("out", out)
    _check_rows("src", src)
    assert out.dtype == src.dtype and out.shape[1] == src.shape[1], (
        f"copy_rows of {src.shape} {src.dtype} to {out.shape} {out.dtype}"
    )
    count, item = src_index.shape[0], src.element_size()
    kernel = jit.copy_kernel(_index_bits(src_index), 0 if out_index is None else _index_bits(out_index), False)
    bad = kernel(
        0,
        count,
        out.data_ptr(),
        out.stride(0) * item,
        out.shape[0],
        src.data_ptr(),
        src.stride(0) * item,
        src.shape[0],
        src.shape[1] * item,
        src_index.data_ptr(),
        0 if out_index is None else out_index.data_ptr(),
    )
    if bad >= 0:
        raise IndexError(
            f"copy_rows: entry {bad} is out of range for {src.shape[0]} source and {out.shape[0]} output rows"
        )


@torch.no_grad()
def copy_rows_ref(out: Tensor, src: Tensor, src_index: Tensor, out_index: Tensor | None = None) -> None:
    """`copy_rows` in plain torch."""
    kind = _INT_OF_BYTES[min(src.element_size(), 8)]
    out, src = out.view(kind), src.view(kind)
    if out_index is None:
        out_index = torch.arange(src_index.shape[0], device=src.device)
    keep = (src_index >= 0) & (out_index >= 0)
    if not keep.all():
        src_index, out_index = src_index[keep], out_index[keep]
    step = max(1, _CHUNK_BYTES // max(1, src.shape[1] * src.element_size()))
    for at in range(0, src_index.shape[0], step):
        out.index_copy_(0, out_index[at : at + step].long(), src.index_select(0, src_index[at : at + step]))


def reduce_rows(
    out: Tensor, rows: Tensor, table_PJ: Tensor, weights: Tensor | None = None, bias: Tensor | None = None
) -> None:
    """Sum rows in a fixed order: out[p] = round(bias[p] + sum over ascending j of w * rows[table[p, j]]).

    Sums in float32 from float32(bias[p]) or +0, each product rounded to float32 before it is added (no fused multiply-add), rounded
    to nearest even once at the end. A NaN in the result is always the same NaN, whatever its bits were.

    Args:
        out: (P, H) float32, float16 or bfloat16, written.
        rows: (N, H) float32, float16 or bfloat16.
        table_PJ: (P, J) int32 or int64 row of `rows`; entries < 0 are skipped and nothing is read for them.
        weights: None (no product), (N,) float32 by row number, or (P, J) float32 by entry.
        bias: (P, H) float32, float16 or bfloat16.

    Raises:
        IndexError: an entry is N or more.

    >>> rows, out = torch.tensor([[1., 2.], [10., 20.]]), torch.empty(2, 2)
    >>> reduce_rows(out, rows, torch.tensor([[0, 1], [-1, 0]]), weights=torch.tensor([0.5, 2.0]))
    >>> out.tolist()
    [[20.5, 41.0], [0.5, 1.0]]
    """
    jit = _load_jit()[0]
    if jit is None or not (
        out.is_cpu and rows.is_cpu and all(map(jit.supports, (FLOATS[out.dtype], FLOATS[rows.dtype])))
    ):
        return reduce_rows_ref(out, rows, table_PJ, weights, bias)
    for name, tensor in (("out", out), ("rows", rows), ("table", table_PJ)):
        _check_rows(name, tensor)
    num_out, width = table_PJ.shape
    assert out.shape == (num_out, rows.shape[1]), f"reduce_rows of {rows.shape} by {table_PJ.shape} into {out.shape}"
    mode, weights_ptr, weights_stride = None, 0, 0
    if weights is not None:
        mode = "row" if weights.ndim == 1 else "entry"
        expected = rows.shape[:1] if mode == "row" else table_PJ.shape
        assert weights.dtype == torch.float32 and weights.shape == expected and weights.stride(-1) == 1, (
            f"weights {weights.shape} {weights.dtype}"
        )
        weights_ptr, weights_stride = weights.data_ptr(), weights.stride(0) * 4
    bias_name, bias_ptr, bias_stride = None, 0, 0
    if bias is not None:
        _check_rows("bias", bias)
        assert bias.shape == out.shape, f"bias {bias.shape} for {out.shape}"
        bias_name, bias_ptr, bias_stride = FLOATS[bias.dtype], bias.data_ptr(), bias.stride(0) * bias.element_size()
    kernel = jit.reduce_kernel(FLOATS[rows.dtype], FLOATS[out.dtype], bias_name, _index_bits(table_PJ), mode, False)
    bad = kernel(
        0,
        num_out,
        out.data_ptr(),
        out.stride(0) * out.element_size(),
        rows.data_ptr(),
        rows.stride(0) * rows.element_size(),
        rows.shape[0],
        rows.shape[1],
        table_PJ.data_ptr(),
        table_PJ.stride(0) * table_PJ.element_size(),
        width,
        weights_ptr,
        weights_stride,
        bias_ptr,
        bias_stride,
    )
    if bad >= 0:
        raise IndexError(f"reduce_rows: table row {bad} names a row beyond the {rows.shape[0]} there are")


@torch.no_grad()
def reduce_rows_ref(
    out: Tensor, rows: Tensor, table_PJ: Tensor, weights: Tensor | None = None, bias: Tensor | None = None
) -> None:
    """`reduce_rows` in plain torch."""
    step = max(1, _CHUNK_BYTES // max(1, 4 * rows.shape[1]))
    for at in range(0, out.shape[0], step):
        part = slice(at, at + step)
        total = (
            torch.zeros(out[part].shape, dtype=torch.float32, device=out.device) if bias is None else bias[part].float()
        )
        for j in range(table_PJ.shape[1] if rows.shape[0] else 0):
            entry = table_PJ[part, j].long()
            used, row = (entry >= 0)[:, None], entry.clamp(min=0)
            value = rows.index_select(0, row).float()
            if weights is not None:
                value *= (weights[row] if weights.ndim == 1 else weights[part, j])[:, None]
            total = torch.where(used, total + value, total)
        out[part] = torch.where(total.isnan(), torch.nan, total)


def scale_rows_grad(
    grad_rows_out: Tensor | None, grad_weights_out: Tensor | None, grad_NH: Tensor, rows_NH: Tensor, weights_N: Tensor
) -> None:
    """Give the gradients of weights[n] * rows[n]: grad_rows = weights * grad, grad_weights = row product of grad and rows.

    The row product is float32 in a fixed order: column c goes to partial sum c mod 512 in ascending c, each product rounded before
    it is added; then the upper half of the 512 sums is added to the lower half until one is left.

    Args:
        grad_rows_out: (N, H) float32, float16 or bfloat16, written; None: not wanted.
        grad_weights_out: (N,) float32, written; None: not wanted.
        grad_NH: (N, H) float32, float16 or bfloat16.
        rows_NH: (N, H) float32, float16 or bfloat16.
        weights_N: (N,) float32.

    >>> grad_rows, grad_weights = torch.empty(1, 2), torch.empty(1)
    >>> scale_rows_grad(grad_rows, grad_weights, torch.tensor([[1., 2.]]), torch.tensor([[3., 4.]]), torch.tensor([0.5]))
    >>> grad_rows.tolist(), grad_weights.tolist()
    ([[0.5, 1.0]], [11.0])
    """
    jit = _load_jit()[0]
    names = [FLOATS[t.dtype] for t in (rows_NH, grad_NH, grad_rows_out) if t is not None]
    if jit is None or not (grad_NH.is_cpu and all(map(jit.supports, names))):
        return scale_rows_grad_ref(grad_rows_out, grad_weights_out, grad_NH, rows_NH, weights_N)
    outs = () if grad_rows_out is None else (("grad_rows_out", grad_rows_out),)
    for name, tensor in (("grad", grad_NH), ("rows", rows_NH), *outs):
        _check_rows(name, tensor)
        assert tensor.shape == grad_NH.shape, f"{name} {tensor.shape} for grad {grad_NH.shape}"
    for name, vector in (("weights", weights_N), ("grad_weights_out", grad_weights_out)):
        assert vector is None or (
            vector.dtype == torch.float32 and vector.shape == grad_NH.shape[:1] and vector.is_contiguous()
        ), name
    if grad_rows_out is None and grad_weights_out is None:
        return
    kernel = jit.grad_kernel(names[0], names[1], names[2] if len(names) > 2 else None, grad_weights_out is not None)
    out_ptr, out_stride = (
        (0, 0)
        if grad_rows_out is None
        else (grad_rows_out.data_ptr(), grad_rows_out.stride(0) * grad_rows_out.element_size())
    )
    kernel(
        0,
        grad_NH.shape[0],
        out_ptr,
        out_stride,
        0 if grad_weights_out is None else grad_weights_out.data_ptr(),
        grad_NH.data_ptr(),
        grad_NH.stride(0) * grad_NH.element_size(),
        rows_NH.data_ptr(),
        rows_NH.stride(0) * rows_NH.element_size(),
        weights_N.data_ptr(),
        grad_NH.shape[1],
    )


@torch.no_grad()
def scale_rows_grad_ref(
    grad_rows_out: Tensor | None, grad_weights_out: Tensor | None, grad_NH: Tensor, rows_NH: Tensor, weights_N: Tensor
) -> None:
    """`scale_rows_grad` in plain torch."""
    step = max(1, _CHUNK_BYTES // max(1, 4 * grad_NH.shape[1]))
    for at in range(0, grad_NH.shape[0], step):
        part = slice(at, at + step)
        grad = grad_NH[part].float()
        if grad_rows_out is not None:
            scaled = weights_N[part, None] * grad
            grad_rows_out[part] = torch.where(scaled.isnan(), torch.nan, scaled)
        if grad_weights_out is not None:
            product = grad * rows_NH[part].float()
            total = torch.zeros(grad.shape[0], DOT_LANES, device=grad.device)
            for column in range(0, grad.shape[1], DOT_LANES):
                block = product[:, column : column + DOT_LANES]
                total[:, : block.shape[1]] += block
            half = DOT_LANES // 2
            while half:
                total = total[:, :half] + total[:, half:]
                half //= 2
            grad_weights_out[part] = torch.where(total.isnan(), torch.nan, total)[:, 0]


def _check_rows(name: str, tensor: Tensor) -> None:
    assert tensor.ndim == 2 and (tensor.stride(1) == 1 or tensor.shape[1] <= 1), (
        f"{name} is {tuple(tensor.shape)} with strides {tensor.stride()}; expected 2-D with a contiguous last dimension"
    )


def _index_bits(index: Tensor) -> int:
    assert index.dtype in (torch.int32, torch.int64) and index.is_cpu and (index.ndim == 2 or index.is_contiguous()), (
        f"index is {index.dtype} {tuple(index.shape)} on {index.device}"
    )
    return 32 if index.dtype == torch.int32 else 64
