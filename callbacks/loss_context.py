"""LossContextReporter: the training loss, for optimizers that look at it."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.optim import Optimizer

from hina_lightning.callbacks import _common as common

__all__ = ["LossContextReporter"]


class LossContextReporter(Callback):
    """Hand the training loss to optimizers whose learning rate follows it, just before each of their steps.

    An optimizer that is stepped with a closure sees what the closure returns. That is not enough where

    * gradients are accumulated: Lightning's closure returns the loss of the last of ``k`` batches, divided by ``k``;
    * precision is 16-bit with a gradient scaler: Lightning runs the closure itself, before the step;
    * the optimization is manual: there is no closure.

    This callback reports one number a step, the mean over the batches whose gradients the step uses. It stays on the
    device, and nothing waits for it. The optimizer takes the mean over several processes.

    In manual optimization the loss is what was given to ``manual_backward`` since a step was last taken, the mean of it
    where there were several; an optimizer that steps right after another one, with no backward pass between them, is
    told the same. Where that mixes the losses of several optimizers (their backward passes all come first), call
    ``optimizer.report_loss(loss)`` yourself instead.

    Logged metrics:
        None: the loss is the module's own to log.

    Raises:
        MisconfigurationException: When the training starts: no optimizer of the trainer offers ``report_loss()``.
    """

    def __init__(self) -> None:
        super().__init__()
        self._total: Tensor | None = None
        self._count = 0
        self._used = False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse a trainer without an optimizer that takes a loss."""
        common.find_optimizers(trainer, self, ["report_loss"])
        self._forget()

    def on_before_zero_grad(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """A new accumulation of gradients begins (automatic optimization only)."""
        self._forget()

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Take part of the loss of the next step."""
        if self._used and not pl_module.automatic_optimization:
            self._forget()
        value = loss.detach().float().mean()
        scaler: Any = getattr(trainer.precision_plugin, "scaler", None)
        if scaler is not None:
            value = value / scaler.scale(torch.ones_like(value))
        if pl_module.automatic_optimization:
            value = value * trainer.accumulate_grad_batches  # by which Lightning divided it
        self._total = value if self._total is None else self._total + value
        self._count += 1

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Report, when all gradients of the step are there."""
        inner = common.unwrap_optimizer(optimizer)
        if self._total is None:  # training_step returned None
            return
        self._used = True
        if callable(getattr(inner, "report_loss", None)):
            inner.report_loss(self._total / self._count)

    def _forget(self) -> None:
        self._total, self._count, self._used = None, 0, False
