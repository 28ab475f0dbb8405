"""Names → optimizers: find them, list them, and build them from names, text, presets, configurations and arguments."""

from __future__ import annotations

import dataclasses
import difflib
import fnmatch
import re
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from hina_optim.arguments import nearest
from hina_optim.catalog import RECORDS, OptimizerInfo, Paper
from hina_optim.engine.optimizer import HinaOptimizer
from hina_optim.parsing import argument_types, parse_arguments
from hina_optim.presets import Preset
from hina_optim.profiles import profile_arguments

__all__ = [
    "OptimizerInfo",
    "Paper",
    "create_optimizer",
    "get_optimizer_info",
    "list_optimizers",
    "list_presets",
]


def _key(name: str) -> str:
    """What is left of a name without case, underscores and hyphens, and the name of the package before it."""
    return re.sub(r"[\s_-]", "", name.removeprefix("hina_optim.")).lower()


_BY_KEY = {_key(spelling): info for info in RECORDS for spelling in (info.name, *info.aliases)}


def create_optimizer(
    name: str,
    params_or_model: nn.Module | Iterable[Tensor] | Iterable[dict[str, Any]] | Iterable[tuple[str, Tensor]],
    *given: Any,
    preset: str | None = None,
    **arguments: Any,
) -> HinaOptimizer:
    """Build an optimizer by name.

    Args:
        name: As listed by :func:`list_optimizers`, or another spelling of it: any case, with or without underscores.
        params_or_model: A module, of which every parameter that requires grad is taken with its name; or parameters,
            named parameters or groups, as for any optimizer of torch.
        *given: Strings of the form ``"lr=1e-3"``, one argument each or several (see
            :func:`~hina_optim.parsing.parse_arguments`), ``"preset=lora"`` among them; mappings of arguments; and a
            configuration object, the same as ``config=``.
        preset: A set of arguments for a purpose; see :func:`list_presets`. It never sets the learning rate.
        **arguments: Of the class. These, and those in ``given``, override the preset. ``profile``
            (:data:`~hina_optim.profiles.PROFILES`) is understood for every optimizer: one that has no such argument of
            its own takes of the profile what it has.

    Raises:
        ValueError: No such optimizer, preset or profile (names the nearest), preset and profile together, a module
            without a parameter that requires grad, text that cannot be read, or an argument with a bad value.
        TypeError: An argument that the class does not have (names the nearest), or one that is given twice.

    Example:
        >>> import torch
        >>> model = torch.nn.Linear(4, 2)
        >>> optimizer = create_optimizer("HinaAdaptive", model, preset="language", lr=3e-4, warmup_steps=100)
        >>> optimizer.param_groups[0]["warmup_steps"], optimizer.param_groups[0]["lora_rank_penalty"]
        (100, True)
        >>> optimizer = create_optimizer("hina_adaptive", model, "lr=3e-4", "betas=(0.9, 0.99) use_tam=no")
        >>> optimizer.param_groups[0]["betas"], optimizer.param_groups[0]["use_tam"]
        ((0.9, 0.99), False)
    """
    info = get_optimizer_info(name)
    known = argument_types(info.cls)
    extra = {"preset": str | None, **({} if "profile" in known else {"profile": str | None})}
    parts: list[Mapping[str, Any]] = [parse_arguments(info.cls, _texts(info, given), extra)]
    for one in given:
        if isinstance(one, Mapping):
            parts.append(one)
        elif not isinstance(one, str):
            parts.append({"config": one})
    parts += [arguments, {} if preset is None else {"preset": preset}]
    merged: dict[str, Any] = {}
    for part in parts:
        for key, value in part.items():
            if key in merged:
                raise TypeError(f"{info.name}: {key} is given twice, as {merged[key]!r} and as {value!r}.")
            merged[key] = value
    chosen = merged.pop("preset", None)
    if chosen is not None and merged.get("profile") is not None:
        raise ValueError(
            f"{info.name}: preset={chosen!r} and profile={merged['profile']!r} are both given; choose one."
        )
    below: Mapping[str, Any] = {} if chosen is None else _preset(info, chosen).arguments
    if "profile" not in known and (profile := merged.pop("profile", None)) is not None:
        below = {key: value for key, value in profile_arguments(profile).items() if key in known}
    return info.cls(_params(params_or_model), **{**below, **merged})


def list_optimizers(filter: str | None = None) -> list[str]:
    """Names of all optimizers, sorted.

    Args:
        filter: A pattern for the name (``"hina*"``, case ignored) or a tag or capability (``"lora"``). None: all.
    """
    return sorted(
        info.name
        for info in RECORDS
        if filter is None
        or fnmatch.fnmatchcase(info.name.lower(), filter.lower())
        or filter in info.tags | info.capabilities
    )


def list_presets(optimizer: str | None = None) -> list[str]:
    """Names of all presets, sorted; of one optimizer, or of any.

    Raises:
        ValueError: No such optimizer.
    """
    records = RECORDS if optimizer is None else (get_optimizer_info(optimizer),)
    return sorted({preset.name for info in records for preset in info.presets})


def get_optimizer_info(name: str) -> OptimizerInfo:
    """The record of an optimizer, by any spelling of its name.

    Raises:
        ValueError: No such optimizer; names the nearest.
    """
    key = _key(str(name))
    if key in _BY_KEY:
        return _BY_KEY[key]
    near = difflib.get_close_matches(key, _BY_KEY, n=1, cutoff=0.6)
    hint = f"Did you mean {_BY_KEY[near[0]].name!r}?" if near else f"Known: {', '.join(list_optimizers())}."
    raise ValueError(f"There is no optimizer named {name!r}. {hint}")


def _texts(info: OptimizerInfo, given: Iterable[Any]) -> list[str]:
    """The strings among what was given; refuses what is no string, mapping or configuration object."""
    for one in given:
        if not isinstance(one, (str, Mapping)) and (not dataclasses.is_dataclass(one) or isinstance(one, type)):
            raise TypeError(
                f"{info.name}: {one!r} is neither text of the form name=value, nor a mapping of arguments, nor a "
                "configuration object."
            )
    texts = [one for one in given if isinstance(one, str)]
    for text in texts:
        if text.strip() in {preset.name for preset in info.presets}:
            raise ValueError(f"{info.name}: {text!r} is not of the form name=value; a preset is preset={text.strip()}.")
    return texts


def _preset(info: OptimizerInfo, name: str) -> Preset:
    for preset in info.presets:
        if preset.name == name:
            return preset
    known = [preset.name for preset in info.presets]
    if not known:
        raise ValueError(f"{info.name} has no preset named {name!r}: it has none.")
    raise ValueError(f"{info.name} has no preset named {name!r}. {nearest(str(name), known)}")


def _params(params_or_model: Any) -> Any:
    if not isinstance(params_or_model, nn.Module):
        return params_or_model
    named = [(name, p) for name, p in params_or_model.named_parameters() if p.requires_grad]
    if not named:
        raise ValueError(
            f"{type(params_or_model).__name__} has no parameter that requires grad: unfreeze what is to be trained, or "
            "add the adapter before the optimizer."
        )
    return named
