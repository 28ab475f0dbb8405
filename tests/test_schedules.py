"""The form of a schedule, and what of it a checkpoint keeps."""

from __future__ import annotations

import logging
import math
import pickle

import pytest
import torch
from torch import nn

from hina_lightning import Schedule, ScheduleLR, configure_optimizers

ADAMW = "torch.optim.AdamW"


def net():
    torch.manual_seed(0)
    return nn.ModuleDict({"embed": nn.Embedding(7, 4), "head": nn.Linear(4, 1)})


@pytest.mark.parametrize("end", [0.0, 0.1])
@pytest.mark.parametrize("shape", ["cosine", "linear", "constant"])
def test_schedule_has_the_value_of_its_formula(shape, end):
    total, warmup = 20, 5
    schedule = Schedule(shape, warmup, total, end)
    decays = {"cosine": lambda p: 0.5 * (1 + math.cos(math.pi * p)), "linear": lambda p: 1 - p, "constant": None}[shape]
    for step in range(total + 5):
        if step < warmup:
            expected = (step + 1) / warmup
        elif decays is None:
            expected = 1.0
        else:
            expected = end + (1 - end) * decays(min((step - warmup) / (total - warmup), 1.0))
        assert schedule(step) == pytest.approx(expected, abs=1e-12)
    assert schedule(0) > 0 and schedule(warmup) == 1.0
    assert schedule(total - 1) > 0
    assert schedule(total) == pytest.approx(1.0 if shape == "constant" else end, abs=1e-12)


def test_schedule_survives_pickle_and_weights_only_loading(tmp_path):
    config = configure_optimizers(net(), lr=1e-3, total_steps=10, warmup=2)
    scheduler = config["lr_scheduler"]["scheduler"]
    for _ in range(4):
        config["optimizer"].step()
        scheduler.step()
    torch.save(scheduler.state_dict(), tmp_path / "schedule.pt")
    fresh = configure_optimizers(net(), lr=1e-3, total_steps=10, warmup=2)["lr_scheduler"]["scheduler"]
    fresh.load_state_dict(torch.load(tmp_path / "schedule.pt", weights_only=True))
    thawed = pickle.loads(pickle.dumps(scheduler))
    for other in (fresh, thawed):
        assert isinstance(other, ScheduleLR)
        assert other.last_epoch == 4
        assert other.get_last_lr() == scheduler.get_last_lr()
    scheduler.step()
    thawed.step()
    fresh.step()
    assert thawed.get_last_lr() == fresh.get_last_lr() == scheduler.get_last_lr()


def test_a_schedule_for_other_groups_is_refused_and_nothing_changes():
    saved = configure_optimizers(net(), ADAMW, lr=1e-3, total_steps=9, lr_multipliers={"embed": 0.1})
    ours = configure_optimizers(net(), ADAMW, lr=1e-3, total_steps=9)["lr_scheduler"]["scheduler"]
    before = ours.state_dict()
    with pytest.raises(ValueError, match="drives 3 parameter groups, this optimizer has 2"):
        ours.load_state_dict(saved["lr_scheduler"]["scheduler"].state_dict())
    assert ours.state_dict() == before


def test_other_learning_rates_in_a_checkpoint_are_kept_and_said(caplog):
    saved = configure_optimizers(net(), ADAMW, lr=1e-3, total_steps=9)["lr_scheduler"]["scheduler"].state_dict()
    ours = configure_optimizers(net(), ADAMW, lr=5e-3, total_steps=9)["lr_scheduler"]["scheduler"]
    with caplog.at_level(logging.WARNING, logger="hina_lightning"):
        ours.load_state_dict(saved)
    assert ours.base_lrs == [1e-3, 1e-3]
    assert "[0.001, 0.001] are kept; this run was configured with [0.005, 0.005]" in caplog.text
