"""Compiled steps of recipes that tell rows and columns apart: one graph a segment for matrices of every shape.

As in :mod:`hina_optim.engine.lines`, nothing is carried from segment to segment, and the shapes of a model do not
matter; but the elements are a grid, ``[N, rows, columns / width, width]``, beside numbers of a parameter, of its rows
and of its columns. ``N`` is 1 for a large matrix or a band of its rows, and more for a stack of small ones; a size of 1
is a constant in a graph, so each has graphs of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from hina_optim.engine.bucket import Bucket
from hina_optim.engine.compiled import (
    MADE,
    WIDTH,
    Compiled,
    Stored,
    aside_of,
    commit,
    element_wise,
    identity_of,
    index_of,
    narrowed,
    numbers_of,
)
from hina_optim.engine.graphs import Segments, graph, mark
from hina_optim.engine.inputs import Inputs
from hina_optim.engine.rules import Rules, Values
from hina_optim.techniques.base import ByColumn, ByRow, Flow, Folded, PeriodicTechnique, Technique

__all__ = ["Grids", "grids_of"]

#: Rows that a graph adds up at a time where it adds up each column: nearer to the order in memory than all at once.
BAND = 32
#: Columns of a narrow matrix, at most.
NARROW = 4 * WIDTH


class Grid(Flow):
    """Named values of elements in a grid."""

    #: Whether rows are so short that what is made once a row costs more than to make it for each of its vectors.
    narrow = False

    def over_rows(self, x: Tensor) -> Tensor:
        """Lay a number a row, ``[N, rows]``, over the elements present."""
        x = x.index_select(1, self.values["row_index"])
        return (x if self.narrow else self.once(x))[:, :, None, None]

    def over_columns(self, x: Tensor) -> Tensor:
        """Lay a number a column, ``[N, columns]``, over the elements present."""
        return self.once(x).reshape(x.shape[0], 1, *self.values["grad"].shape[2:])


class GridGraphs(Segments):
    """The compiled segments of all buckets of matrices that follow the same rules.

    Args:
        rules: Which.
        single: Slots of one number a parameter.
        scalars: Names of the numbers of a step.
        fixed: Slots of one number a row or column.
    """

    def __init__(self, rules: Rules, single: tuple[str, ...], scalars: tuple[str, ...], fixed: tuple[str, ...]) -> None:
        super().__init__(len(rules.segments))
        self.rules = rules
        self.single = single
        self.fixed = fixed
        self.scalars = scalars

    def run(
        self,
        i: int,
        stored: Values,
        numbers: Tensor,
        totals: Tensor | None,
        vectors: Values,
        names: tuple[str, ...],
        seeds: Tensor | None,
        start: Tensor,
        row_index: Tensor,
        written: Tensor | None,
    ) -> Values:
        """Segment ``i``.

        Args:
            i: Which.
            stored: ``[N, rows here, vectors, width]`` each: a row is vectors of :data:`WIDTH` elements, or of one.
            numbers: ``[numbers, N]``: learning rate, elements, rows, columns, :attr:`single`, :attr:`scalars`.
            totals: ``[totals, N]``; None where there are none yet.
            vectors: ``[N, rows]`` or ``[N, columns]``: :attr:`fixed`, and totals as ``"<segment>.<technique>.<name>"``.
            names: What totals there are of one number, named likewise.
            seeds: int32 ``[N]``, where noise is needed.
            start: int64 ``[1]``: global flat index of the first element of each.
            row_index: int64: which rows are here.
            written: ``[N, rows here, 1, 1]``: 1 for what the last segment writes, 0 for what is kept; None in others.

        Returns:
            Sums, over what is here; of the last segment the new values of :attr:`single` and :attr:`fixed`.
        """
        n, rows, across, width = stored["grad"].shape
        banded, narrow = rows > BAND and rows % BAND == 0, across * width <= NARROW
        # sizes of 1 are constants in a graph
        key = i, names, tuple(vectors), width, banded, narrow, n == 1, across == 1
        mark((totals, (1,)), (seeds, (0,)), (written, (0, 1)), *((x, (0, 1)) for x in vectors.values()))
        found: Values = self.call(
            i,
            key,
            lambda holds: self._compile(i, names, banded, narrow, holds),
            (stored, numbers, totals, vectors, seeds, start, row_index, written),
        )
        return found

    def _compile(
        self, i: int, names: tuple[str, ...], banded: bool, narrow: bool, holds: bool
    ) -> Callable[..., Values]:
        rules, single, fixed, known = self.rules, self.single, self.fixed, self.scalars

        def segment(
            stored: Values,
            numbers: Tensor,
            totals: Tensor | None,
            vectors: Values,
            seeds: Tensor | None,
            start: Tensor,
            row_index: Tensor,
            written: Tensor | None,
        ) -> Values:
            number = dict(zip(("lr", "count", "rows", "columns", *single, *known), numbers.unbind(0), strict=True))
            before: list[Values] = [{} for _ in range(i)]
            ones = dict(zip(names, () if totals is None else totals.unbind(0), strict=True))
            for name, total in (ones | vectors).items():
                if name not in fixed:
                    at, label = name.split(".", 1)
                    before[int(at)][label] = total
            state = Stored(rules, stored | {name: vectors[name] for name in fixed}, {})
            for name in single:
                state[name] = number[name][:, None, None, None] if name in rules.zero_anchors else number[name]
            values = {name: stored[name].to(rules.compute) for name in ("grad", "param")}
            scalars = {name: number[name] for name in ("count", "rows", "columns", *known)}
            flow = Grid(values, state, {}, scalars, rules.info, holds)
            flow.narrow = narrow
            flow["lr"] = flow["rate"] = flow.per_param(number["lr"])
            flow["row_index"] = row_index
            if any(one.needs_index for one in rules.chain):
                flow["index"] = index_of(stored["grad"], start)

            def add(value: Any, _: Flow) -> Tensor:
                return _sum(value, banded)

            sums: Values = {}
            for j in range(i + 1):
                sums = rules.run(j, flow, before, {}, add)
            if i + 1 < len(rules.segments):
                return sums
            assert written is not None
            return commit(rules, flow, stored, (*single, *fixed), seeds, start, written > 0)

        return graph(segment, f"grid{i}")


def _sum(value: Any, banded: bool) -> Tensor:
    """A sum over all that is here, or over each of its rows or columns."""
    if isinstance(value, ByRow):
        return value.value.sum((2, 3)).unsqueeze(2)  # told from sums over columns by its dimensions
    if isinstance(value, ByColumn):
        part = value.value
        if banded:
            part = part.unflatten(1, (-1, BAND)).sum(2)
        return part.sum(1).flatten(1)
    assert not isinstance(value, Folded)  # only what measures has such sums, beside the graphs
    # sums over one row stay in registers
    total: Tensor = value.sum((2, 3)).sum(1) if value.ndim == 4 else value
    return total


class Grids(Compiled):
    """How one bucket of matrices runs in grids."""

    def __init__(
        self, bucket: Bucket, rules: Rules, graphs: GridGraphs, aside: tuple[tuple[Technique, bool], ...] = ()
    ) -> None:
        super().__init__(bucket, rules, aside)
        self.graphs = graphs

    def run(self, i: int, inputs: Inputs, totals: list[Values], last: bool) -> Values | None:
        """Segment ``i`` of some matrices, or of some rows of one; None if they have too few."""
        stored, grad = inputs.stored, inputs.stored["grad"]
        if grad.ndim < 3 or not grad.numel() or not (grad.is_contiguous() and stored["param"].is_contiguous()):
            return None
        n, rows = grad.shape[:2]
        columns = grad.numel() // (n * rows)
        if rows < 2 or columns < WIDTH:
            return None
        if not inputs.laid:
            inputs.laid = self._laid(inputs, n, rows, columns)
        grids, numbers, row_index, start = inputs.laid
        every = self.before(totals)
        names = {k: v for k, v in every.items() if v.ndim == 1}
        vectors = {k: v for k, v in every.items() if v.ndim == 2} | {name: stored[name] for name in self.graphs.fixed}
        final = i + 1 == len(self.rules.segments)
        written = None
        if final:
            ok = (totals[0]["engine.bad"] == 0).to(self.rules.compute)
            written = ok.view(n, 1, 1, 1).expand(n, rows, 1, 1).contiguous()
        found = self.graphs.run(
            i,
            grids,
            numbers,
            torch.stack(list(names.values())) if names else None,
            vectors,
            tuple(names),
            inputs.scalars["seeds"] if self.noisy else None,
            start,
            row_index,
            written,
        )
        if not final:
            return {name: self._placed(value, inputs.scalars.get("row_index")) for name, value in found.items()}
        if last:
            self.finish(stored, totals, found)
        return {}

    def _laid(self, inputs: Inputs, n: int, rows: int, columns: int) -> tuple[Any, ...]:
        """What all segments read: elements, numbers, which rows are here, and where they begin."""
        graphs, info, device = self.graphs, self.bucket.info, inputs.stored["grad"].device
        width = WIDTH if columns % WIDTH == 0 else 1
        shape = n, rows, columns // width, width
        grids = {name: part.detach().view(shape) for name, part in self.like(inputs.stored).items()}
        sizes = info.numel, info.rows, info.columns
        numbers = self.numbers(inputs, n, sizes, (*graphs.single, *graphs.scalars))
        rows_here = inputs.scalars.get("row_index")
        row_index = torch.arange(rows, device=device) if rows_here is None else rows_here
        mark((numbers, (1,)), (row_index, (0,)), *((part, (0, 1, 2)) for part in grids.values()))
        return grids, numbers, row_index, torch.full((1,), inputs.start, dtype=torch.int64, device=device)

    def _placed(self, value: Tensor, row_index: Tensor | None) -> Tensor:
        """Sums as the engine adds them up: of rows those of all rows."""
        if value.ndim < 3:
            return value
        part = value.squeeze(2)
        return (
            part
            if row_index is None
            else part.new_zeros(len(part), self.bucket.info.rows).index_add_(1, row_index, part)
        )


def grids_of(bucket: Bucket, measuring: frozenset[str]) -> Grids | None:
    """Graphs for a bucket of matrices in steps in which these techniques measure; None where it must run otherwise.

    That is where no rows and columns are told apart, where complete matrices are needed, and where a shard is a box or
    has no whole rows.
    """
    info, rules, aside = bucket.info, narrowed(bucket), aside_of(bucket, measuring)
    lasting = {slot for one in rules.chain if not isinstance(one, PeriodicTechnique) for slot in one.slots(info)}
    fixed = tuple(slot for slot in rules.slots if slot in lasting and slot.shape not in ("like", ()))
    if (
        aside is None
        or not info.is_matrix
        or len(bucket.key.local_shape) < 2
        or bucket.shard.slices is not None
        or not any(one.by_rows for one in rules.chain)
        or any(one.whole for one in rules.chain)
        or any(slot.shape not in ((info.rows,), (info.columns,)) for slot in fixed)
        or any(not element_wise(rules.codecs[slot.name]) for slot in rules.slots if slot.shape == "like")
    ):
        return None
    key = ("grid", *identity_of(bucket, rules))
    graphs = MADE.get(key)
    if graphs is None:
        graphs = MADE[key] = GridGraphs(rules, *numbers_of(rules), tuple(slot.name for slot in fixed))
    return Grids(bucket, rules, graphs, aside)
