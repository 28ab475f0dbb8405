"""LightningCLI in this process, from the command line and from a file; and the documentation, which shows it."""

from __future__ import annotations

import doctest
import importlib
import inspect
import json
import logging
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from lightning.pytorch import LightningDataModule, LightningModule
from lightning.pytorch.cli import LightningCLI, OptimizerCallable
from torch import nn
from torch.utils.data import DataLoader

import hina_optim
from hina_lightning import configure_optimizers
from hina_lightning.callbacks import ImportanceMonitor, LossContextReporter, LRMaskMonitor, RankMonitor, VRAMGuard
from hina_optim import HinaAdaptive, list_optimizers

QUIET = [
    "--trainer.accelerator=cpu",
    "--trainer.devices=1",
    "--trainer.max_epochs=2",
    "--trainer.logger=false",
    "--trainer.enable_checkpointing=false",
    "--trainer.enable_progress_bar=false",
    "--trainer.enable_model_summary=false",
]


class Data(LightningDataModule):
    def train_dataloader(self):
        x = torch.linspace(-1, 1, 12).reshape(12, 1)
        return DataLoader(list(zip(x, x**2, strict=True)), batch_size=4)


class Stock(LightningModule):
    """Says nothing of optimizers: LightningCLI does it all."""

    def __init__(self, width: int = 4):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(1, width), nn.Tanh(), nn.Linear(width, 1))

    def training_step(self, batch, batch_idx):
        return nn.functional.mse_loss(self.body(batch[0]), batch[1])


class WithFactory(Stock):
    """The optimizer is an argument of the module, and a factory of LightningCLI's making."""

    def __init__(self, optimizer: OptimizerCallable = HinaAdaptive, warmup: float = 0.0, schedule: str = "linear"):
        super().__init__()
        self.optimizer, self.warmup, self.schedule = optimizer, warmup, schedule

    def configure_optimizers(self):
        return configure_optimizers(self, self.optimizer, warmup=self.warmup, schedule=self.schedule)


class Linked(Stock):
    """The optimizer has a section of its own, linked to an argument of the module."""

    def __init__(self, optimizer: dict, warmup: float = 0.0):
        super().__init__()
        self.optimizer, self.warmup = optimizer, warmup

    def configure_optimizers(self):
        return configure_optimizers(self, self.optimizer, warmup=self.warmup, lr_multipliers={r"body\.2": 0.1})


class LinkedCLI(LightningCLI):
    def add_arguments_to_parser(self, parser):
        parser.add_optimizer_args((torch.optim.Optimizer,), link_to="model.optimizer")


@pytest.fixture(autouse=True)
def only_these_arguments(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train.py"])


def fit(model, *arguments, cli=LightningCLI):
    return cli(model, Data, args=["fit", *QUIET, *arguments], seed_everything_default=1, save_config_callback=None)


def optimizer_of(cli):
    (optimizer,) = cli.trainer.optimizers
    return optimizer


def test_stock_cli_takes_the_class_path():
    cli = fit(
        Stock, "--optimizer=hina_optim.HinaAdaptive", "--optimizer.lr=1e-4", "--optimizer.compile=false",
        "--optimizer.betas=[0.8,0.99]", "--optimizer.use_grams=true", "--lr_scheduler=CosineAnnealingLR",
        "--lr_scheduler.T_max=4",
    )  # fmt: skip
    optimizer = optimizer_of(cli)
    assert type(optimizer) is HinaAdaptive
    (group,) = optimizer.param_groups
    assert group["start_lr"] == 1e-4 and list(group["betas"]) == [0.8, 0.99] and group["use_grams"] is True
    assert group["lr"] == pytest.approx(0.5e-4)  # two epochs of four
    assert cli.trainer.global_step == 6
    assert all(state["step"] == 6 for state in optimizer.state.values())


@pytest.mark.parametrize("name", list_optimizers())
def test_stock_cli_takes_every_optimizer(name):
    cli = fit(
        Stock, f"--optimizer=hina_optim.{name}", "--optimizer.lr=1e-4", "--optimizer.weight_decay=0.25",
        "--optimizer.compile=false", "--optimizer.state_precision=bf16",
    )  # fmt: skip
    optimizer = optimizer_of(cli)
    assert type(optimizer) is getattr(hina_optim, name)
    (group,) = optimizer.param_groups
    assert (group["lr"], group["weight_decay"], group["state_precision"]) == (1e-4, 0.25, "bf16")
    # nothing but what was said differs from the class built in Python
    there = getattr(hina_optim, name)(
        Stock().parameters(), lr=1e-4, weight_decay=0.25, compile=False, state_precision="bf16"
    )
    assert plain(group) == plain(there.param_groups[0])
    assert all(state["step"] == 6 for state in optimizer.state.values())


def plain(group):
    """The options of a group; a command line has lists where Python has tuples."""
    return {
        name: list(value) if isinstance(value, tuple) else value for name, value in group.items() if name != "params"
    }


@pytest.mark.parametrize("name", [name for name in list_optimizers() if "COptim" in name])
def test_the_loss_reaches_an_optimizer_that_follows_it(name, caplog):
    """Lightning steps with a closure; with accumulated batches the callback knows better."""
    callback = "--trainer.callbacks=hina_lightning.callbacks.LossContextReporter"
    for given in ([], ["--trainer.accumulate_grad_batches=3", callback]):
        optimizer = (f"--optimizer=hina_optim.{name}", "--optimizer.lr=1e-4", "--optimizer.compile=false")
        with caplog.at_level(logging.WARNING, logger="hina_optim"):
            cli = fit(Stock, *optimizer, *given)
        assert "no loss was reported" not in caplog.text
    assert any(isinstance(callback, LossContextReporter) for callback in cli.trainer.callbacks)


@pytest.mark.parametrize("name", list_optimizers())
def test_help_explains_every_optimizer(name, capsys):
    with pytest.raises(SystemExit):
        LightningCLI(Stock, Data, args=["fit", f"--optimizer.help=hina_optim.{name}"])
    shown = capsys.readouterr().out
    for argument in inspect.signature(getattr(hina_optim, name)).parameters:
        assert argument == "params" or f"--optimizer.{argument}" in shown


@pytest.mark.parametrize("cli", ["stock", "linked"])
def test_a_profile_is_not_lost_among_the_defaults_that_the_cli_spells_out(cli):
    optimizer = ("--optimizer=hina_optim.Automagic_CameAMP_Improved_8Bit", "--optimizer.lr=1e-4")
    given = ("--optimizer.compile=false", "--optimizer.profile=memory_optimized", "--optimizer.d_coef=1.5")
    built = fit(Linked, *optimizer, *given, cli=LinkedCLI) if cli == "linked" else fit(Stock, *optimizer, *given)
    for group in optimizer_of(built).param_groups:
        assert (group["min_8bit_size"], group["edge_suppression"]) == (1024, False)  # the profile's
        assert group["d_coef"] == 1.5 and group["start_lr"] in (1e-4, pytest.approx(1e-5))


def test_a_config_is_not_lost_among_the_defaults_that_the_cli_spells_out():
    built = fit(
        Stock, "--optimizer=hina_optim.Automagic_CameAMP_Improved", "--optimizer.compile=false",
        "--optimizer.config.lr=1e-4", "--optimizer.config.edge_penalty=0.3",
    )  # fmt: skip
    (group,) = optimizer_of(built).param_groups
    assert (group["lr"], group["edge_penalty"]) == (1e-4, 0.3)


def test_stock_cli_refuses_a_bad_type_and_an_unknown_argument(capsys):
    for bad in ("--optimizer.lr=fast", "--optimizer.use_gramms=true"):
        with pytest.raises(SystemExit):
            fit(Stock, "--optimizer=hina_optim.HinaAdaptive", bad)
    errors = capsys.readouterr().err
    assert "fast" in errors and "use_gramms" in errors


def test_help_explains_every_argument(capsys):
    with pytest.raises(SystemExit):
        LightningCLI(Stock, Data, args=["fit", "--optimizer.help=hina_optim.HinaAdaptive"])
    shown = capsys.readouterr().out
    for argument in ("lr", "use_lr_mask", "state_precision"):
        assert f"--optimizer.{argument}" in shown


def test_a_factory_gets_groups_and_a_schedule():
    cli = fit(
        WithFactory, "--model.optimizer=hina_optim.HinaAdaptive", "--model.optimizer.lr=2e-4",
        "--model.optimizer.compile=false", "--model.warmup=0.5",
    )  # fmt: skip
    optimizer = optimizer_of(cli)
    assert [g["name"] for g in optimizer.param_groups] == ["decay", "no_decay"]
    assert [g["start_lr"] for g in optimizer.param_groups] == [2e-4, 2e-4]
    assert optimizer.param_groups[1]["weight_decay"] == 0.0
    assert optimizer.param_names() == ["body.0.weight", "body.2.weight", "body.0.bias", "body.2.bias"]
    (config,) = cli.trainer.lr_scheduler_configs
    assert config.scheduler.last_epoch == 6 and config.scheduler.lr_lambdas[0].warmup_steps == 3


def test_a_linked_section_gets_groups_and_a_schedule():
    cli = fit(
        Linked, "--optimizer=hina_optim.HinaAdaptive", "--optimizer.lr=1e-4", "--optimizer.weight_decay=0.5",
        "--optimizer.compile=false", "--model.warmup=0.5", cli=LinkedCLI,
    )  # fmt: skip
    optimizer = optimizer_of(cli)
    assert type(optimizer) is HinaAdaptive
    assert [(g["name"], g["start_lr"], g["weight_decay"]) for g in optimizer.param_groups] == [
        ("decay", 1e-4, 0.5),
        ("no_decay", 1e-4, 0.0),
        (r"decay:x0.1:body\.2", pytest.approx(1e-5), 0.5),
        (r"no_decay:x0.1:body\.2", pytest.approx(1e-5), 0.0),
    ]
    (config,) = cli.trainer.lr_scheduler_configs
    assert config.interval == "step" and config.scheduler.lr_lambdas[0].total_steps == 6


def test_callbacks_and_optimizer_from_a_file(tmp_path, caplog):
    file = tmp_path / "config.yaml"
    file.write_text(
        f"""
        seed_everything: 3
        model:
          optimizer:
            class_path: hina_optim.HinaAdaptive
            init_args: {{lr: 0.0003, compile: false, warmup_steps: 20}}
          schedule: cosine
        trainer:
          logger:
            class_path: lightning.pytorch.loggers.CSVLogger
            init_args: {{save_dir: {tmp_path}}}
          log_every_n_steps: 1
          callbacks:
            - class_path: hina_lightning.callbacks.LRMaskMonitor
              init_args: {{every_n_steps: 2}}
            - class_path: hina_lightning.callbacks.ImportanceMonitor
            - class_path: hina_lightning.callbacks.RankMonitor
              init_args: {{measure: entropy, by: block}}
            - class_path: hina_lightning.callbacks.LossContextReporter
            - class_path: hina_lightning.callbacks.VRAMGuard
              init_args: {{target_vram_gb: 0.001, dry_run: true}}
        """
    )
    without_logger = [argument for argument in QUIET if "logger" not in argument]
    with caplog.at_level(logging.WARNING, logger="hina_lightning"):
        cli = LightningCLI(
            WithFactory, Data, args=["fit", *without_logger, f"--config={file}"], save_config_callback=None
        )
    kinds = {type(callback) for callback in cli.trainer.callbacks}
    assert {LRMaskMonitor, ImportanceMonitor, LossContextReporter, RankMonitor, VRAMGuard} <= kinds
    header = (tmp_path / "lightning_logs" / "version_0" / "metrics.csv").read_text().splitlines()[0].split(",")
    assert {"lr_eff/decay", "lr_mask/no_decay/p50", "mem/pressure", "rank/body.0/mean"} <= set(header)
    assert optimizer_of(cli).param_groups[0]["warmup_steps"] == 20
    assert "memory pressure" in caplog.text  # a thousandth of a GiB is less than any process has


def test_without_lightning_the_import_names_the_extra():
    code = "import sys; sys.modules['lightning'] = None; import hina_lightning"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "hina_lightning needs Lightning: pip install 'hina-lightning[lightning]'" in done.stderr


# -- documentation ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    ["configure", "groups", "schedules", "callbacks.lr_mask_monitor", "callbacks.vram_guard", "callbacks._common"],
)
def test_examples_in_docstrings(name):
    module = importlib.import_module(f"hina_lightning.{name}")
    assert doctest.testmod(module).failed == 0


def test_the_documentation_runs_from_top_to_bottom(tmp_path, monkeypatch, capsys):
    page = Path(__file__).parents[1] / "docs" / "lightning.md"
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    blocks = [block for block in blocks if not block.startswith("# not run")]
    assert len(blocks) == 6
    namespace = {"__name__": "__main__"}
    for block in blocks:
        capsys.readouterr()
        exec(compile(block, str(page), "exec"), namespace)
        promised = "".join(line[2:] + "\n" for line in block.splitlines() if line.startswith("# "))
        assert not promised or capsys.readouterr().out == promised
    assert namespace["guard"].actions and namespace["guard"].actions[0]["step"] == 0
    assert json.loads((tmp_path / "runs" / "importance.json").read_text())["rank_pattern"]
