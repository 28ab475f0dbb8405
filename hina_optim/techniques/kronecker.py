"""LoKr's rates: the factors of a Kronecker product slow each other down as they grow."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from hina_optim import arguments
from hina_optim.techniques.base import Flow, ParamInfo, PeriodicTechnique, Relations, Slot, Sums

__all__ = ["KroneckerRates"]

#: The two sides of the product: the whole factor, or what is multiplied to make it.
_SIDES = (
    ("lokr_w1", ("lokr_w1_a", "lokr_w1_b"), None),
    ("lokr_w2", ("lokr_w2_a", "lokr_w2_b"), "lokr_t2"),
)
_ROLES = frozenset(
    {"lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2"},
)

#: Norm of a factor that was never measured.
UNKNOWN = -1.0


class KroneckerRates(PeriodicTechnique):
    """Divide the rate of all factors of ``w1 ⊗ w2`` by what the size of the product calls for.

    A change of ``w1`` changes the product in proportion to ``‖w2‖``, and the other way round. With the norms over the
    whole factors, every ``interval`` steps, the same for every factor of one adapter::

        rate ← rate / (1 + strength · ‖w1‖ · ‖w2‖)

    A factor that is itself a product counts with the product of its parts' norms: ``‖w1_a‖·‖w1_b‖`` for ``w1``,
    ``‖w2_a‖·‖w2_b‖`` for ``w2``, times the norm of the Tucker core ``t2`` where there is one. That is an upper bound of
    the norm (it is never below it, and equal for rank 1), so the rate may end up lower than the exact norm would have
    it, never higher.

    The factor is 1 before the first measurement, for an adapter of which one side is not known (frozen, or its names
    are), and while one side is zero everywhere, as ``w2`` is at first. What a step measures is in force from the next
    one on. Needs the numbers of the adapters, which come from the parameters' names.

    State: two numbers a factor, float32. Norms beyond 1e19 count as unknown.

    Args:
        strength: Weight of the product of norms, per unit of it, >= 0. 0 leaves the technique out.
        interval: Steps from one measurement to the next, an integer >= 1.

    Raises:
        ValueError: An argument is not what is said above.

    Source: the original design's rule for LoKr; no paper. There it was for ``w1`` and ``w2`` alone.
    """

    name: ClassVar[str] = "lokr"
    reads: ClassVar[frozenset[str]] = frozenset({"rate"})
    writes: ClassVar[frozenset[str]] = frozenset({"rate"})
    sums_over: ClassVar[frozenset[str]] = frozenset({"param"})
    population: ClassVar[tuple[str, ...]] = ("lokr_norm", "lokr_rate")

    def __init__(self, strength: float = 0.3, interval: int = 10) -> None:
        arguments.check("KroneckerRates", "strength", strength, arguments.NON_NEGATIVE)
        arguments.check("KroneckerRates", "interval", interval, arguments.INTERVAL)
        self.strength = float(strength)
        self.interval = interval

    def applies(self, info: ParamInfo) -> bool:
        """LoKr's factors, unless the strength is 0."""
        return self.strength > 0 and info.role in _ROLES

    def measures(self, info: ParamInfo) -> bool:
        """The population is every factor of a LoKr adapter."""
        return self.applies(info)

    def slots(self, info: ParamInfo) -> tuple[Slot, ...]:
        """The norm as last measured, and the factor on the rate."""
        return (
            Slot("lokr_norm", shape=(), init=UNKNOWN, precision="fp32"),
            Slot("lokr_rate", shape=(), init=1.0, precision="fp32"),
        )

    def rate_factor(self, param: Tensor, state: Mapping[str, Tensor]) -> Tensor | float:
        """The factor in force."""
        return state.get("lokr_rate", 1.0)

    def transform(self, flow: Flow) -> None:
        """Scale the rate by the factor in force."""
        flow["rate"] = flow["rate"] * flow.per_param(flow.state["lokr_rate"])

    def sums(self, flow: Flow) -> Sums:
        """Squares of the weights."""
        return {"squares": flow["param"].square()}

    def settle(self, flow: Flow, totals: dict[str, Tensor]) -> None:
        """Keep the norm."""
        flow.new["lokr_norm"] = totals["squares"].sqrt().reshape(-1)

    def refresh(self, states: dict[str, Tensor], infos: list[ParamInfo], relations: Relations) -> dict[str, Tensor]:
        """One factor an adapter, from the norms of its parts."""
        norms = states["lokr_norm"]
        norms = torch.where((norms >= 0) & torch.isfinite(norms), norms, torch.nan)  # NaN: not known
        adapters = relations.adapters.to(norms.device)
        norms = torch.where(adapters >= 0, norms, torch.nan)
        numbers, group = adapters.unique(return_inverse=True)

        def of(role: str) -> tuple[Tensor, Tensor]:
            """Norm of an adapter's part of that role, NaN if not known; and whether the adapter has it."""
            members = [i for i, info in enumerate(infos) if info.role == role]
            where = torch.tensor(members, dtype=torch.int64, device=norms.device)
            found = norms.new_full((len(numbers),), torch.nan).index_put((group[where],), norms[where])
            has = torch.zeros_like(found, dtype=torch.bool).index_fill(0, group[where], True)
            return found, has

        product = norms.new_ones(len(numbers))
        for whole, (a, b), core in _SIDES:
            (norm, has), (first, _), (second, _) = of(whole), of(a), of(b)
            parts = first * second
            if core is not None:
                middle, has_core = of(core)
                parts = parts * torch.where(has_core, middle, 1)
            product = product * torch.where(has, norm, parts)
        rate = 1 / (1 + self.strength * product)
        return {"lokr_rate": torch.where(torch.isfinite(product), rate, 1)[group]}
