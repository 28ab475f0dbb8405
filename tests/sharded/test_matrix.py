"""The matrix: every named optimizer with everything on, on every engine, with every kind of state, beside one process.

``make test`` runs a diagonal of it, ``make test-sharded`` all of it; either prints a table of what it ran.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest

from tests.every_optimizer import NAMES, OPTIONS
from tests.sharded.cells import ELEMENTWISE, FLAT, KINDS, Result, kinds_of, run_cells
from tests.sharded.engines import ENGINES
from tests.sharded.world import WorldError

Record = Callable[[str, object], None]
PLACES = [(engine, size) for engine, one in ENGINES.items() for size in one.sizes if size > 1]
FLAT_PLACES = [(engine, size) for engine, sizes in FLAT.items() for size in sizes]


def check(
    engine: str, size: int, names: Sequence[str], kinds: Sequence[str], record: Record
) -> dict[tuple[str, str], Result]:
    """Run cells in one world, put them into the table, and fail with all that do not fit."""
    where = f"{engine} {size}"
    refused = ENGINES[engine].refuses if engine in ENGINES else {}
    for kind in [kind for kind in kinds if kind in refused]:
        for name in names:
            record("cell", (kind, name, where, "refused"))
            with pytest.raises(WorldError, match=refused[kind]) as caught:
                run_cells(engine, size, [name], [kind])
            assert len(caught.value.outcomes) == size, "some ranks went on"
    kinds = [kind for kind in kinds if kind not in refused]
    try:
        results = run_cells(engine, size, names, kinds)
    except AssertionError as error:
        what = "ERROR" if isinstance(error, WorldError) else "DIFFERS"
        for kind in kinds:
            for name in names:
                record("cell", (kind, name, where, what))
        raise
    for (name, kind), result in results.items():
        record("cell", (kind, name, where, str(result) if result.fits(kind) else f"**{result}**"))
    wrong = [f"{key}: {result}" for key, result in results.items() if not result.fits(key[1])]
    assert not wrong, f"{where}:\n" + "\n".join(wrong)
    return results


#: Every optimizer, engine and kind at least once.
DIAGONAL = [
    ("ddp", 2, ["Automagic_CameAMP_Improved_8Bit"], ["bf16 weights", "8bit"]),
    ("fsdp2", 2, ["HinaAdaptive", "Automagic_CameAMP_Improved"], ["fp32"]),
    ("fsdp2", 4, ["Automagic_CameAMP_COptim8bit"], ["8bit"]),
    ("fsdp2", 2, ["Automagic_CameAMP"], ["4bit"]),
    ("fsdp2 last", 2, ["HinaAdaptive"], ["fp64"]),
    ("fsdp2 offload", 2, ["HinaAdamWOptimizer"], ["bf16"]),
    ("fsdp2 mixed", 2, ["Automagic_CameAMP_COptim"], ["fp32"]),
    ("hsdp", 4, ["RefactoredAutomagicCameAMP"], ["fp32"]),
    ("tp", 2, ["Automagic_CameAMP"], ["bf16 weights"]),
    ("fsdp2 tp", 4, ["AdaptiveHinaAdamW", "Automagic_CameAMP_8bit"], ["fp64"]),
    ("fsdp1", 2, ["HinaAdaptive"], ["fp32"]),
    ("fsdp1 flat", 2, ["HinaAdamWOptimizer"], ["bf16"]),
    ("zero1", 2, ["Automagic_CameAMP_COptim"], ["fp32"]),
    ("zero1", 2, ["HinaAdaptive", "Automagic_CameAMP_Improved_8Bit"], ["4bit"]),
    ("zero2", 2, ["AdaptiveHinaAdamW"], ["fp32"]),
    ("zero3", 2, ["Automagic_CameAMP_Improved"], ["8bit"]),
]


@pytest.mark.parametrize(
    ("engine", "size", "names", "kinds"), DIAGONAL, ids=[f"{e}-{n}-{'-'.join(k)}" for e, n, _, k in DIAGONAL]
)
def test_diagonal(engine: str, size: int, names: list[str], kinds: list[str], record_property: Record) -> None:
    check(engine, size, names, kinds, record_property)


def test_diagonal_has_everything() -> None:
    assert {name for _, _, names, _ in DIAGONAL for name in names} == set(OPTIONS)
    assert {kind for *_, kinds in DIAGONAL for kind in kinds} == set(KINDS)
    assert {engine for engine, *_ in DIAGONAL} == (set(ENGINES) | set(FLAT)) - {"one"}


@pytest.mark.sharded
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("engine", "size"), PLACES + FLAT_PLACES)
def test_all(engine: str, size: int, name: str, record_property: Record) -> None:
    check(engine, size, [name], kinds_of(engine), record_property)


@pytest.mark.parametrize(
    ("engine", "size"),
    [
        pytest.param(*place, marks=[] if place in (("fsdp2", 2), ("zero3", 2)) else [pytest.mark.sharded])
        for place in PLACES + FLAT_PLACES
    ],
)
def test_elements_and_codes_are_equal_to_the_bit(engine: str, size: int, record_property: Record) -> None:
    """Where nothing crosses elements: weights, state, codes and scales, random rounding included."""
    kinds = kinds_of(engine) if engine in FLAT else list(KINDS)
    results = check(engine, size, [ELEMENTWISE], kinds, record_property)
    for (_, kind), result in results.items():
        assert str(result) == "=", f"{kind}: {result}"
