"""ALLoRA: rows of small norm get a larger learning rate."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from hina_optim import arguments
from hina_optim.techniques.base import ByRow, Flow, ParamInfo, Sums, Technique

__all__ = ["RowScaling"]


class RowScaling(Technique):
    """Divide the rate of every row by about the root of the row's norm, so that small rows leave zero sooner.

    With ``θᵢ`` row ``i`` of the matrix view (first dimension × all others), before the update::

        rate of row i ← rate / √(‖θᵢ‖ + 1/η²)

    A row of zeros (all of LoRA's ``B`` at first) learns ``η`` times as fast, a row of norm ``1 - 1/η²`` at the rate
    that came in, and longer rows slower. The norm follows the weights in every step and nothing is remembered.

    Applies to everything with two dimensions or more; adapters' matrices are what it is for, and the recipe decides
    where it stands. Early in a recipe (before what settles or reads the rate) its sums share the first reduction.

    Args:
        eta: η, the largest factor on a rate, no unit, > 0.

    Raises:
        ValueError: eta is not a finite number > 0.

    Source: *ALLoRA: Adaptive Learning Rate Mitigates LoRA Fatal Flaws*, arXiv 2410.09692, which scales the gradient
    of plain descent; here the rate is scaled, because Adam's direction would not show a factor on the gradient.
    """

    name: ClassVar[str] = "alora"
    sums_over: ClassVar[frozenset[str]] = frozenset({"param"})
    settles: ClassVar[frozenset[str]] = frozenset({"rate"})
    by_rows: ClassVar[bool] = True
    rate_of_whole: ClassVar[bool] = True

    def __init__(self, eta: float = 2.0) -> None:
        arguments.check("RowScaling", "eta", eta, arguments.POSITIVE)
        self.eta = float(eta)

    def applies(self, info: ParamInfo) -> bool:
        """Matrices, in the wide sense, with elements."""
        return info.is_matrix

    def rate_factor(self, param: Tensor, state: Mapping[str, Tensor]) -> Tensor | float:
        """The factor of every row of the weights as they are."""
        norms = param.detach().to(torch.float32).flatten(1).norm(dim=1)
        return torch.rsqrt(norms + 1 / self.eta**2).reshape(-1, *([1] * (param.ndim - 1)))

    def sums(self, flow: Flow) -> Sums:
        """Squares of the weights, by rows."""
        return {"squares": ByRow(flow["param"].square())}

    def settle(self, flow: Flow, totals: dict[str, Tensor]) -> None:
        """Scale the rate, row by row."""
        factor = torch.rsqrt(totals["squares"].sqrt() + 1 / self.eta**2)
        flow["rate"] = flow["rate"] * flow.over_rows(factor)
