"""ImportanceMonitor: which parts of a model the optimizer found to matter, while it trained."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from hina_lightning.callbacks import _common as common
from hina_lightning.groups import clean_name
from hina_lightning.statistics import importance_by_block, importance_scores
from hina_optim import arguments as rule
from hina_optim.optimizers.statistics import rank_pattern

__all__ = ["ImportanceMonitor"]

_log = logging.getLogger(__name__)


class ImportanceMonitor(Callback):
    """Log the importance of the parts of a model, and write the importance of every parameter at the end.

    The scores are the optimizer's (``HinaAdaptive`` with ``use_dynamic_adaptation``): relative to the mean over all
    parameters, so 1 is average. As a logged step begins they come to the host with one wait for the device, and are
    averaged over blocks.

    Logged metrics:
        - ``importance/<block>``: mean score of the parameters of a block. ``<block>`` is the first ``depth`` parts of
          their names or, with ``depth=None``, everything up to the first number (``encoder.layer.3``), or the module
          where there is none (``classifier``). The metrics begin when the optimizer has scores. Names come from the
          optimizer: those of :func:`~hina_lightning.configure_optimizers` know them, one that got bare parameters
          calls them by place. Should a second optimizer use a name again, its own is ``optimizer-1.<name>``.

    Args:
        depth: How many parts of a name make a block, ≥ 1. None: see above.
        every_n_steps: Log every so many steps. None: the trainer's ``log_every_n_steps``.
        export_path: A JSON file to write when the training ends, its folder made if need be. It holds ``step``,
            ``importance`` (by parameter), ``blocks``, ``rank``, and ``rank_pattern`` for peft's ``LoraConfig``: ranks
            of the adapted modules, or of all weight matrices where there is no adapter.
        rank: The rank that ``rank_pattern`` redistributes, ≥ 1.

    Raises:
        ValueError: An argument is not what it must be.
        MisconfigurationException: When the training starts: there is neither a logger nor an ``export_path``, or no
            optimizer that offers ``importance_statistics()``.
    """

    def __init__(
        self,
        depth: int | None = None,
        every_n_steps: int | None = None,
        export_path: str | Path | None = None,
        rank: int = 8,
    ) -> None:
        super().__init__()
        owner = "ImportanceMonitor"
        for name, value in (("depth", depth), ("every_n_steps", every_n_steps)):
            if value is not None:
                rule.check(owner, name, value, rule.INTERVAL)
        rule.check(owner, "rank", rank, rule.INTERVAL)
        self.depth = depth
        self.every_n_steps = every_n_steps
        self._cadence = common.Cadence(every_n_steps)
        self.export_path = None if export_path is None else Path(export_path)
        self.rank = rank
        #: The scores of the last logged step or of the end of the fit, by parameter name.
        self.scores: dict[str, float] = {}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse a trainer that gives nothing to log, or nowhere to put it."""
        if self.export_path is None:
            common.require_logger(trainer, self)
        self._find(trainer)
        self._cadence.start(trainer)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Log the blocks' importance as a step begins."""
        step = self._cadence.due(trainer)
        if step is None:
            return
        self._read(trainer)
        common.log_values(trainer, {f"importance/{block}": value for block, value in self.blocks().items()}, step)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Read the last scores, and write them where an export is wanted."""
        self._read(trainer)
        if self.export_path is None or not trainer.is_global_zero:
            return
        matrices = {clean_name(name) for name, parameter in pl_module.named_parameters() if parameter.ndim > 1}
        content = {
            "step": trainer.global_step,
            "importance": self.scores,
            "blocks": self.blocks(),
            "rank": self.rank,
            "rank_pattern": rank_pattern({n: score for n, score in self.scores.items() if n in matrices}, self.rank),
        }
        self.export_path.parent.mkdir(parents=True, exist_ok=True)
        self.export_path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        _log.info("Importance of %d parameters written to %s.", len(self.scores), self.export_path)

    def blocks(self) -> dict[str, float]:
        """Mean of :attr:`scores` by block."""
        return importance_by_block(self.scores, self.depth)

    def summary(self, count: int = 5) -> dict[str, Any]:
        """The parameters that matter most and least, of the last reading.

        Args:
            count: How many of each.

        Returns:
            ``{"parameters": number, "top": [(name, score), …], "bottom": [(name, score), …]}``: highest first, lowest
            first.
        """
        rule.check("ImportanceMonitor.summary", "count", count, rule.INTERVAL)
        ranked = sorted(self.scores.items(), key=lambda item: (-item[1], item[0]))
        return {"parameters": len(ranked), "top": ranked[:count], "bottom": ranked[::-1][:count]}

    def _find(self, trainer: Trainer) -> list[common.Found]:
        return common.find_optimizers(trainer, self, ["importance_statistics"])

    def _read(self, trainer: Trainer) -> None:
        self.scores = importance_scores(self._find(trainer))
