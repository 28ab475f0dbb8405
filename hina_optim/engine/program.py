"""The recipe of one bucket, cut into segments and ready to run, eagerly or compiled.

A segment is a pure function of tensors: stored inputs, the values so far, the totals of earlier segments and this
step's scalars go in; new values and this segment's sums come out. Only the last one writes, in place, into the stored
tensors it was given.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from hina_optim.engine.bucket import Bucket
from hina_optim.engine.compiled import Compiled
from hina_optim.engine.graphs import graph, without_numbers
from hina_optim.engine.grids import BAND, grids_of
from hina_optim.engine.inputs import Inputs
from hina_optim.engine.lines import lines_of
from hina_optim.engine.rules import FINITE, FiniteGuard, Rules, Values, chosen, set_aside
from hina_optim.engine.transfers import Pieces
from hina_optim.state.ranges import RangeCodec, within
from hina_optim.techniques.base import ByColumn, ByRow, Flow, Folded, Technique

__all__ = ["FiniteGuard", "Inputs", "Program", "Values"]

#: 1 for rows that are written, 0 for others: ``[N, rows, 1, …]``.
KEPT = "engine.rows"


def graphs_of(bucket: Bucket, measuring: frozenset[str]) -> Compiled | None:
    """How a bucket runs in graphs that serve parameters of every shape; None where graphs must be made by shape."""
    return lines_of(bucket, measuring) or grids_of(bucket, measuring)


class Program:
    """A bucket's segments for one set of measuring techniques.

    Attributes:
        segments: The plan; the guard against non-finite gradients comes first.
        needs_whole: Whether any technique needs complete values: then a parameter is never cut into chunks.
        needs_rows: Whether rows and columns are told apart: then a large matrix is cut between rows.
        coded_rows: Whether state is stored in blocks within rows, and must be cut between them.
        reads_loss: Whether any technique reads the loss.
        asked: For every segment, what of the state in host memory it (or any, under -1) was seen to use: what is to be
            brought for it the next time.
    """

    def __init__(self, bucket: Bucket, measuring: frozenset[str], compiled: bool) -> None:
        self.bucket = bucket
        self.info = bucket.info
        self.lines: Compiled | None = graphs_of(bucket, measuring) if compiled else None
        # a step that measures what only the plan can is eager where others run in lines: graphs would be seldom used
        self.compiled = compiled and (self.lines is not None or graphs_of(bucket, frozenset()) is None)
        # what measures beside the graphs has its sums in the first segment, and no part in the plan
        self.rules = Rules.of(bucket, measuring) if self.lines is None else self.lines.rules
        self.compute = self.rules.compute
        self.segments = self.rules.segments
        acting = [one for one in self.rules.chain if not isinstance(one, FiniteGuard)]
        self.measuring = measuring
        self.asked: dict[int, frozenset[str]] = {}
        self.needs_whole = any(s.whole is not None for s in self.segments)
        self.coded_rows = not bucket.in_ranges and any(codec.by_rows for codec in bucket.codecs.values())
        self.needs_rows = self.coded_rows or any(one.by_rows and one.applies(self.info) for one in acting)
        self.reads_loss = any(one.reads_loss and one.applies(self.info) for one in acting)
        self.needs_index = (
            bool(measuring)
            or self.rules.rounding == "stochastic"
            or any(c.noisy for c in bucket.codecs.values())
            or any(one.needs_index and one.applies(self.info) for one in acting)
        )
        #: Slots of which some rank has a part of a block only.
        self.cut_slots = frozenset(slot.name for slot in bucket.slots if bucket.cut_blocks(slot.name))
        self._holds = True
        self._steps: dict[tuple[Any, ...], Callable[..., tuple[Values, Values]]] = {}
        self._chunks: dict[tuple[int, int] | None, Rules] = {None: self.rules}

    def run(
        self, i: int, inputs: Inputs, carry: Values | None, totals: list[Values], whole: Values, last: bool = True
    ) -> tuple[Values, Values]:
        """Run segment ``i``.

        Args:
            i: Which segment.
            inputs: Stored tensors and scalars of a cell.
            carry: Values at the end of segment ``i-1``; None to compute them again from the inputs (a chunk whose
                values were not kept).
            totals: Totals after segments ``0 … i-1``.
            whole: ``{technique name: piece of its complete result}`` for the segments that run.
            last: Whether this is the last cell of its parameters: state of fixed shape is written once, by that one.

        Returns:
            Values at its end, and its sums ``{"<technique>.<name>": [N] or [N, size]}``. Of the last segment, what has
            to be encoded again: :func:`~hina_optim.engine.rules.set_aside`, with ``"<slot>.codes"`` and
            ``"<slot>.scales"``, which are there, and ``"ok"``, ``[N, 1]``.
        """
        if self.lines is not None:
            return {}, self._run_lines(self.lines, i, inputs, totals[:i], last)
        scalars = inputs.scalars
        if self.compiled and self.needs_rows and i + 1 == len(self.segments):
            scalars = scalars | {KEPT: self._finite_rows(inputs.stored["param"], totals[0])}
        given = inputs.stored, scalars, carry or {}, totals[:i], whole
        try:
            return self._step(i, carry is None, last, inputs.chunk)(*given)
        except RuntimeError as error:
            if not self.compiled or not self._holds:
                raise
            without_numbers(error, i, len(self.segments))
            self._holds = False
            self._steps.clear()
            return self._step(i, carry is None, last, inputs.chunk)(*given)

    def rules_of(self, chunk: tuple[int, int] | None) -> Rules:
        """The rules of a chunk: how it is stored depends on where it begins and ends."""
        if chunk not in self._chunks:
            codecs = {name: within(codec, *chunk) for name, codec in self.rules.codecs.items()} if chunk else {}
            known = (one for one in self._chunks.values() if one.codecs == codecs)
            self._chunks[chunk] = next(known, None) or dataclasses.replace(self.rules, codecs=codecs)
        return self._chunks[chunk]

    def _finite_rows(self, param: Tensor, totals: Values) -> Tensor:
        """For every row whether it is written: with this, all that is written is one loop over rows and columns."""
        ok = (totals["engine.bad"] == 0).to(self.compute)
        return (
            ok.reshape(-1, *([1] * (param.ndim - 1))).expand(-1, *param.shape[1:2], *([1] * (param.ndim - 2))).clone()
        )

    def _run_lines(self, lines: Compiled, i: int, inputs: Inputs, totals: list[Values], last: bool) -> Values:
        stored, scalars = inputs.stored, inputs.scalars
        if last and i + 1 == len(self.segments):
            lines.settle(stored, scalars, totals[0])
        sums = lines.run(i, inputs, totals, last)
        if sums is None:  # too few elements, or in an order of their own: as it would run without a compiler
            if self.needs_index:
                grad = stored["grad"]
                index = torch.arange(inputs.start, inputs.start + grad[0].numel(), device=grad.device)
                scalars = scalars | {"index": index.view(1, *grad.shape[1:])}
            _, sums = self._step(i, True, last, None)(stored, scalars, {}, totals, {})
        if i == 0 and lines.aside:
            sums |= lines.measure(stored, scalars, inputs.start, self._sum)
        return sums

    def _step(
        self, i: int, again: bool, last: bool, chunk: tuple[int, int] | None
    ) -> Callable[..., tuple[Values, Values]]:
        rules = self.rules_of(chunk)
        key = (i, again, last or i < len(self.segments) - 1, id(rules))
        if key not in self._steps:
            compiled = self.compiled and self.lines is None
            holds = compiled and self._holds

            def phase(
                stored: Values, scalars: Values, carry: Values, totals: list[Values], whole: Values
            ) -> tuple[Values, Values]:
                flow = self._flow(rules, stored, scalars, carry if not again else {}, start=again)
                flow.holds = holds
                sums: Values = {}
                for j in range(0 if again else i, i + 1):
                    sums = rules.run(j, flow, totals, whole, self._sum)
                if i == len(self.segments) - 1:
                    return self._commit(rules, flow, stored, scalars, last), sums
                if self.compiled and not self.needs_whole:  # to compute it again costs less than to write it
                    return {}, sums
                left = {**flow.values, **{f"new.{k}": v for k, v in flow.new.items()}}
                if not self.compiled:  # decode once; a compiled segment decodes what it uses while reading it
                    left |= {f"state.{k}": v for k, v in flow.state.items()}
                return left, sums

            name = f"phase{i}{'_again' if again else ''}{'' if last else '_part'}"
            self._steps[key] = graph(phase, name) if compiled else phase
        return self._steps[key]

    def _flow(self, rules: Rules, stored: Values, scalars: Values, carry: Values, start: bool) -> Flow:
        state = {k[6:]: v for k, v in carry.items() if k.startswith("state.")}
        if isinstance(stored, Pieces):
            state = States(state, functools.partial(rules.decode, stored=stored))
        elif not state:
            state = {slot.name: rules.decode(slot.name, stored) for slot in self.bucket.slots}
        values = {k: v for k, v in carry.items() if not k.startswith(("new.", "state."))}
        new = {k[4:]: v for k, v in carry.items() if k.startswith("new.")}
        if start:
            values = {"grad": stored["grad"].to(self.compute), "param": stored["param"].to(self.compute)}
            values["lr"] = values["rate"] = scalars["lr"]
            values |= {name: scalars[name] for name in ("index", "row_index", "column_index") if name in scalars}
        return Flow(values, state, new, scalars, self.info)

    def _sum(self, value: Tensor | Folded | ByRow | ByColumn, flow: Flow) -> Tensor:
        if isinstance(value, (ByRow, ByColumn)):
            return self._line_sums(value, flow)
        if isinstance(value, Folded):
            flat = value.value.reshape(value.value.shape[0], -1)
            if self.bucket.shard.slices is not None or self.bucket.in_ranges:
                place = flow["index"].reshape(-1) % value.size
                return flat.new_zeros(flat.shape[0], value.size).index_add_(1, place, flat)
            # chunks begin at multiples of any fold, so only the shard's own beginning shifts the fold
            start = self.bucket.shard.start % value.size
            flat = torch.nn.functional.pad(flat, (start, -(flat.shape[1] + start) % value.size))
            return flat.reshape(flat.shape[0], -1, value.size).sum(1)
        if torch.compiler.is_compiling() and value.ndim > 2:  # sums over short lines stay in registers
            return value.flatten(2).sum(2).sum(1)
        n = value.shape[0]
        return value.reshape(n) if value.numel() == n else value.reshape(n, -1).sum(1)

    def _line_sums(self, given: ByRow | ByColumn, flow: Flow) -> Tensor:
        """Sums of all rows ``[N, rows]`` or columns ``[N, columns]``, of the elements that are here."""
        value, n = given.value, given.value.shape[0]
        row_index, column_index = flow.get("row_index"), flow.get("column_index")
        if column_index is None or value.ndim > 2:
            grid = value.reshape(n, value.shape[1], torch.Size(value.shape[2:]).numel())
            if isinstance(given, ByColumn):
                part = _sum_of_rows(grid)
                if column_index is None:
                    return part
                return part.new_zeros(n, self.info.columns).index_add_(1, column_index, part)
            part = grid.sum(2)
            if row_index is None:
                return part
            return part.new_zeros(n, self.info.rows).index_add_(1, row_index, part)
        assert row_index is not None  # both come together: a flat piece that does not consist of whole rows
        if isinstance(given, ByColumn):
            return value.new_zeros(n, self.info.columns).index_add_(1, column_index, value)
        return value.new_zeros(n, self.info.rows).index_add_(1, row_index, value)

    def whole_matrix(self, one: Technique, inputs: Inputs, carry: Values, complete: list[Tensor]) -> Tensor:
        """A technique's result on complete values (eager: FFTs and the like gain nothing from the compiler)."""
        flow = self._flow(self.rules, inputs.stored, inputs.scalars, carry, start=False)
        return one.whole_matrix(flow, *complete)

    def _commit(self, rules: Rules, flow: Flow, stored: Values, scalars: Values, last: bool) -> Values:
        """Write new weights and state in place; a parameter with a non-finite gradient keeps every bit.

        All that is written is computed before anything is: running out of memory changes nothing.

        Returns:
            What is to be encoded again, see :meth:`run`.
        """
        ok = flow[FINITE]
        old, needed = stored["param"], "index" in scalars
        aside: Values = {}
        written, encoded = rules.written(
            flow,
            scalars["seeds"] if needed else None,
            scalars["index"].to(torch.int32) if needed else None,
            old.dtype,
            aside if self.cut_slots else None,
        )
        rows = scalars.get(KEPT, ok)
        fixed = {slot.name for slot in self.bucket.slots if slot.shape != "like"}
        writes: list[Write] = []
        for name, suffix, part in encoded:
            if name in fixed and not last:
                continue
            have = stored[name + suffix]
            if isinstance(stored, Pieces):
                stored.written.add(name + suffix)
            keep = ok.reshape(-1, *([1] * (have.ndim - 1))) if have.shape != old.shape else rows
            writes.append(Write.blend(have, part.reshape(have.shape), keep))
        writes.append(Write.blend(old, written, rows))
        if last:
            writes.append(Write("add", stored["skipped"], 1 - ok.reshape(-1)))
        if aside:
            aside |= self._edges_before(rules, stored, aside) | {"ok": ok.reshape(-1, 1).clone()}
        for write in writes:
            write()
        return aside

    def _edges_before(self, rules: Rules, stored: Values, aside: Values) -> Values:
        """What is stored of the blocks that are set aside: of a gradient that is not finite, it stays."""
        found: Values = {}
        for name in self.cut_slots:
            codec = rules.codecs[name]
            if f"{name}.value" in aside and isinstance(codec, RangeCodec):
                before = set_aside(name, codec, codec.unpacked(stored[name]), None, stored[name + "_scale"])
                found |= {f"{name}.codes": before[f"{name}.value"], f"{name}.scales": before[f"{name}.scale"]}
        return found


def _sum_of_rows(grid: Tensor) -> Tensor:
    """``[N, rows, columns]`` → ``[N, columns]``; compiled, in bands of rows, which is nearer to the order in memory."""
    if torch.compiler.is_compiling() and grid.shape[1] > BAND and grid.shape[1] % BAND == 0:
        return grid.view(grid.shape[0], -1, BAND, grid.shape[2]).sum(2).sum(1)
    return grid.sum(1)


class States(dict[str, Tensor]):
    """State by slot, decoded when it is asked for."""

    def __init__(self, known: Values, decode: Callable[[str], Tensor]) -> None:
        super().__init__(known)
        self._decode = decode

    def __missing__(self, name: str) -> Tensor:
        value = self[name] = self._decode(name)
        return value


class Write(NamedTuple):
    """A change of a stored tensor, with all that it needs: making it takes no memory, so it cannot fail half-way.

    Attributes:
        how: ``"copy"``, ``"add"``, or ``"lerp"``.
        old: What is written, in place.
        value: What is copied, added, or gone to.
        share: How far it is gone there, 0 or 1 (``"lerp"`` only).
    """

    how: Literal["copy", "add", "lerp"]
    old: Tensor
    value: Tensor
    share: Tensor | None = None

    @classmethod
    def blend(cls, old: Tensor, new: Tensor, ok: Tensor) -> Write:
        """``new`` over ``old`` where ``ok`` is 1, and ``old`` kept where it is 0; both exactly.

        ``lerp`` is exact at both ends for finite values, and runs several times faster than a choice by a boolean
        tensor.
        """
        if old.ndim <= 1 or old[0].numel() <= 4096 or torch.compiler.is_compiling():
            return cls("copy", old, chosen(ok > 0, new, old))
        if old.dtype.is_floating_point:
            return cls("lerp", old, new, ok.to(old.dtype))
        return cls("add", old, (new - old) * ok.to(old.dtype))

    def __call__(self) -> None:
        """Make it."""
        if self.how == "copy":
            self.old.copy_(self.value)
        elif self.how == "add":
            self.old.add_(self.value)
        else:
            assert self.share is not None
            self.old.lerp_(self.value, self.share)
