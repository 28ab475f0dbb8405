"""Loss context: the learning rate follows how the loss went lately, and whether gradients agree from step to step."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from hina_optim import arguments
from hina_optim.arguments import Rule
from hina_optim.techniques.base import Flow, Folded, ParamInfo, Slot, Sums, Technique
from hina_optim.techniques.relationships import with_random_signs

__all__ = ["BOUNDS", "SKETCH", "WINDOW", "LossContext"]

#: Numbers kept of a gradient. The cosine of two independent gradients is then off by about 1/√64.
SKETCH = 64
#: Share of the smoothed cosine that a step keeps.
COSINE_DECAY = 0.9
#: Steepness of the trend: a fall by a quarter of the loss from the older to the newer half gives tanh(1).
GAIN = 4.0
#: Differences of means below this share of the loss are rounding.
ROUNDING = 1e-5
#: Share of the way to the lower bound for every edge case.
CALM = 0.25
#: Standard deviation over mean from which on losses that are no trend are too noisy to follow.
HIGH_VARIANCE = 0.5
#: Smoothed cosine below which successive gradients undo each other.
LOW_CONSISTENCY = -0.25

WINDOW = Rule("an integer >= 4", lambda x: arguments.INTERVAL.holds(x) and x >= 4)


def _are_bounds(x: Any) -> bool:
    return isinstance(x, (tuple, list)) and len(x) == 2 and 0 < x[0] <= 1 <= x[1] and arguments.POSITIVE.holds(x[1])


BOUNDS = Rule("two numbers (lower, upper), 0 < lower <= 1 <= upper", _are_bounds)


class _Part(NamedTuple):
    """Statistics ``[N]`` of the latest losses, in units of the largest of the whole history."""

    size: Tensor  # mean of |L|
    mean: Tensor
    std: Tensor
    fall: Tensor  # mean of the older half minus mean of the newer half
    error: Tensor  # standard error of ``fall``


class LossContext(Technique):
    """Multiply the rate by a number in ``bounds``, from the last losses and the cosine of successive gradients.

    The history holds the last ``n <= window`` finite losses; ``c`` is the cosine of this gradient and the last one,
    averaged over time (``c ← 0.9·c + 0.1·cos``, 0 at first). For a *part* of the history, its latest ``m`` losses
    (short: a third of the window, at least 2; long: all of it)::

        fall  = mean of the older m//2 losses - mean of the newer m//2          positive when the loss falls
        error = 2·std/√m + 1e-5·mean|L|                                         its standard error
        trend = sign(fall) · max(|fall| - error, 0) / mean|L|                   what of it is more than noise

    and with mean and standard deviation of the long part::

        stability = exp(-std / |mean|)
        direction = tanh(4 · (trend_short + trend_long) / 2)
        drive     = direction · stability · (1 + c)/2      if it is positive, else direction
        edges     = [std > |mean|/2 and std > |fall|]      high variance that is no trend
                  + [c < -0.25]                            low consistency: gradients undo each other
                  + [n = window and |fall| <= error]       a long plateau
        drive     = min(drive, 0) - edges/4                if there are edges
        drive     = n/window · max(drive, -1)              few losses say little
        target    = 1 + drive·(upper - 1)  if drive > 0,   1 + drive·(1 - lower)  else

        multiplier ← multiplier + adaptation_rate · (target - multiplier)       1 at first
        rate       ← rate · multiplier                                          in the same step

    So a falling loss raises the rate, the more so the steadier it falls and the better gradients agree; a rising loss
    lowers it whatever they do; and each of the three edge cases keeps the target below 1. By the default arguments, a
    loss that falls by 1 % in each step asks for 1.4 (independent gradients) to 1.8 (equal ones), by 5 % for 1.9 to 2.7,
    which is about the most: a fall so steep that a few losses dominate is taken for variance. Noise without a trend
    ends at 0.93 on average.

    All is relative: multiplying every loss by a constant changes nothing, and falling means falling for negative losses
    too. Adding a constant does change things, as it does to a relative trend. A step without a loss, or with one that
    is not finite, leaves the history as it is; as long as none was ever reported the multiplier is 1.

    The cosine is taken between sketches: gradients folded into 64 numbers with hashed signs, of length 1; its error is
    about 1/8, which the average over time brings down. A gradient of zeros has no direction and leaves sketch and ``c``
    as they are. Early in a recipe it sees the raw gradient and its sums share the first reduction.

    State: window + 67 numbers a parameter, float32.

    Args:
        window: Losses remembered, an integer >= 4.
        adaptation_rate: Share of the way to the target in a step, in [0, 1]; 0 leaves the technique out.
        bounds: Lower and upper bound of the multiplier, ``0 < lower <= 1 <= upper``.

    Raises:
        ValueError: An argument is not what is said above.

    Source: this project's own formula for the idea of the original design; no paper.
    """

    name: ClassVar[str] = "context"
    sums_over: ClassVar[frozenset[str]] = frozenset({"grad"})
    settles: ClassVar[frozenset[str]] = frozenset({"rate"})
    reads_loss: ClassVar[bool] = True
    needs_index: ClassVar[bool] = True

    def __init__(
        self, window: int = 30, adaptation_rate: float = 0.25, bounds: tuple[float, float] = (0.6, 4.0)
    ) -> None:
        arguments.check("LossContext", "window", window, WINDOW)
        arguments.check("LossContext", "adaptation_rate", adaptation_rate, arguments.UNIT)
        arguments.check("LossContext", "bounds", bounds, BOUNDS)
        self.length = window
        self.adaptation_rate = float(adaptation_rate)
        self.bounds = (float(bounds[0]), float(bounds[1]))

    def applies(self, info: ParamInfo) -> bool:
        """Every parameter with elements."""
        return self.adaptation_rate > 0 and info.numel > 0

    def slots(self, info: ParamInfo) -> tuple[Slot, ...]:
        """The losses (newest last), how many there are, the last gradient's sketch, the cosine, the multiplier."""
        return (
            Slot("context_losses", shape=(self.length,), precision="fp32"),
            Slot("context_count", shape=(), precision="fp32"),
            Slot("context_sketch", shape=(SKETCH,), precision="fp32"),
            Slot("context_cosine", shape=(), precision="fp32"),
            Slot("context_rate", shape=(), init=1.0, precision="fp32"),
        )

    def rate_factor(self, param: Tensor, state: Mapping[str, Tensor]) -> Tensor | float:
        """The multiplier as it stands."""
        return state.get("context_rate", 1.0)

    def sums(self, flow: Flow) -> Sums:
        """The gradient with random signs, folded into the sketch."""
        return {"sketch": Folded(with_random_signs(flow["grad"], flow["index"]), SKETCH)}

    def settle(self, flow: Flow, totals: dict[str, Tensor]) -> None:
        """Take loss and gradient in, move the multiplier, and scale the rate."""
        losses, count = self._remember(flow)
        cosine = self._compare(flow, totals["sketch"])
        target = self._target(losses, count, cosine)
        old = flow.state["context_rate"]
        rate = (old + self.adaptation_rate * (target - old)).clamp(*self.bounds)
        flow.new["context_rate"] = rate
        flow["rate"] = flow["rate"] * flow.per_param(rate)

    def _remember(self, flow: Flow) -> tuple[Tensor, Tensor]:
        """The history with this step's loss, ``[N, window]``, and how many losses it holds, ``[N]``."""
        old, loss = flow.state["context_losses"], flow.scalars["loss"]
        finite = torch.isfinite(loss)
        longer = torch.cat((old[:, 1:], torch.where(finite, loss, 0)[:, None]), dim=1)
        flow.new["context_losses"] = losses = torch.where(finite[:, None], longer, old)
        flow.new["context_count"] = count = (flow.state["context_count"] + finite).clamp(max=self.length)
        return losses, count

    def _compare(self, flow: Flow, folded: Tensor) -> Tensor:
        """The smoothed cosine with the gradient before, ``[N]``; keeps the direction of this one."""
        old = flow.state["context_sketch"]
        largest = folded.abs().amax(1, keepdim=True)
        present = largest > 0
        scaled = folded / torch.where(present, largest, 1)
        sketch = scaled / torch.where(present, scaled.square().sum(1, keepdim=True).sqrt(), 1)
        flow.new["context_sketch"] = torch.where(present, sketch, old)
        both = present[:, 0] & (old.abs().amax(1) > 0)
        smoothed = flow.state["context_cosine"]
        cosine = (sketch * old).sum(1).clamp(-1, 1)
        cosine = torch.where(both, COSINE_DECAY * smoothed + (1 - COSINE_DECAY) * cosine, smoothed)
        flow.new["context_cosine"] = cosine
        return cosine

    def _part(self, losses: Tensor, count: Tensor, length: int) -> _Part:
        """Statistics of the latest ``length`` losses, or of all there are."""
        age = torch.arange(self.length - 1, -1, -1, dtype=losses.dtype, device=losses.device)
        m = count.clamp(max=length)[:, None]
        half = torch.floor(m / 2)
        present = (age < m).to(losses.dtype)
        newer = (age < half).to(losses.dtype)
        older = present * (age >= m - half).to(losses.dtype)
        n = m.clamp(min=1)[:, 0]
        size = (losses.abs() * present).sum(1) / n
        mean = (losses * present).sum(1) / n
        std = (((losses - mean[:, None]).square() * present).sum(1) / n).sqrt()
        fall = (losses * (older - newer)).sum(1) / half.clamp(min=1)[:, 0]
        return _Part(size, mean, std, fall, 2 * std / n.sqrt() + ROUNDING * size)

    def _target(self, losses: Tensor, count: Tensor, cosine: Tensor) -> Tensor:
        """The multiplier that history and cosine ask for, ``[N]``."""
        largest = losses.abs().amax(1, keepdim=True)
        losses = losses / torch.where(largest > 0, largest, 1)
        short = self._part(losses, count, max(2, self.length // 3))
        long = self._part(losses, count, self.length)
        spread = long.std / torch.maximum(long.mean.abs(), 1e-6 * long.size).clamp(min=1e-30)
        direction = torch.tanh(GAIN / 2 * (_trend(short) + _trend(long)))
        drive = direction.clamp(min=0) * torch.exp(-spread) * (1 + cosine) / 2 + direction.clamp(max=0)

        noisy = (long.std > HIGH_VARIANCE * long.mean.abs()) & (long.std > long.fall.abs())
        torn = cosine < LOW_CONSISTENCY
        stuck = (count >= self.length) & (long.fall.abs() <= long.error)
        edges = noisy.to(drive.dtype) + torn.to(drive.dtype) + stuck.to(drive.dtype)
        drive = torch.where(edges > 0, drive.clamp(max=0) - CALM * edges, drive)
        drive = count / self.length * drive.clamp(min=-1)
        lower, upper = self.bounds
        return 1 + drive.clamp(min=0) * (upper - 1) + drive.clamp(max=0) * (1 - lower)


def _trend(part: _Part) -> Tensor:
    """The significant part of the fall, relative to the loss."""
    significant = part.fall.sign() * (part.fall.abs() - part.error).clamp(min=0)
    return significant / torch.where(part.size > 0, part.size, 1)
