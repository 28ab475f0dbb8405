"""``prepare``: what ``accelerator.prepare`` does, then checked, bound, and with checkpoints that fit any engine."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import nn
from torch.optim import Optimizer

from hina_lightning.accelerate import checks
from hina_lightning.accelerate.checkpoints import Checkpoints
from hina_lightning.groups import clean_name
from hina_lightning.sharding import bind
from hina_optim.engine.optimizer import HinaOptimizer
from hina_optim.unwrapping import unwrap_optimizer

__all__ = ["prepare"]


def prepare(accelerator: Accelerator, *objects: Any, device_placement: Sequence[bool] | None = None) -> tuple[Any, ...]:
    """Prepare model, optimizer, loaders and schedulers, in any order, as ``accelerator.prepare`` does.

    Beside that, whatever the engine (one process, DDP, FSDP1, FSDP2, DeepSpeed):

    * What accelerate or DeepSpeed would do otherwise than asked, without a word, is refused or said: see *Raises* and
      *Warns*.
    * Afterwards it is checked that the optimizer that was passed in is the one that steps, and that it steps the
      parameters of the prepared model.
    * Under FSDP1 and ZeRO the optimizer learns where the elements of each parameter lie, so that the sharded training
      is the one of a single process.
    * From here on ``accelerator.save_state`` and ``load_state`` keep the state of optimizers of
      :mod:`hina_optim` in ``hina_optimizer_<i>/`` of the checkpoint, in the form that loads under any engine and number
      of processes, instead of where accelerate keeps its own. A checkpoint without such a folder is loaded by
      accelerate's means. Where a hand-made loop calls ``save_state`` it must do so on all ranks, as ever.

    Args:
        accelerator: As it was launched.
        *objects: One or more models, one or more optimizers, any number of loaders and schedulers. Give model and
            optimizer to the same call.
        device_placement: As for ``accelerator.prepare``: for each object whether it is moved.

    Returns:
        The prepared objects in the order in which they were given; always a tuple.

    Raises:
        ValueError: There is no model or no optimizer among the objects. DeepSpeed would replace the optimizer by its
            DeepSpeedCPUAdam.
        RuntimeError: Several processes were launched, but each of them trains by itself. FSDP or DeepSpeed was asked
            for, but is not used. The optimizer has state already and the engine replaces the parameters. Afterwards:
            the optimizer was replaced, or steps tensors that are no part of the model; DeepSpeed clips gradients at
            another norm than it was asked to.

    Warns:
        By :mod:`logging`: ``accelerate launch`` seems to have started one process where several were asked for;
        ``gradient_clipping: 0.0``, which accelerate drops, has been given to DeepSpeed after all; DeepSpeed clips
        gradients although nothing was said about it.

    Example:
        >>> import torch
        >>> from accelerate import Accelerator
        >>> from hina_optim import HinaAdaptive
        >>> model = torch.nn.Linear(3, 2)
        >>> optimizer = HinaAdaptive(model.named_parameters(), lr=1e-3)
        >>> model, prepared = prepare(Accelerator(cpu=True), model, optimizer)
        >>> unwrap_optimizer(prepared) is optimizer
        True
    """
    models = [thing for thing in objects if isinstance(thing, nn.Module)]
    given = [thing for thing in objects if isinstance(thing, Optimizer)]
    if not models or not given:
        raise ValueError(
            "hina_lightning.accelerate.prepare: give model and optimizer to the same call; got "
            f"{', '.join(type(thing).__name__ for thing in objects) or 'nothing'}."
        )
    checks.launch(accelerator)
    checks.untouched(accelerator, given)
    clipping = checks.deepspeed_config(accelerator)
    for one in given:
        _name_parameters(unwrap_optimizer(one), models)

    placement: Sequence[bool | None] | None = device_placement
    if device_placement is None and accelerator.distributed_type == DistributedType.FSDP:
        # to move state that there is not, accelerate would load an empty state dict: too early, the layout is not known
        placement = [False if isinstance(thing, HinaOptimizer) else None for thing in objects]
    results = tuple(accelerator.prepare(*objects, device_placement=placement))

    models = [thing for thing in results if isinstance(thing, nn.Module)]
    wrapped = [thing for thing in results if isinstance(thing, Optimizer)]
    checks.same_optimizers(given, wrapped)
    inner = [unwrap_optimizer(one) for one in wrapped]
    deepspeed = accelerator.distributed_type == DistributedType.DEEPSPEED
    if deepspeed:
        checks.deepspeed_clipping(models[0], clipping)
    else:
        for one in inner:
            checks.own_parameters(accelerator, one, models)
    ours = [one for one in inner if isinstance(one, HinaOptimizer)]
    for one in ours:
        bind(one, _model_of(one, models))
    Checkpoints.of(accelerator).add(ours)
    return results


def _name_parameters(optimizer: Optimizer, models: Sequence[nn.Module]) -> None:
    """Tell an optimizer that was built from bare parameters what they are called in the models.

    A checkpoint that fits any engine goes by names, and so do the roles of adapters.
    """
    if not isinstance(optimizer, HinaOptimizer):
        return
    names = {id(p): clean_name(name) for model in models for name, p in model.named_parameters()}
    for g, group in enumerate(optimizer.param_groups):
        found = [names[id(p)] for p in group["params"] if id(p) in names]
        if optimizer._names[g] is None and len(found) == len(group["params"]):
            optimizer._names[g] = found
            optimizer._buckets.identities.learn(g, found)


def _model_of(optimizer: Optimizer, models: Sequence[nn.Module]) -> nn.Module:
    """The model whose parameters an optimizer steps."""
    steps = {id(p) for group in optimizer.param_groups for p in group["params"]}
    return next((model for model in models if any(id(p) in steps for p in model.parameters())), models[0])
