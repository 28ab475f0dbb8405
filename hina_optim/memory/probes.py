"""How much memory there is and how much is in use: one question, asked of a GPU, of a process, or of a script."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple, Protocol

import torch

from hina_optim import arguments as rule

__all__ = ["GIB", "CudaProbe", "MemoryReading", "Probe", "ProcessProbe", "ScriptedProbe", "probe_for", "reading_of"]

#: Bytes in the gigabyte that every ``…_gb`` argument and figure means (2³⁰).
GIB = 1 << 30


class MemoryReading(NamedTuple):
    """Memory at one moment.

    Attributes:
        used_bytes: In use now.
        limit_bytes: What this process may use in total.
        peak_bytes: The most that was in use at one time so far.
        retries: How often an allocation failed at first, out-of-memory errors included, since the process began.
            It only grows; a rise between two readings is hard pressure.
        reserved_bytes: What the allocator holds, in use or not; None where it is no more than what is in use.
        available_bytes: What the device can still give, whatever the limit; None where the limit is all that is known.
        window_bytes: The most that was in use at one time since the reading before; None where that is not known.
    """

    used_bytes: int
    limit_bytes: int
    peak_bytes: int = 0
    retries: int = 0
    reserved_bytes: int | None = None
    available_bytes: int | None = None
    window_bytes: int | None = None

    @property
    def pressure(self) -> float:
        """Used over limit: 0 is empty, 1 is full."""
        return self.used_bytes / self.limit_bytes

    @property
    def free_bytes(self) -> int:
        """What is left; 0 when the limit is exceeded."""
        return max(0, self.limit_bytes - self.used_bytes)


class Probe(Protocol):
    """Anything that can be asked for a :class:`MemoryReading`. It changes nothing and may be asked at any time."""

    def read(self) -> MemoryReading:
        """Memory now."""


class CudaProbe:
    """Memory of one CUDA device, as its caching allocator sees it.

    What can still be allocated without an error is ``free + (reserved - allocated) - inactive split``: the driver's
    free memory, and what the allocator holds without using it, less the remainders of split blocks, which only smaller
    allocations fit into. With expandable segments the remainders can be joined, so the last term falls away. Used is
    allocated plus those remainders, and the limit is used plus available: memory that other processes hold is no part
    of it.

    Args:
        device: A CUDA device.
        limit_gb: A budget in GiB, where less than the device has is to be used. None: the device.
        windows: Tell the peak since the reading before, too. The allocator has one counter for that, which each reading
            then resets: ``torch.cuda.max_memory_allocated()`` becomes the peak since then for all who ask.

    Raises:
        ValueError: The device is not a CUDA device, CUDA is not available, or the limit is not a finite number > 0.
    """

    def __init__(
        self, device: torch.device | str | int = "cuda", limit_gb: float | None = None, *, windows: bool = False
    ) -> None:
        self.device = torch.device("cuda", device) if isinstance(device, int) else torch.device(device)
        if self.device.type != "cuda":
            raise ValueError(f"CudaProbe: device={str(device)!r} is not a CUDA device; use ProcessProbe for the CPU.")
        if not torch.cuda.is_available():
            raise ValueError("CudaProbe: CUDA is not available in this process; use ProcessProbe or ScriptedProbe.")
        self.limit_bytes = _limit("CudaProbe", limit_gb)
        self.windows = windows
        self._peak = 0

    def read(self) -> MemoryReading:
        """Memory now. Reads counters of the allocator and the driver; waits for no kernel."""
        stats = torch.cuda.memory_stats(self.device)
        free, _ = torch.cuda.mem_get_info(self.device)
        reading = reading_of(stats, free, _expandable_segments(), self.limit_bytes)
        if not self.windows:
            return reading
        torch.cuda.reset_peak_memory_stats(self.device)
        self._peak = max(self._peak, reading.peak_bytes)
        return reading._replace(peak_bytes=self._peak, window_bytes=reading.peak_bytes)


def reading_of(stats: Mapping[str, int], free: int, expandable: bool, limit_bytes: int | None = None) -> MemoryReading:
    """What the counters of a caching allocator say.

    Args:
        stats: As ``torch.cuda.memory_stats`` gives them; what is not there counts as 0.
        free: Bytes that the driver has left.
        expandable: Whether the allocator can join the remainders of split blocks.
        limit_bytes: A budget.
    """
    allocated = stats.get("allocated_bytes.all.current", 0)
    reserved = stats.get("reserved_bytes.all.current", 0)
    used = allocated + (0 if expandable else stats.get("inactive_split_bytes.all.current", 0))
    available = max(0, free + reserved - used)
    limit = used + available
    return MemoryReading(
        used_bytes=used,
        limit_bytes=limit if limit_bytes is None else min(limit, limit_bytes),
        peak_bytes=stats.get("allocated_bytes.all.peak", 0),
        retries=stats.get("num_alloc_retries", 0) + stats.get("num_ooms", 0),
        reserved_bytes=reserved,
        available_bytes=available,
    )


class ProcessProbe:
    """Memory of this process (its resident set) against a limit.

    Linux tells what is resident now. macOS tells the highest value so far, which is then taken for both.

    Args:
        limit_gb: What the process may use, in GiB. None: all physical memory of the machine.

    Raises:
        ValueError: The limit is not a finite number > 0, or the system does not tell a process its memory (Windows).
    """

    def __init__(self, limit_gb: float | None = None) -> None:
        given = _limit("ProcessProbe", limit_gb)
        self.limit_bytes = _physical_memory() if given is None else given
        # asked once now: a system without an answer is found out here, not in the middle of a training
        self._peak = max(_resident())

    def read(self) -> MemoryReading:
        """Memory now."""
        used, peak = _resident()
        self._peak = max(self._peak, used, peak)  # the two counters of Linux differ by some pages
        return MemoryReading(used, self.limit_bytes, self._peak)


class ScriptedProbe:
    """Gives prepared readings, one a call, and then the last one forever: for tests and for trying a policy out.

    Example:
        >>> probe = ScriptedProbe([MemoryReading(1, 4), MemoryReading(3, 4)])
        >>> [probe.read().pressure for _ in range(3)]
        [0.25, 0.75, 0.75]

    Args:
        readings: At least one.

    Raises:
        ValueError: There is no reading.
    """

    def __init__(self, readings: Iterable[MemoryReading]) -> None:
        self.readings = tuple(readings)
        if not self.readings:
            raise ValueError("ScriptedProbe: readings is empty; give at least one MemoryReading.")
        self.calls = 0

    def read(self) -> MemoryReading:
        """The next reading."""
        reading = self.readings[min(self.calls, len(self.readings) - 1)]
        self.calls += 1
        return reading


def probe_for(device: torch.device | str, limit_gb: float | None = None, *, windows: bool = False) -> Probe:
    """The probe that fits a device.

    Args:
        device: Where the parameters are.
        limit_gb: A limit in GiB. None: what the device, or the machine, has.
        windows: Tell the peak since the reading before, where the device counts it (:class:`CudaProbe`).

    Raises:
        ValueError: There is no probe for such a device, or the limit is not a finite number > 0.
    """
    device = torch.device(device)
    if device.type == "cuda":
        return CudaProbe(device, limit_gb, windows=windows)
    if device.type == "cpu":
        return ProcessProbe(limit_gb)
    raise ValueError(
        f"There is no memory probe for device type {device.type!r}: give an object of your own with a method "
        "read() -> MemoryReading."
    )


def _limit(owner: str, limit_gb: float | None) -> int | None:
    if limit_gb is None:
        return None
    rule.check(owner, "limit_gb", limit_gb, rule.POSITIVE)
    return max(1, math.floor(limit_gb * GIB))


def _expandable_segments() -> bool:
    """Whether the allocator was told to use expandable segments."""
    settings = os.environ.get("PYTORCH_ALLOC_CONF", "") + "," + os.environ.get("PYTORCH_CUDA_ALLOC_CONF", "")
    return "expandable_segments:true" in settings.replace(" ", "").lower()


def _physical_memory() -> int:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        raise ValueError("ProcessProbe: this system does not tell how much memory it has; give limit_gb.") from None


def _resident() -> tuple[int, int]:
    """Bytes resident now, and the most so far."""
    try:
        import resource
    except ImportError:
        raise ValueError(
            "ProcessProbe: this system does not tell a process how much memory it uses; give an object of your own "
            "with a method read() -> MemoryReading."
        ) from None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    statm = Path("/proc/self/statm")
    if not statm.exists():
        return peak, peak
    return int(statm.read_text().split()[1]) * resource.getpagesize(), peak
