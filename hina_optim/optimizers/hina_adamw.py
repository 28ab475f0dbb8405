"""HinaAdamW: ADOPT or AdamW that knows the factors of LoRA and LoKr adapters."""

from __future__ import annotations

from typing import Any, Literal

from hina_optim.engine.optimizer import ParamsT
from hina_optim.optimizers import blocks
from hina_optim.optimizers.family import Family, options
from hina_optim.techniques.base import ParamInfo, Technique

__all__ = ["HinaAdamW", "HinaAdamWOptimizer"]


class HinaAdamWOptimizer(Family):
    """ADOPT or AdamW for adapters: rates by what a parameter is to a LoRA or LoKr. Also named ``HinaAdamW``.

    With names (``model.named_parameters()``) it finds the factors of every adapter and which belong together; with
    plain parameters only what shapes, order and zeros prove, see :meth:`diagnose_lora_pairing`. One step:

    1. AGR damps large elements of the gradient, on request its component along the weights is removed.
    2. ADOPT (or Adam's moments), with TAM; the direction is kept where it agrees with the gradient (cautious), or
       takes its signs (Grams).
    3. ``use_alora``: the rate of a row is divided by ``√(‖row‖ + 1/η²)`` (ALLoRA), that of B is ``alora_ratio`` times
       that of A (LoRA+; LoKr: w2 and w1), and both factors of a LoKr are slowed down as their product grows.
    4. Decoupled weight decay that shrinks late in training, more slowly for LoKr. It acts in the optimizer: no training
       script has to be changed for it. Then SPD.

    A learning rate of 0 moves no weight. Weights, moments and schedules are computed in float32 (float64 for float64
    parameters) whatever they are stored in. A parameter whose gradient has an element that is not finite is left as it
    is in that step, with its state.

    Raises:
        ValueError: An argument is not what it must be (the message names argument, value and rule); no parameters, one
            given twice, or one that is complex or not floating point.
        TypeError: An unknown argument (names the nearest one), or one that was removed (names what to use instead).

    References:
        ALLoRA arXiv 2410.09692, LoRA+ 2402.12354, ADOPT 2411.02853, AdamW 1711.05101, AGR 2407.16944, TAM 2412.18790,
        cautious 2411.16085, Grams 2412.17107, orthogonal gradient 2501.04697, SPD 2411.01713. The balance of LoKr
        factors and the schedule of the decay are this project's own.

    Example:
        >>> import torch
        >>> a, b = torch.nn.Parameter(torch.randn(4, 16)), torch.nn.Parameter(torch.zeros(8, 4))
        >>> optimizer = HinaAdamWOptimizer([("q.lora_A.weight", a), ("q.lora_B.weight", b)], lr=1e-3)
        >>> optimizer.get_optimization_info()["lora_stats"]["lora_pairs"]
        1
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        use_alora: bool = True,
        alora_ratio: float = 16.0,
        eta: float = 2.0,
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
            *blocks.context(group),
            *blocks.adapter_rates(group, info),
            *blocks.gradient(group),
            *blocks.adamw_moments(group, info),
            *blocks.direction(group),
            *blocks.decay(group, info),
            *blocks.spd(group),
        ]


HinaAdamW = HinaAdamWOptimizer
