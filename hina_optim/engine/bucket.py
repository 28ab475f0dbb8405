"""Parameters of one shape, updated together.

A bucket owns the stored state of its parameters as stacks ``[N, …]``; ``optimizer.state[p][name]`` are views of them,
so the ordinary state dict is always true. Small parameters share a bucket; a large one is a bucket of its own, whose
stacks are views of its own tensors and cost no copy.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hina_optim.engine.layout import Layout, Shard
from hina_optim.engine.transfers import HOST, Transfers
from hina_optim.state.conversion import converted
from hina_optim.state.precision import Codec, Storage, compute_dtype, decoded
from hina_optim.state.ranges import Edge, RangeCodec, codec_here, cut_blocks, span, within
from hina_optim.state.regions import fits, neighbors
from hina_optim.state.slot import Slot
from hina_optim.techniques.base import ParamInfo, Technique

__all__ = ["SOLO_NUMEL", "Bucket", "BucketKey", "Member"]

#: Parameters with more elements than this are not stacked: a copy would cost more than the kernels it saves.
SOLO_NUMEL = 1 << 18

KAHAN = Slot("kahan", precision="param")


@dataclass
class Member:
    """One parameter of a bucket, and what is known of it."""

    param: Tensor
    name: str
    position: int
    key: int
    info: ParamInfo
    shard: Shard
    state: dict[str, Any]
    partner: int = -1
    adapter: int = -1


@dataclass(frozen=True)
class BucketKey:
    """Parameters with equal keys run together."""

    group: int
    info: ParamInfo
    shard: Shard
    pattern: Hashable  # where their elements lie on all ranks
    local_shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    step: int
    zero_anchors: frozenset[str]
    solo: int  # position of a parameter that runs alone, else -1


class Bucket:
    """``N`` parameters of one kind, their stacked state and their step counters.

    Attributes:
        storage: ``{state name: [N, …]}`` as stored (not decoded).
        hosted: Names of the slots whose stacks are in host memory.
        steps: float32 ``[N]`` on the CPU, equal numbers: steps in which the parameters had a gradient.
        step: The same number on the host.
        skipped: float32 ``[N]`` on the device: those of them that were left out, the gradient not being finite.
    """

    def __init__(
        self,
        key: BucketKey,
        members: Sequence[Member],
        group: dict[str, Any],
        slots: Sequence[Slot],
        chain: Sequence[Technique],
        transfers: Transfers,
        layout: Layout,
    ) -> None:
        self.key = key
        self.layout = layout
        self.transfers = transfers
        self.members = list(members)
        self.params = [m.param for m in members]
        self.group = group
        self.info = key.info
        self.shard = key.shard
        self.slots = tuple(slots)
        self.chain = tuple(chain)
        self.step = key.step
        storage = Storage.of(group)
        self.codecs: dict[str, Codec] = {s.name: self._codec(s, storage) for s in self.slots}
        self._check_blocks(self.codecs)
        self.hosted = self._hosted(storage)
        # wrapped to 32 bits: from the 128th group on, a position needs more
        self.keys = torch.tensor([m.key for m in members]).to(torch.int32).to(key.device)
        self.storage: dict[str, Tensor] = {}
        #: by what measures and what acts in a step
        self.programs: dict[tuple[frozenset[str], tuple[bool, ...]], Any] = {}
        self.digested: dict[str, int] = {}  # periodic technique → step after which it was refreshed last
        #: slot → values ``[N, …]`` of blocks that lie on several ranks, which have not agreed on their scales yet
        self.loose: dict[str, Tensor] = {}
        self._adopt()

    def _check_blocks(self, codecs: dict[str, Codec]) -> None:
        """Refuse a cut between columns that goes through what shares a scale or a byte."""
        shard = self.key.shard
        if shard.slices is None:
            return
        for name, codec in codecs.items():
            each = neighbors(codec)
            if each > 1 and not fits(shard, self.key.local_shape, each):
                raise RuntimeError(
                    f"{self.members[0].name} {shard.shape} is cut between columns, {self.key.local_shape} here, which "
                    f"cuts the blocks of {each} elements in which {name!r} is stored: shard it along "
                    f"dimension 0, in multiples of {each} columns, or give its group state_precision='bf16'."
                )

    def _codec(self, slot: Slot, storage: Storage) -> Codec:
        """How what is here of a slot is stored."""
        return codec_here(slot, storage, self.key.dtype, self.shard, self.key.local_shape)

    def cut_blocks(self, name: str) -> dict[int, int]:
        """The blocks of a slot that lie on several ranks, on whichever: number in the whole → place among them."""
        codec = self.codecs[name]
        if not isinstance(codec, RangeCodec):
            return {}
        return cut_blocks(self.shard.shape, codec.blocks.block, self.layout.ranges(self.params[0]))

    @property
    def in_ranges(self) -> bool:
        """Whether it is cut into chunks between what shares scales and bytes in a flat range."""
        return len(self.key.local_shape) == 1 and any(
            isinstance(codec, RangeCodec) or codec.per_byte > 1 for codec in self.codecs.values()
        )

    @property
    def size(self) -> int:
        """Number of parameters."""
        return len(self.params)

    def weights(self, first: int = 0, stop: int | None = None) -> list[Tensor]:
        """What is here of its parameters ``first … stop-1``, as plain tensors that share their memory."""
        return [self.layout.local(p) for p in self.params[first:stop]]

    def grads(self, first: int = 0, stop: int | None = None) -> list[Tensor]:
        """Their gradients, as far as there are any; of a parameter without elements here, an empty one."""
        found = [(p, self.layout.grad(p)) for p in self.params[first:stop]]
        if not self.numel:
            return [self.layout.local(p) if g is None else g for p, g in found]
        return [g for _, g in found if g is not None]

    @property
    def numel(self) -> int:
        """Local elements of one parameter."""
        return int(torch.Size(self.key.local_shape).numel())

    def _hosted(self, storage: Storage) -> frozenset[str]:
        if not self.transfers.serves(self.key.device):
            return frozenset()
        return frozenset(s.name for s in self.slots if storage.hosts(s)) - self.key.zero_anchors

    @property
    def hosted_parts(self) -> frozenset[str]:
        """State names of what is in host memory."""
        return frozenset(name + suffix for name in self.hosted for suffix in self.codecs[name].parts)

    def _home(self, slot: Slot) -> torch.device:
        return HOST if slot.name in self.hosted else self.key.device

    def part_shapes(self, slot: Slot) -> dict[str, tuple[int, ...]]:
        """State name → stored shape without the batch dimension, for the parts of a slot."""
        codec = self.codecs[slot.name]
        if slot.name in self.key.zero_anchors:
            return {slot.name: ()}
        shape = slot.local_shape(self.key.local_shape)
        return {slot.name + suffix: codec.part_shape(suffix, shape) for suffix in codec.parts}

    def _adopt(self) -> None:
        """Take over every member's state (allocating what is not there) and make the members' state views of it.

        Every stack is built before any view is replaced: running out of memory in between changes nothing. State that
        a framework has moved to the parameter's device goes back to the host where it belongs there.
        """
        self.transfers.wait()
        n, device = self.size, self.key.device
        stacks: dict[str, Tensor] = {}
        for slot in self.slots:
            codec, home = self.codecs[slot.name], self._home(slot)
            shapes = self.part_shapes(slot)
            fresh: dict[str, Tensor] | None = None
            for (part, shape), dtype in zip(shapes.items(), codec.parts.values(), strict=True):
                missing = [part not in m.state for m in self.members]
                if any(missing):
                    fresh = fresh or self._initial(slot)
                if fresh is not None and all(missing):
                    stacks[part] = fresh[part]
                elif n == 1:
                    # contiguous, because a chunk is a range of its flat view
                    stacks[part] = self._held(self.members[0], part).unsqueeze(0).to(home, dtype).contiguous()
                else:
                    stacks[part] = torch.stack(
                        [
                            fresh[part][i] if fresh is not None and missing[i] else self._held(m, part).to(home, dtype)
                            for i, m in enumerate(self.members)
                        ]
                    )
                if stacks[part].shape != (n, *shape):
                    raise RuntimeError(f"state {part!r} has shape {tuple(stacks[part].shape[1:])}, expected {shape}")
                if slot.name in self.hosted:
                    stacks[part] = self.transfers.keep(stacks[part], device)
        steps = torch.full((n,), float(self.step))
        skipped = [m.state.get("skipped") for m in self.members]
        blank = torch.zeros((), device=device)
        stack_skipped = torch.stack([blank if s is None else s.to(device, torch.float32) for s in skipped])
        self.storage = stacks
        self.steps, self.skipped = steps, stack_skipped
        self.views: list[tuple[dict[str, Any], str, Tensor]] = []
        for i, member in enumerate(self.members):
            for name in [k for k in member.state if k not in stacks]:
                del member.state[name]  # of a technique that was switched off; a checkpoint with it would not load
            member.state["step"] = steps[i]
            member.state["skipped"] = stack_skipped[i]
            for slot in self.slots:
                for name in self.part_shapes(slot):
                    member.state[name] = self._view(member, slot, name, stacks[name][i])
            self.views += [(member.state, k, v) for k, v in member.state.items() if isinstance(v, Tensor)]

    def _initial(self, slot: Slot) -> dict[str, Tensor]:
        """The first value of a slot for all members, stored."""
        n, device, dtype = self.size, self._home(slot), self.key.dtype
        codec = self.codecs[slot.name]
        shape = slot.local_shape(self.key.local_shape)
        if slot.name in self.key.zero_anchors:
            return {slot.name: torch.zeros(n, dtype=dtype, device=device)}
        if slot.init == "param":
            # clone keeps the exact bits, whatever the codec computes in
            if n > 1:
                value = torch.stack([w.to(device) for w in self.weights()]).contiguous()
            else:
                value = self.weights()[0][None].to(device, copy=True).contiguous()
            if slot.precision == "param":
                return {slot.name: value}
        else:
            fill = float(self.group["start_lr"]) if slot.init == "start_lr" else float(slot.init)
            value = torch.full((n, *shape), fill, device=device, dtype=compute_dtype(dtype))
        parts = codec.encode(value.to(compute_dtype(dtype)), None)
        return {slot.name + suffix: part for suffix, part in parts.items()}

    def _held(self, member: Member, part: str) -> Tensor:
        """A stored tensor of a member, as far as it is here."""
        return self.layout.unwrap(member.param, member.state[part])

    def _view(self, member: Member, slot: Slot, part: str, value: Tensor) -> Tensor:
        """A stored tensor as the optimizer's state shows it."""
        if slot.shape != "like" or slot.name in self.key.zero_anchors:
            return value
        codec = self.codecs[slot.name]
        return self.layout.wrap(member.param, value, codec.part_shape(part[len(slot.name) :], self.info.shape))

    def views_hold(self, state: dict[Any, Any]) -> bool:
        """Whether ``optimizer.state`` still holds exactly the views that this bucket handed out."""
        return all(state.get(m.param) is m.state for m in self.members) and all(
            d.get(name) is view for d, name, view in self.views
        )

    def release(self) -> None:
        """Let go of all tensors: programs and their bucket know each other, and would keep them until Python looks."""
        self.programs.clear()
        self.storage, self.views, self.members, self.params, self.loose = {}, [], [], [], {}

    def state_bytes(self) -> int:
        """Bytes of stored state, step counters included."""
        tensors = [*self.storage.values(), self.steps, self.skipped]
        return sum(t.numel() * t.element_size() for t in tensors)

    def decoded(self, member: Member, name: str) -> Tensor:
        """The value of one slot of one of its parameters, as it is computed with."""
        self.transfers.wait()
        codec, device = self.codecs[name], self.key.device
        parts = {suffix: self._held(member, name + suffix)[None].to(device) for suffix in codec.parts}
        return decoded(codec, parts, (1, *self.key.local_shape))[0]

    def stored_as(self, storage: Storage) -> bool:
        """Whether every slot is stored as ``storage`` asks, and where."""
        return self.hosted == self._hosted(storage) and all(
            self.codecs[s.name] == self._codec(s, storage) for s in self.slots
        )

    def convert(self, storage: Storage, slots: Sequence[Slot]) -> None:
        """Store the state in another way or place, one slot at a time; one is replaced only once its copy exists.

        Args:
            storage: How.
            slots: What is kept from now on; of slots that are here already, codes may be others.
        """
        self.transfers.wait()
        known = {slot.name: slot for slot in slots}
        self._check_blocks({s.name: self._codec(known.get(s.name, s), storage) for s in self.slots})
        self.slots = tuple(known.get(slot.name, slot) for slot in self.slots)
        self.views = []  # they would keep what is replaced
        self.programs.clear()
        try:
            for slot in self.slots:
                self._convert_slot(slot, storage)
        finally:
            self.views = [(m.state, k, v) for m in self.members for k, v in m.state.items() if isinstance(v, Tensor)]

    def _convert_slot(self, slot: Slot, storage: Storage) -> None:
        old = self.codecs[slot.name]
        new = self._codec(slot, storage)
        goes = slot.name in self._hosted(storage)
        if slot.name in self.key.zero_anchors or (new == old and goes == (slot.name in self.hosted)):
            return
        encoded = {suffix: self.storage[slot.name + suffix] for suffix in old.parts}
        loose: Tensor | None = None
        if new != old:
            if isinstance(new, RangeCodec) and new.edges and self.layout.ranges(self.params[0]):
                loose = torch.cat([self._edge(old, encoded, edge) for edge in new.edges], 1)
            encoded = converted(old, new, encoded, slot.local_shape(self.key.local_shape), self.shard.start)
        if goes:
            encoded = {suffix: self.transfers.keep(part, self.key.device) for suffix, part in encoded.items()}
        else:
            encoded = {suffix: part.to(self.key.device) for suffix, part in encoded.items()}
        self.hosted = self.hosted | {slot.name} if goes else self.hosted - {slot.name}
        for suffix in old.parts:
            del self.storage[slot.name + suffix]
        self.storage.update({slot.name + suffix: part for suffix, part in encoded.items()})
        self.codecs[slot.name] = new
        self.loose.pop(slot.name, None)
        if loose is not None:
            self.loose[slot.name] = loose
        for i, member in enumerate(self.members):
            for suffix in old.parts:
                member.state.pop(slot.name + suffix, None)
            for suffix in encoded:
                part = slot.name + suffix
                member.state[part] = self._view(member, slot, part, self.storage[part][i])

    def _edge(self, codec: Codec, stored: dict[str, Tensor], edge: Edge) -> Tensor:
        """Values of a block at an end of a flat range, ``[N, m]``."""
        at = {suffix: slice(*span(codec, suffix, edge.begin, edge.end)) for suffix in stored}
        some = {suffix: part[:, at[suffix]].to(self.key.device) for suffix, part in stored.items()}
        return decoded(within(codec, edge.begin, edge.end), some, (self.size, edge.end - edge.begin))
