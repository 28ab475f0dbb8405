"""How graphs are made and called: the compiler, and what a call costs beside the work of the graph."""

from __future__ import annotations

import contextlib
import functools
import logging
import types
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["Segments", "compiler", "graph", "mark", "without_numbers"]

log = logging.getLogger("hina_optim")

#: Always in parallel loops, whatever the size of the first parameter; products and sums in one instruction. What
#: several sums are made of is computed in their loop: by its own lights, the compiler writes to fresh memory what is
#: used more than once and reads more than four tensors, and numbers of a line are tensors to it.
OPTIONS: dict[str, Any] = {
    "cpp.dynamic_threads": True,
    "cpp.enable_floating_point_contract_flag": "fast",
    "realize_reads_threshold": 12,
}

#: What is looked at before a graph is used again: tensors, their sizes, and the modes of torch. What it was made of
#: beside, hyper-parameters and codecs, never changes under it: whoever changes them makes other graphs. To look at all
#: of that in every call took longer than many a graph.
GUARDED = frozenset(
    {
        "TENSOR_MATCH", "SHAPE_ENV", "NO_TENSOR_ALIASING", "DUPLICATE_INPUT", "STORAGE_OVERLAPPING",
        "GLOBAL_STATE", "GRAD_MODE", "DEFAULT_DEVICE", "DETERMINISTIC_ALGORITHMS", "TORCH_FUNCTION_STATE",
    }
)  # fmt: skip


@functools.cache
def compiler() -> bool:
    """Whether torch finds a C++ compiler, without which it compiles nothing for CPUs; says so once if not."""
    from torch._inductor.cpp_builder import get_cpp_compiler  # takes a second to import

    try:
        return bool(get_cpp_compiler())
    except RuntimeError:  # an InvalidCxxCompiler, which has another place in other versions
        log.warning(
            "compile=True, but no C++ compiler was found (g++, or what CXX names): steps on CPUs run eagerly, which "
            "takes several times as long and gives the same result."
        )
        return False


def without_numbers(error: RuntimeError, i: int, segments: int) -> None:
    """Raise an error again, unless a graph can be built in which numbers are made in the loops over elements.

    torch 2.13 cannot fuse some of the loops that make numbers with those that write in place. Nothing has run then, and
    without them a graph is slower by the operations on numbers.
    """
    if "KeyError: 'buf" not in str(error):
        raise error
    log.info(
        "torch could not build segment %d of %d with numbers made outside of loops; it is built without.",
        i + 1, segments,
    )  # fmt: skip


@contextlib.contextmanager
def dynamic() -> Iterator[None]:
    """Within this, sizes that happen to be equal when a graph is made may differ later."""
    config = torch.fx.experimental._config
    before, config.use_duck_shape = config.use_duck_shape, False
    try:
        yield
    finally:
        config.use_duck_shape = before


def guarded(guards: Sequence[Any]) -> list[bool]:
    """Which guards are looked at in every call."""
    return [guard.guard_type in GUARDED for guard in guards]


@functools.cache
def _options() -> dict[str, Any]:
    # older versions of torch take no such filter: then all is looked at
    return OPTIONS | ({"guard_filter_fn": guarded} if hasattr(torch.compiler, "keep_tensor_guards_unsafe") else {})


def graph(function: Callable[..., Any], name: str) -> Callable[..., Any]:
    """A function as one graph, under a name of its own: torch.compile counts recompilations by code object.

    What it closes over must not change while the graph is in use (:data:`GUARDED`). Sizes are constants, but for those
    of dimensions that are marked when it is first called, and those that turn out to differ.
    """
    code = function.__code__.replace(co_name=name)
    own = types.FunctionType(code, function.__globals__, name, None, function.__closure__)
    compiled: Callable[..., Any] = torch.compile(own, fullgraph=True, dynamic=False, options=dict(_options()))
    return compiled


def mark(*marked: tuple[Tensor | None, tuple[int, ...]]) -> None:
    """Mark dimensions of arguments of graphs whose sizes differ from call to call."""
    for x, dims in marked:
        if x is not None:
            torch._dynamo.maybe_mark_dynamic(x, dims)


class Segments:
    """The compiled segments of all buckets that follow the same rules.

    Args:
        count: How many segments there are.
    """

    def __init__(self, count: int) -> None:
        self._count = count
        self._compiled: dict[Hashable, Callable[..., Any]] = {}

    def call(self, i: int, key: Hashable, make: Callable[[bool], Callable[..., Any]], given: Sequence[Any]) -> Any:
        """Run segment ``i``.

        Args:
            i: Which.
            key: What is constant in its graph.
            make: Makes the graph; with True, numbers are made outside of its loops.
            given: Arguments of the graph, marked: it may have to be made again, if others have reset the compiler.
        """
        compiled = self._compiled.get(key)
        if compiled is None:
            compiled = self._compiled[key] = make(True)
        with dynamic():
            try:
                return compiled(*given)
            except RuntimeError as error:
                without_numbers(error, i, self._count)
                compiled = self._compiled[key] = make(False)
                return compiled(*given)
