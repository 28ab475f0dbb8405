"""The engine against the float64 reference: whole trajectories, every technique alone and together, over all shapes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hina_optim import HinaAdaptive
from hina_optim.reference.hina_adaptive import ReferenceHinaAdaptive
from tests.optim_cases import EVERYTHING, NOTHING, SHAPES, give, gradients, named_params

PAIR = [(list(SHAPES).index("layer.lora_A.default.weight"), list(SHAPES).index("layer.lora_B.default.weight"))]

ALONE: dict[str, dict[str, Any]] = {
    "adamw": {},
    "agr": {"use_agr": True},
    "tam": {"use_tam": True},
    "adopt": {"use_adopt_stability": True},
    "grams": {"use_grams": True},
    "cautious": {"use_cautious": True},
    "orthogonal": {"use_orthogonal_grad": True},
    "spd": {"use_spd": True},
    "dynamic_weight_decay": {"dynamic_weight_decay": True, "wd_transition_steps": 3},
    "lr_mask": {"use_lr_mask": True, "warmup_steps": 6, "lr_bump": 1e-5},
    "adaptation": {"use_dynamic_adaptation": True, "relationship_discovery_interval": 2},
    "edge": {"edge_suppression": True},
    "spatial": {"spatial_awareness": True},
    "background": {"background_regularization": True},
    "rank": {"lora_rank_penalty": True, "rank_target": 1, "rank_interval": 2},
}


def run_both(
    arguments: dict[str, Any], dtype: torch.dtype, steps: int = 8, lr: float = 3e-4
) -> tuple[Any, Any, list[Any]]:
    """The engine on ``dtype`` parameters, the reference from the same start; the rate follows a schedule."""
    named = named_params(dtype)
    start = [p.detach().double().clone() for _, p in named]
    optimizer = HinaAdaptive(named, lr=lr, **arguments)
    reference = ReferenceHinaAdaptive(start, pairs=PAIR, lr=lr, **arguments)
    for step in range(steps):
        now = lr * (1 - step / (2 * steps))
        optimizer.param_groups[0]["lr"] = now
        for group in reference.param_groups:
            group["lr"] = now
        give(named, step)
        optimizer.step()
        reference.step([g.to(dtype).double() for g in gradients(step)])
    return optimizer, reference, named


def compare(named: list[Any], reference: ReferenceHinaAdaptive, relative: float) -> None:
    """Every parameter within ``relative`` of the movement that a parameter makes."""
    for (name, p), expected in zip(named, reference.params, strict=True):
        scale = 1e-2 + expected.abs().max() if expected.numel() else 1.0
        error = (p.detach().double() - expected).abs().max() / scale if expected.numel() else 0.0
        assert error <= relative, f"{name}: {float(error):.3e}"


@pytest.mark.parametrize("name", ALONE)
def test_alone_in_float64(name: str) -> None:
    _, reference, named = run_both({**NOTHING, **ALONE[name]}, torch.float64)
    compare(named, reference, 1e-9)


@pytest.mark.parametrize(
    "arguments", [{}, EVERYTHING, {**EVERYTHING, "use_grams": True}], ids=["default", "all", "all+grams"]
)
def test_together_in_float64(arguments: dict[str, Any]) -> None:
    _, reference, named = run_both(arguments, torch.float64, steps=14)
    compare(named, reference, 1e-8)


@pytest.mark.parametrize("name", ALONE)
def test_alone_in_float32(name: str) -> None:
    _, reference, named = run_both({**NOTHING, **ALONE[name]}, torch.float32)
    compare(named, reference, 2e-5)


def test_the_reference_moves() -> None:
    """A comparison of two things that stand still would prove nothing."""
    _, _, named = run_both(EVERYTHING, torch.float64)
    for (name, p), (_, before) in zip(named, named_params(torch.float64), strict=True):
        if p.numel():
            assert not torch.equal(p, before), name


SWITCHES = [k for k, v in {**EVERYTHING, **NOTHING}.items() if isinstance(v, bool)]


@settings(max_examples=12, deadline=None, derandomize=True)
@given(
    switches=st.fixed_dictionaries({name: st.booleans() for name in SWITCHES}),
    decay=st.sampled_from([0.0, 0.01, 0.3]),
    betas=st.sampled_from([(0.9, 0.999), (0.0, 0.5), (0.8, 0.99)]),
    interval=st.integers(1, 4),
)
def test_any_combination(switches: dict[str, bool], decay: float, betas: tuple[float, float], interval: int) -> None:
    arguments = {**EVERYTHING, **switches, "weight_decay": decay, "betas": betas, "rank_interval": interval}
    _, reference, named = run_both(arguments, torch.float64, steps=6)
    compare(named, reference, 1e-8)
