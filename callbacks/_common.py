"""What the callbacks share: finding optimizers of a trainer, the logging step, and giving numbers to its loggers.

The only private attribute of the trainer that is used is in :func:`step_index`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, Trainer

from hina_lightning.statistics import Found, find_with
from hina_optim.unwrapping import unwrap_optimizer

__all__ = [
    "Cadence",
    "Found",
    "find_optimizers",
    "log_values",
    "require_logger",
    "step_index",
    "unwrap_optimizer",
]


def find_optimizers(trainer: Trainer, callback: Callback, methods: Sequence[str]) -> list[Found]:
    """The trainer's optimizers that have all of some methods; others are passed over.

    Raises:
        MisconfigurationException: None of them has; says what is needed.
    """
    found = find_with(trainer.optimizers, methods)
    if not found:
        needed = " and ".join(f"{method}()" for method in methods)
        present = ", ".join(type(unwrap_optimizer(one)).__name__ for one in trainer.optimizers) or "none"
        raise MisconfigurationException(
            f"{type(callback).__name__} needs an optimizer with {needed}, such as hina_optim.HinaAdaptive; the "
            f"trainer's optimizers: {present}."
        )
    return found


def require_logger(trainer: Trainer, callback: Callback) -> None:
    """Refuse to monitor into nothing.

    Raises:
        MisconfigurationException: The trainer has no logger.
    """
    if not trainer.loggers:
        raise MisconfigurationException(
            f"Cannot use `{type(callback).__name__}` callback with `Trainer` that has no logger."
        )


class Cadence:
    """When to log: once every ``n`` steps, under the steps that Lightning itself logs under.

    In a training with automatic optimization these are the steps after which ``(step + 1) % n == 0``, with gradient
    accumulation too. In manual optimization, where not every batch needs to end in a step, the first occasion at or
    after each of them is taken. The answer is the same on all ranks.

    Args:
        every_n_steps: ``n``. None: the trainer's ``log_every_n_steps`` (0 there is never).
    """

    def __init__(self, every_n_steps: int | None) -> None:
        self.every_n_steps = every_n_steps
        self._passed: dict[int, int] = {}
        self._begin = 0

    def start(self, trainer: Trainer, *, at_once: bool = False) -> None:
        """Begin to count; with ``at_once`` the first occasion counts whatever its step is."""
        interval = self._interval(trainer)
        self._begin = -1 if at_once else step_index(trainer) // interval if interval else 0
        self._passed = {}

    def due(self, trainer: Trainer, who: int = 0) -> int | None:
        """The step to log under, or None when nothing is due.

        Args:
            trainer: In a fit.
            who: Which of several that have their own occasions.
        """
        interval, step = self._interval(trainer), step_index(trainer)
        if not interval or (step + 1) // interval <= self._passed.get(who, self._begin):
            return None
        self._passed[who] = (step + 1) // interval
        return step

    def _interval(self, trainer: Trainer) -> int:
        interval: int = trainer.log_every_n_steps  # type: ignore[attr-defined]
        return interval if self.every_n_steps is None else self.every_n_steps


def step_index(trainer: Trainer) -> int:
    """The step under which Lightning logs what belongs to the present batch, in a fit."""
    index: int = trainer.fit_loop.epoch_loop._batches_that_stepped
    return index


def log_values(trainer: Trainer, values: Mapping[str, float], step: int) -> None:
    """Give values to every logger, and to callbacks that monitor one (ModelCheckpoint, EarlyStopping)."""
    if not values:
        return
    for logger in trainer.loggers:
        logger.log_metrics(dict(values), step=step)
    trainer.callback_metrics.update({name: torch.tensor(value) for name, value in values.items()})
