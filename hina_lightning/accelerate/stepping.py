"""Calling something around every whole optimizer step, whoever takes it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from accelerate import Accelerator
from accelerate.utils import DistributedType

from hina_lightning.statistics import steps_taken
from hina_optim.unwrapping import unwrap_optimizer

__all__ = ["StepCount", "around_steps"]


def around_steps(
    accelerator: Accelerator,
    optimizer: Any,
    before: Callable[[], object] | None = None,
    after: Callable[[], object] | None = None,
) -> None:
    """Have functions called before and after each step in which weights move; not where gradients are accumulated.

    DeepSpeed's engine steps an optimizer piece by piece, from within ``accelerator.backward``: there the functions are
    called around all of it.

    Args:
        accelerator: That prepared the optimizer.
        optimizer: In its wrappers.
        before: Called when all gradients of the step are there (DeepSpeed holds them elsewhere).
        after: Called when the step is done.
    """
    if accelerator.distributed_type != DistributedType.DEEPSPEED:
        inner = unwrap_optimizer(optimizer)
        if before is not None:
            inner.register_step_pre_hook(lambda *_: _nothing(before()))
        if after is not None:
            inner.register_step_post_hook(lambda *_: _nothing(after()))
        return
    engine: Any = accelerator.deepspeed_engine_wrapped.engine
    step = engine.step

    @functools.wraps(step)
    def stepped(*args: Any, **kwargs: Any) -> Any:
        moves = engine.is_gradient_accumulation_boundary()
        if moves and before is not None:
            before()
        result = step(*args, **kwargs)
        if moves and after is not None:
            after()
        return result

    engine.step = stepped


def _nothing(_: object) -> None:
    """What a hook returns replaces the arguments of the step; ours replace none."""


class StepCount:
    """How many steps an optimizer has taken; read from its state at first and after every ``load_state``.

    Args:
        accelerator: That prepared the optimizer.
        optimizer: In its wrappers.
    """

    def __init__(self, accelerator: Accelerator, optimizer: Any) -> None:
        self._optimizer = unwrap_optimizer(optimizer)
        self._taken: int | None = None
        accelerator.register_load_state_pre_hook(lambda *_: self._forget())

    @property
    def taken(self) -> int:
        """Steps so far."""
        if self._taken is None:
            self._taken = steps_taken(self._optimizer)
        return self._taken

    def advance(self) -> None:
        """One more step is being taken."""
        self._taken = self.taken + 1

    def _forget(self) -> None:
        self._taken = None
