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

import dataclasses
import functools
import logging
import types
import weakref
from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor

from hina_optim.engine.bucket import KAHAN, Bucket
from hina_optim.engine.plan import plan_segments
from hina_optim.engine.rules import FINITE, Rules, Values
from hina_optim.state.precision import Codec
from hina_optim.techniques.base import Flow, Folded, PeriodicTechnique, Technique

__all__ = ["LONGEST", "OPTIONS", "Lines", "compiler", "is_compiled", "line_length", "lines_of"]

log = logging.getLogger("hina_optim")

#: Elements of a line, at most: above, the compiler keeps sums in memory.
LONGEST = 4096
#: Elements of the widest vector of a CPU, in four bytes each.
WIDTH = 16
#: Elements of a piece in which what measures is computed, eagerly.
PIECE = 1 << 17


#: Fewer elements than this make no line, unless a parameter has no more.
SHORTEST = 64

#: Always in parallel loops, whatever the size of the first parameter; products and sums in one instruction.
OPTIONS: dict[str, Any] = {"cpp.dynamic_threads": True, "cpp.enable_floating_point_contract_flag": "fast"}

Adding = Callable[[Any, Flow], Tensor]

_MADE: weakref.WeakValueDictionary[Hashable, Graphs] = weakref.WeakValueDictionary()


def is_compiled(bucket: Bucket) -> bool:
    """Whether its steps are compiled: where it is asked for, and can be.

    None is eager: graphs take from half a minute to minutes to build in a first process, which only many steps of a
    large model give back, and need a compiler.
    """
    return bool(bucket.group["compile"]) and (bucket.key.device.type != "cpu" or compiler())


@functools.cache
def compiler() -> bool:
    """Whether torch finds a C++ compiler, without which it compiles nothing for CPUs; says so once if not."""
    from torch._inductor.cpp_builder import get_cpp_compiler  # takes a second to import

    try:
        return bool(get_cpp_compiler())
    except RuntimeError:  # an InvalidCxxCompiler, which has another place in other versions
        log.warning(
            "compile=True, but no C++ compiler was found (g++, or what CXX names): steps on CPUs run eagerly, which "
            "takes several times as long and gives the same result."
        )
        return False


class Graphs:
    """The compiled segments of all buckets that follow the same rules.

    Args:
        rules: Which.
        single: What has one number a parameter, beside ``scalars`` and totals: state, and zeros that stand for anchors.
        scalars: Names of the numbers of a step.
    """

    def __init__(self, rules: Rules, single: tuple[str, ...], scalars: tuple[str, ...]) -> None:
        self.rules = rules
        self.single = single
        self.scalars = scalars
        self._compiled: dict[tuple[int, tuple[str, ...], bool], Callable[..., Values]] = {}

    def run(
        self, i: int, stored: Values, numbers: Tensor, totals: tuple[str, ...], seeds: Tensor | None, start: Tensor
    ) -> Values:
        """Segment ``i``.

        Args:
            i: Which.
            stored: ``[lines, length]`` each; to the graph, a line is rows of as many elements as a vector has.
            numbers: ``[numbers, lines]``: the learning rate, the number of elements, :attr:`single`, :attr:`scalars`
                and ``totals``.
            totals: What totals there are, as ``"<segment>.<technique>.<name>"``.
            seeds: int32 ``[lines]``, where noise is needed.
            start: int64 ``[lines]``: global flat index of the first element of each.

        Returns:
            Sums of lines; of the last segment, the new values of state of one number, ``[lines]``.
        """
        whole = stored["grad"].shape[1] % WIDTH == 0  # whole vectors: no code for what is left at the end of a line
        key = i, totals, whole
        if key not in self._compiled:
            self._compiled[key] = self._compile(i, totals, _hold)
        stored = {name: part.unflatten(1, (-1, WIDTH if whole else 1)) for name, part in stored.items()}
        for x, dims in ((numbers, (1,)), (seeds, (0,)), (start, (0,)), *((part, (0, 1)) for part in stored.values())):
            if x is not None:
                torch._dynamo.maybe_mark_dynamic(x, dims)
        config = torch.fx.experimental._config
        # sizes that happen to be equal when a graph is made may differ later
        before, config.use_duck_shape = config.use_duck_shape, False
        try:
            return self._compiled[key](stored, numbers, seeds, start)
        except RuntimeError as error:
            # torch 2.13 cannot fuse some of the loops that make the numbers of a line with those that write in place;
            # nothing has run then, and without them the graph is slower by a few operations on numbers
            if "KeyError: 'buf" not in str(error):
                raise
            log.info(
                "torch could not build segment %d of %d with numbers made once a line; it is built without.",
                i + 1, len(self.rules.segments),
            )  # fmt: skip
            self._compiled[key] = self._compile(i, totals, None)
            return self._compiled[key](stored, numbers, seeds, start)
        finally:
            config.use_duck_shape = before

    def _compile(self, i: int, totals: tuple[str, ...], hold: Callable[[Flow], None] | None) -> Callable[..., Values]:
        rules, single, known = self.rules, self.single, self.scalars

        def segment(stored: Values, numbers: Tensor, seeds: Tensor | None, start: Tensor) -> Values:
            names = ("lr", "count", *single, *known, *totals)
            number = dict(zip(names, numbers.unbind(0), strict=True))
            before: list[Values] = [{} for _ in range(i)]
            for name in totals:
                at, label = name.split(".", 1)
                before[int(at)][label] = number[name]
            state = Stored(rules, stored, {name: number[name] for name in single})
            values = {name: stored[name].to(rules.compute) for name in ("grad", "param")}
            flow = Flow(values, state, {}, {name: number[name] for name in ("count", *known)}, rules.info)
            flow["lr"] = flow["rate"] = flow.per_param(number["lr"])
            if any(one.needs_index for one in rules.chain):
                flow["index"] = _index(stored["grad"], start)
            sums: Values = {}
            for j in range(i + 1):
                sums = rules.run(j, flow, before, {}, _sum, hold)
            if i + 1 < len(rules.segments):
                return sums
            return _commit(rules, flow, stored, single, seeds, start)

        # torch.compile counts recompilations by code object
        code = segment.__code__.replace(co_name=f"segment{i}")
        own = types.FunctionType(code, segment.__globals__, segment.__name__, None, segment.__closure__)
        compiled: Callable[..., Values] = torch.compile(own, fullgraph=True, dynamic=False, options=OPTIONS)
        return compiled


class Stored(dict[str, Tensor]):
    """State by slot, decoded when it is asked for: what no technique asks for is no input of a graph."""

    def __init__(self, rules: Rules, stored: Values, single: Values) -> None:
        super().__init__({k: v[:, None, None] if k in rules.zero_anchors else v for k, v in single.items()})
        self._rules, self._stored = rules, stored

    def __missing__(self, name: str) -> Tensor:
        value = self[name] = self._rules.decode(name, self._stored)
        return value


def _hold(flow: Flow) -> None:
    """Have numbers of a line made once for the line, not for each of its vectors: the largest of 16 equal ones.

    The compiler takes up in a loop whatever can be computed there, a dozen roots and quotients of numbers; but not
    what is the outcome of a reduction.
    """
    for name, value in flow.values.items():
        if value.shape[1:] == (1, 1):
            flow[name] = value.expand(-1, 1, WIDTH).amax(2, keepdim=True)


def _sum(value: Any, flow: Flow) -> Tensor:
    """A sum over each line."""
    if isinstance(value, Folded):
        place = (flow["index"] % value.size).flatten(1)
        return value.value.new_zeros(value.value.shape[0], value.size).scatter_add_(1, place, value.value.flatten(1))
    sums: Tensor = value.expand_as(flow["grad"]).sum((1, 2))
    return sums


def _index(like: Tensor, start: Tensor) -> Tensor:
    """Global flat index of every element of ``like``, ``[lines, length / width, width]``, of the dtype of ``start``."""
    steps = torch.arange(like.shape[1] * like.shape[2], dtype=start.dtype, device=start.device)
    return start[:, None, None] + steps.view(like.shape[1:])


def _commit(
    rules: Rules, flow: Flow, stored: Values, single: tuple[str, ...], seeds: Tensor | None, start: Tensor
) -> Values:
    """Write weights and state in place; returns new state of one number a parameter."""
    ok = flow[FINITE] > 0
    index = None if seeds is None else _index(stored["grad"], start.to(torch.int32))
    written, encoded = rules.written(flow, seeds, index, stored["param"].dtype)
    numbers: Values = {}
    writes = [(stored["param"], written)]
    for name, suffix, part in encoded:
        if name in single:
            numbers[name] = part
        else:
            writes.append((stored[name + suffix], part))
    for old, new in writes:
        old.copy_(torch.where(ok, new, old))
    return numbers


class Lines:
    """How one bucket runs in lines.

    Args:
        bucket: Which.
        rules: Those of its steps in which nothing measures.
        graphs: The compiled segments.
        aside: What measures in this step, and all that comes before it in the recipe; computed beside the graphs, since
            it is seldom, and would take as many graphs again.
    """

    def __init__(
        self, bucket: Bucket, rules: Rules, graphs: Graphs, aside: tuple[tuple[Technique, bool], ...] = ()
    ) -> None:
        self.bucket = bucket
        self.aside = aside
        self.rules = rules
        self.graphs = graphs
        self._noise = rules.rounding == "stochastic" or any(
            codec.noisy for name, codec in rules.codecs.items() if name in {slot.name for slot in rules.slots}
        )

    def run(
        self, i: int, stored: Values, scalars: Values, totals: list[Values], start: int, last: bool
    ) -> Values | None:
        """Segment ``i`` of some parameters, or of a part of one.

        Args:
            i: Which.
            stored: ``[N, …]``, as stored.
            scalars: Numbers of this step.
            totals: Of the segments before.
            start: Global flat index of the first element of each parameter.
            last: Whether state of one number is to be written.

        Returns:
            The sums, ``[N]`` each; None if these elements make no lines: then nothing has happened.
        """
        grad = stored["grad"]
        n = grad.shape[0]
        length = line_length(n, grad.numel() // max(1, n))
        if not length or not (grad.is_contiguous() and stored["param"].is_contiguous()):
            return None
        graphs, each = self.graphs, grad.numel() // n // length
        names: dict[str, Tensor] = {}
        beside = {one.name for one, measures in self.aside if measures}
        for j, found in enumerate(totals):
            names |= {f"{j}.{k}": v for k, v in found.items() if k.split(".", 1)[0] not in beside}
        own = [stored[name] for name in graphs.single]
        count = torch.full((), self.bucket.info.numel, dtype=self.rules.compute, device=grad.device)
        known = [scalars["lr"], count, *own, *(scalars[name] for name in graphs.scalars), *names.values()]
        numbers = torch.stack([one.to(self.rules.compute).expand(n) for one in known])
        first = torch.arange(start, start + each * length, length, device=grad.device)
        # a stack of parameters is no leaf, one parameter is: detached they are alike
        lined = {name: stored[name].detach().view(-1, length) for name in ("grad", "param")}
        for slot in self.rules.slots:
            if slot.shape == "like" and slot.name not in self.rules.zero_anchors:
                for suffix in self.rules.codecs[slot.name].parts:
                    lined[slot.name + suffix] = stored[slot.name + suffix].view(-1, length)
        found = graphs.run(
            i,
            lined,
            numbers.repeat_interleave(each, 1),
            tuple(names),
            scalars["seeds"].repeat_interleave(each) if self._noise else None,
            first.repeat(n),
        )
        if i + 1 < len(self.rules.segments):
            return {name: value.view(n, each, *value.shape[1:]).sum(1) for name, value in found.items()}
        if last:
            ok = totals[0]["engine.bad"] == 0
            stored["skipped"].add_((~ok).to(stored["skipped"].dtype))
            for name, value in found.items():
                stored[name].copy_(torch.where(ok, value[::each].to(stored[name].dtype), stored[name]))
        return {}

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
                for begin in range(0, numel, PIECE)
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
        first = torch.tensor([start + columns.start], device=piece["grad"].device)
        flow["index"] = _index(piece["grad"][:, :, None], first)[..., 0]
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
    rules = Rules.of(bucket, frozenset())
    acting = tuple(one for one in rules.applied if not _idle(one))
    aside = _aside(bucket, measuring)
    slots = {slot.name for one in acting for slot in one.slots(bucket.info)} | {KAHAN.name}
    kept = tuple(slot for slot in bucket.slots if slot.name in slots)
    if (
        aside is None
        or bucket.shard.slices is not None
        or any(one.whole or one.by_rows for one in acting)
        or any(_remembers_many(one, bucket) for one in acting)
        or any(not _element_wise(bucket.codecs[slot.name]) for slot in kept if slot.shape == "like")
    ):
        return None
    rules = dataclasses.replace(
        rules,
        chain=acting,
        segments=plan_segments(acting, bucket.info, frozenset()),
        slots=kept,
        codecs=dict(bucket.codecs),
    )
    single = tuple(s.name for s in kept if s.shape == () or s.name in rules.zero_anchors)
    scalars = tuple(sorted(rules.scalars(torch.ones(1, dtype=torch.float64)))) + (
        ("loss",) if any(one.reads_loss for one in acting) else ()
    )
    foreign = any(not type(one).__module__.startswith("hina_optim.") for one in acting)
    key = (
        tuple((type(one), _values(one)) for one in acting),
        tuple((slot, rules.codecs[slot.name], slot.name in rules.zero_anchors) for slot in kept),
        tuple(rules.streams[slot.name] for slot in kept if rules.codecs[slot.name].noisy),
        rules.rounding,
        bucket.key.dtype,
        bucket.key.device,
        bucket.info if foreign else None,  # what a technique of a user's asks of its shape is a constant in a graph
    )
    graphs = _MADE.get(key)
    if graphs is None:
        graphs = _MADE[key] = Graphs(rules, single, scalars)
    return Lines(bucket, rules, graphs, aside)


def _aside(bucket: Bucket, measuring: frozenset[str]) -> tuple[tuple[Technique, bool], ...] | None:
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


def _remembers_many(one: Technique, bucket: Bucket) -> bool:
    """Whether every step needs state of a fixed shape; what measures needs its own only when it does."""
    fixed = any(slot.shape not in ("like", ()) for slot in one.slots(bucket.info))
    return fixed and not isinstance(one, PeriodicTechnique)


def _element_wise(codec: Codec) -> bool:
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
