"""Multi-scale momentum: running means of the gradient that look every 5, 20, 100 steps, mixed into it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, ClassVar

import torch
from torch import Tensor

from hina_optim import arguments
from hina_optim.state.slot import Slot
from hina_optim.techniques.base import Flow, ParamInfo, Technique

__all__ = ["MOMENTUM_SCALES", "MultiScaleMomentum"]


def _are_scales(x: Any) -> bool:
    if not isinstance(x, (tuple, list)) or not all(arguments.INTERVAL.holds(k) for k in x):
        return False
    return 1 in x and len(set(x)) == len(x)


MOMENTUM_SCALES = arguments.Rule("distinct integers >= 1, 1 among them", _are_scales)


class MultiScaleMomentum(Technique):
    """Let a mixture of the gradient and of running means of it, each at a pace of its own, take the gradient's place.

    Of every scale ``k > 1``, in steps ``t`` that ``k`` divides::

        m_k ← β·m_k + (1-β)·x                        state ``momentum_<k>``

    and in every step, over the scales that have been updated at least once, ``n = ⌊t/k⌋ ≥ 1`` times, with weights
    ``1/k``::

        incoming = (x + Σ (1/k)·m_k/(1-βⁿ)) / (1 + Σ 1/k)

    Scale 1 is the gradient itself: its running mean is the first moment that follows, so that the moment of the mixture
    is the mixture of the moments, and no scale is smoothed away twice. (Smoothed here too, the stream would repeat
    itself so much that a :class:`~.confidence.Confidence` took noise for a signal: three times the step.)

    The weights add up to 1 and each mean is corrected for its bias by its own number of updates: the mixture is a mean
    of gradients, in their unit, and is normalized like the gradient that it replaces. The mean step stays within a
    factor of 2 of the one without it.

    Stands after the techniques that change ``grad``, before the one that normalizes it.

    Args:
        scales: k, steps between updates: distinct integers >= 1, 1 among them (the first steps have nothing else to go
            by). Each but the 1 costs a tensor of the parameter's shape.
        beta: β, decay an update, in [0, 1): the memory of a scale is about ``k/(1-β)`` steps.

    Raises:
        ValueError: scales or beta are not as above.

    References:
        This project's own technique; no paper. Means with memories of different length are also the idea of *AdEMAMix*,
        arXiv 2409.03137.
    """

    name: ClassVar[str] = "multi_scale"
    reads: ClassVar[frozenset[str]] = frozenset({"grad", "incoming"})
    writes: ClassVar[frozenset[str]] = frozenset({"incoming"})

    def __init__(self, scales: Iterable[int] = (1, 5, 20, 100), beta: float = 0.9) -> None:
        arguments.check("MultiScaleMomentum", "scales", scales, MOMENTUM_SCALES)
        arguments.check("MultiScaleMomentum", "beta", beta, arguments.BELOW_ONE)
        self.scales = tuple(scales)
        self.slow = tuple(k for k in self.scales if k > 1)
        self.beta = float(beta)

    def slots(self, info: ParamInfo) -> tuple[Slot, ...]:
        """A running mean a scale above 1, of the parameter's shape."""
        # stored again in every step, a mean must stay as it is until its turn: rounded stochastically it does
        return tuple(Slot(f"momentum_{k}", code="signed", slow=True) for k in self.slow)

    def scalars(self, t: Tensor) -> dict[str, Tensor]:
        """Of every scale: how much of the gradient it takes in now, and its weight in the mixture."""
        age = (t - self.window[0]).clamp(min=1)
        updates = {k: (age / k).floor() for k in self.slow}
        weights = {k: n.clamp(max=1) / k for k, n in updates.items()}  # 0 before the first update
        whole = sum(weights.values(), age * 0 + 1)
        numbers = {"weight_1": 1 / whole}
        for k, n in updates.items():
            numbers[f"take_{k}"] = (age % k == 0).to(age.dtype) * (1 - self.beta)
            numbers[f"weight_{k}"] = weights[k] / whole / (1 - self.beta ** n.clamp(min=1))
        return numbers

    def transform(self, flow: Flow) -> None:
        """Update the running means whose turn it is, and mix."""
        x = flow.get("incoming")
        if x is None:
            x = flow["grad"]
        mixture = flow.scalar(self, "weight_1") * x
        for k in self.slow:
            mean = torch.lerp(flow.state[f"momentum_{k}"], x, flow.scalar(self, f"take_{k}"))
            flow.new[f"momentum_{k}"] = mean
            mixture.addcmul_(mean, flow.scalar(self, f"weight_{k}"))
        flow["incoming"] = mixture
