"""Loading and saving of optimizer state: every dtype as it is, by name where names are known, all or nothing.

torch's own ``load_state_dict`` casts every state tensor to its parameter's dtype, which destroys int8 signs, float32 moments of bf16
parameters and 8-bit codes. This one checks everything first, then installs.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from hina_optim.engine.optimizer import HinaOptimizer

__all__ = ["describe", "load"]

VERSION = 1


def describe(optimizer: HinaOptimizer) -> dict[str, Any]:
    """What a checkpoint says of itself: format version, optimizer, names and shapes of the parameters."""
    return {
        "version": VERSION,
        "optimizer": type(optimizer).__name__,
        "names": optimizer.param_names(),
        "named": all(names is not None for names in optimizer._names),
        "shapes": [list(p.shape) for group in optimizer.param_groups for p in group["params"]],
    }


def load(optimizer: HinaOptimizer, saved: Mapping[str, Any]) -> None:
    """Check a state dict against an optimizer, then install it.

    Raises:
        ValueError: What does not fit, by name; nothing has changed then.
    """
    owner = type(optimizer).__name__
    for part in ("state", "param_groups"):
        if part not in saved:
            raise ValueError(f"{owner}: the checkpoint has no {part!r}: it is truncated, or not an optimizer's state_dict.")
    about = saved.get("hina") or {}
    if about.get("version", VERSION) > VERSION:
        raise ValueError(f"{owner}: the checkpoint has format version {about['version']}; this library reads up to {VERSION}.")
    if about.get("optimizer", owner) != owner:
        raise ValueError(f"{owner}: the checkpoint was saved by {about['optimizer']}; build that optimizer to load it.")
    indices = _match(optimizer, saved, about)
    params = [p for group in optimizer.param_groups for p in group["params"]]
    names = optimizer.param_names()
    groups = _merged_groups(optimizer, saved["param_groups"])
    state: dict[Tensor, dict[str, Any]] = {}
    for index, entry in saved["state"].items():
        if index not in indices:
            raise ValueError(f"{owner}: the checkpoint has state for a parameter {index!r} that no group names; it is damaged.")
        at = indices[index]
        state[params[at]] = _entry(owner, names[at], params[at], entry)
    optimizer._buckets.check_loaded(groups, state)
    # from here on nothing can fail
    for group, options in zip(optimizer.param_groups, groups, strict=True):
        group.update(options)
    optimizer.state.clear()
    optimizer.state.update(state)


def _match(optimizer: HinaOptimizer, saved: Mapping[str, Any], about: Mapping[str, Any]) -> dict[Any, int]:
    """Saved parameter index → place of the parameter here: by name if both sides have names, else by order."""
    owner = type(optimizer).__name__
    here, there = optimizer.param_groups, saved["param_groups"]
    saved_indices = [i for group in there for i in group["params"]]
    names = optimizer.param_names()
    if about.get("named") and all(n is not None for n in optimizer._names):
        old = about["names"]
        missing, extra = sorted(set(names) - set(old)), sorted(set(old) - set(names))
        if missing or extra:
            raise ValueError(
                f"{owner}: the checkpoint is of another model: {_some('it lacks', missing)}{_some('it has unknown', extra)}"
            )
        place = {name: at for at, name in enumerate(names)}
        match = {index: place[name] for index, name in zip(saved_indices, old, strict=True)}
    else:
        counts, saved_counts = [len(g["params"]) for g in here], [len(g["params"]) for g in there]
        if counts != saved_counts:
            raise ValueError(
                f"{owner}: the checkpoint has groups of {saved_counts} parameters, this optimizer of {counts}: another "
                "model, or other groups."
            )
        match = {index: at for at, index in enumerate(saved_indices)}
    if len(here) != len(there):
        raise ValueError(f"{owner}: the checkpoint has {len(there)} groups, this optimizer {len(here)}.")
    shapes = about.get("shapes")
    every = [p for group in here for p in group["params"]]
    if shapes is not None:
        for index, shape in zip(saved_indices, shapes, strict=True):
            at = match[index]
            if list(every[at].shape) != list(shape):
                raise ValueError(
                    f"{owner}: {names[at]} has shape {tuple(every[at].shape)}, in the checkpoint {tuple(shape)}: another model."
                )
    return match


def _some(words: str, names: list[str]) -> str:
    if not names:
        return ""
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return f"{words} {', '.join(names[:5])}{more}. "


def _merged_groups(optimizer: HinaOptimizer, saved: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Options of every group: the saved ones over those here, checked."""
    merged = []
    for here, there in zip(optimizer.param_groups, saved, strict=True):
        options = {k: (tuple(v) if isinstance(v, list) else v) for k, v in there.items() if k not in ("params", "param_names")}
        optimizer.check_group({**here, **options})
        merged.append(options)
    return merged


def _entry(owner: str, name: str, param: Tensor, entry: Mapping[str, Any]) -> dict[str, Any]:
    """One parameter's state: on its device, dtype as saved, not shared with the caller's tensors."""
    if not isinstance(entry, Mapping) or "step" not in entry:
        raise ValueError(f"{owner}: the state of {name} has no 'step': it is truncated, or another optimizer's.")
    loaded: dict[str, Any] = {}
    for key, value in entry.items():
        if not isinstance(value, Tensor):
            loaded[key] = torch.tensor(float(value)) if key == "step" else value
        elif key == "step":
            loaded[key] = value.detach().to("cpu", torch.float32, copy=True).reshape(())
        else:
            loaded[key] = value.detach().to(param.device, copy=True)
    return loaded
