"""State that lives in host memory: pieces of it come to the device for their cell, and go back when it is updated.

On CUDA, copies run on two streams of their own, in and out, that are made once: the pieces of the next cell come while
the one at hand is computed, and nothing ever waits on the host but who wants to read the state there. Elsewhere the
same calls copy at once. Where parameters are in host memory themselves there is nothing to do.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from hina_optim.engine.exhaustion import is_out_of_memory

__all__ = ["HOST", "Fetched", "Pieces", "Transfers"]

log = logging.getLogger("hina_optim")

HOST = torch.device("cpu")

Values = dict[str, Tensor]


@dataclass
class Fetched:
    """Pieces on their way to the device.

    Attributes:
        parts: The pieces; to be used after :meth:`take` only.
        ready: When they are there; None if they are.
    """

    parts: Values
    ready: Any = None

    def take(self) -> Values:
        """The pieces; what the device does from here on comes after their arrival."""
        if self.ready is not None and self.parts:
            device = next(iter(self.parts.values())).device
            torch.cuda.current_stream(device).wait_event(self.ready)
            self.ready = None
        return self.parts


class Pieces(dict[str, Tensor]):
    """A cell's stored tensors by name; what is in host memory and not here yet comes when it is asked for.

    Attributes:
        written: Names of what was changed.
    """

    def __init__(self, here: Values, bring: Callable[[str], Tensor]) -> None:
        super().__init__(here)
        self.written: set[str] = set()
        self._bring = bring

    def __missing__(self, name: str) -> Tensor:
        value = self[name] = self._bring(name)
        return value


@dataclass
class Lane:
    """The streams of one CUDA device.

    Attributes:
        inward: For what comes to the device.
        outward: For what goes to the host.
        written: When the last piece had arrived there.
        leaving: Pieces that may still be on their way to the host: their memory must not be used for others yet.
    """

    inward: Any
    outward: Any
    written: Any = None
    leaving: tuple[Tensor, ...] = ()


class Transfers:
    """Moves state between host and devices, for one optimizer."""

    #: Copy between CPU parameters and their state, too, as if they were on a device: the whole path without a GPU.
    COPY_ALWAYS: ClassVar[bool] = False

    def __init__(self) -> None:
        self._lanes: dict[torch.device, Lane] = {}
        self._pins = True

    def serves(self, device: torch.device) -> bool:
        """Whether parameters on such a device can have state elsewhere."""
        return device.type != "cpu" or self.COPY_ALWAYS

    def keep(self, value: Tensor, device: torch.device) -> Tensor:
        """A tensor in host memory as state of parameters on ``device``: contiguous, pinned if that helps and works."""
        value = value.to(HOST).contiguous()
        if device.type != "cuda" or not self._pins or value.is_pinned() or not value.numel():
            return value
        try:
            return value.pin_memory()
        except RuntimeError as error:
            self._pins = False
            log.warning(
                "host memory for optimizer state could not be pinned (%s); ordinary memory is used, from and to which "
                "copies are slower and hold up the host", error,
            )  # fmt: skip
            return value

    def begin(self, devices: set[torch.device]) -> None:
        """Before a step: what it fetches is what the last one wrote."""
        for device in devices & self._lanes.keys():
            lane = self._lanes[device]
            if lane.written is not None:
                lane.inward.wait_event(lane.written)

    def fetch(self, parts: Mapping[str, Tensor], device: torch.device) -> Fetched:
        """Begin to bring pieces of state to the device."""
        if device.type != "cuda" or not parts:
            return Fetched({name: part.to(device, copy=True) for name, part in parts.items()})
        lane = self._lane(device)
        # allocated on the computing stream, which may still be using the memory for what was there before
        into = {name: torch.empty(part.shape, dtype=part.dtype, device=device) for name, part in parts.items()}
        lane.inward.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(lane.inward):
            for name, part in parts.items():
                into[name].copy_(part, non_blocking=True)
        return Fetched(into, lane.inward.record_event())

    def store(self, parts: Mapping[str, Tensor], homes: Mapping[str, Tensor], device: torch.device) -> None:
        """Begin to write updated pieces (by name) back to where they live; takes no memory on the device."""
        if device.type != "cuda" or not homes:
            for name, home in homes.items():
                home.copy_(parts[name])
            return
        lane, current = self._lane(device), torch.cuda.current_stream(device)
        self._arrived(lane, current)
        lane.outward.wait_stream(current)
        with torch.cuda.stream(lane.outward):
            for name, home in homes.items():
                home.copy_(parts[name], non_blocking=True)
        lane.written = lane.outward.record_event()
        lane.leaving = tuple(parts[name] for name in homes)

    def finish(self) -> None:
        """After a step: give back the device memory of what has left, once it has."""
        for device, lane in self._lanes.items():
            self._arrived(lane, torch.cuda.current_stream(device))

    def wait(self) -> None:
        """Return when the state in host memory is what the last step made of it."""
        for lane in self._lanes.values():
            if lane.written is not None:
                lane.written.synchronize()

    @staticmethod
    def _arrived(lane: Lane, current: Any) -> None:
        """Let memory be used again that held what is on its way to the host: only after that has arrived."""
        if lane.leaving:
            current.wait_event(lane.written)
            lane.leaving = ()

    def _lane(self, device: torch.device) -> Lane:
        if device not in self._lanes:
            self._lanes[device] = Lane(torch.cuda.Stream(device), torch.cuda.Stream(device))
        return self._lanes[device]

    def try_fetch(self, parts: Mapping[str, Tensor], device: torch.device) -> Fetched | None:
        """:meth:`fetch` ahead of time; None if there is no memory for it now."""
        try:
            return self.fetch(parts, device)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            return None
