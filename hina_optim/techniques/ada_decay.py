"""AdaDecay: weights whose gradient is large among its layer's decay faster."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from hina_optim.techniques.base import Flow, Sums
from hina_optim.techniques.products import inner
from hina_optim.techniques.weight_decay import ScheduledDecay

__all__ = ["AdaDecay"]

#: Steepness of the sigmoid (α of the paper, at its value).
ALPHA = 4.0

#: Least standard deviation of the magnitudes, in units of their rms: below it, their differences are rounding.
SPREAD_FLOOR = 1e-3


class AdaDecay(ScheduledDecay):
    """Decoupled weight decay, element by element, by how the gradient's magnitude compares within the parameter.

    With mean and standard deviation of ``|g|`` over the whole parameter, ``α = 4``::

        decay = lr · wd · κ(t) · 2 / (1 + exp(-α · (|g| - mean|g|) / std|g|))

    The factor is 1 at the mean magnitude and lies between 0 and 2. Only relative magnitudes count: the scale of the
    loss changes nothing. ``std² = mean(g²) - mean²`` gets ``(1e-3 · rms)²`` on top, which keeps a gradient of equal
    magnitudes at a factor of 1 (its differences are rounding); the factor is 1, too, for parameters of one element and
    where the gradient is zero everywhere. In float32 the rms must lie between about 1e-19 and 1e19, outside of that
    the factor is 1.

    ``g`` is the gradient as the techniques before this one left it. It takes the place of
    :class:`~hina_optim.techniques.weight_decay.DecoupledWeightDecay`. No state.

    Args:
        weight_decay: wd, share of the weight a step and a unit of learning rate, ≥ 0; 0 leaves the technique out.
        transition_steps: Updates until the decay begins to shrink, ≥ 1; None for a constant wd. The schedule κ is
            :class:`~hina_optim.techniques.weight_decay.ScheduledDecay`'s.
        decay_factor: Factor on the decay every further ``transition_steps`` updates, in [0, 1].
        min_ratio: Floor of κ, in [0, 1].

    Raises:
        ValueError: An argument is not what it must be.

    Source: *Adaptive Weight Decay for Deep Neural Networks*, arXiv 1907.08931, with gradient magnitudes normalized
    within each layer and the sigmoid of the paper; κ is that of the original design.
    """

    name: ClassVar[str] = "ada_decay"
    sums_over: ClassVar[frozenset[str]] = frozenset({"grad"})
    settles: ClassVar[frozenset[str]] = frozenset({"decay"})
    settle_reads: ClassVar[frozenset[str]] = frozenset({"grad", "lr"})

    def sums(self, flow: Flow) -> Sums:
        """Magnitudes and squares of the gradient."""
        grad = flow["grad"]
        return {"magnitude": grad.abs(), "squares": inner(grad, grad)}

    def settle(self, flow: Flow, totals: dict[str, Tensor]) -> None:
        """Set the decay of every element."""
        count = flow.count
        mean, mean_square = totals["magnitude"] / count, totals["squares"] / count
        variance = (mean_square - mean.square()).clamp(min=0) + SPREAD_FLOOR**2 * mean_square
        usable = (variance > 0) & torch.isfinite(variance)
        steepness = torch.where(usable, ALPHA * torch.rsqrt(torch.where(usable, variance, 1)), 0)
        # the mean of a usable parameter is finite, but that of another may overflow: infinity times zero
        center = steepness * torch.where(usable, mean, 0)
        factor = (flow["grad"].abs() * flow.once(steepness)).sub_(flow.once(center)).sigmoid_()
        flow["decay"] = factor * (2 * flow["lr"] * flow.scalar(self, "strength"))
