"""Reference: rates by role, row and Kronecker factor, and decay by gradient and rank; one parameter at a time, float64.

Formulas and sources are in the technique of the same name in :mod:`hina_optim.techniques`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

__all__ = ["ada_decay_factor", "kronecker_factor", "rank_aware_drift", "role_factor", "row_factors"]


def _norm(x: Tensor) -> float:
    return math.sqrt(math.fsum(v * v for v in x.double().flatten().tolist()))


def row_factors(param: Tensor, eta: float) -> list[float]:
    """ALLoRA's factor on the rate of every row.

    Args:
        param: Two dimensions or more.
        eta: Largest factor.
    """
    return [1 / math.sqrt(_norm(row) + 1 / eta**2) for row in param]


def role_factor(role: str | None, ratio: float) -> float:
    """LoRA+'s factor on the rate of a parameter of this role."""
    if role is None:
        return 1.0
    if role.startswith("lora_"):
        fast = role in ("lora_b", "lora_mid")
    elif role.startswith("loha_"):
        fast = role.endswith("_a") or role in ("loha_t1", "loha_t2")
    else:
        fast = role.startswith("lokr_w2") or role == "lokr_t2"
    return ratio if fast else 1.0


def kronecker_factor(factors: Mapping[str, Tensor], strength: float) -> float:
    """Factor on the rate of every factor of one LoKr adapter.

    Args:
        factors: ``{role without "lokr_": weights}``, what is known of it: ``w1`` or ``w1_a`` and ``w1_b``, ``w2`` or
            ``w2_a`` and ``w2_b``, and ``t2`` where there is one.
        strength: Weight of the product of norms.
    """
    product = 1.0
    for side, core in (("w1", "t1"), ("w2", "t2")):
        if side in factors:
            product *= _norm(factors[side])
        elif f"{side}_a" in factors and f"{side}_b" in factors:
            product *= _norm(factors[f"{side}_a"]) * _norm(factors[f"{side}_b"])
            product *= _norm(factors[core]) if core in factors else 1.0
        else:
            return 1.0
    return 1 / (1 + strength * product)


def ada_decay_factor(grad: Tensor) -> Tensor:
    """AdaDecay's factor on the decay of every element."""
    sizes = [abs(g) for g in grad.double().flatten().tolist()]
    if not any(sizes):
        return torch.ones_like(grad, dtype=torch.float64)
    mean = math.fsum(sizes) / len(sizes)
    mean_square = math.fsum(g * g for g in sizes) / len(sizes)
    variance = math.fsum((g - mean) ** 2 for g in sizes) / len(sizes)
    std = math.sqrt(variance + 1e-6 * mean_square)
    factors = [2 / (1 + math.exp(min(-4 * (g - mean) / std, 700.0))) for g in sizes]
    return torch.tensor(factors, dtype=torch.float64).reshape(grad.shape)


def rank_aware_drift(param: Tensor, strength: float) -> Tensor:
    """What the decay takes beyond ``strength`` times the weights, from none in the leading direction to as much again.

    Args:
        param: Two dimensions or more.
        strength: Learning rate times weight decay.
    """
    u, sigma, vt = torch.linalg.svd(param.double().reshape(param.shape[0], -1), full_matrices=False)
    drift = torch.zeros_like(u[:, :1] @ vt[:1])
    last = max(len(sigma) - 1, 1)
    for i, value in enumerate(sigma.tolist()):
        drift += strength * i / last * value * torch.outer(u[:, i], vt[i])
    return drift.reshape(param.shape)
