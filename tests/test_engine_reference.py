"""The engine against the float64 reference, the AdamW family: whole trajectories, alone and together, all shapes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from tests.optim_cases import EVERYTHING, NOTHING
from tests.reference_cases import compare, draws, run_both

FAMILY = ["HinaAdaptive", "AdaptiveHinaAdamW", "HinaAdamWOptimizer"]
CONTEXT = {"use_loss_context": True, "context_window": 6}
#: A failing combination is shown as it was drawn: to shrink it would take minutes.
UNSHRUNK = (Phase.explicit, Phase.generate)

ALONE: dict[str, dict[str, Any]] = {
    "adamw": {},
    "amsgrad": {"amsgrad": True, "betas": (0.9, 0.5)},
    "factored adam": {"factored_second_moment": True, "betas": (0.9, 0.9)},
    "factored adopt": {"factored_second_moment": True, "use_adopt_stability": True},
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
    "edge": {"edge_suppression": True, "edge_threshold": 0.15},
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
    named, reference = run_both("HinaAdaptive", {**NOTHING, **ALONE[name]}, torch.float32, steps=6)
    compare(named, reference, 3e-3, torch.float32)


@pytest.mark.parametrize(
    ("optimizer", "arguments"),
    [
        ("HinaAdaptive", {}),
        ("HinaAdaptive", {**EVERYTHING, **CONTEXT}),
        ("HinaAdaptive", {**EVERYTHING, "use_grams": True, "spatial_awareness": False}),
        ("AdaptiveHinaAdamW", {"relationship_discovery_interval": 3, "warmup_steps": 6, **CONTEXT}),
        ("HinaAdamWOptimizer", {"use_orthogonal_grad": True, "wd_transition_steps": 4, **CONTEXT}),
    ],
    ids=["default", "all", "all+grams", "adaptive", "adapters"],
)
def test_together_in_float64(optimizer: str, arguments: dict[str, Any]) -> None:
    named, reference = run_both(optimizer, arguments)
    compare(named, reference, 1e-8)


@pytest.mark.parametrize("name", FAMILY)
def test_groups_have_their_own_options(name: str) -> None:
    """Halves of pairs and adapters lie in different groups, and still belong together."""
    second = {"lr": 5e-4, "weight_decay": 0.3, "tam_beta": 0.5, "wd_transition_steps": 2, "betas": (0.8, 0.9)}
    named, reference = run_both(name, {"wd_transition_steps": 4}, groups=({}, second))
    compare(named, reference, 1e-8)


@pytest.mark.parametrize("name", FAMILY)
@settings(max_examples=6, deadline=None, derandomize=True, phases=UNSHRUNK)
@given(data=st.data())
def test_any_combination(name: str, data: st.DataObject) -> None:
    named, reference = run_both(name, data.draw(draws(name)), steps=12)
    compare(named, reference, 1e-8)
