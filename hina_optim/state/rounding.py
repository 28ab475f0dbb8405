"""Stochastic rounding from a hash of (seed, step, parameter, element): the same on every rank, replica and resume.

A counter-based generator needs no state, so nothing has to be saved, and a shard draws exactly the numbers that the
whole tensor would draw at its place. All is multiplications and shifts of wrapping int32, which every device and the
compiler have. Every step but the last, which drops bits, is a bijection: over all seeds, a draw is exactly uniform.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["element_words", "mix_", "param_seeds", "round_stochastic", "stream_noise"]

_M1 = 0x7FEB352D
_M2 = 0x846CA68B - (1 << 32)
_GOLDEN = 0x9E3779B9 - (1 << 32)
_M3 = 0x2C1B3C6D
#: What words are moved by from one stream to the next: odd, and no small multiple of it is near one of 2³².
_STREAM = 0x632BE59B


def mix_(x: Tensor) -> Tensor:
    """Scramble int32 values in place: every input bit changes every output bit with probability about one half."""
    x.bitwise_xor_((x >> 16).bitwise_and_(0xFFFF)).mul_(_M1)
    x.bitwise_xor_((x >> 15).bitwise_and_(0x1FFFF)).mul_(_M2)
    return x.bitwise_xor_((x >> 16).bitwise_and_(0xFFFF))


def param_seeds(keys: Tensor, seed: int, step: int) -> Tensor:
    """One int32 seed a parameter, ``[N]``, from ``keys`` (int32, ``[N]``), the user's seed and the step."""
    word = (seed * 0x85EBCA6B + step * 0xC2B2AE35 + (step >> 32)) & 0xFFFFFFFF
    return mix_(mix_(keys * _GOLDEN) + (word - (1 << 32) if word >= 1 << 31 else word))


def element_words(seeds: Tensor, index: Tensor) -> Tensor:
    """One scrambled word an element, int32, ``[N, *shape]``: what all draws of a step share, and half of their work.

    Args:
        seeds: int32 ``[N, 1, …]``, from :func:`param_seeds`.
        index: int32 ``[1, *shape]``: global flat index of each element (wrapped to 32 bits).
    """
    x = torch.add(seeds, index, alpha=_GOLDEN)
    x = x.bitwise_xor_((x >> 15).bitwise_and_(0x1FFFF)).mul_(_M3)
    return x.bitwise_xor_((x >> 16).bitwise_and_(0xFFFF))


def stream_noise(words: Tensor, stream: int) -> Tensor:
    """16 uniform bits an element, int32 in [0, 65535], of the shape of ``words``, which :func:`element_words` gives.

    Args:
        words: Of this step.
        stream: Which of several independent draws in one step, from 0.
    """
    # hashed, not only multiplied: products of one word are too alike, and averages that several draws of a step round
    # went astray by a third more
    move = (stream + 1) * _STREAM & 0xFFFFFFFF
    return mix_(words + (move - (1 << 32) if move >= 1 << 31 else move)).bitwise_and_(0xFFFF)


def round_stochastic(x: Tensor, noise: Tensor, dtype: torch.dtype) -> Tensor:
    """Round float32 to bfloat16 or float16 so that the expected value is exact.

    Args:
        x: float32.
        noise: int32 in [0, 65535], same shape, uniform.
        dtype: ``torch.bfloat16`` or ``torch.float16``. Values beyond float16's range become infinite, as in a cast.
    """
    bfloat16 = dtype == torch.bfloat16
    drop = 16 if bfloat16 else 13
    mask = (1 << drop) - 1
    dither = noise if bfloat16 else noise & mask
    rounded = (x.view(torch.int32) + dither).bitwise_and_(~mask).view(torch.float32)
    if not bfloat16:
        # below the smallest normal number the quantum no longer shrinks with the value
        # (13 bits beside at most 10 of the value: the sum is exact, and a representable value stays)
        unit = dither.float() * 2.0**-drop
        rounded = torch.where(x.abs() < 2.0**-14, torch.floor(x * 2.0**24 + unit) * 2.0**-24, rounded)
    # The carry may have made a number of what was none. The sum with what is -0, or none where x is none, changes
    # nothing else, and takes a fifth of the time of a test
    return rounded.add_(x.clamp(-0.0, -0.0)).to(dtype)
