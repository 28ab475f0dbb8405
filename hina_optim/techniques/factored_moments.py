"""ADOPT and Adam with a second moment of which only row and column means are kept."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from hina_optim.state.slot import EXP_AVG, Slot
from hina_optim.techniques.adam import AdamMoments
from hina_optim.techniques.adopt import AdoptNormalization
from hina_optim.techniques.base import Flow, ParamInfo, Sums
from hina_optim.techniques.factored import MEANS
from hina_optim.techniques.means import relative, saves

__all__ = ["FactoredAdam", "FactoredAdopt"]


def squares(x: Tensor) -> Sums:
    """Squares, by row and by column."""
    return MEANS.sums(x * x)


def root(flow: Flow, rows: Tensor, columns: Tensor) -> Tensor:
    """``√(R_i·C_j / mean(R))`` for the elements present; the two factors apart, because their product may overflow."""
    return flow.over_rows(relative(rows).sqrt()) * flow.over_columns(columns.sqrt())


class FactoredAdopt(AdoptNormalization):
    """ADOPT with the factored second moment of Adafactor, for matrices.

    As :class:`~.adopt.AdoptNormalization`, but of ``v`` only the means over its rows and columns are kept, from which
    it is estimated::

        R ← β₂R + (1-β₂)·mean over columns of g²         state ``exp_avg_sq_row``, [rows]
        C ← β₂C + (1-β₂)·mean over rows of g²            state ``exp_avg_sq_col``, [columns]
        v_ij = R_i·C_j / mean(R)

    The estimate is exact where ``v`` has rank 1. A mean of running averages is the running average of the means: ``R``
    and ``C`` are those of the ``v`` that would have been kept, whenever it was given up.

    Source: arXiv 2411.02853, algorithm 2, with the factors of *Adafactor: Adaptive Learning Rates with Sublinear Memory
    Cost*, arXiv 1804.04235, section 3 and algorithm 4. Of a convolution, the matrix view is factored: output channels ×
    all the rest.
    """

    sums_over: ClassVar[frozenset[str]] = frozenset({"grad"})
    by_rows: ClassVar[bool] = True

    def applies(self, info: ParamInfo) -> bool:
        """Only where factors are fewer numbers."""
        return saves(info)

    def slots(self, info: ParamInfo) -> tuple[Slot, ...]:
        """One number a row and one a column."""
        return MEANS.declared(info)

    def transform(self, flow: Flow) -> None:
        """Set what enters the first moment."""
        bound = flow.scalar(self, "bound")
        past = root(flow, *MEANS.held(flow)).clamp_(min=self.eps)
        flow["incoming"] = (flow["grad"] / past).clamp_max_(bound).clamp_min_(-bound)
        flow["lr"] = flow["lr"] * flow.scalar(self, "open")
        flow["rate"] = flow["rate"] * flow.scalar(self, "open")

    def sums(self, flow: Flow) -> Sums:
        """Squares, by row and by column."""
        return squares(flow["grad"])

    def settle(self, flow: Flow, totals: dict[str, Tensor]) -> None:
        """The new means."""
        MEANS.follow(flow, totals, flow.scalar(self, "keep").reshape(-1, 1))


class FactoredAdam(AdamMoments):
    """Adam with the factored second moment of Adafactor, for matrices.

    As :class:`~.adam.AdamMoments` with ``v`` as :class:`FactoredAdopt` has it, this step's gradient counted in.

    Source: arXiv 1711.05101, algorithm 2, with the factors of arXiv 1804.04235, section 3 and algorithm 4.
    """

    sums_over: ClassVar[frozenset[str]] = frozenset({"grad", "incoming"})
    by_rows: ClassVar[bool] = True
    settles: ClassVar[frozenset[str]] = frozenset({"update"})
    settle_reads: ClassVar[frozenset[str]] = frozenset({"grad", "incoming", "damping"})
    reads: ClassVar[frozenset[str]] = frozenset()
    writes: ClassVar[frozenset[str]] = frozenset()

    def __init__(self, betas: tuple[float, float], eps: float) -> None:
        super().__init__(betas, eps)

    def applies(self, info: ParamInfo) -> bool:
        """Only where factors are fewer numbers."""
        return saves(info)

    def slots(self, info: ParamInfo) -> tuple[Slot, ...]:
        """The first moment, and of the second one number a row and one a column."""
        return (EXP_AVG, *MEANS.declared(info))

    def transform(self, flow: Flow) -> None:
        """Nothing: the second moment counts this step's gradient."""

    def sums(self, flow: Flow) -> Sums:
        """Squares, by row and by column."""
        return squares(_incoming(flow))

    def settle(self, flow: Flow, totals: dict[str, Tensor]) -> None:
        """Update the moments and set the direction."""
        incoming, damping = _incoming(flow), flow.get("damping")
        damped = incoming if damping is None else damping * incoming
        m = self.beta1 * flow.state["exp_avg"] + (1 - self.beta1) * damped
        flow.new["exp_avg"] = m
        now = root(flow, *MEANS.follow(flow, totals, self.beta2)) * flow.scalar(self, "correct2")
        flow["update"] = m * flow.scalar(self, "correct1") / (now + self.eps)


def _incoming(flow: Flow) -> Tensor:
    incoming = flow.get("incoming")
    return flow["grad"] if incoming is None else incoming
