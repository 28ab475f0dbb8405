"""Confidence of CAME: step further where the gradient keeps to its running mean, less where it does not."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from hina_optim import arguments
from hina_optim.techniques.base import Flow, ParamInfo, Slot, Sums, Technique
from hina_optim.techniques.factored import follow_factors
from hina_optim.techniques.means import SMALLEST, Means
from hina_optim.techniques.products import inner

__all__ = ["LIMIT", "Confidence"]

#: Of the squared deviations, what is kept.
MEANS = Means("exp_avg_res")
#: Largest mean of |step| over a parameter, in units of the rate.
LIMIT = 2.0
#: A direction whose mean square is below this is no direction.
NOTHING = 1e-30


class Confidence(Technique):
    """Divide the direction by the root of a factored running mean of how far gradients lie from it.

    With ``û = clip·x`` what came in (without damping), ``m`` the first moment *after* this step and ``u`` the direction
    so far (``m``, or a mix with others)::

        R ← β₃R + (1-β₃)·mean over columns of ((û - m)² + ε)       state ``exp_avg_res_row``, [rows]
        C ← β₃C + (1-β₃)·mean over rows of ((û - m)² + ε)          state ``exp_avg_res_col``, [columns]
        S_ij = R̂_i·Ĉ_j / mean(R̂)                                   R̂ = R/(1-β₃ᵗ), Ĉ = C/(1-β₃ᵗ)
        u ← u / √max(S, mean(u²)/4)

    **The bound.** The paper's own formula divides by ``√S`` alone. Where gradients hardly change, ``û - m`` goes to
    zero and nothing does then bound the step: with a constant gradient and β₁ = 0.9 it is 4 times the rate after 100
    updates, and 1/√ε = 10⁸ times in the end; with β₁ = 0 it is that at once. The second term of the maximum, one more
    number a parameter in a reduction that is made anyway, keeps the mean of ``|u|`` over a parameter at 2 or less, in
    every step and for any gradient (after it ``|u| ≤ 2·|u|/rms(u)``, and a mean never exceeds the rms). It is reached
    only where deviations are less than half the direction's rms: with noise of half the signal or more the step is the
    paper's.

    Matrix views only: for vectors and numbers the step is the moment itself, as in the authors' code (the paper's
    algorithm speaks of matrices). Stands after the first moment.

    Args:
        beta3: β₃, decay a step of the running mean, in [0, 1).
        eps: ε, added to the square, no unit (``û`` is about 1), > 0 (1e-16 in the paper).

    Raises:
        ValueError: beta3 is outside [0, 1), or eps is not a finite number > 0.

    Source: *CAME: Confidence-guided Adaptive Memory Efficient Optimization*, arXiv 2307.02047, algorithm 2, lines of
    ``U``, ``R``, ``C``, ``S`` and of the step. The paper does not correct the bias of ``R`` and ``C``: with β₃ = 0.9999
    its first step is a hundred times the corrected one. The original design compared the moment with itself, so that
    every step was one of 1/√ε.
    """

    name: ClassVar[str] = "confidence"
    sums_over: ClassVar[frozenset[str]] = frozenset({"grad", "incoming", "clip", "update"})
    settles: ClassVar[frozenset[str]] = frozenset({"update"})
    by_rows: ClassVar[bool] = True

    def __init__(self, beta3: float, eps: float = 1e-16) -> None:
        arguments.check("Confidence", "beta3", beta3, arguments.BELOW_ONE)
        arguments.check("Confidence", "eps", eps, arguments.POSITIVE)
        self.beta3 = float(beta3)
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
        return {"correct": 1 / (1 - self.beta3**age)}

    def sums(self, flow: Flow) -> Sums:
        """Squared deviations, by row and by column, and the squared direction."""
        x = flow.get("incoming")
        if x is None:
            x = flow["grad"]
        clip = flow.get("clip")
        moment = flow.new["exp_avg"]
        deviation = x - moment if clip is None else (clip * x).sub_(moment)
        return {**MEANS.sums(deviation.square_()), "squares": inner(flow["update"], flow["update"])}

    def settle(self, flow: Flow, totals: dict[str, Tensor]) -> None:
        """Update the factors and divide the direction by their root."""
        a, b = follow_factors(flow, MEANS, totals, self.beta3, flow.scalar(self, "correct"), self.eps)
        largest = LIMIT * (totals["squares"] / flow.count).clamp(min=NOTHING).rsqrt()
        flow["update"] = (flow.over_rows(a) * flow.over_columns(b)).clamp_max_(flow.once(largest)).mul_(flow["update"])
