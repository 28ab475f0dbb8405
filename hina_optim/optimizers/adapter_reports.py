"""What an optimizer tells about the adapters among its parameters."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from hina_optim.adapters import diagnose_lora_pairing, lokr_stats, lora_stats
from hina_optim.engine.everything import about_all

if TYPE_CHECKING:
    from hina_optim.engine.bookkeeping import Buckets
    from hina_optim.engine.layout import Layout

__all__ = ["AdapterReports"]


class AdapterReports:
    """Methods about the factors of adapters; mixed into the named optimizers.

    Roles are read from names; of parameters without names they are known as far as shapes, order and initial zeros
    proved them when the group was added (:func:`hina_optim.adapters.infer_roles`).
    """

    if TYPE_CHECKING:
        param_groups: list[dict[str, Any]]
        _buckets: Buckets
        _layout: Layout

        def _groups(self) -> Iterator[tuple[str, dict[str, Any]]]:
            """From the inspection of rates."""

    @about_all
    def diagnose_lora_pairing(self) -> dict[str, Any]:
        """Which LoRA parameters have their counterpart, group by group.

        Returns:
            As :func:`hina_optim.adapters.diagnose_lora_pairing`; and ``report``, in plain words what is not known of
            parameters without names, empty where every role is known.
        """
        names, shapes = self._adapter_names()
        groups: dict[str, tuple[list[str], list[tuple[int, ...]]]] = {}
        start = 0
        for name, group in self._groups():
            stop = start + len(self._layout.params(group))
            groups[name] = (names[start:stop], shapes[start:stop])
            start = stop
        return {**diagnose_lora_pairing(groups), "report": "\n".join(self._buckets.identities.unknown_roles.values())}

    def _adapter_stats(self) -> dict[str, dict[str, int]]:
        names, shapes = self._adapter_names()
        return {"lora_stats": lora_stats(names, shapes), "lokr_stats": lokr_stats(names, shapes)}

    def _adapter_names(self) -> tuple[list[str], list[tuple[int, ...]]]:
        """A name that tells the role, and the global shape, of every parameter."""
        params = [p for group in self.param_groups for p in self._layout.params(group)]
        return self._buckets.identities.told_names(), [self._layout.shard(p).shape for p in params]
