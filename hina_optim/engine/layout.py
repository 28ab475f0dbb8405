"""Where the elements of a parameter lie: the one interface between the engine and any kind of sharding.

The engine works on local, plain tensors and asks the layout which part of a parameter is here, for the sum of packed
vectors over the shards, and for the complete value of a few tensors. :class:`Layout` itself is one process that holds
everything whole; a sharded engine overrides what differs. Techniques never learn of it.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

import torch
from torch import Tensor

from hina_optim.state.shard import Shape, Shard

__all__ = ["Layout", "Shape", "Shard"]


class Layout:
    """One process that holds every parameter whole; the base of all sharded layouts.

    What sums, gathers or agrees is called by all ranks, in the same order.
    """

    #: True if any parameter has elements on another rank: sums must then be reduced.
    sharded = False

    def params(self, group: dict[str, Any]) -> Sequence[Tensor]:
        """The parameters of a group as the engine sees them: keys of the optimizer's state."""
        found: Sequence[Tensor] = group["params"]
        return found

    def known(self) -> dict[int, tuple[str, Shape]]:
        """Position → name and global shape of all parameters, where an engine shows the optimizer a part of them."""
        return {}

    def holders(self, group: int) -> list[Tensor]:
        """The tensors that a group is made of, where an engine takes them out of it between its steps."""
        return []

    def position(self, param: Tensor) -> int | None:
        """Its place in the groups as they were built, ``(group << 24) | place``; None where they still are so."""
        return None

    def name(self, param: Tensor) -> str | None:
        """Its name, where the layout knows it better than the optimizer."""
        return None

    def local(self, param: Tensor) -> Tensor:
        """The elements that are here, as a plain tensor that shares their memory."""
        return param.detach() if torch.is_grad_enabled() else param

    def grad(self, param: Tensor) -> Tensor | None:
        """Their gradient, plain; None where there is none."""
        return param.grad

    def shard(self, param: Tensor) -> Shard:
        """Which elements of ``param`` are here."""
        return Shard.complete(tuple(param.shape))

    def pattern(self, param: Tensor) -> Hashable:
        """Equal for parameters whose elements lie alike *on all ranks*: only those may run together."""
        return None

    def ranges(self, param: Tensor) -> tuple[tuple[int, int], ...]:
        """The flat ranges, ``(start, stop)``, in which it lies on all ranks, where it is cut anywhere; else none."""
        return ()

    def wrap(self, param: Tensor, value: Tensor, shape: Shape | None) -> Tensor:
        """A piece of state as the optimizer's ``state`` holds it.

        Args:
            param: Whose state.
            value: What is here.
            shape: Global shape of what lies as the parameter does; None for what is whole and the same on all ranks.
        """
        return value

    def unwrap(self, param: Tensor, value: Tensor) -> Tensor:
        """What :meth:`wrap` was given; also of a value that was loaded, whole or as it lies here."""
        return value

    def cut(self, param: Tensor) -> Hashable:
        """Among which ranks it is cut: vectors of parameters with equal answers can be added before they are reduced.

        The same parameters have equal answers on all ranks.
        """
        return None

    def reduce(self, parts: Sequence[tuple[Tensor, Tensor]], largest: bool = False) -> list[Tensor]:
        """Sums over the shards of vectors, each given with a parameter that lies as those it belongs to.

        Args:
            parts: Parameter and vector.
            largest: The largest of all shards in the place of their sum.
        """
        return [value for _, value in parts]

    def gather(self, parts: Sequence[tuple[Tensor, Tensor]]) -> list[Tensor]:
        """Complete ``[N, *shape]`` from all ranks' ``[N, *local shape]``, each given with a parameter that lies so."""
        return [local.reshape(local.shape[0], *self.shard(param).shape) for param, local in parts]

    def total(self, vector: Tensor) -> Tensor:
        """A vector on the host, of numbers ≥ 0, added up over all ranks that share parameters.

        What is not zero on one rank is not zero on all of them; a rank may count more than once.
        """
        return vector

    def settle(self, params: Sequence[Tensor]) -> None:
        """Told of all parameters whenever others are in the groups."""

    def digest(self) -> str:
        """What must be equal on all ranks, in words."""
        return ""

    @staticmethod
    def put(shard: Shard, local: Tensor) -> Tensor:
        """The complete ``[N, *shape]`` with ``[N, *local shape]`` where it belongs, and zero elsewhere."""
        n = local.shape[0]
        complete = local.new_zeros(n, *shard.shape)
        if shard.slices is not None:
            where = (slice(None), *shard.slices)
            complete[where] = local
        else:
            complete.view(n, -1)[:, shard.start : shard.stop] = local.reshape(n, -1)
        return complete

    def take(self, param: Tensor, complete: Tensor) -> Tensor:
        """What is here of the complete ``[N, *shape]``, as a new or shared tensor ``[N, *local shape]``."""
        shard = self.shard(param)
        like = self.local(param).shape
        if shard.slices is not None:
            where = (slice(None), *shard.slices)
            return complete[where]
        return complete.reshape(complete.shape[0], -1)[:, shard.start : shard.stop].reshape(complete.shape[0], *like)
