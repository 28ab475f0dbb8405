"""RankMonitor: how many directions every adapter uses, while it trains."""

from __future__ import annotations

import logging
from typing import Any, Literal

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from hina_lightning.callbacks import _common as common
from hina_lightning.groups import clean_name
from hina_lightning.statistics import block_of
from hina_optim import arguments as rule
from hina_optim.adapters import role_of
from hina_optim.evaluation import Hadamard, Kronecker, adapter_weights
from hina_optim.evaluation.grams import factors, gram_sides, spectra_of_many

__all__ = ["MEASURES", "Measure", "RankMonitor"]

Measure = Literal["effective", "entropy", "stable", "energy"]

#: What is kept of every adapter at every reading, in this order.
MEASURES: tuple[Measure, ...] = ("effective", "entropy", "stable", "energy")

#: Readings that the history holds before every second one is dropped.
_READINGS = 1000

_log = logging.getLogger(__name__)


class RankMonitor(Callback):
    """Log the rank that adapters and small weight matrices really use, and keep its curve over the training.

    Measured is the product that an adapter adds to its layer (``B·A`` of LoRA, ``w1 ⊗ w2`` of LoKr, the element-wise
    product of LoHa), never formed; and every other trainable matrix or kernel whose shorter side is small. As a logged
    step begins, small Gram matrices come to the host with one wait for the device; the first reading is taken when the
    training starts, the last when it ends (that one goes into the history only). An adapter's ``B`` is zero at first,
    and so is its rank.

    Logged metrics:
        - ``rank/<kind>/mean``, ``min``, ``max``: over all adapters of a kind; ``<kind>`` is ``lora``, ``lokr``,
          ``loha``, or ``matrix`` for a weight of no adapter. With ``by="block"`` the kind is a block of the model,
          named as by :class:`~hina_lightning.callbacks.ImportanceMonitor`.
        - ``rank/<adapter>``: with ``per_adapter``, of every adapter, called by the layer that it changes, and of every
          matrix, by its name.

        Weights that are not finite are left out.

    Args:
        measure: Which rank is logged; see :class:`~hina_optim.evaluation.LoraSpectrum`. ``"effective"`` counts the
            singular values above ``threshold`` times the largest; ``"entropy"`` is its continuous sister.
        by: What the metrics bring together.
        per_adapter: Whether each adapter has a metric of its own, too.
        every_n_steps: Log every so many steps. None: the trainer's ``log_every_n_steps``.
        max_side: Longest side of a Gram matrix, ≥ 1: an adapter whose rank, and a matrix whose shorter side, is above
            it is left out. The time on the host grows with its cube.
        threshold: Share of the largest singular value, in (0, 1).
        energy: Share of the energy that ``"energy"`` keeps, in (0, 1).

    Raises:
        ValueError: An argument is not what it must be.
        MisconfigurationException: When the training starts: nothing trainable is an adapter or a matrix within
            ``max_side``.
    """

    def __init__(
        self,
        measure: Measure = "effective",
        by: Literal["kind", "block"] = "kind",
        per_adapter: bool = False,
        every_n_steps: int | None = None,
        max_side: int = 256,
        threshold: float = 0.01,
        energy: float = 0.9,
    ) -> None:
        super().__init__()
        owner = "RankMonitor"
        rule.check(owner, "measure", measure, rule.one_of(*MEASURES))
        rule.check(owner, "by", by, rule.one_of("kind", "block"))
        rule.check(owner, "per_adapter", per_adapter, rule.FLAG)
        if every_n_steps is not None:
            rule.check(owner, "every_n_steps", every_n_steps, rule.INTERVAL)
        rule.check(owner, "max_side", max_side, rule.INTERVAL)
        for name, share in (("threshold", threshold), ("energy", energy)):
            rule.check(owner, name, share, rule.Rule("a number in (0, 1)", lambda x: rule.UNIT.holds(x) and 0 < x < 1))
        self.measure, self.by, self.per_adapter = measure, by, per_adapter
        self.every_n_steps, self.max_side = every_n_steps, max_side
        self.threshold, self.energy = threshold, energy
        self._cadence = common.Cadence(every_n_steps)
        self._kinds: dict[str, str] = {}
        self._steps: list[int] = []
        #: ``[adapters, measures]`` a reading, float32, NaN where weights were not finite.
        self._readings: list[Tensor] = []

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find what there is to measure; refuse a model without."""
        kinds = {
            name: _kind(weights)
            for name, weights in _measurable(pl_module).items()
            if any(factor.requires_grad for factor in factors(weights)) and max(gram_sides(weights)) <= self.max_side
        }
        if not kinds:
            raise MisconfigurationException(
                f"RankMonitor found nothing to measure in {type(pl_module).__name__}: no trainable adapter and no "
                f"trainable matrix with a side of at most max_side={self.max_side}."
            )
        if self._kinds and list(kinds) != list(self._kinds):
            _log.warning("The adapters are not those of the checkpoint: the history of ranks begins anew.")
            self._steps, self._readings = [], []
        self._kinds = kinds
        self._cadence.start(trainer, at_once=not self._steps)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Log the ranks as a step begins."""
        step = self._cadence.due(trainer)
        if step is None:
            return
        self._read(pl_module, step)
        common.log_values(trainer, self._metrics(), step)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Read the ranks that the training ended with."""
        self._read(pl_module, common.step_index(trainer))

    @property
    def history(self) -> dict[str, Any]:
        """All readings, as plain numbers.

        ``{"steps": [0, …], "kinds": {adapter: kind}, "ranks": {adapter: {measure: [rank, …]}}}``, one rank a step for
        each of the measures (``effective``, ``entropy``, ``stable``, ``energy``), NaN where weights were not finite.
        A step is the number of steps that the weights had taken. After 1000 readings every second one is dropped.
        """
        table = torch.stack(self._readings).permute(1, 2, 0).tolist() if self._readings else []
        ranks = {name: dict(zip(MEASURES, rows, strict=True)) for name, rows in zip(self._kinds, table, strict=False)}
        return {"steps": list(self._steps), "kinds": dict(self._kinds), "ranks": ranks}

    def state_dict(self) -> dict[str, Any]:
        """The history, for the checkpoint."""
        readings = torch.stack(self._readings) if self._readings else torch.empty(0)
        return {"kinds": dict(self._kinds), "steps": list(self._steps), "readings": readings}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with a history."""
        self._kinds, self._steps = dict(state_dict["kinds"]), list(state_dict["steps"])
        self._readings = list(state_dict["readings"].unbind()) if self._steps else []

    def _read(self, module: LightningModule, step: int) -> None:
        present = _measurable(module)
        spectra = spectra_of_many({name: present[name] for name in self._kinds}, self.threshold, self.energy)
        missing = [float("nan")] * len(MEASURES)
        rows = [missing if one is None else [float(x) for x in one[: len(MEASURES)]] for one in spectra.values()]
        if step in self._steps[-1:]:  # the last reading of a training that now goes on
            self._steps.pop()
            self._readings.pop()
        self._steps.append(step)
        self._readings.append(torch.tensor(rows))
        if len(self._steps) > _READINGS:
            self._steps, self._readings = self._steps[::2], self._readings[::2]

    def _metrics(self) -> dict[str, float]:
        """What is logged of the last reading."""
        values = self._readings[-1][:, MEASURES.index(self.measure)].tolist()
        ranks = {name: value for name, value in zip(self._kinds, values, strict=True) if value == value}
        gathered: dict[str, list[float]] = {}
        for name, value in ranks.items():
            kind = self._kinds[name]
            # an adapter is called by its layer, a matrix by itself
            block = block_of(name if kind == "matrix" else f"{name}.weight", None)
            gathered.setdefault(kind if self.by == "kind" else block, []).append(value)
        metrics: dict[str, float] = {}
        for key, found in gathered.items():
            numbers = {"mean": sum(found) / len(found), "min": min(found), "max": max(found)}
            metrics |= {f"rank/{key}/{what}": number for what, number in numbers.items()}
        return metrics | ({f"rank/{name}": value for name, value in ranks.items()} if self.per_adapter else {})


def _measurable(module: LightningModule) -> dict[str, Any]:
    """All adapters by layer, then by name all matrices that are no part of one."""
    named = {clean_name(name): parameter for name, parameter in module.named_parameters()}
    adapters = adapter_weights(named)
    matrices = {n: p for n, p in named.items() if p.ndim > 1 and p.numel() and role_of(n, p.shape) is None}
    return {**adapters, **matrices}


def _kind(weights: Any) -> str:
    if isinstance(weights, Kronecker):
        return "lokr"
    if isinstance(weights, Hadamard):
        return "loha"
    return "lora" if isinstance(weights, tuple) else "matrix"
