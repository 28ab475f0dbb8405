"""State in 4 bits: two codes a byte, one bit a sign; what keeps 8 bits; and what it can follow."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._dynamo.utils import counters

from hina_optim import Automagic_CameAMP, Automagic_CameAMP_Improved_8Bit, HinaAdaptive
from hina_optim.state.blockwise import BlockCodec, LogCodec
from hina_optim.state.codebooks import dynamic_map, log_levels
from hina_optim.state.packing import pack, packed_length, unpack
from hina_optim.state.precision import Storage, TensorCodec, codec_for, decoded
from hina_optim.state.signs import SignCodec
from hina_optim.state.slot import EXP_AVG, EXP_AVG_SQ, Slot
from tests.optim_cases import NOTHING
from tests.traced import traced

MASK = Slot("lr_mask", init="start_lr", code=(1e-7, 1e-6, 1e-3))
SIGN = Slot("last_sign", precision="int8", code="ternary")
LONG = Slot("exp_avg_long", code="signed", slow=True)
FOUR = Storage("4bit", min_8bit_size=1024)
SHAPES = {"odd": (9, 131), "kernels": (8, 6, 3, 3)}


def noise_like(value: Tensor, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 1 << 16, value.shape, generator=generator, dtype=torch.int32)


# -- codes -------------------------------------------------------------------------------------------------------------


@settings(max_examples=200, deadline=None)
@given(st.sampled_from([1, 2, 4]), st.integers(0, 40), st.integers(0, 7), st.integers(0, 5), st.booleans())
def test_what_is_packed_is_unpacked(bits: int, n: int, lead: int, rows: int, slice_: bool) -> None:
    lead %= 8 // bits
    generator = torch.Generator().manual_seed(n)
    codes = torch.randint(0, 1 << bits, (rows, n + 1), generator=generator, dtype=torch.uint8)
    codes = codes[:, 1:] if slice_ else codes[:, :-1].contiguous()
    packed = pack(codes, bits, lead)
    assert packed.shape == (rows, packed_length(n, bits, lead)) and packed.dtype == torch.uint8
    back = unpack(packed, bits)
    assert torch.equal(back[:, lead : lead + n], codes)
    assert not back[:, :lead].any() and not back[:, lead + n :].any()
    for i in range(n if rows else 0):  # plainly: the first in the lowest bits
        place = (lead + i) * bits
        assert int(packed[0, place // 8]) >> place % 8 & ((1 << bits) - 1) == int(codes[0, i])


def test_levels() -> None:
    """Centers of four, two and one equal intervals of three decades, on either side; zero and one."""
    positive = [0.0055, 0.0325, 0.0775, 0.2125, 0.4375, 0.6625, 0.8875]
    assert dynamic_map(True, 4).tolist() == pytest.approx([*(-x for x in reversed(positive)), 0.0, *positive, 1.0])
    masks = log_levels(1e-7, 1e-6, 1e-3, 4).tolist()
    assert len(masks) == 16 and {masks[0], masks[-1]} == {*torch.tensor([1e-7, 1e-3]).tolist()}
    assert float(torch.tensor(1e-6)) in masks


def test_how_near_the_nearest_level_is() -> None:
    """Within half the widest gap of the largest of a block; the largest, whatever its sign, and zero are exact."""
    value = torch.randn(4, 5, 333, generator=torch.Generator().manual_seed(0))
    value[0, 0, 7] = 0.0
    codec = BlockCodec(True, 128, bits=4, packed=True)
    parts = codec.encode(value, None)
    assert parts[""].shape == (4, 5, 167) and parts["_scale"].shape == (4, 5, 3)
    out = decoded(codec, parts, value.shape)
    assert out[0, 0, 7] == 0.0
    for begin in range(0, 333, 128):
        block, found = value[..., begin : begin + 128], out[..., begin : begin + 128]
        largest = block.abs().amax(-1, keepdim=True)
        assert ((found - block).abs() <= 0.1127 / 0.8875 * largest).all()
        lowest = block.amin(-1)
        sole = lowest.abs() >= block.amax(-1) / 0.8875  # the scale is made for it
        torch.testing.assert_close(found.amin(-1)[sole], lowest[sole])


@pytest.mark.parametrize(
    ("codec", "scale"),
    [
        (BlockCodec(True, 128, stochastic=True, bits=4, packed=True), 1.0),
        (LogCodec(1e-7, 1e-6, 1e-3, bits=4, packed=True), 1e-3),
    ],
)
def test_the_expected_value_is_exact(codec: BlockCodec | LogCodec, scale: float) -> None:
    value = torch.rand(1, 1, 129, generator=torch.Generator().manual_seed(0)) * scale
    value = value * 2 - scale if isinstance(codec, BlockCodec) else value
    draws = 4000
    total = torch.zeros_like(value)
    for seed in range(draws):
        total += decoded(codec, codec.encode(value, noise_like(value, seed)), value.shape)
    # of one draw at most half a gap; of the widest gaps a quarter of the range
    assert float((total / draws - value).abs().max()) < 5 * 0.15 * scale / draws**0.5


@pytest.mark.parametrize("shape", [(3, 17), (5, 129), (2, 3, 5, 3)])
def test_a_shard_of_rows_is_a_slice(shape: tuple[int, ...]) -> None:
    value = torch.rand(2, *shape, generator=torch.Generator().manual_seed(1)) * 1e-3
    for codec in (BlockCodec(True, 128, bits=4, packed=True), LogCodec(1e-7, 1e-6, 1e-3, bits=4, packed=True)):
        parts = codec.encode(value, None)
        for suffix, part in codec.encode(value[:, 1:], None).items():
            assert torch.equal(part, parts[suffix][:, 1:])


def test_signs_in_one_bit() -> None:
    codec = SignCodec(bits=1)
    value = torch.randint(-1, 2, (2, 3, 21), generator=torch.Generator().manual_seed(0)).float()
    parts = codec.encode(value, None)
    assert parts[""].shape == (2, 3, 3)
    assert torch.equal(decoded(codec, parts, value.shape), torch.where(value < 0, -1.0, 1.0))


# -- what is stored so -------------------------------------------------------------------------------------------------


def test_what_takes_how_many_bits() -> None:
    """Fast moments, masks and signs take 4, 4 and 1; what is slow or divided by keeps 8; what has no rows, as in 8."""
    matrix, kernels = (64, 100), (40, 8, 3, 3)
    for shape in (matrix, kernels):
        kinds = [codec_for(slot, FOUR, torch.float32, shape) for slot in (EXP_AVG, MASK, SIGN, LONG, EXP_AVG_SQ)]
        assert [getattr(codec, "bits", None) for codec in kinds] == [4, 4, 1, 8, 8]
        assert [codec.per_byte for codec in kinds] == [2, 2, 8, 1, 1]
    eight = Storage("8bit", min_8bit_size=1024)
    for shape in ((5000,), (512, 4), (8, 100)):  # a vector, short rows, too small
        for slot in (EXP_AVG, MASK, SIGN, LONG, EXP_AVG_SQ):
            assert codec_for(slot, FOUR, torch.float32, shape) == codec_for(slot, eight, torch.float32, shape)
    assert isinstance(codec_for(SIGN, FOUR, torch.float32, (8, 100)), TensorCodec)


def test_the_profile_for_the_least_memory() -> None:
    """1.2 bytes a parameter of a large matrix: moment, mask and signs; other arguments override it."""
    weight = nn.Parameter(torch.randn(512, 2048) / 32)
    optimizer = Automagic_CameAMP_Improved_8Bit([("w", weight)], profile="memory_optimized", lr=1e-4)
    optimizer.init_state()
    assert {"exp_avg", "lr_mask", "last_sign"} <= optimizer.state[weight].keys()
    assert optimizer.state_bytes() / weight.numel() < 1.2
    more = Automagic_CameAMP_Improved_8Bit([weight], profile="memory_optimized", lr=1e-4, state_precision="8bit")
    assert more.param_groups[0]["state_precision"] == "8bit"


@pytest.mark.slow
def test_compiled_as_eager() -> None:
    """Traced in full: an odd row, kernels, and signs."""
    found: list[dict[str, Tensor]] = []
    for compiled in (False, True):
        torch._dynamo.reset()
        counters.clear()
        generator = torch.Generator().manual_seed(0)
        named = [(n, nn.Parameter(torch.randn(s, generator=generator) / 8)) for n, s in SHAPES.items()]
        optimizer = Automagic_CameAMP(named, lr=1e-4, state_precision="4bit", min_8bit_size=0, compile=compiled)
        with traced():
            for _ in range(3):
                for _, p in named:
                    p.grad = torch.randn(p.shape, generator=generator)
                optimizer.step()
        assert (counters["stats"]["unique_graphs"] > 0) == compiled
        assert all(optimizer.state[p][k].dtype == torch.uint8 for _, p in named for k in ("exp_avg", "last_sign"))
        held = [(n, {**optimizer.state[p], "weight": p.detach()}) for n, p in named]
        found.append({f"{n} {k}": v.clone() for n, state in held for k, v in state.items()})
    eager, graphs = found
    for key, value in eager.items():
        torch.testing.assert_close(graphs[key], value, rtol=1e-6, atol=1e-8, msg=lambda m, k=key: f"{k}: {m}")


# -- what it can follow ------------------------------------------------------------------------------------------------


def moments(precision: str, gradients: list[Tensor]) -> Tensor:
    weight = nn.Parameter(torch.zeros_like(gradients[0]))
    given = {**NOTHING, "state_precision": precision, "min_8bit_size": 0, "betas": (0.9, 0.999)}
    optimizer = HinaAdaptive([("w", weight)], lr=1e-4, **given)  # type: ignore[arg-type]
    for gradient in gradients:
        weight.grad = gradient.clone()
        optimizer.step()
    return optimizer._buckets.decoded(weight, "exp_avg")


def test_a_moment_turns_with_its_gradient() -> None:
    """Where rounding to the nearest would hold it: a step moves it by less than half the distance of two levels."""
    first = torch.full((16, 128), 0.5)
    first[:, 0] = 1.0  # the largest of each block, which goes on as it was
    second = first.clone()
    second[:, 1:] = -0.5
    end = moments("4bit", [first] * 20 + [second] * 40)
    exact = moments("fp32", [first] * 20 + [second] * 40)
    codec, stuck = BlockCodec(True, 128, bits=4, packed=True), first.clone()
    for _ in range(40):
        stuck = decoded(codec, codec.encode((0.9 * stuck + 0.1 * second)[None], None), (1, 16, 128))[0]
    assert (stuck[:, 1:] > 0).all(), "to the nearest, it never would"
    assert (exact[:, 1:] < -0.45).all()
    assert (end[:, 1:] < 0).double().mean() > 0.95
    assert abs(float(end[:, 1:].mean() / exact[:, 1:].mean()) - 1) < 0.05


def test_signs_in_one_bit_move_the_mask_as_others_do() -> None:
    """Nothing is bumped in the first step, when there are no signs yet; then they are those of two bits."""
    found: dict[str, list[Tensor]] = {}
    for precision in ("fp32", "4bit"):
        weight = nn.Parameter(torch.zeros(16, 64))
        optimizer = HinaAdaptive(
            [("w", weight)],
            lr=1e-4,
            state_precision=precision,
            min_8bit_size=0,
            warmup_steps=20,  # type: ignore[arg-type]
        )
        generator = torch.Generator().manual_seed(0)
        for step in range(5):
            weight.grad = torch.randn(16, 64, generator=generator)
            optimizer.step()
            if step == 0:
                mask = optimizer._buckets.decoded(weight, "lr_mask")
                assert torch.equal(mask, torch.full_like(mask, 1e-4))
            found.setdefault(precision, []).append(optimizer._buckets.decoded(weight, "last_sign"))
    for exact, stored in zip(found["fp32"], found["4bit"], strict=True):
        assert torch.equal(exact, stored)
