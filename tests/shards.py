"""Several shards in one process: a thread a rank, sums through a barrier.

A layout that the engine cannot tell from a real one.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from hina_optim.engine.layout import Shard


class World:
    """Meeting place of the ranks; counts what they do together."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.barrier = threading.Barrier(size, timeout=60)
        self.slots: list[Any] = [None] * size
        self.reductions = 0
        self.gathers = 0

    def exchange(self, rank: int, value: Any) -> list[Any]:
        self.slots[rank] = value
        self.barrier.wait()
        everything = list(self.slots)
        self.barrier.wait()
        return everything


class ThreadLayout:
    """Layout of one rank: each parameter is a contiguous flat range, cut where ``cuts`` says."""

    sharded = True

    def __init__(self, world: World, rank: int) -> None:
        self.world = world
        self.rank = rank
        self.shards: dict[Tensor, Shard] = {}

    def shard(self, param: Tensor) -> Shard:
        return self.shards[param]

    def key(self, param: Tensor, position: int) -> int:
        return position

    def all_reduce(self, packed: Tensor) -> Tensor:
        everyone = self.world.exchange(self.rank, packed)
        if self.rank == 0:
            self.world.reductions += 1
        return torch.stack(everyone).sum(0)

    def gather(self, local: Tensor, shard: Shard) -> Tensor:
        everyone = self.world.exchange(self.rank, local.reshape(local.shape[0], -1))
        if self.rank == 0:
            self.world.gathers += 1
        return torch.cat(everyone, dim=1).reshape(local.shape[0], *shard.shape)


def cut(shape: tuple[int, ...], rank: int, size: int, by_rows: bool) -> tuple[int, int]:
    """Uneven on purpose: ceil-sized pieces, so the last ranks get less or nothing; rows, or any flat position."""
    total = int(torch.Size(shape).numel())
    if not shape or total == 0:
        return (0, total) if rank == 0 else (total, total)
    unit = total // shape[0] if by_rows else 1
    count = total // unit
    each = -(-count // size)
    return min(rank * each, count) * unit, min((rank + 1) * each, count) * unit


def piece_of(full: Tensor, start: int, stop: int, by_rows: bool) -> Tensor:
    flat = full.reshape(-1)[start:stop].clone()
    return flat.reshape(-1, *full.shape[1:]) if by_rows and full.ndim else flat


def run_sharded(
    full: list[tuple[str, Tensor]],
    gradients: Callable[[int], list[Tensor]],
    make: Callable[[list[tuple[str, nn.Parameter]]], torch.optim.Optimizer],
    *,
    size: int,
    steps: int,
    by_rows: bool,
) -> tuple[list[Tensor], World]:
    """Train on ``size`` shards; returns the reassembled parameters."""
    world = World(size)
    pieces: list[list[Tensor]] = [[] for _ in range(size)]
    errors: list[BaseException] = []

    def rank_main(rank: int) -> None:
        try:
            layout = ThreadLayout(world, rank)
            ranges = [cut(tuple(t.shape), rank, size, by_rows) for _, t in full]
            named = []
            for (name, t), (start, stop) in zip(full, ranges, strict=True):
                p = nn.Parameter(piece_of(t, start, stop, by_rows))
                layout.shards[p] = Shard(tuple(t.shape), start, stop)
                named.append((name, p))
            optimizer = make(named)
            optimizer.bind_layout(layout)  # type: ignore[attr-defined]
            for step in range(steps):
                for (_, p), g, (start, stop) in zip(named, gradients(step), ranges, strict=True):
                    p.grad = piece_of(g.to(p.dtype), start, stop, by_rows)
                optimizer.step()
            pieces[rank] = [p.detach().reshape(-1) for _, p in named]
        except BaseException as error:
            errors.append(error)
            world.barrier.abort()

    threads = [threading.Thread(target=rank_main, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    real = [e for e in errors if not isinstance(e, threading.BrokenBarrierError)]
    if real:
        raise real[0]
    joined = [torch.cat([pieces[r][i] for r in range(size)]).reshape(t.shape) for i, (_, t) in enumerate(full)]
    return joined, world
