"""Which part of every parameter one rank holds, under each kind of sharding; shapes only."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

__all__ = ["Local", "local_numel", "local_parts", "local_shapes"]

Shape = tuple[int, ...]


class Local(NamedTuple):
    """What one rank's optimizer sees of a parameter: a shape, and the flat index of its first element."""

    shape: Shape
    start: int


def local_shapes(
    shapes: Sequence[Shape], groups: Sequence[int], sharding: str, world_size: int, rank: int
) -> list[Shape]:
    """The shapes of :func:`local_parts`."""
    return [one.shape for one in local_parts(shapes, groups, sharding, world_size, rank)]


def local_parts(
    shapes: Sequence[Shape], groups: Sequence[int], sharding: str, world_size: int, rank: int
) -> list[Local]:
    """Parameters as one rank's optimizer sees them.

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
        return [Local(shape, 0) for shape in shapes]
    if sharding in ("zero1", "zero2"):
        return _flat_partition(shapes, groups, world_size, rank)
    return [_piece(shape, sharding, world_size, rank) for shape in shapes]


def local_numel(shape: Shape, sharding: str, world_size: int, rank: int) -> int:
    """Elements of one parameter's weights on a rank, for forward and backward."""
    if sharding in ("fsdp", "zero3"):
        return _numel(_piece(shape, sharding, world_size, rank).shape)
    return _numel(shape)


def _piece(shape: Shape, sharding: str, world_size: int, rank: int) -> Local:
    if not shape:  # a single number lies on the first rank
        return Local((1,) if rank == 0 else (0,), 0)
    if sharding == "zero3":
        begin, count = _share(_numel(shape), world_size, rank)
        return Local((count,), begin)
    begin, count = _share(shape[0], world_size, rank)
    return Local((count, *shape[1:]), begin * _numel(shape[1:]))


def _share(count: int, world_size: int, rank: int) -> tuple[int, int]:
    """Where a rank's share begins, and how much it is."""
    each = -(-count // world_size)
    begin = min(rank * each, count)
    return begin, min(each, count - begin)


def _flat_partition(shapes: Sequence[Shape], groups: Sequence[int], world_size: int, rank: int) -> list[Local]:
    totals: dict[int, int] = {}
    for shape, group in zip(shapes, groups, strict=True):
        totals[group] = totals.get(group, 0) + _numel(shape)
    align = 2 * world_size
    each = {group: -(-total // align) * 2 for group, total in totals.items()}
    at = dict.fromkeys(totals, 0)
    found: list[Local] = []
    for shape, group in zip(shapes, groups, strict=True):
        begin, end = at[group], at[group] + _numel(shape)
        at[group] = end
        first, last = rank * each[group], (rank + 1) * each[group]
        start, stop = max(begin, first), min(end, last)
        found.append(Local((max(0, stop - start),), start - begin if start < stop else 0))
    return found


def _numel(shape: Shape) -> int:
    return int(torch.Size(shape).numel())
