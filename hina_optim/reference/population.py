"""Reference: what is remembered of each parameter, and what all of them together say about each.

Four techniques look at other parameters, at intervals: importance, relationships, the factors of a LoKr, and the
singular values of both halves of a LoRA pair. All lag one step behind: a step that measures does so on the raw gradient
and on the weights before the update; the next step begins by drawing conclusions from what was measured, for all
parameters, and these are in force from then on.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from hina_optim.reference import adaptation, rates, spectra
from hina_optim.reference.came import Factors
from hina_optim.reference.context import LossHistory

__all__ = ["LOKR_INTERVAL", "LOKR_STRENGTH", "LONGEST_SIDE", "ParameterState", "Population", "decay_matrix"]

#: Longest side of a matrix whose singular values are looked at.
LONGEST_SIDE = 256
#: Steps from one look at the norms of LoKr factors to the next, and the weight of their product.
LOKR_INTERVAL, LOKR_STRENGTH = 10, 0.3


@dataclass
class ParameterState:
    """What is remembered of one parameter; tensors have its shape. No optimizer uses all of it.

    Attributes:
        anchor: Weights when the first gradient came.
        exp_avg: First moment.
        exp_avg_sq: Second moment, as one number an element or as factors.
        largest: The largest second moment so far.
        exp_avg_long: First moment with a long memory.
        residual: Squared deviations of gradients from the first moment, as factors.
        scales: Running means on several time scales, by scale.
        lr_mask: Rate of every element.
        last_sign: Sign of the last gradient that was not zero.
        spatial: Running variance of neighborhoods.
        background: Running share of steps in which an element was small.
        torque: Smoothed cosine of momentum and gradient.
        context: Losses, and how gradients agree from step to step.
        seen: Steps in which there was a gradient.
        skipped: Those of them in which it was not finite.
        measurement: What importance last saw, None before it saw anything.
        fresh: Whether that is still to be digested.
        factor: Weights of a LoKr factor when its norm was taken, None before the first time.
        weights: Weights of which singular values are to be (or were) computed, None before the first time.
        coefficient: Small matrix of the rank penalty, None before it is known.
        projection: Small matrix of the emphasis, None before it is known.
        decay: Small matrix of the decay by rank, None before it is known.
    """

    anchor: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor | Factors
    largest: Tensor
    exp_avg_long: Tensor
    residual: Factors
    lr_mask: Tensor
    last_sign: Tensor
    spatial: Tensor
    background: Tensor
    context: LossHistory
    scales: dict[int, Tensor] = field(default_factory=dict)
    seen: int = 0
    skipped: int = 0
    torque: float = 0.0
    importance: float = 1.0
    importance_rate: float = 1.0
    measurement: adaptation.Measurement | None = None
    fresh: bool = False
    sketch: list[float] = field(default_factory=lambda: [0.0] * 64)
    relation_score: float = 0.0
    factor: Tensor | None = None
    lokr_rate: float = 1.0
    weights: Tensor | None = None
    coefficient: Tensor | None = None
    projection: Tensor | None = None
    decay: Tensor | None = None


class Population:
    """All parameters of an optimizer, known by their places.

    Attributes:
        params: The weights now, float64.
        group_of: Options of the group of each parameter.
        state: What is remembered of each parameter that ever had a gradient, by place.
        roles: What each parameter is to an adapter, by place.
        partner: The other factor of the same product, by place.
        adapters: Places of the parameters of each adapter.
        rank_cutoff: Singular values up to this share of the largest count as zero.
    """

    params: list[Tensor]
    group_of: dict[int, dict[str, Any]]
    state: dict[int, ParameterState]
    roles: Mapping[int, str]
    partner: dict[int, int]
    adapters: list[list[int]]
    rank_cutoff: float

    # -- one parameter measures ----------------------------------------------------------------------------------------

    def _measure(self, i: int, raw: Tensor) -> None:
        """Keep what others, and later steps, want to know of this parameter, where this step is one that measures."""
        group, state, param = self.group_of[i], self.state[i], self.params[i]
        if self._compares(i) and state.seen % group["relationship_discovery_interval"] == 0:
            state.measurement = adaptation.importance_measurement(raw, param, state.anchor)
            state.fresh = True
            if raw.ndim >= 2:
                new = adaptation.sketch(raw)
                state.sketch = adaptation.sketch_average(state.sketch, new, group["importance_decay"])
        if self._is_lokr(i) and state.seen % LOKR_INTERVAL == 0:
            state.factor = param.clone()
        if self._has_spectrum(i) and state.seen % group["rank_interval"] == 0:
            state.weights = param.clone()

    # -- all parameters conclude ---------------------------------------------------------------------------------------

    def _digest(self, active: list[int]) -> None:
        """Draw conclusions from what the last step measured, if one of the parameters that step now measured then."""

        def measured(i: int, interval: int) -> bool:
            seen = self.state[i].seen
            return seen > 0 and (seen - 1) % interval == 0

        everyone = [i for i in sorted(self.state) if self.params[i].numel() > 0]
        if any(self._compares(i) and measured(i, self.group_of[i]["relationship_discovery_interval"]) for i in active):
            compared = [i for i in everyone if self._compares(i)]
            self._digest_importance([i for i in compared if self.state[i].measurement is not None])
            self._digest_relationships([i for i in compared if self.params[i].ndim >= 2])
        if any(self._is_lokr(i) and measured(i, LOKR_INTERVAL) for i in active):
            self._digest_lokr([i for i in everyone if self._is_lokr(i)])
        if any(self._has_spectrum(i) and measured(i, self.group_of[i]["rank_interval"]) for i in active):
            for i in everyone:
                if self._has_spectrum(i):
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
        factors = adaptation.importance_rates([s.importance for s in states], group["adaptation_strength"])
        for state, factor in zip(states, factors, strict=True):
            state.importance_rate = factor

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

    def _digest_lokr(self, places: list[int]) -> None:
        for members in self.adapters:
            known = {
                self.roles[i].removeprefix("lokr_"): factor
                for i in members
                if i in places and (factor := self.state[i].factor) is not None
            }
            for i in members:
                if i in places:
                    self.state[i].lokr_rate = rates.kronecker_factor(known, LOKR_STRENGTH)

    def _digest_spectrum(self, i: int) -> None:
        state, target = self.state[i], self.group_of[i]["rank_target"]
        weights, left = self._measured_weights(i), self._acts_on_left(i)
        state.projection = spectra.leading_projection(weights, target, left, self.rank_cutoff)
        state.decay = decay_matrix(weights, left, self.rank_cutoff)
        other = self.partner.get(i, -1)
        if other in self.state and self._has_spectrum(other) and self._is_half(i) and self._is_half(other):
            a, b = (i, other) if self.roles[i] == "lora_a" else (other, i)
            halves = self._measured_weights(a), self._measured_weights(b)
            of_a, of_b = spectra.pair_coefficients(*halves, target, self.rank_cutoff)
            state.coefficient = of_a if i == a else of_b
        else:
            state.coefficient = spectra.tail_coefficient(weights, target, left, self.rank_cutoff)

    def _measured_weights(self, i: int) -> Tensor:
        """The weights that were last measured, zero if none were."""
        weights = self.state[i].weights
        return torch.zeros_like(self.params[i]) if weights is None else weights

    # -- what a parameter is -------------------------------------------------------------------------------------------

    def _compares(self, i: int) -> bool:
        """Whether it is compared with others."""
        return bool(self.group_of[i].get("use_dynamic_adaptation")) and self.params[i].numel() > 0

    def _is_adapter(self, i: int) -> bool:
        """Whether rates follow what it is to an adapter."""
        return bool(self.group_of[i].get("use_alora")) and i in self.roles

    def _is_lokr(self, i: int) -> bool:
        """Whether it is a factor of a LoKr, and its rate follows that."""
        return self._is_adapter(i) and self.roles[i].startswith("lokr_") and self.params[i].numel() > 0

    def _is_half(self, i: int) -> bool:
        """Whether it is half of a LoRA's product of two matrices: A on its first side, B on its last."""
        role, shape = self.roles.get(i), self.params[i].shape
        if i not in self.partner or len(shape) < 2:
            return False
        return role == "lora_a" or (role == "lora_b" and math.prod(shape[2:]) == 1)

    def _acts_on_left(self, i: int) -> bool:
        """Whether small matrices multiply from the left: on the inner side of a pair, else on the shorter side."""
        if self._is_half(i):
            return self.roles[i] == "lora_a"
        rows = self.params[i].shape[0]
        return rows <= self.params[i].numel() // rows

    def _has_spectrum(self, i: int) -> bool:
        """Whether singular values are looked at."""
        param = self.params[i]
        if not self.group_of[i].get("lora_rank_penalty") or param.ndim < 2 or param.numel() == 0:
            return False
        rows = param.shape[0]
        return (rows if self._acts_on_left(i) else param.numel() // rows) <= LONGEST_SIDE


def decay_matrix(weights: Tensor, left: bool, cutoff: float = 1e-12) -> Tensor:
    """The small matrix ``D`` whose product with the weights is what decays by rank, beyond the decay of all alike.

    It has the singular vectors of the weights on one side: weight 0 for the leading one, 1 for the last and for all
    that the weights have no part in, equal steps between. Of a matrix of zeros it is zero.

    Args:
        weights: Two dimensions or more.
        left: Whether it multiplies from the left.
        cutoff: Singular values up to this share of the largest count as zero.
    """
    matrix = spectra.matrix_view(weights)
    u, sigma, vt = torch.linalg.svd(matrix, full_matrices=True)
    vectors = u if left else vt.T
    small = torch.zeros_like(vectors)
    if not bool(matrix.any()):
        return small
    last = max(len(sigma) - 1, 1)
    for i in range(len(vectors)):
        present = i < len(sigma) and bool(sigma[i] > cutoff * sigma[0])
        small += (i / last if present else 1.0) * torch.outer(vectors[:, i], vectors[:, i])
    return small
