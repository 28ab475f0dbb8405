"""guard_memory in real processes of accelerate: one is short of memory, all do the same."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
from torch import Tensor

from tests.accelerate_worlds import ACCUMULATE, accelerator_with, built, complete, enter
from tests.sharded.world import run

STEPS = 5


class Guarded(NamedTuple):
    """What a rank has to tell: the same on all of them, but for what it read and saved itself."""

    actions: list[tuple[int, str, list[str]]]
    predicted: list[int]
    saved: list[int]
    precisions: list[set[str]]
    weights: dict[str, Tensor]
    logged: dict[int, dict[str, float]]


def guarded(rank: int, engine: str, size: int, options: dict[str, Any]) -> Guarded:
    """Train with a guard; memory is short on the last rank alone, after step 2, and again after step 4."""
    from hina_lightning.accelerate import guard_memory, prepare, unwrap_optimizer
    from hina_optim.memory import MemoryGuard, MemoryReading, ScriptedProbe
    from hina_optim.memory.probes import GIB

    enter(engine, size)
    logged: dict[int, dict[str, float]] = {}
    accelerator = accelerator_with(logged)
    model, optimizer, scheduler, loader = built("HinaAdaptive")
    model, optimizer, loader, scheduler = prepare(accelerator, model, optimizer, loader, scheduler)
    # one is read when it starts, and one after each action
    short = [0.1, 0.5, 0.95, 0.5, 0.5, 0.95, 0.5] if rank == size - 1 else [0.5]
    probe = ScriptedProbe([MemoryReading(int(x * 10 * GIB), 10 * GIB) for x in short])
    guard = MemoryGuard(probe=probe, **{"every_n_steps": 1, "cooldown_steps": 0, **options})
    guard_memory(accelerator, guard, optimizer)
    inner, precisions = unwrap_optimizer(optimizer), []
    batches = iter(loader)
    for _ in range(STEPS):
        for _ in range(ACCUMULATE):
            with accelerator.accumulate(model):
                accelerator.backward(model(next(batches)))
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
        precisions.append({group["state_precision"] for group in inner.param_groups})
    return Guarded(
        [(a["step"], a["reason"], [r["rung"] for r in a["reports"][0]["actions"]]) for a in guard.actions],
        [a["bytes_predicted"] for a in guard.actions],
        [a["bytes_saved"] for a in guard.actions],
        precisions,
        complete(model, getattr(model, "module", model)),
        logged,
    )


ZERO = [pytest.param("zero2", 2, marks=pytest.mark.sharded)]


@pytest.mark.parametrize(("engine", "size"), [("ddp", 2), ("ddp", 4), ("fsdp2", 2), *ZERO])
def test_all_processes_take_the_rungs_that_one_needs(engine: str, size: int) -> None:
    if engine.startswith("zero"):
        from tests.accelerate_worlds import without_builds

        without_builds()
    found = run(guarded, size, engine, size, {}, launched=True)
    for rank, one in enumerate(found):
        assert [action[:2] for action in one.actions] == [(2, "soft"), (4, "soft")], rank
        assert one.actions == found[0].actions and one.actions[0][2] == ["bf16"], "too small for 8 bits"
        assert one.saved == one.predicted and one.saved[0] > 0 and one.saved[1] == 0
        assert one.precisions == [{"fp32"}, *[{"bf16"}] * 4]
        assert one.weights.keys() == found[0].weights.keys()
        assert all(w.equal(found[0].weights[name]) for name, w in one.weights.items()), "all go on as one"
        # the main process logs its own memory: when it starts, and after every step, never in the middle of one
        read = [(step, one.logged[step]["mem/pressure"]) for step in sorted(one.logged)]
        assert read[1:] == ([(step, pytest.approx(0.5)) for step in range(1, STEPS + 1)] if rank == 0 else [])


def test_no_process_acts_in_a_dry_run() -> None:
    for one in run(guarded, 2, "ddp", 2, {"dry_run": True}, launched=True):
        assert [action[:2] for action in one.actions] == [(2, "soft"), (4, "soft")]
        assert one.saved == [0, 0] and one.predicted[0] > 0 and one.precisions == [{"fp32"}] * STEPS


def test_back_again_when_no_process_is_short() -> None:
    """Asked to, all take back what they gave up: after step 3, once the last one has room again."""
    for one in run(guarded, 2, "ddp", 2, {"relax": True, "every_n_steps": 1}, launched=True):
        assert [action[:2] for action in one.actions][:2] == [(2, "soft"), (3, "relax")]
        assert one.precisions[1:3] == [{"bf16"}, {"fp32"}]
