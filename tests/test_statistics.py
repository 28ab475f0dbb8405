"""Histograms that add up, the quantiles made of them, and ranks in proportion to importance."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hina_optim.optimizers.statistics import BINS, CHUNK, log_histogram, log_quantiles, rank_pattern, resolution

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
