"""Rates by row, role and Kronecker factor; decay by gradient and by rank: properties, and the float64 reference."""

from __future__ import annotations

import math

import pytest
import torch
from harness import initial_state, related, run_technique
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hina_optim.adapters.roles import ROLES, role_of
from hina_optim.engine.plan import check_recipe, plan_segments
from hina_optim.reference import core, rates
from hina_optim.techniques.ada_decay import AdaDecay
from hina_optim.techniques.agr import AdaptiveGradientRegularization
from hina_optim.techniques.base import Flow, ParamInfo, Relations, Technique
from hina_optim.techniques.kronecker import KroneckerRates
from hina_optim.techniques.rank_aware_decay import RankAwareDecay
from hina_optim.techniques.role_rates import FAST_ROLES, RoleRates
from hina_optim.techniques.row_scaling import RowScaling
from hina_optim.techniques.spd import SelectiveProjectionDecay
from hina_optim.techniques.spectrum import Spectrum
from hina_optim.techniques.weight_decay import DecoupledWeightDecay

DOUBLE = torch.float64
MATRICES = [(4, 7), (7, 4), (5, 5), (1, 6), (6, 1), (4, 3, 2, 2)]


def draw(*shape, seed=0, dtype=DOUBLE):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def number(x):
    return torch.tensor(x, dtype=DOUBLE)


# -- rows -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", MATRICES)
@pytest.mark.parametrize("of_elements", [False, True])
def test_row_scaling_is_the_formula_on_every_row(shape, of_elements):
    param = draw(2, *shape)
    rate = draw(2, *shape, seed=1).abs() if of_elements else number(0.1)
    values, _ = run_technique(RowScaling(2.5), {"grad": draw(2, *shape), "param": param, "rate": rate})
    got = values["rate"].expand(2, *shape)
    for i in range(2):
        for row, factor in enumerate(rates.row_factors(param[i], 2.5)):
            torch.testing.assert_close(got[i, row], rate.expand(2, *shape)[i, row] * factor)


def test_rows_of_zeros_learn_eta_times_as_fast_and_long_rows_slower():
    param = torch.zeros(1, 4, 9)
    param[0, 1] = 0.25  # norm 3/4 = 1 - 1/η²
    param[0, 2] = 100.0
    param[0, 3] = 1e-30
    values, _ = run_technique(RowScaling(2.0), {"grad": param, "param": param, "rate": torch.tensor(0.5)})
    assert values["rate"][0, :, 0].tolist() == pytest.approx([1.0, 0.5, 0.5 / math.sqrt(300.25), 1.0], rel=1e-6)


def test_row_scaling_is_for_matrices_and_stops_with_the_learning_rate():
    one = RowScaling(2.0)
    assert [one.applies(ParamInfo(s)) for s in [(), (5,), (0, 5), (4, 5), (4, 3, 3, 3)]] == [False] * 3 + [True] * 2
    values, _ = run_technique(one, {"grad": draw(2, 3, 4), "rate": number(0.0)})
    assert values["rate"].eq(0).all()


def test_row_scaling_is_settled_before_the_rate_is_read_and_can_share_the_first_reduction():
    agr, rows, decay, spd = (
        AdaptiveGradientRegularization(),
        RowScaling(2.0),
        DecoupledWeightDecay(0.1),
        SelectiveProjectionDecay(0.1),
    )
    info = ParamInfo((4, 3))

    def summing(chain):
        check_recipe(chain, "test")
        return [[t.name for t in s.summing] for s in plan_segments(chain, info, frozenset())]

    assert summing([agr, decay, rows, spd]) == [["agr", "alora"], ["spd"], []]
    assert summing([rows, agr, decay, spd]) == [["alora", "agr"], ["spd"], []]


# -- roles ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ratio", [1.0, 16.0])
@pytest.mark.parametrize("paired", [True, False])
def test_rates_of_the_two_factors_are_in_the_ratio_paired_or_not(ratio, paired):
    def rate(role):
        info = ParamInfo((3, 4), role, paired)
        values, _ = run_technique(RoleRates(ratio), {"grad": draw(2, 3, 4), "rate": number(0.25)}, info=info)
        return values["rate"].item()

    for fast, slow in [("lora_b", "lora_a"), ("lokr_w2", "lokr_w1"), ("lokr_w2_a", "lokr_w1_a")]:
        assert rate(fast) / rate(slow) == ratio
    assert rate("lora_a") == rate(None) == rate("lora_magnitude") == 0.25
    for role in ROLES:
        assert rate(role) == 0.25 * rates.role_factor(role, ratio)
    assert set(ROLES) >= FAST_ROLES


# -- Kronecker --------------------------------------------------------------------------------------------------------


def measured(technique: KroneckerRates, weights: list[Tensor], infos: list[ParamInfo]) -> dict[str, Tensor]:
    states = []
    for x, info in zip(weights, infos, strict=True):
        values = {"grad": x[None], "param": x[None], "rate": number(1.0)}
        values, state = run_technique(
            technique, values, initial_state(technique, info, x[None]), info=info, measuring=True
        )
        assert values["rate"].eq(1).all(), "what a step measures is in force from the next one on"
        states.append(state)
    return {name: torch.cat([s[name] for s in states]) for name in technique.population}


def kronecker(factors: dict[tuple[int, str], Tensor], strength: float = 0.3) -> dict[tuple[int, str], float]:
    """``{(adapter, role without "lokr_"): rate}`` after measuring and refreshing."""
    technique = KroneckerRates(strength)
    infos = [ParamInfo(tuple(x.shape), f"lokr_{role}") for (_, role), x in factors.items()]
    states = measured(technique, list(factors.values()), infos)
    adapters = torch.tensor([adapter for adapter, _ in factors])
    relations = Relations(torch.full_like(adapters, -1), adapters)
    new = technique.refresh(states, infos, relations)
    again = technique.refresh({**states, **new}, infos, relations)
    assert torch.equal(again["lokr_rate"], new["lokr_rate"]), "idempotent"
    out = {}
    for i, (key, x) in enumerate(factors.items()):
        state = {name: value[i : i + 1] for name, value in {**states, **new}.items()}
        values, _ = run_technique(technique, {"grad": x[None], "rate": number(1.0)}, state, info=infos[i])
        out[key] = values["rate"].item()
    return out


KINDS = {
    "whole": {"w1": (2, 3), "w2": (4, 5)},
    "second factored": {"w1": (2, 3), "w2_a": (4, 2), "w2_b": (2, 5)},
    "both factored": {"w1_a": (3, 2), "w1_b": (2, 3), "w2_a": (4, 2), "w2_b": (2, 5)},
    "Tucker": {"w1": (2, 3), "t2": (2, 2, 3, 3), "w2_a": (2, 4), "w2_b": (2, 5)},
}


def test_lokr_rates_are_the_formula_for_every_kind_of_adapter_at_once():
    factors = {
        (7 - i, role): draw(*shape, seed=10 * i + k) * 0.5
        for i, parts in enumerate(KINDS.values())
        for k, (role, shape) in enumerate(parts.items())
    }
    order = torch.randperm(len(factors), generator=torch.Generator().manual_seed(1)).tolist()
    factors = {key: factors[key] for key in [list(factors)[i] for i in order]}  # adapters' parts lie anywhere
    got = kronecker(factors)
    for adapter, _ in factors:
        mine = {role: x for (a, role), x in factors.items() if a == adapter}
        expected = rates.kronecker_factor(mine, 0.3)
        assert expected < 0.9
        for role in mine:
            assert got[adapter, role] == pytest.approx(expected, rel=1e-12)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 99), rank=st.integers(1, 4))
def test_a_factored_side_counts_with_a_bound_never_below_its_norm(seed, rank):
    a, b, w1 = draw(5, rank, seed=seed), draw(rank, 6, seed=seed + 1), draw(2, 2, seed=seed + 2)
    got = kronecker({(0, "w1"): w1, (0, "w2_a"): a, (0, "w2_b"): b})[0, "w1"]
    exact = 1 / (1 + 0.3 * float(w1.norm() * (a @ b).norm()))
    assert got <= exact * (1 + 1e-12)
    if rank == 1:
        assert got == pytest.approx(exact, rel=1e-9)


def test_an_adapter_of_which_a_side_is_unknown_or_zero_keeps_its_rate():
    x = draw(3, 3)
    got = kronecker(
        {
            (0, "w1"): x,  # w2 is frozen
            (1, "w1"): x,
            (1, "w2"): torch.zeros(4, 4, dtype=DOUBLE),
            (2, "w1_a"): x,  # its other half is
            (2, "w2"): x,
            (3, "w1"): x,
            (3, "w2"): x,
            (-1, "w1"): x,  # of no adapter
            (-1, "w2"): x,
        }
    )
    for (adapter, _), rate in got.items():
        assert rate == (pytest.approx(1 / (1 + 0.3 * float(x.square().sum()))) if adapter == 3 else 1.0)


def test_lokr_rates_are_for_lokr_factors_and_survive_what_is_not_finite():
    one = KroneckerRates()
    assert not any(one.applies(ParamInfo((3, 3), role)) for role in (None, "lora_a", "lora_b", "loha_w1_a"))
    assert all(one.applies(ParamInfo((3, 3), role)) for role in ROLES if role.startswith("lokr_"))
    assert not KroneckerRates(0.0).applies(ParamInfo((3, 3), "lokr_w1"))
    huge = torch.full((3, 3), 1e30)
    assert set(kronecker({(0, "w1"): huge, (0, "w2"): huge}).values()) == {1.0}


@pytest.mark.parametrize("library", ["lycoris", "peft"])
def test_lokr_factors_of_real_modules_are_found_by_their_names(library):
    pytest.importorskip(library)
    layer = torch.nn.Linear(24, 36)
    if library == "peft":
        import peft

        config = peft.LoKrConfig(r=2, target_modules=["0"], init_weights=False, decompose_both=True, decompose_factor=4)
        module: torch.nn.Module = peft.get_peft_model(torch.nn.Sequential(layer), config)
    else:
        from lycoris.modules.lokr import LokrModule

        module = LokrModule("layer", layer, lora_dim=2, factor=4, decompose_both=True)
    factors = {}
    for name, p in module.named_parameters():
        role = role_of(name, p.shape) if p.requires_grad else None
        if role is not None:
            factors[0, role.removeprefix("lokr_")] = draw(*p.shape, seed=len(factors))
    assert len(factors) >= 2
    got = kronecker(factors)
    expected = rates.kronecker_factor({role: x for (_, role), x in factors.items()}, 0.3)
    assert expected < 1
    assert list(got.values()) == pytest.approx([expected] * len(factors))


# -- AdaDecay ---------------------------------------------------------------------------------------------------------


def ada(grad: Tensor, lr: float = 1.0, wd: float = 1.0) -> Tensor:
    return run_technique(AdaDecay(wd), {"grad": grad, "lr": torch.tensor(lr, dtype=grad.dtype)})[0]["decay"]


@settings(max_examples=30, deadline=None)
@given(shape=st.sampled_from([(), (1,), (2,), (40,), (6, 7), (3, 2, 3, 3)]), seed=st.integers(0, 99))
def test_ada_decay_is_the_formula_and_bounded(shape, seed):
    grad = draw(2, *shape, seed=seed) * number([1.0, 1e-6]).reshape(2, *[1] * len(shape))
    got = ada(grad, 0.5, 0.1)
    for i in range(2):
        torch.testing.assert_close(got[i], 0.05 * rates.ada_decay_factor(grad[i]), rtol=1e-9, atol=0)
    assert (got >= 0).all()
    assert (got <= 2 * 0.05).all()


def test_ada_decay_follows_the_magnitude_and_is_scale_free():
    grad = draw(1, 50, dtype=torch.float32)
    plain = ada(grad)
    order = grad[0].abs().argsort()
    assert (plain[0][order].diff() >= 0).all()
    assert plain.min() < 0.5
    assert plain.max() > 1.5
    for scale in (1e-12, 1e-3, 1e3, 1e9):
        torch.testing.assert_close(ada(grad * scale), plain, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(ada(-grad), plain, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE])
def test_ada_decay_is_plain_decay_where_magnitudes_say_nothing(dtype):
    for grad in (
        torch.zeros(2, 5, dtype=dtype),
        draw(2, dtype=dtype),
        draw(2, 1, dtype=dtype),
        0.3 * draw(2, 1000, dtype=dtype).sign(),  # equal magnitudes: their differences are rounding
        torch.full((2, 4), 3e38, dtype=torch.float32),
        torch.full((2, 4), 1e-30, dtype=torch.float32),
    ):
        got = ada(grad, 0.5, 0.1)
        torch.testing.assert_close(got, torch.full_like(grad, 0.05), rtol=2e-3, atol=0)
    assert ada(draw(2, 5), lr=0.0).eq(0).all()
    assert not AdaDecay(0.0).applies(ParamInfo((3,)))


# -- rank-aware decay -------------------------------------------------------------------------------------------------


def decay_matrices(params: list[Tensor], infos: list[ParamInfo], partners: list[int] | None = None) -> Tensor:
    """What Spectrum keeps after measuring parameters of one ``s``."""
    spectrum = Spectrum(0.9, decay=True)
    states = []
    for param, info in zip(params, infos, strict=True):
        values = {"grad": param[None], "param": param[None]}
        states.append(run_technique(spectrum, values, info=info, measuring=True)[1])
    stacked = {name: torch.cat([s[name] for s in states]) for name in spectrum.population}
    known = related(torch.tensor(partners if partners is not None else [-1] * len(params)))
    return spectrum.refresh(stacked, infos, known)["decay_matrix"]


def drift(param: Tensor, matrix: Tensor, info: ParamInfo, lr: float = 0.5, **more: Tensor) -> Tensor:
    values = {"grad": param[None], "param": param[None], "lr": torch.tensor(lr, dtype=param.dtype), **more}
    return run_technique(RankAwareDecay(0.2), values, {"decay_matrix": matrix[None]}, info=info)[0]["drift"][0]


@pytest.mark.parametrize("shape", MATRICES)
@pytest.mark.parametrize("role", [None, "lora_a", "lora_b"])
def test_decay_grows_along_the_singular_values(shape, role):
    info = ParamInfo(shape, role, role is not None)
    param = draw(*shape)
    (matrix,) = decay_matrices([param], [info])
    got = drift(param, matrix, info)
    torch.testing.assert_close(got, rates.rank_aware_drift(param, 0.1), rtol=1e-9, atol=1e-12)
    # with the plain decay beside it: 1x for the leading direction, 2x for the last, in equal steps
    u, sigma, vt = torch.linalg.svd(param.flatten(1), full_matrices=False)
    taken = torch.diagonal(u.T @ (0.1 * param + got).flatten(1) @ vt.T) / (0.1 * sigma)
    expected = torch.linspace(1, 2, len(sigma), dtype=DOUBLE) if len(sigma) > 1 else torch.ones(1, dtype=DOUBLE)
    torch.testing.assert_close(taken, expected, rtol=1e-6, atol=1e-9)


def test_halves_of_a_pair_decay_in_their_own_bases():
    a, b = draw(3, 8), draw(6, 3, seed=1)
    infos = [ParamInfo((3, 8), "lora_a", True), ParamInfo((6, 3), "lora_b", True)]
    matrices = decay_matrices([a, b], infos, [1, 0])
    for x, matrix, info in zip((a, b), matrices, infos, strict=True):
        torch.testing.assert_close(drift(x, matrix, info), rates.rank_aware_drift(x, 0.1), rtol=1e-9, atol=1e-12)


@settings(max_examples=30, deadline=None)
@given(shape=st.sampled_from(MATRICES), seed=st.integers(0, 99), rank=st.integers(0, 4))
def test_no_norm_ever_grows_whatever_the_weights_have_become(shape, seed, rank):
    """Also between measurements, of a matrix that had a low rank when it was measured."""
    info = ParamInfo(shape)
    flat = (shape[0], math.prod(shape[1:]))
    then = (draw(flat[0], rank, seed=seed) @ draw(rank, flat[1], seed=seed + 1)).reshape(shape)
    (matrix,) = decay_matrices([then], [info])
    eigenvalues = torch.linalg.eigvalsh(matrix)
    assert eigenvalues.min() >= -1e-12
    assert eigenvalues.max() <= 1 + 1e-12
    now = draw(*shape, seed=seed + 2)
    before, after = now.flatten(1), (now - 0.1 * now - drift(now, matrix, info)).flatten(1)
    for order in (2, "fro", "nuc"):
        assert torch.linalg.matrix_norm(after, order) <= 0.9 * torch.linalg.matrix_norm(before, order) * (1 + 1e-12)
    if rank == 0:
        assert matrix.eq(0).all(), "a matrix of zeros has no leading direction"


def test_null_directions_decay_fully_whatever_basis_was_found_for_them():
    then = torch.zeros(4, 6, dtype=DOUBLE)
    then[0, 0], then[2, 3] = 2.0, 1.0
    (matrix,) = decay_matrices([then], [ParamInfo((4, 6))])
    torch.testing.assert_close(matrix, torch.diag(number([0.0, 1.0, 1 / 3, 1.0])))


def test_rank_aware_decay_waits_for_a_measurement_stops_with_lr_and_adds_to_what_is_there():
    info, param = ParamInfo((4, 6)), draw(4, 6)
    spectrum = Spectrum(decay=True)
    values, _ = run_technique([spectrum, RankAwareDecay(0.2)], {"grad": param[None], "param": param[None]}, info=info)
    assert values["drift"].eq(0).all()
    (matrix,) = decay_matrices([param], [info])
    assert drift(param, matrix, info, lr=0.0).eq(0).all()
    more = draw(1, 4, 6, seed=3)
    torch.testing.assert_close(drift(param, matrix, info, drift=more), drift(param, matrix, info) + more[0])
    one = RankAwareDecay(0.2)
    assert [one.applies(ParamInfo(s)) for s in [(5,), (), (0, 3), (300, 300), (4, 300)]] == [False] * 4 + [True]
    assert not RankAwareDecay(0.0).applies(info)


def test_the_decay_matrix_is_kept_only_when_asked_for():
    names = {s.name for s in Spectrum().slots(ParamInfo((4, 6)))}
    assert {s.name for s in Spectrum(decay=True).slots(ParamInfo((4, 6)))} - names == {"decay_matrix"}
    assert "decay_matrix" not in Spectrum.population


def test_a_broken_half_leaves_the_decay_of_the_other_alone():
    infos = [ParamInfo((3, 8), "lora_a", True), ParamInfo((6, 3), "lora_b", True)]
    spectrum, old = Spectrum(decay=True), torch.eye(3, dtype=DOUBLE).repeat(2, 1, 1)
    gram = torch.stack([draw(3, 8) @ draw(3, 8).T, torch.full((3, 3), torch.nan, dtype=DOUBLE)])
    states = {name: old for name in spectrum.population} | {"gram": gram}
    new = spectrum.refresh(states, infos, related(torch.tensor([1, 0])))["decay_matrix"]
    assert torch.equal(new[1], old[1])
    assert not torch.equal(new[0], old[0])


# -- SPD and schedules ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("with_decay", [True, False])
def test_spd_counts_drift_with_the_decay(with_decay):
    param, anchor, extra = draw(2, 5, 3), draw(2, 5, 3, seed=1), 0.05 * draw(2, 5, 3, seed=3)
    grad = param - anchor + 0.1 * draw(2, 5, 3, seed=2)
    decay = 0.02 if with_decay else 0.0
    values = {"grad": grad, "param": param, "update": -grad, "rate": number(0.1), "drift": extra}
    values |= {"scale": torch.full((2, 1, 1), 1.7, dtype=DOUBLE)}
    if with_decay:
        values |= {"decay": number(decay)}
    pull = run_technique(SelectiveProjectionDecay(0.3), values, {"anchor": anchor})[0]["pull"]
    moved = param - decay * param - extra + 1.7 * 0.1 * grad
    expected = torch.stack(
        [core.selective_projection_decay(moved[i], param[i], anchor[i], grad[i], 0.3) for i in range(2)]
    )
    assert (pull > 0).all()
    torch.testing.assert_close(moved - pull * (moved - anchor), expected, rtol=1e-12, atol=1e-13)


class LateDrift(Technique):
    """Knows its drift only after a reduction."""

    name = "late"
    sums_over = frozenset({"grad"})
    settles = frozenset({"drift"})


def test_spd_waits_for_a_drift_that_needs_a_reduction():
    chain = [LateDrift(), SelectiveProjectionDecay(0.1)]
    plan = plan_segments(chain, ParamInfo((4, 3)), frozenset())
    assert [[t.name for t in s.summing] for s in plan] == [["late"], ["spd"], []]


@pytest.mark.parametrize("technique", [DecoupledWeightDecay, AdaDecay, RankAwareDecay])
def test_the_decay_of_lokr_shrinks_slower_and_less(technique):
    def strength(role: str | None, t: float) -> float:
        one = technique(0.1, **technique.schedule(ParamInfo((3, 3), role), 100, 0.5, 0.2))
        return one.scalars(number([t]))["strength"].item()

    for role in (None, "lora_b", "loha_w1_a"):
        assert [strength(role, t) for t in (100, 200, 9000)] == pytest.approx([0.1, 0.05, 0.02])
    for role in ("lokr_w1", "lokr_w2_b", "lokr_t2"):
        assert [strength(role, t) for t in (100, 200, 9000)] == pytest.approx([0.1, 0.1 * 0.5**0.7, 0.03])
    assert technique.schedule(ParamInfo((3, 3), "lokr_w1"), 100, 0.7, 0.8)["min_ratio"] == 1.0
    steady = technique(0.1).scalars(number([5000.0]))["strength"].item()
    assert steady == 0.1


# -- all --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: RowScaling(0.0), "RowScaling: eta=0.0"),
        (lambda: RowScaling(math.inf), "eta=inf"),
        (lambda: RoleRates(-1.0), "RoleRates: ratio=-1.0"),
        (lambda: KroneckerRates(-0.1), "KroneckerRates: strength=-0.1"),
        (lambda: KroneckerRates(0.3, 0), "interval=0"),
        (lambda: AdaDecay(-1.0), "AdaDecay: weight_decay=-1.0"),
        (lambda: AdaDecay(0.1, 0), "AdaDecay: transition_steps=0"),
        (lambda: RankAwareDecay(0.1, 10, 1.5), "RankAwareDecay: decay_factor=1.5"),
        (lambda: RankAwareDecay(0.1, 10, 0.5, -1), "min_ratio=-1"),
        (lambda: Spectrum(decay=1), "decay=1"),
    ],
)
def test_senseless_arguments_are_refused(make, text):
    with pytest.raises(ValueError, match=text):
        make()


@pytest.mark.parametrize(
    "technique",
    [RowScaling(2.0), RoleRates(16.0), KroneckerRates(), AdaDecay(0.1, 3), RankAwareDecay(0.1)],
    ids=lambda t: t.name,
)
def test_traces_as_one_graph_for_all_steps_and_a_batch_is_its_members(technique):
    info = ParamInfo((4, 3), "lokr_w2")
    grad, param = draw(2, 4, 3), draw(2, 4, 3, seed=1)
    matrix = draw(2, 3, 3, seed=2)
    matrix = matrix @ matrix.mT
    state = {"lokr_rate": draw(2).abs(), "lokr_norm": draw(2).abs(), "decay_matrix": matrix}
    graphs = []

    def run(grad: Tensor, param: Tensor, state: dict[str, Tensor], scalars: dict[str, Tensor], lr: Tensor):
        flow = Flow({"grad": grad, "param": param, "lr": lr, "rate": lr}, state, {}, scalars, info)
        if technique.whole:
            flow[f"{technique.name}.whole"] = technique.whole_matrix(flow, param)
        technique.transform(flow)
        totals = {}
        for key, value in technique.sums(flow).items():
            totals[key] = value.value.sum(2) if isinstance(technique, RowScaling) else value.sum((1, 2), keepdim=True)
        technique.settle(flow, totals)
        return flow.values, flow.new

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(run, backend=backend, fullgraph=True)
    for t in (1.0, 50.0):
        names = technique.scalars(number([t, t])).items()
        scalars = {f"{technique.name}.{k}": v for k, v in names}
        inputs = (grad, param, state, scalars, number(0.1 / t))
        for got, want in zip(compiled(*inputs), run(*inputs), strict=True):
            assert got.keys() == want.keys()
            for name in want:
                torch.testing.assert_close(got[name], want[name])
        values, _ = run(*inputs)
        for i in range(2):
            part = {k: v[i : i + 1] for k, v in state.items()}
            single = {k: v[i : i + 1] for k, v in scalars.items()}
            alone, _ = run(grad[i : i + 1], param[i : i + 1], part, single, inputs[-1])
            for name in values:
                full = values[name] if values[name].ndim < 3 else values[name].expand(2, 4, 3)[i : i + 1]
                torch.testing.assert_close(alone[name].expand_as(full), full)
    assert len(graphs) == 1
