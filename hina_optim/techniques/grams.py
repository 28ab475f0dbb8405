"""Grams: the momentum says how far, the gradient says where to."""

from __future__ import annotations

from typing import ClassVar

from hina_optim.techniques.base import Flow, Technique

__all__ = ["Grams"]


class Grams(Technique):
    """Take the magnitude of the update and the sign of the gradient.

    ``u ← |u| ⊙ sign(g)``; an element whose gradient is zero does not move.

    Source: *Grams: Gradient Descent with Adaptive Momentum Scaling*, arXiv 2412.17107, algorithm 1.
    """

    name: ClassVar[str] = "grams"
    reads: ClassVar[frozenset[str]] = frozenset({"grad", "update"})
    writes: ClassVar[frozenset[str]] = frozenset({"update"})

    def transform(self, flow: Flow) -> None:
        """Replace the signs."""
        flow["update"] = flow["update"].abs() * flow.sign_of("grad")
