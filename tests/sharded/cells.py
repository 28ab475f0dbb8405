"""One cell of the matrix: an optimizer on an engine, with a kind of state, beside one process.

What is compared after 20 steps, for every parameter: its weights (replicas to the bit), every piece of its state by its
own shape, and how many collectives a step took.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

import hina_optim
from hina_optim.state.blockwise import BlockCodec
from hina_optim.state.ranges import RangeCodec, block_at, codes_of
from tests.every_optimizer import LR, loss_of, make
from tests.optim_cases import NOTHING
from tests.sharded.engines import Built, build, gradients, joined, same_bits
from tests.sharded.world import run

STEPS = 20
#: The name of an optimizer in which no element sees another one.
ELEMENTWISE = "AdamW alone"
#: Kind → dtype of the weights, options. Small parameters are to be in 8 bits, too.
KINDS: dict[str, tuple[torch.dtype, dict[str, Any]]] = {
    "fp64": (torch.float64, {"state_precision": "fp32"}),
    "fp32": (torch.float32, {"state_precision": "fp32"}),
    "bf16": (torch.float32, {"state_precision": "bf16"}),
    "8bit": (torch.float32, {"state_precision": "8bit", "min_8bit_size": 500}),
    "4bit": (torch.float32, {"state_precision": "4bit", "min_8bit_size": 500}),
    "bf16 weights": (torch.bfloat16, {"state_precision": "fp32"}),
}
#: The step whose collectives are counted: an ordinary one after everything was set up.
COUNTED = 14
#: What a cell may differ by, for each kind: weights relative to their movement, state, and codes that are others.
#: In float64 nothing but the order of sums differs. In float32 a sum that is rounded otherwise can make an element
#: cross a threshold; with few bits it can round to the other neighbor, which is right on average.
TOLERANCE: dict[str, tuple[float, float, float]] = {
    "fp64": (1e-9, 1e-9, 0.0),
    "fp32": (1e-4, 1e-4, 1e-3),
    "bf16": (1e-3, 1e-3, 1e-3),
    "8bit": (1e-3, 1e-3, 1e-3),
    "4bit": (1e-3, 1e-3, 1e-3),
    "bf16 weights": (1e-3, 1e-3, 1e-3),
}
#: Engines that lay parameters flat, and the worlds that they are run in. ZeRO keeps float32 weights of its own,
#: whatever the model's are.
FLAT: dict[str, tuple[int, ...]] = {
    "fsdp1": (2, 4),
    "fsdp1 flat": (2,),
    "zero1": (2, 4),
    "zero2": (2, 4),
    "zero3": (2, 4),
}


def kinds_of(engine: str) -> list[str]:
    """The kinds of state that an engine is run with; float64 shows the mathematics where that may differ."""
    if engine in FLAT:
        return [kind for kind in KINDS if KINDS[kind][0] == torch.float32]
    return [kind for kind in KINDS if kind != "fp64" or engine in ("fsdp2", "fsdp2 last", "fsdp2 tp", "tp")]


Whole = dict[str, Tensor]
Pieces = dict[str, tuple[Tensor, Tensor]]


@dataclass
class Trained:
    """What is left of a run, complete.

    Attributes:
        weights: Name → value.
        state: ``"name/slot"`` → value as stored; of flat pieces, as decoded, and codes and scales of blocks beside it.
        collectives: Kind → how many the counted step took.
    """

    weights: Whole
    state: Whole
    collectives: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Result:
    """How far a cell is from one process.

    Attributes:
        error: The largest ``‖w − w₁‖ / ‖w₁ − w₀‖`` of any parameter.
        worst: Which one that is.
        state: The largest ``‖s − s₁‖ / ‖s₁‖`` of any state that is not codes.
        codes: Share of 8-bit codes and 16-bit numbers that are not the same.
        collectives: Kind → how many in a step.
    """

    error: float
    worst: str
    state: float
    codes: float
    collectives: Mapping[str, int]

    def fits(self, kind: str) -> bool:
        """Whether it is within the tolerance of its kind."""
        return all(x <= limit for x, limit in zip((self.error, self.state, self.codes), TOLERANCE[kind], strict=True))

    def __str__(self) -> str:
        if not self.error and not self.state and not self.codes:
            return "="
        return f"{self.error:.0e}" + (f" {self.codes:.0e}" if self.codes else "")


def made(name: str, named: Any, kind: str) -> Any:
    """An optimizer for a cell: a named one with everything on, or AdamW and nothing else."""
    options = KINDS[kind][1]
    if name == ELEMENTWISE:
        return hina_optim.HinaAdaptive(named, lr=LR, **NOTHING, **options)
    return make(name, named, **options)


COLLECTIVES = (
    *("all_reduce", "all_gather", "all_gather_into_tensor", "all_gather_object", "all_to_all", "all_to_all_single"),
    *("broadcast", "broadcast_object_list", "reduce", "reduce_scatter", "reduce_scatter_tensor", "gather", "scatter"),
    *("gather_object", "barrier", "send", "recv"),
)


@contextlib.contextmanager
def counted() -> Iterator[dict[str, int]]:
    """Count calls of torch.distributed by name; torch's own CommDebugMode makes a step slow."""
    counts: dict[str, int] = {}
    before = {name: getattr(dist, name) for name in COLLECTIVES}

    def counting(name: str, function: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            counts[name] = counts.get(name, 0) + 1
            return function(*args, **kwargs)

        return call

    try:
        for name, function in before.items():
            setattr(dist, name, counting(name, function))
        yield counts
    finally:
        for name, function in before.items():
            setattr(dist, name, function)


def train(built: Built, name: str, kind: str, steps: int = STEPS) -> tuple[Any, dict[str, int]]:
    """Train with known gradients; the optimizer, and what the counted step called."""
    optimizer = made(name, built.named, kind)
    counts: dict[str, int] = {}
    for step in range(steps):
        built.give(gradients(built.shapes, step))
        optimizer.report_loss(loss_of(step))
        if step == COUNTED:
            with counted() as counts:
                optimizer.step()
        else:
            optimizer.step()
    return optimizer, counts


def whole(value: Tensor) -> Tensor:
    """Complete, from all ranks."""
    value = value.detach()
    return (value.full_tensor() if isinstance(value, DTensor) else value).clone()


def stored(optimizer: Any, built: Built) -> Whole:
    """All state, complete, called by all ranks in the same order."""
    return {
        f"{name}/{slot}": whole(value)
        for name, p in built.named
        for slot, value in sorted(optimizer.state[p].items())
        if isinstance(value, Tensor)
    }


def rank_main(rank: int, engine: str, names: Sequence[str], kinds: Sequence[str]) -> list[Any]:
    """What :func:`together` puts together, for several cells in one world."""
    found: list[Any] = []
    for kind in kinds:
        for name in names:
            if engine in FLAT:
                found.append(train_flat(engine, name, kind))
                continue
            built = build(engine, KINDS[kind][0])
            optimizer, counts = train(built, name, kind)
            found.append((built.pieces(), stored(optimizer, built), counts))
    return found


def train_flat(engine: str, name: str, kind: str) -> tuple[Pieces, Pieces, dict[str, int]]:
    """The same on an engine that lays parameters flat: pieces of the weights, and of the state."""
    from tests.sharded_state_cases import name_of, start  # loads the frameworks

    ran = start(engine, optimizer=functools.partial(made, name, kind=kind))
    ran.step(STEPS)
    return ran.pieces(), decoded(ran.optimizer, {name_of(m): m for m in ran.members()}), {}


def decoded(optimizer: Any, members: Mapping[str, Any]) -> Pieces:
    """``"name/slot"`` → places and values of what is here of the state; of blocks, codes and scales, too."""
    found = {}
    for name, member in members.items():
        bucket = optimizer._buckets._of[member.param]
        for slot in bucket.slots:
            if slot.name not in bucket.key.zero_anchors:
                value = bucket.decoded(member, slot.name).reshape(-1)
                places = member.shard.index(value.device) if slot.shape == "like" else torch.arange(value.numel())
                found[f"{name}/{slot.name}"] = places, value
                codec = bucket.codecs[slot.name]
                if isinstance(codec, (BlockCodec, RangeCodec)):
                    codes, scales = (member.state[slot.name + suffix] for suffix in codec.parts)
                    if codec.per_byte > 1:
                        local = tuple(optimizer._layout.local(member.param).shape)
                        codes = codes_of(codec, codes[None], (1, *local))
                    codes, scales = codes.reshape(-1), scales.reshape(-1)
                    block = codec.block if isinstance(codec, BlockCodec) else codec.blocks.block
                    first = block_at(member.info.shape, block, member.shard.start) if scales.numel() else 0
                    found[f"{name}/{slot.name} codes"] = places, codes
                    found[f"{name}/{slot.name} scales"] = torch.arange(first, first + scales.numel()), scales
    return found


def together(ranks: Sequence[Any], shapes: Mapping[str, Sequence[int]]) -> Trained:
    """The run from what its ranks have; replicas must be equal to the bit."""
    weights = joined([pieces for pieces, _, _ in ranks], shapes)
    first = ranks[0][1]
    for rank, (_, state, counts) in enumerate(ranks):
        assert state.keys() == first.keys(), f"rank {rank} keeps other state: {sorted(state.keys() ^ first.keys())}"
        for slot, value in state.items():
            assert same_bits(value, first[slot]), f"{slot}: rank {rank} has another value than rank 0"
        assert counts == ranks[0][2], f"rank {rank} called other collectives: {counts}, rank 0 {ranks[0][2]}"
    return Trained(weights, first, ranks[0][2])


@functools.cache
def alone(name: str, kind: str) -> tuple[Trained, Whole, Whole]:
    """One process, its state decoded, and the weights that it began with; computed once a test process."""
    built = build("one", KINDS[kind][0])
    start = {n: p.detach().clone() for n, p in built.named}
    optimizer, _ = train(built, name, kind)
    params = [p for _, p in built.named]
    members = {member.name: member for _, member in optimizer._buckets.identities.members(params)}
    clear = {key: value for key, (_, value) in decoded(optimizer, members).items()}
    return Trained({n: p.detach().clone() for n, p in built.named}, stored(optimizer, built)), clear, start


def run_cells(engine: str, size: int, names: Sequence[str], kinds: Sequence[str]) -> dict[tuple[str, str], Result]:
    """Cells of one engine and size, in one world: (optimizer, kind) → result.

    Raises:
        AssertionError: Replicas differ, state has other names or shapes than in one process.
        WorldError: A rank failed.
    """
    shapes = build("one").shapes
    order = [(name, kind) for kind in kinds for name in names]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if engine in FLAT:  # once here, not in every fork
            importlib.import_module("tests.sharded_state_cases")
        if engine.startswith("zero"):
            importlib.import_module("deepspeed")
    ranks = run(rank_main, size, engine, names, kinds, limit=120.0 + 60.0 * len(order))
    results = {}
    for i, (name, kind) in enumerate(order):
        expected, clear, start = alone(name, kind)
        found = [rank[i] for rank in ranks]
        if engine in FLAT:
            weights = joined([pieces for pieces, _, _ in found], shapes)
            state = joined([pieces for _, pieces, _ in found], {key: value.shape for key, value in clear.items()})
            results[name, kind] = compare(Trained(weights, state), Trained(expected.weights, clear), start)
        else:
            results[name, kind] = compare(together(found, shapes), expected, start)
    return results


def compare(found: Trained, expected: Trained, start: Whole) -> Result:
    """Measure; raises AssertionError where there is nothing to measure."""
    errors = {}
    for name, value in expected.weights.items():
        moved = (value.double() - start[name].double()).norm()
        assert moved > 0, f"{name} did not move in one process"
        errors[name] = float((found.weights[name].double() - value.double()).norm() / moved)
    worst = max(errors, key=errors.__getitem__)
    here, there = found.state.keys(), expected.state.keys()
    assert here == there, f"only sharded: {sorted(here - there)}; only in one process: {sorted(there - here)}"
    far, different, of = 0.0, 0, 0
    for slot, value in expected.state.items():
        mine = found.state[slot]
        assert mine.shape == value.shape and mine.dtype == value.dtype, (
            f"{slot} is {mine.dtype} {tuple(mine.shape)}, in one process {value.dtype} {tuple(value.shape)}"
        )
        if value.dtype in (torch.float32, torch.float64) and value.numel():
            a, b = mine.double(), value.double()
            far = max(far, float((a - b).norm() / b.norm().clamp(min=1e-30)))
        else:
            different, of = different + int((mine != value).sum()), of + value.numel()
    return Result(errors[worst], worst, far, different / of if of else 0.0, found.collectives)
