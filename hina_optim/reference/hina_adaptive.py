"""The whole of HinaAdaptive, written slowly: one parameter after the other, in float64, in the order of the recipe.

This is the page to open first: it says what the fast optimizer does, without batches, shards, precisions or compilers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from hina_optim.reference import adaptation, core, image, spectra

__all__ = ["DEFAULTS", "IGNORED", "ParameterState", "ReferenceHinaAdaptive"]

#: The arguments that change the mathematics, with the defaults of the optimizer.
DEFAULTS: dict[str, Any] = {
    "lr": 1e-3,
    "betas": (0.9, 0.999),
    "eps": 1e-8,
    "weight_decay": 1e-2,
    "use_spd": True,
    "spd_lambda": 0.06,
    "use_cautious": True,
    "use_orthogonal_grad": False,
    "use_adopt_stability": True,
    "use_grams": False,
    "use_agr": True,
    "use_tam": True,
    "tam_beta": 0.9,
    "use_dynamic_adaptation": True,
    "adaptation_strength": 1.0,
    "relationship_discovery_interval": 100,
    "importance_decay": 0.95,
    "compatibility_threshold": 0.3,
    "use_lr_mask": True,
    "warmup_steps": 500,
    "min_lr": 1e-7,
    "max_lr": 1e-3,
    "lr_bump": 3e-6,
    "dynamic_weight_decay": True,
    "wd_transition_steps": 1000,
    "wd_decay_factor": 0.7,
    "wd_min_ratio": 0.1,
    "edge_suppression": False,
    "edge_penalty": 0.1,
    "edge_threshold": 0.6,
    "spatial_awareness": False,
    "frequency_penalty": 0.05,
    "detail_preservation": 0.8,
    "background_regularization": False,
    "lora_rank_penalty": False,
    "rank_penalty_strength": 0.01,
    "low_rank_emphasis": 1.2,
    "rank_target": 0.9,
    "rank_interval": 10,
}

#: Arguments of the optimizer that are about memory and machines: accepted, without effect.
IGNORED = frozenset(
    {
        "memory_efficient",
        "vram_budget_gb",
        "reduce_precision",
        "cpu_offload_states",
        "max_buffer_memory_mb",
        "adaptive_features",
        "emergency_simplify",
        "state_precision",
        "rounding",
        "seed",
        "compile",
        "foreach",
    }
)

#: Longest side of a matrix whose singular values are looked at.
LONGEST_SIDE = 256


@dataclass
class ParameterState:
    """What is remembered of one parameter; tensors have its shape.

    Attributes:
        anchor: Weights when the first gradient came.
        lr_mask: Rate of every element.
        seen: Steps in which there was a gradient.
        skipped: Those of them in which it was not finite.
        torque: Smoothed cosine of momentum and gradient.
        measurement: What importance last saw, None before it saw anything.
        fresh: Whether that is still to be digested.
        weights: Weights of which singular values are to be (or were) computed, None before the first time.
        coefficient: Small matrix of the rank penalty, None before it is known.
        projection: Small matrix of the emphasis, None before it is known.
    """

    anchor: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    lr_mask: Tensor
    last_sign: Tensor
    spatial: Tensor
    background: Tensor
    seen: int = 0
    skipped: int = 0
    torque: float = 0.0
    importance: float = 1.0
    importance_rate: float = 1.0
    measurement: adaptation.Measurement | None = None
    fresh: bool = False
    sketch: list[float] = field(default_factory=lambda: [0.0] * 64)
    relation_score: float = 0.0
    weights: Tensor | None = None
    coefficient: Tensor | None = None
    projection: Tensor | None = None


class ReferenceHinaAdaptive:
    """HinaAdaptive over lists of float64 tensors.

    What parameters learn from each other (importance, relationships, singular values of a pair) lags one step behind:
    a step that measures, does so on raw gradients and on the weights before the update; the next step begins by
    digesting what was measured, for all parameters, and what comes out is in force from then on. Steps 1, 1 + interval,
    1 + 2·interval, … of a parameter measure, counting every step in which it had a gradient. All other counters ignore
    steps in which the gradient was not finite: those leave the parameter and what is remembered of it untouched.
    Options of techniques that compare parameters must be the same in all groups that use them.

    Args:
        params: Tensors, or groups ``{"params": [tensors], **options}``. Copied, to :attr:`params`.
        pairs: ``(A, B)``: places, in :attr:`params`, of the two halves of every LoRA pair.
        rank_cutoff: Singular values up to this share of the largest count as zero (the fast version, which squares
            them, resolves ``√(side·eps)``).
        **arguments: Those of the optimizer.

    Attributes:
        params: The weights now, float64.
        param_groups: Options of each group, with the places of its parameters under ``"places"``. ``"lr"`` may be
            changed between steps.
        state: What is remembered of each parameter that ever had a gradient, by place.

    Raises:
        TypeError: An argument that the optimizer does not have.
    """

    def __init__(
        self,
        params: Sequence[Tensor] | Sequence[dict[str, Any]],
        *,
        pairs: Sequence[tuple[int, int]] = (),
        rank_cutoff: float = 1e-12,
        **arguments: Any,
    ) -> None:
        self.params: list[Tensor] = []
        self.param_groups: list[dict[str, Any]] = []
        self.state: dict[int, ParameterState] = {}
        self.rank_cutoff = rank_cutoff
        self.partner = {a: b for a, b in pairs} | {b: a for a, b in pairs}
        self.first_halves = {a for a, _ in pairs}
        for given in params:
            group: dict[str, Any] = dict(given) if isinstance(given, dict) else {"params": list(params)}
            tensors = group.pop("params")
            options = {**arguments, **group}
            unknown = set(options) - set(DEFAULTS) - IGNORED - {"start_lr", "name"}
            if unknown:
                raise TypeError(f"ReferenceHinaAdaptive: unknown arguments {sorted(unknown)}")
            merged = {**DEFAULTS, **options}
            merged.setdefault("start_lr", merged["lr"])
            merged["places"] = list(range(len(self.params), len(self.params) + len(tensors)))
            self.params += [t.detach().to(torch.float64).clone() for t in tensors]
            self.param_groups.append(merged)
            if not isinstance(given, dict):
                break
        self.group_of = {i: group for group in self.param_groups for i in group["places"]}

    def step(self, grads: Sequence[Tensor | None]) -> None:
        """One update.

        Args:
            grads: A gradient, or None, for each of :attr:`params`.
        """
        gradients = {i: g.detach().to(torch.float64) for i, g in enumerate(grads) if g is not None}
        for i in gradients:
            if i not in self.state:
                self.state[i] = self._begin(i)
        self._digest(list(gradients))
        for i, grad in gradients.items():
            if bool(torch.isfinite(grad).all()):
                if grad.numel() > 0:
                    self._update(i, grad)
            else:
                self.state[i].skipped += 1
            self.state[i].seen += 1

    def _begin(self, i: int) -> ParameterState:
        """What is remembered before the first gradient."""
        param = self.params[i]
        zero = torch.zeros_like(param)
        mask = torch.full_like(param, self.group_of[i]["start_lr"])
        return ParameterState(param.clone(), zero, zero, mask, zero, zero, zero)

    # -- one parameter -------------------------------------------------------------------------------------------------

    def _update(self, i: int, raw: Tensor) -> None:
        group, state, param = self.group_of[i], self.state[i], self.params[i]
        t = state.seen - state.skipped + 1
        lr = float(group["lr"])
        rate = lr
        if group["lora_rank_penalty"] and self._has_spectrum(i) and state.seen % group["rank_interval"] == 0:
            state.weights = param.clone()
        if group["use_dynamic_adaptation"]:
            rate *= state.importance_rate
            rate *= 1 + 0.2 * state.relation_score
            if state.seen % group["relationship_discovery_interval"] == 0:
                self._measure(i, raw)

        grad, bump_scale = self._regularized(i, raw)
        if group["use_adopt_stability"] and t == 1:
            lr = rate = 0.0
        update = self._direction(i, grad, t)
        if group["lora_rank_penalty"] and state.projection is not None:
            left, factor = self._acts_on_left(i), group["low_rank_emphasis"]
            update = spectra.emphasized_update(update, state.projection, left, factor)
        if group["use_grams"]:
            update = core.grams(update, grad)
        elif group["use_cautious"]:
            update = core.cautious(update, grad)

        rates = torch.full_like(param, rate)
        if group["use_lr_mask"]:
            state.lr_mask, state.last_sign = core.learning_rate_mask(
                state.lr_mask,
                state.last_sign,
                grad,
                t,
                min_lr=group["min_lr"],
                max_lr=group["max_lr"],
                lr_bump=group["lr_bump"],
                warmup_steps=group["warmup_steps"],
                bump_scale=bump_scale,
            )
            rates = core.each(lambda r, m: r * m / group["start_lr"], rates, state.lr_mask)
        transition = group["wd_transition_steps"] if group["dynamic_weight_decay"] else None
        decay = lr * core.decay_strength(
            t, group["weight_decay"], transition, group["wd_decay_factor"], group["wd_min_ratio"]
        )
        stepped = core.apply_step(param, update, rates, decay)
        if group["use_spd"]:
            stepped = core.selective_projection_decay(stepped, param, state.anchor, grad, group["spd_lambda"])
        self.params[i] = stepped

    def _regularized(self, i: int, grad: Tensor) -> tuple[Tensor, Tensor | None]:
        """The gradient after all rules on it, and the factor on the bumps of the learning-rate mask."""
        group, state, param = self.group_of[i], self.state[i], self.params[i]
        bump_scale = None
        if group["edge_suppression"]:
            grad = image.edge_suppression(grad, group["edge_penalty"], group["edge_threshold"])
        if group["spatial_awareness"]:
            grad = image.frequency_penalty(grad, group["frequency_penalty"])
            grad, state.spatial, bump_scale = image.spatial_awareness(grad, state.spatial, group["detail_preservation"])
        if group["background_regularization"]:
            grad, state.background = image.background_regularization(grad, state.background)
        if group["use_agr"]:
            grad = core.adaptive_gradient_regularization(grad)
        if group["use_orthogonal_grad"]:
            grad = core.orthogonal(grad, param)
        if group["lora_rank_penalty"] and state.coefficient is not None:
            left, strength = self._acts_on_left(i), group["rank_penalty_strength"]
            grad = spectra.penalized_gradient(grad, param, state.coefficient, left, strength)
        return grad, bump_scale

    def _direction(self, i: int, grad: Tensor, t: int) -> Tensor:
        """The direction of the step, by ADOPT or Adam, with or without torque-aware damping."""
        group, state = self.group_of[i], self.state[i]
        beta1, beta2 = group["betas"]
        incoming = grad
        if group["use_adopt_stability"]:
            incoming, state.exp_avg_sq = core.adopt(grad, state.exp_avg_sq, t, beta2, group["eps"])
        damping = 1.0
        if group["use_tam"]:
            damping, state.torque = core.torque(state.exp_avg, incoming, state.torque, group["tam_beta"])
        if group["use_adopt_stability"]:
            state.exp_avg = core.momentum(state.exp_avg, incoming, beta1, damping)
            return state.exp_avg
        update, state.exp_avg, state.exp_avg_sq = core.adam(
            state.exp_avg, state.exp_avg_sq, grad, t, (beta1, beta2), group["eps"], damping
        )
        return update

    def _measure(self, i: int, raw: Tensor) -> None:
        """What importance and relationships want to know of this parameter."""
        state, decay = self.state[i], self.group_of[i]["importance_decay"]
        state.measurement = adaptation.importance_measurement(raw, self.params[i], state.anchor)
        state.fresh = True
        if raw.ndim >= 2:
            state.sketch = adaptation.sketch_average(state.sketch, adaptation.sketch(raw), decay)

    # -- all parameters ------------------------------------------------------------------------------------------------

    def _digest(self, active: list[int]) -> None:
        """Draw conclusions from what the last step measured, if it measured anything."""

        def measured(switch: str, interval: str) -> bool:
            """Whether a parameter that has a gradient now measured in its last step."""
            return any(
                self.group_of[i][switch]
                and self.state[i].seen > 0
                and (self.state[i].seen - 1) % self.group_of[i][interval] == 0
                for i in active
            )

        if measured("use_dynamic_adaptation", "relationship_discovery_interval"):
            everyone = [i for i in sorted(self.state) if self.group_of[i]["use_dynamic_adaptation"]]
            everyone = [i for i in everyone if self.params[i].numel() > 0]
            self._digest_importance([i for i in everyone if self.state[i].measurement is not None])
            self._digest_relationships([i for i in everyone if self.params[i].ndim >= 2])
        if measured("lora_rank_penalty", "rank_interval"):
            for i in sorted(self.state):
                if self.group_of[i]["lora_rank_penalty"] and self._has_spectrum(i):
                    self._digest_spectrum(i)

    def _digest_importance(self, places: list[int]) -> None:
        if not places:
            return
        group = self.group_of[places[0]]
        states = [self.state[i] for i in places]
        measurements = [s.measurement for s in states if s.measurement is not None]
        scores = adaptation.importance_scores([s.importance for s in states], measurements, group["importance_decay"])
        for state, score in zip(states, scores, strict=True):
            if state.fresh:
                state.importance, state.fresh = score, False
        rates = adaptation.importance_rates([s.importance for s in states], group["adaptation_strength"])
        for state, rate in zip(states, rates, strict=True):
            state.importance_rate = rate

    def _digest_relationships(self, places: list[int]) -> None:
        if not places:
            return
        threshold = self.group_of[places[0]]["compatibility_threshold"]
        at = {i: k for k, i in enumerate(places)}
        partners = [at.get(self.partner.get(i, -1), -1) for i in places]
        shapes = [tuple(self.params[i].shape) for i in places]
        found = adaptation.relations(shapes, [self.state[i].sketch for i in places], partners, threshold)
        for i, mine in zip(places, found, strict=True):
            self.state[i].relation_score = mine[0][0] if mine else 0.0

    def _digest_spectrum(self, i: int) -> None:
        state, target = self.state[i], self.group_of[i]["rank_target"]
        weights = self._measured(i)
        left = self._acts_on_left(i)
        state.projection = spectra.leading_projection(weights, target, left, self.rank_cutoff)
        other = self.partner.get(i, -1)
        known = other in self.state and self.group_of[other]["lora_rank_penalty"]
        if known and self._is_half(i) and self._is_half(other):
            a, b = (i, other) if i in self.first_halves else (other, i)
            both = spectra.pair_coefficients(self._measured(a), self._measured(b), target, self.rank_cutoff)
            state.coefficient = both[0] if i == a else both[1]
        else:
            state.coefficient = spectra.tail_coefficient(weights, target, left, self.rank_cutoff)

    def _measured(self, i: int) -> Tensor:
        """The weights that were last measured, zero if none were."""
        weights = self.state[i].weights
        return torch.zeros_like(self.params[i]) if weights is None else weights

    # -- matrices ------------------------------------------------------------------------------------------------------

    def _is_half(self, i: int) -> bool:
        """Whether the parameter is half of a product of two matrices: A on its first side, B on its last."""
        shape = self.params[i].shape
        return len(shape) >= 2 and (i in self.first_halves or (i in self.partner and math.prod(shape[2:]) == 1))

    def _acts_on_left(self, i: int) -> bool:
        """Whether small matrices multiply from the left: on the inner side of a pair, else on the shorter side."""
        if self._is_half(i):
            return i in self.first_halves
        rows = self.params[i].shape[0]
        return rows <= self.params[i].numel() // rows

    def _has_spectrum(self, i: int) -> bool:
        """Whether singular values are looked at."""
        param = self.params[i]
        if param.ndim < 2 or param.numel() == 0:
            return False
        rows = param.shape[0]
        return (rows if self._acts_on_left(i) else param.numel() // rows) <= LONGEST_SIDE
