"""Operations of Triton's language one by one, for comparing a quick interpreter with the one that comes with Triton."""

from __future__ import annotations

import hashlib

import torch
import triton
import triton.language as tl

SIZE = 16


@triton.jit
def _integers(out, x, y, chosen, number, SIZE: tl.constexpr):  # type: ignore[no-untyped-def]
    """Of numbers of two types, of a number and a block, of blocks of two shapes, and conditions."""
    i = tl.arange(0, SIZE)
    a, b, few = tl.load(x + i), tl.load(y + i), i < number
    scalar = tl.load(y + 3)
    tl.store(out + i, a + b)
    tl.store(out + SIZE + i, a * scalar - 7)
    tl.store(out + 2 * SIZE + i, (a // 5) % 3 + (b >> 2) + (b << 1) + (a & 12) + (a | 3) + (a ^ b))
    tl.store(out + 3 * SIZE + i, tl.where(few & (a > b), a, scalar))
    tl.store(out + 4 * SIZE + i, ((a <= b) | ~few).to(tl.int64) + (a == b).to(tl.int32) - (a != scalar))
    tl.store(out + 5 * SIZE + i, tl.minimum(a, b) + tl.maximum(a, 2) + tl.abs(b))
    square = a[:, None] * b[None, :] + i[None, :]
    tl.store(out + 6 * SIZE + i, tl.sum(square, 1) + tl.cumsum(a, 0) + tl.max(square, 0))
    tl.store(out + 7 * SIZE + i, tl.load(x + i, mask=few, other=scalar) + tl.load(x + i, mask=few, other=0))
    ok, other = tl.load(chosen).to(tl.int1), tl.load(chosen)
    tl.store(out + 8 * SIZE, tl.load(x + 1, mask=ok, other=other) + tl.load(x + 2, mask=scalar > 0, other=other))
    if scalar > 0:
        tl.store(out + 8 * SIZE + 1, scalar)
    tl.atomic_add(out + 8 * SIZE + 2 + (i & 1), a, mask=few)
    tl.store(out + 8 * SIZE + 4, tl.atomic_xchg(out + 8 * SIZE + 2, tl.sum(b, 0).to(tl.int64)))
    ones = ((few + (a > b)) * 2 + ((scalar > 0) & few)).to(tl.int32) + (few & (scalar > 0)).to(tl.int32)
    tl.store(out + 9 * SIZE + i, tl.full((SIZE,), 3, tl.int32) + tl.zeros_like(a) + ones + tl.program_id(0), mask=few)


@triton.jit
def _floats(out, x, y, number, SIZE: tl.constexpr):  # type: ignore[no-untyped-def]
    """Sums, products, signs of zeros, and every conversion that kernels make."""
    i = tl.arange(0, SIZE)
    a, b = tl.load(x + i, mask=i < number, other=-0.0), tl.load(y + i).to(tl.float32)
    tl.store(out + i, a * b + a - 0.5)
    tl.store(out + SIZE + i, tl.where(b > a, a / (b + 0.0), -b))
    tl.store(out + 2 * SIZE + i, a.to(tl.bfloat16).to(tl.float32) + b.to(tl.float16))
    tl.store(out + 3 * SIZE + i, a.to(tl.int32, bitcast=True).to(tl.float32, bitcast=True) * 2)
    tl.store(out + 6 * SIZE + i, tl.full((SIZE,), 0.0, tl.float32))
    tl.store(out + 7 * SIZE + i, tl.full((SIZE,), -0.0, tl.float32))
    tl.store(out + 4 * SIZE + i, tl.sum(a[:, None] * b[None, :], 0) + tl.max(tl.abs(a), 0) + number)
    tl.store(out + 5 * SIZE + i, (a * 4).to(tl.int32) + tl.exp2(b) + tl.full((), 1.0, tl.float32))


def digests() -> list[str]:
    """Of what the operations give for two inputs of the same types."""
    found = []
    for seed in (0, 1):
        random = torch.Generator().manual_seed(seed)
        numbers, more = (torch.randint(-20, 20, (SIZE,), generator=random) for _ in range(2))
        for dtype in (torch.int32, torch.int64):
            given = numbers.int(), more.to(dtype), torch.tensor([seed], dtype=torch.int32), 9 + seed
            out = torch.zeros(10 * SIZE, dtype=torch.int64)
            _integers[(2,)](out, *given, SIZE=SIZE)
            found.append(hashlib.sha256(out.numpy().tobytes()).hexdigest()[:16])
        floats = torch.randn(SIZE, generator=random)
        for kind in (torch.float32, torch.bfloat16, torch.float16):
            sums = torch.ones(8 * SIZE)
            _floats[(1,)](sums, floats, (more / 7).to(kind), 9 + seed, SIZE=SIZE)
            found.append(hashlib.sha256(sums.numpy().tobytes()).hexdigest()[:16])
    return found
