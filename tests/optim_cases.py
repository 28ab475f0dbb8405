"""Parameters, gradients and settings that the engine's tests share."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

#: Every technique that the default leaves off, with short intervals so that a few steps see all of it.
EVERYTHING: dict[str, Any] = {
    "use_orthogonal_grad": True,
    "edge_suppression": True,
    "spatial_awareness": True,
    "background_regularization": True,
    "lora_rank_penalty": True,
    "rank_target": 2,
    "rank_interval": 2,
    "relationship_discovery_interval": 3,
    "warmup_steps": 6,
    "wd_transition_steps": 4,
    "lr_bump": 1e-5,
}

#: AdamW and nothing else.
NOTHING: dict[str, Any] = {
    "use_spd": False,
    "use_cautious": False,
    "use_adopt_stability": False,
    "use_agr": False,
    "use_tam": False,
    "use_dynamic_adaptation": False,
    "use_lr_mask": False,
    "dynamic_weight_decay": False,
}

#: 0-d, 1-d, one element, empty, tall, wide, square, 3-d, 4-d and 5-d kernels, a LoRA pair (names below), two of one
#: shape.
SHAPES: dict[str, tuple[int, ...]] = {
    "scalar": (),
    "one": (1,),
    "vector": (7,),
    "empty": (0, 3),
    "tall": (9, 4),
    "wide": (3, 11),
    "square": (5, 5),
    "conv1d": (2, 3, 5),
    "conv2d": (3, 2, 3, 3),
    "conv3d": (2, 1, 3, 3, 3),
    "layer.lora_A.default.weight": (2, 6),
    "layer.lora_B.default.weight": (8, 2),
    "twin1": (4, 6),
    "twin2": (4, 6),
}


def named_params(dtype: torch.dtype = torch.float32, seed: int = 0) -> list[tuple[str, nn.Parameter]]:
    """One parameter a shape; the LoRA B is zero, as adapters begin."""
    generator = torch.Generator().manual_seed(seed)
    result = []
    for name, shape in SHAPES.items():
        value = torch.randn(shape, generator=generator, dtype=torch.float64)
        if "lora_B" in name:
            value = torch.zeros(shape, dtype=torch.float64)
        result.append((name, nn.Parameter(value.to(dtype))))
    return result


def gradients(step: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """A gradient a shape, for one step: the same numbers whatever the dtype they are rounded to."""
    generator = torch.Generator().manual_seed(1000 + step)
    drift = torch.Generator().manual_seed(7)
    return [
        (
            torch.randn(shape, generator=generator, dtype=torch.float64)
            + torch.randn(shape, generator=drift, dtype=torch.float64)
        ).to(dtype)
        for shape in SHAPES.values()
    ]


def give(params: list[tuple[str, nn.Parameter]], step: int) -> None:
    """Set every parameter's gradient for a step."""
    for (_, p), g in zip(params, gradients(step), strict=True):
        p.grad = g.to(p.device, p.dtype)
