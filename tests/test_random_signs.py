"""The signs that sketches are made with: balanced, the same everywhere, and knowing nothing of each other."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hina_optim.techniques.relationships import with_random_signs


def signs_at(index: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    return with_random_signs(torch.ones(index.shape, dtype=dtype), index).double()


def test_random_signs_are_balanced_and_the_same_for_a_shard():
    index = torch.arange(1 << 16)
    signs = signs_at(index)
    assert set(signs.tolist()) == {-1, 1}
    assert abs(float(signs.mean())) < 0.02
    # not periodic in the buckets of the sketch
    assert (signs.reshape(-1, 64).mean(0).abs() < 0.15).all()
    assert torch.equal(signs_at(index[1000:2000]), signs[1000:2000])
    assert torch.equal(signs_at(index.to(torch.int32)), signs)
    assert torch.equal(signs_at(index, torch.float64), signs)
    far = signs_at(torch.arange(1000) + (1 << 40))
    assert abs(float(far.mean())) < 0.1


@pytest.mark.parametrize("start", [0, 10**9])
def test_random_signs_know_nothing_of_each_other(start: int):
    """Over all distances, not one at which signs agree more often than chance has it; and no frequency stands out."""
    n = 1 << 18
    signs = signs_at(torch.arange(n) + start)
    power = torch.fft.rfft(torch.cat([signs, torch.zeros(n)])).abs().square()
    agreement = torch.fft.irfft(power)[1 : n // 2] / n
    assert agreement.abs().max() * n**0.5 < 6
    assert torch.fft.rfft(signs).abs().square()[1:].max() / n < 25


def test_random_signs_change_nothing_but_the_sign():
    x = torch.tensor([[1.5, -2.0, 0.0, 1e-40, 3e38, -7.0]])
    changed = with_random_signs(x, torch.arange(6)[None])
    assert torch.equal(changed.abs(), x.abs())
    assert torch.equal(with_random_signs(x.double(), torch.arange(6)[None]), changed.double())
