"""Inner products as sums of a technique: the right numbers, whatever way they are added up."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hina_optim.techniques.products import LARGE, PIECE, inner

SHAPES = [
    (3, 5, 7),
    (4,),
    (2, 0),
    (1, LARGE - 1),
    (1, LARGE),
    (3, 2, LARGE // 2),
    (1, PIECE + 3),
    (2, 3, PIECE),
]


def pair(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(shape, generator=generator, dtype=dtype) for _ in range(2))
    return a, a + b


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_inner_products_are_those_of_float64(shape: tuple[int, ...]) -> None:
    """To a few roundings of the sum, however many elements; of every parameter its own."""
    a, b = pair(shape)
    exact = (a.double() * b.double()).reshape(shape[0], -1).sum(1)
    found = inner(a, b)
    assert found.shape == (shape[0], *[1] * (len(shape) - 1)) and found.dtype == torch.float32
    torch.testing.assert_close(found.reshape(-1).double(), exact, rtol=2e-6, atol=1e-6)
    squares = inner(b, b)
    assert (squares >= 0).all()
    torch.testing.assert_close(
        squares.reshape(-1).double(), b.double().square().reshape(shape[0], -1).sum(1), rtol=1e-6, atol=0
    )


@pytest.mark.parametrize("shape", [(3, 5, 7), (3, 2, LARGE // 2), (2, 3, PIECE)], ids=str)
def test_a_batch_is_its_members_to_the_bit(shape: tuple[int, ...]) -> None:
    a, b = pair(shape)
    together = inner(a, b)
    for i in range(shape[0]):
        assert torch.equal(inner(a[i : i + 1], b[i : i + 1]), together[i : i + 1])


def test_float64_stays_float64() -> None:
    a, b = pair((1, 2 * LARGE), torch.float64)
    torch.testing.assert_close(inner(a, b), (a * b).sum(1, keepdim=True), rtol=1e-13, atol=0)


def test_any_layout() -> None:
    """Elements meet by their place in the tensor, not in memory."""
    a, b = pair((1, 256, 512))
    turned = b.transpose(1, 2).contiguous().transpose(1, 2)
    assert torch.equal(inner(a, turned), inner(a, b))


@pytest.mark.parametrize("shape", [(2, 3, 5), (1, 2 * LARGE)], ids=str)
def test_compiled_it_is_the_products(shape: tuple[int, ...]) -> None:
    a, b = pair(shape)
    traced = torch.compile(inner, fullgraph=True, backend="eager")(a, b)
    assert torch.equal(traced, a * b)
