"""The engine against the float64 reference, the AdamW family: whole trajectories, alone and together, all shapes."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import hina_optim
from hina_optim.reference.common import IGNORED
from tests.every_optimizer import NAMES
from tests.optim_cases import EVERYTHING, NOTHING
from tests.reference_cases import (
    DRAWN,
    DRAWN_ADAMW,
    DRAWN_CAME,
    FEW,
    REFERENCES,
    compare,
    draws,
    run_both,
    run_reference,
)

FAMILY = ["HinaAdaptive", "AdaptiveHinaAdamW", "HinaAdamWOptimizer"]
CONTEXT = {"use_loss_context": True, "context_window": 6}

ALONE: dict[str, dict[str, Any]] = {
    "adamw": {},
    "amsgrad": {"amsgrad": True, "betas": (0.9, 0.5)},
    "agr": {"use_agr": True},
    "tam": {"use_tam": True},
    "adopt": {"use_adopt_stability": True},
    "grams": {"use_grams": True},
    "cautious": {"use_cautious": True},
    "orthogonal": {"use_orthogonal_grad": True},
    "spd": {"use_spd": True, "spd_lambda": 2.0},
    "dynamic_weight_decay": {"dynamic_weight_decay": True, "wd_transition_steps": 3, "weight_decay": 0.3},
    "lr_mask": {"use_lr_mask": True, "warmup_steps": 6, "lr_bump": 1e-5},
    "adaptation": {"use_dynamic_adaptation": True, "relationship_discovery_interval": 2},
    "context": CONTEXT,
    "edge": {"edge_suppression": True},
    "spatial": {"spatial_awareness": True},
    "background": {"background_regularization": True},
    "rank": {"lora_rank_penalty": True, "rank_target": 1, "rank_interval": 2},
}


@pytest.mark.parametrize("name", ALONE)
def test_alone_in_float64(name: str) -> None:
    named, reference = run_both("HinaAdaptive", {**NOTHING, **ALONE[name]}, steps=9)
    compare(named, reference, 1e-8)


@pytest.mark.parametrize("name", ALONE)
def test_alone_in_float32(name: str) -> None:
    named, reference = run_both("HinaAdaptive", {**NOTHING, **ALONE[name]}, torch.float32, steps=9)
    compare(named, reference, 1e-2, torch.float32)


@pytest.mark.parametrize(
    ("optimizer", "arguments"),
    [
        ("HinaAdaptive", {}),
        ("HinaAdaptive", {**EVERYTHING, **CONTEXT}),
        ("HinaAdaptive", {**EVERYTHING, "use_grams": True}),
        ("AdaptiveHinaAdamW", {"relationship_discovery_interval": 3, "warmup_steps": 6, **CONTEXT}),
        ("HinaAdamWOptimizer", {"use_orthogonal_grad": True, "wd_transition_steps": 4, **CONTEXT}),
    ],
    ids=["default", "all", "all+grams", "adaptive", "adapters"],
)
def test_together_in_float64(optimizer: str, arguments: dict[str, Any]) -> None:
    named, reference = run_both(optimizer, arguments)
    compare(named, reference, 1e-8)


@pytest.mark.parametrize("name", FAMILY)
@settings(max_examples=8, deadline=None, derandomize=True)
@given(data=st.data())
def test_any_combination(name: str, data: st.DataObject) -> None:
    named, reference = run_both(name, data.draw(draws(name)), steps=12)
    compare(named, reference, 1e-8)


# -- coverage ---------------------------------------------------------------------------------------------------------

#: Arguments that are no options of the mathematics: what is optimized, sets of options, and the user's own strategies
#: (test_came_reference.py has those).
ADDRESSES = {"self", "params", "config", "profile", "regularization", "momentum"}


@pytest.mark.parametrize("name", NAMES)
def test_every_option_is_drawn_or_not_mathematical(name: str) -> None:
    """An option that a class gets must be known to its reference, with the same default, and be drawn."""
    parameters = inspect.signature(getattr(hina_optim, name).__init__).parameters
    options = {k: p.default for k, p in parameters.items() if k not in ADDRESSES | IGNORED}
    assert options == dict(REFERENCES[name].DEFAULTS)
    drawn = set(DRAWN) | set(DRAWN_CAME if "Came" in name else DRAWN_ADAMW)
    assert set(options) <= drawn, f"not drawn: {sorted(set(options) - drawn)}"


def test_what_is_drawn_exists() -> None:
    known = {option for reference in REFERENCES.values() for option in reference.DEFAULTS}
    assert set(DRAWN) | set(DRAWN_ADAMW) | set(DRAWN_CAME) == known


#: What an option needs to matter; of the others everything is on.
NEEDS: dict[str, dict[str, Any]] = {
    "amsgrad": {"use_adopt_stability": False, "betas": (0.9, 0.5)},
    "use_cautious": {"use_grams": False},
    "wd_min_ratio": {"wd_decay_factor": 0.2, "wd_transition_steps": 2},
    "rank_target": {"rank_penalty_strength": 1.0},
    "rank_penalty_strength": {"rank_target": 1},
    "long_term_beta": {"alpha_mix_ratio": 0.7},
    "min_lr": {"lr_bump": 7e-5},
    "max_lr": {"lr_bump": 7e-5},
    "edge_penalty": {"edge_threshold": 0.15},
    "edge_suppression": {"edge_threshold": 0.15},
}


def _first_of_its_kind() -> list[tuple[str, str]]:
    seen: set[str] = set()
    cases = []
    for name in ("HinaAdaptive", "HinaAdamWOptimizer", "Automagic_CameAMP_Improved", "Automagic_CameAMP_COptim"):
        for option in REFERENCES[name].DEFAULTS:
            key = f"{option} {'came' if 'Came' in name else 'adamw'}"
            if key not in seen and option != "use_loss_context":
                cases.append((name, option))
            seen.add(key)
    return cases


@pytest.mark.parametrize(("name", "option"), _first_of_its_kind())
def test_every_option_changes_something(name: str, option: str) -> None:
    """Else drawing it would prove nothing; the comparisons above then say that the engine changes in the same way."""
    drawn = DRAWN | (DRAWN_CAME if "Came" in name else DRAWN_ADAMW)
    everything: dict[str, Any] = {}
    for one, default in REFERENCES[name].DEFAULTS.items():
        everything[one] = True if isinstance(default, bool) and one != "amsgrad" else drawn[one][0]
    full = {"full_finetune": option in ("use_spd", "spd_lambda")} if "Came" in name else {"use_grams": False}
    everything |= {**full, "weight_decay": 0.3, **NEEDS.get(option, {})}
    everything = {one: value for one, value in everything.items() if one in REFERENCES[name].DEFAULTS}
    ends = [
        torch.cat([p.flatten() for p in run_reference(name, {**everything, option: value}, 9, FEW).params])
        for value in drawn[option][:2]
    ]
    assert float((ends[0] - ends[1]).abs().max()) > 1e-9
