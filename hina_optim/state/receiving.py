"""Portable state into an optimizer: checked, read box by box, converted where it is stored otherwise here, installed.

The other half of :mod:`hina_optim.state.portable`.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from torch import Tensor, nn

from hina_optim.state.checkpoint import matching_groups
from hina_optim.state.jobs import Job, Receiver
from hina_optim.state.plain import from_plain, to_plain
from hina_optim.state.portable import Metadata, members, names_of

if TYPE_CHECKING:
    from hina_optim.engine.optimizer import HinaOptimizer

__all__ = ["HOUSING", "Plan", "Source", "receiving"]

#: Options that say how this machine stores state and computes, not what is computed.
HOUSING = (
    "state_precision",
    "min_8bit_size",
    "force_8bit",
    "state_device",
    "anchor_device",
    "max_buffer_memory_mb",
    "compile",
)
#: Given by torch to every optimizer that was copied.
TORCHS = {"differentiable"}
#: Whose options of storage hold after a load: those of the optimizer that loads, or the saved ones.
Source = Literal["optimizer", "checkpoint"]


class Plan:
    """What has to be read, and how it is installed.

    Attributes:
        jobs: Of all parameters.
        notes: What is stored otherwise here than it was saved, in words.
    """

    def __init__(self, optimizer: HinaOptimizer, groups: list[dict[str, Any]], alone: list[int]) -> None:
        self.jobs: list[Job] = []
        self.conversions: Counter[tuple[str, str]] = Counter()
        self.notes: list[str] = []
        self._optimizer = optimizer
        self._groups = groups
        self._alone = alone
        self._before = [
            {key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups
        ]

    def release(self) -> None:
        """Let go of the state that is there: from here on the optimizer has none until :meth:`install`."""
        self._optimizer._buckets.clear()
        self._optimizer.state.clear()

    def install(self, entries: Mapping[Tensor, dict[str, Tensor]]) -> None:
        """Give the optimizer its options and state.

        Args:
            entries: For every parameter with state its stored tensors, as they lie here.

        Raises:
            ValueError: They do not fit. Nothing has changed then.
            torch.OutOfMemoryError: They cannot be stacked as a step wants them. The options are as they were then, and
                the optimizer has no state.
        """
        opt = self._optimizer
        opt._buckets.check_loaded(self._groups, entries)
        self.release()
        try:
            for group, options in zip(opt.param_groups, self._groups, strict=True):
                group.update(options)
            for param, entry in entries.items():
                opt.state[param] = dict(entry)
            opt._buckets.restore(self._alone)
        except BaseException:
            self.revert()
            raise

    def revert(self) -> None:
        """Take back what :meth:`install` did, because another rank could not: the options as before, and no state."""
        self.release()
        for group, options in zip(self._optimizer.param_groups, self._before, strict=True):
            for key in set(group) - set(options) - {"params"}:
                del group[key]
            group.update(options)


@contextlib.contextmanager
def receiving(
    optimizer: HinaOptimizer, metadata: Metadata, *, storage: Source = "optimizer", model: nn.Module | None = None
) -> Iterator[Plan]:
    """Check metadata against an optimizer, and plan what to read. Nothing changes before :meth:`Plan.install`.

    Args:
        optimizer: That is to get the state.
        metadata: Of :func:`~hina_optim.state.portable.export`; from a file, :func:`~hina_optim.state.schema.checked`.
        storage: Whose options say how state is stored.
        model: Gives parameters their names if the optimizer was given none.

    Raises:
        ValueError: The state of another optimizer or model, or of another version; says what does not fit.
    """
    owner = type(optimizer).__name__
    if metadata["optimizer"] != owner:
        raise ValueError(
            f"{owner}: the checkpoint was saved by {metadata['optimizer']}; build that optimizer to load it."
        )
    described, own = (
        from_plain(plain, "described")
        for plain in (metadata["described"], to_plain(optimizer.described(), "described"))
    )
    if not isinstance(described, dict):
        raise ValueError(f"{owner}: described is {str(described)[:80]!r}, expected names and values.")
    for key in {**own, **described}:
        saved, here = (told.get(key, "not told") for told in (described, own))
        if saved != here:
            raise ValueError(f"{owner}: the checkpoint was saved with {key} {saved}, this optimizer has {here}.")
    with optimizer.whole_groups():
        yield from _planned(optimizer, metadata, storage, model)


def _planned(optimizer: HinaOptimizer, metadata: Metadata, storage: Source, model: nn.Module | None) -> Iterator[Plan]:
    owner = type(optimizer).__name__
    optimizer.settle_layout()
    params = metadata["params"]
    here = members(optimizer)
    names, named = names_of(optimizer, here, model)
    places = _places(optimizer, metadata, names, named)
    who = optimizer._buckets.identities
    before, positions = dict(who.aliases), who.positions()
    try:
        told = {positions[places[at]]: entry["told"] for at, entry in enumerate(params) if "told" in entry}
        who.aliases = told or who.aliases
        groups = _groups(optimizer, metadata, places, storage)
        plan = Plan(optimizer, groups, sorted(places[at] for at, entry in enumerate(params) if entry.get("alone")))
        of = {at: index for index, at in enumerate(places)}
        for at, (g, member) in enumerate(members(optimizer)):
            entry = params[of[at]]
            if "slots" in entry:
                options = {**optimizer.group(g), **groups[g]}
                Receiver(owner, plan.jobs, plan.conversions, options, member, entry, names[at], optimizer).plan()
        plan.notes += [f"{old} becomes {new} ({count} ×)" for (old, new), count in sorted(plan.conversions.items())]
        if not (named and metadata["named"]):
            plan.notes.append("parameters are matched by their places in the groups, because they have no names")
        yield plan
    except BaseException:
        who.aliases = before
        raise


def _places(optimizer: HinaOptimizer, metadata: Metadata, names: list[str], named: bool) -> list[int]:
    """Place here of every saved parameter: by name if both sides have names, else by order."""
    owner, params = type(optimizer).__name__, metadata["params"]
    old = [entry["name"] for entry in params]
    if named and metadata["named"]:
        for words, odd in (("lacks", set(names) - set(old)), ("also has", set(old) - set(names))):
            if odd:
                some = ", ".join(sorted(odd)[:5]) + (f" and {len(odd) - 5} more" if len(odd) > 5 else "")
                raise ValueError(f"{owner}: the checkpoint is of another model: it {words} {some}.")
        of = {name: at for at, name in enumerate(names)}
        places = [of[name] for name in old]
    else:
        counts = [len(optimizer._layout.params(group)) for group in optimizer.param_groups]
        saved = [len(group["params"]) for group in metadata["groups"]]
        if counts != saved:
            raise ValueError(
                f"{owner}: the checkpoint has groups of {saved} parameters, this optimizer of {counts}: another "
                "model, or other groups."
            )
        places = list(range(len(params)))
    every = optimizer._buckets.identities.places()
    for at, entry in zip(places, params, strict=True):
        shape = optimizer._layout.shard(every[at][2]).shape
        if list(shape) != entry["shape"]:
            raise ValueError(
                f"{owner}: {names[at]} has shape {shape}, in the checkpoint {tuple(entry['shape'])}: another model."
            )
    return places


def _groups(
    optimizer: HinaOptimizer, metadata: Metadata, places: Sequence[int], storage: Source
) -> list[dict[str, Any]]:
    """Options of every group here: the saved ones, but for those of storage if they are to stay."""
    owner = type(optimizer).__name__
    saved = metadata["groups"]
    if len(saved) != len(optimizer.param_groups):
        raise ValueError(
            f"{owner}: the checkpoint has {len(saved)} groups, this optimizer {len(optimizer.param_groups)}."
        )
    order = matching_groups(optimizer, saved, dict(enumerate(places)))
    merged = []
    for g, (group, at) in enumerate(zip(optimizer.param_groups, order, strict=True)):
        title = group.get("name", g)
        told = saved[at]["options"]
        options = {key: from_plain(value, f"option {key} of group {title}") for key, value in told.items()}
        missing = sorted({*optimizer.defaults, "start_lr"} - set(options) - TORCHS)
        if missing:
            raise ValueError(
                f"{owner}: the options {', '.join(missing)} of group {title} are missing: the checkpoint is of another "
                "version of this optimizer."
            )
        if storage == "optimizer":
            options = {key: value for key, value in options.items() if key not in HOUSING}
        for key, value in options.items():
            if isinstance(value, Tensor) and isinstance(group.get(key), Tensor):
                options[key] = value.to(group[key].device)
        optimizer.check_group({**group, **options})
        merged.append(options)
    return merged
