"""How many parameters are which part of an adapter, and which of them miss their counterpart."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from hina_optim.adapters.roles import Role, find_adapters, find_pairs, role_of

__all__ = ["diagnose_lora_pairing", "lokr_stats", "lora_stats"]

Shapes = Sequence[Sequence[int]]


def lora_stats(
    names: Sequence[str],
    shapes: Shapes,
    *,
    roles: Sequence[Role | None] | None = None,
    adapters: Sequence[Sequence[int]] | None = None,
) -> dict[str, int]:
    """Count the parameters of LoRA (and DoRA, which is LoRA with a magnitude).

    Args:
        names: Fully qualified names.
        shapes: Global shapes, as many.
        roles: Role of each parameter, where it is known otherwise than by name
            (:func:`~hina_optim.adapters.inference.infer_roles`).
        adapters: Indices of the parameters of each adapter; to be given together with ``roles``.

    Returns:
        ``lora_a_params`` and ``lora_b_params``, how many parameters are an A and a B, and ``lora_pairs``, how many
        adapters have both.

    Raises:
        ValueError: There are not as many shapes (or roles) as names.

    Examples:
        >>> lora_stats(["q.lora_A.weight", "v.lora_A.weight", "q.lora_B.weight"], [(4, 16), (4, 16), (16, 4)])
        {'lora_a_params': 2, 'lora_b_params': 1, 'lora_pairs': 1}
    """
    roles, adapters = _known(names, shapes, roles, adapters, "lora_stats")
    return {
        "lora_a_params": roles.count("lora_a"),
        "lora_b_params": roles.count("lora_b"),
        "lora_pairs": sum({"lora_a", "lora_b"} <= {roles[i] for i in adapter} for adapter in adapters),
    }


def lokr_stats(
    names: Sequence[str],
    shapes: Shapes,
    *,
    roles: Sequence[Role | None] | None = None,
    adapters: Sequence[Sequence[int]] | None = None,
) -> dict[str, int]:
    """Count the parameters of LoKr, whose change of a layer is the Kronecker product of ``w1`` and ``w2``.

    Args:
        names: Fully qualified names.
        shapes: Global shapes, as many.
        roles: As for :func:`lora_stats`.
        adapters: As for :func:`lora_stats`.

    Returns:
        ``lokr_w1_params`` and ``lokr_w2_params``, how many parameters make up a first and a second factor, whole or in
        halves, the core of a Tucker decomposition (``lokr_t2``) included; ``lokr_groups``, how many adapters have any
        of them; ``lokr_pairs``, how many of those have both factors.

    Raises:
        ValueError: There are not as many shapes (or roles) as names.

    Examples:
        >>> lokr_stats(["q.lokr_w1", "q.lokr_w2_a", "q.lokr_w2_b"], [(2, 2), (4, 1), (1, 4)])
        {'lokr_w1_params': 1, 'lokr_w2_params': 2, 'lokr_pairs': 1, 'lokr_groups': 1}
    """
    roles, adapters = _known(names, shapes, roles, adapters, "lokr_stats")
    factors = [_lokr_factor(role) for role in roles]
    present = [{factors[i] for i in adapter} - {None} for adapter in adapters]
    return {
        "lokr_w1_params": factors.count("w1"),
        "lokr_w2_params": factors.count("w2"),
        "lokr_pairs": sum(len(found) == 2 for found in present),
        "lokr_groups": sum(len(found) > 0 for found in present),
    }


def diagnose_lora_pairing(
    groups: Mapping[str, tuple[Sequence[str], Shapes]],
    *,
    roles: Sequence[Role | None] | None = None,
    adapters: Sequence[Sequence[int]] | None = None,
    pairs: Sequence[tuple[int, int]] | None = None,
) -> dict[str, Any]:
    """Which LoRA parameters have their counterpart, group by group.

    A and B are found wherever they are: LoRA+ puts them into different groups. A counterpart that is frozen, or that
    another optimizer has, is missing here.

    Args:
        groups: ``{name of the group: (names, shapes)}`` with fully qualified names and global shapes.
        roles: As for :func:`lora_stats`, of all groups one after the other.
        adapters: As for :func:`lora_stats`, indices into all groups one after the other.
        pairs: As :func:`~hina_optim.adapters.roles.find_pairs` gives them, likewise; to be given with ``roles``.

    Returns:
        ``total_groups`` and ``groups``. For each group: ``lora_a_count``, ``lora_b_count``; ``pairs_count``, pairs of
        which a half at least is here; ``unpaired_a`` and ``unpaired_b``, the names of those without counterpart;
        ``parameter_details``, for every parameter ``name``, ``shape``, ``role`` (or None), ``adapter`` (the same
        number for the parameters of one adapter, or None), ``partner`` (name of the other factor of the same product,
        of LoKr and LoHa too, or None).

    Raises:
        ValueError: A group has not as many shapes as names, or there are not as many roles as names.

    Examples:
        >>> a = (["q.lora_A.weight", "v.lora_A.weight"], [(4, 16), (4, 16)])
        >>> found = diagnose_lora_pairing({"decay": a, "lora_b": (["q.lora_B.weight"], [(16, 4)])})
        >>> found["groups"]["decay"]["pairs_count"], found["groups"]["decay"]["unpaired_a"]
        (1, ['v.lora_A.weight'])
    """
    owner = "diagnose_lora_pairing"
    names = [name for listed, _ in groups.values() for name in listed]
    shapes = [tuple(shape) for _, listed in groups.values() for shape in listed]
    for group, (listed, sizes) in groups.items():
        if len(listed) != len(sizes):
            raise ValueError(f"{owner}: group {group!r} has {len(listed)} names but {len(sizes)} shapes.")
    if pairs is None:
        pairs = [] if roles is not None else find_pairs(names, shapes)
    roles, adapters = _known(names, shapes, roles, adapters, owner)
    adapter_of = {i: number for number, adapter in enumerate(adapters) for i in adapter}
    partner = {i: j for pair in pairs for i, j in (pair, pair[::-1])}
    complete = {n for n, adapter in enumerate(adapters) if {"lora_a", "lora_b"} <= {roles[i] for i in adapter}}

    report: dict[str, Any] = {}
    start = 0
    for group, (listed, _) in groups.items():
        here = range(start, start + len(listed))
        start += len(listed)
        halves = [i for i in here if roles[i] in ("lora_a", "lora_b")]
        alone = [i for i in halves if adapter_of.get(i) not in complete]
        report[group] = {
            "lora_a_count": sum(roles[i] == "lora_a" for i in halves),
            "lora_b_count": sum(roles[i] == "lora_b" for i in halves),
            "pairs_count": len({adapter_of[i] for i in halves if i not in alone}),
            "unpaired_a": [names[i] for i in alone if roles[i] == "lora_a"],
            "unpaired_b": [names[i] for i in alone if roles[i] == "lora_b"],
            "parameter_details": [
                {
                    "name": names[i],
                    "shape": shapes[i],
                    "role": roles[i],
                    "adapter": adapter_of.get(i),
                    "partner": names[partner[i]] if i in partner else None,
                }
                for i in here
            ],
        }
    return {"total_groups": len(groups), "groups": report}


def _lokr_factor(role: Role | None) -> str | None:
    if role is None or not role.startswith("lokr_"):
        return None
    return "w1" if role.startswith("lokr_w1") else "w2"


def _known(
    names: Sequence[str],
    shapes: Shapes,
    roles: Sequence[Role | None] | None,
    adapters: Sequence[Sequence[int]] | None,
    owner: str,
) -> tuple[list[Role | None], Sequence[Sequence[int]]]:
    """Roles and adapters as given, else by name."""
    if len(names) != len(shapes):
        raise ValueError(f"{owner}: {len(names)} names but {len(shapes)} shapes; give one shape for each name.")
    if roles is None:
        known = [role_of(name, shape) for name, shape in zip(names, shapes, strict=True)]
        return known, find_adapters(names, shapes) if adapters is None else adapters
    if len(roles) != len(names):
        raise ValueError(f"{owner}: {len(names)} names but {len(roles)} roles; give one role (or None) for each name.")
    return list(roles), adapters or []
