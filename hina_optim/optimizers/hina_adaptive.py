"""HinaAdaptive: ADOPT or AdamW with gradient regularization, per-element rates and adaptation between parameters."""

from __future__ import annotations

import logging
from typing import Any, ClassVar, Literal

from hina_optim import arguments as rule
from hina_optim.engine.optimizer import ENGINE_RULES, HinaOptimizer, ParamsT
from hina_optim.memory.ladder import as_size, plan_for_vram, used_bytes
from hina_optim.memory.probes import GIB
from hina_optim.optimizers.inspection import Inspection
from hina_optim.techniques.adam import AdamMoments
from hina_optim.techniques.adopt import AdoptNormalization, Momentum
from hina_optim.techniques.agr import AdaptiveGradientRegularization
from hina_optim.techniques.background import BackgroundRegularization
from hina_optim.techniques.base import ParamInfo, Technique
from hina_optim.techniques.cautious import Cautious
from hina_optim.techniques.edge import EdgeSuppression
from hina_optim.techniques.emphasis import LowRankEmphasis
from hina_optim.techniques.frequency import FrequencyPenalty
from hina_optim.techniques.grams import Grams
from hina_optim.techniques.importance import ImportanceScaling
from hina_optim.techniques.lr_mask import LearningRateMask
from hina_optim.techniques.orthogonal import OrthogonalGradient
from hina_optim.techniques.rank_penalty import RankPenalty
from hina_optim.techniques.relationships import Relationships
from hina_optim.techniques.spatial import SpatialAwareness
from hina_optim.techniques.spd import SelectiveProjectionDecay
from hina_optim.techniques.spectrum import Spectrum
from hina_optim.techniques.tam import TorqueAwareMomentum
from hina_optim.techniques.weight_decay import DecoupledWeightDecay

__all__ = ["HinaAdaptive"]

log = logging.getLogger("hina_optim")


class HinaAdaptive(HinaOptimizer, Inspection):
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

    Args:
        params: Parameters, (name, parameter) pairs, or groups of either. By names it knows adapters and their pairs,
            and matches checkpoints. A group may set any of the options below for itself.
        lr: Learning rate, ≥ 0; with the mask on, within [min_lr, max_lr]. Schedulers may change it to anything.
        betas: Decay a step of the first and the second moment, each in [0, 1).
        eps: Smallest denominator, in units of the gradient, > 0.
        weight_decay: Decoupled decay, share of a weight a step and a unit of learning rate, ≥ 0.
        use_spd: Selective projection decay: a step that leads away from the weights before the first update, against
            the gradient, is taken back in part. Keeps those weights, in their own dtype (one zero if all are zero).
        spd_lambda: Strength of that, ≥ 0; 1 takes back about all of the distance that the step added.
        use_cautious: Keep the update only where its sign is the gradient's, and the mean step. Left out under Grams.
        use_orthogonal_grad: Remove the component of the gradient along the weights, keep its norm.
        use_adopt_stability: ADOPT. False: Adam moments.
        use_grams: Magnitude of the update, signs of the gradient.
        use_agr: Adaptive gradient regularization, for parameters of two elements or more.
        use_tam: Torque-aware momentum.
        tam_beta: Decay a step of its smoothed cosine, in [0, 1).
        use_dynamic_adaptation: Importance and relationships between parameters.
        adaptation_strength: Factor on an importance score before it is clipped to [0.1, 3], > 0.
        relationship_discovery_interval: Steps from one measurement of both to the next, ≥ 1; the first step measures.
        importance_decay: Share of the old score (and gradient sketch) kept at each measurement, in [0, 1).
        compatibility_threshold: Score from which on two matrices are related, in [0, 1]; 1: adapter pairs and copies.
        use_lr_mask: A learning rate for every element, raised where a gradient keeps its sign, lowered where it flips.
        warmup_steps: Steps in which the masks move, ≥ 0; then they stay. Not a warm-up of the learning rate.
        min_lr: Lower bound of the masks, > 0.
        max_lr: Upper bound of the masks. With the default lr they can only go down.
        lr_bump: Change of a mask a step, in units of the learning rate, ≥ 0.
        dynamic_weight_decay: Let the decay shrink late in training.
        wd_transition_steps: Steps until it begins to, ≥ 1.
        wd_decay_factor: Factor on the decay every further wd_transition_steps, in [0, 1].
        wd_min_ratio: Floor of the factor, in [0, 1].
        memory_efficient: Keep to vram_budget_gb, and let optimize_for_vram() act. False: do neither.
        vram_budget_gb: GiB, > 0. Checked when the state is allocated, against all that PyTorch has allocated on the GPU
            (on a CPU: parameters, gradients and state). State that would not fit is kept in bf16, with a warning.
        reduce_precision: The same as state_precision="bf16".
        cpu_offload_states: Not available yet: with parameters on a GPU it warns, and the state stays there.
        max_buffer_memory_mb: Bound on the temporary memory of a step, MB (10⁶ bytes), > 0. A parameter that a technique
            needs whole (edges, frequencies, spatial awareness, low rank) may exceed it.
        adaptive_features: Accepted and reported; nothing switches techniques off under memory pressure yet.
        emergency_simplify: Accepted and reported; without effect yet, like adaptive_features.
        edge_suppression: Damp gradient elements that stand out of their neighborhood (matrices, convolution kernels).
        edge_penalty: Its strength, ≥ 0.
        edge_threshold: Where an edge begins, in units of 5 times the average (rms) second difference, > 0.
        spatial_awareness: Damp regions of the gradient that keep varying, and its high frequencies.
        frequency_penalty: Share of the high frequencies to remove, in [0, 1].
        detail_preservation: Strength of the damping of busy regions, ≥ 0; the mask's bumps follow it too.
        background_regularization: Up to halve the gradient of elements that are nearly always small.
        lora_rank_penalty: Push down the singular values beyond a rank, of the product B·A for a LoRA pair, and
            emphasize the leading ones. For matrices with a side (of a LoRA pair: the rank) of at most 256.
        rank_penalty_strength: Weight of the penalty, loss per unit of singular value, ≥ 0.
        low_rank_emphasis: Factor on the part of the update within the leading singular directions, ≥ 0; 1 is off.
        rank_target: Rank to keep (an int ≥ 1), or share of the squared singular values to keep (a float in (0, 1)).
        rank_interval: Steps from one look at the singular values to the next, ≥ 1.
        state_precision: "fp32" or "bf16" (rounded stochastically) for moments, masks and running averages. Signs are
            int8, the first weights have the parameter's dtype, small statistics stay in fp32.
        rounding: How bf16 and fp16 parameters are written: "stochastic", "kahan" (compensated; keeps one more tensor of
            the parameter's size and dtype) or "nearest" (steps below half of the last bit are lost).
        seed: Of the stochastic rounding. The same on every rank, replica and resume.
        compile: Run under torch.compile, one graph a segment and shape, which takes long to build. None: as False.
        foreach: Accepted for compatibility with torch's optimizers; without effect.

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

    VERSION: ClassVar[str] = "1.0"
    RULES: ClassVar[dict[str, rule.Rule]] = {
        "lr": rule.NON_NEGATIVE,
        "betas": rule.BETAS,
        "eps": rule.POSITIVE,
        "weight_decay": rule.NON_NEGATIVE,
        "use_spd": rule.FLAG,
        "spd_lambda": rule.NON_NEGATIVE,
        "use_cautious": rule.FLAG,
        "use_orthogonal_grad": rule.FLAG,
        "use_adopt_stability": rule.FLAG,
        "use_grams": rule.FLAG,
        "use_agr": rule.FLAG,
        "use_tam": rule.FLAG,
        "tam_beta": rule.BELOW_ONE,
        "use_dynamic_adaptation": rule.FLAG,
        "adaptation_strength": rule.POSITIVE,
        "relationship_discovery_interval": rule.INTERVAL,
        "importance_decay": rule.BELOW_ONE,
        "compatibility_threshold": rule.UNIT,
        "use_lr_mask": rule.FLAG,
        "warmup_steps": rule.COUNT,
        "min_lr": rule.POSITIVE,
        "max_lr": rule.POSITIVE,
        "lr_bump": rule.NON_NEGATIVE,
        "dynamic_weight_decay": rule.FLAG,
        "wd_transition_steps": rule.INTERVAL,
        "wd_decay_factor": rule.UNIT,
        "wd_min_ratio": rule.UNIT,
        "memory_efficient": rule.FLAG,
        "vram_budget_gb": rule.POSITIVE,
        "reduce_precision": rule.FLAG,
        "cpu_offload_states": rule.FLAG,
        "adaptive_features": rule.FLAG,
        "emergency_simplify": rule.FLAG,
        "edge_suppression": rule.FLAG,
        "edge_penalty": rule.NON_NEGATIVE,
        "edge_threshold": rule.POSITIVE,
        "spatial_awareness": rule.FLAG,
        "frequency_penalty": rule.UNIT,
        "detail_preservation": rule.NON_NEGATIVE,
        "background_regularization": rule.FLAG,
        "lora_rank_penalty": rule.FLAG,
        "rank_penalty_strength": rule.NON_NEGATIVE,
        "low_rank_emphasis": rule.NON_NEGATIVE,
        "rank_target": rule.Rule(
            "a rank (an integer >= 1) or a share of energy to keep (a float in (0, 1))",
            lambda x: rule.INTERVAL.holds(x) or (isinstance(x, float) and 0 < x < 1),
        ),
        "rank_interval": rule.INTERVAL,
        **ENGINE_RULES,
    }
    REMOVED: ClassVar[dict[str, str]] = {
        "fourier_feature_loss": (
            "An optimizer sees latents' gradients, not images: use edge_suppression=True, or "
            "spatial_awareness=True with "
            "frequency_penalty, instead."
        ),
        "super_resolution_mode": (
            "Use spatial_awareness=True with detail_preservation, and background_regularization=True, instead."
        ),
    }

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
        lora_rank_penalty: bool = False,
        rank_penalty_strength: float = 0.01,
        low_rank_emphasis: float = 1.2,
        rank_target: int | float = 0.9,
        rank_interval: int = 10,
        state_precision: Literal["fp32", "bf16"] = "fp32",
        rounding: Literal["stochastic", "kahan", "nearest"] = "stochastic",
        seed: int = 0,
        compile: bool | None = None,
        foreach: bool | None = None,
    ) -> None:
        defaults = dict(locals())
        for name in ("self", "params", "__class__", "foreach"):
            defaults.pop(name, None)
        if reduce_precision and state_precision == "fp32":
            defaults["state_precision"] = "bf16"
        super().__init__(params, defaults)
        if any(group["use_grams"] and group["use_cautious"] for group in self.param_groups):
            log.warning(
                "HinaAdaptive: with use_grams=True every update has its gradient's sign already, so use_cautious has "
                "nothing to do and is left out; set use_cautious=False to say that you know."
            )

    def check_group(self, group: dict[str, Any]) -> None:
        """Every option by its rule; then those that must fit together."""
        super().check_group(group)
        owner = type(self).__name__
        if not group["min_lr"] <= group["max_lr"]:
            raise ValueError(f"{owner}: min_lr={group['min_lr']} is above max_lr={group['max_lr']}.")
        start = float(group.get("start_lr", group["lr"]))
        if group["use_lr_mask"] and not group["min_lr"] <= start <= group["max_lr"]:
            raise ValueError(
                f"{owner}: lr={start} is outside [min_lr, max_lr] = [{group['min_lr']}, {group['max_lr']}], the "
                f"bounds of "
                "the per-element learning rates: raise max_lr, lower min_lr, or set use_lr_mask=False."
            )

    def before_state(self) -> None:
        """Keep to ``vram_budget_gb`` from the first byte of state on, on all ranks alike, and say so."""
        groups = [group for group in self.param_groups if group["memory_efficient"]]
        if any(group["cpu_offload_states"] for group in groups) and any(p.is_cuda for g in groups for p in g["params"]):
            log.warning(
                "HinaAdaptive: cpu_offload_states=True is not available yet for parameters on a GPU; the state "
                "stays there. "
                "reduce_precision=True halves most of it."
            )
        if not groups:
            return
        budget = min(float(group["vram_budget_gb"]) for group in groups)
        if not self.agree(used_bytes(self) > budget * GIB):
            return
        if any(group["state_precision"] == "fp32" for group in self.param_groups):
            needed = used_bytes(self)
            self.set_state_precision("bf16")
            log.warning(
                "HinaAdaptive: parameters, gradients and state need %s, more than vram_budget_gb=%g: the state "
                "is kept in "
                "bf16. Raise vram_budget_gb, or set memory_efficient=False, to keep fp32.",
                as_size(needed), budget,
            )  # fmt: skip
        left = plan_for_vram(self, budget)
        if not left["reached"]:
            log.warning("HinaAdaptive: vram_budget_gb=%g: %s", budget, left["message"])

    def recipe(self, group: dict[str, Any], info: ParamInfo) -> list[Technique]:
        """The techniques of one group, in the order in which they act."""
        g = group
        chain: list[Technique] = []
        if g["lora_rank_penalty"]:
            chain.append(Spectrum(g["rank_target"], g["rank_interval"]))
        if g["use_dynamic_adaptation"]:
            chain.append(
                ImportanceScaling(g["adaptation_strength"], g["importance_decay"], g["relationship_discovery_interval"])
            )
            chain.append(
                Relationships(g["compatibility_threshold"], g["importance_decay"], g["relationship_discovery_interval"])
            )
        if g["edge_suppression"]:
            chain.append(EdgeSuppression(g["edge_penalty"], g["edge_threshold"]))
        if g["spatial_awareness"]:
            chain.append(FrequencyPenalty(g["frequency_penalty"]))
            chain.append(SpatialAwareness(g["detail_preservation"]))
        if g["background_regularization"]:
            chain.append(BackgroundRegularization())
        if g["use_agr"]:
            chain.append(AdaptiveGradientRegularization())
        if g["use_orthogonal_grad"]:
            chain.append(OrthogonalGradient())
        if g["lora_rank_penalty"]:
            chain.append(RankPenalty(g["rank_penalty_strength"]))
        if g["use_adopt_stability"]:
            chain.append(AdoptNormalization(g["betas"][1], g["eps"]))
        if g["use_tam"]:
            chain.append(TorqueAwareMomentum(g["tam_beta"]))
        if g["use_adopt_stability"]:
            chain.append(Momentum(g["betas"][0]))
        else:
            chain.append(AdamMoments(g["betas"], g["eps"]))
        if g["lora_rank_penalty"]:
            chain.append(LowRankEmphasis(g["low_rank_emphasis"]))
        if g["use_grams"]:
            chain.append(Grams())
        elif g["use_cautious"]:
            chain.append(Cautious())
        if g["use_lr_mask"]:
            chain.append(LearningRateMask(g["start_lr"], g["min_lr"], g["max_lr"], g["lr_bump"], g["warmup_steps"]))
        chain.append(
            DecoupledWeightDecay(
                g["weight_decay"],
                transition_steps=g["wd_transition_steps"] if g["dynamic_weight_decay"] else None,
                decay_factor=g["wd_decay_factor"],
                min_ratio=g["wd_min_ratio"],
            )
        )
        if g["use_spd"]:
            chain.append(SelectiveProjectionDecay(g["spd_lambda"]))
        return chain
