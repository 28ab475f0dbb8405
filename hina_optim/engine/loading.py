"""Whether state that is there is what an optimizer keeps."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from hina_optim.engine.transfers import HOST
from hina_optim.state.precision import Storage
from hina_optim.state.ranges import codec_here
from hina_optim.state.slot import Slot

if TYPE_CHECKING:
    from hina_optim.engine.bucket import Member
    from hina_optim.engine.optimizer import HinaOptimizer

__all__ = ["check_loaded", "check_state"]


def check_loaded(
    opt: HinaOptimizer, groups: Sequence[dict[str, Any]], state: Mapping[Tensor, Mapping[str, Any]]
) -> dict[Tensor, set[str]]:
    """Check that loaded state is what the recipes of the loaded groups keep.

    Returns:
        For every parameter the names of what belongs into host memory.

    Raises:
        ValueError: It is not.
    """
    hosted: dict[Tensor, set[str]] = {}
    buckets = opt._buckets
    owner = type(opt).__name__
    for g, m in buckets.identities.members(list(state)):
        group = {**opt.group(g), **groups[g]}
        entry = state[m.param]
        local = tuple(opt._layout.local(m.param).shape)
        known = {"step", "skipped"}
        for slot in buckets._recipe(group, m.info, m.param.dtype)[1]:
            codec = codec_here(slot, Storage.of(group), m.param.dtype, m.shard, local)
            for suffix, dtype in codec.parts.items():
                part = slot.name + suffix
                known.add(part)
                have = entry.get(part)
                if Storage.of(group).hosts(slot):
                    hosted.setdefault(m.param, set()).add(part)
                if not isinstance(have, Tensor):
                    raise ValueError(
                        f"{owner}: the state of {m.name} lacks {part!r}: the checkpoint is truncated, or "
                        f"another optimizer's."
                    )
                zero = slot.constant and have.ndim == 0
                shape = codec.part_shape(suffix, () if zero else slot.local_shape(local))
                if tuple(have.shape) != shape:
                    raise ValueError(
                        f"{owner}: the state {part!r} of {m.name} has shape {tuple(have.shape)}, expected "
                        f"{shape}: another model."
                    )
                if have.dtype != dtype:
                    buckets._say(f"loaded {part} of {m.name} as {have.dtype}; it will be kept as {dtype}")
        unknown = sorted(set(entry) - known)
        if unknown:
            raise ValueError(
                f"{owner}: the state of {m.name} has {', '.join(unknown)}, which this optimizer does not "
                f"keep: another optimizer's checkpoint."
            )
    return hosted


def check_state(
    opt: HinaOptimizer, m: Member, slots: Sequence[Slot], anchors: Collection[str], group: dict[str, Any]
) -> None:
    """State that exists must fit the parameter; what a later technique lacks begins afresh, and is said.

    Args:
        opt: The optimizer.
        m: The parameter.
        slots: What is kept of it.
        anchors: Names of those that are one zero.
        group: Its options.

    Raises:
        RuntimeError: It does not fit.
    """
    if not m.state:
        return
    missing = []
    storage, layout = Storage.of(group), opt._layout
    local = tuple(layout.local(m.param).shape)
    for slot in slots:
        codec = codec_here(slot, storage, m.param.dtype, m.shard, local)
        shape = () if slot.name in anchors else slot.local_shape(local)
        for suffix in codec.parts:
            have = m.state.get(slot.name + suffix)
            if have is None:
                missing.append(slot.name + suffix)
                continue
            have = layout.unwrap(m.param, have)
            if tuple(have.shape) != codec.part_shape(suffix, shape):
                raise RuntimeError(
                    f"parameter {m.name} has shape {local}, but its state {slot.name!r} has "
                    f"{tuple(have.shape)}: the parameter changed its shape after the optimizer began. Build a new "
                    "optimizer for it, or delete optimizer.state[parameter] to begin afresh."
                )
            hosted = storage.hosts(slot) and have.device == HOST
            if have.device != m.param.device and not hosted:
                raise RuntimeError(
                    f"parameter {m.name} is on {m.param.device}, but its state {slot.name!r} is on {have.device}: "
                    "move the model before building the optimizer, or load the optimizer's state_dict again "
                    "after the move."
                )
    if missing:
        opt._buckets._say(
            f"state of {m.name} has no {', '.join(missing)} (a technique was switched on later); beginning afresh"
        )
