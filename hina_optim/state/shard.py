"""Which elements of a parameter are here: a range of them, or a box."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Shape", "Shard", "columns_of"]

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Shard:
    """The part of a parameter that is here: a contiguous range of its flat elements, or a box that is none.

    Rows of a matrix, a flat partition, or all of a parameter are ranges. Some columns of some rows are a box.

    Attributes:
        shape: Shape of the complete (global) parameter.
        start: Global flat index of the first element that is here.
        stop: One past the last of a range; equal to ``start`` for an empty shard. Of a box, one past its last element.
        offset: Where a box that is no range begins, in every dimension; None for a range.
        size: How long it is in every dimension; None for a range.
    """

    shape: Shape
    start: int
    stop: int
    offset: Shape | None = None
    size: Shape | None = None

    @classmethod
    def complete(cls, shape: Shape) -> Shard:
        """All of a parameter."""
        return cls(shape, 0, _numel(shape))

    @classmethod
    def box(cls, shape: Shape, offset: Shape, size: Shape) -> Shard:
        """A box; a range if it consists of whole rows (of the matrix view), or lies in a vector."""
        if not _numel(size):
            return cls(shape, 0, 0)
        start = _flat(offset, shape)
        if size[1:] == shape[1:]:
            return cls(shape, start, start + _numel(size))
        last = tuple(o + n - 1 for o, n in zip(offset, size, strict=True))
        return cls(shape, start, _flat(last, shape) + 1, offset, size)

    @property
    def numel(self) -> int:
        """Number of elements here."""
        return self.stop - self.start if self.size is None else _numel(self.size)

    @property
    def is_complete(self) -> bool:
        """Whether no element lies elsewhere."""
        return self.size is None and self.numel == _numel(self.shape)

    @property
    def slices(self) -> tuple[slice, ...] | None:
        """What to index the complete parameter with to get a box; None for a range."""
        if self.offset is None or self.size is None:
            return None
        return tuple(slice(o, o + n) for o, n in zip(self.offset, self.size, strict=True))

    def boxes(self) -> Iterator[tuple[Shape, Shape]]:
        """``(offset, size)`` of boxes that make up the shard, in the order of its elements.

        A box is one; a range of a matrix is up to three: the end of a row, whole rows, the beginning of a row.
        """
        if self.offset is not None and self.size is not None:
            yield self.offset, self.size
        elif self.numel:
            yield from _boxes(self.shape, self.start, self.stop)

    def index(self, device: torch.device, begin: int = 0, end: int | None = None) -> Tensor:
        """Global flat indices, int64, of the local elements ``begin … end-1``."""
        end = self.numel if end is None else end
        if self.offset is None or self.size is None:
            return torch.arange(self.start + begin, self.start + end, device=device)
        stride = 1
        found = torch.zeros((), dtype=torch.int64, device=device)
        for o, n, length in zip(reversed(self.offset), reversed(self.size), reversed(self.shape), strict=True):
            axis = torch.arange(o, o + n, device=device) * stride
            found = axis.reshape(n, *([1] * found.ndim)) + found
            stride *= length
        return found.reshape(-1)[begin:end]


def columns_of(shape: Shape) -> int:
    """Elements of a row of the matrix view (first dimension × all others); a vector is one row."""
    return _numel(shape[1:] if len(shape) > 1 else shape)


def _numel(shape: Sequence[int]) -> int:
    return int(torch.Size(shape).numel())


def _flat(at: Shape, shape: Shape) -> int:
    index = 0
    for i, n in zip(at, shape, strict=True):
        index = index * n + i
    return index


def _boxes(shape: Shape, start: int, stop: int) -> Iterator[tuple[Shape, Shape]]:
    """Boxes of a flat range of a tensor of this shape, in order."""
    if not shape:
        yield (), ()
        return
    row = _numel(shape[1:])
    first, last = -(-start // row), stop // row  # whole rows

    def inside(index: int, a: int, b: int) -> Iterator[tuple[Shape, Shape]]:
        for offset, size in _boxes(shape[1:], a, b):
            yield (index, *offset), (1, *size)

    if first > last:  # within one row
        yield from inside(last, start - last * row, stop - last * row)
        return
    if start < first * row:
        yield from inside(first - 1, start - (first - 1) * row, row)
    if first < last:
        yield (first, *([0] * (len(shape) - 1))), (last - first, *shape[1:])
    if last * row < stop:
        yield from inside(last, 0, stop - last * row)
