"""Options of parameter groups as JSON: tuples, tensors and numbers that are not finite come back as what they were."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

__all__ = ["dtype_named", "from_plain", "to_plain"]


def to_plain(value: Any, what: str) -> Any:
    """A value of an option as JSON can hold it.

    Args:
        value: None, a bool, number, string or tensor, or a tuple, list or dict of such.
        what: Its name, for the error.

    Raises:
        ValueError: It is nothing of the kind.
    """
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else {"float": repr(float(value))}
    if isinstance(value, Tensor):
        return {"tensor": to_plain(value.tolist(), what), "dtype": str(value.dtype).removeprefix("torch.")}
    if isinstance(value, (tuple, list)):
        items = [to_plain(item, what) for item in value]
        return {"tuple": items} if isinstance(value, tuple) else items
    if isinstance(value, dict) and all(isinstance(key, str) for key in value):
        return {"dict": {key: to_plain(item, f"{what}.{key}") for key, item in value.items()}}
    raise ValueError(
        f"{what} is a {type(value).__name__}, which a checkpoint cannot hold: only None, bools, numbers, strings and "
        "tensors, and tuples, lists and dicts of them."
    )


def from_plain(value: Any, what: str) -> Any:
    """What :func:`to_plain` was given.

    Raises:
        ValueError: It was not made by it.
    """
    if value is None or isinstance(value, (bool, int, str, float)):
        return value
    if isinstance(value, list):
        return [from_plain(item, what) for item in value]
    if isinstance(value, dict):
        match value:
            case {"float": str(text), **rest} if not rest:
                return float(text)
            case {"tuple": list(items), **rest} if not rest:
                return tuple(from_plain(item, what) for item in items)
            case {"dict": dict(items), **rest} if not rest:
                return {key: from_plain(item, f"{what}.{key}") for key, item in items.items()}
            case {"tensor": numbers, "dtype": str(name), **rest} if not rest:
                return torch.tensor(from_plain(numbers, what), dtype=dtype_named(name))
    raise ValueError(f"{what} is {str(value)[:80]!r}, which no option is written as.")


def dtype_named(name: Any) -> torch.dtype:
    """``"float32"`` → ``torch.float32``.

    Raises:
        ValueError: There is no such dtype.
    """
    found = getattr(torch, name, None) if isinstance(name, str) else None
    if not isinstance(found, torch.dtype):
        raise ValueError(f"{name!r} is not a dtype.")
    return found
