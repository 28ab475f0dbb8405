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
        """Whether the parameter may move, the weight of the old second moment, and the bound."""
        is_open = (t > 1).to(t.dtype)
        keep = self.beta2 * is_open
        return {"open": is_open, "keep": keep, "bound": (t - 1) ** 0.25}

    def transform(self, flow: Flow) -> None:
        """Set what enters the first moment, and the new second moment."""
        grad, v = flow["grad"], flow.state["exp_avg_sq"]
        bound = flow.scalar(self, "bound")
        # At t = 1 the bound is 0, and so is what enters, whatever the division gives. Two clips to one tensor each are
        # as fast as products, one to two tensors is several times slower
        root = v.sqrt().clamp_(min=self.eps)
        flow["incoming"] = (grad / root).clamp_max_(bound).clamp_min_(-bound)
        flow.new["exp_avg_sq"] = (grad * grad).lerp_(v, flow.scalar(self, "keep"))
        flow["lr"] = flow["lr"] * flow.scalar(self, "open")
        flow["rate"] = flow["rate"] * flow.scalar(self, "open")


class Momentum(Technique):
    """First moment of what comes in, without bias correction: the direction of ADOPT, and the moment of CAME.

    ``m ← β₁m + (1-β₁)·clip·damping·n``, ``u = m``; ``clip`` and ``damping`` are 1 unless a technique set them.

    With ``decay`` below 1 the memory gets shorter with time: ``β₁(t) = max(β₁·decay^(t-1), floor)``. Under a
    :class:`~.confidence.Confidence` give it a floor of 0.5 or so: as β₁ goes to 0 the moment becomes the gradient
    itself, so that nothing deviates from it any more and every step is taken for a sure one.

    Args:
        beta1: β₁, decay a step, in [0, 1).
        decay: Factor on β₁ a step, in [0, 1]; 1 leaves it constant.
        floor: Smallest β₁ that ``decay`` leads to, in [0, beta1].

    Raises:
        ValueError: beta1 is outside [0, 1), decay outside [0, 1], or floor outside [0, beta1].

    Source: arXiv 2411.02853, algorithm 2, line of ``m``; arXiv 2307.02047, algorithm 2, the same. A β₁ that decays is
    in neither; this project's own.
    """

    name: ClassVar[str] = "momentum"
    reads: ClassVar[frozenset[str]] = frozenset({"grad", "incoming", "clip", "damping"})
    writes: ClassVar[frozenset[str]] = frozenset({"update"})

    def __init__(self, beta1: float, decay: float = 1.0, floor: float = 0.0) -> None:
        arguments.check("Momentum", "beta1", beta1, arguments.BELOW_ONE)
        arguments.check("Momentum", "decay", decay, arguments.UNIT)
        up_to_beta1 = arguments.Rule(
            f"a number in [0, beta1={beta1}]", lambda x: arguments.BELOW_ONE.holds(x) and x <= beta1
        )
        arguments.check("Momentum", "floor", floor, up_to_beta1)
        self.beta1, self.decay, self.floor = float(beta1), float(decay), float(floor)

    def slots(self, info: ParamInfo) -> tuple[Slot, ...]:
        """The first moment, of the parameter's shape."""
        return (EXP_AVG,)

    def scalars(self, t: Tensor) -> dict[str, Tensor]:
        """β₁ of this step, where it decays."""
        if self.decay == 1:
            return {}
        return {"take": 1 - (self.beta1 * self.decay ** (t - 1)).clamp(min=self.floor)}

    def transform(self, flow: Flow) -> None:
        """Update the moment and set the direction."""
        incoming = flow.get("incoming")
        if incoming is None:
            incoming = flow["grad"]
        clip, damping = flow.get("clip"), flow.get("damping")
        if clip is not None:
            damping = clip if damping is None else clip * damping
        if damping is not None:
            incoming = damping * incoming
        take = 1 - self.beta1 if self.decay == 1 else flow.scalar(self, "take")
        m = torch.lerp(flow.state["exp_avg"], incoming, take)
        flow.new["exp_avg"] = m
        flow["update"] = m
