"""Every option that changes mathematics is in the float64 references, is drawn by their comparisons, and matters."""

from __future__ import annotations

import functools
import inspect
from typing import Any

import pytest
import torch
from torch import Tensor

import hina_optim
from hina_optim.reference.common import IGNORED
from tests.every_optimizer import NAMES
from tests.reference_cases import DRAWN, DRAWN_ADAMW, DRAWN_CAME, FEW, REFERENCES, run_reference

#: Arguments that are no options of the mathematics: what is optimized, sets of options, and the user's own strategies
#: (test_came_reference.py has those).
ADDRESSES = {"self", "params", "config", "profile", "regularization", "momentum"}


def values_of(name: str) -> dict[str, list[Any]]:
    return DRAWN | (DRAWN_CAME if "Came" in name else DRAWN_ADAMW)


@pytest.mark.parametrize("name", NAMES)
def test_every_option_is_drawn_or_not_mathematical(name: str) -> None:
    """An option that a class gets must be known to its reference, with the same default, and be drawn."""
    parameters = inspect.signature(getattr(hina_optim, name).__init__).parameters
    options = {k: p.default for k, p in parameters.items() if k not in ADDRESSES | IGNORED}
    assert options == dict(REFERENCES[name].DEFAULTS)
    assert set(options) <= set(values_of(name)), f"not drawn: {sorted(set(options) - set(values_of(name)))}"


def test_every_optimizer_has_a_reference() -> None:
    assert list(REFERENCES) == NAMES


def test_what_is_drawn_exists_and_differs() -> None:
    known = {option for reference in REFERENCES.values() for option in reference.DEFAULTS}
    assert set(DRAWN) | set(DRAWN_ADAMW) | set(DRAWN_CAME) == known
    for values in (*DRAWN.values(), *DRAWN_ADAMW.values(), *DRAWN_CAME.values()):
        assert len(values) >= 2
        assert all(values.count(value) == 1 for value in values)


#: What an option needs to matter, beside what :func:`base` switches on.
NEEDS: dict[str, dict[str, Any]] = {
    "amsgrad": {"use_adopt_stability": False, "betas": (0.9, 0.5)},
    "use_cautious": {"use_grams": False},
    "use_spd": {"full_finetune": True, "spd_lambda": 2.0},
    "spd_lambda": {"full_finetune": True},
    "wd_min_ratio": {"wd_decay_factor": 0.2, "wd_transition_steps": 2},
    "rank_target": {"rank_penalty_strength": 1.0},
    "rank_penalty_strength": {"rank_target": 1},
    "long_term_beta": {"alpha_mix_ratio": 0.7},
    "d_coef": {"warmup_steps": 5},
    "min_lr": {"lr_bump": 7e-5},
    "max_lr": {"lr_bump": 7e-5},
    "edge_penalty": {"edge_threshold": 0.15},
    "edge_suppression": {"edge_threshold": 0.15},
    "frequency_penalty": {"spatial_awareness": True},
    "detail_preservation": {"spatial_awareness": True},
}
#: On in no base: they exclude others, or are slow.
OFF = {"amsgrad", "factored_second_moment", "use_grams", "full_finetune", "spatial_awareness"}


def base(name: str, option: str) -> dict[str, Any]:
    """Nearly everything on, with short intervals, and what an option needs."""
    chosen = {
        one: one not in OFF if isinstance(default, bool) else values_of(name)[one][0]
        for one, default in REFERENCES[name].DEFAULTS.items()
    }
    chosen |= {"weight_decay": 0.3, **({"use_grams": True} if "Came" in name else {}), **NEEDS.get(option, {})}
    return {one: value for one, value in chosen.items() if one in REFERENCES[name].DEFAULTS}


@functools.cache
def end(name: str, arguments: tuple[tuple[str, Any], ...]) -> Tensor:
    """All weights after some steps."""
    return torch.cat([p.flatten() for p in run_reference(name, dict(arguments), 9, FEW).params])


def cases() -> list[tuple[str, str]]:
    """Every option once for each family."""
    found: dict[tuple[str, bool], str] = {}
    for name in ("HinaAdaptive", "HinaAdamWOptimizer", "Automagic_CameAMP_Improved", "Automagic_CameAMP_COptim"):
        for option in REFERENCES[name].DEFAULTS:
            found.setdefault((option, "Came" in name), name)
    return [(name, option) for (option, _), name in found.items()]


@pytest.mark.parametrize(("name", "option"), cases())
def test_every_option_changes_something(name: str, option: str) -> None:
    """Else drawing it would prove nothing; the comparisons with the engine then say that it changes in the same way."""
    one, other = ({**base(name, option), option: value} for value in values_of(name)[option][:2])
    moved = (end(name, tuple(one.items())) - end(name, tuple(other.items()))).abs().max()
    assert float(moved) > 1e-9
