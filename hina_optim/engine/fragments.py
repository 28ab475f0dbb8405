"""Flat partitions: FSDP1 and DeepSpeed's ZeRO lay parameters end to end and cut the result anywhere.

What such an engine hands to its optimizer are vectors without names. A :class:`Fragment` says which elements of which
original parameter lie where; with them the same sums serve and the algorithm stays what it is.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
from torch import Tensor

from hina_optim.engine.axes import Axis, all_sums
from hina_optim.engine.layout import Layout, Shape, Shard

__all__ = ["FlatLayout", "Fragment"]


@dataclass(frozen=True)
class Fragment:
    """The elements of one original parameter within one tensor of the optimizer's groups, on this rank.

    Attributes:
        name: The parameter's fully qualified name, as in the unwrapped model's ``named_parameters()``.
        position: ``(group << 24) | place`` of the original parameter in the groups as the optimizer was built with.
        shard: Which of its elements are here; a range, maybe an empty one.
        holder: The tensor in ``optimizer.param_groups`` that holds them; of an empty fragment, one of its group.
        offset: Index in ``holder.reshape(-1)`` of the first of them.
    """

    name: str
    position: int
    shard: Shard
    holder: Tensor
    offset: int


class FlatLayout(Layout):
    """Fragments of parameters in flat tensors. Every rank lists a fragment, maybe empty, of every parameter.

    To be built by all ranks at once: they tell each other what they hold.

    Args:
        group: The processes among which parameters are cut; None for all.
        fragments: Of all parameters of all groups, in the same order on all ranks.
        together: The processes that step together, where they are more: those with replicas, too.

    Raises:
        ValueError: The fragments of all ranks do not make up every parameter once.
    """

    sharded = True

    def __init__(
        self,
        group: dist.ProcessGroup | None,
        fragments: Sequence[Fragment],
        together: dist.ProcessGroup | None = None,
    ) -> None:
        self._axis = Axis.of(group)
        self._together = self._axis if together is None else Axis.of(together)
        self.fragments: dict[Tensor, Fragment] = {}
        self._held: dict[Tensor, list[Tensor]] = {}
        shared = Counter(fragment.holder for fragment in fragments)
        for fragment in fragments:
            alone = shared[fragment.holder] == 1 and fragment.shard.numel == fragment.holder.numel()
            key = fragment.holder if alone else _view(fragment)
            self.fragments[key] = fragment
            self._held.setdefault(fragment.holder, []).append(key)
        self._patterns = self._agree(fragments)

    def _agree(self, fragments: Sequence[Fragment]) -> dict[int, tuple[tuple[int, int], ...]]:
        """Where every parameter lies on all ranks, by position."""
        mine = [(f.position, tuple(f.shard.shape), f.shard.start, f.shard.stop) for f in fragments]
        everyone: list[Any] = [None] * len(self._axis.ranks)
        dist.all_gather_object(everyone, mine, group=self._axis.group)
        if any([one[:2] for one in other] != [one[:2] for one in mine] for other in everyone):
            raise ValueError("the ranks list other parameters, or another order: build the optimizer alike on all.")
        found = {}
        for f, ranges in zip(fragments, zip(*everyone, strict=True), strict=True):
            pattern = tuple((start, stop) for _, _, start, stop in ranges)
            held = sorted(piece for piece in pattern if piece[0] < piece[1])
            ends = [0, *(stop for _, stop in held)]
            if [start for start, _ in held] != ends[:-1] or ends[-1] != Shard.complete(f.shard.shape).numel:
                raise ValueError(
                    f"the fragments {held} of {f.name} {f.shard.shape} do not make up all of it exactly once: the "
                    "engine's partition is not what was read from it."
                )
            found[f.position] = pattern
        return found

    def params(self, group: dict[str, Any]) -> Sequence[Tensor]:
        """The fragments in the tensors of a group, in the order of the parameters."""
        keys = [key for holder in group["params"] for key in self._held.get(holder, ())]
        return sorted(keys, key=lambda key: self.fragments[key].position)

    def known(self) -> dict[int, tuple[str, Shape]]:
        """Those of all fragments: ZeRO-3 steps one sub-group at a time."""
        return {f.position: (f.name, f.shard.shape) for f in self.fragments.values()}

    def holders(self, group: int) -> list[Tensor]:
        """The flat tensors of a group."""
        return list(dict.fromkeys(f.holder for f in self.fragments.values() if f.position >> 24 == group))

    def position(self, param: Tensor) -> int | None:
        """That of the original parameter."""
        return self.fragments[param].position

    def name(self, param: Tensor) -> str | None:
        """That of the original parameter."""
        return self.fragments[param].name

    def local(self, param: Tensor) -> Tensor:
        """The range of the flat tensor, also after an engine has given it other memory."""
        fragment = self.fragments.get(param)
        if fragment is None or fragment.holder is param:
            return param.detach()
        flat = fragment.holder.detach().reshape(-1)
        return flat[fragment.offset : fragment.offset + fragment.shard.numel]

    def grad(self, param: Tensor) -> Tensor | None:
        """The range of the flat gradient."""
        fragment = self.fragments.get(param)
        if fragment is None:
            return param.grad
        grad = fragment.holder.grad
        if grad is None or fragment.holder is param:
            return grad
        return grad.reshape(-1)[fragment.offset : fragment.offset + fragment.shard.numel]

    def shard(self, param: Tensor) -> Shard:
        """What the fragment says."""
        if param not in self.fragments:
            raise RuntimeError(
                f"a tensor of shape {tuple(param.shape)} in the groups is none of those that this layout was made of: "
                "the engine has replaced it; bind the optimizer to the engine again."
            )
        return self.fragments[param].shard

    def pattern(self, param: Tensor) -> Hashable:
        """The ranges on all ranks."""
        return self.ranges(param)

    def ranges(self, param: Tensor) -> tuple[tuple[int, int], ...]:
        """Those of all fragments of the parameter."""
        return self._patterns[self.fragments[param].position]

    def reduce(self, parts: Sequence[tuple[Tensor, Tensor]], largest: bool = False) -> list[Tensor]:
        """One all-reduce."""
        return all_sums(self._axis, [value for _, value in parts], largest)

    def gather(self, parts: Sequence[tuple[Tensor, Tensor]]) -> list[Tensor]:
        """A sum of pieces that do not overlap."""
        return self.reduce([(param, self.put(self.shard(param), local)) for param, local in parts])

    def total(self, vector: Tensor) -> Tensor:
        """One all-reduce."""
        return self._together.add(vector)


def _view(fragment: Fragment) -> Tensor:
    """A tensor that stands for a fragment: key of its state, with its dtype and device."""
    flat = fragment.holder.detach().reshape(-1)
    view = flat[fragment.offset : fragment.offset + fragment.shard.numel]
    return view.requires_grad_(fragment.holder.requires_grad)
