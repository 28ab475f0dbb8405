"""The second moment as row and column means, written slowly: of a matrix view, one element at a time, float64.

The formulas and their source are in :mod:`hina_optim.techniques.factored_moments`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hina_optim.reference.came import Factors, matrix, mean

__all__ = ["averaged", "means", "saves", "spread"]


def saves(param: Tensor) -> bool:
    """Whether a parameter has rows and columns, and fewer of them than elements."""
    if param.ndim < 2 or param.numel() == 0:
        return False
    return param.shape[0] + param.numel() // param.shape[0] < param.numel()


def means(v: Tensor) -> Factors:
    """The mean of every row, and of every column."""
    values = matrix(v)
    return Factors([mean(row) for row in values], [mean(list(column)) for column in zip(*values, strict=True)])


def averaged(old: Factors, new: Factors, beta: float) -> Factors:
    """Old and new means, ``beta`` and ``1 - beta`` of them."""

    def mixed(before: list[float], now: list[float]) -> list[float]:
        return [beta * x + (1 - beta) * y for x, y in zip(before, now, strict=True)]

    return Factors(mixed(old.rows, new.rows), mixed(old.columns, new.columns))


def spread(factors: Factors, like: Tensor) -> Tensor:
    """What the means say of every element: the product of its row's and its column's over the mean of all."""
    whole = mean(factors.rows)
    if whole == 0:
        return torch.zeros_like(like)
    estimate = [[row * column / whole for column in factors.columns] for row in factors.rows]
    return torch.tensor(estimate, dtype=torch.float64).reshape(like.shape)
