"""State in 8 bits: equal to bitsandbytes where it rounds to the nearest, unbiased with noise, never adrift."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hina_optim.state.blockwise import BlockCodec, LogCodec
from hina_optim.state.codebooks import Tables, dynamic_map, dynamic_tables, log_levels, log_tables
from hina_optim.state.rounding import element_words, param_seeds, stream_noise

BLOCK = 256
MASK = (1e-7, 1e-4, 1e-3)
NEVER_UP, MOST = 0, 0xFFFF  # noise that leads only what is on a level already to it; and as far up as noise goes


def noise_like(value: Tensor, step: int) -> Tensor:
    """What the engine draws: other bits for every element and step."""
    seeds = param_seeds(torch.arange(value.shape[0], dtype=torch.int32), seed=0, step=step)
    index = torch.arange(value[0].numel(), dtype=torch.int32).reshape(1, *value.shape[1:])
    return stream_noise(element_words(seeds.reshape(-1, *[1] * (value.ndim - 1)), index), 0)


def stored(codec: Any, value: Tensor, noise: Tensor | None = None) -> Tensor:
    """What is left of a value after it was stored."""
    out: Tensor = codec.decode(codec.encode(value, noise))
    return out


def blocks(signed: bool) -> Tensor:
    """One block a row, of every kind: the ordinary, the constant, zero, tiny, huge, with one value, with ties."""
    generator = torch.Generator().manual_seed(0)
    normal = torch.randn(64, BLOCK, generator=generator)
    wide = normal * 10.0 ** (torch.rand(64, BLOCK, generator=generator) * 12 - 12)
    one_hot = torch.zeros(4, BLOCK)
    one_hot[torch.arange(4), torch.tensor([0, 7, 200, 255])] = torch.tensor([1.0, -3.0, 1e-20, 1e30])
    levels = dynamic_map(signed)
    middles = (levels[1:] + levels[:-1]) / 2
    rows = [
        normal,
        wide,
        normal[:8] * 1e30,
        normal[:8] * 1e-30,
        normal[:8] * 1e-40,
        torch.full((1, BLOCK), 0.37),
        torch.full((1, BLOCK), -2.5),
        torch.full((1, BLOCK), 1e30),
        torch.full((1, BLOCK), 3e38),
        torch.full((1, BLOCK), 1e-40),
        torch.zeros(1, BLOCK),
        one_hot,
        levels[None],
        -levels[None],
        torch.cat([middles, torch.ones(1)])[None],  # every tie there is
        torch.cat([middles.nextafter(torch.tensor(2.0)), torch.ones(1)])[None],
        torch.cat([middles.nextafter(torch.tensor(-2.0)), torch.ones(1)])[None],
    ]
    every = torch.cat(rows)
    return every if signed else every.abs()


@pytest.fixture(scope="module")
def bnb() -> Any:
    """The functional interface of the real library."""
    pytest.importorskip("bitsandbytes")
    import bitsandbytes.functional

    return bitsandbytes.functional


@pytest.mark.parametrize("signed", [True, False])
def test_map_is_that_of_bitsandbytes(bnb: Any, signed: bool) -> None:
    """Bit for bit."""
    assert torch.equal(dynamic_map(signed), bnb.create_dynamic_map(signed=signed))


@pytest.mark.parametrize("signed", [True, False])
def test_codes_and_scales_are_those_of_bitsandbytes(bnb: Any, signed: bool) -> None:
    """Of its kernel for every device, bit for bit, and so is what its dequantize_blockwise makes of them."""
    value, code = blocks(signed), dynamic_map(signed)
    kernel = torch.ops.bitsandbytes.quantize_blockwise.default
    codes, scale = kernel._op_dk(torch._C.DispatchKey.CompositeExplicitAutograd, value, code, BLOCK)
    codec = BlockCodec(signed)
    for given_shape in (value[None], value[:, None], value.reshape(1, -1), value[None, :, None]):
        parts = codec.encode(given_shape, None)
        assert parts[""].dtype == torch.uint8 and torch.equal(parts[""].flatten(), codes.flatten())
        assert parts["_scale"].dtype == torch.float32 and torch.equal(parts["_scale"].flatten(), scale)
        theirs = bnb.dequantize_blockwise(codes, absmax=scale, code=code, blocksize=BLOCK)
        assert torch.equal(codec.decode(parts).flatten(), theirs.flatten())


@pytest.mark.parametrize("signed", [True, False])
def test_cpu_kernel_of_bitsandbytes_differs_by_its_table_only(bnb: Any, signed: bool) -> None:
    """Its kernel for float32 on CPUs reads a table of 65536 steps: equal but within half a step of a middle."""
    value = blocks(signed)
    value = value[value.abs().amax(1) > 1e-37]  # of zeros and of denormal numbers it makes what it likes
    code = dynamic_map(signed)
    codes, state = bnb.quantize_blockwise(value, code=code, blocksize=BLOCK)
    parts = BlockCodec(signed).encode(value[None], None)
    assert torch.equal(parts["_scale"].flatten(), state.absmax)
    unit = value / state.absmax[:, None]
    middles = (code[1:] + code[:-1]) / 2
    far = (unit.unsqueeze(-1) - middles).abs().amin(-1) > 1.6e-5
    assert far.float().mean() > 0.5
    assert torch.equal(parts[""][0][far], codes[far])
    theirs = bnb.dequantize_blockwise(codes, state)
    ours = BlockCodec(signed).decode(parts)[0]
    near = (theirs - ours).abs() / state.absmax[:, None]
    assert near.max() < 0.015  # one level
    # and wherever they differ, ours is the nearer one (up to the rounding of a tie)
    closer = (ours - value).abs() - (theirs - value).abs()
    assert (closer / state.absmax[:, None]).max() < 1e-7


@pytest.mark.parametrize("signed", [True, False])
def test_every_boundary_is_at_its_place(signed: bool) -> None:
    """Codes of the floats around each boundary, and of signed zeros, are those of a binary search."""
    levels = dynamic_map(signed)
    up, down = torch.tensor(2.0), torch.tensor(-2.0)
    for limits, right in (((levels[1:] + levels[:-1]) / 2, False), (levels[1:], True)):
        around = torch.cat([limits, limits.nextafter(up), limits.nextafter(down), torch.tensor([0.0, -0.0, 1.0])])
        around = around[around.abs() <= 1]
        value = torch.cat([around, torch.ones(1)])[None]  # the scale is 1
        codec = BlockCodec(signed, block=1 << 20)
        noise = torch.full(value.shape, NEVER_UP, dtype=torch.int32) if right else None
        codes = codec.encode(value, noise)[""].long()
        other = codes != torch.bucketize(value, limits, right=right)
        # with noise, the fraction of the way to the next level is 1 for the float below it
        assert not other.any() if not right else bool((value[other].nextafter(up) == levels[codes[other]]).all())


def test_levels_come_back_as_they_are() -> None:
    """Storing what was stored changes nothing, with and without noise."""
    for codec, value in (
        (BlockCodec(True), dynamic_map(True)),
        (BlockCodec(False), dynamic_map(False)),
        (BlockCodec(True, stochastic=True), dynamic_map(True)),
        (BlockCodec(False, stochastic=True), dynamic_map(False)),
        (LogCodec(*MASK), log_levels(*MASK)),
    ):
        row = value[None]
        assert torch.equal(stored(codec, row), row)
        for bits in (NEVER_UP, 1, 12345, MOST):
            assert torch.equal(stored(codec, row, torch.full(row.shape, bits, dtype=torch.int32)), row)


@settings(max_examples=40, deadline=None)
@given(
    low=st.floats(1e-12, 1e-2),
    below=st.one_of(st.just(1.0), st.floats(1, 1.0001), st.floats(1, 1e6)),
    above=st.one_of(st.just(1.0), st.floats(1, 1.0001), st.floats(1, 1e6)),
)
def test_log_levels(low: float, below: float, above: float) -> None:
    """Ascending, between the ends, with the three arguments among them; every value finds the level below it."""
    start = low * below
    high = start * above
    levels = log_levels(low, start, high)
    assert 1 <= len(levels) <= 256 and bool((levels.diff() > 0).all())
    for exact in (low, start, high):
        assert bool((levels == torch.tensor(exact)).any())
    assert levels[0] == torch.tensor(low) and levels[-1] == torch.tensor(high)
    codec = LogCodec(low, start, high)
    value = torch.rand(1, 500) * (high - low) + low
    value = torch.cat([value, levels[None]], 1).clamp(levels[0], levels[-1])
    noise = torch.full(value.shape, NEVER_UP, dtype=torch.int32)
    assert torch.equal(codec.encode(value, noise)[""].long(), torch.bucketize(value, levels[1:], right=True))


def test_log_levels_are_rejected_out_of_order() -> None:
    """The error names the values."""
    for bad in ((0.0, 1.0, 2.0), (2.0, 1.0, 3.0), (1.0, 3.0, 2.0), (1.0, 2.0, math.inf)):
        with pytest.raises(ValueError, match="low="):
            LogCodec(*bad)


def test_tables_are_made_on_the_cpu_in_float32() -> None:
    """Whatever default device and dtype are."""
    for function in (dynamic_tables, log_tables):
        function.cache_clear()
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            tables = [BlockCodec(True)._tables, LogCodec(*MASK)._tables]
    finally:
        torch.set_default_dtype(torch.float32)
    for table in tables:
        assert table.levels.device.type == "cpu" and table.levels.dtype == table.per_gap.dtype == torch.float32


def test_tables_follow_to_a_device_once() -> None:
    """The meta device stands for any other."""
    tables: Tables = dynamic_tables(True)
    meta = torch.device("meta")
    assert tables.on(meta).levels.device == meta and tables.on(meta) is tables.on(meta)
    codec = BlockCodec(True)
    parts = codec.encode(torch.zeros(1, 4, 300, device="meta"), None)
    assert parts["_scale"].shape == (1, 4, 2) and codec.decode(parts).shape == (1, 4, 300)


SHAPES = [(), (5,), (256,), (700,), (3, 17), (4, 256), (4, 320), (2, 1024), (6, 3, 5, 5), (6, 40, 3, 3), (2, 3, 2, 130)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("stochastic", [False, True])
def test_parts_have_their_shapes_and_blocks_lie_in_rows(shape: tuple[int, ...], stochastic: bool) -> None:
    """Each block is stored as if it were alone, and a range of rows is a range of every part."""
    codec = BlockCodec(True, stochastic=stochastic)
    torch.manual_seed(0)
    value = torch.randn(2, *shape)
    noise = noise_like(value, 0) if stochastic else None
    parts = codec.encode(value, noise)
    assert {s: tuple(p.shape[1:]) for s, p in parts.items()} == {s: codec.part_shape(s, shape) for s in codec.parts}
    assert {s: p.dtype for s, p in parts.items()} == codec.parts
    decoded = codec.decode(parts)
    assert decoded.shape == value.shape
    columns = torch.Size(shape[1:] if len(shape) > 1 else shape).numel()
    lines, flat_noise = value.reshape(-1, columns), None if noise is None else noise.reshape(-1, columns)
    for start in range(0, columns, BLOCK):
        cut = slice(start, start + BLOCK)
        alone = codec.encode(lines[:, cut], None if flat_noise is None else flat_noise[:, cut])
        assert torch.equal(alone[""], parts[""].reshape(-1, columns)[:, cut])
        assert torch.equal(alone["_scale"].flatten(), parts["_scale"].reshape(len(lines), -1)[:, start // BLOCK])
    if len(shape) > 1:
        some = codec.encode(value[:, 1:3], None if noise is None else noise[:, 1:3])
        for suffix, part in parts.items():
            assert torch.equal(some[suffix], part[:, 1:3])
        assert torch.equal(codec.decode({s: p[:, 1:3] for s, p in parts.items()}), decoded[:, 1:3])


def test_flat_ranges_of_whole_blocks() -> None:
    """Where rows fill blocks, a range of the flat value is stored as that range of the parts."""
    codec = BlockCodec(True)
    value = torch.randn(1, 4, 512)
    parts = codec.encode(value, None)
    flat = codec.encode(value.view(1, -1)[:, 256:1024], None)
    assert torch.equal(flat[""], parts[""].view(1, -1)[:, 256:1024])
    assert torch.equal(flat["_scale"], parts["_scale"].view(1, -1)[:, 1:4])


@pytest.mark.parametrize("shape", [(0,), (0, 300), (3, 0)])
def test_empty_shards(shape: tuple[int, ...]) -> None:
    """A rank that holds nothing stores nothing."""
    for codec in (BlockCodec(True), LogCodec(*MASK)):
        value = torch.zeros(2, *shape)
        parts = codec.encode(value, None)
        assert all(parts[s].shape == (2, *codec.part_shape(s, shape)) for s in codec.parts)
        assert codec.decode(parts).shape == value.shape


def test_strides_of_the_input_do_not_matter() -> None:
    """Channels last, transposed, expanded."""
    image = torch.randn(2, 8, 40, 3, 3)
    for codec in (BlockCodec(True), LogCodec(*MASK)):
        last = image.permute(0, 1, 3, 4, 2).contiguous().permute(0, 1, 4, 2, 3)
        for given_value in (last, image.transpose(1, 2), image[:, :, :, :1].expand_as(image)):
            wanted = codec.encode(given_value.contiguous(), None)
            assert all(torch.equal(p, wanted[s]) for s, p in codec.encode(given_value, None).items())


def test_float64_parameters_are_given_float64() -> None:
    """Codes are those of the float32 value."""
    value = torch.randn(1, 3, 300, dtype=torch.float64).abs()
    for one, two in (
        (BlockCodec(True, compute=torch.float64), BlockCodec(True)),
        (LogCodec(*MASK, compute=torch.float64), LogCodec(*MASK)),
    ):
        assert stored(one, value).dtype == torch.float64
        assert torch.equal(stored(one, value).float(), stored(two, value.float()))


def test_compiled_is_the_same() -> None:
    """In one graph, the same codes and values: a block and a part of one, whole blocks, less than one."""
    torch.manual_seed(0)
    cases: list[tuple[Any, Tensor, bool]] = [
        (BlockCodec(True), torch.randn(2, 5, 320), False),
        (BlockCodec(False, stochastic=True), torch.rand(2, 5, 512), True),
        (LogCodec(*MASK), torch.rand(2, 5, 17) * 1e-3, True),
    ]
    noises = [noise_like(value, 0) if noisy else None for _, value, noisy in cases]

    def run() -> list[Tensor]:
        out: list[Tensor] = []
        for (codec, value, _), noise in zip(cases, noises, strict=True):
            parts = codec.encode(value, noise)
            out += [*parts.values(), codec.decode(parts)]
        return out

    for one, other in zip(torch.compile(run, fullgraph=True, dynamic=False)(), run(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize(("signed", "absolute", "relative"), [(True, 0.0071, 0.062), (False, 0.0036, 0.033)])
@pytest.mark.parametrize("size", [1e-30, 1e-3, 1.0, 1e30])
def test_error_bounds(signed: bool, absolute: float, relative: float, size: float) -> None:
    """Of the block's largest value, and relative to values in each decade below it."""
    unit = torch.cat([torch.logspace(-7, 0, 200_001), torch.ones(1)])
    value = (unit * size)[None]
    error = (stored(BlockCodec(signed, block=1 << 20), value) - value).abs() / size
    assert error.max() < absolute
    for decade in range(5):
        inside = (unit >= 10.0 ** (-decade - 1)) & (unit <= 10.0**-decade)
        assert (error[0][inside] / unit[inside]).max() < relative * 2**decade
    if signed:
        assert ((stored(BlockCodec(True, block=1 << 20), -value) + value).abs() / size).max() < absolute


def test_zeros_stay_zeros() -> None:
    """In a block of zeros, beside other values, with noise, and as negative zero; fresh zero storage is zero, too."""
    for signed in (True, False):
        for codec in (BlockCodec(signed), BlockCodec(signed, stochastic=True)):
            value = torch.zeros(1, 3, 300)
            value[0, 1, ::7] = -0.0
            value[0, 2, 5] = 1e20
            for bits in (NEVER_UP, 1 << 10, MOST):
                noise = torch.full(value.shape, bits, dtype=torch.int32) if codec.noisy else None
                out = stored(codec, value, noise)
                assert torch.equal(out, value)
            blank = {s: torch.zeros(1, *codec.part_shape(s, (3, 300)), dtype=d) for s, d in codec.parts.items()}
            assert bool((codec.decode(blank) == 0).all())


def test_what_is_not_finite_stays_in_its_block() -> None:
    """Other blocks, of the same row and of others, are as if it were not there."""
    for bad in (math.nan, math.inf, -math.inf):
        for codec in (BlockCodec(True), BlockCodec(False, stochastic=True)):
            value = torch.randn(1, 3, 600).abs()
            noise = noise_like(value, 0) if codec.noisy else None
            clean = stored(codec, value, noise)
            spoiled = value.clone()
            spoiled[0, 1, 300] = bad
            same = stored(codec, spoiled, noise) == clean
            same[0, 1, 256:512] = True
            assert bool(same.all())
        out = stored(LogCodec(*MASK), torch.tensor([[bad, 5e-5, -1.0, 1.0]]))
        assert bool(out.isfinite().all()) and out[0, 2] == MASK[0] and out[0, 3] == MASK[2]


@pytest.mark.parametrize("bits", [None, NEVER_UP, 12345, MOST])
def test_without_a_sign_what_is_negative_becomes_zero(bits: int | None) -> None:
    """Whatever its size and the noise, -0 included; its neighbors are not touched."""
    value = torch.tensor([[-3.0, 4.0, -1e-30, -0.0, 1.0, -4.0, 0.0, 2.0]])
    noise = None if bits is None else torch.full(value.shape, bits, dtype=torch.int32)
    codec = BlockCodec(False, stochastic=noise is not None)
    assert torch.equal(stored(codec, value, noise), stored(codec, value.clamp(min=0), noise))
    assert (stored(codec, value, noise)[value <= 0] == 0).all()


@pytest.mark.parametrize("codec", [BlockCodec(True, stochastic=True), BlockCodec(False, stochastic=True)])
def test_block_rounding_is_unbiased(codec: BlockCodec) -> None:
    """The mean over many draws is the value: within five standard errors for every element."""
    torch.manual_seed(1)
    value = torch.randn(1, 1, 256).abs()
    value[0, 0, 0] = 4.0
    draws = 4000
    many = value.expand(1, draws, 256)
    out = stored(codec, many, noise_like(many, 3))
    error = (out.double().mean(1) - value[:, 0].double()).abs()
    assert bool((error <= 5 * out.double().std(1) / draws**0.5 + 1e-6).all())
    assert bool((out.std(1) > 0).float().mean() > 0.9)


@pytest.mark.parametrize("bounds", [MASK, (1e-7, 1e-3, 1e-3), (1e-4, 1e-4, 1e-3)])
def test_log_rounding_is_unbiased(bounds: tuple[float, float, float]) -> None:
    """The mean over many draws is the value; without noise the nearest level is taken."""
    codec, levels = LogCodec(*bounds), log_levels(*bounds)
    torch.manual_seed(1)
    value = torch.rand(1, 1, 300) * (bounds[2] - bounds[0]) + bounds[0]
    draws = 4000
    many = value.expand(1, draws, 300)
    out = stored(codec, many, noise_like(many, 3))
    error = (out.double().mean(1) - value[:, 0].double()).abs()
    assert bool((error <= 5 * out.double().std(1) / draws**0.5 + 1e-10).all())
    nearest = (value[0, 0].unsqueeze(-1) - levels).abs()
    chosen = (stored(codec, value)[0, 0] - value[0, 0]).abs()
    assert torch.allclose(chosen, nearest.amin(-1), rtol=1e-3, atol=1e-12)


@pytest.mark.parametrize("bounds", [(1e-4, 1e-4, 1e-4), (1e-4, 1e-4, 1e-3), (1e-7, 1e-3, 1e-3), (1e-4, 1.000001e-4, 1)])
def test_degenerate_bounds(bounds: tuple[float, float, float]) -> None:
    """Equal, or nearly equal, bounds: the start is kept exactly, and values beyond the ends become the ends."""
    codec = LogCodec(*bounds)
    assert codec._tables.floor.numel() <= 1 << 17
    value = torch.tensor([[0.0, bounds[0], bounds[1], bounds[2], 10.0]])
    wanted = torch.tensor([[bounds[0], bounds[0], bounds[1], bounds[2], bounds[2]]])
    for noise in (None, noise_like(value, 0), noise_like(value, 1)):
        assert torch.equal(stored(codec, value, noise), wanted)


def test_a_frozen_mask_does_not_move() -> None:
    """5000 times stored, with other noise each time."""
    codec = LogCodec(*MASK)
    parts = codec.encode(torch.rand(1, 64) * 1e-3, noise_like(torch.zeros(1, 64), 0))
    first = parts[""].clone()
    noise = torch.randint(0, MOST + 1, (50, 1, 64), dtype=torch.int32)
    for step in range(5000):
        parts = codec.encode(codec.decode(parts), noise[step % 50])
    assert torch.equal(parts[""], first)


@pytest.mark.parametrize("start", [1e-4, 1e-3])
@pytest.mark.parametrize("pattern", ["up", "down", "mixed"])
def test_mask_follows_its_bumps(start: float, pattern: str) -> None:
    """500 bumps of 3e-6, less than the distance of two levels at 1e-3: the mean is within 2 % of that in fp32."""
    codec = LogCodec(MASK[0], start, MASK[2])
    torch.manual_seed(2)
    exact = torch.full((1, 16, 256), start)
    odds = torch.rand_like(exact) * 0.2 + 0.4  # of an upward bump; each element drifts its own way
    parts = codec.encode(exact, None)
    assert torch.equal(codec.decode(parts), exact)
    steps = {1e-4: 30, 1e-3: 300}[start] if pattern == "down" else 500  # downward, to a tenth of the start
    for step in range(steps):
        sign = (torch.rand_like(exact) < odds).float() * 2 - 1 if pattern == "mixed" else torch.ones_like(exact)
        bump = -3e-6 * sign if pattern == "down" else 3e-6 * sign
        exact = (exact + bump).clamp(MASK[0], MASK[2])
        parts = codec.encode((codec.decode(parts) + bump).clamp(MASK[0], MASK[2]), noise_like(exact, step))
    out = codec.decode(parts)
    assert abs(float(out.mean() / exact.mean()) - 1) < 0.02
    if pattern == "mixed":
        assert float((out - exact).norm() / exact.norm()) < 0.12


def follow(codec: BlockCodec, beta: float, fading: bool) -> tuple[Tensor, Tensor]:
    """500 steps of an average of gradients of three decades (squared if unsigned), stored, and in fp32.

    Args:
        codec: Of the stored one.
        beta: Of the average.
        fading: After 100 steps there are no more gradients but for one element of a block.
    """
    generator = torch.Generator().manual_seed(3)
    size = 10 ** (torch.rand(1, 8, 512, generator=generator) * 3 - 3)
    size[..., ::256] = 1.0
    exact = torch.zeros(1, 8, 512)
    parts = codec.encode(exact, None)
    alive = torch.zeros(512)
    alive[::256] = 1.0
    for step in range(500):
        grad = torch.randn(1, 8, 512, generator=generator) * size
        grad = grad * alive if fading and step >= 100 else grad
        new = grad if codec.signed else grad.square()
        exact = beta * exact + (1 - beta) * new
        value = beta * codec.decode(parts) + (1 - beta) * new
        parts = codec.encode(value, noise_like(value, step) if codec.noisy else None)
    return codec.decode(parts), exact


@pytest.mark.parametrize(
    ("signed", "beta", "stochastic", "bound"),
    [
        (True, 0.9, False, 0.04),
        (True, 0.9, True, 0.06),
        (False, 0.9, False, 0.02),
        (False, 0.9, True, 0.03),
        (False, 0.999, False, 0.07),
        (False, 0.999, True, 0.09),
        (True, 0.999, False, 0.35),
        (True, 0.999, True, 0.4),
    ],
)
def test_averages_are_followed(signed: bool, beta: float, stochastic: bool, bound: float) -> None:
    """Root mean square of the difference, relative to that of the average itself."""
    out, exact = follow(BlockCodec(signed, stochastic=stochastic), beta, fading=False)
    assert float((out - exact).norm() / exact.norm()) < bound


def test_a_second_moment_that_is_rounded_at_random_fades() -> None:
    """By its due in 400 steps; rounded to the nearest, as in bitsandbytes, it stands still."""
    quiet = torch.arange(512) % 256 != 0
    out, exact = follow(BlockCodec(False, stochastic=True), 0.999, fading=True)
    assert abs(float(out[..., quiet].sum() / exact[..., quiet].sum()) - 1) < 0.03
    out, exact = follow(BlockCodec(False), 0.999, fading=True)
    assert float(out[..., quiet].sum() / exact[..., quiet].sum()) > 1.5
