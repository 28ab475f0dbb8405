"""Clipping by the root mean square: no step of a parameter is larger than its usual one."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from hina_optim import arguments
from hina_optim.techniques.base import Flow, Sums, Technique
from hina_optim.techniques.products import inner

__all__ = ["RmsClip"]


class RmsClip(Technique):
    """Shrink a whole parameter's normalized gradient so that its root mean square is at most ``threshold``.

    ``clip = 1 / max(1, rms(x)/d)``, the mean over the whole parameter, ``x`` the incoming (normalized) gradient and
    ``d`` the threshold. ``x`` itself is left as it is: who takes it in (a moment, a confidence) multiplies by ``clip``,
    so that this sum shares a reduction with others of ``x``.

    Args:
        threshold: d, > 0, no unit: of a gradient divided by the root of its second moment the rms is about 1.

    Raises:
        ValueError: threshold is not a finite number > 0.

    Source: *Adafactor: Adaptive Learning Rates with Sublinear Memory Cost*, arXiv 1804.04235, section 6; arXiv
    2307.02047, algorithm 2, line of ``û``.
    """

    name: ClassVar[str] = "rms_clip"
    sums_over: ClassVar[frozenset[str]] = frozenset({"grad", "incoming"})
    settles: ClassVar[frozenset[str]] = frozenset({"clip"})

    def __init__(self, threshold: float = 1.0) -> None:
        arguments.check("RmsClip", "threshold", threshold, arguments.POSITIVE)
        self.threshold = float(threshold)

    def sums(self, flow: Flow) -> Sums:
        """The sum of squares."""
        x = flow.get("incoming")
        if x is None:
            x = flow["grad"]
        return {"squares": inner(x, x)}

    def settle(self, flow: Flow, totals: dict[str, Tensor]) -> None:
        """Set the factor."""
        rms = (totals["squares"] / flow.count).sqrt()
        flow["clip"] = 1 / (rms / self.threshold).clamp(min=1)
