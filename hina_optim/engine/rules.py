"""What the update of a kind of parameters is made of, apart from any parameter: the same for buckets that are alike."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from hina_optim.engine.bucket import KAHAN, Bucket
from hina_optim.engine.plan import Segment, plan_segments
from hina_optim.state.precision import Codec, compute_dtype, decoded
from hina_optim.state.ranges import RangeCodec
from hina_optim.state.rounding import element_words, round_stochastic, stream_noise
from hina_optim.state.slot import Slot
from hina_optim.techniques.base import Flow, ParamInfo, PeriodicTechnique, Sums, Technique

__all__ = ["FINITE", "FiniteGuard", "Rules", "Values", "chosen", "set_aside"]

Values = dict[str, Tensor]

#: 1 for parameters whose gradient is finite, 0 for others: ``[N, 1, …]``.
FINITE = "engine.finite"


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
        flow[FINITE] = (totals["bad"] == 0).to(flow["grad"].dtype)


@dataclass
class Rules:
    """A recipe cut into segments, and how its state is stored.

    Attributes:
        chain: The techniques that act, behind the guard against gradients that are not finite.
        segments: The plan.
        info: What the parameters are.
        slots: Their state.
        codecs: How each slot is stored.
        zero_anchors: Slots of which one zero stands for the whole.
        compute: The dtype that all is computed in.
        rounding: How weights are rounded: ``"nearest"``, ``"stochastic"`` or ``"kahan"``.
        streams: Slot → which draw of noise rounds it.
    """

    chain: tuple[Technique, ...]
    segments: tuple[Segment, ...]
    info: ParamInfo
    slots: tuple[Slot, ...]
    codecs: Mapping[str, Codec]
    zero_anchors: frozenset[str]
    compute: torch.dtype
    rounding: str
    streams: Mapping[str, int] = field(default_factory=dict)

    @classmethod
    def of(cls, bucket: Bucket, measuring: frozenset[str]) -> Rules:
        """Those of a bucket in its next step, in which the techniques named in ``measuring`` measure."""
        low = bucket.key.dtype in (torch.bfloat16, torch.float16)
        chain = (FiniteGuard(), *(one for one in bucket.chain if one.acts(bucket.step)))
        return cls(
            chain,
            plan_segments(chain, bucket.info, measuring),
            bucket.info,
            bucket.slots,
            bucket.codecs,
            bucket.key.zero_anchors,
            compute_dtype(bucket.key.dtype),
            bucket.group["rounding"] if low else "nearest",
            {slot.name: i + 1 for i, slot in enumerate(bucket.slots)},
        )

    @property
    def applied(self) -> tuple[Technique, ...]:
        """The techniques of the chain that mean anything for these parameters."""
        return tuple(one for one in self.chain if one.applies(self.info))

    def scalars(self, t: Tensor) -> Values:
        """Every technique's numbers of this step, in the compute dtype, from ``t`` ``[N]``."""
        return {
            f"{one.name}.{key}": value.to(self.compute) for one in self.applied for key, value in one.scalars(t).items()
        }

    def decode(self, name: str, stored: Values) -> Tensor:
        """A slot as it is computed with."""
        codec, grad = self.codecs[name], stored["grad"]
        if name in self.zero_anchors:
            zero = stored[name].to(self.compute)
            return zero.reshape(zero.shape[0], *([1] * (grad.ndim - 1)))
        return decoded(codec, {suffix: stored[name + suffix] for suffix in codec.parts}, grad.shape)

    def run(
        self,
        i: int,
        flow: Flow,
        totals: list[Values],
        whole: Values,
        add: Callable[[Any, Flow], Tensor],
    ) -> Values:
        """Segment ``i``: its sums ``{"<technique>.<name>": …}``, each added up by ``add``."""
        segment = self.segments[i]
        for one in segment.settling:
            prefix = f"{one.name}."
            mine = {k[len(prefix) :]: v for k, v in totals[i - 1].items() if k.startswith(prefix)}
            one.settle(flow, {k: flow.per_param(v) if v.ndim == 1 else v for k, v in mine.items()})
        flow.hold()
        sums: Values = {}
        for one, takes_sums in segment.running:
            if one is segment.whole:
                flow[f"{one.name}.whole"] = whole[one.name]
            one.transform(flow)
            if takes_sums:
                for key, value in one.sums(flow).items():
                    sums[f"{one.name}.{key}"] = add(value, flow)
            elif one.name in segment.immediate:
                one.settle(flow, {})
        return sums

    def target(self, flow: Flow) -> Tensor:
        """The new weights, before they are rounded."""
        param = flow["param"]
        update = flow["rate"] * flow["update"]
        target = torch.addcmul(param, update, flow["scale"], value=-1) if "scale" in flow else param - update
        if "decay" in flow:
            target.addcmul_(flow["decay"], param, value=-1)
        if "drift" in flow:
            target.sub_(flow["drift"])
        if "pull" in flow:
            target.lerp_(flow.state["anchor"].expand_as(target), flow["pull"])
        return target

    def written(
        self,
        flow: Flow,
        seeds: Tensor | None,
        index: Tensor | None,
        dtype: torch.dtype,
        aside: Values | None = None,
    ) -> tuple[Tensor, Iterator[tuple[str, str, Tensor]]]:
        """New weights, and new state, as they are stored.

        Args:
            flow: At the end of the last segment.
            seeds: ``[N]``, where noise is needed.
            index: Global flat index of each element (int32, wrapped), where noise is needed.
            dtype: Of the weights.
            aside: Gets, while the state is iterated, what of it has to be encoded again once all ranks have agreed on a
                scale: :func:`set_aside`.

        Returns:
            The weights, and slot, suffix and value of every part of the state.
        """
        target = self.target(flow)
        words: Tensor | None = None
        if self.rounding == "stochastic" or any(self.codecs[name].noisy for name in flow.new):
            assert seeds is not None and index is not None
            words = element_words(flow.per_param(seeds), index)
        if self.rounding == "stochastic":
            assert words is not None
            weights = round_stochastic(target, stream_noise(words, 0), dtype)
        elif self.rounding == "kahan":
            # an element that does not move (lr 0) keeps weight and remainder: a remainder of half a bit would round up
            param, lost = flow["param"], flow.state[KAHAN.name]
            moves = target != param
            wanted = (target - param) + lost
            weights = torch.where(moves, param + wanted, param).to(dtype)
            flow.new[KAHAN.name] = torch.where(moves, wanted - (weights.to(self.compute) - param), lost)
        else:
            weights = target.to(dtype)
        return weights, self._encoded(flow.new, words, aside)

    def _encoded(self, new: Values, words: Tensor | None, aside: Values | None) -> Iterator[tuple[str, str, Tensor]]:
        for name, value in new.items():
            codec = self.codecs[name]
            noise = stream_noise(words, self.streams[name]) if words is not None and codec.noisy else None
            parts = codec.encode(value, noise)
            if aside is not None and isinstance(codec, RangeCodec):
                aside |= set_aside(name, codec, value, noise, parts["_scale"])
            for suffix in codec.parts:
                yield name, suffix, parts.pop(suffix)


def set_aside(name: str, codec: RangeCodec, value: Tensor, noise: Tensor | None, scale: Tensor) -> Values:
    """What is needed of a slot to encode the blocks at the ends of a range again, one behind the other.

    Returns:
        ``"<slot>.value"`` and ``"<slot>.noise"``, ``[N, elements]``, and ``"<slot>.scale"``, ``[N, blocks]``.
    """

    def some(of: Tensor, ends: list[tuple[int, int]]) -> Tensor:
        return torch.cat([of[:, :0], *(of[:, begin:end] for begin, end in ends)], 1)

    elements = [(edge.begin, edge.end) for edge in codec.edges]
    found = {f"{name}.value": some(value, elements)}
    found[f"{name}.scale"] = some(scale, [(edge.scale, edge.scale + 1) for edge in codec.edges])
    return found if noise is None else found | {f"{name}.noise": some(noise, elements)}


def chosen(ok: Tensor, new: Tensor, old: Tensor) -> Tensor:
    """``new`` where ``ok``, else ``old``; compiled, bytes as floats: of bytes, the compiler chooses one by one."""
    if torch.compiler.is_compiling() and old.dtype in (torch.int8, torch.uint8):
        return torch.where(ok, new.float(), old.float()).to(old.dtype)
    return torch.where(ok, new, old)


def periodic(chain: tuple[Technique, ...]) -> list[PeriodicTechnique]:
    """The periodic techniques of a recipe."""
    return [one for one in chain if isinstance(one, PeriodicTechnique)]
