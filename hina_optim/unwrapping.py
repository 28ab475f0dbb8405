"""The optimizer itself, outside of what frameworks wrap around it."""

from __future__ import annotations

from typing import Any

__all__ = ["unwrap_optimizer"]


def unwrap_optimizer(wrapped: Any) -> Any:
    """The innermost optimizer: the one whose state and methods are real.

    Wrappers of Lightning and Fabric (``LightningOptimizer``), accelerate (``AcceleratedOptimizer``,
    ``DeepSpeedOptimizerWrapper``) and DeepSpeed (ZeRO and mixed precision) each hold the next one under ``optimizer``.
    Most of them forward no method of ours, and an attribute that is written to a wrapper is lost.

    Args:
        wrapped: An optimizer, in any number of wrappers, or an engine that holds one.

    Returns:
        The optimizer at the bottom; ``wrapped`` itself where there is no wrapper.

    Raises:
        TypeError: There is no optimizer in it.

    Example:
        >>> import torch
        >>> optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
        >>> unwrap_optimizer(optimizer) is optimizer
        True
    """
    inner = wrapped
    while _is_optimizer(getattr(inner, "optimizer", None)):
        inner = inner.optimizer
    if not _is_optimizer(inner):
        raise TypeError(
            f"unwrap_optimizer: {type(wrapped).__name__} neither is an optimizer (with step() and param_groups) nor "
            "holds one under .optimizer."
        )
    return inner


def _is_optimizer(thing: Any) -> bool:
    return callable(getattr(thing, "step", None)) and hasattr(thing, "param_groups")
