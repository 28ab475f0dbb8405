"""Torque-aware momentum: gradients that turn against the momentum enter it damped."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from hina_optim import arguments
from hina_optim.state.slot import EXP_AVG, Slot
from hina_optim.techniques.base import Flow, ParamInfo, Sums, Technique
from hina_optim.techniques.products import inner

__all__ = ["TorqueAwareMomentum"]

#: Keeps a gradient that opposes the momentum from vanishing altogether (ε of the paper).
EPS = 1e-8


class TorqueAwareMomentum(Technique):
    """Damp what enters the first moment by its alignment with that moment, smoothed over time.

    ``s ← γs + (1-γ)·cos(m, n)``, ``damping = ε + (1+s)/2``, with ``m`` the first moment *before* this step, ``n`` what
    is about to enter it, ``s = 0`` at first, ``ε = 1e-8``. Aligned gradients bring the factor to 1, opposed ones to 0,
    unrelated ones to ½. Where ``m`` or ``n`` is zero everywhere the cosine counts as 0.

    One number ``s`` a parameter is kept, in float32: changes of (1-γ)·cos must not be lost to rounding. The three sums
    are squares: in float32 norms must lie between about 1e-18 and 1e18, outside of that the cosine counts as 0.

    Args:
        beta: γ, decay a step of the smoothed cosine, in [0, 1).

    Raises:
        ValueError: beta is outside [0, 1).

    Source: *Torque-Aware Momentum*, arXiv 2412.18790, equations of ŝ and d.
    """

    name: ClassVar[str] = "tam"
    sums_over: ClassVar[frozenset[str]] = frozenset({"grad", "incoming"})
    settles: ClassVar[frozenset[str]] = frozenset({"damping"})

    def __init__(self, beta: float) -> None:
        arguments.check("TorqueAwareMomentum", "beta", beta, arguments.BELOW_ONE)
        self.beta = float(beta)

    def slots(self, info: ParamInfo) -> tuple[Slot, ...]:
        """The smoothed cosine, and the first moment that it is taken with."""
        return (Slot("torque", shape=(), precision="fp32"), EXP_AVG)

    def sums(self, flow: Flow) -> Sums:
        """The three inner products of the first moment and what enters it."""
        incoming = flow.get("incoming")
        if incoming is None:
            incoming = flow["grad"]
        m = flow.state["exp_avg"]
        return {"mn": inner(m, incoming), "mm": inner(m, m), "nn": inner(incoming, incoming)}

    def settle(self, flow: Flow, totals: dict[str, Tensor]) -> None:
        """Update the smoothed cosine and set the damping."""
        norms = totals["mm"].sqrt() * totals["nn"].sqrt()
        usable = (norms > 0) & torch.isfinite(norms)
        cosine = torch.where(usable, totals["mn"] / torch.where(usable, norms, 1), 0).clamp(-1, 1)
        torque = self.beta * flow.per_param(flow.state["torque"]) + (1 - self.beta) * cosine
        flow.new["torque"] = torque.reshape(torque.shape[0])
        flow["damping"] = EPS + (1 + torque) / 2
