"""Adam moments: the direction of AdamW."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from hina_optim import arguments
from hina_optim.state.slot import EXP_AVG, EXP_AVG_SQ, Slot
from hina_optim.techniques.base import Flow, ParamInfo, Technique

__all__ = ["AdamMoments"]

#: The largest second moment so far; it must not creep up by rounding.
MAX_EXP_AVG_SQ = Slot("max_exp_avg_sq", precision="fp32")


class AdamMoments(Technique):
    """First and second moment of the gradient, bias-corrected, as :class:`torch.optim.AdamW` has them.

    ``m ← β₁m + (1-β₁)·damping·n``, ``v ← β₂v + (1-β₂)·n²``, ``u = (m/(1-β₁ᵗ)) / (√v/√(1-β₂ᵗ) + ε)``

    where ``n`` is the incoming gradient, ``t`` the update from 1, and ``damping`` 1 unless a technique set it (it
    enters the first moment only: the second keeps measuring the gradient itself). Both corrections are computed in
    float64 where the device has it, so that ``1 - β₂ᵗ`` loses nothing at small ``t``.

    With ``amsgrad``, the largest ``v`` so far takes its place in ``u``.

    Args:
        betas: β₁ and β₂, decay a step of the two moments, in [0, 1).
        eps: ε, in units of the gradient, > 0.
        amsgrad: Never let the denominator shrink; keeps one more tensor of the parameter's shape.

    Raises:
        ValueError: A beta is outside [0, 1), or eps is not a finite number > 0.

    Source: *Decoupled Weight Decay Regularization*, arXiv 1711.05101, algorithm 2; AMSGrad: *On the Convergence of Adam
    and Beyond*, arXiv 1904.09237.
    """

    name: ClassVar[str] = "adam"
    reads: ClassVar[frozenset[str]] = frozenset({"grad", "incoming", "damping"})
    writes: ClassVar[frozenset[str]] = frozenset({"update"})

    def __init__(self, betas: tuple[float, float], eps: float, amsgrad: bool = False) -> None:
        arguments.check("AdamMoments", "betas", betas, arguments.BETAS)
        arguments.check("AdamMoments", "eps", eps, arguments.POSITIVE)
        self.beta1, self.beta2 = float(betas[0]), float(betas[1])
        self.eps = float(eps)
        self.amsgrad = amsgrad

    def slots(self, info: ParamInfo) -> tuple[Slot, ...]:
        """Two moments of the parameter's shape, and with ``amsgrad`` the largest second one."""
        return (EXP_AVG, EXP_AVG_SQ, MAX_EXP_AVG_SQ) if self.amsgrad else (EXP_AVG, EXP_AVG_SQ)

    def scalars(self, t: Tensor) -> dict[str, Tensor]:
        """The factors that undo the bias towards zero."""
        return {"correct1": 1 / (1 - self.beta1**t), "correct2": 1 / (1 - self.beta2**t).sqrt()}

    def transform(self, flow: Flow) -> None:
        """Update the moments and set the direction."""
        incoming = flow.get("incoming")
        if incoming is None:
            incoming = flow["grad"]
        damping = flow.get("damping")
        damped = incoming if damping is None else damping * incoming
        m = self.beta1 * flow.state["exp_avg"] + (1 - self.beta1) * damped
        v = self.beta2 * flow.state["exp_avg_sq"] + (1 - self.beta2) * incoming * incoming
        flow.new["exp_avg"], flow.new["exp_avg_sq"] = m, v
        if self.amsgrad:
            flow.new[MAX_EXP_AVG_SQ.name] = v = torch.maximum(flow.state[MAX_EXP_AVG_SQ.name], v)
        root = v.sqrt() * flow.scalar(self, "correct2")
        flow["update"] = m * flow.scalar(self, "correct1") / (root + self.eps)
