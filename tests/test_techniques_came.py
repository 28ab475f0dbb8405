"""The family of CAME, each technique: its float64 reference, its state, and what it must leave alone."""

import math

import pytest
import torch
from harness import initial_state, run_technique, total

from hina_optim.engine.plan import check_recipe, plan_segments
from hina_optim.reference import came, core
from hina_optim.techniques.adopt import Momentum
from hina_optim.techniques.base import Flow, ParamInfo
from hina_optim.techniques.cautious import Cautious
from hina_optim.techniques.confidence import Confidence
from hina_optim.techniques.dual_momentum import DualMomentum
from hina_optim.techniques.factored import FactoredNormalization, UnfactoredNormalization
from hina_optim.techniques.multi_scale import MultiScaleMomentum
from hina_optim.techniques.rms_clip import RmsClip
from hina_optim.techniques.tam import TorqueAwareMomentum
from tests.came_cases import CONV2D, MATRICES, OTHERS, SQUARE, TALL, WIDE, directions, draw, recipe

# -- against the reference --------------------------------------------------------------------------------------------

OPTIONS = {
    "plain": {},
    "shorter memory": {"decay": 0.9, "floor": 0.5, "threshold": 0.7},
    "dual": {"long_beta": 0.95},
    "dual, fixed share": {"long_beta": 0.9, "alpha": 0.3, "betas": (0.9, 0.999, 0.9999)},
    "scales": {"scales": (1, 2, 5), "scale_beta": 0.7},
    "no memory": {"betas": (0.0, 0.0, 0.0)},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("shape", [*MATRICES, *OTHERS], ids=str)
def test_the_whole_recipe_is_its_reference_in_every_step(shape, options):
    n, steps = 2, 11
    references = [came.Came(**options) for _ in range(n)]
    # rows of very different size, and a scale that changes
    size = 10.0 ** (torch.arange(shape[0] if shape else 1, dtype=torch.float64) % 3)
    size = size.reshape(-1, *[1] * (len(shape) - 1)) if shape else size.squeeze()
    gradients = [draw(n, *shape, seed=t, dtype=torch.float64) * size * (1 + t % 4) for t in range(steps)]
    for t, (values, state) in enumerate(directions(recipe(**options), gradients)):
        for i, reference in enumerate(references):
            close = {"rtol": 1e-9, "atol": 1e-12}
            torch.testing.assert_close(values["update"][i], reference(gradients[t][i]), **close)
            torch.testing.assert_close(state["exp_avg"][i], reference.m, **close)
            for k, mean in reference.means.items():
                torch.testing.assert_close(state[f"momentum_{k}"][i], mean, **close)
            if "long_beta" in options:
                torch.testing.assert_close(state["exp_avg_long"][i], reference.long, **close)
            if isinstance(reference.v, came.Factors):
                for key, factors in (("sq", reference.v), ("res", reference.r)):
                    assert state[f"exp_avg_{key}_row"][i].tolist() == pytest.approx(factors.rows, rel=1e-9)
                    assert state[f"exp_avg_{key}_col"][i].tolist() == pytest.approx(factors.columns, rel=1e-9)
            else:
                torch.testing.assert_close(state["exp_avg_sq"][i], reference.v, **close)


@pytest.mark.parametrize("shape", [TALL, WIDE, SQUARE], ids=str)
@pytest.mark.parametrize("threshold", [1.0, 1.3])
def test_normalization_and_clip_are_those_of_torch_adafactor(shape, threshold):
    # β₂ next to 1, corrected for its bias, is the mean over time; so is Adafactor's 1 - 1/t
    chain = [FactoredNormalization(1 - 1e-9, 1e-30), RmsClip(threshold)]
    lr, param = 1e-6, torch.nn.Parameter(draw(*shape, seed=99, dtype=torch.float64))
    adafactor = torch.optim.Adafactor([param], lr=lr, beta2_decay=-1.0, d=threshold, weight_decay=0.0)
    gradients = [draw(1, *shape, seed=t, dtype=torch.float64) * (1 + t) for t in range(6)]
    for values, _ in directions(chain, gradients):
        before = param.detach().clone()
        param.grad = values["grad"][0].clone()
        adafactor.step()
        moved = (before - param.detach()) / (lr * before.square().mean().sqrt())
        torch.testing.assert_close((values["clip"] * values["incoming"])[0], moved, rtol=1e-6, atol=1e-8)


# -- factored moments -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(12, 3), (3, 12), (8, 8), (6, 2, 3, 3)], ids=str)
def test_rows_and_columns_of_any_size_come_out_alike(shape):
    rows, columns = shape[0], math.prod(shape[1:])
    size = 10.0 ** torch.linspace(-3, 3, rows)[:, None] * 10.0 ** torch.linspace(2, -2, columns)
    signs = draw(rows, columns).sign()
    values, _ = run_technique(FactoredNormalization(0.99), {"grad": (size * signs).reshape(1, *shape)})
    # a matrix whose squares are a product of row and column is normalized to ±1
    torch.testing.assert_close(values["incoming"].reshape(rows, columns), signs, rtol=1e-5, atol=0)


def test_a_convolution_is_normalized_as_its_matrix_view():
    conv = draw(2, 4, 3, 3, 2)
    chain = recipe()
    for (a, _), (b, _) in zip(directions(chain, [conv] * 3), directions(chain, [conv.flatten(2)] * 3), strict=True):
        torch.testing.assert_close(a["update"].flatten(2), b["update"], rtol=0, atol=0)


@pytest.mark.parametrize("shape", MATRICES, ids=str)
def test_the_state_of_a_matrix_is_one_moment_and_twice_its_rows_and_columns(shape):
    info = ParamInfo(shape)
    slots = {slot.name: slot for one in recipe() for slot in one.slots(info)}
    sizes = {name: math.prod(slot.local_shape(shape)) for name, slot in slots.items()}
    rows, columns = shape[0], math.prod(shape[1:])
    assert sizes.pop("exp_avg") == rows * columns
    assert len(sizes) == 4
    assert sum(sizes.values()) == 2 * (rows + columns)
    # whatever the piece of it that lies here
    assert all(slot.local_shape((1, 2)) == slot.shape for name, slot in slots.items() if name != "exp_avg")


@pytest.mark.parametrize("shape", OTHERS, ids=str)
def test_a_vector_keeps_two_moments_and_has_no_confidence(shape):
    info = ParamInfo(shape)
    chain = [one for one in recipe() if one.applies(info)]
    assert {slot.name for one in chain for slot in one.slots(info)} == {"exp_avg", "exp_avg_sq"}
    assert {slot.name for one in recipe() for slot in one.slots(info)} == {"exp_avg", "exp_avg_sq"}


def test_a_vectors_step_is_its_moment_and_the_moment_is_not_touched_by_it():
    # a constant gradient is normalized to its sign, and the moment goes to it as 1 - β₁ᵗ
    grad = draw(1, 6)
    for t, (values, state) in enumerate(directions(recipe(), [grad] * 30), 1):
        torch.testing.assert_close(values["update"], grad.sign() * (1 - 0.8**t), rtol=1e-5, atol=0)
        torch.testing.assert_close(state["exp_avg"], values["update"], rtol=0, atol=0)


@pytest.mark.parametrize("technique", [FactoredNormalization, Confidence], ids=lambda c: c.__name__)
def test_rows_that_lie_elsewhere_change_nothing(technique):
    """Pieces of a parameter, each with the totals of the whole, give the whole."""
    one, shape = technique(0.9), (7, 2, 3)
    info = ParamInfo(shape)
    x, m = draw(2, *shape, seed=1), draw(2, *shape, seed=2)
    state = {k: v + 0.5 for k, v in initial_state(one, info, x).items()}
    scalars = {f"{one.name}.{k}": v.float() for k, v in one.scalars(torch.tensor([3.0, 3.0])).items()}
    whole = Flow({"grad": x, "update": m}, state, {"exp_avg": m}, scalars, info)
    totals = {k: total(v) for k, v in one.sums(whole).items()}
    one.settle(whole, totals)
    written = "update" if "update" in one.settles else "incoming"
    for rows in (slice(0, 3), slice(3, 7)):
        part = Flow({"grad": x[:, rows], "update": m[:, rows]}, state, {"exp_avg": m[:, rows]}, scalars, info)
        part["row_index"] = torch.arange(7)[rows]
        one.settle(part, totals)
        torch.testing.assert_close(part[written], whole[written][:, rows], rtol=0, atol=0)
        for name in state:
            torch.testing.assert_close(part.new[name], whole.new[name], rtol=0, atol=0)


# -- scale, zero, and rounding ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [1e-9, 1e-3, 1e3, 1e9])
@pytest.mark.parametrize("shape", [TALL, CONV2D, (7,), ()], ids=str)
def test_the_scale_of_the_loss_does_not_matter(shape, scale):
    chain = recipe(long_beta=0.99, scales=(1, 2, 3))
    gradients = [draw(2, *shape, seed=t) for t in range(8)]
    for (a, _), (b, _) in zip(
        directions(chain, gradients), directions(chain, [g * scale for g in gradients]), strict=True
    ):
        torch.testing.assert_close(a["update"], b["update"], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("shape", [*MATRICES, *OTHERS], ids=str)
def test_no_gradient_moves_nothing_then_or_later(shape):
    chain = recipe(long_beta=0.99, scales=(1, 2, 3))
    nothing = torch.zeros(2, *shape)
    for values, state in directions(chain, [nothing] * 4):
        assert values["update"].count_nonzero() == 0
        assert all(v.count_nonzero() == 0 for v in state.values())
    for values, state in directions(chain, [nothing, draw(2, *shape), nothing, nothing]):
        assert all(torch.isfinite(v).all() for v in (values["update"], *state.values()))
        assert (values["update"].abs() < 2.1 * max(1, math.sqrt(math.prod(shape)))).all()


@pytest.mark.parametrize("size", [1e-15, 1.0, 1e15])
@pytest.mark.parametrize("eps", [(1e-30, 1e-16), (1e-60, 1e-60)])
@pytest.mark.parametrize("betas", [(0.8, 0.99, 0.999), (0.0, 0.99, 0.999)])
def test_idle_rows_and_columns_stay_where_they_are(size, eps, betas):
    grad = size * draw(2, 8, 12)
    grad[:, 2:5] = 0
    grad[:, :, 3:7] = 0
    for values, state in directions(recipe(betas, eps), [grad] * 5):
        assert all(torch.isfinite(v).all() for v in (values["update"], *state.values()))
        assert values["update"][:, 2:5].count_nonzero() == 0
        assert values["update"][:, :, 3:7].count_nonzero() == 0
        assert (values["update"].count_nonzero() == grad.count_nonzero()).all()


@pytest.mark.parametrize("shape", [TALL, CONV2D, (7,)], ids=str)
def test_a_block_of_equal_gradients_is_nothing_special(shape):
    for t, (values, _) in enumerate(directions(recipe(), [torch.full((1, *shape), -3.0)] * 50), 1):
        assert torch.isfinite(values["update"]).all()
        assert (values["update"] < 0).all(), t


# -- clip, moment, long moment ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("threshold", [0.5, 1.0, 2.0])
def test_the_clip_brings_the_rms_down_and_never_up(threshold):
    x = draw(3, 4, 5) * torch.tensor([0.01, 1.0, 100.0]).reshape(3, 1, 1)
    values, _ = run_technique(RmsClip(threshold), {"grad": x, "incoming": x})
    torch.testing.assert_close(values["incoming"], x, rtol=0, atol=0)
    before, after = x.flatten(1).square().mean(1).sqrt(), (values["clip"] * x).flatten(1).square().mean(1).sqrt()
    torch.testing.assert_close(after, before.clamp(max=threshold))
    assert before[0] < threshold < before[2]


def test_a_plain_moment_is_a_running_mean():
    m, x, damping = draw(2, 3, 4), draw(2, 3, 4, seed=1), torch.tensor([0.3, 0.7]).reshape(2, 1, 1)
    assert Momentum(0.9).scalars(torch.ones(1)) == {}
    values, state = run_technique(Momentum(0.9), {"grad": x, "damping": damping}, {"exp_avg": m})
    torch.testing.assert_close(values["update"], 0.9 * m + (1 - 0.9) * (damping * x), rtol=1e-6, atol=1e-7)
    assert torch.equal(state["exp_avg"], values["update"])


def test_a_moment_honors_clip_and_damping_together():
    x, clip, damping = draw(2, 3, seed=1), torch.tensor([[0.5], [0.1]]), torch.tensor([[0.3], [0.7]])
    values, _ = run_technique(Momentum(0.9, 0.99), {"grad": x, "clip": clip, "damping": damping})
    torch.testing.assert_close(values["update"], 0.1 * clip * damping * x)


def test_the_memory_of_the_moment_shortens_down_to_its_floor():
    technique = Momentum(0.8, 0.9, 0.5)
    keep = (1 - technique.scalars(torch.arange(1, 11, dtype=torch.float64))["take"]).tolist()
    assert keep == pytest.approx([came.beta1_at(t, 0.8, 0.9, 0.5) for t in range(1, 11)])
    assert keep[0] == pytest.approx(0.8) and keep[-1] == 0.5
    assert keep == sorted(keep, reverse=True)


def test_the_long_moment_counts_for_as_much_as_it_has_seen():
    technique = DualMomentum(0.99)
    x, m, long = draw(1, 4, 5), draw(1, 4, 5, seed=1), draw(1, 4, 5, seed=2)
    for t, share in ((1, 0.005), (70, 0.5 * (1 - 0.99**70)), (5000, 0.5)):
        given_state = {"exp_avg_long": long}
        values, state = run_technique(technique, {"grad": x, "update": m}, given_state, t=t)
        torch.testing.assert_close(state["exp_avg_long"], 0.99 * long + 0.01 * x)
        torch.testing.assert_close(values["update"], (1 - share) * m + share * state["exp_avg_long"])


@pytest.mark.parametrize(("alpha", "name"), [(0.0, "update"), (1.0, "exp_avg_long")])
def test_a_fixed_share_goes_from_the_short_moment_to_the_long(alpha, name):
    values = {"grad": draw(1, 4, 5), "update": draw(1, 4, 5, seed=1), "clip": torch.full((1, 1, 1), 0.5)}
    after, state = run_technique(DualMomentum(0.9, alpha), values)
    torch.testing.assert_close(after["update"], {**values, **state}[name], rtol=0, atol=0)
    torch.testing.assert_close(state["exp_avg_long"], 0.1 * 0.5 * values["grad"])


def test_the_long_moment_remembers_what_the_short_one_has_forgotten():
    early, late = draw(1, 4, 5, seed=1).abs(), draw(1, 4, 5, seed=2)
    gradients = [early] * 60 + [late * (-1) ** t for t in range(30)]
    overlap = {}
    for name, chain in {"short": [Momentum(0.8)], "both": [Momentum(0.8), DualMomentum(0.99)]}.items():
        *_, (values, _) = directions(chain, gradients)
        overlap[name] = float((values["update"] * early).sum() / early.square().sum())
    assert overlap["both"] > 5 * abs(overlap["short"])


# -- how they fit together --------------------------------------------------------------------------------------------


def reductions(chain, shape):
    check_recipe(chain, "test")
    return [[t.name for t in s.summing] for s in plan_segments(chain, ParamInfo(shape), frozenset()) if s.summing]


def test_clip_and_torque_share_a_reduction():
    first = [FactoredNormalization(0.99), UnfactoredNormalization(0.99), RmsClip(1.0), TorqueAwareMomentum(0.9)]
    rest = [Confidence(0.999), Cautious()]
    want = [["factored"], ["rms_clip", "tam"], ["confidence"], ["cautious"]]
    assert reductions([*first, Momentum(0.9), *rest], (4, 5)) == want
    scales = MultiScaleMomentum()
    assert reductions([scales, *first, Momentum(0.9, 0.9), DualMomentum(), *rest], (4, 5)) == want
    assert reductions([*first, Momentum(0.9), *rest], (5,)) == [["rms_clip", "tam"], ["cautious"]]


class Watched(Flow):
    """A flow that notes what is read."""

    def __init__(self, *parts):
        super().__init__(*parts)
        self.read = set()

    def __getitem__(self, name):
        self.read.add(name)
        return super().__getitem__(name)

    def get(self, name):
        self.read.add(name)
        return super().get(name)


@pytest.mark.parametrize("shape", [(4, 5), (5,)], ids=str)
def test_what_a_technique_reads_is_what_it_declares(shape):
    info = ParamInfo(shape)
    for one in recipe(decay=0.9, long_beta=0.99, scales=(1, 2)):
        if not one.applies(info):
            continue
        values = {name: draw(2, *shape) for name in ("grad", "incoming", "update")}
        values |= {name: torch.ones(2, *[1] * len(shape)) for name in ("clip", "damping")}
        scalars = {f"{one.name}.{k}": v.float() for k, v in one.scalars(torch.tensor([3.0, 3.0])).items()}
        state = initial_state(one, info, values["grad"])
        for present in (values, {k: v for k, v in values.items() if k != "incoming"}):
            flow = Watched(dict(present), state, {"exp_avg": draw(2, *shape)}, scalars, info)
            one.transform(flow)
            assert flow.read <= one.reads | one.writes, one.name
            flow.read = set()
            sums = one.sums(flow)
            assert flow.read <= one.sums_over, one.name
            flow.read = set()
            one.settle(flow, {k: total(v) for k, v in sums.items()})
            assert flow.read <= one.settles | one.settle_reads, one.name


def test_a_technique_that_begins_late_counts_its_own_age():
    x, m, u = (draw(1, 4, 5, seed=i, dtype=torch.float64) for i in range(3))
    one, info = Confidence(0.999).during(10), ParamInfo((4, 5))
    scalars = {f"confidence.{k}": v for k, v in one.scalars(torch.tensor([11.0], dtype=torch.float64)).items()}
    flow = Flow({"grad": x, "update": u}, initial_state(one, info, x), {"exp_avg": m}, scalars, info)
    one.settle(flow, {k: total(v) for k, v in one.sums(flow).items()})
    want, _ = came.confidence(u[0], x[0], m[0], came.Factors.of(x[0]), 1, 0.999, 1e-16)
    torch.testing.assert_close(flow["update"][0], want)
    assert DualMomentum(0.9).during(10).scalars(torch.tensor([11.0]))["alpha"] == pytest.approx(0.05)
    late = MultiScaleMomentum((1, 5)).during(10).scalars(torch.tensor([14.0, 15.0]))
    assert late["weight_5"].tolist() == pytest.approx([0.0, 0.2 / 1.2 / 0.1])
    assert FactoredNormalization(0.9).during(3).scalars(torch.tensor([4.0]))["correct"] == pytest.approx(10)
    assert UnfactoredNormalization(0.9).during(3).scalars(torch.tensor([4.0]))["correct"] == pytest.approx(10)


@pytest.mark.parametrize("shape", [(4, 5), (5,), ()], ids=str)
def test_the_chain_traces_as_one_graph(shape):
    chain, info = recipe(decay=0.9, long_beta=0.99, scales=(1, 2)), ParamInfo(shape)
    chain = [one for one in chain if one.applies(info)]
    grad = draw(2, *shape)
    state = {k: v for one in chain for k, v in initial_state(one, info, grad).items()}
    t = torch.full((2,), 3.0, dtype=torch.float64)
    scalars = {f"{one.name}.{k}": v.float() for one in chain for k, v in one.scalars(t).items()}

    def step(grad, state, scalars):
        flow = Flow({"grad": grad}, state, {}, scalars, info)
        for one in chain:
            one.transform(flow)
            one.settle(flow, {k: total(v) for k, v in one.sums(flow).items()})
        return flow["update"], flow.new

    eager = step(grad, state, scalars)
    traced = torch.compile(step, fullgraph=True, backend="eager")(grad, state, scalars)
    torch.testing.assert_close(eager, traced, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("make", "word"),
    [
        (lambda: FactoredNormalization(1.0), "beta2"),
        (lambda: FactoredNormalization(0.9, 0.0), "eps"),
        (lambda: UnfactoredNormalization(-0.1), "UnfactoredNormalization: beta2"),
        (lambda: UnfactoredNormalization(0.9, float("nan")), "eps"),
        (lambda: RmsClip(0.0), "threshold"),
        (lambda: Momentum(1.0), "beta1"),
        (lambda: Momentum(0.9, 1.1), "decay"),
        (lambda: Momentum(0.9, 0.9, 0.95), r"floor must be a number in \[0, beta1=0.9\]"),
        (lambda: Momentum(0.9, 0.9, -0.1), "floor"),
        (lambda: DualMomentum(1.0), "long_beta"),
        (lambda: DualMomentum(0.9, 1.5), "alpha"),
        (lambda: Confidence("0.9"), "beta3"),
        (lambda: Confidence(0.9, 0), "eps"),
        (lambda: MultiScaleMomentum((5, 20)), "scales"),
        (lambda: MultiScaleMomentum((1, 5, 5)), "scales"),
        (lambda: MultiScaleMomentum((1, 2.5)), "scales"),
        (lambda: MultiScaleMomentum(5), "scales"),
        (lambda: MultiScaleMomentum((1, 5), 1.0), "beta"),
    ],
)
def test_values_that_make_no_sense_are_refused(make, word):
    with pytest.raises(ValueError, match=word):
        make()


def test_the_reference_agrees_with_itself_on_a_number_worked_out_by_hand():
    # one row: v is g² element by element, û = ±1, m = 0.2·û, the deviation 0.8·û, and the step 0.2/0.8
    step = came.Came((0.8, 0.99, 0.999))(torch.tensor([[3.0, -2.0, 0.5]]))
    torch.testing.assert_close(step, torch.tensor([[0.25, -0.25, 0.25]], dtype=torch.float64))
    assert came.rms_clip(torch.tensor([3.0, 4.0]), 1.0) == pytest.approx(1 / math.sqrt(12.5))
    assert core.momentum(torch.zeros(1), torch.ones(1), came.beta1_at(3, 0.8, 0.5)).item() == pytest.approx(0.8)
