"""Histograms that add up, the quantiles made of them, and ranks in proportion to importance."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hina_optim.optimizers.statistics import BINS, CHUNK, log_histogram, log_quantiles, rank_pattern, resolution
from hina_optim.techniques.base import ParamInfo
from hina_optim.techniques.importance import analyze_importance
from hina_optim.techniques.relationships import interaction_type

LOW, HIGH = 1e-7, 1e-3


@settings(max_examples=25, deadline=None)
@given(
    exponents=st.lists(st.floats(-7, -3), min_size=1, max_size=60),
    share=st.sampled_from([0.05, 0.5, 0.95, 1.0]),
    cut=st.integers(0, 60),
    deterministic=st.booleans(),
)
def test_quantiles_to_within_one_bin_and_additive(exponents, share, cut, deterministic):
    x = torch.tensor([10.0**e for e in exponents]).clamp(LOW, HIGH)
    torch.use_deterministic_algorithms(deterministic)
    try:
        counts = log_histogram([x], LOW, HIGH)
        pieces = log_histogram([x[:cut]], LOW, HIGH) + log_histogram([x[cut:]], LOW, HIGH)
    finally:
        torch.use_deterministic_algorithms(False)
    assert torch.equal(counts, pieces)
    assert counts.sum() == len(x)
    exact = x.sort().values[math.ceil(share * len(x)) - 1].item()
    value = log_quantiles(counts, LOW, HIGH, [share]).item()
    assert value == pytest.approx(exact, rel=resolution(LOW, HIGH) - 1 + 1e-4)


def test_histogram_of_bf16_beyond_the_bounds_and_of_one_value():
    low, high = 1e-6, 9e-4
    x = torch.tensor([low, high]).bfloat16()
    assert float(x[0]) < low and float(x[1]) > high, "these two are rounded outwards"
    counts = log_histogram([x], low, high)
    assert counts[0] == counts[-1] == 1
    same = log_histogram([torch.full((9,), 3e-4)], 3e-4, 3e-4)
    assert same.sum() == 9
    assert log_quantiles(same, 3e-4, 3e-4, [0.05, 0.95]).tolist() == pytest.approx([3e-4, 3e-4], rel=1e-3)


def test_nothing_counted_is_nan_and_chunks_lose_nothing():
    assert log_histogram([], LOW, HIGH).shape == (BINS,)
    assert log_quantiles(log_histogram([], LOW, HIGH), LOW, HIGH, [0.5]).isnan().all()
    x = torch.full((CHUNK + 5,), 1e-4)
    assert log_histogram([x[:3], x, x[:7]], LOW, HIGH).sum() == CHUNK + 15


def test_rank_pattern_rules():
    lora = {"m.base_model.model.a.q.lora_A.default.weight": 1.0, "m.base_model.model.a.q.lora_B.default.weight": 3.0}
    assert rank_pattern({**lora, "a.head.weight": 50.0}, 8) == {"a.q": 8}
    assert rank_pattern({"a.weight": 3.0, "b.weight": 1.0, "b.bias": 9.0}, 8) == {"a": 12, "b": 4}
    many = {f"m{i}.weight": 0.01 for i in range(20)} | {"big.weight": 100.0}
    pattern = rank_pattern(many, 8)
    assert pattern["big"] == 32 and pattern["m0"] == 1
    assert rank_pattern({"a.weight": 0.0}, 8) == rank_pattern({}, 8) == rank_pattern({"scale": 1.0}, 8) == {}


def test_analysis_of_importance():
    names = list("abcdef")
    result = analyze_importance(names, torch.tensor([1.0, 1.0, 1.0, 1.0, 3.0, 0.1]), limit=1)
    assert result["total_parameters"] == 6
    assert result["importance_statistics"] == pytest.approx(
        {"mean": 7.1 / 6, "max": 3.0, "min": 0.1, "std": (13.01 / 6 - (7.1 / 6) ** 2) ** 0.5}
    )
    assert [name for name, _ in result["high_importance_params"]] == ["e"]
    assert [name for name, _ in result["low_importance_params"]] == ["f"]
    nothing = analyze_importance([], torch.zeros(0))
    assert nothing["total_parameters"] == 0
    assert nothing["importance_statistics"] == {"mean": 0.0, "max": 0.0, "min": 0.0, "std": 0.0}
    assert analyze_importance(["a", "b"], torch.ones(2))["high_importance_params"] == []


def test_interaction_types():
    pairs = {
        "same_shape": ((4, 6), (4, 2, 3)),
        "transposed_shape": ((4, 6), (6, 4)),
        "shared_dimension": ((4, 6), (7, 4)),
        "similar_gradients": ((4, 6), (7, 5)),
    }
    for word, (a, b) in pairs.items():
        assert interaction_type(ParamInfo(a), ParamInfo(b), False) == word
        assert interaction_type(ParamInfo(a), ParamInfo(b), True) == "adapter_pair"
