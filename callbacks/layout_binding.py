"""LayoutBinding: tells optimizers where FSDP1 and DeepSpeed have put the parameters."""

from __future__ import annotations

from lightning.pytorch import Callback, LightningModule, Trainer

from hina_lightning.sharding import bind
from hina_optim.engine.optimizer import HinaOptimizer
from hina_optim.unwrapping import unwrap_optimizer

__all__ = ["LayoutBinding"]


class LayoutBinding(Callback):
    """Bind optimizers of :mod:`hina_optim` to the engine of the strategy when a fit starts.

    ``FSDPStrategy`` and ``DeepSpeedStrategy`` lay parameters flat; an optimizer that knows how computes what it would
    in one process (see :func:`hina_lightning.sharding.bind`). :func:`hina_lightning.configure_optimizers` adds this
    callback by itself, and so does :class:`~hina_lightning.callbacks.ShardedOptimizerState`. It is for optimizers that
    are built otherwise; with any other strategy it does nothing.

    Logged metrics:
        None.

    Raises:
        RuntimeError: When the fit starts: the engine steps another optimizer, or has laid parameters in a way that
            cannot be followed.
    """

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Bind: the engine is there, and a checkpoint is not loaded yet."""
        for optimizer in trainer.optimizers:
            if isinstance(unwrap_optimizer(optimizer), HinaOptimizer):
                bind(optimizer, trainer.strategy.model)

    @classmethod
    def add_to(cls, trainer: Trainer) -> None:
        """Add it to a trainer that has none."""
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
        if not any(isinstance(callback, cls) for callback in callbacks):
            callbacks.append(cls())
