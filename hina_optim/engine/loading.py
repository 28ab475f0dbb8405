"""Whether loaded state is what an optimizer keeps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from hina_optim.state.precision import Storage, codec_for

if TYPE_CHECKING:
    from hina_optim.engine.optimizer import HinaOptimizer

__all__ = ["check_loaded"]


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
            codec = codec_for(slot, Storage.of(group), m.param.dtype, m.info.shape)
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
