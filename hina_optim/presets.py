"""Named sets of arguments for a purpose. A preset never sets a learning rate, and explicit arguments override it.

The values are those that the original design recommends for the purpose. Text models have no edges and no neighborhoods
in their weights, so the techniques that look for them are off in every preset that is not named after images.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

__all__ = ["PRESETS", "Preset"]

_NEVER = frozenset({"lr", "params"})


@dataclass(frozen=True)
class Preset:
    """Arguments for a purpose.

    Attributes:
        name: What it is called in ``create_optimizer(…, preset=name)``.
        optimizer: The optimizer that it is for.
        purpose: One line: what it is for.
        arguments: Read-only.

    Raises:
        ValueError: The arguments hold ``lr`` or ``params``.
    """

    name: str
    optimizer: str
    purpose: str
    arguments: Mapping[str, Any]

    def __post_init__(self) -> None:
        forbidden = _NEVER & set(self.arguments)
        if forbidden:
            raise ValueError(
                f"preset {self.name!r} sets {', '.join(sorted(forbidden))}, which is the user's to choose."
            )
        object.__setattr__(self, "arguments", MappingProxyType(dict(self.arguments)))


PRESETS: tuple[Preset, ...] = (
    Preset(
        "lora",
        "HinaAdaptive",
        "adapters of any kind of model: the product B·A is kept at a low rank",
        {
            "warmup_steps": 500,
            "lora_rank_penalty": True,
            "rank_penalty_strength": 0.01,
            "low_rank_emphasis": 1.2,
        },
    ),
    Preset(
        "language",
        "HinaAdaptive",
        "language models with an adapter: low rank, long warm-up, nothing that looks for images",
        {
            "warmup_steps": 1000,
            "lora_rank_penalty": True,
            "edge_suppression": False,
            "spatial_awareness": False,
            "background_regularization": False,
        },
    ),
    Preset(
        "full_finetune",
        "HinaAdaptive",
        "all weights of a pretrained model: short warm-up, stronger adaptation between parameters",
        {
            "warmup_steps": 200,
            "edge_suppression": False,
            "lora_rank_penalty": False,
            "adaptation_strength": 1.2,
            "relationship_discovery_interval": 150,
            "importance_decay": 0.95,
            "compatibility_threshold": 0.25,
            "dynamic_weight_decay": True,
            "wd_transition_steps": 800,
            "wd_decay_factor": 0.75,
        },
    ),
    Preset(
        "large_model",
        "HinaAdaptive",
        "large models: long warm-up, conservative adaptation, state in bf16",
        {
            "warmup_steps": 1000,
            "adaptation_strength": 0.8,
            "relationship_discovery_interval": 200,
            "importance_decay": 0.98,
            "compatibility_threshold": 0.35,
            "use_cautious": True,
            "use_adopt_stability": True,
            "state_precision": "bf16",
        },
    ),
    Preset(
        "image",
        "HinaAdaptive",
        "image models: less over-fitting to edges, to high frequencies and to the background",
        {
            "edge_suppression": True,
            "edge_penalty": 0.1,
            "edge_threshold": 0.6,
            "spatial_awareness": True,
            "frequency_penalty": 0.08,
            "detail_preservation": 0.8,
            "background_regularization": True,
        },
    ),
    Preset(
        "image_lora",
        "HinaAdaptive",
        "adapters of image models: low rank and mild edge suppression",
        {
            "lora_rank_penalty": True,
            "rank_penalty_strength": 0.01,
            "low_rank_emphasis": 1.2,
            "edge_suppression": True,
            "edge_penalty": 0.08,
        },
    ),
    Preset(
        "image_subject",
        "HinaAdaptive",
        "adapters that learn a subject: strong edge control, details kept",
        {
            "edge_suppression": True,
            "edge_penalty": 0.2,
            "spatial_awareness": True,
            "frequency_penalty": 0.1,
            "detail_preservation": 0.9,
            "background_regularization": True,
            "lora_rank_penalty": True,
        },
    ),
    Preset(
        "image_style",
        "HinaAdaptive",
        "adapters that learn a style or a background: strongly low rank, smoothing allowed",
        {
            "spatial_awareness": True,
            "detail_preservation": 0.7,
            "background_regularization": True,
            "lora_rank_penalty": True,
            "rank_penalty_strength": 0.025,
            "low_rank_emphasis": 1.5,
        },
    ),
    Preset(
        "low_memory",
        "HinaAdaptive",
        "the least memory: a small budget, state in bf16, small temporary buffers",
        {
            "memory_efficient": True,
            "vram_budget_gb": 4.0,
            "state_precision": "bf16",
            "max_buffer_memory_mb": 200,
            "adaptive_features": True,
        },
    ),
    Preset(
        "quick",
        "HinaAdaptive",
        "short experiments: short warm-up, the costly techniques off",
        {
            "warmup_steps": 200,
            "lora_rank_penalty": False,
            "spatial_awareness": False,
            "background_regularization": False,
        },
    ),
    Preset(
        "full_finetune",
        "AdaptiveHinaAdamW",
        "all weights of a pretrained model: stronger adaptation between parameters, looked at less often",
        {
            "use_dynamic_adaptation": True,
            "adaptation_strength": 1.2,
            "relationship_discovery_interval": 150,
            "importance_decay": 0.95,
            "compatibility_threshold": 0.25,
            "dynamic_weight_decay": True,
            "wd_transition_steps": 800,
            "wd_decay_factor": 0.75,
        },
    ),
    Preset(
        "large_model",
        "AdaptiveHinaAdamW",
        "large models: conservative adaptation, stable updates",
        {
            "adaptation_strength": 0.8,
            "relationship_discovery_interval": 200,
            "importance_decay": 0.98,
            "compatibility_threshold": 0.35,
            "use_cautious": True,
            "use_adopt_stability": True,
        },
    ),
    Preset(
        "diffusion",
        "HinaAdamWOptimizer",
        "LoRA adapters of diffusion models: decay that shrinks early",
        {
            "alora_ratio": 16.0,
            "wd_transition_steps": 800,
            "wd_decay_factor": 0.75,
            "use_spd": True,
            "spd_lambda": 0.06,
        },
    ),
    Preset(
        "language",
        "HinaAdamWOptimizer",
        "adapters of large language models: B faster, decay that shrinks late",
        {
            "alora_ratio": 20.0,
            "wd_transition_steps": 1200,
            "wd_decay_factor": 0.8,
            "use_adopt_stability": True,
        },
    ),
    Preset(
        "lokr",
        "HinaAdamWOptimizer",
        "LoKr adapters: decay that shrinks early, to a higher floor",
        {
            "alora_ratio": 18.0,
            "wd_transition_steps": 600,
            "wd_decay_factor": 0.8,
            "wd_min_ratio": 0.18,
        },
    ),
    Preset(
        "image_lora",
        "Automagic_CameAMP_Improved",
        "adapters of image models: stronger control of edges and high frequencies, lower rank",
        {
            "edge_suppression": True,
            "edge_penalty": 0.15,
            "edge_threshold": 0.5,
            "background_regularization": True,
            "frequency_penalty": 0.08,
            "lora_rank_penalty": True,
            "rank_penalty_strength": 0.02,
            "low_rank_emphasis": 1.3,
        },
    ),
    Preset(
        "image_subject",
        "Automagic_CameAMP_Improved",
        "adapters that learn a subject: strong edge control, details kept",
        {
            "edge_suppression": True,
            "edge_penalty": 0.2,
            "spatial_awareness": True,
            "frequency_penalty": 0.1,
            "detail_preservation": 0.9,
        },
    ),
    Preset(
        "image_style",
        "Automagic_CameAMP_Improved",
        "adapters that learn a style or a background: strongly low rank, smoothing allowed",
        {
            "background_regularization": True,
            "lora_rank_penalty": True,
            "rank_penalty_strength": 0.025,
            "low_rank_emphasis": 1.5,
            "detail_preservation": 0.7,
        },
    ),
    Preset(
        "image",
        "RefactoredAutomagicCameAMP",
        "image models: more of the high frequencies removed",
        {
            "edge_suppression": True,
            "frequency_penalty": 0.08,
            "spatial_awareness": True,
            "background_regularization": True,
        },
    ),
    Preset(
        "language",
        "RefactoredAutomagicCameAMP",
        "language models with an adapter: low rank, long warm-up, nothing that looks for images",
        {
            "lora_rank_penalty": True,
            "edge_suppression": False,
            "spatial_awareness": False,
            "background_regularization": False,
            "warmup_steps": 1000,
        },
    ),
)
