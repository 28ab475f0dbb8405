"""RankMonitor in real trainings of real adapters: its numbers are those of an SVD of what the adapter adds."""

from __future__ import annotations

import csv
import logging
import math
import re

import peft
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader

from hina_lightning import configure_optimizers
from hina_lightning.callbacks import RankMonitor
from hina_optim.evaluation import lora_spectrum

BOTH = {"target_modules": ["0", "2"]}
CONFIGS = {
    "lora": lambda: peft.LoraConfig(r=3, **BOTH),
    "lokr": lambda: peft.LoKrConfig(r=2, **BOTH),
    "loha": lambda: peft.LoHaConfig(r=2, **BOTH),
}


class Net(LightningModule):
    """A regression; with a kind, only the adapters of that kind train."""

    def __init__(self, kind=None, **options):
        super().__init__()
        torch.manual_seed(0)
        body = nn.Sequential(nn.Linear(6, 10), nn.Tanh(), nn.Linear(10, 4))
        self.body = peft.get_peft_model(body, CONFIGS[kind]()) if kind else body
        self.options = {"lr": 1e-2, "max_lr": 1e-1, "compile": False, **options}

    def training_step(self, batch, batch_idx):
        return nn.functional.mse_loss(self.body(batch[0]), batch[1])

    def configure_optimizers(self):
        return configure_optimizers(self, schedule=None, **self.options)

    def deltas(self):
        """What each adapter adds to its layer, formed."""
        return {
            f"body.base_model.model.{i}": self.body.base_model.model[i].get_delta_weight("default").detach()
            for i in (0, 2)
        }


def batches(count):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(4 * count, 6, generator=generator)
    return DataLoader(list(zip(x, x[:, :4].sin(), strict=True)), batch_size=4)


def trainer(callbacks, logger=False, **options):
    quiet = dict(enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, log_every_n_steps=1)
    given = {"accelerator": "cpu", "devices": 1, "max_epochs": 1, **quiet, **options}
    return Trainer(callbacks=callbacks, logger=logger, **given)


def rows_of(logger):
    """``{metric: {step: value}}`` of the metrics of ranks."""
    found = {}
    with open(f"{logger.log_dir}/metrics.csv", newline="") as file:
        for row in csv.DictReader(file):
            for name, value in row.items():
                if name.startswith("rank/") and value != "":
                    found.setdefault(name, {})[int(row["step"])] = float(value)
    return found


@pytest.mark.parametrize("kind", CONFIGS)
def test_it_measures_the_product_that_an_adapter_adds(tmp_path, kind):
    class Exact(Net):
        """Keeps the spectra of the formed products as every step begins."""

        def on_train_batch_start(self, batch, batch_idx):
            self.seen = [*getattr(self, "seen", []), {n: lora_spectrum(d) for n, d in self.deltas().items()}]

    logger, monitor, model = CSVLogger(tmp_path), RankMonitor(per_adapter=True), Exact(kind)
    trainer([monitor], logger).fit(model, batches(4))
    model.on_train_batch_start(None, 4)
    history = monitor.history
    assert history["steps"] == [0, 1, 2, 3, 4]
    assert set(history["kinds"].values()) == {kind}
    for name, ranks in history["ranks"].items():
        exact = [spectra[name] for spectra in model.seen]
        assert ranks["effective"] == [s.effective_rank for s in exact]
        for measure, of in (("entropy", "entropy_rank"), ("stable", "stable_rank"), ("energy", "energy_rank")):
            assert ranks[measure] == pytest.approx([getattr(s, of) for s in exact], rel=2e-3), (name, measure)
    rows = rows_of(logger)
    assert rows.keys() == {f"rank/{kind}/{what}" for what in ("mean", "min", "max")} | {
        f"rank/{name}" for name in history["ranks"]
    }
    effective = torch.tensor([ranks["effective"] for ranks in history["ranks"].values()])
    assert rows[f"rank/{kind}/mean"] == pytest.approx(dict(enumerate(effective.mean(0).tolist()[:4])))
    assert rows[f"rank/{kind}/min"] == dict(enumerate(effective.amin(0).tolist()[:4]))
    assert rows[f"rank/{kind}/max"] == dict(enumerate(effective.amax(0).tolist()[:4]))


def test_a_lora_begins_at_rank_zero_and_grows():
    monitor = RankMonitor()
    trainer([monitor]).fit(Net("lora"), batches(6))
    for ranks in monitor.history["ranks"].values():
        assert ranks["effective"][0] == 0 and ranks["effective"][-1] == 3
        assert 1 <= ranks["entropy"][-1] <= 3


def test_the_rank_penalty_keeps_the_curve_lower():
    ends = []
    for strength in (None, 1.0):
        options = {} if strength is None else {"lora_rank_penalty": True, "rank_penalty_strength": strength}
        monitor = RankMonitor(measure="entropy")
        model = Net("lora", rank_target=1, **options) if options else Net("lora")
        trainer([monitor], max_epochs=5).fit(model, batches(6))
        ends.append(sum(ranks["entropy"][-1] for ranks in monitor.history["ranks"].values()))
    assert ends[1] < ends[0]


def test_without_adapters_it_measures_trainable_matrices(tmp_path):
    logger, monitor = CSVLogger(tmp_path), RankMonitor(by="block", measure="stable", max_side=8)
    model = Net()
    trainer([monitor], logger).fit(model, batches(3))
    assert monitor.history["kinds"] == {"body.0.weight": "matrix", "body.2.weight": "matrix"}  # no biases
    rows = rows_of(logger)
    assert rows.keys() == {f"rank/body.{i}/{what}" for i in (0, 2) for what in ("mean", "min", "max")}
    spectrum = lora_spectrum(model.body[2].weight)
    assert monitor.history["ranks"]["body.2.weight"]["stable"][-1] == pytest.approx(spectrum.stable_rank, rel=1e-5)
    assert rows["rank/body.0/mean"][0] == pytest.approx(monitor.history["ranks"]["body.0.weight"]["stable"][0])


def test_large_and_frozen_ones_are_left_out():
    monitor, model = RankMonitor(max_side=4), Net()
    trainer([monitor]).fit(model, batches(2))
    assert list(monitor.history["kinds"]) == ["body.2.weight"]  # 4 × 10; the other is 10 × 6
    model.body[2].requires_grad_(False)
    with pytest.raises(MisconfigurationException, match=r"nothing to measure in Net: .*max_side=4"):
        trainer([RankMonitor(max_side=4)]).fit(model, batches(2))


@pytest.mark.parametrize("accumulate", [1, 2, 3])
def test_it_logs_under_the_steps_of_lightning(tmp_path, accumulate):
    logger, monitor = CSVLogger(tmp_path), RankMonitor(every_n_steps=2)
    trainer([monitor], logger, accumulate_grad_batches=accumulate).fit(Net("lora"), batches(9))
    steps = math.ceil(9 / accumulate)
    expected = [0, *range(1, steps, 2)]
    assert sorted(rows_of(logger)["rank/lora/mean"]) == expected
    assert monitor.history["steps"] == [*expected, steps]


def test_one_host_sync_a_reading(monkeypatch):
    moved, read = [], Tensor.cpu

    class Counted(RankMonitor):
        def _read(self, *arguments):
            with monkeypatch.context() as patch:
                patch.setattr(Tensor, "cpu", lambda x: moved.append(x.numel()) or read(x))
                super()._read(*arguments)

    trainer([Counted()]).fit(Net("lora"), batches(3))
    assert moved == [2 * 2 * 9] * 4  # two adapters, two 3×3 Gram matrices each, three steps and the end


def test_history_goes_on_after_a_resume(tmp_path):
    whole = RankMonitor(every_n_steps=2)
    trainer([whole], max_epochs=4).fit(Net("lora"), batches(3))
    first, second = RankMonitor(every_n_steps=2), RankMonitor(every_n_steps=2)
    save = ModelCheckpoint(tmp_path, filename="half", save_top_k=-1, every_n_epochs=2)
    trainer([first, save], max_epochs=2, enable_checkpointing=True).fit(Net("lora"), batches(3))
    fit = trainer([second], max_epochs=4)
    fit.fit(Net("lora"), batches(3), ckpt_path=str(tmp_path / "half.ckpt"), weights_only=True)
    assert second.history == whole.history
    assert whole.history["steps"] == [0, 1, 3, 5, 7, 9, 11, 12]


def test_a_training_that_goes_on_in_the_same_trainer_counts_no_step_twice():
    monitor, model = RankMonitor(), Net("lora")
    fit = trainer([monitor], max_epochs=2)
    fit.fit(model, batches(2))
    fit.fit_loop.max_epochs = 3
    fit.fit(model, batches(2))
    assert monitor.history["steps"] == list(range(7))


def test_another_model_begins_a_history_anew(caplog):
    monitor = RankMonitor()
    trainer([monitor]).fit(Net("lora"), batches(2))
    other = RankMonitor()
    other.load_state_dict(monitor.state_dict())
    assert other.history == monitor.history
    with caplog.at_level(logging.WARNING):
        trainer([other]).fit(Net(), batches(3))
    assert "begins anew" in caplog.text
    assert other.history["steps"] == [0, 1, 2, 3] and set(other.history["kinds"].values()) == {"matrix"}


def test_history_is_bounded_and_keeps_its_ends(monkeypatch):
    monkeypatch.setattr("hina_lightning.callbacks.rank_monitor._READINGS", 8)
    monitor = RankMonitor()
    trainer([monitor], max_epochs=5).fit(Net("lora"), batches(4))
    history = monitor.history
    assert len(history["steps"]) <= 8 and history["steps"][0] == 0 and history["steps"][-1] == 20
    assert all(len(ranks["stable"]) == len(history["steps"]) for ranks in history["ranks"].values())


def test_weights_that_are_not_finite_are_left_out(tmp_path):
    class Broken(Net):
        def on_train_batch_start(self, batch, batch_idx):
            if batch_idx == 0:
                with torch.no_grad():
                    self.body.base_model.model[0].lora_A.default.weight[0, 0] = math.nan

    logger, monitor = CSVLogger(tmp_path), RankMonitor(per_adapter=True)
    trainer([monitor], logger).fit(Broken("lora"), batches(3))
    broken, whole = (monitor.history["ranks"][f"body.base_model.model.{i}"]["effective"] for i in (0, 2))
    assert math.isnan(broken[1]) and not math.isnan(whole[1])
    rows = rows_of(logger)
    assert 1 not in rows["rank/body.base_model.model.0"] and 1 in rows["rank/lora/mean"]


def test_it_works_with_any_optimizer_and_without_a_logger():
    class Plain(Net):
        def configure_optimizers(self):
            return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.1)

    monitor = RankMonitor()
    fit = trainer([monitor])
    fit.fit(Plain("lora"), batches(3))
    assert monitor.history["steps"] == [0, 1, 2, 3]
    assert {"rank/lora/mean", "rank/lora/max"} <= fit.callback_metrics.keys()


def test_before_a_fit_there_is_nothing():
    assert RankMonitor().history == {"steps": [], "kinds": {}, "ranks": {}}
    fresh = RankMonitor()
    fresh.load_state_dict(RankMonitor().state_dict())
    assert fresh.history["steps"] == []


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        (dict(measure="rank"), "measure='rank' is not valid: measure must be one of 'effective', 'entropy'"),
        (dict(by="layer"), "by='layer'"),
        (dict(per_adapter=1), "per_adapter=1"),
        (dict(every_n_steps=0), "every_n_steps=0"),
        (dict(max_side=0), "max_side=0"),
        (dict(threshold=1.0), "threshold=1.0"),
        (dict(energy=0), "energy=0"),
    ],
)
def test_arguments_that_are_none(argument, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        RankMonitor(**argument)
