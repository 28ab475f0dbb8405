"""Compiled steps: the trajectory of eager ones, whole graphs only, and no recompilation while a schedule runs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters

from hina_optim import HinaAdaptive
from tests.optim_cases import EVERYTHING, NOTHING

LR = 3e-4
Params = list[nn.Parameter]


def build(shapes: list[tuple[int, ...]], dtype: torch.dtype, **arguments: Any) -> tuple[Params, HinaAdaptive]:
    generator = torch.Generator().manual_seed(0)
    params = [nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in shapes]
    return params, HinaAdaptive(params, lr=LR, **arguments)


def take_step(params: Params, optimizer: HinaAdaptive, step: int) -> None:
    """One step of a schedule; gradients have a drift, so that signs agree."""
    generator = torch.Generator().manual_seed(100 + step)
    for p in params:
        p.grad = (torch.randn(p.shape, generator=generator) + 0.3).to(p.dtype)
    optimizer.param_groups[0]["lr"] = LR * (1 - step / 20)
    optimizer.step()


def graphs() -> int:
    return int(counters["stats"]["unique_graphs"])


def run_both(
    shapes: list[tuple[int, ...]],
    dtype: torch.dtype = torch.float32,
    steps: int = 12,
    settled: int = 2,
    **arguments: Any,
) -> tuple[Params, Params, HinaAdaptive, HinaAdaptive]:
    """Eager and compiled side by side; after ``settled`` steps nothing is compiled any more, and no graph breaks."""
    torch._dynamo.reset()
    counters.clear()
    eager, first = build(shapes, dtype, **arguments)
    compiled, second = build(shapes, dtype, compile=True, **arguments)
    before = 0
    for step in range(steps):
        take_step(eager, first, step)
        assert graphs() == before, "eager steps compile nothing"
        take_step(compiled, second, step)
        if step >= settled:
            assert graphs() == before, f"compiled again in step {step + 1}"
        before = graphs()
    assert before > 0
    assert not counters["graph_break"]
    assert not counters["recompiles"]
    return eager, compiled, first, second


def compare(eager: Params, compiled: Params, first: HinaAdaptive, second: HinaAdaptive) -> None:
    for p, q in zip(eager, compiled, strict=True):
        torch.testing.assert_close(q, p, rtol=1e-5, atol=1e-6)
        for key, value in first.state[p].items():
            torch.testing.assert_close(
                second.state[q][key], value, rtol=2e-4, atol=1e-6, msg=lambda m, k=key: f"{k}: {m}"
            )


def test_compile_is_asked_for() -> None:
    """Without it nothing is compiled: a first step must not take minutes unasked."""
    counters.clear()
    params, optimizer = build([(3, 2)], torch.float32)
    take_step(params, optimizer, 0)
    assert graphs() == 0


@pytest.mark.slow
def test_default() -> None:
    """Two matrices that are stacked, and a vector; measuring steps and others."""
    compare(*run_both([(6, 5), (6, 5), (7,)], relationship_discovery_interval=4))


@pytest.mark.slow
def test_everything() -> None:
    """All techniques, Fourier transforms and singular values between the graphs."""
    options = {"relationship_discovery_interval": 2, "rank_interval": 2}
    compare(*run_both([(6, 5)], settled=2, **{**EVERYTHING, **options}))


def test_a_large_parameter_in_chunks() -> None:
    """Chunks of one size and a shorter last one: two graphs a phase at most, for any number of chunks."""
    compare(*run_both([(640, 500)], steps=4, settled=1, **{**NOTHING, "use_cautious": True}))
    assert graphs() <= 8


def test_bf16_with_stochastic_rounding() -> None:
    """The same noise: only where the last bit of float32 decides may a weight round to its other neighbor."""
    eager, compiled, _, _ = run_both([(64, 48)], torch.bfloat16, steps=6, settled=1, **NOTHING)
    p, q = eager[0].detach(), compiled[0].detach()
    moved = p != build([(64, 48)], torch.bfloat16)[0][0]
    assert moved.float().mean() > 0.2
    assert (p != q).float().mean() < 0.01
    torch.testing.assert_close(q, p, rtol=2**-6, atol=1e-6)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_bad_gradient(bad: float) -> None:
    """Compilers fold what only matters for values that are not finite."""
    params, optimizer = build([(5, 3), (5, 3)], torch.float32, compile=True, **NOTHING)
    for step in range(2):
        take_step(params, optimizer, step)
    before = [p.detach().clone() for p in params]
    moments = optimizer.state[params[0]]["exp_avg"].clone()
    params[0].grad[2, 1], params[1].grad[0, 0] = bad, 1.0  # type: ignore[index]
    optimizer.step()
    assert torch.equal(params[0], before[0]) and not torch.equal(params[1], before[1])
    assert torch.equal(optimizer.state[params[0]]["exp_avg"], moments)
    assert [float(optimizer.state[p]["skipped"]) for p in params] == [1.0, 0.0]


def test_learning_rate_as_a_tensor() -> None:
    """Numbers and tensors, in turns: the same graphs."""
    params, optimizer = build([(5, 3)], torch.float32, compile=True, **NOTHING)
    take_step(params, optimizer, 0)
    before = graphs()
    for step in range(1, 5):
        params[0].grad = torch.ones_like(params[0])
        optimizer.param_groups[0]["lr"] = torch.tensor(LR / step) if step % 2 else LR / step
        optimizer.step()
    assert graphs() == before
