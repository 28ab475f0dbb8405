"""What is in use, and whether any rank is short of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from hina_optim.engine import sizes
from hina_optim.memory.probes import GIB

__all__ = [
    "Saver",
    "any_rank",
    "as_size",
    "expected_bytes",
    "gradient_bytes",
    "largest_state",
    "most_of_ranks",
    "parameter_bytes",
    "pending_bytes",
    "used_bytes",
]


class Saver(Protocol):
    """What the ladder needs of an optimizer."""

    param_groups: list[dict[str, Any]]
    defaults: dict[str, Any]

    @property
    def state(self) -> Any:
        """``{parameter: {name: tensor}}``."""

    def state_bytes(self, precision: str | None = None) -> int:
        """Bytes of state held now; with a precision, of all state that there will be, if stored in that one."""

    def change_options(self, changes: Sequence[Mapping[str, Any]]) -> None:
        """Set options of the groups, and convert the state that exists."""

    def agree(self, here: bool) -> bool:
        """Whether it is so on any rank."""

    def scratch_bytes(self) -> int:
        """Bytes that the engine holds between steps for its own use."""

    def release_scratch(self) -> int:
        """Give them back; returns how many there were."""


def used_bytes(optimizer: Saver) -> int:
    """Memory in use that counts against a target.

    With parameters on CUDA devices: what PyTorch has allocated on the fullest of them, whoever asked for it. Elsewhere:
    what the optimizer can see, which is parameters, gradients, state (but for what it keeps in host memory for
    parameters elsewhere) and its scratch. Before the first step the state
    that it will allocate is counted already, so that a target can be met before training begins.
    """
    pending = pending_bytes(optimizer)
    devices = {p.device for p in _parameters(optimizer) if p.is_cuda}
    if devices:
        return max(torch.cuda.memory_allocated(device) for device in devices) + pending
    held = optimizer.state_bytes() - _hosted_bytes(optimizer) + optimizer.scratch_bytes()
    return parameter_bytes(optimizer) + gradient_bytes(optimizer) + held + pending


def pending_bytes(optimizer: Saver) -> int:
    """State that the first step will allocate; 0 once there is any."""
    if optimizer.state_bytes():
        return 0
    # of what is here, without asking other ranks: one of them may have its state already
    return sizes.state_bytes(sizes.kept(optimizer, zero=sizes.zero_here(optimizer)), on_device=True)  # type: ignore[arg-type]


def expected_bytes(optimizer: Saver) -> int:
    """What the first step will need beside what is there: gradients, state, and the engine's temporary memory."""
    every = sizes.kept(optimizer)  # type: ignore[arg-type]
    gradients = sum(_bytes(one.param) for one in every if one.param.grad is None)
    temporary = sizes.temporary_bytes(every, [one.local_shape for one in every])
    return gradients + temporary + (0 if optimizer.state_bytes() else sizes.state_bytes(every, on_device=True))


def any_rank(optimizer: Saver, here: bool) -> bool:
    """Whether it is so on any rank; without other processes, whether it is so here. All ranks must ask."""
    if _several_processes():
        return most_of_ranks(optimizer, int(here))[0] > 0
    return optimizer.agree(here)


def most_of_ranks(optimizer: Saver, *numbers: int) -> list[int]:
    """The largest of all ranks' numbers, for each of several. All ranks must ask."""
    if not _several_processes():
        return list(numbers)
    home = next((p.device for p in _parameters(optimizer) if p.device.type not in ("cpu", "meta")), None)
    if home is None and "nccl" in torch.distributed.get_backend() and torch.cuda.is_available():
        home = torch.device("cuda", torch.cuda.current_device())
    shared = torch.tensor(numbers, dtype=torch.int64, device=home or "cpu")
    torch.distributed.all_reduce(shared, torch.distributed.ReduceOp.MAX)
    largest: list[int] = shared.tolist()
    return largest


def as_size(number: int) -> str:
    """Bytes as a person reads them: ``"1.50 GiB"``, ``"12.3 MiB"``, ``"640 bytes"``."""
    for unit, size in (("GiB", GIB), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if abs(number) >= size:
            return f"{number / size:{'.3g' if abs(number) < 999.5 * size else '.0f'}} {unit}"
    return f"{number} bytes"


def largest_state(optimizer: Saver, count: int = 4) -> list[tuple[str, int]]:
    """The state names that take most, with their bytes."""
    kinds: Counter[str] = Counter()
    for p in _parameters(optimizer):
        for name, x in optimizer.state.get(p, {}).items():
            if isinstance(x, Tensor):
                kinds[name] += _bytes(x)
    return kinds.most_common(count)


def parameter_bytes(optimizer: Saver) -> int:
    """Bytes of the parameters that it has."""
    return sum(_bytes(p) for p in _parameters(optimizer))


def gradient_bytes(optimizer: Saver) -> int:
    """Bytes of the gradients that they have now."""
    return sum(_bytes(p.grad) for p in _parameters(optimizer) if p.grad is not None)


def _hosted_bytes(optimizer: Saver) -> int:
    """State in host memory of parameters elsewhere; ``step``, which always is there, counts as with them."""
    return sum(
        _bytes(x)
        for p in _parameters(optimizer)
        if p.device.type != "cpu"
        for name, x in optimizer.state.get(p, {}).items()
        if name != "step" and isinstance(x, Tensor) and x.device.type == "cpu"
    )


def _several_processes() -> bool:
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    return distributed and torch.distributed.get_world_size() > 1


def _parameters(optimizer: Saver) -> Iterator[Tensor]:
    for group in optimizer.param_groups:
        yield from group["params"]


def _bytes(x: Tensor) -> int:
    """Of what is here of it."""
    here: Tensor = x.to_local() if hasattr(x, "to_local") else x
    return here.numel() * here.element_size()
