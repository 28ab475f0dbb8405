"""State that is made of other state when a recipe comes to keep the one in the place of the other.

A second moment, say, becomes the means of its rows and columns, and is made of them again. Everything new is there
before anything old is given up, on all ranks or on none.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hina_optim.engine.agreement import Agreement
from hina_optim.engine.bucket import Bucket
from hina_optim.engine.cells import lines
from hina_optim.engine.transfers import HOST
from hina_optim.state.blockwise import BlockCodec
from hina_optim.state.conversion import pieces
from hina_optim.state.precision import Codec, Storage, codec_for, decoded
from hina_optim.state.ranges import covering, local
from hina_optim.state.slot import Slot

if TYPE_CHECKING:
    from hina_optim.engine.optimizer import HinaOptimizer

__all__ = ["Heirs", "inherits"]

#: A mean of row means below this counts as this, so that what is zero everywhere stays zero.
SMALLEST = 1e-37


def inherits(old: Sequence[Slot], new: Sequence[Slot]) -> bool:
    """Whether any state that is new is made of state that goes."""
    return bool(_means(old, new) or _wholes(old, new))


def _means(old: Sequence[Slot], new: Sequence[Slot]) -> list[Slot]:
    """New state that is the mean of state that is there."""
    names = {slot.name for slot in old}
    return [s for s in new if s.mean_of and s.name not in names and s.mean_of[0] in names]


def _wholes(old: Sequence[Slot], new: Sequence[Slot]) -> list[Slot]:
    """New state of which both means are there."""
    known = {slot.mean_of for slot in old}
    names = {slot.name for slot in old}
    return [s for s in new if s.name not in names and {(s.name, "row"), (s.name, "column")} <= known]


class Heirs:
    """The new state of all buckets of which some is made of old one.

    Args:
        optimizer: Whose.
        changes: Each bucket with the state that it is to keep, and the options that say how.
        together: Whether all ranks do this now, with the same changes.

    Raises:
        ValueError: They do not, and the parameters are sharded: sums over all ranks are needed.
        torch.OutOfMemoryError: There is no memory for it. Nothing has changed then, on any rank.
    """

    def __init__(
        self,
        optimizer: HinaOptimizer,
        changes: Sequence[tuple[Bucket, Sequence[Slot], dict[str, Any]]],
        together: bool = False,
    ) -> None:
        layout, agreement = optimizer._layout, Agreement(optimizer)
        self._made: dict[Bucket, list[tuple[Slot, Codec, dict[str, Tensor]]]] = {bucket: [] for bucket, _, _ in changes}
        if not changes:
            return
        if layout.sharded and not together:
            raise ValueError(
                f"{type(optimizer).__name__}: an option that was changed in a group turns state into means of its "
                "rows and columns, or back, and the parameters are sharded: put it back, and call "
                "optimizer.change_options() on all ranks, which add up what each has."
            )
        sums: list[tuple[Bucket, Slot, Tensor]] = []
        with agreement.noting():
            for bucket, slots, group in changes:
                bucket.transfers.wait()
                storage = Storage.of(group)
                for slot in _wholes(bucket.slots, slots):
                    codec = codec_for(slot, storage, bucket.key.dtype, bucket.info.shape)
                    self._made[bucket].append((slot, codec, _spread(bucket, slot, codec, storage)))
                found: dict[str, dict[str, Tensor]] = {}
                for slot in _means(bucket.slots, slots):
                    assert slot.mean_of is not None
                    name, axis = slot.mean_of
                    found[name] = found.get(name) or _sums(bucket, name)
                    sums.append((bucket, slot, found[name][axis]))
        agreement.sound()
        totals = layout.reduce([(bucket.params[0], value) for bucket, _, value in sums]) if sums else []
        for (bucket, slot, _), value in zip(sums, totals, strict=True):
            assert slot.mean_of is not None
            count = bucket.info.columns if slot.mean_of[1] == "row" else bucket.info.rows
            codec = codec_for(slot, Storage.of(bucket.group), bucket.key.dtype, bucket.info.shape)
            parts = codec.encode((value / count).to(codec.compute), None)
            self._made[bucket].append((slot, codec, {slot.name + suffix: part for suffix, part in parts.items()}))

    def install(self, bucket: Bucket, slots: Sequence[Slot]) -> None:
        """Give the parameters of a bucket what was made for them, and let go of what they no longer keep.

        The bucket is to be formed again.
        """
        stay = {slot.name for slot in slots}
        gone = {slot.name + s for slot in bucket.slots if slot.name not in stay for s in bucket.codecs[slot.name].parts}
        for i, member in enumerate(bucket.members):
            for part in gone:
                member.state.pop(part, None)
            for slot, codec, parts in self._made.get(bucket, ()):
                for part, stack in parts.items():
                    value = stack[i]
                    if slot.shape == "like":
                        shape = codec.part_shape(part[len(slot.name) :], bucket.info.shape)
                        value = bucket.layout.wrap(member.param, value, shape)
                    member.state[part] = value


def _sums(bucket: Bucket, name: str) -> dict[str, Tensor]:
    """Sums of a state over each row, ``"row"`` ``[N, rows]``, and each column, of the elements that are here."""
    n, info, shape, device = bucket.size, bucket.info, bucket.key.local_shape, bucket.key.device
    wide = torch.float32 if device.type == "mps" else torch.float64
    rows = torch.zeros(n, info.rows, dtype=wide, device=device)
    columns = torch.zeros(n, info.columns, dtype=wide, device=device)
    codec = bucket.codecs[name]
    parts = {suffix: bucket.storage[name + suffix] for suffix in codec.parts}
    for piece in pieces(n, shape, (codec,), bucket.shard.start) if bucket.numel else ():
        some = {suffix: piece.of(codec, suffix, part).to(device) for suffix, part in parts.items()}
        value = decoded(piece.codec(codec), some, piece.shape).to(wide)
        at = lines(bucket, *piece.flat)
        row, column = at["row_index"], at.get("column_index")
        if len(shape) > 1:
            grid = value.flatten(2)
            rows[piece.batch].index_add_(1, row, grid.sum(2))
            if column is None:
                columns[piece.batch] += grid.sum(1)
            else:
                columns[piece.batch].index_add_(1, column, grid.sum(1))
        else:
            assert column is not None  # both come together: a flat piece that does not consist of whole rows
            rows[piece.batch].index_add_(1, row, value)
            columns[piece.batch].index_add_(1, column, value)
    return {"row": rows, "column": columns}


def _spread(bucket: Bucket, slot: Slot, codec: Codec, storage: Storage) -> dict[str, Tensor]:
    """What the means of rows and columns say of every element that is here, stored: ``R_i·C_j / mean(R)``."""
    device, shape = bucket.key.device, bucket.key.local_shape
    home = HOST if storage.hosts(slot) and bucket.transfers.serves(device) else device
    found = {
        kept.mean_of[1]: bucket.codecs[kept.name].decode({"": bucket.storage[kept.name]})
        for kept in bucket.slots
        if kept.mean_of and kept.mean_of[0] == slot.name
    }
    rows, columns = found["row"], found["column"]
    rows = rows / rows.mean(1, keepdim=True).clamp(min=SMALLEST)
    # of blocks that end on another rank all is known here, too: encoded whole, they are the same on both
    shard, before = bucket.shard, 0
    if len(shape) == 1 and isinstance(codec, BlockCodec):
        shard = covering(bucket.shard, codec.block)
        before, shape = bucket.shard.start - shard.start, (shard.numel,)
    codec = local(codec, shard, shape)
    fresh = {
        suffix: torch.empty((bucket.size, *codec.part_shape(suffix, shape)), dtype=dtype, device=home)
        for suffix, dtype in codec.parts.items()
    }
    for piece in pieces(bucket.size, shape, (codec,), shard.start) if bucket.numel else ():
        begin, end = piece.flat
        at = lines(bucket, begin - before, end - before)
        row, column = at["row_index"], at.get("column_index")
        r = rows[piece.batch].index_select(1, row)
        c = columns[piece.batch] if column is None else columns[piece.batch].index_select(1, column)
        value = (r[:, :, None] * c[:, None, :]).reshape(piece.shape) if len(shape) > 1 else r * c
        for suffix, part in piece.codec(codec).encode(value, None).items():
            piece.of(codec, suffix, fresh[suffix]).copy_(part)
    if shard is not bucket.shard:
        fresh[""] = fresh[""][:, before : before + bucket.numel].clone()
    return {slot.name + suffix: part for suffix, part in fresh.items()}
