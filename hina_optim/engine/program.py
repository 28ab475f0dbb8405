"""The recipe of one bucket, cut into segments and ready to run, eagerly or compiled.

A segment is a pure function of tensors: stored inputs, the values so far, the totals of earlier segments and this
step's scalars go in; new values and this segment's sums come out. Only the last one writes, in place, into the stored
tensors it was given.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from hina_optim.engine.bucket import KAHAN, Bucket
from hina_optim.engine.plan import Segment, plan_segments
from hina_optim.engine.transfers import Pieces
from hina_optim.state.precision import compute_dtype
from hina_optim.state.rounding import element_words, round_stochastic, stream_noise
from hina_optim.techniques.base import ByColumn, ByRow, Flow, Folded, PeriodicTechnique, Sums, Technique

__all__ = ["Inputs", "Program", "Values"]

Values = dict[str, Tensor]

_FINITE = "engine.finite"


@dataclass
class Inputs:
    """What a segment reads, for one cell (``N`` parameters, or one chunk of one).

    Attributes:
        stored: ``grad``, ``param`` and every stored part of the state, as stored.
        scalars: ``lr`` (0-d), ``loss`` (``[N]``), ``seeds`` (int32 ``[N]``), ``index`` (int64 ``[1, …]``, low
            precisions and measuring only), ``row_index`` and ``column_index`` (int64, where not all rows are here), and
            ``"<technique>.<name>"`` ``[N]``.
    """

    stored: Values
    scalars: Values


class FiniteGuard(Technique):
    """Counts gradient elements that are not finite: a parameter that has any is left alone in this step."""

    name = "engine"
    reads = writes = sums_over = frozenset({"grad"})

    def transform(self, flow: Flow) -> None:
        """Go on with zero for what is not finite, so that the outcome is finite and can be blended out."""
        raw = flow["grad"]
        # x - x is 0 for every finite element and NaN for any other; the compiler would fold x * 0 into 0
        flow["engine.odd"] = raw - raw
        if torch.compiler.is_compiling():  # compiled, a comparison vectorizes and nan_to_num does not; eagerly it is so
            flow["grad"] = torch.where(flow["engine.odd"] == 0, raw, 0.0)
        else:
            flow["grad"] = raw.nan_to_num(0.0, 0.0, 0.0)

    def sums(self, flow: Flow) -> Sums:
        """Zero for every finite element, NaN for any other: arithmetic is several times faster than a test."""
        return {"bad": flow.values.pop("engine.odd")}

    def settle(self, flow: Flow, totals: Values) -> None:
        """Remember which parameters may be written."""
        flow[_FINITE] = (totals["bad"] == 0).to(flow["grad"].dtype)


class Program:
    """A bucket's segments for one set of measuring techniques.

    Attributes:
        segments: The plan; the guard against non-finite gradients comes first.
        needs_whole: Whether any technique needs complete values: then a parameter is never cut into chunks.
        needs_rows: Whether rows and columns are told apart: then a large matrix is cut between rows.
        coded_rows: Whether state is stored in blocks within rows.
        reads_loss: Whether any technique reads the loss.
        asked: For every segment, what of the state in host memory it (or any, under -1) was seen to use: what is to be
            brought for it the next time.
    """

    def __init__(self, bucket: Bucket, measuring: frozenset[str], compiled: bool) -> None:
        self.bucket = bucket
        self.info = bucket.info
        self.compute = compute_dtype(bucket.key.dtype)
        acting = [one for one in bucket.chain if one.acts(bucket.step)]
        self.chain: tuple[Technique, ...] = (FiniteGuard(), *acting)
        self.segments: tuple[Segment, ...] = plan_segments(self.chain, self.info, measuring)
        self.measuring = measuring
        self.asked: dict[int, frozenset[str]] = {}
        self.needs_whole = any(s.whole is not None for s in self.segments)
        self.coded_rows = any(codec.by_rows for codec in bucket.codecs.values())
        self.needs_rows = self.coded_rows or any(one.by_rows and one.applies(self.info) for one in acting)
        self.reads_loss = any(one.reads_loss and one.applies(self.info) for one in acting)
        self.rounding = bucket.group["rounding"] if bucket.key.dtype in (torch.bfloat16, torch.float16) else "nearest"
        self.streams = {slot.name: i + 1 for i, slot in enumerate(bucket.slots)}
        self.needs_index = (
            bool(measuring)
            or self.rounding == "stochastic"
            or any(c.noisy for c in bucket.codecs.values())
            or any(one.needs_index and one.applies(self.info) for one in acting)
        )
        self.compiled = compiled
        self._steps: dict[tuple[int, bool, bool], Callable[..., tuple[Values, Values]]] = {}

    def scalars(self, t: Tensor) -> Values:
        """Every technique's numbers of this step, in the compute dtype, from ``t`` ``[N]``."""
        return {
            f"{one.name}.{key}": value.to(self.compute)
            for one in self.chain
            if one.applies(self.info)
            for key, value in one.scalars(t).items()
        }

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
            Values at its end, and its sums ``{"<technique>.<name>": [N] or [N, size]}``.
        """
        return self._step(i, carry is None, last)(inputs.stored, inputs.scalars, carry or {}, totals[:i], whole)

    def _step(self, i: int, again: bool, last: bool) -> Callable[..., tuple[Values, Values]]:
        key = (i, again, last or i < len(self.segments) - 1)
        if key not in self._steps:

            def phase(
                stored: Values, scalars: Values, carry: Values, totals: list[Values], whole: Values
            ) -> tuple[Values, Values]:
                flow = self._flow(stored, scalars, carry if not again else {}, start=again)
                sums: Values = {}
                for j in range(0 if again else i, i + 1):
                    sums = self._segment(j, flow, totals, whole)
                if i == len(self.segments) - 1:
                    self._commit(flow, stored, scalars, last)
                    return {}, sums
                left = {**flow.values, **{f"new.{k}": v for k, v in flow.new.items()}}
                if not self.compiled:  # decode once; a compiled segment decodes what it uses while reading it
                    left |= {f"state.{k}": v for k, v in flow.state.items()}
                return left, sums

            if self.compiled:
                # torch.compile counts recompilations by code object; each segment of each bucket is a program of its
                # own
                code = phase.__code__.replace(co_name=f"phase{i}{'_again' if again else ''}{'' if last else '_part'}")
                own = types.FunctionType(code, phase.__globals__, phase.__name__, None, phase.__closure__)
                self._steps[key] = torch.compile(own, fullgraph=True, dynamic=False)
            else:
                self._steps[key] = phase
        return self._steps[key]

    def _flow(self, stored: Values, scalars: Values, carry: Values, start: bool) -> Flow:
        ndim = stored["grad"].ndim
        state = {k[6:]: v for k, v in carry.items() if k.startswith("state.")}
        if isinstance(stored, Pieces):
            state = States(state, functools.partial(self._decode, stored=stored, ndim=ndim))
        elif not state:
            state = {slot.name: self._decode(slot.name, stored, ndim) for slot in self.bucket.slots}
        values = {k: v for k, v in carry.items() if not k.startswith(("new.", "state."))}
        new = {k[4:]: v for k, v in carry.items() if k.startswith("new.")}
        if start:
            values = {"grad": stored["grad"].to(self.compute), "param": stored["param"].to(self.compute)}
            values["lr"] = values["rate"] = scalars["lr"]
            values |= {name: scalars[name] for name in ("index", "row_index", "column_index") if name in scalars}
        return Flow(values, state, new, scalars, self.info)

    def _decode(self, name: str, stored: Values, ndim: int) -> Tensor:
        """A slot as it is computed with."""
        codec = self.bucket.codecs[name]
        if name in self.bucket.key.zero_anchors:
            zero = stored[name].to(self.compute)
            return zero.reshape(zero.shape[0], *([1] * (ndim - 1)))
        return codec.decode({suffix: stored[name + suffix] for suffix in codec.parts})

    def _segment(self, i: int, flow: Flow, totals: list[Values], whole: Values) -> Values:
        segment = self.segments[i]
        for one in segment.settling:
            prefix = f"{one.name}."
            mine = {k[len(prefix) :]: v for k, v in totals[i - 1].items() if k.startswith(prefix)}
            one.settle(flow, {k: flow.per_param(v) if v.ndim == 1 else v for k, v in mine.items()})
        sums: Values = {}
        for one, takes_sums in segment.running:
            if one is segment.whole:
                flow[f"{one.name}.whole"] = whole[one.name]
            one.transform(flow)
            if takes_sums:
                for key, value in one.sums(flow).items():
                    sums[f"{one.name}.{key}"] = self._sum(value, flow)
            elif one.name in segment.immediate:
                one.settle(flow, {})
        return sums

    def _sum(self, value: Tensor | Folded | ByRow | ByColumn, flow: Flow) -> Tensor:
        if isinstance(value, (ByRow, ByColumn)):
            return self._line_sums(value, flow)
        if isinstance(value, Folded):
            flat = value.value.reshape(value.value.shape[0], -1)
            if self.bucket.shard.slices is not None:
                place = flow["index"].reshape(-1) % value.size
                return flat.new_zeros(flat.shape[0], value.size).index_add_(1, place, flat)
            # chunks begin at multiples of any fold, so only the shard's own beginning shifts the fold
            start = self.bucket.shard.start % value.size
            flat = torch.nn.functional.pad(flat, (start, -(flat.shape[1] + start) % value.size))
            return flat.reshape(flat.shape[0], -1, value.size).sum(1)
        return value.reshape(value.shape[0], -1).sum(1)

    def _line_sums(self, given: ByRow | ByColumn, flow: Flow) -> Tensor:
        """Sums of all rows ``[N, rows]`` or columns ``[N, columns]``, of the elements that are here."""
        value, n = given.value, given.value.shape[0]
        row_index, column_index = flow.get("row_index"), flow.get("column_index")
        if column_index is None or value.ndim > 2:
            grid = value.reshape(n, value.shape[1], torch.Size(value.shape[2:]).numel())
            if isinstance(given, ByColumn):
                part = grid.sum(1)
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
        flow = self._flow(inputs.stored, inputs.scalars, carry, start=False)
        return one.whole_matrix(flow, *complete)

    def _commit(self, flow: Flow, stored: Values, scalars: Values, last: bool) -> None:
        """Write new weights and state in place; a parameter with a non-finite gradient keeps every bit.

        All that is written is computed before anything is: running out of memory changes nothing.
        """
        ok = flow[_FINITE]
        param = flow["param"]
        update = flow["rate"] * flow["update"]
        target = torch.addcmul(param, update, flow["scale"], value=-1) if "scale" in flow else param - update
        if "decay" in flow:
            target.addcmul_(flow["decay"], param, value=-1)
        if "drift" in flow:
            target.sub_(flow["drift"])
        if "pull" in flow:
            target.lerp_(flow.state["anchor"].expand_as(target), flow["pull"])
        words: Tensor | None = None
        if self.rounding == "stochastic" or any(self.bucket.codecs[name].noisy for name in flow.new):
            words = element_words(flow.per_param(scalars["seeds"]), scalars["index"].to(torch.int32))
        old = stored["param"]
        if self.rounding == "stochastic":
            assert words is not None
            written = round_stochastic(target, stream_noise(words, 0), old.dtype)
        elif self.rounding == "kahan":
            # an element that does not move (lr 0) keeps weight and remainder: a remainder of half a bit would round up
            lost = flow.state[KAHAN.name]
            moves = target != param
            wanted = (target - param) + lost
            written = torch.where(moves, param + wanted, param).to(old.dtype)
            flow.new[KAHAN.name] = torch.where(moves, wanted - (written.to(self.compute) - param), lost)
        else:
            written = target.to(old.dtype)
        fixed = {slot.name for slot in self.bucket.slots if slot.shape != "like"}
        writes: list[Write] = []
        for name, value in flow.new.items():
            if name in fixed and not last:
                continue
            codec = self.bucket.codecs[name]
            noise = stream_noise(words, self.streams[name]) if words is not None and codec.noisy else None
            for suffix, part in codec.encode(value, noise).items():
                have = stored[name + suffix]
                if isinstance(stored, Pieces):
                    stored.written.add(name + suffix)
                keep = ok.reshape(-1, *([1] * (have.ndim - 1)))
                writes.append(Write.blend(have, part.reshape(have.shape), keep))
        writes.append(Write.blend(old, written, ok))
        if last:
            writes.append(Write("add", stored["skipped"], 1 - ok.reshape(-1)))
        for write in writes:
            write()


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
        if old.ndim <= 1 or old[0].numel() <= 4096:
            return cls("copy", old, torch.where(ok > 0, new, old))
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


def periodic(chain: tuple[Technique, ...]) -> list[PeriodicTechnique]:
    """The periodic techniques of a recipe."""
    return [one for one in chain if isinstance(one, PeriodicTechnique)]
