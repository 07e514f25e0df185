"""Two comparisons: copies bit for bit, arithmetic against the error of a same-dtype baseline."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from moecomm.testing.provenance import decode_provenance


@dataclass(frozen=True, slots=True)
class Mismatch:
    """The first element in which two tensors differ."""

    index: tuple[int, ...]
    expected: object
    got: object
    num_wrong: int


def first_mismatch(actual: Tensor, expected: Tensor) -> Mismatch | None:
    """Find the first element whose bits differ; NaN equals NaN whatever its payload bits.

    >>> first_mismatch(torch.tensor([[1.0, 2.0]]), torch.tensor([[1.0, 3.0]]))
    Mismatch(index=(0, 1), expected=3.0, got=2.0, num_wrong=1)
    >>> first_mismatch(torch.tensor([0.0]), torch.tensor([-0.0]))
    Mismatch(index=(0,), expected=-0.0, got=0.0, num_wrong=1)
    """
    actual, expected = actual.detach().cpu(), expected.detach().cpu()
    wrong = _bits_differ(actual, expected)
    if not bool(wrong.any()):
        return None
    index = tuple(wrong.nonzero()[0].tolist())
    return Mismatch(index, _value(expected[index]), _value(actual[index]), int(wrong.sum()))


def assert_bitwise(actual: Tensor, expected: Tensor, what: str, origin: Callable[[int], str] | None = None) -> None:
    """Demand the same shape, dtype and bits (NaN equals NaN), and name the first wrong element.

    Args:
        actual: what the library gave.
        expected: what the oracle says.
        what: the thing compared, first words of the message.
        origin: row index -> where that row should come from; rows of `provenance_rows` are decoded without it.

    Raises:
        AssertionError: the message has both shapes, or the first wrong coordinate, both values, how many are wrong and
            the provenance.

    >>> assert_bitwise(torch.tensor([[1.0, 2.0]]), torch.tensor([[1.0, 3.0]]), "dispatched x")
    Traceback (most recent call last):
    ...
    AssertionError: dispatched x: row 0, column 1: expected 3.0, got 2.0 (1 of 2 elements differ)
    """
    if actual.shape != expected.shape or actual.dtype != expected.dtype:
        raise AssertionError(
            f"{what}: expected {tuple(expected.shape)} {expected.dtype}, got {tuple(actual.shape)} {actual.dtype}"
        )
    wrong = first_mismatch(actual, expected)
    if wrong is None:
        return
    place = ", ".join(f"{name} {i}" for name, i in zip(_axis_names(len(wrong.index)), wrong.index, strict=True))
    message = f"{what}: {place}: expected {wrong.expected}, got {wrong.got}"
    message += f" ({wrong.num_wrong} of {expected.numel()} elements differ)"
    if wrong.index and origin is not None:
        message += f"; this row should be {origin(wrong.index[0])}"
    if actual.dim() == 2:
        row = slice(wrong.index[0], wrong.index[0] + 1)
        from_expected, from_actual = decode_provenance(expected[row])[0], decode_provenance(actual[row])[0]
        if from_expected is not None or from_actual is not None:
            message += f"; expected row is {from_expected or 'no payload'}, got {from_actual or 'no payload'}"
    raise AssertionError(message)


def assert_error_bounded(
    actual: Tensor,
    baseline: Tensor,
    exact: Tensor,
    what: str,
    *,
    factor: float = 2.0,
    magnitude: Tensor | None = None,
    roundings: int = 1,
) -> None:
    """Demand that `actual` is about as exact as a plain computation in the same dtype.

    Both the largest and the mean absolute error against `exact` must be at most `factor` times those of `baseline`. A
    baseline can be exact by luck, so each of its errors counts as at least what a single rounding costs: half the
    spacing of `actual`'s dtype, times the largest (for the mean: the mean) magnitude in `exact`. With `magnitude` every
    error is taken relative to that of its own element, so that no element is hidden behind a larger one, and where
    terms cancel a rounding costs what it costs them. Where `exact` is not finite, `actual` must be the same.

    What `roundings` of a term can cost at worst, half a spacing each, is no fault either, however exact the baseline
    is: of few elements it may be so by luck. (For the mean of m errors: what they cost on average, the square root of a
    third of their number, and of the worst case one part in the square root of m.)

    Args:
        actual: floating, what the library gave.
        baseline: floating, the same sum computed plainly in the same dtype.
        exact: float64, the same sum in double precision.
        what: the thing compared, first words of the message.
        factor: how many times the baseline's error is allowed.
        magnitude: float64, for each element the sum of the magnitudes of its terms; None: compare absolute errors.
        roundings: to which a term is subject before it is added.

    Raises:
        AssertionError: a shape differs or an error is too large; the message has the error, its bound and the worst
            element.

    >>> exact = torch.tensor([1.0, 4.0], dtype=torch.float64)
    >>> assert_error_bounded(exact.float(), exact.float(), exact, "sum")
    >>> assert_error_bounded(exact.float() + 1, exact.float(), exact, "sum")
    Traceback (most recent call last):
    ...
    AssertionError: sum: max error 1 at (0,) exceeds 4.8e-07 (2.0 x the baseline's): got 2.0, exact 1.0
    """
    if not actual.shape == baseline.shape == exact.shape:
        raise AssertionError(
            f"{what}: shapes differ: got {tuple(actual.shape)}, baseline {tuple(baseline.shape)}, "
            f"exact {tuple(exact.shape)}"
        )
    if exact.dtype != torch.float64:
        raise AssertionError(f"{what}: exact must be float64, got {exact.dtype}")
    actual, baseline, exact = actual.detach().cpu(), baseline.detach().cpu(), exact.detach().cpu()
    finite = exact.isfinite()
    wrong = first_mismatch(torch.where(finite, 0.0, actual.double()), torch.where(finite, 0.0, exact))
    if wrong is not None:
        raise AssertionError(f"{what}: at {wrong.index}: expected {wrong.expected}, got {wrong.got}")
    if not bool(finite.any()):
        return
    errors = (actual.double() - exact).abs()[finite].nan_to_num(nan=float("inf"))
    baseline_errors = (baseline.double() - exact).abs()[finite]
    if not bool(baseline_errors.isfinite().all()):
        raise AssertionError(f"{what}: the baseline is not finite where the exact result is, so it bounds nothing")
    rounded = exact.abs()[finite]
    if magnitude is not None:
        # Below the smallest normal number the spacing no longer shrinks.
        scale = magnitude.detach().cpu()[finite].clamp(min=torch.finfo(actual.dtype).tiny)
        errors, baseline_errors, rounded = errors / scale, baseline_errors / scale, torch.ones_like(scale)
    half_spacing = torch.finfo(actual.dtype).eps / 2
    kind = "error" if magnitude is None else "relative error"
    on_average = (roundings / 3) ** 0.5 + roundings / errors.numel() ** 0.5
    for name, reduce, worth in (("max", Tensor.max, float(roundings)), ("mean", Tensor.mean, on_average)):
        error, floor = float(reduce(errors)), half_spacing * float(reduce(rounded))
        bound = max(factor * max(float(reduce(baseline_errors)), floor), worth * floor)
        if not error <= bound:
            worst = tuple(finite.nonzero()[int(errors.argmax())].tolist())
            raise AssertionError(
                f"{what}: {name} {kind} {error:.2g} at {worst} exceeds {bound:.2g} ({factor} x the baseline's): "
                f"got {_value(actual[worst])}, exact {_value(exact[worst])}"
            )


def _bits_differ(actual: Tensor, expected: Tensor) -> Tensor:
    if actual.shape != expected.shape or actual.dtype != expected.dtype:
        raise ValueError(f"{tuple(actual.shape)} {actual.dtype} against {tuple(expected.shape)} {expected.dtype}")
    if actual.numel() == 0:
        return torch.zeros(actual.shape, dtype=torch.bool)
    a, e = (tensor.contiguous().reshape(-1).view(torch.uint8) for tensor in (actual, expected))
    if torch.equal(a, e):
        return torch.zeros(actual.shape, dtype=torch.bool)
    as_bytes = (*actual.shape, actual.dtype.itemsize)
    differ = (a.reshape(as_bytes) != e.reshape(as_bytes)).any(dim=-1)
    if actual.dtype.is_floating_point:
        differ &= ~(_isnan(actual) & _isnan(expected))
    return differ


def _isnan(values: Tensor) -> Tensor:
    return values.float().isnan() if values.dtype.itemsize == 1 else values.isnan()


def _value(element: Tensor) -> object:
    return element.item()


def _axis_names(num_axes: int) -> tuple[str, ...]:
    return ("row", "column")[:num_axes] if num_axes <= 2 else tuple(f"axis {i}" for i in range(num_axes))
