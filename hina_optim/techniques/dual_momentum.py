"""Dual momentum: a long memory of the gradient beside the short one."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from hina_optim import arguments
from hina_optim.state.slot import Slot
from hina_optim.techniques.base import Flow, ParamInfo, Technique

__all__ = ["EXP_AVG_LONG", "DualMomentum"]

#: First moment with a long memory.
EXP_AVG_LONG = Slot("exp_avg_long", code="signed", slow=True)


class DualMomentum(Technique):
    """Mix a second, slower first moment into the direction.

    ``l ← β_l·l + (1-β_l)·clip·x``, ``u ← (1-α)·u + α·l``, with ``x`` what entered the short moment, ``u`` the direction
    made of that one and ``clip`` 1 unless a technique set it. ``damping`` is left out: what judges a single gradient
    against the short memory says little about the long one.

    Without an α of its own, ``α_t = ½·(1 - β_lᵗ)``: the long moment counts for as much as it has seen, from almost
    nothing at first to an equal share.

    Beside the papers: AdEMAMix moves along ``m₁ + α·m₂``, a short and a very long moment (β₃ 0.9999) with α from 4 to
    10, both warmed up over the whole run, the long one without bias correction. Here the two shares add up to 1, so
    that the learning rate keeps its meaning: α of the paper is ``α / (1-α)`` here, and the rate larger by ``1/(1-α)``.
    The warm-up is the moment's own age. The second paper shows that the short moment may as well be the gradient itself
    (simplified AdEMAMix: ``m₂ + α·g``); that is this technique after a :class:`~.adopt.Momentum` with β₁ = 0.

    Stands after the first moment.

    Args:
        long_beta: β_l, decay a step of the long moment, in [0, 1); its memory is about 1/(1-β_l) steps.
        alpha: α, share of the long moment, in [0, 1], or None for a share that grows to ½.

    Raises:
        ValueError: long_beta is outside [0, 1), or alpha outside [0, 1].

    Source: *The AdEMAMix Optimizer: Better, Faster, Older*, arXiv 2409.03137, equation of AdEMAMix; *Connections
    between Schedule-Free Optimizers, AdEMAMix, and Accelerated SGD Variants*, arXiv 2502.02431.
    """

    name: ClassVar[str] = "dual_momentum"
    reads: ClassVar[frozenset[str]] = frozenset({"grad", "incoming", "clip", "update"})
    writes: ClassVar[frozenset[str]] = frozenset({"update"})

    def __init__(self, long_beta: float = 0.99, alpha: float | None = None) -> None:
        arguments.check("DualMomentum", "long_beta", long_beta, arguments.BELOW_ONE)
        if alpha is not None:
            arguments.check("DualMomentum", "alpha", alpha, arguments.UNIT)
        self.long_beta = float(long_beta)
        self.alpha = None if alpha is None else float(alpha)

    def slots(self, info: ParamInfo) -> tuple[Slot, ...]:
        """The long moment, of the parameter's shape."""
        return (EXP_AVG_LONG,)

    def scalars(self, t: Tensor) -> dict[str, Tensor]:
        """The share of the long moment, where it grows."""
        if self.alpha is not None:
            return {}
        age = (t - self.window[0]).clamp(min=1)
        return {"alpha": 0.5 * (1 - self.long_beta**age)}

    def transform(self, flow: Flow) -> None:
        """Update the long moment and mix it in."""
        incoming = flow.get("incoming")
        if incoming is None:
            incoming = flow["grad"]
        clip = flow.get("clip")
        taken = incoming if clip is None else clip * incoming
        long = torch.lerp(flow.state["exp_avg_long"], taken, 1 - self.long_beta)
        flow.new["exp_avg_long"] = long
        alpha = flow.scalar(self, "alpha") if self.alpha is None else self.alpha
        flow["update"] = torch.lerp(flow["update"], long, alpha)
