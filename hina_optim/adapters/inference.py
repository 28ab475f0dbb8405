"""Roles of parameters that came without names: what shapes, order and initial zeros prove, and what they do not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from hina_optim.adapters.roles import Role

__all__ = ["Inferred", "Unknown", "infer_roles"]

Unknown = Literal["vector", "matrix", "product", "doubtful", "hidden"]

#: Why a role is not known, for the report.
_WHY: dict[Unknown, str] = {
    "vector": "one dimension or none: a bias, a norm's weight or a DoRA magnitude",
    "matrix": "no neighbor to form a low-rank product with: an ordinary weight, or a LoKr factor, whose shape proves "
    "nothing",
    "product": "by shape halves of a low-rank product, but not zero where a new LoRA or LoHa is: an adapter that was "
    "trained or initialized otherwise, a LoKr, or a bottleneck of the model",
    "doubtful": "these would pass for LoRA or LoHa, but other matrices of the list are all zero and belong to no such "
    "product, so zeros prove nothing here",
    "hidden": "the values are not here to be looked at (meta device, or not floating point)",
}

_REMEDY = "Pass model.named_parameters() instead of model.parameters(): names tell all of them."

#: The four matrices of a LoHa, in the order in which LyCORIS and OneTrainer register them.
_LOHA: tuple[Role, ...] = ("loha_w1_a", "loha_w1_b", "loha_w2_a", "loha_w2_b")

_FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Inferred:
    """What is known of parameters without names. Indices are places in the list that was given.

    Attributes:
        roles: The role of each parameter, None where it is not known.
        pairs: As :func:`~hina_optim.adapters.roles.find_pairs` gives them.
        adapters: As :func:`~hina_optim.adapters.roles.find_adapters` gives them.
        unknown: ``{reason: indices}`` of the parameters without a role. ``"product"`` and ``"doubtful"`` are the
            reasons that matter: these parameters may well be an adapter's.
    """

    roles: list[Role | None]
    pairs: list[tuple[int, int]] = field(default_factory=list)
    adapters: list[list[int]] = field(default_factory=list)
    unknown: dict[Unknown, list[int]] = field(default_factory=dict)

    @property
    def report(self) -> str:
        """What is not known, why, and what to do about it, in a few lines; empty where every role is known."""
        if not self.unknown:
            return ""
        known = sum(role is not None for role in self.roles)
        lines = [
            f"The parameters have no names. The adapter roles of {known} of {len(self.roles)} follow from shapes, "
            "order and initial zeros; those of the others do not:"
        ]
        for reason, places in self.unknown.items():
            shown = ", ".join(map(str, places[:8])) + (", …" if len(places) > 8 else "")
            lines.append(f"- {len(places)} (at {shown}): {_WHY[reason]}.")
        return "\n".join([*lines, _REMEDY])


def infer_roles(params: Sequence[Tensor]) -> Inferred:
    """Roles, pairs and adapters of parameters without names, as far as they can be proven.

    Proven is, in the order of the list:

    * **LoRA**: two consecutive tensors ``A`` of shape ``(r, in)`` or ``(r, in, *kernel)`` and ``B`` of shape
      ``(out, r)`` or ``(out, r, 1, …)`` with ``2·r <= in`` (times the kernel) and ``2·r <= out``, ``B`` all zeros
      and ``A`` not; an ``A`` of ``(r, r, *kernel)`` may be the core of a Tucker decomposition and proves nothing;
    * **LoHa** as LyCORIS and OneTrainer make it: four consecutive matrices ``(out, r)``, ``(r, in)``, ``(out, r)``,
      ``(r, in)``, as thin, of which the third alone is all zeros. (peft's has the fourth at zero, like a square LoKr.)

    Neighbors that share such an ``r`` form a run, and a run counts only if it consists of such adapters entirely: else
    it could be cut in more than one way. Where any other matrix of the list is all zeros (the mark of a LoKr, or of a
    model with an initialization of its own), zeros prove nothing, and no role is given. A bottleneck of two linear
    layers ``64 → 8 → 32`` is no LoRA, because its second matrix is not zero; if it is, and neither bias nor anything
    else stands between the two, it cannot be told from one.

    Not known, and not guessed, are LoKr, magnitudes of DoRA, adapters that were trained already (so call this when
    training begins, and keep the outcome for a resumed one), and adapters of which one half is in another list.

    Looks at values, once, and only if some shapes fit: one host sync, and for DTensors one all-reduce a mesh in which
    every rank must take part.

    Args:
        params: Parameters in the order in which their modules registered them. Shapes are global ones, as those of a
            DTensor are. A flat partition (FSDP1, ZeRO) has one dimension and tells nothing.

    Returns:
        Roles, pairs, adapters, and for all others the reason why nothing is known.

    Examples:
        >>> layer = torch.nn.Linear(64, 32)
        >>> a, b = torch.randn(4, 64), torch.zeros(32, 4)
        >>> found = infer_roles([layer.weight, layer.bias, a, b])
        >>> found.roles
        [None, None, 'lora_a', 'lora_b']
        >>> found.pairs, found.unknown
        ([(2, 3)], {'matrix': [0], 'vector': [1]})
    """
    shapes = [tuple(p.shape) for p in params]
    matrices = {i for i, shape in enumerate(shapes) if len(shape) > 1 and 0 not in shape}
    runs = _runs(shapes)
    hidden = {i for i in matrices if params[i].device.type == "meta" or params[i].dtype not in _FLOATS}
    seen = sorted(matrices - hidden) if runs else []
    zero = {i for i, is_zero in zip(seen, _all_zero([params[i] for i in seen]), strict=True) if is_zero}

    adapters: list[list[int]] = []
    for run in runs:
        if hidden.isdisjoint(run):
            adapters += _cut(run, shapes, zero)
    explained = {i for adapter in adapters for i in adapter}
    found = Inferred([None] * len(params))
    if zero <= explained:
        for adapter in adapters:
            _assign(found, adapter)
    in_runs = {i for run in runs for i in run}
    for i, role in enumerate(found.roles):
        if role is None:
            reason: Unknown = "matrix"
            if i not in matrices:
                reason = "vector"
            elif i in hidden:
                reason = "hidden"
            elif i in explained:
                reason = "doubtful"
            elif i in in_runs:
                reason = "product"
            found.unknown.setdefault(reason, []).append(i)
    return found


def _is_product(a: Sequence[int], b: Sequence[int]) -> bool:
    """Whether ``B·A`` is a low-rank product: ``A (r, in, …)``, ``B (out, r, 1, …)``, ``r`` well below the others."""
    if len(a) < 2 or len(b) < 2 or any(side != 1 for side in b[2:]) or 0 in (*a, *b):
        return False
    if len(a) > 2 and a[0] == a[1]:  # (r, r, *kernel) may be the core of a Tucker decomposition, and no A
        return False
    rank, columns, rows = a[0], torch.Size(a[1:]).numel(), b[0]
    return b[1] == rank and 2 * rank <= min(columns, rows)


def _runs(shapes: Sequence[tuple[int, ...]]) -> list[list[int]]:
    """Maximal runs of two or more consecutive tensors, neighbors being a low-rank product in one order or the other."""
    runs: list[list[int]] = []
    for i in range(1, len(shapes)):
        if _is_product(shapes[i - 1], shapes[i]) or _is_product(shapes[i], shapes[i - 1]):
            if runs and runs[-1][-1] == i - 1:
                runs[-1].append(i)
            else:
                runs.append([i - 1, i])
    return runs


def _cut(run: Sequence[int], shapes: Sequence[tuple[int, ...]], zero: set[int]) -> list[list[int]]:
    """The adapters that a run consists of; none if it is not made of complete ones from end to end.

    There is one way at most: a LoRA begins with two matrices of which the second is zero, a LoHa with two that are not.
    """
    adapters: list[list[int]] = []
    at = 0
    while at < len(run):
        pair, four = list(run[at : at + 2]), list(run[at : at + 4])
        if len(pair) == 2 and _is_product(*(shapes[i] for i in pair)) and [i in zero for i in pair] == [False, True]:
            adapters.append(pair)
        elif len(four) == 4 and _is_loha([shapes[i] for i in four]) and [i for i in four if i in zero] == four[2:3]:
            adapters.append(four)
        else:
            return []
        at += len(adapters[-1])
    return adapters


def _is_loha(shapes: Sequence[tuple[int, ...]]) -> bool:
    first, second = shapes[:2]
    return _is_product(second, first) and shapes[2:] == [first, second]


def _assign(found: Inferred, adapter: list[int]) -> None:
    roles: tuple[Role, ...] = ("lora_a", "lora_b") if len(adapter) == 2 else _LOHA
    for i, role in zip(adapter, roles, strict=True):
        found.roles[i] = role
    found.pairs.extend((adapter[at], adapter[at + 1]) for at in range(0, len(adapter), 2))
    found.adapters.append(adapter)


@torch.no_grad()
def _all_zero(params: Sequence[Tensor]) -> list[bool]:
    """Whether each tensor, over all its shards, is zero everywhere: one host sync a device."""
    places: dict[tuple[torch.device, Any], list[int]] = {}
    for i, p in enumerate(params):
        places.setdefault((p.device, getattr(p, "device_mesh", None)), []).append(i)
    answers = [False] * len(params)
    for (device, mesh), members in places.items():
        locals_: list[Any] = [params[i] if mesh is None else params[i].to_local() for i in members]  # type: ignore[attr-defined]
        marks = torch.zeros(len(members), device=device)  # 1 where something is not zero; NaN is not zero either
        filled = [k for k, local in enumerate(locals_) if local.numel()]  # a shard may be empty
        if filled:
            norms = torch._foreach_norm([locals_[k] for k in filled], float("inf"))
            marks[filled] = torch.stack([norm != 0 for norm in norms]).to(marks.dtype)
        if mesh is not None:
            from torch.distributed.tensor import DTensor, Partial

            marks = DTensor.from_local(marks, mesh, [Partial()] * mesh.ndim).full_tensor()
        for i, mark in zip(members, marks.tolist(), strict=True):
            answers[i] = mark == 0
    return answers
