"""Reference: rank penalty and low-rank emphasis by plain singular value decompositions, matrix by matrix, in float64.

Read this before :mod:`hina_optim.techniques.spectrum`, which reaches the same numbers from small Gram matrices.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = [
    "emphasized_update",
    "kept_rank",
    "leading_projection",
    "matrix_view",
    "pair_coefficients",
    "pair_tail_gradients",
    "penalized_gradient",
    "tail_coefficient",
    "tail_gradient",
    "tail_sum",
]


def matrix_view(x: Tensor) -> Tensor:
    """First dimension × all others, in float64."""
    return x.double().reshape(x.shape[0], -1)


def kept_rank(sigma: Tensor, target: int | float) -> int:
    """``k``: the target itself, or the least number of leading singular values that hold a share of the energy.

    Args:
        sigma: Singular values, descending.
        target: A rank (int), or a share in (0, 1) of the sum of squares (float).
    """
    if isinstance(target, int):
        return min(target, len(sigma))
    energies = [float(s) ** 2 for s in sigma]
    wanted = target * sum(energies)
    kept, k = 0.0, 0
    while k < len(energies) and kept < wanted:
        kept += energies[k]
        k += 1
    return k


def tail_sum(x: Tensor, k: int) -> Tensor:
    """Sum of the singular values of the matrix view beyond the ``k`` largest; differentiable."""
    sigma: Tensor = torch.linalg.svdvals(matrix_view(x))
    return sigma[k:].sum()


def _tail(matrix: Tensor, target: int | float, cutoff: float) -> tuple[Tensor, Tensor, Tensor]:
    """Singular triplets beyond the kept rank, without those of value at most ``cutoff`` times the largest."""
    u, sigma, vt = torch.linalg.svd(matrix, full_matrices=False)
    k = kept_rank(sigma, target)
    tail = [i for i in range(k, len(sigma)) if sigma[i] > cutoff * sigma[0]]
    return u[:, tail], sigma[tail], vt[tail].T


def tail_gradient(x: Tensor, target: int | float, cutoff: float = 1e-12) -> Tensor:
    """Gradient of the tail sum: ``U_t·V_tᵀ`` over the tail, in the shape of ``x``.

    Args:
        x: Two dimensions or more.
        target: Rank or share of energy to keep.
        cutoff: Singular values up to this share of the largest count as zero.
    """
    u, _, v = _tail(matrix_view(x), target, cutoff)
    return (u @ v.T).reshape(x.shape)


def tail_coefficient(x: Tensor, target: int | float, left: bool, cutoff: float = 1e-12) -> Tensor:
    """The small matrix ``K`` with ``K·M`` (left) or ``M·K`` equal to the gradient of the tail sum of ``M``."""
    u, sigma, v = _tail(matrix_view(x), target, cutoff)
    vectors = u if left else v
    small = torch.zeros(vectors.shape[0], vectors.shape[0], dtype=torch.float64)
    for i in range(len(sigma)):
        small += torch.outer(vectors[:, i], vectors[:, i]) / sigma[i]
    return small


def pair_tail_gradients(a: Tensor, b: Tensor, target: int | float, cutoff: float = 1e-12) -> tuple[Tensor, Tensor]:
    """Gradients with respect to A and B of the tail sum of the product ``B·A``, by the chain rule on the product."""
    u, _, v = _tail(matrix_view(b) @ matrix_view(a), target, cutoff)
    of_product = u @ v.T
    of_a = matrix_view(b).T @ of_product
    of_b = of_product @ matrix_view(a).T
    return of_a.reshape(a.shape), of_b.reshape(b.shape)


def pair_coefficients(a: Tensor, b: Tensor, target: int | float, cutoff: float = 1e-12) -> tuple[Tensor, Tensor]:
    """The small matrices with ``K_A·A`` and ``B·K_B`` equal to :func:`pair_tail_gradients`, by pseudo-inverses."""
    of_a, of_b = pair_tail_gradients(a, b, target, cutoff)
    left = matrix_view(of_a) @ torch.linalg.pinv(matrix_view(a), rtol=cutoff)
    right = torch.linalg.pinv(matrix_view(b), rtol=cutoff) @ matrix_view(of_b)
    return left, right


def leading_projection(x: Tensor, target: int | float, left: bool, cutoff: float = 1e-12) -> Tensor:
    """Projection on the leading left (or right) singular vectors."""
    u, sigma, vt = torch.linalg.svd(matrix_view(x), full_matrices=False)
    vectors = u if left else vt.T
    small = torch.zeros(vectors.shape[0], vectors.shape[0], dtype=torch.float64)
    for i in range(kept_rank(sigma, target)):
        if sigma[i] > cutoff * sigma[0]:
            small += torch.outer(vectors[:, i], vectors[:, i])
    return small


def penalized_gradient(grad: Tensor, param: Tensor, coefficient: Tensor, left: bool, strength: float) -> Tensor:
    """``g + strength·K·θ``, or ``g + strength·θ·K``."""
    matrix = matrix_view(param)
    penalty = coefficient @ matrix if left else matrix @ coefficient
    return grad.double() + strength * penalty.reshape(param.shape)


def emphasized_update(update: Tensor, projection: Tensor, left: bool, factor: float) -> Tensor:
    """The update with its part in the leading subspace multiplied by ``factor``."""
    matrix = matrix_view(update)
    inside = projection @ matrix if left else matrix @ projection
    return (matrix - inside + factor * inside).reshape(update.shape)
