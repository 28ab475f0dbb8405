"""One step over all buckets: cells, phases, one reduction a phase, and nothing written before everything is known.

A *cell* is what runs at once: some parameters of a bucket, or a chunk of a large one. Cells whose sums must meet before
the next phase form a *domain*: one cell in the usual case, the chunks of a large parameter, or everything where
parameters are sharded. Values are kept from phase to phase in a domain of one cell; in a larger one they are computed
again from the stored tensors if keeping them would take more memory than allowed.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from hina_optim.engine.bucket import Bucket
from hina_optim.engine.layout import Layout
from hina_optim.engine.program import Inputs, Program, Values, piece
from hina_optim.state.precision import compute_dtype
from hina_optim.state.rounding import param_seeds

__all__ = ["Runner"]

#: Values alive at once, per element, while a segment runs (measured: 34 with the default techniques).
LIVE_VALUES = 40
#: Those of them that are kept from one segment to the next.
KEPT_VALUES = 16
#: Chunks begin at multiples of this many elements, which is a multiple of every fold (techniques.base.Folded); those
#: that are cut between rows, at multiples of FOLD.
GRAIN = 4096
FOLD = 64
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

    def __init__(self, layout: Layout, max_bytes: int, loss: Tensor | None = None) -> None:
        self.layout = layout
        self.max_bytes = max_bytes
        self.loss = loss

    def step(self, work: Sequence[tuple[Bucket, Program]]) -> None:
        """Update every bucket of ``work`` by one step; state is allocated, gradients are there."""
        if self.layout.sharded:
            cells = [cell for bucket, program in work for cell in self._cells(bucket, program)]
            self._domain(cells)
        else:
            for bucket, program in work:
                for _, domain in groupby(self._cells(bucket, program), key=lambda cell: cell.first):
                    self._domain(list(domain))

    def _cells(self, bucket: Bucket, program: Program) -> Iterator[Cell]:
        itemsize = compute_dtype(bucket.key.dtype).itemsize
        limit = max(GRAIN, self.max_bytes // (LIVE_VALUES * itemsize) // GRAIN * GRAIN)
        if bucket.key.device.type == "cpu" and not program.compiled:
            limit = min(limit, CPU_CHUNK)
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
                keep = keep_all or cell.program.needs_whole
                inputs = cell.inputs or self._inputs(cell)
                if segments[i].whole is not None:
                    self._gather(cell, i, inputs)
                values, sums = cell.program.run(i, inputs, cell.carry, cell.totals, cell.whole, cell.last)
                final = i == len(segments) - 1
                if final:
                    self._write_back(cell, inputs)
                cell.inputs = inputs if keep and not final else None
                cell.carry = values if keep and not final else None
                if not final:
                    results.append((cell, sums))
            if results:
                self._reduce(results)

    def _gather(self, cell: Cell, i: int, inputs: Inputs) -> None:
        """Complete values for the technique that opens segment ``i``, and its result on them."""
        one, carry = cell.program.segments[i].whole, cell.carry
        assert one is not None and carry is not None  # the guard's segment comes before any other
        shard = cell.bucket.shard
        complete = [
            # where parameters are sharded every rank takes part, one that happens to have all of this one, too
            self.layout.gather(v, shard) if self.layout.sharded else v.reshape(v.shape[0], *shard.shape)
            for v in (carry[name] for name in one.whole)
        ]
        result = cell.program.whole_matrix(one, inputs, carry, complete)
        cell.whole[one.name] = piece(result, one, shard, carry["grad"])

    def _reduce(self, results: list[tuple[Cell, Values]]) -> None:
        """Add up the sums of a phase: over chunks here, over shards in one packed all-reduce."""
        groups: dict[tuple[int, int, int], list[tuple[Cell, Values]]] = {}
        for cell, sums in results:
            groups.setdefault((id(cell.bucket), cell.first, cell.stop), []).append((cell, sums))
        merged: list[tuple[list[tuple[Cell, Values]], Values]] = []
        for members in groups.values():
            first = members[0][1]
            if len(members) == 1 and not self.layout.sharded:
                merged.append((members, first))
                continue
            device = members[0][0].bucket.key.device
            wide = torch.float32 if device.type == "mps" else torch.float64
            merged.append(
                (members, {k: sum((s[k].to(wide) for _, s in members[1:]), first[k].to(wide)) for k in first})
            )
        if self.layout.sharded:
            flat = [v.reshape(-1) for _, sums in merged for v in sums.values()]
            if flat:
                packed = self.layout.all_reduce(torch.cat(flat))
                at = 0
                for _, sums in merged:
                    for k, v in sums.items():
                        sums[k] = packed[at : at + v.numel()].reshape(v.shape)
                        at += v.numel()
        for members, sums in merged:
            for cell, _ in members:
                cell.totals.append({k: v.to(cell.program.compute) for k, v in sums.items()})

    def _write_back(self, cell: Cell, inputs: Inputs) -> None:
        """Copy updated stacks into the parameters they were made of; views are updated already."""
        if cell.stop - cell.first > 1:
            params: list[Any] = [p.detach() for p in cell.bucket.params[cell.first : cell.stop]]
            torch._foreach_copy_(params, list(inputs.stored["param"].unbind(0)))
