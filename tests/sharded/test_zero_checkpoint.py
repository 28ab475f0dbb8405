"""DeepSpeed's own checkpoints: a run that was saved and loaded is the one that was not, to the bit."""

from __future__ import annotations

import contextlib
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from hina_lightning.sharding import bind
from tests.every_optimizer import loss_of, make
from tests.sharded.flat import Given, initialized, load_deepspeed
from tests.sharded.test_flat_steps import BF16, OFFLOAD, gradients, start
from tests.sharded.world import outcomes, run

#: Optimizer, precision of its state, stage, DeepSpeed's options.
CASES: list[tuple[str, str, int, dict[str, Any]]] = [
    ("HinaAdaptive", "fp32", 1, {}),
    ("HinaAdaptive", "fp32", 1, {**BF16, "data_types": {"grad_accum_dtype": "fp32"}}),
    ("Automagic_CameAMP_Improved", "8bit", 2, {}),
    ("Automagic_CameAMP", "4bit", 1, {}),
    ("AdaptiveHinaAdamW", "bf16", 2, {"zero_force_ds_cpu_optimizer": False, "zero": OFFLOAD}),
    ("HinaAdaptive", "8bit", 3, {"zero": {"sub_group_size": 4000}}),
    ("Automagic_CameAMP", "fp32", 3, BF16),
    ("HinaAdaptive", "fp32", 0, BF16),
]


def begun(case: tuple[str, str, int, dict[str, Any]]) -> tuple[Any, Any]:
    name, state, stage, options = case
    model = Given(start())
    every = list(model.named_parameters())
    optimizer = make(name, [{"params": every[::2]}, {"params": every[1::2]}], state_precision=state)
    copied = {key: dict(value) if isinstance(value, dict) else value for key, value in options.items()}
    engine = initialized(model, optimizer, stage, **copied)
    bind(optimizer, engine)
    return engine, optimizer


def train(engine: Any, optimizer: Any, begin: int, end: int) -> None:
    for step in range(begin, end):
        optimizer.report_loss(loss_of(step))
        engine.backward(engine(gradients(step)))
        engine.step()


def whole(engine: Any, stage: int) -> dict[str, Tensor]:
    import deepspeed

    found = {}
    for name, p in engine.module.named_parameters():
        with deepspeed.zero.GatheredParameters([p]) if stage == 3 else contextlib.nullcontext():
            found[name] = p.detach().clone()
    return found


def save_and_load(rank: int, folder: Path) -> None:
    for number, case in enumerate(CASES):
        engine, optimizer = begun(case)
        train(engine, optimizer, 0, 4)
        engine.save_checkpoint(str(folder), tag=str(number))
        train(engine, optimizer, 4, 7)
        expected = whole(engine, case[2])
        for again in (begun(case), (engine, optimizer)):  # another process's engine, and the same one, rewound
            again[0].load_checkpoint(str(folder), tag=str(number))
            train(*again, 4, 7)
            for name, value in whole(again[0], case[2]).items():
                assert torch.equal(value, expected[name]), (case, name)


def test_a_loaded_run_goes_on_as_the_uninterrupted_one(tmp_path: Path) -> None:
    load_deepspeed()
    run(save_and_load, 2, tmp_path, limit=240)


def load_elsewhere(rank: int, folder: Path, case: tuple[str, str, int, dict[str, Any]]) -> None:
    engine, _ = begun(case)
    engine.load_checkpoint(str(folder), tag="two")


def save(rank: int, folder: Path, case: tuple[str, str, int, dict[str, Any]]) -> None:
    engine, optimizer = begun(case)
    train(engine, optimizer, 0, 2)
    engine.save_checkpoint(str(folder), tag="two")


@pytest.mark.parametrize(
    ("size", "saved", "loading", "message"),
    [
        (1, ("HinaAdaptive", "fp32", 2, {}), ("HinaAdaptive", "fp32", 2, {}), "DP world size|dp world size"),
        (2, ("HinaAdaptive", "fp32", 2, {}), ("Automagic_CameAMP", "fp32", 2, {}), "HinaAdaptive|Automagic_CameAMP"),
    ],
)
def test_another_world_or_optimizer_is_refused(
    size: int, saved: Any, loading: Any, message: str, tmp_path: Path
) -> None:

    load_deepspeed()
    run(save, 2, tmp_path, saved)
    for outcome in outcomes(load_elsewhere, size, tmp_path, loading):
        assert outcome.error is not None and re.search(message, outcome.error), outcome
