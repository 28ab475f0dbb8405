"""The optimizers around CAME, written slowly: one parameter after the other, in float64.

In the order of the recipe. Automagic_CameAMP, its improved and refactored forms and COptim are one chain of rules, of
which each has a part; what an optimizer has no option for is off. This page says what the fast optimizers do, in which
phase of the training, without batches, shards, precisions or compilers. The rules themselves are in
:mod:`~hina_optim.reference.came`, :mod:`~hina_optim.reference.core`, :mod:`~hina_optim.reference.image`,
:mod:`~hina_optim.reference.rates`, :mod:`~hina_optim.reference.spectra` and :mod:`~hina_optim.reference.context`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from hina_optim.reference import came, core, rates
from hina_optim.reference.common import Reference, by_row
from hina_optim.reference.population import ParameterState

__all__ = ["ReferenceCOptim", "ReferenceCame", "ReferenceCameAMP", "ReferenceCameAMPImproved"]

#: Phases of a training, in their order.
EARLY, LATE, STABLE, MATURE = range(4)
#: Where a first beta that decays ends.
SHORTEST_MEMORY = 0.5


class ReferenceCame(Reference):
    """The chain of the family. The options of an optimizer, with its defaults, are in ``DEFAULTS`` of a subclass.

    Args:
        params: As :class:`~hina_optim.reference.common.Reference`.
        regularization: A user's strategies that change the gradient, in their order.
        momentum: A user's strategy in place of the momentum.
        **arguments: As :class:`~hina_optim.reference.common.Reference`.
    """

    def __init__(
        self,
        params: Sequence[Tensor] | Sequence[dict[str, Any]],
        *,
        regularization: Sequence[Any] = (),
        momentum: Any = None,
        **arguments: Any,
    ) -> None:
        super().__init__(params, **arguments)
        self.regularization, self.momentum = list(regularization), momentum

    def _begin(self, i: int) -> ParameterState:
        state, param = super()._begin(i), self.params[i]
        if param.ndim >= 2 and param.numel() > 0:
            state.exp_avg_sq, state.residual = came.Factors.of(param), came.Factors.of(param)
        state.scales = {k: torch.zeros_like(param) for k in self.group_of[i].get("momentum_scales", ()) if k > 1}
        return state

    def phase(self, i: int) -> int:
        """The phase of a parameter's step: by how many gradients it has had, with this one."""
        seen, warmup = self.state[i].seen + 1, self.group_of[i]["warmup_steps"]
        if seen < warmup / 2:
            return EARLY
        return LATE if seen < warmup else STABLE if seen < 2 * warmup else MATURE

    def _update(self, i: int, raw: Tensor, loss: float) -> None:
        group, state, param = self.group_of[i], self.state[i], self.params[i]
        t, phase, lr = state.seen - state.skipped + 1, self.phase(i), float(group["lr"])

        rate = torch.full_like(param, lr)
        if group.get("use_loss_context", True):
            rate = rate * self._context(i, raw, loss)
        if not group["full_finetune"] and param.ndim >= 2:
            rate = by_row(rate, rates.row_factors(param, group["eta"]))

        grad, bump_scale = self._regularized(i, raw, t)
        update = self._direction(i, grad, t)
        if self._has_spectrum(i):
            update = self._emphasized(i, update)
        if group["use_grams"] and phase == LATE:
            update = core.grams(update, grad)
        if group["use_cautious"] and phase >= STABLE:
            update = core.cautious(update, grad)
        if group["use_lr_mask"]:
            rate = self._masked(i, rate, grad, t, bump_scale)

        decayed = self._decayed(i, grad, phase, lr)
        stepped = core.each(lambda p, d, r, u: p - d - r * u, param, decayed, rate, update)
        if group["use_spd"] and group["full_finetune"] and phase >= STABLE:
            stepped = core.selective_projection_decay(stepped, param, state.anchor, grad, group["spd_lambda"])
        self.params[i] = stepped

    def _regularized(self, i: int, grad: Tensor, t: int) -> tuple[Tensor, Tensor | None]:
        """The gradient after all rules on it, and the factor on the bumps of the learning-rate mask."""
        group, bump_scale = self.group_of[i], None
        if "edge_suppression" in group:
            grad, bump_scale = self._images(i, grad)
        for strategy in self.regularization:
            step = torch.tensor(float(t), dtype=torch.float64)
            grad = strategy.apply(grad, param=self.params[i], step=step)
        if group["use_agr"]:
            grad = core.adaptive_gradient_regularization(grad)
        if self._has_spectrum(i):
            grad = self._penalized(i, grad)
        return grad, bump_scale

    def _direction(self, i: int, grad: Tensor, t: int) -> Tensor:
        """Normalized, clipped, with momentum, over its confidence."""
        group, state = self.group_of[i], self.state[i]
        beta1, beta2, beta3 = group["betas"]
        incoming = grad
        update: Tensor
        if "momentum_scales" in group:
            incoming, state.scales = came.multi_scale(incoming, state.scales, t, beta1)
        if isinstance(state.exp_avg_sq, came.Factors):
            incoming, state.exp_avg_sq = came.factored(incoming, state.exp_avg_sq, t, beta2, group["eps"][0])
        else:
            incoming, state.exp_avg_sq = came.unfactored(incoming, state.exp_avg_sq, t, beta2, group["eps"][0])
        taken = came.rms_clip(incoming, group["clip_threshold"]) * incoming
        damping = 1.0
        if group["use_tam"] and self.phase(i) <= LATE:
            damping, state.torque = core.torque(state.exp_avg, incoming, state.torque, group["tam_beta"])

        if self.momentum is not None:
            step = torch.tensor(float(t), dtype=torch.float64)
            result = self.momentum.apply(damping * taken, state.exp_avg, step=step)
            state.exp_avg, update = result if isinstance(result, tuple) else (result, result)
        else:
            beta1 = came.beta1_at(t, beta1, group["beta1_decay"], min(beta1, SHORTEST_MEMORY))
            update = state.exp_avg = core.momentum(state.exp_avg, taken, beta1, damping)
        if group.get("enable_dual_momentum"):
            share, long_beta = group["alpha_mix_ratio"], group["long_term_beta"]
            update, state.exp_avg_long = came.dual_momentum(update, taken, state.exp_avg_long, t, long_beta, share)
        if group["came"] and grad.ndim >= 2:
            m, eps = state.exp_avg, group["eps"][1]
            update, state.residual = came.confidence(update, taken, m, state.residual, t, beta3, eps)
        return update

    def _decayed(self, i: int, grad: Tensor, phase: int, lr: float) -> Tensor:
        """What decay takes off the weights: by the size of the gradient, and, once mature, by rank beside it."""
        group, state, param = self.group_of[i], self.state[i], self.params[i]
        strength = lr * group["weight_decay"]
        factor = rates.ada_decay_factor(grad) if group["use_ada_decay"] else torch.ones_like(param)
        decayed = core.each(lambda p, f: strength * f * p, param, factor)
        if self._has_spectrum(i) and phase == MATURE and state.decay is not None:
            matrix = param.reshape(param.shape[0], -1)
            by_rank = state.decay @ matrix if self._acts_on_left(i) else matrix @ state.decay
            decayed = decayed + strength * by_rank.reshape(param.shape)
        return decayed


class ReferenceCameAMP(ReferenceCame):
    """Automagic_CameAMP."""

    DEFAULTS: ClassVar[Mapping[str, Any]] = {
        "lr": 1e-6,
        "betas": (0.8, 0.99, 0.999),
        "eps": (1e-30, 1e-16),
        "weight_decay": 5e-4,
        "warmup_steps": 500,
        "min_lr": 1e-7,
        "max_lr": 1e-3,
        "lr_bump": 3e-6,
        "beta1_decay": 0.9995,
        "eta": 2.0,
        "came": True,
        "full_finetune": False,
        "clip_threshold": 1.0,
        "use_agr": True,
        "use_tam": True,
        "tam_beta": 0.9,
        "use_grams": True,
        "use_cautious": True,
        "use_ada_decay": True,
        "use_spd": True,
        "spd_lambda": 0.06,
        "use_lr_mask": True,
        "use_loss_context": False,
        "context_window": 30,
        "adaptation_rate": 0.25,
    }


class ReferenceCameAMPImproved(ReferenceCame):
    """Automagic_CameAMP_Improved, and RefactoredAutomagicCameAMP, which takes a user's strategies beside."""

    DEFAULTS: ClassVar[Mapping[str, Any]] = {
        **ReferenceCameAMP.DEFAULTS,
        "d_coef": 2.0,
        "edge_suppression": True,
        "edge_penalty": 0.1,
        "edge_threshold": 0.6,
        "spatial_awareness": True,
        "frequency_penalty": 0.05,
        "detail_preservation": 0.8,
        "background_regularization": True,
        "factored_image_state": False,
        "lora_rank_penalty": True,
        "rank_penalty_strength": 0.01,
        "low_rank_emphasis": 1.2,
        "rank_target": 0.9,
        "rank_interval": 10,
        "enable_dual_momentum": True,
        "long_term_beta": 0.99,
        "alpha_mix_ratio": None,
    }


class ReferenceCOptim(ReferenceCame):
    """Automagic_CameAMP_COptim: gradients on several time scales, and a look at the loss that is not an option."""

    DEFAULTS: ClassVar[Mapping[str, Any]] = {
        **{name: value for name, value in ReferenceCameAMP.DEFAULTS.items() if name != "use_loss_context"},
        "momentum_scales": (1, 5, 20, 100),
    }
