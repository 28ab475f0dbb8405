"""Probes and the ladder of memory: predictions against measurements, on the CPU, in this very process."""

import gc
import logging
import math
import sys

import pytest
import torch
from torch import nn

from hina_optim import HinaAdaptive
from hina_optim.memory import (
    LADDER,
    CudaProbe,
    MemoryReading,
    ProcessProbe,
    ScriptedProbe,
    as_size,
    optimize_for_vram,
    plan_for_vram,
    probe_for,
    used_bytes,
)
from hina_optim.memory.ladder import ReleaseScratch, Rung
from hina_optim.memory.probes import GIB, reading_of

TINY = 1e-9
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def build(steps=2, **arguments):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(40, 30), nn.Tanh(), nn.Linear(30, 40))
    optimizer = HinaAdaptive(model.named_parameters(), **{"lr": 1e-4, **arguments})
    train(model, optimizer, steps)
    return model, optimizer


def train(model, optimizer, steps):
    for i in range(steps):
        optimizer.zero_grad()
        x = torch.randn(4, 40, generator=torch.Generator().manual_seed(i))
        model(x).square().mean().backward()
        optimizer.step()


def held(optimizer):
    return sum(x.numel() * x.element_size() for s in optimizer.state.values() for x in s.values())


# -- readings and probes -----------------------------------------------------------------------------------------------


def test_reading():
    reading = MemoryReading(used_bytes=3, limit_bytes=4)
    assert reading.pressure == 0.75
    assert reading.free_bytes == 1
    assert MemoryReading(5, 4).free_bytes == 0
    assert reading.peak_bytes == reading.retries == 0


def test_what_an_allocator_has_left():
    """Free on the device, and held without use; less remainders of blocks, unless those can be joined."""
    stats = {
        "allocated_bytes.all.current": 50, "reserved_bytes.all.current": 80, "inactive_split_bytes.all.current": 12,
        "allocated_bytes.all.peak": 70, "num_alloc_retries": 2, "num_ooms": 1,
    }  # fmt: skip
    reading = reading_of(stats, 20, expandable=False)
    assert reading.available_bytes == 20 + (80 - 50) - 12
    assert (reading.used_bytes, reading.limit_bytes, reading.reserved_bytes) == (62, 100, 80)
    assert (reading.peak_bytes, reading.retries) == (70, 3)
    joined = reading_of(stats, 20, expandable=True)
    assert (joined.available_bytes, joined.used_bytes, joined.limit_bytes) == (50, 50, 100)
    short = reading_of(stats, 20, expandable=False, limit_bytes=64)
    assert short.limit_bytes == 64 and short.available_bytes == 38, "a budget takes nothing from the device"
    assert reading_of({}, 7, expandable=False).available_bytes == 7


def test_scripted_probe_repeats_its_last_reading():
    readings = [MemoryReading(1, 4), MemoryReading(3, 4)]
    probe = ScriptedProbe(iter(readings))
    assert [probe.read() for _ in range(4)] == [readings[0], readings[1], readings[1], readings[1]]
    with pytest.raises(ValueError, match="at least one"):
        ScriptedProbe([])


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells what is resident now")
def test_process_probe_sees_memory_come_and_go():
    gc.collect()  # what other tests have left must not go in between
    probe = ProcessProbe(limit_gb=512.0)
    before = probe.read()
    assert before.limit_bytes == 512 * GIB
    assert 0 < before.used_bytes < before.limit_bytes
    size = 256 << 20
    ballast = torch.ones(size, dtype=torch.uint8)
    during = probe.read()
    assert during.used_bytes - before.used_bytes > 0.9 * size
    assert during.peak_bytes >= during.used_bytes
    assert during.pressure > before.pressure
    del ballast
    after = probe.read()
    assert after.used_bytes < during.used_bytes - 0.9 * size
    assert after.peak_bytes >= during.peak_bytes


def test_process_probe_without_a_limit_takes_the_machine():
    psutil = pytest.importorskip("psutil")
    reading = ProcessProbe().read()
    assert reading.limit_bytes == psutil.virtual_memory().total
    assert reading.used_bytes == pytest.approx(psutil.Process().memory_info().rss, rel=0.05)


@pytest.mark.parametrize("limit", [0, -1.0, math.nan, math.inf, "8"])
@pytest.mark.parametrize("make", [ProcessProbe, lambda limit: probe_for("cpu", limit)])
def test_bad_limits(make, limit):
    with pytest.raises(ValueError, match="limit_gb="):
        make(limit)


def test_probe_for_a_device():
    probe = probe_for("cpu", limit_gb=2)
    assert isinstance(probe, ProcessProbe)
    assert probe.read().limit_bytes == 2 * GIB
    with pytest.raises(ValueError, match="no memory probe for device type 'meta'"):
        probe_for(torch.device("meta"))


def test_cuda_probe_refuses_what_is_not_cuda():
    with pytest.raises(ValueError, match="'cpu' is not a CUDA device"):
        CudaProbe("cpu")
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="CUDA is not available"):
            CudaProbe("cuda:0")


@pytest.mark.gpu
@needs_gpu
def test_cuda_probe_sees_memory_come_and_go():
    probe = CudaProbe()
    before = probe.read()
    ballast = torch.ones(256 << 20, dtype=torch.uint8, device="cuda")
    during = probe.read()
    assert during.used_bytes - before.used_bytes >= 256 << 20
    assert during.limit_bytes == pytest.approx(before.limit_bytes, rel=0.01)
    assert during.peak_bytes >= during.used_bytes
    del ballast
    assert probe.read().used_bytes <= before.used_bytes + (2 << 20)
    assert CudaProbe(limit_gb=0.5).read().limit_bytes == GIB // 2


@pytest.mark.gpu
@needs_gpu
def test_on_cuda_the_allocator_confirms_what_was_saved():
    model = nn.Linear(1024, 1024, device="cuda")
    optimizer = HinaAdaptive(model.parameters(), lr=1e-4)
    model(torch.randn(4, 1024, device="cuda")).square().mean().backward()
    optimizer.step()
    before = torch.cuda.memory_allocated()
    report = optimizer.optimize_for_vram(TINY)
    saved = before - torch.cuda.memory_allocated()
    assert saved == pytest.approx(sum(action["bytes_saved"] for action in report["actions"]))
    assert saved == pytest.approx(report["actions"][-1]["bytes_predicted"], rel=0.05)
    assert "cuda:0" in optimizer.get_memory_stats()["cuda_memory"]


# -- the ladder --------------------------------------------------------------------------------------------------------


def test_used_bytes_counts_what_is_there():
    model, optimizer = build()
    params = sum(p.numel() * 4 for p in model.parameters())
    assert used_bytes(optimizer) == 2 * params + held(optimizer) + optimizer.scratch_bytes()
    optimizer.zero_grad(set_to_none=True)
    assert used_bytes(optimizer) == params + held(optimizer) + optimizer.scratch_bytes()


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_state_to_come_is_counted_before_the_first_step(precision):
    _model, optimizer = build(steps=0, state_precision=precision)
    expected = used_bytes(optimizer)
    optimizer.init_state()
    assert used_bytes(optimizer) == expected


def test_existing_state_is_converted_and_what_was_learned_is_kept(caplog):
    model, optimizer = build(steps=3)
    moments = {p: optimizer.state[p]["exp_avg"].clone() for p in model.parameters()}
    before, used = held(optimizer), used_bytes(optimizer)
    with caplog.at_level(logging.INFO, logger="hina_optim"):
        report = optimizer.optimize_for_vram((used - 1) / GIB)
    assert report["reached"] and report["message"] == "" and not report["dry_run"]
    (action,) = report["actions"]
    assert action["rung"] == "bf16"
    assert action["bytes_saved"] == action["bytes_predicted"] == before - held(optimizer) > 0
    assert report["used_bytes_before"] == used
    assert report["used_bytes_after"] == used_bytes(optimizer) == used - action["bytes_saved"]
    assert all(group["state_precision"] == "bf16" for group in optimizer.param_groups)
    for p in model.parameters():
        assert optimizer.state[p]["exp_avg"].dtype == torch.bfloat16
        torch.testing.assert_close(optimizer.state[p]["exp_avg"].float(), moments[p], rtol=2**-7, atol=0)
    (record,) = caplog.records
    assert record.levelno == logging.INFO and record.name == "hina_optim"
    assert "bf16" in record.getMessage() and str(action["bytes_saved"]) in record.getMessage()
    train(model, optimizer, 2)
    assert all(p.isfinite().all() for p in model.parameters())
    assert held(optimizer) == before - action["bytes_saved"], "it stays so"


def test_a_target_met_already_costs_nothing():
    _model, optimizer = build()
    report = optimizer.optimize_for_vram(1.0)
    assert report["reached"] and report["actions"] == [] and report["message"] == ""
    assert optimizer.param_groups[0]["state_precision"] == "fp32"


def test_an_impossible_target_does_all_it_can_and_says_what_else_helps(caplog):
    _model, optimizer = build()
    with caplog.at_level(logging.WARNING, logger="hina_optim"):
        report = optimizer.optimize_for_vram(TINY)
    assert not report["reached"]
    # these parameters are too small for 8 bits
    off = ["use_dynamic_adaptation=False", "use_spd=False", "use_lr_mask=False"]
    rungs = ["bf16", "factored_second_moment=True", *off]
    assert [action["rung"] for action in report["actions"]] == rungs
    assert report["used_bytes_after"] > TINY * GIB
    for words in ("out of reach", "smaller batch", "gradient checkpointing", "exp_avg_sq"):
        assert words in report["message"]
    assert report["message"] in caplog.text
    again = optimizer.optimize_for_vram(TINY)
    assert again["actions"] == [] and not again["reached"]
    assert again["used_bytes_after"] == report["used_bytes_after"]


def test_before_the_first_step_the_state_to_come_shrinks():
    _model, optimizer = build(steps=0)
    full = used_bytes(optimizer)
    report = optimizer.optimize_for_vram((full - 1) / GIB)
    assert report["reached"]
    (action,) = report["actions"]
    assert action["bytes_saved"] == action["bytes_predicted"] > 0
    optimizer.init_state()
    assert used_bytes(optimizer) == report["used_bytes_after"] == full - action["bytes_saved"]


def test_a_plan_changes_nothing_and_comes_true(caplog):
    _model, optimizer = build()
    before = held(optimizer)
    with caplog.at_level(logging.DEBUG, logger="hina_optim"):
        plan = optimizer.plan_for_vram(TINY)
    assert caplog.records == []
    assert plan["dry_run"] and held(optimizer) == before
    assert optimizer.param_groups[0]["state_precision"] == "fp32"
    done = optimizer.optimize_for_vram(TINY)
    assert plan["used_bytes_after"] == done["used_bytes_after"]
    assert [a["rung"] for a in plan["actions"]] == [a["rung"] for a in done["actions"]]
    assert [a["bytes_predicted"] for a in plan["actions"]] == [a["bytes_saved"] for a in done["actions"]]


def test_memory_efficient_off_does_nothing_and_says_so(caplog):
    _model, optimizer = build(memory_efficient=False)
    with caplog.at_level(logging.INFO, logger="hina_optim"):
        report = optimizer.optimize_for_vram(TINY)
    assert report["actions"] == [] and not report["reached"]
    assert report["used_bytes_before"] == report["used_bytes_after"]
    assert "memory_efficient=False" in report["message"]
    assert "memory_efficient=False" in caplog.text
    assert optimizer.param_groups[0]["state_precision"] == "fp32"
    stats = optimizer.get_memory_stats()
    assert stats["memory_pressure"] == 0 and stats["budget_bytes"] is None


@pytest.mark.parametrize("target", [0, -1.0, math.nan, math.inf, "6", None])
@pytest.mark.parametrize("method", ["optimize_for_vram", "plan_for_vram"])
def test_a_bad_target_is_named_and_changes_nothing(method, target):
    _model, optimizer = build()
    with pytest.raises(ValueError, match=f"{method}: target_vram_gb="):
        getattr(optimizer, method)(target)
    assert optimizer.param_groups[0]["state_precision"] == "fp32"


def test_it_walks_only_as_far_as_needed_and_measures_each_rung():
    """Rungs of one's own, in their order: the first saves less than it promises, the last is never reached."""

    class DropAnchors(Rung):
        cost = "the way back"

        def __init__(self, name, which, promise):
            self.name, self.which, self.promise = name, which, promise

        def applicable(self, optimizer):
            return any("anchor" in optimizer.state[p] for p in self.which)

        def predict(self, optimizer):
            return self.promise

        def act(self, optimizer):
            for p in self.which:
                del optimizer.state[p]["anchor"]

    model, optimizer = build()
    params = list(model.parameters())
    ladder = [
        DropAnchors("first", params[:1], 10_000_000),
        DropAnchors("second", params[1:3], 1),
        DropAnchors("never", params[3:], 1),
    ]
    size = [p.numel() * 4 for p in params]
    target = used_bytes(optimizer) - size[0] - size[1] - size[2]
    plan = plan_for_vram(optimizer, target / GIB, ladder)
    assert [a["rung"] for a in plan["actions"]] == ["first"], "a plan believes the promise"
    report = optimize_for_vram(optimizer, target / GIB, ladder)
    assert [(a["rung"], a["bytes_saved"]) for a in report["actions"]] == [
        ("first", size[0]),
        ("second", size[1] + size[2]),
    ]
    assert report["reached"] and "anchor" in optimizer.state[params[3]]


def test_the_ladder_releases_scratch_before_it_touches_state():
    """An engine that keeps scratch: a subclass with a buffer of its own."""

    class Buffered(HinaAdaptive):
        buffer = torch.zeros(1000)

        def scratch_bytes(self):
            return self.buffer.numel() * 4

        def release_scratch(self):
            freed, self.buffer = self.scratch_bytes(), torch.zeros(0)
            return freed

    assert [rung.name for rung in LADDER][:4] == ["scratch", "anchor_device=cpu", "bf16", "8bit"]
    model = nn.Linear(10, 10)
    optimizer = Buffered(model.parameters(), lr=1e-4)
    optimizer.init_state()
    assert optimizer.get_memory_stats()["buffer_pool_stats"]["current_memory_mb"] == pytest.approx(0.004)
    report = optimizer.optimize_for_vram((used_bytes(optimizer) - 4000) / GIB)
    assert report["actions"] == [
        {"rung": "scratch", "bytes_predicted": 4000, "bytes_saved": 4000, "cost": ReleaseScratch.cost}
    ]
    assert report["reached"] and optimizer.param_groups[0]["state_precision"] == "fp32"


def test_memory_stats_add_up():
    model, optimizer = build(vram_budget_gb=2.0, max_buffer_memory_mb=100)
    optimizer.set_state_precision("bf16")
    stats = optimizer.get_memory_stats()
    state = stats["state_bytes"]
    assert state["total"] == held(optimizer)
    for key in ("by_precision", "by_device", "by_name"):
        assert sum(state[key].values()) == state["total"]
    assert set(state["by_precision"]) == {"float32", "bfloat16", "int8"}
    assert set(state["by_device"]) == {"cpu"}
    assert state["by_name"]["lr_mask"] == 2 * sum(p.numel() for p in model.parameters())
    assert stats["buffer_pool_stats"]["max_memory_mb"] == 100
    assert stats["used_bytes"] == used_bytes(optimizer)
    assert stats["memory_pressure"] == pytest.approx(used_bytes(optimizer) / (2 * GIB))
    assert optimizer.get_optimization_info()["current_memory_pressure"] == stats["memory_pressure"]


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (0, "0 bytes"),
        (640, "640 bytes"),
        (1536, "1.5 KiB"),
        (1020 << 10, "1020 KiB"),
        (3 << 19, "1.5 MiB"),
        (GIB, "1 GiB"),
    ],
)
def test_sizes_as_read(number, text):
    assert as_size(number) == text
