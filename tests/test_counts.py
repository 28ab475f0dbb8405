"""A step costs what it cost: operators, waits, collectives, segments, graphs and bytes, held against a table.

None of this depends on a clock. What grew is a regression, unless it was meant; what shrank is to be kept. The table
is renewed by ``python -m benchmarks.counts --write``.
"""

from __future__ import annotations

import pytest
import torch

from benchmarks import counts
from benchmarks.workloads import build

ROWS = [(name, workload) for name in counts.names() for workload in counts.SHAPES]


def check(name: str, workload: str, found: dict[str, int]) -> None:
    """Fail with what moved, by how much, and how to write it down."""
    table = counts.table()
    row = f"{name} | {workload}"
    moved = counts.compare(row, table["rows"].get(row, {}), found)
    other = table["torch"] != torch.__version__.partition("+")[0]
    hint = f"\n(the table is of torch {table['torch']}, this is {torch.__version__})" if other else ""
    assert not moved, "\n".join(moved) + f"\nIf that is meant, renew the table: {counts.RENEW}" + hint


@pytest.mark.parametrize(("name", "workload"), ROWS, ids=[f"{n}-{w}" for n, w in ROWS])
def test_a_step_costs_what_it_did(name: str, workload: str) -> None:
    """Every optimizer as it comes, and in its variants, on each small workload."""
    check(name, workload, counts.counted(name, workload))


@pytest.mark.parametrize(("name", "workload"), counts.COMPILED, ids=[f"{n}-{w}" for n, w in counts.COMPILED])
def test_what_is_compiled(name: str, workload: str) -> None:
    """Graphs of the first steps, and that none is made again while a schedule runs."""
    found = counts.compiled(name, workload)
    check(name, workload, found)
    assert found["recompiles"] == 0


def test_nothing_waits() -> None:
    """Not a matter of the table: a step never waits for the device."""
    waiting = {row: known["waits"] for row, known in counts.table()["rows"].items() if known["waits"]}
    assert not waiting


def test_the_table_has_these_rows_and_no_others() -> None:
    assert set(counts.table()["rows"]) == {f"{name} | {workload}" for name, workload in ROWS}


def test_one_reduction_a_segment_but_the_last() -> None:
    """However many parameters there are."""
    known = counts.table()["rows"]["HinaAdaptive | adapters"]
    buckets = len({(tuple(p.shape), "lora_A" in name) for name, p in build(counts.SHAPES["adapters"]())})
    assert known["segments"] == buckets * (known["reductions"] + 1)


def test_growth_and_shrinking_are_told() -> None:
    known = {"calls": 100, "moved_bytes": 1000, "waits": 0}
    assert counts.compare("x", known, dict(known)) == []
    assert counts.compare("x", known, {"calls": 101}) == ["x: calls grew from 100 to 101 (+1.0%)"]
    assert counts.compare("x", known, {"calls": 98}) == []
    assert "shrank from 100 to 90 (-10.0%): write it down to keep it" in counts.compare("x", known, {"calls": 90})[0]
    assert counts.compare("x", known, {"moved_bytes": 1009}) == []
    assert "grew from 1,000 to 1,011" in counts.compare("x", known, {"moved_bytes": 1011})[0]
    assert "grew from 0 to 1" in counts.compare("x", known, {"waits": 1})[0]
    assert "not in the table" in counts.compare("x", {}, {"calls": 1})[0]


def test_the_table_fails_when_a_step_costs_more() -> None:
    """One technique more than the table knows is found."""
    optimizer = counts.make("HinaAdaptive", build(counts.SHAPES["adapters"]()), compile=False, use_orthogonal_grad=True)
    for _ in range(2):
        optimizer.step()
    gauge = counts.watch(optimizer)
    found = {"calls": sum(gauge.calls.values()), "moved_bytes": sum(gauge.moved.values())}
    with pytest.raises(
        AssertionError, match=r"calls grew from .*\n.*moved_bytes grew(.|\n)*renew the table: python -m"
    ):
        check("HinaAdaptive", "adapters", found)
