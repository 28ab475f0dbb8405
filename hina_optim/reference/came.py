"""The family of CAME, written slowly: one parameter, one element at a time, float64.

Tensors go in and come out with the shape of the parameter; rows and columns are lists of Python numbers, of the matrix
view: first dimension × all the others. Formulas and sources are in the technique of the same name in
:mod:`hina_optim.techniques`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from hina_optim.reference import core

__all__ = [
    "Came",
    "Factors",
    "beta1_at",
    "confidence",
    "dual_momentum",
    "factored",
    "follow",
    "multi_scale",
    "rms_clip",
    "unfactored",
]


@dataclass
class Factors:
    """Running means of the rows and columns of a matrix view."""

    rows: list[float]
    columns: list[float]

    @classmethod
    def of(cls, tensor: Tensor) -> Factors:
        """Zeros for a tensor."""
        rows = tensor.shape[0]
        return cls([0.0] * rows, [0.0] * (tensor.numel() // rows))


def matrix(x: Tensor) -> list[list[float]]:
    """The matrix view as lists of numbers."""
    rows: list[list[float]] = x.to(torch.float64).reshape(x.shape[0], -1).tolist()
    return rows


def mean(numbers: list[float]) -> float:
    """The mean, rounded once."""
    return math.fsum(numbers) / len(numbers)


def follow(square: Tensor, old: Factors, t: int, beta: float, eps: float) -> tuple[Tensor, Factors]:
    """Row and column means of ``square + eps`` over time, and what they say of every element.

    Args:
        square: Something positive.
        old: Means before; zeros at ``t = 1``.
        t: Which update this is, from 1.
        beta: Decay a step.
        eps: Added to every element.

    Returns:
        The estimate of every element, bias-corrected, and the new means *without* ``eps``.
    """
    values = matrix(square)
    rows, columns = [], []
    for i in range(len(old.rows)):
        rows.append(beta * old.rows[i] + (1 - beta) * mean(values[i]))
    for j in range(len(old.columns)):
        columns.append(beta * old.columns[j] + (1 - beta) * mean([row[j] for row in values]))
    correct = 1 - beta**t
    row_hat = [r / correct + eps for r in rows]
    column_hat = [c / correct + eps for c in columns]
    whole = mean(row_hat)
    estimate = [[r * c / whole for c in column_hat] for r in row_hat]
    return torch.tensor(estimate, dtype=torch.float64).reshape(square.shape), Factors(rows, columns)


def factored(x: Tensor, old: Factors, t: int, beta2: float, eps: float) -> tuple[Tensor, Factors]:
    """What comes in over the root of its factored second moment, and the new factors."""
    v, new = follow(core.each(lambda g: g * g, x), old, t, beta2, eps)
    return core.each(lambda g, s: g / math.sqrt(s), x, v), new


def unfactored(x: Tensor, old: Tensor, t: int, beta2: float, eps: float) -> tuple[Tensor, Tensor]:
    """The same with one number an element: what enters the moment, and the new second moment without ``eps``."""
    v = core.each(lambda g, s: beta2 * s + (1 - beta2) * g * g, x, old)
    return core.each(lambda g, s: g / math.sqrt(s / (1 - beta2**t) + eps), x, v), v


def rms_clip(x: Tensor, threshold: float) -> float:
    """The factor that brings the rms down to the threshold."""
    if x.numel() == 0:
        return 1.0
    rms = math.sqrt(core.dot(x, x) / x.numel())
    return 1 / max(1.0, rms / threshold)


def beta1_at(t: int, beta1: float, decay: float = 1.0, floor: float = 0.0) -> float:
    """Decay of the first moment in step ``t`` (from 1)."""
    return max(beta1 * decay ** (t - 1), floor)


def dual_momentum(
    update: Tensor, taken: Tensor, long: Tensor, t: int, long_beta: float, alpha: float | None
) -> tuple[Tensor, Tensor]:
    """The direction with the long moment mixed in, and the new long moment.

    Args:
        update: Direction of the short moment.
        taken: What came in, clipped, not damped.
        long: The long moment before.
        t: Which update this is, from 1.
        long_beta: Its decay a step.
        alpha: Its share; None lets it grow with its age, to a half.
    """
    long = core.each(lambda old, x: long_beta * old + (1 - long_beta) * x, long, taken)
    share = (1 - long_beta**t) / 2 if alpha is None else alpha
    return core.each(lambda u, x: (1 - share) * u + share * x, update, long), long


def confidence(
    update: Tensor, taken: Tensor, m: Tensor, old: Factors, t: int, beta3: float, eps: float, limit: float | None = 2.0
) -> tuple[Tensor, Factors]:
    """The direction over the root of how far gradients lie from the moment, and the new factors.

    Args:
        update: Direction so far.
        taken: What came in, clipped, not damped.
        m: First moment after this step.
        old: Factors before.
        t: Which update this is, from 1.
        beta3: Decay a step of the factors.
        eps: Added to the square.
        limit: Largest mean of the step, in units of the rate; None is the formula of the paper.
    """
    deviation = core.each(lambda x, y: (x - y) ** 2, taken, m)
    s, new = follow(deviation, old, t, beta3, eps)
    least = 0.0 if limit is None else core.dot(update, update) / update.numel() / limit**2
    return core.each(lambda u, x: u / math.sqrt(max(x, least)), update, s), new


def multi_scale(x: Tensor, means: dict[int, Tensor], t: int, beta: float) -> tuple[Tensor, dict[int, Tensor]]:
    """The mixture that takes the gradient's place, and the new running means, by scale (all but scale 1)."""
    means = dict(means)
    mixture, whole = x.to(torch.float64), 1.0
    for k in means:
        if t % k == 0:
            means[k] = core.each(lambda old, g: beta * old + (1 - beta) * g, means[k], x)
        updates = t // k
        if updates > 0:
            mixture = mixture + means[k] / (1 - beta**updates) / k
            whole += 1 / k
    return mixture / whole, means


@dataclass
class Came:
    """CAME as a whole, for one parameter: call it with a gradient, get the direction of the step.

    Attributes:
        betas: Decays of the first moment, the second moment and the confidence.
        eps: Added to the squared gradient and to the squared deviation.
        threshold: Largest rms of what enters the first moment.
        decay: Factor on β₁ a step.
        floor: Smallest β₁.
        long_beta: Decay of the long moment; None for none.
        alpha: Share of the long moment; None lets it grow.
        scales: Of the multi-scale momentum; empty for none.
        scale_beta: Its decay an update.
        limit: Of :func:`confidence`.
    """

    betas: tuple[float, float, float] = (0.8, 0.99, 0.999)
    eps: tuple[float, float] = (1e-30, 1e-16)
    threshold: float = 1.0
    decay: float = 1.0
    floor: float = 0.0
    long_beta: float | None = None
    alpha: float | None = None
    scales: tuple[int, ...] = ()
    scale_beta: float = 0.9
    limit: float | None = 2.0

    t: int = field(default=0, init=False)
    m: Tensor = field(default_factory=lambda: torch.zeros(()), init=False)
    long: Tensor = field(default_factory=lambda: torch.zeros(()), init=False)
    v: Factors | Tensor = field(default_factory=lambda: torch.zeros(()), init=False)
    r: Factors | None = field(default=None, init=False)
    means: dict[int, Tensor] = field(default_factory=dict, init=False)

    def __call__(self, grad: Tensor) -> Tensor:
        """One step."""
        grad = grad.to(torch.float64)
        is_matrix = grad.ndim > 1 and grad.numel() > 0
        if self.t == 0:
            self.m, self.long = torch.zeros_like(grad), torch.zeros_like(grad)
            self.v = Factors.of(grad) if is_matrix else torch.zeros_like(grad)
            self.r = Factors.of(grad) if is_matrix else None
            self.means = {k: torch.zeros_like(grad) for k in self.scales if k > 1}
        self.t += 1
        x = grad
        if self.scales:
            x, self.means = multi_scale(x, self.means, self.t, self.scale_beta)
        if isinstance(self.v, Factors):
            x, self.v = factored(x, self.v, self.t, self.betas[1], self.eps[0])
        else:
            x, self.v = unfactored(x, self.v, self.t, self.betas[1], self.eps[0])
        taken = rms_clip(x, self.threshold) * x
        self.m = core.momentum(self.m, taken, beta1_at(self.t, self.betas[0], self.decay, self.floor))
        update = self.m
        if self.long_beta is not None:
            update, self.long = dual_momentum(update, taken, self.long, self.t, self.long_beta, self.alpha)
        if self.r is not None:
            update, self.r = confidence(update, taken, self.m, self.r, self.t, self.betas[2], self.eps[1], self.limit)
        return update
