"""From one way of storing to another, a piece at a time: the float32 values of a large tensor are never all there."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from hina_optim.state.precision import Codec, decoded
from hina_optim.state.ranges import codes_of, ends, span, within
from hina_optim.state.signs import SignCodec

__all__ = ["PIECE", "Piece", "converted", "pieces", "spread_out"]

#: Elements that are decoded at once, about.
PIECE = 1 << 20


@dataclass(frozen=True)
class Piece:
    """A part of a stack of values: some of them whole, or a range along the first dimension of one.

    Attributes:
        batch: Which of the stack.
        first: Where the range begins.
        last: One past its end.
        shape: Of the values, with the batch dimension.
    """

    batch: slice
    first: int
    last: int
    shape: tuple[int, ...]

    @property
    def flat(self) -> tuple[int, int]:
        """Its first element of each value, and one past the last."""
        row = int(torch.Size(self.shape[2:]).numel())
        return self.first * row, self.last * row

    def of(self, codec: Codec, suffix: str, part: Tensor) -> Tensor:
        """The piece of a stored stack, a view."""
        if len(self.shape) == 1:
            return part[self.batch]
        if len(self.shape) == 2:
            return part[self.batch, slice(*span(codec, suffix, self.first, self.last))]
        ends = (codec.part_shape(suffix, (end, *self.shape[2:]))[0] for end in (self.first, self.last))
        return part[self.batch, slice(*ends)]

    def codec(self, whole: Codec) -> Codec:
        """How it is stored, of values that are stored by ``whole``."""
        return within(whole, self.first, self.last) if len(self.shape) == 2 else whole


def pieces(n: int, shape: tuple[int, ...], codecs: Sequence[Codec] = (), start: int = 0) -> Iterator[Piece]:
    """Pieces of about :data:`PIECE` elements of ``n`` values of a shape.

    Args:
        n: How many.
        shape: Of each.
        codecs: What a flat range is stored by, beginning at the element ``start`` of the whole: none may be cut.
        start: Global flat index of the first element of a flat range.
    """
    numel = int(torch.Size(shape).numel())
    if n > 1 or not shape or numel <= PIECE:
        each = max(1, PIECE // max(1, numel))
        for begin in range(0, n, each):
            count = min(each, n - begin)
            yield Piece(slice(begin, begin + count), 0, shape[0] if shape else 1, (count, *shape))
        return
    if len(shape) == 1:
        for first, last in pairwise((0, *ends(start, numel, PIECE, codecs))):
            yield Piece(slice(0, 1), first, last, (1, last - first))
        return
    row = max(1, numel // shape[0])
    each = max(1, PIECE // row)
    for first in range(0, shape[0], each):
        last = min(first + each, shape[0])
        yield Piece(slice(0, 1), first, last, (1, last - first, *shape[1:]))


def spread_out(codec: Codec, stored: Tensor, shape: tuple[int, ...], dtype: torch.dtype, start: int = 0) -> Tensor:
    """Codes that share bytes → one a byte; of signs, the signs themselves.

    Args:
        codec: How they are stored.
        stored: ``[N, …]``.
        shape: Of one value, without the batch dimension.
        dtype: Of the result, ``[N, *shape]``.
        start: Of a flat range, global flat index of its first element.
    """
    fresh = torch.empty((stored.shape[0], *shape), dtype=dtype, device=stored.device)
    for piece in pieces(stored.shape[0], shape, (codec,), start):
        one, part = piece.codec(codec), piece.of(codec, "", stored)
        signs = isinstance(codec, SignCodec)
        codes = decoded(one, {"": part}, piece.shape) if signs else codes_of(one, part, piece.shape)
        fresh[piece.batch, piece.first : piece.last].copy_(codes)
    return fresh


def converted(
    old: Codec, new: Codec, parts: dict[str, Tensor], shape: tuple[int, ...], start: int = 0
) -> dict[str, Tensor]:
    """Stored by ``old`` → stored by ``new``, rounded to the nearest.

    Needs memory for the result and a few times :data:`PIECE` elements.

    Args:
        old: How it is stored.
        new: How it will be.
        parts: Suffix → ``[N, …]``.
        shape: Of one value, without the batch dimension.
        start: Of a flat range, global flat index of its first element.
    """
    n, device = parts[next(iter(old.parts))].shape[0], parts[next(iter(old.parts))].device
    fresh = {
        suffix: torch.empty((n, *new.part_shape(suffix, shape)), dtype=dtype, device=device)
        for suffix, dtype in new.parts.items()
    }
    for piece in pieces(n, shape, (old, new), start):
        some = {suffix: piece.of(old, suffix, part) for suffix, part in parts.items()}
        value = decoded(piece.codec(old), some, piece.shape)
        for suffix, part in piece.codec(new).encode(value, None).items():
            piece.of(new, suffix, fresh[suffix]).copy_(part)
    return fresh
