"""RefactoredAutomagicCameAMP: the improved CAME optimizer whose regularization and momentum a user can replace."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

from hina_optim.engine.optimizer import ParamsT
from hina_optim.optimizers.came_amp_config import OptimizerConfig
from hina_optim.optimizers.came_amp_improved import ImprovedFamily
from hina_optim.optimizers.family import options
from hina_optim.techniques.adopt import Momentum
from hina_optim.techniques.base import Technique
from hina_optim.techniques.strategies import (
    CustomMomentum,
    CustomRegularization,
    MomentumStrategy,
    RegularizationStrategy,
)

__all__ = ["RefactoredAutomagicCameAMP", "create_full_finetune_optimizer", "create_lora_optimizer"]


class RefactoredAutomagicCameAMP(ImprovedFamily):
    """:class:`~hina_optim.Automagic_CameAMP_Improved` with strategies that a user can replace.

    ``regularization`` strategies change the gradient, in their order, before AGR; a ``momentum`` strategy takes the
    place of the momentum. They are code, so a checkpoint holds their state and their class names, not themselves: give
    them again when resuming.

    A learning rate of 0 moves no weight. Weights, moments and schedules are computed in float32 (float64 for float64
    parameters) whatever they are stored in. A parameter whose gradient has an element that is not finite is left as it
    is in that step, with its state.

    Raises:
        ValueError: An argument is not what it must be (the message names argument, value and rule); lr is outside the
            bounds of the mask; no parameters, one given twice, or one that is complex or not floating point.
        TypeError: An unknown argument (names the nearest one), or one that was removed (names what to use instead).

    References:
        As :class:`~hina_optim.Automagic_CameAMP_Improved`.

    Example:
        >>> import torch
        >>> model = torch.nn.Linear(4, 2)
        >>> config = OptimizerConfig(lr=2e-4, warmup_steps=300)
        >>> optimizer = RefactoredAutomagicCameAMP(model.named_parameters(), config)
        >>> optimizer.config.warmup_steps
        300
    """

    CONFIG: ClassVar[type | None] = OptimizerConfig

    def __init__(
        self,
        params: ParamsT,
        config: OptimizerConfig | None = None,
        *,
        lr: float = 1e-6,
        regularization: Sequence[RegularizationStrategy] = (),
        momentum: MomentumStrategy | None = None,
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
        self._regularization = [CustomRegularization(one, i) for i, one in enumerate(regularization)]
        self._momentum = CustomMomentum(momentum) if momentum is not None else None
        super().__init__(params, options(locals()))

    def regularizers(self) -> list[Technique]:
        """The user's own."""
        return list(self._regularization)

    def moments(self, g: dict[str, Any], extra: Sequence[Technique] = ()) -> list[Technique]:
        """As in the family, with the user's momentum in place of ours where there is one."""
        chain = super().moments(g, extra)
        if self._momentum is None:
            return chain
        return [self._momentum if isinstance(one, Momentum) else one for one in chain]

    def described(self) -> dict[str, Any]:
        """Class names of the user's strategies: a checkpoint must be loaded with the same."""
        return {
            "regularization": [type(one.strategy).__name__ for one in self._regularization],
            "momentum": type(self._momentum.strategy).__name__ if self._momentum is not None else None,
        }

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "strategies": (self._regularization, self._momentum)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        state = dict(state)
        if "strategies" in state:
            self._regularization, self._momentum = state.pop("strategies")
        super().__setstate__(state)


def create_lora_optimizer(
    params: ParamsT, lr: float = 1e-4, warmup_steps: int = 500, **arguments: Any
) -> RefactoredAutomagicCameAMP:
    """A :class:`RefactoredAutomagicCameAMP` for adapters: rows scaled by their norm, low rank.

    Args:
        params: Parameters, (name, parameter) pairs, or groups of either.
        lr: Learning rate.
        warmup_steps: Steps in which the masks move.
        **arguments: Of the class.

    Raises:
        ValueError: As the class.
        TypeError: As the class.
    """
    purpose = {"full_finetune": False, "lora_rank_penalty": True}
    return RefactoredAutomagicCameAMP(params, lr=lr, warmup_steps=warmup_steps, **{**purpose, **arguments})


def create_full_finetune_optimizer(
    params: ParamsT, lr: float = 5e-5, warmup_steps: int = 500, **arguments: Any
) -> RefactoredAutomagicCameAMP:
    """A :class:`RefactoredAutomagicCameAMP` for whole models: SPD after the warm-up, nothing about low rank.

    Args:
        params: Parameters, (name, parameter) pairs, or groups of either.
        lr: Learning rate.
        warmup_steps: Steps in which the masks move.
        **arguments: Of the class.

    Raises:
        ValueError: As the class.
        TypeError: As the class.
    """
    purpose = {"full_finetune": True, "lora_rank_penalty": False}
    return RefactoredAutomagicCameAMP(params, lr=lr, warmup_steps=warmup_steps, **{**purpose, **arguments})
