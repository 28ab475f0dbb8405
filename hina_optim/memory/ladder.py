"""What an optimizer gives up for memory, one rung after another, the one that costs least quality first.

A rung says how many bytes it will save before it acts, and the ladder measures how many it did save. New ways to save
(anchors on the host, 8-bit moments, 8-bit masks, moments and masks on the host, simplifications) are further rungs:
subclass :class:`Rung` and put it at its place in :data:`LADDER`.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar, Protocol, TypedDict

import torch
from torch import Tensor

from hina_optim import arguments as rule
from hina_optim.memory.probes import GIB

__all__ = [
    "LADDER",
    "Action",
    "Rung",
    "Saver",
    "VramReport",
    "as_size",
    "optimize_for_vram",
    "plan_for_vram",
    "used_bytes",
]

logger = logging.getLogger("hina_optim")


class Saver(Protocol):
    """What the ladder needs of an optimizer."""

    param_groups: list[dict[str, Any]]

    @property
    def state(self) -> Any:
        """``{parameter: {name: tensor}}``."""

    def state_bytes(self, precision: str | None = None) -> int:
        """Bytes of state held now; with a precision, of all state that there will be, if stored in that one."""

    def set_state_precision(self, precision: str) -> int:
        """Convert the state that exists, and keep what is yet to come in this precision."""

    def scratch_bytes(self) -> int:
        """Bytes that the engine holds between steps for its own use."""

    def release_scratch(self) -> int:
        """Give them back; returns how many there were."""


class Action(TypedDict):
    """One rung that was taken, or that a plan would take."""

    rung: str
    bytes_predicted: int
    bytes_saved: int
    cost: str


class VramReport(TypedDict):
    """What :func:`optimize_for_vram` did, or what :func:`plan_for_vram` expects.

    ``bytes_saved`` of an action is measured; in a plan it is 0 and ``used_bytes_after`` is a prediction. ``message``
    says what a reader must know, and is empty where there is nothing to say.
    """

    target_vram_gb: float
    used_bytes_before: int
    used_bytes_after: int
    reached: bool
    actions: list[Action]
    dry_run: bool
    message: str


class Rung(ABC):
    """One way to save memory.

    Attributes:
        name: Its name in reports and logs.
        cost: What is paid for the bytes, in words.
    """

    name: ClassVar[str]
    cost: ClassVar[str]

    @abstractmethod
    def applicable(self, optimizer: Saver) -> bool:
        """Whether there is anything left to save this way, and the options of the optimizer allow it."""

    @abstractmethod
    def predict(self, optimizer: Saver) -> int:
        """Bytes that it would save, as the optimizer stands. Changes nothing."""

    @abstractmethod
    def act(self, optimizer: Saver) -> None:
        """Save them."""

    def apply(self, optimizer: Saver) -> int:
        """Save them, and return how many bytes were saved: :func:`used_bytes` before less after."""
        before = used_bytes(optimizer)
        self.act(optimizer)
        return before - used_bytes(optimizer)


class ReleaseScratch(Rung):
    """Give back the memory that the engine keeps for intermediate results."""

    name = "scratch"
    cost = "no quality; the next step allocates again what it needs"

    def applicable(self, optimizer: Saver) -> bool:
        """Whether the engine holds any."""
        return optimizer.scratch_bytes() > 0

    def predict(self, optimizer: Saver) -> int:
        """All of it."""
        return optimizer.scratch_bytes()

    def act(self, optimizer: Saver) -> None:
        """Release it."""
        optimizer.release_scratch()


class StateToBf16(Rung):
    """Store in bf16 what is stored in fp32, where the technique that keeps it tolerates that."""

    name = "bf16"
    cost = "state keeps 8 significant bits instead of 24, rounded stochastically"

    def applicable(self, optimizer: Saver) -> bool:
        """Whether any group still keeps fp32."""
        return any(group["state_precision"] == "fp32" for group in optimizer.param_groups)

    def predict(self, optimizer: Saver) -> int:
        """All state in fp32 less all state in bf16; exact once every trainable parameter has its state."""
        return optimizer.state_bytes(precision="fp32") - optimizer.state_bytes(precision="bf16")

    def act(self, optimizer: Saver) -> None:
        """Convert."""
        optimizer.set_state_precision("bf16")


#: All rungs, the cheapest in quality first. A walk takes them in this order and stops as soon as the target is reached.
LADDER: tuple[Rung, ...] = (ReleaseScratch(), StateToBf16())


def optimize_for_vram(optimizer: Saver, target_vram_gb: float, ladder: Sequence[Rung] = LADDER) -> VramReport:
    """Give memory back until at most ``target_vram_gb`` is in use, and no further.

    Existing state is converted; momentum and all that was learned is kept. Every action is logged at level INFO by the
    logger ``hina_optim``, with its bytes; a target that cannot be reached at level WARNING, with what else could help.

    Args:
        optimizer: Changed in place. Nothing happens if it was built with ``memory_efficient=False``.
        target_vram_gb: GiB (2³⁰ bytes) that :func:`used_bytes` is to come down to.
        ladder: The rungs to take.

    Raises:
        ValueError: The target is not a finite number > 0.
    """
    return _walk(optimizer, target_vram_gb, ladder, dry_run=False)


def plan_for_vram(optimizer: Saver, target_vram_gb: float, ladder: Sequence[Rung] = LADDER) -> VramReport:
    """What :func:`optimize_for_vram` would do; changes nothing and logs nothing."""
    return _walk(optimizer, target_vram_gb, ladder, dry_run=True)


def used_bytes(optimizer: Saver) -> int:
    """Memory in use that counts against a target.

    With parameters on CUDA devices: what PyTorch has allocated on the fullest of them, whoever asked for it. Elsewhere:
    what the optimizer can see, which is parameters, gradients, state and its scratch. Before the first step the state
    that it will allocate is counted already, so that a target can be met before training begins.
    """
    state = optimizer.state_bytes()
    pending = 0
    if not state:
        pending = max(optimizer.state_bytes(p) for p in {group["state_precision"] for group in optimizer.param_groups})
    devices = {p.device for p in _parameters(optimizer) if p.is_cuda}
    if devices:
        return max(torch.cuda.memory_allocated(device) for device in devices) + pending
    return _parameter_bytes(optimizer) + _gradient_bytes(optimizer) + state + pending + optimizer.scratch_bytes()


def as_size(number: int) -> str:
    """Bytes as a person reads them: ``"1.50 GiB"``, ``"12.3 MiB"``, ``"640 bytes"``."""
    for unit, size in (("GiB", GIB), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if abs(number) >= size:
            return f"{number / size:.3g} {unit}"
    return f"{number} bytes"


def _walk(optimizer: Saver, target_vram_gb: float, ladder: Sequence[Rung], dry_run: bool) -> VramReport:
    rule.check("plan_for_vram" if dry_run else "optimize_for_vram", "target_vram_gb", target_vram_gb, rule.POSITIVE)
    target = int(target_vram_gb * GIB)
    before = used = used_bytes(optimizer)
    actions: list[Action] = []
    message = ""
    enabled = all(group.get("memory_efficient", True) for group in optimizer.param_groups)
    for rung in ladder if enabled else ():
        if used <= target:
            break
        if not rung.applicable(optimizer):
            continue
        predicted = rung.predict(optimizer)
        if predicted <= 0:
            continue
        saved = 0 if dry_run else rung.apply(optimizer)
        used = used - predicted if dry_run else used_bytes(optimizer)
        actions.append(Action(rung=rung.name, bytes_predicted=predicted, bytes_saved=saved, cost=rung.cost))
        if not dry_run:
            logger.info(
                "optimize_for_vram: %s saved %s (%d bytes; predicted %d). Cost: %s.",
                rung.name, as_size(saved), saved, predicted, rung.cost,
            )  # fmt: skip
    if not enabled:
        message = "Nothing was done: the optimizer was built with memory_efficient=False."
        if not dry_run:
            logger.info("optimize_for_vram: %s", message)
    elif used > target:
        message = _what_else(optimizer, used, target)
        if not dry_run:
            logger.warning("optimize_for_vram: %s", message)
    return VramReport(
        target_vram_gb=float(target_vram_gb),
        used_bytes_before=before,
        used_bytes_after=used,
        reached=used <= target,
        actions=actions,
        dry_run=dry_run,
        message=message,
    )


def _what_else(optimizer: Saver, used: int, target: int) -> str:
    """Why the target is out of reach, and what the user can do that the optimizer cannot."""
    kinds: Counter[str] = Counter()
    for name, x in _state_tensors(optimizer):
        kinds[name] += _bytes(x)
    largest = ", ".join(f"{name} {as_size(size)}" for name, size in kinds.most_common(4)) or "none allocated yet"
    return (
        f"The target of {as_size(target)} is out of reach: {as_size(used)} are in use, {as_size(used - target)} too "
        f"many, and the optimizer has nothing more to give. Parameters take {as_size(_parameter_bytes(optimizer))}, "
        f"gradients {as_size(_gradient_bytes(optimizer))}, optimizer state: {largest}. Use a smaller batch or shorter "
        "sequences, gradient checkpointing, fewer trainable parameters (an adapter, or a lower rank), parameters in "
        "bf16, or switch off a technique that keeps the state named here."
    )


def _parameters(optimizer: Saver) -> Iterator[Tensor]:
    for group in optimizer.param_groups:
        yield from group["params"]


def _state_tensors(optimizer: Saver) -> Iterator[tuple[str, Tensor]]:
    for p in _parameters(optimizer):
        for name, x in optimizer.state.get(p, {}).items():
            if isinstance(x, Tensor):
                yield name, x


def _parameter_bytes(optimizer: Saver) -> int:
    return sum(_bytes(p) for p in _parameters(optimizer))


def _gradient_bytes(optimizer: Saver) -> int:
    return sum(_bytes(p.grad) for p in _parameters(optimizer) if p.grad is not None)


def _bytes(x: Tensor) -> int:
    return x.numel() * x.element_size()
