"""A second device for machines that have one: tensors that say they are elsewhere, and refuse to meet those here.

They say ``meta``, whose tensors elsewhere hold nothing; these hold their numbers.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

FAR = torch.device("meta")

#: What moves data between devices.
_COPIES = {torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default}


class Far(Tensor):
    """A tensor of the far device."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> Far:
        made = torch.Tensor._make_wrapper_subclass(
            cls, inner.shape, inner.stride(), inner.storage_offset(), dtype=inner.dtype, device=FAR
        )
        made.inner = inner
        return made

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        return f"Far({self.inner!r})"

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(func, args, kwargs or {})


class _Numbers(TorchFunctionMode):
    """What fills tensors with numbers, or reads them, out of sight of the dispatcher."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.tensor and kwargs.get("device") == FAR:
            return func(*args, **{**kwargs, "device": None}).to(FAR)
        if func is torch.Tensor.new_tensor and args[0].device == FAR:
            return torch.tensor(args[1], dtype=args[0].dtype).to(FAR)
        if func is torch.Tensor.tolist:
            return near(args[0]).tolist()
        return func(*args, **kwargs)


class FarMode(TorchDispatchMode):
    """Makes the far device known: needed around all that uses it."""

    def __init__(self) -> None:
        super().__init__()
        self.moved: list[tuple[torch.device, torch.device, int]] = []
        self._numbers = _Numbers()

    def __enter__(self) -> FarMode:
        self._numbers.__enter__()
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._numbers.__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _COPIES:
            source = args[1] if func is torch.ops.aten.copy_.default else args[0]
            target = args[0].device if func is torch.ops.aten.copy_.default else kwargs.get("device", source.device)
            if target != source.device:
                self.moved.append((source.device, target, source.numel() * source.element_size()))
        return run(func, args, kwargs)


def run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
    far = [x for x in given if isinstance(x, Far)]
    here = [x for x in given if not isinstance(x, Far) and x.ndim > 0]
    if far and here and func not in _COPIES:
        raise RuntimeError(f"{func}: tensors of two devices meet")
    wrapped = {id(x.inner): x for x in far}
    asked = kwargs.get("device")
    plain = {**kwargs, "device": torch.device("cpu")} if asked is not None else kwargs
    out = func(*tree_map(near, args), **tree_map(near, plain))
    lands = asked == FAR if asked is not None else bool(far)
    if func is torch.ops.aten.copy_.default:
        return args[0]

    def place(x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        if id(x) in wrapped:
            return wrapped[id(x)]
        return Far(x) if lands else x

    return tree_map(place, out)


def near(x: Any) -> Any:
    """The numbers of a tensor of either device."""
    return x.inner if isinstance(x, Far) else x
