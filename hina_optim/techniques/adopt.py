"""ADOPT: normalize the gradient by the past second moment before it enters the first, so that any β₂ converges."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from hina_optim import arguments
from hina_optim.state.slot import EXP_AVG, EXP_AVG_SQ, Slot
from hina_optim.techniques.base import Flow, ParamInfo, Technique

__all__ = ["AdoptNormalization", "Momentum"]


class AdoptNormalization(Technique):
    """Divide the gradient by the root of the second moment *before* this gradient, and clip.

    First update of a parameter (t = 1): ``v = g²``, and nothing moves: the learning rate is closed (0), so that neither
    step, decay nor pull happens. From t = 2 on::

        n = clip(g / max(√v, ε), ±(t-1)^¼)
        v ← β₂v + (1-β₂)g²                      after n is taken

    The paper initializes ``v₀ = g₀²`` outside of its loop and counts its steps, and with them the bound ``c_t = t^¼``,
    from the first one that moves. Here ``t`` counts gradients, so the paper's ``t`` is our ``t - 1``: the bound is 1 at
    the first move, as in the paper's own code.

    Args:
        beta2: β₂, decay a step of the second moment, in [0, 1).
        eps: ε, smallest denominator, in units of the gradient, > 0.

    Raises:
        ValueError: beta2 is outside [0, 1), or eps is not a finite number > 0.

    Source: *ADOPT: Modified Adam Can Converge with Any β₂ with the Optimal Rate*, arXiv 2411.02853, the version with
    clipping (algorithm 2).
    """

    name: ClassVar[str] = "adopt"
    reads: ClassVar[frozenset[str]] = frozenset({"grad", "lr", "rate"})
    writes: ClassVar[frozenset[str]] = frozenset({"incoming", "lr", "rate"})

    def __init__(self, beta2: float, eps: float) -> None:
        arguments.check("AdoptNormalization", "beta2", beta2, arguments.BELOW_ONE)
        arguments.check("AdoptNormalization", "eps", eps, arguments.POSITIVE)
        self.beta2 = float(beta2)
        self.eps = float(eps)

    def slots(self, info: ParamInfo) -> tuple[Slot, ...]:
        """The second moment, of the parameter's shape."""
        return (EXP_AVG_SQ,)

    def scalars(self, t: Tensor) -> dict[str, Tensor]:
        """Whether the parameter may move, the weights of old and new second moment, and the bound."""
        is_open = (t > 1).to(t.dtype)
        keep = self.beta2 * is_open
        bound = (t - 1) ** 0.25
        divisor = torch.where(bound > 0, bound, 1)
        return {"open": is_open, "keep": keep, "take": 1 - keep, "bound": bound, "divisor": divisor}

    def transform(self, flow: Flow) -> None:
        """Set what enters the first moment, and the new second moment."""
        grad, v = flow["grad"], flow.state["exp_avg_sq"]
        bound = flow.scalar(self, "bound")
        # At t = 1 the bound is 0, and so is what enters, whatever the division gives.
        # min(max(x, -bound), bound) as a clip to ±1 of x / bound: clips to numbers run several times faster than to
        # tensors
        unit = grad / (v.sqrt().clamp(min=self.eps) * flow.scalar(self, "divisor"))
        flow["incoming"] = unit.clamp(-1, 1) * bound
        flow.new["exp_avg_sq"] = torch.addcmul(flow.scalar(self, "keep") * v, grad * flow.scalar(self, "take"), grad)
        flow["lr"] = flow["lr"] * flow.scalar(self, "open")
        flow["rate"] = flow["rate"] * flow.scalar(self, "open")


class Momentum(Technique):
    """First moment of what comes in, without bias correction: the direction of ADOPT.

    ``m ← β₁m + (1-β₁)·damping·n``, ``u = m``; ``damping`` is 1 unless a technique set it.

    Args:
        beta1: β₁, decay a step, in [0, 1).

    Raises:
        ValueError: beta1 is outside [0, 1).

    Source: arXiv 2411.02853, algorithm 2, line of ``m``.
    """

    name: ClassVar[str] = "momentum"
    reads: ClassVar[frozenset[str]] = frozenset({"grad", "incoming", "damping"})
    writes: ClassVar[frozenset[str]] = frozenset({"update"})

    def __init__(self, beta1: float) -> None:
        arguments.check("Momentum", "beta1", beta1, arguments.BELOW_ONE)
        self.beta1 = float(beta1)

    def slots(self, info: ParamInfo) -> tuple[Slot, ...]:
        """The first moment, of the parameter's shape."""
        return (EXP_AVG,)

    def transform(self, flow: Flow) -> None:
        """Update the moment and set the direction."""
        incoming = flow.get("incoming")
        if incoming is None:
            incoming = flow["grad"]
        damping = flow.get("damping")
        if damping is not None:
            incoming = damping * incoming
        m = self.beta1 * flow.state["exp_avg"] + (1 - self.beta1) * incoming
        flow.new["exp_avg"] = m
        flow["update"] = m
