"""Learning-rate schedules: a warm-up, then a cosine, a line or a constant, one value an optimizer step."""

from __future__ import annotations

import logging
import math
from typing import Any, Literal

import torch
from torch.optim.lr_scheduler import LambdaLR

from hina_optim import arguments as rule

__all__ = ["SCHEDULES", "Schedule", "ScheduleLR", "ScheduleName"]

ScheduleName = Literal["cosine", "linear", "constant"]
SCHEDULES: tuple[ScheduleName, ...] = ("cosine", "linear", "constant")

_log = logging.getLogger(__name__)


class Schedule:
    """What the learning rate is multiplied by, as a function of the number of optimizer steps already taken.

    With ``W`` warm-up steps, ``T`` steps in all and ``s`` steps taken::

        s < W:   (s + 1) / W
        s ≥ W:   e + (1 − e)·shape(p),   p = min((s − W) / (T − W), 1)
                 cosine: (1 + cos(π·p)) / 2     linear: 1 − p     constant: 1

    The warm-up begins at ``1/W``, not at 0, so that no step is wasted. The first step has ``s = 0`` and the last one
    ``s = T − 1``: the end value ``e`` is reached when the last step has been taken, and every step moves the weights.

    Args:
        shape: ``"cosine"``, ``"linear"`` or ``"constant"``.
        warmup_steps: ``W``, optimizer steps, ≥ 0.
        total_steps: ``T``, optimizer steps, ≥ 1. A constant schedule does not need it.
        end_factor: ``e``, in [0, 1]; a constant schedule has no use for it.

    Raises:
        ValueError: A value is not what it must be, or ``total_steps`` is missing.

    Example:
        >>> schedule = Schedule("linear", warmup_steps=2, total_steps=6)
        >>> [schedule(s) for s in range(7)]
        [0.5, 1.0, 1.0, 0.75, 0.5, 0.25, 0.0]
    """

    def __init__(
        self, shape: ScheduleName, warmup_steps: int = 0, total_steps: int | None = None, end_factor: float = 0.0
    ) -> None:
        rule.check("Schedule", "shape", shape, rule.one_of(*SCHEDULES))
        rule.check("Schedule", "warmup_steps", warmup_steps, rule.COUNT)
        rule.check("Schedule", "end_factor", end_factor, rule.UNIT)
        if total_steps is not None or shape != "constant":
            rule.check("Schedule", "total_steps", total_steps, rule.INTERVAL)
        self.shape = shape
        self.warmup_steps = warmup_steps
        self.total_steps = total_steps
        self.end_factor = float(end_factor)

    def __call__(self, step: int) -> float:
        """The factor after ``step`` optimizer steps."""
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        if self.shape == "constant" or self.total_steps is None:
            return 1.0
        progress = min((step - self.warmup_steps) / max(self.total_steps - self.warmup_steps, 1), 1.0)
        left = (1 + math.cos(math.pi * progress)) / 2 if self.shape == "cosine" else 1 - progress
        return self.end_factor + (1 - self.end_factor) * left


class ScheduleLR(LambdaLR):
    """A :class:`Schedule` on every group of an optimizer.

    A checkpoint holds the position and the learning rates. The *form* of the schedule is that of the run that goes on:
    when a training is continued with more steps than it was planned for, the schedule stretches over the new total,
    instead of standing at the end of the old one, and says so.

    Args:
        optimizer: Its groups' learning rates are what the factor multiplies.
        schedule: One schedule, for all groups.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, schedule: Schedule) -> None:
        super().__init__(optimizer, schedule)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take position and learning rates from a checkpoint, and keep this run's form.

        Raises:
            ValueError: The checkpoint's schedule drives another number of groups; nothing has been changed.
        """
        saved_forms, base_lrs = state_dict["lr_lambdas"], [float(lr) for lr in state_dict["base_lrs"]]
        ours, our_lrs = vars(self.lr_lambdas[0]), [float(lr) for lr in self.base_lrs]
        if len(base_lrs) != len(our_lrs):
            raise ValueError(
                f"ScheduleLR: the checkpoint's schedule drives {len(base_lrs)} parameter groups, this optimizer has "
                f"{len(our_lrs)}. Configure the same groups (lr_multipliers, lora_ratio, frozen parameters)."
            )
        super().load_state_dict({**state_dict, "lr_lambdas": [None] * len(our_lrs)})
        if base_lrs != our_lrs:
            _log.warning(
                "The checkpoint's learning rates %s are kept; this run was configured with %s. To train on with other "
                "rates, load the weights alone.",
                base_lrs,
                our_lrs,
            )
        saved = saved_forms[0] or {}
        if saved != ours:
            changed = ", ".join(
                f"{name}: {saved.get(name)!r} -> {v!r}" for name, v in ours.items() if saved.get(name) != v
            )
            _log.warning("The schedule differs from the checkpoint's; this run's is used (%s).", changed)
            self._apply_now()

    def _apply_now(self) -> None:
        """Give the groups the rate of this position at once: the old form may have left them at 0."""
        rates = [lr * fn(self.last_epoch) for lr, fn in zip(self.base_lrs, self.lr_lambdas, strict=True)]
        for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
            if isinstance(group["lr"], torch.Tensor):
                group["lr"].fill_(rate)
            else:
                group["lr"] = rate
        self._last_lr = rates
