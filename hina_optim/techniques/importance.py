"""Importance: learning rate moves from parameters that have little to do to those that have much."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from hina_optim import arguments as rule
from hina_optim.state.slot import ANCHOR
from hina_optim.techniques.base import Flow, ParamInfo, PeriodicTechnique, Relations, Slot, Sums

__all__ = ["ImportanceScaling", "analyze_importance"]

#: Bounds of a score before the rates are divided by their mean.
LOWEST, HIGHEST = 0.1, 3.0

#: Last element of ``importance_raw``: never measured; measured since the last refresh; or before it, and used.
NEVER, FRESH, USED = 0.0, 1.0, 2.0

_WEIGHTS = (0.4, 0.3, 0.3)


class ImportanceScaling(PeriodicTechnique):
    """Scale each parameter's rate by its importance relative to all others, of all groups that use the technique.

    Every ``interval`` steps, from the raw gradient ``g`` and the weights ``θ`` (``θ₀`` before the first update), with
    ``n`` the number of elements::

        a = ‖g‖ / √n          v = variance(g) · share of elements of g that are not 0
        d = ‖θ − θ₀‖ / ‖θ₀‖   (over ‖θ‖ where θ₀ = 0; 0 where that is 0 too)
        c = 0.4·a/mean(a) + 0.3·d/mean(d) + 0.3·v/mean(v)      means over all measured parameters
        score <- decay · score + (1 − decay) · c               score starts at 1
        factor = clip(1 + adaptation_strength · (score - 1), 0.1, 3);   rate <- rate · factor / mean(factor)

    ``c`` has mean 1: where a mean is 0 (nothing has moved yet), all count as equal to it. Only ratios enter, so the
    scale of the loss does not matter; the mean of the rates' factors is 1, so learning rate is redistributed and not
    added. A parameter that was not measured keeps its score; one that never was, a factor of 1. Refreshed one step
    after measuring, on the device.

    First in a recipe but for other periodic techniques, so that it sees the raw gradient. State: the anchor ``θ₀``
    (shared) and six numbers a parameter, float32.

    Args:
        adaptation_strength: Factor on the distance of a score from 1, the average, > 0: 1 takes the score itself, less
            adapts less, more adapts more, until scores meet a bound. (The original design multiplies the score; divided
            by their mean, the factors would not show it.)
        decay: Share of the old score kept at each measurement, in [0, 1).
        interval: Steps from one measurement to the next, an integer >= 1.

    Raises:
        ValueError: An argument is not what is said above.

    References:
        This project's own technique; no paper. The original design scored the absolute gradient norm, which ranks large
        tensors first and follows the scale of the loss.
    """

    name: ClassVar[str] = "importance"
    reads: ClassVar[frozenset[str]] = frozenset({"rate"})
    writes: ClassVar[frozenset[str]] = frozenset({"rate"})
    sums_over: ClassVar[frozenset[str]] = frozenset({"grad", "param"})
    population: ClassVar[tuple[str, ...]] = ("importance", "importance_rate", "importance_raw")

    def __init__(self, adaptation_strength: float = 1.0, decay: float = 0.95, interval: int = 100) -> None:
        rule.check("ImportanceScaling", "adaptation_strength", adaptation_strength, rule.POSITIVE)
        rule.check("ImportanceScaling", "decay", decay, rule.BELOW_ONE)
        rule.check("ImportanceScaling", "interval", interval, rule.INTERVAL)
        self.adaptation_strength = adaptation_strength
        self.decay = decay
        self.interval = interval

    def applies(self, info: ParamInfo) -> bool:
        """Every parameter with elements."""
        return info.numel > 0

    def measures(self, info: ParamInfo) -> bool:
        """Every parameter with elements."""
        return info.numel > 0

    def slots(self, info: ParamInfo) -> tuple[Slot, ...]:
        """Anchor, score, factor on the rate, and the last measurement ``[a, d, v, whether it is used]``."""
        return (
            ANCHOR,
            Slot("importance", shape=(), init=1.0, precision="fp32"),
            Slot("importance_rate", shape=(), init=1.0, precision="fp32"),
            Slot("importance_raw", shape=(4,), precision="fp32"),
        )

    def rate_factor(self, param: Tensor, state: Mapping[str, Tensor]) -> Tensor | float:
        """The factor in force."""
        return state.get("importance_rate", 1.0)

    def transform(self, flow: Flow) -> None:
        """Scale the rate by the factor in force."""
        flow["rate"] = flow["rate"] * flow.per_param(flow.state["importance_rate"])

    def sums(self, flow: Flow) -> Sums:
        """Squares and counts of the gradient, the weights, the anchor, and how far the weights are from it."""
        grad, param = flow["grad"], flow["param"]
        anchor = flow.state["anchor"].expand_as(param)
        return {
            "grad": grad,
            "grad_sq": grad.square(),
            "nonzero": (grad != 0).to(grad.dtype),
            "moved_sq": (param - anchor).square(),
            "anchor_sq": anchor.square(),
            "param_sq": param.square(),
        }

    def settle(self, flow: Flow, totals: dict[str, Tensor]) -> None:
        """Keep this measurement."""
        n = flow.count
        of = {name: value.reshape(-1) for name, value in totals.items()}
        mean_sq = of["grad_sq"] / n
        variance = (mean_sq - (of["grad"] / n).square()).clamp_min(0)
        start = torch.where(of["anchor_sq"] > 0, of["anchor_sq"], of["param_sq"])
        drift = torch.where(start > 0, of["moved_sq"] / torch.where(start > 0, start, 1), 0).sqrt()
        flow.new["importance_raw"] = torch.stack(
            (mean_sq.sqrt(), drift, variance * of["nonzero"] / n, torch.full_like(drift, FRESH)), dim=1
        )

    def refresh(self, states: dict[str, Tensor], infos: list[ParamInfo], relations: Relations) -> dict[str, Tensor]:
        """Scores and factors from all measurements; one that is not finite counts as not made."""
        raw, score, rate = states["importance_raw"], states["importance"], states["importance_rate"]
        flag = raw[:, 3]
        usable = (flag != NEVER) & torch.isfinite(raw).all(1)
        count = usable.sum().clamp_min(1)

        values = torch.where(usable[:, None], raw[:, :3], 0)
        # divided by the largest first: the sum of a thousand large ones must not overflow, nor that of tiny ones vanish
        largest = values.amax(0)
        values = torch.where(largest > 0, values / torch.where(largest > 0, largest, 1), 1)
        mean = torch.where(usable[:, None], values, 0).sum(0) / count
        relative = values / torch.where(mean > 0, mean, 1)
        combined = (relative * raw.new_tensor(_WEIGHTS)).sum(1)

        fresh = usable & (flag == FRESH)
        score = torch.where(fresh, self.decay * score + (1 - self.decay) * combined, score)
        factor = (1 + self.adaptation_strength * (score - 1)).clamp(LOWEST, HIGHEST)
        average = torch.where(usable, factor, 0).sum() / count
        rate = torch.where(usable, factor / torch.where(average > 0, average, 1), rate)
        raw = torch.cat((raw[:, :3], torch.where(flag == FRESH, USED, flag)[:, None]), dim=1)
        return {"importance": score, "importance_rate": rate, "importance_raw": raw}


def analyze_importance(names: Sequence[str], scores: Tensor, limit: int = 10) -> dict[str, Any]:
    """Importance scores in words: their statistics, and who stands out.

    Args:
        names: ``P`` names of parameters.
        scores: ``[P]``, the state ``importance`` of each (on any device; one transfer).
        limit: Most names to give on either side.

    Returns:
        ``total_parameters``; ``importance_statistics`` with ``mean``, ``max``, ``min`` and ``std`` (of the
        population; all 0.0 if there are no parameters); ``high_importance_params`` and ``low_importance_params``:
        ``[(name, score), …]`` more than one standard deviation above (highest first) or below (lowest first) the
        mean.
    """
    values = [float(x) for x in scores.detach().to("cpu", torch.float64)]
    if not values:
        statistics = dict.fromkeys(("mean", "max", "min", "std"), 0.0)
        return {
            "total_parameters": 0,
            "importance_statistics": statistics,
            "high_importance_params": [],
            "low_importance_params": [],
        }
    mean = sum(values) / len(values)
    std = (sum((x - mean) ** 2 for x in values) / len(values)) ** 0.5
    ranked = sorted(zip(names, values, strict=True), key=lambda pair: -pair[1])
    return {
        "total_parameters": len(values),
        "importance_statistics": {"mean": mean, "max": max(values), "min": min(values), "std": std},
        "high_importance_params": [pair for pair in ranked if pair[1] > mean + std][:limit],
        "low_importance_params": [pair for pair in reversed(ranked) if pair[1] < mean - std][:limit],
    }
