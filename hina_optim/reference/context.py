"""Reference: the loss context of one parameter, loss by loss in plain Python numbers (float64).

The formulas, and why they are so, are in :mod:`hina_optim.techniques.loss_context`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

__all__ = ["LossHistory", "context_target", "part_trend"]


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values) if values else 0.0


def _std(values: Sequence[float]) -> float:
    mean = _mean(values)
    return math.sqrt(_mean([(x - mean) ** 2 for x in values]))


def part_trend(losses: Sequence[float]) -> tuple[float, float, float]:
    """How a run of losses went.

    Args:
        losses: Oldest first.

    Returns:
        The trend (positive: it falls), the fall from the older to the newer half, and its standard error.
    """
    m = len(losses)
    half = m // 2
    fall = _mean(losses[:half]) - _mean(losses[m - half :])
    size = _mean([abs(x) for x in losses])
    error = 2 * _std(losses) / math.sqrt(max(m, 1)) + 1e-5 * size
    beyond = max(abs(fall) - error, 0.0)
    return (math.copysign(beyond, fall) / size if size else 0.0), fall, error


def context_target(losses: Sequence[float], cosine: float, window: int, bounds: tuple[float, float]) -> float:
    """The multiplier that a history of finite losses and the smoothed cosine ask for.

    Args:
        losses: At most ``window``, oldest first.
        cosine: Smoothed cosine of successive gradients.
        window: Most losses remembered.
        bounds: Of the multiplier.
    """
    short, _, _ = part_trend(losses[-max(2, window // 3) :])
    long, fall, error = part_trend(losses)
    mean, std = abs(_mean(losses)), _std(losses)
    direction = math.tanh(4 * (short + long) / 2)
    drive = direction
    if direction > 0:
        drive *= (math.exp(-std / mean) if mean else 0.0) * (1 + cosine) / 2
    edges = 0
    if std > mean / 2 and std > abs(fall):
        edges += 1  # high variance that is no trend
    if cosine < -0.25:
        edges += 1  # gradients undo each other
    if len(losses) == window and abs(fall) <= error:
        edges += 1  # a long plateau
    if edges:
        drive = min(drive, 0.0) - edges / 4
    drive = len(losses) / window * max(drive, -1.0)
    lower, upper = bounds
    return 1 + drive * (upper - 1) if drive > 0 else 1 + drive * (1 - lower)


@dataclass
class LossHistory:
    """What is remembered of one parameter: losses, smoothed cosine, last gradient's sketch, multiplier."""

    window: int
    adaptation_rate: float
    bounds: tuple[float, float]
    losses: list[float] = field(default_factory=list)
    cosine: float = 0.0
    sketch: list[float] = field(default_factory=list)
    rate: float = 1.0

    def step(self, loss: float, sketch: Sequence[float]) -> float:
        """The multiplier of this step.

        Args:
            loss: NaN for a step without one.
            sketch: Of the gradient, of length 1; all zeros for a zero gradient.
        """
        if math.isfinite(loss):
            self.losses = [*self.losses, loss][-self.window :]
        if any(sketch):
            if self.sketch:
                cosine = math.fsum(x * y for x, y in zip(sketch, self.sketch, strict=True))
                self.cosine = 0.9 * self.cosine + 0.1 * cosine
            self.sketch = list(sketch)
        target = context_target(self.losses, self.cosine, self.window, self.bounds)
        self.rate += self.adaptation_rate * (target - self.rate)
        return self.rate
