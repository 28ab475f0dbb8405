"""Resuming is exact: run(N) equals run(k), save, new process, load, run(N-k), to the bit. And it is loud when it cannot be.

Run as a program, this file is the new process: ``python -m tests.test_resume FOLDER``.
"""

from __future__ import annotations

import copy
import io
import math
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

if __name__ != "__main__":
    import pytest

from tests.optim_cases import EVERYTHING, named_params

from hina_optim import HinaAdaptive

STEPS = 14
LR = 3e-4
#: Warm-up of the mask: 6 steps, its early phase 3. Adaptation measures in steps 1, 4, 7 and is refreshed in 2, 5, 8; the
#: spectrum measures in steps 1, 3, 5. So: between measuring and refresh, early, late, at the end of the warm-up, mature.
STOPS = (1, 2, 4, 6, 7, 11)
BF16 = torch.bfloat16
CASES: dict[str, tuple[torch.dtype, dict[str, Any]]] = {
    "fp32": (torch.float32, EVERYTHING),
    "fp32-default": (torch.float32, {}),
    "fp32-state-bf16": (torch.float32, {**EVERYTHING, "state_precision": "bf16"}),
    "bf16": (BF16, EVERYTHING),
    "bf16-state-bf16": (BF16, {**EVERYTHING, "state_precision": "bf16"}),
    "bf16-kahan": (BF16, {**EVERYTHING, "rounding": "kahan"}),
    "bf16-state-bf16-kahan": (BF16, {**EVERYTHING, "rounding": "kahan", "state_precision": "bf16"}),
}

#: Parameters without a gradient in every third step; the twins miss different ones, so that their steps come to be equal again.
MISSING = {"wide": 1, "twin1": 1, "twin2": 2}

State = dict[str, Any]


class Training:
    """Parameters, optimizer and schedule; one parameter lacks its gradient at times, one gradient is not finite."""

    def __init__(self, dtype: torch.dtype, arguments: dict[str, Any], named: list[tuple[str, nn.Parameter]] | None = None):
        self.named = named or named_params(dtype)
        self.optimizer = HinaAdaptive(self.named, lr=LR, **arguments)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, lambda s: s / 4 if s < 4 else 0.5 * (1 + math.cos(math.pi * (s - 4) / STEPS))
        )
        self.step_count = 0

    def run(self, steps: int) -> None:
        for _ in range(steps):
            generator = torch.Generator().manual_seed(1000 + self.step_count)
            grads = {name: torch.randn(p.shape, generator=generator) for name, p in sorted(self.named)}
            for name, p in self.named:
                p.grad = grads[name].to(p.dtype)
                if self.step_count % 3 == MISSING.get(name):
                    p.grad = None
                if name == "tall" and self.step_count == 5:
                    p.grad[0, 0] = torch.nan
            self.optimizer.step()
            self.schedule.step()
            self.step_count += 1

    def save(self) -> State:
        return {
            "model": {name: p.detach() for name, p in self.named},
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "step": self.step_count,
        }

    def load(self, saved: State) -> None:
        with torch.no_grad():
            for name, p in self.named:
                p.copy_(saved["model"][name])
        self.optimizer.load_state_dict(saved["optimizer"])
        self.schedule.load_state_dict(saved["schedule"])
        self.step_count = saved["step"]


def finish(saved: State, case: str) -> State:
    """Load into a model that begins elsewhere, run to the end."""
    dtype, arguments = CASES[case]
    training = Training(dtype, arguments, named_params(dtype, seed=5))
    training.load(saved)
    training.run(STEPS - training.step_count)
    return training.save()


def same_bits(a: Any, b: Any, path: str = "") -> None:
    """Assert that two nests of dicts, lists and tensors are equal to the bit, dtypes and keys included."""
    assert type(a) is type(b), path
    if isinstance(a, dict):
        assert a.keys() == b.keys(), path
        for key in a:
            same_bits(a[key], b[key], f"{path}.{key}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), path
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            same_bits(x, y, f"{path}.{i}")
    elif isinstance(a, Tensor):
        assert a.dtype == b.dtype and a.shape == b.shape, path
        assert torch.equal(a, b), f"{path}: {(a.double() - b.double()).abs().max()}"
    else:
        assert a == b, path


def main(folder: Path) -> None:
    """The new process: finish every run that is found as a file."""
    torch.set_num_threads(1)
    for file in sorted(folder.glob("*.stopped")):
        case = file.name.split("@")[0]
        done = finish(torch.load(file, weights_only=True), case)
        torch.save(done, file.with_suffix(".finished"))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    raise SystemExit


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every case run to the end and stopped on the way; one other process has loaded and finished what was stopped."""
    path = tmp_path_factory.mktemp("resume")
    for case, (dtype, arguments) in CASES.items():
        training = Training(dtype, arguments)
        for stop in STOPS:
            training.run(stop - training.step_count)
            torch.save(training.save(), path / f"{case}@{stop}.stopped")
    command = [sys.executable, "-m", "tests.test_resume", str(path)]
    done = subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return path


@pytest.fixture(scope="module")
def uninterrupted() -> dict[str, State]:
    """Every case run to the end without ever being looked at."""
    result = {}
    for case, (dtype, arguments) in CASES.items():
        training = Training(dtype, arguments)
        training.run(STEPS)
        result[case] = training.save()
    return result


@pytest.mark.parametrize("stop", STOPS)
@pytest.mark.parametrize("case", CASES)
def test_a_new_process_goes_on_to_the_bit(folder: Path, uninterrupted: dict[str, State], case: str, stop: int) -> None:
    """Weights, every state, group options and the schedule."""
    same_bits(torch.load(folder / f"{case}@{stop}.finished", weights_only=True), uninterrupted[case])
