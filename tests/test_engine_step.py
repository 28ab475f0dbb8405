"""What torch and the frameworks expect of a step: closures, hooks, schedules, gradients that lack or are not finite."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hina_optim import HinaAdaptive
from tests.optim_cases import EVERYTHING, SHAPES, give, gradients, named_params

LR = 3e-4
BF16 = torch.bfloat16
#: Everything but what compares parameters with each other: those must not depend on who else is there.
APART = {**EVERYTHING, "use_dynamic_adaptation": False, "lora_rank_penalty": False}

Named = list[tuple[str, nn.Parameter]]


def build(dtype: torch.dtype = torch.float32, **arguments: Any) -> tuple[Named, HinaAdaptive]:
    named = named_params(dtype)
    return named, HinaAdaptive(named, lr=LR, **{**EVERYTHING, **arguments})


def run(named: Named, optimizer: torch.optim.Optimizer, steps: range | int) -> None:
    for step in steps if isinstance(steps, range) else range(steps):
        give(named, step)
        optimizer.step()


def equal(a: Named, b: Named) -> None:
    for (name, p), (_, q) in zip(a, b, strict=True):
        assert torch.equal(p, q), f"{name}: {(p.double() - q.double()).abs().max()}"


def close(a: Named, b: Named, relative: float = 1e-5) -> None:
    for (name, p), (_, q) in zip(a, b, strict=True):
        torch.testing.assert_close(p, q, rtol=relative, atol=relative, msg=lambda m, name=name: f"{name}: {m}")


def state_equal(a: dict[str, Any], b: dict[str, Any]) -> None:
    assert a.keys() == b.keys()
    for key in a:
        assert torch.equal(a[key], b[key]), key


# -- closures and hooks --------------------------------------------------------------------------------------------


def test_the_closure_runs_once_with_gradients_before_any_is_read() -> None:
    """Lightning runs forward and backward inside ``step(closure)``."""
    plain, with_closure = nn.Linear(4, 3), nn.Linear(4, 3)
    with_closure.load_state_dict(plain.state_dict())
    x, calls = torch.randn(8, 4), []
    first, second = (HinaAdaptive(m.parameters(), lr=LR, **EVERYTHING) for m in (plain, with_closure))

    def closure() -> Tensor:
        calls.append(torch.is_grad_enabled())
        second.zero_grad()
        loss = with_closure(x).square().sum()
        loss.backward()
        return loss

    for step in range(4):
        first.zero_grad()
        expected = plain(x).square().sum()
        expected.backward()
        assert first.step() is None
        assert torch.equal(second.step(closure), expected)
        assert calls == [True] * (step + 1)
    assert torch.equal(plain.weight, with_closure.weight)
    assert torch.is_grad_enabled()


def test_a_closure_that_fails_changes_nothing() -> None:
    named, optimizer = build()
    run(named, optimizer, 2)
    before = copy.deepcopy((named, optimizer.state_dict()))

    def closure() -> float:
        raise KeyError("loss")

    with pytest.raises(KeyError, match="loss"):
        optimizer.step(closure)
    equal(named, before[0])
    for index, state in optimizer.state_dict()["state"].items():
        state_equal(state, before[1]["state"][index])


def test_step_hooks() -> None:
    seen: list[str] = []
    named, optimizer = build()
    before = [p.detach().clone() for _, p in named]
    optimizer.register_step_pre_hook(
        lambda o, args, kwargs: seen.append(
            f"pre {all(torch.equal(p, q) for (_, p), q in zip(named, before, strict=True))}"
        )
    )
    optimizer.register_step_post_hook(lambda o, args, kwargs: seen.append("post"))
    run(named, optimizer, 1)
    assert seen == ["pre True", "post"]


@pytest.mark.parametrize("set_to_none", [True, False])
def test_gradients_are_only_read(set_to_none: bool) -> None:
    named, optimizer = build()
    for step in range(3):
        give(named, step)
        before = [(p.grad, p.grad.clone(), p.grad._version) for _, p in named]  # type: ignore[union-attr]
        optimizer.step()
        for (name, p), (same, value, version) in zip(named, before, strict=True):
            assert p.grad is same and torch.equal(p.grad, value) and p.grad._version == version, name
        optimizer.zero_grad(set_to_none=set_to_none)
    assert all(p.grad is None if set_to_none else not p.grad.any() for _, p in named)


def test_accumulated_gradients() -> None:
    """Two halves of a batch and one backward for both are the same step."""
    whole, parts = nn.Linear(5, 4), nn.Linear(5, 4)
    parts.load_state_dict(whole.state_dict())
    first, second = (HinaAdaptive(m.named_parameters(), lr=LR, **EVERYTHING) for m in (whole, parts))
    for step in range(5):
        x = torch.randn(8, 5, generator=torch.Generator().manual_seed(step))
        for o in (first, second):
            o.zero_grad(set_to_none=step % 2 == 0)
        whole(x).square().mean().backward()
        for half in x.split(4):
            (parts(half).square().mean() / 2).backward()
        first.step()
        second.step()
    torch.testing.assert_close(parts.weight, whole.weight, rtol=1e-5, atol=1e-7)


# -- who has a gradient --------------------------------------------------------------------------------------------


def test_alternating_parameters_are_as_in_optimizers_of_their_own() -> None:
    """A parameter without a gradient is not stepped: no decay, no momentum, no counting."""
    together, _ = build()
    apart = named_params()
    optimizer = HinaAdaptive(together, lr=LR, **APART)
    own = [HinaAdaptive([pair], lr=LR, **APART) for pair in apart]
    for step in range(9):
        for i, (g, (_, p), (_, q)) in enumerate(zip(gradients(step), together, apart, strict=True)):
            p.grad = q.grad = None if (step + i) % 3 == 0 else g.float()
        optimizer.step()
        for o in own:
            o.step()
    close(together, apart, 1e-6)
    for i, (_, p) in enumerate(together):
        assert float(optimizer.state[p]["step"]) == sum((step + i) % 3 != 0 for step in range(9))


def test_frozen_and_later_unfrozen() -> None:
    """What never has a gradient has no state; unfrozen, it begins its own first step, with its own anchor."""
    named = named_params()
    frozen = dict(named)["conv2d"]
    frozen.requires_grad_(False)
    optimizer = HinaAdaptive(named, lr=LR, **APART)
    before = frozen.detach().clone()
    for step in range(6):
        if step == 3:
            frozen.requires_grad_(True)
            assert torch.equal(frozen, before) and frozen not in optimizer.state
        give(named, step)
        if step < 3:
            frozen.grad = None
        optimizer.step()
    assert float(optimizer.state[frozen]["step"]) == 3
    alone = nn.Parameter(before.clone())
    other = HinaAdaptive([("conv2d", alone)], lr=LR, **APART)
    for step in range(3, 6):
        alone.grad = gradients(step)[list(SHAPES).index("conv2d")].float()
        other.step()
    torch.testing.assert_close(frozen, alone, rtol=1e-6, atol=1e-8)


def test_no_gradient_at_all() -> None:
    named, optimizer = build()
    optimizer.step()
    assert not optimizer.state
    run(named, optimizer, 1)
    before = copy.deepcopy(named)
    optimizer.zero_grad()
    optimizer.step()
    equal(named, before)
    assert all(float(s["step"]) == 1 for s in optimizer.state.values())


# -- learning rates ------------------------------------------------------------------------------------------------


def test_a_tensor_as_learning_rate() -> None:
    (named, optimizer), (other, expected) = build(), build()
    optimizer.param_groups[0]["lr"] = torch.tensor(LR)
    for step in range(6):
        optimizer.param_groups[0]["lr"].fill_(LR * (1 - step / 10))
        expected.param_groups[0]["lr"] = float(optimizer.param_groups[0]["lr"])
        give(named, step)
        give(other, step)
        optimizer.step()
        expected.step()
    close(named, other, 1e-6)
    built = HinaAdaptive(named_params(), lr=torch.tensor(LR), **EVERYTHING)  # type: ignore[arg-type]
    assert math.isclose(built.param_groups[0]["start_lr"], LR, rel_tol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, BF16, torch.float16])
@pytest.mark.parametrize("rounding", ["stochastic", "kahan", "nearest"])
def test_learning_rate_zero_changes_no_weight(dtype: torch.dtype, rounding: str) -> None:
    """Not one bit, in the middle of a training as little as at its start; but real gradients count."""
    named, optimizer = build(dtype, rounding=rounding, seed=3)
    with torch.no_grad():
        dict(named)["tall"].mul_(1e-5)  # subnormal in float16
    for step in range(8):
        optimizer.param_groups[0]["lr"] = 0.0 if step in (0, 1, 5, 6, 7) else LR
        before = copy.deepcopy(named)
        run(named, optimizer, range(step, step + 1))
        if optimizer.param_groups[0]["lr"] == 0:
            equal(named, before)
    assert all(float(s["step"]) == 8 for s in optimizer.state.values())


def test_priming_leaves_no_trace() -> None:
    """A step with zero gradients and learning rate 0, at the start or later, is not a step."""
    (named, optimizer), (other, expected) = build(), build()
    for step in range(6):
        if step in (0, 3):
            for _, p in named:
                p.grad = torch.zeros_like(p)
            optimizer.param_groups[0]["lr"] = 0.0
            optimizer.step()
            optimizer.param_groups[0]["lr"] = LR
            equal(named, other)
        run(named, optimizer, range(step, step + 1))
        run(other, expected, range(step, step + 1))
    equal(named, other)
    for (_, p), (_, q) in zip(named, other, strict=True):
        state_equal(optimizer.state[p], expected.state[q])


def test_warm_up_from_zero_counts() -> None:
    """A schedule that begins at 0 with real gradients is training: moments and counters move, weights do not."""
    named, optimizer = build()
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: min(1.0, s / 3))
    before = copy.deepcopy(named)
    run(named, optimizer, 1)
    schedule.step()
    equal(named, before)
    state = optimizer.state[dict(named)["square"]]
    assert float(state["step"]) == 1 and state["exp_avg_sq"].any() and state["last_sign"].any()
    run(named, optimizer, range(1, 3))
    assert not torch.equal(dict(named)["square"], dict(before)["square"])


def test_one_cycle_with_momentum_through_betas() -> None:
    named, optimizer = build(betas=(0.9, 0.99), max_lr=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1e-2, total_steps=8)
    other, expected = build(betas=(0.9, 0.99), max_lr=1e-2)
    seen = set()
    for step in range(7):
        group = optimizer.param_groups[0]
        seen.add(group["betas"][0])
        expected.param_groups[0].update(lr=group["lr"], betas=group["betas"], min_lr=group["min_lr"])
        run(named, optimizer, range(step, step + 1))
        run(other, expected, range(step, step + 1))
        schedule.step()
    assert len(seen) > 4
    equal(named, other)


# -- memory layouts ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arguments", [{}, EVERYTHING], ids=["default", "all"])
@pytest.mark.parametrize("which", ["parameter", "gradient", "both"])
def test_memory_layout_does_not_matter(which: str, arguments: dict[str, Any]) -> None:
    """channels_last, transposed and strided parameters and gradients; one large enough to be cut into chunks."""
    makers: list[Callable[[Tensor], Tensor]] = [
        lambda x: x.to(memory_format=torch.channels_last),
        lambda x: x.mT.contiguous().mT,
        lambda x: torch.stack([x, x], dim=-1)[..., 0],
        lambda x: x.T.contiguous().T,
    ]
    shapes = [(3, 2, 3, 3), (4, 6), (5, 3), (700, 400)]
    generator = torch.Generator().manual_seed(0)
    values = [torch.randn(s, generator=generator) for s in shapes]
    plain = [nn.Parameter(v.clone()) for v in values]
    odd = [nn.Parameter(m(v) if which != "gradient" else v.clone()) for m, v in zip(makers, values, strict=True)]
    if which != "gradient":
        assert not any(p.is_contiguous() for p in odd)
    strides = [p.stride() for p in odd]
    first, second = HinaAdaptive(plain, lr=LR, **arguments), HinaAdaptive(odd, lr=LR, **arguments)
    for _ in range(4):
        for p, q, make in zip(plain, odd, makers, strict=True):
            g = torch.randn(p.shape, generator=generator)
            p.grad = g
            q.grad = make(g) if which != "parameter" else g.clone()
        first.step()
        second.step()
    for p, q in zip(plain, odd, strict=True):
        torch.testing.assert_close(q, p, rtol=1e-5, atol=1e-7)
    assert [q.stride() for q in odd] == strides


def test_state_in_another_memory_layout() -> None:
    """State may come back strided from a framework; a large one is updated through flat views of it."""
    params = [nn.Parameter(torch.randn(700, 400, generator=torch.Generator().manual_seed(0))) for _ in range(2)]
    optimizers = [HinaAdaptive([p], lr=LR) for p in params]
    for step in range(4):
        if step == 2:
            state = optimizers[1].state[params[1]]
            optimizers[1].state[params[1]] = {k: v.T.contiguous().T if v.ndim == 2 else v for k, v in state.items()}
        for p, o in zip(params, optimizers, strict=True):
            p.grad = torch.randn(700, 400, generator=torch.Generator().manual_seed(step))
            o.step()
    assert torch.equal(*params)


def test_an_expanded_gradient() -> None:
    """The gradient of a sum may be one number with strides of 0."""
    p, q = nn.Parameter(torch.ones(4, 3)), nn.Parameter(torch.ones(4, 3))
    first, second = HinaAdaptive([p], lr=LR), HinaAdaptive([q], lr=LR)
    for _ in range(3):
        p.grad, q.grad = torch.tensor(2.0).expand(4, 3), torch.full((4, 3), 2.0)
        first.step()
        second.step()
    assert torch.equal(p, q)


# -- gradients that are not finite ---------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, BF16])
def test_a_bad_gradient_leaves_its_parameter_alone(dtype: torch.dtype, bad: float) -> None:
    """To the bit, state included; it is counted and named; the others go on."""
    named, optimizer = build(dtype)
    victim, other = dict(named)["twin1"], dict(named)["twin2"]
    # what is refreshed from all parameters at once follows the others
    shared = ("importance", "relation", "rank_coefficient", "emphasis_projection")
    for step in range(6):
        give(named, step)
        if step in (0, 2, 3):
            victim.grad[1, 2] = bad  # type: ignore[index]
        weights = victim.detach().clone()
        state = {k: v.clone() for k, v in optimizer.state.get(victim, {}).items()}
        momentum = optimizer.state[other]["exp_avg"].clone() if step else None
        optimizer.step()
        if step in (2, 3):
            assert torch.equal(victim, weights)
            for key, value in optimizer.state[victim].items():
                if key in ("step", "skipped"):
                    assert value == state[key] + 1
                elif not key.startswith(shared):
                    assert torch.equal(value, state[key]), key
            assert not torch.equal(optimizer.state[other]["exp_avg"], momentum)  # type: ignore[arg-type]
    assert float(optimizer.state[victim]["skipped"]) == 3
    assert optimizer.get_optimization_info()["training_stats"]["skipped_nonfinite"] == {"twin1": 3}
    for name, p in named:
        assert p.isfinite().all(), name
        assert all(v.isfinite().all() for v in optimizer.state[p].values()), name


def test_a_bad_gradient_is_as_none() -> None:
    """The trajectory of everyone, of the parameter that was left out too, is that of a run in which it had none."""
    (named, optimizer), (other, expected) = build(**APART), build(**APART)
    for step in range(8):
        give(named, step)
        give(other, step)
        if step in (0, 4):
            dict(named)["conv2d"].grad.fill_(torch.nan)  # type: ignore[union-attr]
            dict(other)["conv2d"].grad = None
        optimizer.step()
        expected.step()
    close(named, other, 1e-6)


def test_a_bad_gradient_in_one_chunk_of_a_large_parameter() -> None:
    """The bad element lies in the last chunk; the first has been looked at long before."""
    p = nn.Parameter(torch.randn(700, 1000))
    optimizer = HinaAdaptive([p], lr=LR)
    for bad in (False, False, True):
        p.grad = torch.randn(700, 1000)
        before = p.detach().clone()
        state = {k: v.clone() for k, v in optimizer.state.get(p, {}).items()}
        if bad:
            p.grad[-1, -1] = torch.inf
        optimizer.step()
    assert torch.equal(p, before)
    for key, value in optimizer.state[p].items():
        if key.startswith(("exp_avg", "lr_mask", "last_sign", "anchor", "torque")):
            assert torch.equal(value, state[key]), key


def test_grad_scaler_skips_and_goes_on() -> None:
    """torch's GradScaler skips the whole step on an overflow, and lowers its scale."""
    model = nn.Linear(4, 3)
    optimizer = HinaAdaptive(model.named_parameters(), lr=LR, **EVERYTHING)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    for step in range(5):
        optimizer.zero_grad()
        scaler.scale(model(torch.randn(2, 4)).square().sum()).backward()
        if step == 2:
            model.weight.grad[0, 0] = torch.inf  # type: ignore[index]
        before = copy.deepcopy(model.state_dict())
        scaler.step(optimizer)
        scaler.update()
        moved = not torch.equal(before["weight"], model.weight)
        assert moved == (step in (1, 3, 4))  # the first step of ADOPT only measures
    assert scaler.get_scale() == 4.0
    assert float(optimizer.state[model.weight]["step"]) == 4 and float(optimizer.state[model.weight]["skipped"]) == 0
