"""LossContextReporter: the loss that reaches techniques in every way that a training can step."""

from __future__ import annotations

import re
from typing import ClassVar

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor, nn
from torch.utils.data import DataLoader

from hina_lightning.callbacks import LossContextReporter
from hina_optim import arguments as rule
from hina_optim.engine.optimizer import ENGINE_RULES, HinaOptimizer
from hina_optim.techniques.base import Flow, ParamInfo, Slot, Technique


class KeepLoss(Technique):
    """Plain gradient descent that remembers the loss it was told."""

    name: ClassVar[str] = "keep_loss"
    reads: ClassVar[frozenset[str]] = frozenset({"grad"})
    writes: ClassVar[frozenset[str]] = frozenset({"update"})
    reads_loss: ClassVar[bool] = True

    def slots(self, info: ParamInfo) -> tuple[Slot, ...]:
        return (Slot("loss", shape=(1,), precision="fp32"),)

    def transform(self, flow: Flow) -> None:
        flow["update"] = flow["grad"]
        flow.new["loss"] = flow.scalars["loss"].reshape(-1, 1)


class Descent(HinaOptimizer):
    RULES: ClassVar[dict[str, rule.Rule]] = {"lr": rule.NON_NEGATIVE, **ENGINE_RULES}

    def __init__(self, params, lr: float = 0.01):
        super().__init__(params, {"lr": lr, "compile": False})

    def recipe(self, group, info):
        return [KeepLoss()]


def told(optimizer) -> float:
    """The loss of the last step."""
    (one,) = {float(state["loss"]) for state in optimizer.state.values()}
    return one


class Net(LightningModule):
    """Its loss is the mean of the batch times a weight that stays 1 (lr 0): known before it is computed."""

    def __init__(self, optimizer=lambda params: Descent(params, lr=0.0)):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))
        self.make = optimizer
        self.seen = []

    def configure_optimizers(self):
        return self.make([self.weight])

    def training_step(self, batch, batch_idx):
        return (batch * self.weight).mean()

    def on_train_batch_end(self, outputs, batch, batch_idx):
        optimizer = self.trainer.optimizers[0]
        if len(self.seen) < self.trainer.global_step:
            self.seen.append(told(optimizer))


#: Batches of one number, and that number is the loss.
LOSSES = [3.0, 1.0, 4.0, 1.5, 9.0, 2.0, 6.0]


def data():
    return DataLoader(torch.tensor(LOSSES).reshape(-1, 1), batch_size=1)


def trainer(callbacks=None, **options):
    quiet = dict(logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)
    callbacks = [LossContextReporter()] if callbacks is None else callbacks
    return Trainer(callbacks=callbacks, **{"accelerator": "cpu", "devices": 1, "max_epochs": 1, **quiet, **options})


def means(k):
    return [sum(LOSSES[i : i + k]) / len(LOSSES[i : i + k]) for i in range(0, len(LOSSES), k)]


def test_every_step_is_told_the_loss_of_its_batch():
    model = Net()
    trainer().fit(model, data())
    assert model.seen == pytest.approx(LOSSES)


def test_without_accumulation_the_closure_is_enough():
    model = Net()
    trainer([]).fit(model, data())
    assert model.seen == pytest.approx(LOSSES)


@pytest.mark.parametrize("accumulate", [2, 3])
def test_accumulated_batches_are_told_as_their_mean(accumulate):
    """The last step of the epoch has fewer batches."""
    model = Net()
    trainer(accumulate_grad_batches=accumulate).fit(model, data())
    assert model.seen == pytest.approx(means(accumulate))


def test_gradients_carried_over_epochs_begin_anew():
    model = Net()
    trainer(accumulate_grad_batches=4, max_epochs=2).fit(model, data())
    assert model.seen == pytest.approx(means(4) * 2)


def test_a_scaled_loss_is_told_unscaled():
    """A real GradScaler, on the CPU; Lightning runs the closure before the step, without handing over its loss."""
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for accumulate in (1, 2):
        model = Net()
        precision = MixedPrecision("16-mixed", "cpu", scaler=scaler)
        trainer(plugins=[precision], accumulate_grad_batches=accumulate).fit(model, data())
        assert model.seen == pytest.approx(means(accumulate), rel=1e-3)


def test_a_step_that_the_module_skipped_reports_nothing():
    class Skipping(Net):
        def training_step(self, batch, batch_idx):
            return None if batch_idx == 1 else super().training_step(batch, batch_idx)

    reports = []

    class Listening(Descent):
        def report_loss(self, loss):
            reports.append(float(loss))
            super().report_loss(loss)

    trainer().fit(Skipping(lambda params: Listening(params, lr=0.0)), data())
    assert 1.0 not in reports and set(reports) == set(LOSSES) - {1.0}


def test_what_is_reported_is_a_tensor_without_a_graph():
    """One number that stays where it was computed."""

    class Strict(Descent):
        def report_loss(self, loss):
            assert isinstance(loss, Tensor) and not loss.requires_grad and loss.shape == ()
            super().report_loss(loss)

    model = Net(lambda params: Strict(params, lr=0.0))
    trainer(accumulate_grad_batches=2).fit(model, data())
    assert model.seen == pytest.approx(means(2))


# -- manual optimization -----------------------------------------------------------------------------------------------


class Manual(Net):
    """Two optimizers, whose losses are the batch and ten times the batch."""

    def __init__(self, mode):
        super().__init__()
        self.automatic_optimization = False
        self.other = nn.Parameter(torch.ones(1))
        self.mode = mode
        self.seen = []

    def configure_optimizers(self):
        return [Descent([self.weight], lr=0.0), Descent([self.other], lr=0.0)]

    def on_train_batch_end(self, outputs, batch, batch_idx):
        pass

    def training_step(self, batch, batch_idx):
        first, second = self.optimizers()
        last = batch_idx % 2 == 1
        if self.mode == "one after the other":
            for optimizer, weight, factor in ((first, self.weight, 1), (second, self.other, 10)):
                optimizer.zero_grad()
                self.manual_backward((factor * batch * weight).mean())
                optimizer.step()
        elif self.mode == "one loss":
            self.manual_backward((batch * self.weight * self.other).mean())
            first.step()
            second.step()
        elif self.mode == "accumulated":
            self.manual_backward((batch * self.weight * self.other).mean())
            if not last:
                return
            first.step()
            second.step()
        elif self.mode == "closure":

            def closure():
                loss = (batch * self.weight).mean()
                self.manual_backward(loss)

            first.step(closure=closure)
            self.seen.append([told(o) for o in self.trainer.optimizers[:1]])
            return
        self.seen.append([told(o) for o in self.trainer.optimizers])


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        ("one after the other", [[x, 10 * x] for x in LOSSES]),
        ("one loss", [[x, x] for x in LOSSES]),
        ("accumulated", [[x, x] for x in means(2)[:3]]),
        ("closure", [[x] for x in LOSSES]),
    ],
)
def test_manual_optimization(mode, expected):
    model = Manual(mode)
    trainer().fit(model, data())
    assert len(model.seen) == len(expected)
    for seen, wanted in zip(model.seen, expected, strict=True):
        assert seen == pytest.approx(wanted)


# -- optimizers --------------------------------------------------------------------------------------------------------


def test_optimizers_that_take_no_loss_are_passed_over():
    class Mixed(Manual):
        def configure_optimizers(self):
            return [Descent([self.weight], lr=0.0), torch.optim.SGD([self.other], lr=0.0)]

        def training_step(self, batch, batch_idx):
            self.manual_backward((batch * self.weight * self.other).mean())
            for optimizer in self.optimizers():
                optimizer.step()
            self.seen.append(told(self.trainer.optimizers[0]))

    model = Mixed("")
    trainer().fit(model, data())
    assert model.seen == pytest.approx(LOSSES)


def test_without_such_an_optimizer_it_is_an_error():
    message = "LossContextReporter needs an optimizer with report_loss()"
    with pytest.raises(MisconfigurationException, match=re.escape(message)):
        trainer().fit(Net(lambda params: torch.optim.SGD(params, lr=0.1)), data())


@pytest.mark.parametrize("losses", [[1.0, float("nan"), 2.0]])
def test_a_loss_that_is_not_finite_goes_through_and_stays_in_its_step(losses):
    model = Net()
    trainer().fit(model, DataLoader(torch.tensor(losses).reshape(-1, 1), batch_size=1))
    assert model.seen[0] == 1.0 and model.seen[-1] == pytest.approx(2.0)
