"""State in 8 and in 4 bits: blocks with a scale, and levels on a log scale.

All codecs are element-wise but for the scale of a block, and blocks lie inside a row of the matrix view (first
dimension × all others; a vector is one row): a range of rows is a range of every part. They take ``[N, *shape]`` or
any range of its rows; :class:`~hina_optim.state.ranges.RangeCodec` takes any flat range. Codes of 4 bits are two to a
byte where they are *packed* (:mod:`hina_optim.state.packing`): every row begins with a byte, and what does not fill its
last one comes back with something behind it, which :func:`~hina_optim.state.precision.decoded` takes off.

Codes are found by one table look-up (:mod:`hina_optim.state.codebooks`). On one CPU core, encoding takes about 3 ns
an element (6 ns with noise) and decoding 1 ns, where the kernels of bitsandbytes take 6 and 0.5 ns.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from hina_optim.state.codebooks import CELL_BITS, Tables, dynamic_tables, log_tables
from hina_optim.state.packing import pack, packed_shape, unpack

__all__ = ["SMALLEST_SCALE", "BlockCodec", "LogCodec", "scale_"]

#: The lowest level of the signed map, by bits.
LOWEST = {8: -0.992968738079071, 4: -0.8875}
#: A scale below this counts as this one where it is divided by: its reciprocal must be finite.
SMALLEST_SCALE = 1e-38


def _lines(value: Tensor) -> Tensor:
    """Rows of the matrix view: ``[N, rows, columns]``, ``[N, n]`` of vectors, ``[N, 1]`` of numbers."""
    if value.ndim == 1:
        return value.unsqueeze(1)
    return value.flatten(2) if value.ndim > 3 else value


def _line_shape(shape: tuple[int, ...], size: int) -> tuple[int, ...]:
    """Shape of what is kept once for every ``size`` elements of a row."""
    if len(shape) < 2:
        return (-(-torch.Size(shape).numel() // size),)
    return (shape[0], -(-torch.Size(shape[1:]).numel() // size))


def _extremes(lines: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """Largest and smallest value of each block, ``[…, columns]`` → ``[…, blocks]``."""
    columns = lines.shape[-1]
    if columns <= block:
        return (lines.amax(-1, keepdim=True), lines.amin(-1, keepdim=True)) if columns else (lines, lines)
    whole = columns // block * block
    head = lines[..., :whole].unflatten(-1, (-1, block))
    largest, smallest = head.amax(-1), head.amin(-1)
    if columns == whole:
        return largest, smallest
    tail = lines[..., whole:]
    return (
        torch.cat([largest, tail.amax(-1, keepdim=True)], -1),
        torch.cat([smallest, tail.amin(-1, keepdim=True)], -1),
    )


def _times(lines: Tensor, scale: Tensor, block: int) -> Tensor:
    """Every element times the number of its block."""
    columns = lines.shape[-1]
    if columns <= block:
        return lines * scale
    if columns % block == 0:
        product: Tensor = (lines.unflatten(-1, (-1, block)) * scale.unsqueeze(-1)).flatten(-2)
        return product
    # in two pieces: torch 2.13 compiles expand, flatten and slice of the scale to wrong code on CPUs
    whole = columns // block * block
    head = lines[..., :whole].unflatten(-1, (-1, block)) * scale[..., :-1].unsqueeze(-1)
    return torch.cat([head.flatten(-2), lines[..., whole:] * scale[..., -1:]], -1)


def scale_(lines: Tensor, scale: Tensor, block: int) -> Tensor:
    """:func:`_times` in place."""
    columns = lines.shape[-1]
    blocks = columns // block
    whole = blocks * block
    if whole:
        lines[..., :whole].unflatten(-1, (blocks, block)).mul_(scale[..., :blocks].unsqueeze(-1))
    if whole < columns:
        lines[..., whole:].mul_(scale[..., blocks:])
    return lines


def _look_up(table: Tensor, index: Tensor) -> Tensor:
    # index_select with 32-bit indices is three to five times as fast as indexing on a CPU
    found: Tensor = table.index_select(0, index.reshape(-1)).view(index.shape)
    return found


def _codes(table: Tensor, key: Tensor, shift: int) -> Tensor:
    """The code of each key from a table of cells."""
    return _look_up(table, key >> shift).add_(key).bitwise_right_shift_(shift)


def _promote(value: Tensor, codes: Tensor, tables: Tables, noise: Tensor | None) -> Tensor:
    """The next level instead of the one below as often as the fraction of the way to it says; the nearer without noise.

    The fraction, in [0, 1] where there are levels on both sides and in (-1, 0] elsewhere, is exactly 0 at a level. With
    the noise, a multiple of 2⁻¹⁶ in [0, 1), it reaches 1 or does not, and is cut off.
    """
    below = _look_up(tables.levels, codes)
    fraction = torch.sub(value, below).mul_(_look_up(tables.per_gap, codes))
    fraction = fraction.add_(0.5) if noise is None else fraction.add_(noise, alpha=2.0**-16)
    return fraction.to(torch.int32).add_(codes)


@dataclass(frozen=True)
class BlockCodec:
    """8 or 4 bits an element and a float32 scale a block: ``x ≈ scale · level[code]``, ``scale = max |x|`` of it.

    In 8 bits the levels are the dynamic map of bitsandbytes; scales, codes and decoded values are those of its
    device-independent kernel, bit for bit: the nearest level of ``x · (1/scale)``, the lower one in a tie. (Its kernel
    for float32 on CPUs finds codes in a table of 65536 equal steps; there, zero comes back as 2e-5 of the largest value
    of its block.)

    The error is at most 0.7 % of the block's largest value (0.35 % unsigned). Relative to a value of 0.1 … 1 of the
    largest it is at most 6.2 % (3.3 %), and in each decade below at most twice that of the one above. The largest value
    is exact unless it is negative: -1 is not among the levels, and comes back as -0.993 (where it is rounded at random,
    and in 4 bits, whose lowest level is -0.8875, the scale is larger instead). Zero is exact. A block of zeros has
    scale 0 and comes back as zeros; one whose largest value is below 1e-38 comes back smaller than it was. A value that
    is not finite spoils its own block and no other.

    Attributes:
        signed: Whether values may be negative; if not, negative ones become zero, and small ones have one bit more.
        block: Elements of a block, ≥ 1; the last one of a row may be shorter.
        compute: dtype of decoded values.
        stochastic: Round to one of the two levels around a value at random, so that the expected value is exact. An
            average then keeps moving by less than the distance of two levels, where rounding to the nearest stops it.
        bits: Of a code, 8 or 4. In 4 the error is at most 13 % of the block's largest value.
        packed: Codes of 4 bits are two to a byte, not one.

    Source: 8-bit Optimizers via Block-wise Quantization (arXiv 2110.02861), section 2.
    """

    signed: bool
    block: int = 256
    compute: torch.dtype = torch.float32
    stochastic: bool = False
    bits: int = 8
    packed: bool = False
    by_rows: ClassVar[bool] = True
    lead: ClassVar[int] = 0
    _tables: Tables = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_tables", dynamic_tables(self.signed, self.bits))

    @property
    def per_byte(self) -> int:
        """Codes in a byte."""
        return 8 // self.bits if self.packed else 1

    @property
    def parts(self) -> dict[str, torch.dtype]:
        """Codes of the value's shape, and scales."""
        return {"": torch.uint8, "_scale": torch.float32}

    def part_shape(self, suffix: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The value's own shape for codes; ``(rows, blocks of a row)`` for scales, ``(blocks,)`` of a vector.

        Packed codes are ``(rows, bytes of a row)``, ``(bytes,)`` of a vector.
        """
        if suffix:
            return _line_shape(shape, self.block)
        return packed_shape(shape, self.bits) if self.packed else shape

    @property
    def noisy(self) -> bool:
        """True when rounding stochastically."""
        return self.stochastic

    def decode(self, parts: dict[str, Tensor]) -> Tensor:
        """``scale · level[code]``."""
        scale = parts["_scale"]
        codes = unpack(parts[""], self.bits) if self.packed else parts[""]
        # what fills the last byte of an odd row counts to its last block: blocks are even
        lines = scale_(self.levels(_lines(codes)), scale, self.block)
        return lines.reshape(codes.shape).to(self.compute)

    def levels(self, codes: Tensor) -> Tensor:
        """The level of each code, float32."""
        return _look_up(self._tables.on(codes.device).levels, codes.to(torch.int32))

    def encode(self, value: Tensor, noise: Tensor | None) -> dict[str, Tensor]:
        """Scales and codes; ``noise`` only if :attr:`stochastic`: without it, the nearest level is taken."""
        lines = _lines(value).to(torch.float32)
        scale = self.scales(lines, noise is not None)
        unit = _times(lines, 1 / scale.clamp(min=SMALLEST_SCALE), self.block)
        codes = self.codes(unit, noise)
        return {"": pack(codes, self.bits) if self.packed else codes.reshape(value.shape), "_scale": scale}

    def scales(self, lines: Tensor, by_chance: bool) -> Tensor:
        """Scales of the blocks of rows, float32 ``[…, columns]`` → ``[…, blocks]``: a block's is its parts' largest.

        Args:
            lines: Rows; each begins with a block.
            by_chance: Whether they will be rounded at random.
        """
        largest, smallest = _extremes(lines, self.block)
        # an average that is stored again and again must not lose the 0.7 % by which the lowest level falls short of -1,
        # let alone the 11 % of 4 bits
        lowest = LOWEST[self.bits] if self.signed and (by_chance or self.bits < 8) else -1.0
        return torch.maximum(largest, smallest / lowest).abs()

    def codes(self, unit: Tensor, noise: Tensor | None) -> Tensor:
        """Codes of values that were divided by their scale, float32; ``unit`` is overwritten."""
        bits = unit.view(torch.int32)
        # without a sign, what is negative becomes 0, here and (the same memory) in what is rounded at random below
        key = (bits >> 31).bitwise_xor_(bits) if self.signed else bits.clamp_(min=0)
        tables = self._tables.on(unit.device)
        codes = _codes(tables.nearest if noise is None else tables.floor, key, CELL_BITS)
        if noise is not None:
            codes = _promote(unit, codes, tables, noise.reshape(unit.shape))
        return codes.to(torch.uint8)


@dataclass(frozen=True)
class LogCodec:
    """8 or 4 bits an element for values in ``[low, high]`` that begin at ``start``: 256 or 16 levels on a log scale.

    The three arguments are levels, exactly; the others are :func:`~hina_optim.state.codebooks.log_levels`: for 1e-7,
    1e-4 and 1e-3, they lie 1 % apart at the upper end, 1.9 % at the start, and less than 2e-6 below it (in 4 bits 19 %,
    34 %, and 4e-5). With noise, a value becomes one of the two levels around it so that the expected value is exact,
    and a level stays what it is: what does not change is never moved by being stored. Values beyond the ends become the
    ends.

    Attributes:
        low: Smallest value, > 0.
        start: First value.
        high: Largest value.
        compute: dtype of decoded values.
        bits: Of a code, 8 or 4.
        packed: Codes of 4 bits are two to a byte, not one.
        lead: Of a flat range, how many codes its first byte has place for before the first of them.

    Raises:
        ValueError: Not ``0 < low <= start <= high < inf``.
    """

    low: float
    start: float
    high: float
    compute: torch.dtype = torch.float32
    bits: int = 8
    packed: bool = False
    lead: int = 0
    _tables: Tables = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        tables = log_tables(float(self.low), float(self.start), float(self.high), self.bits)
        object.__setattr__(self, "_tables", tables)

    @property
    def per_byte(self) -> int:
        """Codes in a byte."""
        return 8 // self.bits if self.packed else 1

    @property
    def by_rows(self) -> bool:
        """Whether rows begin with a byte."""
        return self.packed

    @property
    def parts(self) -> dict[str, torch.dtype]:
        """Codes of the value's shape."""
        return {"": torch.uint8}

    def part_shape(self, suffix: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The value's own shape; of packed codes ``(rows, bytes of a row)``, ``(bytes,)`` of a vector."""
        return packed_shape(shape, self.bits, self.lead) if self.packed else shape

    @property
    def noisy(self) -> bool:
        """True: bumps are smaller than the distance of two levels."""
        return True

    def decode(self, parts: dict[str, Tensor]) -> Tensor:
        """``level[code]``."""
        codes = unpack(parts[""], self.bits) if self.packed else parts[""]
        return _look_up(self._tables.on(codes.device).levels, codes.to(torch.int32)).to(self.compute)

    def encode(self, value: Tensor, noise: Tensor | None) -> dict[str, Tensor]:
        """One of the two levels around a value; the nearest without noise."""
        tables = self._tables.on(value.device)
        # positive floats are ordered like their bits; negative values and NaN end up at an end, inside the table
        bits = value.to(torch.float32).contiguous().view(torch.int32).clamp(tables.first, tables.last)
        inside = bits.view(torch.float32)
        if tables.shift < 0:
            codes = torch.bucketize(inside, tables.levels[1:], out_int32=True, right=True)
        else:
            codes = _codes(tables.floor, bits - tables.first, tables.shift)
        codes = _promote(inside, codes, tables, noise).to(torch.uint8)
        return {"": pack(_lines(codes), self.bits, self.lead) if self.packed else codes}
