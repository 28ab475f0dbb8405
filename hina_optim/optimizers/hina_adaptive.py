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
    """Placeholder docstring."""

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
