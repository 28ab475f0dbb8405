"""What a gradient looks like around each element: curvature, local variance and size, on batches ``[N, *shape]``.

Everything here takes the *complete* parameter, in any memory layout, and the axes along which elements are neighbors
(:attr:`~hina_optim.techniques.base.ParamInfo.spatial_axes`).
"""

from __future__ import annotations

from itertools import product

import torch
from torch import Tensor

__all__ = ["NOISE", "has_neighbors", "neighborhood_variance", "rms", "second_difference"]

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
    peak = x.abs().amax(dims, keepdim=True).clamp_min(torch.finfo(x.dtype).tiny)
    return peak * (x / peak).square().mean(dims, keepdim=True).sqrt()


def second_difference(x: Tensor, axes: tuple[int, ...]) -> Tensor:
    """Discrete Laplacian: ``Σ_axes x[i+1] - 2·x[i] + x[i-1]``; the two ends of an axis repeat their neighbor's value.

    The difference of differences cancels exactly where neighbors are equal, and the repeated ends make it zero on a
    linear ramp up to the border. An axis of fewer than three elements adds nothing.

    Args:
        x: ``[N, *shape]``.
        axes: Spatial axes, as dims of ``x``.

    Returns:
        ``[N, *shape]``.
    """
    total = torch.zeros_like(x)
    for axis in axes:
        size = x.shape[axis]
        if size >= 3:
            bend = x.diff(dim=axis).diff(dim=axis)
            ends = bend.narrow(axis, 0, 1), bend.narrow(axis, size - 3, 1)
            total = total + torch.cat((ends[0], bend, ends[1]), dim=axis)
    return total


def neighborhood_variance(x: Tensor, axes: tuple[int, ...]) -> Tensor:
    """Population variance of the elements at most one step away along every axis, the element itself included.

    Outside the border there is nothing: a corner of a matrix has four elements, not nine. The variance is taken of the
    differences to the element in the middle, ``mean d² - (mean d)²``: equal elements give exactly 0, and, one of the
    ``n`` differences being 0, at least ``mean d² / n`` is left, so that the subtraction loses few digits.

    Args:
        x: ``[N, *shape]``.
        axes: Spatial axes, as dims of ``x``.

    Returns:
        ``[N, *shape]``.
    """
    linear, square = torch.zeros_like(x), torch.zeros_like(x)
    middle = (0,) * len(axes)
    # Of two opposite steps one is enough: the difference serves both of its ends.
    for step in (s for s in product((-1, 0, 1), repeat=len(axes)) if s > middle):
        here, there = _ends(x, axes, step)
        difference = there - here
        here, there = _ends(linear, axes, step)
        here += difference
        there -= difference
        here, there = _ends(square, axes, step)
        difference = difference.square()
        here += difference
        there += difference
    count = _neighbors(x, axes)
    return square / count - (linear / count).square()


def _ends(x: Tensor, axes: tuple[int, ...], step: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Views of all elements that have one ``step`` away, and of those that they have there."""
    here = there = x
    for axis, move in zip(axes, step, strict=True):
        if move:
            length = x.shape[axis] - 1
            here = here.narrow(axis, 0 if move > 0 else 1, length)
            there = there.narrow(axis, 1 if move > 0 else 0, length)
    return here, there


def _neighbors(x: Tensor, axes: tuple[int, ...]) -> Tensor:
    """How many elements each neighborhood holds, broadcastable to ``x``."""
    count = x.new_ones(())
    for axis in axes:
        size = x.shape[axis]
        place = torch.arange(size, device=x.device)
        along = 1 + (place > 0).to(x.dtype) + (place < size - 1).to(x.dtype)
        count = count * along.reshape([-1 if dim == axis else 1 for dim in range(x.ndim)])
    return count
