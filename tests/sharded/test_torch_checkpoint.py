"""torch's own sharded checkpoints carry our state to other world sizes and meshes, to the bit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from tests.every_optimizer import NAMES, loss_of
from tests.sharded.cells import KINDS, TOLERANCE, made, stored
from tests.sharded.engines import ENGINES, Built, build, gradients, joined, same_bits
from tests.sharded.world import WorldError, run

SAVED, END = 7, 12
Pieces = dict[str, tuple[Tensor, Tensor]]
Ended = dict[str, tuple[dict[str, Tensor], Pieces]]  # optimizer → its state when saved or loaded, weights at the end


def trained(built: Built, optimizer: Any, steps: range) -> None:
    for step in steps:
        built.give(gradients(built.shapes, step))
        optimizer.report_loss(loss_of(step))
        optimizer.step()


def saving(rank: int, engine: str, names: Sequence[str], kind: str, folder: Path, options: Any) -> Ended:
    """Train, save, and go on."""
    found = {}
    for name in names:
        built = build(engine, KINDS[kind][0])
        optimizer = made(name, built.named, kind)
        trained(built, optimizer, range(SAVED))
        model_state, optimizer_state = get_state_dict(built.model, optimizer, options=options)
        if options is not None and options.full_state_dict:
            if rank == 0:
                torch.save({"model": model_state, "optimizer": optimizer_state}, folder / f"{name}.pt")
        else:
            dcp.save({"model": model_state, "optimizer": optimizer_state}, checkpoint_id=folder / name)
        state = stored(optimizer, built)
        trained(built, optimizer, range(SAVED, END))
        found[name] = state, built.pieces()
    return found


def loading(rank: int, engine: str, names: Sequence[str], kind: str, folder: Path, options: Any) -> Ended:
    """Load into a fresh model and optimizer, and go on to the same step."""
    found = {}
    for name in names:
        built = build(engine, KINDS[kind][0])
        optimizer = made(name, built.named, kind)
        if options is not None and options.full_state_dict:
            # only rank 0 reads where it is sent to the others
            read = rank == 0 or not options.broadcast_from_rank0
            both = torch.load(folder / f"{name}.pt", weights_only=True) if read else {"model": {}, "optimizer": {}}
        else:
            model_state, optimizer_state = get_state_dict(built.model, optimizer, options=options)
            both = {"model": model_state, "optimizer": optimizer_state}
            dcp.load(both, checkpoint_id=folder / name)
        # not set_state_dict: it leaves out the model where a rank brings nothing, and hangs
        set_model_state_dict(built.model, both["model"], options=options)
        set_optimizer_state_dict(built.model, optimizer, both["optimizer"], options=options)
        state = stored(optimizer, built)
        trained(built, optimizer, range(SAVED, END))
        found[name] = state, built.pieces()
    return found


def check(
    saver: tuple[str, int], loader: tuple[str, int], names: Sequence[str], kind: str, folder: Path, options: Any = None
) -> None:
    args = names, kind, folder, options
    limit = 60.0 + 60.0 * len(names)
    before = run(saving, saver[1], saver[0], *args, limit=limit)
    after = run(loading, loader[1], loader[0], *args, limit=limit)
    shapes = build("one").shapes
    for name in names:
        same_state(before[0][name][0], [found[name][0] for found in after], name)
        straight = joined([found[name][1] for found in before], shapes)
        resumed = joined([found[name][1] for found in after], shapes)
        for p, value in straight.items():
            error = float((resumed[p].double() - value.double()).norm() / value.double().norm().clamp(min=1e-3))
            assert error <= TOLERANCE[kind][0], f"{name}: {p} goes on otherwise, by {error}"


def same_state(saved: Mapping[str, Tensor], loaded: Sequence[Mapping[str, Tensor]], name: str) -> None:
    for rank, state in enumerate(loaded):
        assert state.keys() == saved.keys(), f"{name}: {sorted(state.keys() ^ saved.keys())}"
        wrong = [slot for slot, value in saved.items() if not same_bits(state[slot], value)]
        assert not wrong, f"{name}: rank {rank} has other state: {wrong}"


MOVES = [
    (("fsdp2", 2), ("fsdp2", 4)),
    (("fsdp2", 4), ("fsdp2", 2)),
    (("fsdp2", 2), ("one", 1)),
    (("fsdp2", 2), ("ddp", 2)),
    (("ddp", 2), ("fsdp2", 4)),
    (("hsdp", 4), ("fsdp2", 2)),
    (("fsdp2 tp", 4), ("fsdp2", 2)),
    (("fsdp2", 2), ("fsdp2 tp", 4)),
    (("fsdp2 last", 4), ("fsdp2", 2)),
    (("tp", 2), ("fsdp2", 4)),
]
IDS = [f"{a}-{n} to {b}-{m}" for (a, n), (b, m) in MOVES]


@pytest.mark.sharded
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("saver", "loader"), MOVES, ids=IDS)
def test_every_optimizer_moves(saver: tuple[str, int], loader: tuple[str, int], kind: str, tmp_path: Path) -> None:
    if kind in ENGINES[saver[0]].refuses:
        with pytest.raises(WorldError, match=ENGINES[saver[0]].refuses[kind]):
            check(saver, loader, NAMES, kind, tmp_path)
        return
    check(saver, loader, NAMES, kind, tmp_path)


@pytest.mark.parametrize(
    ("saver", "loader", "kind"), [(*MOVES[0], "8bit"), (*MOVES[1], "4bit"), (*MOVES[2], "bf16"), (*MOVES[6], "fp32")]
)
def test_moves(saver: tuple[str, int], loader: tuple[str, int], kind: str, tmp_path: Path) -> None:
    check(saver, loader, ["HinaAdaptive", "Automagic_CameAMP_Improved_8Bit"], kind, tmp_path)


FULL = {
    "broadcast": StateDictOptions(full_state_dict=True, cpu_offload=True, broadcast_from_rank0=True),
    "each": StateDictOptions(full_state_dict=True, cpu_offload=True),
    "flat": StateDictOptions(flatten_optimizer_state_dict=True),
}


@pytest.mark.parametrize("options", FULL.values(), ids=FULL)
def test_consolidated_and_flattened(options: StateDictOptions, tmp_path: Path) -> None:
    check(("fsdp2", 2), ("fsdp2", 4), ["Automagic_CameAMP_Improved_8Bit"], "8bit", tmp_path, options)


def asked(rank: int, engine: str) -> list[str]:
    """What asking a fresh optimizer for its state does: torch takes a step with zero gradients and lr 0."""
    built = build(engine)
    optimizer = made("HinaAdaptive", built.named, "fp32")
    before = built.pieces()
    set_optimizer_state_dict(built.model, optimizer, get_optimizer_state_dict(built.model, optimizer))
    changed = [name for name, (_, value) in built.pieces().items() if not same_bits(value, before[name][1])]
    return changed + [name for name, p in built.named if float(optimizer.state[p]["step"])]


@pytest.mark.parametrize(("engine", "size"), [("fsdp2", 2), ("fsdp2 tp", 4)])
def test_asking_for_state_changes_nothing(engine: str, size: int) -> None:
    assert run(asked, size, engine) == [[]] * size
