"""Parameters that are DTensors: FSDP2, hybrid sharding, tensor parallelism, and any mixture of them.

The engine computes on what is here and adds up over the dimensions of the mesh that cut a parameter; those over which
it is replicated hold equal numbers and need nothing. State that lies as the parameter does is a DTensor of the same
mesh and placements, so torch.distributed.checkpoint knows where it belongs.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor import Shard as Cut
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.distributed.tensor.placement_types import _StridedShard

from hina_optim.engine.axes import Axis, all_sums
from hina_optim.engine.layout import Layout, Shard

__all__ = ["MeshLayout"]


@dataclass(frozen=True)
class Place:
    """Where a kind of parameter lies: the part that is here, and the axes that cut it."""

    shard: Shard
    axes: tuple[Axis, ...]


class MeshLayout(Layout):
    """DTensors, and plain parameters beside them, which every rank holds whole."""

    sharded = True

    def __init__(self) -> None:
        #: by ranks, in the order of the parameters, which is the same on all ranks; those that only replicate, too
        self._axes: dict[tuple[int, ...], Axis] = {}
        self._places: dict[Hashable, Place] = {}
        self._of: dict[Tensor, Place] = {}
        self._digest = ""

    def settle(self, params: Sequence[Tensor]) -> None:
        """Look at all parameters.

        Raises:
            RuntimeError: One is neither cut nor replicated along a dimension of its mesh.
        """
        self._of = {p: self._place(p) for p in params}
        self._digest = repr([(tuple(p.shape), p.dtype, getattr(p, "placements", None)) for p in params])

    def digest(self) -> str:
        """Shapes, dtypes and placements."""
        return self._digest

    def _place(self, param: Tensor) -> Place:
        if not isinstance(param, DTensor):
            return Place(Shard.complete(tuple(param.shape)), ())
        key = self.pattern(param), tuple(param.shape)
        if key not in self._places:
            mesh, axes = param.device_mesh, []
            for dim, placement in enumerate(param.placements):
                cuts = isinstance(placement, (Cut, _StridedShard))
                if not cuts and not placement.is_replicate():
                    raise RuntimeError(
                        f"a parameter of shape {tuple(param.shape)} has the placement {placement} along dimension "
                        f"{dim} of its mesh: only parameters that are cut (Shard) or replicated (Replicate) there can "
                        "be stepped; redistribute() it."
                    )
                if mesh.size(dim) > 1:
                    axis = Axis.of(mesh.get_group(dim))
                    axis = self._axes.setdefault(axis.ranks, axis)
                    if cuts:
                        axes.append(axis)
            size, offset = compute_local_shape_and_global_offset(param.shape, mesh, param.placements)
            if tuple(size) != tuple(param.to_local().shape):
                raise RuntimeError(
                    f"a parameter of shape {tuple(param.shape)} with the placements {param.placements} has "
                    f"{tuple(param.to_local().shape)} here, expected {tuple(size)}: it was not made by torch's own "
                    "sharding, and which elements these are is unknown."
                )
            self._places[key] = Place(Shard.box(tuple(param.shape), tuple(offset), tuple(size)), tuple(axes))
        return self._places[key]

    def local(self, param: Tensor) -> Tensor:
        """The local tensor of a DTensor."""
        return param.to_local().detach() if isinstance(param, DTensor) else param.detach()

    def grad(self, param: Tensor) -> Tensor | None:
        """The local tensor of its gradient, in the parameter's placements."""
        grad = param.grad
        if not isinstance(param, DTensor) or grad is None:
            return grad
        if not isinstance(grad, DTensor):
            raise RuntimeError(
                f"a DTensor of shape {tuple(param.shape)} has a gradient that is none: set .grad to a DTensor of the "
                "same mesh (torch.distributed.tensor.distribute_tensor)."
            )
        if grad.placements != param.placements:  # once: whoever looks again finds it as it should lie
            grad = param.grad = grad.redistribute(param.device_mesh, param.placements)
        return grad.to_local()

    def shard(self, param: Tensor) -> Shard:
        """From its mesh and placements."""
        return (self._of.get(param) or self._place(param)).shard

    def pattern(self, param: Tensor) -> Hashable:
        """Mesh and placements."""
        return (param.device_mesh, param.placements) if isinstance(param, DTensor) else None

    def wrap(self, param: Tensor, value: Tensor, shape: tuple[int, ...] | None) -> Tensor:
        """A DTensor of the parameter's mesh and placements."""
        if shape is None or not isinstance(param, DTensor):
            return value
        stride = torch.empty(shape, device="meta").stride()
        return DTensor.from_local(
            value, param.device_mesh, param.placements, run_check=False, shape=torch.Size(shape), stride=stride
        )

    def unwrap(self, param: Tensor, value: Tensor) -> Tensor:
        """The local tensor; of a plain tensor with the parameter's global shape, what is here of it."""
        if isinstance(value, DTensor):
            if isinstance(param, DTensor) and value.ndim and value.placements != param.placements:
                value = value.redistribute(param.device_mesh, param.placements)
            return value.to_local()
        if isinstance(param, DTensor) and value.ndim and value.shape == param.shape:
            return self.take(param, value[None])[0] if value.shape != param.to_local().shape else value
        return value

    def cut(self, param: Tensor) -> Hashable:
        """The dimensions of its mesh that cut it."""
        return tuple(axis.ranks for axis in self._cut(param))

    def reduce(self, parts: Sequence[tuple[Tensor, Tensor]], largest: bool = False) -> list[Tensor]:
        """One all-reduce for each dimension of a mesh that cuts any of them."""
        values = [value for _, value in parts]
        cut = [self._cut(param) for param, _ in parts]
        for axis in self._axes.values():
            at = [i for i, axes in enumerate(cut) if axis in axes]
            if at:
                for i, value in zip(at, all_sums(axis, [values[i] for i in at], largest), strict=True):
                    values[i] = value
        return values

    def _cut(self, param: Tensor) -> tuple[Axis, ...]:
        return (self._of.get(param) or self._place(param)).axes

    def gather(self, parts: Sequence[tuple[Tensor, Tensor]]) -> list[Tensor]:
        """A sum of pieces that do not overlap."""
        return self.reduce([(param, self.put(self.shard(param), local)) for param, local in parts])

    def total(self, vector: Tensor) -> Tensor:
        """One all-reduce for each dimension of a mesh, those that replicate included: replicas step together."""
        for axis in self._axes.values():
            axis.add(vector)
        return vector
