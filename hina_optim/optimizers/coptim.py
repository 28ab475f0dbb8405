"""Automagic_CameAMP_COptim: CAME with a learning rate that follows the loss, and moments on several time scales."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from hina_optim.engine.optimizer import ParamsT
from hina_optim.optimizers import blocks
from hina_optim.optimizers.came_amp import CameFamily
from hina_optim.optimizers.family import options
from hina_optim.techniques.base import ParamInfo, Technique
from hina_optim.techniques.loss_context import LossContext
from hina_optim.techniques.multi_scale import MultiScaleMomentum

__all__ = [
    "AutomagicCameAMPCOptim",
    "AutomagicCameAMPCOptim8bit",
    "AutomagicCameAMPCOptimLowBit",
    "Automagic_CameAMP_COptim",
    "Automagic_CameAMP_COptim8bit",
]


class Automagic_CameAMP_COptim(CameFamily):
    """:class:`~hina_optim.Automagic_CameAMP` that looks at the training as a whole.

    Beside its steps: the learning rate is multiplied by a factor in [0.6, 4] that follows the trend of the loss, its
    steadiness, and how far successive gradients agree, and is calmed where losses scatter, gradients disagree or a
    plateau lasts; and the gradient is smoothed by moments on several time scales before it is normalized.

    The loss comes from ``step(closure)``, from :meth:`report_loss` before each step, or from the Lightning callback;
    without it the factor stays 1, and a warning says so.

    A learning rate of 0 moves no weight. Weights, moments and schedules are computed in float32 (float64 for float64
    parameters) whatever they are stored in. A parameter whose gradient has an element that is not finite is left as it
    is in that step, with its state.

    Raises:
        ValueError: An argument is not what it must be (the message names argument, value and rule); lr is outside the
            bounds of the mask; no parameters, one given twice, or one that is complex or not floating point.
        TypeError: An unknown argument (names the nearest one), or one that was removed (names what to use instead).

    References:
        As :class:`~hina_optim.Automagic_CameAMP`. The context and the mix of scales are this project's own.

    Example:
        >>> import torch
        >>> model = torch.nn.Linear(4, 2)
        >>> optimizer = Automagic_CameAMP_COptim(model.named_parameters(), lr=1e-4)
        >>> loss = model(torch.ones(8, 4)).square().mean()
        >>> loss.backward()
        >>> optimizer.report_loss(loss)
        >>> optimizer.step()
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
        context_window: int = 30,
        adaptation_rate: float = 0.25,
        momentum_scales: tuple[int, ...] = (1, 5, 20, 100),
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
        g = group
        return [
            LossContext(g["context_window"], g["adaptation_rate"]),
            *self.rows(g),
            *blocks.gradient(g),
            MultiScaleMomentum(g["momentum_scales"], g["betas"][0]),
            *self.moments(g),
            *self.directions(g),
            *blocks.mask(g),
            *self.decays(g, info),
        ]


class Automagic_CameAMP_COptim8bit(Automagic_CameAMP_COptim):
    """:class:`Automagic_CameAMP_COptim` with its state in 8 bits; everything else is the same."""

    STATE_PRECISION: ClassVar[str] = "8bit"


AutomagicCameAMPCOptim = Automagic_CameAMP_COptim
AutomagicCameAMPCOptim8bit = Automagic_CameAMP_COptim8bit
#: For hosts that take a name ending in "8bit" for one of bitsandbytes.
AutomagicCameAMPCOptimLowBit = Automagic_CameAMP_COptim8bit
