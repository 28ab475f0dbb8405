"""Any mesh and placements that torch makes, with shapes that nothing divides.

The elements are where the layout says they are, and the trajectory is that of one process.
"""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from hina_optim.engine.meshes import MeshLayout
from tests.every_optimizer import NAMES, make
from tests.sharded.world import run

STEPS = 4
Case = tuple[tuple[int, ...], tuple[Any, ...]]  # shape, placements


def cases(number: int, dims: int) -> list[Case]:
    """Random shapes of up to four dimensions and placements on a mesh of ``dims`` dimensions."""
    draw = random.Random(number)
    found: list[Case] = []
    for _ in range(12):
        shape = tuple(draw.choice([1, 2, 3, 5, 8, 13]) for _ in range(draw.randint(1, 4)))
        placements = [draw.choice([Replicate(), *[Shard(d) for d in range(len(shape))]]) for _ in range(dims)]
        found.append((shape, tuple(placements)))
    return found


def values(chosen: list[Case], step: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(step)
    return [torch.randn(*shape, generator=generator, dtype=torch.float64) for shape, _ in chosen]


def trained(rank: int, name: str, chosen: list[Case], mesh_shape: tuple[int, ...] | None) -> list[Tensor]:
    """On a mesh, or in one process."""
    mesh = init_device_mesh("cpu", mesh_shape) if mesh_shape else None

    def spread(i: int, value: Tensor) -> Tensor:
        return value.clone() if mesh is None else distribute_tensor(value, mesh, chosen[i][1])

    named = [(f"p{i}", nn.Parameter(spread(i, value))) for i, value in enumerate(values(chosen, 0))]
    optimizer = make(name, named, state_precision="fp32")
    for step in range(STEPS):
        for i, ((_, p), value) in enumerate(zip(named, values(chosen, step + 1), strict=True)):
            p.grad = spread(i, value)
        optimizer.report_loss(1.0)
        optimizer.step()
    return [p.full_tensor().detach() if isinstance(p, DTensor) else p.detach() for _, p in named]


def places(rank: int, chosen: list[Case], mesh_shape: tuple[int, ...]) -> list[str]:
    """Parameters whose elements are not those that the layout says, found by giving each its own index."""
    mesh, layout = init_device_mesh("cpu", mesh_shape), MeshLayout()
    wrong = []
    for shape, placements in chosen:
        index = torch.arange(torch.Size(shape).numel(), dtype=torch.float64).reshape(shape)
        p = nn.Parameter(distribute_tensor(index, mesh, placements))
        here = layout.shard(p).index(torch.device("cpu"))
        if not torch.equal(here, p.to_local().detach().reshape(-1).to(torch.int64)):
            wrong.append(f"{shape} {placements}")
    return wrong


MESHES = [(2,), (3,), (2, 2)]


@pytest.mark.parametrize("mesh_shape", MESHES, ids=str)
def test_elements_are_where_they_are_said_to_be(mesh_shape: tuple[int, ...]) -> None:
    chosen = [case for number in range(10) for case in cases(number, len(mesh_shape))]
    assert run(places, torch.Size(mesh_shape).numel(), chosen, mesh_shape) == [[]] * torch.Size(mesh_shape).numel()


@pytest.mark.parametrize(
    ("name", "number", "mesh_shape"),
    [
        ("HinaAdaptive", 1, (2, 2)),
        ("RefactoredAutomagicCameAMP", 2, (3,)),
        *[
            pytest.param(name, number, mesh_shape, marks=pytest.mark.sharded)
            for name in NAMES
            for number in range(4)
            for mesh_shape in MESHES
        ],
    ],
)
def test_any_placements(name: str, number: int, mesh_shape: tuple[int, ...]) -> None:
    chosen = cases(number, len(mesh_shape))
    expected, start = trained(0, name, chosen, None), values(chosen, 0)
    for found in run(trained, torch.Size(mesh_shape).numel(), name, chosen, mesh_shape):
        for i, (mine, one) in enumerate(zip(found, expected, strict=True)):
            error = float((mine - one).norm() / (one - start[i]).norm().clamp(min=1e-12))
            assert error < 1e-8, f"parameter {i}, {chosen[i]}, is off by {error}"
