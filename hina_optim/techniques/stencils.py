"""What a gradient looks like around each element: curvature, local variance and size, on batches ``[N, *shape]``.

Everything here takes the *complete* parameter, in any memory layout, and the axes along which elements are neighbors
(:attr:`~hina_optim.techniques.base.ParamInfo.spatial_axes`).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from hina_optim.techniques.products import inner

__all__ = ["NOISE", "has_neighbors", "keep_above", "neighborhood_variance", "rms", "second_difference"]

#: Differences below this share of the rms are taken for rounding. A few float32 roundings of a value are about 1e-7 of
#: it; a real structure this faint would not show beside the gradient that carries it.
NOISE = 1e-5


def has_neighbors(shape: tuple[int, ...], axes: tuple[int, ...], least: int) -> bool:
    """Whether a parameter has an element, and a spatial axis of at least ``least`` of them.

    Args:
        shape: Shape of one parameter.
        axes: Its spatial axes, as dims of ``[N, *shape]``.
        least: Smallest size of an axis that serves.
    """
    return 0 not in shape and any(shape[axis - 1] >= least for axis in axes)


def rms(x: Tensor) -> Tensor:
    """Root mean square over each parameter, ``[N, 1, …]``.

    Squares are taken relative to the largest element, so that they neither vanish nor overflow where ``x`` does not.
    """
    dims = tuple(range(1, x.ndim))
    peak = torch.maximum(x.amax(dims, keepdim=True), -x.amin(dims, keepdim=True))
    peak = peak.clamp_min(torch.finfo(x.dtype).tiny)
    relative = x * (1 / peak)
    return peak * (inner(relative, relative).sum(dims, keepdim=True) / max(x[0].numel(), 1)).sqrt()


def keep_above(x: Tensor, floor: Tensor) -> Tensor:
    """What is above the floor, and zero elsewhere, in place: without a boolean tensor, which are slow.

    Args:
        x: Finite numbers ``[N, *shape]``.
        floor: ``[N, 1, …]``.
    """
    return x.mul_(x.clone().gt_(floor))


def second_difference(x: Tensor, axes: tuple[int, ...]) -> Tensor:
    """Discrete Laplacian: ``Σ_axes x[i+1] - 2·x[i] + x[i-1]``; the two ends of an axis repeat their neighbor's value.

    The difference of differences cancels exactly where neighbors are equal, and the repeated ends make it zero on a
    linear ramp up to the border. An axis of fewer than three elements adds nothing.

    Args:
        x: ``[N, *shape]``.
        axes: Spatial axes, as dims of ``x``.

    Returns:
        ``[N, *shape]``, a tensor of its own.
    """
    total: Tensor | None = None
    for axis in (axis for axis in axes if x.shape[axis] > 2):
        step, count = x.diff(dim=axis), x.shape[axis] - 2
        left, right = _before(step, axis), _after(step, axis)
        begun = total is not None
        total = total if total is not None else x.new_empty(x.shape)
        first, inside, last = _ends(total, axis)
        for place, start, length in ((inside, 0, count), (first, 0, 1), (last, count - 1, 1)):
            here, there = left.narrow(axis, start, length), right.narrow(axis, start, length)
            if begun:
                place.add_(there - here)
            else:
                _put(torch.sub, there, here, place)
    return torch.zeros_like(x) if total is None else total


def neighborhood_variance(x: Tensor, axes: tuple[int, ...]) -> Tensor:
    """Population variance of the elements at most one step away along every axis, the element itself included.

    Outside the border there is nothing: a corner of a matrix has four elements, not nine. Axis by axis: the variance of
    three groups of equal size is the mean of theirs plus the variance of their means, and all elements of a
    neighborhood are such groups. Only differences of neighbors enter, as ``var(a, b, c) = 2/9·(s² + t² + s·t)`` with
    ``s = b - a`` and ``t = c - b``: equal elements give exactly 0, and no digits are lost to what is common to all.

    Args:
        x: ``[N, *shape]``.
        axes: Spatial axes, as dims of ``x``.

    Returns:
        ``[N, *shape]``, a tensor of its own.
    """
    # Of the groups so far: 9/2 of the variance within, and 3 times the distance of the mean from the element in the
    # middle
    within: Tensor | None = None
    shift: Tensor | None = None
    for axis in (axis for axis in reversed(axes) if x.shape[axis] > 1):
        step = x.diff(dim=axis)
        if shift is not None:
            step.add_(_after(shift, axis), alpha=1 / 3).sub_(_before(shift, axis), alpha=1 / 3)
        variance = _variance_of_three(step, axis)
        if within is not None:
            _add_mean_of_three(variance, within, axis)
        within, shift = variance, _shift(step, shift, axis)
    return torch.zeros_like(x) if within is None else within.mul_(2 / 9)


def _put(operation: Callable[..., Tensor], a: Tensor, b: Tensor | float, place: Tensor) -> Tensor:
    """The result of an operation in a part of a tensor, which is returned."""
    if torch.compiler.is_compiling():  # which has no out= for parts
        return place.copy_(operation(a, b))
    return operation(a, b, out=place)


def _before(x: Tensor, axis: int) -> Tensor:
    """All but the last along an axis."""
    return x.narrow(axis, 0, x.shape[axis] - 1)


def _after(x: Tensor, axis: int) -> Tensor:
    """All but the first along an axis."""
    return x.narrow(axis, 1, x.shape[axis] - 1)


def _ends(x: Tensor, axis: int) -> tuple[Tensor, Tensor, Tensor]:
    """The first along an axis, what lies between, and the last."""
    size = x.shape[axis]
    return x.narrow(axis, 0, 1), x.narrow(axis, 1, size - 2), x.narrow(axis, size - 1, 1)


def _longer(x: Tensor, axis: int) -> Tensor:
    """An empty tensor that has one element more along an axis."""
    return x.new_empty([size + (dim == axis) for dim, size in enumerate(x.shape)])


def _variance_of_three(step: Tensor, axis: int) -> Tensor:
    """9/2 of the variance of each element and its neighbors, two at the ends, from the steps between them."""
    squares = step.square()
    made = _longer(step, axis)
    first, inside, last = _ends(made, axis)
    _put(torch.add, _before(squares, axis), _after(squares, axis), inside)
    inside.addcmul_(_before(step, axis), _after(step, axis))
    _put(torch.mul, squares.narrow(axis, 0, 1), 9 / 8, first)
    _put(torch.mul, squares.narrow(axis, squares.shape[axis] - 1, 1), 9 / 8, last)
    return made


def _add_mean_of_three(total: Tensor, x: Tensor, axis: int) -> None:
    """Add the mean of each element and its neighbors."""
    first, inside, last = _ends(total, axis)
    for start in range(3):
        inside.add_(x.narrow(axis, start, inside.shape[axis]), alpha=1 / 3)
    for start in range(2):
        first.add_(x.narrow(axis, start, 1), alpha=1 / 2)
        last.add_(x.narrow(axis, x.shape[axis] - 1 - start, 1), alpha=1 / 2)


def _shift(step: Tensor, before: Tensor | None, axis: int) -> Tensor:
    """3 times the distance of the mean of each element and its neighbors from the element; ``before``: so far."""
    made = _longer(step, axis)
    first, inside, last = _ends(made, axis)
    _put(torch.sub, _after(step, axis), _before(step, axis), inside)
    _put(torch.mul, step.narrow(axis, 0, 1), 3 / 2, first)
    _put(torch.mul, step.narrow(axis, step.shape[axis] - 1, 1), -3 / 2, last)
    return made if before is None else made.add_(before)
