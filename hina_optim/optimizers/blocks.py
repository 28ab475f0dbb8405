"""Pieces of recipes that several optimizers share. Each is a list of techniques, empty where options switch it off."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from hina_optim.techniques.ada_decay import AdaDecay
from hina_optim.techniques.adam import AdamMoments
from hina_optim.techniques.adopt import AdoptNormalization, Momentum
from hina_optim.techniques.agr import AdaptiveGradientRegularization
from hina_optim.techniques.background import BackgroundMeans, BackgroundRegularization, LowActivity
from hina_optim.techniques.base import ParamInfo, Technique
from hina_optim.techniques.cautious import Cautious
from hina_optim.techniques.edge import EdgeSuppression
from hina_optim.techniques.factored_moments import FactoredAdam, FactoredAdopt
from hina_optim.techniques.frequency import FrequencyPenalty
from hina_optim.techniques.grams import Grams
from hina_optim.techniques.importance import ImportanceScaling
from hina_optim.techniques.kronecker import KroneckerRates
from hina_optim.techniques.loss_context import LossContext
from hina_optim.techniques.lr_mask import LearningRateMask
from hina_optim.techniques.means import saves
from hina_optim.techniques.orthogonal import OrthogonalGradient
from hina_optim.techniques.rank_penalty import RankPenalty
from hina_optim.techniques.relationships import Relationships
from hina_optim.techniques.role_rates import RoleRates
from hina_optim.techniques.row_scaling import RowScaling
from hina_optim.techniques.spatial import FactoredSpatialAwareness, SpatialAwareness
from hina_optim.techniques.spd import SelectiveProjectionDecay
from hina_optim.techniques.tam import TorqueAwareMomentum
from hina_optim.techniques.weight_decay import DecoupledWeightDecay

__all__ = [
    "Phases",
    "adamw_moments",
    "adaptation",
    "adapter_rates",
    "context",
    "decay",
    "direction",
    "gradient",
    "images",
    "mask",
    "spd",
]

Group = dict[str, Any]


class Phases(NamedTuple):
    """Where the phases of a training end, as steps counted from 0 (a step is update ``t = step + 1``).

    Early warm-up ``t < W/2``, late warm-up ``t < W``, stable ``t < 2W``, mature after, with ``W = warmup_steps``.
    """

    early: int
    late: int
    stable: int

    @classmethod
    def of(cls, warmup_steps: int) -> Phases:
        """The phases of a warm-up of so many steps."""
        w = warmup_steps
        return cls(max(0, math.ceil(w / 2) - 1), max(0, w - 1), max(0, 2 * w - 1))

    def name(self, step: int) -> str:
        """The phase of a step, counted from 0."""
        ends = {"early_warmup": self.early, "late_warmup": self.late, "stable": self.stable}
        return next((name for name, end in ends.items() if step < end), "mature")


def context(g: Group) -> list[Technique]:
    """The learning rate follows the trend of the loss."""
    return [LossContext(g["context_window"], g["adaptation_rate"])] if g.get("use_loss_context") else []


def adaptation(g: Group) -> list[Technique]:
    """Parameters compared with each other, at intervals."""
    if not g["use_dynamic_adaptation"]:
        return []
    interval = g["relationship_discovery_interval"]
    return [
        ImportanceScaling(g["adaptation_strength"], g["importance_decay"], interval),
        Relationships(g["compatibility_threshold"], g["importance_decay"], interval),
    ]


def images(g: Group, info: ParamInfo) -> list[Technique]:
    """What keeps image models from over-fitting to edges, high frequencies, busy regions and the background."""
    factored = g["factored_image_state"] and saves(info)
    chain: list[Technique] = []
    if g["edge_suppression"]:
        chain.append(EdgeSuppression(g["edge_penalty"], g["edge_threshold"]))
    if g["spatial_awareness"]:
        spatial = FactoredSpatialAwareness if factored else SpatialAwareness
        chain += [FrequencyPenalty(g["frequency_penalty"]), spatial(g["detail_preservation"])]
    if g["background_regularization"]:
        chain += [LowActivity(), BackgroundMeans()] if factored else [BackgroundRegularization()]
    return chain


def gradient(g: Group) -> list[Technique]:
    """Regularization of the gradient that fits any model."""
    chain: list[Technique] = []
    if g["use_agr"]:
        chain.append(AdaptiveGradientRegularization())
    if g.get("use_orthogonal_grad"):
        chain.append(OrthogonalGradient())
    if g.get("lora_rank_penalty"):
        chain.append(RankPenalty(g["rank_penalty_strength"]))
    return chain


def adamw_moments(g: Group, info: ParamInfo) -> list[Technique]:
    """ADOPT or Adam, with torque-aware momentum; the second moment whole, or its row and column means."""
    (beta1, beta2), eps = g["betas"], g["eps"]
    tam: list[Technique] = [TorqueAwareMomentum(g["tam_beta"])] if g["use_tam"] else []
    factored = g["factored_second_moment"] and saves(info)
    if g["use_adopt_stability"]:
        adopt = FactoredAdopt if factored else AdoptNormalization
        return [adopt(beta2, eps), *tam, Momentum(beta1)]
    if factored:
        return [*tam, FactoredAdam((beta1, beta2), eps)]
    return [*tam, AdamMoments((beta1, beta2), eps, g["amsgrad"])]


def direction(g: Group) -> list[Technique]:
    """Signs of the gradient, or agreement with them."""
    if g["use_grams"]:
        return [Grams()]
    return [Cautious()] if g["use_cautious"] else []


def mask(g: Group) -> list[Technique]:
    """A learning rate for every element."""
    if not g["use_lr_mask"]:
        return []
    bounds = g["start_lr"], g["min_lr"], g["max_lr"]
    return [LearningRateMask(*bounds, g["lr_bump"], g["warmup_steps"], g.get("d_coef", 1.0))]


def adapter_rates(g: Group, info: ParamInfo) -> list[Technique]:
    """Rates of the factors of adapters: balanced LoKr factors, B over A, rows by their norm."""
    if not g["use_alora"] or info.role is None:
        return []
    return [KroneckerRates(), RoleRates(g["alora_ratio"]), RowScaling(g["eta"])]


def decay(g: Group, info: ParamInfo) -> list[Technique]:
    """Decoupled weight decay, with a schedule of its own (slower for LoKr) and by the size of the gradient."""
    schedule: dict[str, Any] = {}
    if g.get("dynamic_weight_decay"):
        schedule = DecoupledWeightDecay.schedule(
            info, g["wd_transition_steps"], g["wd_decay_factor"], g["wd_min_ratio"]
        )
    one = AdaDecay if g.get("use_ada_decay") else DecoupledWeightDecay
    return [one(g["weight_decay"], **schedule)]


def spd(g: Group) -> list[Technique]:
    """Selective projection decay."""
    return [SelectiveProjectionDecay(g["spd_lambda"])] if g["use_spd"] else []
