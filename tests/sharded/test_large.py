"""Parameters that fill more than one piece of temporary memory, of which every rank has another number."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from hina_optim import HinaAdaptive
from hina_optim.engine import runner
from tests.every_optimizer import make
from tests.sharded.world import run

STEPS = 3


def values(shapes: list[tuple[int, ...]], step: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(step)
    return [torch.randn(*shape, generator=generator, dtype=torch.float64) * (i + 1) for i, shape in enumerate(shapes)]


def trained(rank: int, name: str, shapes: list[tuple[int, ...]], cut: str) -> list[Tensor]:
    """Cut along the ``"first"`` or ``"last"`` dimension, in small chunks; not at all where it is ``""``."""
    if cut:
        runner.CPU_CHUNK = 4096  # in this fork: so that little data makes many of them

    def spread(value: Tensor) -> Tensor:
        if not cut:
            return value.clone()
        mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
        return distribute_tensor(value, mesh, [Shard(0 if cut == "first" else value.ndim - 1)])

    named = [(f"p{i}", nn.Parameter(spread(value))) for i, value in enumerate(values(shapes, 0))]
    options: dict[str, Any] = {"state_precision": "fp32"}
    optimizer = make(name, named, **options) if name else HinaAdaptive(named, lr=3e-4)
    for step in range(STEPS):
        for (_, p), g in zip(named, values(shapes, step + 1), strict=True):
            p.grad = spread(g)
        optimizer.step()
    return [p.full_tensor().detach() if isinstance(p, DTensor) else p.detach() for _, p in named]


SHAPES = {
    "many": [(5, 200)] * 12,
    "large": [(5, 60, 10)] * 2 + [(7, 1000)],
    "uneven": [(3,)] * 4 + [(3000,)] * 4 + [(1, 5000), (5000, 1)],
}


@pytest.mark.parametrize("shapes", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("cut", ["first", pytest.param("last", marks=pytest.mark.sharded)])
@pytest.mark.parametrize(
    "name", ["", "RefactoredAutomagicCameAMP", pytest.param("Automagic_CameAMP", marks=pytest.mark.sharded)]
)
def test_pieces_of_temporary_memory_change_nothing(name: str, cut: str, shapes: list[tuple[int, ...]]) -> None:
    """Ranks with more elements need more pieces, and their sums still meet those of the others."""
    expected = trained(0, name, shapes, "")
    for size in (2, 3):
        for found in run(trained, size, name, shapes, cut):
            for i, (mine, one, start) in enumerate(zip(found, expected, values(shapes, 0), strict=True)):
                error = float((mine - one).norm() / (one - start).norm())
                assert error < 1e-9, f"parameter {i} {shapes[i]} on {size} ranks is off by {error}"
