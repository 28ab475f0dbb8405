"""Reference: what the two families have in common. Options, the loop over parameters, and rules that both apply.

The optimizers themselves are in :mod:`hina_optim.reference.adamw_family` and
:mod:`hina_optim.reference.came_family`.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from hina_optim.reference import adaptation, core, image, spectra
from hina_optim.reference.came import Factors
from hina_optim.reference.context import LossHistory
from hina_optim.reference.population import ParameterState, Population

__all__ = ["IGNORED", "Reference"]

#: Arguments of the optimizers that are about memory and machines: accepted, without effect.
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
        "min_8bit_size",
        "force_8bit",
        "state_device",
        "anchor_device",
        "rounding",
        "seed",
        "compile",
        "verbose",
        "foreach",
    }
)

#: Bounds of what the trend of the loss multiplies the rate with.
CONTEXT_BOUNDS = (0.6, 4.0)


class Reference(Population, ABC):
    """An optimizer over lists of float64 tensors.

    All counters but :attr:`ParameterState.seen` ignore steps in which the gradient was not finite: those leave the
    parameter and what is remembered of it untouched. Measurements and phases go by ``seen``. Options of techniques that
    compare parameters must be the same in all groups that use them.

    Args:
        params: Tensors, or groups ``{"params": [tensors], **options}``. Copied, to :attr:`params`.
        pairs: Places, in :attr:`params`, of the two factors of every product: (A, B) of a LoRA unless ``roles`` says
            otherwise.
        roles: What the parameters are to adapters, by place: ``"lora_a"``, ``"lokr_w1"``, …
        adapters: Places of the parameters of each adapter.
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

    #: The arguments that change the mathematics, with the defaults of the optimizer.
    DEFAULTS: ClassVar[Mapping[str, Any]] = {}

    def __init__(
        self,
        params: Sequence[Tensor] | Sequence[dict[str, Any]],
        *,
        pairs: Sequence[tuple[int, int]] = (),
        roles: Mapping[int, str] | None = None,
        adapters: Sequence[Sequence[int]] = (),
        rank_cutoff: float = 1e-12,
        **arguments: Any,
    ) -> None:
        self.params: list[Tensor] = []
        self.param_groups: list[dict[str, Any]] = []
        self.state: dict[int, ParameterState] = {}
        self.rank_cutoff = rank_cutoff
        self.partner = {a: b for a, b in pairs} | {b: a for a, b in pairs}
        lora = {place: role for pair in pairs for place, role in zip(pair, ("lora_a", "lora_b"), strict=True)}
        self.roles: Mapping[int, str] = lora if roles is None else roles
        self.adapters = [list(members) for members in adapters]
        groups = [p for p in params if isinstance(p, dict)]
        for group in groups or [{"params": list(params)}]:
            self._add_group(group["params"], {**arguments, **{k: v for k, v in group.items() if k != "params"}})
        self.group_of = {i: group for group in self.param_groups for i in group["places"]}

    def _add_group(self, tensors: Sequence[Tensor], options: dict[str, Any]) -> None:
        unknown = set(options) - set(self.DEFAULTS) - IGNORED - {"start_lr", "name"}
        if unknown:
            raise TypeError(f"{type(self).__name__}: unknown arguments {sorted(unknown)}")
        group = {**self.DEFAULTS, **options}
        group.setdefault("start_lr", group["lr"])
        group["places"] = list(range(len(self.params), len(self.params) + len(tensors)))
        self.params += [t.detach().to(torch.float64).clone() for t in tensors]
        self.param_groups.append(group)

    def step(self, grads: Sequence[Tensor | None], loss: float | None = None) -> None:
        """One update.

        Args:
            grads: A gradient, or None, for each of :attr:`params`.
            loss: What was reported last; None (or NaN) where nothing was. In float32, as the optimizer takes it.
        """
        gradients = {i: g.detach().to(torch.float64) for i, g in enumerate(grads) if g is not None}
        for i in gradients:
            if i not in self.state:
                self.state[i] = self._begin(i)
        self._digest(list(gradients))
        for i, grad in gradients.items():
            if not bool(torch.isfinite(grad).all()):
                self.state[i].skipped += 1
            elif grad.numel() > 0:
                self._measure(i, grad)
                self._update(i, grad, math.nan if loss is None else loss)
            self.state[i].seen += 1

    @abstractmethod
    def _update(self, i: int, raw: Tensor, loss: float) -> None:
        """One update of one parameter, in the order of the recipe.

        Args:
            i: Its place.
            raw: Its gradient, finite.
            loss: NaN where there is none.
        """

    def _begin(self, i: int) -> ParameterState:
        """What is remembered before the first gradient."""
        group, param = self.group_of[i], self.params[i]
        zero = torch.zeros_like(param)
        context = LossHistory(group["context_window"], group["adaptation_rate"], CONTEXT_BOUNDS)
        mask = torch.full_like(param, group["start_lr"])
        none = Factors([], [])
        return ParameterState(param.clone(), zero, zero, zero, zero, none, mask, zero, zero, zero, context)

    # -- rules of both families ----------------------------------------------------------------------------------------

    def _context(self, i: int, raw: Tensor, loss: float) -> float:
        """What the trend of the loss multiplies the rate with."""
        return self.state[i].context.step(loss, adaptation.sketch(raw))

    def _images(self, i: int, grad: Tensor) -> tuple[Tensor, Tensor | None]:
        """Edges, high frequencies, busy regions and background damped; and the factor on the bumps of the mask."""
        group, state = self.group_of[i], self.state[i]
        bump_scale = None
        factored = group["factored_image_state"]
        if group["edge_suppression"]:
            grad = image.edge_suppression(grad, group["edge_penalty"], group["edge_threshold"])
        if group["spatial_awareness"]:
            grad = image.frequency_penalty(grad, group["frequency_penalty"])
            strength = group["detail_preservation"]
            grad, state.spatial, bump_scale = image.spatial_awareness(grad, state.spatial, strength, factored)
        if group["background_regularization"]:
            grad, state.background = image.background_regularization(grad, state.background, factored)
        return grad, bump_scale

    def _penalized(self, i: int, grad: Tensor) -> Tensor:
        """The gradient of the rank penalty added."""
        coefficient, strength = self.state[i].coefficient, self.group_of[i]["rank_penalty_strength"]
        if coefficient is None:
            return grad
        return spectra.penalized_gradient(grad, self.params[i], coefficient, self._acts_on_left(i), strength)

    def _emphasized(self, i: int, update: Tensor) -> Tensor:
        """The part of the direction in the leading singular directions of the weights made larger."""
        projection, factor = self.state[i].projection, self.group_of[i]["low_rank_emphasis"]
        if projection is None:
            return update
        return spectra.emphasized_update(update, projection, self._acts_on_left(i), factor)

    def _masked(self, i: int, rates: Tensor, grad: Tensor, t: int, bump_scale: Tensor | None) -> Tensor:
        """Rates times what the learning-rate mask has become of its start."""
        group, state = self.group_of[i], self.state[i]
        state.lr_mask, state.last_sign = core.learning_rate_mask(
            state.lr_mask,
            state.last_sign,
            grad,
            t,
            min_lr=group["min_lr"],
            max_lr=group["max_lr"],
            lr_bump=group["lr_bump"],
            warmup_steps=group["warmup_steps"],
            d_coef=group.get("d_coef", 1.0),
            bump_scale=bump_scale,
        )
        return core.each(lambda rate, mask: rate * mask / group["start_lr"], rates, state.lr_mask)


def by_row(x: Tensor, factors: Sequence[float]) -> Tensor:
    """Every row times a factor of its own."""
    return torch.stack([row * factor for row, factor in zip(x, factors, strict=True)])
