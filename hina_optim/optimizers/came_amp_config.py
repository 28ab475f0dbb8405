"""All options of a CAME-based optimizer in one object."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

__all__ = ["Improved8BitOptimizerConfig", "ImprovedOptimizerConfig", "OptimizerConfig"]


@dataclass
class ImprovedOptimizerConfig:
    """Options of :class:`~hina_optim.Automagic_CameAMP_Improved`, with its defaults; they are described there."""

    lr: float = 1e-6
    betas: tuple[float, float, float] = (0.8, 0.99, 0.999)
    eps: tuple[float, float] = (1e-30, 1e-16)
    weight_decay: float = 5e-4
    warmup_steps: int = 500
    min_lr: float = 1e-7
    max_lr: float = 1e-3
    lr_bump: float = 3e-6
    beta1_decay: float = 0.9995
    eta: float = 2.0
    came: bool = True
    full_finetune: bool = False
    clip_threshold: float = 1.0
    use_agr: bool = True
    use_tam: bool = True
    tam_beta: float = 0.9
    use_grams: bool = True
    use_cautious: bool = True
    use_ada_decay: bool = True
    use_spd: bool = True
    spd_lambda: float = 0.06
    use_lr_mask: bool = True
    d_coef: float = 2.0
    edge_suppression: bool = True
    edge_penalty: float = 0.1
    edge_threshold: float = 0.6
    spatial_awareness: bool = True
    frequency_penalty: float = 0.05
    detail_preservation: float = 0.8
    background_regularization: bool = True
    factored_image_state: bool = False
    lora_rank_penalty: bool = True
    rank_penalty_strength: float = 0.01
    low_rank_emphasis: float = 1.2
    rank_target: int | float = 0.9
    rank_interval: int = 10
    enable_dual_momentum: bool = True
    long_term_beta: float = 0.99
    alpha_mix_ratio: float | None = None
    use_loss_context: bool = False
    context_window: int = 30
    adaptation_rate: float = 0.25
    max_buffer_memory_mb: int = 500
    state_precision: Literal["fp32", "bf16", "8bit", "4bit"] | None = None
    min_8bit_size: int = 4096
    force_8bit: bool = False
    state_device: Literal["cpu"] | None = None
    anchor_device: Literal["cpu"] | None = None
    rounding: Literal["stochastic", "kahan", "nearest"] = "stochastic"
    seed: int = 0
    compile: bool | None = None
    verbose: bool = False


@dataclass
class OptimizerConfig(ImprovedOptimizerConfig):
    """Options of :class:`~hina_optim.RefactoredAutomagicCameAMP`, with its defaults; they are described there."""


@dataclass
class Improved8BitOptimizerConfig(ImprovedOptimizerConfig):
    """Options of :class:`~hina_optim.Automagic_CameAMP_Improved_8Bit`, with its defaults; they are described there.

    ``state_precision=None`` is ``"8bit"`` there.
    """
