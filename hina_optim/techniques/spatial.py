"""Spatial awareness: damps the gradient where its neighborhood is busier than the parameter's average."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from hina_optim import arguments as rule
from hina_optim.techniques.base import Flow, ParamInfo, Slot, Sums, Technique
from hina_optim.techniques.means import Means, relative, saves
from hina_optim.techniques.stencils import NOISE, has_neighbors, keep_above, neighborhood_variance, rms

__all__ = ["SPATIAL_VARIANCE", "FactoredSpatialAwareness", "SpatialAwareness"]

#: Running variance of the neighborhood. Only its ratio to its own mean is used, and it forgets a tenth a step: the
#: 8 bits of a bf16 mantissa are enough.
SPATIAL_VARIANCE = Slot("spatial_variance", code="unsigned", slow=True)
#: The same by row and by column.
MEANS = Means(SPATIAL_VARIANCE.name)


class SpatialAwareness(Technique):
    """Damp the gradient in regions that keep varying from element to element, and slow their rates.

    With ``var`` the variance of ``g`` over the elements at most one step away along every spatial axis (nine in the
    inside of a matrix, the element itself included), 0 where it is below the rounding of ``g``, ``(1e-5·rms(g))²``::

        s          <- 0.9·s + 0.1·var                         state ``spatial_variance``, 0 at the start
        ŝ          =  s / mean(s)                             0 where mean(s) is 0
        g          <- g / (1 + detail_preservation·max(ŝ - 1, 0))
        bump_scale =  clip(ŝ·detail_preservation, 0.5, 1.5)   factor on the bumps of the learning-rate mask

    The bias of the young ``s`` cancels in the ratio, and so does the scale of the loss. Flat regions are left alone,
    signs are kept, and nothing grows.

    Acts on both axes of a matrix and on the kernel axes of a convolution weight; vectors and 1×1 convolutions are left
    alone.

    Args:
        detail_preservation: Strength, no unit, >= 0: a region twice as busy as the average shrinks to
            1 / (1 + detail_preservation).

    Raises:
        ValueError: ``detail_preservation`` is negative or not finite.

    References:
        This project's own technique; no paper. The original design scaled by the unnormalized variance, so that its
        effect depended on the scale of the loss.
    """

    name: ClassVar[str] = "spatial"
    sums_over: ClassVar[frozenset[str]] = frozenset({"grad"})
    settles: ClassVar[frozenset[str]] = frozenset({"grad", "bump_scale"})
    whole: ClassVar[tuple[str, ...]] = ("grad",)

    def __init__(self, detail_preservation: float = 0.8) -> None:
        rule.check("SpatialAwareness", "detail_preservation", detail_preservation, rule.NON_NEGATIVE)
        self.detail_preservation = detail_preservation

    def slots(self, info: ParamInfo) -> tuple[Slot, ...]:
        """One number an element."""
        return (SPATIAL_VARIANCE,)

    def applies(self, info: ParamInfo) -> bool:
        """An element without neighbors has no variance."""
        return has_neighbors(info.shape, info.spatial_axes, 2)

    def whole_matrix(self, flow: Flow, *complete: Tensor) -> Tensor:
        """The variance of every neighborhood, ``[N, *shape]``."""
        (grad,) = complete
        variance = neighborhood_variance(grad, flow.info.spatial_axes)
        # A flat gradient that has passed through a Fourier transform is flat up to rounding. Were that rounding the
        # only variance there is, its ratio to its own mean would be anything.
        floor = (NOISE * rms(grad)).square()
        # Gradients beyond 1e19 have no variance in float32: an infinite one would stay in the state for good.
        variance = variance.nan_to_num_(0.0, 0.0, 0.0)
        return keep_above(variance, floor)

    def transform(self, flow: Flow) -> None:
        """Let the running variance follow."""
        flow.new["spatial_variance"] = torch.lerp(flow.state["spatial_variance"], flow["spatial.whole"], 0.1)

    def sums(self, flow: Flow) -> Sums:
        """The running variance, for its mean."""
        return {"variance": flow.new["spatial_variance"]}

    def settle(self, flow: Flow, totals: dict[str, Tensor]) -> None:
        """Damp where the running variance is above its mean."""
        mean = totals["variance"] / flow.count
        self._damp(
            flow, flow.new["spatial_variance"] / torch.where(mean > 0, mean / self.detail_preservation, torch.inf)
        )

    def _damp(self, flow: Flow, busy: Tensor) -> None:
        """``busy`` is p·ŝ, from which 1 + p·max(ŝ - 1, 0) = max(p·ŝ + (1 - p), 1); it is overwritten."""
        flow["bump_scale"] = busy.clamp(0.5, 1.5)
        flow["grad"] = flow["grad"] / busy.add_(1 - self.detail_preservation).clamp_(min=1)


class FactoredSpatialAwareness(SpatialAwareness):
    """:class:`SpatialAwareness` that keeps of the running variance the means of rows and columns, for matrices.

    ``s_ij = R_i·C_j / mean(R)`` (:class:`~.means.Means`), so ``ŝ_ij = R_i·C_j / mean(R)²``: where a neighborhood stands
    out of its row and of its column, that is not remembered.
    """

    by_rows: ClassVar[bool] = True

    def slots(self, info: ParamInfo) -> tuple[Slot, ...]:
        """One number a row and one a column."""
        return MEANS.declared(info)

    def applies(self, info: ParamInfo) -> bool:
        """As without factors, where they are fewer numbers."""
        return super().applies(info) and saves(info)

    def transform(self, flow: Flow) -> None:
        """Nothing: the means follow once their sums are known."""

    def sums(self, flow: Flow) -> Sums:
        """The variance, by row and by column."""
        return MEANS.sums(flow["spatial.whole"])

    def settle(self, flow: Flow, totals: dict[str, Tensor]) -> None:
        """Damp where the running variance is above its mean."""
        rows, columns = MEANS.follow(flow, totals, 0.9)
        strength = self.detail_preservation
        self._damp(flow, flow.over_rows(relative(rows) * strength) * flow.over_columns(relative(columns)))
