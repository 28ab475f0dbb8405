"""Cautious update: move only where direction and gradient agree."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from hina_optim.techniques.base import Flow, Sums, Technique

__all__ = ["Cautious"]

#: Smallest mean of the mask: the surviving elements grow by at most its inverse.
SMALLEST_MEAN = 1e-3


class Cautious(Technique):
    """Mask the elements of the update whose sign differs from the gradient's, and keep the mean step.

    ``k = [u ⊙ g > 0]``, ``u ← u ⊙ k / max(mean k, 1e-3)``, the mean over the whole parameter.

    Signs are compared, not the product, so that tiny gradients do not underflow to "disagrees". The mask is written
    into ``update`` at once; the division goes into ``scale``, so that its sum can share a reduction with what follows.

    Source: *Cautious Optimizers: Improving Training with One Line of Code*, arXiv 2411.16085, algorithm 1; the bound on
    the mean is that of its reference implementation.
    """

    name: ClassVar[str] = "cautious"
    reads: ClassVar[frozenset[str]] = frozenset({"grad", "update"})
    writes: ClassVar[frozenset[str]] = frozenset({"update"})
    sums_over: ClassVar[frozenset[str]] = frozenset({"update"})
    settles: ClassVar[frozenset[str]] = frozenset({"scale"})

    def transform(self, flow: Flow) -> None:
        """Mask the update."""
        sign = flow.sign_of("grad")
        # |u| where the signs agree, 0 elsewhere, without a boolean tensor: those do not vectorize
        agreeing = (flow["update"] * sign).clamp_(min=0)
        flow["cautious.agreeing"] = agreeing
        flow["update"] = agreeing * sign

    def sums(self, flow: Flow) -> Sums:
        """The mask: 1 where the update agrees with the gradient, 0 elsewhere."""
        return {"kept": flow.values.pop("cautious.agreeing").sign()}

    def settle(self, flow: Flow, totals: dict[str, Tensor]) -> None:
        """Scale so that the mean step is kept."""
        mean = totals["kept"] / flow.count
        scale = 1 / mean.clamp(min=SMALLEST_MEAN)
        before = flow.get("scale")
        flow["scale"] = scale if before is None else before * scale
