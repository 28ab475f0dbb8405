"""Counts of what a step costs, which no clock disturbs, held in a table: ``python -m benchmarks.counts --write``.

Small fixed workloads, every optimizer. What grows is a regression, and ``tests/test_counts.py`` fails; what was made
smaller is written down by the same command, so that it stays.
"""

from __future__ import annotations

import argparse
import json
import logging
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import report
from benchmarks.gauges import Gauge, graphs, must_move, watch
from benchmarks.workloads import Named, Shapes, build, unet
from hina_optim import create_optimizer, list_optimizers
from hina_optim.engine.layout import Layout
from hina_optim.engine.optimizer import HinaOptimizer

TABLE = Path(__file__).parents[1] / "tests" / "counts.json"
RENEW = "python -m benchmarks.counts --write"
LR = 3e-4

#: What counts, and the share by which it may grow or shrink unnoticed.
TOLERANCES = {
    "calls": 0.0,  # dispatcher calls of an ordinary step
    "measuring_calls": 0.0,  # of the first step, in which everything is measured, state being there
    "waits": 0.0,  # operators that would keep the host waiting for a device
    "reductions": 0.0,  # collectives of an ordinary step, if parameters are sharded
    "gathers": 0.0,  # times that complete values are gathered then
    "agreements": 0.0,  # exchanges on the host then
    "segments": 0.0,  # of all buckets together
    "moved_bytes": 0.01,  # read and written by all operators together
    "temporary_bytes": 0.01,  # in tensors alive at once
    "graphs": 0.0,  # of torch.compile, up to the third step
    "recompiles": 0.0,  # after that
}
#: What shrinks by more than this is to be written down.
SHRINKS = 0.03


def adapters() -> Shapes:
    """64 LoRA tensors of three shapes."""
    return [
        pair
        for i in range(32)
        for pair in (
            (f"layer{i}.lora_A.default.weight", (8, 64)),
            (f"layer{i}.lora_B.default.weight", (64 if i % 2 else 96, 8)),
        )
    ]


def language() -> Shapes:
    """A transformer of two blocks, with vectors."""
    blocks: Shapes = [("embedding.weight", (96, 32))]
    for i in range(2):
        blocks += [(f"block{i}.{k}.weight", s) for k, s in (("qkv", (96, 32)), ("up", (128, 32)), ("down", (32, 128)))]
        blocks += [(f"block{i}.{k}.bias", s) for k, s in (("qkv", (96,)), ("up", (128,)), ("norm", (32,)))]
    return blocks


#: Name → shapes.
SHAPES: dict[str, Callable[[], Shapes]] = {
    "adapters": adapters,
    "language": language,
    "chunks": lambda: [("weight", (1024, 384))],
    "kernels": lambda: unet(1 / 1024)[:24],
}

#: Variants beside the optimizers as they come.
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "HinaAdaptive, 8bit": ("HinaAdaptive", {"state_precision": "8bit", "min_8bit_size": 256}),
    "HinaAdaptive, bf16": ("HinaAdaptive", {"state_precision": "bf16"}),
    "Automagic_CameAMP_Improved_8Bit, memory_optimized": (
        "Automagic_CameAMP_Improved_8Bit",
        {"profile": "memory_optimized"},
    ),
}
#: Columns of the table of passes in docs/performance.md.
SHOWN = (
    "HinaAdaptive",
    "HinaAdaptive, bf16",
    "HinaAdaptive, 8bit",
    "Automagic_CameAMP",
    "Automagic_CameAMP_COptim",
    "Automagic_CameAMP_Improved",
)
#: Compiling takes long, even without generating code: a few rows stand for all.
COMPILED = (
    ("HinaAdaptive", "adapters"),
    ("HinaAdaptive, 8bit", "chunks"),
    ("Automagic_CameAMP", "adapters"),
)


class Counting(Layout):
    """One process that takes itself for one of several: all is here, and what ranks would do together is counted."""

    sharded = True

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()

    def reduce(self, parts: Sequence[tuple[Tensor, Tensor]], largest: bool = False) -> list[Tensor]:
        """Count."""
        self.counts["reductions"] += 1
        return super().reduce(parts, largest)

    def total(self, vector: Tensor) -> Tensor:
        """Count."""
        self.counts["agreements"] += 1
        return vector

    def gather(self, parts: Sequence[tuple[Tensor, Tensor]]) -> list[Tensor]:
        """Count."""
        self.counts["gathers"] += 1
        return super().gather(parts)


def names() -> list[str]:
    """Every optimizer as it comes, and the variants."""
    return sorted([*list_optimizers(), *VARIANTS])


def make(name: str, named: Named, **arguments: Any) -> HinaOptimizer:
    """An optimizer or a variant of one."""
    cls, given = VARIANTS.get(name, (name, {}))
    return create_optimizer(cls, named, lr=LR, **given, **arguments)


def counted(name: str, workload: str) -> dict[str, int]:
    """All counts of a row that need no compiler."""
    optimizer = make(name, build(SHAPES[workload]()), compile=False)
    optimizer.init_state()
    first = watch(optimizer)
    optimizer.step()  # digests what the first one measured
    gauge = watch(optimizer)
    segments = sum(len(optimizer._buckets.program(b).segments) for b in set(optimizer._buckets._of.values()))
    layout = Counting()
    shared = make(name, build(SHAPES[workload]()), compile=False)
    shared.bind_layout(layout)
    for _ in range(3):
        layout.counts.clear()
        shared.step()
    return {
        "calls": sum(gauge.calls.values()),
        "measuring_calls": sum(first.calls.values()),
        "waits": sum(gauge.waits.values()),
        "reductions": layout.counts["reductions"],
        "gathers": layout.counts["gathers"],
        "agreements": layout.counts["agreements"],
        "segments": segments,
        "moved_bytes": sum(gauge.moved.values()),
        "temporary_bytes": gauge.peak,
    }


def compiled(name: str, workload: str, steps: int = 8) -> dict[str, int]:
    """Graphs that are traced in some steps of a schedule, in the first three and after; no code is generated."""
    torch._dynamo.reset()
    optimizer = make(name, build(SHAPES[workload]()), compile=True)
    begin = settled = graphs()
    with torch.compiler.set_stance("default", force_backend="eager"):
        for step in range(steps):
            optimizer.param_groups[0]["lr"] = LR * (1 - step / (2 * steps))
            optimizer.step()
            if step == 2:
                settled = graphs()
    return {"graphs": settled - begin, "recompiles": graphs() - settled}


def compare(row: str, known: dict[str, int], found: dict[str, int]) -> list[str]:
    """What moved, in words; empty if nothing did."""
    lines = []
    for key, now in found.items():
        then = known.get(key)
        if then is None:
            lines.append(f"{row}: {key} is {now:,} and not in the table yet")
            continue
        share = (now - then) / then if then else float(now != then)
        if share > TOLERANCES[key]:
            lines.append(f"{row}: {key} grew from {then:,} to {now:,} ({share:+.1%})")
        elif share < -max(TOLERANCES[key], SHRINKS):
            lines.append(f"{row}: {key} shrank from {then:,} to {now:,} ({share:+.1%}): write it down to keep it")
    return lines


def table() -> dict[str, Any]:
    """The checked-in table."""
    loaded: dict[str, Any] = json.loads(TABLE.read_text())
    return loaded


def measured() -> dict[str, Any]:
    """The table as it is now."""
    rows = {f"{name} | {workload}": counted(name, workload) for name in names() for workload in SHAPES}
    for name, workload in COMPILED:
        rows[f"{name} | {workload}"] |= compiled(name, workload)
    return {"torch": torch.__version__.partition("+")[0], "rows": rows}


def profiled(name: str, shapes: Shapes) -> tuple[Gauge, int]:
    """An ordinary step of an optimizer under the gauge, and the bytes that it cannot do without."""
    optimizer = make(name, build(shapes), compile=False)
    for _ in range(2):
        optimizer.step()
    return watch(optimizer), must_move(optimizer)


def passes() -> str:
    """Where the passes over memory are: functions by bytes an element, on a matrix in chunks, as Markdown."""
    shapes = SHAPES["chunks"]()
    each = sum(torch.Size(shape).numel() for _, shape in shapes)
    found = [profiled(name, shapes) for name in SHOWN]
    lines = [f"| bytes an element | {' | '.join(f'`{name}`' for name in SHOWN)} |", "|---|" + "---:|" * len(SHOWN)]

    def add(title: str, cells: list[str]) -> None:
        lines.append(f"| {title} | {' | '.join(cells)} |")

    add("that must be moved", [f"{must / each:.0f}" for _, must in found])
    add("that operators move", [f"**{sum(gauge.moved.values()) / each:.0f}**" for gauge, _ in found])
    add("calls of operators", [f"{sum(gauge.calls.values()):,}" for gauge, _ in found])
    most = Counter[str]()
    for gauge, _ in found:
        most |= gauge.sites
    for where, largest in most.most_common():
        if largest / each >= 10:
            numbers = [gauge.sites[where] / each for gauge, _ in found]
            add(f"`{where}`", [f"{n:.0f}" if n >= 0.5 else "" for n in numbers])
    return "\n".join(lines)


def _show(title: str, moved: Counter[str], calls: Counter[str], elements: int) -> None:
    print(f"{title:<44} {'calls':>7} {'bytes an element':>17}")
    for key, total in moved.most_common():
        print(f"{key:<44} {calls.get(key, ''):>7} {total / elements:>17.1f}")
    print(f"{'all':<44} {sum(calls.values()) or '':>7} {sum(moved.values()) / elements:>17.1f}\n")


def main() -> None:
    """Show what moved, write the table, or show which operators an optimizer's step consists of."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--write", action="store_true", help=f"renew {TABLE.name}, and the passes in {report.PAGE.name}"
    )
    parser.add_argument("--ops", metavar="NAME", help="the operators of an optimizer's step, by the bytes they move")
    parser.add_argument("--workload", choices=list(SHAPES), default="chunks", help="for --ops (default: chunks)")
    args = parser.parse_args()
    if args.ops:
        shapes = SHAPES[args.workload]()
        gauge, _ = profiled(args.ops, shapes)
        each = sum(torch.Size(shape).numel() for _, shape in shapes)
        _show("operator", gauge.moved, gauge.calls, each)
        _show("where", gauge.sites, Counter(), each)
        return
    found = measured()
    if args.write:
        lines = [f"  {json.dumps(row)}: {json.dumps(counts)}" for row, counts in found["rows"].items()]
        text = ",\n".join(lines)
        TABLE.write_text(f'{{"torch": {json.dumps(found["torch"])}, "rows": {{\n{text}\n}}}}\n')
        report.write(passes(), "passes")
        return
    known = table()["rows"]
    changes = [line for row, counts in found["rows"].items() for line in compare(row, known.get(row, {}), counts)]
    print("\n".join(changes) or "nothing moved")


if __name__ == "__main__":
    logging.getLogger("hina_optim").setLevel(logging.ERROR)  # no loss is reported here
    main()
