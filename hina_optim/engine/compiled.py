"""What compiled steps have in common whose graphs serve parameters of every shape (:mod:`lines`, :mod:`grids`)."""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor

from hina_optim.engine.bucket import KAHAN, Bucket
from hina_optim.engine.graphs import compiler
from hina_optim.engine.inputs import Inputs
from hina_optim.engine.plan import plan_segments
from hina_optim.engine.rules import Rules, Values, chosen
from hina_optim.state.precision import Codec
from hina_optim.techniques.base import Flow, PeriodicTechnique, Technique

__all__ = [
    "MADE",
    "WIDTH",
    "Compiled",
    "Stored",
    "aside_of",
    "commit",
    "element_wise",
    "identity_of",
    "index_of",
    "is_compiled",
    "narrowed",
    "numbers_of",
]

#: Elements of the widest vector of a CPU, in four bytes each.
WIDTH = 16
#: Elements of a piece in which what measures is computed, eagerly.
PIECE = 1 << 17

Adding = Callable[[Any, Flow], Tensor]

#: Graphs, by what they do.
MADE: weakref.WeakValueDictionary[Hashable, Any] = weakref.WeakValueDictionary()


def is_compiled(bucket: Bucket) -> bool:
    """Whether its steps are compiled: where it is asked for, and can be.

    None is eager: graphs take from half a minute to minutes to build in a first process, which only many steps of a
    large model give back, and need a compiler.
    """
    return bool(bucket.group["compile"]) and (bucket.key.device.type != "cpu" or compiler())


def index_of(like: Tensor, start: Tensor) -> Tensor:
    """Global flat index of every element of ``like``, ``[N, …]``, of the dtype of ``start``, ``[N]`` or ``[1]``."""
    steps = torch.arange(like.shape[1:].numel(), dtype=start.dtype, device=start.device)
    return start.view(-1, *([1] * (like.ndim - 1))) + steps.view(1, *like.shape[1:])


def commit(
    rules: Rules, flow: Flow, stored: Values, small: tuple[str, ...], seeds: Tensor | None, start: Tensor, ok: Tensor
) -> Values:
    """Write weights and state in place where ``ok``; returns the new state named in ``small``, for others to write."""
    index = None if seeds is None else index_of(stored["grad"], start.to(torch.int32))
    weights, encoded = rules.written(flow, seeds, index, stored["param"].dtype)
    found: Values = {}
    writes = [(stored["param"], weights)]
    for name, suffix, part in encoded:
        if name in small:
            found[name] = part
        else:
            writes.append((stored[name + suffix], part))
    for old, new in writes:
        old.copy_(chosen(ok, new, old))
    return found


class Stored(dict[str, Tensor]):
    """State by slot, decoded when it is asked for: what no technique asks for is no input of a graph."""

    def __init__(self, rules: Rules, stored: Values, single: Values) -> None:
        super().__init__({k: v[:, None, None] if k in rules.zero_anchors else v for k, v in single.items()})
        self._rules, self._stored = rules, stored

    def __missing__(self, name: str) -> Tensor:
        value = self[name] = self._rules.decode(name, self._stored)
        return value


class Compiled:
    """How one bucket runs in graphs that serve parameters of every shape.

    Args:
        bucket: Which.
        rules: Those of its steps in which nothing measures.
        aside: What measures in this step, and all that comes before it in the recipe; computed beside the graphs, since
            it is seldom, and would take as many graphs again.
    """

    def __init__(self, bucket: Bucket, rules: Rules, aside: tuple[tuple[Technique, bool], ...] = ()) -> None:
        self.bucket = bucket
        self.rules = rules
        self.aside = aside
        #: Whether anything is rounded by chance.
        self.noisy = rules.rounding == "stochastic" or any(rules.codecs[slot.name].noisy for slot in rules.slots)

    def run(self, i: int, inputs: Inputs, totals: list[Values], last: bool) -> Values | None:
        """Segment ``i`` of some parameters, or of a part of one.

        Args:
            i: Which.
            inputs: ``[N, …]``, as stored, and the numbers of this step.
            totals: Of the segments before.
            last: Whether state of one number, and of rows and columns, is to be written.

        Returns:
            The sums, ``[N]`` or ``[N, size]`` each; None if no graph takes these elements: then nothing has happened.
        """
        raise NotImplementedError

    def before(self, totals: list[Values]) -> Values:
        """Totals as ``"<segment>.<technique>.<name>"``, without those of what measures beside the graphs."""
        beside = {one.name for one, measures in self.aside if measures}
        return {
            f"{j}.{k}": v
            for j, found in enumerate(totals)
            for k, v in found.items()
            if k.split(".", 1)[0] not in beside
        }

    @staticmethod
    def finish(stored: Values, totals: list[Values], found: Values) -> None:
        """Write state of numbers, rows and columns, and which parameters were skipped."""
        ok = totals[0]["engine.bad"] == 0
        stored["skipped"].add_((~ok).to(stored["skipped"].dtype))
        for name, value in found.items():
            old = stored[name]
            keep = ok.view(-1, *([1] * (old.ndim - 1)))
            old.copy_(torch.where(keep, value.reshape(old.shape).to(old.dtype), old))

    def like(self, stored: Values) -> Values:
        """Gradient, weights and the parts of the state that have an element for each of theirs."""
        names = ["grad", "param"]
        for slot in self.rules.slots:
            if slot.shape == "like" and slot.name not in self.rules.zero_anchors:
                names += [slot.name + suffix for suffix in self.rules.codecs[slot.name].parts]
        return {name: stored[name] for name in names}

    def numbers(self, inputs: Inputs, n: int, sizes: tuple[int, ...], names: tuple[str, ...]) -> Tensor:
        """Learning rate, sizes, state of one number, and numbers of the step, ``[numbers, n]``.

        Args:
            inputs: Of ``n`` parameters.
            n: How many.
            sizes: The same for all of them.
            names: Slots of one number a parameter, then names of the step's numbers.
        """
        like = inputs.stored["grad"]
        found = [inputs.scalars["lr"]]
        found += [torch.full((), size, dtype=self.rules.compute, device=like.device) for size in sizes]
        found += [inputs.stored[name] if name in inputs.stored else inputs.scalars[name] for name in names]
        return torch.stack([one.to(self.rules.compute).expand(n) for one in found])

    def measure(self, stored: Values, scalars: Values, start: int, add: Adding) -> Values:
        """The sums of what measures, in pieces."""
        grad = stored["grad"]
        n, numel = grad.shape[0], grad.numel() // max(1, grad.shape[0])
        step, wide = max(1, PIECE // max(1, numel)), torch.float32 if grad.device.type == "mps" else torch.float64
        found: list[Values] = []
        for first in range(0, n, step):
            rows = slice(first, first + step)
            pieces = [
                self._measure_piece(stored, scalars, rows, slice(begin, begin + PIECE), start, add)
                for begin in range(0, max(1, numel), PIECE)  # of an empty shard, one empty piece
            ]
            one, *others = pieces
            if others:
                one = {k: sum((s[k].to(wide) for s in others), one[k].to(wide)) for k in one}
            found.append(one)
        return {k: torch.cat([s[k] for s in found]) for k in found[0]}

    def _measure_piece(
        self,
        stored: Values,
        scalars: Values,
        rows: slice,
        columns: slice,
        start: int,
        add: Callable[[Any, Flow], Tensor],
    ) -> Values:
        like = {"grad", "param"} | {
            slot.name + suffix
            for slot in self.bucket.slots
            if slot.shape == "like" and slot.name not in self.rules.zero_anchors
            for suffix in self.rules.codecs[slot.name].parts
        }
        piece = {k: v[rows].flatten(1)[:, columns] if k in like else v[rows] for k, v in stored.items()}
        numbers = {k: v[rows] if v.ndim else v for k, v in scalars.items()}
        values = {name: piece[name].to(self.rules.compute) for name in ("grad", "param")}
        flow = Flow(values, Stored(self.rules, piece, {}), {}, numbers, self.bucket.info)
        flow["lr"] = flow["rate"] = numbers["lr"]
        first = start + columns.start
        flow["index"] = torch.arange(first, first + piece["grad"].shape[1], device=piece["grad"].device).unsqueeze(0)
        sums: Values = {}
        for one, measures in self.aside:
            one.transform(flow)
            if measures:
                sums |= {f"{one.name}.{key}": add(value, flow) for key, value in one.sums(flow).items()}
        return sums

    def settle(self, stored: Values, scalars: Values, totals: Values) -> None:
        """Write what was measured, where the gradient is finite."""
        ok = totals["engine.bad"] == 0
        flow = Flow({"grad": stored["grad"]}, Stored(self.rules, stored, {}), {}, scalars, self.bucket.info)
        for one, measures in self.aside:
            mine = {k[len(one.name) + 1 :]: v for k, v in totals.items() if k.startswith(f"{one.name}.")}
            if measures:
                one.settle(flow, {k: flow.per_param(v) if v.ndim == 1 else v for k, v in mine.items()})
        for name, value in flow.new.items():
            for suffix, part in self.rules.codecs[name].encode(value, None).items():
                old = stored[name + suffix]
                old.copy_(torch.where(ok.reshape(-1, *([1] * (old.ndim - 1))), part.reshape(old.shape), old))


def narrowed(bucket: Bucket) -> Rules:
    """The rules of a bucket in steps in which nothing measures, without what does nothing else, and its state."""
    rules = Rules.of(bucket, frozenset())
    acting = tuple(one for one in rules.applied if not _idle(one))
    slots = {slot.name for one in acting for slot in one.slots(bucket.info)} | {KAHAN.name}
    return dataclasses.replace(
        rules,
        chain=acting,
        segments=plan_segments(acting, bucket.info, frozenset()),
        slots=tuple(slot for slot in bucket.slots if slot.name in slots),
        codecs=dict(bucket.codecs),
    )


def numbers_of(rules: Rules) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Slots of one number a parameter, zeros that stand for anchors among them; and the names of a step's numbers."""
    single = tuple(slot.name for slot in rules.slots if slot.shape == () or slot.name in rules.zero_anchors)
    scalars = tuple(sorted(rules.scalars(torch.ones(1, dtype=torch.float64))))
    return single, scalars + (("loss",) if any(one.reads_loss for one in rules.chain) else ())


def identity_of(bucket: Bucket, rules: Rules) -> tuple[Hashable, ...]:
    """What makes two buckets' graphs the same."""
    foreign = any(not type(one).__module__.startswith("hina_optim.") for one in rules.chain)
    return (
        tuple((type(one), _values(one)) for one in rules.chain),
        tuple(
            (slot.name, slot.shape if slot.shape in ("like", ()) else None, rules.codecs[slot.name])
            for slot in rules.slots
        ),
        rules.zero_anchors,
        tuple(rules.streams[slot.name] for slot in rules.slots if rules.codecs[slot.name].noisy),
        rules.rounding,
        bucket.key.dtype,
        bucket.key.device,
        bucket.info if foreign else None,  # what a technique of a user's asks of its shape is a constant in a graph
    )


def aside_of(bucket: Bucket, measuring: frozenset[str]) -> tuple[tuple[Technique, bool], ...] | None:
    """What measures, and what runs before it; None if that must be part of the plan.

    Beside the plan goes what takes its sums in the first segment and whose outcome is state of its own alone.
    """
    running = Rules.of(bucket, measuring).segments[0].running
    measures = [isinstance(one, PeriodicTechnique) and one.name in measuring for one, _ in running]
    here = [one for (one, _), is_it in zip(running, measures, strict=True) if is_it]
    if len(here) < sum(one.name in measuring and one.applies(bucket.info) for one in bucket.chain):
        return None
    if any(one.whole or one.settles or one.by_rows for one in here):
        return None
    last = max((i for i, is_it in enumerate(measures) if is_it), default=-1)
    return tuple((one, is_it) for (one, _), is_it in zip(running[: last + 1], measures, strict=False))


def _idle(one: Technique) -> bool:
    """Whether a technique does nothing but measure."""
    return isinstance(one, PeriodicTechnique) and type(one).transform is Technique.transform


def element_wise(codec: Codec) -> bool:
    """Whether every stored part has an element for each of the value."""
    return not codec.by_rows and all(codec.part_shape(suffix, (8,)) == (8,) for suffix in codec.parts)


def _values(one: Technique) -> Hashable:
    """Hyper-parameters, to tell whether two techniques do the same; what has no hash is the same as itself only."""
    found = []
    for name, value in sorted(vars(one).items()):
        try:
            hash(value)
        except TypeError:
            value = id(value)
        found.append((name, value))
    return tuple(found)
