"""State in 8 or 4 bits of a flat range of a matrix that begins and ends anywhere: its blocks are those of the whole.

FSDP1 and DeepSpeed's ZeRO give every rank a range of a parameter's flat elements. What is stored of it are the codes of
its elements and the scales of all blocks that it has elements of. A block that ends on another rank has its scale on
both; what is stored is what one process stores once they have agreed on it (:mod:`hina_optim.engine.scales`). Codes
that share bytes are packed without regard to rows, between the same elements wherever a range begins.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from hina_optim.state.blockwise import SMALLEST_SCALE, BlockCodec, LogCodec, scale_
from hina_optim.state.packing import pack, packed_length, unpack
from hina_optim.state.precision import Codec, Storage, codec_for
from hina_optim.state.shard import Shape, Shard, columns_of
from hina_optim.state.signs import SignCodec
from hina_optim.state.slot import Slot

__all__ = [
    "Edge",
    "RangeCodec",
    "block_at",
    "codec_here",
    "codes_of",
    "covering",
    "cut_blocks",
    "ends",
    "local",
    "span",
    "stored_codes",
    "within",
]

#: Ranges are cut at global multiples of this, where that is between blocks.
GRAIN = 4096


class Span(NamedTuple):
    """A part of a range whose rows begin with blocks.

    Attributes:
        begin: Its first element.
        end: One past its last.
        first: Its first scale.
        last: One past its last.
        rows: How many rows it is.
    """

    begin: int
    end: int
    first: int
    last: int
    rows: int

    def lines(self, value: Tensor) -> Tensor:
        """Its elements of ``[N, m]``, a view ``[N, rows, columns]``."""
        lines: Tensor = value[:, self.begin : self.end].unflatten(1, (self.rows, -1))
        return lines

    def scales(self, scale: Tensor) -> Tensor:
        """Its scales of ``[N, blocks]``, a view ``[N, rows, blocks of a row]``."""
        scales: Tensor = scale[:, self.first : self.last].unflatten(1, (self.rows, -1))
        return scales


class Edge(NamedTuple):
    """A block of which a range has a part.

    Attributes:
        begin: The first element of it in the range.
        end: One past the last.
        scale: Which of the range's scales is its.
    """

    begin: int
    end: int
    scale: int


@dataclass(frozen=True)
class RangeCodec:
    """:class:`BlockCodec` for a flat range ``[N, m]`` of a matrix.

    Two ranges in which blocks lie alike have equal codecs. Where rows are whole blocks, they count as rows of one.

    Attributes:
        blocks: How a whole matrix is stored.
        columns: Elements of a row.
        lead: Elements of the range's first row that lie before it.
        numel: Elements of the range.
        skip: How many codes its first byte has place for before the first of its own.
    """

    blocks: BlockCodec
    columns: int
    lead: int
    numel: int
    skip: int = 0
    by_rows: ClassVar[bool] = False
    #: What is done at once: at most the end of a block, the end of a row, whole rows, and the beginning of one.
    spans: tuple[Span, ...] = field(init=False, repr=False, compare=False)
    #: The blocks at its two ends (or the one that is both), where they are not whole.
    edges: tuple[Edge, ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "spans", tuple(_spans(self)))
        object.__setattr__(self, "edges", tuple(_edges(self)))

    @classmethod
    def of(cls, blocks: BlockCodec, shape: Shape, start: int, stop: int) -> RangeCodec:
        """That of the elements ``start … stop-1`` of a parameter."""
        columns = max(1, columns_of(shape))
        columns = blocks.block if columns % blocks.block == 0 else columns
        if start == stop:
            return cls(blocks, columns, 0, 0)
        return cls(blocks, columns, start % columns, stop - start, start % blocks.per_byte)

    @property
    def compute(self) -> torch.dtype:
        """What decoded values are."""
        return self.blocks.compute

    @property
    def parts(self) -> dict[str, torch.dtype]:
        """Codes of the range's elements, and scales of the blocks that they are in."""
        return self.blocks.parts

    @property
    def noisy(self) -> bool:
        """As that of the whole."""
        return self.blocks.noisy

    @property
    def per_byte(self) -> int:
        """Codes in a byte."""
        return self.blocks.per_byte

    def part_shape(self, suffix: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The value's own for codes, ``(bytes,)`` of packed ones; ``(blocks,)`` for scales, whatever ``shape`` is."""
        if suffix:
            return (self.count(self.numel),)
        return shape if self.per_byte == 1 else (packed_length(self.numel, self.blocks.bits, self.skip),)

    def unpacked(self, stored: Tensor) -> Tensor:
        """Codes as they are stored → one a byte, ``[N, m]``."""
        if self.per_byte == 1:
            return stored
        return unpack(stored, self.blocks.bits)[:, self.skip : self.skip + self.numel]

    def packed(self, codes: Tensor) -> Tensor:
        """The other way round."""
        return codes if self.per_byte == 1 else pack(codes, self.blocks.bits, self.skip)

    def count(self, end: int, begin: int = 0) -> int:
        """Blocks that the elements ``begin … end-1`` are in."""
        return self.place(end - 1) + 1 - self.place(begin) if begin < end else 0

    def place(self, at: int) -> int:
        """Which of the range's blocks its element ``at`` is in."""
        return self._block(self.lead + at) - self._block(self.lead)

    def _block(self, at: int) -> int:
        block = self.blocks.block
        return at // self.columns * -(-self.columns // block) + at % self.columns // block

    def decode(self, parts: dict[str, Tensor]) -> Tensor:
        """``scale · level[code]``, ``[N, m]``."""
        values = self.blocks.levels(self.unpacked(parts[""]))
        for one in self.spans:
            scale_(one.lines(values), one.scales(parts["_scale"]), self.blocks.block)
        return values.to(self.compute)

    def encode(self, value: Tensor, noise: Tensor | None) -> dict[str, Tensor]:
        """Codes and scales of ``[N, m]``; of a block that is not all here, as if the rest were zero."""
        unit = value.to(torch.float32, copy=True)
        found = []
        for one in self.spans:
            lines = one.lines(unit)
            scale = self.blocks.scales(lines, noise is not None)
            scale_(lines, 1 / scale.clamp(min=SMALLEST_SCALE), self.blocks.block)
            found.append(scale.flatten(1))
        scales = torch.cat(found, 1) if found else unit.new_empty(unit.shape[0], 0)
        return {"": self.packed(self.blocks.codes(unit, noise)), "_scale": scales}

    def overwritten(self, stored: Tensor, codes: Tensor) -> Tensor:
        """What is stored, ``[N, …]``, with its own codes anew: the first and last byte may hold others, too."""
        if self.per_byte == 1:
            return codes
        every = unpack(stored, self.blocks.bits)
        every[:, self.skip : self.skip + self.numel] = codes
        return pack(every, self.blocks.bits)

    def encode_edge(self, value: Tensor, noise: Tensor | None, scale: Tensor) -> Tensor:
        """Codes of a part of one block, ``[N, m]``, whose scale ``[N, 1]`` is known."""
        unit = value.to(torch.float32) * (1 / scale.clamp(min=SMALLEST_SCALE))
        return self.blocks.codes(unit, noise)


def _spans(codec: RangeCodec) -> Iterator[Span]:
    block, columns = codec.blocks.block, codec.columns
    at, column = 0, codec.lead

    def until(end: int, rows: int = 1) -> Span:
        return Span(at, end, codec.place(at), codec.place(end - 1) + 1, rows)

    for end in (min(-column % block, columns - column), columns - column) if column else ():
        end = min(end, codec.numel)  # of the block, then of the row
        if at < end:
            yield until(end)
            at = end
    rows = (codec.numel - at) // columns
    if rows:
        yield until(at + rows * columns, rows)
        at += rows * columns
    if at < codec.numel:
        yield until(codec.numel)


def _edges(codec: RangeCodec) -> Iterator[Edge]:
    block, columns, numel = codec.blocks.block, codec.columns, codec.numel
    if not numel:
        return
    before = codec.lead % block
    first = min(min(codec.lead - before + block, columns) - codec.lead, numel)  # elements of the first block
    after = (codec.lead + numel) % columns  # where in its row the range ends; 0 at the end of one
    odd = after % block
    if before or (odd and odd >= numel):
        yield Edge(0, first, 0)
    if odd and odd < numel and (not before or first < numel):
        yield Edge(numel - odd, numel, codec.count(numel) - 1)


def local(codec: Codec, shard: Shard, local_shape: Shape) -> Codec:
    """How what is here of a parameter is stored, whose whole is stored by ``codec``.

    Args:
        codec: That of the whole.
        shard: What is here.
        local_shape: The shape in which it lies here: of a flat range, a vector.
    """
    if len(local_shape) != 1 or len(shard.shape) < 2:
        return codec
    if isinstance(codec, BlockCodec):
        return RangeCodec.of(codec, shard.shape, shard.start, shard.stop)
    if isinstance(codec, (SignCodec, LogCodec)):
        return replace(codec, lead=shard.start % codec.per_byte if shard.numel else 0)
    return codec


def codec_here(slot: Slot, storage: Storage, dtype: torch.dtype, shard: Shard, local_shape: Shape) -> Codec:
    """:func:`~hina_optim.state.precision.codec_for`, for what is here."""
    codec = codec_for(slot, storage, dtype, shard.shape)
    return local(codec, shard, local_shape) if slot.shape == "like" else codec


def within(codec: Codec, begin: int, end: int) -> Codec:
    """How the elements ``begin … end-1`` of a range are stored."""
    if isinstance(codec, RangeCodec):
        if begin == end:
            return replace(codec, lead=0, numel=0, skip=0)
        lead, skip = (codec.lead + begin) % codec.columns, (codec.skip + begin) % codec.per_byte
        return replace(codec, lead=lead, numel=end - begin, skip=skip)
    if isinstance(codec, (SignCodec, LogCodec)):
        return replace(codec, lead=(codec.lead + begin) % codec.per_byte if begin < end else 0)
    return codec


def span(codec: Codec, suffix: str, begin: int, end: int) -> tuple[int, int]:
    """Where the elements ``begin … end-1`` of a flat range are in one of its parts."""
    if isinstance(codec, RangeCodec) and suffix:
        first = codec.place(begin) if begin < end else 0
        return first, first + codec.count(end, begin)
    if codec.per_byte > 1:
        assert isinstance(codec, (RangeCodec, BlockCodec, SignCodec, LogCodec))
        before = codec.skip if isinstance(codec, RangeCodec) else codec.lead
        return (before + begin) // codec.per_byte, -(-(before + end) // codec.per_byte)
    return codec.part_shape(suffix, (begin,))[0], codec.part_shape(suffix, (end,))[0]


def codes_of(codec: Codec, stored: Tensor, shape: Sequence[int]) -> Tensor:
    """Codes that share bytes → one a byte, ``[N, *shape[1:]]``."""
    if isinstance(codec, RangeCodec):
        return codec.unpacked(stored)
    assert isinstance(codec, (BlockCodec, LogCodec))
    row = int(torch.Size(shape[2:] if len(shape) > 2 else shape[1:]).numel())
    return unpack(stored, codec.bits)[..., codec.lead : codec.lead + row].reshape(shape)


def stored_codes(codec: Codec, codes: Tensor) -> Tensor:
    """The other way round: codes one a byte, ``[N, …]``, as they are stored."""
    if isinstance(codec, RangeCodec):
        return codec.packed(codes)
    assert isinstance(codec, (BlockCodec, LogCodec))
    return pack(codes.flatten(2) if codes.ndim > 3 else codes, codec.bits, codec.lead)


def ends(start: int, numel: int, most: int, codecs: Iterable[Codec]) -> list[int]:
    """Where to cut a flat range so that no piece shares a scale or a byte with another.

    Args:
        start: Global flat index of its first element.
        numel: Its elements.
        most: Elements of a piece, about.
        codecs: How it is stored.

    Returns:
        The end of every piece.
    """
    step = math.lcm(*(_step(codec) for codec in codecs))
    step = GRAIN if GRAIN % step == 0 else step
    most = max(1, most // step) * step
    return [*range(most - start % step, numel, most), numel]


def _step(codec: Codec) -> int:
    return math.lcm(codec.columns, codec.per_byte) if isinstance(codec, RangeCodec) else codec.per_byte


def block_at(shape: Shape, block: int, at: int) -> int:
    """Which block of a whole parameter its element ``at`` is in."""
    columns = max(1, columns_of(shape))
    return at // columns * -(-columns // block) + at % columns // block


@functools.lru_cache(maxsize=4096)
def cut_blocks(shape: Shape, block: int, ranges: Sequence[tuple[int, int]]) -> dict[int, int]:
    """The blocks of which no range has all: block → its place among them.

    Args:
        shape: Of the whole parameter.
        block: Elements of a block.
        ranges: The flat ranges on all ranks.
    """
    columns = max(1, columns_of(shape))
    cuts = {stop for start, stop in ranges if start < stop}
    found = sorted({block_at(shape, block, at) for at in cuts if at % columns % block})
    return {one: i for i, one in enumerate(found)}


def covering(shard: Shard, block: int) -> Shard:
    """The range of all blocks that a range has elements of."""
    if not shard.numel:
        return shard
    columns = max(1, columns_of(shard.shape))
    begin, last = shard.start % columns, (shard.stop - 1) % columns
    end = min(last // block * block + block, columns)
    return Shard(shard.shape, shard.start - begin % block, shard.stop - 1 - last + end)
