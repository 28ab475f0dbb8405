"""Strategies that a user writes for one parameter at a time, and the techniques that run them in a recipe."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar

import torch
from torch import Tensor

from hina_optim.state.slot import EXP_AVG, Slot
from hina_optim.techniques.base import Flow, ParamInfo, Technique

__all__ = ["CustomMomentum", "CustomRegularization", "MomentumStrategy", "RegularizationStrategy"]


class RegularizationStrategy(ABC):
    """Changes the gradient of a parameter. Subclass it and define :meth:`apply`.

    It is called for every parameter in every step with complete tensors (of sharded parameters they are gathered), and
    must not wait for the device (no ``.item()``), draw random numbers that other ranks do not draw, or write to what it
    is given.

    Attributes:
        batched: True if :meth:`apply` takes ``N`` parameters of one shape at once, ``[N, *shape]``: hundreds of small
            tensors then cost one call. False: it is called for each.
    """

    batched: ClassVar[bool] = False

    @abstractmethod
    def apply(self, grad: Tensor, **kwargs: Any) -> Tensor:
        """The gradient to go on with.

        Args:
            grad: float32 (float64 for float64 parameters), the parameter's shape.
            **kwargs: ``param``, the weights before the update, like ``grad``; ``step``, 0-d (batched: ``[N, 1, …]``),
                which update of its life this is for the parameter, from 1. More may come: take ``**kwargs``.

        Returns:
            A tensor of the shape and dtype of ``grad``.
        """


class MomentumStrategy(ABC):
    """Takes the place of the momentum. Subclass it and define :meth:`apply`, element by element.

    It runs on any part of a parameter (shards, chunks) and on ``N`` parameters at once, and under ``torch.compile`` if
    that is asked for; what needs sums over a parameter is a :class:`~hina_optim.techniques.base.Technique`.
    """

    @abstractmethod
    def apply(self, grad: Tensor, moment: Tensor, **kwargs: Any) -> Tensor | tuple[Tensor, Tensor]:
        """The new moment, which is also the direction of the step; or both, ``(moment, direction)``.

        Args:
            grad: What enters the moment, normalized, clipped and damped; ``[N, *shape]``.
            moment: The moment so far, zero at first, like ``grad``.
            **kwargs: ``step``, ``[N, 1, …]``: which update this is, from 1. More may come: take ``**kwargs``.
        """


class CustomRegularization(Technique):
    """Runs a :class:`RegularizationStrategy`: ``g ← strategy.apply(g, param=θ, step=t)``.

    Args:
        strategy: What to run.
        index: Its place among several.

    Raises:
        TypeError: It is not a RegularizationStrategy.
    """

    reads: ClassVar[frozenset[str]] = frozenset()
    writes: ClassVar[frozenset[str]] = frozenset({"grad"})
    whole: ClassVar[tuple[str, ...]] = ("grad", "param")

    def __init__(self, strategy: RegularizationStrategy, index: int = 0) -> None:
        if not isinstance(strategy, RegularizationStrategy):
            raise TypeError(
                f"regularization[{index}] is {_what(strategy)}; give instances of subclasses of RegularizationStrategy."
            )
        self.strategy = strategy
        self.name = f"regularization{index}"  # type: ignore[misc]  # one recipe may hold several

    def scalars(self, t: Tensor) -> dict[str, Tensor]:
        """The count of updates."""
        return {"step": t}

    def whole_matrix(self, flow: Flow, *complete: Tensor) -> Tensor:
        """The changed gradient, ``[N, *shape]``.

        Raises:
            ValueError: The strategy returned something else than a tensor like the gradient.
        """
        grad, param = complete
        step = flow.scalars[f"{self.name}.step"]
        if self.strategy.batched:
            lay = [-1, *([1] * (grad.ndim - 1))]
            return self._checked(self.strategy.apply(grad, param=param, step=step.reshape(lay)), grad)
        rows = zip(grad.unbind(), param.unbind(), step.unbind(), strict=True)
        return torch.stack([self._checked(self.strategy.apply(g, param=p, step=t), g) for g, p, t in rows])

    def transform(self, flow: Flow) -> None:
        """Take it."""
        flow["grad"] = flow[f"{self.name}.whole"]

    def _checked(self, result: Any, like: Tensor) -> Tensor:
        if not isinstance(result, Tensor) or result.shape != like.shape:
            raise ValueError(
                f"{type(self.strategy).__name__}.apply() returned {_what(result)} for a gradient of shape "
                f"{tuple(like.shape)}; it must return a tensor of that shape."
            )
        return result.to(like.dtype)


class CustomMomentum(Technique):
    """Runs a :class:`MomentumStrategy`: ``m, u ← strategy.apply(n, m, step=t)``, ``n`` what enters the moment.

    Args:
        strategy: What to run.

    Raises:
        TypeError: It is not a MomentumStrategy.
    """

    name: ClassVar[str] = "custom_momentum"
    reads: ClassVar[frozenset[str]] = frozenset({"grad", "incoming", "clip", "damping"})
    writes: ClassVar[frozenset[str]] = frozenset({"update"})

    def __init__(self, strategy: MomentumStrategy) -> None:
        if not isinstance(strategy, MomentumStrategy):
            raise TypeError(f"momentum is {_what(strategy)}; give an instance of a subclass of MomentumStrategy.")
        self.strategy = strategy

    def slots(self, info: ParamInfo) -> tuple[Slot, ...]:
        """The moment, of the parameter's shape."""
        return (EXP_AVG,)

    def scalars(self, t: Tensor) -> dict[str, Tensor]:
        """The count of updates."""
        return {"step": t}

    def transform(self, flow: Flow) -> None:
        """Update the moment and set the direction."""
        incoming = flow.get("incoming")
        if incoming is None:
            incoming = flow["grad"]
        for factor in (flow.get("clip"), flow.get("damping")):
            if factor is not None:
                incoming = incoming * factor
        result = self.strategy.apply(incoming, flow.state["exp_avg"], step=flow.scalar(self, "step"))
        moment, update = result if isinstance(result, tuple) else (result, result)
        if moment.shape != incoming.shape or update.shape != incoming.shape:
            raise ValueError(
                f"{type(self.strategy).__name__}.apply() returned shapes {tuple(moment.shape)} and "
                f"{tuple(update.shape)} for {tuple(incoming.shape)}; both must be that."
            )
        flow.new["exp_avg"], flow["update"] = moment, update


def _what(x: Any) -> str:
    if isinstance(x, Tensor):
        return f"a tensor of shape {tuple(x.shape)}"
    return f"the class {x.__name__}, not an instance of it" if isinstance(x, type) else f"a {type(x).__name__}"
