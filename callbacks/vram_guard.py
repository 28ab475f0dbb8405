"""VRAMGuard: gives optimizer memory back before the device runs out of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from hina_lightning.callbacks import _common as common
from hina_optim.memory.guard import MemoryGuard
from hina_optim.memory.probes import Probe

__all__ = ["VRAMGuard"]


class VRAMGuard(MemoryGuard, Callback):
    """Watch memory between steps, and have the optimizers store their state in less when it runs short.

    Pressure is memory over its limit. Memory is what is in use between steps or, where the last steps reached a new
    peak or an allocation had to be retried, the peak: activations are gone when a step is over, but the next one needs
    them again. When the training starts it is what is in use and what the first step will allocate: gradients, state,
    and the engine's bound on temporary memory. There are three reasons to act:

    - *plan*: when the training starts, what is to come brings the pressure to ``soft`` or above.
    - *soft*: the pressure is at ``soft`` or above, or the device can give less than 512 MiB, or less than 3 % of all
      that there is for this process, beyond that memory. This fires once and then waits until the pressure has fallen
      below ``soft − hysteresis``, and twice as much can be given.
    - *hard*: the pressure is at ``hard`` or above, or an allocation failed and had to be retried since the last look.

    After an action at least ``cooldown_steps`` steps pass before the next one, whatever the reason. To act is to call
    ``optimize_for_vram()`` of every optimizer of the trainer that offers it, until the bytes above
    ``soft − hysteresis`` are given back: existing state is converted, the cheapest loss of quality first; a technique
    is switched off at hard pressure only, and if ``emergency_simplify`` allows it. It happens after a step and before
    the next forward. All ranks act when one has to, at the same step, for the bytes of the one
    that needs most. Every action is logged by :mod:`logging` at level WARNING, said in the progress bar, and kept in
    :attr:`actions`, which is part of the checkpoint. Other training loops use
    :class:`hina_optim.memory.MemoryGuard`, of which this is the Lightning form.

    Logged metrics (with every look, where the trainer has a logger):
        - ``mem/used_gb``: memory in use now, GiB.
        - ``mem/free_gb``: what is left below the limit, GiB.
        - ``mem/reserved_gb``: what the allocator holds, in use or not, GiB; what is in use where it does not tell.
        - ``mem/allocated_peak_gb``: the most that was in use at one time so far, GiB.
        - ``mem/pressure``: as above; 1 is full.
        - ``mem/alloc_retries``: how often an allocation failed at first so far.
        - ``mem/actions``: how many actions there have been.

    Args:
        target_vram_gb: The limit, GiB. None, or more than there is: that of the probe.
        soft: Pressure at which to act, in (0, 1].
        hard: Pressure at which to act even when the last action has not brought relief, ≥ ``soft``.
        every_n_steps: Look after every so many optimizer steps, and after the first one of a fit.
        cooldown_steps: Steps between two actions, ≥ 0.
        hysteresis: How far below ``soft`` an action aims and the pressure must fall, in [0, ``soft``).
        dry_run: Say and record what would be done, do nothing.
        relax: Take back what was given up, the last first, as far as memory stays below ``soft − hysteresis`` on all
            ranks: what is in use now, and the peak since the last look; where the probe does not tell that, the highest
            that was seen, less what has been given back since. After ``cooldown_steps``, too. Without ``probe``, on a
            CUDA device, each look then resets ``torch.cuda.max_memory_allocated()``.
        probe: Where readings come from. None: the one that fits the device of the training. It is also read once when
            the training starts, so that what came before is not taken for a peak of its own.
        snapshot_dir: Where to write what is known when the fit runs out of memory: the error, readings, actions, and
            the plan of each optimizer as JSON; on CUDA devices, where the allocator then keeps a history, also a
            snapshot for https://pytorch.org/memory_viz.

    Attributes:
        actions: One dictionary for each action: ``step``, ``reason`` (``"plan"``, ``"soft"``, ``"hard"`` or
            ``"relax"``), ``dry_run``, ``pressure_before``, ``pressure_after``, ``bytes_needed``, ``bytes_predicted``,
            ``bytes_saved``, and ``reports``, what each optimizer returned, with its class under ``optimizer``.

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
        relax: bool = False,
        probe: Probe | None = None,
        snapshot_dir: str | Path | None = None,
    ) -> None:
        super().__init__(
            target_vram_gb,
            soft=soft,
            hard=hard,
            every_n_steps=every_n_steps,
            cooldown_steps=cooldown_steps,
            hysteresis=hysteresis,
            dry_run=dry_run,
            relax=relax,
            probe=probe,
            snapshot_dir=snapshot_dir,
        )
        self._cadence = common.Cadence(every_n_steps)
        self._steps_taken = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find optimizers and probe, take the first reading as the baseline, and make room for the first step."""
        found = common.find_optimizers(trainer, self, ["optimize_for_vram", "plan_for_vram"])
        self._cadence.start(trainer, at_once=True)
        self._steps_taken = trainer.global_step
        if self.start(*(one.optimizer for one in found), device=trainer.strategy.root_device, step=trainer.global_step):
            self._say(trainer)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Look at the memory if a step has just been taken and a look is due; act if need be."""
        if trainer.global_step == self._steps_taken:
            return
        self._steps_taken = trainer.global_step
        step = self._cadence.due(trainer)
        if step is None:
            return
        if self.look(step):
            self._say(trainer)
            pl_module.log("mem/actions", self.metrics["mem/actions"], prog_bar=True, logger=False)
        if trainer.loggers:
            common.log_values(trainer, self.metrics, step)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Write down what is known if memory ran out."""
        self.write_snapshot(exception)

    def _say(self, trainer: Trainer) -> None:
        """The last action, above the progress bar."""
        bar = trainer.progress_bar_callback
        if bar is not None:
            bar.print(self.message)
