"""How and where an optimizer keeps its state: how much it is, in which precision, on which device."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch

from hina_optim import arguments as rule
from hina_optim.engine.everything import about_all

if TYPE_CHECKING:
    from hina_optim.engine.bookkeeping import Buckets
    from hina_optim.engine.transfers import Transfers

__all__ = ["Housing"]


class Housing:
    """The part of :class:`~hina_optim.engine.optimizer.HinaOptimizer` that is about the memory of its state."""

    if TYPE_CHECKING:
        RULES: ClassVar[dict[str, rule.Rule]]
        param_groups: list[dict[str, Any]]
        defaults: dict[str, Any]
        _buckets: Buckets
        _transfers: Transfers

        def check_group(self, group: dict[str, Any]) -> None:
            """From the optimizer."""

    @about_all
    def state_bytes(self, precision: str | None = None) -> int:
        """Bytes of optimizer state held now; with ``precision``, what they would be in that one.

        Args:
            precision: One of ``"fp32"``, ``"bf16"``, ``"8bit"``, ``"4bit"``, or None for what is.
        """
        return self._buckets.state_bytes(precision)

    @about_all
    def set_state_precision(self, precision: str) -> int:
        """Convert the state in place, one slot of one bucket at a time, and keep it so from now on.

        Args:
            precision: ``"fp32"``, ``"bf16"``, ``"8bit"`` or ``"4bit"``.

        Returns:
            Bytes given back (negative when the state grew).
        """
        rule.check(type(self).__name__, "state_precision", precision, self.RULES["state_precision"])
        before = self.state_bytes()
        with torch.no_grad():
            self._buckets.convert(precision)
        self.defaults["state_precision"] = precision
        return before - self.state_bytes()

    @about_all
    def change_options(self, changes: Sequence[Mapping[str, Any]]) -> None:
        """Set options of the groups, and convert the state that exists now, not at the next step.

        State of a technique that is switched off is dropped; one that is switched on begins afresh.

        Args:
            changes: One mapping for each group; empty for one that stays as it is.

        Raises:
            ValueError: An option is not what it must be. Nothing has changed then.
        """
        for group, options in zip(self.param_groups, changes, strict=True):
            self.check_group({**group, **options})
        with torch.no_grad():
            self._buckets.change(changes)

    @about_all
    def set_state_device(self, device: Literal["cpu"] | None) -> int:
        """Move the state of the parameters' shapes to host memory, or back to the parameters, and keep it there.

        From then on a step fetches it piece by piece and writes it back; what it computes stays the same, to the bit.

        Args:
            device: ``"cpu"``, or None for where the parameters are.

        Returns:
            Bytes that left the parameters' devices (negative when they came back); 0 for parameters on the CPU.
        """
        return self._rehouse("state_device", device)

    @about_all
    def set_anchor_device(self, device: Literal["cpu"] | None) -> int:
        """The same for the weights before the first update only, which some techniques keep."""
        return self._rehouse("anchor_device", device)

    def _rehouse(self, option: str, device: str | None) -> int:
        rule.check(type(self).__name__, option, device, rule.HOST_OR_NONE)
        before = self.host_state_bytes()
        with torch.no_grad():
            self._buckets.rehouse(option, device)
        self.defaults[option] = device
        return self.host_state_bytes() - before

    @about_all
    def host_state_bytes(self) -> int:
        """Bytes of state in host memory that belong to parameters on other devices; part of :meth:`state_bytes`."""
        return self._buckets.host_bytes()

    def wait_for_state(self) -> None:
        """Return when state in host memory is what the last step made of it.

        Everything here that reads state waits by itself; to be called before reading such tensors in ``state``.
        """
        self._transfers.wait()

    def scratch_bytes(self) -> int:
        """Bytes of temporary memory that the engine keeps between steps: none, they live inside a step only."""
        return 0

    def release_scratch(self) -> int:
        """Give back what the engine and the caching allocator of the device hold without need.

        Returns:
            Bytes given back to the device.
        """
        devices = {p.device for g in self.param_groups for p in g["params"] if p.device.type == "cuda"}
        before = sum(torch.cuda.memory_reserved(d) for d in devices)
        if devices:
            torch.cuda.empty_cache()
        return before - sum(torch.cuda.memory_reserved(d) for d in devices)
