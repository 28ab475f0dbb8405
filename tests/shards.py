"""Several shards in one process: a thread a rank, sums through a barrier.

A layout that the engine cannot tell from a real one.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hina_optim.engine.layout import Layout, Shard


class World:
    """Meeting place of the ranks; counts what they do together."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.barrier = threading.Barrier(size, timeout=60)
        self.slots: list[Any] = [None] * size
        self.reductions = 0
        self.gathers = 0
        self.agreements = 0
        self.largest = 0

    def exchange(self, rank: int, value: Any) -> list[Any]:
        self.slots[rank] = value
        self.barrier.wait()
        everything = list(self.slots)
        self.barrier.wait()
        return everything


class ThreadLayout(Layout):
    """Layout of one rank: each parameter is a contiguous flat range, cut where ``cuts`` says."""

    sharded = True

    def __init__(self, world: World, rank: int) -> None:
        self.world = world
        self.rank = rank
        self.shards: dict[Tensor, Shard] = {}
        self.everywhere: dict[Tensor, tuple[tuple[int, int], ...]] = {}

    def settle(self, params: Sequence[Tensor]) -> None:
        """Called by all ranks, with the same parameters in the same order."""
        mine = [(self.shards[p].start, self.shards[p].stop) for p in params]
        everyone = self.world.exchange(self.rank, mine)
        self.everywhere = dict(zip(params, zip(*everyone, strict=True), strict=True))

    def pattern(self, param: Tensor) -> Hashable:
        return self.everywhere[param]

    def ranges(self, param: Tensor) -> tuple[tuple[int, int], ...]:
        return self.everywhere[param]

    def shard(self, param: Tensor) -> Shard:
        return self.shards[param]

    def sum(self, value: Tensor, largest: bool = False) -> Tensor:
        every = torch.stack(self.world.exchange(self.rank, value))
        return every.amax(0) if largest else every.sum(0)

    def reduce(self, parts: Sequence[tuple[Tensor, Tensor]], largest: bool = False) -> list[Tensor]:
        if self.rank == 0:
            self.world.reductions += 1
            self.world.largest += largest
        packed = self.sum(torch.cat([value.reshape(-1) for _, value in parts]), largest)
        split = packed.split([value.numel() for _, value in parts])
        return [x.reshape(value.shape) for x, (_, value) in zip(split, parts, strict=True)]

    def total(self, vector: Tensor) -> Tensor:
        if self.rank == 0:
            self.world.agreements += 1
        return self.sum(vector)

    def gather(self, parts: Sequence[tuple[Tensor, Tensor]]) -> list[Tensor]:
        if self.rank == 0:
            self.world.gathers += 1
        return [self.sum(self.put(self.shard(param), local)) for param, local in parts]


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


def in_threads(size: int, main: Callable[[int], Any]) -> list[Any]:
    """What ``main`` returns for every rank, each in a thread of its own; the first real error is raised."""
    found: list[Any] = [None] * size
    errors: list[BaseException] = []

    def run(rank: int) -> None:
        try:
            found[rank] = main(rank)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for error in sorted(errors, key=lambda one: isinstance(one, threading.BrokenBarrierError)):
        raise error
    return found
