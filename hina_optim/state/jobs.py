"""What has to be read for one parameter, and what is made of it where it is stored otherwise than it was saved."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hina_optim.state.blockwise import BlockCodec, LogCodec
from hina_optim.state.conversion import converted
from hina_optim.state.portable import BLOCKS, COUNTERS, LEVELS, Metadata, codec_of, form_of, saved_as, slots_of
from hina_optim.state.precision import Codec, Storage, TensorCodec, codec_for
from hina_optim.state.ranges import covering, stored_codes
from hina_optim.state.ranges import local as local_codec
from hina_optim.state.regions import Box, block_boxes, covering_scales, decode_elements, fits, neighbors, numel, whole
from hina_optim.state.signs import SignCodec

if TYPE_CHECKING:
    from hina_optim.engine.bucket import Member
    from hina_optim.engine.optimizer import HinaOptimizer
    from hina_optim.state.slot import Slot

__all__ = ["Job", "Read", "Receiver"]

HOST = torch.device("cpu")


@dataclass(frozen=True)
class Read:
    """Boxes of a stored tensor that are wanted, flat and in this order.

    Attributes:
        key: As in :class:`~hina_optim.state.portable.Piece`.
        shape: Of the whole tensor.
        dtype: As it was saved.
        boxes: Which parts of it.
        device: Where they go.
    """

    key: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    boxes: tuple[Box, ...]
    device: torch.device

    @property
    def numel(self) -> int:
        """Elements in all boxes."""
        return sum(numel(size) for _, size in self.boxes)

    @property
    def nbytes(self) -> int:
        """Bytes in all boxes."""
        return self.numel * self.dtype.itemsize


@dataclass(frozen=True)
class Job:
    """One slot of one parameter: what to read for it, and what to make of that.

    Attributes:
        param: The key in the optimizer's state.
        reads: What is needed.
        build: What was read → the stored tensors here, by name.
    """

    param: Tensor
    reads: tuple[Read, ...]
    build: Callable[[Sequence[Tensor]], dict[str, Tensor]]


@dataclass
class Receiver:
    """Plans what one parameter gets.

    Attributes:
        owner: What the optimizer is called in errors.
        jobs: What is planned is added here.
        conversions: How state is stored that was saved otherwise, and how often, is counted here.
        options: Of the parameter's group, as they will be.
        member: The parameter here.
        entry: The parameter in the metadata.
        name: Its name here.
        optimizer: Whose it is.
    """

    owner: str
    jobs: list[Job]
    conversions: Counter[tuple[str, str]]
    options: dict[str, Any]
    member: Member
    entry: Metadata
    name: str
    optimizer: HinaOptimizer

    def plan(self) -> None:
        """Add a job for each slot and counter.

        Raises:
            ValueError: Other slots were saved than are kept here.
        """
        slots = {slot.name: slot for slot in slots_of(self.optimizer, self.options, self.member)}
        saved = self.entry["slots"]
        for words, odd in (("lacks", set(slots) - set(saved)), ("also has", set(saved) - set(slots))):
            if odd:
                raise ValueError(
                    f"{self.owner}: the saved state of {self.name} {words} {', '.join(sorted(odd))}: it is of an "
                    "optimizer with other techniques."
                )
        for part in COUNTERS:
            device = HOST if part == "step" else self.member.param.device
            self._add((Read(self._key(part), (), torch.float32, whole(()), device),), part)
        for name, slot in slots.items():
            self._slot(name, slot, saved[name])

    def _key(self, part: str) -> str:
        return f"{self.entry['name']}/{part}"

    def _add(self, reads: tuple[Read, ...], part: str, shape: tuple[int, ...] = ()) -> None:
        self.jobs.append(Job(self.member.param, reads, lambda values: {part: values[0].view(shape)}))

    def _slot(self, name: str, slot: Slot, form: Metadata) -> None:
        param = self.member.param
        storage = Storage.of(self.options)
        target = codec_for(slot, storage, param.dtype, self.member.info.shape)
        home = HOST if storage.hosts(slot) else param.device
        if form == {"form": "zero"}:
            if not slot.constant:
                raise ValueError(f"{self.owner}: {name} of {self.name} is saved as one zero, which it cannot be.")
            zero = torch.zeros((), dtype=target.parts[""], device=param.device)
            self.jobs.append(Job(param, (), lambda _: {name: zero}))
            return
        source = codec_of({key: value for key, value in form.items() if key not in ("shape", "decoded")})
        _check_code(f"{self.owner}: {name} of {self.name}", slot, source)
        shape = None if slot.shape == "like" else list(slot.shape)
        if form.get("shape") != shape:
            raise ValueError(
                f"{self.owner}: {name} of {self.name} was saved with shape {form.get('shape', 'of the parameter')}, "
                f"expected {shape or 'that of the parameter'}."
            )
        if slot.shape != "like":
            self._fixed(name, slot.shape, source, target)
        elif len(self.member.shard.shape) > 1 and self._local_dimensions() == 1:
            self._range(name, source, target, home)
        else:
            self._like(name, source, target, home)
        old, new = _words(form), _words(form_of(saved_as(target)))
        if old != new:
            self.conversions[old, new] += 1

    def _fixed(self, name: str, shape: tuple[int, ...], source: Codec, target: Codec) -> None:
        device = self.member.param.device
        read = Read(self._key(name), shape, source.parts[""], whole(shape), device)
        dtype = target.parts[""]
        self.jobs.append(Job(self.member.param, (read,), lambda values: {name: values[0].to(dtype).view(shape)}))

    def _local_dimensions(self) -> int:
        return self.optimizer._layout.local(self.member.param).ndim

    def _read(self, name: str, codec: Codec, suffix: str, boxes: tuple[Box, ...], home: torch.device) -> Read:
        shape = codec.part_shape(suffix, self.member.shard.shape)
        return Read(self._key(name + suffix), shape, codec.parts[suffix], boxes, home)

    def _range(self, name: str, source: Codec, target: Codec, home: torch.device) -> None:
        """A flat range. What it has a part of only is read whole where it is encoded: alike on all ranks."""
        shard = self.member.shard
        made, direct = _made(source, target)
        wide = covering(shard, target.block) if isinstance(target, BlockCodec) and not direct else shard
        shape = (wide.numel,)
        old, new = local_codec(source, wide, shape), local_codec(made, wide, shape)
        reads = [self._read(name, source, "", tuple(wide.boxes()), home)]
        if isinstance(source, BlockCodec):
            reads.append(self._read(name, source, "_scale", covering_scales(wide, source), home))
        before = shard.start - wide.start

        def build(values: Sequence[Tensor]) -> dict[str, Tensor]:
            stored = {s: v.view(1, *old.part_shape(s, shape)) for s, v in zip(old.parts, values, strict=True)}
            parts = stored if direct else converted(old, new, stored, shape, wide.start)
            if wide.numel > shard.numel:
                parts[""] = parts[""][:, before : before + shard.numel].clone()
            if made != target:
                parts[""] = stored_codes(local_codec(target, shard, (shard.numel,)), parts[""])
            return {name + suffix: part[0] for suffix, part in parts.items()}

        self.jobs.append(Job(self.member.param, tuple(reads), build))

    def _like(self, name: str, source: Codec, target: Codec, home: torch.device) -> None:
        param, shard = self.member.param, self.member.shard
        local = tuple(self.optimizer._layout.local(param).shape)
        boxes = tuple(shard.boxes())
        each = neighbors(target)
        if shard.slices is not None and each > 1 and not fits(shard, local, each):
            raise ValueError(
                f"{self.owner}: {self.name} {shard.shape} is cut between columns, {local} here, which cuts the blocks "
                f"of {each} elements in which {name!r} is stored: give its group state_precision='bf16', or "
                "shard it along dimension 0."
            )

        reads = [self._read(name, source, "", boxes, home)]
        whole_blocks = True
        if isinstance(source, BlockCodec):
            scales = block_boxes(shard, local, source)
            whole_blocks = scales is not None
            covered = covering_scales(shard, source) if scales is None else scales
            reads.append(self._read(name, source, "_scale", covered, home))
        made, same = _made(source, target)
        direct = whole_blocks and same

        def build(values: Sequence[Tensor]) -> dict[str, Tensor]:
            if isinstance(source, BlockCodec) and not whole_blocks:
                old: Codec = TensorCodec(source.compute, source.compute)
                stored = {"": decode_elements(shard, source, values[0], values[1]).view(1, *local)}
            else:
                old = source
                shapes = {suffix: source.part_shape(suffix, local) for suffix in source.parts}
                stored = {s: v.view(1, *shapes[s]) for s, v in zip(source.parts, values, strict=True)}
            parts = stored if direct else converted(old, made, stored, local)
            if made != target:
                parts[""] = stored_codes(target, parts[""])
            return {name + suffix: part[0] for suffix, part in parts.items()}

        self.jobs.append(Job(param, tuple(reads), build))


def _made(source: Codec, target: Codec) -> tuple[Codec, bool]:
    """What is made of what was read, before codes share bytes; and whether it is that already."""
    if isinstance(target, SignCodec):
        return target, False
    made = saved_as(target)
    return made, form_of(source) == form_of(made)


def _check_code(what: str, slot: Slot, source: Codec) -> None:
    """Codes are of the kind in which the slot is ever written: read as another, they would be other numbers."""
    match source:
        case BlockCodec():
            right = slot.code == ("signed" if source.signed else "unsigned")
        case LogCodec():
            right = isinstance(slot.code, tuple)
        case _:
            right = True
    if not right:
        raise ValueError(f"{what} was saved as {form_of(source)}, which it is never stored as.")


def _words(form: Metadata) -> str:
    """How state of a form is called."""
    if "decoded" in form:
        return f"decoded {_words(form['decoded'])}"
    for names, kind in ((BLOCKS, "blocks"), (LEVELS, "levels")):
        for bits, name in names.items():
            if form["form"] == name:
                return f"{bits}-bit {kind}"
    return str(form["dtype"])
