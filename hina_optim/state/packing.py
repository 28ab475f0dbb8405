"""Codes of fewer than 8 bits, several in a byte: the first in the lowest bits.

All work is done on the codes of one byte at a time, as the bytes of one wider integer.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["pack", "packed_length", "packed_shape", "spread", "unpack"]

#: Bits of a code → an integer with a byte for each code of a byte, and the lowest ``bits`` of each of these bytes.
_WIDE = {1: (torch.int64, 0x0101010101010101), 2: (torch.int32, 0x03030303), 4: (torch.int16, 0x0F0F)}


def packed_length(n: int, bits: int, lead: int = 0) -> int:
    """Bytes of ``n`` codes, the first of which has ``lead`` places before it in its byte."""
    return -(-(lead + n) * bits // 8)


def packed_shape(shape: tuple[int, ...], bits: int, lead: int = 0) -> tuple[int, ...]:
    """Shape of packed codes of a value: rows of the matrix view (none of a vector) and bytes of a row."""
    row = int(torch.Size(shape[1:] if len(shape) > 1 else shape).numel())
    return (*(shape[:1] if len(shape) > 1 else ()), packed_length(row, bits, lead))


def pack(codes: Tensor, bits: int, lead: int = 0) -> Tensor:
    """Codes one a byte → ``8 / bits`` a byte.

    Args:
        codes: uint8 or int8 ``[…, n]``, below ``2^bits`` (of negative ones, the lowest bits count).
        bits: Of a code: 1, 2 or 4.
        lead: How many places of the first byte stay free.

    Returns:
        uint8 ``[…, packed_length(n, bits, lead)]``; places that are no code's are 0.
    """
    dtype, mask = _WIDE[bits]
    per_byte = 8 // bits
    behind = -(lead + codes.shape[-1]) % per_byte
    if lead or behind:
        codes = torch.nn.functional.pad(codes, (lead, behind))
    codes = codes.contiguous()
    # what a graph packs it has made itself; a slice may begin where no wider integer can
    if not torch.compiler.is_compiling() and codes.storage_offset() % per_byte:
        codes = codes.clone()
    # flat: only so is one dtype a view of another for every shape
    wide = codes.view(-1).view(dtype) & mask
    gathered = wide
    for place in range(1, per_byte):
        gathered = gathered | wide >> place * (8 - bits)
    return gathered.to(torch.uint8).view(*codes.shape[:-1], codes.shape[-1] // per_byte)


def unpack(packed: Tensor, bits: int) -> Tensor:
    """``8 / bits`` codes a byte → one a byte, uint8: ``[…, bytes]`` → ``[…, 8 / bits · bytes]``."""
    return spread(packed, bits).view(torch.uint8).view(*packed.shape[:-1], 8 // bits * packed.shape[-1])


def spread(packed: Tensor, bits: int) -> Tensor:
    """:func:`unpack`, flat, as one wider integer for each byte of ``packed``."""
    dtype, mask = _WIDE[bits]
    wide = packed.reshape(-1).to(dtype)
    found = wide
    for place in range(1, 8 // bits):
        found = found | wide << place * (8 - bits)
    return found & mask
