"""How large optimizer state is before there is any: names, dtypes and bytes, from shapes alone.

The numbers come from the recipes and codecs that the state itself is made with, so they are exact. What cannot be known
without the weights is which of them are zero everywhere: an anchor at zero is one number.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hina_optim.engine.cells import CPU_CHUNK, FOLD, GRAIN, KEPT_VALUES, LIVE_VALUES
from hina_optim.state.precision import Storage, codec_for, compute_dtype
from hina_optim.state.ranges import codec_here
from hina_optim.state.shard import Shard
from hina_optim.state.slot import Slot
from hina_optim.techniques.base import ParamInfo, Technique

if TYPE_CHECKING:
    from hina_optim.engine.optimizer import HinaOptimizer

__all__ = ["Kept", "Part", "kept", "nonzero", "state_bytes", "temporary_bytes", "zero_here", "zero_positions"]


@dataclass(frozen=True)
class Part:
    """One stored tensor of a parameter's state: its name, dtype and bytes, and whether it is in host memory."""

    name: str
    dtype: torch.dtype
    nbytes: int
    hosted: bool = False


#: ``step`` on the host and ``skipped`` on the device.
COUNTERS = (Part("step", torch.float32, 4), Part("skipped", torch.float32, 4))


@dataclass(frozen=True)
class Kept:
    """What an optimizer keeps for one parameter, wherever its elements lie.

    Attributes:
        param: The parameter.
        local_shape: Shape of what is here of it.
        start: Flat index of the first element that is here.
        group: Index of its group.
        options: The group's options.
        info: What the parameter is; its global shape.
        dtype: What the optimizer sees of it.
        device: Where it is.
        serves: Whether such a parameter can have state in host memory.
        chain: The techniques that act on it.
        slots: Their state.
        zero: Whether it is known to be zero everywhere.
        known: What was asked before, of all parameters of its kind.
    """

    param: Tensor
    local_shape: tuple[int, ...]
    start: int
    group: int
    options: dict[str, Any]
    info: ParamInfo
    dtype: torch.dtype
    device: torch.device
    serves: bool
    chain: tuple[Technique, ...]
    slots: tuple[Slot, ...]
    zero: bool
    known: dict[tuple[tuple[int, ...], int], tuple[Part, ...]] = field(repr=False, compare=False)

    def parts(self, local_shape: tuple[int, ...], start: int = 0) -> tuple[Part, ...]:
        """The stored tensors of a shard of this local shape; of a flat range, that begins at this element."""
        start = start if len(local_shape) == 1 < len(self.info.shape) else 0
        key = local_shape, start
        if key not in self.known:
            self.known[key] = (*self._parts(local_shape, start), *COUNTERS)
        return self.known[key]

    def _parts(self, local_shape: tuple[int, ...], start: int) -> Iterator[Part]:
        storage = Storage.of(self.options)
        shard = Shard(self.info.shape, start, start + int(torch.Size(local_shape).numel()))
        for slot in self.slots:
            codec = codec_here(slot, storage, self.dtype, shard, local_shape)
            zero = slot.constant and self.zero and bool(local_shape)
            shape = () if zero else slot.local_shape(local_shape)
            hosted = self.serves and storage.hosts(slot) and not zero
            for suffix, kind in codec.parts.items():
                numel = torch.Size(codec.part_shape(suffix, shape)).numel()
                yield Part(slot.name + suffix, kind, int(numel) * kind.itemsize, hosted)


def zero_positions(params: Iterable[tuple[int, Tensor]]) -> set[int]:
    """Which of some ``(position, parameter)`` are zero everywhere; what is on the meta device counts as not."""
    seen = [(position, p) for position, p in params if p.device.type != "meta"]
    if not seen:
        return set()
    some = nonzero([p for _, p in seen]).tolist()
    return {position for (position, _), x in zip(seen, some, strict=True) if not x}


def zero_here(optimizer: HinaOptimizer) -> set[int]:
    """Positions of the parameters that are zero in all elements that are here."""
    optimizer.settle_layout()
    places = optimizer._buckets.identities.places()
    return zero_positions((position, optimizer._layout.local(p)) for position, _, p in places)


def nonzero(tensors: Sequence[Tensor]) -> Tensor:
    """Whether each of them has an element that is not zero, 1 or 0: float32 ``[P]`` on the host, by one wait.

    What has no memory (the meta device) counts as not zero.
    """
    home = tensors[0].device
    try:
        return torch.stack([x.detach().any().to(home) for x in tensors]).cpu().float()
    except NotImplementedError:
        return torch.ones(len(tensors))


def kept(
    optimizer: HinaOptimizer,
    groups: Sequence[dict[str, Any]] | None = None,
    zero: Collection[int] | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | None = None,
) -> list[Kept]:
    """What an optimizer keeps, or would keep, for every parameter that is trained.

    Args:
        optimizer: With or without state.
        groups: Options in the place of those of its groups. None: its own.
        zero: Positions of the parameters that are zero everywhere. None: the weights of those without state are looked
            at, on all ranks.
        dtype: In the place of that of all parameters.
        device: In the place of that of all parameters.
    """
    buckets = optimizer._buckets
    groups = optimizer.param_groups if groups is None else groups
    optimizer.settle_layout()
    layout = optimizer._layout
    params = [p for _, _, p in buckets.identities.places() if p.requires_grad or p in optimizer.state]
    members = buckets.identities.members(params)
    if zero is None:
        # sharded, of all of them: the ranks exchange a number for each, and one may lack state that the others have
        zero = buckets._zero_params([m for _, m in members if layout.sharded or not m.state])
    empty = set(zero)
    recipes: dict[tuple[int, ParamInfo, torch.dtype], tuple[tuple[Technique, ...], tuple[Slot, ...]]] = {}
    transfers = optimizer._transfers
    known: dict[Any, dict[tuple[tuple[int, ...], int], tuple[Part, ...]]] = {}
    found = []
    for g, m in members:
        seen_as = dtype or m.param.dtype
        kind = g, m.info, seen_as
        if kind not in recipes:
            recipes[kind] = buckets._recipe(groups[g], m.info, seen_as)
        chain, slots = recipes[kind]
        anchors = [slot for slot in slots if slot.constant]
        is_zero = any(buckets._is_zero(slot, m, empty) for slot in anchors)
        home = device or m.param.device
        of_kind = known.setdefault((*kind, home, is_zero), {})
        serves = transfers.serves(home)
        local = tuple(layout.local(m.param).shape)
        where = local, m.shard.start
        found.append(Kept(m.param, *where, g, groups[g], m.info, seen_as, home, serves, chain, slots, is_zero, of_kind))
    return found


def state_bytes(every: Iterable[Kept], on_device: bool = False) -> int:
    """Bytes of the state of all these parameters as they lie here; with ``on_device`` without what is on the host."""
    parts = (part for one in every for part in one.parts(one.local_shape, one.start))
    return sum(part.nbytes for part in parts if not (on_device and part.hosted))


def temporary_bytes(every: Sequence[Kept], local_shapes: Sequence[tuple[int, ...]], sharded: bool = False) -> int:
    """About the most temporary memory that a step takes; comparisons between parameters, at intervals, aside.

    It is the engine's own bound, ``max_buffer_memory_mb`` where there is as much to do, or what a technique needs that
    sees a complete matrix; with some room for decoding 8 bits.

    Args:
        every: All parameters.
        local_shapes: What of each of them is here.
        sharded: Whether parameters are cut, which makes all of them wait for each other's sums.
    """
    if not every:
        return 0
    budget = min(int(one.options["max_buffer_memory_mb"] * 1e6) for one in every)
    alike: Counter[tuple[int, ParamInfo, tuple[int, ...]]] = Counter()
    of: dict[tuple[int, ParamInfo, tuple[int, ...]], Kept] = {}
    for one, shape in zip(every, local_shapes, strict=True):
        key = one.group, one.info, shape
        alike[key] += 1
        of[key] = one
    found = [_live_bytes(of[key], key[2], count, budget) for key, count in alike.items()]
    most = max(live for live, _, _ in found)
    # values are kept from phase to phase where all of them fit: of the chunks of one parameter, or of all that wait
    keeping = [sum(all_kept for _, _, all_kept in found)] if sharded else [chunks for _, chunks, _ in found]
    return max([most, *(most + kept for kept in keeping if most + kept <= budget)])


def _live_bytes(one: Kept, shape: tuple[int, ...], count: int, budget: int) -> tuple[int, int, int]:
    """What a step over a bucket holds at once, and what it keeps of one in chunks, and of all, where that fits."""
    storage, itemsize = Storage.of(one.options), compute_dtype(one.dtype).itemsize
    hosted = sum(one.serves and storage.hosts(slot) for slot in one.slots)
    coded = sum(codec_for(slot, storage, one.dtype, one.info.shape).by_rows for slot in one.slots)
    numel = int(torch.Size(shape).numel())
    each = (LIVE_VALUES + 2 * hosted) * itemsize
    limit = max(GRAIN, budget // each // GRAIN * GRAIN)
    if one.device.type == "cpu" and not one.options["compile"]:
        limit = min(limit, CPU_CHUNK)
    each += 2 * coded * itemsize
    kept = (KEPT_VALUES + hosted) * itemsize * numel
    if any(technique.whole for technique in one.chain):
        return each * max(numel, min(limit, count * numel)), 0, kept * count
    row = numel // shape[0] if len(shape) > 1 and shape[0] else 1
    cell = min(count * numel, max(limit, min(numel, row * FOLD)))
    return each * cell, kept if numel > limit else 0, kept * count
