"""What runs at once: some parameters of a bucket, or a chunk of a large one."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import pairwise

import torch
from torch import Tensor

from hina_optim.engine.bucket import Bucket
from hina_optim.engine.grids import BAND
from hina_optim.engine.layout import Shard
from hina_optim.engine.lines import line_length
from hina_optim.engine.program import Inputs, Program, Values
from hina_optim.engine.transfers import Fetched
from hina_optim.state.ranges import ends as range_ends
from hina_optim.state.ranges import span
from hina_optim.state.rounding import param_seeds

__all__ = [
    "CPU_CHUNK",
    "FOLD",
    "GRAIN",
    "KEPT_VALUES",
    "LINED_VALUES",
    "LIVE_VALUES",
    "STACK",
    "Cell",
    "cut",
]

#: Values alive at once, per element, while a segment runs: of the leanest recipe 14 were measured, of the fullest 37.
LIVE_VALUES = 40
#: Those of them that are kept from one segment to the next.
KEPT_VALUES = 16
#: Chunks begin at multiples of this many elements, which is a multiple of every fold (techniques.base.Folded); those
#: that are cut between rows, at multiples of FOLD.
GRAIN = 4096
FOLD = 64
#: Values alive at once, per element, where segments run in lines: stacks of small parameters, and little else.
LINED_VALUES = 4
#: Elements of a stack of small parameters that runs in graphs: weights and gradients take 32 MB. Smaller ones would
#: stay in nearer caches from segment to segment, but a call of a graph costs as much as many elements.
STACK = 1 << 22
#: On a CPU, eager chunks are small enough for the values in flight to stay in its caches.
CPU_CHUNK = 1 << 17


@dataclass
class Cell:
    """Parameters ``first … stop-1`` of a bucket; of a single one, optionally only elements ``begin … end-1``.

    A chunk is cut from the flat parameter (of a flat partition in 8 bits, between its blocks), or, with ``by_rows``,
    along its first dimension: the way for techniques and codecs that tell rows apart, and for a parameter whose memory
    is not contiguous (channels last), which cannot be flattened without a copy.
    """

    bucket: Bucket
    program: Program
    first: int
    stop: int
    begin: int
    end: int
    chunked: bool
    by_rows: bool
    last: bool
    measured_scalars: Values
    carry: Values | None = None
    totals: list[Values] = field(default_factory=list)
    inputs: Inputs | None = None
    whole: Values = field(default_factory=dict)
    kept: bool = True  # whether inputs and values stay from one segment to the next
    fetched: Fetched | None = None
    complete: list[Tensor] | None = None  # gathered ahead, for the next segment

    @property
    def range(self) -> tuple[int, int] | None:
        """Its elements in a flat range that is stored in blocks; None where it is no chunk of one."""
        return (self.begin, self.end) if self.chunked and self.bucket.in_ranges else None

    def homes(self, i: int) -> Values:
        """What is worth bringing from host memory before segment ``i``: pieces, where they live."""
        parts = self.bucket.hosted_parts
        if not self.program.compiled:  # that takes all at once; else what is missing comes when it is asked for
            parts = self.program.asked.get(-1 if self.kept else i, frozenset())
        return self.pieces({part: self.bucket.storage[part] for part in parts})

    def pieces(self, stacks: Mapping[str, Tensor]) -> Values:
        """Its part of stored tensors: views."""
        bucket, rows = self.bucket, slice(self.first, self.stop)
        pieces = {name: stack[rows] for name, stack in stacks.items()}
        if not self.chunked:
            return pieces
        for slot in bucket.slots:
            if slot.shape == "like" and slot.name not in bucket.key.zero_anchors:
                codec = bucket.codecs[slot.name]
                for suffix in codec.parts:
                    part = slot.name + suffix
                    if part in pieces:
                        pieces[part] = self._cut(pieces[part], *span(codec, suffix, self.begin, self.end))
        return pieces

    def chunk(self, values: Values) -> Values:
        """The elements of the chunk of such tensors; all, where it is none."""
        if not self.chunked:
            return values
        return {name: self._cut(value, self.begin, self.end) for name, value in values.items()}

    def _cut(self, value: Tensor, begin: int, end: int) -> Tensor:
        """The chunk of a stack ``[1, …]``, which in the flat one is ``begin … end-1``."""
        if not self.by_rows:
            return value.view(1, -1)[:, begin:end]
        # cut between rows, every part of a state has the parameter's rows as its first dimension
        row = self.bucket.numel // self.bucket.key.local_shape[0]
        return value[:, self.begin // row : self.end // row]

    def lines(self) -> Values:
        """Rows of the matrix view that are here, where not all are; of a box, its columns, too.

        Of a flat piece, each element's row and column.
        """
        bucket = self.bucket
        whole = bucket.shard.is_complete and not self.chunked and len(bucket.key.local_shape) > 1
        return {} if whole or not bucket.info.is_matrix else lines(bucket, self.begin, self.end)


def lines(bucket: Bucket, begin: int, end: int) -> Values:
    """Rows and columns of the matrix view in which the local elements ``begin … end-1`` of a bucket's parameters lie.

    ``row_index`` of each row, and of a box that is no range also ``column_index`` of each column; of a flat piece, of
    each element.
    """
    shard, shape, device, columns = bucket.shard, bucket.key.local_shape, bucket.key.device, bucket.info.columns
    if not bucket.numel and len(shape) > 1:  # rows without columns, or columns without rows
        none = {"row_index": shape[0], "column_index": torch.Size(shape[1:]).numel()}
        return {name: torch.zeros(n, dtype=torch.int64, device=device) for name, n in none.items()}
    if shard.offset is not None and shard.size is not None:  # some columns of some rows
        row = bucket.numel // shape[0]
        first = shard.offset[0] + begin // row
        across = Shard.box(shard.shape[1:], shard.offset[1:], shard.size[1:])
        rows = torch.arange(first, first + (end - begin) // row, device=device)
        return {"row_index": rows, "column_index": across.index(device)}
    begin, end = shard.start + begin, shard.start + end
    if len(shape) > 1:
        return {"row_index": torch.arange(begin // columns, end // columns, device=device)}
    index = torch.arange(begin, end, device=device)
    return {"row_index": index // columns, "column_index": index % columns}


def cut(bucket: Bucket, program: Program, limit: int, loss: Tensor | None, numel: int, flat: bool) -> Iterator[Cell]:
    """The cells of a bucket for its next step.

    Args:
        bucket: With its state.
        program: Its segments.
        limit: Elements that may run at once.
        loss: 0-d, the loss that was reported for this step; None where none was.
        numel: Elements that a parameter counts for; its local ones, or more.
        flat: Whether all its weights and gradients are contiguous.
    """
    device = bucket.key.device
    precise = torch.float32 if device.type == "mps" else torch.float64
    t = (bucket.step + 1) - bucket.skipped.to(precise)
    scalars = program.rules.scalars(t)
    lr = bucket.group["lr"]
    scalars["lr"] = (
        lr.to(device, program.compute).reshape(())
        if isinstance(lr, Tensor)
        else torch.full((), float(lr), dtype=program.compute, device=device)
    )
    if program.reads_loss:
        scalars["loss"] = (
            torch.full((bucket.size,), torch.nan, dtype=program.compute, device=device)
            if loss is None
            else loss.to(device, program.compute).reshape(1).expand(bucket.size)
        )
    if program.needs_index:
        scalars["seeds"] = param_seeds(bucket.keys, int(bucket.group["seed"]), bucket.step)
    n = bucket.size
    by_rows = not flat or (program.needs_rows and len(bucket.key.local_shape) > 1)
    if by_rows and not program.needs_whole:
        row = max(1, numel // max(1, bucket.key.local_shape[0] if bucket.key.local_shape else 1))
        step = FOLD // math.gcd(row, FOLD)
        if program.lines is not None and limit // row >= math.lcm(step, BAND):  # one kind of graphs for all chunks
            step = math.lcm(step, BAND)
        limit = max(1, limit // row // step) * step * row
    tail = numel - numel % GRAIN
    odd = program.lines is not None and not by_rows and (n == 1 or numel > limit) and 2 * GRAIN <= tail < numel
    if odd and not line_length(1, numel - (numel - 1) // limit * limit):
        # elements that make no lines: as few as possible, apart from the others
        ends = [*range(limit, tail, limit), tail, numel]
    elif bucket.in_ranges:
        ends = range_ends(bucket.shard.start, numel, limit, bucket.codecs.values())
    else:
        ends = [*range(limit, numel, limit), numel]
    if len(ends) > 1 and not program.needs_whole:
        for p in range(n):
            for begin, end in pairwise((0, *ends)):
                yield Cell(bucket, program, p, p + 1, begin, end, True, by_rows, end == numel, scalars)
        return
    # without chunks a parameter must fit as a whole; small ones share a cell
    each = max(1, limit // max(1, numel))
    for first in range(0, n, each):
        stop = min(n, first + each)
        yield Cell(bucket, program, first, stop, 0, bucket.numel, False, False, True, scalars)
