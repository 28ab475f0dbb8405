"""VRAMGuard: gives optimizer memory back before the device runs out of it."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from hina_lightning.callbacks import _common as common
from hina_optim import arguments as rule
from hina_optim.memory.probes import GIB, MemoryReading, Probe, probe_for

__all__ = ["VRAMGuard"]

_log = logging.getLogger(__name__)


class VRAMGuard(Callback):
    """Watch memory between steps, and have the optimizers store their state in less when it runs short.

    Pressure is memory over its limit. Memory is what is in use between steps or, where the last steps reached a new
    peak or an allocation had to be retried, the peak: activations are gone when a step is over, but the next one needs
    them again. There are two reasons to act:

    - *soft*: the pressure is at ``soft`` or above. This fires once and then waits until the pressure has fallen below
      ``soft − hysteresis``.
    - *hard*: the pressure is at ``hard`` or above, or an allocation failed and had to be retried since the last look.

    After an action at least ``cooldown_steps`` steps pass before the next one, whatever the reason. To act is to call
    ``optimize_for_vram()`` of every optimizer of the trainer that offers it, until the bytes above
    ``soft − hysteresis`` are given back: existing state is converted, the cheapest loss of quality first. It happens
    after a step and before the next forward. All ranks act when one has to, at the same step, for the bytes of the one
    that needs most. Every action is logged by :mod:`logging` at level WARNING, shown in the progress bar, and kept in
    :attr:`actions`, which is part of the checkpoint.

    Logged metrics (with every look, where the trainer has a logger):
        - ``mem/used_gb``: memory in use now, GiB.
        - ``mem/free_gb``: what is left below the limit, GiB.
        - ``mem/pressure``: as above; 1 is full.
        - ``mem/actions``: how many actions there have been.

    Args:
        target_vram_gb: The limit, GiB. None, or more than there is: that of the probe.
        soft: Pressure at which to act, in (0, 1].
        hard: Pressure at which to act even when the last action has not brought relief, ≥ ``soft``.
        every_n_steps: Look after every so many optimizer steps, and after the first one of a fit.
        cooldown_steps: Steps between two actions, ≥ 0.
        hysteresis: How far below ``soft`` an action aims and the pressure must fall, in [0, ``soft``).
        dry_run: Say and record what would be done, do nothing.
        probe: Where readings come from. None: the one that fits the device of the training. It is also read once when
            the training starts, so that what came before is not taken for a peak of its own.

    Attributes:
        actions: One dictionary for each action: ``step``, ``reason`` (``"soft"`` or ``"hard"``), ``dry_run``,
            ``pressure_before``, ``pressure_after``, ``bytes_needed``, ``bytes_predicted``, ``bytes_saved``, and
            ``reports``, what each optimizer returned, with its class under ``optimizer``.

    Raises:
        ValueError: An argument is not what it must be; there is no probe for the device.
        MisconfigurationException: When the training starts: no optimizer offers ``optimize_for_vram()``.

    Example:
        >>> guard = VRAMGuard(target_vram_gb=16.0, dry_run=True)
        >>> guard.actions
        []
    """

    def __init__(
        self,
        target_vram_gb: float | None = None,
        *,
        soft: float = 0.9,
        hard: float = 0.97,
        every_n_steps: int = 10,
        cooldown_steps: int = 50,
        hysteresis: float = 0.1,
        dry_run: bool = False,
        probe: Probe | None = None,
    ) -> None:
        super().__init__()
        owner = "VRAMGuard"
        if target_vram_gb is not None:
            rule.check(owner, "target_vram_gb", target_vram_gb, rule.POSITIVE)
        share = rule.Rule("a number in (0, 1]", lambda x: rule.UNIT.holds(x) and x > 0)
        rule.check(owner, "soft", soft, share)
        rule.check(owner, "hard", hard, rule.Rule(f"a finite number >= soft ({soft})", _at_least(soft)))
        below_soft = rule.Rule(f"a number in [0, soft) = [0, {soft})", lambda x: rule.UNIT.holds(x) and x < soft)
        rule.check(owner, "hysteresis", hysteresis, below_soft)
        rule.check(owner, "every_n_steps", every_n_steps, rule.INTERVAL)
        rule.check(owner, "cooldown_steps", cooldown_steps, rule.COUNT)
        rule.check(owner, "dry_run", dry_run, rule.FLAG)
        self.target_vram_gb = target_vram_gb
        self.soft = soft
        self.hard = hard
        self.low = soft - hysteresis
        self.cooldown_steps = cooldown_steps
        self.dry_run = dry_run
        self.probe = probe
        self.actions: list[dict[str, Any]] = []
        self.armed = True
        self._cadence = common.Cadence(every_n_steps)
        self._steps_taken = 0
        self._peak_bytes = 0
        self._retries = 0

    # -- hooks ---------------------------------------------------------------------------------------------------------

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find optimizers and probe, and take the first reading as the baseline."""
        self._find(trainer)
        if self.probe is None:
            self.probe = probe_for(trainer.strategy.root_device)
        self._cadence.start(trainer, at_once=True)
        self._steps_taken = trainer.global_step
        self._remember(self.probe.read())

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Look at the memory if a step has just been taken and a look is due; act if need be."""
        if trainer.global_step == self._steps_taken:
            return
        self._steps_taken = trainer.global_step
        step = self._cadence.due(trainer)
        if step is None or self.probe is None:
            return
        reading = self.probe.read()
        retried = reading.retries > self._retries
        level = self._level(reading, retried)
        self._remember(reading)
        pressure = level / self._limit(reading)
        reason = self._decide(trainer, step, pressure, retried)
        if reason is not None:
            self._act(trainer, step, reason, reading, level)
            pl_module.log("mem/actions", float(len(self.actions)), prog_bar=True, logger=False)
        if trainer.loggers:
            metrics = {
                "mem/used_gb": reading.used_bytes / GIB,
                "mem/free_gb": max(0, self._limit(reading) - reading.used_bytes) / GIB,
                "mem/pressure": pressure,
                "mem/actions": float(len(self.actions)),
            }
            common.log_values(trainer, metrics, step)

    def state_dict(self) -> dict[str, Any]:
        """What was done so far, and whether the next soft pressure would act."""
        return {"actions": list(self.actions), "armed": self.armed}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a checkpoint. The layout of the state comes with the optimizer's own."""
        self.actions = list(state_dict["actions"])
        self.armed = bool(state_dict["armed"])

    # -- readings ------------------------------------------------------------------------------------------------------

    def _limit(self, reading: MemoryReading) -> int:
        if self.target_vram_gb is None:
            return reading.limit_bytes
        return min(reading.limit_bytes, int(self.target_vram_gb * GIB))

    def _level(self, reading: MemoryReading, retried: bool) -> int:
        """Bytes in use, or the peak where it was reached just now: a new one, or an allocation was retried."""
        reached = retried or reading.peak_bytes > self._peak_bytes  # the counter only grows
        return max(reading.used_bytes, reading.peak_bytes if reached else 0)

    def _remember(self, reading: MemoryReading) -> None:
        self._peak_bytes = reading.peak_bytes
        self._retries = reading.retries

    # -- decision and action -------------------------------------------------------------------------------------------

    def _decide(self, trainer: Trainer, step: int, pressure: float, retried: bool) -> str | None:
        """``"soft"``, ``"hard"`` or None; every rank comes to the same answer."""
        strategy = trainer.strategy
        if not self.armed:
            self.armed = strategy.reduce_boolean_decision(pressure < self.low, all=True)
        if self.actions and step - self.actions[-1]["step"] < self.cooldown_steps:
            return None
        if strategy.reduce_boolean_decision(retried or pressure >= self.hard, all=False):
            return "hard"
        if self.armed and strategy.reduce_boolean_decision(pressure >= self.soft, all=False):
            return "soft"
        return None

    def _act(self, trainer: Trainer, step: int, reason: str, reading: MemoryReading, level: int) -> None:
        limit = self._limit(reading)
        own_need = max(0, level - int(self.low * limit))
        shared = trainer.strategy.reduce(torch.tensor(own_need, device=trainer.strategy.root_device), reduce_op="max")
        needed = int(shared)  # a rank may need nothing and must still do what the others do
        reports = self._ask(trainer, needed)
        actions = [action for report in reports for action in report["actions"]]
        after = self._after()
        record = {
            "step": step,
            "reason": reason,
            "dry_run": self.dry_run,
            "pressure_before": level / limit,
            "pressure_after": after.used_bytes / self._limit(after),
            "bytes_needed": needed,
            "bytes_predicted": sum(action["bytes_predicted"] for action in actions),
            "bytes_saved": 0 if self.dry_run else sum(action["bytes_saved"] for action in actions),
            "reports": reports,
        }
        self.actions.append(record)
        self.armed = False
        _log.warning(
            "VRAMGuard: %s memory pressure %.0f %% after step %d; %s %s "
            "(%d bytes needed, %d predicted, %d saved); pressure now %.0f %%.",
            reason,
            100 * record["pressure_before"],
            step,
            "would take" if self.dry_run else "took",
            ", ".join(action["rung"] for action in actions) or "nothing: the optimizer has no more to give",
            needed,
            record["bytes_predicted"],
            record["bytes_saved"],
            100 * record["pressure_after"],
        )

    def _ask(self, trainer: Trainer, needed: int) -> list[dict[str, Any]]:
        """Have the optimizers give back so many bytes together, one after the other."""
        reports = []
        for optimizer, _ in self._find(trainer):
            # The target is in the optimizer's own account, which need not be that of the probe (a process has more
            # in memory than an optimizer can see): what it uses now, less what is needed.
            used = optimizer.plan_for_vram(1.0)["used_bytes_before"]
            target_gb = max(used - needed, 1) / GIB
            report = optimizer.plan_for_vram(target_gb) if self.dry_run else optimizer.optimize_for_vram(target_gb)
            needed = max(0, needed - (report["used_bytes_before"] - report["used_bytes_after"]))
            reports.append({"optimizer": type(optimizer).__name__, **_plain(report)})
        return reports

    def _after(self) -> MemoryReading:
        """Memory after an action, which is the baseline for what comes."""
        assert self.probe is not None
        reading = self.probe.read()
        self._remember(reading)
        return reading

    def _find(self, trainer: Trainer) -> list[common.Found]:
        return common.find_optimizers(trainer, self, ["optimize_for_vram", "plan_for_vram"])


def _at_least(bound: float) -> Any:
    return lambda x: rule.POSITIVE.holds(x) and x >= bound


def _plain(report: Mapping[str, Any]) -> dict[str, Any]:
    """A report as plain dictionaries: it goes into checkpoints that are read with ``weights_only``."""
    return {**report, "actions": [dict(action) for action in report["actions"]]}
