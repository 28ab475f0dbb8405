"""What DeepSpeed's ZeRO makes of the parameters: which elements of which lie where in its flat partitions.

ZeRO replaces the parameters of every group by vectors. Stages 1 and 2 lay a group end to end and give each rank one
slice, cut anywhere. Stage 3 cuts every parameter into equal ranges (the last padded) and lays those of a rank end to
end, one vector a sub-group. All of them are padded. Which elements a rank has is read from the addresses of the
parameters (stages 1 and 2) and from ZeRO's own table of gradients (stage 3).
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import torch.distributed as dist
from torch import Tensor

from hina_lightning.sharding.places import places_of
from hina_optim.engine.fragments import Fragment
from hina_optim.engine.layout import Shard
from hina_optim.engine.optimizer import HinaOptimizer
from hina_optim.state.names import plain_name

__all__ = ["begin_copies", "check_supported", "engine_of", "fragments", "is_partitioned", "process_group", "zero_of"]

#: One parameter: itself, the vector of this rank, where in it, how many elements, the first one's index, the shape.
Piece = tuple[Tensor, Tensor, int, int, int, tuple[int, ...]]


def engine_of(model: Any) -> Any:
    """The DeepSpeedEngine that a model is, or is wrapped around; None if there is none."""
    deepspeed = sys.modules.get("deepspeed")
    if deepspeed is None:  # where it was never imported there is no engine
        return None
    for thing in (model, getattr(model, "_forward_module", None)):  # Fabric holds the engine as its forward module
        if isinstance(thing, deepspeed.DeepSpeedEngine):
            return thing
    return None


def zero_of(optimizer: Any) -> Any:
    """DeepSpeed's optimizer among an optimizer and what it wraps; None if there is none."""
    if "deepspeed" not in sys.modules:
        return None
    from deepspeed.runtime.base_optimizer import DeepSpeedOptimizer

    while optimizer is not None and not isinstance(optimizer, DeepSpeedOptimizer):
        optimizer = getattr(optimizer, "optimizer", None)
    return optimizer


def is_partitioned(zero: Any) -> bool:
    """Whether this optimizer of DeepSpeed's has laid parameters flat: ZeRO-1, 2 and 3 do, stage 0 does not."""
    flats = ("single_partition_of_fp32_groups", "fp32_groups_flat_partition", "fp32_partitioned_groups_flat")
    return any(hasattr(zero, name) for name in flats)


def check_supported(zero: Any, engine: Any) -> None:
    """Check that what ZeRO is told to do can be followed.

    Args:
        zero: DeepSpeed's optimizer.
        engine: The engine that has it, or None where it is not known.

    Raises:
        RuntimeError: It cannot; says which option to change.
    """
    kind = type(zero).__name__
    if getattr(zero, "has_moe_layers", False):
        raise RuntimeError(f"{kind}: layers of experts have process groups of their own, which is not supported.")
    mpu, parallel = getattr(zero, "mpu", None), getattr(zero, "model_parallel_group", None)
    if mpu is not None and not hasattr(mpu, "initialize_sequence_parallel"):
        parallel = mpu.get_model_parallel_group()
    if parallel is not None and dist.get_world_size(parallel) > 1:
        raise RuntimeError(
            f"{kind}: with tensor parallelism ZeRO's parameters are pieces of the model's, and it does not know which: "
            "use ZeRO without it, or FSDP2 with tensor parallelism."
        )
    if getattr(zero, "zenflow", False):
        raise RuntimeError(f"{kind}: ZenFlow steps an optimizer of its own: remove 'zenflow' from zero_optimization.")
    if getattr(zero, "swap_optimizer", False):
        raise RuntimeError(
            f"{kind}: offload_optimizer with device 'nvme' moves DeepSpeed's own kinds of state to files, not those of "
            'this optimizer: use {"device": "cpu"}.'
        )
    if getattr(zero, "elastic_checkpoint", False):
        raise RuntimeError(
            f"{kind}: elastic_checkpoint saves no state but that of DeepSpeed's own optimizers: remove it from "
            "zero_optimization. hina_lightning.sharded_state saves checkpoints that load in any world size."
        )
    if engine is not None and engine.load_universal_checkpoint():
        raise RuntimeError(
            f"{kind}: universal checkpoints hold no state but Adam's: remove checkpoint.load_universal from the "
            "configuration. hina_lightning.sharded_state saves checkpoints that load in any world size."
        )


def begin_copies(zero: Any, engine: Any, optimizer: HinaOptimizer) -> None:
    """Make stage 0 of bf16 and fp16 training, which replaces every parameter by a float32 copy, begin as it should.

    DeepSpeed's ``FP16_UnfusedOptimizer`` takes a step when it is made, with gradients of zero but the learning rate as
    it is: weights decay, and everything that counts steps begins at 1. That step is undone.

    Raises:
        RuntimeError: It left parameters out, so that the others have lost their places; or the engine is not known.
    """
    for g, group in enumerate(optimizer.param_groups):
        names = optimizer._names[g]
        if names is not None and len(names) != len(group["params"]):
            raise RuntimeError(
                f"{type(zero).__name__}: group {g} of {type(optimizer).__name__} was built with {len(names)} "
                f"parameters and has {len(group['params'])}: DeepSpeed leaves out what is frozen or has no elements. "
                "Leave those out of the optimizer."
            )
    if not optimizer.state or not hasattr(zero, "fp32_groups"):
        return
    if engine is None:
        raise RuntimeError(f"{type(zero).__name__}: pass the DeepSpeedEngine as the model, not what is in it.")
    if engine.global_steps == 0:
        optimizer._buckets.clear()
        optimizer.state.clear()
        for copies, params in zip(zero.fp32_groups, zero.fp16_groups, strict=True):
            for copy, p in zip(copies, params, strict=True):
                copy.data.copy_(p.data)


def process_group(zero: Any) -> dist.ProcessGroup:
    """The processes among which parameters are cut.

    Raises:
        RuntimeError: They are not the same for all groups.
    """
    groups = set(_groups(zero))
    if len(groups) > 1:
        raise RuntimeError(f"{type(zero).__name__}: groups are partitioned among different processes; not supported.")
    return groups.pop()


def fragments(zero: Any, optimizer: HinaOptimizer) -> list[Fragment]:
    """Where every parameter that ZeRO trains lies on this rank.

    Args:
        zero: DeepSpeed's optimizer, of stage 1, 2 or 3 (also ``BF16_Optimizer``).
        optimizer: The one in it, built with the parameters of the model.

    Returns:
        A fragment, maybe empty, for each parameter, in the order of the optimizer's groups.

    Raises:
        RuntimeError: Something is not where ZeRO should have put it.
    """
    pieces = _stage3(zero) if hasattr(zero, "fp32_partitioned_groups_flat") else _stages_1_and_2(zero)
    found = []
    for g, members in pieces.items():
        names = [_name(zero, piece[0], g) for piece in members]
        places = places_of(optimizer, g, names, [piece[5] for piece in members])
        for name, place, (_, holder, offset, count, start, shape) in zip(names, places, members, strict=True):
            first, at = (start, offset) if count else (0, 0)
            found.append(Fragment(name, (g << 24) | place, Shard(shape, first, first + count), holder, at))
    return sorted(found, key=lambda fragment: fragment.position)


def _groups(zero: Any) -> list[dist.ProcessGroup]:
    """The processes of each vector."""
    if not hasattr(zero, "fp32_partitioned_groups_flat"):
        return list(zero.real_dp_process_group)
    return list(getattr(zero, "sub_group_process_groups", None) or [zero.dp_process_group] * len(zero.fp16_groups))


def _stages_1_and_2(zero: Any) -> dict[int, list[Piece]]:
    bf16 = hasattr(zero, "fp32_groups_flat_partition")
    members: Sequence[Sequence[Tensor]] = zero.bf16_groups if bf16 else zero.bit16_groups
    flats: Sequence[Tensor] = zero.bf16_groups_flat if bf16 else zero.bit16_groups_flat
    holders: Sequence[Tensor] = zero.fp32_groups_flat_partition if bf16 else zero.single_partition_of_fp32_groups
    pieces: dict[int, list[Piece]] = {}
    for g, (group, flat, holder) in enumerate(zip(_groups(zero), flats, holders, strict=True)):
        size = flat.numel() // dist.get_world_size(group)
        if holder.numel() != size:
            raise RuntimeError(f"{type(zero).__name__}: partition {g} has {holder.numel()} elements, not {size}.")
        begin = dist.get_rank(group) * size
        pieces[g] = [(p, holder, *_overlap(zero, p, flat, begin, size), tuple(p.shape)) for p in members[g]]
    return pieces


def _overlap(zero: Any, param: Tensor, flat: Tensor, begin: int, size: int) -> tuple[int, int, int]:
    """Offset in a partition, count, and first element of what it has of a parameter.

    From where the parameter is in memory: ZeRO's own table is wrong with ``round_robin_gradients``.
    """
    at, rest = divmod(param.data_ptr() - flat.data_ptr(), flat.element_size())
    if rest or at < 0 or at + param.numel() > flat.numel() or not param.is_contiguous():
        raise RuntimeError(
            f"{type(zero).__name__}: a parameter of shape {tuple(param.shape)} is not in ZeRO's flat tensor; bind the "
            "optimizer while nothing is offloaded (engine.reload_states()) and the parameters are not replaced."
        )
    start, stop = max(at, begin), min(at + param.numel(), begin + size)
    return start - begin, max(stop - start, 0), start - at


def _stage3(zero: Any) -> dict[int, list[Piece]]:
    pieces: dict[int, list[Piece]] = {}
    holders: Sequence[Tensor] = zero.fp32_partitioned_groups_flat
    for s, (group, members, holder) in enumerate(zip(_groups(zero), zero.fp16_groups, holders, strict=True)):
        g = zero.sub_group_to_group_id[s]
        for p in members:
            sub_group, offset, numel = zero.grad_position[zero.get_param_id(p)]
            if sub_group != s or offset + numel > holder.numel():
                raise RuntimeError(
                    f"{type(zero).__name__}: sub-group {s} has {holder.numel()} elements, and a parameter of it is at "
                    f"{offset} of sub-group {sub_group}; bind the optimizer while nothing is offloaded."
                )
            start = min(dist.get_rank(group) * numel, p.ds_numel)
            here = min(numel, p.ds_numel - start)
            pieces.setdefault(g, []).append((p, holder, offset, here, start, tuple(p.ds_shape)))
    return pieces


def _name(zero: Any, param: Tensor, group: int) -> str:
    known: dict[Tensor, str] = zero.param_names
    name = known.get(param)
    if name is None:
        raise RuntimeError(
            f"{type(zero).__name__}: a parameter of shape {tuple(getattr(param, 'ds_shape', param.shape))} in group "
            f"{group} is not one of the model's: build the optimizer from the model that deepspeed.initialize gets."
        )
    return plain_name(name)
