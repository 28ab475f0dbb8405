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


@pytest.mark.parametrize("size", [2, 4])
def test_all_ranks_act_when_one_has_to(size: int) -> None:
    on_ranks(size, _short_on_the_last, size)
