"""Compiled steps where parameters are sharded: the trajectory of one process that steps eagerly."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from tests.every_optimizer import loss_of, make
from tests.sharded.cells import TOLERANCE, Pieces
from tests.sharded.engines import build, gradients, joined
from tests.sharded.world import run
from tests.traced import traced

STEPS = 3
#: A stack, rows that no world divides, kernels, a vector, and one number: an empty shard.
SHAPES: list[tuple[int, ...]] = [(64, 48), (64, 48), (33, 80), (12, 3, 4, 4), (96,), (1,)]


def values(step: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(step)
    return [torch.randn(*shape, generator=generator, dtype=torch.float64) + 0.2 for shape in SHAPES]


def trained(rank: int, name: str, compile_it: bool) -> tuple[list[Tensor], int]:
    """Weights at the end, and how many graphs were made; as traced, without a code generator."""
    counters.clear()

    def spread(value: Tensor) -> Tensor:
        if not compile_it:
            return value.clone()
        mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
        return distribute_tensor(value, mesh, [Shard(0)])

    named = [(f"p{i}", nn.Parameter(spread(value))) for i, value in enumerate(values(0))]
    optimizer = make(name, named, state_precision="fp32", compile=compile_it, use_loss_context=False)
    with traced():
        for step in range(STEPS):
            for (_, p), g in zip(named, values(step + 1), strict=True):
                p.grad = spread(g)
            optimizer.report_loss(1.0)
            optimizer.step()
    found = [p.full_tensor().detach() if isinstance(p, DTensor) else p.detach() for _, p in named]
    return found, int(counters["stats"]["unique_graphs"])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["AdaptiveHinaAdamW", "Automagic_CameAMP"])
def test_compiled_shards(name: str) -> None:
    """Numbers, and sums over rows and columns, of all shards."""
    expected, none = trained(0, name, False)
    assert none == 0
    for found, graphs in run(trained, 2, name, True, limit=300.0):
        assert graphs > 0
        for i, (mine, one, start) in enumerate(zip(found, expected, values(0), strict=True)):
            error = float((mine - one).norm() / (one - start).norm())
            assert error < 1e-9, f"parameter {i} {SHAPES[i]} is off by {error}"


#: Without what follows the loss: that makes a graph for every shape, and these are to be made in lines where they can.
OPTIONS = {"state_precision": "fp32", "use_loss_context": False}


def flat(rank: int, engine: str, name: str) -> tuple[Pieces, int]:
    """Pieces of the weights, and how many graphs were made."""
    from tests.sharded_state_cases import start  # loads the frameworks

    counters.clear()
    with traced():
        ran = start(engine, optimizer=name, compile=True, **OPTIONS)
        ran.step(STEPS)
    return ran.pieces(), int(counters["stats"]["unique_graphs"])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("engine", "name"),
    [
        ("zero3", "AdaptiveHinaAdamW"),
        *(
            pytest.param(*place, marks=pytest.mark.sharded)
            for place in (
                ("fsdp1", "AdaptiveHinaAdamW"),
                ("fsdp1", "Automagic_CameAMP"),
                ("zero1", "AdaptiveHinaAdamW"),
                ("zero2", "Automagic_CameAMP"),
            )
        ),
    ],
)
def test_compiled_flat_partitions(engine: str, name: str) -> None:
    """Ranges that are cut anywhere, views of an engine's memory, groups that are stepped one by one."""
    built = build("one")
    begin = {key: p.detach().clone() for key, p in built.named}
    eager = make(name, built.named, **OPTIONS)
    for step in range(STEPS):
        built.give(gradients(built.shapes, step))
        eager.report_loss(loss_of(step))
        eager.step()
    found = run(flat, 2, engine, name, limit=400.0)
    assert all(graphs > 0 for _, graphs in found)
    weights = joined([pieces for pieces, _ in found], built.shapes)
    for key, p in built.named:
        error = float((weights[key] - p.detach()).norm() / (p.detach() - begin[key]).norm())
        assert error < TOLERANCE["fp32"][0], f"{key} is off by {error}"
