"""Automagic_CameAMP_Improved: CAME with control of edges, frequencies, regions and rank, and a long-term moment."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from hina_optim.engine.optimizer import ParamsT
from hina_optim.optimizers import blocks
from hina_optim.optimizers.came_amp import CameFamily
from hina_optim.optimizers.came_amp_config import Improved8BitOptimizerConfig, ImprovedOptimizerConfig
from hina_optim.optimizers.family import options
from hina_optim.techniques.base import ParamInfo, Technique
from hina_optim.techniques.dual_momentum import DualMomentum
from hina_optim.techniques.emphasis import LowRankEmphasis
from hina_optim.techniques.rank_aware_decay import RankAwareDecay
from hina_optim.techniques.spectrum import Spectrum

__all__ = [
    "AutomagicCameAMPImproved",
    "AutomagicCameAMPImproved8Bit",
    "AutomagicCameAMPImprovedLowBit",
    "Automagic_CameAMP_Improved",
    "Automagic_CameAMP_Improved_8Bit",
    "ImprovedFamily",
    "create_improved_8bit_optimizer",
]

Profile = Literal["memory_optimized", "quality_optimized", "balanced"]


class ImprovedFamily(CameFamily):
    """The recipe of the improved CAME optimizers."""

    def recipe(self, group: dict[str, Any], info: ParamInfo) -> list[Technique]:
        """The techniques of one group, in the order in which they act."""
        g = group
        low_rank = g["lora_rank_penalty"]
        long_term = [DualMomentum(g["long_term_beta"], g["alpha_mix_ratio"])] if g["enable_dual_momentum"] else []
        mature = blocks.Phases.of(g["warmup_steps"]).stable
        return [
            *([Spectrum(g["rank_target"], g["rank_interval"], decay=True)] if low_rank else []),
            *blocks.context(g),
            *self.rows(g),
            *blocks.images(g, info),
            *self.regularizers(),
            *blocks.gradient(g),
            *self.moments(g, long_term),
            *([LowRankEmphasis(g["low_rank_emphasis"])] if low_rank else []),
            *self.directions(g),
            *blocks.mask(g),
            *([RankAwareDecay(g["weight_decay"]).during(mature)] if low_rank else []),
            *self.decays(g, info),
        ]

    def regularizers(self) -> list[Technique]:
        """A user's own, where a class takes them."""
        return []


class Automagic_CameAMP_Improved(ImprovedFamily):
    """:class:`~hina_optim.Automagic_CameAMP` for image models and adapters, with control of what they over-fit to.

    Beside its steps: edges, high frequencies, busy regions and background of the gradient are damped; the singular
    values beyond a rank are pushed down (of the product B·A for a LoRA pair) and the leading ones emphasized; weights
    decay more outside of the leading directions once the training is mature; a long-term moment is mixed with the short
    one; agreeing elements raise their learning rate ``d_coef`` times as fast in the first half of the warm-up.

    A learning rate of 0 moves no weight. Weights, moments and schedules are computed in float32 (float64 for float64
    parameters) whatever they are stored in. A parameter whose gradient has an element that is not finite is left as it
    is in that step, with its state.

    Raises:
        ValueError: An argument is not what it must be (the message names argument, value and rule); lr is outside the
            bounds of the mask; no parameters, one given twice, or one that is complex or not floating point.
        TypeError: An unknown argument (names the nearest one), or one that was removed (names what to use instead).

    References:
        As :class:`~hina_optim.Automagic_CameAMP`; AdEMAMix arXiv 2409.03137 and 2502.02431 for the long-term moment.
        The control of images and rank is this project's own.

    Example:
        >>> import torch
        >>> model = torch.nn.Linear(4, 2)
        >>> config = ImprovedOptimizerConfig(lr=1e-4, edge_penalty=0.15, frequency_penalty=0.08)
        >>> optimizer = Automagic_CameAMP_Improved(model.named_parameters(), config)
        >>> optimizer.config.edge_penalty
        0.15
    """

    CONFIG: ClassVar[type | None] = ImprovedOptimizerConfig

    def __init__(
        self,
        params: ParamsT,
        config: ImprovedOptimizerConfig | None = None,
        *,
        lr: float = 1e-6,
        betas: tuple[float, float, float] = (0.8, 0.99, 0.999),
        eps: tuple[float, float] = (1e-30, 1e-16),
        weight_decay: float = 5e-4,
        warmup_steps: int = 500,
        min_lr: float = 1e-7,
        max_lr: float = 1e-3,
        lr_bump: float = 3e-6,
        beta1_decay: float = 0.9995,
        eta: float = 2.0,
        came: bool = True,
        full_finetune: bool = False,
        clip_threshold: float = 1.0,
        use_agr: bool = True,
        use_tam: bool = True,
        tam_beta: float = 0.9,
        use_grams: bool = True,
        use_cautious: bool = True,
        use_ada_decay: bool = True,
        use_spd: bool = True,
        spd_lambda: float = 0.06,
        use_lr_mask: bool = True,
        d_coef: float = 2.0,
        edge_suppression: bool = True,
        edge_penalty: float = 0.1,
        edge_threshold: float = 0.6,
        spatial_awareness: bool = True,
        frequency_penalty: float = 0.05,
        detail_preservation: float = 0.8,
        background_regularization: bool = True,
        factored_image_state: bool = False,
        lora_rank_penalty: bool = True,
        rank_penalty_strength: float = 0.01,
        low_rank_emphasis: float = 1.2,
        rank_target: int | float = 0.9,
        rank_interval: int = 10,
        enable_dual_momentum: bool = True,
        long_term_beta: float = 0.99,
        alpha_mix_ratio: float | None = None,
        use_loss_context: bool = False,
        context_window: int = 30,
        adaptation_rate: float = 0.25,
        max_buffer_memory_mb: int = 500,
        state_precision: Literal["fp32", "bf16", "8bit", "4bit"] | None = None,
        min_8bit_size: int = 4096,
        force_8bit: bool = False,
        state_device: Literal["cpu"] | None = None,
        anchor_device: Literal["cpu"] | None = None,
        rounding: Literal["stochastic", "kahan", "nearest"] = "stochastic",
        seed: int = 0,
        compile: bool | None = None,
        verbose: bool = False,
        foreach: bool | None = None,
    ) -> None:
        super().__init__(params, options(locals()))


class Automagic_CameAMP_Improved_8Bit(ImprovedFamily):
    """:class:`Automagic_CameAMP_Improved` with its state in 8 bits, and profiles.

    A learning rate of 0 moves no weight. Weights, moments and schedules are computed in float32 (float64 for float64
    parameters) whatever they are stored in. A parameter whose gradient has an element that is not finite is left as it
    is in that step, with its state.

    Raises:
        ValueError: An argument is not what it must be (the message names argument, value and rule); lr is outside the
            bounds of the mask; no parameters, one given twice, or one that is complex or not floating point.
        TypeError: An unknown argument (names the nearest one), or one that was removed (names what to use instead).

    References:
        As :class:`Automagic_CameAMP_Improved`; 8-bit optimizers via block-wise quantization, arXiv 2110.02861.

    Example:
        >>> import torch
        >>> model = torch.nn.Linear(64, 64)
        >>> optimizer = Automagic_CameAMP_Improved_8Bit(model.named_parameters(), lr=2e-4, profile="balanced")
        >>> optimizer.config.min_8bit_size
        4096
    """

    STATE_PRECISION: ClassVar[str] = "8bit"
    CONFIG: ClassVar[type | None] = Improved8BitOptimizerConfig

    def __init__(
        self,
        params: ParamsT,
        config: Improved8BitOptimizerConfig | None = None,
        *,
        lr: float = 1e-6,
        profile: Profile | None = None,
        betas: tuple[float, float, float] = (0.8, 0.99, 0.999),
        eps: tuple[float, float] = (1e-30, 1e-16),
        weight_decay: float = 5e-4,
        warmup_steps: int = 500,
        min_lr: float = 1e-7,
        max_lr: float = 1e-3,
        lr_bump: float = 3e-6,
        beta1_decay: float = 0.9995,
        eta: float = 2.0,
        came: bool = True,
        full_finetune: bool = False,
        clip_threshold: float = 1.0,
        use_agr: bool = True,
        use_tam: bool = True,
        tam_beta: float = 0.9,
        use_grams: bool = True,
        use_cautious: bool = True,
        use_ada_decay: bool = True,
        use_spd: bool = True,
        spd_lambda: float = 0.06,
        use_lr_mask: bool = True,
        d_coef: float = 2.0,
        edge_suppression: bool = True,
        edge_penalty: float = 0.1,
        edge_threshold: float = 0.6,
        spatial_awareness: bool = True,
        frequency_penalty: float = 0.05,
        detail_preservation: float = 0.8,
        background_regularization: bool = True,
        factored_image_state: bool = False,
        lora_rank_penalty: bool = True,
        rank_penalty_strength: float = 0.01,
        low_rank_emphasis: float = 1.2,
        rank_target: int | float = 0.9,
        rank_interval: int = 10,
        enable_dual_momentum: bool = True,
        long_term_beta: float = 0.99,
        alpha_mix_ratio: float | None = None,
        use_loss_context: bool = False,
        context_window: int = 30,
        adaptation_rate: float = 0.25,
        max_buffer_memory_mb: int = 500,
        state_precision: Literal["fp32", "bf16", "8bit", "4bit"] | None = None,
        min_8bit_size: int = 4096,
        force_8bit: bool = False,
        state_device: Literal["cpu"] | None = None,
        anchor_device: Literal["cpu"] | None = None,
        rounding: Literal["stochastic", "kahan", "nearest"] = "stochastic",
        seed: int = 0,
        compile: bool | None = None,
        verbose: bool = False,
        foreach: bool | None = None,
    ) -> None:
        super().__init__(params, options(locals()))


def create_improved_8bit_optimizer(
    params: ParamsT, profile: Profile | None = None, **arguments: Any
) -> Automagic_CameAMP_Improved_8Bit:
    """Build an :class:`Automagic_CameAMP_Improved_8Bit`.

    Args:
        params: Parameters, (name, parameter) pairs, or groups of either.
        profile: A set of options, which never sets the learning rate.
        **arguments: Of the class; they override the profile.

    Raises:
        ValueError: As the class.
        TypeError: As the class.
    """
    return Automagic_CameAMP_Improved_8Bit(params, profile=profile, **arguments)


AutomagicCameAMPImproved = Automagic_CameAMP_Improved
AutomagicCameAMPImproved8Bit = Automagic_CameAMP_Improved_8Bit
#: For hosts that take a name ending in "8bit" for one of bitsandbytes.
AutomagicCameAMPImprovedLowBit = Automagic_CameAMP_Improved_8Bit
