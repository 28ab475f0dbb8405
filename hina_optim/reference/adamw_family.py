"""The optimizers around ADOPT and AdamW, written slowly: one parameter after the other, in float64.

In the order of the recipe. HinaAdaptive, AdaptiveHinaAdamW and HinaAdamW are one chain of rules, of which each has a
part; what an optimizer has no option for is off. This page says what the fast optimizers do, without batches, shards,
precisions or compilers. The rules themselves are in :mod:`~hina_optim.reference.core`,
:mod:`~hina_optim.reference.image`, :mod:`~hina_optim.reference.rates`, :mod:`~hina_optim.reference.spectra` and
:mod:`~hina_optim.reference.context`; what parameters learn from each other is in
:mod:`~hina_optim.reference.population`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from hina_optim.reference import core, factored, rates
from hina_optim.reference.came import Factors
from hina_optim.reference.common import Reference, by_row

__all__ = ["ReferenceAdamW", "ReferenceAdaptiveHinaAdamW", "ReferenceHinaAdamW"]


class ReferenceAdamW(Reference):
    """The chain of the family. The options of an optimizer, with its defaults, are in ``DEFAULTS`` of a subclass."""

    def _update(self, i: int, raw: Tensor, loss: float) -> None:
        group, state, param = self.group_of[i], self.state[i], self.params[i]
        t = state.seen - state.skipped + 1
        waits = group["use_adopt_stability"] and t == 1  # ADOPT's first gradient moves nothing, decay included
        lr = 0.0 if waits else float(group["lr"])

        rate = self._rates(i, raw, loss, lr)
        grad, bump_scale = self._regularized(i, raw)
        update = self._direction(i, grad, t)
        if self._has_spectrum(i):
            update = self._emphasized(i, update)
        if group["use_grams"]:
            update = core.grams(update, grad)
        elif group["use_cautious"]:
            update = core.cautious(update, grad)
        if group.get("use_lr_mask"):
            rate = self._masked(i, rate, grad, t, bump_scale)

        stepped = core.apply_step(param, update, rate, lr * self._decay(i, t))
        if group["use_spd"]:
            stepped = core.selective_projection_decay(stepped, param, state.anchor, grad, group["spd_lambda"])
        self.params[i] = stepped

    def _rates(self, i: int, raw: Tensor, loss: float, lr: float) -> Tensor:
        """The rate of every element before the mask: what the parameter is, and how it compares with others."""
        group, state, param = self.group_of[i], self.state[i], self.params[i]
        rate = lr
        if self._compares(i):
            rate *= state.importance_rate
            rate *= 1 + 0.2 * state.relation_score
        if group["use_loss_context"]:
            rate *= self._context(i, raw, loss)
        every = torch.full_like(param, rate)
        if self._is_adapter(i):
            every = every * state.lokr_rate * rates.role_factor(self.roles[i], group["alora_ratio"])
            if param.ndim >= 2:
                every = by_row(every, rates.row_factors(param, group["eta"]))
        return every

    def _regularized(self, i: int, grad: Tensor) -> tuple[Tensor, Tensor | None]:
        """The gradient after all rules on it, and the factor on the bumps of the learning-rate mask."""
        group, bump_scale = self.group_of[i], None
        if "edge_suppression" in group:
            grad, bump_scale = self._images(i, grad)
        if group["use_agr"]:
            grad = core.adaptive_gradient_regularization(grad)
        if group["use_orthogonal_grad"]:
            grad = core.orthogonal(grad, self.params[i])
        if self._has_spectrum(i):
            grad = self._penalized(i, grad)
        return grad, bump_scale

    def _direction(self, i: int, grad: Tensor, t: int) -> Tensor:
        """The direction of the step, by ADOPT or Adam, with or without torque-aware damping."""
        group, state = self.group_of[i], self.state[i]
        (beta1, beta2), eps = group["betas"], group["eps"]
        v = self._second_moment(i)
        incoming, damping = grad, 1.0
        if group["use_adopt_stability"]:
            incoming, kept = core.adopt(grad, v, t, beta2, eps)
            self._keep(i, grad, kept, beta2 if t > 1 else 0.0)
        if group["use_tam"]:
            damping, state.torque = core.torque(state.exp_avg, incoming, state.torque, group["tam_beta"])
        if group["use_adopt_stability"]:
            state.exp_avg = core.momentum(state.exp_avg, incoming, beta1, damping)
            return state.exp_avg
        update, state.exp_avg, v = core.adam(state.exp_avg, v, grad, t, (beta1, beta2), eps, damping)
        self._keep(i, grad, v, beta2)
        if group["amsgrad"]:
            state.largest = v = core.each(max, state.largest, v)
        elif isinstance(state.exp_avg_sq, Factors):
            v = factored.spread(state.exp_avg_sq, grad)
        else:
            return update
        corrected = core.each(lambda x: x / (1 - beta2**t), v)
        return core.each(lambda x, y: x / (1 - beta1**t) / (math.sqrt(y) + eps), state.exp_avg, corrected)

    def _second_moment(self, i: int) -> Tensor:
        """The second moment of every element, or what row and column means say of it; kept as the options say now."""
        state, held = self.state[i], self.state[i].exp_avg_sq
        wanted = self.group_of[i]["factored_second_moment"] and factored.saves(self.params[i])
        if isinstance(held, Tensor) and wanted:
            state.exp_avg_sq = held = factored.means(held)
        elif isinstance(held, Factors) and not wanted:
            state.exp_avg_sq = held = factored.spread(held, self.params[i])
        return factored.spread(held, self.params[i]) if isinstance(held, Factors) else held

    def _keep(self, i: int, grad: Tensor, v: Tensor, beta2: float) -> None:
        """The second moment after this gradient: ``v``, or means of rows and columns."""
        state = self.state[i]
        if isinstance(state.exp_avg_sq, Factors):
            new = factored.means(core.each(lambda g: g * g, grad))
            state.exp_avg_sq = factored.averaged(state.exp_avg_sq, new, beta2)
        else:
            state.exp_avg_sq = v

    def _decay(self, i: int, t: int) -> float:
        """The decay of this step, to be multiplied by the learning rate; of LoKr's factors it shrinks more slowly."""
        group = self.group_of[i]
        transition = group["wd_transition_steps"] if group["dynamic_weight_decay"] else None
        factor, floor = group["wd_decay_factor"], group["wd_min_ratio"]
        if self.roles.get(i, "").startswith("lokr_"):
            factor, floor = factor**0.7, min(1.5 * floor, 1.0)
        return core.decay_strength(t, group["weight_decay"], transition, factor, floor)


#: What all three have.
SHARED: dict[str, Any] = {
    "lr": 1e-3,
    "betas": (0.9, 0.999),
    "eps": 1e-8,
    "weight_decay": 1e-2,
    "use_spd": True,
    "spd_lambda": 0.06,
    "use_cautious": True,
    "use_orthogonal_grad": False,
    "use_adopt_stability": True,
    "amsgrad": False,
    "factored_second_moment": False,
    "use_grams": False,
    "use_agr": True,
    "use_tam": True,
    "tam_beta": 0.9,
    "dynamic_weight_decay": True,
    "wd_transition_steps": 1000,
    "wd_decay_factor": 0.7,
    "wd_min_ratio": 0.1,
    "use_loss_context": False,
    "context_window": 30,
    "adaptation_rate": 0.25,
}


class ReferenceAdaptiveHinaAdamW(ReferenceAdamW):
    """AdaptiveHinaAdamW: parameters compared with each other, and a rate for every element."""

    DEFAULTS: ClassVar[Mapping[str, Any]] = {
        **SHARED,
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
    }


class ReferenceHinaAdamW(ReferenceAdamW):
    """HinaAdamW: rates by what a parameter is to an adapter."""

    DEFAULTS: ClassVar[Mapping[str, Any]] = {**SHARED, "use_alora": True, "alora_ratio": 16.0, "eta": 2.0}
