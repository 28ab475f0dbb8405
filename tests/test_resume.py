"""Resuming is exact: run(N) equals run(k), save, new process, load, run(N-k), to the bit.

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

from hina_optim import HinaAdaptive
from tests.optim_cases import EVERYTHING, named_params

STEPS = 14
LR = 3e-4
#: Warm-up of the mask: 6 steps, its early phase 3. Adaptation measures in steps 1, 4, 7 and is refreshed in 2, 5, 8;
#: the spectrum measures in 1, 3, 5. So: early, late, the end of the warm-up, mature; at 1 and 4 a measurement waits.
STOPS = (1, 4, 6, 11)
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

#: Parameters without a gradient in every third step; the twins miss different ones, and come to equal counts again.
MISSING = {"wide": 1, "twin1": 1, "twin2": 2}

State = dict[str, Any]


class Training:
    """Parameters, optimizer and schedule; one parameter lacks its gradient at times, one gradient is not finite."""

    def __init__(
        self, dtype: torch.dtype, arguments: dict[str, Any], named: list[tuple[str, nn.Parameter]] | None = None
    ):
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


def trained(case: str = "bf16", steps: int = 5) -> Training:
    dtype, arguments = CASES[case]
    training = Training(dtype, arguments)
    training.run(steps)
    return training


def tensors(optimizer: HinaAdaptive) -> list[Tensor]:
    return [x for state in optimizer.state.values() for x in state.values()]


# -- loading -----------------------------------------------------------------------------------------------------------


def test_saving_changes_nothing_and_holds_only_plain_values(uninterrupted: dict[str, State]) -> None:
    training = Training(*CASES["bf16"])
    for _ in range(STEPS):
        training.run(1)
        torch.load(io.BytesIO(saved_bytes(training.optimizer.state_dict())), weights_only=True)
    same_bits(training.save(), uninterrupted["bf16"])


def saved_bytes(value: Any) -> bytes:
    file = io.BytesIO()
    torch.save(value, file)
    return file.getvalue()


@pytest.mark.parametrize("case", ["fp32", "bf16", "bf16-state-bf16-kahan"])
def test_every_dtype_survives(case: str) -> None:
    """torch's own loading would cast all of it to the parameters' dtype: signs, counters, float32 moments."""
    training = trained(case)
    other = Training(*CASES[case])
    other.load(torch.load(io.BytesIO(saved_bytes(training.save())), weights_only=True))
    bf16_state = CASES[case][1].get("state_precision") == "bf16"
    for _, p in other.named:
        state, expected = other.optimizer.state[p], training.optimizer.state
        mine = next(s for q, s in expected.items() if q.shape == p.shape and torch.equal(q, p))
        assert {k: v.dtype for k, v in state.items()} == {k: v.dtype for k, v in mine.items()}
        assert state["step"].dtype == torch.float32 and state["step"].shape == () and state["step"].device.type == "cpu"
        assert state["last_sign"].dtype == torch.int8
        assert state["exp_avg"].dtype == (BF16 if bf16_state else torch.float32)
        assert state["anchor"].dtype == p.dtype


def test_loaded_state_is_not_the_callers() -> None:
    """Neither does training go on in the caller's tensors, nor does writing to these change the optimizer."""
    training, other = trained(), Training(*CASES["bf16"])
    training.optimizer.param_groups[0]["lr"] = torch.tensor(LR)
    saved = copy.deepcopy(training.save())
    untouched = copy.deepcopy(saved)
    other.load(saved)
    other.run(2)
    other.optimizer.param_groups[0]["lr"].zero_()
    same_bits(saved, untouched)
    here = copy.deepcopy(other.optimizer.state_dict())
    for state in saved["optimizer"]["state"].values():
        for x in state.values():
            x.fill_(3)
    same_bits(other.optimizer.state_dict(), here)


def test_loading_twice_is_loading_once() -> None:
    """Frameworks load what they have just saved (Accelerate does in prepare)."""
    training, other = trained(), trained()
    for _ in range(2):
        other.optimizer.load_state_dict(other.optimizer.state_dict())
        same_bits(other.save(), training.save())
    training.run(4)
    other.run(4)
    same_bits(other.save(), training.save())


def test_an_empty_state_loads_and_empties() -> None:
    """A state dict from before the first step is one: nothing is left of what was there."""
    fresh, used = Training(*CASES["fp32"]), trained("fp32")
    with torch.no_grad():
        for (_, p), (_, q) in zip(used.named, fresh.named, strict=True):
            p.copy_(q)
    used.optimizer.load_state_dict(fresh.optimizer.state_dict())
    used.schedule.load_state_dict(fresh.schedule.state_dict())
    used.step_count = 0
    for training in (fresh, used):
        training.run(4)
    same_bits(used.save(), fresh.save())


def by_name(training: Training) -> dict[str, State]:
    return {name: training.optimizer.state[p] for name, p in training.named}


@pytest.mark.parametrize("groups", [1, 2])
def test_by_name_in_another_order(groups: int) -> None:
    """Names decide where both sides have them, for groups too: nobody's state, decay or rate is given to another."""
    training = trained("fp32", 5)
    reversed_params = named_params(torch.float32, seed=5)[::-1]
    other = Training(*CASES["fp32"], named=reversed_params)
    if groups == 2:
        training = Training(*CASES["fp32"])
        split(training, training.named[:6], training.named[6:])
        training.run(5)
        split(other, reversed_params[:8], reversed_params[8:], decay=(0.5, 0.6))
    other.load(torch.load(io.BytesIO(saved_bytes(training.save())), weights_only=True))
    same_bits(by_name(other), by_name(training))
    for ours in other.optimizer.param_groups:
        theirs = next(
            g for g in training.optimizer.param_groups if any(torch.equal(p, ours["params"][0]) for p in g["params"])
        )
        assert ours["weight_decay"] == theirs["weight_decay"]
    training.run(STEPS - 5)
    other.run(STEPS - 5)
    for (name, p), (_, q) in zip(sorted(other.named), sorted(training.named), strict=True):
        # means over all parameters are summed in another order
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-7, msg=lambda m, name=name: f"{name}: {m}")


def split(training: Training, first: Any, second: Any, decay: tuple[float, float] = (0.1, 0.2)) -> None:
    """Give a training a new optimizer with two groups."""
    groups = [{"params": g, "weight_decay": d} for g, d in zip((first, second), decay, strict=True)]
    training.optimizer = HinaAdaptive(groups, lr=LR, **CASES["fp32"][1])
    training.schedule = torch.optim.lr_scheduler.LambdaLR(training.optimizer, lambda s: 1 / (1 + s))


def test_other_groups_are_refused() -> None:
    """Where names are in other groups than before, the groups' options fit nobody."""
    training, other = Training(*CASES["fp32"]), Training(*CASES["fp32"])
    split(training, training.named[:6], training.named[6:])
    split(other, other.named[:7], other.named[7:])
    training.run(2)
    with pytest.raises(ValueError, match="group"):
        other.load(training.save())


@pytest.mark.parametrize("unnamed", ["saved", "loading", "both"])
def test_by_place_without_names(unnamed: str) -> None:
    """Without names on both sides, the order decides, as in torch."""

    def build(named: bool) -> tuple[list[nn.Parameter], HinaAdaptive]:
        params = [nn.Parameter(torch.full((3, 2), float(i))) for i in range(4)]
        given = [(f"p{i}", p) for i, p in enumerate(params)] if named else params
        return params, HinaAdaptive(given, lr=LR)  # type: ignore[arg-type]

    params, optimizer = build(unnamed == "loading")
    for p in params:
        p.grad = p.detach() + 1
    optimizer.step()
    others, loading = build(unnamed == "saved")
    loading.load_state_dict(torch.load(io.BytesIO(saved_bytes(optimizer.state_dict())), weights_only=True))
    for p, q in zip(params, others, strict=True):
        same_bits(loading.state[q], optimizer.state[p])


@pytest.mark.parametrize("edited", [{"use_lr_mask": False}, {"spatial_awareness": True}, {"state_precision": "bf16"}])
@pytest.mark.parametrize("when", ["before a step", "right before saving"])
def test_options_edited_in_the_middle_leave_a_checkpoint_that_loads(when: str, edited: dict[str, Any]) -> None:
    """What a technique kept that is off now, or will keep that is on now, is as the saved options say."""
    training = Training(torch.float32, {**EVERYTHING, "spatial_awareness": False})
    training.run(5)
    training.optimizer.param_groups[0].update(edited)
    if when == "before a step":
        training.run(1)
    other = Training(*CASES["fp32"])
    other.load(torch.load(io.BytesIO(saved_bytes(training.save())), weights_only=True))
    training.run(3)
    other.run(3)
    same_bits(other.save(), training.save())
    assert all("lr_mask" in state for state in training.optimizer.state.values()) == ("use_lr_mask" not in edited)


# -- copies ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
@pytest.mark.parametrize("case", ["fp32", "bf16-state-bf16-kahan"])
def test_a_copy_goes_on_alone(case: str, how: str) -> None:
    """A copy has everything (names too), trains exactly as the original would, and shares nothing with it."""
    training = trained(case)
    bundle = (training.named, training.optimizer)
    named, optimizer = copy.deepcopy(bundle) if how == "deepcopy" else pickle.loads(pickle.dumps(bundle))
    before = copy.deepcopy(training.save())
    twin = Training(*CASES[case])
    twin.named, twin.optimizer, twin.step_count = named, optimizer, training.step_count
    assert twin.optimizer.param_names() == training.optimizer.param_names()
    twin.schedule = torch.optim.lr_scheduler.LambdaLR(twin.optimizer, training.schedule.lr_lambdas[0])
    twin.schedule.load_state_dict(training.schedule.state_dict())
    twin.optimizer.param_groups[0]["lr"] = training.optimizer.param_groups[0]["lr"]
    twin.run(STEPS - twin.step_count)
    same_bits(training.save(), before)
    training.run(STEPS - training.step_count)
    same_bits(twin.save(), training.save())


@pytest.mark.parametrize("of", ["optimizer", "state_dict"])
@pytest.mark.parametrize("way", ["pickle", "torch.save"])
def test_size_of_a_copy_is_linear(of: str, way: str) -> None:
    """State of small parameters lies in common stacks; a pickle must not carry a whole stack for every one of them."""
    sizes = []
    for count in (50, 200):
        params = [(f"p{i}", nn.Parameter(torch.randn(16, 16))) for i in range(count)]
        optimizer = HinaAdaptive(params, lr=LR)
        for _, p in params:
            p.grad = torch.ones_like(p)
        optimizer.step()
        state = sum(x.numel() * x.element_size() for x in tensors(optimizer))
        value = optimizer if of == "optimizer" else optimizer.state_dict()
        size = len(pickle.dumps(value) if way == "pickle" else saved_bytes(value))
        assert size < 3 * state + 20_000
        sizes.append(size)
    assert sizes[1] < 4.2 * sizes[0]


# -- torch.distributed.checkpoint ----------------------------------------------------------------------------------


def small_model(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 3), nn.Conv2d(2, 3, 2), nn.LayerNorm(3))


def train_model(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        for p in model.parameters():
            p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)
        optimizer.step()
        optimizer.zero_grad()


def test_priming_by_torch_leaves_no_trace() -> None:
    """torch's checkpoint code steps a fresh optimizer with zero gradients and lr 0 to create its state."""
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

    model, plain = small_model(), small_model()
    optimizer, expected = (HinaAdaptive(m.named_parameters(), lr=LR, **EVERYTHING) for m in (model, plain))
    saved = get_optimizer_state_dict(model, optimizer)
    assert set(saved["state"]) == {name for name, _ in model.named_parameters()}
    same_bits(dict(model.named_parameters()), dict(plain.named_parameters()))
    assert all(float(s["step"]) == 0 for s in optimizer.state.values())
    assert optimizer.param_groups[0]["lr"] == LR
    for m, o in ((model, optimizer), (plain, expected)):
        train_model(m, o, 5)
    same_bits(optimizer.state_dict(), expected.state_dict())
    same_bits(dict(model.named_parameters()), dict(plain.named_parameters()))


@pytest.mark.parametrize("flat", [False, True], ids=["nested", "flat"])
@pytest.mark.parametrize("dtype", [torch.float32, BF16], ids=["fp32", "bf16"])
def test_through_torchs_checkpoint_calls(dtype: torch.dtype, flat: bool) -> None:
    """``get_`` and ``set_optimizer_state_dict`` on a fresh optimizer: weights, state, and how it goes on."""
    from torch.distributed.checkpoint import state_dict as dcp

    options = dcp.StateDictOptions(flatten_optimizer_state_dict=flat)
    model, other = small_model().to(dtype), small_model().to(dtype)
    optimizer, fresh = (HinaAdaptive(m.named_parameters(), lr=LR, **EVERYTHING) for m in (model, other))
    train_model(model, optimizer, 5)
    saved = dcp.get_optimizer_state_dict(model, optimizer, options=options)
    saved = torch.load(io.BytesIO(saved_bytes(saved)), weights_only=True)
    other.load_state_dict(model.state_dict())
    weights = copy.deepcopy(other.state_dict())
    dcp.set_optimizer_state_dict(other, fresh, saved, options=options)
    same_bits(other.state_dict(), weights)
    same_bits(fresh.state_dict()["state"], optimizer.state_dict()["state"])
    for m, o in ((model, optimizer), (other, fresh)):
        train_model(m, o, 5, seed=1)
    same_bits(other.state_dict(), model.state_dict())


def test_flattened_state_is_linear_in_the_number_of_parameters() -> None:
    """Names kept in a group would be repeated for every parameter of it."""
    from torch.distributed.checkpoint import state_dict as dcp

    sizes = []
    for count in (20, 80):
        model = nn.ParameterDict({f"p{i}": nn.Parameter(torch.randn(3)) for i in range(count)})
        optimizer = HinaAdaptive(model.named_parameters(), lr=LR)
        train_model(model, optimizer, 1)
        options = dcp.StateDictOptions(flatten_optimizer_state_dict=True)
        sizes.append(len(saved_bytes(dcp.get_optimizer_state_dict(model, optimizer, options=options))))
        for group in optimizer.param_groups:
            plain = (bool, int, float, str, type(None))
            for key, value in group.items():
                assert key == "params" or isinstance(value, plain) or key == "betas", key
    assert sizes[1] < 4.2 * sizes[0]
