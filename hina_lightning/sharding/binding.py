"""Telling an optimizer where an engine has put its parameters."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch.distributed as dist

from hina_lightning.sharding import deepspeed, fsdp1
from hina_optim.engine.fragments import FlatLayout, Fragment
from hina_optim.engine.optimizer import HinaOptimizer
from hina_optim.unwrapping import unwrap_optimizer

__all__ = ["bind"]


def bind(optimizer: Any, model: Any) -> None:
    """Let an optimizer step the parameters of a model that FSDP1 or DeepSpeed has laid flat.

    To be called by all ranks, after the engine was made and before the first step or the loading of a checkpoint.
    Calling it again changes nothing. It also does nothing where there is nothing to do: one process, DDP, FSDP2, tensor
    parallelism, stage 0.

    Args:
        optimizer: The optimizer, in any wrappers that Lightning, accelerate or DeepSpeed put around it.
        model: What the engine returned: a ``DeepSpeedEngine``, a module that FSDP1 wrapped, or one with such modules in
            it; anything else is not sharded in this way.

    Raises:
        TypeError: The optimizer is not one of this package.
        RuntimeError: DeepSpeed's engine steps another optimizer, or the optimizer has state already, or its parameters
            are not where the engine should have put them. The message says which, and what to do. Nothing has changed.

    Example:
        >>> import torch
        >>> from hina_optim import HinaAdaptive
        >>> model = torch.nn.Linear(3, 2)
        >>> optimizer = HinaAdaptive(model.parameters())
        >>> bind(optimizer, model)  # one process: nothing to do; with DeepSpeed: bind(optimizer, engine)
    """
    engine = deepspeed.engine_of(model)
    inner = _unwrapped(optimizer, engine)
    zero = deepspeed.zero_of(optimizer) or deepspeed.zero_of(getattr(engine, "optimizer", None))
    if zero is not None:
        if deepspeed.is_partitioned(zero):
            deepspeed.check_supported(zero, engine)
            _install(inner, lambda: deepspeed.fragments(zero, inner), lambda: deepspeed.process_group(zero))
        else:
            deepspeed.begin_copies(zero, engine, inner)
    elif fsdp1.has_units(model):
        # replicas of hybrid sharding step together
        together = dist.group.WORLD
        _install(inner, lambda: fsdp1.fragments(model, inner), lambda: fsdp1.process_group(model, inner), together)


def _unwrapped(optimizer: Any, engine: Any) -> HinaOptimizer:
    """The optimizer itself, if it is one of ours and the engine's."""
    inner: Any = unwrap_optimizer(optimizer)
    stepped = unwrap_optimizer(engine.optimizer) if engine is not None and engine.optimizer is not None else inner
    for one in (inner, stepped):
        if type(one).__module__.startswith("deepspeed.ops"):
            raise RuntimeError(
                f"bind: the optimizer was replaced by {type(one).__name__}: accelerate does so where the DeepSpeed "
                'configuration offloads the optimizer. Set "zero_force_ds_cpu_optimizer": false in it (at its top '
                'level, beside "zero_optimization"), and the optimizer that you built is kept.'
            )
    if stepped is not inner:
        raise RuntimeError(
            f"bind: the engine steps a {type(stepped).__name__}, not this {type(inner).__name__}: pass the optimizer "
            "that was given to deepspeed.initialize (or to prepare), or what that returned."
        )
    if not isinstance(inner, HinaOptimizer):
        raise TypeError(f"bind: {type(inner).__name__} is not an optimizer of hina_optim; it needs no binding.")
    return inner


def _install(
    optimizer: HinaOptimizer,
    find: Callable[[], list[Fragment]],
    group: Callable[[], dist.ProcessGroup],
    together: dist.ProcessGroup | None = None,
) -> None:
    """Find the fragments and give them to the optimizer, on all ranks or on none."""
    owner = type(optimizer).__name__
    found: list[Fragment] = []
    problem = None
    new = True
    try:
        found = find()
        new = not _same(optimizer, found)
        if new and any(optimizer.state.values()):
            problem = (
                f"{owner} has state already, of another layout. Bind it after the engine is made and before its first "
                "step and before load_checkpoint() or load_state_dict()."
            )
    except RuntimeError as error:
        problem = str(error)
    everyone: list[tuple[str | None, bool]] = [(None, False)] * dist.get_world_size()
    dist.all_gather_object(everyone, (problem, new))
    wrong = next(((rank, text) for rank, (text, _) in enumerate(everyone) if text is not None), None)
    if wrong is not None:
        raise RuntimeError(problem or f"{wrong[1]} (on rank {wrong[0]})")
    if any(different for _, different in everyone):
        optimizer.bind_layout(FlatLayout(group(), found, together))


def _same(optimizer: HinaOptimizer, found: Sequence[Fragment]) -> bool:
    """Whether the optimizer knows these fragments already."""
    now = optimizer._layout
    if not isinstance(now, FlatLayout):
        return False

    def facts(fragments: Sequence[Fragment]) -> list[tuple[Any, ...]]:
        return sorted((f.position, f.name, f.shard.start, f.shard.stop, id(f.holder), f.offset) for f in fragments)

    return facts(list(now.fragments.values())) == facts(found)
