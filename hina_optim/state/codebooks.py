"""The values of codes of 8 and 4 bits, and tables that find a value's code with a single look-up.

The bits of floats, read as integers, are in the order of the values. Cut into cells of ``2^shift`` values so small that
at most one boundary between two codes falls into a cell, one table entry a cell holds the code at its beginning and the
place of the boundary, as one integer whose carry is the comparison::

    code = (bits + entry) >> shift      entry = (code at the beginning + 1) · 2^shift - (bits at the boundary)

(without a boundary in the cell, ``entry = code · 2^shift - (bits at the beginning)``), which is exact for every float.
On a CPU it takes a twentieth of the time of a binary search.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import lru_cache

import torch
from torch import Tensor

__all__ = ["CELL_BITS", "Tables", "dynamic_map", "dynamic_tables", "log_levels", "log_tables", "order"]

#: Low bits of a float inside a cell of :func:`unit_table`: sign, exponent and 7 bits of fraction choose the cell.
CELL_BITS = 16
#: More cells than this (levels at very unequal distances), and a binary search takes the table's place.
MOST_CELLS = 1 << 17


def dynamic_map(signed: bool, bits: int = 8) -> Tensor:
    """The values of the dynamic data type, ascending, float32 ``[2^bits]``; the largest is 1.

    For every exponent ``e`` from ``2 - bits`` to 0 these are centers of equal intervals of ``[0.1, 1]·10^e``:
    ``2^(bits-2+e)`` of them with a sign on either side of zero, ``2^(bits-1+e)`` without. Zero and one are exact; -1 is
    not among them.

    Source: 8-bit Optimizers via Block-wise Quantization (arXiv 2110.02861), section 2.2 and appendix; in 8 bits bit for
    bit the map of bitsandbytes. In 4: Memory Efficient Optimizers with 4-bit States (arXiv 2309.01507).
    """
    levels = [torch.tensor([0.0, 1.0], dtype=torch.float32)]
    for exponent in range(2 - bits, 1):
        count = 2 ** (bits - 2 + exponent) if signed else 2 ** (bits - 1 + exponent)
        edges = torch.linspace(0.1, 1, count + 1, dtype=torch.float32)
        centers = (edges[1:] + edges[:-1]) / 2 * 10.0**exponent
        levels += [centers, -centers] if signed else [centers]
    return torch.cat(levels).sort().values


def log_levels(low: float, start: float, high: float, bits: int = 8) -> Tensor:
    """Up to ``2^bits`` ascending float32 values between ``low`` and ``high``, at equal steps of ``log(x + start)``.

    Above ``start`` they lie at nearly equal ratios, below it at nearly equal distances: what moves by bumps of one size
    is followed equally well from ``start`` down to zero. All three arguments are among the values, exactly: the steps
    below and above ``start`` differ a little, as there are whole numbers of them.

    Args:
        low: Smallest value, > 0.
        start: Value between the ends.
        high: Largest value.
        bits: Of a code.

    Raises:
        ValueError: Not ``0 < low <= start <= high < inf``.
    """
    most = 2**bits - 1
    if not 0 < low <= start <= high < math.inf:
        raise ValueError(f"log levels: low={low}, start={start}, high={high} must be 0 < low <= start <= high < inf.")
    first, middle, last = (math.log1p(x / start) for x in (low, start, high))
    if first < middle < last:
        steps = min(max(round(most * (middle - first) / (last - first)), 1), most - 1)
    else:
        steps = most if first < middle else 0
    below = torch.linspace(first, middle, steps + 1, dtype=torch.float64)
    above = torch.linspace(middle, last, most + 1 - steps, dtype=torch.float64)
    levels = torch.cat([below[:-1], above]).expm1() * start
    levels[0], levels[-1], levels[steps] = low, high, start
    # rounding may have led a neighbor of an end past it, or onto another level
    distinct: Tensor = levels.clamp(low, high).to(torch.float32).unique()
    return distinct


def order(values: Tensor) -> Tensor:
    """Float32 values → integers (int64) in the same order, -0 below +0, neighbors one apart."""
    bits = values.view(torch.int32).to(torch.int64)
    return torch.where(bits < 0, -(bits & 0x7FFFFFFF) - 1, bits)


def cell_table(boundaries: Tensor, starts: Tensor, shift: int) -> Tensor:
    """The table of the module's introduction, int32, one entry a cell.

    Args:
        boundaries: Ascending int64: the :func:`order` of the first value of each next code.
        starts: The order of the first value of each cell. The bits that are looked up count from 0 at the first cell.
        shift: Cells have ``2^shift`` values.

    Raises:
        ValueError: Two boundaries share a cell.
    """
    code = torch.searchsorted(boundaries, starts)
    after = torch.searchsorted(boundaries, starts + (1 << shift))
    if bool((after - code > 1).any()):
        raise ValueError(f"cells of 2^{shift} values are too coarse for these boundaries")
    beyond = torch.cat([boundaries, boundaries.new_zeros(1)])
    carry = torch.where(after > code, (1 << shift) - (beyond[code] - starts), 0)
    return (((code - torch.arange(len(starts))) << shift) + carry).to(torch.int32)


def cell_shift(boundaries: Tensor) -> int:
    """The largest ``shift`` whose cells hold no two boundaries, whatever their alignment; at most 22."""
    gap = int((boundaries[1:] - boundaries[:-1]).min()) if len(boundaries) > 1 else 1 << 22
    return min(max(gap, 1).bit_length() - 1, 22)


def unit_table(boundaries: Tensor) -> Tensor:
    """:func:`cell_table` for values of both signs, int32 ``[2^15]``.

    A value's place is its bits, all of them flipped if it is negative: values in [-2, 2) fall on different places, in
    ascending order on either side of zero. What lies beyond ±2 is read as some value in [-2, 2).
    """
    cells = torch.arange(1 << 15, dtype=torch.int64) << CELL_BITS
    return cell_table(boundaries, torch.where(cells < 1 << 30, cells, cells - (1 << 31)), CELL_BITS)


@dataclass(frozen=True)
class Tables:
    """Constants of a code.

    Attributes:
        levels: float32, up to ``2^bits``, ascending.
        per_gap: One over the distance to the next level, float32; 0 at the last level.
        floor: Look-up of the last level that is not above a value, int32 ``[cells]``.
        nearest: Look-up of the nearest level, int32 ``[cells]``; a tie takes the lower one.
        shift: Cells have ``2^shift`` values; -1 where there are too many for a table.
        first: Bits of the first level.
        last: Bits of the last level.
        copies: The same on other devices.
    """

    levels: Tensor
    per_gap: Tensor
    floor: Tensor
    nearest: Tensor
    shift: int
    first: int
    last: int
    copies: dict[torch.device, Tables] = field(default_factory=dict)

    def on(self, device: torch.device) -> Tables:
        """The tables on a device: copied there once (by a graph that is traced before that, each time)."""
        if device == self.levels.device:
            return self
        copy = self.copies.get(device)
        if copy is None:
            tensors = {k: getattr(self, k).to(device) for k in ("levels", "per_gap", "floor", "nearest")}
            copy = Tables(**tensors, shift=self.shift, first=self.first, last=self.last)
            if not torch.compiler.is_compiling():
                self.copies[device] = copy
        return copy


def _per_gap(levels: Tensor) -> Tensor:
    """One over the distance to the next level; 0 at the last."""
    return torch.cat([1 / levels.diff(), levels.new_zeros(1)]).clamp(max=torch.finfo(torch.float32).max)


@lru_cache(maxsize=4)
def dynamic_tables(signed: bool, bits: int = 8) -> Tables:
    """Tables of :func:`dynamic_map`."""
    with torch.device("cpu"):  # whatever the default device is at the time
        levels = dynamic_map(signed, bits)
        floor = unit_table(order(levels[1:]))
        # a value above the middle of two levels takes the upper one
        nearest = unit_table(order((levels[1:] + levels[:-1]) / 2) + 1)
        return Tables(levels, _per_gap(levels), floor, nearest, CELL_BITS, 0, 0)


@lru_cache(maxsize=256)
def log_tables(low: float, start: float, high: float, bits: int = 8) -> Tables:
    """Tables of :func:`log_levels`; the nearest level is not looked up."""
    with torch.device("cpu"):
        levels = log_levels(low, start, high, bits)
        per_gap, places = _per_gap(levels), order(levels)
        first, last = int(places[0]), int(places[-1])
        shift = cell_shift(places)
        none = torch.zeros(0, dtype=torch.int32)
        if (last - first) >> shift >= MOST_CELLS:
            return Tables(levels, per_gap, none, none, -1, first, last)
        floor = cell_table(places[1:], torch.arange(first, last + 1, 1 << shift), shift)
        return Tables(levels, per_gap, floor, none, shift, first, last)
