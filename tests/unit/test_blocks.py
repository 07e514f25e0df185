"""Memory for rows: shapes, what serves again, and when."""

from __future__ import annotations

import gc
from functools import partial

import pytest
import torch

from moecomm import blocks
from moecomm.blocks import empty_rows


@pytest.mark.parametrize("shape", [(0, 4), (3, 0), (0, 0), (2, 5)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.uint8], ids=str)
def test_empty_rows_have_the_shape_asked_for(shape: tuple[int, int], dtype: torch.dtype) -> None:
    new = empty_rows(*shape, dtype, torch.device("cpu"))
    assert new.shape == shape and new.dtype == dtype and new.is_contiguous()


def test_empty_rows_recycles_what_died_and_only_that() -> None:
    """Promise 9: as long as anything looks at an output, nobody else gets its memory."""
    make = partial(empty_rows, 1024, 1024, torch.float32, torch.device("cpu"))
    first = make()
    where = first.data_ptr()
    second = make()
    assert second.data_ptr() != where
    part = first[3:5].view(torch.int32)
    del first
    assert make().data_ptr() not in (where, second.data_ptr()), "a view of it is alive"
    kept = make()
    del part
    gc.collect()
    again = make()
    assert again.data_ptr() == where and kept.data_ptr() != where
    assert empty_rows(4096, 1024, torch.float32, torch.device("cpu")).data_ptr() != where


@pytest.mark.parametrize("num_rows", [1, 1024, 5000])
def test_empty_rows_begin_at_a_cache_line(num_rows: int) -> None:
    for _ in range(3):
        assert empty_rows(num_rows, 1024, torch.bfloat16, torch.device("cpu")).data_ptr() % 64 == 0


def test_empty_rows_keeps_two_blocks() -> None:
    device = torch.device("cpu")
    many = [empty_rows(1024, 1024, torch.float32, device) for _ in range(5)]
    many.clear()
    gc.collect()
    assert len(blocks._free_blocks) == 2
