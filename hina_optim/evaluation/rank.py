"""How many directions a weight matrix or an adapter really uses.

Everything is read off the singular values ``σ₁ >= σ₂ >= …`` of the matrix, or of the product that an adapter adds to
its layer. A product is never formed: the singular values of ``B·A`` are those of the small matrix ``R_B·R_Aᵀ``, with
``B = Q_B R_B`` and ``Aᵀ = Q_A R_A``; those of a Kronecker product are the products of its factors' singular values. A
scale (alpha) multiplies them all and changes no rank.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hina_optim import arguments as rule

__all__ = [
    "Hadamard",
    "Kronecker",
    "LoraSpectrum",
    "Weights",
    "analyze_lora_rank",
    "khatri_rao",
    "lora_spectrum",
    "singular_values",
    "summarize",
]

_SHARE = rule.Rule("a number in (0, 1)", lambda x: rule.UNIT.holds(x) and 0 < x < 1)


@dataclass(frozen=True)
class Kronecker:
    """LoKr: ``first ⊗ second``, each a matrix (``lokr_w1``, ``lokr_w2``) or a factored pair.

    LyCORIS and peft write a factored one as ``w2 = w2_a · w2_b``, so its pair ``(A, B)`` is ``(w2_b, w2_a)``.
    """

    first: Any
    second: Any


@dataclass(frozen=True)
class Hadamard:
    """LoHa: the element-wise product of two factored pairs, ``(B₁·A₁) ∘ (B₂·A₂)``.

    LyCORIS and peft write each as ``w1_a · w1_b``, so the pairs ``(A, B)`` are ``(w1_b, w1_a)`` and ``(w2_b, w2_a)``.
    Its rank is at most the product of the two; it is again a product of two factors, with that inner side (a row-wise
    and a column-wise Khatri-Rao product).
    """

    first: Any
    second: Any


#: A matrix or kernel, a pair (A, B), Kronecker or Hadamard.
Weights = Any


class LoraSpectrum(NamedTuple):
    """What the singular values ``σ`` of a matrix say about its rank. All are 0 for a matrix of zeros.

    Attributes:
        effective_rank: How many exceed ``threshold · σ₁``.
        entropy_rank: ``exp(−Σ pᵢ ln pᵢ)`` with ``pᵢ = σᵢ / Σσ``: between 1 and the rank, and continuous (O. Roy, M.
            Vetterli, "The effective rank: a measure of effective dimensionality", EUSIPCO 2007).
        stable_rank: ``Σσ² / σ₁²`` (M. Rudelson, R. Vershynin, "Sampling from large matrices", J. ACM 54, 2007).
        energy_rank: The least ``k`` with ``σ₁² + … + σₖ²`` at least ``energy`` of the sum of all.
        singular_values: Float64 on the CPU, descending. Of a product those that its inner side allows; all others are
            zero.
    """

    effective_rank: int
    entropy_rank: float
    stable_rank: float
    energy_rank: int
    singular_values: Tensor


def analyze_lora_rank(weights: Weights, threshold: float = 0.01) -> int:
    """The effective rank of a matrix or adapter: how many singular values exceed 1 % of the largest.

    Args:
        weights: A matrix, a kernel (viewed as first dimension × all others), a pair ``(A, B)`` of LoRA whose product
            ``B·A`` is meant (a convolution's ``B`` has a 1 × 1 kernel), :class:`Kronecker` or :class:`Hadamard`.
            Tensors or what ``torch.as_tensor`` reads.
        threshold: Share of the largest, in (0, 1).

    Returns:
        The effective rank; 0 for a matrix of zeros, such as an adapter before its first step. More about the spectrum:
        :func:`lora_spectrum`.

    Raises:
        ValueError: Fewer than two dimensions, empty, complex, not finite, two factors that do not fit, or a bad
            threshold.

    Example:
        >>> import torch
        >>> A, B = torch.randn(8, 512), torch.randn(768, 8)
        >>> analyze_lora_rank((A, B)), analyze_lora_rank(B @ A)
        (8, 8)
    """
    rule.check("analyze_lora_rank", "threshold", threshold, _SHARE)
    return summarize(_singular_values("analyze_lora_rank", weights), threshold, 0.9).effective_rank


def lora_spectrum(weights: Weights, threshold: float = 0.01, energy: float = 0.9) -> LoraSpectrum:
    """Four measures of the rank of a matrix or adapter, and its singular values.

    Args:
        weights: As for :func:`analyze_lora_rank`.
        threshold: Share of the largest singular value that counts as one, in (0, 1).
        energy: Share of the energy that ``energy_rank`` keeps, in (0, 1).

    Raises:
        ValueError: As :func:`analyze_lora_rank`.

    Example:
        >>> import torch
        >>> spectrum = lora_spectrum(torch.diag(torch.tensor([2.0, 1.0, 1.0, 0.001])))
        >>> spectrum.effective_rank, round(spectrum.stable_rank, 2), spectrum.energy_rank
        (3, 1.5, 3)
    """
    rule.check("lora_spectrum", "threshold", threshold, _SHARE)
    rule.check("lora_spectrum", "energy", energy, _SHARE)
    return summarize(_singular_values("lora_spectrum", weights), threshold, energy)


def singular_values(weights: Weights) -> Tensor:
    """Singular values of a matrix or adapter, without forming a product.

    Args:
        weights: As for :func:`analyze_lora_rank`.

    Returns:
        Float64 on the CPU, descending.

    Raises:
        ValueError: As :func:`analyze_lora_rank`.
    """
    return _singular_values("singular_values", weights)


def summarize(sigma: Tensor, threshold: float = 0.01, energy: float = 0.9) -> LoraSpectrum:
    """The measures of descending singular values, at least one; see :class:`LoraSpectrum`."""
    largest = float(sigma[0])
    if largest == 0:
        return LoraSpectrum(0, 0.0, 0.0, 0, sigma)
    share = sigma / largest  # squares of tiny values would underflow
    p = share / share.sum()
    square = share.square()
    kept = square.cumsum(0)
    return LoraSpectrum(
        effective_rank=int((share > threshold).sum()),
        entropy_rank=math.exp(float(torch.special.entr(p).sum())),
        stable_rank=float(square.sum()),
        # the sum of all reaches its own share whatever the rounding
        energy_rank=int((kept < energy * kept[-1]).sum()) + 1,
        singular_values=sigma,
    )


def _singular_values(owner: str, weights: Weights) -> Tensor:
    if isinstance(weights, Kronecker):
        first, second = _singular_values(owner, weights.first), _singular_values(owner, weights.second)
        return torch.outer(first, second).flatten().sort(descending=True).values
    if isinstance(weights, Hadamard):
        return _of_product(*khatri_rao(*_pairs(owner, weights)))
    if _is_pair(weights):
        return _of_product(*_pair(owner, weights))
    return _on_host(_matrix(owner, "weights", weights))


def _of_product(a: Tensor, b: Tensor) -> Tensor:
    """Of ``B·A`` from ``A`` ``[r, in]`` and ``B`` ``[out, r]``."""
    _, r_a = torch.linalg.qr(a.mT, mode="r")
    _, r_b = torch.linalg.qr(b, mode="r")
    return _on_host(r_b @ r_a.mT)


def _on_host(matrix: Tensor) -> Tensor:
    values: Tensor = torch.linalg.svdvals(matrix)
    return values.cpu()


def khatri_rao(first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """One pair ``(A, B)`` of which ``B·A`` is ``(B₁·A₁) ∘ (B₂·A₂)``, from two pairs of matrices."""
    (a1, b1), (a2, b2) = first, second
    a = torch.einsum("in,jn->ijn", a1, a2).flatten(0, 1)
    return a, torch.einsum("mi,mj->mij", b1, b2).flatten(1)


def _pairs(owner: str, weights: Hadamard) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    first, second = _pair(owner, weights.first), _pair(owner, weights.second)
    shapes = [(b.shape[0], a.shape[1]) for a, b in (first, second)]
    if shapes[0] != shapes[1]:
        raise ValueError(f"{owner}: the products of a Hadamard have shapes {shapes[0]} and {shapes[1]}, not the same.")
    return first, second


def _is_pair(weights: Any) -> bool:
    return isinstance(weights, Sequence) and len(weights) == 2 and all(_dimensions(one) >= 2 for one in weights)


def _dimensions(x: Any) -> int:
    return int(getattr(x, "ndim", 0))


def _pair(owner: str, pair: Any) -> tuple[Tensor, Tensor]:
    if not _is_pair(pair):
        raise ValueError(f"{owner}: a factor of a Hadamard must be a pair (A, B) of matrices.")
    a, b = (_matrix(owner, name, one) for name, one in zip("AB", pair, strict=True))
    if a.shape[0] != b.shape[1]:
        raise ValueError(
            f"{owner}: the pair has A {tuple(pair[0].shape)} and B {tuple(pair[1].shape)}; the first side of A must be "
            "the last of B (a kernel of B is 1×1), as in the product B·A."
        )
    return a, b.to(a.device)


def _matrix(owner: str, name: str, given: Any) -> Tensor:
    """The matrix view in float64, on its device (MPS has no float64)."""
    try:
        matrix = torch.as_tensor(given).detach()
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{owner}: {name} is not a matrix, nor a pair (A, B) of matrices: {error}") from error
    shape = tuple(matrix.shape)
    if matrix.ndim < 2 or matrix.numel() == 0:
        raise ValueError(f"{owner}: {name} has shape {shape}; it must be a matrix or kernel, and not empty.")
    if matrix.is_complex():
        raise ValueError(f"{owner}: {name} is complex; it must be real.")
    if hasattr(matrix, "full_tensor"):
        matrix = matrix.full_tensor()
    matrix = (matrix.cpu() if matrix.device.type == "mps" else matrix).to(torch.float64).flatten(1)
    if not bool(torch.isfinite(matrix).all()):
        raise ValueError(f"{owner}: {name} of shape {shape} has values that are not finite (NaN or infinity).")
    return matrix
