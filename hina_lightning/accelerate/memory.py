"""The memory guard in a loop of accelerate."""

from __future__ import annotations

from typing import Any

from accelerate import Accelerator

from hina_lightning.accelerate.checkpoints import Checkpoints
from hina_lightning.accelerate.stepping import StepCount, around_steps
from hina_lightning.statistics import steps_taken
from hina_optim.memory import MemoryGuard
from hina_optim.unwrapping import unwrap_optimizer

__all__ = ["guard_memory"]


def guard_memory(accelerator: Accelerator, guard: MemoryGuard, *optimizers: Any) -> MemoryGuard:
    """Start a guard, and have it look after every step in which weights move; all ranks act together.

    What it reads goes to the accelerator's trackers, as ``mem/…``; what it has done is part of
    ``accelerator.save_state``. To have an out-of-memory error written down, train within ``guard.watching()``.

    Args:
        accelerator: That prepared the optimizers.
        guard: Not started.
        *optimizers: Prepared ones. With several, a look is due after steps of the last.

    Returns:
        The guard, started.

    Raises:
        ValueError: No optimizer offers ``optimize_for_vram()``; no probe for the device.

    Example::

        guard = guard_memory(accelerator, MemoryGuard(target_vram_gb=16.0), optimizer)
        with guard.watching():
            ...  # the loop
    """
    guard.start(*optimizers, device=accelerator.device, step=max(map(_steps, optimizers), default=0))
    accelerator.log(dict(guard.metrics), step=_steps(optimizers[-1]))
    count = StepCount(accelerator, optimizers[-1])

    def look() -> None:
        count.advance()
        before = guard.metrics
        guard.after_step(count.taken)
        if guard.metrics is not before:
            accelerator.log(dict(guard.metrics), step=count.taken)

    around_steps(accelerator, optimizers[-1], before=lambda: count.taken, after=look)
    Checkpoints.of(accelerator).extras["memory_guard"] = guard
    return guard


def _steps(optimizer: Any) -> int:
    return steps_taken(unwrap_optimizer(optimizer))
