"""Stochastic rounding: exact on average, the same everywhere; and what low precision costs with it and without."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from hina_optim import HinaAdaptive
from hina_optim.state.precision import Storage, TensorCodec, codec_for
from hina_optim.state.rounding import element_words, param_seeds, round_stochastic, stream_noise
from hina_optim.state.slot import Slot

BF16, FP16 = torch.bfloat16, torch.float16
LOW = [BF16, FP16]


def noise(
    shape: tuple[int, ...], seed: int = 0, step: int = 0, keys: list[int] | None = None, stream: int = 0
) -> Tensor:
    """As the engine draws it: ``[N, *shape]``, for as many parameters as there are keys."""
    keys = keys or [0]
    seeds = param_seeds(torch.tensor(keys, dtype=torch.int32), seed, step)
    index = torch.arange(math.prod(shape)).reshape(1, *shape).to(torch.int32)
    return stream_noise(element_words(seeds.reshape(-1, *([1] * len(shape))), index), stream)


def neighbors(x: float, dtype: torch.dtype) -> tuple[float, float]:
    """The representable values next to ``x``, below (or equal) and above (or equal)."""
    nearest = torch.tensor(x, dtype=torch.float64).to(dtype)
    step = torch.tensor(math.inf, dtype=dtype)
    up = nearest if float(nearest) >= x else torch.nextafter(nearest, step)
    down = nearest if float(nearest) <= x else torch.nextafter(nearest, -step)
    return float(down), float(up)


# -- rounding ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize(
    "x", [1.0009765, -1.0031, 3.1415926, -2.5e4, 6.1e-5, -6.05e-5, 3.3e-6, -1.23e-7, 4e-8, 1e-3, 255.7, 0.99999]
)
def test_exact_on_average(dtype: torch.dtype, x: float) -> None:
    """Every draw is one of the two neighbors; the mean of 100,000 is the value, within five standard errors."""
    count = 100_000
    draws = round_stochastic(torch.full((1, count), x), noise((count,)), dtype).double()
    exact = float(torch.tensor(x))
    low, high = neighbors(exact, dtype)
    assert set(draws.unique().tolist()) <= {low, high}
    share = (exact - low) / (high - low) if high > low else 0.0
    error = (high - low) * math.sqrt(share * (1 - share) / count)
    assert abs(float(draws.mean()) - exact) <= 5 * error + (high - low) * 2.0**-12
    if 0.01 < share < 0.99:
        assert draws.unique().numel() == 2


@pytest.mark.parametrize("dtype", LOW)
def test_what_is_representable_stays(dtype: torch.dtype) -> None:
    """All 65,536 bit patterns, subnormal numbers, zeros of both signs and infinities: no noise moves them."""
    every = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int16).view(dtype)
    every = every[~every.isnan()]
    most = torch.full((1, every.numel()), 0xFFFF, dtype=torch.int32)
    least = torch.zeros_like(most)
    for bits in (most, least, noise((every.numel(),))):
        rounded = round_stochastic(every.float()[None], bits, dtype)[0]
        assert torch.equal(rounded, every)


@pytest.mark.parametrize("dtype", LOW)
def test_not_a_number_stays_one(dtype: torch.dtype) -> None:
    """Not even one whose bits the carry would turn into those of a number (all ones: the NaN that a GPU makes)."""
    patterns = [0x7FFFFFFF, -1, 0x7FC00000, 0x7F800001, 0x7F800000, -(1 << 23)]
    x = torch.tensor(patterns, dtype=torch.int32).view(torch.float32)
    for bits in (0, 1, 0xFFFF):
        rounded = round_stochastic(x, torch.full((6,), bits, dtype=torch.int32), dtype)
        assert torch.equal(rounded.isnan(), torch.tensor([True, True, True, True, False, False]))
        assert torch.equal(rounded[4:].float(), torch.tensor([math.inf, -math.inf]))


def test_beyond_the_range() -> None:
    """What is too large for float16 becomes infinite, as in a cast; what fits does not."""
    x = torch.tensor([65504.0, 65600.0, -70000.0, 1e30])
    for bits in (0, 0xFFFF):
        rounded = round_stochastic(x, torch.full((4,), bits, dtype=torch.int32), FP16)
        assert rounded[0] == 65504.0
    assert torch.equal(rounded[1:], torch.tensor([math.inf, -math.inf, math.inf], dtype=FP16))


@pytest.mark.parametrize("dtype", LOW)
def test_rounding_is_monotonic_and_odd(dtype: torch.dtype) -> None:
    """With the same noise, a larger value never becomes smaller; magnitudes are rounded alike for both signs."""
    x = torch.linspace(-3, 3, 5001) ** 5 * 1e-3
    bits = torch.full_like(x, 0, dtype=torch.int32) + 12345
    positive = x[x > 6.2e-5]
    rounded = round_stochastic(positive, bits[x > 6.2e-5], dtype)
    assert (rounded[1:] >= rounded[:-1]).all()
    assert torch.equal(round_stochastic(-positive, bits[x > 6.2e-5], dtype), -rounded)


# -- the noise -----------------------------------------------------------------------------------------------------


def test_noise_is_uniform_and_independent() -> None:
    """Every bit is set half of the time, whatever the others; neighbors in any direction do not know of each other."""
    draws = noise((64, 256), keys=list(range(16)))
    assert draws.dtype == torch.int32 and draws.min() == 0 and draws.max() == 0xFFFF
    bits = torch.stack([(draws >> b) & 1 for b in range(16)]).double()
    count = draws.numel()
    assert (bits.mean((1, 2, 3)) - 0.5).abs().max() < 5 * 0.5 / math.sqrt(count)
    unit = (draws.double() + 0.5) / 2**16 - 0.5
    for other in (unit.roll(1, 0), unit.roll(1, 1), unit.roll(1, 2), unit.roll(64, 2)):
        assert abs(float((unit * other).mean()) * 12) < 5 / math.sqrt(count)


@pytest.mark.parametrize("stream", [0, 1, 5, 17])
@pytest.mark.parametrize("step", [0, 1, 1000])
def test_noise_has_no_period(step: int, stream: int) -> None:
    """Of all distances between two elements there is none at which draws agree more than by chance."""
    n = 1 << 18
    unit = (noise((n,), step=step, stream=stream)[0].double() + 0.5) / 2**16 - 0.5
    power = torch.fft.rfft(torch.cat([unit, torch.zeros(n)])).abs().square()
    correlation = torch.fft.irfft(power)[1 : n // 2] * 12 / n
    assert correlation.abs().max() * math.sqrt(n) < 6
    assert torch.fft.rfft(unit).abs().square()[1:].max() * 12 / n < 25


def test_streams_of_one_word_are_independent() -> None:
    """Draws from one word: in pairs, they fill the square evenly, and no draw of one moves another."""
    n, streams = 1 << 18, 20
    draws = torch.cat([noise((n,), seed=4, stream=k) for k in range(streams)])
    unit = (draws.double() + 0.5) / 2**16 - 0.5
    correlation = torch.corrcoef(unit) - torch.eye(streams)
    assert correlation.abs().max() * math.sqrt(n) < 5.5
    cells, expected = 32, n / 32**2
    for a in range(streams):
        for b in range(a):
            pair = (draws[a] // 2048) * cells + draws[b] // 2048
            excess = (pair.bincount(minlength=cells**2) - expected).square().sum() / expected - (cells**2 - 1)
            assert excess < 7 * math.sqrt(2 * cells**2)


def test_noise_of_an_element_is_uniform_over_time() -> None:
    """Of one element, over 100,000 steps: every sixteenth of the range as often, whatever it was the step before."""
    steps = 100_000
    seeds = torch.cat([param_seeds(torch.tensor([5], dtype=torch.int32), 0, step) for step in range(0, steps, 50)])
    index = torch.full((1, 50), 77, dtype=torch.int32) + torch.arange(50, dtype=torch.int32) * 1000
    draws = stream_noise(element_words(seeds[:, None], index), 3)
    counts = torch.stack([row.bincount(minlength=16) for row in (draws >> 12).T]).double()
    each = steps / 50
    assert ((counts - each / 16).square().sum(1) / (each / 16) - 15).abs().max() < 5.5 * math.sqrt(30)
    unit = draws.double() / 2**16 - 0.5
    assert ((unit[1:] * unit[:-1]).mean(0) * 12).abs().max() * math.sqrt(each) < 5


def test_noise_is_the_same_again_and_differs_by_everything() -> None:
    base = noise((1000,), seed=1, step=5, keys=[3], stream=0)
    assert torch.equal(base, noise((1000,), seed=1, step=5, keys=[3], stream=0))
    others = {
        "seed": noise((1000,), seed=2, step=5, keys=[3]),
        "step": noise((1000,), seed=1, step=6, keys=[3]),
        "parameter": noise((1000,), seed=1, step=5, keys=[4]),
        "group": noise((1000,), seed=1, step=5, keys=[(1 << 24) | 3]),
        "stream": noise((1000,), seed=1, step=5, keys=[3], stream=1),
        "negative seed": noise((1000,), seed=-1, step=5, keys=[3]),
        "large seed": noise((1000,), seed=2**40 + 1, step=5, keys=[3]),
    }
    for what, other in others.items():
        equal = (base == other).float().mean()
        assert what == "large seed" or equal < 0.01, what
        correlation = torch.corrcoef(torch.stack([base[0].double(), other[0].double()]))[0, 1]
        assert what == "large seed" or abs(correlation) < 0.16, what


def test_a_shard_draws_what_the_whole_draws_there() -> None:
    seeds = param_seeds(torch.tensor([7, 8], dtype=torch.int32), 0, 3).reshape(2, 1)
    index = torch.arange(1000, dtype=torch.int32).reshape(1, -1)
    whole = stream_noise(element_words(seeds, index), 2)
    for start, stop in ((0, 13), (13, 700), (700, 1000), (500, 500)):
        assert torch.equal(stream_noise(element_words(seeds, index[:, start:stop]), 2), whole[:, start:stop])


def test_elements_beyond_four_billion() -> None:
    """Indices are wrapped to 32 bits, without an error."""
    index = torch.tensor([[2**31 - 1, 2**31, 2**32 - 1, 2**32]]).to(torch.int32)
    seed = param_seeds(torch.tensor([0], dtype=torch.int32), 0, 0).reshape(1, 1)
    draws = stream_noise(element_words(seed, index), 0)
    assert draws[0, :3].unique().numel() == 3


def test_long_trainings_and_odd_keys() -> None:
    """Steps beyond 2³² and any 32-bit key give noise."""
    keys = torch.tensor([-(2**31), -1, 0, 2**31 - 1], dtype=torch.int32)
    seen = {tuple(param_seeds(keys, 0, step).tolist()) for step in (0, 1, 2**31, 2**32, 2**32 + 1)}
    assert len(seen) == 5


# -- state in low precision ----------------------------------------------------------------------------------------


def test_codecs_keep_what_must_be_kept() -> None:
    """A technique names the lowest precision it tolerates; a user's choice never goes below."""
    expected = {
        ("state", "fp32"): torch.float32,
        ("state", "bf16"): BF16,
        ("fp32", "bf16"): torch.float32,
        ("int8", "bf16"): torch.int8,
        ("param", "bf16"): FP16,
    }
    for (slot, precision), dtype in expected.items():
        codec = codec_for(Slot("x", precision=slot), Storage(precision), FP16, (8,))  # type: ignore[arg-type]
        assert codec.parts == {"": dtype}
        assert codec.noisy == ((slot, precision) == ("state", "bf16"))
    assert codec_for(Slot("x", shape=(4,)), Storage("bf16"), BF16, (8,)).parts == {"": torch.float32}
    assert codec_for(Slot("x"), Storage("fp32"), torch.float64, (8,)).parts == {"": torch.float64}
    with pytest.raises(ValueError, match="state_precision='fp8'"):
        Storage("fp8")


@pytest.mark.parametrize("decay", [0.99, 0.999])
def test_an_average_in_bf16_decays(decay: float) -> None:
    """Rounded to nearest, 0.999·v is v again, and a second moment never forgets; rounded stochastically it does."""
    codec = TensorCodec(BF16, stochastic=True)
    stochastic, nearest = torch.ones(1, 4096, dtype=BF16), torch.ones(1, 4096, dtype=BF16)
    steps = 1000
    for step in range(steps):
        value = decay * codec.decode({"": stochastic})
        stochastic = codec.encode(value, noise((4096,), step=step))[""]
        nearest = TensorCodec(BF16).encode(decay * nearest.float(), None)[""]
    exact = decay**steps
    assert float(stochastic.double().mean()) == pytest.approx(exact, rel=0.05, abs=1e-6)
    if decay == 0.999:
        assert float(nearest.float().mean()) > 0.9


def test_a_second_moment_in_bf16_forgets() -> None:
    """In the optimizer itself: after large gradients come small ones."""
    moments = {}
    for precision in ("fp32", "bf16"):
        p = nn.Parameter(torch.zeros(32, 32))
        optimizer = HinaAdaptive([p], lr=1e-4, state_precision=precision, use_adopt_stability=False)  # type: ignore[arg-type]
        for step in range(400):
            generator = torch.Generator().manual_seed(step)
            p.grad = torch.randn(32, 32, generator=generator) * (10.0 if step < 3 else 1e-3)
            optimizer.step()
        moments[precision] = float(optimizer.state[p]["exp_avg_sq"].double().mean())
    assert moments["bf16"] == pytest.approx(moments["fp32"], rel=0.02)


@pytest.mark.parametrize(("lr", "bump"), [(1e-3, 3e-6), (1e-4, 3e-7), (2e-5, 1e-6)])
def test_a_mask_in_bf16_follows_that_of_fp32(lr: float, bump: float) -> None:
    """Bumps smaller than the last bit must not vanish: the mean stays within 2 % over 500 steps."""
    masks: dict[str, list[float]] = {}
    for precision in ("fp32", "bf16"):
        p = nn.Parameter(torch.zeros(48, 32))
        optimizer = HinaAdaptive(
            [p],
            lr=lr,
            state_precision=precision,
            lr_bump=bump,
            warmup_steps=600,
            max_lr=1e-2,
            use_dynamic_adaptation=False,
        )  # type: ignore[arg-type]
        masks[precision] = []
        for step in range(500):
            generator = torch.Generator().manual_seed(step)
            # a drift in half of the elements: their signs agree more often than not
            p.grad = torch.randn(48, 32, generator=generator) + torch.linspace(0, 2, 48)[:, None]
            optimizer.step()
            if step % 100 == 99:
                masks[precision].append(float(optimizer.state[p]["lr_mask"].double().mean()))
    assert masks["bf16"] == pytest.approx(masks["fp32"], rel=0.02)
    assert masks["fp32"][-1] > lr * 1.03  # it moved: by more than the tolerance


# -- weights in low precision --------------------------------------------------------------------------------------


def trained(dtype: torch.dtype, rounding: str, seed: int = 0) -> tuple[Tensor, float]:
    """Weights pulled towards a target by steps far below their last bit; the distance that is left."""
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(64, 48, generator=generator).to(dtype).float() + 0.0
    goal = start + 0.02 * torch.randn(64, 48, generator=generator).sign()
    p = nn.Parameter(start.to(dtype, copy=True))
    optimizer = HinaAdaptive(
        [p],
        lr=1e-4,
        weight_decay=0.0,
        rounding=rounding,  # type: ignore[arg-type]
        seed=seed,
        use_lr_mask=False,
        use_spd=False,
        use_agr=False,
        use_dynamic_adaptation=False,
    )
    for _ in range(150):
        p.grad = (p.detach().float() - goal).to(dtype)
        optimizer.step()
    return p.detach(), float((p.detach().float() - goal).norm() / (start - goal).norm())


@pytest.mark.parametrize("dtype", LOW)
def test_small_updates_arrive(dtype: torch.dtype) -> None:
    """Nearest rounding loses them; stochastic rounding and Kahan summation go where float32 goes."""
    weights, expected = trained(torch.float32, "nearest")
    errors = {}
    for rounding in ("nearest", "stochastic", "kahan"):
        got, left = trained(dtype, rounding)
        errors[rounding] = abs(left - expected), float((got.float() - weights).mean().abs())
    assert expected < 0.5
    # what stochastic rounding leaves is the width of a last bit, not a loss of updates
    assert errors["kahan"][0] < 0.03 and errors["stochastic"][0] < 0.1, errors
    if dtype == BF16:
        assert errors["nearest"][0] > 0.25, errors


def test_rounding_of_weights_is_repeatable() -> None:
    first, again, other = (trained(BF16, "stochastic", seed)[0] for seed in (3, 3, 4))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
