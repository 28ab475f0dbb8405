"""Spectrum, rank penalty and low-rank emphasis against autograd and the float64 reference."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from harness import initial_state, related, run_technique
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hina_optim.reference import spectra
from hina_optim.techniques.base import Flow, ParamInfo
from hina_optim.techniques.emphasis import LowRankEmphasis
from hina_optim.techniques.rank_penalty import RankPenalty
from hina_optim.techniques.spectrum import MAX_SIDE, Spectrum, acts_on_left, has_spectrum, multiply, side

DOUBLE = torch.float64
SHAPES = [(3, 17), (17, 3), (8, 8), (1, 9), (9, 1), (6, 4, 3, 3), (12, 2, 2), (5, 7, 1, 1)]


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = DOUBLE) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def low_rank(rows: int, columns: int, sigma: Sequence[float], seed: int = 0) -> Tensor:
    u = torch.linalg.qr(randn(rows, len(sigma), seed=seed)).Q
    v = torch.linalg.qr(randn(columns, len(sigma), seed=seed + 1)).Q
    return (u * torch.tensor(sigma, dtype=DOUBLE)) @ v.T


def measured(spectrum: Spectrum, params: Sequence[Tensor], infos: Sequence[ParamInfo]) -> dict[str, Tensor]:
    """Measure parameters of one ``s``, one batch each, and stack their states."""
    states = []
    for param, info in zip(params, infos, strict=True):
        state = initial_state(spectrum, info, param[None])
        _, state = run_technique(
            spectrum, {"grad": torch.zeros_like(param)[None], "param": param[None]}, state, info=info, measuring=True
        )
        states.append(state)
    return {name: torch.cat([s[name] for s in states]) for name in spectrum.population}


def refreshed(
    spectrum: Spectrum, params: Sequence[Tensor], infos: Sequence[ParamInfo], partners: Sequence[int] | None = None
) -> dict[str, Tensor]:
    states = measured(spectrum, params, infos)
    known = torch.tensor(partners if partners is not None else [-1] * len(params))
    return {**states, **spectrum.refresh(states, list(infos), related(known))}


def penalty(param: Tensor, coefficient: Tensor, info: ParamInfo) -> Tensor:
    """What RankPenalty adds to a zero gradient, per unit of strength."""
    values, _ = run_technique(
        RankPenalty(0.5),
        {"grad": torch.zeros_like(param)[None], "param": param[None]},
        {"rank_coefficient": coefficient[None]},
        info=info,
    )
    return 2 * values["grad"][0]


def autograd_of_tail(param: Tensor, k: int) -> Tensor:
    leaf = param.clone().requires_grad_()
    return torch.autograd.grad(spectra.tail_sum(leaf, k), leaf)[0]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("target", [1, 2, 0.9, 0.5])
def test_penalty_is_the_gradient_of_the_tail(shape, target):
    param, info = randn(*shape), ParamInfo(shape)
    state = refreshed(Spectrum(target), [param], [info])
    k = spectra.kept_rank(torch.linalg.svdvals(spectra.matrix_view(param)), target)
    got = penalty(param, state["rank_coefficient"][0], info)
    torch.testing.assert_close(got, autograd_of_tail(param, k), rtol=1e-9, atol=1e-9)
    left = acts_on_left(info)
    torch.testing.assert_close(state["rank_coefficient"][0], spectra.tail_coefficient(param, target, left))
    torch.testing.assert_close(state["emphasis_projection"][0], spectra.leading_projection(param, target, left))


PAIRS = [((4, 11), (9, 4)), ((4, 3), (9, 4)), ((1, 5), (5, 1)), ((4, 2, 3, 3), (6, 4, 1, 1)), ((5, 40), (3, 5))]


def pair_infos(shapes: Sequence[tuple[int, ...]]) -> list[ParamInfo]:
    return [ParamInfo(shapes[0], "lora_a", True), ParamInfo(shapes[1], "lora_b", True)]


@pytest.mark.parametrize("shapes", PAIRS)
@pytest.mark.parametrize("target", [1, 2, 0.8])
def test_penalty_of_a_pair_is_that_of_the_product(shapes, target):
    a, b = randn(*shapes[0], seed=1), randn(*shapes[1], seed=2)
    infos = pair_infos(shapes)
    state = refreshed(Spectrum(target), [a, b], infos, [1, 0])
    leaves = a.clone().requires_grad_(), b.clone().requires_grad_()
    product = leaves[1].flatten(1) @ leaves[0].flatten(1)
    sigma = torch.linalg.svdvals(product)
    k = spectra.kept_rank(sigma.detach(), target)
    rank = min(shapes[0][0], *product.shape)
    # beyond the rank of the product singular values are rounding, whose derivative is noise
    wanted = torch.autograd.grad(sigma[k:rank].sum() + 0 * product.sum(), leaves)
    for i, x in enumerate((a, b)):
        got = penalty(x, state["rank_coefficient"][i], infos[i])
        torch.testing.assert_close(got, wanted[i], rtol=1e-8, atol=1e-8)
        torch.testing.assert_close(got, spectra.pair_tail_gradients(a, b, target)[i], rtol=1e-8, atol=1e-8)
    for got, want in zip(state["rank_coefficient"], spectra.pair_coefficients(a, b, target), strict=True):
        torch.testing.assert_close(multiplied(got, a, b), multiplied(want, a, b), rtol=1e-7, atol=1e-7)


def multiplied(small: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """The coefficient where it matters, between the factors (outside their ranges it is free)."""
    return b.flatten(1) @ small @ a.flatten(1)


def test_many_pairs_in_any_order_equal_each_alone():
    shapes = ((3, 10), (8, 3))
    pairs = [(randn(*shapes[0], seed=2 * i), randn(*shapes[1], seed=2 * i + 1)) for i in range(5)]
    spectrum = Spectrum(1)
    a_info, b_info = pair_infos(shapes)
    alone = [refreshed(spectrum, pair, [a_info, b_info], [1, 0])["rank_coefficient"] for pair in pairs]
    # all the A, then all the B, with a matrix of no pair in between
    other = randn(3, 6, seed=99)
    params = [a for a, _ in pairs] + [other] + [b for _, b in pairs]
    infos = [a_info] * 5 + [ParamInfo((3, 6))] + [b_info] * 5
    together = refreshed(spectrum, params, infos, [6, 7, 8, 9, 10, -1, 0, 1, 2, 3, 4])["rank_coefficient"]
    for i, coefficients in enumerate(alone):
        torch.testing.assert_close(together[[i, 6 + i]], coefficients)
    torch.testing.assert_close(together[5], spectra.tail_coefficient(other, 1, left=True))


def test_half_of_a_pair_without_its_other_half_is_a_matrix_of_its_own():
    a_info, b_info = pair_infos(((4, 3), (9, 4)))
    a, b = randn(4, 3), randn(9, 4, seed=1)
    state = refreshed(Spectrum(2), [a, b], [a_info, b_info], [-1, -1])
    for x, info, coefficient in zip((a, b), (a_info, b_info), state["rank_coefficient"], strict=True):
        torch.testing.assert_close(penalty(x, coefficient, info), spectra.tail_gradient(x, 2))


def test_partners_that_are_no_product_keep_their_own_spectra():
    """The factors of a Kronecker product are partners too, but no product of theirs is penalized."""
    shapes = ((4, 6), (4, 5))
    infos = [ParamInfo(shapes[0], "lokr_w1", True), ParamInfo(shapes[1], "lokr_w2", True)]
    params = [randn(*shapes[0]), randn(*shapes[1], seed=1)]
    state = refreshed(Spectrum(2), params, infos, [1, 0])
    for x, info, coefficient in zip(params, infos, state["rank_coefficient"], strict=True):
        torch.testing.assert_close(penalty(x, coefficient, info), spectra.tail_gradient(x, 2))


@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE])
def test_penalty_is_zero_when_rank_is_at_most_the_target(dtype):
    wide = low_rank(6, 20, [3.0, 1.0, 0.1]).to(dtype)
    a, b = randn(6, 20, seed=3).to(dtype), low_rank(15, 6, [2.0, 0.5]).to(dtype)
    a_info, b_info = pair_infos(((6, 20), (15, 6)))
    infos = [ParamInfo((6, 20)), a_info, b_info]
    state = refreshed(Spectrum(3), [wide, a, b], infos, [-1, 2, 1])
    assert torch.equal(state["rank_coefficient"], torch.zeros_like(state["rank_coefficient"]))
    # one rank less, and the same matrices are penalized
    state = refreshed(Spectrum(1), [wide, a, b], infos, [-1, 2, 1])
    assert (state["rank_coefficient"].flatten(1).abs().amax(1) > 1e-3).all()


@pytest.mark.parametrize("target", [1, 0.9])
def test_zero_matrices_are_left_alone(target):
    a, b = randn(4, 12), torch.zeros(7, 4, dtype=DOUBLE)
    state = refreshed(Spectrum(target), [a, b], pair_infos(((4, 12), (7, 4))), [1, 0])
    assert torch.equal(state["rank_coefficient"], torch.zeros(2, 4, 4, dtype=DOUBLE))
    assert torch.equal(state["emphasis_projection"][1], torch.zeros(4, 4, dtype=DOUBLE))
    assert state["emphasis_projection"][0].norm() > 0.9


@pytest.mark.parametrize("scale", [1e-12, 1e-4, 1e8])
def test_float32_agrees_with_the_reference_at_any_scale(scale):
    a, b = (scale * randn(8, 40, seed=1)).float(), (randn(30, 8, seed=2)).float()
    infos = pair_infos(((8, 40), (30, 8)))
    state = refreshed(Spectrum(3), [a, b], infos, [1, 0])
    for i, (x, want) in enumerate(zip((a, b), spectra.pair_tail_gradients(a, b, 3), strict=True)):
        got = penalty(x, state["rank_coefficient"][i], infos[i]).double()
        assert (got - want).norm() <= 2e-5 * want.norm()


def test_penalty_follows_its_coefficient_to_new_weights():
    """Between measurements, the tail that was found is applied to the weights as they are now."""
    info = ParamInfo((4, 10))
    coefficient = refreshed(Spectrum(2), [randn(4, 10)], [info])["rank_coefficient"]
    now = randn(4, 10, seed=5)
    values, _ = run_technique(
        RankPenalty(0.3),
        {"grad": randn(1, 4, 10, seed=6), "param": now[None]},
        {"rank_coefficient": coefficient},
        info=info,
    )
    want = spectra.penalized_gradient(
        randn(4, 10, seed=6), now, spectra.tail_coefficient(randn(4, 10), 2, left=True), left=True, strength=0.3
    )
    torch.testing.assert_close(values["grad"][0], want)


def test_refresh_twice_is_refresh_once():
    infos = [*pair_infos(((4, 9), (6, 4))), ParamInfo((4, 5))]
    params = [randn(4, 9), randn(6, 4, seed=1), randn(4, 5, seed=2)]
    spectrum = Spectrum(0.7)
    once = refreshed(spectrum, params, infos, [1, 0, -1])
    twice = {**once, **spectrum.refresh(once, infos, related(torch.tensor([1, 0, -1])))}
    assert all(torch.equal(once[name], twice[name]) for name in once)


def test_a_gram_matrix_that_is_not_finite_leaves_the_old_coefficients():
    infos = [*pair_infos(((4, 9), (6, 4))), ParamInfo((4, 5))]
    spectrum = Spectrum(1)
    before = refreshed(spectrum, [randn(4, 9), randn(6, 4, seed=1), randn(4, 5, seed=2)], infos, [1, 0, -1])
    broken = {**before, "gram": before["gram"] * 4}
    broken["gram"][0, 1, 1] = float("nan")
    after = spectrum.refresh(broken, infos, related(torch.tensor([1, 0, -1])))
    for name, value in after.items():
        assert torch.isfinite(value).all()
        # the other half of the pair has no product to look at either
        assert torch.equal(value[:2], before[name][:2])
    torch.testing.assert_close(after["rank_coefficient"][2], before["rank_coefficient"][2] / 2)


def effective_rank(matrix: Tensor) -> float:
    sigma = torch.linalg.svdvals(matrix.double())
    p = sigma / sigma.sum()
    return float(torch.exp(-(p * torch.log(p.clamp_min(1e-30))).sum()))


def train_pair(strength: float, steps: int = 150, interval: int = 5) -> tuple[Tensor, float]:
    """Fit a noisy matrix of rank 2 by a LoRA pair of rank 6, driving the techniques as the engine does."""
    signal = low_rank(12, 16, [3.0, 2.0], seed=7).float()
    noisy = signal + 0.1 * randn(12, 16, seed=9).float()
    a, b = 0.3 * randn(6, 16, seed=10).float(), torch.zeros(12, 6)
    infos = pair_infos(((6, 16), (12, 6)))
    chain = [Spectrum(2, interval), RankPenalty(strength)]
    states = [initial_state(chain[0], info, x[None]) for info, x in zip(infos, (a, b), strict=True)]
    for step in range(1, steps + 1):
        if step > 1 and (step - 2) % interval == 0:
            stacked = {name: torch.cat([s[name] for s in states]) for name in chain[0].population}
            for name, value in chain[0].refresh(stacked, infos, related(torch.tensor([1, 0]))).items():
                for i, state in enumerate(states):
                    state[name] = value[i : i + 1]
        error = b @ a - noisy
        new = []
        for i, (x, grad) in enumerate(((a, b.T @ error), (b, error @ a.T))):
            values, states[i] = run_technique(
                chain,
                {"grad": grad[None], "param": x[None]},
                states[i],
                info=infos[i],
                measuring=(step - 1) % interval == 0,
            )
            new.append(x - 0.05 * values["grad"][0])
        a, b = new
    return b @ a, float((b @ a - signal).norm() / signal.norm())


def test_training_with_the_penalty_ends_at_a_lower_effective_rank():
    plain, error_plain = train_pair(0.0)
    penalized, error_penalized = train_pair(0.3)
    assert effective_rank(plain) > 2.5
    assert effective_rank(penalized) < effective_rank(plain) - 0.3
    # and not by shrinking the matrix: what remains is nearer to the matrix of rank 2 behind the noise
    assert error_penalized < error_plain < 0.3
    kept, free = torch.linalg.svdvals(penalized)[:2], torch.linalg.svdvals(plain)[:2]
    torch.testing.assert_close(kept, free, rtol=0.02, atol=0)


@pytest.mark.parametrize("shape", SHAPES)
def test_emphasis_scales_the_leading_part_alone(shape):
    info = ParamInfo(shape)
    param, update = randn(*shape), randn(*shape, seed=3)
    projection = refreshed(Spectrum(1), [param], [info])["emphasis_projection"]
    values, _ = run_technique(
        LowRankEmphasis(1.2),
        {"grad": update[None], "update": update[None]},
        {"emphasis_projection": projection},
        info=info,
    )
    left = acts_on_left(info)
    want = spectra.emphasized_update(update, spectra.leading_projection(param, 1, left), left, 1.2)
    torch.testing.assert_close(values["update"][0], want)
    inside = multiply(update[None], projection, info)
    inside_after = multiply(values["update"], projection, info)
    torch.testing.assert_close(inside_after, 1.2 * inside)
    torch.testing.assert_close(values["update"] - inside_after, update[None] - inside)


def test_emphasis_never_compounds():
    """The moment is not touched: after a hundred steps the update is what one step would have made of it."""
    info = ParamInfo((4, 9))
    param, moment = randn(4, 9), randn(1, 4, 9, seed=3)
    state = {"emphasis_projection": refreshed(Spectrum(2), [param], [info])["emphasis_projection"], "exp_avg": moment}
    updates = []
    for t in range(1, 101):
        values, state = run_technique(
            LowRankEmphasis(1.2), {"grad": moment, "update": state["exp_avg"]}, state, info=info, t=t
        )
        updates.append(values["update"])
    assert torch.equal(state["exp_avg"], moment)
    assert torch.equal(updates[0], updates[-1])
    assert updates[-1].norm() <= 1.2 * moment.norm()


def test_nothing_happens_before_the_first_measurement():
    info = ParamInfo((4, 9))
    chain = [Spectrum(), RankPenalty(10.0), LowRankEmphasis(5.0)]
    grad, update = randn(2, 4, 9), randn(2, 4, 9, seed=1)
    values, _ = run_technique(
        chain, {"grad": grad, "update": update, "param": randn(2, 4, 9, seed=2)}, info=info, measuring=True
    )
    assert torch.equal(values["grad"], grad)
    assert torch.equal(values["update"], update)


@given(
    rows=st.integers(1, 9),
    columns=st.integers(1, 9),
    target=st.one_of(st.integers(1, 9), st.floats(0.05, 0.95)),
    seed=st.integers(0, 1000),
)
@settings(max_examples=40, deadline=None)
def test_spectrum_equals_the_reference(rows, columns, target, seed):
    param, info = randn(rows, columns, seed=seed), ParamInfo((rows, columns))
    state = refreshed(Spectrum(target), [param], [info])
    projection = state["emphasis_projection"][0]
    torch.testing.assert_close(projection @ projection, projection)
    torch.testing.assert_close(projection, spectra.leading_projection(param, target, acts_on_left(info)))
    got = penalty(param, state["rank_coefficient"][0], info)
    torch.testing.assert_close(got, spectra.tail_gradient(param, target), rtol=1e-5, atol=1e-6)
    # a unit step along every tail direction: the penalty is bounded whatever the singular values
    assert torch.linalg.matrix_norm(got, 2) < 1 + 1e-5


def test_which_parameters_have_a_spectrum():
    assert has_spectrum(ParamInfo((MAX_SIDE, 5000)))
    assert has_spectrum(ParamInfo((5000, MAX_SIDE)))
    assert not has_spectrum(ParamInfo((MAX_SIDE + 1, MAX_SIDE + 1)))
    assert not has_spectrum(ParamInfo((7,)))
    assert not has_spectrum(ParamInfo(()))
    assert not has_spectrum(ParamInfo((0, 5)))
    assert not has_spectrum(ParamInfo((5, 0)))
    # half of a pair has its rank for a side, wherever the shorter side may be
    assert side(ParamInfo((8, 4), "lora_a", True)) == 8
    assert side(ParamInfo((8, 4), "lora_a", False)) == 4
    assert side(ParamInfo((4, 8, 1, 1), "lora_b", True)) == 8
    assert not has_spectrum(ParamInfo((MAX_SIDE + 1, 2), "lora_a", True))
    for technique in (Spectrum(), RankPenalty(), LowRankEmphasis()):
        assert technique.applies(ParamInfo((4, 9)))
        assert not technique.applies(ParamInfo((9,)))
    assert not LowRankEmphasis(1.0).applies(ParamInfo((4, 9)))
    assert not RankPenalty(0.0).applies(ParamInfo((4, 9)))


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: Spectrum(0), "rank_target=0"),
        (lambda: Spectrum(1.5), "share of energy"),
        (lambda: Spectrum(True), "rank_target=True"),
        (lambda: Spectrum(0.9, 0), "interval=0"),
        (lambda: RankPenalty(-1.0), "strength=-1.0"),
        (lambda: RankPenalty(float("nan")), "strength=nan"),
        (lambda: LowRankEmphasis(-0.1), "factor=-0.1"),
    ],
)
def test_senseless_arguments_are_refused(make, text):
    with pytest.raises(ValueError, match=text):
        make()


def test_the_hot_path_is_one_graph():
    info = ParamInfo((4, 9))
    spectrum, penalize, emphasize = Spectrum(2), RankPenalty(0.1), LowRankEmphasis(1.2)
    state = {"rank_coefficient": randn(2, 4, 4), "emphasis_projection": randn(2, 4, 4, seed=1)}

    def step(grad: Tensor, param: Tensor, update: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        flow = Flow({"grad": grad, "param": param, "update": update}, state, {}, {}, info)
        flow["spectrum.whole"] = spectrum.whole_matrix(flow, flow["param"])
        spectrum.settle(flow, {})
        flow["rank_penalty.whole"] = penalize.whole_matrix(flow, flow["param"])
        penalize.transform(flow)
        flow["low_rank_emphasis.whole"] = emphasize.whole_matrix(flow, flow["update"])
        emphasize.transform(flow)
        return flow["grad"], flow["update"], flow.new["gram"]

    inputs = [randn(2, 4, 9, seed=i) for i in range(3)]
    compiled = torch.compile(step, fullgraph=True, backend="eager")
    for got, want in zip(compiled(*inputs), step(*inputs), strict=True):
        torch.testing.assert_close(got, want)
