"""Trainer and Fabric with every strategy: the trajectory of one process, and checkpoints that go anywhere."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric import Fabric
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn

from hina_lightning.callbacks import LayoutBinding, ShardedOptimizerState
from hina_lightning.fabric import setup
from hina_lightning.sharded_state import CheckpointError
from hina_optim import HinaAdaptive
from tests.lightning_worlds import ENGINES, HALF, Module, Trained, fabric_trained, trained
from tests.sharded.world import run
from tests.test_accelerate import HIDDEN, LONG, largest_difference, same_bits

ALL = [engine if engine in ("ddp", "fsdp1", "fsdp2") else pytest.param(engine, marks=LONG) for engine in ENGINES]
FABRIC = [engine if engine == "fsdp2" else pytest.param(engine, marks=LONG) for engine in ENGINES]
#: Batches of the first half.
BATCHES = 2 * HALF


@pytest.fixture(scope="module")
def one(tmp_path_factory) -> Trained:
    return trained("one", 1, optimizer="HinaAdaptive", save=tmp_path_factory.mktemp("one"))[0]


@pytest.mark.parametrize("engine", ALL)
def test_every_strategy_trains_as_one_process_and_resumes_to_the_bit(engine, one, tmp_path):
    ranks = trained(engine, optimizer="HinaAdaptive", save=tmp_path)
    first = ranks[0]
    assert all(same_bits(first.weights, other.weights) for other in ranks)
    assert largest_difference(first, one) < 2e-6
    assert first.losses == pytest.approx(one.losses, rel=1e-5)
    assert first.rates == one.rates
    hidden = engine.startswith("zero")
    for step, values in one.logged.items():
        wanted = {name: value for name, value in values.items() if not (hidden and name.startswith(HIDDEN))}
        assert all(rank.logged[step] == pytest.approx(wanted, rel=1e-4, abs=1e-9) for rank in ranks)

    again = trained(engine, optimizer="HinaAdaptive", resume=tmp_path / "epoch=0.ckpt")[0]
    assert same_bits(again.weights, first.weights)
    assert again.losses == first.losses[BATCHES:]
    assert again.rates == first.rates[BATCHES:]
    assert again.logged == {step: values for step, values in first.logged.items() if step >= HALF}


@pytest.mark.parametrize(
    ("before", "processes", "after", "others"),
    [
        ("one", 1, "ddp", 2),
        pytest.param("ddp", 2, "one", 1, marks=LONG),
        pytest.param("ddp", 2, "fsdp2", 2, marks=LONG),
        ("fsdp2-full", 2, "one", 1),
        pytest.param("ddp", 2, "fsdp1", 2, marks=LONG),
        pytest.param("fsdp2", 2, "fsdp2", 4, marks=LONG),
        pytest.param("fsdp1", 2, "fsdp1", 4, marks=LONG),
        pytest.param("zero2", 2, "zero2", 1, marks=LONG),
        pytest.param("zero3", 2, "zero3", 1, marks=LONG),
        pytest.param("zero1", 1, "zero2", 2, marks=LONG),
    ],
)
def test_a_checkpoint_goes_on_elsewhere(before, processes, after, others, one, tmp_path):
    """As far as the strategy that loads can read the weights of the one that saved."""
    trained(before, processes, optimizer="HinaAdaptive", save=tmp_path)
    again = trained(after, others, optimizer="HinaAdaptive", resume=tmp_path / "epoch=0.ckpt")[0]
    assert largest_difference(again, one) < 2e-6
    assert again.rates == one.rates[BATCHES:]


@pytest.mark.parametrize("engine", FABRIC)
def test_fabric_trains_as_one_process_and_resumes_to_the_bit(engine, tmp_path):
    reference = fabric_trained("one", 1)[0]
    ranks = fabric_trained(engine, save=tmp_path / "half")
    assert all(same_bits(ranks[0].weights, other.weights) for other in ranks)
    assert largest_difference(ranks[0], reference) < 2e-6
    again = fabric_trained(engine, resume=tmp_path / "half")[0]
    assert same_bits(again.weights, ranks[0].weights)


# -- without the callback ----------------------------------------------------------------------------------------------


def test_fsdp_needs_no_callback_to_train(one):
    found = trained("fsdp1", optimizer="HinaAdaptive", callback=False)[0]
    assert largest_difference(found, one) < 2e-6


def by_hand(rank: int) -> Any:
    """A fit with FSDP1 whose optimizer is built by hand, without and with the callback."""
    from tests.lightning_worlds import strategy_of

    class ByHand(Module):
        def configure_optimizers(self):
            return HinaAdaptive(self.named_parameters(), lr=5e-4, compile=False)

    def fit(callbacks: list[Any]) -> str:
        trainer = Trainer(
            accelerator="cpu", devices=2, strategy=strategy_of("fsdp1", 2), max_steps=1, callbacks=callbacks,
            logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
            use_distributed_sampler=False,
        )  # fmt: skip
        try:
            trainer.fit(ByHand("HinaAdaptive"))
        except RuntimeError as error:
            return str(error)
        return ""

    return fit([]), fit([LayoutBinding()])


def test_an_optimizer_built_by_hand_says_what_it_needs():
    for without, with_callback in run(by_hand, 2, launched=True):
        assert "bind(" in without
        assert with_callback == ""


# -- files -------------------------------------------------------------------------------------------------------------


def fit(folder: Path, callbacks: list[Any], ckpt_path: str | Path | None = None, **options: Any) -> Module:
    torch.manual_seed(0)
    module = Module("HinaAdaptive")
    trainer = Trainer(
        accelerator="cpu", devices=1, max_epochs=options.pop("max_epochs", 2), callbacks=callbacks, logger=False,
        default_root_dir=folder, enable_progress_bar=False, enable_model_summary=False, accumulate_grad_batches=2,
        **options,
    )  # fmt: skip
    trainer.fit(module, ckpt_path=ckpt_path)
    return module


def test_state_goes_with_the_checkpoints_that_lightning_removes(tmp_path):
    keep = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=1, save_last="link")
    fit(tmp_path, [keep, ShardedOptimizerState()])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["epoch=1.ckpt", "epoch=1.ckpt.optimizer", "last.ckpt"]
    again = fit(tmp_path, [ShardedOptimizerState()], tmp_path / "last.ckpt", max_epochs=3, enable_checkpointing=False)
    assert {int(state["step"]) for state in again.optimizers().state.values()} == {3 * HALF}


def test_a_checkpoint_of_lightning_alone_is_loaded_by_it(tmp_path, caplog):
    fit(tmp_path, [ModelCheckpoint(tmp_path, "{epoch}")], max_epochs=1)
    module = fit(tmp_path, [ShardedOptimizerState()], tmp_path / "epoch=0.ckpt", enable_checkpointing=False)
    assert {int(state["step"]) for state in module.optimizers().state.values()} == {2 * HALF}
    assert "Lightning loads what it has saved by itself" in caplog.text


def test_weights_only_checkpoints_hold_no_state(tmp_path):
    fit(tmp_path, [ModelCheckpoint(tmp_path, "{epoch}", save_weights_only=True), ShardedOptimizerState()], max_epochs=1)
    assert [path.name for path in tmp_path.iterdir()] == ["epoch=0.ckpt"]


def test_state_that_is_incomplete_is_named(tmp_path):
    fit(tmp_path, [ModelCheckpoint(tmp_path, "{epoch}"), ShardedOptimizerState()], max_epochs=1)
    (manifest,) = (tmp_path / "epoch=0.ckpt.optimizer" / "hina_optimizer_0").glob("*.json")
    manifest.unlink()
    with pytest.raises(CheckpointError, match=r"hina_optimizer_0 is incomplete"):
        fit(tmp_path, [ShardedOptimizerState()], tmp_path / "epoch=0.ckpt", enable_checkpointing=False)


def test_other_optimizers_are_refused(tmp_path):
    class Other(Module):
        def configure_optimizers(self):
            return torch.optim.AdamW(self.parameters(), lr=1e-3)

    trainer = Trainer(
        accelerator="cpu", devices=1, max_steps=1, callbacks=[ShardedOptimizerState()], logger=False,
        default_root_dir=tmp_path, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    with pytest.raises(MisconfigurationException, match="the trainer has AdamW"):
        trainer.fit(Other("AdamW"))


# -- Fabric ------------------------------------------------------------------------------------------------------------


def test_fabric_refuses_an_optimizer_of_another_model():
    fabric = Fabric(accelerator="cpu", devices=1)
    stranger = HinaAdaptive(nn.Linear(3, 2).named_parameters(), lr=1e-3)
    with pytest.raises(RuntimeError, match="no parameters of the model that was set up: weight, bias"):
        setup(fabric, nn.Linear(3, 2), lambda model: stranger)


@pytest.mark.gpu
@pytest.mark.parametrize("strategy", ["fsdp", "deepspeed_stage_2", "deepspeed_stage_3"])
def test_strategies_of_lightning_on_gpus(strategy, tmp_path):
    """Lightning's own classes, on as many devices as there are."""
    module = Module("HinaAdaptive")
    trainer = Trainer(
        accelerator="gpu", strategy=strategy, max_epochs=1, callbacks=[ShardedOptimizerState()], logger=False,
        default_root_dir=tmp_path, use_distributed_sampler=False, enable_progress_bar=False,
    )  # fmt: skip
    trainer.fit(module)
    assert all(torch.isfinite(torch.tensor(module.losses)))
