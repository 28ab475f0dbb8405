"""How state in 8 and 4 bits is stored of flat ranges that begin and end anywhere: blocks and codes of the whole."""

from __future__ import annotations

from itertools import pairwise

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hina_optim.state.blockwise import BlockCodec, LogCodec
from hina_optim.state.codebooks import dynamic_tables
from hina_optim.state.conversion import converted
from hina_optim.state.precision import TensorCodec, decoded
from hina_optim.state.ranges import RangeCodec, block_at, codes_of, covering, cut_blocks, ends, local, span, within
from hina_optim.state.shard import Shard
from hina_optim.state.signs import SignCodec


@st.composite
def ranges(draw: st.DrawFn) -> tuple[BlockCodec, tuple[int, int], int, int]:
    """A codec with small blocks, a shape, and a range of it."""
    block, bits = draw(st.sampled_from([(1, 8), (2, 8), (3, 8), (4, 8), (8, 8), (2, 4), (4, 4), (8, 4)]))
    codec = BlockCodec(draw(st.booleans()), block, stochastic=draw(st.booleans()), bits=bits, packed=bits == 4)
    shape = draw(st.integers(1, 5)), draw(st.integers(1, 17))
    a, b = sorted((draw(st.integers(0, shape[0] * shape[1])), draw(st.integers(0, shape[0] * shape[1]))))
    return codec, shape, a, b


def drawn(codec: BlockCodec, shape: tuple[int, int], n: int = 2) -> tuple[Tensor, Tensor | None]:
    generator = torch.Generator().manual_seed(shape[0] * 100 + shape[1])
    value = torch.randn(n, *shape, generator=generator)
    noise = torch.randint(0, 1 << 16, value.shape, generator=generator, dtype=torch.int32)
    return value if codec.signed else value.abs(), noise if codec.stochastic else None


@settings(max_examples=400, deadline=None)
@given(ranges())
def test_a_range_has_the_blocks_of_the_whole(case: tuple[BlockCodec, tuple[int, int], int, int]) -> None:
    """Codes and scales are those of the whole parameter, but of blocks that are not all here; those are named."""
    codec, shape, a, b = case
    value, noise = drawn(codec, shape)
    whole = codec.encode(value, noise)
    block_of = torch.tensor([block_at(shape, codec.block, i) for i in range(shape[0] * shape[1])])
    here = RangeCodec.of(codec, shape, a, b)
    first, count = block_at(shape, codec.block, a), here.part_shape("_scale", (b - a,))[0]
    every = codes_of(codec, whole[""], value.shape) if codec.packed else whole[""]
    codes, scales = every.flatten(1)[:, a:b], whole["_scale"].flatten(1)[:, first : first + count]
    values_here = here.decode({"": here.packed(codes), "_scale": scales})
    assert torch.equal(values_here, decoded(codec, whole, value.shape).flatten(1)[:, a:b])

    values, noises = value.flatten(1)[:, a:b], None if noise is None else noise.flatten(1)[:, a:b]
    found = here.encode(values, noises)
    assert found["_scale"].shape == scales.shape
    partial = {int(i) for i in block_of[a:b] if int((block_of == i).sum()) > int((block_of[a:b] == i).sum())}
    assert {edge.scale + first for edge in here.edges} == partial
    inner = torch.tensor([int(i) not in partial for i in block_of[a:b]], dtype=torch.bool)
    assert found[""].shape[1:] == here.part_shape("", (b - a,))
    assert torch.equal(here.unpacked(found[""])[:, inner], codes[:, inner])
    whole_blocks = [i for i in range(count) if i + first not in partial]
    assert torch.equal(found["_scale"][:, whole_blocks], scales[:, whole_blocks])
    for edge in here.edges:
        at = slice(edge.begin, edge.end)
        scale = scales[:, edge.scale : edge.scale + 1]
        assert bool((found["_scale"][:, edge.scale : edge.scale + 1] <= scale).all()), "of a part of it"
        again = here.encode_edge(values[:, at], None if noises is None else noises[:, at], scale)
        assert torch.equal(again, codes[:, at])
        piece, (first, last) = within(here, edge.begin, edge.end), span(here, "", edge.begin, edge.end)
        assert isinstance(piece, RangeCodec)
        stored = found[""].clone()
        stored[:, first:last] = piece.overwritten(stored[:, first:last], codes[:, at])
        expected = here.unpacked(found[""]).clone()
        expected[:, at] = codes[:, at]
        assert torch.equal(here.unpacked(stored), expected), "and no other"
    wide = covering(Shard(shape, a, b), codec.block)
    assert set(range(wide.start, wide.stop)) == {i for i, x in enumerate(block_of.tolist()) if x in block_of[a:b]}


@settings(max_examples=200, deadline=None)
@given(ranges(), st.integers(1, 40))
def test_pieces_of_a_range(case: tuple[BlockCodec, tuple[int, int], int, int], most: int) -> None:
    """Pieces begin with blocks and bytes, and hold what the range holds; signs, too."""
    codec, shape, a, b = case
    here = RangeCodec.of(codec, shape, a, b)
    shared = [
        local(one, Shard(shape, a, b), (b - a,))
        for one in (SignCodec(), SignCodec(bits=1), LogCodec(0.1, 1.0, 2.0, bits=4, packed=True))
    ]
    value, noise = drawn(codec, shape)
    values, noises = value.flatten(1)[:, a:b], None if noise is None else noise.flatten(1)[:, a:b]
    step = here.columns * 8
    pieces = [0, *ends(a, b - a, most, (here, *shared))]
    assert pieces[-1] == b - a and all(x < y for x, y in pairwise(pieces[:-1]))
    assert all(y - x <= max(most, step, 4096) for x, y in pairwise(pieces))
    for one, data in ((here, values), *((one, values.sign()) for one in shared)):
        stored = one.encode(data, noises if one is here else None)
        for begin, end in pairwise(pieces):
            part = within(one, begin, end).encode(
                data[:, begin:end], None if noises is None or one is not here else noises[:, begin:end]
            )
            for suffix, held in part.items():
                assert torch.equal(held, stored[suffix][:, slice(*span(one, suffix, begin, end))])


def test_a_range_against_plain_float64() -> None:
    """Levels and scales from their definition, element by element."""
    shape, (a, b), block = (3, 11), (5, 30), 4
    for signed in (True, False):
        codec = BlockCodec(signed, block)
        value, _ = drawn(codec, shape, 1)
        levels = dynamic_tables(signed).levels.double().tolist()
        flat = value.flatten().double().tolist()
        here = RangeCodec.of(codec, shape, a, b)
        stored = here.encode(value.flatten(1)[:, a:b], None)
        decoded = here.decode(stored)[0].double().tolist()
        for i in range(a, b):
            mine = [j for j in range(a, b) if block_at(shape, block, j) == block_at(shape, block, i)]
            scale = max(abs(flat[j]) for j in mine)
            nearest = min((scale * level for level in levels), key=lambda x, want=flat[i]: abs(x - want))
            assert abs(decoded[i - a] - nearest) < 1e-6 * scale


def test_which_blocks_are_cut() -> None:
    assert cut_blocks((4, 512), 256, ((0, 256), (256, 256), (256, 2048))) == {}
    assert cut_blocks((4, 512), 256, ((0, 257), (257, 300), (300, 1024), (1024, 2048))) == {1: 0}
    assert cut_blocks((4, 300), 256, ((0, 300), (300, 556), (556, 700), (700, 1200))) == {4: 0}


def test_conversion_of_a_large_range() -> None:
    """In pieces, from and to blocks that are cut, as in one go."""
    shape, start, numel = (2300, 1000), 777, 2_200_123
    shard = Shard(shape, start, start + numel)
    here = RangeCodec.of(BlockCodec(True), shape, shard.start, shard.stop)
    plain = TensorCodec(torch.float32)
    value = torch.randn(1, numel, generator=torch.Generator().manual_seed(0))
    stored = converted(plain, here, {"": value}, (numel,), start)
    assert all(torch.equal(part, here.encode(value, None)[suffix]) for suffix, part in stored.items())
    assert torch.equal(converted(here, plain, stored, (numel,), start)[""], here.decode(stored))
    signs = local(SignCodec(), shard, (numel,))
    packed = converted(plain, signs, {"": value.sign()}, (numel,), start)
    assert torch.equal(converted(signs, plain, packed, (numel,), start)[""], value.sign())
