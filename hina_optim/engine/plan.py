"""Cut a recipe into segments: as few reductions as the techniques' own declarations allow.

A segment is a run of techniques that needs nothing from outside. Between two segments lies one reduction of all sums
gathered so far, or one gathering of complete matrices. Two techniques share a reduction unless the second touches what
the first settles only once its totals are known.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from hina_optim.techniques.base import NAMES, ParamInfo, PeriodicTechnique, Technique

__all__ = ["Segment", "check_recipe", "plan_segments"]


@dataclass(frozen=True)
class Segment:
    """What runs between two reductions.

    Attributes:
        settling: Techniques whose totals are known at the start; settled first, in order.
        whole: The technique whose complete values were gathered before this segment, or None.
        running: Techniques that are transformed, in order; with True where their sums are taken right after.
        immediate: Names of techniques in ``running`` that are settled at once, having no sums.
    """

    settling: tuple[Technique, ...]
    whole: Technique | None
    running: tuple[tuple[Technique, bool], ...]
    immediate: frozenset[str]

    @property
    def summing(self) -> tuple[Technique, ...]:
        """Techniques whose sums this segment takes."""
        return tuple(t for t, sums in self.running if sums)


def check_recipe(chain: Iterable[Technique], owner: str) -> None:
    """Raise ValueError for a recipe that cannot work: duplicate or empty names, undeclared vocabulary."""
    seen: set[str] = set()
    for one in chain:
        label = f"{owner}: technique {type(one).__name__}"
        if not one.name:
            raise ValueError(f"{label} has no name: set the class variable `name`.")
        if one.name in seen:
            raise ValueError(f"{label}: the name {one.name!r} is in the recipe twice; names must be unique.")
        seen.add(one.name)
        declared = one.reads | one.writes | one.sums_over | one.settles | one.settle_reads | frozenset(one.whole)
        unknown = declared - NAMES
        if unknown:
            raise ValueError(
                f"{label} declares unknown values {sorted(unknown)}; the vocabulary is {', '.join(sorted(NAMES))}."
            )
        if one.settles and not one.sums_over:
            raise ValueError(f"{label} settles {sorted(one.settles)} but declares no sums (`sums_over`).")


def plan_segments(chain: Iterable[Technique], info: ParamInfo, measuring: frozenset[str]) -> tuple[Segment, ...]:
    """Segments of a recipe for one kind of parameter.

    Args:
        chain: The recipe.
        info: What the parameters are (techniques that do not apply are left out).
        measuring: Names of the periodic techniques that measure in this step.
    """
    segments: list[Segment] = []
    settling: tuple[Technique, ...] = ()
    whole: Technique | None = None
    running: list[tuple[Technique, bool]] = []
    immediate: set[str] = set()

    def close() -> None:
        nonlocal settling, whole
        segments.append(Segment(settling, whole, tuple(running), frozenset(immediate)))
        settling, whole = segments[-1].summing, None
        running.clear()
        immediate.clear()

    for one in chain:
        if not one.applies(info):
            continue
        active = not isinstance(one, PeriodicTechnique) or one.name in measuring
        touches = one.reads | one.writes
        if active:
            touches |= one.sums_over | frozenset(one.whole)
        waiting = [t for t, sums in running if sums]
        if any(touches & t.settles or one.writes & t.settle_reads for t in waiting):
            close()
        if one.whole and active:
            # complete values are those at the end of the segment before; settle first what they depend on
            if running or whole is not None:
                close()
            if any(t.settles & frozenset(one.whole) for t in settling):
                close()
            whole = one
        sums = active and bool(one.sums_over)
        if active and not sums:
            immediate.add(one.name)
        running.append((one, sums))
    if any(sums for _, sums in running):
        close()
    close()
    return tuple(segments)
