"""Where the elements of a parameter lie: the one interface between the engine and any kind of sharding.

The engine works on local tensors and asks the layout for three things only: which part of a parameter is here, the sum
of a packed vector over all shards, and the complete value of a few tensors. :class:`LocalLayout` is the layout of one
process. A sharded engine implements :class:`Layout` once; techniques never learn of it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

__all__ = ["Layout", "LocalLayout", "Shard"]


@dataclass(frozen=True)
class Shard:
    """A contiguous range of a flattened parameter: rows of a matrix, a flat partition, a chunk, or all of it.

    Attributes:
        shape: Shape of the complete (global) parameter.
        start: Global flat index of the first element that is here.
        stop: One past the last; equal to ``start`` for an empty shard.
    """

    shape: tuple[int, ...]
    start: int
    stop: int

    @classmethod
    def complete(cls, shape: tuple[int, ...]) -> Shard:
        """All of a parameter."""
        return cls(shape, 0, int(torch.Size(shape).numel()))

    @property
    def is_complete(self) -> bool:
        """Whether no element lies elsewhere."""
        return self.stop - self.start == int(torch.Size(self.shape).numel())


class Layout(Protocol):
    """What an engine for sharded parameters implements. Every call is made by all ranks, in the same order."""

    @property
    def sharded(self) -> bool:
        """True if any parameter has elements on another rank: sums must then be reduced."""

    def shard(self, param: Tensor) -> Shard:
        """Which elements of ``param`` are here."""

    def key(self, param: Tensor, position: int) -> int:
        """A number for a parameter that is the same on every rank, world size and resume.

        ``position`` is its place in the groups.
        """

    def all_reduce(self, packed: Tensor) -> Tensor:
        """The sum of a flat vector over all shards."""

    def gather(self, local: Tensor, shard: Shard) -> Tensor:
        """The complete ``[N, *shard.shape]`` from every rank's ``[N, *local shape]``."""


class LocalLayout:
    """One process holds every parameter whole."""

    sharded = False

    def shard(self, param: Tensor) -> Shard:
        """All of it."""
        return Shard.complete(tuple(param.shape))

    def key(self, param: Tensor, position: int) -> int:
        """The place in the groups."""
        return position

    def all_reduce(self, packed: Tensor) -> Tensor:
        """Nothing to add."""
        return packed

    def gather(self, local: Tensor, shard: Shard) -> Tensor:
        """It is complete already."""
        return local
