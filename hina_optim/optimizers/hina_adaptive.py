"""HinaAdaptive: ADOPT or AdamW with gradient regularization, per-element rates and adaptation between parameters."""

from __future__ import annotations

from typing import Any, Literal

from hina_optim.engine.optimizer import ParamsT
from hina_optim.optimizers import blocks
from hina_optim.optimizers.family import Family, options
from hina_optim.techniques.base import ParamInfo, Technique
from hina_optim.techniques.emphasis import LowRankEmphasis
from hina_optim.techniques.spectrum import Spectrum

__all__ = ["HinaAdaptive"]


class HinaAdaptive(Family):
    """ADOPT or AdamW for fine-tuning: a learning rate for every element, and more of it for parameters that matter.

    For adapters and whole models that start from pretrained weights. All that is not AdamW can be switched off; what is
    off costs nothing and keeps no state. One step, in the order of :meth:`recipe`:

    1. At intervals, parameters are compared: importance, relationships, and the singular values of small matrices. What
       a step measured is in force from the next one on.
    2. The gradient ``g`` is treated: edges, high frequencies, busy regions and background damped; then AGR (large
       elements damped by their share of the whole), the component along the weights removed, the rank penalty added.
    3. ADOPT: ``g`` over the root of the second moment before it, clipped; the first gradient of a parameter moves
       nothing. (``use_adopt_stability=False``: Adam's two moments with bias correction.) TAM damps what enters the
       first moment when it turns against it.
    4. The direction is kept where it agrees with ``g`` (cautious), or takes the signs of ``g`` (Grams).
    5. ``θ ← θ - lr·wd·κ(t)·θ - rate ⊙ direction``, where the rate of an element is ``mask · lr / (lr at start)`` times
       the factors of importance and relationships; then SPD may take back part of what led away from where ``θ`` began.

    A learning rate of 0 moves no weight. Weights, moments and schedules are computed in float32 (float64 for float64
    parameters) whatever they are stored in. A parameter whose gradient has an element that is not finite is left as it
    is in that step, with its state; :meth:`get_optimization_info` names it. docs/techniques.md has every formula and
    source, ``hina_optim.reference`` the whole in plain float64, docs/inspection.md what the ``get_…`` methods return.

    Raises:
        ValueError: An argument is not what it must be (the message names argument, value and rule); lr is outside the
            bounds of the mask; no parameters, one given twice, or one that is complex or not floating point.
        TypeError: An unknown argument (names the nearest one), or one that was removed (names what to use instead).

    References:
        ADOPT arXiv 2411.02853, AdamW 1711.05101, AGR 2407.16944, TAM 2412.18790, cautious 2411.16085, Grams 2412.17107,
        orthogonal gradient 2501.04697, SPD 2411.01713. The mask follows ai-toolkit's Automagic. The others are this
        project's own.

    Example:
        >>> import torch
        >>> model = torch.nn.Linear(4, 2)
        >>> optimizer = HinaAdaptive(model.named_parameters(), lr=3e-4, warmup_steps=100)
        >>> for _ in range(2):
        ...     optimizer.zero_grad()
        ...     model(torch.ones(8, 4)).square().mean().backward()
        ...     optimizer.step()
        >>> [int(state["step"]) for state in optimizer.state.values()]
        [2, 2]
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
        memory_efficient: bool = True,
        vram_budget_gb: float = 16.0,
        reduce_precision: bool = False,
        cpu_offload_states: bool = False,
        max_buffer_memory_mb: int = 500,
        adaptive_features: bool = True,
        emergency_simplify: bool = True,
        edge_suppression: bool = False,
        edge_penalty: float = 0.1,
        edge_threshold: float = 0.6,
        spatial_awareness: bool = False,
        frequency_penalty: float = 0.05,
        detail_preservation: float = 0.8,
        background_regularization: bool = False,
        factored_image_state: bool = False,
        lora_rank_penalty: bool = False,
        rank_penalty_strength: float = 0.01,
        low_rank_emphasis: float = 1.2,
        rank_target: int | float = 0.9,
        rank_interval: int = 10,
        use_loss_context: bool = False,
        context_window: int = 30,
        adaptation_rate: float = 0.25,
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
        low_rank = group["lora_rank_penalty"]
        return [
            *([Spectrum(group["rank_target"], group["rank_interval"])] if low_rank else []),
            *blocks.adaptation(group),
            *blocks.context(group),
            *blocks.images(group, info),
            *blocks.gradient(group),
            *blocks.adamw_moments(group, info),
            *([LowRankEmphasis(group["low_rank_emphasis"])] if low_rank else []),
            *blocks.direction(group),
            *blocks.mask(group),
            *blocks.decay(group, info),
            *blocks.spd(group),
        ]
