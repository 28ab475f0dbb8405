"""A guard for any training loop: gives optimizer memory back before the device runs out of it, on all ranks alike."""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from hina_optim import arguments as rule
from hina_optim.engine.exhaustion import is_out_of_memory
from hina_optim.memory.account import expected_bytes, most_of_ranks, used_bytes
from hina_optim.memory.ladder import LADDER, SwitchOff, optimize_for_vram, plan_for_vram
from hina_optim.memory.planning import plan_of
from hina_optim.memory.probes import GIB, MemoryReading, Probe, probe_for
from hina_optim.unwrapping import unwrap_optimizer

__all__ = ["MemoryGuard"]

_METHODS = ("optimize_for_vram", "plan_for_vram")


class MemoryGuard:
    """Watch memory between steps, and have optimizers store their state in less when it runs short.

    Pressure is memory over its limit. Memory is what is in use between steps or, where the last steps reached a new
    peak or an allocation had to be retried, the peak: activations are gone when a step is over, but the next one needs
    them again. Before the first step it is what is in use and what that step will allocate: gradients, state, and the
    engine's bound on temporary memory. There are three reasons to act:

    - *plan*: before the first step, what is to come brings the pressure to ``soft`` or above.
    - *soft*: the pressure is at ``soft`` or above. This fires once and then waits until the pressure has fallen below
      ``soft − hysteresis``.
    - *hard*: the pressure is at ``hard`` or above, or an allocation failed and had to be retried since the last look.

    After an action at least ``cooldown_steps`` steps pass before the next one, whatever the reason. To act is to walk
    the ladder of every optimizer that has one (:func:`~hina_optim.memory.optimize_for_vram`), until the bytes above
    ``soft − hysteresis`` are given back; a technique is switched off at hard pressure only. Each look of several
    processes costs one small all-reduce: all act when one has to, at the same step, for the bytes of the one that needs
    most. So all must look.

    Args:
        target_vram_gb: The limit, GiB. None, or more than there is: that of the probe.
        soft: Pressure at which to act, in (0, 1].
        hard: Pressure at which to act even when the last action has not brought relief, ≥ ``soft``.
        every_n_steps: Look after every so many optimizer steps, and after the first.
        cooldown_steps: Steps between two actions, ≥ 0.
        hysteresis: How far below ``soft`` an action aims and the pressure must fall, in [0, ``soft``).
        dry_run: Say and record what would be done, do nothing.
        probe: Where readings come from. None: the one that fits the device.
        snapshot_dir: Where to write what was known when memory ran out (see :meth:`watching`). On CUDA devices the
            allocator then keeps a history, and a snapshot for https://pytorch.org/memory_viz is written too.

    Attributes:
        actions: One dictionary for each action: ``step``, ``reason``, ``dry_run``, ``pressure_before``,
            ``pressure_after``, ``bytes_needed``, ``bytes_predicted``, ``bytes_saved``, and ``reports``, what each
            optimizer returned, with its class under ``optimizer``.
        metrics: ``mem/…`` values of the last look: ``used_gb``, ``free_gb``, ``allocated_peak_gb`` (GiB), ``pressure``,
            ``alloc_retries``, ``actions`` (how many so far).
        message: What the last action was, in one line; empty before the first.

    Raises:
        ValueError: An argument is not what it must be.

    Example:
        >>> from hina_optim import HinaAdaptive
        >>> model = torch.nn.Linear(4, 2)
        >>> optimizer = HinaAdaptive(model.parameters(), lr=3e-4)
        >>> guard = MemoryGuard(target_vram_gb=64.0)
        >>> acted = guard.start(optimizer)
        >>> with guard.watching():
        ...     for _ in range(3):
        ...         model(torch.ones(8, 4)).square().mean().backward()
        ...         optimizer.step()
        ...         optimizer.zero_grad()
        ...         acted = guard.after_step()
        >>> guard.actions, sorted(guard.metrics)[0]
        ([], 'mem/actions')
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
        snapshot_dir: str | Path | None = None,
    ) -> None:
        super().__init__()
        owner = type(self).__name__
        if target_vram_gb is not None:
            rule.check(owner, "target_vram_gb", target_vram_gb, rule.POSITIVE)
        share = rule.Rule("a number in (0, 1]", lambda x: rule.UNIT.holds(x) and x > 0)
        rule.check(owner, "soft", soft, share)
        at_least = rule.Rule(f"a finite number >= soft ({soft})", lambda x: rule.POSITIVE.holds(x) and x >= soft)
        rule.check(owner, "hard", hard, at_least)
        below_soft = rule.Rule(f"a number in [0, soft) = [0, {soft})", lambda x: rule.UNIT.holds(x) and x < soft)
        rule.check(owner, "hysteresis", hysteresis, below_soft)
        rule.check(owner, "every_n_steps", every_n_steps, rule.INTERVAL)
        rule.check(owner, "cooldown_steps", cooldown_steps, rule.COUNT)
        rule.check(owner, "dry_run", dry_run, rule.FLAG)
        self.target_vram_gb = target_vram_gb
        self.soft = soft
        self.hard = hard
        self.low = soft - hysteresis
        self.every_n_steps = every_n_steps
        self.cooldown_steps = cooldown_steps
        self.dry_run = dry_run
        self.probe = probe
        self.snapshot_dir = None if snapshot_dir is None else Path(snapshot_dir)
        self.actions: list[dict[str, Any]] = []
        self.metrics: dict[str, float] = {}
        self.message = ""
        self.armed = True
        self.optimizers: list[Any] = []
        self._step = 0
        self._peak_bytes = 0
        self._retries = 0

    # -- use -----------------------------------------------------------------------------------------------------------

    def start(self, *optimizers: Any, device: torch.device | str | None = None, step: int = 0) -> bool:
        """Begin: take a reading, and act at once if what the first step will allocate does not fit.

        Args:
            *optimizers: Those of the training, also in the wrappers of Accelerate, Lightning or DeepSpeed. Those
                without ``optimize_for_vram()`` are passed over.
            device: Whose memory. None: that of the first parameter.
            step: Steps that were taken before, in a training that is resumed.

        Returns:
            Whether it acted.

        Raises:
            ValueError: None of them offers ``optimize_for_vram()``, or there is no probe for the device.
        """
        inner = [unwrap_optimizer(optimizer) for optimizer in optimizers]
        self.optimizers = [o for o in inner if all(callable(getattr(o, method, None)) for method in _METHODS)]
        if not self.optimizers:
            present = ", ".join(type(o).__name__ for o in inner) or "none"
            raise ValueError(
                f"{type(self).__name__} needs an optimizer with optimize_for_vram() and plan_for_vram(), such as "
                f"hina_optim.HinaAdaptive; got {present}."
            )
        if self.probe is None:
            self.probe = probe_for(device or self.optimizers[0].param_groups[0]["params"][0].device)
        if self.snapshot_dir is not None and torch.cuda.is_available():
            torch.cuda.memory._record_memory_history(max_entries=100_000)
        self._step = step
        reading = self.probe.read()
        self._remember(reading)
        level = reading.used_bytes + sum(expected_bytes(optimizer) for optimizer in self.optimizers)
        return self._look(step, reading, level, retried=False, planned=True)

    def after_step(self, step: int | None = None) -> bool:
        """Call after every optimizer step, before the next forward; looks if a look is due.

        Args:
            step: Number of steps taken so far. None: one more than at the last call.

        Returns:
            Whether it acted.
        """
        self._step = self._step + 1 if step is None else step
        if self._step != 1 and self._step % self.every_n_steps:
            return False
        return self.look(self._step)

    def look(self, step: int) -> bool:
        """Read the memory, and act if need be. Returns whether it acted."""
        assert self.probe is not None, "start() comes first"
        reading = self.probe.read()
        retried = reading.retries > self._retries
        level = self._level(reading, retried)
        self._remember(reading)
        return self._look(step, reading, level, retried)

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Within this, running out of memory is written down before the error goes on its way."""
        try:
            yield
        except (RuntimeError, MemoryError) as error:
            self.write_snapshot(error)
            raise

    def write_snapshot(self, error: BaseException) -> Path | None:
        """Write what is known about an out-of-memory error to ``snapshot_dir``.

        Returns:
            The file: JSON with the error, the last reading, metrics and actions, and the plan of each optimizer. None
            if there is no directory, or the error is another one.
        """
        if self.snapshot_dir is None or not is_out_of_memory(error):
            return None
        rank = dist.get_rank() if dist.is_available() and dist.is_initialized() else 0
        path = self.snapshot_dir / f"memory-rank{rank}-step{self._step}.json"
        about = {
            "error": str(error),
            "step": self._step,
            "reading": None if self.probe is None else self.probe.read()._asdict(),
            "metrics": self.metrics,
            "actions": self.actions,
            "optimizers": [{"state_bytes": one.state_bytes(), "plan": _described(one)} for one in self.optimizers],
        }
        self.snapshot_dir.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(about, indent=1))
        if torch.cuda.is_available():
            torch.cuda.memory._dump_snapshot(str(path.with_suffix(".pickle")))
        self._log.error("%s: out of memory; what is known is in %s", type(self).__name__, path)
        return path

    def state_dict(self) -> dict[str, Any]:
        """What was done so far, and whether the next soft pressure would act."""
        return {"actions": list(self.actions), "armed": self.armed}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a checkpoint. The layout of the state comes with the optimizer's own."""
        self.actions = list(state_dict["actions"])
        self.armed = bool(state_dict["armed"])

    # -- readings ------------------------------------------------------------------------------------------------------

    @property
    def _log(self) -> logging.Logger:
        return logging.getLogger(type(self).__module__)

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

    def _look(self, step: int, reading: MemoryReading, level: int, retried: bool, planned: bool = False) -> bool:
        pressure = level / self._limit(reading)
        reason, needed = self._decide(step, pressure, retried, level - int(self.low * self._limit(reading)), planned)
        if reason is not None:
            self._act(step, reason, needed, level / self._limit(reading))
        self.metrics = {
            "mem/used_gb": reading.used_bytes / GIB,
            "mem/free_gb": max(0, self._limit(reading) - reading.used_bytes) / GIB,
            "mem/allocated_peak_gb": reading.peak_bytes / GIB,
            "mem/pressure": pressure,
            "mem/alloc_retries": float(reading.retries),
            "mem/actions": float(len(self.actions)),
        }
        return reason is not None

    def _decide(self, step: int, pressure: float, retried: bool, needed: int, planned: bool) -> tuple[str | None, int]:
        """The reason to act or None, and the bytes to give back; every rank comes to the same answer."""
        here = [pressure >= self.low, pressure >= self.soft, retried or pressure >= self.hard, max(0, needed)]
        strained, soft, hard, most = most_of_ranks(self.optimizers[0], *(int(x) for x in here))
        # before the first step there are no activations: a low pressure is no relief
        self.armed = self.armed or not (strained or planned)
        if self.actions and step - self.actions[-1]["step"] < self.cooldown_steps:
            return None, most
        if planned:
            return ("plan" if soft else None), most
        return ("hard" if hard else "soft" if soft and self.armed else None), most

    def _act(self, step: int, reason: str, needed: int, before: float) -> None:
        reports = self._ask(needed, reason)
        actions = [action for report in reports for action in report["actions"]]
        assert self.probe is not None
        after = self.probe.read()  # the baseline for what comes
        self._remember(after)
        predicted = sum(action["bytes_predicted"] for action in actions)
        record = {
            "step": step,
            "reason": reason,
            "dry_run": self.dry_run,
            "pressure_before": before,
            "pressure_after": after.used_bytes / self._limit(after),
            "bytes_needed": needed,
            "bytes_predicted": predicted,
            "bytes_saved": 0 if self.dry_run else sum(action["bytes_saved"] for action in actions),
            "reports": reports,
        }
        self.actions.append(record)
        self.armed = False
        took = ", ".join(action["rung"] for action in actions) or "nothing: the optimizer has no more to give"
        self.message = (
            f"{type(self).__name__}: {reason} memory pressure {100 * before:.0f} % after step {step}; "
            f"{'would take' if self.dry_run else 'took'} {took} ({needed} bytes needed, {predicted} predicted, "
            f"{record['bytes_saved']} saved); pressure now {100 * record['pressure_after']:.0f} %."
        )
        self._log.warning(self.message)

    def _ask(self, needed: int, reason: str) -> list[dict[str, Any]]:
        """Have the optimizers give back so many bytes together, one after the other."""
        reports = []
        ladder = LADDER if reason == "hard" else tuple(rung for rung in LADDER if not isinstance(rung, SwitchOff))
        run = plan_for_vram if self.dry_run else optimize_for_vram
        for optimizer in self.optimizers:
            # The target is in the optimizer's own account, which need not be that of the probe (a process has more
            # in memory than an optimizer can see): what it uses now, less what is needed.
            report = run(optimizer, max(used_bytes(optimizer) - needed, 1) / GIB, ladder)
            needed = max(0, needed - (report["used_bytes_before"] - report["used_bytes_after"]))
            reports.append({"optimizer": type(optimizer).__name__, **_plain(report)})
        return reports


def _described(optimizer: Any) -> list[str]:
    """The lines of an optimizer's plan, as far as it can be made while there is no memory."""
    with contextlib.suppress(RuntimeError, MemoryError):
        if not optimizer._layout.sharded:  # a plan of shards asks all ranks, and only this one is here
            return str(plan_of(optimizer)).splitlines()
    return []


def _plain(report: Mapping[str, Any]) -> dict[str, Any]:
    """A report as plain dictionaries: it goes into checkpoints that are read with ``weights_only``."""
    actions: Sequence[Mapping[str, Any]] = report["actions"]
    return {**report, "actions": [dict(action) for action in actions]}
