"""Which place in the optimizer's groups a parameter had before an engine laid it flat."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

from hina_optim.engine.fragments import FlatLayout
from hina_optim.engine.optimizer import HinaOptimizer
from hina_optim.state.names import plain_name

__all__ = ["places_of"]

Shape = tuple[int, ...]


def places_of(optimizer: HinaOptimizer, group: int, names: Sequence[str], shapes: Sequence[Shape]) -> list[int]:
    """Places of parameters in a group as the optimizer was built with, from what it remembers of them.

    Engines leave out what they do not train (frozen parameters), so a count alone says nothing. Names do, and where the
    optimizer was given none or others, the shapes, if they fit in one way only.

    Args:
        optimizer: Built before the engine was.
        group: Index of the group.
        names: Fully qualified names of those that the engine trains, in order.
        shapes: Their shapes.

    Returns:
        For each its place, increasing.

    Raises:
        RuntimeError: They are not in the group, or could be in more than one way.
    """
    if isinstance(optimizer._layout, FlatLayout):  # bound before
        bound = {f.name: f.position for f in optimizer._layout.fragments.values() if f.position >> 24 == group}
        if all(name in bound for name in names):
            return [bound[name] & 0xFFFFFF for name in names]
    known = sorted(optimizer._buckets.identities._known.items())
    built = [(plain_name(name), shape) for position, (name, shape) in known if position >> 24 == group]
    places = _only_way(list(zip(names, shapes, strict=True)), built)
    if places is None:
        places = _only_way(shapes, [shape for _, shape in built])
    if places is None:
        raise RuntimeError(
            f"{type(optimizer).__name__}: group {group} was built with {len(built)} parameters, the engine trains "
            f"{len(shapes)} of it, and neither names nor shapes tell which. Build the optimizer for this engine, from "
            "model.named_parameters(), and leave out parameters that are frozen or have no elements."
        )
    return places


def _only_way(some: Sequence[Hashable], every: Sequence[Hashable]) -> list[int] | None:
    """Where ``some`` lie within ``every``, in order; None if they do not, or in more than one way."""
    first, last = _first_way(some, every), _first_way(some[::-1], every[::-1])
    if first is None or last is None or first != [len(every) - 1 - at for at in reversed(last)]:
        return None
    return first


def _first_way(some: Sequence[Hashable], every: Sequence[Hashable]) -> list[int] | None:
    """The leftmost places of ``some`` within ``every``, in order; None if they are not in it."""
    places: list[int] = []
    for one in some:
        at = places[-1] + 1 if places else 0
        while at < len(every) and every[at] != one:
            at += 1
        if at == len(every):
            return None
        places.append(at)
    return places
