"""LoRA rank penalty: pushes down the singular values beyond a target rank."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from hina_optim import arguments as rule
from hina_optim.techniques.base import Flow, ParamInfo, Technique
from hina_optim.techniques.spectrum import has_spectrum, multiply

__all__ = ["RankPenalty"]


class RankPenalty(Technique):
    """Add the gradient of a penalty on the tail of the singular values.

    With ``σᵢ`` the singular values of a matrix, or of the product ``B·A`` of a LoRA pair, and ``k`` the target rank::

        g <- g + strength · d/dθ (σₖ₊₁ + σₖ₊₂ + …)

    The tail's gradient has length 1 along every singular direction beyond ``k``, however small its singular value, so
    that it empties the tail and leaves the leading directions alone (weight decay shrinks all in proportion). It is
    ``K·θ`` or ``θ·K`` with the small matrix ``K`` that :class:`~hina_optim.techniques.spectrum.Spectrum` last found:
    exact at the weights measured, and between measurements that of the same directions. Nothing is added before the
    first measurement.

    Needs :class:`~hina_optim.techniques.spectrum.Spectrum` before it in the recipe, and acts on the same parameters.

    Args:
        strength: Weight of the penalty in units of the loss per unit of singular value, >= 0. 0 switches it off.

    Raises:
        ValueError: ``strength`` is negative or not finite.

    References:
        This project's own technique; no paper. The original design shrank all singular values in proportion, which is
        weight decay under another name.
    """

    name: ClassVar[str] = "rank_penalty"
    writes: ClassVar[frozenset[str]] = frozenset({"grad"})
    whole: ClassVar[tuple[str, ...]] = ("param",)

    def __init__(self, strength: float = 0.01) -> None:
        rule.check("RankPenalty", "strength", strength, rule.NON_NEGATIVE)
        self.strength = strength

    def applies(self, info: ParamInfo) -> bool:
        """Matrices that have a spectrum."""
        return self.strength > 0 and has_spectrum(info)

    def whole_matrix(self, flow: Flow, *complete: Tensor) -> Tensor:
        """Gradient of the tail sum, ``[N, *shape]``."""
        (param,) = complete
        return multiply(param, flow.state["rank_coefficient"], flow.info)

    def transform(self, flow: Flow) -> None:
        """Add it."""
        flow["grad"] = flow["grad"] + self.strength * flow["rank_penalty.whole"]
