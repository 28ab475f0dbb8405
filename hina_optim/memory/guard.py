"""A guard for any training loop: gives optimizer memory back before the device runs out of it, on all ranks alike."""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from hina_optim import arguments as rule
from hina_optim.engine.exhaustion import is_out_of_memory
from hina_optim.memory.account import as_size, expected_bytes, most_of_ranks, used_bytes
from hina_optim.memory.ladder import GIVEN_UP, LADDER, Simplify, optimize_for_vram, plan_for_vram, relax_vram
from hina_optim.memory.planning import plan_of
from hina_optim.memory.probes import GIB, MemoryReading, Probe, probe_for
from hina_optim.unwrapping import unwrap_optimizer

__all__ = ["MemoryGuard"]

_METHODS = ("optimize_for_vram", "plan_for_vram")
#: What a device must be able to give beyond what is predicted: so many bytes, or this share of all if that is more.
LEAST_BYTES, LEAST_SHARE = 512 << 20, 0.03


class _Strain(NamedTuple):
    """How one rank stands.

    Attributes:
        pressure: Memory over its limit.
        left: Bytes that the device can give beyond it; None where the probe does not tell.
        strained: Whether it has not recovered from pressure.
        soft: Whether it is under soft pressure.
        hard: Whether it is under hard pressure.
        needed: Bytes to give back; negative where there is room.
    """

    pressure: float
    left: int | None
    strained: bool
    soft: bool
    hard: bool
    needed: int


class MemoryGuard:
    """Watch memory between steps, and have optimizers store their state in less when it runs short.

    Pressure is memory over its limit. Memory is what is in use between steps or, where the last steps reached a new
    peak or an allocation had to be retried, the peak: activations are gone when a step is over, but the next one needs
    them again. Before the first step it is what is in use and what that step will allocate: gradients, state, and the
    engine's bound on temporary memory. There are three reasons to act:

    - *plan*: before the first step, what is to come brings the pressure to ``soft`` or above.
    - *soft*: the pressure is at ``soft`` or above, or the device can give less than 512 MiB, or less than 3 % of all
      that there is for this process, beyond that memory. This fires once and then waits until the pressure has fallen
      below ``soft − hysteresis``, and twice as much can be given.
    - *hard*: the pressure is at ``hard`` or above, or an allocation failed and had to be retried since the last look.

    After an action at least ``cooldown_steps`` steps pass before the next one, whatever the reason. To act is to walk
    the ladder of every optimizer that has one (:func:`~hina_optim.memory.optimize_for_vram`), until the bytes above
    ``soft − hysteresis`` (or those up to twice what must be available) are given back; a technique is switched off at
    hard pressure only. What was given up stays so, unless ``relax`` asks for it back. Each look of several
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
        relax: Take back what was given up, the last first, as far as memory stays below ``soft − hysteresis`` on all
            ranks: what is in use now, and the peak since the last look; where the probe does not tell that, the highest
            that was seen, less what has been given back since. After ``cooldown_steps``, too; an action with the reason
            ``"relax"``. Without ``probe``, on a CUDA device, each look then resets
            ``torch.cuda.max_memory_allocated()``.
        probe: Where readings come from. None: the one that fits the device.
        snapshot_dir: Where to write what was known when memory ran out (see :meth:`watching`). On CUDA devices the
            allocator then keeps a history, and a snapshot for https://pytorch.org/memory_viz is written too.

    Attributes:
        actions: One dictionary for each action: ``step``, ``reason``, ``dry_run``, ``pressure_before``,
            ``pressure_after``, ``bytes_needed``, ``bytes_predicted``, ``bytes_saved``, and ``reports``, what each
            optimizer returned, with its class under ``optimizer``.
        metrics: ``mem/…`` values of the last look: ``used_gb``, ``free_gb``, ``reserved_gb``, ``allocated_peak_gb``
            (GiB), ``pressure``, ``alloc_retries``, ``actions`` (how many so far).
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
        relax: bool = False,
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
        rule.check(owner, "relax", relax, rule.FLAG)
        self.target_vram_gb = target_vram_gb
        self.soft = soft
        self.hard = hard
        self.low = soft - hysteresis
        self.every_n_steps = every_n_steps
        self.cooldown_steps = cooldown_steps
        self.dry_run = dry_run
        self.relax = relax
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
        self._reached = 0  # the highest peak since the training began, less what was given back since

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
            device = device or self.optimizers[0].param_groups[0]["params"][0].device
            self.probe = probe_for(device, windows=self.relax)
        if self.snapshot_dir is not None and torch.cuda.is_available():
            torch.cuda.memory._record_memory_history(max_entries=100_000)
        self._step = step
        reading = self.probe.read()
        self._remember(reading)
        self._reached = 0
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
        if reading.window_bytes is not None:
            return max(reading.used_bytes, reading.window_bytes)
        reached = retried or reading.peak_bytes > self._peak_bytes  # the counter only grows
        return max(reading.used_bytes, reading.peak_bytes if reached else 0)

    def _remember(self, reading: MemoryReading) -> None:
        if reading.peak_bytes > self._peak_bytes:
            self._reached = reading.peak_bytes
        self._peak_bytes = reading.peak_bytes
        self._retries = reading.retries

    # -- decision and action -------------------------------------------------------------------------------------------

    def _look(self, step: int, reading: MemoryReading, level: int, retried: bool, planned: bool = False) -> bool:
        strain = self._strain(reading, level, retried)
        reason, needed = self._decide(step, strain, planned)
        if reason == "relax":
            acted = self._take_back(step, reading, strain.pressure)
        elif reason is not None:
            acted = self._act(step, reason, needed, strain)
        else:
            acted = False
        reserved = reading.used_bytes if reading.reserved_bytes is None else reading.reserved_bytes
        self.metrics = {
            "mem/used_gb": reading.used_bytes / GIB,
            "mem/free_gb": max(0, self._limit(reading) - reading.used_bytes) / GIB,
            "mem/reserved_gb": reserved / GIB,
            "mem/allocated_peak_gb": reading.peak_bytes / GIB,
            "mem/pressure": strain.pressure,
            "mem/alloc_retries": float(reading.retries),
            "mem/actions": float(len(self.actions)),
        }
        return acted

    def _strain(self, reading: MemoryReading, level: int, retried: bool) -> _Strain:
        limit = self._limit(reading)
        pressure, needed = level / limit, level - int(self.low * limit)
        strained, soft, hard = pressure >= self.low, pressure >= self.soft, retried or pressure >= self.hard
        left = None
        if reading.available_bytes is not None:
            left = reading.available_bytes - (level - reading.used_bytes)
            least = max(LEAST_BYTES, int(LEAST_SHARE * (reading.used_bytes + reading.available_bytes)))
            strained, soft = strained or left < 2 * least, soft or left < least
            needed = max(needed, 2 * least - left)
        return _Strain(pressure, left, strained, soft, hard, needed)

    def _room(self, reading: MemoryReading) -> int:
        """Bytes that may be taken back here."""
        most = max(reading.used_bytes, self._reached if reading.window_bytes is None else reading.window_bytes)
        return -self._strain(reading, most, retried=False).needed

    def _decide(self, step: int, strain: _Strain, planned: bool) -> tuple[str | None, int]:
        """The reason to act or None, and the bytes to give back; every rank comes to the same answer."""
        here = [strain.strained, strain.soft, strain.hard, max(0, strain.needed)]
        strained, soft, hard, most = most_of_ranks(self.optimizers[0], *(int(x) for x in here))
        # before the first step there are no activations: a low pressure is no relief
        self.armed = self.armed or not (strained or planned)
        if self.actions and step - self.actions[-1]["step"] < self.cooldown_steps:
            return None, most
        if planned:
            return ("plan" if soft else None), most
        if hard or (soft and self.armed):
            return ("hard" if hard else "soft"), most
        gave_up = any(group.get(GIVEN_UP) for optimizer in self.optimizers for group in optimizer.param_groups)
        return ("relax" if self.relax and gave_up and not strained and not self.dry_run else None), most

    def _act(self, step: int, reason: str, needed: int, strain: _Strain) -> bool:
        reports = self._ask(needed, reason)
        record = self._record(step, reason, needed, strain.pressure, reports)
        self.armed = False
        took = ", ".join(_rungs(reports)) or "nothing: the optimizer has no more to give"
        there = "" if strain.left is None else f", {as_size(strain.left)} available"
        self.message = (
            f"{type(self).__name__}: {reason} memory pressure {100 * strain.pressure:.0f} %{there} after step {step}; "
            f"{'would take' if self.dry_run else 'took'} {took} ({needed} bytes needed, {record['bytes_predicted']} "
            f"predicted, {record['bytes_saved']} saved); pressure now {100 * record['pressure_after']:.0f} %."
        )
        self._log.warning(self.message)
        return True

    def _take_back(self, step: int, reading: MemoryReading, before: float) -> bool:
        """Take back what was given up, as far as there is room; whether there was any."""
        room = self._room(reading)
        (crowded,) = most_of_ranks(self.optimizers[0], int(room <= 0))
        if crowded:
            return False
        reports = []
        for optimizer in reversed(self.optimizers):
            report = relax_vram(optimizer, (used_bytes(optimizer) + room) / GIB)
            room -= report["used_bytes_after"] - report["used_bytes_before"]
            reports.append({"optimizer": type(optimizer).__name__, **_plain(report)})
        if not _rungs(reports):
            return False
        self._record(step, "relax", 0, before, reports)
        self.message = f"{type(self).__name__}: took {', '.join(_rungs(reports))} back after step {step}."
        self._log.warning(self.message)
        return True

    def _record(
        self, step: int, reason: str, needed: int, before: float, reports: list[dict[str, Any]]
    ) -> dict[str, Any]:
        """Keep what was done, and the reading after it as the baseline for what comes."""
        assert self.probe is not None
        after = self.probe.read()
        self._remember(after)
        actions = [action for report in reports for action in report["actions"]]
        saved = 0 if self.dry_run else sum(action["bytes_saved"] for action in actions)
        self._reached = max(0, self._reached - saved)
        record = {
            "step": step,
            "reason": reason,
            "dry_run": self.dry_run,
            "pressure_before": before,
            "pressure_after": after.used_bytes / self._limit(after),
            "bytes_needed": needed,
            "bytes_predicted": sum(action["bytes_predicted"] for action in actions),
            "bytes_saved": saved,
            "reports": reports,
        }
        self.actions.append(record)
        return record

    def _ask(self, needed: int, reason: str) -> list[dict[str, Any]]:
        """Have the optimizers give back so many bytes together, one after the other."""
        reports = []
        ladder = LADDER if reason == "hard" else tuple(rung for rung in LADDER if not isinstance(rung, Simplify))
        run = plan_for_vram if self.dry_run else optimize_for_vram
        for optimizer in self.optimizers:
            # The target is in the optimizer's own account, which need not be that of the probe (a process has more
            # in memory than an optimizer can see): what it uses now, less what is needed.
            report = run(optimizer, max(used_bytes(optimizer) - needed, 1) / GIB, ladder)
            needed = max(0, needed - (report["used_bytes_before"] - report["used_bytes_after"]))
            reports.append({"optimizer": type(optimizer).__name__, **_plain(report)})
        return reports


def _rungs(reports: Sequence[Mapping[str, Any]]) -> list[str]:
    """The names of what was taken."""
    return [action["rung"] for report in reports for action in report["actions"]]


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
