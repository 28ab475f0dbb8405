"""Techniques that compare parameters with each other: gather their small states, refresh, put back.

Runs at the start of a step, at intervals, on small tensors only. What a step measured is digested at the next one's
start, so the outcome does not depend on whether the groups are stepped in one call or in several.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from hina_optim.engine.bucket import Bucket
from hina_optim.engine.rules import periodic
from hina_optim.techniques.base import PeriodicTechnique, Relations

__all__ = ["due", "measuring", "refresh"]


def measuring(bucket: Bucket) -> frozenset[str]:
    """Names of the techniques that measure in the bucket's next step: steps 1, 1 + interval and so on."""
    return frozenset(p.name for p in periodic(bucket.chain) if p.acts(bucket.step) and bucket.step % p.interval == 0)


def due(buckets: Iterable[Bucket]) -> dict[str, PeriodicTechnique]:
    """Techniques of which some bucket has measured in its last step.

    Refreshing again changes nothing until the next measurement. Only where every step measures, a group that comes
    after another in one round must not digest what that one has measured just now: it had its refresh then.
    """
    return {
        one.name: one
        for bucket in buckets
        if bucket.step > 0
        for one in periodic(bucket.chain)
        if (bucket.step - 1) % one.interval == 0
        and one.applies(bucket.info)
        and (one.interval > 1 or bucket.digested.get(one.name) != bucket.step)
    }


def refresh(name: str, buckets: Iterable[Bucket]) -> None:
    """Refresh one technique over all parameters that use it.

    Args:
        name: The technique.
        buckets: All buckets that have state, whether they step now or not.
    """
    using: list[tuple[Bucket, PeriodicTechnique]] = [
        (bucket, one)
        for bucket in buckets
        for one in periodic(bucket.chain)
        if one.name == name and one.applies(bucket.info)
    ]
    # state of fixed shape may still differ in size from parameter to parameter (Gram matrices): one population a size
    sizes: dict[tuple[tuple[int, ...], ...], list[tuple[Bucket, PeriodicTechnique]]] = {}
    for bucket, one in using:
        key = tuple(tuple(bucket.storage[slot].shape[1:]) for slot in one.population)
        sizes.setdefault(key, []).append((bucket, one))
    for members in sizes.values():
        _refresh_one_size(members)
    for bucket, _ in using:
        bucket.digested[name] = bucket.step


def _refresh_one_size(using: Sequence[tuple[Bucket, PeriodicTechnique]]) -> None:
    stacked = [m for bucket, _ in using for m in bucket.members]
    ranked = sorted(range(len(stacked)), key=lambda r: stacked[r].position)
    members = [stacked[r] for r in ranked]
    place = {m.position: at for at, m in enumerate(members)}
    first = using[0][1]
    home = using[0][0].key.device
    forward = torch.tensor(ranked, device=home)
    backward = torch.argsort(forward)
    states: dict[str, Tensor] = {
        slot: torch.cat([bucket.storage[slot].to(home) for bucket, _ in using])[forward] for slot in first.population
    }
    relations = Relations(
        torch.tensor([place.get(m.partner, -1) for m in members], device=home),
        torch.tensor([m.adapter for m in members], device=home),
    )
    infos = [m.info for m in members]
    # groups may differ in hyper-parameters: every distinct technique digests the whole population, its own buckets
    # take the outcome
    outcomes: list[tuple[PeriodicTechnique, dict[str, Tensor]]] = []
    for _, one in using:
        if not any(vars(one) == vars(other) for other, _ in outcomes):
            fresh = one.refresh(dict(states), infos, relations)
            outcomes.append((one, {slot: value[backward] for slot, value in fresh.items()}))
    # from here on nothing takes memory: all of it is written, or none
    at = 0
    for bucket, one in using:
        fresh = next(values for other, values in outcomes if vars(other) == vars(one))
        for slot, value in fresh.items():
            bucket.storage[slot].copy_(value[at : at + bucket.size])
        at += bucket.size
