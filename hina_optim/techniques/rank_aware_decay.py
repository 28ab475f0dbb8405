"""Rank-aware decay: the lesser singular directions of a matrix decay up to twice as fast as the leading one."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from hina_optim.techniques.base import Flow, ParamInfo
from hina_optim.techniques.spectrum import has_spectrum, multiply
from hina_optim.techniques.weight_decay import ScheduledDecay

__all__ = ["RankAwareDecay"]


class RankAwareDecay(ScheduledDecay):
    """Add to the weight decay what makes it grow along the singular values of the matrix.

    With ``θ = Σᵢ σᵢ·uᵢ·vᵢᵀ``, ``σ₁ >= … >= σᵣ``, ``r`` the shorter side of the matrix view::

        drift = lr · wd · κ(t) · Σᵢ (i-1)/(r-1) · σᵢ·uᵢ·vᵢᵀ

    Beside a :class:`~hina_optim.techniques.weight_decay.DecoupledWeightDecay` or
    :class:`~hina_optim.techniques.ada_decay.AdaDecay` of the same arguments, which takes ``lr·wd·κ·θ``, the leading
    direction decays at 1×, the last at 2×, and those between in equal steps. No norm of the matrix grows as long as
    ``2·lr·wd <= 1``. A rank of 1 has a leading direction only, and decays at 1×.

    No singular vector is formed: the sum is ``D·θ`` or ``θ·D`` with the small matrix ``D`` that
    :class:`~hina_optim.techniques.spectrum.Spectrum` last found, exact at the weights measured, and between
    measurements that of the same directions (as a matrix with eigenvalues in [0, 1], it shrinks any weights). Nothing
    is added before the first measurement, and for a matrix that was zero when measured.

    Half of a LoRA pair decays in its own singular basis, on the side of the rank, not in that of the product: a factor
    times the product's ``D`` may grow, since it is not symmetric there, while this one always shrinks it.

    Needs ``Spectrum(…, decay=True)`` before it in the recipe, and acts on the same parameters. No state of its own.

    Args:
        weight_decay: wd, share of the weight a step and a unit of learning rate, ≥ 0; 0 leaves the technique out.
        transition_steps: Updates until the decay begins to shrink, ≥ 1; None for a constant wd. The schedule κ is
            :class:`~hina_optim.techniques.weight_decay.ScheduledDecay`'s.
        decay_factor: Factor on the decay every further ``transition_steps`` updates, in [0, 1].
        min_ratio: Floor of κ, in [0, 1].

    Raises:
        ValueError: An argument is not what it must be.

    Source: the original design; no paper.
    """

    name: ClassVar[str] = "rank_aware_decay"
    reads: ClassVar[frozenset[str]] = frozenset({"lr", "drift"})
    writes: ClassVar[frozenset[str]] = frozenset({"drift"})
    whole: ClassVar[tuple[str, ...]] = ("param",)

    def applies(self, info: ParamInfo) -> bool:
        """Matrices that have a spectrum."""
        return super().applies(info) and has_spectrum(info)

    def whole_matrix(self, flow: Flow, *complete: Tensor) -> Tensor:
        """``D·θ`` or ``θ·D``, ``[N, *shape]``."""
        (param,) = complete
        return multiply(param, flow.state["decay_matrix"], flow.info)

    def transform(self, flow: Flow) -> None:
        """Add to the drift."""
        drift = flow["lr"] * flow.scalar(self, "strength") * flow["rank_aware_decay.whole"]
        before = flow.get("drift")
        flow["drift"] = drift if before is None else before + drift
