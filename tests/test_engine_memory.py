"""What a step costs beside its arithmetic: temporary memory within bounds, nothing that grows, no waiting."""

from __future__ import annotations

import copy
import gc
import tracemalloc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from hina_optim import HinaAdaptive
from tests.optim_cases import EVERYTHING, NOTHING, give, named_params

LR = 3e-4
LARGE = [(1500, 1000)]
SMALL = [(64, 32)] * 750
#: All that looks at complete matrices off: those may exceed the bound.
CHUNKED = {**EVERYTHING, "edge_suppression": False, "spatial_awareness": False, "lora_rank_penalty": False}


def build(shapes: list[tuple[int, ...]], **arguments: Any) -> tuple[list[nn.Parameter], HinaAdaptive]:
    params = [nn.Parameter(torch.randn(shape)) for shape in shapes]
    optimizer = HinaAdaptive(params, lr=LR, **arguments)
    for p in params:
        p.grad = torch.randn_like(p)
    return params, optimizer


def peak(run: Callable[[], Any]) -> tuple[int, int]:
    """Bytes that the allocator handed out at most beyond what was in use before, and bytes that stayed in use."""
    gc.collect()
    gc.disable()  # memory that only the collector gives back counts as held: on a GPU it is
    try:
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            run()
    finally:
        gc.enable()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]  # type: ignore[union-attr]
    now = most = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most, now


def test_the_gauge_measures() -> None:
    def run() -> None:
        x = torch.ones(1_000_000)
        y = x + 1
        del x
        y *= 2

    assert peak(run) == (pytest.approx(8_000_000, abs=100), 0)
    kept: list[Tensor] = []
    assert peak(lambda: kept.append(torch.ones(1000))) == (pytest.approx(4000, abs=100), 4000)


@pytest.mark.parametrize("limit", [8, 64, 256])
@pytest.mark.parametrize("shapes", [LARGE, SMALL], ids=["large", "small"])
@pytest.mark.parametrize("arguments", [NOTHING, {}, CHUNKED], ids=["adamw", "default", "chunked"])
def test_temporary_memory_is_bounded(arguments: dict[str, Any], shapes: list[tuple[int, ...]], limit: int) -> None:
    """6 MB of parameters, as one and as many: a step keeps to ``max_buffer_memory_mb`` and leaves nothing behind."""
    options = {**arguments, "max_buffer_memory_mb": limit, "relationship_discovery_interval": 2}
    _, optimizer = build(shapes, **options)
    optimizer.step()
    optimizer.step()  # digests what the first one measured; measuring steps are 1, 3, 5
    most, left = peak(optimizer.step)
    assert most <= limit * 1e6
    assert left == 0


def test_comparing_parameters_is_bounded() -> None:
    """All pairs of 3,000 matrices are looked at in blocks: 9 million scores, at intervals only."""
    _, optimizer = build([(4, 2)] * 3000, relationship_discovery_interval=2)
    optimizer.step()
    most, left = peak(optimizer.step)
    assert most < 160e6  # half of what all scores at once would take
    assert left == 0


def test_complete_matrices_cost_a_multiple_of_one_parameter() -> None:
    """Techniques that look at a complete matrix see one large parameter at a time."""
    params, optimizer = build([(600, 500)] * 6, **{**EVERYTHING, "max_buffer_memory_mb": 8})
    for _ in range(2):
        optimizer.step()
    most, left = peak(optimizer.step)
    assert most < 40 * params[0].numel() * 4
    assert left == 0


def test_state_costs_what_it_says() -> None:
    """The first step keeps the state and nothing else."""
    for arguments in ({}, EVERYTHING, {"state_precision": "bf16"}):
        _, optimizer = build([(64, 32)] * 50, **arguments)
        promised = optimizer.state_bytes(optimizer.param_groups[0]["state_precision"])
        _, left = peak(optimizer.step)
        assert optimizer.state_bytes() == promised
        assert promised <= left <= promised * 1.01 + 4096


@pytest.mark.parametrize("shapes", [[(600, 500)] * 2, [(64, 32)] * 200], ids=["large", "small"])
def test_loading_needs_no_second_state(shapes: list[tuple[int, ...]]) -> None:
    """The old state goes before the new one comes: torch's checkpoint code allocates a state only to load into it."""
    _, source = build(shapes, max_buffer_memory_mb=4)
    source.step()
    saved = {**source.state_dict(), "state": copy.deepcopy(source.state_dict()["state"])}
    _, optimizer = build(shapes, max_buffer_memory_mb=4)
    state = source.state_bytes()

    def run() -> None:
        optimizer.step()
        optimizer.load_state_dict(saved)

    most, left = peak(run)
    assert most < (1.5 if len(shapes) < 10 else 2.2) * state  # small ones are stacked, which takes a second copy
    assert left < 1.01 * state


def test_kahan_costs_nothing_where_it_does_nothing() -> None:
    """float32 parameters of a mixed model keep no compensation."""
    full, half = nn.Parameter(torch.ones(4, 3)), nn.Parameter(torch.ones(4, 3).bfloat16())
    optimizer = HinaAdaptive([full, half], lr=LR, rounding="kahan")
    full.grad, half.grad = torch.ones(4, 3), torch.ones(4, 3).bfloat16()
    promised = optimizer.state_bytes("fp32")
    optimizer.step()
    assert "kahan" not in optimizer.state[full] and optimizer.state[half]["kahan"].dtype == torch.bfloat16
    assert optimizer.state_bytes() == promised


def live_tensors() -> int:
    gc.collect()
    return sum(issubclass(type(x), Tensor) for x in gc.get_objects())


@pytest.mark.parametrize("arguments", [{}, EVERYTHING], ids=["default", "all"])
def test_nothing_grows(arguments: dict[str, Any]) -> None:
    """50 steps, with a schedule, options that change, and a parameter whose gradient comes and goes."""
    named = named_params()
    optimizer = HinaAdaptive(named, lr=LR, **{**arguments, "relationship_discovery_interval": 3})

    def run(steps: int) -> None:
        for step in range(steps):
            give(named, step % 7)
            named[-1][1].grad = None if step % 2 else named[-1][1].grad
            optimizer.param_groups[0]["lr"] = LR * (1 - step / 100)
            optimizer.param_groups[0]["betas"] = (0.9 - step / 1000, 0.999)
            optimizer.step()

    run(12)
    give(named, 0)
    tensors, buckets = live_tensors(), len(set(optimizer._buckets._of.values()))
    tracemalloc.start()
    try:
        run(12)
        give(named, 0)
        gc.collect()
        before, _ = tracemalloc.get_traced_memory()
        run(50)
        give(named, 0)
        gc.collect()
        after, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert live_tensors() == tensors
    assert len(set(optimizer._buckets._of.values())) == buckets
    assert after - before < 50_000


def test_buckets_formed_again_leave_nothing_behind() -> None:
    """State is stacked anew when the gradients' owners or the options change; the old stacks must not wait for Python's
    collector, which does not know how large they are."""
    params, optimizer = build([(16, 8)] * 6)
    counts = []
    gc.collect()
    gc.disable()
    try:
        for step in range(30):
            for i, p in enumerate(params):
                p.grad = None if i == step % 6 else torch.ones_like(p)
            if step % 3 == 0:
                optimizer.param_groups[0]["use_lr_mask"] = bool(step % 2)
            if step % 7 == 0:
                optimizer.load_state_dict(optimizer.state_dict())
            optimizer.step()
            held = {
                t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in gc.get_objects() if is_plain(t)
            }
            counts.append(sum(held.values()))
    finally:
        gc.enable()
    assert max(counts[18:]) <= 1.1 * max(counts[6:18])


def is_plain(x: Any) -> bool:
    return type(x) in (Tensor, nn.Parameter) and x.device.type == "cpu" and x.layout is torch.strided


class Waits(TorchDispatchMode):
    """Records operations whose result the host must wait for."""

    NAMES = ("_local_scalar_dense", "item", "equal", "is_nonzero", "nonzero", "masked_select", "unique", "_unique2")

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []
        self.calls = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls += 1
        name = func.overloadpacket.__name__
        if name in self.NAMES:
            self.seen.append(name)
        return func(*args, **(kwargs or {}))


def test_the_watch_sees_waits() -> None:
    with Waits() as watch:
        x = torch.ones(3)
        bool((x > 0).all())
        x[x > 0]
    assert {"_local_scalar_dense", "nonzero"} & set(watch.seen) and "_local_scalar_dense" in watch.seen


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "arguments", [{}, EVERYTHING, {"state_precision": "bf16"}], ids=["default", "all", "bf16 state"]
)
def test_a_step_never_waits_for_the_device(arguments: dict[str, Any], dtype: torch.dtype) -> None:
    """Measuring and refreshing steps, phases, schedules and bad gradients included; only making state may look."""
    named = named_params(dtype)
    optimizer = HinaAdaptive(named, lr=LR, **{**arguments, "relationship_discovery_interval": 3})
    give(named, 0)
    optimizer.step()
    for step in range(1, 9):
        give(named, step)
        optimizer.param_groups[0]["lr"] = LR / step
        if step == 4:
            dict(named)["square"].grad[0, 0] = torch.nan  # type: ignore[index]
        with Waits() as watch:
            optimizer.step()
        assert watch.calls > 20
        assert watch.seen == [], f"step {step + 1}"


def test_calls_do_not_grow_with_the_number_of_small_tensors() -> None:
    """Hundreds of tensors of one shape cost the operations of one, beside gathering and handing back."""
    calls = []
    for count in (2, 50, 200):
        _, optimizer = build([(16, 8)] * count)
        for _ in range(2):
            optimizer.step()
        with Waits() as watch:
            optimizer.step()
        calls.append(watch.calls)
    # a detached view a parameter to read it, one to write it
    assert calls[2] - calls[1] <= 4 * 150
    assert calls[1] - calls[0] <= 4 * 48
