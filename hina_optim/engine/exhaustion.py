"""Running out of memory within a step: told from other errors, answered by giving memory back, and said."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator
from typing import TypeVar

import torch

__all__ = ["UNCHANGED", "ExhaustionError", "attempt", "before_any_change", "give_back", "is_out_of_memory"]

log = logging.getLogger("hina_optim")

T = TypeVar("T")

UNCHANGED = "Memory ran out in step() of the optimizer. Nothing was changed; the step can be taken again."
#: What allocators say that have no error type of their own (the CPU's, MPS, CUDA's libraries).
_SIGNS = ("out of memory", "can't allocate memory", "not enough memory", "DefaultCPUAllocator", "_ALLOC_FAILED")


class ExhaustionError(torch.OutOfMemoryError):
    """A step ran out of memory; the message says what was updated and what was not.

    Frameworks know it as what it is: it is torch's own error, and its message holds the allocator's words.
    """


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error is that of an allocator that had nothing left."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in _SIGNS)


@contextlib.contextmanager
def before_any_change() -> Iterator[None]:
    """What runs within changes nothing of a step: if memory runs out there, the error says so."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise ExhaustionError(f"{error}\n{UNCHANGED}") from error


def give_back(device: torch.device) -> None:
    """Let the caching allocator of a device return what nobody uses."""
    if device.type == "cuda":
        torch.cuda.empty_cache()


def attempt(run: Callable[[], T], release: Callable[[], None], what: Callable[[], str]) -> T:
    """Call ``run``; if memory runs out, call ``release`` and then ``run`` once more.

    Args:
        run: Changes nothing unless it succeeds.
        release: Gives back what is held without need.
        what: Names what was tried, for the log.

    Raises:
        RuntimeError: Memory ran out again; the allocator's own error.
    """
    try:
        return run()
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        words = str(error)
    # out of the handler, which keeps all that the failed call had allocated
    release()
    log.warning("out of memory in step() at %s; memory was given back, trying once more (%s)", what(), words)
    return run()
