"""The family of CAME, in a row: how large its steps are, and what the engine makes of it."""

from typing import ClassVar

import pytest
import torch
from harness import initial_state, run_technique
from hypothesis import given, settings
from hypothesis import strategies as st

from hina_optim.engine.optimizer import ENGINE_RULES, HinaOptimizer
from hina_optim.reference import came
from hina_optim.state.precision import Storage, codec_for
from hina_optim.techniques.base import Flow, ParamInfo
from hina_optim.techniques.confidence import Confidence
from hina_optim.techniques.multi_scale import MultiScaleMomentum
from hina_optim.techniques.tam import TorqueAwareMomentum
from tests.came_cases import CONV2D, KINDS, TALL, WIDE, directions, draw, recipe, stream
from tests.shards import run_sharded

# -- confidence -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("betas", [(0.8, 0.99, 0.999), (0.9, 0.999, 0.9999), (0.4, 0.99, 0.999), (0.0, 0.9, 0.99)])
@pytest.mark.parametrize("kind", KINDS)
def test_the_mean_step_is_at_most_twice_the_rate(kind, betas):
    for t, (values, _) in enumerate(directions(recipe(betas), stream(kind, 100)), 1):
        mean = values["update"].abs().mean((1, 2))
        assert (mean <= 2.0 + 1e-5).all(), t
        if kind in ("noise", "drift", "tiny", "huge"):
            assert (mean > 0.05).all(), t


@pytest.mark.parametrize("kind", ["noise", "drift", "constant", "sparse rows"])
@pytest.mark.parametrize("shape", [(60, 4), (4, 60), (8, 4, 3, 3)], ids=str)
def test_the_mean_step_is_bounded_for_every_shape_with_everything_on(shape, kind):
    chain = [TorqueAwareMomentum(0.9), *recipe(long_beta=0.99, scales=(1, 5, 20, 100))]
    chain.insert(4, chain.pop(0))  # damping where it belongs, beside the clip
    for values, _ in directions(chain, stream(kind, 100, (1, *shape))):
        assert values["update"].abs().mean() <= 2.0 + 1e-5


@settings(max_examples=30, deadline=None)
@given(
    beta1=st.floats(0, 0.99),
    beta3=st.floats(0, 0.9999),
    seed=st.integers(0, 10**6),
    spread=st.floats(0, 4),
    drift=st.floats(0, 100),
)
def test_no_gradients_break_the_bound(beta1, beta3, seed, spread, drift):
    shape = (1, 5, 6)
    size = 10.0 ** (spread * draw(*shape, seed=seed).clamp(-3, 3))
    mean = drift * draw(*shape, seed=seed + 1)
    gradients = [size * (mean + draw(*shape, seed=seed + 2 + t)) for t in range(12)]
    for values, _ in directions(recipe((beta1, 0.99, beta3)), gradients):
        assert values["update"].abs().mean() <= 2.0 + 1e-4


@pytest.mark.parametrize("beta1", [0.8, 0.9])
@pytest.mark.parametrize("kind", ["noise", "drift", "alternating"])
def test_ordinary_steps_are_the_papers_own(kind, beta1):
    reference = came.Came((beta1, 0.99, 0.999), limit=None)
    gradients = list(stream(kind, 40, (1, 12, 10), torch.float64))
    for t, (values, _) in enumerate(directions(recipe((beta1, 0.99, 0.999)), gradients)):
        torch.testing.assert_close(values["update"][0], reference(gradients[t][0]), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(("beta1", "least"), [(0.9, 3.5), (0.8, 5.0), (0.0, 1e7)])
def test_what_the_bound_is_for(beta1, least):
    """The paper's own formula with a constant gradient: the step grows, or is enormous from the first."""
    reference = came.Came((beta1, 0.99, 0.999), limit=None)
    gradient = draw(6, 5, dtype=torch.float64)
    for _ in range(100):
        step = reference(gradient)
    assert step.abs().mean() > least
    *_, (values, _) = directions(recipe((beta1, 0.99, 0.999)), [gradient[None]] * 100)
    assert 1 < values["update"].abs().mean() <= 2
    torch.testing.assert_close(values["update"].square().mean(), torch.tensor(4.0, dtype=torch.float64))


def test_rows_that_keep_their_direction_step_further():
    steady = draw(1, 16, 24, seed=3)
    steady[:, 8:] = 0
    gradients = [steady + noise for noise in stream("noise", 60, (1, 16, 24))]
    *_, (values, state) = directions(recipe(), gradients)
    confident = values["update"].abs() / state["exp_avg"].abs()
    assert confident[:, :8].mean() > 1.3 * confident[:, 8:].mean()


def test_confidence_measures_from_the_new_moment_without_damping():
    x, m, update = draw(1, 4, 5), draw(1, 4, 5, seed=1), draw(1, 4, 5, seed=2)
    one, info = Confidence(0.9, 1e-16), ParamInfo((4, 5))
    values = {"grad": x, "incoming": x, "update": update, "clip": torch.full((1, 1, 1), 0.5)}
    values["damping"] = torch.full((1, 1, 1), 0.1)
    flow = Flow(values, initial_state(one, info, x), {"exp_avg": m}, {}, info)
    torch.testing.assert_close(one.sums(flow)["rows"].value, (0.5 * x - m).square())


# -- several scales ---------------------------------------------------------------------------------------------------


def test_every_scale_moves_in_its_own_steps_only():
    technique, state = MultiScaleMomentum((1, 3, 4), 0.5), {}
    assert [s.name for s in technique.slots(ParamInfo((3,)))] == ["momentum_3", "momentum_4"]
    for t in range(1, 14):
        before = {k: v.clone() for k, v in state.items()}
        _, state = run_technique(technique, {"grad": draw(2, 3, seed=t)}, state, t=t)
        for k in (3, 4):
            old = before.get(f"momentum_{k}", torch.zeros(2, 3))
            assert torch.equal(state[f"momentum_{k}"], old) == (t % k != 0), (t, k)


@pytest.mark.parametrize("state_precision", ["bf16", "8bit"])
def test_a_mean_that_waits_does_not_fade(state_precision):
    (slot,) = MultiScaleMomentum((1, 100)).slots(ParamInfo((8, 512)))
    codec = codec_for(slot, Storage(state_precision), torch.float32, (8, 512))
    assert codec.noisy
    noise = [torch.randint(2**16, (1, 8, 512), dtype=torch.int32) for _ in range(100)]
    once = again = codec.decode(codec.encode(draw(1, 8, 512).abs().neg(), noise[0]))
    for bits in noise[1:]:
        again = codec.decode(codec.encode(again, bits))
    # to the bit in 16 bits; in 8, a product of scale and level may miss its last bit, and round up once in a while
    assert (again - once).norm() <= (0 if state_precision == "bf16" else 1e-3) * once.norm()


def test_a_constant_gradient_passes_through_all_scales_unchanged():
    grad = draw(2, 4, 5)
    for values, _ in directions([MultiScaleMomentum((1, 5, 20, 100), 0.9)], [grad] * 120):
        torch.testing.assert_close(values["incoming"], grad, rtol=1e-5, atol=1e-6)


def test_the_first_step_is_the_gradients():
    grad = draw(2, 4, 5)
    values, _ = run_technique(MultiScaleMomentum(), {"grad": grad})
    assert torch.equal(values["incoming"], grad)


@pytest.mark.parametrize("betas", [(0.8, 0.99, 0.999), (0.9, 0.999, 0.9999)])
@pytest.mark.parametrize("kind", ["noise", "drift", "constant", "sparse rows", "heavy tails", "huge"])
def test_the_mean_step_of_several_scales_is_within_a_factor_of_two_of_one(kind, betas):
    several = directions(recipe(betas, scales=(1, 5, 20, 100), scale_beta=betas[0]), stream(kind, 150))
    for t, ((a, _), (b, _)) in enumerate(zip(several, directions(recipe(betas), stream(kind, 150)), strict=True), 1):
        ratio = a["update"].abs().mean() / b["update"].abs().mean()
        assert 0.5 <= ratio <= 2, t


# -- on the engine ----------------------------------------------------------------------------------------------------


class CameOptimizer(HinaOptimizer):
    """The recipe with everything, on the engine."""

    RULES: ClassVar = dict(ENGINE_RULES)
    OPTIONS: ClassVar = {"decay": 0.99, "long_beta": 0.99, "scales": (1, 2, 5)}

    def __init__(self, params, lr=0.01, **engine):
        super().__init__(params, {"lr": lr, **engine})

    def recipe(self, group, info):
        return recipe(**self.OPTIONS)


def test_the_engine_makes_the_same_of_it():
    shapes = [TALL, WIDE, TALL, CONV2D, (7,), (), (0, 3)]
    params = [torch.nn.Parameter(draw(*shape, seed=i, dtype=torch.float64)) for i, shape in enumerate(shapes)]
    want = [p.detach().clone() for p in params]
    references = [came.Came(**CameOptimizer.OPTIONS) for _ in params]
    optimizer = CameOptimizer(params)
    for t in range(7):
        for i, (p, reference) in enumerate(zip(params, references, strict=True)):
            p.grad = draw(*p.shape, seed=100 * t + i, dtype=torch.float64)
            want[i] = want[i] - 0.01 * reference(p.grad)
        optimizer.step()
    torch.testing.assert_close([p.detach() for p in params], want, rtol=1e-9, atol=1e-12)


def large(seed):
    # more than one chunk; neither dimension a round number
    return [draw(301, 517, seed=seed), draw(7, 5, seed=seed + 1), draw(11, seed=seed + 2)]


def test_a_matrix_in_chunks_is_the_matrix_at_once():
    params = [torch.nn.Parameter(x) for x in large(0)]
    optimizer, state, want = CameOptimizer(params), {}, params[0].detach().clone()
    for t in range(1, 4):
        for p, g in zip(params, large(10 * t), strict=True):
            p.grad = g
        optimizer.step()
        values, state = run_technique(recipe(**CameOptimizer.OPTIONS), {"grad": params[0].grad[None]}, state, t=t)
        want = want - 0.01 * values["update"][0]
    torch.testing.assert_close(params[0].detach(), want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("by_rows", [True, False])
@pytest.mark.parametrize("size", [2, 3])
def test_shards_change_nothing(size, by_rows):
    full = [(str(i), x) for i, x in enumerate(large(0))]
    params = [torch.nn.Parameter(x.clone()) for _, x in full]
    optimizer = CameOptimizer(params)
    for t in range(3):
        for p, g in zip(params, large(10 + 10 * t), strict=True):
            p.grad = g
        optimizer.step()
    joined, _ = run_sharded(full, lambda t: large(10 + 10 * t), CameOptimizer, size=size, steps=3, by_rows=by_rows)
    torch.testing.assert_close(joined, [p.detach() for p in params], rtol=1e-5, atol=1e-6)
