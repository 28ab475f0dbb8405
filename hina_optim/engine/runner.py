"""One step over all buckets: cells, phases, one reduction a phase, and nothing written before everything is known.

A *cell* is what runs at once: some parameters of a bucket, or a chunk of a large one. Cells whose sums must meet before
the next phase form a *domain*: one cell in the usual case, the chunks of a large parameter, or everything where
parameters are sharded. Values are kept from phase to phase in a domain of one cell; in a larger one they are computed
again from the stored tensors if keeping them would take more memory than allowed.
"""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor

from hina_optim.engine.bucket import Bucket
from hina_optim.engine.exhaustion import UNCHANGED, ExhaustionError, attempt, give_back, is_out_of_memory
from hina_optim.engine.layout import Layout
from hina_optim.engine.program import Inputs, Program, Values, piece
from hina_optim.state.precision import compute_dtype
from hina_optim.state.rounding import param_seeds

__all__ = ["Runner"]

log = logging.getLogger("hina_optim")

T = TypeVar("T")

#: Values alive at once, per element, while a segment runs (measured: 34 with the default techniques).
LIVE_VALUES = 40
#: Those of them that are kept from one segment to the next.
KEPT_VALUES = 16
#: Chunks begin at multiples of this many elements, which is a multiple of every fold (techniques.base.Folded); those
#: that are cut between rows, at multiples of FOLD.
GRAIN = 4096
FOLD = 64
#: Bytes of temporary memory with which a step makes do if it must.
SMALLEST_BUFFER = 8_000_000
#: On a CPU, eager chunks are small enough for the values in flight to stay in its caches.
CPU_CHUNK = 1 << 17


@dataclass
class Cell:
    """Parameters ``first … stop-1`` of a bucket; of a single one, optionally only elements ``begin … end-1``.

    A chunk is cut from the flat parameter, or, with ``by_rows``, along its first dimension: the way for techniques and
    codecs that tell rows apart, and for a parameter whose memory is not contiguous (channels last), which cannot be
    flattened without a copy.
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


class Runner:
    """Runs buckets.

    Args:
        layout: Where elements lie.
        max_bytes: Bound on temporary memory (a complete matrix that a technique needs whole may exceed it).
        loss: 0-d, the loss that was reported for this step; None where none was.
    """

    #: Devices on which memory is set aside before the first cell: those whose allocator keeps what it once had.
    RESERVING: ClassVar[frozenset[str]] = frozenset({"cuda"})

    def __init__(self, layout: Layout, max_bytes: int, loss: Tensor | None = None) -> None:
        self.layout = layout
        self.max_bytes = max_bytes
        self.loss = loss
        #: bucket → ranges of its parameters that this step has updated, weights and state
        self.updated: dict[Bucket, list[tuple[int, int]]] = {}
        #: name of a parameter of which some chunks are updated and others not yet
        self.torn: str | None = None
        self._short = False  # memory ran out in this step: keep nothing that can be computed again

    def step(self, work: Sequence[tuple[Bucket, Program]]) -> None:
        """Update every bucket of ``work`` by one step; state is allocated, gradients are there.

        Where memory runs out, what is held without need is given back and the cell at hand, which has changed nothing
        until then, runs once more.

        Raises:
            ExhaustionError: It ran out again. :attr:`updated` says what this step has updated until then.
        """
        try:
            self._reserve(work)
            if self.layout.sharded:
                self._domain([cell for bucket, program in work for cell in self._cells(bucket, program)])
                return
            for bucket, program in work:
                for _, domain in groupby(self._cells(bucket, program), key=lambda cell: cell.first):
                    self._domain(list(domain))
        except (RuntimeError, MemoryError) as error:
            if isinstance(error, ExhaustionError) or not is_out_of_memory(error):
                raise
            raise ExhaustionError(f"{error}\n{self._outcome(work)}") from error

    def _outcome(self, work: Sequence[tuple[Bucket, Program]]) -> str:
        """What a step that ends early has done."""
        every = sum(bucket.size for bucket, _ in work)
        done = [m.name for bucket, ranges in self.updated.items() for a, b in ranges for m in bucket.members[a:b]]
        if not done and self.torn is None:
            return UNCHANGED
        some = f" ({', '.join(done[:3])}{', …' if len(done) > 3 else ''})" if done else ""
        torn = (
            f" {self.torn} was updated in part: every element has the weight and the state of the same step, but some "
            "have taken this step and others have not."
            if self.torn is not None
            else ""
        )
        return (
            f"Memory ran out in step() of the optimizer. {len(done)} of {every} parameters were updated{some}, weights "
            f"and state alike; the others are as they were.{torn} The gradients are as they were: do not step with "
            "them again."
        )

    def _reserve(self, work: Sequence[tuple[Bucket, Program]]) -> None:
        """See that the temporary memory of the largest cell is there before anything changes; the allocator keeps it.

        With less, the cells are made smaller.

        Raises:
            RuntimeError: There is not even enough for the smallest.
        """
        for device in {b.key.device for b, _ in work if b.key.device.type in self.RESERVING}:
            while not self._has(device, max(self._live_bytes(b, p) for b, p in work if b.key.device == device)):
                if self.max_bytes // 2 < SMALLEST_BUFFER:
                    raise torch.OutOfMemoryError(f"{SMALLEST_BUFFER} bytes cannot be had on {device}.")
                self.max_bytes //= 2
                log.warning(
                    "too little memory on %s for a step in pieces of max_buffer_memory_mb; this one takes pieces of "
                    "%d MB", device, self.max_bytes // 10**6,
                )  # fmt: skip

    @staticmethod
    def _has(device: torch.device, size: int) -> bool:
        for again in (False, True):
            try:
                torch.empty(size, dtype=torch.uint8, device=device)
                return True
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
            if not again:
                give_back(device)
        return False

    def _limit(self, bucket: Bucket, program: Program) -> int:
        """Elements that may run at once."""
        limit = max(GRAIN, self.max_bytes // self._each(bucket) // GRAIN * GRAIN)
        return min(limit, CPU_CHUNK) if bucket.key.device.type == "cpu" and not program.compiled else limit

    @staticmethod
    def _each(bucket: Bucket) -> int:
        """Bytes that a step holds an element."""
        return LIVE_VALUES * compute_dtype(bucket.key.dtype).itemsize

    def _live_bytes(self, bucket: Bucket, program: Program) -> int:
        return self._each(bucket) * min(self._limit(bucket, program), bucket.size * bucket.numel)

    def _attempt(self, run: Callable[[], T], cell: Cell | None, cells: Sequence[Cell], what: str) -> T:
        """Run what changes nothing unless it succeeds; once more if memory runs out."""

        def release() -> None:
            self._short = True
            for other in cells:
                if other is not cell and not other.program.needs_whole:
                    other.inputs = other.carry = None
            for device in {other.bucket.key.device for other in cells}:
                give_back(device)

        def name() -> str:
            if cell is None:
                return what
            names = [m.name for m in cell.bucket.members[cell.first : cell.stop]]
            return f"{what} of {', '.join(names[:3])}{f' and {len(names) - 3} more' if len(names) > 3 else ''}"

        return attempt(run, release, name)

    def _cells(self, bucket: Bucket, program: Program) -> list[Cell]:
        return self._attempt(lambda: list(self._cut(bucket, program)), None, (), "the scalars")

    def _cut(self, bucket: Bucket, program: Program) -> Iterator[Cell]:
        limit = self._limit(bucket, program)
        device = bucket.key.device
        precise = torch.float32 if device.type == "mps" else torch.float64
        t = (bucket.step + 1) - bucket.skipped.to(precise)
        scalars = program.scalars(t)
        lr = bucket.group["lr"]
        scalars["lr"] = (
            lr.to(device, program.compute).reshape(())
            if isinstance(lr, Tensor)
            else torch.full((), float(lr), dtype=program.compute, device=device)
        )
        if program.reads_loss:
            scalars["loss"] = (
                torch.full((bucket.size,), torch.nan, dtype=program.compute, device=device)
                if self.loss is None
                else self.loss.to(device, program.compute).reshape(1).expand(bucket.size)
            )
        if program.needs_index:
            scalars["seeds"] = param_seeds(bucket.keys, int(bucket.group["seed"]), bucket.step)
        n, numel = bucket.size, bucket.numel
        by_rows = not self._contiguous(bucket) or (program.needs_rows and len(bucket.key.local_shape) > 1)
        if by_rows:
            row = max(1, numel // max(1, bucket.key.local_shape[0] if bucket.key.local_shape else 1))
            step = FOLD // math.gcd(row, FOLD)
            limit = max(1, limit // row // step) * step * row
        if numel > limit and not program.needs_whole and not (program.coded_rows and len(bucket.key.local_shape) == 1):
            for p in range(n):
                for begin in range(0, numel, limit):
                    end = min(begin + limit, numel)
                    yield Cell(bucket, program, p, p + 1, begin, end, True, by_rows, end == numel, scalars)
            return
        # without chunks a parameter must fit as a whole; small ones share a cell
        each = max(1, limit // max(1, numel))
        for first in range(0, n, each):
            stop = min(n, first + each)
            yield Cell(bucket, program, first, stop, 0, numel, False, False, True, scalars)

    def _contiguous(self, bucket: Bucket) -> bool:
        return all(p.is_contiguous() and p.grad is not None and p.grad.is_contiguous() for p in bucket.params)

    def _inputs(self, cell: Cell) -> Inputs:
        """Stored tensors of a cell: views where the memory allows it, stacks of the small ones."""
        bucket = cell.bucket
        params = bucket.params[cell.first : cell.stop]
        grads: list[Tensor] = [p.grad for p in params if p.grad is not None]
        rows = slice(cell.first, cell.stop)
        stored: Values = {name: stack[rows] for name, stack in bucket.storage.items()}
        stored["skipped"] = bucket.skipped[rows]
        if len(params) == 1:
            stored["param"], stored["grad"] = params[0].detach().unsqueeze(0), grads[0].detach().unsqueeze(0)
        else:
            stored["param"], stored["grad"] = torch.stack([p.detach() for p in params]), torch.stack(grads)
        if cell.chunked:
            row = bucket.numel // bucket.key.local_shape[0] if cell.by_rows else 1
            cut = slice(cell.begin // row, cell.end // row)
            like = {s.name for s in bucket.slots if s.shape == "like"} - bucket.key.zero_anchors
            like = {name + suffix for name in like for suffix in bucket.codecs[name].parts} | {"param", "grad"}
            # cut between rows, every part of a state has the parameter's rows as its first dimension
            stored = {k: (v if cell.by_rows else v.view(1, -1))[:, cut] if k in like else v for k, v in stored.items()}
        scalars = {k: v[rows] if v.ndim else v for k, v in cell.measured_scalars.items()}
        if cell.program.needs_index:
            start = bucket.shard.start + cell.begin
            shape = stored["grad"].shape[1:]
            index = torch.arange(start, start + cell.end - cell.begin, device=bucket.key.device)
            scalars["index"] = index.reshape(1, *shape)
        if cell.program.needs_rows:
            scalars |= self._lines(cell)
        return Inputs(stored, scalars)

    @staticmethod
    def _lines(cell: Cell) -> Values:
        """Rows of the matrix view that are here, where not all are; of a flat piece, each element's row and column."""
        shard, shape, device = cell.bucket.shard, cell.bucket.key.local_shape, cell.bucket.key.device
        columns = cell.bucket.info.columns
        if not cell.bucket.info.is_matrix or (shard.is_complete and not cell.chunked):
            return {}
        begin, end = shard.start + cell.begin, shard.start + cell.end
        if len(shape) > 1:
            return {"row_index": torch.arange(begin // columns, end // columns, device=device)}
        index = torch.arange(begin, end, device=device)
        return {"row_index": index // columns, "column_index": index % columns}

    def _domain(self, cells: list[Cell]) -> None:
        phases = max((len(c.program.segments) for c in cells), default=0)
        sizes = [(c.end - c.begin) * (c.stop - c.first) * c.program.compute.itemsize for c in cells]
        keep_all = len(cells) == 1 or sum(sizes) * KEPT_VALUES + max(sizes) * LIVE_VALUES <= self.max_bytes
        for i in range(phases):
            results: list[tuple[Cell, Values]] = []
            for cell in cells:
                segments = cell.program.segments
                if i >= len(segments):
                    continue
                # where parameters are sharded the other ranks wait for this one: gathered once, whatever happens
                complete = self._complete(cell, i) if self.layout.sharded else None
                final = i == len(segments) - 1
                if final and cell.program.compiled:  # what a graph writes when is the compiler's business
                    inputs, values, sums = self._run(cell, i, complete)
                else:
                    run = functools.partial(self._run, cell, i, complete)
                    inputs, values, sums = self._attempt(run, cell, cells, f"segment {i + 1} of {len(segments)}")
                if final:
                    self._note(cell)
                keep = (keep_all and not self._short) or len(cells) == 1 or cell.program.needs_whole
                cell.inputs = inputs if keep and not final else None
                cell.carry = values if keep and not final else None
                if not final:
                    results.append((cell, sums))
            if results:
                self._reduce(results, cells)

    def _run(self, cell: Cell, i: int, complete: list[Tensor] | None) -> tuple[Inputs, Values, Values]:
        """Segment ``i`` of a cell; nothing changes but in the last one, at its end."""
        inputs = cell.inputs or self._inputs(cell)
        segment = cell.program.segments[i]
        if segment.whole is not None:
            assert cell.carry is not None
            complete = self._complete(cell, i) if complete is None else complete
            result = cell.program.whole_matrix(segment.whole, inputs, cell.carry, complete)
            cell.whole[segment.whole.name] = piece(result, segment.whole, cell.bucket.shard, cell.carry["grad"])
        values, sums = cell.program.run(i, inputs, cell.carry, cell.totals, cell.whole, cell.last)
        if i == len(cell.program.segments) - 1:
            self._write_back(cell, inputs)
        return inputs, values, sums

    def _note(self, cell: Cell) -> None:
        """Remember that a cell is updated."""
        if cell.last:
            self.updated.setdefault(cell.bucket, []).append((cell.first, cell.stop))
        self.torn = None if cell.last else cell.bucket.members[cell.first].name

    def _complete(self, cell: Cell, i: int) -> list[Tensor]:
        """Complete values for the technique that opens segment ``i``.

        Where parameters are sharded every rank takes part, one that happens to have all of this one, too.
        """
        one, carry = cell.program.segments[i].whole, cell.carry
        if one is None:
            return []
        assert carry is not None  # the guard's segment comes before any other
        shard = cell.bucket.shard
        if self.layout.sharded:
            return [self.layout.gather(carry[name], shard) for name in one.whole]
        return [carry[name].reshape(carry[name].shape[0], *shard.shape) for name in one.whole]

    def _reduce(self, results: list[tuple[Cell, Values]], cells: list[Cell]) -> None:
        """Add up the sums of a phase: over chunks here, over shards in one packed all-reduce."""
        merged = self._attempt(lambda: self._merge(results), None, cells, "the sums")
        flat = [v.reshape(-1) for _, sums in merged for v in sums.values()] if self.layout.sharded else []
        if flat:
            local = self._attempt(lambda: torch.cat(flat), None, cells, "the sums")
            packed = self.layout.all_reduce(local)  # once: the other ranks wait for this one
            at = 0
            for _, sums in merged:
                for k, v in sums.items():
                    sums[k] = packed[at : at + v.numel()].reshape(v.shape)
                    at += v.numel()
        pairs = [(cell, sums) for members, sums in merged for cell in members]
        totals = self._attempt(
            lambda: [{k: v.to(cell.program.compute) for k, v in sums.items()} for cell, sums in pairs],
            None, cells, "the sums",
        )  # fmt: skip
        for (cell, _), values in zip(pairs, totals, strict=True):
            cell.totals.append(values)

    def _merge(self, results: list[tuple[Cell, Values]]) -> list[tuple[list[Cell], Values]]:
        """Cells of the same parameters, and their sums."""
        groups: dict[tuple[int, int, int], list[tuple[Cell, Values]]] = {}
        for cell, sums in results:
            groups.setdefault((id(cell.bucket), cell.first, cell.stop), []).append((cell, sums))
        merged: list[tuple[list[Cell], Values]] = []
        for members in groups.values():
            cells, first = [cell for cell, _ in members], members[0][1]
            if len(members) == 1 and not self.layout.sharded:
                merged.append((cells, first))
                continue
            wide = torch.float32 if cells[0].bucket.key.device.type == "mps" else torch.float64
            merged.append((cells, {k: sum((s[k].to(wide) for _, s in members[1:]), first[k].to(wide)) for k in first}))
        return merged

    def _write_back(self, cell: Cell, inputs: Inputs) -> None:
        """Copy updated stacks into the parameters they were made of; views are updated already."""
        if cell.stop - cell.first > 1:
            params: list[Any] = [p.detach() for p in cell.bucket.params[cell.first : cell.stop]]
            torch._foreach_copy_(params, list(inputs.stored["param"].unbind(0)))
