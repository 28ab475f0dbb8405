"""The engines of the matrix give what they promise: torch's own AdamW has the same trajectory on all of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.sharded.engines import ENGINES, build, gradients, joined
from tests.sharded.world import run

STEPS = 5
CASES = [(name, size) for name, engine in ENGINES.items() for size in engine.sizes if size > 1]


def trained(rank: int, engine: str, real: bool) -> dict[str, tuple[Tensor, Tensor]]:
    built = build(engine)
    optimizer = torch.optim.AdamW([p for _, p in built.named], lr=1e-3, foreach=False)
    for step in range(STEPS):
        if real:
            built.backward(step)
        else:
            built.give(gradients(built.shapes, step))
        optimizer.step()
    return built.pieces()


def expected(real: bool) -> tuple[dict[str, Tensor], dict[str, tuple[int, ...]]]:
    shapes = build("one").shapes
    return joined([trained(0, "one", real)], shapes), shapes


@pytest.mark.parametrize(("engine", "size"), CASES)
def test_given_gradients_reach_their_elements(engine: str, size: int) -> None:
    """To the bit: AdamW looks at one element at a time."""
    whole, shapes = expected(real=False)
    found = joined(run(trained, size, engine, False), shapes)
    for name in shapes:
        assert torch.equal(found[name], whole[name]), name


@pytest.mark.parametrize(("engine", "size"), [(e, n) for e, n in CASES if not ENGINES[e].looser])
def test_real_gradients_are_those_of_one_process(engine: str, size: int) -> None:
    whole, shapes = expected(real=True)
    found: dict[str, Any] = joined(run(trained, size, engine, True), shapes)
    for name in shapes:
        # AdamW's first steps are ±lr wherever a gradient is not exactly zero: rounding shows where it is almost
        error = (found[name] - whole[name]).abs()
        assert error.max() < STEPS * 2e-3 and error.mean() < 1e-6, name
