"""The memory guard inside transformers' Trainer."""

from __future__ import annotations

from typing import Any

from hina_optim.memory.guard import MemoryGuard

__all__ = ["trainer_callback"]


def trainer_callback(guard: MemoryGuard, trainer: Any = None) -> Any:
    """A callback of transformers' Trainer that starts a guard and lets it look after every step.

    Its metrics go where the Trainer logs: to its loggers, if the Trainer is given, else to ``state.log_history``. To
    have an out-of-memory error written down, train within ``guard.watching()``.

    Args:
        guard: Not started.
        trainer: The Trainer that the callback will be added to.

    Returns:
        A ``transformers.TrainerCallback``.

    Raises:
        ModuleNotFoundError: transformers is not installed.

    Example::

        guard = MemoryGuard(target_vram_gb=16.0)
        trainer.add_callback(trainer_callback(guard, trainer))
        with guard.watching():
            trainer.train()
    """
    try:
        from transformers import TrainerCallback
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("trainer_callback needs transformers: pip install transformers.") from error

    class MemoryGuardCallback(TrainerCallback):  # type: ignore[misc]
        """Calls the guard."""

        def on_train_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
            """Before the first step."""
            guard.start(given["optimizer"], device=args.device, step=state.global_step)

        def on_step_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
            """After every optimizer step; accumulating ones do not come here."""
            before = guard.metrics
            guard.after_step(state.global_step)
            if guard.metrics is before:
                return
            if trainer is not None:
                trainer.log(dict(guard.metrics))
            else:
                state.log_history.append({**guard.metrics, "step": state.global_step})

    return MemoryGuardCallback()
