"""Low-rank emphasis: longer steps within the leading singular directions of a matrix."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from hina_optim import arguments as rule
from hina_optim.techniques.base import Flow, ParamInfo, Technique
from hina_optim.techniques.spectrum import has_spectrum, multiply

__all__ = ["LowRankEmphasis"]


class LowRankEmphasis(Technique):
    """Scale the part of the update that lies in the leading singular directions of the matrix itself.

    With ``P`` the projection on the leading ``k`` singular directions of ``θ``, on its short side (the inner side for
    half of a LoRA pair), that :class:`~hina_optim.techniques.spectrum.Spectrum` last found::

        u <- u + (factor − 1) · P·u        (u·P where the short side is that of the columns)

    The part outside stays as it is. The moment that the update comes from is not touched, so that the factor is the
    same in every step and never compounds. Nothing changes before the first measurement.

    Needs :class:`~hina_optim.techniques.spectrum.Spectrum` before it in the recipe, and acts on the same parameters.

    Args:
        factor: On the leading part, no unit, >= 0. 1 switches the technique off; below 1 damps.

    Raises:
        ValueError: ``factor`` is negative or not finite.

    References:
        This project's own technique; no paper. The original design scaled the stored moment, step after step.
    """

    name: ClassVar[str] = "low_rank_emphasis"
    writes: ClassVar[frozenset[str]] = frozenset({"update"})
    whole: ClassVar[tuple[str, ...]] = ("update",)

    def __init__(self, factor: float = 1.2) -> None:
        rule.check("LowRankEmphasis", "factor", factor, rule.NON_NEGATIVE)
        self.factor = factor

    def applies(self, info: ParamInfo) -> bool:
        """Matrices that have a spectrum."""
        return self.factor != 1 and has_spectrum(info)

    def whole_matrix(self, flow: Flow, *complete: Tensor) -> Tensor:
        """The emphasized update, ``[N, *shape]``."""
        (update,) = complete
        leading = multiply(update, flow.state["emphasis_projection"], flow.info)
        return update + (self.factor - 1) * leading

    def transform(self, flow: Flow) -> None:
        """Take it."""
        flow["update"] = flow["low_rank_emphasis.whole"]
