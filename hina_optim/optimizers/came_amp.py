"""Automagic_CameAMP: factored moments with confidence (CAME), a learning rate for every element, and phases."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

from hina_optim import arguments as rule
from hina_optim.engine.optimizer import ParamsT
from hina_optim.optimizers import blocks
from hina_optim.optimizers.family import Family, options
from hina_optim.optimizers.options import CAME_RULES
from hina_optim.techniques.adopt import Momentum
from hina_optim.techniques.base import ParamInfo, Technique
from hina_optim.techniques.cautious import Cautious
from hina_optim.techniques.confidence import Confidence
from hina_optim.techniques.factored import FactoredNormalization, UnfactoredNormalization
from hina_optim.techniques.grams import Grams
from hina_optim.techniques.rms_clip import RmsClip
from hina_optim.techniques.row_scaling import RowScaling
from hina_optim.techniques.spd import SelectiveProjectionDecay
from hina_optim.techniques.tam import TorqueAwareMomentum

__all__ = [
    "AutomagicCameAMP",
    "AutomagicCameAMP8bit",
    "AutomagicCameAMPLowBit",
    "Automagic_CameAMP",
    "Automagic_CameAMP_8Bit",
    "Automagic_CameAMP_8bit",
    "CameFamily",
]


#: Where ``beta1_decay`` ends: below it, the moment follows the gradient so closely that confidence has nothing to say
#: (at 0.4 a step of noise is 1.4 times the rate, at 0.5 it is about 1, at 0.8 about 0.4).
SHORTEST_MEMORY = 0.5


class CameFamily(Family):
    """What the CAME-based optimizers share: the moments, and the phases of a training.

    ========================  =====================  ====================  ================  ======================
    ..                        early warm-up t < W/2  late warm-up t < W    stable t < 2W     mature
    ========================  =====================  ====================  ================  ======================
    learning-rate mask        moves, agreeing bumps  moves                 frozen            frozen
                              × ``d_coef``
    torque-aware momentum     yes                    yes
    direction                 free                   Grams                 cautious          cautious
    SPD (``full_finetune``)                                                yes               yes
    rank-aware decay                                                                         yes (where low rank is
                                                                                             asked for)
    ========================  =====================  ====================  ================  ======================

    ``W = warmup_steps``; all else acts throughout. What is switched off acts in no phase. Phases count the steps in
    which a parameter had a gradient; mask, β₁ and the schedule of the decay count its updates, which a gradient that is
    not finite leaves out.
    """

    PHASES: ClassVar[bool] = True
    OWN_RULES: ClassVar[dict[str, rule.Rule]] = CAME_RULES

    @property
    def phase(self) -> str:
        """The phase of the next step: ``early_warmup``, ``late_warmup``, ``stable`` or ``mature``."""
        return blocks.Phases.of(self.param_groups[0]["warmup_steps"]).name(self._global_step())

    def moments(self, g: dict[str, Any], extra: Sequence[Technique] = ()) -> list[Technique]:
        """Factored second moment, clipped and with momentum, over its confidence; ``extra`` follows the momentum."""
        beta1, beta2, beta3 = g["betas"]
        phases = blocks.Phases.of(g["warmup_steps"])
        return [
            FactoredNormalization(beta2, g["eps"][0]),
            UnfactoredNormalization(beta2, g["eps"][0]),
            RmsClip(g["clip_threshold"]),
            *([TorqueAwareMomentum(g["tam_beta"]).during(0, phases.late)] if g["use_tam"] else []),
            Momentum(beta1, g["beta1_decay"], min(beta1, SHORTEST_MEMORY)),
            *extra,
            *([Confidence(beta3, g["eps"][1])] if g["came"] else []),
        ]

    def directions(self, g: dict[str, Any]) -> list[Technique]:
        """Grams late in the warm-up, cautious after it."""
        phases = blocks.Phases.of(g["warmup_steps"])
        return [
            *([Grams().during(phases.early, phases.late)] if g["use_grams"] else []),
            *([Cautious().during(phases.late)] if g["use_cautious"] else []),
        ]

    def decays(self, g: dict[str, Any], info: ParamInfo) -> list[Technique]:
        """Weight decay by the size of the gradient, and SPD after the warm-up of a whole model."""
        phases = blocks.Phases.of(g["warmup_steps"])
        chain = blocks.decay(g, info)
        if g["use_spd"] and g["full_finetune"]:
            chain.append(SelectiveProjectionDecay(g["spd_lambda"]).during(phases.late))
        return chain

    def rows(self, g: dict[str, Any]) -> list[Technique]:
        """Rows of an adapter's matrices scaled by their norm."""
        return [] if g["full_finetune"] else [RowScaling(g["eta"])]

    def _training_stats(self) -> dict[str, Any]:
        return {**super()._training_stats(), "phase": self.phase}


class Automagic_CameAMP(CameFamily):
    """CAME with gradient regularization, torque-aware momentum and a learning rate for every element.

    For fine-tuning adapters (rows are scaled by their norm) or, with ``full_finetune``, whole models (SPD). A matrix
    R×C keeps R·C numbers of momentum and 2(R + C) for the rest, beside mask and signs. One step:

    1. AGR damps large elements of the gradient.
    2. The gradient is divided by the root of its factored second moment and clipped by its rms; momentum (TAM damps
       what turns against it; its beta falls slowly, ``beta1_decay``) over the root of its factored confidence.
    3. By phase (:class:`CameFamily`), the direction takes the signs of the gradient, or is kept where it agrees.
    4. The rate of an element is its mask · lr / (lr at start), for adapters over ``√(‖row‖ + 1/η²)``.
    5. Weight decay by the size of the gradient (AdaDecay), SPD.

    A learning rate of 0 moves no weight. Weights, moments and schedules are computed in float32 (float64 for float64
    parameters) whatever they are stored in. A parameter whose gradient has an element that is not finite is left as it
    is in that step, with its state.

    Raises:
        ValueError: An argument is not what it must be (the message names argument, value and rule); lr is outside the
            bounds of the mask; no parameters, one given twice, or one that is complex or not floating point.
        TypeError: An unknown argument (names the nearest one), or one that was removed (names what to use instead).

    References:
        CAME arXiv 2307.02047, Adafactor 1804.04235, AGR 2407.16944, TAM 2412.18790, Grams 2412.17107, cautious
        2411.16085, ALLoRA 2410.09692, AdaDecay 1907.08931, SPD 2411.01713. The mask follows ai-toolkit's Automagic.

    Example:
        >>> import torch
        >>> model = torch.nn.Linear(4, 2)
        >>> optimizer = Automagic_CameAMP(model.named_parameters(), lr=1e-4, warmup_steps=100)
        >>> optimizer.phase
        'early_warmup'
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-6,
        *,
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

    def recipe(self, group: dict[str, Any], info: ParamInfo) -> list[Technique]:
        """The techniques of one group, in the order in which they act."""
        return [
            *blocks.context(group),
            *self.rows(group),
            *blocks.gradient(group),
            *self.moments(group),
            *self.directions(group),
            *blocks.mask(group),
            *self.decays(group, info),
        ]


class Automagic_CameAMP_8bit(Automagic_CameAMP):
    """:class:`Automagic_CameAMP` with its state in 8 bits; everything else is the same."""

    STATE_PRECISION: ClassVar[str] = "8bit"


AutomagicCameAMP = Automagic_CameAMP
AutomagicCameAMP8bit = Automagic_CameAMP_8Bit = Automagic_CameAMP_8bit
#: For hosts that take a name ending in "8bit" for one of bitsandbytes.
AutomagicCameAMPLowBit = Automagic_CameAMP_8bit
