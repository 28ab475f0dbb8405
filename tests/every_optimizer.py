"""Every named optimizer, with options under which a few steps see all phases, intervals and techniques of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

import hina_optim
from hina_optim.engine.optimizer import HinaOptimizer
from tests.optim_cases import EVERYTHING

LR = 3e-4

_CAME: dict[str, Any] = {"warmup_steps": 4, "lr_bump": 1e-5, "use_loss_context": True}
_IMPROVED: dict[str, Any] = {**_CAME, "rank_target": 2, "rank_interval": 2}
_ADAMW: dict[str, Any] = {"use_orthogonal_grad": True, "wd_transition_steps": 4, "use_loss_context": True}

#: Name → options: everything switched on, short intervals.
OPTIONS: dict[str, dict[str, Any]] = {
    "HinaAdaptive": {**EVERYTHING, "use_loss_context": True},
    "AdaptiveHinaAdamW": {**_ADAMW, "relationship_discovery_interval": 3, "warmup_steps": 6, "lr_bump": 1e-5},
    "HinaAdamWOptimizer": _ADAMW,
    "Automagic_CameAMP": _CAME,
    "Automagic_CameAMP_Improved": _IMPROVED,
    "RefactoredAutomagicCameAMP": {**_IMPROVED, "full_finetune": True, "factored_image_state": True},
    "Automagic_CameAMP_8bit": _CAME,
    "Automagic_CameAMP_Improved_8Bit": {**_IMPROVED, "factored_image_state": True},
    "Automagic_CameAMP_COptim": {"warmup_steps": 4, "lr_bump": 1e-5, "momentum_scales": (1, 2, 3)},
    "Automagic_CameAMP_COptim8bit": {"warmup_steps": 4, "lr_bump": 1e-5, "momentum_scales": (1, 2, 3)},
}
NAMES = list(OPTIONS)


def make(name: str, params: Any, **arguments: Any) -> HinaOptimizer:
    """Build it with everything switched on."""
    cls: Callable[..., HinaOptimizer] = getattr(hina_optim, name)
    return cls(params, **{"lr": LR, **OPTIONS[name], **arguments})


def loss_of(step: int) -> float:
    """A loss that falls, with noise; what techniques that read it are given."""
    return 2.0 * 0.97**step + 0.01 * ((step * 7919) % 13)


def reported(optimizer: HinaOptimizer, step: int) -> None:
    """Report the loss of a step, and take it."""
    optimizer.report_loss(loss_of(step))
    optimizer.step()


def large(dtype: torch.dtype = torch.float32) -> list[tuple[str, nn.Parameter]]:
    """Parameters that are large enough for 8 bits: rows of whole blocks, of ragged ones, a kernel, a vector, a pair."""
    shapes = {
        "blocks": (20, 256),
        "ragged": (70, 300),
        "kernel": (24, 20, 3, 3),
        "vector": (5000,),
        "layer.lora_A.default.weight": (8, 640),
        "layer.lora_B.default.weight": (640, 8),
        "small": (7, 5),
    }
    generator = torch.Generator().manual_seed(3)
    return [
        (name, nn.Parameter((torch.zeros(s) if "lora_B" in name else torch.randn(s, generator=generator)).to(dtype)))
        for name, s in shapes.items()
    ]


def give_large(named: list[tuple[str, nn.Parameter]], step: int) -> None:
    """Set gradients with a drift, the same for the same step."""
    generator = torch.Generator().manual_seed(500 + step)
    drift = torch.Generator().manual_seed(11)
    for _, p in named:
        g = torch.randn(p.shape, generator=generator) + torch.randn(p.shape, generator=drift)
        p.grad = g.to(p.dtype)
