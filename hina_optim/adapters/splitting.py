"""Groups for any optimizer: a model, named parameters or existing groups, split by decay, adapter role and regex."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from hina_optim import arguments as rule
from hina_optim.adapters.groups import ParameterGroup, Sorter, named_of, normalization_parameters

__all__ = ["adapter_groups"]

_OWNER = "adapter_groups"

#: Options that are learning rates: they keep their meaning when a group's rate is multiplied.
_RATES = ("lr", "min_lr", "max_lr", "lr_bump")

#: torch takes (name, parameter) pairs from here on.
_NAMED_PARAMETERS = torch.__version__ >= "2.6"


def adapter_groups(
    params: nn.Module | Iterable[tuple[str, nn.Parameter]] | Iterable[Mapping[str, Any]],
    *,
    lr: float,
    ratio: float | None = None,
    roles: Mapping[str, float] | None = None,
    lr_multipliers: Mapping[str, float] | None = None,
    **options: Any,
) -> list[dict[str, Any]]:
    """Parameter groups for adapters, to be given to any optimizer.

    Splits what is given, and never merges: by whether it decays (biases, norms, DoRA magnitudes and other vectors get
    ``weight_decay`` 0), by the factor of its role, and by the first regular expression that fits. Frozen parameters
    are left out, tied ones are there once, and no group is empty.

    Args:
        params: A model, ``(name, parameter)`` pairs, or groups whose ``"params"`` are such pairs. Options of a group
            (``lr``, ``weight_decay``, …) go to all its parts. Of pairs the norms are known by having one dimension.
        lr: Learning rate, >= 0, of what has no factor and no ``lr`` of its own.
        ratio: LoRA+ (arXiv 2402.12354): learning rate of every adapter's B (LoKr: w2) over that of A, > 0.
        roles: ``{role: factor}``, as for :func:`~hina_optim.adapters.groups.group_parameters`.
        lr_multipliers: ``{regex: factor}``, as for :func:`~hina_optim.adapters.groups.group_parameters`.
        **options: Go into every group that does not have them. ``min_lr``, ``max_lr`` and ``lr_bump`` are multiplied
            like ``lr``: give those that bound a masked rate where a factor would take the rate out of them.

    Returns:
        Groups with ``params`` (named pairs where this torch takes them), ``name``, ``lr`` and the options.
        ``weight_decay`` is 0 in those that do not decay, and only where it was given in the others. Names are
        ``decay``, ``no_decay``, ``lora_b``, … , with a factor by regex ``decay:x0.1:<regex>``; parts of a given group
        are called ``<its name>``, ``<its name>:no_decay``, ``<its name>:lora_b``, …

    Raises:
        ValueError: As :func:`~hina_optim.adapters.groups.group_parameters`; parameters came without names; a rate is
            not a finite number >= 0; two groups have the same name.

    Example:
        >>> model = nn.ModuleDict({"lora_A": nn.Linear(8, 2, bias=False), "lora_B": nn.Linear(2, 8, bias=False)})
        >>> for group in adapter_groups(model, lr=1e-4, ratio=16, weight_decay=0.01):
        ...     print(group["name"], f"{group['lr']:g}", group["weight_decay"])
        decay 0.0001 0.01
        lora_b 0.0016 0.01
    """
    rule.check(_OWNER, "lr", lr, rule.NON_NEGATIVE)
    what = type(params).__name__ if isinstance(params, nn.Module) else "the given parameters"
    sorter = Sorter(_OWNER, what, lr_multipliers=lr_multipliers, lora_ratio=ratio, roles=roles, ratio_name="ratio")
    made: list[dict[str, Any]] = []
    for given in _given(params):
        source = given.pop("params")
        norms = normalization_parameters(source) if isinstance(source, nn.Module) else frozenset()
        settings = {"lr": lr, **options, **given}
        prefix = settings.pop("name", None)
        rule.check(_OWNER, "lr" if prefix is None else f"lr of group {prefix!r}", settings["lr"], rule.NON_NEGATIVE)
        by_decay = prefix is None or settings.get("weight_decay") != 0
        made += [_options(group, prefix, settings) for group in sorter.sort(named_of(source), norms, by_decay=by_decay)]
    sorter.finish()
    return made


def _given(params: Any) -> list[dict[str, Any]]:
    """What was given as groups: one without a name, unless it came as groups."""
    if isinstance(params, nn.Module):
        return [{"params": params}]
    listed = list(params)
    if not listed or not isinstance(listed[0], Mapping):
        return [{"params": _pairs(listed)}]
    groups: list[dict[str, Any]] = []
    for i, one in enumerate(listed):
        group = {"name": f"group{i}", **one}
        group["params"] = _pairs(list(group["params"]))
        if any(group["name"] == other["name"] for other in groups):
            raise ValueError(f"{_OWNER}: two groups are called {group['name']!r}; give each a name of its own.")
        groups.append(group)
    return groups


def _pairs(listed: list[Any]) -> list[tuple[str, nn.Parameter]]:
    for one in listed:
        if not (isinstance(one, tuple) and len(one) == 2 and isinstance(one[0], str) and isinstance(one[1], Tensor)):
            raise ValueError(
                f"{_OWNER}: adapters are known by the names of their parameters, but a {type(one).__name__} came "
                "without one. Pass a model or model.named_parameters() instead of model.parameters()."
            )
    return listed


def _options(group: ParameterGroup, prefix: str | None, settings: Mapping[str, Any]) -> dict[str, Any]:
    """One group as an optimizer takes it."""
    name = group.name
    if prefix is not None:
        own = name.removeprefix("decay").removeprefix(":")
        name = f"{prefix}:{own}" if own else prefix
    scaled = {rate: settings[rate] * group.factor for rate in _RATES if rate in settings}
    decay = {} if group.decays else {"weight_decay": 0.0}
    members = group.params if _NAMED_PARAMETERS else [parameter for _, parameter in group.params]
    return {"params": members, "name": name, **settings, **scaled, **decay}
