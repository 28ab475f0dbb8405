"""Orthogonal gradient: take out of the gradient what only scales the weights."""

from __future__ import annotations

from typing import ClassVar

import torch

from hina_optim.techniques.base import Flow, Sums, Technique
from hina_optim.techniques.products import inner

__all__ = ["OrthogonalGradient"]

#: Share of ‖g‖² below which the remainder is rounding noise, not a direction.
SMALLEST_REMAINDER = 1e-6


class OrthogonalGradient(Technique):
    """Remove the component of the gradient along the weights and restore its norm.

    ``r = g - (⟨g,θ⟩/⟨θ,θ⟩)·θ``, ``g ← r·‖g‖/‖r‖``, inner products over the whole parameter.

    From the three sums alone, ``‖r‖² = ‖g‖² - c²`` with ``c = ⟨g,θ⟩/‖θ‖``. The gradient stays as it is where the
    weights are zero, or where ``‖r‖² ≤ 1e-6·‖g‖²``: what is left of a gradient that is parallel to the weights is
    rounding noise, and blowing it up to the old norm would be a random step. (A parameter of one element is always
    parallel.)

    Range: the squares are taken as they come, which in float32 holds for gradients and weights with norms between
    about 1e-18 and 1e18 (``c`` is divided by ``‖θ‖`` before it is squared, so that the product does not narrow this).
    Outside of it the sums become 0 or infinite, and the gradient stays as it is.

    Source: *Grokking at the Edge of Numerical Stability*, arXiv 2501.04697, section on ⊥Grad; restoring the norm
    follows its reference implementation.
    """

    name: ClassVar[str] = "orthogonal"
    sums_over: ClassVar[frozenset[str]] = frozenset({"grad", "param"})
    settles: ClassVar[frozenset[str]] = frozenset({"grad"})
    settle_reads: ClassVar[frozenset[str]] = frozenset({"param"})

    def sums(self, flow: Flow) -> Sums:
        """The three inner products of gradient and weights."""
        grad, param = flow["grad"], flow["param"]
        return {"gp": inner(grad, param), "pp": inner(param, param), "gg": inner(grad, grad)}

    def settle(self, flow: Flow, totals: dict[str, torch.Tensor]) -> None:
        """Project, and restore the norm."""
        grad, param = flow["grad"], flow["param"]
        gp, pp, gg = totals["gp"], totals["pp"], totals["gg"]
        norm = torch.where(pp > 0, pp, 1).sqrt()
        along = gp / norm
        rest = gg - along * along
        usable = (pp > 0) & (rest > SMALLEST_REMAINDER * gg)
        restore = (gg / torch.where(usable, rest, 1)).sqrt()
        flow["grad"] = torch.where(usable, (grad - (along / norm) * param) * restore, grad)
