"""hina_lightning.accelerate on every engine, with the configurations that are shipped."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import DistributedType, ProjectConfiguration
from lightning.fabric import Fabric
from lightning.pytorch.core.optimizer import LightningOptimizer
from torch import nn

from hina_lightning.accelerate import StatisticsTracker, checks, guard_memory, prepare, unwrap_optimizer
from hina_lightning.sharded_state import CheckpointError
from hina_optim import HinaAdamW, HinaAdaptive
from hina_optim.memory import MemoryGuard, MemoryReading, ScriptedProbe
from hina_optim.memory.probes import GIB
from tests.accelerate_worlds import (
    ENGINES,
    HALF,
    Trained,
    accelerator_with,
    built,
    enter,
    masters_main,
    trained,
    without_builds,
)
from tests.sharded.world import outcomes, run

#: DeepSpeed takes several seconds to begin.
LONG = pytest.mark.sharded
ALL = [pytest.param(engine, marks=LONG) if engine.startswith("zero") else engine for engine in ENGINES]
#: What DeepSpeed hides from an optimizer until it steps.
HIDDEN = "sign_agree/"


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    """Every test begins like a script that was started by itself."""
    for name in list(os.environ):
        if name.startswith(("ACCELERATE_", "FSDP_", "MASTER_")) or name in ("WORLD_SIZE", "RANK", "LOCAL_RANK"):
            monkeypatch.delenv(name)
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@pytest.fixture(scope="module")
def one() -> Trained:
    return trained("one", 1, optimizer_name="HinaAdaptive")[0]


def largest_difference(some: Trained, others: Trained) -> float:
    """Largest ``‖w − w′‖ / ‖w′‖`` of any parameter."""
    assert some.weights.keys() == others.weights.keys()
    return max(((w - others.weights[n]).norm() / others.weights[n].norm()).item() for n, w in some.weights.items())


def same_bits(some: dict[str, torch.Tensor], others: dict[str, torch.Tensor]) -> bool:
    return some.keys() == others.keys() and all(torch.equal(w, others[n]) for n, w in some.items())


@pytest.mark.parametrize("engine", ALL)
def test_every_engine_trains_as_one_process_and_resumes_to_the_bit(engine, one, tmp_path):
    ranks = trained(engine, optimizer_name="HinaAdaptive", save=tmp_path / "half")
    first = ranks[0]
    assert all(same_bits(first.weights, other.weights) for other in ranks)
    assert largest_difference(first, one) < 2e-6
    assert first.losses == pytest.approx(one.losses, rel=1e-5)
    assert first.rates == one.rates

    hidden = engine.startswith("zero")
    for step, values in one.logged.items():  # statistics of the whole model
        wanted = {name: value for name, value in values.items() if not (hidden and name.startswith(HIDDEN))}
        assert first.logged[step] == pytest.approx(wanted, rel=1e-4, abs=1e-9)
    assert all(rank.statistics == first.statistics != {} for rank in ranks)

    again = trained(engine, optimizer_name="HinaAdaptive", first=HALF, resume=tmp_path / "half")[0]
    assert same_bits(again.weights, first.weights)
    assert again.losses == first.losses[HALF:]
    assert again.rates == first.rates[HALF:]
    assert again.logged == {step: values for step, values in first.logged.items() if step >= HALF}


@pytest.mark.parametrize("engine", [pytest.param(engine, marks=LONG) for engine in ENGINES])
def test_factored_8bit_state_does_so_too(engine, tmp_path):
    name, options = "Automagic_CameAMP_Improved_8Bit", {"min_8bit_size": 256}
    reference = trained("one", 1, optimizer_name=name, options=options)[0]
    first = trained(engine, optimizer_name=name, options=options, save=tmp_path / "half")[0]
    # flat partitions cut blocks of 8-bit state: other blocks, other roundings
    blocks_are_kept = engine in ("ddp", "fsdp2")
    assert largest_difference(first, reference) < (2e-6 if blocks_are_kept else 5e-4)
    again = trained(engine, optimizer_name=name, options=options, first=HALF, resume=tmp_path / "half")[0]
    if blocks_are_kept:
        assert same_bits(again.weights, first.weights)
    else:  # saved decoded, and encoded again
        assert largest_difference(again, first) < 2e-4


@pytest.mark.parametrize(
    ("engine", "before", "after"),
    [("ddp", 2, 1), ("ddp", 1, 2), pytest.param("fsdp2", 2, 4, marks=LONG), pytest.param("zero2", 2, 1, marks=LONG),
     pytest.param("zero1", 1, 2, marks=LONG), pytest.param("zero3", 2, 1, marks=LONG)],
)  # fmt: skip
def test_a_checkpoint_goes_on_in_another_number_of_processes(engine, before, after, one, tmp_path):
    trained(engine, before, optimizer_name="HinaAdaptive", last=HALF, save=tmp_path / "half")
    again = trained(engine, after, optimizer_name="HinaAdaptive", first=HALF, resume=tmp_path / "half")[0]
    assert largest_difference(again, one) < 2e-6
    assert again.rates == one.rates[HALF:]


@LONG
@pytest.mark.parametrize("engine", ["zero2", "zero3"])
def test_weights_in_full_precision_survive_another_number_of_processes(engine, tmp_path):
    """DeepSpeed alone would take them from the bf16 weights."""
    without_builds()
    saved = run(masters_main, 2, engine, 2, tmp_path / "half", False, launched=True)[0]
    loaded = run(masters_main, 1, engine, 1, tmp_path / "half", True, launched=True)[0]
    assert same_bits(loaded, saved)
    assert any(not torch.equal(w, w.bfloat16().float()) for w in saved.values())


# -- prepare -----------------------------------------------------------------------------------------------------------


def small() -> tuple[nn.Module, HinaAdaptive]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 1))
    return model, HinaAdaptive(model.named_parameters(), lr=1e-3, compile=False)


def step(model: nn.Module, optimizer: Any) -> None:
    model(torch.ones(2, 4)).sum().backward()
    optimizer.step()
    optimizer.zero_grad()


def test_prepare_returns_the_objects_in_their_order_and_keeps_the_optimizer():
    model, optimizer, scheduler, loader = built("HinaAdaptive")
    results = prepare(Accelerator(cpu=True), loader, optimizer, model, scheduler)
    assert [unwrap_optimizer(results[1]) is optimizer, results[2] is model] == [True, True]
    assert next(iter(results[0])).shape == (4, 32)
    assert results[3].scheduler is scheduler


@pytest.mark.parametrize("missing", ["model", "optimizer"])
def test_prepare_needs_model_and_optimizer(missing):
    model, optimizer = small()
    with pytest.raises(ValueError, match="give model and optimizer to the same call; got"):
        prepare(Accelerator(cpu=True), optimizer if missing == "model" else model)


def test_an_optimizer_of_another_model_is_refused():
    model, _ = small()
    _, stranger = small()
    with pytest.raises(RuntimeError, match=r"no parameters of the prepared model: 0\.weight, 0\.bias"):
        prepare(Accelerator(cpu=True), model, stranger)


def test_parameters_without_names_get_those_of_the_model(tmp_path):
    model, _ = small()
    optimizer = HinaAdaptive(model.parameters(), lr=1e-3, compile=False)
    prepare(Accelerator(cpu=True), model, optimizer)
    assert optimizer.param_names() == [name for name, _ in model.named_parameters()]


def test_other_optimizers_are_prepared_and_saved_as_ever(tmp_path):
    accelerator = Accelerator(cpu=True)
    model, ours = small()
    other = torch.optim.AdamW(model.parameters(), lr=1e-3)
    model, ours, other = prepare(accelerator, model, ours, other)
    for optimizer in (ours, other):
        step(model, optimizer)
    accelerator.save_state(str(tmp_path))
    assert {"optimizer.bin", "hina_optimizer_0"} <= {path.name for path in tmp_path.iterdir()}
    moments = [state["exp_avg"].clone() for optimizer in (ours, other) for state in optimizer.state.values()]
    for optimizer in (ours, other):
        step(model, optimizer)
    accelerator.load_state(str(tmp_path))
    found = [state["exp_avg"] for optimizer in (ours, other) for state in optimizer.state.values()]
    assert all(map(torch.equal, found, moments))
    assert len(accelerator._optimizers) == 2


# -- what goes wrong without a word ------------------------------------------------------------------------------------


def refused(rank: int, engine: str, environment: dict[str, str], stepped: bool = False) -> None:
    """Prepare in a world that has something wrong with it."""
    enter(engine, 2)
    os.environ.update(environment)
    accelerator = accelerator_with({})
    model, optimizer, scheduler, loader = built("HinaAdaptive")
    if stepped:
        optimizer.init_state()
    prepare(accelerator, model, optimizer, loader, scheduler)


def alone(rank: int, environment: dict[str, str], **options: Any) -> None:
    """Prepare in processes that accelerate does not connect."""
    os.environ.update(environment)
    model, optimizer = small()
    prepare(Accelerator(**options), model, optimizer)


def test_processes_that_know_nothing_of_each_other_are_refused():
    found = outcomes(alone, 2, {}, launched=True)
    assert all("2 processes were launched, but accelerate trains in 1" in str(one.error) for one in found)


@pytest.mark.parametrize("engine", ["FSDP", "DEEPSPEED"])
def test_an_engine_that_is_not_used_is_refused(engine):
    environment = {f"ACCELERATE_USE_{engine}": "true", "FSDP_SYNC_MODULE_STATES": "false"}
    for one in outcomes(alone, 2, {**environment, "ACCELERATE_USE_CPU": "true"}, launched=True):
        assert "was asked for, but accelerate trains with distributed_type MULTI_CPU" in str(one.error)


def test_a_launch_that_ignored_the_number_of_processes_is_said(monkeypatch, caplog):
    model, optimizer = small()
    prepare(Accelerator(cpu=True), model, optimizer)
    assert not caplog.records
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    prepare(Accelerator(cpu=True), *small())
    assert "ignores --num_processes" in caplog.text


@pytest.mark.parametrize("engine", ["fsdp2", pytest.param("zero2", marks=LONG)])
def test_state_that_the_engine_would_leave_behind_is_refused(engine):
    if engine == "zero2":
        without_builds()
    for one in outcomes(refused, 2, engine, {}, True, launched=True):
        assert "has state already" in str(one.error)


@LONG
def test_an_optimizer_that_deepspeed_would_replace_is_refused():
    without_builds()
    environment = {"ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": "cpu"}
    for one in outcomes(refused, 2, "zero2", environment, launched=True):
        assert "ValueError" in str(one.error)
        assert "zero_force_ds_cpu_optimizer: false" in str(one.error)


def test_an_optimizer_that_was_replaced_is_noticed():
    model, optimizer = small()
    with pytest.raises(RuntimeError, match=r"HinaAdaptive was replaced by SGD.*zero_force_ds_cpu_optimizer: false"):
        checks.same_optimizers([optimizer], [torch.optim.SGD(model.parameters(), lr=0.1)])


def test_flat_parameters_of_fsdp1_are_refused():
    for one in outcomes(flat, 2, launched=True):
        assert "steps tensors that are no parameters of the prepared model: 0.weight" in str(one.error)
        assert "fsdp_use_orig_params: true" in str(one.error)


def flat(rank: int) -> None:
    """Prepare where FSDP1 replaces the parameters."""
    enter("fsdp1", 2)
    os.environ.update(FSDP_USE_ORIG_PARAMS="false", FSDP_AUTO_WRAP_POLICY="NO_WRAP")
    prepare(Accelerator(), *small())


class Engine:
    """What is asked of a DeepSpeed engine here."""

    def __init__(self, clipping: float) -> None:
        self.clipping = clipping

    def gradient_clipping(self) -> float:
        return self.clipping


def test_deepspeed_clipping_otherwise_than_asked_is_noticed():
    checks.deepspeed_clipping(Engine(0.5), 0.5)
    checks.deepspeed_clipping(Engine(1.0), None)
    with pytest.raises(RuntimeError, match=r"clips gradients at norm 1\.0, but gradient_clipping: 0\.5"):
        checks.deepspeed_clipping(Engine(1.0), 0.5)


# -- wrappers ----------------------------------------------------------------------------------------------------------


def test_the_optimizer_is_found_in_every_wrapper():
    model, optimizer = small()
    fabric = Fabric(accelerator="cpu", devices=1)
    wrappers = [
        optimizer,
        prepare(Accelerator(cpu=True), model, optimizer)[1],
        LightningOptimizer(optimizer),
        fabric.setup(model, optimizer)[1],
    ]
    assert [unwrap_optimizer(one) is optimizer for one in wrappers] == [True] * 4
    with pytest.raises(TypeError, match="Linear neither is an optimizer"):
        unwrap_optimizer(model[0])


def test_a_method_called_on_what_is_unwrapped_changes_the_optimizer():
    model, optimizer = small()
    model, prepared = prepare(Accelerator(cpu=True), model, optimizer)
    step(model, prepared)
    unwrap_optimizer(prepared).set_state_precision("bf16")
    assert {state["exp_avg"].dtype for state in prepared.state.values()} == {torch.bfloat16}


# -- trackers and memory -----------------------------------------------------------------------------------------------


def test_statistics_are_those_of_the_callbacks(one):
    from tests.lightning_worlds import trained as lightning_trained

    logged = lightning_trained("one", 1, optimizer="HinaAdaptive")[0].logged
    for at in (1, 3):  # the data are the same up to there
        # the module of Lightning holds the model
        wanted = {name.replace("importance/model.", "importance/"): value for name, value in logged[at].items()}
        assert one.logged[at] == pytest.approx(wanted, rel=1e-6, abs=1e-12)


def test_a_second_optimizer_is_told_apart():
    logged: dict[int, dict[str, float]] = {}
    accelerator = accelerator_with(logged)
    accelerator.gradient_accumulation_steps = 1
    model, first = small()
    second = HinaAdamW(model[0].named_parameters(), lr=1e-3, compile=False)
    model, first, second = prepare(accelerator, model, first, second)
    StatisticsTracker(accelerator, first, second, every_n_steps=1)
    step(model, first)
    step(model, second)
    assert {"lr/group0", "lr/group0-1", "lr_eff/group0-1"} <= logged[0].keys()


def test_tracking_needs_a_tracker_and_statistics():
    model, optimizer = small()
    accelerator = Accelerator(cpu=True)
    with pytest.raises(ValueError, match="the accelerator has no tracker"):
        StatisticsTracker(accelerator, optimizer)
    with pytest.raises(ValueError, match=r"needs an optimizer with lr_mask_statistics\(\).*got SGD"):
        StatisticsTracker(accelerator_with({}), torch.optim.SGD(model.parameters(), lr=0.1))
    with pytest.raises(ValueError, match="every_n_steps"):
        StatisticsTracker(accelerator_with({}), optimizer, every_n_steps=0)


def test_the_guard_acts_within_the_loop_and_goes_with_the_checkpoint(tmp_path):
    limit = 10 * GIB
    script = [0.1, 0.2, 0.95, 0.5, 0.5]  # at the start, after steps 1, 2 (and after it acted), 4
    probe = ScriptedProbe([MemoryReading(int(x * limit), limit, 0, 0) for x in script])
    logged: dict[int, dict[str, float]] = {}
    accelerator = accelerator_with(logged)
    accelerator.gradient_accumulation_steps = 1
    model, optimizer = prepare(accelerator, *small())
    guard = guard_memory(accelerator, MemoryGuard(probe=probe, every_n_steps=2), optimizer)
    for _ in range(2):
        step(model, optimizer)
    assert [action["step"] for action in guard.actions] == [2]
    assert logged[2]["mem/actions"] == 1.0
    accelerator.save_state(str(tmp_path))

    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = Accelerator(cpu=True)
    model, optimizer = prepare(accelerator, *small())
    resumed = guard_memory(accelerator, MemoryGuard(probe=ScriptedProbe([probe.read()] * 9)), optimizer)
    accelerator.load_state(str(tmp_path))
    assert resumed.actions == guard.actions
    # what it did to the state is still so
    assert {state["exp_avg"].dtype for state in optimizer.state.values()} != {torch.float32}


# -- checkpoints -------------------------------------------------------------------------------------------------------


def test_numbered_checkpoints_are_found(tmp_path):
    def begin() -> tuple[Any, ...]:
        AcceleratorState._reset_state(reset_partial_state=True)
        configuration = ProjectConfiguration(str(tmp_path), automatic_checkpoint_naming=True, total_limit=2)
        accelerator = Accelerator(cpu=True, project_config=configuration)
        return accelerator, *prepare(accelerator, *small())

    accelerator, model, optimizer = begin()
    for _ in range(3):
        step(model, optimizer)
        accelerator.save_state()
    assert len(list((tmp_path / "checkpoints").iterdir())) == 2
    accelerator, model, optimizer = begin()
    accelerator.load_state()
    assert {int(state["step"]) for state in optimizer.state.values()} == {3}


def test_a_checkpoint_of_accelerate_alone_is_loaded_by_it(tmp_path, caplog):
    accelerator = Accelerator(cpu=True)
    model, optimizer = small()
    model, optimizer = accelerator.prepare(model, optimizer)
    step(model, optimizer)
    accelerator.save_state(str(tmp_path))
    accelerator = Accelerator(cpu=True)
    model, optimizer = prepare(accelerator, *small())
    accelerator.load_state(str(tmp_path))
    assert {int(state["step"]) for state in optimizer.state.values()} == {1}
    assert "has no hina_optimizer_0/: accelerate loads what it has saved by itself" in caplog.text


def test_another_number_of_optimizers_is_refused(tmp_path):
    accelerator = Accelerator(cpu=True)
    model, first = small()
    prepare(accelerator, model, first, HinaAdamW(model.named_parameters(), lr=1e-3))
    accelerator.save_state(str(tmp_path))
    accelerator = Accelerator(cpu=True)
    prepare(accelerator, *small())
    with pytest.raises(RuntimeError, match="holds the state of 2 optimizers, 1 were prepared"):
        accelerator.load_state(str(tmp_path))


def test_incomplete_state_is_named_before_weights_are_loaded(tmp_path):
    accelerator = Accelerator(cpu=True)
    model, optimizer = prepare(accelerator, *small())
    step(model, optimizer)
    accelerator.save_state(str(tmp_path))
    next((tmp_path / "hina_optimizer_0").glob("*.bin")).unlink()
    step(model, optimizer)
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(CheckpointError, match="hina_optimizer_0"):
        accelerator.load_state(str(tmp_path))
    assert all(map(torch.equal, before, model.parameters()))


@pytest.mark.gpu
def test_on_a_gpu():
    accelerator = Accelerator()
    assert accelerator.distributed_type == DistributedType.NO
    model, optimizer = prepare(accelerator, *small())
    model(torch.ones(2, 4, device=accelerator.device)).sum().backward()
    optimizer.step()
    assert {p.device.type for group in optimizer.param_groups for p in group["params"]} == {"cuda"}
    assert {state["exp_avg"].device.type for state in optimizer.state.values()} == {"cuda"}
