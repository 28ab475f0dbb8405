"""``accelerator.save_state`` and ``load_state`` with optimizer state that fits any engine and number of processes."""

from __future__ import annotations

import contextlib
import functools
import logging
import weakref
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

from accelerate import Accelerator
from accelerate.utils import DistributedType

from hina_lightning import sharded_state
from hina_lightning.sharding.zero_weights import of_another_world
from hina_optim.engine.optimizer import HinaOptimizer
from hina_optim.unwrapping import unwrap_optimizer

__all__ = ["Checkpoints"]

_log = logging.getLogger(__name__)


class Checkpoints:
    """The optimizers of one accelerator whose state is saved and loaded by us.

    accelerate would save the state of one process, hand it to FSDP1, which refuses state that is not shaped as a
    parameter, to torch's distributed checkpoint, or to DeepSpeed, which loads it in the same number of processes only.
    While it saves and loads, our optimizers are hidden from it; what DeepSpeed saves by itself stays, since it has the
    weights in it.

    Attributes:
        optimizers: In the order in which they were prepared; their state lies in ``hina_optimizer_<i>/``.
        extras: What else is kept, by name: things with ``state_dict()`` and ``load_state_dict()`` of plain values.
    """

    _all: ClassVar[weakref.WeakKeyDictionary[Accelerator, Checkpoints]] = weakref.WeakKeyDictionary()

    @classmethod
    def of(cls, accelerator: Accelerator) -> Checkpoints:
        """Those of an accelerator, made at the first call."""
        if accelerator not in cls._all:
            cls._all[accelerator] = cls(accelerator)
        return cls._all[accelerator]

    def __init__(self, accelerator: Accelerator) -> None:
        self.optimizers: list[HinaOptimizer] = []
        self.extras: dict[str, Any] = {}
        self._accelerator = weakref.ref(accelerator)
        accelerator.register_save_state_pre_hook(lambda models, weights, folder: self._save(Path(folder)))
        accelerator.register_load_state_pre_hook(lambda models, folder: self._load(Path(folder)))
        save_state, load_state = accelerator.save_state, accelerator.load_state

        @functools.wraps(save_state)
        def save(*args: Any, **kwargs: Any) -> Any:
            with self._hidden():
                return save_state(*args, **kwargs)

        @functools.wraps(load_state)
        def load(input_dir: str | None = None, *args: Any, **kwargs: Any) -> Any:
            found = self._latest() if input_dir is None else Path(input_dir).expanduser()
            if not self.optimizers:
                return load_state(input_dir, *args, **kwargs)
            if found is None or not (found / _folder(0)).is_dir():
                _log.warning("%s has no %s/: accelerate loads what it has saved by itself.", found, _folder(0))
                return load_state(input_dir, *args, **kwargs)
            self._check(found)  # before weights are loaded
            with contextlib.ExitStack() as stack:
                stack.enter_context(self._hidden())
                if self._owner.distributed_type is DistributedType.DEEPSPEED and not self._saved_alike(found):
                    for engine in self._owner._models:
                        stack.enter_context(of_another_world(engine))
                return load_state(input_dir, *args, **kwargs)

        accelerator.save_state, accelerator.load_state = save, load

    def add(self, optimizers: Sequence[HinaOptimizer]) -> None:
        """Keep the state of more optimizers."""
        self.optimizers += [one for one in optimizers if not any(one is known for known in self.optimizers)]

    # -- hooks: accelerate calls them on all ranks, with the folder that it has chosen ---------------------------------

    def _save(self, folder: Path) -> None:
        extras = {name: extra.state_dict() for name, extra in self.extras.items()}
        about = {**self._world(), "extras": extras}
        for index, optimizer in enumerate(self.optimizers):
            sharded_state.save(folder / _folder(index), optimizer, extra=about)

    def _load(self, folder: Path) -> None:
        if not (folder / _folder(0)).is_dir():
            return
        for index, optimizer in enumerate(self.optimizers):
            # how it is stored may have changed in the course of the training (memory guard): that goes on
            about = sharded_state.load(folder / _folder(index), optimizer, storage="checkpoint")
        for name, state in about["extras"].items():
            if name in self.extras:
                self.extras[name].load_state_dict(state)
            else:
                _log.warning("%s holds the state of %r, which this training does without.", folder, name)

    # -- helpers -------------------------------------------------------------------------------------------------------

    @property
    def _owner(self) -> Accelerator:
        accelerator = self._accelerator()
        assert accelerator is not None, "hooks belong to their accelerator"
        return accelerator

    def _world(self) -> dict[str, Any]:
        """Engine and number of processes."""
        return {"engine": self._owner.distributed_type.value, "processes": self._owner.num_processes}

    def _check(self, folder: Path) -> None:
        """Refuse a checkpoint that is not complete, or not of these optimizers."""
        saved = len(list(folder.glob(_folder("*"))))
        if saved != len(self.optimizers):
            raise RuntimeError(
                f"{folder} holds the state of {saved} optimizers, {len(self.optimizers)} were prepared: prepare those "
                "that were saved, in the same order."
            )
        for index in range(saved):
            sharded_state.open_checkpoint(folder / _folder(index)).check_files()

    @contextlib.contextmanager
    def _hidden(self) -> Iterator[None]:
        """Within this, accelerate knows the optimizers of others only."""
        accelerator = self._owner
        known = accelerator._optimizers
        others = [one for one in known if not any(unwrap_optimizer(one) is ours for ours in self.optimizers)]
        if others and len(others) < len(known) and accelerator.distributed_type is DistributedType.FSDP:
            raise RuntimeError(
                "Under FSDP accelerate saves its optimizers by the place of their models, so one accelerator cannot "
                "hold optimizers of hina_optim beside others: prepare them with an Accelerator each."
            )
        accelerator._optimizers = others
        try:
            yield
        finally:
            accelerator._optimizers = known

    def _latest(self) -> Path | None:
        """The checkpoint that accelerate takes where none is named: the last of those that it numbered."""
        configuration = self._owner.project_configuration
        if not configuration.automatic_checkpoint_naming:
            return None
        numbered = Path(str(self._owner.project_dir), "checkpoints").glob("checkpoint_*")
        return max(numbered, key=lambda path: int(path.name.rpartition("_")[2]), default=None)

    def _saved_alike(self, folder: Path) -> bool:
        """Whether as many DeepSpeed processes saved: only then can it load what it has saved of each of them."""
        about = sharded_state.open_checkpoint(folder / _folder(0)).manifest.extra
        return {name: about[name] for name in ("engine", "processes")} == self._world()


def _folder(index: int | str) -> str:
    return f"hina_optimizer_{index}"
