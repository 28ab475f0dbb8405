"""Loss context: what raises the rate, what lowers it, what calms it, and the float64 reference."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import ClassVar

import pytest
import torch
from harness import initial_state, run_technique
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hina_optim import arguments as rule
from hina_optim.engine.optimizer import ENGINE_RULES, HinaOptimizer
from hina_optim.reference.adaptation import sketch
from hina_optim.reference.context import LossHistory, context_target
from hina_optim.techniques.ada_decay import AdaDecay
from hina_optim.techniques.adopt import Momentum
from hina_optim.techniques.base import Flow, ParamInfo
from hina_optim.techniques.kronecker import KroneckerRates
from hina_optim.techniques.loss_context import SKETCH, LossContext
from hina_optim.techniques.rank_aware_decay import RankAwareDecay
from hina_optim.techniques.role_rates import RoleRates
from hina_optim.techniques.row_scaling import RowScaling
from hina_optim.techniques.spd import SelectiveProjectionDecay
from hina_optim.techniques.spectrum import Spectrum
from tests.shards import run_sharded

DOUBLE = torch.float64
NAN = math.nan
SHAPE = (9, 20)


def draw(*shape, seed=0, dtype=DOUBLE):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def noise(count: int, seed: int = 0) -> list[float]:
    return draw(count, seed=seed).tolist()


class Run:
    """One technique over steps, on parameters ``[N, *SHAPE]``."""

    def __init__(self, technique: LossContext | None = None, dtype: torch.dtype = DOUBLE) -> None:
        self.technique, self.dtype = technique or LossContext(), dtype
        self.state: dict[str, Tensor] = {}
        self.t = 0

    def step(self, loss: float, grad: Tensor, lr: float = 1.0) -> Tensor:
        """The multipliers, ``[N]``."""
        self.t += 1
        values = {"grad": grad.to(self.dtype), "rate": torch.tensor(lr, dtype=self.dtype)}
        values, self.state = run_technique(self.technique, values, self.state, t=self.t, loss=loss)
        return values["rate"].reshape(-1)


def final(losses: Iterable[float], grads: str = "steady", technique: LossContext | None = None, **more) -> float:
    """The multiplier after these losses, with gradients that agree, that have nothing in common, or that alternate."""
    run, rate = Run(technique, **more), torch.ones(1)
    for t, loss in enumerate(losses):
        grad = draw(1, *SHAPE, seed=t if grads == "random" else 0)
        rate = run.step(loss, -grad if grads == "opposed" and t % 2 else grad)
    return rate.item()


FALLING = [2 * 0.985**t for t in range(60)]
RISING = FALLING[::-1]


def test_a_falling_loss_raises_the_rate_and_a_rising_loss_lowers_it():
    raised, lowered = final(FALLING), final(RISING)
    assert 1.3 < raised <= 4
    assert 0.6 <= lowered < 0.9
    assert 0.6 <= final([2 * 1.05**t for t in range(60)]) < 0.65
    assert final([2 * 0.97**t for t in range(60)]) > raised, "the faster the more"
    assert final(FALLING, "random") > 1.1, "gradients that have nothing in common are usual"
    assert final(FALLING, "random") < raised


def test_what_it_sees_it_does_at_once():
    run, grad = Run(LossContext(adaptation_rate=1.0)), draw(1, *SHAPE)
    steady = [run.step(loss, grad).item() for loss in FALLING]
    assert run.step(100.0, grad).item() < 1 < steady[-1]


def test_it_moves_a_share_of_the_way_in_each_step():
    losses, grad = FALLING[:40], draw(1, *SHAPE)
    free, slow = Run(LossContext(adaptation_rate=1.0)), Run(LossContext(adaptation_rate=0.25))
    expected = 1.0
    for loss in losses:
        expected += 0.25 * (free.step(loss, grad).item() - expected)
        assert slow.step(loss, grad).item() == pytest.approx(expected, rel=1e-12)


def test_noise_calms():
    quiet = final(FALLING)
    shaken = [final([x + 0.1 * e for x, e in zip(FALLING, noise(60, seed), strict=True)]) for seed in range(8)]
    assert sum(shaken) / 8 < quiet - 0.1, "less steady, less raised"
    for seed in range(4):
        assert final([2 + 2 * abs(e) ** 3 for e in noise(60, seed)]) < 1, "high variance"
        assert final(noise(60, seed)) < 1, "around zero"


def test_stationary_noise_does_not_raise_the_rate_on_average():
    run, rates = Run(), []
    for t, e in enumerate(noise(400, seed=5)):
        rates.append(run.step(2 + 0.1 * e, draw(1, *SHAPE, seed=t)).item())
    assert 0.88 < sum(rates[50:]) / 350 < 0.98
    assert max(rates) < 1.25


def test_low_consistency_calms():
    assert final(FALLING) > 1.3
    assert final(FALLING, "opposed") < 1


@pytest.mark.parametrize("level", [1.7, 1e-8, -3.0, 0.0])
def test_a_long_plateau_calms_and_a_short_one_does_not(level):
    assert final([level] * 29) == 1.0
    assert final([level] * 60) < 0.95
    assert final([level] * 60, dtype=torch.float32) < 0.95


def test_a_fast_fall_is_no_high_variance():
    fast = [10 * 0.92**t for t in range(60)]  # the standard deviation of the last 30 is most of their mean
    assert final(fast) > 1.3


@settings(max_examples=40, deadline=None)
@given(
    losses=st.lists(st.one_of(st.floats(-1e6, 1e6), st.just(NAN), st.just(math.inf)), max_size=40),
    cosine=st.floats(-1, 1),
    bounds=st.tuples(st.floats(0.01, 1), st.floats(1, 50)),
)
def test_the_multiplier_stays_within_its_bounds(losses, cosine, bounds):
    run = Run(LossContext(8, 1.0, bounds))
    run.state = {"context_cosine": torch.tensor([cosine], dtype=DOUBLE)}
    for loss in losses:
        rate = run.step(loss, torch.zeros(1, 2, 3)).item()
        assert bounds[0] <= rate <= bounds[1]


def test_a_multiplier_from_wider_bounds_is_within_these_at_once():
    run = Run(LossContext(bounds=(0.9, 1.1)))
    run.state = {"context_rate": torch.tensor([3.0, 0.2], dtype=DOUBLE)}
    assert run.step(1.0, draw(2, *SHAPE)).tolist() == [1.1, 0.9]


def test_how_far_the_target_goes():
    one = LossContext(30, 1.0)
    losses, full = torch.tensor([[1000.0 * 0.5**t for t in range(30)]], dtype=DOUBLE), torch.tensor([30.0])
    agree = torch.ones(1, dtype=DOUBLE)
    assert one._target(losses.flip(1), full, agree).item() == pytest.approx(0.6, abs=0.02)
    gentle = torch.tensor([[2 - 0.02 * t for t in range(30)]], dtype=DOUBLE)
    steep = torch.tensor([[0.95**t for t in range(30)]], dtype=DOUBLE)
    assert 2.7 < one._target(steep, full, agree).item() < 4
    assert one._target(gentle, full, agree).item() > 1.9
    assert one._target(gentle, full, -agree).item() <= 1


@pytest.mark.parametrize("scale", [1e-30, 1e-3, 1e3, 1e30])
@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE])
def test_it_is_scale_free_in_loss_and_gradient(scale, dtype):
    def rates(factor: float) -> list[float]:
        run, out = Run(dtype=dtype), []
        for t, e in enumerate(noise(50)):
            loss = (2 * 0.98**t + 0.02 * e) * factor
            out.append(run.step(loss, draw(1, *SHAPE, seed=t // 2) * factor).item())
        return out

    assert rates(scale) == pytest.approx(rates(1.0), rel=1e-3 if dtype == torch.float32 else 1e-9)


def test_negative_losses_fall_downwards():
    down = [-1 - 0.02 * t for t in range(60)]
    assert final(down) > 1.3
    assert final(down[::-1]) < 0.9


def test_without_a_loss_the_multiplier_is_one():
    run = Run()
    for t in range(40):
        grad = draw(1, *SHAPE)
        assert run.step(NAN, -grad if t % 2 else grad).item() == 1.0
    assert run.state["context_count"].item() == 0
    assert run.state["context_cosine"].item() < -0.5, "gradients are compared all the same"


@pytest.mark.parametrize("bad", [NAN, math.inf, -math.inf])
def test_a_step_without_a_finite_loss_leaves_the_history(bad):
    run, grad = Run(), draw(1, *SHAPE)
    for loss in FALLING[:35]:
        run.step(loss, grad)
    before = {k: v.clone() for k, v in run.state.items()}
    rate = run.step(bad, grad)
    for name in ("context_losses", "context_count"):
        assert torch.equal(run.state[name], before[name])
    assert rate.item() > before["context_rate"].item() > 1, "it still follows what it knows"
    assert torch.isfinite(rate).all()


def test_history_is_the_last_losses_oldest_first():
    run = Run(LossContext(4))
    for loss in (1.0, NAN, 2.0, 3.0):
        run.step(loss, draw(1, *SHAPE))
    assert run.state["context_losses"].tolist() == [[0.0, 1.0, 2.0, 3.0]]
    assert run.state["context_count"].tolist() == [3.0]
    for loss in (4.0, 5.0):
        run.step(loss, draw(1, *SHAPE))
    assert run.state["context_losses"].tolist() == [[2.0, 3.0, 4.0, 5.0]]
    assert run.state["context_count"].tolist() == [4.0]


def test_zero_gradients_have_no_direction():
    run, grad = Run(), draw(2, *SHAPE)
    run.step(1.0, grad)
    before = run.state["context_sketch"].clone()
    run.step(1.0, torch.zeros(2, *SHAPE))
    assert torch.equal(run.state["context_sketch"], before)
    assert run.state["context_cosine"].tolist() == [0.0, 0.0]
    run.step(1.0, grad * torch.tensor([1.0, -1e-8], dtype=DOUBLE)[:, None, None])
    assert run.state["context_cosine"].tolist() == pytest.approx([0.1, -0.1])


def test_the_sketch_tells_gradients_apart_that_sum_to_zero_over_their_rows():
    """The gradient of a classifier's last layer does, and without random signs nothing would be left of it."""
    run = Run()
    grads = [draw(1, 10, SKETCH, seed=i) for i in range(2)]
    grads = [g - g.mean(1, keepdim=True) for g in grads]
    for grad in (grads[0], grads[0], grads[1], grads[1]):
        run.step(1.0, grad)
    cosine = 0.81 * 0.1 + 0.1  # alike, unlike, alike
    assert run.state["context_cosine"].item() == pytest.approx(cosine, abs=0.09 * 0.4)


@settings(max_examples=15, deadline=None)
@given(
    window=st.integers(4, 12),
    seed=st.integers(0, 999),
    trend=st.sampled_from([-0.2, -0.02, 0.0, 0.05]),
    spread=st.sampled_from([0.0, 0.01, 0.5]),
    level=st.sampled_from([-5.0, 0.0, 1.0]),
)
def test_it_equals_the_reference(window, seed, trend, spread, level):
    bounds, shape = (0.5, 3.0), (5, 30)
    run = Run(LossContext(window, 0.4, bounds))
    references = [LossHistory(window, 0.4, bounds) for _ in range(2)]
    turns = draw(20, 2, seed=seed + 1) > 0.5
    for t, e in enumerate(noise(20, seed)):
        loss = NAN if t % 7 == 3 else level + trend * t + spread * e
        grad = draw(2, *shape, seed=seed) + draw(2, *shape, seed=t)
        grad = torch.where(turns[t][:, None, None], -grad, grad) * (t != 5)
        got = run.step(loss, grad)
        expected = [one.step(loss, sketch(g)) for one, g in zip(references, grad, strict=True)]
        assert got.tolist() == pytest.approx(expected, rel=1e-7)
        assert run.state["context_cosine"].tolist() == pytest.approx([r.cosine for r in references], abs=1e-12)


def test_the_target_in_float32_is_that_of_float64():
    one = LossContext()
    for seed in range(20):
        losses = [3 * 0.99**t + 0.1 * seed / 20 * e for t, e in enumerate(noise(30, seed))]
        cosine = 0.7 - seed / 20
        got = one._target(torch.tensor([losses]), torch.tensor([30.0]), torch.tensor([cosine]))
        assert got.item() == pytest.approx(context_target(losses, cosine, 30, one.bounds), rel=1e-3)


def test_it_resumes_from_its_state():
    through, first = Run(), Run()
    for t in range(50):
        loss, grad = 2 * 0.98**t + 0.01 * (t % 3), draw(2, *SHAPE, seed=t // 3)
        expected = through.step(loss, grad)
        if t == 33:
            slots = {s.name for s in first.technique.slots(ParamInfo(SHAPE))}
            assert set(first.state) == slots, "nothing is remembered elsewhere"
            resumed = Run()
            resumed.state, resumed.t = {k: v.clone() for k, v in first.state.items()}, first.t
            first = resumed
        assert torch.equal(first.step(loss, grad), expected)


def test_learning_rate_zero_stops_and_an_empty_parameter_is_left_out():
    run = Run()
    for loss in FALLING:
        assert run.step(loss, draw(1, *SHAPE), lr=0.0).item() == 0.0
    assert not LossContext().applies(ParamInfo((0, 3)))
    assert not LossContext(adaptation_rate=0.0).applies(ParamInfo((2, 3)))


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: LossContext(3), "LossContext: window=3"),
        (lambda: LossContext(30.0), "window=30.0"),
        (lambda: LossContext(30, 1.5), "adaptation_rate=1.5"),
        (lambda: LossContext(bounds=(0.0, 4.0)), "bounds"),
        (lambda: LossContext(bounds=(1.1, 4.0)), "bounds"),
        (lambda: LossContext(bounds=(0.5, 0.9)), "bounds"),
        (lambda: LossContext(bounds=(0.5, math.inf)), "bounds"),
        (lambda: LossContext(bounds=0.5), "bounds"),
    ],
)
def test_senseless_arguments_are_refused(make, text):
    with pytest.raises(ValueError, match=text):
        make()


def test_it_traces_as_one_graph_for_all_steps():
    one, info, grad = LossContext(6), ParamInfo((4, 16)), draw(2, 4, 16)
    index = torch.arange(64).reshape(1, 4, 16)
    graphs = []

    def run(grad: Tensor, state: dict[str, Tensor], loss: Tensor):
        flow = Flow({"grad": grad, "rate": grad.new_tensor(0.1), "index": index}, state, {}, {"loss": loss}, info)
        totals = {k: v.value.reshape(2, -1, v.size).sum(1) for k, v in one.sums(flow).items()}
        one.settle(flow, totals)
        return flow["rate"], flow.new

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(run, backend=backend, fullgraph=True)
    state = initial_state(one, info, grad)
    for loss in (3.0, 2.0, NAN, 2.5, math.inf, 2.0, 1.5, 1.0, 0.5):
        inputs = grad * loss if math.isfinite(loss) else -grad, state, torch.full((2,), loss, dtype=DOUBLE)
        (rate, new), (want, state) = compiled(*inputs), run(*inputs)
        torch.testing.assert_close(rate, want)
        for name, value in state.items():
            torch.testing.assert_close(new[name], value)
    assert len(graphs) == 1
    assert one.needs_index
    assert one.reads_loss


# -- in the engine, with the other techniques of rates and decay -------------------------------------------------------


class Rates(HinaOptimizer):
    """Everything that sets rates and decays, in an order in which most sums share a reduction."""

    RULES: ClassVar[dict[str, rule.Rule]] = {"lr": rule.NON_NEGATIVE, "whole": rule.FLAG, **ENGINE_RULES}

    def __init__(self, params, lr=0.05, whole=True, **engine):
        super().__init__(params, {"lr": lr, "whole": whole, **engine})
        self.steps = 0
        self.register_step_pre_hook(lambda *_: self.report())

    def report(self):
        self.report_loss(2 * 0.9**self.steps)
        self.steps += 1

    def recipe(self, group, info):
        chain = [
            Spectrum(0.9, 2, decay=True),
            KroneckerRates(0.3, 2),
            RoleRates(4.0),
            RowScaling(2.0),
            LossContext(6),
            Momentum(0.9),
            AdaDecay(0.1),
            RankAwareDecay(0.1),
            SelectiveProjectionDecay(0.5),
        ]
        return [one for one in chain if group["whole"] or not one.whole]


SHAPES = {
    "vector": (7,),
    "tall": (9, 4),
    "conv": (3, 2, 3, 3),
    "l.lora_A.weight": (2, 6),
    "l.lora_B.weight": (8, 2),
    "k.lokr_w1": (2, 3),
    "k.lokr_w2_a": (5, 2),
    "k.lokr_w2_b": (2, 6),
    "large": (40, 300),
}


def weights() -> list[tuple[str, torch.nn.Parameter]]:
    return [(name, torch.nn.Parameter(draw(*shape, seed=i))) for i, (name, shape) in enumerate(SHAPES.items())]


def gradients(step: int) -> list[Tensor]:
    return [
        draw(*shape, seed=i) + 2 * draw(*shape, seed=100 * step + i + 50) for i, shape in enumerate(SHAPES.values())
    ]


def trained(**options) -> list[torch.nn.Parameter]:
    named = weights()
    optimizer = Rates(named, **options)
    for step in range(8):
        for (_, p), g in zip(named, gradients(step), strict=True):
            p.grad = g
        optimizer.step()
    state = optimizer.state[named[-1][1]]
    assert state["context_rate"].item() != 1
    return [p.detach() for _, p in named]


@pytest.mark.parametrize("by_rows", [True, False], ids=["rows", "flat"])
def test_shards_change_nothing(by_rows):
    start = [(name, p.detach()) for name, p in weights()]
    found, _ = run_sharded(start, gradients, Rates, size=2 if by_rows else 3, steps=8, by_rows=by_rows)
    for (name, _), got, want in zip(start, found, trained(), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-11, msg=lambda m, n=name: f"{n}: {m}")


def test_chunks_change_nothing():
    whole, chunks = trained(whole=False), trained(whole=False, max_buffer_memory_mb=0.5)
    for name, got, want in zip(SHAPES, chunks, whole, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")
    assert any(not torch.equal(a, b) for a, b in zip(whole, trained(), strict=True)), "the decay by rank does something"
