"""LRMaskMonitor: the learning rates that a masked optimizer really uses."""

from __future__ import annotations

from lightning.pytorch import Callback, LightningModule, Trainer
from torch.optim import Optimizer

from hina_lightning.callbacks import _common as common
from hina_lightning.statistics import learning_rates
from hina_optim import arguments as rule

__all__ = ["LRMaskMonitor"]


class LRMaskMonitor(Callback):
    """Log the learning rates with which a step is taken: the group's, and the distribution of the elements' own.

    A masked optimizer gives every element a rate of its own, so ``group["lr"]`` is not what moves the weights. Just
    before a step that is to be logged, when its gradients are known, the optimizer hands over its statistics as device
    tensors; they come to the host with one wait for the device. Steps and learning rates are those that Lightning's
    LearningRateMonitor logs.

    Logged metrics:
        - ``lr/<group>``: the learning rate of the group.
        - ``lr_eff/<group>``: the mean over the group's elements of the rate that is used.
        - ``lr_mask/<group>/mean``, ``p05``, ``p50``, ``p95``: mean and quantiles of the mask, a learning rate.
        - ``lr_mask/<group>/at_min``, ``at_max``: share of the elements at ``min_lr`` and ``max_lr``, in [0, 1].
        - ``sign_agree/<group>``: share of the elements whose gradient has the sign of the one before, in [0, 1].

        ``<group>`` is the group's ``name``, or ``group<i>``. The groups of a second optimizer of the trainer are called
        ``<group>-1``, of a third ``<group>-2``. While the mask is off, its metrics are missing. Optimizers that have no
        such statistics are passed over.

    Args:
        every_n_steps: Log every so many steps. None: the trainer's ``log_every_n_steps``.

    Raises:
        ValueError: ``every_n_steps`` is not an integer ≥ 1.
        MisconfigurationException: When the training starts: no logger, or no optimizer that offers
            ``lr_mask_statistics()``.
    """

    def __init__(self, every_n_steps: int | None = None) -> None:
        super().__init__()
        if every_n_steps is not None:
            rule.check("LRMaskMonitor", "every_n_steps", every_n_steps, rule.INTERVAL)
        self.every_n_steps = every_n_steps
        self._cadence = common.Cadence(every_n_steps)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse a trainer without a logger or without a masked optimizer."""
        common.require_logger(trainer, self)
        self._find(trainer)
        self._cadence.start(trainer)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Log the rates with which this step is taken."""
        stepping = common.unwrap_optimizer(optimizer)
        for who, (found, suffix) in enumerate(self._find(trainer)):
            if found is stepping:
                step = self._cadence.due(trainer, who)
                if step is not None:
                    common.log_values(trainer, learning_rates(found, suffix), step)

    def _find(self, trainer: Trainer) -> list[common.Found]:
        return common.find_optimizers(trainer, self, ["lr_mask_statistics"])
