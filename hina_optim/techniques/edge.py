"""Edge suppression: damps the gradient where it breaks off from its neighbors."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from hina_optim import arguments as rule
from hina_optim.techniques.base import Flow, ParamInfo, Technique
from hina_optim.techniques.stencils import NOISE, has_neighbors, keep_above, rms, second_difference

__all__ = ["EdgeSuppression"]


class EdgeSuppression(Technique):
    """Damp gradient elements that stand out of their neighborhood, in proportion to how far they do.

    A model that overfits the edges of its training images gets gradients with isolated spikes. With ``L`` the second
    difference of ``g``, summed over the spatial axes::

        e = |L| / max(rms(L), 1e-5·rms(g))
        g <- g / (1 + edge_penalty · e · [e > edge_threshold / 0.2])

    ``e`` is relative to the parameter's own average, so that the scale of the loss does not matter; the floor keeps the
    rounding of a smooth gradient from being taken for edges. The ends of an axis repeat the second difference of their
    neighbor: a linear ramp has ``e = 0`` everywhere and is left alone. Signs are kept and nothing grows.

    Acts on both axes of a matrix and on the kernel axes of a convolution weight, where one of them has at least three
    elements; vectors are left alone.

    Args:
        edge_penalty: Strength, no unit, >= 0. An edge of ``e`` times the average shrinks to 1 / (1 + edge_penalty·e).
            0 switches the technique off.
        edge_threshold: Where edges begin, in units of 5 times the average, > 0: 0.6 marks what is 3 times the average.

    Raises:
        ValueError: ``edge_penalty`` is negative or ``edge_threshold`` not positive, or one of them not finite.

    References:
        This project's own technique; no paper. The original design compared |L| with an absolute number, so that its
        effect depended on the scale of the loss.
    """

    name: ClassVar[str] = "edge"
    writes: ClassVar[frozenset[str]] = frozenset({"grad"})
    whole: ClassVar[tuple[str, ...]] = ("grad",)

    def __init__(self, edge_penalty: float = 0.1, edge_threshold: float = 0.6) -> None:
        rule.check("EdgeSuppression", "edge_penalty", edge_penalty, rule.NON_NEGATIVE)
        rule.check("EdgeSuppression", "edge_threshold", edge_threshold, rule.POSITIVE)
        self.edge_penalty = edge_penalty
        self.edge_threshold = edge_threshold

    def applies(self, info: ParamInfo) -> bool:
        """A second difference needs three elements in a row."""
        return self.edge_penalty > 0 and has_neighbors(info.shape, info.spatial_axes, 3)

    def whole_matrix(self, flow: Flow, *complete: Tensor) -> Tensor:
        """The damped gradient, ``[N, *shape]``."""
        (grad,) = complete
        bend = second_difference(grad, flow.info.spatial_axes)
        average = torch.maximum(rms(bend), NOISE * rms(grad))
        # a gradient of zeros has an average of 0, and nothing that is above it
        edge = keep_above(bend.abs_(), average * (self.edge_threshold / 0.2))
        unit = average / self.edge_penalty
        return grad / edge.div_(torch.where(unit > 0, unit, 1)).add_(1)

    def transform(self, flow: Flow) -> None:
        """Take the damped gradient."""
        flow["grad"] = flow["edge.whole"]
