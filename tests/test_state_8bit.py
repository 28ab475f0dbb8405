"""State in 8 bits inside the optimizers: what is stored how, conversions, reports, and training that tracks fp32."""

from __future__ import annotations

import copy
import logging
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hina_optim import AdaptiveHinaAdamW, Automagic_CameAMP, Automagic_CameAMP_8bit, HinaAdaptive
from hina_optim.state.blockwise import BlockCodec
from tests.every_optimizer import NAMES, give_large, large, make, reported
from tests.shards import run_sharded

Named = list[tuple[str, nn.Parameter]]


def trained(name: str, steps: int = 4, **arguments: Any) -> tuple[Named, Any]:
    named = large()
    optimizer = make(name, named, **arguments)
    for step in range(steps):
        give_large(named, step)
        reported(optimizer, step)
    return named, optimizer


@pytest.mark.parametrize("kind", ["normal", "negative", "constant"])
def test_what_does_not_change_stays(kind: str) -> None:
    """An average that is stored again in every step while it waits: no bias, whatever the sign of the largest."""
    shape = (1, 8, 512)
    generator = torch.Generator().manual_seed(0)
    x = {
        "normal": torch.randn(shape, generator=generator),
        "negative": -torch.rand(shape, generator=generator),
        "constant": -torch.ones(shape),
    }[kind]
    codec = BlockCodec(True, stochastic=True)
    noise = [torch.randint(2**16, shape, dtype=torch.int32, generator=generator) for _ in range(200)]
    first = now = codec.decode(codec.encode(x, noise[0]))
    for bits in noise[1:]:
        now = codec.decode(codec.encode(now, bits))
    assert (now - first).norm() <= 1e-3 * x.norm()
    assert (now.abs().amax() - x.abs().amax()).abs() <= 1e-6 * x.abs().amax()


def test_what_is_stored_how() -> None:
    """Blocks for long rows, 16 bits for short ones and vectors, fp32 for small parameters, masks wherever they pay.

    Signs share bytes where there are blocks.
    """
    named, optimizer = trained("AdaptiveHinaAdamW", state_precision="8bit")
    dtypes = {name: {k: v.dtype for k, v in optimizer.state[p].items()} for name, p in named}
    for name in ("blocks", "ragged", "kernel", "layer.lora_A.default.weight"):
        assert dtypes[name]["exp_avg"] == dtypes[name]["exp_avg_sq"] == dtypes[name]["lr_mask"] == torch.uint8, name
        assert dtypes[name]["exp_avg_scale"] == torch.float32
        assert dtypes[name]["last_sign"] == torch.uint8
    for name in ("layer.lora_B.default.weight", "vector"):
        assert dtypes[name]["exp_avg"] == torch.bfloat16 and dtypes[name]["lr_mask"] == torch.uint8
        assert dtypes[name]["last_sign"] == torch.int8
    assert dtypes["small"]["exp_avg"] == dtypes["small"]["lr_mask"] == torch.float32
    shapes = {
        name: tuple(optimizer.state[p]["exp_avg_scale"].shape)
        for name, p in named
        if "exp_avg_scale" in optimizer.state[p]
    }
    signs = {name: tuple(optimizer.state[p]["last_sign"].shape) for name, p in named}
    assert signs["blocks"] == (20, 64) and signs["ragged"] == (70, 75) and signs["kernel"] == (24, 45)
    assert shapes["blocks"] == (20, 1) and shapes["ragged"] == (70, 2) and shapes["kernel"] == (24, 1)


def test_forced_and_refused() -> None:
    """``force_8bit`` stores whatever has rows, ``min_8bit_size`` moves the limit."""
    named, optimizer = trained("AdaptiveHinaAdamW", state_precision="8bit", force_8bit=True)
    for _, p in named:  # the blocks of a vector would be cut anywhere where it is sharded
        assert optimizer.state[p]["exp_avg"].dtype == (torch.uint8 if p.ndim > 1 else torch.bfloat16)
    named, optimizer = trained("AdaptiveHinaAdamW", state_precision="8bit", min_8bit_size=10**6)
    assert all(optimizer.state[p]["exp_avg"].dtype == torch.float32 for _, p in named)


@pytest.mark.parametrize("by_rows", [True, False], ids=["rows", "flat"])
def test_a_shard_decides_nothing(by_rows: bool) -> None:
    """What is large, and has long rows, is so as a whole: pieces below both limits are stored as the whole is."""
    start = [("large", torch.randn(24, 256)), ("short", torch.randn(1024, 8)), ("small", torch.randn(15, 256))]
    kinds: dict[int, list[dict[str, dict[str, torch.dtype]]]] = {1: [], 4: []}
    for size, found in kinds.items():
        built: list[tuple[Any, Any]] = []

        def build(named: Any, built: list[tuple[Any, Any]] = built) -> Any:
            built.append((named, make("AdaptiveHinaAdamW", named, state_precision="8bit")))
            return built[-1][1]

        run_sharded(start, lambda _: [torch.ones_like(t) for _, t in start], build, size=size, steps=1, by_rows=by_rows)
        found += [{n: {k: v.dtype for k, v in o.state[p].items()} for n, p in named} for named, o in built]
        assert size == 1 or all(p.numel() < 4096 for named, _ in built for _, p in named), "no piece is large"
    (whole,) = kinds[1]
    assert all(piece == whole for piece in kinds[4])
    assert whole["large"]["exp_avg"] == whole["large"]["last_sign"] == torch.uint8
    assert whole["short"]["exp_avg"] == torch.bfloat16 and whole["small"]["exp_avg"] == torch.float32


@pytest.mark.parametrize("name", NAMES)
def test_conversions_keep_what_was_learned(name: str) -> None:
    """fp32 → 8 bits → fp32 in the middle of a training: state within the error of a block, and the training goes on."""
    named, optimizer = trained(name, state_precision="fp32")
    before = {n: {k: v.clone() for k, v in optimizer.state[p].items()} for n, p in named}
    expected, predicted = optimizer.state_bytes("8bit"), optimizer.state_bytes()
    saved = optimizer.set_state_precision("8bit")
    assert optimizer.state_bytes() == expected and saved == predicted - expected > 0
    assert optimizer.set_state_precision("fp32") == -saved
    for n, p in named:
        for key, value in optimizer.state[p].items():
            old = before[n][key]
            assert value.dtype == old.dtype and value.shape == old.shape, key
            if value.is_floating_point() and value.numel():
                # a block's error is 0.7 % of its largest value, which is at most that of the tensor
                assert (value - old).abs().max() <= 0.04 * old.abs().max() + 1e-12, (n, key)
    give_large(named, 4)
    reported(optimizer, 4)
    assert all(torch.isfinite(p).all() for _, p in named)


def test_bounds_of_a_mask_that_move_take_its_codes_along() -> None:
    """The levels belong to the bounds: when those change, the mask stays what it was."""
    named, optimizer = trained("AdaptiveHinaAdamW", state_precision="8bit")
    p = named[0][1]
    before = optimizer._buckets.decoded(p, "lr_mask")
    assert before is not None
    optimizer.param_groups[0]["max_lr"] = 5e-3
    optimizer.param_groups[0]["warmup_steps"] = 0
    give_large(named, 4)
    reported(optimizer, 4)
    after = optimizer._buckets.decoded(p, "lr_mask")
    assert after is not None
    torch.testing.assert_close(after, before, rtol=0.04, atol=0)


def test_the_report_counts_what_is_there() -> None:
    """Bytes are those of the tensors in the state; the fp32 figure is what a twin in fp32 really holds."""
    named, optimizer = trained("Automagic_CameAMP_8bit")
    twin = trained("Automagic_CameAMP")[1]
    report = optimizer.get_memory_efficiency_report()
    held = sum(v.numel() * v.element_size() for s in optimizer.state.values() for v in s.values())
    full = sum(v.numel() * v.element_size() for s in twin.state.values() for v in s.values())
    assert report["state_bytes"] == held and report["fp32_state_bytes"] == full
    assert report["memory_saved_mb"] == pytest.approx((full - held) / 1e6)
    total = sum(p.numel() for _, p in named)
    # lora_B and the small one are not in 8 bits, but the mask of lora_B is
    assert report["total_parameters"] == total and report["8bit_parameters"] == total - 35
    assert report["32bit_parameters"] == 35
    assert report["compression_ratio"] == pytest.approx((total - 35) / total)
    assert sum(b for sizes in report["states_breakdown"].values() for b in sizes.values()) == held
    fresh = Automagic_CameAMP_8bit(large(), lr=1e-4).get_memory_efficiency_report()
    assert fresh["state_bytes"] == 0 and fresh["memory_saved_mb"] == 0.0


def test_an_8bit_class_says_so_and_can_be_told_otherwise() -> None:
    assert Automagic_CameAMP_8bit([nn.Parameter(torch.ones(2))]).param_groups[0]["state_precision"] == "8bit"
    plain = Automagic_CameAMP_8bit([nn.Parameter(torch.ones(2))], state_precision="fp32")
    assert plain.param_groups[0]["state_precision"] == "fp32"
    assert Automagic_CameAMP([nn.Parameter(torch.ones(2))]).param_groups[0]["state_precision"] == "fp32"
    assert HinaAdaptive([nn.Parameter(torch.ones(2))], reduce_precision=True).defaults["state_precision"] == "bf16"


@pytest.mark.slow
@pytest.mark.parametrize("cls", [HinaAdaptive, AdaptiveHinaAdamW, Automagic_CameAMP])
def test_training_tracks_fp32(cls: Any) -> None:
    """500 steps of a small regression with noise: the loss of 8 bits within 1 %, the mean mask within 2 %."""
    results = []
    for precision in ("fp32", "8bit"):
        generator = torch.Generator().manual_seed(0)
        target = torch.randn(32, 256, generator=generator) / 16
        w = nn.Parameter(torch.zeros(32, 256))
        optimizer = cls([("w", w)], lr=1e-3, max_lr=2e-3, warmup_steps=300, weight_decay=0.0, state_precision=precision)
        for _ in range(500):
            x = torch.randn(64, 256, generator=generator)
            error = x @ (w.detach() - target).t() + 0.1 * torch.randn(64, 32, generator=generator)
            w.grad = error.t() @ x / 64
            optimizer.step()
        x = torch.randn(4096, 256, generator=generator)
        loss: Tensor = (
            (x @ (w.detach() - target).t() + 0.1 * torch.randn(4096, 32, generator=generator)).square().mean()
        )
        mask = optimizer._buckets.decoded(w, "lr_mask")
        results.append((float(loss), float(mask.mean())))
    (loss, mask), (loss8, mask8) = results
    start = float(target.square().sum(1).mean()) + 0.01
    assert loss < 0.5 * start, "nothing was learned"
    assert abs(loss8 / loss - 1) < 0.01, results
    assert abs(mask8 / mask - 1) < 0.02, results


def test_a_copy_shares_nothing() -> None:
    named, optimizer = trained("Automagic_CameAMP_8bit")
    twin, theirs = copy.deepcopy((optimizer, named))
    give_large(named, 4)
    reported(optimizer, 4)
    for (_, p), (_, q) in zip(named, theirs, strict=True):
        for key, value in twin.state[q].items():
            assert value.data_ptr() != optimizer.state[p][key].data_ptr() or not value.numel()


@pytest.mark.parametrize(
    ("saved", "built"), [("fp32", "8bit"), ("8bit", "bf16"), ("bf16", "fp32"), ("4bit", "8bit"), ("8bit", "4bit")]
)
def test_a_checkpoint_in_another_precision_is_said(saved: str, built: str, caplog: pytest.LogCaptureFixture) -> None:
    """A state dict brings its options: state goes on as it was saved, and is converted on request."""
    named, optimizer = trained("HinaAdaptive", state_precision=saved)
    fresh = make("HinaAdaptive", large(), state_precision=built)
    with caplog.at_level(logging.WARNING, "hina_optim"):
        fresh.load_state_dict(optimizer.state_dict())
    (line,) = [record.getMessage() for record in caplog.records if "checkpoint" in record.getMessage()]
    assert f"goes on in {saved}" in line and f"set_state_precision('{built}')" in line
    assert fresh.state_bytes() == optimizer.state_bytes()
    for one in (fresh, optimizer):
        one.set_state_precision(built)
    for p, (_, q) in zip(fresh.param_groups[0]["params"], named, strict=True):
        assert fresh.state[p].keys() == optimizer.state[q].keys()
        assert all(torch.equal(value, optimizer.state[q][name]) for name, value in fresh.state[p].items())
    caplog.clear()
    same = make("HinaAdaptive", large(), state_precision=built)
    same.load_state_dict(optimizer.state_dict())
    assert not [record for record in caplog.records if "checkpoint" in record.getMessage()]
