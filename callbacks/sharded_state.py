"""ShardedOptimizerState: optimizer state in checkpoints that any strategy and number of devices can load."""

from __future__ import annotations

import contextlib
import logging
import shutil
from collections.abc import Callable, Iterator
from functools import wraps
from pathlib import Path
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import DeepSpeedStrategy, Strategy

from hina_lightning import sharded_state
from hina_lightning.callbacks.layout_binding import LayoutBinding
from hina_lightning.sharding.zero_weights import of_another_world
from hina_optim.engine.optimizer import HinaOptimizer
from hina_optim.unwrapping import unwrap_optimizer

__all__ = ["ShardedOptimizerState"]

_log = logging.getLogger(__name__)


class ShardedOptimizerState(Callback):
    """Keep optimizer state in the form of :mod:`hina_lightning.sharded_state`, whoever writes a checkpoint.

    With it ``trainer.save_checkpoint`` and ``ModelCheckpoint`` save the state of the optimizers by parameter name, each
    rank what it holds, and ``trainer.fit(ckpt_path=…)`` loads it under any strategy and number of devices that can
    load the *weights* of that checkpoint. Without it Lightning leaves the state to the strategy: FSDP1 refuses state
    that is not shaped as its parameter, and DeepSpeed loads it on the same number of devices only.

    The state lies in ``hina_optimizer_<i>/`` inside a checkpoint that is a folder (``ModelParallelStrategy``,
    ``FSDPStrategy`` with sharded checkpoints, ``DeepSpeedStrategy``), beside one that is a file in
    ``<file>.optimizer/``, and goes when Lightning removes the checkpoint. A checkpoint without it is loaded by
    Lightning's own means. How the state is stored (precision, device) comes from the checkpoint.

    All optimizers of the trainer must be of :mod:`hina_optim`. Weights-only checkpoints hold no optimizer state.

    Logged metrics:
        None.

    Raises:
        MisconfigurationException: With the first checkpoint that is saved or loaded: an optimizer is of others.
        sharded_state.CheckpointError: The state is missing in part, damaged, or of another model or optimizer.
    """

    def __init__(self) -> None:
        super().__init__()
        self._trainer: Trainer | None = None
        self._folder: Path | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Stand between the trainer and its strategy, for checkpoints of a fit."""
        if stage != "fit" or self._trainer is trainer:
            return
        LayoutBinding.add_to(trainer)
        self._trainer = trainer
        strategy: Any = trainer.strategy
        strategy.optimizer_state = _around(strategy.optimizer_state, self._optimizer_state)
        strategy.save_checkpoint = _around(strategy.save_checkpoint, self._save_checkpoint)
        strategy.load_checkpoint = _around(strategy.load_checkpoint, self._load_checkpoint)
        strategy.load_optimizer_state_dict = _around(strategy.load_optimizer_state_dict, self._load_optimizer_state)
        strategy.remove_checkpoint = _around(strategy.remove_checkpoint, self._remove_checkpoint)

    # -- in the place of the strategy's methods ------------------------------------------------------------------------

    def _optimizer_state(self, original: Callable[..., Any], optimizer: Any) -> dict[str, Any]:
        """Nothing for Lightning to save: on all ranks."""
        self._optimizers()
        return {}

    def _save_checkpoint(
        self, original: Callable[..., None], checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None
    ) -> None:
        wanted = bool(checkpoint.pop("optimizer_states", None))
        if wanted:
            checkpoint["optimizer_states"] = []
        original(checkpoint, filepath, storage_options)
        if wanted:
            path = Path(self._strategy.broadcast(filepath))
            self._strategy.barrier("ShardedOptimizerState")
            for index, optimizer in enumerate(self._optimizers()):
                sharded_state.save(_inside(path) / _name(index), optimizer, extra={"processes": self._processes})

    def _load_checkpoint(self, original: Callable[..., Any], checkpoint_path: Any, *args: Any, **kwargs: Any) -> Any:
        path = Path(self._strategy.broadcast(checkpoint_path))
        folder = _inside(path)
        if not (folder / _name(0)).is_dir():
            _log.warning("%s has no %s/: Lightning loads what it has saved by itself.", folder, _name(0))
            return original(checkpoint_path, *args, **kwargs)
        for kept in folder.glob(_name("*")):  # before weights are loaded
            sharded_state.open_checkpoint(kept).check_files()
        self._folder = folder
        with self._hidden(folder):
            loaded = original(checkpoint_path, *args, **kwargs)
        if not self._strategy.lightning_restore_optimizer:
            self._load()
        return loaded

    def _load_optimizer_state(self, original: Callable[..., None], checkpoint: Any) -> None:
        if self._folder is None:
            original(checkpoint)
        else:
            self._load()

    def _remove_checkpoint(self, original: Callable[..., None], filepath: Any) -> None:
        original(filepath)
        if self._strategy.is_global_zero:
            shutil.rmtree(_beside(Path(filepath)), ignore_errors=True)

    # -- helpers -------------------------------------------------------------------------------------------------------

    @property
    def _strategy(self) -> Strategy:
        assert self._trainer is not None
        return self._trainer.strategy

    @property
    def _processes(self) -> int:
        assert self._trainer is not None
        return self._trainer.world_size

    def _optimizers(self) -> list[HinaOptimizer]:
        assert self._trainer is not None
        inner = [unwrap_optimizer(one) for one in self._trainer.optimizers]
        foreign = [type(one).__name__ for one in inner if not isinstance(one, HinaOptimizer)]
        if foreign:
            raise MisconfigurationException(
                f"ShardedOptimizerState saves optimizers of hina_optim, and the trainer has {', '.join(foreign)}: "
                "leave the callback out, or train with optimizers of hina_optim alone."
            )
        return inner

    def _load(self) -> None:
        assert self._folder is not None
        optimizers = self._optimizers()
        saved = len(list(self._folder.glob(_name("*"))))
        if saved != len(optimizers):
            raise MisconfigurationException(
                f"{self._folder} holds the state of {saved} optimizers, the trainer has {len(optimizers)}."
            )
        for index, optimizer in enumerate(optimizers):
            sharded_state.load(self._folder / _name(index), optimizer, storage="checkpoint")
        self._folder = None

    @contextlib.contextmanager
    def _hidden(self, folder: Path) -> Iterator[None]:
        """Within this, the strategy loads weights and counters, and no state of optimizers."""
        strategy: Any = self._strategy
        if isinstance(strategy, DeepSpeedStrategy):
            about = sharded_state.open_checkpoint(folder / _name(0)).manifest.extra
            alike = about["processes"] == self._processes  # then DeepSpeed can load all that it has saved
            with contextlib.nullcontext() if alike else of_another_world(strategy.deepspeed_engine):
                yield
            return
        optimizers, strategy._optimizers = strategy._optimizers, []
        try:
            yield
        finally:
            strategy._optimizers = optimizers


def _around(original: Callable[..., Any], replacement: Callable[..., Any]) -> Callable[..., Any]:
    """A method that calls the replacement with the original in front."""

    @wraps(original)
    def call(*args: Any, **kwargs: Any) -> Any:
        return replacement(original, *args, **kwargs)

    return call


def _inside(path: Path) -> Path:
    """The folder in which state of a checkpoint lies: itself, or one beside a file."""
    if path.is_symlink() and not _beside(path).is_dir():  # ModelCheckpoint links its last one
        path = path.resolve()
    return path if path.is_dir() else _beside(path)


def _beside(path: Path) -> Path:
    return path.with_name(f"{path.name}.optimizer")


def _name(index: int | str) -> str:
    return f"hina_optimizer_{index}"
