"""State in host memory: the same training to the bit, with the state where it was asked to be."""

from __future__ import annotations

import copy
import functools
import io
import logging
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

from hina_optim import Automagic_CameAMP_Improved, HinaAdamW, HinaAdaptive
from hina_optim.engine.optimizer import HinaOptimizer
from hina_optim.engine.transfers import Fetched, Transfers
from tests.far_device import FAR, Far, FarMode, near
from tests.shards import run_sharded
from tests.test_out_of_memory import Scarce, places
from tests.traced import traced

CPU = torch.device("cpu")
#: Two stacked, a vector, one cut into chunks, one that begins at zero.
SHAPES = [(20, 16), (20, 16), (5,), (90, 100), (12, 8)]

CASES: dict[str, tuple[type[HinaOptimizer], dict[str, Any]]] = {
    "adaptive": (HinaAdaptive, dict(lr=1e-3)),
    "adaptive 8bit": (HinaAdaptive, dict(lr=1e-3, state_precision="8bit", min_8bit_size=0)),
    "adaptive 4bit": (HinaAdaptive, dict(lr=1e-3, state_precision="4bit", min_8bit_size=0)),
    "images bf16": (
        HinaAdaptive,
        dict(lr=1e-3, state_precision="bf16", edge_suppression=True, spatial_awareness=True, lora_rank_penalty=True),
    ),
    "kahan": (HinaAdaptive, dict(lr=1e-3, rounding="kahan")),
    "adamw": (HinaAdamW, dict(lr=1e-3, weight_decay=0.1)),
    "came": (Automagic_CameAMP_Improved, dict(lr=1e-4, full_finetune=True)),
}


def build(
    name: str, place: Callable[[Tensor], Tensor] = Far, dtype: torch.dtype = torch.float32, **more: Any
) -> tuple[list[nn.Parameter], HinaOptimizer]:
    kind, arguments = CASES[name]
    generator = torch.Generator().manual_seed(0)
    values = [(torch.randn(s, generator=generator) * 0.1).to(dtype) for s in SHAPES]
    values[-1].zero_()
    params = [nn.Parameter(place(v)) for v in values]
    named = [(f"p{i}", p) for i, p in enumerate(params)]
    return params, kind(named, **{**arguments, "max_buffer_memory_mb": 0.1, **more})  # type: ignore[call-arg, arg-type]


def give(params: list[nn.Parameter], step: int) -> None:
    generator = torch.Generator().manual_seed(step + 1)
    for p in params:
        grad = (torch.randn(p.shape, generator=generator) * 0.01).to(p.dtype)
        p.grad = Far(grad) if isinstance(p, Far) else grad.to(p.device)


def train(params: list[nn.Parameter], optimizer: HinaOptimizer, steps: range) -> None:
    for step in steps:
        give(params, step)
        optimizer.step()


def weights(params: list[nn.Parameter]) -> list[Tensor]:
    return [near(p.detach()).clone() for p in params]


def same(one: list[Tensor], other: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@functools.cache
def at_home(name: str, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Weights after 5 steps with everything in one place."""
    ours, optimizer = build(name, lambda v: v, dtype)
    train(ours, optimizer, range(5))
    return weights(ours)


def places_of(params: list[nn.Parameter], optimizer: HinaOptimizer) -> tuple[set[str], set[str]]:
    """State on the host and state on the device, by name (``step`` aside)."""
    every = [(k, p, v) for p in params for k, v in optimizer.state[p].items() if k != "step" and p.numel() > 1]
    hosted = [(k, p, v) for k, p, v in every if v.device == CPU]
    # of every element: itself, its share of a scale, or of a byte
    assert all(v.shape == p.shape or k.endswith("_scale") or v.dtype == torch.uint8 for k, p, v in hosted)
    return {k for k, _, v in every if v.device == CPU}, {k for k, _, v in every if v.device == FAR}


@pytest.fixture
def copying(monkeypatch: pytest.MonkeyPatch) -> None:
    """Parameters on the CPU, and the way that state in host memory takes for those elsewhere."""
    monkeypatch.setattr(Transfers, "COPY_ALWAYS", True)


def test_devices_must_not_meet() -> None:
    """The far device behaves as one: it takes part in nothing with tensors here, but can be copied to and from."""
    with FarMode() as watch:
        x = torch.ones(3).to(FAR)
        assert x.device == FAR and isinstance(x * 2 + torch.tensor([1.0, 2.0, 3.0], device=FAR), Far)
        with pytest.raises(RuntimeError, match="two devices meet"):
            x + torch.ones(3)
        assert torch.equal((x * 2).to(CPU), torch.full((3,), 2.0))
    assert watch.moved[0] == (CPU, FAR, 12) and watch.moved[-1] == (FAR, CPU, 12)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [*((name, torch.float32) for name in CASES if name != "kahan")]
    + [(name, torch.bfloat16) for name in ("adaptive 8bit", "kahan", "came")],
)
def test_the_same_training_to_the_bit(name: str, dtype: torch.dtype) -> None:
    with FarMode():
        params, optimizer = build(name, dtype=dtype, state_device="cpu")
        train(params, optimizer, range(5))
        wanted = at_home(name, dtype)
        assert same(weights(params), wanted)
        host, device = places_of(params, optimizer)
        assert {"lr_mask", "last_sign"} & host if name != "adamw" else {"exp_avg", "exp_avg_sq"} <= host
        assert not device & {"exp_avg", "exp_avg_sq", "lr_mask", "last_sign", "kahan"}
        assert all(v.device == CPU for v in optimizer.state[params[3]].values() if v.shape == (90, 100))


def test_anchors_alone() -> None:
    with FarMode():
        params, optimizer = build("adaptive", anchor_device="cpu")
        train(params, optimizer, range(5))
        assert same(weights(params), at_home("adaptive"))
        host, device = places_of(params, optimizer)
        assert host == {"anchor"} and {"exp_avg", "lr_mask"} <= device
        assert optimizer.state[params[-1]]["anchor"].device == FAR  # one zero stays
        assert optimizer.host_state_bytes() == 4 * (320 + 320 + 5 + 9000)


def test_a_step_writes_every_byte_back_once() -> None:
    """But the anchors, which do not change. The segments of a large parameter fetch what each of them uses."""
    with FarMode() as watch:
        params, optimizer = build("adaptive", state_device="cpu")
        train(params, optimizer, range(3))
        give(params, 3)
        watch.moved.clear()
        optimizer.step()
        back = sum(n for _, to, n in watch.moved if to == CPU)
        there = sum(n for _, to, n in watch.moved if to == FAR)
        held = optimizer.host_state_bytes()
        assert back == held - sum(s["anchor"].nbytes for s in optimizer.state.values() if s["anchor"].device == CPU)
        assert held <= there < 3 * held


def test_moving_at_run_time() -> None:
    with FarMode():
        params, optimizer = build("adaptive")
        train(params, optimizer, range(2))
        total, anchors = optimizer.state_bytes(), 4 * (320 + 320 + 5 + 9000)
        assert optimizer.set_anchor_device("cpu") == anchors
        train(params, optimizer, range(2, 3))
        moved = optimizer.set_state_device("cpu")
        assert moved > 0 and optimizer.host_state_bytes() == moved + anchors
        assert places_of(params, optimizer)[0] >= {"exp_avg", "exp_avg_sq", "anchor", "lr_mask", "last_sign"}
        train(params, optimizer, range(3, 4))
        assert optimizer.set_state_device(None) == -moved  # the anchors stay
        assert places_of(params, optimizer)[0] == {"anchor"}
        assert optimizer.set_anchor_device(None) == -anchors and optimizer.host_state_bytes() == 0
        train(params, optimizer, range(4, 5))
        assert optimizer.state_bytes() == total
        assert same(weights(params), at_home("adaptive"))


@pytest.mark.parametrize("back", [False, True])
def test_out_of_memory_while_moving(back: bool) -> None:
    """At any allocation: all state is whole and where it was, as the options say, and the training is the same."""
    option = {"state_device": "cpu"} if back else {}

    def begun() -> tuple[list[nn.Parameter], HinaOptimizer]:
        params, optimizer = build("adamw", **option)
        train(params, optimizer, range(2))
        return params, optimizer

    def move(optimizer: HinaOptimizer) -> int:
        return optimizer.set_state_device(None if back else "cpu")

    with FarMode():
        params, optimizer = begun()
        with Scarce() as watch:
            moved = move(optimizer)
        assert watch.count > 10
        for n in range(watch.count):
            params, optimizer = begun()
            where = places_of(params, optimizer)
            with pytest.raises(torch.OutOfMemoryError), Scarce(n):
                move(optimizer)
            assert places_of(params, optimizer) == where
            assert optimizer.param_groups[0]["state_device"] == option.get("state_device")
            train(params, optimizer, range(2, 3))
            assert places_of(params, optimizer) == where and move(optimizer) == moved, "at another occasion"
            train(params, optimizer, range(3, 5))
            assert same(weights(params), at_home("adamw"))


def test_before_the_first_step_and_by_hand() -> None:
    """The option alone, edited in a group, is enough; state that does not exist yet begins where it belongs."""
    with FarMode():
        params, optimizer = build("adamw")
        assert optimizer.set_state_device("cpu") == 0
        optimizer.init_state()
        assert places_of(params, optimizer) == (
            {"exp_avg", "exp_avg_sq", "anchor"},
            {"skipped", "torque", "anchor"},
        )  # the anchor of what begins at zero is one zero
        train(params, optimizer, range(2))
        optimizer.param_groups[0]["state_device"] = None
        train(params, optimizer, range(2, 5))
        assert optimizer.host_state_bytes() == 0
        assert same(weights(params), at_home("adamw"))


def test_other_precision_while_hosted() -> None:
    results = []
    for device in ("cpu", None):
        with FarMode():
            params, optimizer = build("adaptive", state_device=device)
            train(params, optimizer, range(2))
            optimizer.set_state_precision("bf16")
            train(params, optimizer, range(2, 4))
            optimizer.set_state_precision("8bit")
            if device:
                assert not places_of(params, optimizer)[1] & {"exp_avg", "exp_avg_sq", "exp_avg_scale", "lr_mask"}
            train(params, optimizer, range(4, 5))
            results.append(weights(params))
    assert same(*results)


@pytest.mark.parametrize("name", ["adaptive", "adaptive 8bit"])
def test_checkpoints(name: str) -> None:
    """Resume is exact; the layout comes from the checkpoint; the state goes from it to the host, not by the device."""
    with FarMode() as watch:
        params, optimizer = build(name, state_device="cpu")
        train(params, optimizer, range(3))
        saved = optimizer.state_dict()
        assert all(v.device == CPU for s in saved["state"].values() for k, v in s.items() if k.startswith("exp_avg"))
        fresh, resumed = build(name)
        with torch.no_grad():
            for p, q in zip(fresh, params, strict=True):
                p.copy_(q)
        held = optimizer.host_state_bytes()
        watch.moved.clear()
        resumed.load_state_dict(saved)
        assert sum(n for _, to, n in watch.moved if to == FAR) < held / 10
        assert places_of(fresh, resumed) == places_of(params, optimizer)
        train(fresh, resumed, range(3, 5))
        assert same(weights(fresh), at_home(name))


def test_a_framework_moves_the_state(caplog: pytest.LogCaptureFixture) -> None:
    """Lightning moves every state tensor but ``step`` to the parameter's device after a load: it goes back."""
    with FarMode(), caplog.at_level(logging.INFO, "hina_optim"):
        params, optimizer = build("adaptive 8bit", state_device="cpu")
        train(params, optimizer, range(2))
        optimizer.load_state_dict(optimizer.state_dict())
        before = places_of(params, optimizer)
        for state in optimizer.state.values():
            for key, value in state.items():
                if key != "step":
                    state[key] = value.to(FAR)
        assert places_of(params, optimizer)[0] == set()
        train(params, optimizer, range(2, 5))
        assert places_of(params, optimizer) == before
        assert same(weights(params), at_home("adaptive 8bit"))
    assert not caplog.records


def test_state_where_it_should_not_be() -> None:
    with FarMode():
        params, optimizer = build("adaptive")
        train(params, optimizer, range(1))
        state = optimizer.state[params[3]]
        state["exp_avg"] = state["exp_avg"].to(CPU)
        with pytest.raises(RuntimeError, match=r"p3 is on meta.*'exp_avg' is on cpu"):
            train(params, optimizer, range(1, 2))


def test_schedules_clipping_accumulation_and_new_groups() -> None:
    results = []
    for device in ("cpu", None):
        with FarMode():
            params, optimizer = build("adaptive", state_device=device)
            schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10)
            for step in range(6):
                give(params, step)
                first = [p.grad for p in params]
                give(params, step + 100)
                for p, g in zip(params, first, strict=True):
                    p.grad += g
                nn.utils.clip_grad_norm_(params, 0.05, foreach=False)
                params[1].grad = None if step == 3 else params[1].grad
                optimizer.step()
                schedule.step()
                if step == 2:
                    params.append(nn.Parameter(Far(torch.ones(6, 6))))
                    optimizer.add_param_group({"params": [("late", params[-1])], "lr": 5e-4})
            results.append(weights(params))
            assert (places_of(params, optimizer)[0] != set()) == (device == "cpu")
    assert same(*results)


def test_on_a_cpu_there_is_nothing_to_move() -> None:
    params, optimizer = build("adaptive", lambda v: v, cpu_offload_states=True)
    assert optimizer.param_groups[0]["state_device"] == "cpu"
    train(params, optimizer, range(5))
    assert optimizer.host_state_bytes() == 0 and optimizer.set_state_device(None) == 0
    assert same(weights(params), at_home("adaptive"))


@pytest.mark.parametrize("option", ["state_device", "anchor_device"])
def test_bad_values(option: str) -> None:
    with pytest.raises(ValueError, match=f'{option}=.*"cpu" or None'):
        build("adamw", lambda v: v, **{option: "cuda"})
    _, optimizer = build("adamw", lambda v: v)
    with pytest.raises(ValueError, match=option):
        getattr(optimizer, f"set_{option}")("disk")


class Recorded(Transfers):
    """Writes down what is asked of it."""

    def __init__(self) -> None:
        super().__init__()
        self.told: list[str] = []

    def fetch(self, parts: Mapping[str, Tensor], device: torch.device) -> Fetched:
        self.told.append("fetch")
        return super().fetch(parts, device)

    def store(self, parts: Mapping[str, Tensor], homes: Mapping[str, Tensor], device: torch.device) -> None:
        self.told.append("store")
        super().store(parts, homes, device)


@pytest.mark.usefixtures("copying")
def test_the_next_piece_comes_while_one_is_computed() -> None:
    params, optimizer = build("adamw", lambda v: v, state_device="cpu")
    optimizer._transfers = transfers = Recorded()
    optimizer._buckets.clear()
    train(params, optimizer, range(1))
    transfers.told.clear()
    train(params, optimizer, range(1, 2))
    told = transfers.told
    assert told[:2] == ["fetch", "fetch"]  # the first, and ahead of its turn the second
    at = [i for i, what in enumerate(told) if what == "store"]
    assert len(at) == 3 + 3 and all(told[: i + 1].count("fetch") > told[: i + 1].count("store") for i in at[:-1])
    assert told[-1] == "store"


@pytest.mark.usefixtures("copying")
@pytest.mark.parametrize("name", ["adaptive 8bit", "came"])
def test_copies_and_pickles(name: str) -> None:
    params, optimizer = build(name, lambda v: v, state_device="cpu")
    train(params, optimizer, range(2))
    buffer = io.BytesIO()
    torch.save({"params": params, "optimizer": optimizer}, buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=False)
    for mine, its in (copy.deepcopy((params, optimizer)), (loaded["params"], loaded["optimizer"])):
        train(mine, its, range(2, 5))
        assert its.host_state_bytes() == optimizer.host_state_bytes() > 0
        assert same(weights(mine), at_home(name))


@pytest.mark.usefixtures("copying")
@pytest.mark.parametrize("by_rows", [True, False])
def test_shards(by_rows: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    full = [(f"p{i}", torch.randn(s, generator=generator) * 0.1) for i, s in enumerate(SHAPES)]

    def gradients(step: int) -> list[Tensor]:
        noise = torch.Generator().manual_seed(step + 1)
        return [torch.randn(s, generator=noise) * 0.01 for s in SHAPES]

    results = [
        run_sharded(
            full,
            gradients,
            lambda named, device=device: HinaAdaptive(named, lr=1e-3, state_device=device, max_buffer_memory_mb=0.2),
            size=2,
            steps=4,
            by_rows=by_rows,
        )[0]
        for device in ("cpu", None)
    ]
    assert same(*results)


@pytest.mark.usefixtures("copying")
@pytest.mark.parametrize("name", ["adaptive", "adaptive 8bit", "adamw", "came"])
def test_compiled_steps(name: str) -> None:
    """In lines, in grids and by shape, as traced, without a code generator: where the state lives changes nothing."""
    counters.clear()
    ends = []
    for device in ("cpu", None):
        params, optimizer = build(name, lambda v: v, state_device=device, compile=True)
        with traced():
            train(params, optimizer, range(5))
        assert counters["stats"]["unique_graphs"] > 0  # the second optimizer may use the graphs of the first
        assert (optimizer.host_state_bytes() > 0) == (device == "cpu")
        ends.append(weights(params))
    assert same(*ends)


def test_without_pinned_memory(caplog: pytest.LogCaptureFixture) -> None:
    """There is none without a GPU: ordinary memory is used, and it is said once."""
    if torch.cuda.is_available():
        pytest.skip("there is pinned memory here")
    transfers, value = Transfers(), torch.ones(3)
    for _ in range(2):
        assert torch.equal(transfers.keep(value, torch.device("cuda")), value)
    assert len(caplog.records) == 1 and "could not be pinned" in caplog.text


@pytest.mark.usefixtures("copying")
def test_out_of_memory_while_hosted() -> None:
    """Pieces that are on their way are given up, and come again."""
    params, optimizer = build("adaptive 8bit", lambda v: v, state_device="cpu")
    train(params, optimizer, range(2))

    def again() -> tuple[list[nn.Parameter], HinaOptimizer]:
        mine, its = copy.deepcopy((params, optimizer))
        give(mine, 2)
        return mine, its

    calm = again()
    with Scarce() as watch:
        calm[1].step()
    for n in places(watch.count, 25):
        mine, its = again()
        try:
            with Scarce(n):
                its.step()
        except torch.OutOfMemoryError as error:
            assert "Nothing was changed" in str(error)
            its.step()
        assert same(weights(mine), weights(calm[0]))
        for p, q in zip(mine, calm[0], strict=True):
            assert all(torch.equal(v, calm[1].state[q][k]) for k, v in its.state[p].items())


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["adaptive", "adaptive 8bit", "adaptive 4bit", "came"])
def test_on_a_gpu(name: str) -> None:
    """The same to the bit with streams and pinned memory, over steps that follow each other without a pause."""
    results = []
    for device in ("cpu", None):
        params, optimizer = build(name, lambda v: v.cuda(), state_device=device)
        for step in range(10):
            give(params, step)
            optimizer.step()
        optimizer.wait_for_state()
        results.append(
            {f"{i}.{k}": v.cpu().clone() for i, p in enumerate(params) for k, v in optimizer.state[p].items()}
        )
        results[-1] |= {str(i): p.detach().cpu() for i, p in enumerate(params)}
        if device:
            assert optimizer.state[params[3]]["lr_mask"].is_pinned()
    assert all(torch.equal(v, results[1][k]) for k, v in results[0].items())


@pytest.mark.gpu
def test_a_step_with_hosted_state_never_waits() -> None:
    params, optimizer = build("adaptive", lambda v: v.cuda(), state_device="cpu")
    for p in params:
        p.grad = torch.randn_like(p)
    for _ in range(3):
        optimizer.step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            optimizer.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
