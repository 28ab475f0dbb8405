"""LRMaskMonitor and ImportanceMonitor with real loggers, in every way that a training can step."""

from __future__ import annotations

import csv
import json
import math
import re

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping, LearningRateMonitor
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from peft import LoraConfig, get_peft_model
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn
from torch.utils.data import DataLoader

from hina_lightning import configure_optimizers
from hina_lightning.callbacks import ImportanceMonitor, LRMaskMonitor
from hina_lightning.statistics import block_of

MASK = ("mean", "p05", "p50", "p95", "at_min", "at_max")


class Net(LightningModule):
    def __init__(self, **options):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList([nn.Linear(4, 4) for _ in range(3)])
        self.head = nn.Linear(4, 1, bias=False)
        self.options = {"lr": 1e-3, "compile": False, "relationship_discovery_interval": 2, **options}

    def training_step(self, batch, batch_idx):
        x, y = batch
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return nn.functional.mse_loss(self.head(x), y)

    def configure_optimizers(self):
        return configure_optimizers(self, **self.options)


class Manual(Net):
    """Two optimizers, stepped by hand, the second in every other batch only."""

    def __init__(self, second_in=lambda batch_idx: True, **options):
        super().__init__(**options)
        self.automatic_optimization = False
        self.second_in = second_in

    def configure_optimizers(self):
        return [
            configure_optimizers(part, **{**self.options, "schedule": None})["optimizer"]
            for part in (self.layers, self.head)
        ]

    def training_step(self, batch, batch_idx):
        first, second = self.optimizers()
        self.manual_backward(super().training_step(batch, batch_idx))
        first.step()
        first.zero_grad()
        if self.second_in(batch_idx):
            second.step()
            second.zero_grad()


def batches(count):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(4 * count, 4, generator=generator)
    return DataLoader(list(zip(x, x.sum(1, keepdim=True), strict=True)), batch_size=4)


def trainer(callbacks, logger=False, **options):
    quiet = dict(enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, log_every_n_steps=1)
    given = {"accelerator": "cpu", "devices": 1, "max_epochs": 1, **quiet, **options}
    return Trainer(callbacks=callbacks, logger=logger, **given)


def csv_rows(logger):
    """``{metric: {step: value}}`` of what CSVLogger wrote."""
    found = {}
    with open(f"{logger.log_dir}/metrics.csv", newline="") as file:
        for row in csv.DictReader(file):
            for name, value in row.items():
                if name not in ("step", "epoch") and value != "":
                    found.setdefault(name, {})[int(row["step"])] = float(value)
    return found


def tensorboard_rows(logger):
    events = EventAccumulator(logger.log_dir)
    events.Reload()
    return {tag: {e.step: e.value for e in events.Scalars(tag)} for tag in events.Tags()["scalars"]}


def mask_metrics(group):
    return {f"lr/{group}", f"lr_eff/{group}"} | {f"lr_mask/{group}/{one}" for one in MASK}


# -- LRMaskMonitor ----------------------------------------------------------------------------------------------------


def test_the_same_values_reach_csv_and_tensorboard(tmp_path):
    loggers = [CSVLogger(tmp_path / "csv"), TensorBoardLogger(tmp_path / "tb")]
    trainer([LRMaskMonitor(), ImportanceMonitor()], loggers).fit(Net(), batches(5))
    rows, board = csv_rows(loggers[0]), tensorboard_rows(loggers[1])
    assert mask_metrics("decay") | mask_metrics("no_decay") <= rows.keys()
    assert {"sign_agree/decay", "importance/layers.0", "importance/head"} <= rows.keys()
    assert all(name.count("/") <= 2 for name in rows)
    assert rows.keys() == board.keys() - {"epoch", "hp_metric"}
    for name, values in rows.items():
        assert board[name] == pytest.approx(values, rel=1e-6), name
    assert sorted(rows["lr_eff/decay"]) == [0, 1, 2, 3, 4]


def test_rates_are_those_of_the_step_and_of_lightnings_own_monitor(tmp_path):
    logger = CSVLogger(tmp_path)
    model = Net(use_dynamic_adaptation=False, lr_multipliers={"head": 0.1}, lr=5e-4, warmup=3)
    theirs = LearningRateMonitor()
    trainer([LRMaskMonitor(), theirs], logger, log_every_n_steps=2).fit(model, batches(8))
    rows = csv_rows(logger)
    assert sorted(rows["lr/decay"]) == [1, 3, 5, 7]  # as everything that is logged: after every second step
    for group in ("decay", "no_decay", "decay:x0.1:head"):
        assert list(rows[f"lr/{group}"].values()) == pytest.approx(theirs.lrs[f"lr/{group}"], rel=1e-6)
        start = 5e-5 if "head" in group else 5e-4
        for step, lr in rows[f"lr/{group}"].items():
            # the mask and the schedule together, and nothing else in this run, make the effective rate
            expected = rows[f"lr_mask/{group}/mean"][step] * lr / start
            assert rows[f"lr_eff/{group}"][step] == pytest.approx(expected, rel=1e-5)


def test_mask_moves_and_its_statistics_are_in_order(tmp_path):
    logger = CSVLogger(tmp_path)
    model = Net(schedule=None, lr=5e-4, lr_bump=2e-4, warmup_steps=100)
    trainer([LRMaskMonitor()], logger, max_epochs=4).fit(model, batches(5))
    rows = csv_rows(logger)
    mean = rows["lr_mask/decay/mean"]
    assert mean[0] == pytest.approx(5e-4) and mean[19] != pytest.approx(5e-4, rel=1e-3)
    for step in mean:
        low, middle, high = (rows[f"lr_mask/decay/{q}"][step] for q in ("p05", "p50", "p95"))
        assert low <= middle <= high
        assert 0 <= rows["lr_mask/decay/at_max"][step] <= 1
    assert rows["lr_mask/decay/at_max"][19] > 0.05  # five bumps from the start reach max_lr
    agree = rows["sign_agree/decay"]
    assert all(0 <= value <= 1 for value in agree.values())
    assert any(value < 1 for step, value in agree.items() if step)  # not the gradient compared with itself


@pytest.mark.parametrize("accumulate", [1, 2, 3])
@pytest.mark.parametrize("every", [None, 2])
def test_accumulated_batches_log_once_a_step(tmp_path, accumulate, every):
    logger = CSVLogger(tmp_path)
    monitors = [LRMaskMonitor(every_n_steps=every), ImportanceMonitor(every_n_steps=every)]
    fit = trainer(monitors, logger, accumulate_grad_batches=accumulate)
    fit.fit(Net(), batches(7))
    steps = math.ceil(7 / accumulate)
    expected = [s for s in range(steps) if (s + 1) % (every or 1) == 0]
    rows = csv_rows(logger)
    assert fit.global_step == steps
    assert sorted(rows["lr/decay"]) == expected
    with open(f"{logger.log_dir}/metrics.csv", newline="") as file:
        logged = [row["step"] for row in csv.DictReader(file) if row["lr/decay"]]
    assert len(logged) == len(expected)  # none twice


def test_one_host_sync_a_logged_step(tmp_path, monkeypatch):
    fetched = []
    tolist, item = Tensor.tolist, Tensor.item

    def counted(original):
        def read(self):
            fetched.append(tuple(self.shape))
            return original(self)

        return read

    class Counted(LRMaskMonitor):
        def on_before_optimizer_step(self, *arguments):
            with monkeypatch.context() as patch:
                patch.setattr(Tensor, "tolist", counted(tolist))
                patch.setattr(Tensor, "item", counted(item))
                patch.setattr(Tensor, "__float__", counted(item))
                super().on_before_optimizer_step(*arguments)

    trainer([Counted(every_n_steps=2)], CSVLogger(tmp_path)).fit(Net(), batches(6))
    assert len(fetched) == 3 and all(shape[0] > 10 for shape in fetched)


def test_two_optimizers_in_manual_optimization(tmp_path):
    logger = CSVLogger(tmp_path)
    fit = trainer([LRMaskMonitor(), ImportanceMonitor()], logger)
    fit.fit(Manual(), batches(4))
    rows = csv_rows(logger)
    assert mask_metrics("decay") | mask_metrics("no_decay") | mask_metrics("decay-1") <= rows.keys()
    assert "lr/no_decay-1" not in rows  # the head has no bias
    assert sorted(rows["lr_eff/decay"]) == sorted(rows["lr_eff/decay-1"]) == [0, 1, 2, 3]
    # bare names clash ("weight" of the head is unique, "0.weight" too), and every block has its metric
    assert {"importance/0", "importance/1", "importance/2", "importance/weight"} <= rows.keys()


def test_an_optimizer_that_steps_in_few_batches_is_logged_when_it_steps(tmp_path):
    logger = CSVLogger(tmp_path)
    model = Manual(second_in=lambda batch_idx: batch_idx % 3 == 0)
    trainer([LRMaskMonitor(every_n_steps=2)], logger).fit(model, batches(10))
    rows = csv_rows(logger)
    assert sorted(rows["lr/decay"]) == [1, 3, 5, 7, 9]
    assert sorted(rows["lr/decay-1"]) == [3, 6, 9]


def test_other_optimizers_are_passed_over(tmp_path):
    class Mixed(Manual):
        def configure_optimizers(self):
            plain = torch.optim.SGD(self.layers.parameters(), lr=0.1)
            return [plain, configure_optimizers(self.head, **self.options, schedule=None)["optimizer"]]

    logger = CSVLogger(tmp_path)
    trainer([LRMaskMonitor()], logger).fit(Mixed(), batches(2))
    assert {name for name in csv_rows(logger) if name.startswith("lr/")} == {"lr/decay-1"}


def test_a_mask_that_is_off_has_no_metrics(tmp_path):
    logger = CSVLogger(tmp_path)
    trainer([LRMaskMonitor()], logger).fit(Net(use_lr_mask=False), batches(3))
    rows = csv_rows(logger)
    assert {"lr/decay", "lr_eff/decay"} <= rows.keys()
    assert not any(name.startswith(("lr_mask/", "sign_agree/")) for name in rows)


def test_bf16_mixed_precision(tmp_path):
    logger = CSVLogger(tmp_path)
    trainer([LRMaskMonitor(), ImportanceMonitor()], logger, precision="bf16-mixed").fit(Net(), batches(6))
    rows = csv_rows(logger)
    assert sorted(rows["lr_mask/decay/mean"]) == list(range(6))
    assert all(math.isfinite(value) for values in rows.values() for value in values.values())


def test_what_is_logged_can_be_monitored(tmp_path):
    stop = EarlyStopping("lr/decay", mode="min", stopping_threshold=6e-4, check_on_train_epoch_end=True, patience=99)
    fit = trainer([LRMaskMonitor(), stop], CSVLogger(tmp_path), max_epochs=10)
    fit.fit(Net(schedule="linear"), batches(2))
    assert fit.current_epoch == 5  # the rate of the last step of epoch 4, 9/20 of the way, is 5.5e-4


@pytest.mark.parametrize("monitor", [LRMaskMonitor, ImportanceMonitor])
def test_without_a_logger_it_is_an_error_as_with_lightnings_own(monitor):
    message = f"Cannot use `{monitor.__name__}` callback with `Trainer` that has no logger"
    with pytest.raises(MisconfigurationException, match=re.escape(message)):
        trainer([monitor()]).fit(Net(), batches(2))


@pytest.mark.parametrize(
    ("monitor", "method"), [(LRMaskMonitor, "lr_mask_statistics"), (ImportanceMonitor, "importance_statistics")]
)
def test_without_a_fitting_optimizer_it_is_an_error(tmp_path, monitor, method):
    with pytest.raises(MisconfigurationException, match=rf"needs an optimizer with {method}\(\).*optimizers: AdamW"):
        trainer([monitor()], CSVLogger(tmp_path)).fit(PlainNet(), batches(2))


class PlainNet(Net):
    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters())


@pytest.mark.parametrize("make", [LRMaskMonitor, ImportanceMonitor])
@pytest.mark.parametrize("value", [0, -1, 2.5, "10"])
def test_a_senseless_interval_is_an_error(make, value):
    with pytest.raises(ValueError, match=r"every_n_steps=.* is not valid: every_n_steps must be an integer >= 1"):
        make(every_n_steps=value)


# -- ImportanceMonitor ------------------------------------------------------------------------------------------------


def test_blocks_are_means_of_the_optimizers_scores(tmp_path):
    logger = CSVLogger(tmp_path)
    monitor = ImportanceMonitor()
    fit = trainer([monitor], logger)
    fit.fit(Net(), batches(6))
    scores = {k.removeprefix("importance/"): v.item() for k, v in fit.optimizers[0].importance_statistics().items()}
    assert monitor.scores == pytest.approx(scores)
    assert set(scores) == {f"layers.{i}.{kind}" for i in range(3) for kind in ("weight", "bias")} | {"head.weight"}
    blocks = monitor.blocks()
    assert blocks.keys() == {"layers.0", "layers.1", "layers.2", "head"}
    for i in range(3):
        expected = (scores[f"layers.{i}.weight"] + scores[f"layers.{i}.bias"]) / 2
        assert blocks[f"layers.{i}"] == pytest.approx(expected)
    assert {name.removeprefix("importance/") for name in csv_rows(logger)} == blocks.keys()


@pytest.mark.parametrize(
    ("name", "depth", "block"),
    [
        ("model.encoder.layer.3.attention.self.query.weight", None, "model.encoder.layer.3"),
        ("classifier.dense.weight", None, "classifier.dense"),
        ("gain", None, "gain"),
        ("model.encoder.layer.3.attention.weight", 2, "model.encoder"),
        ("head.weight", 5, "head.weight"),
    ],
)
def test_block_names(name, depth, block):
    assert block_of(name, depth) == block


def test_depth_makes_coarser_blocks(tmp_path):
    logger = CSVLogger(tmp_path)
    trainer([ImportanceMonitor(depth=1)], logger).fit(Net(), batches(5))
    assert csv_rows(logger).keys() == {"importance/layers", "importance/head"}


def test_summary_ranks_parameters():
    monitor = ImportanceMonitor()
    assert monitor.summary() == {"parameters": 0, "top": [], "bottom": []}
    monitor.scores = {"a": 0.5, "b": 3.0, "c": 1.0}
    assert monitor.summary(2) == {"parameters": 3, "top": [("b", 3.0), ("c", 1.0)], "bottom": [("a", 0.5), ("c", 1.0)]}
    with pytest.raises(ValueError, match="count=0"):
        monitor.summary(0)


def test_export_gives_peft_its_ranks(tmp_path):
    class Adapted(Net):
        def __init__(self):
            super().__init__()
            self.base = get_peft_model(
                nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 1)), LoraConfig(r=4, target_modules=["0", "2"])
            )
            self.layers = self.head = None

        def training_step(self, batch, batch_idx):
            return nn.functional.mse_loss(self.base(batch[0]), batch[1])

    path = tmp_path / "new" / "importance.json"
    monitor = ImportanceMonitor(export_path=path, rank=4)
    trainer([monitor]).fit(Adapted(), batches(8))  # no logger: the file is what it is for
    content = json.loads(path.read_text())
    assert content["step"] == 8 and content["rank"] == 4
    assert content["importance"] == pytest.approx(monitor.scores)
    assert set(content["importance"]) == {
        f"base.base_model.model.{i}.lora_{half}.default.weight" for i in (0, 2) for half in "AB"
    }
    pattern = content["rank_pattern"]
    assert pattern.keys() == {"0", "2"} and sum(pattern.values()) == pytest.approx(8, abs=1)
    again = get_peft_model(
        nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 1)),
        LoraConfig(r=4, target_modules=["0", "2"], rank_pattern=pattern),
    )
    ranks = {name: p.shape[0] for name, p in again.named_parameters() if "lora_A" in name}
    assert ranks == {f"base_model.model.{i}.lora_A.default.weight": pattern[i] for i in ("0", "2")}


def test_export_of_a_model_trained_whole_ranks_its_matrices(tmp_path):
    path = tmp_path / "importance.json"
    trainer([ImportanceMonitor(export_path=path)], CSVLogger(tmp_path)).fit(Net(), batches(5))
    assert json.loads(path.read_text())["rank_pattern"].keys() == {"layers.0", "layers.1", "layers.2", "head"}
