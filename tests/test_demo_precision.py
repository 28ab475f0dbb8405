"""The demo's task, trained briefly with state in fp32, bf16, 8 and 4 bits: what is learned does not depend on it.

``python -m tests.test_demo_precision`` prints the table of docs/memory.md: the whole task, for as long as the demo.
"""

from __future__ import annotations

import math
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "examples"))

import demo_files  # noqa: E402

from hina_lightning import configure_optimizers  # noqa: E402

STEPS, SEEDS = 60, (101, 102)
STORED = {"fp32": torch.float32, "bf16": torch.bfloat16, "8bit": torch.uint8, "4bit": torch.uint8}


def arguments(precision: str, steps: int = STEPS) -> dict[str, Any]:
    """The demo's own, with all that can be in few bits: most of its matrices are below ``min_8bit_size``."""
    learning_rate = demo_files.LEARNING_RATES["HinaAdaptive"]
    given = demo_files.optimizer_arguments("HinaAdaptive", learning_rate, steps)
    return {**given, "state_precision": precision, "force_8bit": True}


def losses(task: Any, seed: int, steps: int = STEPS) -> dict[str, float]:
    """The loss on held-out snippets after the last step, by precision.

    The same initial weights, batches and held-out snippets, so that the runs differ by rounding alone.
    """
    from demo_run import trial

    return {precision: trial(task, arguments(precision, steps), steps=steps, seed=seed) for precision in STORED}


def made(layers: int, scale: float) -> Any:
    """The task with LoRA in its last layers, and a share of its snippets."""
    demo_files.quieten()
    from demo_run import Task

    return Task(demo_files.packaged_model(), layers, scale, None)


@pytest.mark.slow
def test_loss_is_within_a_hundredth_of_that_with_fp32() -> None:
    """For each seed by itself: no mean over seeds or steps that could hide a run that goes astray."""
    task = made(layers=1, scale=0.2)
    for precision, dtype in STORED.items():
        optimizer: Any = configure_optimizers(task.module({}), schedule=None, **arguments(precision))["optimizer"]
        optimizer.init_state()
        stored: Counter[torch.dtype] = Counter()
        for p, state in optimizer.state.items():
            stored[state["exp_avg"].dtype] += p.numel()
        assert stored[dtype] > 0.99 * stored.total(), (precision, stored)
    for seed in SEEDS:
        loss = losses(task, seed)
        assert loss["fp32"] < math.log(len(task.packages)) - 0.3, "nothing was learned that could be lost"
        assert len(set(loss.values())) == len(STORED), "two are stored alike"
        for precision in ("bf16", "8bit", "4bit"):
            assert abs(loss[precision] / loss["fp32"] - 1) < 0.01, (seed, loss)


if __name__ == "__main__":
    whole = made(demo_files.TRAINED_LAYERS, 1.0)
    for seed in (0, 1, 2):
        found = losses(whole, seed, demo_files.STEPS)
        others = " | ".join(f"{100 * (found[name] / found['fp32'] - 1):+.2f} %" for name in ("bf16", "8bit", "4bit"))
        print(f"| {seed} | {found['fp32']:.3f} | {others} |", flush=True)
