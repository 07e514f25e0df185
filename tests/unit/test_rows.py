"""Row primitives: both implementations against loops in numpy, bit by bit."""

from __future__ import annotations

import mmap
import multiprocessing
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from torch import Tensor

from moecomm import rows

FLOATS = [torch.float32, torch.float16, torch.bfloat16]
BYTES = [torch.uint8, torch.bool, torch.float8_e4m3fn, torch.int16, torch.int32, torch.complex64, torch.complex128]
PATHS = ["llvmlite", "torch"]


@pytest.fixture(params=PATHS)
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Run the test on the compiled loops and on plain torch."""
    if request.param == "llvmlite":
        pytest.importorskip("llvmlite", reason="llvmlite is not installed")
        assert rows.backend() == "llvmlite"
    else:
        monkeypatch.setattr(rows, "_jit", lambda: None)
        monkeypatch.setattr(rows, "why_not", lambda: "a test asked for it")
        assert rows.backend() == "torch (a test asked for it)"
    yield request.param


@pytest.fixture(params=[1, 3], ids=["one_thread", "three_threads"])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    """Give torch, and so the primitives, that many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def bits(tensor: Tensor) -> Tensor:
    """The bytes of a tensor, as integers."""
    return tensor.view(torch.uint8)


def assert_same_bits(got: Tensor, expected: Tensor) -> None:
    """Compare bytes and name the first coordinate that differs."""
    assert got.dtype == expected.dtype and got.shape == expected.shape
    wrong = (bits(got) != bits(expected)).nonzero()
    assert not len(wrong), f"first of {len(wrong)} wrong bytes at {wrong[0].tolist()}"


def random_rows(count: int, hidden: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Rows of any bit pattern (integers, so also NaN payloads and subnormals), except that a bool is 0 or 1."""
    generator = torch.Generator().manual_seed(seed)
    size = (count, hidden * dtype.itemsize)
    return torch.randint(0, 2 if dtype == torch.bool else 256, size, dtype=torch.uint8, generator=generator).view(dtype)


def strided(tensor: Tensor, *, extra: int = 3) -> Tensor:
    """The same rows, with a gap of `extra` items between them that starts poisoned."""
    wide = torch.empty(tensor.shape[0], tensor.shape[1] + extra, dtype=tensor.dtype)
    wide.view(torch.uint8).fill_(0xA5)
    view = wide[:, : tensor.shape[1]]
    view.copy_(tensor)
    return view


def assert_gaps_untouched(view: Tensor, *, extra: int = 3) -> None:
    """The gaps that `strided` left are still poisoned."""
    gaps = view.as_strided((view.shape[0], extra), view.stride(), view.storage_offset() + view.shape[1])
    assert (bits(gaps) == 0xA5).all(), "wrote between the rows"


def reduce_loops(
    dtype: torch.dtype, values: Tensor, table: Tensor, weights: Tensor | None, bias: Tensor | None
) -> Tensor:
    """The definition of `reduce_rows`, one entry at a time."""
    value = values.float().numpy()
    out = np.zeros((table.shape[0], values.shape[1]), np.float32)
    with np.errstate(all="ignore"):
        for p in range(table.shape[0]):
            if bias is not None:
                out[p] = bias[p].float().numpy()
            for j in range(table.shape[1]):
                row = int(table[p, j])
                if row < 0:
                    continue
                term = value[row]
                if weights is not None:
                    term = np.float32(weights[row] if weights.ndim == 1 else weights[p, j]) * term
                out[p] = out[p] + term
    return torch.from_numpy(out).to(dtype)


# --- copy_rows ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", FLOATS + BYTES, ids=str)
@pytest.mark.parametrize("hidden", [1, 7, 64, 513])
@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64], ids=str)
def test_copy_moves_bits(path: str, dtype: torch.dtype, hidden: int, index_dtype: torch.dtype) -> None:
    src = strided(random_rows(20, hidden, dtype))
    out = strided(random_rows(30, hidden, dtype, seed=1))
    src_index = torch.randint(0, 20, (24,), dtype=index_dtype)
    out_index = torch.randperm(30)[:24].to(index_dtype)
    expected = out.clone()
    for i in range(24):
        expected[out_index[i]] = src[src_index[i]]
    rows.copy_rows(out, src, src_index, out_index)
    assert_same_bits(out, expected)
    assert_gaps_untouched(out)


def test_copy_without_out_index_fills_the_first_rows(path: str) -> None:
    src, out = random_rows(5, 9, torch.bfloat16), random_rows(6, 9, torch.bfloat16, seed=1)
    before = out.clone()
    rows.copy_rows(out, src, torch.tensor([4, 0, 4]))
    assert_same_bits(out, torch.cat([src[[4, 0, 4]], before[3:]]))


def test_copy_skips_negative_entries(path: str) -> None:
    src, out = random_rows(4, 5, torch.float32), random_rows(4, 5, torch.float32, seed=1)
    before = out.clone()
    rows.copy_rows(out, src, torch.tensor([0, -1, 2]), torch.tensor([1, 2, -1]))
    assert_same_bits(out, torch.stack([before[0], src[0], before[2], before[3]]))


@pytest.mark.parametrize(("src_entry", "out_entry"), [(4, 0), (0, 6), (2**31 - 1, 0)])
def test_copy_refuses_an_index_out_of_range(path: str, src_entry: int, out_entry: int) -> None:
    src, out = random_rows(4, 5, torch.float32), random_rows(6, 5, torch.float32)
    with pytest.raises(IndexError):
        rows.copy_rows(out, src, torch.tensor([0, src_entry]), torch.tensor([1, out_entry]))


@pytest.mark.parametrize(("count", "num_src", "hidden"), [(0, 3, 4), (3, 3, 0), (0, 0, 4)])
def test_copy_of_nothing(path: str, count: int, num_src: int, hidden: int) -> None:
    rows.copy_rows(torch.empty(3, hidden), torch.empty(num_src, hidden), torch.zeros(count, dtype=torch.int32))


@pytest.mark.parametrize("offset", [0, 1], ids=["aligned", "misaligned"])
def test_copy_of_a_large_output(path: str, offset: int, threads: int) -> None:
    hidden, count = 1024 + offset, 2 * rows._STREAM_BYTES // 2048
    src = random_rows(50, hidden, torch.bfloat16)
    src_index, out_index = torch.randint(0, 50, (count,)), torch.randperm(count)
    out = torch.empty(count, hidden, dtype=torch.bfloat16)
    rows.copy_rows(out, src, src_index, out_index)
    assert_same_bits(out[out_index], src[src_index])
    with pytest.raises(IndexError):
        src_index[-1] = 50
        rows.copy_rows(out, src, src_index, out_index)


# --- reduce_rows --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("hidden", [1, 15, 16, 64, 100, 257])
@pytest.mark.parametrize("weighted", ["none", "row", "entry"])
@pytest.mark.parametrize("biased", [False, True], ids=["no_bias", "bias"])
def test_reduce_is_the_definition(path: str, dtype: torch.dtype, hidden: int, weighted: str, biased: bool) -> None:
    torch.manual_seed(hidden)
    values = strided(torch.randn(12, hidden).to(dtype))
    table = torch.randint(-1, 12, (9, 5), dtype=torch.int32)
    table[3] = -1
    weights = {"none": None, "row": torch.randn(12), "entry": strided(torch.randn(9, 5))}[weighted]
    bias = strided(torch.randn(9, hidden).to(dtype)) if biased else None
    out = strided(torch.full((9, hidden), torch.nan, dtype=dtype))
    rows.reduce_rows(out, values, table, weights, bias)
    assert_same_bits(out, reduce_loops(dtype, values, table, weights, bias))
    assert_gaps_untouched(out)


@pytest.mark.parametrize("out_dtype", FLOATS, ids=str)
@pytest.mark.parametrize("rows_dtype", FLOATS, ids=str)
def test_reduce_converts_between_dtypes(path: str, rows_dtype: torch.dtype, out_dtype: torch.dtype) -> None:
    values, bias = torch.randn(8, 83).to(rows_dtype), torch.randn(6, 83)
    table, out = torch.randint(0, 8, (6, 3)), torch.empty(6, 83, dtype=out_dtype)
    rows.reduce_rows(out, values, table, None, bias)
    assert_same_bits(out, reduce_loops(out_dtype, values, table, None, bias))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_reduce_of_every_bit_pattern(path: str, dtype: torch.dtype) -> None:
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)[None]
    out = torch.empty_like(every)
    rows.reduce_rows(out, every, torch.tensor([[0]]))
    expected = (every.float() + 0.0).to(dtype)
    nan = every.isnan()
    assert_same_bits(out[~nan][None], expected[~nan][None])
    assert_same_bits(out[nan], torch.full_like(out[nan], torch.nan))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_reduce_rounds_as_torch_does(path: str, dtype: torch.dtype) -> None:
    """Halfway cases, subnormals of the output and overflow."""
    fine = torch.arange(2**16, dtype=torch.int32)
    scales = [torch.finfo(dtype).max, 1.0, torch.finfo(dtype).tiny, torch.finfo(dtype).smallest_normal / 64]
    for scale in scales:
        around = torch.tensor([scale]).view(torch.int32) + (fine - 2**15) * 64
        values = around.view(torch.float32)[None]
        out = torch.empty(values.shape, dtype=dtype)
        rows.reduce_rows(out, values, torch.tensor([[0]]))
        finite = ~values.isnan()
        assert_same_bits(out[finite], (values + 0.0).to(dtype)[finite])


def test_reduce_does_not_fuse_and_keeps_the_order(path: str) -> None:
    torch.manual_seed(0)
    values, weights = torch.randn(3, 4096), torch.randn(3)
    out = torch.empty(1, 4096)
    rows.reduce_rows(out, values, torch.tensor([[0, 1, 2]]), weights)
    a, b, c = (weights[n] * values[n] for n in range(3))
    assert_same_bits(out, (((0 + a) + b) + c)[None])
    assert not torch.equal(out[0], a + (b + c)), "the case cannot tell the order"
    fused = a
    for n in (1, 2):
        fused = (fused.double() + weights[n].double() * values[n].double()).float()
    assert not torch.equal(out[0], fused), "the case cannot tell a fused multiply-add"


@pytest.mark.parametrize("biased", [False, True], ids=["no_bias", "bias"])
def test_reduce_skips_without_adding_or_reading(path: str, biased: bool) -> None:
    values = torch.full((2, 70), torch.nan)
    values[1] = -0.0
    bias = torch.full((3, 70), -0.0) if biased else None
    out = torch.full((3, 70), torch.nan)
    table = torch.tensor([[-1, -1], [-1, 1], [-(2**31), -5]])
    rows.reduce_rows(out, values, table, torch.ones(2), bias)
    assert_same_bits(out, torch.full((3, 70), -0.0 if biased else 0.0))
    rows.reduce_rows(out, values[:0], torch.full((3, 2), -1), torch.ones(0), bias)
    assert_same_bits(out, torch.full((3, 70), -0.0 if biased else 0.0))


def test_reduce_gives_one_nan(path: str) -> None:
    payloads = torch.tensor([[0x7FC00001, 0x7F800001, -1, 0x7F800000]], dtype=torch.int32).view(torch.float32)
    values = torch.cat([payloads, torch.tensor([[0.0, 0.0, 0.0, -torch.inf]])])
    out = torch.empty(1, 4)
    rows.reduce_rows(out, values, torch.tensor([[0, 1]]))
    assert_same_bits(out, torch.full((1, 4), torch.nan))


def test_reduce_refuses_an_entry_out_of_range(path: str) -> None:
    out, values = torch.empty(2, 4), torch.randn(3, 4)
    with pytest.raises(IndexError):
        rows.reduce_rows(out, values, torch.tensor([[0, 1], [2, 3]]))


@pytest.mark.parametrize(("sums", "width", "hidden"), [(0, 3, 4), (2, 0, 4), (2, 3, 0)])
def test_reduce_of_nothing(path: str, sums: int, width: int, hidden: int) -> None:
    out = torch.full((sums, hidden), torch.nan)
    rows.reduce_rows(out, torch.randn(3, hidden), torch.zeros(sums, width, dtype=torch.int32))
    assert_same_bits(out, torch.zeros(sums, hidden) if not width else torch.empty(sums, hidden))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("offset", [0, 1], ids=["aligned", "misaligned"])
def test_reduce_into_a_large_output(path: str, dtype: torch.dtype, offset: int, threads: int) -> None:
    hidden, sums = 1024 + offset, 2 * rows._STREAM_BYTES // (1024 * dtype.itemsize)
    values = torch.randn(300, hidden).to(dtype)
    table = torch.randint(-1, 300, (sums, 2), dtype=torch.int32)
    out = torch.empty(sums, hidden, dtype=dtype)
    rows.reduce_rows(out, values, table)
    for p in (*range(0, sums, 97), sums - 1):
        assert_same_bits(out[p : p + 1], reduce_loops(dtype, values, table[p : p + 1], None, None))
    table[-1, -1] = 300
    with pytest.raises(IndexError):
        rows.reduce_rows(out, values, table)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("hidden", [1, 70, 1100])
def test_reduce_columns_is_reduce_rows_of_all_sources(path: str, dtype: torch.dtype, hidden: int) -> None:
    torch.manual_seed(0)
    sources = [random_rows(count, hidden, dtype) for count in (5, 0, 9)]
    table = torch.stack([torch.randint(-1, 5, (40,)), torch.full((40,), -1), torch.randint(-1, 9, (40,))], 1)
    out, expected = torch.empty(40, hidden, dtype=dtype), torch.empty(40, hidden, dtype=dtype)
    rows.reduce_columns(out, sources, table)
    rows.reduce_rows(expected, torch.cat(sources), torch.where(table < 0, table, table + torch.tensor([0, 5, 5])))
    assert_same_bits(out, expected)
    table[-1, 1] = 0
    with pytest.raises(IndexError):
        rows.reduce_columns(out, sources, table)


# --- scale_rows_grad ----------------------------------------------------------------------------------------------


def dot_loops(grad: Tensor, values: Tensor) -> Tensor:
    """The summation order that `scale_rows_grad` documents."""
    a, b = grad.float().numpy(), values.float().numpy()
    total = np.zeros((a.shape[0], 512), np.float32)
    for column in range(a.shape[1]):
        total[:, column % 512] += a[:, column] * b[:, column]
    half = 256
    while half:
        total[:, :half] += total[:, half : 2 * half]
        half //= 2
    return torch.from_numpy(total[:, 0].copy())


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("hidden", [1, 37, 512, 1600])
@pytest.mark.parametrize("wanted", ["both", "rows", "weights", "none"])
def test_grad_is_the_definition(path: str, dtype: torch.dtype, hidden: int, wanted: str) -> None:
    torch.manual_seed(hidden)
    grad, values = strided(torch.randn(11, hidden).to(dtype)), strided(torch.randn(11, hidden).to(dtype))
    weights = torch.randn(11)
    grad_rows = strided(torch.full((11, hidden), torch.nan, dtype=dtype)) if wanted in ("both", "rows") else None
    grad_weights = torch.full((11,), torch.nan) if wanted in ("both", "weights") else None
    rows.scale_rows_grad(grad_rows, grad_weights, grad, values, weights)
    if grad_rows is not None:
        assert_same_bits(grad_rows, (weights[:, None] * grad.float()).to(dtype))
    if grad_weights is not None:
        assert_same_bits(grad_weights, dot_loops(grad, values))
        exact = (grad.double() * values.double()).sum(1)
        # At most ceil(H / 512) + 9 additions and one product touch a term, each within half a unit of float32.
        bound = (grad.double() * values.double()).abs().sum(1) * (hidden / 512 + 11) * 2.0**-24
        assert ((grad_weights.double() - exact).abs() <= bound).all()


def test_grad_of_large_rows(path: str, threads: int) -> None:
    count = 2 * rows._STREAM_BYTES // 2048
    grad, values, weights = (
        torch.randn(count, 1024).bfloat16(),
        torch.randn(count, 1024).bfloat16(),
        torch.randn(count),
    )
    grad_rows, grad_weights = torch.empty_like(grad), torch.empty(count)
    rows.scale_rows_grad(grad_rows, grad_weights, grad, values, weights)
    assert_same_bits(grad_rows, (weights[:, None] * grad.float()).bfloat16())
    assert_same_bits(grad_weights, dot_loops(grad, values))


# --- around them --------------------------------------------------------------------------------------------------


def _write_from_a_child(memory: mmap.mmap, threads: int) -> None:
    torch.set_num_threads(threads)
    peer = torch.frombuffer(memory, dtype=torch.bfloat16).view(2048, 1024)
    rows.copy_rows(peer, torch.arange(4.0).bfloat16()[:, None].expand(4, 1024).contiguous(), torch.arange(2048) % 4)


def test_copy_into_memory_of_another_process_after_a_fork(threads: int) -> None:
    """Threads do not survive a fork; the child must not wait for those of its parent."""
    with_threads = torch.empty(2048, 1024, dtype=torch.bfloat16)
    rows.copy_rows(with_threads, torch.zeros(4, 1024, dtype=torch.bfloat16), torch.arange(2048) % 4)
    memory = mmap.mmap(-1, 2048 * 1024 * 2)
    child = multiprocessing.get_context("fork").Process(target=_write_from_a_child, args=(memory, threads))
    child.start()
    child.join(60)
    alive = child.is_alive()
    if alive:
        child.kill()
        child.join()
    assert not alive and child.exitcode == 0
    seen = torch.frombuffer(memory, dtype=torch.bfloat16).view(2048, 1024)
    assert_same_bits(seen, (torch.arange(2048) % 4).bfloat16()[:, None].repeat(1, 1024))


def test_tensors_that_need_a_gradient_are_read_and_written(path: str) -> None:
    values = torch.randn(3, 4, requires_grad=True)
    out = torch.empty(3, 4)
    rows.copy_rows(out, values, torch.arange(3))
    assert_same_bits(out, values.detach())
    rows.reduce_rows(out, values, torch.arange(3)[:, None], torch.ones(3, requires_grad=True))
    assert_same_bits(out, values.detach() + 0.0)
    assert not out.requires_grad


def test_both_paths_share_the_number_of_partial_sums() -> None:
    jit = pytest.importorskip("moecomm._rows_jit")
    assert jit.DOT_LANES == rows.DOT_LANES


WRONG: list[tuple[str, Callable[[], None]]] = [
    ("do not fit", lambda: rows.copy_rows(torch.empty(2, 3), torch.empty(2, 4), torch.zeros(1, dtype=torch.int32))),
    ("do not fit", lambda: rows.copy_rows(torch.empty(2, 3).half(), torch.empty(2, 3), torch.zeros(1).int())),
    ("expected int32", lambda: rows.copy_rows(torch.empty(2, 3), torch.empty(2, 3), torch.zeros(1))),
    ("contiguous", lambda: rows.copy_rows(torch.empty(3, 2).t(), torch.empty(2, 3), torch.zeros(1).int())),
    ("do not give", lambda: rows.reduce_rows(torch.empty(2, 3), torch.empty(2, 3), torch.zeros(1, 1).int())),
    ("weights", lambda: rows.reduce_rows(torch.empty(1, 3), torch.empty(2, 3), torch.zeros(1, 1).int(), torch.ones(3))),
]


@pytest.mark.parametrize(("message", "call"), WRONG)
def test_a_programming_error_is_named(message: str, call: Callable[[], None]) -> None:
    if rows.backend() != "llvmlite":
        pytest.skip("torch words its own errors")
    with pytest.raises(AssertionError, match=message):
        call()
