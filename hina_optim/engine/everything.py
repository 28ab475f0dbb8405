"""Methods that are about all parameters, also where an engine leaves groups empty between its steps."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Concatenate, ParamSpec, TypeVar, cast

if TYPE_CHECKING:
    from hina_optim.engine.optimizer import HinaOptimizer

__all__ = ["about_all", "whole_groups"]

P = ParamSpec("P")
R = TypeVar("R")
S = TypeVar("S")


@contextlib.contextmanager
def whole_groups(optimizer: HinaOptimizer) -> Iterator[None]:
    """Within this, groups hold what they are made of: ZeRO-3 leaves them empty but for the moment of their step."""
    shown = []
    for g, group in optimizer.indexed_groups():
        holders = optimizer._layout.holders(g)
        if holders:
            shown.append((group, group["params"]))
            group["params"] = holders
    try:
        yield
    finally:
        for group, params in shown:
            group["params"] = params


def about_all(method: Callable[Concatenate[S, P], R]) -> Callable[Concatenate[S, P], R]:
    """A method of an optimizer that runs :func:`whole_groups`."""

    @functools.wraps(method)
    def wrapped(self: S, /, *args: P.args, **kwargs: P.kwargs) -> R:
        with whole_groups(cast("HinaOptimizer", self)):
            return method(self, *args, **kwargs)

    return wrapped
