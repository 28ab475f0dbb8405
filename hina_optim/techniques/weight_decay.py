"""Decoupled weight decay, with a schedule of its own."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from hina_optim import arguments
from hina_optim.techniques.base import Flow, ParamInfo, Technique

__all__ = ["DecoupledWeightDecay", "ScheduledDecay"]

#: LoKr's slower schedule: factor on the exponent, and on the floor.
LOKR_EXPONENT = 0.7
LOKR_FLOOR = 1.5


class ScheduledDecay(Technique):
    """A decay whose strength ``wd·κ(t)`` follows a schedule; what it acts on, and how, is the subclass's.

    ``κ = 1`` without a schedule; with one::

        κ(t) = 1                                            for t ≤ T
        κ(t) = max(decay_factor^((t-T)/T), min_ratio)       after

    continuous at ``T``, and at its floor for good once it is there.

    Args:
        weight_decay: wd, share of the weight a step and a unit of learning rate, ≥ 0; 0 leaves the technique out.
        transition_steps: T, updates, ≥ 1; None for a constant decay.
        decay_factor: Factor on the decay every further ``T`` updates, in [0, 1].
        min_ratio: Floor of κ, in [0, 1].

    Raises:
        ValueError: An argument is not what it must be.
    """

    def __init__(
        self,
        weight_decay: float,
        transition_steps: int | None = None,
        decay_factor: float = 0.7,
        min_ratio: float = 0.1,
    ) -> None:
        owner = type(self).__name__
        arguments.check(owner, "weight_decay", weight_decay, arguments.NON_NEGATIVE)
        if transition_steps is not None:
            arguments.check(owner, "transition_steps", transition_steps, arguments.INTERVAL)
        arguments.check(owner, "decay_factor", decay_factor, arguments.UNIT)
        arguments.check(owner, "min_ratio", min_ratio, arguments.UNIT)
        self.weight_decay = float(weight_decay)
        self.transition_steps = transition_steps
        self.decay_factor, self.min_ratio = float(decay_factor), float(min_ratio)

    @staticmethod
    def schedule(
        info: ParamInfo, transition_steps: int, decay_factor: float = 0.7, min_ratio: float = 0.1
    ) -> dict[str, Any]:
        """The schedule of a parameter, as keyword arguments: slower for LoKr's factors, plain for all others.

        Slower is ``κ(t) = max(decay_factor^(0.7·(t-T)/T), min(1.5·min_ratio, 1))``.

        Args:
            info: What the parameter is; its role counts.
            transition_steps: T.
            decay_factor: Before it is made slower.
            min_ratio: Before it is raised.
        """
        if info.role is not None and info.role.startswith("lokr"):
            decay_factor, min_ratio = decay_factor**LOKR_EXPONENT, min(LOKR_FLOOR * min_ratio, 1.0)
        return {"transition_steps": transition_steps, "decay_factor": decay_factor, "min_ratio": min_ratio}

    def applies(self, info: ParamInfo) -> bool:
        """False when the weight decay is 0."""
        return self.weight_decay > 0

    def scalars(self, t: Tensor) -> dict[str, Tensor]:
        """``wd·κ(t)``."""
        if self.transition_steps is None:
            return {"strength": torch.full_like(t, self.weight_decay)}
        exponent = ((t - self.transition_steps) / self.transition_steps).clamp(min=0)
        return {"strength": self.weight_decay * torch.pow(self.decay_factor, exponent).clamp(min=self.min_ratio)}


class DecoupledWeightDecay(ScheduledDecay):
    """Pull the weights towards zero, apart from the gradient, and less so late in training.

    ``decay = lr·wd·κ(t)`` and the engine takes ``decay·θ`` off the weights; ``κ`` and the arguments are
    :class:`ScheduledDecay`'s. ``lr`` is the group's learning rate now (not the rate of the element), so decay follows
    the scheduler and is zero when the learning rate is.

    Args:
        weight_decay: wd, share of the weight a step and a unit of learning rate, ≥ 0; 0 leaves the technique out.
        transition_steps: T, updates, ≥ 1; None for a constant decay.
        decay_factor: Factor on the decay every further ``T`` updates, in [0, 1].
        min_ratio: Floor of κ, in [0, 1].

    Raises:
        ValueError: An argument is not what it must be.

    Source: *Decoupled Weight Decay Regularization*, arXiv 1711.05101; the schedule is that of the original design.
    """

    name: ClassVar[str] = "weight_decay"
    reads: ClassVar[frozenset[str]] = frozenset({"lr"})
    writes: ClassVar[frozenset[str]] = frozenset({"decay"})

    def transform(self, flow: Flow) -> None:
        """Set the decay."""
        flow["decay"] = flow["lr"] * flow.scalar(self, "strength")
