"""The rank of many adapters with one trip to the host: small Gram matrices there, eigenvalues here.

The singular values of a matrix follow from the Gram matrix of its shorter side; those of a product ``B·A`` from
``A·Aᵀ`` and ``Bᵀ·B``, whose sides are the rank: they are those of ``√(Bᵀ·B)·√(A·Aᵀ)``. A Gram matrix in float64
resolves singular values down to about 1e-7 of the largest, far below any threshold of
:func:`~hina_optim.evaluation.analyze_lora_rank`, and its entries are all that has to leave the device.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from hina_optim.evaluation.rank import (
    Hadamard,
    Kronecker,
    LoraSpectrum,
    Weights,
    khatri_rao,
    summarize,
)

__all__ = ["factors", "gram_sides", "spectra_of_many"]


def factors(weights: Weights) -> Iterator[Any]:
    """The tensors that something :func:`~hina_optim.evaluation.lora_spectrum` takes is made of."""
    if isinstance(weights, (Kronecker, Hadamard)):
        weights = (weights.first, weights.second)
    if isinstance(weights, tuple):
        for one in weights:
            yield from factors(one)
    else:
        yield weights


def gram_sides(weights: Weights) -> list[int]:
    """Sides of the Gram matrices that its singular values are read off, two for each product."""
    if isinstance(weights, Kronecker):
        return gram_sides(weights.first) + gram_sides(weights.second)
    if isinstance(weights, Hadamard):
        return [weights.first[0].shape[0] * weights.second[0].shape[0]] * 2
    if isinstance(weights, tuple):
        return [weights[0].shape[0]] * 2
    return [min(weights.shape[0], weights.numel() // max(weights.shape[0], 1))]


@torch.no_grad()
def spectra_of_many(
    named: Mapping[str, Weights], threshold: float = 0.01, energy: float = 0.9
) -> dict[str, LoraSpectrum | None]:
    """The spectra of many matrices and adapters, with one wait for the device.

    Args:
        named: By any name, what :func:`~hina_optim.evaluation.lora_spectrum` takes, of tensors on one device, not
            empty. Sharded ones (DTensor) are gathered one by one, so that all ranks must call this together.
        threshold: As for :func:`~hina_optim.evaluation.lora_spectrum`.
        energy: As for :func:`~hina_optim.evaluation.lora_spectrum`.

    Returns:
        By name; None for weights that are not finite.
    """
    grams = [gram.flatten() for weights in named.values() for gram in _grams(weights)]
    if not grams:
        return {}
    numbers = torch.cat(grams).cpu().double()
    result: dict[str, LoraSpectrum | None] = {}
    for name, weights in named.items():
        sides = gram_sides(weights)
        here, numbers = numbers.split([sum(s * s for s in sides), numbers.numel() - sum(s * s for s in sides)])
        if not bool(torch.isfinite(here).all()):
            result[name] = None
            continue
        matrices = iter([g.reshape(s, s) for g, s in zip(here.split([s * s for s in sides]), sides, strict=True)])
        result[name] = summarize(_sigma(weights, matrices), threshold, energy)
    return result


def _grams(weights: Weights) -> list[Tensor]:
    if isinstance(weights, Kronecker):
        return _grams(weights.first) + _grams(weights.second)
    if isinstance(weights, Hadamard):
        (a1, b1), (a2, b2) = ((_view(one) for one in pair) for pair in (weights.first, weights.second))
        weights = khatri_rao((a1, b1), (a2, b2))
    if isinstance(weights, tuple):
        a, b = (_view(one) for one in weights)
        return [a @ a.mT, b.mT @ b]
    matrix = _view(weights)
    return [matrix @ matrix.mT if matrix.shape[0] <= matrix.shape[1] else matrix.mT @ matrix]


def _view(parameter: Tensor) -> Tensor:
    """The whole matrix view in float64, where the device has it."""
    whole = parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter
    return whole.flatten(1).to(torch.float32 if whole.device.type == "mps" else torch.float64)


def _sigma(weights: Weights, grams: Iterator[Tensor]) -> Tensor:
    """Descending singular values from the Gram matrices in the order in which :func:`_grams` gives them."""
    if isinstance(weights, Kronecker):
        first = _sigma(weights.first, grams)
        return torch.outer(first, _sigma(weights.second, grams)).flatten().sort(descending=True).values
    if isinstance(weights, (Hadamard, tuple)):
        (vectors_a, root_a), (vectors_b, root_b) = _root(next(grams)), _root(next(grams))
        sigma: Tensor = torch.linalg.svdvals(root_b[:, None] * (vectors_b.mT @ vectors_a) * root_a)
        return sigma
    return _root(next(grams))[1].flip(0)


def _root(gram: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvectors, and square roots of the ascending eigenvalues; what cannot be told from zero is zero."""
    values, vectors = torch.linalg.eigh(gram)
    resolution = len(values) * torch.finfo(values.dtype).eps
    return vectors, torch.where(values > resolution * values[-1], values, 0).clamp_min(0).sqrt()
