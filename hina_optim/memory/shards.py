"""Which part of every parameter one rank holds, under each kind of sharding; shapes only."""

from __future__ import annotations

from collections.abc import Sequence

import torch

__all__ = ["local_numel", "local_shapes"]

Shape = tuple[int, ...]


def local_shapes(
    shapes: Sequence[Shape], groups: Sequence[int], sharding: str, world_size: int, rank: int
) -> list[Shape]:
    """Shapes as one rank's optimizer sees them.

    Args:
        shapes: Of all trained parameters, in order.
        groups: The group of each.
        sharding: ``none`` and ``ddp``: whole. ``fsdp``: dimension 0 in pieces of ``ceil(rows / ranks)``, the last ones
            smaller or empty. ``zero3``: flat pieces of ``ceil(elements / ranks)``. ``zero1``, ``zero2``: each group
            laid end to end, padded to a multiple of twice the ranks, and cut evenly.
        world_size: Number of ranks.
        rank: Which of them.
    """
    if sharding in ("none", "ddp"):
        return list(shapes)
    if sharding in ("zero1", "zero2"):
        return _flat_partition(shapes, groups, world_size, rank)
    return [_piece(shape, sharding, world_size, rank) for shape in shapes]


def local_numel(shape: Shape, sharding: str, world_size: int, rank: int) -> int:
    """Elements of one parameter's weights on a rank, for forward and backward."""
    if sharding in ("fsdp", "zero3"):
        return _numel(_piece(shape, sharding, world_size, rank))
    return _numel(shape)


def _piece(shape: Shape, sharding: str, world_size: int, rank: int) -> Shape:
    if sharding == "zero3" or not shape:  # a single number lies on the first rank
        return (_share(_numel(shape), world_size, rank),) if shape else ((1,) if rank == 0 else (0,))
    return (_share(shape[0], world_size, rank), *shape[1:])


def _share(count: int, world_size: int, rank: int) -> int:
    each = -(-count // world_size)
    return min(each, max(0, count - rank * each))


def _flat_partition(shapes: Sequence[Shape], groups: Sequence[int], world_size: int, rank: int) -> list[Shape]:
    totals: dict[int, int] = {}
    for shape, group in zip(shapes, groups, strict=True):
        totals[group] = totals.get(group, 0) + _numel(shape)
    align = 2 * world_size
    each = {group: -(-total // align) * 2 for group, total in totals.items()}
    at = dict.fromkeys(totals, 0)
    found: list[Shape] = []
    for shape, group in zip(shapes, groups, strict=True):
        begin, end = at[group], at[group] + _numel(shape)
        at[group] = end
        first, last = rank * each[group], (rank + 1) * each[group]
        found.append((max(0, min(end, last) - max(begin, first)),))
    return found


def _numel(shape: Shape) -> int:
    return int(torch.Size(shape).numel())
