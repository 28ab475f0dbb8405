"""Adaptive gradient regularization: large gradients are damped by their share of the whole."""

from __future__ import annotations

from typing import ClassVar

import torch

from hina_optim.techniques.base import Flow, ParamInfo, Sums, Technique

__all__ = ["AdaptiveGradientRegularization"]


class AdaptiveGradientRegularization(Technique):
    """Shrink every element of the gradient by its share of the sum of magnitudes.

    ``g ← g ⊙ (1 - |g| / Σ|g|)``, the sum over the whole parameter.

    The factor lies in [0, 1]: nothing is amplified, no sign flips, and a factor on the loss cancels. A gradient that
    is zero everywhere stays zero. A gradient with a single non-zero element becomes zero, which is what the formula
    says. For that reason parameters of one element are left alone: they would never move.

    Source: *Adaptive Gradient Regularization: A Faster and Generalizable Optimization Technique for Deep Neural
    Networks*, arXiv 2407.16944.
    """

    name: ClassVar[str] = "agr"
    sums_over: ClassVar[frozenset[str]] = frozenset({"grad"})
    settles: ClassVar[frozenset[str]] = frozenset({"grad"})

    def applies(self, info: ParamInfo) -> bool:
        """True for parameters of two or more elements."""
        return info.numel > 1

    def sums(self, flow: Flow) -> Sums:
        """``|g|``."""
        magnitude = flow["grad"].abs()
        if not torch.compiler.is_compiling():  # compiled, to compute it again costs less than to keep it
            flow["agr.magnitude"] = magnitude
        return {"magnitude": magnitude}

    def settle(self, flow: Flow, totals: dict[str, torch.Tensor]) -> None:
        """Apply the factor."""
        grad, total = flow["grad"], totals["magnitude"]
        # the inverse is one number a parameter; a gradient that is zero everywhere has none
        inverse = flow.once(torch.where(total > 0, 1 / total, 0))
        magnitude = flow.values.pop("agr.magnitude", None)
        share = (grad.abs() if magnitude is None else magnitude) * inverse
        flow["grad"] = torch.addcmul(grad, grad, share, value=-1)
