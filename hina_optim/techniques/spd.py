"""Selective projection decay: pull weights back to where they began when they stray from there against the gradient."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from hina_optim import arguments
from hina_optim.state.slot import ANCHOR, Slot
from hina_optim.techniques.base import Flow, ParamInfo, Sums, Technique
from hina_optim.techniques.products import inner

__all__ = ["SelectiveProjectionDecay"]


#: Cosine of gradient and distance below which their product is taken for rounding.
COSINE_FLOOR = 1e-5


class SelectiveProjectionDecay(Technique):
    """Go part of the way back to the anchor ``θ₀`` when a step leads away from it against the gradient.

    With ``θ̃`` the weights after step and decay, and all norms and products over the whole parameter::

        r = max(0, (‖θ̃-θ₀‖ - ‖θ-θ₀‖) / ‖θ̃-θ₀‖)          share of the distance that this step added
        θ ← θ̃ - min(λ·r, 1)·(θ̃-θ₀)                       only where -⟨g, θ-θ₀⟩ < 0

    The condition says that the gradient now points back to the anchor; ``r > 0`` says that the step goes away from it
    nevertheless; a cosine of the two below :data:`COSINE_FLOOR` is rounding (an orthogonalized gradient has none at all
    with weights that began at zero) and does not count. Steps that come nearer, and the first step (``θ = θ₀``), are
    never touched. The pull is bounded by 1, at which the weights are the anchor again: the paper leaves λ unbounded,
    and beyond 1 the pull would overshoot.

    θ̃ is never formed. With ``d = θ-θ₀``, ``c = decay·θ + drift + scale·rate·u`` (``θ̃-θ₀ = d-c``), the growth
    ``‖θ̃-θ₀‖² - ‖d‖² = ⟨c,c⟩ - 2⟨d,c⟩`` is taken from sums of the small ``c``, not as a difference of two large norms.
    ``scale`` is only applied to the totals, so that the sums do not wait for it. Nothing moves when the learning rate
    is 0: then ``c = 0``, hence ``r = 0``.

    Args:
        spd_lambda: λ, strength of the pull, ≥ 0 (1 undoes the distance that the step added, to first order).

    Raises:
        ValueError: spd_lambda is not a finite number ≥ 0.

    Source: *Rethinking Weight Decay for Robust Fine-Tuning of Foundation Models*, arXiv 2411.01713, algorithm 1.
    """

    name: ClassVar[str] = "spd"
    sums_over: ClassVar[frozenset[str]] = frozenset({"grad", "param", "update", "rate", "decay", "drift"})
    settles: ClassVar[frozenset[str]] = frozenset({"pull"})
    settle_reads: ClassVar[frozenset[str]] = frozenset({"scale"})

    def __init__(self, spd_lambda: float) -> None:
        arguments.check("SelectiveProjectionDecay", "spd_lambda", spd_lambda, arguments.NON_NEGATIVE)
        self.spd_lambda = float(spd_lambda)

    def slots(self, info: ParamInfo) -> tuple[Slot, ...]:
        """The weights before the first update, in the parameter's own dtype; one zero for those that begin at zero."""
        return (ANCHOR,)

    def sums(self, flow: Flow) -> Sums:
        """The inner products of distance ``d``, unscaled step ``b``, decay and drift ``e``; gradient and distance."""
        param = flow["param"]
        d = param - flow.state["anchor"]
        b = flow["rate"] * flow["update"]
        grad = flow["grad"]
        products: Sums = {
            "gd": inner(grad, d),
            "gg": inner(grad, grad),
            "dd": inner(d, d),
            "db": inner(d, b),
            "bb": inner(b, b),
        }
        decay, drift = flow.get("decay"), flow.get("drift")
        e = drift if decay is None else decay * param if drift is None else decay * param + drift
        if e is not None:
            products |= {"de": inner(d, e), "ee": inner(e, e), "eb": inner(e, b)}
        return products

    def settle(self, flow: Flow, totals: dict[str, Tensor]) -> None:
        """Set the pull."""
        scale = flow.get("scale")
        if scale is None:
            scale = torch.ones_like(totals["dd"])
        cc = scale * scale * totals["bb"]
        dc = scale * totals["db"]
        if "de" in totals:
            cc = cc + totals["ee"] + 2 * scale * totals["eb"]
            dc = dc + totals["de"]
        before = totals["dd"]
        growth = cc - 2 * dc
        after = (before + growth).clamp(min=0)
        # (√after - √before)/√after, with the difference of roots written through the growth
        roots = after + after.sqrt() * before.sqrt()
        share = torch.where(roots > 0, growth / torch.where(roots > 0, roots, 1), 0).clamp(0, 1)
        pull = (self.spd_lambda * share).clamp(max=1)
        clearly = COSINE_FLOOR * totals["gg"].sqrt() * before.sqrt()
        flow["pull"] = torch.where(totals["gd"] > clearly, pull, 0)
