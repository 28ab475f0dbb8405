"""The statistics of the callbacks, for accelerate's trackers."""

from __future__ import annotations

import functools
from typing import Any

from accelerate import Accelerator

from hina_lightning.accelerate.stepping import StepCount, around_steps
from hina_lightning.statistics import (
    Found,
    find_with,
    importance_by_block,
    importance_scores,
    learning_rates,
)
from hina_optim import arguments as rule

__all__ = ["StatisticsTracker"]

_RATES, _IMPORTANCE = "lr_mask_statistics", "importance_statistics"


class StatisticsTracker:
    """Give accelerate's trackers what :class:`~hina_lightning.callbacks.LRMaskMonitor` and ``ImportanceMonitor`` log.

    Once built it works by itself: the numbers are taken just before a step in which weights move, with one wait for
    the device, and are global, equal on all ranks and engines.

    Logged metrics:
        - ``lr/<group>``, ``lr_eff/<group>``, ``lr_mask/<group>/{mean,p05,p50,p95,at_min,at_max}``,
          ``sign_agree/<group>``: as :class:`~hina_lightning.callbacks.LRMaskMonitor`. ``sign_agree`` needs gradients,
          which DeepSpeed holds elsewhere: it is missing there.
        - ``importance/<block>``: as :class:`~hina_lightning.callbacks.ImportanceMonitor`.

    The step that they are logged under is the number of steps that the optimizer has taken before, also in a training
    that was resumed.

    Args:
        accelerator: With trackers (``log_with``).
        *optimizers: Prepared ones; those without statistics are passed over.
        every_n_steps: ``n`` ≥ 1: log before the ``n``-th, ``2n``-th … step.
        depth: How many parts of a parameter's name make a block, ≥ 1. None: all up to the first number.

    Attributes:
        values: What was logged last.

    Raises:
        ValueError: An argument is not what it must be; no optimizer has statistics; the accelerator has no tracker.
    """

    def __init__(
        self, accelerator: Accelerator, *optimizers: Any, every_n_steps: int = 10, depth: int | None = None
    ) -> None:
        owner = "StatisticsTracker"
        rule.check(owner, "every_n_steps", every_n_steps, rule.INTERVAL)
        if depth is not None:
            rule.check(owner, "depth", depth, rule.INTERVAL)
        if not accelerator.log_with:
            raise ValueError(
                f"{owner}: the accelerator has no tracker. Use Accelerator(log_with='tensorboard', project_dir=…), and "
                "accelerator.init_trackers(…) before the training."
            )
        self._rates = find_with(optimizers, [_RATES])
        self._importance = find_with(optimizers, [_IMPORTANCE])
        if not self._rates and not self._importance:
            present = ", ".join(type(one).__name__ for one in optimizers) or "none"
            raise ValueError(
                f"{owner} needs an optimizer with {_RATES}() or {_IMPORTANCE}(), such as hina_optim.HinaAdaptive; got "
                f"{present}."
            )
        self.every_n_steps = every_n_steps
        self.depth = depth
        self.values: dict[str, float] = {}
        self._accelerator = accelerator
        for index, optimizer in enumerate(optimizers):
            suffix = f"-{index}" if index else ""
            ours = [one for one in (*self._rates, *self._importance) if one.suffix == suffix]
            if ours:
                count = StepCount(accelerator, optimizer)
                around_steps(accelerator, optimizer, functools.partial(self._before, ours[0], count))

    def _before(self, found: Found, count: StepCount) -> None:
        """A step is about to be taken."""
        step = count.taken
        count.advance()
        if (step + 1) % self.every_n_steps:
            return
        self.values = learning_rates(*found) if found in self._rates else {}
        if (
            self._importance and found.optimizer is self._importance[0].optimizer
        ):  # of all, so that names are told apart
            blocks = importance_by_block(importance_scores(self._importance), self.depth)
            self.values |= {f"importance/{block}": value for block, value in blocks.items()}
        self._accelerator.log(self.values, step=step)
