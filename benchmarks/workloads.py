"""What is stepped in the benchmarks: the shapes of four kinds of training, at any scale."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import nn

Shape = tuple[int, ...]
Shapes = list[tuple[str, Shape]]
Named = list[tuple[str, nn.Parameter]]


def lora(scale: float = 1.0) -> Shapes:
    """500 pairs of rank 16 on widths 512 to 4096, under peft's names; the scale is that of their number."""
    widths = (512, 768, 1024, 2048, 4096)
    made: Shapes = []
    for i in range(max(len(widths), round(500 * scale))):
        width = widths[i % len(widths)]
        made += [(f"layer{i}.lora_A.default.weight", (16, width)), (f"layer{i}.lora_B.default.weight", (width, 16))]
    return made


def transformer(scale: float = 1.0) -> Shapes:
    """A decoder of 60M parameters: embedding 32k × 512, 14 blocks of width 512; the scale is that of the elements,
    fewer and narrower blocks in equal parts."""
    width = max(64, round(512 * scale**0.25 / 64) * 64)
    made: Shapes = [("embedding.weight", (max(64, round(32_000 * scale**0.75)), width))]
    for i in range(max(2, round(14 * math.sqrt(scale)))):
        for name, shape in (
            ("attention", (3 * width, width)),
            ("output", (width, width)),
            ("up", (4 * width, width)),
            ("down", (width, 4 * width)),
        ):
            made += [(f"block{i}.{name}.weight", shape), (f"block{i}.{name}.bias", shape[:1])]
        for name in ("norm1", "norm2"):
            made += [(f"block{i}.{name}.weight", (width,)), (f"block{i}.{name}.bias", (width,))]
    return [*made, ("norm.weight", (width,)), ("norm.bias", (width,))]


def unet(scale: float = 1.0) -> Shapes:
    """The residual blocks of a diffusion U-Net: 3 × 3 kernels of 96 to 384 channels on the way down and up, 1 × 1
    where channels change, norms, and a projection of the time embedding; the scale is that of the elements."""
    base = max(8, round(96 * math.sqrt(scale) / 8) * 8)
    time = 4 * base
    made: Shapes = [("conv_in.weight", (base, 4, 3, 3)), ("conv_in.bias", (base,))]
    skips = [base]

    def block(name: str, into: int, out: int) -> None:
        for part, shape in (
            ("norm1", (into,)),
            ("conv1", (out, into, 3, 3)),
            ("time", (out, time)),
            ("norm2", (out,)),
            ("conv2", (out, out, 3, 3)),
            *([("skip", (out, into, 1, 1))] if into != out else []),
        ):
            made.extend([(f"{name}.{part}.weight", shape), (f"{name}.{part}.bias", shape[:1])])

    channels = base
    widths = (base, 2 * base, 4 * base, 4 * base)
    for level, width in enumerate(widths):
        for i in range(2):
            block(f"down{level}.{i}", channels, width)
            channels = width
            skips.append(channels)
    for i in range(2):
        block(f"middle.{i}", channels, channels)
    for level, width in reversed(list(enumerate(widths))):
        for i in range(2):
            block(f"up{level}.{i}", channels + skips.pop(), width)
            channels = width
    return [*made, ("conv_out.weight", (4, base, 3, 3)), ("conv_out.bias", (4,))]


def matrix(scale: float = 1.0) -> Shapes:
    """One matrix of 64M (2²⁶) elements; the scale is that of the elements."""
    side = max(64, round(8192 * math.sqrt(scale) / 64) * 64)
    return [("weight", (side, side))]


#: Key → what it is, and its shapes at a scale.
WORKLOADS: dict[str, tuple[str, Callable[[float], Shapes]]] = {
    "L": ("LoRA tensors of rank 16", lora),
    "T": ("a transformer", transformer),
    "C": ("kernels of a diffusion U-Net", unet),
    "B": ("one matrix", matrix),
}


def build(shapes: Shapes, device: torch.device | str = "cpu") -> Named:
    """Parameters with gradients, the same for the same shapes; the B of every LoRA is zero, as it begins."""
    generator = torch.Generator().manual_seed(0)
    named: Named = []
    for name, shape in shapes:
        start = torch.zeros(shape) if "lora_B" in name else torch.randn(shape, generator=generator) * 0.02
        p = nn.Parameter(start.to(device))
        p.grad = (torch.randn(shape, generator=generator) * 1e-3).to(device)
        named.append((name, p))
    return named
