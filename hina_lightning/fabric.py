"""Our optimizers in loops of Lightning Fabric: set up, bound, and with checkpoints that fit any strategy."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from lightning.fabric import Fabric
from lightning.fabric.strategies.fsdp import FSDPStrategy
from lightning.fabric.strategies.model_parallel import ModelParallelStrategy
from torch import nn
from torch.optim import Optimizer

from hina_lightning import sharded_state
from hina_lightning.sharding import bind
from hina_optim.engine.optimizer import HinaOptimizer
from hina_optim.unwrapping import unwrap_optimizer

__all__ = ["load_optimizer", "save_optimizer", "setup"]


#: Builds an optimizer from the parameters of a model.
Build = Callable[[nn.Module], Optimizer]


def setup(fabric: Fabric, model: nn.Module, *build: Build, **options: Any) -> tuple[Any, ...]:
    """Set up a model and its optimizers, as ``fabric.setup`` does, by the same lines with any strategy.

    ``FSDPStrategy`` and ``ModelParallelStrategy`` must have the model before an optimizer is built from it, and
    ``DeepSpeedStrategy`` both at once: so this function is told how to build. Afterwards optimizers of
    :mod:`hina_optim` know where FSDP1 and DeepSpeed have put the parameters. ``FSDPStrategy`` needs
    ``use_orig_params=True``.

    Args:
        fabric: Launched.
        model: Not set up.
        *build: For each optimizer a function that makes it from the parameters of the model.
        **options: As for ``fabric.setup`` or ``fabric.setup_module``.

    Returns:
        The model, then the optimizers, as Fabric wraps them.

    Raises:
        RuntimeError: An optimizer was replaced, or steps tensors that are no parameters of the model, or that lie in a
            way that cannot be followed.

    Example:
        >>> import torch
        >>> from hina_optim import HinaAdaptive
        >>> fabric = Fabric(accelerator="cpu", devices=1)
        >>> model = torch.nn.Linear(3, 2)
        >>> model, optimizer = setup(fabric, model, lambda model: HinaAdaptive(model.named_parameters(), lr=1e-3))
    """
    if isinstance(fabric.strategy, (FSDPStrategy, ModelParallelStrategy)):
        prepared = fabric.setup_module(model, **options)
        engine = prepared._forward_module
        built = [make(engine) for make in build]
        wrapped = [fabric.setup_optimizers(one) for one in built]
    else:
        built = [make(model) for make in build]
        prepared, *wrapped = fabric.setup(model, *built, **options)
        engine = prepared._forward_module
    for before, after in zip(built, wrapped, strict=True):
        inner = unwrap_optimizer(after)
        if inner is not before:
            raise RuntimeError(
                f"{type(before).__name__} was replaced by {type(inner).__name__}. Set `zero_force_ds_cpu_optimizer: "
                "false` in the configuration of DeepSpeed."
            )
        if isinstance(inner, HinaOptimizer):
            bind(after, engine)
            _check_parameters(inner, engine)
    return prepared, *wrapped


def save_optimizer(fabric: Fabric, path: str | Path, optimizer: Any, extra: Any = None) -> None:
    """Save an optimizer's state into a folder, to be loaded with any strategy and number of devices; on all ranks.

    Weights are Fabric's to save: ``fabric.save(path, {"model": model, …})`` without the optimizer.

    Args:
        fabric: That set it up.
        path: The folder; that of the first rank counts.
        optimizer: From :func:`setup`.
        extra: As for :func:`hina_lightning.sharded_state.save`.
    """
    sharded_state.save(fabric.broadcast(str(path)), optimizer, extra=extra)


def load_optimizer(fabric: Fabric, path: str | Path, optimizer: Any) -> Any:
    """Load what :func:`save_optimizer` has saved, stored as it was; on all ranks.

    Args:
        fabric: That set it up.
        path: The folder; that of the first rank counts.
        optimizer: From :func:`setup`.

    Returns:
        The ``extra`` that was saved.

    Raises:
        sharded_state.CheckpointError: It is missing, incomplete, damaged, or of another model or optimizer.
    """
    return sharded_state.load(fabric.broadcast(str(path)), optimizer, storage="checkpoint")


def _check_parameters(optimizer: HinaOptimizer, engine: nn.Module) -> None:
    """Refuse an optimizer whose parameters the engine has left behind."""
    if optimizer._layout.sharded or hasattr(engine, "optimizer"):  # where they were bound, that has been checked
        return
    own = {id(p) for p in engine.parameters()}
    every = [p for group in optimizer.param_groups for p in group["params"]]
    strangers = [name for name, p in zip(optimizer.param_names(), every, strict=True) if id(p) not in own]
    if strangers:
        raise RuntimeError(
            f"{type(optimizer).__name__} steps tensors that are no parameters of the model that was set up: "
            f"{', '.join(strangers[:5])}. Build it from the parameters of the model that the function is given."
        )
