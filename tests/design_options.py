"""Arguments by purpose, as the documents of the design give them."""

from __future__ import annotations

from typing import Any

Named = dict[str, dict[str, Any]]

HINA_ADAPTIVE: Named = {
    "basic": dict(
        lr=1e-4,
        memory_efficient=True,
        vram_budget_gb=8.0,
        edge_suppression=True,
        edge_penalty=0.1,
        spatial_awareness=True,
        frequency_penalty=0.05,
    ),
    "advanced": dict(
        lr=1e-4,
        memory_efficient=True,
        vram_budget_gb=12.0,
        reduce_precision=True,
        cpu_offload_states=True,
        edge_suppression=True,
        edge_penalty=0.1,
        spatial_awareness=True,
        frequency_penalty=0.05,
        background_regularization=True,
        lora_rank_penalty=True,
        rank_penalty_strength=0.01,
        use_dynamic_adaptation=True,
        use_tam=True,
        use_cautious=True,
        use_spd=True,
    ),
    "lora": dict(
        lr=1e-4,
        lora_rank_penalty=True,
        rank_penalty_strength=0.01,
        low_rank_emphasis=1.2,
        edge_suppression=True,
        edge_penalty=0.08,
        memory_efficient=True,
        vram_budget_gb=8.0,
    ),
    "large": dict(
        lr=8e-5,
        edge_suppression=True,
        edge_penalty=0.12,
        spatial_awareness=True,
        frequency_penalty=0.06,
        background_regularization=True,
        use_dynamic_adaptation=True,
        memory_efficient=True,
        vram_budget_gb=16.0,
        reduce_precision=True,
        cpu_offload_states=True,
    ),
    "quick": dict(lr=1e-4, edge_suppression=True, edge_penalty=0.1, memory_efficient=True, vram_budget_gb=6.0),
    "low": dict(lr=1e-4, memory_efficient=True, vram_budget_gb=8.0),
    "lower": dict(
        lr=1e-4,
        memory_efficient=True,
        vram_budget_gb=12.0,
        reduce_precision=True,
        cpu_offload_states=True,
        max_buffer_memory_mb=500,
    ),
    "lowest": dict(
        lr=1e-4,
        memory_efficient=True,
        vram_budget_gb=4.0,
        reduce_precision=True,
        cpu_offload_states=True,
        max_buffer_memory_mb=200,
        adaptive_features=True,
    ),
    "unstable": dict(lr=1e-4, edge_suppression=True, edge_penalty=0.05, spatial_awareness=True, frequency_penalty=0.02),
    "migrated": dict(
        lr=1e-4,
        edge_suppression=True,
        edge_penalty=0.1,
        spatial_awareness=True,
        frequency_penalty=0.05,
        background_regularization=True,
        memory_efficient=True,
        vram_budget_gb=8.0,
    ),
}
ADAPTIVE_ADAMW: Named = {
    "quick_start": dict(
        lr=1e-3,
        use_dynamic_adaptation=True,
        adaptation_strength=1.0,
        relationship_discovery_interval=100,
        importance_decay=0.95,
        compatibility_threshold=0.3,
        use_spd=True,
        use_cautious=True,
    ),
    "general": dict(
        lr=1e-3,
        use_dynamic_adaptation=True,
        adaptation_strength=1.2,
        relationship_discovery_interval=150,
        importance_decay=0.95,
        compatibility_threshold=0.25,
        dynamic_weight_decay=True,
        wd_transition_steps=800,
        wd_decay_factor=0.75,
    ),
    "large": dict(
        lr=5e-4,
        adaptation_strength=0.8,
        relationship_discovery_interval=200,
        importance_decay=0.98,
        compatibility_threshold=0.35,
        use_cautious=True,
        use_adopt_stability=True,
    ),
}
HINA_ADAMW: Named = {
    "quick_start": dict(lr=1e-3, use_alora=True, dynamic_weight_decay=True, use_spd=True, use_cautious=True),
    "diffusion": dict(
        lr=8e-4, alora_ratio=16.0, wd_transition_steps=800, wd_decay_factor=0.75, use_spd=True, spd_lambda=0.06
    ),
    "language": dict(
        lr=5e-4, alora_ratio=20.0, wd_transition_steps=1200, wd_decay_factor=0.8, use_adopt_stability=True
    ),
    "lokr": dict(lr=1e-3, alora_ratio=18.0, wd_transition_steps=600, wd_decay_factor=0.8, wd_min_ratio=0.18),
}

IMPROVED: Named = {
    "basic": dict(
        lr=1e-4,
        edge_suppression=True,
        edge_penalty=0.15,
        edge_threshold=0.5,
        background_regularization=True,
        frequency_penalty=0.08,
        lora_rank_penalty=True,
        rank_penalty_strength=0.02,
        low_rank_emphasis=1.3,
    ),
    "subject": dict(lr=1e-4, edge_penalty=0.2, frequency_penalty=0.1, detail_preservation=0.9),
    "style": dict(lr=1e-4, rank_penalty_strength=0.025, low_rank_emphasis=1.5, detail_preservation=0.7),
}
REFACTORED: Named = {
    "watched": dict(verbose=True),
    "own": dict(
        lr=2e-4, warmup_steps=300, edge_suppression=True, spatial_awareness=True, lora_rank_penalty=True, verbose=True
    ),
    "images": dict(
        lr=1e-4, edge_suppression=True, frequency_penalty=0.08, spatial_awareness=True, background_regularization=True
    ),
    "language": dict(
        lr=2e-5, lora_rank_penalty=True, edge_suppression=False, spatial_awareness=False, warmup_steps=1000
    ),
}
#: Each beside ``lr=1e-4``.
REGULARIZATIONS: Named = {
    "edge_suppression": dict(edge_suppression=True, edge_penalty=0.1, edge_threshold=0.6),
    "spatial_awareness": dict(spatial_awareness=True, frequency_penalty=0.05, detail_preservation=0.8),
    "background_regularization": dict(background_regularization=True),
    "lora_rank_penalty": dict(lora_rank_penalty=True, rank_penalty_strength=0.01, low_rank_emphasis=1.2),
}
#: Each on top of the last.
STAGES: list[dict[str, Any]] = [
    dict(memory_efficient=True),
    dict(edge_suppression=True, edge_penalty=0.1),
    dict(spatial_awareness=True, frequency_penalty=0.05, background_regularization=True),
]
CREATE_LORA: list[dict[str, Any]] = [
    dict(lr=1e-4, warmup_steps=500),
    dict(lr=1e-4, warmup_steps=500, edge_suppression=True, spatial_awareness=True),
]

_RATES: dict[str, Any] = dict(warmup_steps=500, min_lr=1e-7, max_lr=1e-3, lr_bump=3e-6)
_ADAMW: dict[str, Any] = dict(
    lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=1e-2, use_spd=True, spd_lambda=0.06, use_cautious=True,
    use_orthogonal_grad=False, use_adopt_stability=True, use_grams=False, use_agr=True, use_tam=True,
    dynamic_weight_decay=True, wd_transition_steps=1000, wd_decay_factor=0.7, wd_min_ratio=0.1, verbose=False,
)  # fmt: skip
_ADAPTIVE: dict[str, Any] = dict(
    **_ADAMW, **_RATES, use_dynamic_adaptation=True, adaptation_strength=1.0, relationship_discovery_interval=100,
    importance_decay=0.95, compatibility_threshold=0.3, use_lr_mask=True,
)  # fmt: skip
_CAME: dict[str, Any] = dict(
    **_RATES, lr=1e-6, betas=(0.8, 0.99, 0.999), eps=(1e-30, 1e-16), weight_decay=5e-4, beta1_decay=0.9995, eta=2.0,
    came=True, full_finetune=False, clip_threshold=1.0, verbose=False,
)  # fmt: skip
_IMAGES: dict[str, Any] = dict(
    edge_penalty=0.1, edge_threshold=0.6, frequency_penalty=0.05, detail_preservation=0.8, rank_penalty_strength=0.01,
    low_rank_emphasis=1.2,
)  # fmt: skip
_IMPROVED: dict[str, Any] = dict(
    **_CAME, **_IMAGES, edge_suppression=True, background_regularization=True, spatial_awareness=True,
    lora_rank_penalty=True, d_coef=2.0, enable_dual_momentum=True, long_term_beta=0.99, alpha_mix_ratio=None,
)  # fmt: skip
_COPTIM: dict[str, Any] = dict(**_CAME, context_window=30, adaptation_rate=0.25, momentum_scales=(1, 5, 20, 100))
_8BIT: dict[str, Any] = dict(min_8bit_size=4096, force_8bit=False, state_precision="8bit")
_SWITCHES = ("edge_suppression", "spatial_awareness", "background_regularization", "lora_rank_penalty")
_MEMORY: dict[str, Any] = dict(
    memory_efficient=True, vram_budget_gb=16.0, reduce_precision=False, cpu_offload_states=False,
    max_buffer_memory_mb=500, adaptive_features=True, emergency_simplify=True,
)  # fmt: skip
#: What is in a group where nothing was said.
DEFAULTS: Named = {
    "HinaAdaptive": {**_ADAPTIVE, **_IMAGES, **_MEMORY, **dict.fromkeys(_SWITCHES, False)},
    "AdaptiveHinaAdamW": _ADAPTIVE,
    "HinaAdamWOptimizer": dict(**_ADAMW, use_alora=True, alora_ratio=16.0),
    "Automagic_CameAMP": _CAME,
    "Automagic_CameAMP_Improved": _IMPROVED,
    "RefactoredAutomagicCameAMP": _IMPROVED,
    "Automagic_CameAMP_8bit": {**_CAME, **_8BIT},
    "Automagic_CameAMP_Improved_8Bit": {**_IMPROVED, **_8BIT},
    "Automagic_CameAMP_COptim": _COPTIM,
    "Automagic_CameAMP_COptim8bit": {**_COPTIM, **_8BIT},
}
