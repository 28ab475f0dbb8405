"""Memory before the first step: what parameters, gradients, state and the step itself will take, from shapes alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import Tensor, nn

from hina_optim import arguments as rule
from hina_optim.engine import sizes
from hina_optim.memory.account import as_size
from hina_optim.memory.ladder import LADDER, Change, Rung
from hina_optim.memory.probes import GIB
from hina_optim.memory.shards import Local, local_numel, local_parts

if TYPE_CHECKING:
    from hina_optim.engine.optimizer import HinaOptimizer

__all__ = ["BudgetError", "MemoryPlan", "PlannedRung", "Sharding", "plan", "plan_of"]

Sharding = Literal["none", "ddp", "fsdp", "zero1", "zero2", "zero3"]

#: Engines under which an optimizer sees a float32 copy of the weights, flat and cut anywhere.
_ZERO = ("zero1", "zero2", "zero3")
_META = (
    "The weights are not there, so nothing is known to be zero: a LoRA B, which begins at zero, is counted with a full "
    "anchor, which it will not keep."
)
_ASSUMED: dict[str, str] = {
    "none": "",
    "ddp": "DDP: every rank holds everything; its communication buckets are not counted.",
    "fsdp": (
        "FSDP2: dimension 0 in pieces of ceil(rows / ranks), so the first rank has the most; the layer that is "
        "gathered for forward and backward is not counted."
    ),
    "zero1": (
        "ZeRO-1: weights and gradients whole on every rank; the optimizer's float32 copy of each group is one flat "
        "tensor, padded to a multiple of 2 x ranks and cut evenly."
    ),
    "zero2": "ZeRO-2: as ZeRO-1, with the gradients cut like the optimizer's copy.",
    "zero3": "ZeRO-3: every weight in flat pieces of ceil(elements / ranks), with a float32 copy for the optimizer.",
}
_WHOLE = "State of rows, columns and fixed size is whole on every rank, also on those that hold nothing else of it."


class BudgetError(ValueError):
    """A budget that not even the parameters fit into. ``plan`` says what is needed."""

    def __init__(self, message: str, plan: MemoryPlan) -> None:
        super().__init__(f"{message}\n{plan}")
        self.plan = plan


@dataclass(frozen=True)
class PlannedRung:
    """One step of the ladder, with all before it: what the state takes then, and the whole.

    Attributes:
        name: ``"as built"``, or the rung.
        state_bytes: Optimizer state, wherever it is.
        host_bytes: What of it is in host memory.
        total_bytes: Everything in the plan that is on the device, with such a state.
        fits: Whether that is within the budget; None without one.
        cost: What is paid, in words.
    """

    name: str
    state_bytes: int
    host_bytes: int
    total_bytes: int
    fits: bool | None
    cost: str


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes on one rank: the fullest. ``str()`` gives a table.

    Attributes:
        optimizer: Class of the optimizer.
        sharding: How parameters are shared among ranks.
        world_size: Number of ranks.
        rank: The rank that the bytes are those of.
        trained: Elements that are trained, of the whole model.
        frozen: Elements that are not.
        parameter_bytes: Weights.
        master_bytes: The engine's float32 copy of those that are trained (ZeRO).
        gradient_bytes: Gradients, of the weights' dtype.
        state_bytes: Optimizer state as the arguments ask for it.
        host_bytes: What of it is in host memory.
        state: State name → dtype → bytes.
        temporary_bytes: What the step takes beside, at most, about: the engine's own bound.
        rungs: The ladder, from the top.
        vram_bytes: The budget, or None.
        notes: What was assumed.
    """

    optimizer: str
    sharding: Sharding
    world_size: int
    rank: int
    trained: int
    frozen: int
    parameter_bytes: int
    master_bytes: int
    gradient_bytes: int
    state_bytes: int
    host_bytes: int
    temporary_bytes: int
    vram_bytes: int | None
    rungs: tuple[PlannedRung, ...]
    notes: tuple[str, ...]
    state: Mapping[str, Mapping[str, int]] = field(default_factory=dict)

    @property
    def total_bytes(self) -> int:
        """All that is on the device: a step at its peak, without activations."""
        return self.rungs[0].total_bytes

    @property
    def rung(self) -> str | None:
        """The first step of the ladder that fits the budget; None if none does or there is no budget."""
        return next((rung.name for rung in self.rungs if rung.fits), None)

    def __str__(self) -> str:
        """A table for people."""
        one = f" on rank {self.rank} of {self.world_size} ({self.sharding})" if self.sharding != "none" else ""
        per = self.state_bytes / max(1, self.trained)
        lines = [
            f"{self.optimizer}: {self.trained:,} parameters trained, {self.frozen:,} frozen{one}",
            f"  parameters       {as_size(self.parameter_bytes):>12}",
            *([f"  float32 copy     {as_size(self.master_bytes):>12}"] if self.master_bytes else []),
            f"  gradients        {as_size(self.gradient_bytes):>12}",
            f"  optimizer state  {as_size(self.state_bytes):>12}"
            + (f"  ({per:.2f} bytes a trained parameter)" if self.sharding in ("none", "ddp") else ""),
        ]
        for name, kinds in sorted(self.state.items(), key=lambda item: -sum(item[1].values())):
            if sum(kinds.values()) >= self.state_bytes / 1000:
                lines += [f"    {name:<17}{as_size(size):>10}  {dtype}" for dtype, size in kinds.items()]
        if self.host_bytes:
            lines.append(f"    of it on the host{as_size(self.host_bytes):>11}")
        lines += [
            f"  while stepping   {as_size(self.temporary_bytes):>12}  at most",
            f"  total            {as_size(self.total_bytes):>12}  (activations not counted)",
        ]
        if self.vram_bytes is not None:
            lines.append(f"Within {as_size(self.vram_bytes)}: {self.rung or 'nothing on the ladder fits'}")
        for rung in self.rungs:
            mark = "" if rung.fits is None else ("  fits" if rung.fits else "  does not fit")
            state = as_size(rung.state_bytes - rung.host_bytes)
            lines.append(f"  {rung.name:<30}{state:>10} state{as_size(rung.total_bytes):>12}{mark}")
        return "\n".join([*lines, *(f"* {note}" for note in self.notes)])


def plan(
    params_or_model_or_shapes: Any,
    optimizer: str | type[HinaOptimizer] = "HinaAdaptive",
    *,
    preset: str | None = None,
    world_size: int = 1,
    sharding: Sharding = "none",
    vram_gb: float | None = None,
    rank: int | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
    **arguments: Any,
) -> MemoryPlan:
    """Say what a training will take before it begins.

    State bytes are those that the optimizer then holds, to the byte. Nothing is allocated for shapes or for modules on
    the meta device: a model of 70 billion parameters takes seconds.

    Args:
        params_or_model_or_shapes: A module (what requires no grad counts as frozen); parameters, named parameters or
            groups; or shapes: a mapping from names to shapes, pairs of both, or shapes alone. Names tell what belongs
            to an adapter.
        optimizer: A name, as for ``create_optimizer``, or a class.
        preset: A set of arguments, as for ``create_optimizer``.
        world_size: Number of ranks, ≥ 1.
        sharding: How they share the parameters. What is assumed of each is in :attr:`MemoryPlan.notes`.
        vram_gb: GiB (2³⁰ bytes) of one device. The plan then says which step of the ladder fits.
        rank: Whose bytes. None: the rank with the most state.
        dtype: Of the parameters, where shapes are given.
        device: Where the parameters will be. None: where they are; shapes and meta tensors count as on a GPU. It
            decides about temporary memory, and whether there is anything to move to the host.
        **arguments: Of the optimizer.

    Raises:
        BudgetError: The weights alone do not fit into ``vram_gb``; has the plan.
        ValueError: An unknown sharding, a rank that does not exist, a bad argument of the optimizer, or nothing given.
        TypeError: Something that is neither a module, nor parameters, nor shapes.

    Example:
        >>> shapes = {"up": (4096, 1024), "down": (1024, 4096), "norm": (1024,)}
        >>> full, small = plan(shapes), plan(shapes, state_precision="8bit")
        >>> full.state["exp_avg"], small.state["exp_avg"]
        ({'float32': 33558528}, {'uint8': 8388608, 'float32': 135168})
        >>> plan(shapes, vram_gb=0.63).rung
        'anchor_device=cpu'
    """
    owner = "plan"
    rule.check(owner, "sharding", sharding, rule.one_of(*get_args(Sharding)))
    rule.check(owner, "world_size", world_size, rule.INTERVAL)
    if vram_gb is not None:
        rule.check(owner, "vram_gb", vram_gb, rule.POSITIVE)
    if sharding == "none" and world_size != 1:
        raise ValueError(f"plan: world_size={world_size} with sharding='none'; say how: 'ddp', 'fsdp', 'zero1' to 3.")
    if rank is not None and not 0 <= rank < world_size:
        raise ValueError(f"plan: rank={rank} is not valid: it must be an integer in [0, {world_size}).")
    frozen: list[Tensor] = []
    if isinstance(params_or_model_or_shapes, nn.Module):
        frozen = [p for p in params_or_model_or_shapes.parameters() if not p.requires_grad]
        given: Any = [(n, p) for n, p in params_or_model_or_shapes.named_parameters() if p.requires_grad]
    else:
        given = list(_parameters(params_or_model_or_shapes, dtype))
    built = _build(optimizer, given, preset, arguments)
    home = None if device is None else torch.device(device)
    return _planned(built, frozen, sharding, world_size, rank, vram_gb, home)


def plan_of(optimizer: HinaOptimizer, vram_gb: float | None = None) -> MemoryPlan:
    """The plan of an optimizer that exists, as its parameters lie here; they need no state yet."""
    return _planned(optimizer, [], "none", 1, 0, vram_gb)


def _build(optimizer: Any, given: Any, preset: str | None, arguments: dict[str, Any]) -> HinaOptimizer:
    # the registry knows the optimizers, which know this package: it can only be asked once all are there
    from hina_optim.registry import create_optimizer

    built: HinaOptimizer
    if isinstance(optimizer, type) and preset is None:
        built = optimizer(given, **arguments)
    else:
        name = optimizer.__name__ if isinstance(optimizer, type) else optimizer
        built = create_optimizer(name, given, preset=preset, **arguments)
    return built


def _parameters(given: Any, dtype: torch.dtype) -> Iterator[Any]:
    """Parameters, named where they have names; shapes become parameters on the meta device."""
    if isinstance(given, Tensor):
        raise TypeError("plan: got a tensor; pass [tensor], a module, or shapes.")
    for item in given.items() if isinstance(given, Mapping) else given:
        if isinstance(item, Mapping):
            yield {**item, "params": list(_parameters(item["params"], dtype))}
        elif isinstance(item, Tensor):
            yield item
        elif isinstance(item, Sequence) and len(item) == 2 and isinstance(item[0], str):
            yield item[0], item[1] if isinstance(item[1], Tensor) else _meta(item[1], dtype)
        else:
            yield _meta(item, dtype)


def _meta(shape: Any, dtype: torch.dtype) -> nn.Parameter:
    if not isinstance(shape, Iterable) or isinstance(shape, str):
        raise TypeError(f"plan: {shape!r} is neither a parameter nor a shape (a tuple of integers).")
    shape = tuple(shape)
    if not all(isinstance(n, int) and n >= 0 for n in shape):
        raise TypeError(f"plan: {shape!r} is not a shape: a tuple of integers >= 0.")
    return nn.Parameter(torch.empty(shape, dtype=dtype, device="meta"))


def _planned(
    optimizer: HinaOptimizer,
    frozen: Sequence[Tensor],
    sharding: Sharding,
    world_size: int,
    rank: int | None,
    vram_gb: float | None,
    device: torch.device | None = None,
) -> MemoryPlan:
    dtype = torch.float32 if sharding in _ZERO else None
    sharded_here = optimizer._layout.sharded
    zero = None if sharded_here else _zeros(optimizer)
    every = sizes.kept(optimizer, zero=zero, dtype=dtype, device=device)
    shapes = [one.info.shape for one in every]
    offsets = [one.group for one in every]
    whose = [rank] if rank is not None else _candidates(sharding, world_size, every)
    rank, local = max(
        ((r, local_parts(shapes, offsets, sharding, world_size, r)) for r in whose),
        key=lambda item: _total(every, item[1]),
    )
    whole = [(one.info.shape, one.param.element_size()) for one in every if one.param.requires_grad]
    whole += [(tuple(p.shape), p.element_size()) for p in frozen]
    weights = sum(local_numel(shape, sharding, world_size, rank) * size for shape, size in whole)
    if sharded_here:  # they lie here already as they will
        local = [Local(one.local_shape, one.start) for one in every]
        weights = sum(int(torch.Size(one.local_shape).numel()) * one.param.element_size() for one in every)
    here = sum(int(torch.Size(one.shape).numel()) for one in local)
    gradients = sum(
        int(torch.Size(one.info.shape if sharding in ("ddp", "zero1") else lies.shape).numel())
        * one.param.element_size()
        for one, lies in zip(every, local, strict=True)
    )
    master = 4 * here if sharding in _ZERO else 0
    cut = sharded_here or sharding not in ("none", "ddp")
    temporary = sizes.temporary_bytes(every, [one.shape for one in local], cut)
    base = weights + master + gradients
    budget = None if vram_gb is None else int(vram_gb * GIB)
    rungs = _rungs(optimizer, local, base, budget, zero, dtype, device, cut)
    notes = [_ASSUMED[sharding]] if _ASSUMED[sharding] else []
    if sharding not in ("none", "ddp"):
        notes.append(_WHOLE)
    if any(one.param.device.type == "meta" for one in every) and any(s.constant for one in every for s in one.slots):
        notes.append(_META)
    made = MemoryPlan(
        optimizer=type(optimizer).__name__,
        sharding=sharding,
        world_size=world_size,
        rank=rank,
        trained=sum(one.info.numel for one in every if one.param.requires_grad),
        frozen=sum(p.numel() for p in frozen),
        parameter_bytes=weights,
        master_bytes=master,
        gradient_bytes=gradients,
        state_bytes=rungs[0].state_bytes,
        host_bytes=rungs[0].host_bytes,
        temporary_bytes=temporary,
        vram_bytes=budget,
        rungs=rungs,
        notes=tuple(notes),
        state=_by_name(every, local),
    )
    if budget is not None and weights > budget:
        raise BudgetError(
            f"{made.optimizer}: the budget of {as_size(budget)} is smaller than the parameters themselves, "
            f"{as_size(weights)}: nothing that an optimizer can do will fit.",
            made,
        )
    return made


def _zeros(optimizer: HinaOptimizer) -> set[int]:
    """Positions of parameters without state whose weights are known to be zero."""
    places = optimizer._buckets.identities.places()
    return sizes.zero_positions(
        (position, p) for position, _, p in places if p.requires_grad and not optimizer.state.get(p)
    )


def _candidates(sharding: Sharding, world_size: int, every: Sequence[sizes.Kept]) -> list[int]:
    """Ranks among which the fullest is: the first one where every piece is cut with the largest pieces first.

    In 8 bits and in 4 a flat piece that begins within a block or a byte has a scale or a byte more than the first one.
    """
    coded = any(one.options["state_precision"] in ("8bit", "4bit") for one in every)
    anywhere = sharding in ("zero1", "zero2") or (sharding == "zero3" and coded)
    return list(range(world_size)) if anywhere else [0]


def _total(every: Sequence[sizes.Kept], local: Sequence[Local], hosted: bool = False) -> int:
    """Bytes of all state, or of what is in host memory."""
    parts = (part for one, lies in zip(every, local, strict=True) for part in one.parts(*lies))
    return sum(part.nbytes for part in parts if part.hosted or not hosted)


def _by_name(every: Sequence[sizes.Kept], local: Sequence[Local]) -> dict[str, dict[str, int]]:
    """State name → dtype → bytes; scales and the like count as what they belong to."""
    counts: dict[str, Counter[str]] = {}
    for one, lies in zip(every, local, strict=True):
        names = {slot.name for slot in one.slots}
        for part in one.parts(*lies):
            name = next((n for n in (part.name, part.name.rsplit("_", 1)[0]) if n in names), part.name)
            counts.setdefault(name, Counter())[str(part.dtype).removeprefix("torch.")] += part.nbytes
    return {name: dict(kinds) for name, kinds in counts.items()}


def _rungs(
    optimizer: HinaOptimizer,
    local: Sequence[Local],
    base: int,
    budget: int | None,
    zero: set[int] | None,
    dtype: torch.dtype | None,
    device: torch.device | None,
    cut: bool,
) -> tuple[PlannedRung, ...]:
    """The ladder from the top, each step with all before it."""
    groups = [dict(group) for group in optimizer.param_groups]

    def planned(name: str, cost: str) -> PlannedRung:
        every = sizes.kept(optimizer, groups, zero, dtype, device)
        state, host = _total(every, local), _total(every, local, hosted=True)
        total = base + state - host + sizes.temporary_bytes(every, [lies.shape for lies in local], cut)
        return PlannedRung(name, state, host, total, None if budget is None else total <= budget, cost)

    found = [planned("as built", "")]
    enabled = all(group.get("memory_efficient", True) for group in groups)
    for rung in _changes(LADDER) if enabled else ():
        before = [dict(group) for group in groups]
        for group in groups:
            group.update(rung.options(group))
        taken = planned(rung.name, rung.cost)
        if taken.state_bytes - taken.host_bytes < found[-1].state_bytes - found[-1].host_bytes:
            found.append(taken)
        else:
            groups = before
    return tuple(found)


def _changes(ladder: Sequence[Rung]) -> Iterator[Change]:
    return (rung for rung in ladder if isinstance(rung, Change))
