"""Loading and saving of optimizer state: every dtype as it is, by name where names are known, all or nothing.

torch's own ``load_state_dict`` casts every state tensor to its parameter's dtype, which destroys int8 signs, float32
moments of bf16 parameters and 8-bit codes. This one checks everything first, then installs.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hina_optim.state.precision import Storage
from hina_optim.state.ranges import RangeCodec, codec_here
from hina_optim.state.signs import SignCodec

if TYPE_CHECKING:
    from hina_optim.engine.optimizer import HinaOptimizer

__all__ = ["describe", "load", "matching_groups", "unstacked"]

#: 2: state in 8 bits of flat partitions is in the blocks of the whole parameter; before, blocks began with a partition.
VERSION = 2


def describe(optimizer: HinaOptimizer) -> dict[str, Any]:
    """What a checkpoint says of itself: version, optimizer, names and shapes of the parameters, how many have state."""
    every = [p for _, _, p in optimizer._buckets.identities.places()]
    return {
        "version": VERSION,
        "optimizer": type(optimizer).__name__,
        "names": optimizer.param_names(),
        "named": all(names is not None for names in optimizer._names),
        "shapes": [list(optimizer._layout.shard(p).shape) for p in every],
        "kept": sum(bool(optimizer.state.get(p)) for p in every),
        "alone": optimizer._buckets.alone(),
        "told": optimizer._buckets.identities.told_names() if optimizer._buckets.identities.aliases else [],
        **optimizer.described(),
    }


def unstacked(state: Mapping[str, Any]) -> dict[str, Any]:
    """One parameter's state as tensors of its own: the pickle of a view carries its whole stack for every parameter."""
    return {k: v.clone() if isinstance(v, Tensor) and _is_view(v) else v for k, v in state.items()}


def _is_view(value: Tensor) -> bool:
    local: Tensor = value.to_local() if hasattr(value, "to_local") else value
    return local.untyped_storage().nbytes() > local.nbytes


def load(optimizer: HinaOptimizer, saved: Mapping[str, Any]) -> None:
    """Check a state dict against an optimizer, then install it.

    Raises:
        ValueError: What does not fit, by name; nothing has changed then.
    """
    owner = type(optimizer).__name__
    for part in ("state", "param_groups"):
        if part not in saved:
            raise ValueError(
                f"{owner}: the checkpoint has no {part!r}: it is truncated, or not an optimizer's state_dict."
            )
    about = saved.get("hina") or {}
    if about.get("version", VERSION) > VERSION:
        raise ValueError(
            f"{owner}: the checkpoint has format version {about['version']}; this library reads up to {VERSION}."
        )
    if about.get("optimizer", owner) != owner:
        raise ValueError(f"{owner}: the checkpoint was saved by {about['optimizer']}; build that optimizer to load it.")
    for key, value in optimizer.described().items():
        if about.get(key, value) != value:
            raise ValueError(f"{owner}: the checkpoint was saved with {key} {about[key]}, this optimizer has {value}.")
    if any(saved["state"].values()):  # accelerate loads nothing, before anyone can say where the parameters lie
        optimizer.settle_layout()
    indices, order = _match(optimizer, saved, about)
    params = [p for _, _, p in optimizer._buckets.identities.places()]
    names = optimizer.param_names()
    groups = _merged_groups(optimizer, [saved["param_groups"][at] for at in order])
    kept = sum(bool(entry) for entry in saved["state"].values())
    if kept < about.get("kept", 0):
        raise ValueError(
            f"{owner}: the checkpoint has the state of {kept} parameters, {about['kept']} had one when it was saved: "
            "it is truncated."
        )
    entries: dict[Tensor, dict[str, Any]] = {}
    for index, entry in saved["state"].items():
        if index not in indices:
            raise ValueError(
                f"{owner}: the checkpoint has state for a parameter {index!r} that no group names; it is damaged."
            )
        at = indices[index]
        if entry == {}:
            continue  # torch's state makes an empty entry for whoever only looks
        if not isinstance(entry, Mapping) or "step" not in entry:
            raise ValueError(
                f"{owner}: the state of {names[at]} has no 'step': it is truncated, or another optimizer's."
            )
        # what is here of it: a framework may hand over a whole tensor, or one that is cut otherwise
        entries[params[at]] = {
            k: optimizer._layout.unwrap(params[at], v) if isinstance(v, Tensor) else v for k, v in entry.items()
        }
    with _told(optimizer, about, indices):
        if about.get("version", VERSION) < 2:
            _refuse_other_blocks(optimizer, groups, entries)
        _pack_signs(optimizer, groups, entries)
        hosted = optimizer._buckets.check_loaded(groups, entries)
    _tell_precision(optimizer, groups)
    # it all fits; the old state goes before the new one comes, so that loading needs no more memory than training
    for group, options in zip(optimizer.param_groups, groups, strict=True):
        group.update(options)
    optimizer._buckets.clear()
    optimizer.state.clear()
    for param, entry in entries.items():
        optimizer.state[param] = _own(param, entry, hosted.get(param, set()))
    every = list(indices.values())
    optimizer._buckets.restore([every[at] for at in about.get("alone", ())])


def _tell_precision(optimizer: HinaOptimizer, groups: Sequence[dict[str, Any]]) -> None:
    """Say where state goes on in another precision than the one that the optimizer was built with."""
    for here, there in zip(optimizer.param_groups, groups, strict=True):
        built, saved = here["state_precision"], there.get("state_precision", here["state_precision"])
        if built != saved:
            optimizer._buckets._say(
                f"the checkpoint keeps state in {saved}, this optimizer was to keep it in {built}: it goes on in "
                f"{saved}, as the checkpoint's options say. set_state_precision({built!r}) converts it."
            )


def _pack_signs(
    optimizer: HinaOptimizer, groups: Sequence[dict[str, Any]], entries: Mapping[Tensor, dict[str, Any]]
) -> None:
    """Signs that were saved in a byte each where they share one now: so they were kept before they shared any."""
    for g, member in optimizer._buckets.identities.members(list(entries)):
        group, entry = {**optimizer.group(g), **groups[g]}, entries[member.param]
        local = tuple(optimizer._layout.local(member.param).shape)
        for slot in optimizer._buckets._recipe(group, member.info, member.param.dtype)[1]:
            have = entry.get(slot.name)
            if not isinstance(have, Tensor) or have.dtype != torch.int8 or tuple(have.shape) != local:
                continue
            codec = codec_here(slot, Storage.of(group), member.param.dtype, member.shard, local)
            if isinstance(codec, SignCodec):
                entry[slot.name] = codec.encode(have[None], None)[""][0]


def _refuse_other_blocks(
    optimizer: HinaOptimizer, groups: Sequence[dict[str, Any]], entries: Mapping[Tensor, dict[str, Any]]
) -> None:
    """Blocks that began where a flat partition does would be read as others."""
    for g, member in optimizer._buckets.identities.members(list(entries)):
        group, local = {**optimizer.group(g), **groups[g]}, tuple(optimizer._layout.local(member.param).shape)
        for slot in optimizer._buckets._recipe(group, member.info, member.param.dtype)[1]:
            codec = codec_here(slot, Storage.of(group), member.param.dtype, member.shard, local)
            if isinstance(codec, RangeCodec):
                raise ValueError(
                    f"{type(optimizer).__name__}: the checkpoint is of an earlier version, which kept {slot.name!r} of "
                    f"{member.name} in other 8-bit blocks in flat partitions (FSDP1, ZeRO): save it with that one "
                    "by hina_lightning.sharded_state.save, or in bf16 (set_state_precision)."
                )


@contextlib.contextmanager
def _told(optimizer: HinaOptimizer, about: Mapping[str, Any], indices: Mapping[Any, int]) -> Iterator[None]:
    """What the checkpoint says of the adapters among nameless parameters holds from here on, unless an error comes.

    The weights of a trained adapter no longer prove what those of a new one did.
    """
    who = optimizer._buckets.identities
    before = dict(who.aliases)
    told = about.get("told") or []
    positions = who.positions()
    if told:
        who.aliases = {
            positions[at]: name for at, name in zip(indices.values(), told, strict=True) if ".inferred" in name
        }
    try:
        yield
    except BaseException:
        who.aliases = before
        raise


def _match(
    optimizer: HinaOptimizer, saved: Mapping[str, Any], about: Mapping[str, Any]
) -> tuple[dict[Any, int], list[int]]:
    """Who is who: by name if both sides have names, else by order.

    Returns:
        Saved parameter index → place of the parameter here; and for every group here, the place of the saved one.
    """
    owner = type(optimizer).__name__
    here, there = optimizer.param_groups, saved["param_groups"]
    if not all(isinstance(group, Mapping) and "params" in group for group in there):
        raise ValueError(
            f"{owner}: a group of the checkpoint has no 'params': it is truncated, or not an optimizer's state_dict."
        )
    saved_indices = [i for group in there for i in group["params"]]
    for what in ("names", "shapes"):
        if what in about and len(about[what]) != len(saved_indices):
            raise ValueError(
                f"{owner}: the checkpoint has {what} of {len(about[what])} parameters, its groups hold "
                f"{len(saved_indices)}: it is truncated."
            )
    if len(here) != len(there):
        raise ValueError(f"{owner}: the checkpoint has {len(there)} groups, this optimizer {len(here)}.")
    if not all("start_lr" in group for group in there):
        raise ValueError(f"{owner}: the groups of the checkpoint have no 'start_lr': it is another optimizer's.")
    names = optimizer.param_names()
    order = list(range(len(here)))
    if about.get("named") and all(n is not None for n in optimizer._names):
        old = about["names"]
        missing, extra = sorted(set(names) - set(old)), sorted(set(old) - set(names))
        if missing or extra:
            raise ValueError(
                f"{owner}: the checkpoint is of another model: "
                f"{_some('it lacks', missing)}{_some('it has unknown', extra)}"
            )
        place = {name: at for at, name in enumerate(names)}
        match = {index: place[name] for index, name in zip(saved_indices, old, strict=True)}
        order = matching_groups(optimizer, there, match)
    else:
        counts, saved_counts = [len(optimizer._layout.params(g)) for g in here], [len(g["params"]) for g in there]
        if counts != saved_counts:
            raise ValueError(
                f"{owner}: the checkpoint has groups of {saved_counts} parameters, this optimizer of {counts}: another "
                "model, or other groups."
            )
        match = {index: at for at, index in enumerate(saved_indices)}
    shapes = about.get("shapes")
    every = [optimizer._layout.shard(p).shape for _, _, p in optimizer._buckets.identities.places()]
    if shapes is not None:
        for index, shape in zip(saved_indices, shapes, strict=True):
            at = match[index]
            if list(every[at]) != list(shape):
                raise ValueError(
                    f"{owner}: {names[at]} has shape {every[at]}, in the checkpoint {tuple(shape)}: another model."
                )
    return match, order


def matching_groups(optimizer: HinaOptimizer, there: Sequence[Any], match: Mapping[Any, int]) -> list[int]:
    """For every group here, the saved one with the same parameters: their options go together."""
    places = [frozenset(match[index] for index in group["params"]) for group in there]
    order, start = [], 0
    for g, group in enumerate(optimizer.param_groups):
        count = len(optimizer._layout.params(group))
        mine = frozenset(range(start, start + count))
        start += count
        if mine not in places:
            raise ValueError(
                f"{type(optimizer).__name__}: no group of the checkpoint holds the same parameters as group {g} "
                f"({group.get('name', 'unnamed')}) here, so whose options it should get is unknown: build the groups "
                "as they were."
            )
        order.append(places.index(mine))
    return order


def _some(words: str, names: list[str]) -> str:
    if not names:
        return ""
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return f"{words} {', '.join(names[:5])}{more}. "


def _merged_groups(optimizer: HinaOptimizer, saved: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Options of every group: the saved ones over those here, checked."""
    merged = []
    for here, there in zip(optimizer.param_groups, saved, strict=True):
        options = {
            k: (tuple(v) if isinstance(v, list) else copy.deepcopy(v))
            for k, v in there.items()
            if k not in ("params", "param_names")
        }
        optimizer.check_group({**here, **options})
        merged.append(options)
    return merged


def _own(param: Tensor, entry: Mapping[str, Any], hosted: Collection[str]) -> dict[str, Any]:
    """One parameter's state: on its device or the host, dtype as saved, not shared with the caller's tensors."""
    loaded: dict[str, Any] = {}
    for key, value in entry.items():
        if not isinstance(value, Tensor):
            loaded[key] = torch.tensor(float(value)) if key == "step" else value
        elif key == "step":
            loaded[key] = value.detach().to("cpu", torch.float32, copy=True).reshape(())
        else:
            # a zero that stands for a whole tensor stays with the parameter
            at_host = key in hosted and (value.ndim > 0 or param.ndim == 0)
            loaded[key] = value.detach().to("cpu" if at_host else param.device, copy=True)
    return loaded
