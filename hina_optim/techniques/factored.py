"""Second moment kept as one number a row and one a column: what CAME and Adafactor divide the gradient by."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from hina_optim import arguments
from hina_optim.state.slot import EXP_AVG_SQ, Slot
from hina_optim.techniques.base import Flow, ParamInfo, Sums, Technique
from hina_optim.techniques.means import SMALLEST, Means

__all__ = ["FactoredNormalization", "UnfactoredNormalization", "follow_factors"]

#: Of the second moment, what is kept.
MEANS = Means(EXP_AVG_SQ.name)


def follow_factors(
    flow: Flow, means: Means, totals: dict[str, Tensor], beta: float, correct: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """Update the running row and column means of something positive, and take the inverse root of their product.

    ``R ← βR + (1-β)·row means``, ``C ← βC + (1-β)·column means``, ``S_ij = R̂_i·Ĉ_j / mean(R̂)`` with
    ``R̂ = R·correct + ε``, ``Ĉ = C·correct + ε``. ``ε`` enters when the means are read, not when they are stored: after
    the correction of the bias the two are the same, and a small ``ε`` is not lost in a product with ``1-β``.

    Args:
        flow: Holds the state and takes the new one.
        means: What is kept.
        totals: Its sums over each row, ``"rows"`` ``[N, rows]``, and each column, ``"columns"`` ``[N, columns]``.
        beta: β, decay a step.
        correct: ``1 / (1 - βᵗ)``, any shape of ``N`` elements.
        eps: ε, in the units of what is averaged.

    Returns:
        ``a`` ``[N, rows]`` and ``b`` ``[N, columns]`` with ``a_i·b_j = 1/√S_ij``. They are kept apart because the
        product may overflow where row and column are both idle; multiply one after the other.
    """
    correct = correct.reshape(-1, 1)
    rows, columns = means.follow(flow, totals, beta)
    rows, columns = rows * correct + eps, columns * correct + eps
    return rows.mean(1, keepdim=True).sqrt() * rows.rsqrt(), columns.rsqrt()


class FactoredNormalization(Technique):
    """Divide by the root of a second moment of which only row and column means are kept.

    Of the matrix view of a parameter (a convolution: output channels × all the rest), with ``x`` the incoming
    gradient::

        R ← β₂R + (1-β₂)·mean over columns of (x² + ε)        state ``exp_avg_sq_row``, [rows]
        C ← β₂C + (1-β₂)·mean over rows of (x² + ε)           state ``exp_avg_sq_col``, [columns]
        v̂_ij = R̂_i·Ĉ_j / mean(R̂)                              R̂ = R/(1-β₂ᵗ), Ĉ = C/(1-β₂ᵗ)
        incoming = x / √v̂

    Vectors and numbers have no such view: list :class:`UnfactoredNormalization` beside it.

    Args:
        beta2: β₂, decay a step of the second moment, in [0, 1).
        eps: ε, added to the square, in units of the squared gradient, > 0 (1e-30 in both papers).

    Raises:
        ValueError: beta2 is outside [0, 1), or eps is not a finite number > 0.

    Source: *CAME: Confidence-guided Adaptive Memory Efficient Optimization*, arXiv 2307.02047, algorithm 2, lines of
    ``r``, ``c``, ``v`` and ``u``; the factors are those of *Adafactor*, arXiv 1804.04235, algorithm 4. Neither corrects
    the bias: Adafactor's β₂ begins at 0, and CAME leaves it to the clipping to bring its first steps back to size.
    Corrected, the first step is Adafactor's. Their code factors the last two axes of a convolution (the kernel's), for
    each pair of channels; here it is the matrix view. The original design kept a full second moment.
    """

    name: ClassVar[str] = "factored"
    sums_over: ClassVar[frozenset[str]] = frozenset({"grad", "incoming"})
    settles: ClassVar[frozenset[str]] = frozenset({"incoming"})
    settle_reads: ClassVar[frozenset[str]] = frozenset({"grad"})
    by_rows: ClassVar[bool] = True

    def __init__(self, beta2: float, eps: float = 1e-30) -> None:
        arguments.check(type(self).__name__, "beta2", beta2, arguments.BELOW_ONE)
        arguments.check(type(self).__name__, "eps", eps, arguments.POSITIVE)
        self.beta2 = float(beta2)
        self.eps = max(float(eps), SMALLEST)

    def applies(self, info: ParamInfo) -> bool:
        """Only what has rows and columns."""
        return info.is_matrix

    def slots(self, info: ParamInfo) -> tuple[Slot, ...]:
        """One number a row and one a column; decided on the global shape."""
        return MEANS.declared(info) if info.is_matrix else ()

    def scalars(self, t: Tensor) -> dict[str, Tensor]:
        """The factor that undoes the bias towards zero."""
        age = (t - self.window[0]).clamp(min=1)
        return {"correct": 1 / (1 - self.beta2**age)}

    def sums(self, flow: Flow) -> Sums:
        """Squares, by row and by column."""
        x = flow.get("incoming")
        if x is None:
            x = flow["grad"]
        return MEANS.sums(x * x)

    def settle(self, flow: Flow, totals: dict[str, Tensor]) -> None:
        """Update the factors and set what enters the first moment."""
        x = flow.get("incoming")
        if x is None:
            x = flow["grad"]
        a, b = follow_factors(flow, MEANS, totals, self.beta2, flow.scalar(self, "correct"), self.eps)
        flow["incoming"] = (x * flow.over_rows(a)).mul_(flow.over_columns(b))


class UnfactoredNormalization(Technique):
    """Divide by the root of the second moment, one number an element: for vectors and numbers.

    ``v ← β₂v + (1-β₂)(x² + ε)``, ``incoming = x / √(v/(1-β₂ᵗ))``

    Args:
        beta2: β₂, decay a step of the second moment, in [0, 1).
        eps: ε, added to the square, in units of the squared gradient, > 0.

    Raises:
        ValueError: beta2 is outside [0, 1), or eps is not a finite number > 0.

    Source: the authors' code of arXiv 2307.02047, which does this for parameters of less than two dimensions (the
    algorithm of the paper speaks of matrices only); arXiv 1804.04235, algorithm 5. With the bias corrected.
    """

    name: ClassVar[str] = "unfactored"
    reads: ClassVar[frozenset[str]] = frozenset({"grad", "incoming"})
    writes: ClassVar[frozenset[str]] = frozenset({"incoming"})

    def __init__(self, beta2: float, eps: float = 1e-30) -> None:
        arguments.check(type(self).__name__, "beta2", beta2, arguments.BELOW_ONE)
        arguments.check(type(self).__name__, "eps", eps, arguments.POSITIVE)
        self.beta2 = float(beta2)
        self.eps = max(float(eps), SMALLEST)

    def applies(self, info: ParamInfo) -> bool:
        """Only what has no rows and columns."""
        return not info.is_matrix

    def slots(self, info: ParamInfo) -> tuple[Slot, ...]:
        """The second moment, of the parameter's shape."""
        return () if info.is_matrix else (EXP_AVG_SQ,)

    def scalars(self, t: Tensor) -> dict[str, Tensor]:
        """The factor that undoes the bias towards zero."""
        age = (t - self.window[0]).clamp(min=1)
        return {"correct": 1 / (1 - self.beta2**age)}

    def transform(self, flow: Flow) -> None:
        """Update the second moment and set what enters the first."""
        x = flow.get("incoming")
        if x is None:
            x = flow["grad"]
        v = self.beta2 * flow.state["exp_avg_sq"] + (1 - self.beta2) * x * x
        flow.new["exp_avg_sq"] = v
        # ε where the moment is read: the same once the bias is corrected, and not lost in a product with 1 - β₂
        flow["incoming"] = x * (v * flow.scalar(self, "correct") + self.eps).rsqrt()
