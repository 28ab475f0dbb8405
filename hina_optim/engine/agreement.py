"""What all ranks that share parameters agree on before a step changes anything.

A rank that raises while the others go on leaves them waiting for it. So whatever one of them finds wrong is noted, told
to the others in the one exchange on the host that begins every step of sharded parameters, and raised by all.
"""

from __future__ import annotations

import contextlib
import zlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hina_optim.engine.layout import Layout
from hina_optim.engine.sizes import nonzero

if TYPE_CHECKING:
    from hina_optim.engine.optimizer import HinaOptimizer

__all__ = ["Agreement", "check_partitions", "settled"]

#: Checksums this short have a sum of squares, over many ranks, that still fits into 64 bits.
MASK = (1 << 20) - 1


def settled(layout: Layout, params: Sequence[Tensor], owner: str) -> Layout:
    """The layout of these parameters: that of DTensors where there are any and no other was bound.

    Raises:
        RuntimeError: They are flat partitions, and nobody said of what.
    """
    if type(layout) is Layout:
        if any(hasattr(p, "device_mesh") for p in params):
            from hina_optim.engine.meshes import MeshLayout  # loads torch.distributed

            layout = MeshLayout()
        elif any(getattr(p, "_fsdp_flattened", False) for p in params):
            raise RuntimeError(
                f"{owner}: these parameters are flat partitions of FullyShardedDataParallel (FSDP1), which hide their "
                "rows and columns. Call hina_lightning.sharding.bind(optimizer, model) before the first step, or use "
                "fully_shard (FSDP2), which needs nothing."
            )
    layout.settle(params)
    return layout


def check_partitions(optimizer: HinaOptimizer) -> None:
    """Raise RuntimeError if a group holds one vector in the place of the parameters that it was built with."""
    if optimizer._layout.sharded:
        return
    built = optimizer._buckets.identities.shapes()
    for g, group in optimizer.indexed_groups():
        now, then = [tuple(p.shape) for p in group["params"]], built.get(g, [])
        if len(now) == 1 and len(now[0]) == 1 and then and now != then:
            raise RuntimeError(
                f"{type(optimizer).__name__}: group {g} was built with {len(then)} parameters and holds one vector of "
                f"{now[0][0]} elements now: an engine (DeepSpeed ZeRO) has laid them end to end, which hides their "
                "rows and columns. Call hina_lightning.sharding.bind(optimizer, engine) after "
                "deepspeed.initialize() and before the first step."
            )


class Agreement:
    """One step's agreement of all ranks that share parameters; nothing where none are shared."""

    def __init__(self, optimizer: HinaOptimizer) -> None:
        self._optimizer = optimizer
        self._layout = optimizer._layout
        self._trouble: BaseException | None = None
        #: whether any rank must make buckets, or has no state at all; of this one until :meth:`stepping` has asked all
        self.needed = False
        self.blank = False

    @contextlib.contextmanager
    def noting(self) -> Iterator[None]:
        """Note an error instead of raising it, where others would wait."""
        if not self._layout.sharded:
            yield
        elif self._trouble is None:
            try:
                yield
            except (RuntimeError, ValueError, TypeError, MemoryError) as error:
                self._trouble = error
        else:
            with contextlib.suppress(Exception):
                yield

    def needs(self, buckets: bool, state: bool) -> None:
        """Note what is to be made here: buckets, or all of the state."""
        self.needed, self.blank = buckets, state

    def making_state(self, blank: bool) -> None:
        """All ranks make their state, without a step."""
        self.needed = True
        if self._layout.sharded:
            self.blank = bool(self._layout.total(torch.tensor([blank], dtype=torch.int64)))

    def stepping(self, params: Sequence[Tensor], grads: Sequence[Tensor | None]) -> list[Tensor]:
        """The parameters that have a gradient, the same on all ranks.

        Raises:
            RuntimeError: Any rank has noted an error; groups differ between ranks; or a parameter has a gradient on
                some ranks, and none on others that hold elements of it.
        """
        if not self._layout.sharded:
            return [p for p, grad in zip(params, grads, strict=True) if grad is not None]
        flags = [grad is not None for grad in grads]
        options, present = self._digest(), zlib.crc32(bytes(flags)) & MASK
        marks = [1, self._trouble is not None, self.needed, self.blank, options, options**2, present, present**2]
        ranks, troubled, needed, blank, *sums = self._layout.total(torch.tensor(marks, dtype=torch.int64)).tolist()
        self._raise(bool(troubled))
        self.needed, self.blank = bool(needed), bool(blank)
        # equal numbers on all ranks, and only those, have a sum of squares that is so small
        options_agree, present_agree = (ranks * squares == total**2 for total, squares in (sums[:2], sums[2:]))
        if not options_agree:
            raise RuntimeError(
                f"{type(self._optimizer).__name__}: the parameter groups differ between the ranks (number, order, "
                "shapes, or options such as lr): build the optimizer alike on all of them, and let schedulers that "
                "follow a metric follow the same one. Nothing has changed."
            )
        if present_agree:
            return [p for p, yes in zip(params, flags, strict=True) if yes]
        # an engine may leave out the gradient of what has no elements on a rank
        here = torch.tensor(flags, dtype=torch.int64)
        held = torch.tensor([self._layout.local(p).numel() > 0 for p in params], dtype=torch.int64)
        have, lack = self._layout.total(torch.stack([here, held * (1 - here)])).tolist()
        torn = [i for i, (yes, no) in enumerate(zip(have, lack, strict=True)) if yes and no]
        if torn:
            names = self._optimizer.param_names()
            some = ", ".join(names[i] for i in torn[:5]) + (f" and {len(torn) - 5} more" if len(torn) > 5 else "")
            raise RuntimeError(
                f"{type(self._optimizer).__name__}: {some}: some ranks have a gradient and others none, though they "
                "hold parts of the same parameter. Let every rank run the same backward pass (or give zeros). Nothing "
                "has changed."
            )
        return [p for p, yes in zip(params, have, strict=True) if yes]

    def zero_everywhere(self, params: Sequence[Tensor]) -> set[Tensor]:
        """Those of the parameters, the same on all ranks, that have no element but zero on any."""
        some = torch.zeros(len(params))
        with self.noting():
            if params:
                some = nonzero([self._layout.local(p) for p in params])
        troubled, *counts = self._layout.total(
            torch.cat([torch.tensor([float(self._trouble is not None)]), some])
        ).tolist()
        self._raise(bool(troubled))
        return {p for p, count in zip(params, counts, strict=True) if not count}

    def formed(self, buckets: str) -> None:
        """After state was made: raise on all ranks what went wrong on any.

        Args:
            buckets: What the buckets are, in words that must be the same on all ranks.

        Raises:
            RuntimeError: A rank could not make its state, or has lost what the others have.
        """
        digest = zlib.crc32(buckets.encode()) & MASK
        marks = torch.tensor([self._trouble is not None, 1, digest, digest**2], dtype=torch.int64)
        troubled, ranks, total, squares = self._layout.total(marks).tolist()
        self._raise(bool(troubled))
        if ranks * squares != total**2:
            raise RuntimeError(
                f"{type(self._optimizer).__name__}: the state of the same parameters differs between the ranks (their "
                "steps, or which of them have any): a rank has lost state, or was given another. Load the last "
                "checkpoint on all of them. No weight has changed."
            )

    def sound(self, together: bool = True) -> None:
        """Raise on all ranks what went wrong on any; if they are not ``together``, what went wrong here."""
        if self._layout.sharded and not together:
            self._raise(False)
        elif self._layout.sharded:
            self._raise(bool(self._layout.total(torch.tensor([self._trouble is not None], dtype=torch.int64))))

    def _raise(self, anywhere: bool) -> None:
        if self._trouble is not None:
            raise self._trouble
        if anywhere:
            raise RuntimeError(
                f"{type(self._optimizer).__name__}: another rank cannot take this step; its error says why. No rank "
                "has changed anything."
            )

    def _digest(self) -> int:
        """A checksum of groups and options."""
        layout, opt = self._layout, self._optimizer
        if self._trouble is not None:
            return 0
        told = [
            [(k, _plain(v)) for k, v in sorted(group.items()) if k != "params"] for _, group in opt.indexed_groups()
        ]
        return zlib.crc32(repr((told, layout.digest())).encode()) & MASK


def _plain(value: object) -> object:
    """An option without what would have to be waited for."""
    if isinstance(value, Tensor):
        return value.tolist() if value.device.type == "cpu" else None
    return value
