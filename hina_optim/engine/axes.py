"""Process groups over which parameters are cut, and the sums over them."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["Axis", "all_sums"]


@dataclass
class Axis:
    """One dimension of a mesh of processes: the ranks that hold pieces of the same parameters.

    Attributes:
        group: Their process group.
        ranks: Their global ranks, in order.
    """

    group: dist.ProcessGroup
    ranks: tuple[int, ...]
    _host: dist.ProcessGroup | None = field(default=None, repr=False)

    @classmethod
    def of(cls, group: dist.ProcessGroup | None) -> Axis:
        """That of a process group; None is all processes."""
        known = dist.group.WORLD if group is None else group
        if known is None:
            raise RuntimeError("torch.distributed is not initialized: call torch.distributed.init_process_group first.")
        return cls(known, tuple(dist.get_process_group_ranks(known)))

    def add(self, value: Tensor, largest: bool = False) -> Tensor:
        """The sum over the ranks, or the largest of them, in place."""
        dist.all_reduce(value, dist.ReduceOp.MAX if largest else dist.ReduceOp.SUM, group=self._for(value.device))
        return value

    def _for(self, device: torch.device) -> dist.ProcessGroup:
        """A group that can add tensors on ``device``: NCCL knows no tensors on the host, so those get a gloo group."""
        if device.type != "cpu" or device in self.group._device_types:
            return self.group
        if self._host is None:
            self._host = dist.new_group(list(self.ranks), backend="gloo", use_local_synchronization=True)
        return self._host


def all_sums(axis: Axis, values: list[Tensor], largest: bool = False) -> list[Tensor]:
    """Sums of several tensors over the ranks of an axis, or the largest of them, by one all-reduce a device."""
    result = list(values)
    for device in dict.fromkeys(x.device for x in values):
        at = [i for i, x in enumerate(values) if x.device == device]
        packed = axis.add(torch.cat([values[i].reshape(-1) for i in at]), largest)
        for i, part in zip(at, packed.split([values[i].numel() for i in at]), strict=True):
            result[i] = part.reshape(values[i].shape)
    return result
