"""The core rules, written slowly: one parameter, one element at a time, float64.

Tensors go in and come out with the shape of the parameter; every sum and every element in between is a Python number.
Formulas and sources are in the technique of the same name in :mod:`hina_optim.techniques`.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

__all__ = [
    "adam",
    "adaptive_gradient_regularization",
    "adopt",
    "apply_step",
    "cautious",
    "decay_strength",
    "grams",
    "learning_rate_mask",
    "momentum",
    "orthogonal",
    "selective_projection_decay",
    "torque",
]


def each(rule: Callable[..., float], *tensors: Tensor) -> Tensor:
    """``rule`` applied element by element to tensors of one shape."""
    columns = [t.to(torch.float64).flatten().tolist() for t in tensors]
    values = [rule(*row) for row in zip(*columns, strict=True)]
    return torch.tensor(values, dtype=torch.float64).reshape(tensors[0].shape)


def total(rule: Callable[..., float], *tensors: Tensor) -> float:
    """The sum of ``rule`` over the elements of tensors of one shape, rounded once."""
    columns = [t.to(torch.float64).flatten().tolist() for t in tensors]
    return math.fsum(rule(*row) for row in zip(*columns, strict=True))


def dot(a: Tensor, b: Tensor) -> float:
    """Inner product of two tensors of one shape."""
    return total(lambda x, y: x * y, a, b)


def sign(x: float) -> float:
    """-1, 0 or 1."""
    return float((x > 0) - (x < 0))


def adaptive_gradient_regularization(grad: Tensor) -> Tensor:
    """``g (1 - |g| / Σ|g|)``; a single element stays as it is."""
    if grad.numel() <= 1:
        return grad
    whole = total(abs, grad)
    if whole == 0:
        return grad
    return each(lambda g: g * (1 - abs(g) / whole), grad)


def orthogonal(grad: Tensor, param: Tensor) -> Tensor:
    """What is left of the gradient across the weights, at the gradient's length."""
    pp, gg = dot(param, param), dot(grad, grad)
    if pp == 0:
        return grad
    along = dot(grad, param) / pp
    rest = each(lambda g, p: g - along * p, grad, param)
    rr = dot(rest, rest)
    if rr <= 1e-6 * gg:
        return grad
    restore = math.sqrt(gg / rr)
    return each(lambda r: r * restore, rest)


def adopt(grad: Tensor, v: Tensor, t: int, beta2: float, eps: float) -> tuple[Tensor, Tensor]:
    """The normalized gradient and the second moment after it.

    Args:
        grad: Gradient.
        v: Second moment before this gradient; not read at ``t = 1``.
        t: Which gradient of the parameter's life this is, from 1. At ``t = 1`` nothing may move: the caller sees to it.
        beta2: Decay of the second moment.
        eps: Smallest denominator.

    Returns:
        What enters the first moment, and the new second moment.
    """
    if t == 1:
        return torch.zeros_like(grad), each(lambda g: g * g, grad)
    bound = math.sqrt(math.sqrt(t - 1))

    def normalized(g: float, old: float) -> float:
        return min(max(g / max(math.sqrt(old), eps), -bound), bound)

    return each(normalized, grad, v), each(lambda g, old: beta2 * old + (1 - beta2) * g * g, grad, v)


def torque(m: Tensor, incoming: Tensor, smoothed: float, gamma: float) -> tuple[float, float]:
    """Damping of what enters the first moment, and the smoothed cosine after this step.

    Args:
        m: First moment before this step.
        incoming: What is about to enter it.
        smoothed: Smoothed cosine before this step, 0 at first.
        gamma: Decay of the smoothed cosine.

    Returns:
        Damping and smoothed cosine.
    """
    norms = math.sqrt(dot(m, m)) * math.sqrt(dot(incoming, incoming))
    cosine = dot(m, incoming) / norms if norms > 0 else 0.0
    smoothed = gamma * smoothed + (1 - gamma) * cosine
    return 1e-8 + (1 + smoothed) / 2, smoothed


def momentum(m: Tensor, incoming: Tensor, beta1: float, damping: float = 1.0) -> Tensor:
    """First moment, without bias correction."""
    return each(lambda old, n: beta1 * old + (1 - beta1) * damping * n, m, incoming)


def adam(
    m: Tensor, v: Tensor, grad: Tensor, t: int, betas: tuple[float, float], eps: float, damping: float = 1.0
) -> tuple[Tensor, Tensor, Tensor]:
    """Direction, first and second moment of Adam at step ``t`` (from 1); ``damping`` enters the first moment only."""
    beta1, beta2 = betas
    m = momentum(m, grad, beta1, damping)
    v = each(lambda old, g: beta2 * old + (1 - beta2) * g * g, v, grad)
    update = each(lambda x, y: (x / (1 - beta1**t)) / (math.sqrt(y / (1 - beta2**t)) + eps), m, v)
    return update, m, v


def cautious(update: Tensor, grad: Tensor) -> Tensor:
    """Only elements whose sign is the gradient's, at the mean step of all."""
    if update.numel() == 0:
        return update
    kept = total(lambda u, g: float(sign(u) * sign(g) > 0), update, grad)
    mean = max(kept / update.numel(), 1e-3)
    return each(lambda u, g: u / mean if sign(u) * sign(g) > 0 else 0.0, update, grad)


def grams(update: Tensor, grad: Tensor) -> Tensor:
    """The update's magnitudes with the gradient's signs."""
    return each(lambda u, g: abs(u) * sign(g), update, grad)


def learning_rate_mask(
    mask: Tensor,
    last_sign: Tensor,
    grad: Tensor,
    t: int,
    *,
    min_lr: float,
    max_lr: float,
    lr_bump: float,
    warmup_steps: int,
    d_coef: float = 1.0,
    bump_scale: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Rate of every element, and the last sign of its gradient, after step ``t`` (from 1).

    Args:
        mask: Rates before this step; the learning rate at construction at first.
        last_sign: Signs last seen, zeros at first.
        grad: Gradient.
        t: Step.
        min_lr: Lower bound.
        max_lr: Upper bound.
        lr_bump: Change a step.
        warmup_steps: The first step at which nothing changes any more.
        d_coef: Factor on raises in the first half of the warm-up.
        bump_scale: Factor on the change of every element; 1 if None.

    Returns:
        Mask and signs.
    """
    if t >= warmup_steps:
        return mask, last_sign
    raised = lr_bump * d_coef if t < warmup_steps / 2 else lr_bump

    def moved(rate: float, last: float, g: float, scale: float) -> float:
        if last * g > 0:
            rate += raised * scale
        elif last * g < 0:
            rate -= lr_bump * scale
        return min(max(rate, min_lr), max_lr)

    scale = torch.ones_like(mask) if bump_scale is None else bump_scale
    new_sign = each(lambda last, g: sign(g) if g != 0 else last, last_sign, grad)
    return each(moved, mask, last_sign, each(sign, grad), scale), new_sign


def decay_strength(
    t: int, weight_decay: float, transition_steps: int | None, decay_factor: float, min_ratio: float
) -> float:
    """Weight decay at step ``t``, to be multiplied by the learning rate; constant if ``transition_steps`` is None."""
    if transition_steps is None or t <= transition_steps:
        return weight_decay
    return weight_decay * max(math.pow(decay_factor, (t - transition_steps) / transition_steps), min_ratio)


def apply_step(param: Tensor, update: Tensor, rate: Tensor, decay: float) -> Tensor:
    """``θ - decay·θ - rate·u``."""
    return each(lambda p, u, r: p - decay * p - r * u, param, update, rate)


def selective_projection_decay(stepped: Tensor, param: Tensor, anchor: Tensor, grad: Tensor, strength: float) -> Tensor:
    """Weights after the pull to the anchor.

    Args:
        stepped: Weights after step and decay.
        param: Weights before.
        anchor: Weights before the first update.
        grad: Gradient.
        strength: λ.

    Returns:
        ``stepped``, or weights nearer to the anchor.
    """
    distance = each(lambda p, a: p - a, param, anchor)
    if dot(grad, distance) <= 1e-5 * math.sqrt(dot(grad, grad)) * math.sqrt(dot(distance, distance)):
        return stepped  # along the gradient, or across it but for rounding
    away = each(lambda s, a: s - a, stepped, anchor)
    before, after = math.sqrt(dot(distance, distance)), math.sqrt(dot(away, away))
    if after == 0:
        return stepped
    ratio = max(0.0, (after - before) / after)
    pull = min(strength * ratio, 1.0)
    return each(lambda s, d: s - pull * d, stepped, away)
