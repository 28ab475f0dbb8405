"""How one piece of state is stored: the rule of an optimizer never sees it.

A codec turns float32 values ``[N, *shape]`` into stored tensors and back. It may store several tensors a slot (codes
and scales of a blockwise format): its *parts*, each a suffix of the state name.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from hina_optim.state.blockwise import BlockCodec, LogCodec
from hina_optim.state.rounding import round_stochastic
from hina_optim.state.signs import SignCodec
from hina_optim.state.slot import Slot

__all__ = ["PRECISIONS", "Codec", "Storage", "TensorCodec", "codec_for", "compute_dtype", "decoded"]

#: Values of the argument ``state_precision``, highest first.
PRECISIONS = ("fp32", "bf16", "8bit", "4bit")
#: Elements of a block, by bits.
BLOCK = {8: 256, 4: 128}
#: Elements of a row from which on blocks within rows pay: a scale for each costs a quarter of a byte an element then.
SHORTEST_ROW = 16


class Codec(Protocol):
    """How a slot is stored."""

    @property
    def compute(self) -> torch.dtype:
        """What decoded values are."""

    @property
    def parts(self) -> dict[str, torch.dtype]:
        """Suffix of the state name → dtype of that part."""

    def part_shape(self, suffix: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of a part for a value of shape ``shape`` (without the batch dimension)."""

    @property
    def noisy(self) -> bool:
        """Whether :meth:`encode` wants noise."""

    @property
    def by_rows(self) -> bool:
        """Whether only whole rows (of the matrix view) can be stored: blocks lie within a row."""

    @property
    def per_byte(self) -> int:
        """How many elements of a row share a byte."""

    def decode(self, parts: dict[str, Tensor]) -> Tensor:
        """Stored → float32; behind the end of a row, there may be what fills its last byte (:func:`decoded`)."""

    def encode(self, value: Tensor, noise: Tensor | None) -> dict[str, Tensor]:
        """float32 → stored. ``noise``: 16 uniform bits, int32 in [0, 65535], of the same shape, if :attr:`noisy`."""


@dataclass(frozen=True)
class TensorCodec:
    """A plain tensor of one dtype.

    bf16 is rounded stochastically, so that what decays by less than its last bit still decays.
    """

    dtype: torch.dtype
    compute: torch.dtype = torch.float32
    stochastic: bool = False
    by_rows: ClassVar[bool] = False
    per_byte: ClassVar[int] = 1

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
        """Cast, with the noise if there is any; in a graph, bytes are left to who writes them."""
        if noise is not None:
            return {"": round_stochastic(value.to(torch.float32), noise, self.dtype)}
        if self.dtype == torch.int8 and torch.compiler.is_compiling():
            return {"": value}  # engine.rules.chosen casts it, once it has chosen between new and old ones as floats
        return {"": value.to(self.dtype)}


@dataclass(frozen=True)
class Storage:
    """What the user chose for the state of a group.

    Attributes:
        precision: One of :data:`PRECISIONS`.
        min_8bit_size: Elements of the whole (global) parameter below which nothing is stored in 8 bits or 4.
        force_8bit: Store in 8 bits, or 4, whatever can be.
        state_device: ``"cpu"`` keeps state of the parameter's shape in host memory; None, where the parameter is.
        anchor_device: The same for state that never changes only (the weights before the first update).
    """

    precision: str
    min_8bit_size: int = 4096
    force_8bit: bool = False
    state_device: str | None = None
    anchor_device: str | None = None

    def __post_init__(self) -> None:
        if self.precision not in PRECISIONS:
            raise ValueError(f"state_precision={self.precision!r} is not one of {', '.join(PRECISIONS)}.")

    @classmethod
    def of(cls, group: Mapping[str, Any], precision: str | None = None) -> Storage:
        """That of a group; with ``precision`` in the place of its own."""
        return cls(
            precision or group["state_precision"],
            group["min_8bit_size"],
            group["force_8bit"],
            group.get("state_device"),
            group.get("anchor_device"),
        )

    def hosts(self, slot: Slot) -> bool:
        """Whether a slot is to be in host memory; what has few numbers stays where the parameter is."""
        return slot.shape == "like" and "cpu" in (self.state_device, self.anchor_device if slot.constant else None)


def codec_for(slot: Slot, storage: Storage, param_dtype: torch.dtype, shape: tuple[int, ...]) -> Codec:
    """The codec of a slot.

    In 8 bits: what has a code, in parameters of ``min_8bit_size`` elements and rows of :data:`SHORTEST_ROW` (fixed
    levels need no rows); smaller parameters stay in fp32, what has short rows or no code in bf16. Of a vector, whose
    blocks a shard would cut anywhere, moments stay in bf16. Signs share bytes where moments share scales, and take a
    byte each elsewhere. It is decided on the global shape, so that sharding changes nothing.

    In 4 bits: the same, but that the first moment, masks and signs of what has such rows take 4, 4 and 1 bits. What is
    slow or unsigned keeps 8: an average over 100 steps adds up so much of what 16 levels round that nothing is left of
    it, and a second moment is divided by.

    Args:
        slot: What is to be stored.
        storage: The user's choice.
        param_dtype: dtype of the parameter.
        shape: Its global shape.
    """
    compute = compute_dtype(param_dtype)
    numel = torch.Size(shape).numel()
    row = numel // shape[0] if len(shape) > 1 and shape[0] else 0
    large = storage.force_8bit or numel >= storage.min_8bit_size
    blocks = large and (row >= SHORTEST_ROW or (storage.force_8bit and row > 0))
    coded, four = storage.precision in ("8bit", "4bit"), storage.precision == "4bit" and blocks
    if slot.precision == "int8":
        packs = coded and slot.code == "ternary" and blocks
        return SignCodec(compute, bits=1 if four else 2) if packs else TensorCodec(torch.int8, compute)
    if slot.precision == "param":
        return TensorCodec(param_dtype, compute)
    if slot.precision == "fp32" or storage.precision == "fp32" or slot.shape != "like":
        return TensorCodec(compute, compute)
    if coded:
        if not large:
            return TensorCodec(compute, compute)
        if isinstance(slot.code, tuple):
            return LogCodec(*slot.code, compute=compute, bits=4 if four else 8, packed=four)
        if slot.code is not None and blocks:
            signed, four = slot.code == "signed", four and slot.code == "signed" and not slot.slow
            bits = 4 if four else 8
            return BlockCodec(signed, BLOCK[bits], compute, slot.slow or four, bits, packed=four)
    return TensorCodec(torch.bfloat16, compute, stochastic=True)


def decoded(codec: Codec, parts: dict[str, Tensor], shape: Sequence[int]) -> Tensor:
    """The value of shape ``[N, *shape]`` that is stored in ``parts``."""
    value = codec.decode(parts)
    if codec.per_byte == 1 or not isinstance(codec, (SignCodec, LogCodec, BlockCodec)):
        return value  # as it is, or of a flat range, whose codec knows where it ends
    row = int(torch.Size(shape[2:] if len(shape) > 2 else shape[1:]).numel())
    return value[..., codec.lead : codec.lead + row].reshape(shape)


def compute_dtype(param_dtype: torch.dtype) -> torch.dtype:
    """The dtype that all mathematics runs in: float32, or float64 for float64 parameters."""
    return torch.float64 if param_dtype == torch.float64 else torch.float32
