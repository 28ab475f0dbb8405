"""Scales of blocks of which several ranks have a part: agreed on, so that they are those of one process.

Flat partitions (FSDP1, ZeRO) cut parameters anywhere, also within a block. Each rank finds the scale of its part, and
the largest of them is the whole block's. In a step, and where state is converted, a rank stores its part by its own
scale first, which is true state as far as it goes, and keeps the values; once the scales of all ranks are known, these
few elements are encoded again.

Scales are ≥ 0, and are compared as integers of the same bits: their order is the same, with NaN as the largest.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hina_optim.engine.agreement import Agreement
from hina_optim.engine.bucket import Bucket
from hina_optim.engine.cells import Cell
from hina_optim.engine.layout import Layout
from hina_optim.engine.rules import Values, chosen
from hina_optim.engine.transfers import Transfers
from hina_optim.state.precision import Storage
from hina_optim.state.ranges import Edge, RangeCodec, block_at, codec_here, cut_blocks, span, within

if TYPE_CHECKING:
    from hina_optim.engine.bookkeeping import Buckets
    from hina_optim.engine.bucket import Member

__all__ = ["agree_on_state", "agree_on_step"]

#: What is to be written where: tensors in the same place, or on their way to the host.
Writes = list[tuple[Tensor, Tensor]]


def _edges(codec: RangeCodec, shape: tuple[int, ...], start: int, begin: int = 0) -> list[tuple[Edge, int]]:
    """The blocks at the ends of a piece that begins at the element ``begin`` of a range, with their numbers."""
    return [(edge, block_at(shape, codec.blocks.block, start + begin + edge.begin)) for edge in codec.edges]


# -- a step ------------------------------------------------------------------------------------------------------------


def agree_on_step(
    layout: Layout,
    transfers: Transfers,
    found: Sequence[tuple[Cell, Values]],
    attempt: Callable[[Callable[[], Any]], Any],
) -> None:
    """Encode again what the last segments of a step have set aside: one all-reduce for all of it.

    Args:
        layout: Where elements lie.
        transfers: Takes state to the host.
        found: Every cell of a bucket of which some rank has a part of a block, with what its last segment has left; in
            the same order of buckets on all ranks.
        attempt: Runs what changes nothing, once more if memory runs out.
    """
    buckets: dict[Bucket, list[tuple[Cell, Values]]] = {}
    for cell, values in found:
        buckets.setdefault(cell.bucket, []).append((cell, values))
    slots = [
        (bucket, slot.name)
        for bucket, cells in buckets.items()
        for slot in bucket.slots
        if f"{slot.name}.value" in cells[0][1]
    ]
    parts = attempt(lambda: [(bucket.params[0], _largest(bucket, name, buckets[bucket])) for bucket, name in slots])
    if not parts:
        return
    totals = layout.reduce(parts, largest=True)  # once: the other ranks wait for this one
    writes: list[tuple[Bucket, Writes]] = attempt(
        lambda: [
            (bucket, _again(cell, values, name, total.view(torch.float32)))
            for (bucket, name), total in zip(slots, totals, strict=True)
            for cell, values in buckets[bucket]
        ]
    )
    for bucket, pairs in writes:
        away = {str(i): home for i, (home, _) in enumerate(pairs)} if bucket.hosted else {}
        transfers.store({str(i): value for i, (_, value) in enumerate(pairs)}, away, bucket.key.device)
        for home, value in pairs if not away else ():
            home.copy_(value)


def _pieces(cell: Cell, name: str) -> tuple[RangeCodec, int, list[tuple[Edge, int]]]:
    """Of a slot of a cell its codec, where the cell begins, and its edges with the places of their blocks."""
    bucket = cell.bucket
    codec = cell.program.rules_of(cell.range).codecs[name]
    assert isinstance(codec, RangeCodec)
    begin = cell.begin if cell.chunked else 0
    places = bucket.cut_blocks(name)
    return codec, begin, [(edge, places[n]) for edge, n in _edges(codec, bucket.shard.shape, bucket.shard.start, begin)]


def _largest(bucket: Bucket, name: str, cells: Sequence[tuple[Cell, Values]]) -> Tensor:
    """Bits of the scales here of all blocks that are cut anywhere, int32 ``[N, blocks]``; 0 of those of others."""
    bits = torch.zeros((bucket.size, len(bucket.cut_blocks(name))), dtype=torch.int32, device=bucket.key.device)
    for cell, values in cells:
        scale = values[f"{name}.scale"].contiguous().view(torch.int32)
        for i, (_, place) in enumerate(_pieces(cell, name)[2]):
            bits[cell.first : cell.stop, place] = scale[:, i]
    return bits


def _again(cell: Cell, values: Values, name: str, scales: Tensor) -> Writes:
    """Codes and scales of the cut blocks of a cell by the scales ``[N, blocks]`` that were agreed on."""
    bucket, rows, at = cell.bucket, slice(cell.first, cell.stop), 0
    codec, begin, edges = _pieces(cell, name)
    whole = bucket.codecs[name]
    assert isinstance(whole, RangeCodec)
    writes: Writes = []
    again: list[tuple[int, Tensor]] = []
    for i, (edge, place) in enumerate(edges):
        here = slice(at, at + edge.end - edge.begin)
        scale, noise = scales[rows, place : place + 1], values.get(f"{name}.noise")
        codes = codec.encode_edge(values[f"{name}.value"][:, here], None if noise is None else noise[:, here], scale)
        ok, at = values["ok"] > 0, here.stop
        again.append((begin + edge.begin, chosen(ok, codes, values[f"{name}.codes"][:, here])))
        first = whole.place(begin + edge.begin)
        home = bucket.storage[name + "_scale"][rows, first : first + 1]
        writes.append((home, chosen(ok, scale, values[f"{name}.scales"][:, i : i + 1])))
    return writes + _codes_again(whole, bucket.storage[name][rows], again)


def _codes_again(codec: RangeCodec, home: Tensor, found: Sequence[tuple[int, Tensor]]) -> Writes:
    """Codes of edges, to where they are stored.

    Args:
        codec: How it is stored.
        home: Codes of all that is here, ``[N, …]``.
        found: Of each edge, in order, its first element, and its codes ``[N, m]``.
    """
    writes: Writes = []
    end = 0
    for begin, codes in found:
        first, last = span(codec, "", begin, begin + codes.shape[1])
        piece = within(codec, begin, begin + codes.shape[1])
        assert isinstance(piece, RangeCodec)
        to, new = home[:, first:last], codes
        if codec.per_byte > 1:
            old = to.to(codes.device)
            if first < end:  # two edges share a byte, and the one before is not written yet
                old = torch.cat([writes[-1][1][:, -1:], old[:, 1:]], 1)
            new = piece.overwritten(old, codes)
        writes.append((to, new))
        end = last
    return writes


# -- state that is there -----------------------------------------------------------------------------------------------


def agree_on_state(buckets: Buckets, agreement: Agreement) -> bool:
    """Give blocks of which several ranks have a part the same scale on all of them.

    Which those are follows from where elements lie and from options, so that all ranks take part whatever state they
    have. To be called by all of them; what goes wrong is noted.

    Args:
        buckets: Whose state.
        agreement: Notes what goes wrong here.

    Returns:
        Whether there may be any such blocks; on all ranks the same.
    """
    optimizer = buckets._optimizer
    layout = optimizer._layout
    if not layout.sharded:
        return False
    every: list[tuple[Member, str, RangeCodec, dict[int, int]]] = []
    for g, member in buckets.identities.members([p for _, _, p in buckets.identities.places()]):
        ranges = layout.ranges(member.param)
        group = optimizer.group(g)
        local = tuple(layout.local(member.param).shape)
        for slot in buckets._recipe(group, member.info, member.param.dtype)[1] if ranges else ():
            codec = codec_here(slot, Storage.of(group), member.param.dtype, member.shard, local)
            if isinstance(codec, RangeCodec):
                places = cut_blocks(member.info.shape, codec.blocks.block, ranges)
                if places:
                    every.append((member, slot.name, codec, places))
    if not every:
        return False
    optimizer._transfers.wait()
    bits = [torch.zeros(len(places), dtype=torch.int32, device=m.param.device) for m, _, _, places in every]
    with agreement.noting():
        for (member, name, codec, places), own in zip(every, bits, strict=True):
            stored = optimizer.state.get(member.param, {}).get(name + "_scale")
            for edge, n in _edges(codec, member.info.shape, member.shard.start) if stored is not None else ():
                own[places[n]] = stored[edge.scale].to(own.device).view(torch.int32)
    totals = layout.reduce([(m.param, own) for (m, *_), own in zip(every, bits, strict=True)], largest=True)
    with agreement.noting():
        writes: Writes = []
        loose = _loose(buckets)
        for (member, name, codec, places), total in zip(every, totals, strict=True):
            state = optimizer.state.get(member.param, {})
            if name + "_scale" in state:
                values = loose.get((member.param, name))
                start, scales = member.shard.start, total.view(torch.float32)
                edges = [(edge, scales[places[n]]) for edge, n in _edges(codec, member.info.shape, start)]
                writes += _again_stored(state[name], state[name + "_scale"], codec, edges, values)
        for home, value in writes:
            home.copy_(value)
        for member, *_ in every:
            if member.param in buckets._of:
                buckets._of[member.param].loose = {}
    return True


def _again_stored(
    codes: Tensor, scales: Tensor, codec: RangeCodec, edges: Sequence[tuple[Edge, Tensor]], values: Tensor | None
) -> Writes:
    """The cut blocks of a parameter by the scales that were agreed on.

    Args:
        codes: Its codes.
        scales: Its scales.
        codec: How it is stored.
        edges: Its cut blocks and their new scales, 0-d.
        values: What they are, one behind the other; None where only what they were rounded to is known.
    """
    writes: Writes = []
    at = 0
    found: list[tuple[int, Tensor]] = []
    for edge, scale in edges:
        held, piece = scales[edge.scale : edge.scale + 1], within(codec, edge.begin, edge.end)
        assert isinstance(piece, RangeCodec)
        here = slice(*span(codec, "", edge.begin, edge.end))
        old, before = held.to(scale.device), piece.unpacked(codes[None, here].to(scale.device))
        value = codec.blocks.levels(before[0]) * old if values is None else values[at : at + piece.numel]
        at += piece.numel
        again = codec.encode_edge(value[None], None, scale.view(1, 1))
        found.append((edge.begin, torch.where(scale == old, before, again)))
        writes.append((held, scale.view(1)))
    return writes + _codes_again(codec, codes[None], found)


def _loose(buckets: Buckets) -> dict[tuple[Tensor, str], Tensor]:
    """Parameter and slot → values of its cut blocks that a conversion has remembered."""
    return {
        (p, name): value
        for bucket in set(buckets._of.values())
        for name, values in bucket.loose.items()
        for p, value in zip(bucket.params, values.unbind(0), strict=True)
    }
