"""Frequency penalty: takes a share of the high spatial frequencies out of the gradient."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from hina_optim import arguments as rule
from hina_optim.techniques.base import Flow, ParamInfo, Technique
from hina_optim.techniques.stencils import has_neighbors

__all__ = ["CUTOFF", "FrequencyPenalty"]

#: Radial frequency, in cycles per element, above which a frequency is high. Along one axis the highest one is 0.5.
CUTOFF = 0.3

#: On the squared radius. A frequency that lies on the cutoff (3 cycles in 10 elements) is low whatever the rounding.
_TOLERANCE = 1e-6


class FrequencyPenalty(Technique):
    """Shrink the high spatial frequencies of the gradient by a fixed share.

    With ``F`` the discrete Fourier transform of ``g`` over its spatial axes and ``r`` the radial frequency, the root of
    the sum of the squared frequencies of the axes::

        H = [r > 0.3]
        g <- IDFT(F · (1 - frequency_penalty · H)) = g - frequency_penalty · IDFT(F · H)

    The second form is the one computed: what is not penalized does not pass through the transform. The map is linear
    (hence odd, and blind to the scale of the loss), keeps the phase and the mean, and never adds energy.

    Acts on both axes of a matrix and on the kernel axes of a convolution weight; vectors and 1×1 convolutions are left
    alone.

    Args:
        frequency_penalty: Share of the high frequencies to remove, in [0, 1]; 0 switches the technique off.

    Raises:
        ValueError: ``frequency_penalty`` is not in [0, 1].

    References:
        This project's own technique; no paper. The original design measured the radius on a grid that does not begin
        at frequency 0, which shrank the *low* frequencies, and it dropped the phase.
    """

    name: ClassVar[str] = "frequency"
    writes: ClassVar[frozenset[str]] = frozenset({"grad"})
    whole: ClassVar[tuple[str, ...]] = ("grad",)

    def __init__(self, frequency_penalty: float = 0.05) -> None:
        rule.check("FrequencyPenalty", "frequency_penalty", frequency_penalty, rule.UNIT)
        self.frequency_penalty = frequency_penalty

    def applies(self, info: ParamInfo) -> bool:
        """One element in a row has no frequency but 0."""
        return self.frequency_penalty > 0 and has_neighbors(info.shape, info.spatial_axes, 2)

    def whole_matrix(self, flow: Flow, *complete: Tensor) -> Tensor:
        """The gradient with its high frequencies shrunk, ``[N, *shape]``."""
        (grad,) = complete
        axes = flow.info.spatial_axes
        high = torch.fft.rfftn(grad, dim=axes).mul_(_are_high(grad, axes))
        wave: Tensor = torch.fft.irfftn(high, s=[grad.shape[axis] for axis in axes], dim=axes)
        return torch.sub(grad, wave, alpha=self.frequency_penalty)

    def transform(self, flow: Flow) -> None:
        """Take the smoothed gradient."""
        flow["grad"] = flow["frequency.whole"]


def _are_high(grad: Tensor, axes: tuple[int, ...]) -> Tensor:
    """1 where ``rfftn(grad, dim=axes)`` holds a high frequency, 0 elsewhere; broadcastable to it."""
    squared_radius = grad.new_zeros(())
    for axis in axes:
        frequencies = torch.fft.rfftfreq if axis == axes[-1] else torch.fft.fftfreq  # rfftn halves the last axis
        along = frequencies(grad.shape[axis], dtype=grad.dtype, device=grad.device)
        squared_radius = squared_radius + along.square().reshape([-1 if a == axis else 1 for a in range(grad.ndim)])
    return squared_radius.gt_(CUTOFF**2 + _TOLERANCE)
