"""Reference: importance and relationships, one parameter and one pair at a time, in plain Python numbers (float64)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

__all__ = [
    "Measurement",
    "compatibility",
    "importance_measurement",
    "importance_rates",
    "importance_scores",
    "relations",
    "sketch",
    "sketch_average",
]


@dataclass(frozen=True)
class Measurement:
    """What importance sees of one parameter: gradient norm per √element, drift, and variance × density."""

    norm: float
    drift: float
    activity: float


def importance_measurement(grad: Tensor, param: Tensor, anchor: Tensor) -> Measurement:
    """Measure one parameter.

    Args:
        grad: Raw gradient.
        param: Weights before the update.
        anchor: Weights before the first update, of the same shape.
    """
    g = [float(x) for x in grad.double().flatten()]
    now = [float(x) for x in param.double().flatten()]
    start = [float(x) for x in anchor.double().flatten()]
    mean = sum(g) / len(g)
    variance = sum((x - mean) ** 2 for x in g) / len(g)
    density = sum(1 for x in g if x != 0) / len(g)
    moved = math.sqrt(sum((x - y) ** 2 for x, y in zip(now, start, strict=True)))
    length = math.sqrt(sum(x * x for x in start)) or math.sqrt(sum(x * x for x in now))
    return Measurement(
        norm=math.sqrt(sum(x * x for x in g)) / math.sqrt(len(g)),
        drift=moved / length if length else 0.0,
        activity=variance * density,
    )


def _relative(values: Sequence[float]) -> list[float]:
    mean = sum(values) / len(values)
    return [x / mean if mean else 1.0 for x in values]


def importance_scores(scores: Sequence[float], measured: Sequence[Measurement], decay: float) -> list[float]:
    """New scores of parameters that were all measured."""
    norms = _relative([m.norm for m in measured])
    drifts = _relative([m.drift for m in measured])
    activities = _relative([m.activity for m in measured])
    new = []
    for score, norm, drift, activity in zip(scores, norms, drifts, activities, strict=True):
        combined = 0.4 * norm + 0.3 * drift + 0.3 * activity
        new.append(decay * score + (1 - decay) * combined)
    return new


def importance_rates(scores: Sequence[float], adaptation_strength: float) -> list[float]:
    """Factors on the rates: clipped scores, their distance from 1 scaled by the strength, divided by their mean."""
    clipped = [min(max(1 + adaptation_strength * (score - 1), 0.1), 3.0) for score in scores]
    mean = sum(clipped) / len(clipped)
    return [x / mean for x in clipped]


def _sign(index: int) -> int:
    """A sign hashed from a flat index: part of the definition of a sketch."""
    x = _int32(index * 0x9E3779B9)
    x = _int32((x ^ (x >> 15)) * 0x2C1B3C6D)
    x = _int32((x ^ (x >> 16)) * 0x297A2D39)
    return -1 if x < 0 else 1


def _int32(x: int) -> int:
    """What is left of an integer in 32 bits, the upper one its sign."""
    return (x + 2**31) % 2**32 - 2**31


def sketch(grad: Tensor, size: int = 64) -> list[float]:
    """The gradient, with hashed signs, folded into ``size`` numbers and scaled to length 1 (zero stays zero)."""
    folded = [0.0] * size
    for i, value in enumerate(grad.double().flatten().tolist()):
        folded[i % size] += _sign(i) * value
    length = math.sqrt(sum(x * x for x in folded))
    return [x / length if length else 0.0 for x in folded]


def sketch_average(old: Sequence[float], new: Sequence[float], decay: float) -> list[float]:
    """Average of sketches over time."""
    return [decay * x + (1 - decay) * y for x, y in zip(old, new, strict=True)]


def compatibility(
    shape_x: Sequence[int], shape_y: Sequence[int], sketch_x: Sequence[float], sketch_y: Sequence[float]
) -> float:
    """How well two matrices that are no adapter pair fit together, in [0, 1]."""
    rows_x, columns_x = shape_x[0], math.prod(shape_x[1:])
    rows_y, columns_y = shape_y[0], math.prod(shape_y[1:])
    equalities = [rows_x == rows_y, columns_x == columns_y, rows_x == columns_y, columns_x == rows_y]
    length_x = math.sqrt(sum(x * x for x in sketch_x))
    length_y = math.sqrt(sum(y * y for y in sketch_y))
    dot = sum(x * y for x, y in zip(sketch_x, sketch_y, strict=True))
    cosine = abs(dot) / (length_x * length_y) if length_x and length_y else 0.0
    return 0.7 * sum(equalities) / 4 + 0.3 * cosine


def relations(
    shapes: Sequence[Sequence[int]],
    sketches: Sequence[Sequence[float]],
    partners: Sequence[int],
    threshold: float,
    kept: int = 3,
) -> list[list[tuple[float, int]]]:
    """For each matrix its best relations ``(score, index)``, best first, at most ``kept``."""
    found = []
    for i in range(len(shapes)):
        mine: list[tuple[float, int]] = []
        for j in range(len(shapes)):
            if i == j:
                continue
            score = 1.0 if partners[i] == j else compatibility(shapes[i], shapes[j], sketches[i], sketches[j])
            if score >= threshold and score > 0:
                mine.append((score, j))
        found.append(sorted(mine, key=lambda entry: (-entry[0], entry[1]))[:kept])
    return found
