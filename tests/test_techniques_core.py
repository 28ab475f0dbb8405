"""The core techniques: the properties that each one promises, one at a time and against torch.optim."""

import itertools
import math

import pytest
import torch
from harness import run_technique
from hypothesis import given, settings
from hypothesis import strategies as st

from hina_optim.reference import core
from hina_optim.techniques.adam import AdamMoments
from hina_optim.techniques.adopt import AdoptNormalization, Momentum
from hina_optim.techniques.agr import AdaptiveGradientRegularization
from hina_optim.techniques.base import Flow, ParamInfo
from hina_optim.techniques.cautious import Cautious
from hina_optim.techniques.grams import Grams
from hina_optim.techniques.lr_mask import LearningRateMask
from hina_optim.techniques.orthogonal import OrthogonalGradient
from hina_optim.techniques.spd import SelectiveProjectionDecay
from hina_optim.techniques.tam import TorqueAwareMomentum
from hina_optim.techniques.weight_decay import DecoupledWeightDecay

SHAPES = [(), (1,), (7,), (0,), (0, 3), (1, 5), (6, 2), (4, 4), (2, 3, 3), (3, 2, 2, 2)]


def draw(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def norm(x):
    return x.flatten(1).norm(dim=1)


def written(values, anchor):
    """What the engine makes of the values of a flow."""
    param = values["param"]
    moved = param - values["rate"] * values.get("scale", 1) * values["update"] - values.get("decay", 0) * param
    return moved - values.get("pull", 0) * (moved - anchor)


class Training:
    """Weights ``[N, *shape]``, a recipe, and its state over steps."""

    def __init__(self, chain, param, lr, start_lr=None):
        self.chain, self.param, self.lr = chain, param, lr
        self.start_lr = lr if start_lr is None else start_lr
        self.anchor, self.state, self.t = param.clone(), {}, 0

    def step(self, grad, lr=None):
        self.t += 1
        lr = torch.tensor(self.lr if lr is None else lr, dtype=grad.dtype)
        values = {"grad": grad, "param": self.param, "lr": lr, "rate": lr}
        values, self.state = run_technique(self.chain, values, self.state, t=self.t, start_lr=self.start_lr)
        self.param = written(values, self.anchor)
        return values


# -- gradient ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [1e-8, 1e-3, 1.0, 1e3])
def test_agr_is_scale_free_and_never_flips_or_amplifies(scale):
    grad = draw(3, 8, 5)
    out = run_technique(AdaptiveGradientRegularization(), {"grad": grad * scale})[0]["grad"]
    plain = run_technique(AdaptiveGradientRegularization(), {"grad": grad})[0]["grad"]
    torch.testing.assert_close(out / scale, plain)
    assert (out.abs() <= grad.abs() * scale).all()
    assert (out.sign() == grad.sign()).all()
    assert (out.abs() < grad.abs() * scale * (1 - 1e-4)).any(), "nothing was damped"


def test_agr_leaves_zero_gradients_and_single_elements_alone():
    assert run_technique(AdaptiveGradientRegularization(), {"grad": torch.zeros(2, 4)})[0]["grad"].eq(0).all()
    for shape in [(2,), (2, 1), (2, 1, 1)]:
        grad = draw(*shape)
        assert run_technique(AdaptiveGradientRegularization(), {"grad": grad})[0]["grad"].equal(grad)


@settings(max_examples=30, deadline=None)
@given(exponent=st.integers(-12, 12), shape=st.sampled_from([(3,), (4, 5), (2, 3, 3)]), seed=st.integers(0, 99))
def test_orthogonal_removes_the_weights_direction_and_keeps_the_norm(exponent, shape, seed):
    grad, param = draw(2, *shape, seed=seed) * 10.0**exponent, draw(2, *shape, seed=seed + 100)
    out = run_technique(OrthogonalGradient(), {"grad": grad, "param": param})[0]["grad"]
    rest = core.orthogonal(grad[0], param[0])
    torch.testing.assert_close(norm(out), norm(grad), rtol=1e-3, atol=0)
    cosine = (out * param).flatten(1).sum(1) / norm(out) / norm(param)
    assert cosine.abs().max() < 1e-3
    torch.testing.assert_close(out[0].double(), rest, rtol=1e-3, atol=1e-3 * float(grad.abs().max()))


@pytest.mark.parametrize("case", ["zero weights", "parallel", "zero gradient", "too small", "one element"])
def test_orthogonal_is_skipped_where_it_means_nothing(case):
    grad, param = draw(2, 4, 3), draw(2, 4, 3, seed=1)
    if case == "zero weights":
        param = torch.zeros_like(param)
    elif case == "parallel":
        grad = -3 * param
    elif case == "zero gradient":
        grad = torch.zeros_like(grad)
    elif case == "too small":
        grad = grad * 1e-30
    else:
        grad, param = grad[:, :1, :1], param[:, :1, :1]
    assert run_technique(OrthogonalGradient(), {"grad": grad, "param": param})[0]["grad"].equal(grad)


# -- moments ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("weight_decay", "amsgrad"), [(0.0, False), (0.1, False), (0.1, True)])
def test_adam_with_decay_is_torch_adamw(weight_decay, amsgrad):
    param = draw(2, 6, 4)
    ours = Training([AdamMoments((0.9, 0.999), 1e-8, amsgrad), DecoupledWeightDecay(weight_decay)], param.clone(), 1e-2)
    theirs = param.clone().requires_grad_()
    optimizer = torch.optim.AdamW([theirs], lr=1e-2, weight_decay=weight_decay, amsgrad=amsgrad, foreach=False)
    for i in range(50):
        grad = draw(2, 6, 4, seed=i + 1) * 10.0 ** (i % 5 - 3)
        ours.step(grad)
        theirs.grad = grad
        optimizer.step()
    torch.testing.assert_close(ours.param, theirs.detach(), rtol=1e-5, atol=1e-6)
    assert (ours.param - param).abs().min() > 1e-4, "nothing was trained"


def test_adam_bias_correction_is_exact_at_the_first_step():
    grad = draw(1, 1000) * 1e-3
    values, _ = run_technique(AdamMoments((0.9, 0.9999), 1e-30), {"grad": grad})
    torch.testing.assert_close(values["update"], grad.sign(), rtol=1e-6, atol=0)


def test_adopt_moves_nothing_at_the_first_step_and_divides_by_the_past():
    chain = [AdoptNormalization(0.9, 1e-8), Momentum(0.8), DecoupledWeightDecay(0.1)]
    run = Training(chain, draw(2, 3, dtype=torch.float64), 1e-2)
    first, second, third = (draw(2, 3, seed=s, dtype=torch.float64) for s in (1, 2, 3))
    start = run.param.clone()
    run.step(first)
    assert run.param.equal(start)
    assert run.state["exp_avg"].eq(0).all()
    assert run.state["exp_avg_sq"].equal(first * first)

    values = run.step(second)
    torch.testing.assert_close(values["incoming"], (second / first.abs()).clamp(-1, 1))
    torch.testing.assert_close(run.state["exp_avg"], 0.2 * values["incoming"])
    torch.testing.assert_close(run.param, start - 1e-2 * run.state["exp_avg"] - 1e-3 * start)

    v = 0.9 * first**2 + 0.1 * second**2
    torch.testing.assert_close(run.state["exp_avg_sq"], v)
    values = run.step(third)
    torch.testing.assert_close(values["incoming"], (third / v.sqrt()).clamp(-(2**0.25), 2**0.25))


def test_adopt_bounds_elements_whose_first_gradient_was_zero():
    run = Training([AdoptNormalization(0.999, 1e-8), Momentum(0.9)], torch.zeros(1, 3), 1e-3)
    run.step(torch.zeros(1, 3))
    values = run.step(torch.tensor([[5.0, -1e-3, 0.0]]))
    assert values["incoming"].equal(torch.tensor([[1.0, -1.0, 0.0]]))


def test_adopt_converges_where_adam_does_not():
    # The problem of arXiv 2411.02853: minimize x over [-1, 1], from gradients k² with probability 1/k, else -k, which
    # are 1 on average. 32 independent runs.
    k, beta2 = 7, 0.5
    ends = []
    for chain in ([AdamMoments((0.9, beta2), 1e-8)], [AdoptNormalization(beta2, 1e-8), Momentum(0.9)]):
        generator = torch.Generator().manual_seed(0)
        run = Training(chain, torch.zeros(1, 32), 0.05)
        for t in range(5000):
            rare = torch.rand(1, 32, generator=generator) < 1 / k
            run.step(torch.where(rare, float(k * k), -float(k)), lr=0.05 / math.sqrt(1 + 0.01 * t))
            run.param = run.param.clamp(-1, 1)
        ends.append(run.param)
    adam, adopt = ends
    assert adam.min() > 0.2, "Adam was expected to go the wrong way"
    assert adopt.max() < 0
    assert adopt.mean() < -0.75


@pytest.mark.parametrize(("factor", "limit"), [(1.0, 1.0), (-1.0, 0.0)])
def test_tam_goes_to_one_for_aligned_and_to_zero_for_opposed_gradients(factor, limit):
    state = {"exp_avg": draw(2, 5, 3)}
    dampings = []
    for _ in range(80):
        values, state = run_technique(TorqueAwareMomentum(0.9), {"grad": factor * 7 * state["exp_avg"]}, state)
        dampings.append(values["damping"])
        assert values["damping"].shape == (2, 1, 1)
    assert (dampings[0] - 0.5).abs().max() == pytest.approx(0.05, abs=1e-6)
    torch.testing.assert_close(dampings[-1], torch.full((2, 1, 1), limit), rtol=0, atol=1e-3)
    assert (dampings[-1] > 0).all()


def test_tam_compares_with_the_momentum_before_this_gradient():
    chain = [TorqueAwareMomentum(0.0), Momentum(0.0)]  # the momentum becomes the damped gradient
    first, second = draw(1, 6), draw(1, 6, seed=1)
    _, state = run_technique(chain, {"grad": first})
    assert state["torque"].item() == 0.0, "there is no momentum before the first gradient"
    _, state = run_technique(chain, {"grad": second}, state)
    torch.testing.assert_close(state["torque"], torch.cosine_similarity(first, second))


def test_tam_counts_a_zero_gradient_as_unrelated():
    values, state = run_technique(TorqueAwareMomentum(0.9), {"grad": torch.zeros(2, 3)}, {"exp_avg": draw(2, 3)})
    assert state["torque"].eq(0).all()
    torch.testing.assert_close(values["damping"], torch.full((2, 1), 0.5))


def test_damping_enters_the_first_moment_only():
    grad, damping = draw(2, 4), torch.tensor([[0.25], [1.0]])
    for technique in (AdamMoments((0.9, 0.99), 1e-8), Momentum(0.9)):
        _, plain = run_technique(technique, {"grad": grad})
        _, damped = run_technique(technique, {"grad": grad, "damping": damping})
        torch.testing.assert_close(damped["exp_avg"], damping * plain["exp_avg"])
        if "exp_avg_sq" in plain:
            assert damped["exp_avg_sq"].equal(plain["exp_avg_sq"])


# -- update -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [1.0, 1e-35])
def test_cautious_masks_and_keeps_the_mean_step(scale):
    update, grad = draw(3, 4, 5), draw(3, 4, 5, seed=1)
    values, _ = run_technique(Cautious(), {"grad": grad * scale, "update": update * scale})
    out = values["update"] * values["scale"] / scale
    agree = update.sign() == grad.sign()
    assert out[~agree].eq(0).all()
    count = agree.flatten(1).sum(1).reshape(3, 1, 1)
    torch.testing.assert_close(out, update * agree * 20 / count)


def test_cautious_multiplies_a_scale_that_is_there_and_bounds_its_own():
    grad, update = torch.ones(1, 5000), -torch.ones(1, 5000)
    update[0, 0] = 1
    values, _ = run_technique(Cautious(), {"grad": grad, "update": update, "scale": torch.tensor([[0.5]])})
    assert values["scale"].item() == pytest.approx(500)
    assert values["update"].sum() == 1


def test_grams_takes_magnitude_from_the_update_and_sign_from_the_gradient():
    update, grad = draw(2, 7), draw(2, 7, seed=1)
    grad[0, 0] = 0
    out = run_technique(Grams(), {"grad": grad, "update": update})[0]["update"]
    assert out.equal(update.abs() * grad.sign())
    assert out[0, 0] == 0


# -- rates ------------------------------------------------------------------------------------------------------------


def mask(start=1e-4, warmup=100, **other):
    return LearningRateMask(start, 1e-7, 1e-3, 3e-6, warmup, **other)


def test_lr_mask_starts_at_the_learning_rate_of_the_group():
    values, state = run_technique(mask(), {"grad": draw(1, 9), "lr": torch.tensor(1e-4)}, start_lr=1e-4)
    torch.testing.assert_close(values["rate"], torch.full((1, 9), 1e-4), rtol=1e-6, atol=0)
    assert state["last_sign"].equal(draw(1, 9).sign())


def test_lr_mask_halving_the_learning_rate_halves_the_rate_once():
    update = torch.ones(1, 4)
    run = Training([mask()], torch.zeros(1, 4), 1e-4)
    rates = []
    for i in range(12):
        values, run.state = run_technique(
            run.chain,
            {"grad": draw(1, 4, seed=i), "update": update, "lr": torch.tensor(1e-4 if i < 4 else 5e-5)},
            run.state,
            t=100 + i,  # frozen
            start_lr=1e-4,
        )
        rates.append(values["rate"])
    for before in rates[:4]:
        torch.testing.assert_close(before, torch.full((1, 4), 1e-4), rtol=1e-6, atol=0)
    for after in rates[4:]:
        torch.testing.assert_close(after, torch.full((1, 4), 5e-5), rtol=1e-6, atol=0)


def test_lr_mask_composes_with_what_others_made_of_the_rate_and_stops_at_zero():
    state = {"lr_mask": torch.tensor([[1e-4, 3e-4]])}
    grad = torch.ones(1, 2)
    rate = torch.tensor(5e-5) * torch.tensor([[1.5]])
    values, _ = run_technique(mask(), {"grad": grad, "lr": torch.tensor(5e-5), "rate": rate}, state, t=200)
    torch.testing.assert_close(values["rate"], torch.tensor([[7.5e-5, 2.25e-4]]), rtol=1e-6, atol=0)
    values, _ = run_technique(mask(), {"grad": grad, "lr": torch.tensor(0.0)}, state, t=200)
    assert values["rate"].eq(0).all()


def test_lr_mask_bumps_by_the_agreement_of_signs():
    # last sign, gradient → change in units of the bump
    last = torch.tensor([[1.0, 1.0, -1.0, -1.0, 0.0, 1.0]])
    grad = torch.tensor([[2.0, -3.0, -1e-9, 4.0, 5.0, 0.0]])
    state = {"lr_mask": torch.full((1, 6), 1e-4), "last_sign": last}
    for t, rise in ((2, 2.0), (49, 2.0), (50, 1.0), (99, 1.0), (100, 0.0)):
        scale = torch.full((1, 6), 0.5)
        values = {"grad": grad, "bump_scale": scale}
        _, new = run_technique(mask(d_coef=2.0), values, state, t=t, start_lr=1e-4)
        fall = float(t < 100)
        change = torch.tensor([[rise, -fall, rise, -fall, 0, 0]])
        torch.testing.assert_close(new["lr_mask"], 1e-4 + 1.5e-6 * change, rtol=1e-6, atol=0)
        if t < 100:
            assert new["last_sign"].equal(torch.tensor([[1.0, -1.0, -1.0, 1.0, 1.0, 1.0]]))
        else:
            assert new["last_sign"].equal(last), "frozen"


def test_lr_mask_stays_within_its_bounds():
    run = Training([LearningRateMask(1e-5, 4e-6, 1.5e-5, 3e-6, 100)], torch.zeros(1, 2), 1e-5)
    for i in range(6):
        values = {"grad": torch.tensor([[1.0, (-1.0) ** i]]), "update": torch.zeros(1, 2)}
        _, run.state = run_technique(run.chain, values, run.state, t=i + 1, start_lr=1e-5)
    torch.testing.assert_close(run.state["lr_mask"], torch.tensor([[1.5e-5, 4e-6]]), rtol=1e-6, atol=0)


@pytest.mark.parametrize(("lr", "word"), [(2e-3, "max_lr"), (1e-8, "min_lr"), (0.0, "min_lr")])
def test_lr_mask_rejects_a_learning_rate_outside_of_its_bounds(lr, word):
    with pytest.raises(ValueError, match=rf"lr={lr}.*{word}=.*(Raise|Lower) {word}"):
        mask(lr)


# -- decay ------------------------------------------------------------------------------------------------------------


def strength(technique, t):
    return technique.scalars(torch.tensor([float(t)], dtype=torch.float64))["strength"].item()


def test_weight_decay_schedule_is_continuous_and_reaches_its_floor():
    technique = DecoupledWeightDecay(0.1, 1000, 0.7, 0.1)
    values = [strength(technique, t) for t in range(1, 9000)]
    assert values[:1000] == [0.1] * 1000
    assert strength(technique, 2000) == pytest.approx(0.07)
    assert values[-1] == pytest.approx(0.01)
    steps = [b - a for a, b in itertools.pairwise(values)]
    assert max(steps) <= 0
    assert min(steps) > -1e-4, "a jump"
    assert values[8000:] == [values[-1]] * len(values[8000:])


def test_weight_decay_follows_the_learning_rate_and_is_left_out_at_zero():
    values = {"grad": draw(2, 3), "lr": torch.tensor(0.5), "rate": torch.tensor(7.0)}
    values, _ = run_technique(DecoupledWeightDecay(0.1), values, t=5000)
    torch.testing.assert_close(values["decay"], torch.full((2, 1), 0.05))
    values, _ = run_technique(DecoupledWeightDecay(0.1), {"grad": draw(2, 3), "lr": torch.tensor(0.0)})
    assert values["decay"].eq(0).all()
    assert not DecoupledWeightDecay(0.0).applies(ParamInfo((3,)))


def pull(param, anchor, grad, update, *, rate=0.1, decay=None, strength=0.5):
    values = {"grad": grad, "param": param, "update": update, "lr": torch.tensor(rate), "rate": torch.tensor(rate)}
    if decay is not None:
        values["decay"] = torch.tensor(decay)
    return run_technique(SelectiveProjectionDecay(strength), values, {"anchor": anchor})[0]["pull"]


def test_spd_acts_only_when_moving_away_against_the_gradient():
    anchor = torch.zeros(1, 4)
    param = torch.ones(1, 4)
    out, home = -torch.ones(1, 4), torch.ones(1, 4)  # the update is subtracted
    assert pull(param, anchor, grad=home, update=out).item() == pytest.approx(0.5 * (2.2 - 2) / 2.2)
    assert pull(param, anchor, grad=home, update=home) == 0, "moves nearer"
    assert pull(param, anchor, grad=out, update=out) == 0, "the gradient asks for it"
    assert pull(anchor, anchor, grad=home, update=out) == 0, "at the anchor"
    assert pull(param, anchor, grad=home, update=out, rate=0.0, decay=0.0) == 0, "no learning rate"
    assert pull(param, anchor, grad=home, update=out, strength=1e9) == 1, "never beyond the anchor"
    assert pull(param, anchor, grad=home, update=10 * home) == 0, "lands on the anchor"


@pytest.mark.parametrize("step", [1e-6, 1e-2, 1.0])
def test_spd_from_sums_is_spd_by_definition(step):
    param, anchor = draw(2, 5, 3, dtype=torch.float64), draw(2, 5, 3, seed=1, dtype=torch.float64)
    grad = param - anchor + 0.1 * draw(2, 5, 3, seed=2, dtype=torch.float64)
    update = -grad
    values = {"grad": grad, "param": param, "update": update, "rate": torch.tensor(step, dtype=torch.float64)}
    values |= {"scale": torch.full((2, 1, 1), 1.7, dtype=torch.float64)}
    values |= {"decay": torch.tensor(0.2 * step, dtype=torch.float64)}
    out, _ = run_technique(SelectiveProjectionDecay(0.3), values, {"anchor": anchor})
    assert (out["pull"] > 0).all()
    for i in range(2):
        rate = torch.full_like(param[i], 1.7 * step)
        moved = core.apply_step(param[i], update[i], rate, 0.2 * step)
        expected = core.selective_projection_decay(moved, param[i], anchor[i], grad[i], 0.3)
        torch.testing.assert_close(written(out, anchor)[i], expected, rtol=1e-12, atol=1e-13)
    # In float32 a small step far from the anchor must not drown in the norms: the pull keeps its digits.
    single, _ = run_technique(
        SelectiveProjectionDecay(0.3), {k: v.float() for k, v in values.items()}, {"anchor": anchor.float()}
    )
    torch.testing.assert_close(single["pull"].double(), out["pull"], rtol=1e-4, atol=0)


def test_spd_with_a_zero_anchor_that_broadcasts():
    param, grad, update = draw(2, 5, 3), draw(2, 5, 3), -draw(2, 5, 3)
    assert pull(param, torch.zeros(2, 1, 1), grad, update).equal(pull(param, torch.zeros(2, 5, 3), grad, update))


# -- all --------------------------------------------------------------------------------------------------------------


def everything():
    return [
        AdaptiveGradientRegularization(),
        OrthogonalGradient(),
        AdoptNormalization(0.999, 1e-8),
        TorqueAwareMomentum(0.9),
        Momentum(0.9),
        Cautious(),
        mask(1e-3, warmup=6),
        DecoupledWeightDecay(0.1, 2),
        SelectiveProjectionDecay(0.06),
    ]


@pytest.mark.parametrize("shape", SHAPES)
def test_a_batch_is_its_members_one_by_one(shape):
    runs = [Training(everything(), draw(3, *shape), 1e-3)]
    runs += [Training(everything(), draw(3, *shape)[i : i + 1], 1e-3) for i in range(3)]
    for t in range(8):
        grad = draw(3, *shape, seed=t + 1) * torch.tensor([1.0, 1e-3, 1e3]).reshape(3, *[1] * len(shape))
        runs[0].step(grad)
        for i in range(3):
            runs[i + 1].step(grad[i : i + 1])
    alone = torch.cat([r.param for r in runs[1:]])
    torch.testing.assert_close(runs[0].param, alone, rtol=1e-6, atol=1e-7)
    assert torch.isfinite(alone).all()


@pytest.mark.parametrize("moments", ["adopt", "adam"])
def test_zero_gradients_and_learning_rate_zero_change_no_weight(moments):
    chain = everything()
    if moments == "adam":
        chain[2:5] = [TorqueAwareMomentum(0.9), AdamMoments((0.9, 0.999), 1e-8)]
    param = draw(2, 4, 3)
    run = Training(chain, param.clone(), 1e-3)
    for t in range(4):
        values = run.step(draw(2, 4, 3, seed=t), lr=0.0)
        assert run.param.equal(param)
        assert all(torch.isfinite(v).all() for v in values.values())
    quiet = Training([c for c in chain if not isinstance(c, DecoupledWeightDecay)], param.clone(), 1e-3)
    for _ in range(4):
        quiet.step(torch.zeros(2, 4, 3))
        assert quiet.param.equal(param)


@pytest.mark.parametrize("technique", [*everything(), AdamMoments((0.9, 0.999), 1e-8), Grams()], ids=lambda t: t.name)
def test_traces_as_one_graph_for_all_steps(technique):
    info = ParamInfo((4, 3))
    grad, param, update = draw(2, 4, 3), draw(2, 4, 3, seed=1), draw(2, 4, 3, seed=2)
    state = {"exp_avg": draw(2, 4, 3, seed=3), "exp_avg_sq": draw(2, 4, 3, seed=4).abs(), "torque": draw(2)}
    state |= {"anchor": torch.zeros(2, 1, 1), "lr_mask": torch.full((2, 4, 3), 1e-3), "last_sign": grad.sign()}
    lr = torch.tensor(1e-3)

    def run(grad, param, update, state, scalars, lr):
        values = {"grad": grad, "param": param, "update": update, "lr": lr, "rate": lr, "scale": lr + 1}
        flow = Flow(values, state, {}, scalars, info)
        technique.transform(flow)
        totals = {k: v.flatten(1).sum(1).reshape(-1, 1, 1) for k, v in technique.sums(flow).items()}
        technique.settle(flow, totals)
        return flow.values, flow.new

    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(run, backend=backend, fullgraph=True)
    for t in (1.0, 5.0):
        steps = torch.full((2,), t, dtype=torch.float64)
        scalars = {f"{technique.name}.{k}": v.float() for k, v in technique.scalars(steps).items()}
        expected = run(grad, param, update, state, scalars, lr)
        torch.testing.assert_close(compiled(grad, param, update, state, scalars, lr), expected)
    assert len(graphs) == 1, "time alone must not compile again"


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: AdamMoments((0.9, 1.0), 1e-8), "AdamMoments: betas"),
        (lambda: AdamMoments((0.9, 0.99), 0.0), "AdamMoments: eps"),
        (lambda: AdoptNormalization(-0.1, 1e-8), "AdoptNormalization: beta2"),
        (lambda: AdoptNormalization(0.9, float("nan")), "AdoptNormalization: eps"),
        (lambda: Momentum(1.0), "Momentum: beta1"),
        (lambda: TorqueAwareMomentum(1.5), "TorqueAwareMomentum: beta"),
        (lambda: LearningRateMask(1e-4, 0.0, 1e-3, 0.0, 1), "LearningRateMask: min_lr"),
        (lambda: LearningRateMask(1e-4, 1e-7, 1e-3, -1.0, 1), "LearningRateMask: lr_bump"),
        (lambda: LearningRateMask(1e-4, 1e-7, 1e-3, 0.0, 1.5), "LearningRateMask: warmup_steps"),
        (lambda: DecoupledWeightDecay(-1.0), "DecoupledWeightDecay: weight_decay"),
        (lambda: DecoupledWeightDecay(0.1, 0), "DecoupledWeightDecay: transition_steps"),
        (lambda: DecoupledWeightDecay(0.1, 10, 1.5), "DecoupledWeightDecay: decay_factor"),
        (lambda: SelectiveProjectionDecay(float("inf")), "SelectiveProjectionDecay: spd_lambda"),
    ],
)
def test_senseless_values_are_named(build, words):
    with pytest.raises(ValueError, match=f"{words}=.* is not valid"):
        build()
