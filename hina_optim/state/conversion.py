"""From one way of storing to another, a piece at a time: the float32 values of a large tensor are never all there."""

from __future__ import annotations

import torch
from torch import Tensor

from hina_optim.state.precision import Codec, decoded

__all__ = ["PIECE", "converted"]

#: Elements that are decoded at once, about.
PIECE = 1 << 20
#: Ranges of a vector begin at multiples of this, which every codec can begin at.
GRAIN = 4096


def converted(old: Codec, new: Codec, parts: dict[str, Tensor], shape: tuple[int, ...]) -> dict[str, Tensor]:
    """Stored by ``old`` → stored by ``new``, rounded to the nearest.

    Needs memory for the result and a few times :data:`PIECE` elements.

    Args:
        old: How it is stored.
        new: How it will be.
        parts: Suffix → ``[N, …]``.
        shape: Of one value, without the batch dimension.
    """
    n, device = parts[next(iter(old.parts))].shape[0], parts[next(iter(old.parts))].device
    fresh = {
        suffix: torch.empty((n, *new.part_shape(suffix, shape)), dtype=dtype, device=device)
        for suffix, dtype in new.parts.items()
    }
    numel = int(torch.Size(shape).numel())
    if n > 1 or not shape or numel <= PIECE:
        each = max(1, PIECE // max(1, numel))
        for first in range(0, n, each):
            cut = slice(first, first + each)
            some = {suffix: part[cut] for suffix, part in parts.items()}
            value = decoded(old, some, (min(each, n - first), *shape))
            for suffix, part in new.encode(value, None).items():
                fresh[suffix][cut] = part
        return fresh
    row = max(1, numel // shape[0])
    each = max(1, PIECE // row) if len(shape) > 1 else PIECE // GRAIN * GRAIN
    for first in range(0, shape[0], each):
        last = min(first + each, shape[0])

        def piece(codec: Codec, suffix: str, first: int = first, last: int = last) -> slice:
            return slice(*(codec.part_shape(suffix, (end, *shape[1:]))[0] for end in (first, last)))

        some = {suffix: part[:, piece(old, suffix)] for suffix, part in parts.items()}
        value = decoded(old, some, (1, last - first, *shape[1:]))
        for suffix, part in new.encode(value, None).items():
            fresh[suffix][:, piece(new, suffix)] = part
    return fresh
