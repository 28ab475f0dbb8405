"""Background regularization: halves the gradient of elements that hardly ever take part."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from hina_optim.techniques.base import Flow, ParamInfo, Slot, Sums, Technique
from hina_optim.techniques.means import Means, relative, saves
from hina_optim.techniques.products import inner

__all__ = ["BACKGROUND", "BackgroundMeans", "BackgroundRegularization", "LowActivity"]

#: Share of recent steps with low activity, in [0, 1]. Only half of it is used, as a factor: bf16 is enough.
BACKGROUND = Slot("background", code="unsigned", slow=True)
#: The same by row and by column.
MEANS = Means(BACKGROUND.name)
#: Which elements are low, where two techniques share the work.
LOW = "background.low"

#: Smallest spread of |g| to believe in, as a share of its mean: float32 sums of squares do not resolve a smaller one,
#: and with none at all the rounding of the mean alone would decide which elements of a constant gradient are low.
_SPREAD = 1e-3


class BackgroundRegularization(Technique):
    """Shrink the gradient of the elements that lie in the background, by up to a half.

    An element is low in a step when its gradient is clearly smaller than the parameter's average; the background is
    where that happens most of the time::

        low = [|g| < mean|g| - std|g| / 2]         population std, at least mean|g| / 1000
        b   <- 0.95·b + 0.05·low                   state ``background``, 0 at the start
        g   <- g · (1 - b / 2)

    The bar is relative to the parameter's own average, so that the scale of the loss does not matter; a constant
    gradient has no background. Mean and deviation come from sums over the whole parameter: sharded and unsharded runs
    agree. Applies to every parameter with more than one element.

    References:
        This project's own technique; no paper. The original design called an element low when its variance was below
        an absolute 1e-6, which depends on the scale of the loss.
    """

    name: ClassVar[str] = "background"
    sums_over: ClassVar[frozenset[str]] = frozenset({"grad"})
    settles: ClassVar[frozenset[str]] = frozenset({"grad"})

    def slots(self, info: ParamInfo) -> tuple[Slot, ...]:
        """One number an element."""
        return (BACKGROUND,)

    def applies(self, info: ParamInfo) -> bool:
        """A single element has no others to be lower than."""
        return info.numel > 1

    def sums(self, flow: Flow) -> Sums:
        """First and second moment of |g|."""
        grad = flow["grad"]
        return {"size": grad.abs(), "square": inner(grad, grad)}

    def settle(self, flow: Flow, totals: dict[str, Tensor]) -> None:
        """Mark the low elements and shrink those that have been low for long."""
        background = torch.lerp(flow.state["background"], _low(flow, totals), 0.05)
        flow.new["background"] = background
        flow["grad"] = torch.addcmul(flow["grad"], flow["grad"], background, value=-0.5)


def _low(flow: Flow, totals: dict[str, Tensor]) -> Tensor:
    """1 where ``|g|`` is low, else 0: boolean tensors are slow."""
    mean = totals["size"] / flow.count
    variance = totals["square"] / flow.count - mean.square()
    std = torch.maximum(variance, (_SPREAD * mean).square()).sqrt()
    return flow["grad"].abs().lt_(mean - std / 2)


class LowActivity(BackgroundRegularization):
    """The first half of :class:`BackgroundRegularization` where of ``b`` means are kept: which elements are low.

    It changes no gradient, but says so, for :class:`BackgroundMeans` to come in a segment of its own.
    """

    def slots(self, info: ParamInfo) -> tuple[Slot, ...]:
        """None."""
        return ()

    def applies(self, info: ParamInfo) -> bool:
        """Where means are fewer numbers."""
        return saves(info)

    def settle(self, flow: Flow, totals: dict[str, Tensor]) -> None:
        """Mark the low elements."""
        flow[LOW] = _low(flow, totals)


class BackgroundMeans(Technique):
    """The second half: ``g ← g·(1 - b/2)``, with ``b_ij = min(R_i·C_j / mean(R), 1)`` (:class:`~.means.Means`).

    ``R`` and ``C`` are the shares of low activity by row and by column, 0.95 of the old ones and 0.05 of the new.
    """

    name: ClassVar[str] = "background_means"
    sums_over: ClassVar[frozenset[str]] = frozenset({"grad"})
    settles: ClassVar[frozenset[str]] = frozenset({"grad"})
    by_rows: ClassVar[bool] = True

    def slots(self, info: ParamInfo) -> tuple[Slot, ...]:
        """One number a row and one a column."""
        return MEANS.declared(info)

    def applies(self, info: ParamInfo) -> bool:
        """Where means are fewer numbers."""
        return saves(info)

    def sums(self, flow: Flow) -> Sums:
        """Low elements, by row and by column."""
        return MEANS.sums(flow[LOW])

    def settle(self, flow: Flow, totals: dict[str, Tensor]) -> None:
        """Shrink what has been low for long."""
        rows, columns = MEANS.follow(flow, totals, 0.95)
        background = (flow.over_rows(relative(rows)) * flow.over_columns(columns)).clamp_(max=1)
        flow["grad"] = torch.addcmul(flow["grad"], flow["grad"], background, value=-0.5)
