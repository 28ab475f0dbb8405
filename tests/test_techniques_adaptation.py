"""Importance and relationships: what they find, and the float64 reference."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from harness import initial_state, related, run_technique
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hina_optim.reference import adaptation
from hina_optim.techniques import relationships as module
from hina_optim.techniques.base import Flow, ParamInfo, PeriodicTechnique
from hina_optim.techniques.importance import ImportanceScaling
from hina_optim.techniques.relationships import Relationships, describe_relationships

DOUBLE = torch.float64
State = dict[str, Tensor]


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


class Population:
    """Parameters of any shapes under one periodic technique, driven as the engine does: measure, refresh, transform."""

    def __init__(
        self,
        technique: PeriodicTechnique,
        params: Sequence[Tensor],
        infos: Sequence[ParamInfo] | None = None,
        partners: Sequence[int] | None = None,
    ) -> None:
        self.technique = technique
        self.params = list(params)
        self.infos = list(infos or [ParamInfo(tuple(p.shape)) for p in params])
        self.partners = torch.tensor(partners if partners is not None else [-1] * len(self.params))
        self.states = [initial_state(technique, i, p[None]) for i, p in zip(self.infos, self.params, strict=True)]

    def measure(self, grads: Sequence[Tensor | None], measuring: bool = True) -> list[Tensor]:
        """One step; the rate of each parameter relative to the group's."""
        rates = []
        for i, grad in enumerate(grads):
            if grad is None:
                rates.append(torch.tensor(1.0))
                continue
            values, self.states[i] = run_technique(
                self.technique,
                {"grad": grad[None], "param": self.params[i][None], "rate": torch.ones((), dtype=grad.dtype)},
                self.states[i],
                info=self.infos[i],
                measuring=measuring,
            )
            rates.append(values["rate"].flatten()[0])
        return rates

    def refresh(self) -> None:
        for name, value in self.technique.refresh(self.stacked(), self.infos, related(self.partners)).items():
            for i, state in enumerate(self.states):
                state[name] = value[i : i + 1]

    def stacked(self) -> State:
        return {name: torch.cat([s[name] for s in self.states]) for name in self.technique.population}

    def rates(self) -> list[float]:
        return [float(r) for r in self.measure([torch.zeros_like(p) for p in self.params], measuring=False)]


MIXED = [(), (5,), (4, 6), (3, 2, 2, 2), (9, 2)]


def mixed(seed: int = 0, dtype: torch.dtype = DOUBLE, scale: float = 1.0) -> list[Tensor]:
    return [scale * randn(*shape, seed=seed + i, dtype=dtype) for i, shape in enumerate(MIXED)]


# --- importance -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [DOUBLE, torch.float32])
def test_importance_equals_the_reference_over_several_measurements(dtype):
    anchors = mixed(dtype=dtype)
    anchors[2] = torch.zeros_like(anchors[2])  # as a LoRA B begins
    population = Population(ImportanceScaling(1.5, 0.6), anchors)
    scores = [1.0] * len(MIXED)
    for t in range(4):
        population.params = [p + 0.1 * t * d for p, d in zip(anchors, mixed(50 + 10 * t, dtype), strict=True)]
        grads = mixed(100 + 10 * t, dtype)
        grads[1][2:] = 0
        grads[4] = torch.zeros_like(grads[4])
        population.measure(grads)
        population.refresh()
        measured = [
            adaptation.importance_measurement(g, p, a)
            for g, p, a in zip(grads, population.params, anchors, strict=True)
        ]
        raw = population.stacked()["importance_raw"]
        for row, m in zip(raw, measured, strict=True):
            torch.testing.assert_close(row[:3], torch.tensor([m.norm, m.drift, m.activity], dtype=dtype))
        scores = adaptation.importance_scores(scores, measured, 0.6)
        torch.testing.assert_close(population.stacked()["importance"], torch.tensor(scores, dtype=dtype))
        want = adaptation.importance_rates(scores, 1.5)
        torch.testing.assert_close(population.rates(), want, rtol=1e-5, atol=0)


def test_a_ten_times_larger_gradient_ranks_first():
    """Also against a tensor of a thousand times the elements, whose gradient norm is larger."""
    params = [randn(4, 4, seed=i) for i in range(5)] + [randn(128, 128, seed=9)]
    grads = [randn(4, 4, seed=20 + i) for i in range(5)] + [randn(128, 128, seed=29)]
    grads[3] = 10 * grads[3]
    assert grads[5].norm() > grads[3].norm()
    population = Population(ImportanceScaling(), params)
    population.measure(grads)
    population.refresh()
    rates = population.rates()
    assert rates.index(max(rates)) == 3
    assert rates[3] > 1 > rates[5]


@pytest.mark.parametrize("scale", [1e-3, 1e3, 1e-9])
def test_importance_is_free_of_the_scale_of_the_loss(scale):
    outcomes = []
    for factor in (1.0, scale):
        population = Population(ImportanceScaling(decay=0.5), mixed(dtype=torch.float32))
        for t in range(3):
            population.params = mixed(30 + t, torch.float32)
            population.measure(mixed(60 + 10 * t, torch.float32, factor))
            population.refresh()
        outcomes.append(torch.tensor(population.rates()))
    torch.testing.assert_close(*outcomes)
    assert outcomes[0].std() > 0.05


def test_importance_redistributes_and_is_bounded():
    params = [randn(6, 6, seed=i) for i in range(40)]
    grads = [10.0 ** (i / 5 - 4) * randn(6, 6, seed=100 + i) for i in range(40)]
    population = Population(ImportanceScaling(decay=0.0), params)
    population.measure(grads)
    population.refresh()
    rates = torch.tensor(population.rates())
    torch.testing.assert_close(rates.mean(), torch.tensor(1.0))
    assert rates.max() / rates.min() <= 3 / 0.1 + 1e-3
    assert rates.max() / rates.min() > 5


def test_importance_is_deterministic():
    outcomes = []
    for seed in (1, 2):
        torch.manual_seed(seed)  # the global generator plays no part
        population = Population(ImportanceScaling(), mixed())
        population.measure(mixed(7))
        population.refresh()
        outcomes.append(population.stacked())
    assert all(torch.equal(outcomes[0][name], outcomes[1][name]) for name in outcomes[0])


def test_importance_does_not_depend_on_how_parameters_are_batched():
    """Two parameters in one batch, as in a bucket, are measured as each alone."""
    params, grads = randn(2, 4, 6, dtype=DOUBLE), randn(2, 4, 6, seed=1, dtype=DOUBLE)
    _, together = run_technique(ImportanceScaling(), {"grad": grads, "param": params}, measuring=True)
    for i in range(2):
        one = {"grad": grads[i : i + 1], "param": params[i : i + 1]}
        _, alone = run_technique(ImportanceScaling(), one, measuring=True)
        torch.testing.assert_close(alone["importance_raw"][0], together["importance_raw"][i])


@pytest.mark.parametrize("technique", [ImportanceScaling(decay=0.5), Relationships(0.1)])
def test_refreshing_again_changes_nothing(technique):
    population = Population(technique, [randn(5, 6, seed=i) for i in range(4)])
    population.measure([randn(5, 6, seed=10 + i) for i in range(4)])
    population.refresh()
    once = population.stacked()
    population.refresh()
    assert all(torch.equal(once[name], value) for name, value in population.stacked().items())


def test_only_what_was_measured_counts():
    population = Population(ImportanceScaling(decay=0.5), mixed())
    grads = mixed(3)
    population.measure([grads[0], grads[1], None, grads[3], None])
    population.refresh()
    rates = population.rates()
    assert rates[2] == rates[4] == 1
    assert sum(rates[i] for i in (0, 1, 3)) == pytest.approx(3)
    before = population.stacked()["importance"]
    # parameter 0 is not measured now: its score stays, as do those of the parameters that never were
    population.measure([None, 9 * grads[1], None, grads[3], None])
    population.refresh()
    after = population.stacked()["importance"]
    assert torch.equal(after[[0, 2, 4]], before[[0, 2, 4]])
    assert after[1] != before[1]
    assert sum(population.rates()[i] for i in (0, 1, 3)) == pytest.approx(3)


def test_zero_gradients_and_still_weights_are_no_nan():
    params = [torch.zeros(3, 4), torch.zeros(5)]
    population = Population(ImportanceScaling(), params)
    population.measure([torch.zeros(3, 4), torch.zeros(5)])
    population.refresh()
    assert population.rates() == [1.0, 1.0]
    assert population.stacked()["importance"].tolist() == [1.0, 1.0]


def test_a_measurement_that_overflows_spoils_no_other():
    population = Population(ImportanceScaling(decay=0.5), mixed(dtype=torch.float32))
    grads = mixed(3, torch.float32)
    grads[2] = grads[2] * 1e30
    population.measure(grads)
    population.refresh()
    state = population.stacked()
    assert state["importance"][2] == 1
    assert torch.isfinite(torch.tensor(population.rates())).all()
    assert (state["importance"][[0, 1, 3, 4]] != 1).all()


def test_an_anchor_of_one_zero_is_a_whole_one():
    """A parameter that began at zero keeps a single zero, which broadcasts."""
    param, grad = randn(1, 4, 6, dtype=DOUBLE), randn(1, 4, 6, seed=1, dtype=DOUBLE)
    technique, info = ImportanceScaling(), ParamInfo((4, 6))
    full = {**initial_state(technique, info, param), "anchor": torch.zeros_like(param)}
    small = {**full, "anchor": torch.zeros(1, 1, 1, dtype=DOUBLE)}
    raws = [
        run_technique(technique, {"grad": grad, "param": param}, state, info=info, measuring=True)[1]["importance_raw"]
        for state in (full, small)
    ]
    assert torch.equal(*raws)
    assert raws[0][0, 1] == 1


@given(
    decay=st.floats(0, 0.99),
    strength=st.floats(0.05, 20),
    exponents=st.lists(st.floats(-12, 8), min_size=1, max_size=12),
)
@settings(max_examples=40, deadline=None)
def test_rates_have_mean_one_and_bounds_for_any_gradients(decay, strength, exponents):
    params = [randn(3, seed=i) for i in range(len(exponents))]
    population = Population(ImportanceScaling(strength, decay), params)
    for t in range(2):
        population.measure([10.0**e * randn(3, seed=50 + i + t) for i, e in enumerate(exponents)])
        population.refresh()
    rates = torch.tensor(population.rates())
    assert rates.mean() == pytest.approx(1, abs=1e-5)
    assert rates.max() <= 30 * rates.min() * (1 + 1e-5)


def test_more_strength_adapts_more():
    """The spread of the rates grows with the strength; at 1 they are the scores, at nearly 0 nothing is adapted."""
    spreads = []
    for strength in (0.01, 0.8, 1.0, 1.2):
        params = [randn(3, seed=i) for i in range(4)]
        population = Population(ImportanceScaling(strength, 0.5), params)
        population.measure([(1 + i) * randn(3, seed=50) for i in range(4)])
        population.refresh()
        rates = torch.tensor(population.rates())
        spreads.append(float(rates.max() - rates.min()))
        if strength == 1.0:
            scores = population.stacked()["importance"]
            torch.testing.assert_close(rates.to(scores), scores / scores.mean(), rtol=1e-5, atol=1e-6)
    assert spreads[0] < 0.02 and spreads[0] < spreads[1] < spreads[2] < spreads[3], spreads


# --- relationships ----------------------------------------------------------------------------------------------------


def test_a_lora_pair_is_found_and_beats_unrelated_matrices():
    shapes = [(4, 32), (24, 4), (16, 48), (16, 48), (7, 11)]
    infos = [
        ParamInfo(shapes[0], "lora_a", True),
        ParamInfo(shapes[1], "lora_b", True),
        *(ParamInfo(s) for s in shapes[2:]),
    ]
    params = [randn(*s, seed=i) for i, s in enumerate(shapes)]
    population = Population(Relationships(0.3, 0.9), params, infos, [1, 0, -1, -1, -1])
    for t in range(5):
        population.measure([randn(*s, seed=100 + 10 * t + i) for i, s in enumerate(shapes)])
        population.refresh()
    state = population.stacked()
    assert state["relation_score"][:2].tolist() == [1, 1]
    assert state["relation_partners"][:2, 0].tolist() == [1, 0]
    # same shape, independent gradients: half of the equalities, and a cosine near zero
    assert state["relation_partners"][2:4, 0].tolist() == [3, 2]
    assert 0.35 <= state["relation_score"][2] < 0.5
    # nothing in common with anyone
    assert state["relation_score"][4] == 0
    assert state["relation_partners"][4].tolist() == [-1, -1, -1]
    rates = population.rates()
    assert rates[:2] == pytest.approx([1.2, 1.2])
    assert rates[4] == 1

    listed = describe_relationships(
        list("abcde"), infos, population.partners, state["relation_partners"], state["relation_scores"]
    )
    assert [entry["names"] for entry in listed] == [("a", "b"), ("c", "d")]
    assert [entry["interaction_type"] for entry in listed] == ["adapter_pair", "same_shape"]
    assert listed[0]["shapes"] == (shapes[0], shapes[1])
    assert listed[0]["compatibility"] == 1.0


def test_no_relationships_are_an_empty_list():
    assert describe_relationships([], [], torch.zeros(0), torch.zeros(0, 3), torch.zeros(0, 3)) == []
    infos = [ParamInfo((2, 3)), ParamInfo((5, 7))]
    nobody = torch.full((2, 3), -1.0)
    assert describe_relationships(["a", "b"], infos, torch.tensor([-1, -1]), nobody, torch.zeros(2, 3)) == []


def test_gradients_that_agree_over_time_are_told_from_independent_ones():
    params = [randn(20, 30, seed=i) for i in range(3)]
    population = Population(Relationships(0.0, 0.8), params)
    for t in range(6):
        common = randn(20, 30, seed=40 + t)
        noise = [0.3 * randn(20, 30, seed=80 + 3 * t + i) for i in range(3)]
        population.measure([common + noise[0], -common + noise[1], 5 * noise[2]])
        population.refresh()
    state = population.stacked()
    related, unrelated = state["relation_scores"][0, 0], state["relation_scores"][2, 0]
    assert state["relation_partners"][0, 0] == 1
    assert related > 0.35 + 0.3 * 0.8
    assert unrelated < 0.35 + 0.3 * 0.3


@pytest.mark.parametrize("threshold", [0.0, 0.36, 1.0])
def test_relationships_equal_the_reference(threshold):
    shapes = [(4, 8), (8, 4), (4, 8), (6, 6), (6, 6), (4, 2, 2, 2), (3, 5), (1, 4), (5, 1), (5, 1)]
    infos = [ParamInfo(s) for s in shapes]
    partners = [1, 0, -1, -1, -1, -1, -1, -1, -1, -1]
    params = [randn(*s, seed=i, dtype=DOUBLE) for i, s in enumerate(shapes)]
    population = Population(Relationships(threshold, 0.7), params, infos, partners)
    sketches = [[0.0] * 64 for _ in shapes]
    for t in range(3):
        grads = [randn(*s, seed=30 + 20 * t + i, dtype=DOUBLE) for i, s in enumerate(shapes)]
        grads[4] = 2 * grads[3]
        grads[6] = torch.zeros_like(grads[6])
        population.measure(grads)
        population.refresh()
        sketches = [
            adaptation.sketch_average(old, adaptation.sketch(g), 0.7) for old, g in zip(sketches, grads, strict=True)
        ]
    state = population.stacked()
    torch.testing.assert_close(state["relation_sketch"], torch.tensor(sketches, dtype=DOUBLE))
    for i, want in enumerate(adaptation.relations(shapes, sketches, partners, threshold)):
        got = [
            (score, int(j))
            for score, j in zip(
                state["relation_scores"][i].tolist(), state["relation_partners"][i].tolist(), strict=True
            )
            if j >= 0
        ]
        assert [j for _, j in got] == [j for _, j in want]
        assert [s for s, _ in got] == pytest.approx([s for s, _ in want])
        assert state["relation_score"][i] == pytest.approx(want[0][0] if want else 0)


def test_relationships_are_free_of_the_scale_of_the_loss():
    outcomes = []
    for scale in (1.0, 1e3, 1e-3, 1e-25):
        population = Population(Relationships(0.1), [randn(5, 6, seed=i) for i in range(4)])
        population.measure([scale * randn(5, 6, seed=10 + i) for i in range(4)])
        population.refresh()
        outcomes.append(population.stacked())
    for other in outcomes[1:]:
        torch.testing.assert_close(outcomes[0]["relation_scores"], other["relation_scores"])
        assert torch.equal(outcomes[0]["relation_partners"], other["relation_partners"])


def large_population(count: int) -> tuple[Relationships, State, list[ParamInfo], Tensor]:
    technique = Relationships(0.3)
    infos = [ParamInfo((16, 64), "lora_a", True), ParamInfo((64, 16), "lora_b", True)] * (count // 2)
    states = {
        "relation_sketch": randn(count, 64),
        "relation_score": torch.zeros(count),
        "relation_partners": torch.full((count, 3), -1.0),
        "relation_scores": torch.zeros(count, 3),
    }
    return technique, states, infos, torch.arange(count) ^ 1


def test_a_thousand_matrices_are_compared_quickly_and_the_list_is_bounded():
    technique, states, infos, partners = large_population(1000)
    start = time.perf_counter()
    new = technique.refresh(states, infos, related(partners))
    assert time.perf_counter() - start < 2
    assert new["relation_partners"].shape == (1000, 3)
    assert torch.equal(new["relation_partners"][:, 0].long(), partners)
    assert (new["relation_partners"] >= 0).all()
    names = [str(i) for i in range(1000)]
    listed = describe_relationships(names, infos, partners, new["relation_partners"], new["relation_scores"])
    assert 500 <= len(listed) <= 3000
    assert [entry["interaction_type"] for entry in listed[:500]] == ["adapter_pair"] * 500


class LargestTensor(TorchDispatchMode):
    """The number of elements of the largest tensor that any operation returned."""

    numel = 0

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        self.numel = max([self.numel, *(x.numel() for x in tree_leaves(out) if isinstance(x, Tensor))])
        return out


def test_the_table_of_pairs_is_never_whole():
    technique, states, infos, partners = large_population(3000)
    with LargestTensor() as largest:
        new = technique.refresh(states, infos, related(partners))
    assert 3000 * 500 < largest.numel <= module.BLOCK < 3000 * 3000
    assert torch.equal(new["relation_partners"][:, 0].long(), partners)
    # the second best of a matrix in the last block, found by hand
    alike = torch.nn.functional.cosine_similarity(states["relation_sketch"], states["relation_sketch"][2998:2999]).abs()
    alike[1::2] = alike[2998] = -1
    assert new["relation_partners"][2998, 1] == alike.argmax()
    torch.testing.assert_close(new["relation_scores"][2998, 1], 0.35 + 0.3 * alike.max())


def test_which_parameters_are_compared():
    assert not Relationships().applies(ParamInfo((5,)))
    assert not Relationships().applies(ParamInfo((0, 5)))
    assert Relationships().measures(ParamInfo((5, 1)))
    assert ImportanceScaling().measures(ParamInfo(()))
    assert not ImportanceScaling().applies(ParamInfo((0,)))


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: ImportanceScaling(0.0), "adaptation_strength=0.0"),
        (lambda: ImportanceScaling(1.0, 1.0), "decay=1.0"),
        (lambda: ImportanceScaling(1.0, 0.9, 0), "interval=0"),
        (lambda: Relationships(1.2), "threshold=1.2"),
        (lambda: Relationships(0.3, -0.1), "decay=-0.1"),
        (lambda: Relationships(0.3, 0.9, 2.5), "interval=2.5"),
    ],
)
def test_senseless_arguments_are_refused(make, text):
    with pytest.raises(ValueError, match=text):
        make()


@pytest.mark.parametrize("technique", [ImportanceScaling(), Relationships()])
def test_the_hot_path_is_one_graph(technique):
    info = ParamInfo((4, 6))
    state = initial_state(technique, info, randn(2, 4, 6))

    def step(grad: Tensor, param: Tensor, rate: Tensor) -> list[Tensor]:
        index = torch.arange(24, dtype=torch.int32).reshape(1, 4, 6)
        flow = Flow({"grad": grad, "param": param, "rate": rate, "index": index}, state, {}, {}, info)
        technique.transform(flow)
        totals = {}
        for name, value in technique.sums(flow).items():
            if isinstance(value, Tensor):
                totals[name] = value.sum((1, 2), keepdim=True)
            else:
                totals[name] = torch.nn.functional.pad(value.value.flatten(1), (0, value.size - 24))
        technique.settle(flow, totals)
        return [flow["rate"], *flow.new.values()]

    inputs = [randn(2, 4, 6, seed=1), randn(2, 4, 6, seed=2), torch.tensor(1e-3)]
    compiled = torch.compile(step, fullgraph=True, backend="eager")
    for got, want in zip(compiled(*inputs), step(*inputs), strict=True):
        torch.testing.assert_close(got, want)
