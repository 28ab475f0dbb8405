"""How one piece of state is stored: the rule of an optimizer never sees it.

A codec turns float32 values ``[N, *shape]`` into stored tensors and back. It may store several tensors a slot (codes
and scales of a blockwise format): its *parts*, each a suffix of the state name. Codecs here store one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from hina_optim.state.rounding import round_stochastic
from hina_optim.state.slot import Slot

__all__ = ["PRECISIONS", "Codec", "TensorCodec", "codec_for", "compute_dtype"]

#: Values of the argument ``state_precision``, highest first.
PRECISIONS = ("fp32", "bf16")


class Codec(Protocol):
    """How a slot is stored."""

    @property
    def parts(self) -> dict[str, torch.dtype]:
        """Suffix of the state name → dtype of that part."""

    def part_shape(self, suffix: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of a part for a value of shape ``shape`` (without the batch dimension)."""

    @property
    def noisy(self) -> bool:
        """Whether :meth:`encode` wants noise."""

    def decode(self, parts: dict[str, Tensor]) -> Tensor:
        """Stored → float32."""

    def encode(self, value: Tensor, noise: Tensor | None) -> dict[str, Tensor]:
        """float32 → stored. ``noise``: uniform int32 bits of the same shape, if :attr:`noisy`."""


@dataclass(frozen=True)
class TensorCodec:
    """A plain tensor of one dtype.

    bf16 is rounded stochastically, so that what decays by less than its last bit still decays.
    """

    dtype: torch.dtype
    compute: torch.dtype = torch.float32
    stochastic: bool = False

    @property
    def parts(self) -> dict[str, torch.dtype]:
        """One part without a suffix."""
        return {"": self.dtype}

    def part_shape(self, suffix: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The value's own shape."""
        return shape

    @property
    def noisy(self) -> bool:
        """True when rounding stochastically."""
        return self.stochastic

    def decode(self, parts: dict[str, Tensor]) -> Tensor:
        """Cast to the compute dtype."""
        return parts[""].to(self.compute)

    def encode(self, value: Tensor, noise: Tensor | None) -> dict[str, Tensor]:
        """Cast, with the noise if there is any."""
        if noise is not None:
            return {"": round_stochastic(value, noise, self.dtype)}
        return {"": value.to(self.dtype)}


def codec_for(slot: Slot, state_precision: str, param_dtype: torch.dtype) -> Codec:
    """The codec of a slot.

    Args:
        slot: What is to be stored.
        state_precision: The user's choice, one of :data:`PRECISIONS`.
        param_dtype: dtype of the parameter.
    """
    compute = compute_dtype(param_dtype)
    if slot.precision == "int8":
        return TensorCodec(torch.int8, compute)
    if slot.precision == "param":
        return TensorCodec(param_dtype, compute)
    if slot.precision == "fp32" or state_precision == "fp32" or slot.shape != "like":
        return TensorCodec(compute, compute)
    if state_precision == "bf16":
        return TensorCodec(torch.bfloat16, compute, stochastic=True)
    raise ValueError(f"state_precision={state_precision!r} is not one of {', '.join(PRECISIONS)}.")


def compute_dtype(param_dtype: torch.dtype) -> torch.dtype:
    """The dtype that all mathematics runs in: float32, or float64 for float64 parameters."""
    return torch.float64 if param_dtype == torch.float64 else torch.float32
