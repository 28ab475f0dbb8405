"""AdaptiveHinaAdamW: ADOPT or AdamW whose learning rate follows the elements, and the parameters that matter."""

from __future__ import annotations

from typing import Any, Literal

from hina_optim.engine.optimizer import ParamsT
from hina_optim.optimizers import blocks
from hina_optim.optimizers.family import Family, options
from hina_optim.techniques.base import ParamInfo, Technique

__all__ = ["AdaptiveHinaAdamW"]


class AdaptiveHinaAdamW(Family):
    """ADOPT or AdamW for models of any architecture: learning rate for every element, more for parameters that matter.

    It needs no names and no adapter: importance and relationships are found in gradients and weights. It is
    :class:`~hina_optim.HinaAdaptive` without a memory budget and without the techniques for images and low rank; the
    steps are those of its docstring.

    A learning rate of 0 moves no weight. Weights, moments and schedules are computed in float32 (float64 for float64
    parameters) whatever they are stored in. A parameter whose gradient has an element that is not finite is left as it
    is in that step, with its state.

    Raises:
        ValueError: An argument is not what it must be (the message names argument, value and rule); lr is outside the
            bounds of the mask; no parameters, one given twice, or one that is complex or not floating point.
        TypeError: An unknown argument (names the nearest one), or one that was removed (names what to use instead).

    References:
        As :class:`~hina_optim.HinaAdaptive`.

    Example:
        >>> import torch
        >>> model = torch.nn.Linear(4, 2)
        >>> optimizer = AdaptiveHinaAdamW(model.named_parameters(), lr=5e-4, adaptation_strength=0.8)
        >>> optimizer.get_optimization_info()["features"]["dynamic_adaptation"]
        True
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        use_spd: bool = True,
        spd_lambda: float = 0.06,
        use_cautious: bool = True,
        use_orthogonal_grad: bool = False,
        use_adopt_stability: bool = True,
        amsgrad: bool = False,
        factored_second_moment: bool = False,
        use_grams: bool = False,
        use_agr: bool = True,
        use_tam: bool = True,
        tam_beta: float = 0.9,
        use_dynamic_adaptation: bool = True,
        adaptation_strength: float = 1.0,
        relationship_discovery_interval: int = 100,
        importance_decay: float = 0.95,
        compatibility_threshold: float = 0.3,
        use_lr_mask: bool = True,
        warmup_steps: int = 500,
        min_lr: float = 1e-7,
        max_lr: float = 1e-3,
        lr_bump: float = 3e-6,
        dynamic_weight_decay: bool = True,
        wd_transition_steps: int = 1000,
        wd_decay_factor: float = 0.7,
        wd_min_ratio: float = 0.1,
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
            *blocks.adaptation(group),
            *blocks.context(group),
            *blocks.gradient(group),
            *blocks.adamw_moments(group, info),
            *blocks.direction(group),
            *blocks.mask(group),
            *blocks.decay(group, info),
            *blocks.spd(group),
        ]
