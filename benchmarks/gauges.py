"""What a step costs, measured in numbers that do not depend on the clock, and the one that does: a copy of memory."""

from __future__ import annotations

import gc
import inspect
import time
import warnings
import weakref
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from torch.profiler import DeviceType, ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import hina_optim
from benchmarks.state_bytes import leaves
from hina_optim.engine.optimizer import HinaOptimizer
from hina_optim.techniques.base import ParamInfo

#: Where this library is.
LIBRARY = Path(hina_optim.__file__).parent
#: Operators whose result the host must wait for on a device.
WAITING = frozenset(
    ("_local_scalar_dense", "item", "equal", "is_nonzero", "nonzero", "masked_select", "unique", "_unique2")
)
#: Operators that wait if they are given a mask, to count what it lets through.
MASKED = frozenset(("index", "index_put", "index_put_"))
#: Operators that write over what they change without reading it.
OVERWRITING = frozenset(("copy_", "_foreach_copy_", "fill_", "zero_", "_foreach_zero_"))


class Gauge(TorchDispatchMode):
    """Watches all that the dispatcher runs (eager steps only: compiled graphs refuse to run under it).

    Args:
        host: Tensors that are on the host wherever the parameters are, such as step counters: reading them is no wait.
        calls_only: Count calls and waits and nothing else, which is several times faster.

    Attributes:
        calls: Operator → how often it was called, views included.
        moved: Operator → bytes that it reads and writes if nothing is in a cache: every tensor it is given, and every
            one it makes or changes. Views move nothing.
        sites: File and function of this library → the same bytes, by who called.
        waits: Operators that would keep the host waiting for a device.
        peak: Bytes at most that were alive in tensors made meanwhile. What a kernel allocates inside, and frees, is
            not seen.
    """

    def __init__(self, host: Iterable[Tensor] = (), calls_only: bool = False) -> None:
        super().__init__()
        self._calls_only = calls_only
        self._host = {x.untyped_storage()._cdata for x in host}
        self.calls: Counter[str] = Counter()
        self.moved: Counter[str] = Counter()
        self.sites: Counter[str] = Counter()
        self.waits: Counter[str] = Counter()
        self.peak = 0
        self._live = 0
        self._known: dict[int, weakref.ref[Any]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operator and take its measures."""
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        if name.startswith("_record_function"):  # torch's note for the profiler that a step begins
            return func(*args, **kwargs)
        self.calls[name] += 1
        if self._calls_only and name not in WAITING | MASKED:
            return func(*args, **kwargs)
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        masked = name in MASKED and any(x.dtype in (torch.bool, torch.uint8) for x in given[1:])
        if (name in WAITING or masked) and any(x.untyped_storage()._cdata not in self._host for x in given):
            self.waits[name] += 1
        for x in given:
            self._meet(x, new=False)
        result = func(*args, **kwargs)
        made = [x for x in tree_leaves(result) if isinstance(x, Tensor)]
        for x in made:
            self._meet(x, new=True)
        if not func.is_view and not name.startswith(("empty", "new_empty")):
            changed = [
                x
                for argument, value in zip(func._schema.arguments, args, strict=False)
                if argument.alias_info is not None and argument.alias_info.is_write
                for x in tree_leaves(value)
                if isinstance(x, Tensor)
            ]
            ids = {id(x) for x in changed}
            fresh = [x for x in made if id(x) not in ids]
            read = touched(given) - (touched(changed) if name in OVERWRITING else 0)
            moved = read + touched(changed) + touched(fresh)
            self.moved[name] += moved
            self.sites[site()] += moved
        return result

    def _meet(self, x: Tensor, new: bool) -> None:
        storage = x.untyped_storage()
        key = storage._cdata
        if key in self._known:
            return
        size = storage.nbytes() if new else 0

        def gone(_: Any) -> None:
            self._live -= size
            del self._known[key]

        self._known[key] = weakref.ref(storage, gone)
        self._live += size
        self.peak = max(self.peak, self._live)


def site() -> str:
    """The innermost function of this library that is running, as ``folder/file.py function``."""
    frame = inspect.currentframe()
    while frame is not None:
        code = frame.f_code
        if str(LIBRARY) in code.co_filename:
            return f"{Path(code.co_filename).relative_to(LIBRARY)} {code.co_name.strip('<>')}"
        frame = frame.f_back
    return "elsewhere"


def touched(tensors: Iterable[Tensor]) -> int:
    """Bytes of memory behind tensors; an expanded dimension is one element."""
    total = 0
    for x in tensors:
        count = 1
        for size, stride in zip(x.shape, x.stride(), strict=True):
            count *= size if stride or not size else 1
        total += count * x.element_size()
    return total


def counter(optimizer: torch.optim.Optimizer, calls_only: bool = True) -> Gauge:
    """A gauge for an optimizer: its counters (``step``, of one element) are on the host in every library."""
    counters = [state["step"] for state in optimizer.state.values() if isinstance(state.get("step"), Tensor)]
    return Gauge(counters, calls_only)


def watch(optimizer: torch.optim.Optimizer) -> Gauge:
    """All measures of one step."""
    with counter(optimizer, calls_only=False) as gauge:
        optimizer.step()
    return gauge


def temporary_bytes(run: Callable[[], Any], device: torch.device) -> int:
    """Bytes that torch's allocator handed out at most beyond what was in use before, compiled code included.

    On CUDA by the allocator's own statistics, on a CPU by the profiler's record of every allocation. Memory that a
    library takes from elsewhere (malloc in an extension) is not seen.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        torch.cuda.synchronize(device)
        return int(torch.cuda.max_memory_allocated(device) - before)
    gc.disable()  # memory that only the collector gives back counts as held
    try:
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            run()
    finally:
        gc.enable()
    now = most = 0
    for event in sorted((e for e in _events(profiler) if e.name() == "[memory]"), key=lambda e: e.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most


def launches(run: Callable[[], Any], device: torch.device) -> int:
    """What is started in a call, by the profiler: kernels on CUDA; on a CPU operators, a compiled graph being one."""
    if device.type == "cuda":
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
            run()
            torch.cuda.synchronize(device)
        return sum(e.device_type() == DeviceType.CUDA for e in _events(profiler))
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        run()
    count, end = 0, 0
    for event in sorted(_events(profiler), key=lambda e: e.start_ns()):
        if event.name().startswith(("aten::", "## Call CompiledFxGraph")) and event.start_ns() >= end:
            count += 1
            end = event.start_ns() + event.duration_ns()
    return count


def _events(profiler: Any) -> list[Any]:
    return list(profiler.profiler.kineto_results.events())


def cuda_waits(run: Callable[[], Any]) -> int:
    """How often a call waits for the GPU, by torch's own watch."""
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            run()
    finally:
        torch.cuda.set_sync_debug_mode(before)
    return sum("synchroniz" in str(w.message) for w in caught)


def clock(run: Callable[[], Any], device: torch.device) -> float:
    """Seconds of a call."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    begin = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - begin


class Mover:
    """Moves memory as fast as anything can: what a step is held against.

    A copy must often read what it is about to write over, so a sum in place moves more bytes a second; the faster
    counts.
    """

    def __init__(self, nbytes: int, device: torch.device) -> None:
        self._device = device
        self._from = torch.ones(nbytes // 4, device=device)
        self._to = torch.ones_like(self._from)

    def speed(self) -> float:
        """Bytes a second."""
        size = touched([self._from])
        copy = 2 * size / clock(lambda: self._to.copy_(self._from), self._device)
        return max(copy, 3 * size / clock(lambda: self._to.add_(self._from), self._device))


def must_move(optimizer: torch.optim.Optimizer) -> int:
    """Bytes that a step cannot do without: gradients read, weights and state read and written.

    State is what is there, tensor by tensor, except on the host (counters); what never changes is only read.
    """
    total = 0
    seen: set[tuple[int, int]] = set()
    for group in optimizer.param_groups:
        for p in group["params"]:
            total += 2 * touched([p]) + touched([p.grad])
            constant = _constant(optimizer, group, p)
            for name, value in optimizer.state.get(p, {}).items():
                for x in leaves(value):
                    key = x.data_ptr(), x.numel()
                    if x.device == p.device and x.numel() and key not in seen:
                        seen.add(key)
                        total += touched([x]) * (1 if name in constant else 2)
    return total


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of all state, a tensor that is shared once."""
    held = {(x.data_ptr(), x.numel()): touched([x]) for x in leaves(dict(enumerate(optimizer.state.values())))}
    return sum(held.values())


def _constant(optimizer: torch.optim.Optimizer, group: dict[str, Any], p: Tensor) -> set[str]:
    if not isinstance(optimizer, HinaOptimizer):
        return set()
    info = ParamInfo(shape=tuple(p.shape))
    return {s.name for one in optimizer.recipe(group, info) for s in one.slots(info) if s.constant}


def graphs() -> int:
    """Graphs that torch.compile has made in this process until now."""
    from torch._dynamo.utils import counters

    return cast(int, counters["stats"]["unique_graphs"])
