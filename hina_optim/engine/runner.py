"""One step over all buckets: cells, phases, one reduction a phase, and nothing written before everything is known.

A *cell* is what runs at once: some parameters of a bucket, or a chunk of a large one. Cells whose sums must meet before
the next phase form a *domain*: one cell in the usual case, the chunks of a large parameter, or everything where
parameters are sharded. Values are kept from phase to phase in a domain of one cell; in a larger one they are computed
again from the stored tensors if keeping them would take more memory than allowed.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from typing import ClassVar, TypeVar

import torch
from torch import Tensor

from hina_optim.engine.bucket import Bucket
from hina_optim.engine.cells import (
    CPU_CHUNK,
    GRAIN,
    KEPT_VALUES,
    LINED_VALUES,
    LIVE_VALUES,
    STACK,
    Cell,
    cut,
)
from hina_optim.engine.exhaustion import UNCHANGED, ExhaustionError, attempt, give_back, is_out_of_memory
from hina_optim.engine.layout import Layout
from hina_optim.engine.program import Inputs, Program, Values
from hina_optim.engine.scales import agree_on_step
from hina_optim.engine.transfers import Pieces, Transfers
from hina_optim.state.precision import compute_dtype

__all__ = ["Runner"]

log = logging.getLogger("hina_optim")

T = TypeVar("T")

#: Bytes of temporary memory with which a step makes do if it must.
SMALLEST_BUFFER = 8_000_000
#: Bytes of complete values of sharded parameters that are gathered at once; a single parameter may be larger.
GATHERED = 64_000_000
#: What happens to the other ranks when this one cannot finish a step.
WAITING = " The other ranks wait for this one and end with a time-out: resume all from the last checkpoint."
#: Pieces in which memory is set aside.
RESERVED = 8


class Runner:
    """Runs buckets.

    Args:
        layout: Where elements lie.
        max_bytes: Bound on temporary memory (a complete matrix that a technique needs whole may exceed it).
        loss: 0-d, the loss that was reported for this step; None where none was.
        transfers: Brings state from host memory, and takes it back.
    """

    #: Devices on which memory is set aside before the first cell: those whose allocator keeps what it once had.
    RESERVING: ClassVar[frozenset[str]] = frozenset({"cuda"})

    def __init__(
        self, layout: Layout, max_bytes: int, loss: Tensor | None = None, transfers: Transfers | None = None
    ) -> None:
        self.layout = layout
        self.transfers = transfers or Transfers()
        self.max_bytes = max_bytes
        self.loss = loss
        #: bucket → ranges of its parameters that this step has updated, weights and state
        self.updated: dict[Bucket, list[tuple[int, int]]] = {}
        #: name of a parameter of which some chunks are updated and others not yet
        self.torn: str | None = None
        self._flat: dict[Bucket, bool] = {}
        self._ahead: list[Cell] = []  # cells whose state is on its way
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
            self.transfers.begin({bucket.key.device for bucket, _ in work})
            ahead = any(bucket.hosted for bucket, _ in work)
            domains = self._domains(work)
            cells = next(domains, None)
            while cells:
                following = next(domains, None) if ahead else None
                self._domain(cells, following[0] if following else None)
                cells = following if ahead else next(domains, None)
        except (RuntimeError, MemoryError) as error:
            if isinstance(error, ExhaustionError) or not is_out_of_memory(error):
                raise
            raise ExhaustionError(f"{error}\n{self._outcome(work)}") from error
        finally:
            self._drop_ahead()
            self.transfers.finish()

    def _domains(self, work: Sequence[tuple[Bucket, Program]]) -> Iterator[list[Cell]]:
        """Cells whose sums must meet."""
        if self.layout.sharded:
            yield self._together([cell for bucket, program in work for cell in self._cells(bucket, program)])
            return
        for bucket, program in work:
            for _, domain in groupby(self._cells(bucket, program), key=lambda cell: cell.first):
                yield self._together(list(domain))

    def _together(self, cells: list[Cell]) -> list[Cell]:
        """A domain: what is kept in it from segment to segment is all, or only what cannot be computed again."""
        sizes = [(c.end - c.begin) * (c.stop - c.first) * c.program.compute.itemsize for c in cells]
        most = max(
            (size * (LIVE_VALUES + 2 * len(c.bucket.hosted)) for c, size in zip(cells, sizes, strict=True)), default=0
        )
        every = sum(size * (KEPT_VALUES + len(c.bucket.hosted)) for c, size in zip(cells, sizes, strict=True))
        keep_all = len(cells) == 1 or every + most <= self.max_bytes
        for cell in cells:
            cell.kept = keep_all or cell.program.needs_whole
        return cells

    def _outcome(self, work: Sequence[tuple[Bucket, Program]]) -> str:
        """What a step that ends early has done."""
        every = sum(bucket.size for bucket, _ in work)
        done = [m.name for bucket, ranges in self.updated.items() for a, b in ranges for m in bucket.members[a:b]]
        if not done and self.torn is None:
            return UNCHANGED + (WAITING if self.layout.sharded else "")
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
            f"them again.{WAITING if self.layout.sharded else ''}"
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
                # in pieces, as it will be used: one alone could ask for new memory where enough blocks are free
                [torch.empty(-(-size // RESERVED), dtype=torch.uint8, device=device) for _ in range(RESERVED)]
                return True
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
            if not again:
                give_back(device)
        return False

    def _limit(self, bucket: Bucket, program: Program, most: int) -> int:
        """Elements that may run at once within so many bytes."""
        limit = max(GRAIN, most // self._each(bucket, program) // GRAIN * GRAIN)
        if self._lined(bucket, program):
            return min(limit, STACK) if bucket.size > 1 else limit
        eager = program.lines is not None or not program.compiled
        return min(limit, CPU_CHUNK) if bucket.key.device.type == "cpu" and eager else limit

    def _lined(self, bucket: Bucket, program: Program) -> bool:
        """Whether its segments run in lines: with next to no temporary values."""
        return program.lines is not None and self._is_flat(bucket)

    def _is_flat(self, bucket: Bucket) -> bool:
        """Whether all its weights and gradients are contiguous."""
        if bucket not in self._flat:
            self._flat[bucket] = all(x.is_contiguous() for x in (*bucket.weights(), *bucket.grads()))
        return self._flat[bucket]

    def _each(self, bucket: Bucket, program: Program) -> int:
        """Bytes that a step holds an element."""
        values = LINED_VALUES if self._lined(bucket, program) else LIVE_VALUES
        # of what comes from the host, this cell's pieces and the next one's
        return (values + 2 * len(bucket.hosted)) * compute_dtype(bucket.key.dtype).itemsize

    def _live_bytes(self, bucket: Bucket, program: Program) -> int:
        return self._each(bucket, program) * min(
            self._limit(bucket, program, self.max_bytes), bucket.size * bucket.numel
        )

    def _attempt(self, run: Callable[[], T], cell: Cell | None, cells: Sequence[Cell], what: str) -> T:
        """Run what changes nothing unless it succeeds; once more if memory runs out."""

        def release() -> None:
            self._short = True
            self._drop_ahead()
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
        # complete values are gathered by all ranks: whatever each of them holds, they cut a bucket into the same cells
        alike = self.layout.sharded and program.needs_whole
        most = int(bucket.group["max_buffer_memory_mb"] * 1e6) if alike else self.max_bytes
        limit = self._limit(bucket, program, most)
        numel = bucket.info.numel if alike else bucket.numel
        flat = self._is_flat(bucket)
        return self._attempt(lambda: list(cut(bucket, program, limit, self.loss, numel, flat)), None, (), "the scalars")

    def _inputs(self, cell: Cell, i: int) -> Inputs:
        """Stored tensors of a cell for segment ``i``: views where the memory allows it, stacks of the small ones."""
        bucket = cell.bucket
        weights, grads = bucket.weights(cell.first, cell.stop), bucket.grads(cell.first, cell.stop)
        rows = slice(cell.first, cell.stop)
        stored = cell.pieces(bucket.storage)
        stored["skipped"] = bucket.skipped[rows]
        if bucket.hosted:
            stored = self._with_hosted(cell, i, stored)
        if len(weights) == 1:
            both = {"param": weights[0].unsqueeze(0), "grad": grads[0].detach().unsqueeze(0)}
        else:
            both = {"param": torch.stack(weights), "grad": torch.stack(grads)}
        stored |= cell.chunk(both)
        scalars = {k: v[rows] if v.ndim else v for k, v in cell.measured_scalars.items()}
        if cell.program.needs_index and cell.program.lines is None:  # lines make their own
            index = bucket.shard.index(bucket.key.device, cell.begin, cell.end)
            scalars["index"] = index.reshape(1, *stored["grad"].shape[1:])
        if cell.program.needs_rows:
            scalars |= cell.lines()
        return Inputs(stored, scalars, bucket.shard.start + cell.begin, cell.range)

    def _with_hosted(self, cell: Cell, i: int, stored: Values) -> Values:
        """Pieces of state with those from the host in the place of where they live."""
        bucket, device = cell.bucket, cell.bucket.key.device
        homes = {name: stored.pop(name) for name in bucket.hosted_parts}
        fetched, cell.fetched = cell.fetched or self.transfers.fetch(cell.homes(i), device), None
        stored |= fetched.take()
        if cell.program.compiled:
            return stored
        return Pieces(stored, lambda name: self.transfers.fetch({name: homes[name]}, device).take()[name])

    def _fetch_ahead(self, cell: Cell | None, i: int) -> None:
        """Let a cell's state for segment ``i`` come while another one is computed."""
        if cell is None or not cell.bucket.hosted or self._short or cell.inputs is not None or cell.fetched is not None:
            return
        cell.fetched = self.transfers.try_fetch(cell.homes(i), cell.bucket.key.device)
        self._ahead = [other for other in (*self._ahead, cell) if other.fetched is not None]

    def _drop_ahead(self) -> None:
        """Give up what is on its way."""
        for cell in self._ahead:
            if cell.fetched is not None:
                cell.fetched.take()  # its memory is free for others once it has arrived
                cell.fetched = None
        self._ahead = []

    def _domain(self, cells: list[Cell], following: Cell | None) -> None:
        phases = max((len(c.program.segments) for c in cells), default=0)
        cut: list[tuple[Cell, Values]] = []  # what is encoded again once the ranks agree on the scales of its blocks
        for i in range(phases):
            results: list[tuple[Cell, Values]] = []
            running = [cell for cell in cells if i < len(cell.program.segments)]
            for at, cell in enumerate(running):
                segments = cell.program.segments
                if at + 1 < len(running):
                    self._fetch_ahead(running[at + 1], i)
                elif cell.kept or i + 1 == phases:  # what is kept needs not come again
                    self._fetch_ahead(following, 0)
                else:
                    self._fetch_ahead(running[0], i + 1)
                # where parameters are sharded the other ranks wait for this one: gathered once, whatever happens
                complete = self._gathered(running[at:], i) if self.layout.sharded else None
                final = i == len(segments) - 1
                if final and cell.program.compiled:  # what a graph writes when is the compiler's business
                    inputs, values, sums = self._run(cell, i, complete)
                else:
                    run = functools.partial(self._run, cell, i, complete)
                    inputs, values, sums = self._attempt(run, cell, cells, f"segment {i + 1} of {len(segments)}")
                if final:
                    self._note(cell)
                    cut += [(cell, values)] if values else []
                keep = cell.kept and (not self._short or len(cells) == 1 or cell.program.needs_whole)
                cell.inputs = inputs if keep and not final else None
                carries = not cell.program.compiled or cell.program.needs_whole  # other graphs compute values again
                cell.carry = values if keep and carries and not final else None
                if not final:
                    results.append((cell, sums))
            if results:
                self._reduce(results, cells)
        if cut:
            again = functools.partial(self._attempt, cell=None, cells=cells, what="blocks that lie on several ranks")
            agree_on_step(self.layout, self.transfers, cut, again)
        for cell in cells:  # what outlives its use leaves holes in the heap
            cell.totals, cell.whole = [], {}

    def _run(self, cell: Cell, i: int, complete: list[Tensor] | None) -> tuple[Inputs, Values, Values]:
        """Segment ``i`` of a cell; nothing changes but in the last one, at its end."""
        inputs = cell.inputs or self._inputs(cell, i)
        segment = cell.program.segments[i]
        if segment.whole is not None:
            assert cell.carry is not None
            complete = self._complete(cell, i) if complete is None else complete
            result = cell.program.whole_matrix(segment.whole, inputs, cell.carry, complete)
            here = result if segment.whole.whole_is_small else self.layout.take(cell.bucket.params[0], result)
            cell.whole[segment.whole.name] = here
        values, sums = cell.program.run(i, inputs, cell.carry, cell.totals, cell.whole, cell.last)
        final = i == len(cell.program.segments) - 1
        if cell.bucket.hosted and (final or not cell.kept):
            cell.program.asked[-1 if cell.kept else i] = cell.bucket.hosted_parts & inputs.stored.keys()
        if final:
            self._write_back(cell, inputs)
        return inputs, values, sums

    def _note(self, cell: Cell) -> None:
        """Remember that a cell is updated."""
        if cell.last:
            self.updated.setdefault(cell.bucket, []).append((cell.first, cell.stop))
        self.torn = None if cell.last else cell.bucket.members[cell.first].name

    def _complete(self, cell: Cell, i: int) -> list[Tensor]:
        """Complete values, where nothing is sharded, for the technique that opens segment ``i``."""
        one, carry = cell.program.segments[i].whole, cell.carry
        assert one is not None and carry is not None  # the guard's segment comes before any other
        return self.layout.gather([(cell.bucket.params[cell.first], carry[name]) for name in one.whole])

    def _gathered(self, cells: Sequence[Cell], i: int) -> list[Tensor]:
        """The same for the first of these cells, where parameters are sharded.

        Every rank takes part, one that happens to have all of this one, too. What small parameters need is gathered
        together with those that follow.
        """
        first = cells[0]
        if first.program.segments[i].whole is None:
            return []
        if first.complete is None:
            parts: list[tuple[Cell, Tensor]] = []
            size = 0
            for cell in cells:
                one, carry = cell.program.segments[i].whole, cell.carry
                if one is None or cell.complete is not None:
                    continue
                assert carry is not None
                size += (
                    len(one.whole) * (cell.stop - cell.first) * cell.bucket.info.numel * cell.program.compute.itemsize
                )
                if parts and size > GATHERED:  # the same on all ranks, whatever memory each of them has
                    break
                cell.complete = []
                parts += [(cell, carry[name]) for name in one.whole]
            values = self.layout.gather([(cell.bucket.params[cell.first], value) for cell, value in parts])
            for (cell, _), value in zip(parts, values, strict=True):
                assert cell.complete is not None
                cell.complete.append(value)
        found, first.complete = first.complete, None
        assert found is not None
        return found

    def _reduce(self, results: list[tuple[Cell, Values]], cells: list[Cell]) -> None:
        """Add up the sums of a phase: over chunks here, over shards in one packed all-reduce."""
        merged = self._attempt(lambda: self._merge(results), None, cells, "the sums")
        if self.layout.sharded:
            self._add_shards(merged, cells)
        pairs = [(cell, sums) for members, sums in merged for cell in members]
        totals = self._attempt(
            lambda: [{k: v.to(cell.program.compute) for k, v in sums.items()} for cell, sums in pairs],
            None, cells, "the sums",
        )  # fmt: skip
        for (cell, _), values in zip(pairs, totals, strict=True):
            cell.totals.append(values)

    def _add_shards(self, merged: list[tuple[list[Cell], Values]], cells: list[Cell]) -> None:
        """Replace sums by those over all shards, by one packed all-reduce.

        A bucket's are packed together: how it is cut into cells depends on what a rank holds of it.
        """
        alike: dict[tuple[Bucket, str], list[Values]] = {}
        for members, sums in merged:
            for k in sums:
                alike.setdefault((members[0].bucket, k), []).append(sums)
        parts = self._attempt(
            lambda: [
                (bucket.params[0], torch.cat([sums[k] for sums in every]) if len(every) > 1 else every[0][k])
                for (bucket, k), every in alike.items()
            ],
            None, cells, "the sums",
        )  # fmt: skip
        totals = self.layout.reduce(parts) if parts else []  # once: the other ranks wait for this one
        for ((_, k), every), total in zip(alike.items(), totals, strict=True):
            for sums, value in zip(every, total.split([sums[k].shape[0] for sums in every]), strict=True):
                sums[k] = value

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
        """Copy updated stacks into the parameters they were made of, and state to the host; views are updated."""
        bucket, stored = cell.bucket, inputs.stored
        if bucket.hosted:
            written = bucket.hosted_parts & (stored.written if isinstance(stored, Pieces) else stored.keys())
            homes = cell.pieces({part: bucket.storage[part] for part in written})
            self.transfers.store(stored, homes, bucket.key.device)
        if cell.stop - cell.first > 1:
            weights = bucket.weights(cell.first, cell.stop)
            torch._foreach_copy_(weights, list(inputs.stored["param"].unbind(0)))
