"""Optimizer state that belongs to no engine and no number of ranks: pieces of whole tensors, by name of the parameter.

:func:`export` says what an optimizer holds: *metadata* of plain values, equal on all ranks, and *pieces*, each a box of
the tensor that one process with everything whole would store. :func:`hina_optim.state.receiving.receiving` checks
metadata against an optimizer and says which boxes it needs; whoever stores the pieces reads those and hands them over.

A number is saved as it is stored, with one exception. Signs and codes of 4 bits, several of which share a byte, are
saved in a byte each: then any cut is one between bytes. Of state with a scale for each block, the scale of a block that
lies on several ranks is saved by the one that has its first element. (Earlier versions stored other blocks in flat
partitions, and saved what a partition had cut decoded, in float32; that is encoded again when it is loaded.)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from hina_optim.state.blockwise import BlockCodec, LogCodec
from hina_optim.state.conversion import spread_out
from hina_optim.state.names import plain_name
from hina_optim.state.plain import dtype_named, to_plain
from hina_optim.state.precision import Codec, Storage, TensorCodec, codec_for
from hina_optim.state.ranges import RangeCodec, local
from hina_optim.state.regions import Box, beginning_scales, block_boxes, whole
from hina_optim.state.signs import SignCodec
from hina_optim.state.slot import Slot

if TYPE_CHECKING:
    from hina_optim.engine.bucket import Member
    from hina_optim.engine.optimizer import HinaOptimizer

__all__ = [
    "BLOCKS",
    "COUNTERS",
    "LEVELS",
    "VERSION",
    "Agree",
    "Piece",
    "codec_of",
    "export",
    "form_of",
    "members",
    "names_of",
    "saved_as",
    "slots_of",
]

VERSION = 1
#: Numbers that every parameter with state has, beside the slots of its techniques; float32.
COUNTERS = ("step", "skipped")
#: Flags → those of them that are set on all ranks. Called by all ranks, with as many flags.
Agree = Callable[[list[bool]], list[bool]]
Metadata = dict[str, Any]
#: Bits → the name of the form of codes in blocks, and of those on a log scale.
BLOCKS = {8: "blocks", 4: "blocks of 4 bits"}
LEVELS = {8: "levels", 4: "levels of 4 bits"}


@dataclass(frozen=True)
class Piece:
    """The part of a stored tensor that is on this rank.

    Attributes:
        key: Name of the parameter, a slash, and name of the stored tensor.
        shape: Of the whole tensor.
        dtype: As it is saved.
        boxes: Which parts of it are here, in the order of their elements.
        read: Gives them, flat, when they are written: what has to be decoded first is so only then.
    """

    key: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    boxes: tuple[Box, ...]
    read: Callable[[], Tensor]


def export(
    optimizer: HinaOptimizer, agree: Agree | None = None, model: nn.Module | None = None
) -> tuple[Metadata, list[Piece]]:
    """What an optimizer holds, apart from how it lies.

    Args:
        optimizer: Any, sharded or not.
        agree: How its ranks agree; None for one process.
        model: Gives parameters their names if the optimizer was given none.

    Returns:
        Metadata for JSON, and the pieces that are on this rank. They share the state's memory: to be read before the
        next step.

    Raises:
        ValueError: An option cannot be saved, or two parameters have one name.
    """
    with optimizer.whole_groups():
        return _export(optimizer, agree, model)


def _export(optimizer: HinaOptimizer, agree: Agree | None, model: nn.Module | None) -> tuple[Metadata, list[Piece]]:
    optimizer.settle_layout()
    optimizer._buckets.conform()
    if agree is not None:
        optimizer._buckets.agree_on_scales()
    optimizer.wait_for_state()
    every = members(optimizer)
    names, named = names_of(optimizer, every, model)
    found = [_Held(optimizer, g, member) for g, member in every]
    flags = [flag for one in found for flag in one.flags()]
    agreed = iter(agree(flags) if agree else flags)
    params, pieces = [], []
    for name, one in zip(names, found, strict=True):
        one.settle(agreed)
        params.append({"name": name, **one.described()})
        pieces += one.pieces(name)
    who = optimizer._buckets.identities
    told = who.told_names() if who.aliases else []
    for at, entry in enumerate(params):
        if told and ".inferred" in told[at]:
            entry["told"] = told[at]
    for at in optimizer._buckets.alone():
        params[at]["alone"] = True
    metadata = {
        "version": VERSION,
        "optimizer": type(optimizer).__name__,
        "named": named,
        "described": to_plain(optimizer.described(), "described()"),
        "groups": _groups(optimizer, every),
        "params": params,
    }
    return metadata, pieces


def members(optimizer: HinaOptimizer) -> list[tuple[int, Member]]:
    """All parameters with the index of their group, in order."""
    who = optimizer._buckets.identities
    return who.members([p for _, _, p in who.places()])


def slots_of(optimizer: HinaOptimizer, group: dict[str, Any], member: Member) -> tuple[Slot, ...]:
    """What the techniques of a group remember of a parameter."""
    return optimizer._buckets._recipe(group, member.info, member.param.dtype)[1]


def names_of(
    optimizer: HinaOptimizer, every: Sequence[tuple[int, Member]], model: nn.Module | None
) -> tuple[list[str], bool]:
    """A name for every parameter, without those of wrappers; and whether they are names, or places in the groups.

    Raises:
        ValueError: Two parameters have one name.
    """
    names = [plain_name(member.name) for _, member in every]
    named = all(known is not None for known in optimizer._names)
    if not named:
        named = all(optimizer._layout.name(member.param) is not None for _, member in every)
    if not named and model is not None:
        of = {id(p): plain_name(name) for name, p in model.named_parameters()}
        told = [of.get(id(member.param)) for _, member in every]
        if any(name is None for name in told):
            raise ValueError(
                f"{type(optimizer).__name__}: {names[told.index(None)]} is no parameter of the model that was given "
                "for the names: give the model whose parameters the optimizer steps."
            )
        names, named = [name for name in told if name is not None], True
    if len(set(names)) < len(names):
        twice = sorted({name for name in names if names.count(name) > 1})
        raise ValueError(
            f"{type(optimizer).__name__}: two parameters are both {twice[0]!r} once the names that wrappers give are "
            "taken off; rename the module."
        )
    return names, named


def _groups(optimizer: HinaOptimizer, every: Sequence[tuple[int, Member]]) -> list[Metadata]:
    groups = []
    for g, group in optimizer.indexed_groups():
        where = f"{type(optimizer).__name__}: option {{}} of group {group.get('name', g)}"
        groups.append(
            {
                "params": [at for at, (index, _) in enumerate(every) if index == g],
                "options": {
                    key: to_plain(value, where.format(key))
                    for key, value in group.items()
                    if key not in ("params", "param_names")
                },
            }
        )
    return groups


class _Held:
    """What a rank holds of one parameter's state."""

    def __init__(self, optimizer: HinaOptimizer, g: int, member: Member) -> None:
        self._layout = optimizer._layout
        self._member = member
        group = optimizer.group(g)
        self._slots = {slot.name: slot for slot in slots_of(optimizer, group, member)}
        storage = Storage.of(group)
        self._codecs = {
            name: codec_for(slot, storage, member.param.dtype, member.info.shape) for name, slot in self._slots.items()
        }
        self._local_shape = tuple(self._layout.local(member.param).shape)
        self._kept = bool(member.state)
        self._zero: dict[str, bool] = {}

    def flags(self) -> list[bool]:
        """What is so if it is so on all ranks: no state, a slot that is one zero."""
        state = self._member.state
        for name, slot in self._slots.items():
            value = state.get(name)
            self._zero[name] = slot.constant and bool(self._member.info.shape) and (value is None or value.ndim == 0)
        return [not self._kept, *self._zero.values()]

    def settle(self, agreed: Any) -> None:
        """Take the flags back, in the same order."""
        self._kept = not next(agreed)
        self._zero = {name: next(agreed) for name in self._zero}

    def described(self) -> Metadata:
        """Shape, dtype, and how each slot is stored; without ``slots`` if there is no state."""
        about: Metadata = {
            "shape": list(self._member.info.shape),
            "dtype": str(self._member.param.dtype).removeprefix("torch."),
        }
        if self._kept:
            about["slots"] = {name: self._form(name) for name in self._slots}
        return about

    def _form(self, name: str) -> Metadata:
        slot, codec = self._slots[name], self._codecs[name]
        if self._zero[name]:
            return {"form": "zero"}
        form = form_of(saved_as(codec))
        return form if slot.shape == "like" else {**form, "shape": list(slot.shape)}

    def pieces(self, name: str) -> list[Piece]:
        """The stored tensors of a parameter called ``name``."""
        if not self._kept or not self._member.state:
            return []
        found = [self._whole(f"{name}/{part}", part, torch.float32) for part in COUNTERS]
        for slot_name, slot in self._slots.items():
            codec = self._codecs[slot_name]
            if self._zero[slot_name]:
                continue
            if slot.shape != "like":
                found.append(self._whole(f"{name}/{slot_name}", slot_name, codec.parts[""]))
            else:
                found += [self._part(name, slot_name, suffix) for suffix in codec.parts]
        return found

    def _whole(self, key: str, part: str, dtype: torch.dtype) -> Piece:
        shape = tuple(self._member.state[part].shape)
        return Piece(key, shape, dtype, whole(shape), self._reader(part))

    def _part(self, name: str, slot_name: str, suffix: str) -> Piece:
        shard, codec, part = self._member.shard, self._codecs[slot_name], slot_name + suffix
        boxes: tuple[Box, ...] | None = tuple(shard.boxes())
        skipped = 0
        if suffix and isinstance(codec, BlockCodec):
            if isinstance(local(codec, shard, self._local_shape), RangeCodec):
                boxes, skipped = beginning_scales(shard, codec)
            else:
                boxes = block_boxes(shard, self._local_shape, codec)
        assert boxes is not None  # a bucket refuses what is cut between columns within a block
        saved = saved_as(codec)
        shape = saved.part_shape(suffix, shard.shape)
        read = self._reader(part) if suffix or saved is codec else self._unpacker(slot_name, codec)
        return Piece(f"{name}/{part}", shape, saved.parts[suffix], boxes, lambda: read()[skipped:])

    def _reader(self, part: str) -> Callable[[], Tensor]:
        member, layout = self._member, self._layout
        return lambda: layout.unwrap(member.param, member.state[part]).detach().reshape(-1)

    def _unpacker(self, slot_name: str, codec: Codec) -> Callable[[], Tensor]:
        packed = self._reader(slot_name)
        shape, shard = self._local_shape, self._member.shard

        def read() -> Tensor:
            here = local(codec, shard, shape)
            stored = packed().view(1, *here.part_shape("", shape))
            return spread_out(here, stored, shape, saved_as(codec).parts[""], shard.start).reshape(-1)

        return read


def saved_as(codec: Codec) -> Codec:
    """How state is saved that is stored so: as it is, but that every sign and every code has a byte of its own."""
    if isinstance(codec, SignCodec):
        return TensorCodec(torch.int8, codec.compute)
    if isinstance(codec, (BlockCodec, LogCodec)) and codec.packed:
        return replace(codec, packed=False)
    return codec


def form_of(codec: Codec) -> Metadata:
    """A codec in plain values."""
    if isinstance(codec, TensorCodec):
        return {"form": "tensor", "dtype": str(codec.dtype).removeprefix("torch.")}
    compute = str(codec.compute).removeprefix("torch.")
    if isinstance(codec, BlockCodec):
        # another name, not another field: who knows no codes of 4 bits must not take them for 8
        name = BLOCKS[codec.bits]
        return {"form": name, "signed": codec.signed, "block": codec.block, "compute": compute}
    if isinstance(codec, LogCodec):
        ends = {"low": float(codec.low), "start": float(codec.start), "high": float(codec.high)}
        return {"form": LEVELS[codec.bits], **ends, "compute": compute}
    raise ValueError(f"{type(codec).__name__} has no portable form: a checkpoint cannot hold what it stores.")


def codec_of(form: Mapping[str, Any]) -> Codec:
    """What reads state of a form.

    Raises:
        ValueError: There is no such form.
    """
    match form:
        case {"form": "tensor", "dtype": name}:
            dtype = dtype_named(name)
            return TensorCodec(dtype, torch.float64 if dtype == torch.float64 else torch.float32)
        case {"form": kind, "signed": bool(signed), "block": int(block), "compute": name} if 0 < block < 1 << 62:
            if kind in BLOCKS.values():
                return BlockCodec(signed, block, compute=_computed_in(name), bits=_bits(BLOCKS, kind))
        case {"form": kind, "low": float(low), "start": float(start), "high": float(high), "compute": name}:
            if kind in LEVELS.values():
                return LogCodec(low, start, high, compute=_computed_in(name), bits=_bits(LEVELS, kind))
    raise ValueError(f"{str(dict(form))[:120]} is no form in which state is stored.")


def _bits(names: Mapping[int, str], kind: str) -> int:
    return next(bits for bits, name in names.items() if name == kind)


def _computed_in(name: Any) -> torch.dtype:
    """The dtype that codes are decoded to."""
    dtype = dtype_named(name)
    if dtype not in (torch.float32, torch.float64):
        raise ValueError(f"{name!r} is no dtype that state is computed in: float32 and float64 are.")
    return dtype
