"""One small model on any engine, stepped with known gradients, its optimizer saved and loaded."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hina_lightning import sharded_state
from hina_lightning.sharded_state.loading import open_checkpoint, read_boxes
from hina_optim.engine.optimizer import HinaOptimizer
from hina_optim.state.jobs import Read
from hina_optim.state.names import plain_name
from hina_optim.state.portable import members
from hina_optim.state.regions import whole
from tests.every_optimizer import loss_of, make
from tests.sharded import engines
from tests.sharded.flat import initialized, wrapped

#: What is run: engine and number of ranks.
Where = tuple[str, int]
FLAT = ("fsdp1", "fsdp1 flat", "zero1", "zero2", "zero3")
EVERYWHERE: list[Where] = [
    ("one", 1),
    *[("ddp", n) for n in (1, 2, 4)],
    *[("fsdp2", n) for n in (1, 2, 4)],
    ("fsdp2 last", 2),
    ("hsdp", 4),
    ("fsdp2 tp", 4),
    *[("fsdp1", n) for n in (1, 2, 4)],
    ("fsdp1 flat", 2),
    *[(f"zero{stage}", n) for stage in (1, 2, 3) for n in (1, 2, 4)],
]
#: Small parameters are to be in 8 bits, too.
KINDS: dict[str, dict[str, Any]] = {
    "fp32": {"state_precision": "fp32"},
    "bf16": {"state_precision": "bf16"},
    "8bit": {"state_precision": "8bit", "min_8bit_size": 64},
    "4bit": {"state_precision": "4bit", "min_8bit_size": 64},
}
BEFORE, AFTER = 4, 5

Complete = dict[str, Tensor]


def begin(rank: int) -> None:
    """What a rank does first."""
    del rank
    warnings.simplefilter("ignore")


@dataclass
class Run:
    """An optimizer on an engine.

    Attributes:
        optimizer: The innermost one.
        keep: What must live as long: the model, the engine.
        shapes: Of the parameters, by name.
        taken: Steps.
    """

    optimizer: HinaOptimizer
    keep: Any
    shapes: dict[str, tuple[int, ...]]
    taken: int = 0

    def step(self, steps: int) -> None:
        """Step with the gradients of the steps that come next."""
        for _ in range(steps):
            self.give(engines.gradients(self.shapes, self.taken))
            self.optimizer.report_loss(loss_of(self.taken))
            with self.optimizer.whole_groups():  # ZeRO-3 does it itself, for one vector after the other
                self.optimizer.step()
            self.taken += 1

    def members(self) -> list[Any]:
        """The parameters as the engine sees them."""
        with self.optimizer.whole_groups():
            self.optimizer.settle_layout()
            return [member for _, member in members(self.optimizer)]

    def give(self, complete: Mapping[str, Tensor]) -> None:
        """Set what is here of complete gradients."""
        self.optimizer.settle_layout()
        layout = self.optimizer._layout
        fragments = getattr(layout, "fragments", {})
        for holder in {f.holder for f in fragments.values()}:
            holder.grad = torch.zeros_like(holder)
        for member in self.members():
            p = member.param
            local = layout.local(p)
            here = complete[name_of(member)].reshape(-1)[member.shard.index(torch.device("cpu"))]
            here = here.reshape(local.shape).to(local.dtype)
            if p in fragments:
                held = fragments[p]
                held.holder.grad.reshape(-1)[held.offset : held.offset + here.numel()] = here.reshape(-1)
            else:
                p.grad = engines.like(p, here)

    def pieces(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Name → places and values of the weights that are here."""
        layout = self.optimizer._layout
        return {
            name_of(m): (m.shard.index(torch.device("cpu")), layout.local(m.param).reshape(-1).clone())
            for m in self.members()
        }

    def set_weights(self, complete: Mapping[str, Tensor]) -> None:
        """Set what is here of complete weights."""
        with torch.no_grad():
            for member in self.members():
                local = self.optimizer._layout.local(member.param)
                here = complete[name_of(member)].reshape(-1)[member.shard.index(torch.device("cpu"))]
                local.copy_(here.reshape(local.shape))


def name_of(member: Any) -> str:
    """The name in the model that was not wrapped."""
    return plain_name(member.name)


def start(
    engine: str,
    kind: str = "fp32",
    optimizer: str | Callable[[Any], HinaOptimizer] = "HinaAdaptive",
    initial: Complete | None = None,
    deepspeed: dict[str, Any] | None = None,
    **options: Any,
) -> Run:
    """The model and an optimizer on an engine; called by all ranks.

    Args:
        engine: One of :data:`EVERYWHERE`.
        kind: Of state.
        optimizer: A name, or what makes one of named parameters.
        initial: Weights to begin with, for an engine of :data:`FLAT`; None: those of all tests.
        deepspeed: More of its configuration.
        options: Of the optimizer.
    """
    options = {**KINDS[kind], **options}

    def making(named: Any) -> HinaOptimizer:
        return make(optimizer, named, **options) if isinstance(optimizer, str) else optimizer(named)

    if engine not in FLAT:
        spread = "one" if engine == "ddp" and not torch.distributed.is_initialized() else engine
        built = engines.build(spread)
        named = list(built.model.named_parameters())  # with what wrappers add to the names
        return Run(making(named), built, built.shapes)
    from hina_lightning.sharding import bind

    model = engines.Model()
    engines.initialize(model, engines.weights if initial is None else lambda _, name, p: initial[name])
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    if engine.startswith("zero"):
        made = making(list(model.named_parameters()))
        told = {"train_batch_size": torch.distributed.get_world_size(), **(deepspeed or {})}
        keep = initialized(model, made, int(engine[-1]), **told)
    else:
        keep = wrapped(model, "FULL_SHARD", engine == "fsdp1", inner=("embed", "up", "conv"))
        made = making(list(keep.named_parameters()))
    bind(made, keep)
    return Run(made, keep, shapes)


def own_steps_main(rank: int, engine: str, path: Path) -> tuple[Any, Any]:
    """Train by the engine's own steps, save, go on; and go on from what was saved in a new engine."""
    begin(rank)
    size = torch.distributed.get_world_size()
    options = {"zero": {"sub_group_size": 700}} if engine == "zero3" else {}
    ends = []
    saved: Complete | None = None
    for first in (0, 3):
        run = start(engine, initial=saved, deepspeed=options)
        if first:
            sharded_state.load(path, run.optimizer)
        for step in range(first, 6):
            words, targets = engines.batch(step, rank, size)
            loss = (run.keep(words) - targets).square().mean()
            run.optimizer.report_loss(loss_of(step))
            run.keep.backward(loss)
            run.keep.step()
            if step == 2:
                sharded_state.save(path, run.optimizer)
                everyone: list[Any] = [None] * size
                torch.distributed.all_gather_object(everyone, run.pieces())
                saved = engines.joined(everyone, run.shapes)
        ends.append(run.pieces())
    return ends[0], ends[1]


def contents(path: Path) -> Complete:
    """Every stored tensor of a checkpoint, complete."""
    reader = open_checkpoint(path)
    table = reader.manifest.tensors()
    reads = [Read(key, shape, dtype, whole(shape), torch.device("cpu")) for key, (dtype, shape) in table.items()]
    return {read.key: value.view(read.shape) for read, value in zip(reads, read_boxes(reader, reads), strict=True)}


def save_main(rank: int, where: Where, kind: str, path: Path, options: dict[str, Any]) -> list[Any]:
    """Train, save, go on; the weights before and after."""
    begin(rank)
    run = start(where[0], kind, **options)
    run.step(BEFORE)
    sharded_state.save(path, run.optimizer, extra={"step": run.taken})
    between = run.pieces()
    run.step(AFTER)
    return [between, run.pieces()]


def load_main(
    rank: int, where: Where, kind: str, saved: Sequence[tuple[Path, Complete]], to: Path, options: dict[str, Any]
) -> list[Any]:
    """For every checkpoint: load, save again, go on; the weights at the end."""
    begin(rank)
    run = start(where[0], kind, **options)
    found = []
    for i, (path, weights) in enumerate(saved):
        run.set_weights(weights)
        run.taken = sharded_state.load(path, run.optimizer)["step"]
        sharded_state.save(to / str(i), run.optimizer)
        run.step(AFTER)
        found.append(run.pieces())
    return found
