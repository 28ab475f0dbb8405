"""The memory guard outside of Lightning: plain loops, Accelerate, transformers' Trainer, several processes."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from hina_optim import HinaAdaptive
from hina_optim.memory import MemoryGuard, MemoryReading, ScriptedProbe, trainer_callback
from hina_optim.memory.probes import GIB
from tests.processes import on_ranks

LIMIT = 10 * GIB


def reading(pressure: float) -> MemoryReading:
    return MemoryReading(int(pressure * LIMIT), LIMIT)


def every_step(*pressures: float, **options: Any) -> MemoryGuard:
    probe = ScriptedProbe([reading(p) for p in (0.0, *pressures)])
    return MemoryGuard(probe=probe, every_n_steps=1, cooldown_steps=0, **options)


def model_and_optimizer(width: int = 30, **options: Any) -> tuple[nn.Module, HinaAdaptive]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, width), nn.Tanh(), nn.Linear(width, 1))
    return model, HinaAdaptive(model.named_parameters(), lr=1e-3, **options)


def step(model: nn.Module, optimizer: Any) -> None:
    model(torch.ones(8, 4)).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


def test_in_a_plain_loop(caplog: pytest.LogCaptureFixture) -> None:
    model, optimizer = model_and_optimizer()
    guard = every_step(0.5, 0.95, 0.6)
    assert not guard.start(optimizer)
    acted = []
    with caplog.at_level(logging.WARNING, "hina_optim"), guard.watching():
        for _ in range(4):
            step(model, optimizer)
            acted.append(guard.after_step())
    assert acted == [False, True, False, False]
    (action,) = guard.actions
    assert (action["step"], action["reason"]) == (2, "soft")
    assert optimizer.param_groups[0]["state_precision"] == "bf16"
    assert action["bytes_saved"] == action["bytes_predicted"] > 0
    assert guard.message in caplog.text and "took bf16" in guard.message
    assert guard.metrics["mem/pressure"] == pytest.approx(0.6) and guard.metrics["mem/actions"] == 1
    assert json.loads(json.dumps(guard.state_dict())) == guard.state_dict()


def test_it_looks_at_intervals() -> None:
    _, optimizer = model_and_optimizer()
    guard = MemoryGuard(probe=ScriptedProbe([reading(0.1)]), every_n_steps=4)
    guard.start(optimizer)
    looked = []
    for i in range(1, 10):
        before = guard.metrics
        guard.after_step()
        if guard.metrics is not before:
            looked.append(i)
    assert looked == [1, 4, 8]


def test_it_plans_for_the_first_step() -> None:
    _, optimizer = model_and_optimizer(width=100_000)
    limit = int((GIB + 10_000_000) / 0.9)
    guard = MemoryGuard(probe=ScriptedProbe([MemoryReading(GIB, limit)]), hysteresis=0.0)
    assert guard.start(optimizer)
    assert guard.actions[0]["reason"] == "plan" and optimizer.param_groups[0]["state_precision"] != "fp32"


def device(used: float, available: float, peak: float = 0.0, retries: int = 0) -> MemoryReading:
    """Of a device of 100 GiB, in GiB."""
    held = int((used + 1) * GIB)
    return MemoryReading(int(used * GIB), 100 * GIB, int(peak * GIB), retries, held, int(available * GIB))


def looked(*readings: MemoryReading, **options: Any) -> MemoryGuard:
    """A guard after these readings, one a step; what it read after an action counts, too."""
    model, optimizer = model_and_optimizer(emergency_simplify=True)
    guard = MemoryGuard(
        probe=ScriptedProbe([device(1, 99), *readings]), **{"every_n_steps": 1, "cooldown_steps": 0, **options}
    )
    guard.start(optimizer)
    for _ in readings:
        step(model, optimizer)
        guard.after_step()
    return guard


def test_what_the_device_can_still_give() -> None:
    """Others have taken the memory: soft pressure far below the limit, for twice what must be left; until relief."""
    for used, available in ((1, 0.49), (40, 1.2)):  # less than 512 MiB; less than 3 % of 41.2 GiB
        guard = looked(device(used, available), device(used, available))
        assert [(a["step"], a["reason"]) for a in guard.actions] == [(1, "soft")], "it waits for relief"
        least = max(512 << 20, int(0.03 * (used + available) * GIB))
        assert guard.actions[0]["bytes_needed"] == pytest.approx(2 * least - available * GIB, abs=2)
        assert f"{available:.3g} GiB available" in guard.message or "MiB available" in guard.message
    assert looked(device(1, 0.51), device(40, 1.3)).actions == []
    # enough again is twice as much: not after the fourth reading, but after the sixth; one is read after an action
    steps = [device(1, x) for x in (0.4, 0.4, 0.9, 0.4, 1.1, 0.4, 0.4)]
    assert [a["step"] for a in looked(*steps).actions] == [1, 5]


def test_a_new_peak_is_taken_from_what_is_available() -> None:
    """The next step needs it again."""
    assert looked(device(10, 30, peak=38.7)).actions == []
    assert [a["reason"] for a in looked(device(10, 30, peak=38.9)).actions] == ["soft"]


def test_the_names_of_what_is_logged() -> None:
    guard = looked(device(10, 50, peak=20, retries=0))
    assert guard.metrics == pytest.approx(
        {
            "mem/used_gb": 10, "mem/free_gb": 90, "mem/reserved_gb": 11, "mem/allocated_peak_gb": 20,
            "mem/pressure": 0.2, "mem/alloc_retries": 0, "mem/actions": 0,
        }
    )  # fmt: skip


def test_it_relaxes_only_if_asked(caplog: pytest.LogCaptureFixture) -> None:
    """What was given up comes back once there is room for it beside the highest peak, less what was given back."""
    model, optimizer = model_and_optimizer(width=40_000)
    step(model, optimizer)
    saved = optimizer.state_bytes() - optimizer.state_bytes("bf16")
    soft = int(0.9 * LIMIT)
    low = soft - saved // 2

    def at(used: int, peak: int = 0, **more: Any) -> MemoryReading:
        return MemoryReading(used, LIMIT, peak, **more)

    def after(
        *readings: MemoryReading, first: MemoryReading | None = None, **options: Any
    ) -> tuple[list[tuple[int, str]], str]:
        model, optimizer = model_and_optimizer(width=40_000)
        guard = MemoryGuard(
            probe=ScriptedProbe([first or at(0), *readings]), every_n_steps=1, hysteresis=(soft - low) / LIMIT,
            **{"cooldown_steps": 0, **options},
        )  # fmt: skip
        step(model, optimizer)
        guard.start(optimizer)
        with caplog.at_level(logging.WARNING, "hina_optim"):
            for _ in readings:
                step(model, optimizer)
                guard.after_step()
        return [(a["step"], a["reason"]) for a in guard.actions], optimizer.param_groups[0]["state_precision"]

    strained, quiet = at(soft + 1), at(low - 2 * saved)
    assert after(strained, quiet, quiet, quiet) == ([(1, "soft")], "bf16")
    assert after(strained, quiet, quiet, quiet, relax=True) == ([(1, "soft"), (2, "relax")], "fp32")
    assert "took bf16 back after step 2" in caplog.text
    assert after(strained, *[quiet] * 4, relax=True, cooldown_steps=3) == ([(1, "soft"), (4, "relax")], "fp32")
    near = at(low - saved + 10)  # with what would come back, over what it aims for
    assert after(strained, near, near, relax=True) == ([(1, "soft")], "bf16")
    # the peak was reached before anything was given back, and would be again
    peaked = at(low - 2 * saved, peak=soft + 1)
    assert after(peaked, peaked, peaked, peaked, relax=True) == ([(1, "soft")], "bf16")
    # one from before the training will not be reached again
    both = [(1, "soft"), (2, "relax")]
    old = [at(reading.used_bytes, peak=LIMIT) for reading in (strained, quiet, quiet)]
    assert after(*old, first=at(0, peak=LIMIT), relax=True) == (both, "fp32")
    # the device was short; the peak was fine, and is so again with what was given back
    short = at(low - 2 * saved, low - 10, available_bytes=0)
    free = at(low - 2 * saved, low - 10, available_bytes=LIMIT)
    assert after(short, free, free, relax=True) == (both, "fp32")
    # where the probe tells the peak of the last steps, that counts, and none before
    high = at(low - 2 * saved, LIMIT, window_bytes=soft + 1)
    calm = at(low - 2 * saved, LIMIT, window_bytes=low - saved - 10)
    assert after(high, calm, calm, relax=True) == (both, "fp32")
    busy = at(low - 2 * saved, LIMIT, window_bytes=low - saved + 10)
    assert after(high, busy, busy, relax=True) == ([(1, "soft")], "bf16")
    assert after(strained, quiet, relax=True, dry_run=True) == ([(1, "soft")], "fp32")


def test_an_error_outside_of_memory_passes(tmp_path: Path) -> None:
    _, optimizer = model_and_optimizer()
    guard = every_step(0.5, snapshot_dir=tmp_path)
    guard.start(optimizer)
    with pytest.raises(RuntimeError, match="shapes"), guard.watching():
        raise RuntimeError("shapes")
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(RuntimeError, match="allocate"), guard.watching():
        raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate")
    (path,) = tmp_path.iterdir()
    assert path.name == "memory-rank0-step0.json" and "HinaAdaptive" in path.read_text()


def test_without_a_supporting_optimizer_it_is_an_error() -> None:
    model, _ = model_and_optimizer()
    with pytest.raises(ValueError, match=r"MemoryGuard needs an optimizer with optimize_for_vram\(\).*got SGD"):
        MemoryGuard().start(torch.optim.SGD(model.parameters(), lr=0.1))


def test_with_accelerate() -> None:
    accelerate = pytest.importorskip("accelerate")
    model, optimizer = model_and_optimizer()
    accelerator = accelerate.Accelerator(cpu=True)
    model, wrapped = accelerator.prepare(model, optimizer)
    guard = every_step(0.5, 0.95, 0.6)
    guard.start(wrapped)
    accelerator.register_for_checkpointing(guard)
    for _ in range(3):
        accelerator.backward(model(torch.ones(8, 4)).square().mean())
        wrapped.step()
        wrapped.zero_grad()
        guard.after_step()
    assert [a["step"] for a in guard.actions] == [2]
    assert optimizer.param_groups[0]["state_precision"] == "bf16"


def tiny_trainer(folder: Path, optimizer: Any, model: nn.Module) -> Any:
    transformers = pytest.importorskip("transformers")

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = model

        def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"loss": self.body(x).square().mean()}

    arguments = transformers.TrainingArguments(
        output_dir=str(folder), max_steps=6, per_device_train_batch_size=2, use_cpu=True, report_to=[],
        disable_tqdm=True, save_strategy="no", logging_strategy="no", gradient_accumulation_steps=2,
        remove_unused_columns=False,
    )  # fmt: skip
    data = [{"x": torch.ones(4)} for _ in range(32)]
    return transformers.Trainer(Model(), arguments, train_dataset=data, optimizers=(optimizer, None))


@pytest.mark.parametrize("given", [False, True])
def test_with_transformers(tmp_path: Path, given: bool) -> None:
    model, optimizer = model_and_optimizer()
    trainer = tiny_trainer(tmp_path, optimizer, model)
    guard = every_step(0.5, 0.95, 0.6)
    trainer.add_callback(trainer_callback(guard, trainer if given else None))
    with guard.watching():
        trainer.train()
    assert [a["step"] for a in guard.actions] == [2]
    assert optimizer.param_groups[0]["state_precision"] == "bf16"
    logged = [(row["step"], row["mem/actions"]) for row in trainer.state.log_history if "mem/actions" in row]
    assert logged == [(1, 0), (2, 1), (3, 1), (4, 1), (5, 1), (6, 1)]


def _short_on_the_last(rank: int, size: int) -> None:
    model, optimizer = model_and_optimizer()
    guard = every_step(*([0.5, 0.95, 0.85, 0.92, 0.7, 0.99] if rank == size - 1 else [0.5]))
    guard.start(optimizer)
    for _ in range(6):
        step(model, optimizer)
        guard.after_step()
    # the reading after an action is one of the script, too
    assert [(a["step"], a["reason"]) for a in guard.actions] == [(2, "soft"), (5, "hard"), (6, "hard")]
    assert guard.actions[0]["bytes_needed"] == pytest.approx(0.15 * LIMIT, abs=2)
    group = optimizer.param_groups[0]
    assert group["state_precision"] == "bf16" and not group["use_lr_mask"]


def _room_on_the_first(rank: int, size: int) -> None:
    """Relief on rank 0 alone, then on all; and on rank 0 alone, because the other once had a peak."""
    peak = MemoryReading(int(0.3 * LIMIT), LIMIT, int(0.95 * LIMIT))
    for late, expected in (
        # one is read after the action
        ([reading(p) for p in (0.0, 0.95, 0.6, 0.85, 0.85, 0.3)], [(1, "soft"), (4, "relax")]),
        ([reading(0.0), peak], [(1, "soft")]),
    ):
        model, optimizer = model_and_optimizer()
        probe = ScriptedProbe(late if rank == size - 1 else [reading(0.3)])
        guard = MemoryGuard(probe=probe, every_n_steps=1, cooldown_steps=0, relax=True)
        guard.start(optimizer)
        for _ in range(5):
            step(model, optimizer)
            guard.after_step()
        assert [(a["step"], a["reason"]) for a in guard.actions] == expected
        assert optimizer.param_groups[0]["state_precision"] == ("bf16" if len(expected) == 1 else "fp32")


def test_all_ranks_relax_when_all_can() -> None:
    on_ranks(2, _room_on_the_first, 2)


@pytest.mark.parametrize("size", [2, 4])
def test_all_ranks_act_when_one_has_to(size: int) -> None:
    on_ranks(size, _short_on_the_last, size)
