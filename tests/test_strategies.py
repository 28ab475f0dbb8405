"""Strategies of a user: they change the step, keep their state, and are checked against a checkpoint."""

from __future__ import annotations

import copy
import pickle
from dataclasses import replace
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

from hina_optim import (
    MomentumStrategy,
    OptimizerConfig,
    RefactoredAutomagicCameAMP,
    RegularizationStrategy,
)
from tests.every_optimizer import reported
from tests.optim_cases import give, gradients, named_params
from tests.shards import run_sharded

Named = list[tuple[str, nn.Parameter]]
PLAIN: dict[str, Any] = {
    "lr": 1e-3,
    "warmup_steps": 4,
    "edge_suppression": False,
    "spatial_awareness": False,
    "background_regularization": False,
    "lora_rank_penalty": False,
}


class Centered(RegularizationStrategy):
    """Gradient centralization, for one parameter at a time."""

    def apply(self, grad: Tensor, **kwargs: Any) -> Tensor:
        assert kwargs["param"].shape == grad.shape and kwargs["step"].ndim == 0
        return grad - grad.mean()


class CenteredAtOnce(RegularizationStrategy):
    """The same for all parameters of a shape."""

    batched: ClassVar[bool] = True

    def apply(self, grad: Tensor, **kwargs: Any) -> Tensor:
        assert kwargs["step"].shape == (grad.shape[0], *([1] * (grad.ndim - 1)))
        return grad - grad.reshape(grad.shape[0], -1).mean(1).reshape(kwargs["step"].shape)


class Zero(RegularizationStrategy):
    def apply(self, grad: Tensor, **kwargs: Any) -> Tensor:
        return torch.zeros_like(grad)


class Nesterov(MomentumStrategy):
    """A moment, and a direction that looks ahead."""

    def __init__(self, beta: float = 0.9) -> None:
        self.beta = beta

    def apply(self, grad: Tensor, moment: Tensor, **kwargs: Any) -> tuple[Tensor, Tensor]:
        moment = self.beta * moment + (1 - self.beta) * grad
        return moment, self.beta * moment + (1 - self.beta) * grad


class Plain(MomentumStrategy):
    def apply(self, grad: Tensor, moment: Tensor, **kwargs: Any) -> Tensor:
        return 0.8 * moment + (1 - 0.8) * grad


def train(named: Named, steps: int = 6, start: int = 0, **arguments: Any) -> RefactoredAutomagicCameAMP:
    optimizer = RefactoredAutomagicCameAMP(named, **{**PLAIN, **arguments})
    for step in range(start, start + steps):
        give(named, step)
        optimizer.step()
    return optimizer


def weights(named: Named) -> list[Tensor]:
    return [p.detach().clone() for _, p in named if p.numel()]


def test_a_regularization_changes_the_step_as_it_says() -> None:
    """Centering in the optimizer equals centering by hand before it."""
    by_strategy, by_hand = named_params(torch.float64), named_params(torch.float64)
    train(by_strategy, regularization=[Centered()])
    optimizer = RefactoredAutomagicCameAMP(by_hand, **PLAIN)
    for step in range(6):
        give(by_hand, step)
        for _, p in by_hand:
            assert p.grad is not None
            if p.numel():
                p.grad -= p.grad.mean()
        optimizer.step()
    for a, b in zip(weights(by_strategy), weights(by_hand), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
    without = named_params(torch.float64)
    train(without)
    assert any(not torch.equal(a, b) for a, b in zip(weights(by_strategy), weights(without), strict=True))


def test_batched_or_not_is_the_same() -> None:
    one, all_at_once = named_params(torch.float64), named_params(torch.float64)
    train(one, regularization=[Centered()])
    train(all_at_once, regularization=[CenteredAtOnce()])
    for a, b in zip(weights(one), weights(all_at_once), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_strategies_act_in_their_order() -> None:
    """After a strategy that leaves nothing of the gradient, nothing moves but by decay."""
    named = named_params()
    before = weights(named)
    train(named, regularization=[Centered(), Zero()], weight_decay=0.0)
    assert all(torch.equal(a, b) for a, b in zip(weights(named), before, strict=True))


def test_a_momentum_takes_the_place_of_ours() -> None:
    """The same rule gives the same numbers; another one gives others."""
    ours, theirs, nesterov = (named_params(torch.float64) for _ in range(3))
    train(ours, beta1_decay=1.0, enable_dual_momentum=False)
    train(theirs, momentum=Plain(), enable_dual_momentum=False)
    optimizer = train(nesterov, momentum=Nesterov(), enable_dual_momentum=False)
    for a, b in zip(weights(ours), weights(theirs), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)
    assert any(not torch.allclose(a, b) for a, b in zip(weights(ours), weights(nesterov), strict=True))
    names = [one.name for one in optimizer._buckets.techniques(nesterov[0][1])]
    assert "custom_momentum" in names and "momentum" not in names


@pytest.mark.parametrize("by_rows", [True, False])
def test_shards_see_what_the_whole_sees(by_rows: bool) -> None:
    """A strategy gets complete gradients whatever the sharding."""

    def make(named: Named) -> RefactoredAutomagicCameAMP:
        return RefactoredAutomagicCameAMP(named, **PLAIN, regularization=[Centered()], momentum=Nesterov())

    whole = named_params(torch.float64)
    optimizer = make(whole)
    for step in range(5):
        give(whole, step)
        optimizer.step()
    start = [(name, p.detach()) for name, p in named_params(torch.float64)]
    found, _ = run_sharded(start, gradients, make, size=3, steps=5, by_rows=by_rows)
    for (_, p), q in zip(whole, found, strict=True):
        torch.testing.assert_close(q, p.detach(), rtol=1e-9, atol=1e-12)


def test_copies_keep_the_strategies() -> None:
    named = named_params()
    optimizer = train(named, regularization=[Centered()], momentum=Nesterov(0.7))
    for twin, theirs in (copy.deepcopy((optimizer, named)), pickle.loads(pickle.dumps((optimizer, named)))):
        fresh = copy.deepcopy((optimizer, named))
        for one, params in ((twin, theirs), fresh):
            give(params, 9)
            reported(one, 9)
        assert all(torch.equal(a, b) for a, b in zip(weights(theirs), weights(fresh[1]), strict=True))


def test_a_checkpoint_asks_for_the_same_strategies() -> None:
    """It holds their state and their names, not their code; other ones are refused, and nothing has changed."""
    named = named_params()
    saved = train(named, regularization=[Centered()], momentum=Nesterov()).state_dict()
    same = RefactoredAutomagicCameAMP(named_params(), **PLAIN, regularization=[Centered()], momentum=Nesterov())
    same.load_state_dict(saved)
    for wrong in ({}, {"regularization": [Zero()], "momentum": Nesterov()}, {"regularization": [Centered()]}):
        other = RefactoredAutomagicCameAMP(named_params(), **{**PLAIN, **wrong})
        with pytest.raises(ValueError, match=r"regularization|momentum"):
            other.load_state_dict(saved)
        assert not other.state


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"regularization": [Centered]}, "the class Centered, not an instance"),
        ({"regularization": [Centered(), 3]}, r"regularization\[1\] is a int"),
        ({"momentum": Nesterov}, "momentum is the class Nesterov"),
        ({"momentum": Centered()}, "momentum is a Centered"),
    ],
)
def test_what_is_no_strategy_is_refused(arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(TypeError, match=words):
        RefactoredAutomagicCameAMP(named_params(), **{**PLAIN, **arguments})


def test_a_strategy_that_returns_nonsense_is_named_before_anything_moves() -> None:
    class Wrong(RegularizationStrategy):
        def apply(self, grad: Tensor, **kwargs: Any) -> Tensor:
            return grad.sum()

    p = nn.Parameter(torch.ones(3, 4))
    optimizer = RefactoredAutomagicCameAMP([p], **PLAIN, regularization=[Wrong()])
    p.grad = torch.ones(3, 4)
    with pytest.raises(ValueError, match=r"Wrong.apply\(\) returned a tensor of shape \(\)"):
        optimizer.step()
    assert torch.equal(p, torch.ones(3, 4))


def test_config_and_strategies_together() -> None:
    """As the class is called in practice: parameters, a config object, and strategies beside it."""
    config = OptimizerConfig(lr=2e-4, warmup_steps=3, lora_rank_penalty=False)
    optimizer = RefactoredAutomagicCameAMP(named_params(), config, regularization=[Centered()])
    assert optimizer.config == replace(config, state_precision="fp32") and optimizer.param_groups[0]["lr"] == 2e-4
