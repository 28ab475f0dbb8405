"""What FSDP1 makes of the parameters: which elements of which lie where in its flat shards.

FSDP1 lays the parameters of a unit end to end and gives each rank one slice, cut anywhere. With
``use_orig_params=True`` the optimizer still sees the parameters, each shrunk to the vector of its elements that are
here; without, it sees one vector a unit.
"""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel

from hina_optim.engine.fragments import Fragment
from hina_optim.engine.layout import Shard
from hina_optim.engine.optimizer import HinaOptimizer
from hina_optim.state.names import plain_name

__all__ = ["fragments", "has_units", "process_group"]

#: One parameter: its name, its shard, where in the flat shard it begins.
Piece = tuple[str, Shard, int]


def has_units(model: Any) -> bool:
    """Whether a model is, or contains, modules that FSDP1 has wrapped."""
    return isinstance(model, nn.Module) and bool(_units(model))


def fragments(model: nn.Module, optimizer: HinaOptimizer) -> list[Fragment]:
    """Where every parameter of the optimizer lies on this rank.

    Args:
        model: Wrapped by FSDP1, or with parts that are.
        optimizer: Built with the parameters of the wrapped model.

    Returns:
        A fragment, maybe empty, for each parameter, in the order of the optimizer's groups.

    Raises:
        RuntimeError: The optimizer was not built from this model, or its elements do not lie in their order.
    """
    order = {module: at for at, module in enumerate(model.modules())}
    originals: dict[Tensor, Piece] = {}
    flats: dict[Tensor, list[Piece]] = {}
    places: dict[str, int] = {}
    for prefix, unit in _units(model):
        handle = unit._handle
        flat = handle.flat_param
        pieces = _pieces(prefix, flat)
        for i, (name, _, _) in enumerate(pieces):
            places[name] = (order[flat._param_infos[i].module] << 24) | i
        if handle._use_orig_params:
            originals |= {p: (name, shard, 0) for p, (name, shard, _) in zip(flat._params, pieces, strict=True)}
        else:
            flats[flat] = pieces
    found = []
    for g, group in enumerate(optimizer.param_groups):
        inside: list[tuple[Piece, Tensor]] = []
        for i, p in enumerate(group["params"]):
            if p not in originals and p not in flats:
                raise RuntimeError(
                    f"{type(optimizer).__name__}: parameter {i} of group {g}, of shape {tuple(p.shape)}, is in none of "
                    "the modules that FSDP1 wrapped. Build the optimizer from the parameters of the wrapped model, and "
                    "keep parameters that FSDP1 ignores in an optimizer of their own."
                )
            inside += [(piece, p) for piece in ([originals[p]] if p in originals else flats[p])]
        if any(p in flats for p in group["params"]):  # the order of the units is not that of the model
            inside.sort(key=lambda one: places[one[0][0]])
        found += [Fragment(n, (g << 24) | i, s, p, at) for i, ((n, s, at), p) in enumerate(inside)]
    return found


def process_group(model: nn.Module, optimizer: HinaOptimizer) -> dist.ProcessGroup:
    """The processes among which the optimizer's parameters are cut; this one alone where they are whole (``NO_SHARD``).

    Raises:
        RuntimeError: They are not cut alike.
    """
    mine = {p for group in optimizer.param_groups for p in group["params"]}
    handles = [unit._handle for _, unit in _units(model)]
    used = [h for h in handles if not mine.isdisjoint((h.flat_param, *(h.flat_param._params or ())))]
    cut = {h.process_group if h.uses_sharded_strategy else None for h in used}
    if len(cut) > 1:
        raise RuntimeError(
            f"{type(optimizer).__name__}: units of FSDP1 are cut among different processes, or some are not cut; give "
            "all units the same sharding_strategy and process_group, or one optimizer for each kind."
        )
    group: dist.ProcessGroup | None = cut.pop()
    return group or dist.new_group([dist.get_rank()], use_local_synchronization=True)


def _units(model: nn.Module) -> list[tuple[str, Any]]:
    """The wrapped modules that have parameters of their own, with their names."""
    return [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, FullyShardedDataParallel) and getattr(module, "_handle", None) is not None
    ]


def _pieces(prefix: str, flat: Any) -> list[Piece]:
    """What this rank has of every parameter of a unit."""
    pieces = []
    for i, (fqn, shape, info) in enumerate(zip(flat._fqns, flat._shapes, flat._shard_param_infos, strict=True)):
        name = plain_name(f"{prefix}.{fqn}" if prefix else fqn)
        if flat._param_extensions[i] is not None:
            raise RuntimeError(f"{name} is a DTensor inside FSDP1: for tensor parallelism use FSDP2 (fully_shard).")
        if not flat._contiguities[i]:
            raise RuntimeError(
                f"{name} is laid flat in the order of its memory, which is not that of its elements: make it "
                "contiguous before FSDP1 wraps it (no channels_last)."
            )
        begin, count = (info.intra_param_start_idx, info.numel_in_shard) if info.in_shard else (0, 0)
        offset = info.offset_in_shard if info.in_shard else 0
        pieces.append((name, Shard(tuple(shape), begin, begin + count), offset))
    return pieces
