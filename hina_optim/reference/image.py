"""The image techniques, written slowly: one parameter, one element at a time, float64.

Every function takes one parameter's gradient of any shape and loops over it with plain Python numbers. Nothing here is
shared with the fast versions. A *plane* is the part of a parameter whose elements are neighbors: a matrix as a whole,
or the kernel that a convolution weight holds for one pair of channels.
"""

from __future__ import annotations

import cmath
import math
from collections.abc import Iterator
from itertools import product

import torch
from torch import Tensor

from hina_optim.reference.factored import means, saves, spread

__all__ = ["background_regularization", "edge_suppression", "frequency_penalty", "spatial_awareness"]

Place = tuple[int, ...]


def edge_suppression(grad: Tensor, edge_penalty: float, edge_threshold: float) -> Tensor:
    """``g / (1 + edge_penalty·e·[e > edge_threshold/0.2])``, ``e = |L| / max(rms(L), 1e-5·rms(g))``.

    Args:
        grad: Gradient of one parameter, any shape.
        edge_penalty: Strength, >= 0.
        edge_threshold: Where edges begin, in units of 5 times the average.

    Returns:
        The damped gradient, float64; ``grad`` itself where nothing has two neighbors in a row.
    """
    g = grad.to(torch.float64)
    if not any(size >= 3 for size in _plane_sizes(g)):
        return g
    laplacian = torch.zeros_like(g)
    for lead, sizes in _planes(g):
        for place in _places(sizes):
            for axis, size in enumerate(sizes):
                if size < 3:
                    continue
                center = min(max(place[axis], 1), size - 2)  # an end repeats its neighbor's value
                row = [float(g[lead + _moved(place, axis, to)]) for to in (center - 1, center, center + 1)]
                laplacian[lead + place] += row[0] - 2 * row[1] + row[2]
    average = max(_rms(laplacian), 1e-5 * _rms(g))
    out = torch.zeros_like(g)
    for index in _places(tuple(g.shape)):
        edge = abs(float(laplacian[index])) / average if average > 0 else 0.0
        strength = edge_penalty * edge if edge > edge_threshold / 0.2 else 0.0
        out[index] = float(g[index]) / (1 + strength)
    return out


def frequency_penalty(grad: Tensor, penalty: float) -> Tensor:
    """``IDFT(F · (1 - penalty·[r > 0.3]))`` by the definition of the Fourier transform, plane by plane.

    A radius within rounding of 0.3 counts as low.

    Args:
        grad: Gradient of one parameter, any shape.
        penalty: Share of the high frequencies to remove, in [0, 1].

    Returns:
        The smoothed gradient, float64.
    """
    g = grad.to(torch.float64)
    out = g.clone()
    for lead, sizes in _planes(g):
        count = math.prod(sizes)
        kept = {}
        for wave in _places(sizes):
            value = sum(float(g[lead + place]) * _wave(wave, place, sizes, -1) for place in _places(sizes))
            # Cycles per element: beyond half the size, a wave is the mirror image of a slower one.
            squared = sum((min(k, n - k) / n) ** 2 for k, n in zip(wave, sizes, strict=True))
            kept[wave] = value * (1 - penalty) if squared > 0.09 + 1e-6 else value
        for place in _places(sizes):
            value = sum(kept[wave] * _wave(wave, place, sizes, 1) for wave in kept) / count
            out[lead + place] = complex(value).real
    return out


def spatial_awareness(
    grad: Tensor, state: Tensor, detail_preservation: float, factored: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """``g / (1 + detail_preservation·max(ŝ - 1, 0))`` with ``ŝ`` the running variance relative to its mean.

    Args:
        grad: Gradient of one parameter, any shape.
        state: Running variance before this step, zeros at first; shape of ``grad``.
        detail_preservation: Strength, >= 0.
        factored: Use what the means of its rows and columns say of the running variance, where those are fewer.

    Returns:
        The damped gradient, the running variance after this step, and the factor on the bumps of the learning-rate
        mask; all float64, of the shape of ``grad``. Without a spatial axis of two elements: gradient and state as they
        were, and a factor of 1.
    """
    g = grad.to(torch.float64)
    s = state.to(torch.float64).clone()
    if not any(size >= 2 for size in _plane_sizes(g)):
        return g, s, torch.ones_like(g)
    floor = (1e-5 * _rms(g)) ** 2
    for lead, sizes in _planes(g):
        for place in _places(sizes):
            around = [range(max(i - 1, 0), min(i + 2, size)) for i, size in zip(place, sizes, strict=True)]
            values = [float(g[lead + neighbor]) for neighbor in product(*around)]
            middle = sum(values) / len(values)
            variance = sum((x - middle) ** 2 for x in values) / len(values)
            s[lead + place] = 0.9 * float(s[lead + place]) + 0.1 * (variance if variance > floor else 0.0)
    mean = sum(float(s[index]) for index in _places(tuple(s.shape))) / s.numel()
    used = _known(s, factored)
    out, bump = torch.zeros_like(g), torch.zeros_like(g)
    for index in _places(tuple(g.shape)):
        relative = float(used[index]) / mean if mean > 0 else 0.0
        out[index] = float(g[index]) / (1 + detail_preservation * max(relative - 1, 0.0))
        bump[index] = min(max(relative * detail_preservation, 0.5), 1.5)
    return out, s, bump


def background_regularization(grad: Tensor, state: Tensor, factored: bool = False) -> tuple[Tensor, Tensor]:
    """``g · (1 - b/2)``, ``b`` the running share of steps with ``|g| < mean - std/2``, ``std`` at least ``mean/1000``.

    Args:
        grad: Gradient of one parameter, any shape.
        state: ``b`` before this step, zeros at first; shape of ``grad``.
        factored: Use what the means of its rows and columns say of ``b``, at most 1, where those are fewer.

    Returns:
        The shrunk gradient and ``b`` after this step, float64. Of a single element, both as they were.
    """
    g = grad.to(torch.float64)
    b = state.to(torch.float64).clone()
    out = g.clone()
    if g.numel() <= 1:
        return out, b
    sizes = {index: abs(float(g[index])) for index in _places(tuple(g.shape))}
    mean = sum(sizes.values()) / len(sizes)
    std = math.sqrt(sum((x - mean) ** 2 for x in sizes.values()) / len(sizes))
    bar = mean - max(std, 1e-3 * mean) / 2
    for index, size in sizes.items():
        b[index] = 0.95 * float(b[index]) + 0.05 * (1.0 if size < bar else 0.0)
    used = _known(b, factored)
    for index in sizes:
        out[index] = float(g[index]) * (1 - min(float(used[index]), 1.0) / 2)
    return out, b


def _known(average: Tensor, factored: bool) -> Tensor:
    """A running average as it is, or what its means of rows and columns say of it, which are running averages, too."""
    if factored and saves(average):
        return spread(means(average), average)
    return average


def _plane_sizes(g: Tensor) -> tuple[int, ...]:
    """Both sizes of a matrix, the kernel sizes of a convolution weight, nothing for the rest or for an empty tensor."""
    if g.numel() == 0:
        return ()
    return tuple(g.shape) if g.ndim == 2 else tuple(g.shape[2:])


def _planes(g: Tensor) -> Iterator[tuple[Place, tuple[int, ...]]]:
    """Leading index and sizes of every plane."""
    sizes = _plane_sizes(g)
    if sizes:
        for lead in _places(tuple(g.shape[: g.ndim - len(sizes)])):
            yield lead, sizes


def _places(sizes: tuple[int, ...]) -> Iterator[Place]:
    """Every index of a tensor of such a shape."""
    return product(*(range(size) for size in sizes))


def _moved(place: Place, axis: int, to: int) -> Place:
    return (*place[:axis], to, *place[axis + 1 :])


def _wave(wave: Place, place: Place, sizes: tuple[int, ...], sign: int) -> complex:
    return cmath.exp(sign * 2j * math.pi * sum(k * i / n for k, i, n in zip(wave, place, sizes, strict=True)))


def _rms(x: Tensor) -> float:
    return math.sqrt(sum(float(x[index]) ** 2 for index in _places(tuple(x.shape))) / x.numel())
