"""The engine against the float64 reference, the family of CAME: whole trajectories through all phases, all shapes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor

from hina_optim import MomentumStrategy, RegularizationStrategy
from tests.reference_cases import STEPS, compare, draws, run_both

FAMILY = ["Automagic_CameAMP", "Automagic_CameAMP_Improved", "Automagic_CameAMP_COptim"]
IN_8_BITS = ["Automagic_CameAMP_8bit", "Automagic_CameAMP_Improved_8Bit", "Automagic_CameAMP_COptim8bit"]

#: All four phases within a few steps.
PHASES: dict[str, Any] = {"warmup_steps": 4, "lr_bump": 1e-5}
CONTEXT = {"use_loss_context": True, "context_window": 6}
#: A failing combination is shown as it was drawn: to shrink it would take minutes.
UNSHRUNK = (Phase.explicit, Phase.generate)
IMPROVED = {**PHASES, "edge_threshold": 0.15, "rank_interval": 2, "rank_target": 1}
#: Without the Fourier transform, whose reference is slow.
FASTER = {**IMPROVED, "spatial_awareness": False}
NOTHING = {
    "warmup_steps": 0,
    "came": False,
    "full_finetune": True,
    "use_agr": False,
    "use_tam": False,
    "use_grams": False,
    "use_cautious": False,
    "use_ada_decay": False,
    "use_spd": False,
    "use_lr_mask": False,
}
NOTHING_IMPROVED = {
    **NOTHING,
    "edge_suppression": False,
    "spatial_awareness": False,
    "background_regularization": False,
    "lora_rank_penalty": False,
    "enable_dual_momentum": False,
}

#: Each alone, beside factored moments.
ALONE: dict[str, dict[str, Any]] = {
    "factored": {},
    "shorter memory": {"beta1_decay": 0.8, "clip_threshold": 0.4},
    "came": {"came": True},
    "agr": {"use_agr": True},
    "tam": {"use_tam": True, "warmup_steps": 4},
    "grams": {"use_grams": True, "warmup_steps": 6},
    "cautious": {"use_cautious": True, "warmup_steps": 4},
    "ada decay": {"use_ada_decay": True, "weight_decay": 0.3},
    "spd": {"use_spd": True, "spd_lambda": 2.0, "warmup_steps": 4},
    "mask": {"use_lr_mask": True, "warmup_steps": 8, "lr_bump": 1e-5},
    "rows": {"full_finetune": False},
    "context": CONTEXT,
    "dual": {"enable_dual_momentum": True},
    "rank": {"lora_rank_penalty": True, "rank_target": 1, "rank_interval": 2, "rank_penalty_strength": 1.0},
    "rank-aware decay": {"lora_rank_penalty": True, "warmup_steps": 3, "rank_interval": 3, "weight_decay": 0.3},
}

TOGETHER: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("Automagic_CameAMP", PHASES),
    "plain, whole model": ("Automagic_CameAMP", {**PHASES, **CONTEXT, "full_finetune": True}),
    "improved": ("Automagic_CameAMP_Improved", IMPROVED),
    "refactored, whole model": ("RefactoredAutomagicCameAMP", {**FASTER, **CONTEXT, "full_finetune": True}),
    "COptim": ("Automagic_CameAMP_COptim", {**PHASES, "context_window": 6, "momentum_scales": (1, 2, 5)}),
}


@pytest.mark.parametrize("name", ALONE)
def test_alone(name: str) -> None:
    named, reference = run_both("Automagic_CameAMP_Improved", {**NOTHING_IMPROVED, **ALONE[name]}, steps=10)
    compare(named, reference, 1e-8)


@pytest.mark.parametrize("name", TOGETHER)
def test_together(name: str) -> None:
    optimizer, arguments = TOGETHER[name]
    named, reference = run_both(optimizer, arguments)
    compare(named, reference, 1e-8)


@pytest.mark.parametrize("optimizer", ["Automagic_CameAMP", "Automagic_CameAMP_COptim"])
def test_together_in_float32(optimizer: str) -> None:
    named, reference = run_both(optimizer, PHASES, torch.float32)
    compare(named, reference, 1e-2, torch.float32)


@pytest.mark.parametrize("name", IN_8_BITS)
def test_a_class_in_8_bits_differs_in_its_state_only(name: str) -> None:
    """With ``state_precision="fp32"`` it is the same mathematics."""
    arguments = FASTER if "Improved" in name else PHASES
    named, reference = run_both(name, arguments, steps=9)
    compare(named, reference, 1e-8)


@pytest.mark.parametrize("optimizer", ["Automagic_CameAMP", "Automagic_CameAMP_Improved"])
def test_groups_have_their_own_options(optimizer: str) -> None:
    """Phases included; halves of a pair lie in different groups, and still belong together."""
    arguments = FASTER if "Improved" in optimizer else PHASES
    second = {"lr": 5e-4, "weight_decay": 0.3, "warmup_steps": 6, "full_finetune": True, "betas": (0.7, 0.9, 0.99)}
    named, reference = run_both(optimizer, arguments, groups=({}, second))
    compare(named, reference, 1e-8)


@pytest.mark.parametrize("name", FAMILY)
@settings(max_examples=5, deadline=None, derandomize=True, phases=UNSHRUNK)
@given(data=st.data())
def test_any_combination(name: str, data: st.DataObject) -> None:
    if "Improved" in name and data.draw(st.booleans()):
        name = "RefactoredAutomagicCameAMP"  # the same options
    named, reference = run_both(name, data.draw(draws(name)), steps=12)
    compare(named, reference, 1e-8)


# -- a user's strategies ----------------------------------------------------------------------------------------------


class Centered(RegularizationStrategy):
    """Takes the mean off, by what is there to see."""

    def apply(self, grad: Tensor, **kwargs: Any) -> Tensor:
        centered = grad - grad.mean() if grad.ndim > 1 else grad
        return centered + 0.01 * kwargs["step"] * kwargs["param"]


class Squashed(RegularizationStrategy):
    """Element by element, for many at once."""

    batched = True

    def apply(self, grad: Tensor, **kwargs: Any) -> Tensor:
        return torch.tanh(grad)


class Nesterov(MomentumStrategy):
    """Looks ahead; forgets faster at first."""

    def apply(self, grad: Tensor, moment: Tensor, **kwargs: Any) -> tuple[Tensor, Tensor]:
        beta = 0.9 - 0.4 / kwargs["step"]
        moment = beta * moment + (1 - beta) * grad
        return moment, beta * moment + (1 - beta) * grad


class Plain(MomentumStrategy):
    """Moment and direction are one."""

    def apply(self, grad: Tensor, moment: Tensor, **kwargs: Any) -> Tensor:
        return 0.7 * moment + 0.3 * grad


@pytest.mark.parametrize(
    "strategies",
    [{"regularization": [Centered(), Squashed()], "momentum": Nesterov()}, {"momentum": Plain()}],
    ids=["regularization and momentum", "momentum"],
)
@pytest.mark.parametrize("dual", [True, False])
def test_strategies(strategies: dict[str, Any], dual: bool) -> None:
    arguments = {**NOTHING_IMPROVED, **PHASES, "came": True, "use_tam": True, "use_agr": True}
    arguments["enable_dual_momentum"] = dual
    named, reference = run_both("RefactoredAutomagicCameAMP", arguments, steps=STEPS, strategies=strategies)
    compare(named, reference, 1e-8)
