"""The simulation of benchmarks/sharding.py says what real processes send and hold."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from benchmarks.sharding import Costs, simulate, unbudgeted
from hina_lightning.sharding import bind
from hina_optim import create_optimizer
from hina_optim.engine.axes import Axis
from tests.sharded.engines import build
from tests.sharded.flat import initialized
from tests.sharded.world import run

SENT: list[int] = []
#: Rows and elements that divide by 4, as the first rank's share is then that of all.
SHAPES: dict[str, tuple[int, ...]] = {
    "wide": (24, 40),
    "tall": (64, 8),
    "low.lora_A.default.weight": (4, 64),
    "bias": (16,),
}
#: In the order in which the model has them; rows that four ranks cut, and two cut one of them.
CUT: dict[str, tuple[int, ...]] = {"bias": (16,), "one": (25, 50), "other": (63, 20)}


class Several(nn.Module):
    """Parameters of these shapes, and a loss that reaches all of them."""

    def __init__(self, shapes: dict[str, tuple[int, ...]]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.all = nn.ParameterDict({name.replace(".", "/"): torch.randn(shape) for name, shape in shapes.items()})

    def named(self) -> list[tuple[str, nn.Parameter]]:
        return [(name.replace("/", "."), p) for name, p in self.all.items()]

    def forward(self) -> torch.Tensor:
        return torch.stack([p.square().sum() for p in self.all.values()]).sum()


def counted(optimizer: Any, step: Any) -> tuple[int, int, int]:
    """All-reduces and their bytes of a step in which nothing measures, and bytes of state."""
    optimizer.init_state()
    for _ in range(2):
        step()
    SENT.clear()
    step()
    return len(SENT), sum(SENT), optimizer.state_bytes()


def watch() -> None:
    """Note what goes through the process groups of the engine."""
    add = Axis.add

    def noted(self: Axis, value: torch.Tensor, largest: bool = False) -> torch.Tensor:
        SENT.append(value.nbytes)
        return add(self, value, largest)

    Axis.add = noted  # type: ignore[method-assign]


def meshed(rank: int, engine: str, name: str) -> tuple[Any, Any]:
    watch()
    built = build(engine)
    optimizer = create_optimizer(name, built.named, lr=1e-3, **unbudgeted(name))

    def step() -> None:
        for _, p in built.named:
            p.grad = torch.ones_like(p)
        optimizer.step()

    return counted(optimizer, step), built.shapes


def partitioned(
    rank: int, stage: int, name: str, options: dict[str, Any], shapes: dict[str, tuple[int, ...]]
) -> tuple[Any, Any]:
    watch()
    model = Several(shapes)
    optimizer = create_optimizer(name, model.named(), lr=1e-3, **unbudgeted(name), **options)
    engine = initialized(model, optimizer, stage)
    bind(optimizer, engine)

    def step() -> None:
        engine.backward(engine())
        engine.step()

    return counted(optimizer, step), shapes


def check(found: list[tuple[tuple[int, int, int], Any]], costs: Costs) -> None:
    parts = (costs.sums, costs.gathers, costs.agreements)
    expected = sum(times for times, _ in parts), sum(size for _, size in parts)
    assert {(calls, size) for (calls, size, _), _ in found} == {expected}
    assert max(state for (_, _, state), _ in found) == costs.state_bytes


@pytest.mark.parametrize("name", ["HinaAdaptive", "Automagic_CameAMP_Improved"])
@pytest.mark.parametrize(("engine", "size"), [("fsdp2", 2), ("fsdp2", 4), ("hsdp", 4)])
def test_fsdp2(engine: str, size: int, name: str) -> None:
    found = run(meshed, size, engine, name)
    check(found, simulate(found[0][1], engine, size, name, node=2))


@pytest.mark.parametrize("name", ["HinaAdaptive", "Automagic_CameAMP_Improved"])
@pytest.mark.parametrize(("stage", "size"), [(1, 2), (3, 2), (3, 4)])
def test_zero(stage: int, size: int, name: str) -> None:
    pytest.importorskip("deepspeed")
    found = run(partitioned, size, stage, name, {}, SHAPES)
    check(found, simulate(SHAPES, f"zero{stage}", size, name))


@pytest.mark.parametrize(("stage", "size", "blocks"), [(1, 2, 1), (3, 4, 6)])
def test_scales_of_cut_blocks(stage: int, size: int, blocks: int) -> None:
    """One more all-reduce where flat pieces cut blocks of 8 bits, of one number a block and moment."""
    pytest.importorskip("deepspeed")
    options = {"state_precision": "8bit", "min_8bit_size": 0}
    found = run(partitioned, size, stage, "HinaAdaptive", options, CUT)
    for rank, ((calls, sent, state), _) in enumerate(found):
        costs, plain = (
            simulate(CUT, f"zero{stage}", size, "HinaAdaptive", rank=rank, **more) for more in (options, {})
        )
        parts = (costs.sums, costs.gathers, costs.agreements)
        assert (calls, sent, state) == (sum(n for n, _ in parts), sum(b for _, b in parts), costs.state_bytes)
        assert costs.sums == (plain.sums[0] + 1, plain.sums[1] + 4 * 2 * blocks)
