"""Compiled steps of element-wise recipes: one graph a segment for parameters of every shape.

A parameter is looked at as lines of equally many elements, ``[lines, length]``, with a column of numbers a line for
all that belongs to a parameter: rates, state of one number, totals. So a stack of a hundred small parameters and a part
of a large one are the same to a graph, which takes its sizes as it finds them.

A segment computes what it needs from the stored tensors, whatever earlier segments have computed already: reading state
again costs less than writing values and reading those. So there are no temporaries either. Lines are short enough for a
sum over one to stay in registers, without the cascade that the compiler makes of longer ones; the sums of lines are
added up here.
"""

from __future__ import annotations

import functools
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
from hina_optim.engine.rules import FINITE, Rules, Values
from hina_optim.techniques.base import Flow, Folded, PeriodicTechnique, Technique

__all__ = ["LONGEST", "Lines", "line_length", "lines_of"]

#: Elements of a line, at most: above, the compiler keeps sums in memory.
LONGEST = 4096
#: Fewer elements than this make no line, unless a parameter has no more.
SHORTEST = 64


class Graphs(Segments):
    """The compiled segments of all buckets that follow the same rules.

    Args:
        rules: Which.
        single: What has one number a parameter, beside ``scalars`` and totals: state, and zeros that stand for anchors.
        scalars: Names of the numbers of a step.
    """

    def __init__(self, rules: Rules, single: tuple[str, ...], scalars: tuple[str, ...]) -> None:
        super().__init__(len(rules.segments))
        self.rules = rules
        self.single = single
        self.scalars = scalars

    def run(
        self,
        i: int,
        stored: Values,
        numbers: Tensor,
        totals: Tensor | None,
        names: tuple[str, ...],
        seeds: Tensor | None,
        start: Tensor,
    ) -> Values:
        """Segment ``i``.

        Args:
            i: Which.
            stored: ``[lines, vectors, width]`` each: a line is vectors of :data:`WIDTH` elements, or of one.
            numbers: ``[numbers, lines]``: the learning rate, the number of elements, :attr:`single`, :attr:`scalars`.
            totals: ``[totals, lines]``; None where there are none yet.
            names: What totals there are, as ``"<segment>.<technique>.<name>"``.
            seeds: int32 ``[lines]``, where noise is needed.
            start: int64 ``[lines]``: global flat index of the first element of each.

        Returns:
            Sums of lines; of the last segment, the new values of state of one number, ``[lines]``.
        """
        mark((totals, (1,)))
        found: Values = self.call(
            i,
            (i, names, stored["grad"].shape[2]),
            lambda holds: self._compile(i, names, holds),
            (stored, numbers, totals, seeds, start),
        )
        return found

    def _compile(self, i: int, names: tuple[str, ...], holds: bool) -> Callable[..., Values]:
        rules, single, known = self.rules, self.single, self.scalars

        def segment(
            stored: Values, numbers: Tensor, totals: Tensor | None, seeds: Tensor | None, start: Tensor
        ) -> Values:
            number = dict(zip(("lr", "count", *single, *known), numbers.unbind(0), strict=True))
            before: list[Values] = [{} for _ in range(i)]
            for name, total in zip(names, () if totals is None else totals.unbind(0), strict=True):
                at, label = name.split(".", 1)
                before[int(at)][label] = total
            state = Stored(rules, stored, {name: number[name] for name in single})
            values = {name: stored[name].to(rules.compute) for name in ("grad", "param")}
            flow = Flow(values, state, {}, {name: number[name] for name in ("count", *known)}, rules.info, holds)
            flow["lr"] = flow["rate"] = flow.per_param(number["lr"])
            if any(one.needs_index for one in rules.chain):
                flow["index"] = index_of(stored["grad"], start)
            sums: Values = {}
            for j in range(i + 1):
                sums = rules.run(j, flow, before, {}, _sum)
            if i + 1 < len(rules.segments):
                return sums
            return commit(rules, flow, stored, single, seeds, start, flow[FINITE] > 0)

        return graph(segment, f"segment{i}")


def _sum(value: Any, flow: Flow) -> Tensor:
    """A sum over each line."""
    if isinstance(value, Folded):
        place = (flow["index"] % value.size).flatten(1)
        return value.value.new_zeros(value.value.shape[0], value.size).scatter_add_(1, place, value.value.flatten(1))
    sums: Tensor = value.expand_as(flow["grad"]).sum((1, 2))
    return sums


class Lines(Compiled):
    """How one bucket runs in lines."""

    def __init__(
        self, bucket: Bucket, rules: Rules, graphs: Graphs, aside: tuple[tuple[Technique, bool], ...] = ()
    ) -> None:
        super().__init__(bucket, rules, aside)
        self.graphs = graphs

    def run(self, i: int, inputs: Inputs, totals: list[Values], last: bool) -> Values | None:
        """Segment ``i`` of some parameters, or of a part of one; None if their elements make no lines."""
        stored, grad = inputs.stored, inputs.stored["grad"]
        n = grad.shape[0]
        length = line_length(n, grad.numel() // max(1, n))
        if not length or not (grad.is_contiguous() and stored["param"].is_contiguous()):
            return None
        each = grad.numel() // n // length
        if not inputs.laid:
            inputs.laid = self._laid(inputs, n, each, length)
        lined, numbers, seeds, start = inputs.laid
        names = self.before(totals)
        found = self.graphs.run(i, lined, numbers, _spread(list(names.values()), each), tuple(names), seeds, start)
        if i + 1 < len(self.rules.segments):
            return self._added(found, n, each)
        if last:
            self.finish(stored, totals, {name: value[::each] for name, value in found.items()})
        return {}

    def _laid(self, inputs: Inputs, n: int, each: int, length: int) -> tuple[Any, ...]:
        """What all segments read: elements and numbers of lines, their seeds, and where they begin."""
        graphs, device = self.graphs, inputs.stored["grad"].device
        width = WIDTH if length % WIDTH == 0 else 1  # whole vectors: no code for what is left at the end of a line
        # a stack of parameters is no leaf, one parameter is: detached they are alike
        lined = {
            name: part.detach().view(n * each, length // width, width)
            for name, part in self.like(inputs.stored).items()
        }
        names = (*graphs.single, *graphs.scalars)
        numbers = self.numbers(inputs, n, (self.bucket.info.numel,), names).repeat_interleave(each, 1)
        seeds = inputs.scalars["seeds"].repeat_interleave(each) if self.noisy else None
        start = torch.arange(inputs.start, inputs.start + each * length, length, device=device).repeat(n)
        mark((numbers, (1,)), (seeds, (0,)), (start, (0,)), *((part, (0, 1)) for part in lined.values()))
        return lined, numbers, seeds, start

    @staticmethod
    def _added(found: Values, n: int, each: int) -> Values:
        """Sums of lines, added up for each parameter."""
        if each == 1:
            return found
        plain = [name for name, value in found.items() if value.ndim == 1]
        added = {name: value.view(n, each, -1).sum(1) for name, value in found.items() if value.ndim > 1}
        if plain:  # together, in one call
            sums = torch.stack([found[name] for name in plain]).view(len(plain), n, each).sum(2)
            added |= dict(zip(plain, sums.unbind(0), strict=True))
        return added


def _spread(totals: list[Tensor], each: int) -> Tensor | None:
    """Totals ``[N]`` each, for each line: ``[totals, N · each]``."""
    if not totals:
        return None
    stacked = torch.stack(totals)
    return stacked if each == 1 else stacked.repeat_interleave(each, 1)


@functools.lru_cache(maxsize=4096)
def line_length(n: int, numel: int) -> int:
    """Elements of a line for ``n`` parameters of so many: a divisor that makes two lines or more; 0 if none is good."""
    most = min(numel, LONGEST)
    if n == 1:
        most = min(most, numel // 2)
    divisors = [d for d in range(most, 0, -1) if numel % d == 0]
    found = next((d for d in divisors if d % WIDTH == 0 and d >= SHORTEST), divisors[0] if divisors else 0)
    if found % WIDTH and n * numel < LONGEST:
        return 0  # too few for graphs of their own
    return found if found >= min(SHORTEST, most) else 0


def lines_of(bucket: Bucket, measuring: frozenset[str]) -> Lines | None:
    """Graphs for a bucket in steps in which these techniques measure; None where it must run in another way.

    That is where rows and columns are told apart, complete matrices or sums of many numbers are needed, and where a
    shard is a box.
    """
    rules, aside = narrowed(bucket), aside_of(bucket, measuring)
    if (
        aside is None
        or bucket.shard.slices is not None
        or any(one.whole or one.by_rows or _remembers_many(one, bucket) for one in rules.chain)
        or any(not element_wise(rules.codecs[slot.name]) for slot in rules.slots if slot.shape == "like")
    ):
        return None
    key = ("lines", *identity_of(bucket, rules))
    graphs = MADE.get(key)
    if graphs is None:
        graphs = MADE[key] = Graphs(rules, *numbers_of(rules))
    return Lines(bucket, rules, graphs, aside)


def _remembers_many(one: Technique, bucket: Bucket) -> bool:
    """Whether every step needs state of a fixed shape; what measures needs its own only when it does."""
    fixed = any(slot.shape not in ("like", ()) for slot in one.slots(bucket.info))
    return fixed and not isinstance(one, PeriodicTechnique)
