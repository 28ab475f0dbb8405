"""Where the stored tensors of a shard lie in those of the whole parameter: boxes of elements and of scales.

Stored state of 8 or 4 bits has a scale for every block of a row. The scales of a shard are a part of the whole
parameter's: of a flat range those of all blocks that it has elements of; of others, which must begin and end with
blocks, of their own.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hina_optim.state.blockwise import BlockCodec
from hina_optim.state.precision import Codec
from hina_optim.state.ranges import block_at, covering
from hina_optim.state.shard import Shape, Shard, columns_of

__all__ = [
    "Box",
    "beginning_scales",
    "block_boxes",
    "covering_scales",
    "decode_elements",
    "fits",
    "neighbors",
    "numel",
    "whole",
]

#: ``(offset, size)`` in every dimension.
Box = tuple[Shape, Shape]
#: Elements whose scales are looked up at once.
PIECE = 1 << 20


def numel(shape: Shape) -> int:
    """Number of elements."""
    return int(torch.Size(shape).numel())


def whole(shape: Shape) -> tuple[Box, ...]:
    """The box that is all of a tensor; none of one without elements."""
    return (((0,) * len(shape), shape),) if numel(shape) else ()


def neighbors(codec: Codec) -> int:
    """How many elements of a row share a scale, or a byte."""
    return codec.block if isinstance(codec, BlockCodec) else codec.per_byte


def fits(shard: Shard, local_shape: Shape, each: int) -> bool:
    """Whether so many neighbors in a row here, from its beginning on, are such of the whole parameter.

    Args:
        shard: What is here.
        local_shape: The shape in which it lies here.
        each: How many.
    """
    columns = columns_of(shard.shape)
    if shard.offset is not None and shard.size is not None:
        if shard.size[2:] != shard.shape[2:]:
            return False
        inner = numel(shard.shape[2:])
        begin, end = shard.offset[1] * inner, (shard.offset[1] + shard.size[1]) * inner
        return begin % each == 0 and (end % each == 0 or end == columns)
    first, last = shard.start // columns, (shard.stop - 1) // columns
    begin, end = shard.start - first * columns, shard.stop - last * columns
    if first == last or columns % each == 0:
        return begin % each == 0 and (end % each == 0 or end == columns)
    return len(local_shape) > 1 and begin == 0 and end == columns


def block_boxes(shard: Shard, local_shape: Shape, codec: BlockCodec) -> tuple[Box, ...] | None:
    """Boxes of a shard's scales in those of the parameter, in the order in which they lie here.

    Args:
        shard: What is here.
        local_shape: The shape in which it lies here; blocks lie in its rows.
        codec: How it is stored.

    Returns:
        None where the blocks here are not blocks of the whole parameter.
    """
    if not shard.numel:
        return ()
    block, columns = codec.block, columns_of(shard.shape)
    if not fits(shard, local_shape, block):
        return None
    scales = codec.part_shape("_scale", shard.shape)
    per_row = -(-columns // block)
    if shard.offset is not None and shard.size is not None:
        inner = numel(shard.shape[2:])
        begin, end = shard.offset[1] * inner, (shard.offset[1] + shard.size[1]) * inner
        return (((shard.offset[0], begin // block), (shard.size[0], -(-(end - begin) // block))),)
    first, last = shard.start // columns, (shard.stop - 1) // columns
    begin, end = shard.start - first * columns, shard.stop - last * columns
    return tuple(Shard(scales, first * per_row + begin // block, last * per_row + -(-end // block)).boxes())


def _scale_range(shard: Shard, block: int) -> tuple[int, int]:
    """Flat range of the scales of all blocks that a shard has elements of; of a box, of all between them, too."""
    if not shard.numel:
        return 0, 0
    if shard.size is None:
        return block_at(shard.shape, block, shard.start), block_at(shard.shape, block, shard.stop - 1) + 1
    columns = columns_of(shard.shape)
    per_row = -(-columns // block)
    first, last = shard.start // columns, (shard.stop - 1) // columns
    if first < last:
        return first * per_row, (last + 1) * per_row
    begin, end = shard.start - first * columns, shard.stop - first * columns
    return first * per_row + begin // block, first * per_row + -(-end // block)


def covering_scales(shard: Shard, codec: BlockCodec) -> tuple[Box, ...]:
    """Boxes of the scales of all blocks that a shard has elements of (of a box, also of blocks between them)."""
    return tuple(Shard(codec.part_shape("_scale", shard.shape), *_scale_range(shard, codec.block)).boxes())


def beginning_scales(shard: Shard, codec: BlockCodec) -> tuple[tuple[Box, ...], int]:
    """Boxes of the scales of all blocks whose first element a flat range has, and how many it has before those.

    Every block begins in one range.
    """
    first, last = _scale_range(shard, codec.block)
    skipped = int(bool(shard.numel) and covering(shard, codec.block).start < shard.start)
    return tuple(Shard(codec.part_shape("_scale", shard.shape), first + skipped, last).boxes()), skipped


def decode_elements(shard: Shard, codec: BlockCodec, codes: Tensor, scales: Tensor) -> Tensor:
    """The values of a shard that need not begin or end with a block, flat; of codes that have a byte each.

    Args:
        shard: What is here.
        codec: How it is stored.
        codes: Its codes, flat.
        scales: Those of :func:`covering_scales`, flat.
    """
    columns = columns_of(shard.shape)
    per_row, first = -(-columns // codec.block), _scale_range(shard, codec.block)[0]
    each = BlockCodec(codec.signed, block=1, compute=codec.compute, bits=codec.bits)
    values = torch.empty(codes.numel(), dtype=codec.compute, device=codes.device)
    for begin in range(0, codes.numel(), PIECE):
        end = min(begin + PIECE, codes.numel())
        at = shard.index(codes.device, begin, end)
        scale = scales[at // columns * per_row + at % columns // codec.block - first]
        values[begin:end] = each.decode({"": codes[None, begin:end], "_scale": scale[None]})[0]
    return values
