"""Phases of the CAME-based optimizers: which techniques act in which step, and that the phases follow the steps."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from torch import nn

from hina_optim import Automagic_CameAMP, Automagic_CameAMP_Improved
from hina_optim.optimizers.blocks import Phases
from hina_optim.techniques.cautious import Cautious

W = 6
NAMES = {"early_warmup": {1, 2}, "late_warmup": {3, 4, 5}, "stable": set(range(6, 12)), "mature": {12, 13, 14}}


def optimizer_of(cls: Any = Automagic_CameAMP, **arguments: Any) -> tuple[nn.Parameter, Any]:
    p = nn.Parameter(torch.randn(6, 9))
    return p, cls([("w", p)], lr=1e-4, warmup_steps=W, **arguments)


def step(p: nn.Parameter, optimizer: Any) -> set[str]:
    """Take a step; names of the techniques that ran in it."""
    p.grad = torch.randn_like(p)
    optimizer.step()
    (bucket,) = {id(b): b for b in optimizer._buckets._of.values()}.values()
    kind = tuple(one.acts(bucket.step - 1) for one in bucket.chain)
    (names,) = {
        tuple(one.name for one in program.rules.chain)
        for (_, acting), program in bucket.programs.items()
        if acting == kind
    }
    return set(names)


def test_phases_by_update() -> None:
    """Early ``t < W/2``, late ``t < W``, stable ``t < 2W``, mature after; ``t`` counts updates from 1."""
    phases = Phases.of(W)
    for name, updates in NAMES.items():
        for t in updates:
            assert phases.name(t - 1) == name, t
    assert {Phases.of(7).name(t - 1) for t in (1, 2, 3)} == {"early_warmup"}  # 3 < 3.5
    assert Phases.of(7).name(3) == "late_warmup"
    assert Phases.of(0).name(0) == "mature"


def test_what_acts_when() -> None:
    p, optimizer = optimizer_of(Automagic_CameAMP_Improved, full_finetune=True)
    expected = {
        "early_warmup": ({"tam"}, {"grams", "cautious", "spd", "rank_aware_decay"}),
        "late_warmup": ({"tam", "grams"}, {"cautious", "spd", "rank_aware_decay"}),
        "stable": ({"cautious", "spd"}, {"tam", "grams", "rank_aware_decay"}),
        "mature": ({"cautious", "spd", "rank_aware_decay"}, {"tam", "grams"}),
    }
    for t in range(1, 15):
        phase = optimizer.phase
        assert t in NAMES[phase]
        assert optimizer.get_optimization_info()["training_stats"]["phase"] == phase
        ran = step(p, optimizer)
        there, missing = expected[phase]
        assert there <= ran and not missing & ran, (t, ran)
        assert {"agr", "factored", "rms_clip", "momentum", "confidence", "lr_mask", "ada_decay"} <= ran


def test_what_is_switched_off_acts_in_no_phase() -> None:
    p, optimizer = optimizer_of(use_tam=False, use_grams=False, use_cautious=False, came=False, use_ada_decay=False)
    for _ in range(14):
        ran = step(p, optimizer)
        assert not ran & {"tam", "grams", "cautious", "confidence", "ada_decay"} and "weight_decay" in ran


def test_state_waits_for_its_phase() -> None:
    """What a later phase needs is there from the first step, so that no step allocates in the middle of a training."""
    p, optimizer = optimizer_of(Automagic_CameAMP_Improved, full_finetune=True)
    step(p, optimizer)
    names = set(optimizer.state[p])
    for _ in range(14):
        step(p, optimizer)
    assert set(optimizer.state[p]) == names and "anchor" in names


def test_a_window_that_ends_before_it_begins_is_refused() -> None:
    with pytest.raises(ValueError, match=r"Cautious.during: 4, 3"):
        Cautious().during(4, 3)
    assert not Cautious().during(3, 3).acts(3) and Cautious().during(3).acts(3)


def test_verbose_logs_at_intervals_and_prints_nothing(
    caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    caplog.set_level(logging.INFO, "hina_optim")
    p, optimizer = optimizer_of(verbose=True)
    for _ in range(101):
        step(p, optimizer)
    lines = [record.getMessage() for record in caplog.records if "effective learning rate" in record.getMessage()]
    assert len(lines) == 2 and "step 1," in lines[0] and "step 100," in lines[1] and "group0" in lines[0]
    assert capsys.readouterr().out == ""
    caplog.clear()
    p, optimizer = optimizer_of()
    step(p, optimizer)
    assert not caplog.records
