"""VRAMGuard in real fits: scripted memory, the memory of this process, and two processes."""

from __future__ import annotations

import gc
import json
import logging
import math

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint, ProgressBar
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from torch.utils.data import DataLoader

from hina_lightning import configure_optimizers
from hina_lightning.callbacks import VRAMGuard
from hina_optim.memory.probes import GIB, MemoryReading, ProcessProbe, ScriptedProbe

LIMIT = 10 * GIB


def reading(pressure, peak=0.0, retries=0):
    return MemoryReading(int(pressure * LIMIT), LIMIT, int(peak * LIMIT), retries)


def script(*pressures):
    """A probe: empty when the training starts, then these readings."""
    return ScriptedProbe([reading(0.0), *(p if isinstance(p, MemoryReading) else reading(p) for p in pressures)])


class Net(LightningModule):
    def __init__(self, width=16, **options):
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Linear(4, width), nn.Tanh(), nn.Linear(width, 1))
        self.options = {"lr": 1e-3, "compile": False, "schedule": None, **options}

    def training_step(self, batch, batch_idx):
        x, y = batch
        loss = nn.functional.mse_loss(self.body(x), y)
        self.log("loss", loss)
        return loss

    def configure_optimizers(self):
        return configure_optimizers(self, **self.options)


def batches(count):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(4 * count, 4, generator=generator)
    return DataLoader(list(zip(x, x.sum(1, keepdim=True), strict=True)), batch_size=4)


def fit(callbacks, model=None, steps=8, logger=False, ckpt_path=None, **options):
    quiet = dict(enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, log_every_n_steps=1)
    trainer = Trainer(
        **{
            "accelerator": "cpu",
            "devices": 1,
            "max_epochs": 1,
            "callbacks": callbacks,
            "logger": logger,
            **quiet,
            **options,
        }
    )
    trainer.fit(model or Net(), batches(steps), ckpt_path=ckpt_path)
    return trainer


def precisions(trainer):
    return {group["state_precision"] for optimizer in trainer.optimizers for group in optimizer.param_groups}


def every_step(probe, **options):
    return VRAMGuard(**{"probe": probe, "every_n_steps": 1, "cooldown_steps": 0, **options})


# -- when it acts -----------------------------------------------------------------------------------------------------


def test_without_pressure_it_does_nothing():
    guard = every_step(script(0.5, 0.89))
    trainer = fit([guard])
    assert guard.actions == [] and precisions(trainer) == {"fp32"}


def test_under_pressure_existing_state_is_converted_and_the_bytes_are_counted():
    guard = every_step(script(0.5, 0.5, 0.95, 0.6))
    before = []

    class Size(Callback):
        def on_train_batch_end(self, trainer, *_):
            before.append(trainer.optimizers[0].state_bytes())

    trainer = fit([Size(), guard])
    (action,) = guard.actions
    assert (action["step"], action["reason"], action["dry_run"]) == (2, "soft", False)
    assert (action["pressure_before"], action["pressure_after"]) == pytest.approx((0.95, 0.6))
    assert action["bytes_needed"] == pytest.approx(0.15 * LIMIT, abs=2)
    assert precisions(trainer) == {"bf16"}
    # callbacks run in order: what was measured just before the action, and after the next step
    assert action["bytes_saved"] == action["bytes_predicted"] == before[2] - before[3] > 0
    (report,) = action["reports"]
    assert report["optimizer"] == "HinaAdaptive" and [one["rung"] for one in report["actions"]] == ["bf16"]


def test_it_gives_back_no_more_than_is_needed():
    guard = every_step(ScriptedProbe([reading(0.0), MemoryReading(901, 1000), MemoryReading(0, 1000)]), hysteresis=0.0)
    trainer = fit([guard])
    (action,) = guard.actions
    assert action["bytes_needed"] == 1
    assert precisions(trainer) == {"bf16"}  # the one rung with anything to give
    both = every_step(ScriptedProbe([reading(0.0), MemoryReading(901, 1000), MemoryReading(0, 1000)]), hysteresis=0.0)
    trainer = fit([both], Two())
    assert [[a["rung"] for a in report["actions"]] for report in both.actions[0]["reports"]] == [["bf16"], []]
    assert [o.param_groups[0]["state_precision"] for o in trainer.optimizers] == ["bf16", "fp32"]


class Two(Net):
    """Two optimizers in manual optimization; the second may be of another kind."""

    def __init__(self, second=None):
        super().__init__()
        self.automatic_optimization = False
        self.second = second

    def configure_optimizers(self):
        first = configure_optimizers(self.body[0], **self.options)["optimizer"]
        if self.second is not None:
            return [first, self.second(self.body[2].parameters(), lr=1e-3)]
        return [first, configure_optimizers(self.body[2], **self.options)["optimizer"]]

    def training_step(self, batch, batch_idx):
        for optimizer in self.optimizers():
            optimizer.zero_grad()
        self.manual_backward(super().training_step(batch, batch_idx))
        for optimizer in self.optimizers():
            optimizer.step()


def test_every_supporting_optimizer_is_asked_and_others_are_left_alone():
    guard = every_step(script(0.95, 0.5))
    trainer = fit([guard], Two())
    assert len(guard.actions[0]["reports"]) == 2 and precisions(trainer) == {"bf16"}
    guard = every_step(script(0.95, 0.5))
    fit([guard], Two(second=torch.optim.SGD))
    assert len(guard.actions[0]["reports"]) == 1


def test_hysteresis_one_action_until_relief():
    # 0.85 is below soft and above soft − hysteresis: not yet relief. (A reading is also taken after each action.)
    guard = every_step(script(0.92, 0.91, 0.85, 0.92, 0.85, 0.92, 0.7, 0.92, 0.9, 0.92))
    fit([guard], steps=9)
    # step 0 acts; 1 to 4 do not (0.85, 0.92, 0.85, 0.92); 5 sees 0.7; 6 acts again
    assert [action["step"] for action in guard.actions] == [0, 6]


def test_cooldown_holds_back_even_hard_pressure():
    guard = every_step(script(*[0.99] * 20), cooldown_steps=3)
    fit([guard], steps=8)
    assert [(action["step"], action["reason"]) for action in guard.actions] == [(0, "hard"), (3, "hard"), (6, "hard")]


def test_hard_pressure_acts_where_soft_waits_for_relief():
    guard = every_step(script(0.92, 0.92, 0.93, 0.98, 0.98, 0.93, 0.93))
    fit([guard], steps=5)
    assert [(a["step"], a["reason"]) for a in guard.actions] == [(0, "soft"), (2, "hard")]


def test_a_retried_allocation_is_hard_pressure_for_what_the_peak_needs():
    guard = every_step(
        script(reading(0.4, 0.97), reading(0.4, 0.97), reading(0.4, 0.97, retries=1), reading(0.3, 0.97, retries=1)),
        soft=0.98, hard=1.0,
    )  # fmt: skip
    fit([guard], steps=5)
    (action,) = guard.actions
    assert (action["step"], action["reason"]) == (2, "hard")
    assert action["bytes_needed"] == pytest.approx((0.97 - 0.88) * LIMIT, abs=2)


def test_a_new_peak_counts_and_an_old_one_does_not():
    start = reading(0.2, peak=0.99)  # loading the model took more than training does
    guard = every_step(ScriptedProbe([start, reading(0.3, peak=0.99)]))
    fit([guard])
    assert guard.actions == []
    guard = every_step(script(reading(0.3, peak=0.6), reading(0.3, peak=0.95), reading(0.25, peak=0.95)))
    fit([guard])
    assert [(a["step"], a["pressure_before"]) for a in guard.actions] == [(1, pytest.approx(0.95))]


def test_the_target_is_a_limit_below_the_probes():
    guard = every_step(script(0.5), target_vram_gb=4.0)
    fit([guard], steps=2)
    assert guard.actions[0]["pressure_before"] == pytest.approx(5 / 4)
    guard = every_step(script(0.5), target_vram_gb=400.0)
    fit([guard], steps=2)
    assert guard.actions == []


@pytest.mark.parametrize("accumulate", [1, 2])
def test_it_looks_after_the_first_step_and_at_intervals_of_steps(accumulate):
    steps_taken = []

    class Looked(VRAMGuard):
        def _level(self, reading, retried):
            steps_taken.append(trainer.global_step)
            return super()._level(reading, retried)

    guard = Looked(probe=script(0.1), every_n_steps=3)
    trainer = Trainer(
        accelerator="cpu", devices=1, max_epochs=1, accumulate_grad_batches=accumulate, callbacks=[guard], logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(Net(), batches(8 * accumulate))
    assert steps_taken == [1, 3, 6]


def test_it_acts_between_steps_and_the_training_goes_on_as_one_in_bf16_from_there():
    def trained(callbacks):
        model = Net(rounding="nearest")
        fit(callbacks, model, steps=6)
        return torch.cat([p.detach().reshape(-1) for p in model.parameters()])

    class ByHand(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if batch_idx == 2:
                trainer.optimizers[0].set_state_precision("bf16")

    guarded = trained([every_step(script(0.5, 0.5, 0.95, 0.5))])
    assert torch.equal(guarded, trained([ByHand()]))
    assert not torch.equal(guarded, trained([]))


# -- dry run, records, checkpoints ------------------------------------------------------------------------------------


def test_dry_run_says_and_does_nothing(caplog):
    guard = every_step(script(0.95), dry_run=True)
    with caplog.at_level(logging.WARNING, logger="hina_lightning"):
        trainer = fit([guard])
    (action,) = guard.actions
    assert precisions(trainer) == {"fp32"}
    assert action["dry_run"] and action["bytes_predicted"] > 0 and action["bytes_saved"] == 0
    assert "soft memory pressure 95 % after step 0; would take bf16" in caplog.text


def test_an_action_is_logged_with_its_bytes(caplog):
    guard = every_step(script(0.95, 0.5))
    with caplog.at_level(logging.WARNING, logger="hina_lightning"):
        fit([guard])
    (record,) = [r for r in caplog.records if r.name.startswith("hina_lightning")]
    saved = guard.actions[0]["bytes_saved"]
    assert (
        f"took bf16 ({guard.actions[0]['bytes_needed']} bytes needed, {saved} predicted, {saved} saved)"
        in record.message
    )
    assert "pressure now 50 %" in record.message


def test_an_optimizer_with_nothing_to_give_is_said(caplog):
    guard = every_step(script(0.95), cooldown_steps=0)
    with caplog.at_level(logging.WARNING, logger="hina_lightning"):
        fit([guard], Net(state_precision="bf16"))
    assert guard.actions[0]["bytes_saved"] == 0
    assert "took nothing: the optimizer has no more to give" in caplog.text


def test_the_record_and_the_layout_are_in_the_checkpoint(tmp_path):
    first = every_step(script(0.95, 0.85))
    save = ModelCheckpoint(tmp_path, filename="end")
    fit([first, save], enable_checkpointing=True, steps=4)
    saved = torch.load(tmp_path / "end.ckpt", weights_only=True)["callbacks"]["VRAMGuard"]
    assert saved == {"actions": first.actions, "armed": False}
    assert json.loads(json.dumps(first.actions)) == first.actions

    second = every_step(script(0.92))
    trainer = fit([second], steps=4, max_epochs=2, ckpt_path=tmp_path / "end.ckpt")
    assert trainer.global_step == 8
    assert second.actions == first.actions  # not armed: the pressure has not been relieved since
    assert precisions(trainer) == {"bf16"}
    state = trainer.optimizers[0].state[next(trainer.lightning_module.parameters())]
    assert state["lr_mask"].dtype == torch.bfloat16


# -- logging ----------------------------------------------------------------------------------------------------------


def test_metrics_reach_both_loggers(tmp_path):
    csv_logger, board = CSVLogger(tmp_path / "csv"), TensorBoardLogger(tmp_path / "tb")
    fit([every_step(script(0.5, 0.95, 0.6))], steps=3, logger=[csv_logger, board])
    events = EventAccumulator(board.log_dir)
    events.Reload()
    seen = {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"] if "mem/" in tag}
    # the second reading of 0.6 comes after the action of step 1
    names = ("used_gb", "free_gb", "reserved_gb", "allocated_peak_gb", "pressure", "alloc_retries", "actions")
    assert {tag: [step for step, _ in values] for tag, values in seen.items()} == {
        f"mem/{name}": [0, 1, 2] for name in names
    }
    assert [value for _, value in seen["mem/used_gb"]] == pytest.approx([5, 9.5, 6])
    assert [value for _, value in seen["mem/free_gb"]] == pytest.approx([5, 0.5, 4])
    assert seen["mem/reserved_gb"] == seen["mem/used_gb"], "this probe tells no more"
    assert [value for _, value in seen["mem/pressure"]] == pytest.approx([0.5, 0.95, 0.6])
    assert [value for _, value in seen["mem/actions"]] == [0, 1, 1]
    header = (tmp_path / "csv" / "lightning_logs" / "version_0" / "metrics.csv").read_text().splitlines()[0].split(",")
    assert {"mem/used_gb", "mem/free_gb", "mem/pressure", "mem/actions"} <= set(header)


def test_an_action_is_shown_in_the_progress_bar():
    shown = []

    class Bar(Callback):
        def on_train_batch_end(self, trainer, *_):
            shown.append(trainer.progress_bar_metrics.get("mem/actions"))

    fit([Bar(), every_step(script(0.5, 0.95, 0.5))], steps=4)
    assert shown[:2] == [None, None] and shown[2] == 1.0


def test_bf16_mixed_precision():
    guard = every_step(script(0.95, 0.5))
    trainer = fit([guard], precision="bf16-mixed")
    assert len(guard.actions) == 1 and precisions(trainer) == {"bf16"}
    assert all(torch.isfinite(p).all() for p in trainer.lightning_module.parameters())


# -- real memory ------------------------------------------------------------------------------------------------------


def test_the_memory_of_this_process():
    """A limit just above what the process uses: growing beyond it during training sets the guard off."""
    hoard = []

    class Hoard(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if batch_idx == 3:
                hoard.append(torch.ones(128 << 20))  # 512 MiB

    fit([], steps=1)  # what a first fit loads is no part of this
    gc.collect()
    now = ProcessProbe().read().used_bytes
    limit_gb = (now + (256 << 20)) / 0.9 / GIB
    guard = every_step(ProcessProbe(limit_gb=limit_gb), hysteresis=0.01)
    fit([Hoard(), guard], Net(width=50_000), steps=6)
    hoard.clear()
    action = guard.actions[0]
    assert action["step"] == 3
    assert action["pressure_before"] >= 0.9
    assert action["bytes_saved"] == action["bytes_predicted"] > 1_000_000


def test_it_chooses_the_probe_of_the_device():
    guard = VRAMGuard()
    fit([guard], steps=2)
    assert type(guard.probe) is ProcessProbe
    assert 0 < guard.probe.read().pressure < 1


# -- before the first step, and when it is too late ------------------------------------------------------------------


def test_the_first_step_is_in_the_prediction():
    """What is in use fits; with gradients, state and the step's own memory on top it would not."""
    model = Net(width=50_000)
    state = 17 * 300_001
    tight = MemoryReading(8 * GIB, int((8 * GIB + state) / 0.9))
    guard = every_step(ScriptedProbe([tight]), hysteresis=0.0)
    bar = Bar()
    trainer = fit([guard, bar], model, steps=2, enable_progress_bar=True)
    assert (guard.actions[0]["step"], guard.actions[0]["reason"]) == (0, "plan")
    assert "bf16" in [a["rung"] for a in guard.actions[0]["reports"][0]["actions"]]
    assert trainer.optimizers[0].param_groups[0]["use_lr_mask"]
    assert any("VRAMGuard: plan memory pressure" in line for line in bar.lines)
    roomy = MemoryReading(8 * GIB, 16 * GIB)
    guard = every_step(ScriptedProbe([roomy]))
    fit([guard], model, steps=2)
    assert guard.actions == []


class Bar(ProgressBar):
    """What would be printed above the progress bar."""

    def __init__(self):
        super().__init__()
        self.lines = []

    def disable(self):
        pass

    def enable(self):
        pass

    def print(self, *args, **kwargs):
        self.lines.append(" ".join(map(str, args)))


def test_what_is_known_is_written_down_when_memory_runs_out(tmp_path):
    class Greedy(Net):
        def training_step(self, batch, batch_idx):
            if batch_idx == 2:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3.00 GiB.")
            return super().training_step(batch, batch_idx)

    guard = every_step(script(0.5), snapshot_dir=tmp_path / "memory")
    with pytest.raises(torch.OutOfMemoryError):
        fit([guard], Greedy())
    (path,) = (tmp_path / "memory").glob("*.json")
    about = json.loads(path.read_text())
    assert "Tried to allocate" in about["error"] and about["metrics"]["mem/used_gb"] == pytest.approx(5)
    (one,) = about["optimizers"]
    assert one["state_bytes"] > 0 and any("exp_avg" in line for line in one["plan"])


def test_techniques_go_at_hard_pressure_only():
    guard = every_step(script(0.92, 0.5))
    trainer = fit([guard])
    assert trainer.optimizers[0].param_groups[0]["use_lr_mask"]
    guard = every_step(script(0.99, 0.5))
    trainer = fit([guard])
    assert not trainer.optimizers[0].param_groups[0]["use_lr_mask"]
    guard = every_step(script(0.99, 0.5))
    trainer = fit([guard], Net(emergency_simplify=False))
    assert trainer.optimizers[0].param_groups[0]["use_lr_mask"]


# -- several processes ------------------------------------------------------------------------------------------------


class OnlyTheLast(Callback):
    """Memory is short on the last rank alone; what each rank did goes to a file."""

    def __init__(self, folder):
        self.folder = folder
        self.guard = None

    def setup(self, trainer, pl_module, stage):
        self.guard = next(c for c in trainer.callbacks if isinstance(c, VRAMGuard))
        short = trainer.global_rank == trainer.world_size - 1
        self.guard.probe = script(0.5, 0.95, 0.85, 0.92) if short else script(0.5)

    def on_train_end(self, trainer, pl_module):
        state = {
            "actions": [(a["step"], a["reason"], a["bytes_needed"], a["bytes_saved"]) for a in self.guard.actions],
            "armed": self.guard.armed,
            "precision": sorted(precisions(trainer)),
            "weights": [p.double().sum().item() for p in pl_module.parameters()],
        }
        (self.folder / f"rank{trainer.global_rank}.json").write_text(json.dumps(state))


@pytest.mark.parametrize("size", [2, 4])
def test_all_ranks_act_when_one_has_to(size, tmp_path):
    fit([OnlyTheLast(tmp_path), every_step(None)], devices=size, strategy="ddp_fork", steps=5 * size)
    zero, *others = (json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in range(size))
    assert others == [zero] * (size - 1)
    assert [(step, reason) for step, reason, *_ in zero["actions"]] == [(1, "soft")]
    assert zero["actions"][0][2] == pytest.approx(0.15 * LIMIT, abs=2)  # what the last rank needs
    assert not zero["armed"] and zero["precision"] == ["bf16"]


# -- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"target_vram_gb": 0}, "target_vram_gb=0 is not valid"),
        ({"target_vram_gb": math.inf}, "target_vram_gb=inf is not valid"),
        ({"soft": 0.0}, r"soft=0.0 is not valid: soft must be a number in \(0, 1\]"),
        ({"soft": 1.5}, "soft=1.5"),
        ({"hard": 0.8}, r"hard=0.8 is not valid: hard must be a finite number >= soft \(0.9\)"),
        ({"hysteresis": 0.9}, r"hysteresis=0.9 is not valid: hysteresis must be a number in \[0, soft\)"),
        ({"hysteresis": math.nan}, "hysteresis=nan"),
        ({"every_n_steps": 0}, "every_n_steps=0"),
        ({"cooldown_steps": -1}, "cooldown_steps=-1"),
        ({"dry_run": "no"}, "dry_run='no'"),
        ({"relax": 1}, "relax=1"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=f"VRAMGuard: {message}"):
        VRAMGuard(**arguments)


def test_without_a_supporting_optimizer_it_is_an_error():
    class Plain(Net):
        def configure_optimizers(self):
            return torch.optim.AdamW(self.parameters())

    with pytest.raises(
        MisconfigurationException, match=r"VRAMGuard needs an optimizer with optimize_for_vram\(\) and plan"
    ):
        fit([VRAMGuard()], Plain())
