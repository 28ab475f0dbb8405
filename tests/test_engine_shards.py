"""Sharding changes nothing: the interface that sharded engines implement, driven by shards in one process."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from hina_optim import HinaAdaptive
from tests.optim_cases import EVERYTHING, give, gradients, named_params
from tests.shards import run_sharded

STEPS = 8


def whole(dtype: torch.dtype, arguments: dict[str, Any]) -> list[torch.Tensor]:
    named = named_params(dtype)
    optimizer = HinaAdaptive(named, lr=3e-4, **arguments)
    for step in range(STEPS):
        give(named, step)
        optimizer.step()
    return [p.detach() for _, p in named]


@pytest.mark.parametrize("by_rows", [True, False], ids=["rows", "flat"])
@pytest.mark.parametrize("size", [1, 2, 3, 8])
@pytest.mark.parametrize("arguments", [{}, EVERYTHING], ids=["default", "all"])
def test_same_trajectory(arguments: dict[str, Any], size: int, by_rows: bool) -> None:
    """Uneven and empty shards included: 8 ranks share matrices of 2 to 9 rows."""
    expected = whole(torch.float64, arguments)
    start = [(name, p.detach()) for name, p in named_params(torch.float64)]
    found, _ = run_sharded(
        start,
        gradients,
        lambda named: HinaAdaptive(named, lr=3e-4, **arguments),
        size=size,
        steps=STEPS,
        by_rows=by_rows,
    )
    for (name, _), a, b in zip(start, expected, found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("size", [2, 3])
def test_float32_and_bf16_round_alike(size: int) -> None:
    """Stochastic rounding draws by global element: a shard of a bf16 parameter rounds as the whole one does."""
    for dtype, close in ((torch.float32, 1e-6), (torch.bfloat16, 0.0)):
        arguments = {
            "use_spd": False,
            "use_tam": False,
            "use_agr": False,
            "use_cautious": False,
            "use_dynamic_adaptation": False,
        }
        expected = whole(dtype, arguments)
        start = [(name, p.detach()) for name, p in named_params(dtype)]
        found, _ = run_sharded(
            start,
            gradients,
            lambda named, arguments=arguments: HinaAdaptive(named, lr=3e-4, **arguments),
            size=size,
            steps=STEPS,
            by_rows=True,
        )
        for a, b in zip(expected, found, strict=True):
            torch.testing.assert_close(a, b, rtol=close, atol=close)


def test_one_reduction_a_phase() -> None:
    """The number of reductions does not grow with the number of parameters."""
    start = [(name, p.detach()) for name, p in named_params(torch.float32)]
    counts = []
    for repeat in (1, 3):
        many = [(f"{name}.{i}", t) for i in range(repeat) for name, t in start]
        _, world = run_sharded(
            many,
            lambda step, repeat=repeat: gradients(step) * repeat,
            lambda named: HinaAdaptive(named, lr=3e-4, use_dynamic_adaptation=False, memory_efficient=False),
            size=2,
            steps=5,
            by_rows=True,
        )
        counts.append((world.reductions, world.agreements))
        assert world.gathers == 0
    # 5 steps of 3 phases (gradient sums, torque, cautious with projection decay). On the host: an agreement a step, and
    # at the start a look for zero weights and whether all ranks have made their state
    assert counts == [(5 * 3, 5 + 2)] * 2
