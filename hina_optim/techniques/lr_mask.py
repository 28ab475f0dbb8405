"""Learning-rate mask: every element finds its own learning rate during warm-up."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from hina_optim import arguments
from hina_optim.state.slot import Slot
from hina_optim.techniques.base import Flow, ParamInfo, Technique

__all__ = ["LearningRateMask"]


class LearningRateMask(Technique):
    """A learning rate ``M`` for every element, raised where the gradient keeps its sign and lowered where it flips.

    ``M`` begins at the learning rate that the group was built with (``start_lr``). With ``a = sign(g)·(last sign)``,
    while ``t < W`` (``W = warmup_steps``)::

        M ← clip(M + bump·a, min_lr, max_lr)      bump = lr_bump · bump_scale · (d_coef if a > 0 and t < W/2 else 1)

    and from ``t = W`` on ``M`` is frozen. There is no bump before a last sign exists, nor where the gradient is zero; a
    zero gradient leaves the last sign as it was. The clip is part of the rule: the bounds are where an element may go.
    ``bump_scale`` is 1 unless a technique set it.

    The rate used is ``rate · M / start_lr``: the rate that arrives is the group's learning rate now, times what other
    techniques made of it. Every scheduler works, a scheduler that halves the learning rate halves every element's rate
    once, and a learning rate of 0 stops.

    Args:
        start_lr: Learning rate that the group was built with.
        min_lr: Lower bound of ``M``, > 0.
        max_lr: Upper bound of ``M``.
        lr_bump: Change of ``M`` a step, in units of the learning rate, ≥ 0.
        warmup_steps: ``W``, updates, ≥ 0; 0 leaves every element at ``start_lr`` for good.
        d_coef: Factor on bumps of agreeing signs in the first half of the warm-up, > 0.

    Raises:
        ValueError: ``start_lr`` lies outside [min_lr, max_lr] (it is not moved there silently), or an argument is not
            what it must be.

    Source: the Automagic optimizer of ostris' ai-toolkit (no paper), with the freeze after warm-up and the early phase
    of the original design. There, bumps were added to a mask that began at twice the learning rate, and the schedule
    was multiplied into it in every step.
    """

    name: ClassVar[str] = "lr_mask"
    reads: ClassVar[frozenset[str]] = frozenset({"grad", "rate", "bump_scale"})
    writes: ClassVar[frozenset[str]] = frozenset({"rate"})

    def __init__(
        self,
        start_lr: float,
        min_lr: float,
        max_lr: float,
        lr_bump: float,
        warmup_steps: int,
        d_coef: float = 1.0,
    ) -> None:
        owner = "LearningRateMask"
        arguments.check(owner, "lr", start_lr, arguments.NON_NEGATIVE)
        arguments.check(owner, "min_lr", min_lr, arguments.POSITIVE)
        arguments.check(owner, "max_lr", max_lr, arguments.POSITIVE)
        arguments.check(owner, "lr_bump", lr_bump, arguments.NON_NEGATIVE)
        arguments.check(owner, "warmup_steps", warmup_steps, arguments.COUNT)
        arguments.check(owner, "d_coef", d_coef, arguments.POSITIVE)
        self.start_lr, self.min_lr, self.max_lr = float(start_lr), float(min_lr), float(max_lr)
        self.lr_bump, self.warmup_steps, self.d_coef = float(lr_bump), warmup_steps, float(d_coef)
        if self.start_lr > self.max_lr:
            raise ValueError(
                f"{owner}: lr={self.start_lr} is above max_lr={self.max_lr}: the learning-rate mask starts at lr and "
                f"cannot leave [min_lr, max_lr]. Raise max_lr to at least {self.start_lr}, or lower lr."
            )
        if self.start_lr < self.min_lr:
            raise ValueError(
                f"{owner}: lr={self.start_lr} is below min_lr={self.min_lr}: the learning-rate mask starts at lr and "
                f"cannot leave [min_lr, max_lr]. Lower min_lr, or raise lr (to warm up from 0, let a scheduler do it)."
            )

    def slots(self, info: ParamInfo) -> tuple[Slot, ...]:
        """The mask and the last sign, of the parameter's shape."""
        levels = self.min_lr, self.start_lr, self.max_lr
        return (Slot("lr_mask", init="start_lr", code=levels), Slot("last_sign", precision="int8", code="ternary"))

    def scalars(self, t: Tensor) -> dict[str, Tensor]:
        """Twice 1 while the mask moves, and the size of the bumps of this step, upwards and downwards."""
        moving = (t < self.warmup_steps).to(t.dtype)
        # there is no last sign in the first step; where it takes one bit, it would be read as 1
        down = self.lr_bump * moving * (t > 1)
        up = torch.where(t < self.warmup_steps / 2, self.d_coef * down, down)
        return {"twice": 2 * moving, "up": up, "down": down}

    def rate_factor(self, param: Tensor, state: Mapping[str, Tensor]) -> Tensor | float:
        """``M / start_lr``."""
        return state["lr_mask"] / self.start_lr if "lr_mask" in state else 1.0

    def transform(self, flow: Flow) -> None:
        """Move the mask, remember the signs, and set the rate."""
        mask, last = flow.state["lr_mask"], flow.state["last_sign"]
        down, bump_scale = flow.scalar(self, "down"), flow.get("bump_scale")
        sign = flow.sign_of("grad")
        bump = sign * last
        if bump_scale is not None:
            bump.mul_(bump_scale)
        mask = torch.addcmul(mask, bump, down)
        if self.d_coef != 1:
            mask.addcmul_(bump.clamp_(min=0), flow.scalar(self, "up") - down)
        mask.clamp_(self.min_lr, self.max_lr)
        flow.new["lr_mask"] = mask
        # twice the sign more and back into [-1, 1]: the sign, and the last one where there is none
        flow.new["last_sign"] = torch.addcmul(last, sign, flow.scalar(self, "twice")).clamp_(-1, 1)
        flow["rate"] = mask * (flow["rate"] / self.start_lr)
