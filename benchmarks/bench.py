"""Time, memory and operators of one optimizer step, beside what users would pick instead: ``make bench``.

All in one run. Every row is measured against torch's fused AdamW and against plain moving of memory, in turns, and
what counts is the ratio within a round: absolute times mean little on a machine that is shared. The row of the fused
AdamW is such a comparison too, of one with another: how far it is from 1 is what the ratios are worth.
"""

from __future__ import annotations

import argparse
import gc
import json
import logging
import os
import platform
import statistics
import tempfile
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks import gauges, report
from benchmarks.contenders import BASE, Contender, contenders
from benchmarks.workloads import WORKLOADS, Named, Shapes, build

#: Steps of a schedule in which compilations are counted, after those that see every kind of step once.
SCHEDULE, SETTLED = 200, 3
#: Share of a workload that is enough to see what is compiled again.
SMALL = 1 / 256


@dataclass
class Row:
    """What was measured of one contender on one workload. Lists have a number a round.

    Attributes:
        name: Of the contender.
        ours: Whether it is this library's.
        status: Empty, or why there are no numbers.
        seconds: Of a step.
        ratios: To the step of the fused AdamW in the same round.
        floors: Time that moving the bytes that must be moved takes at the speed of this round, over the step's.
        must_bytes: Those bytes: gradients, weights and state.
        state_bytes: Bytes of state.
        temporary_bytes: Of the allocator, at most, beyond what a step begins with.
        ops: Dispatcher calls a step; for compiled ones operators and graphs, on CUDA kernels.
        waits: How often the host waits for the device in a step.
        compile_seconds: What the first two steps took beyond two ordinary ones; compiled ones only.
        recompiles: Graphs made in 200 steps of a schedule, after the first three; compiled ones only.
    """

    name: str
    ours: bool
    status: str = ""
    seconds: list[float] = field(default_factory=list)
    ratios: list[float] = field(default_factory=list)
    floors: list[float] = field(default_factory=list)
    must_bytes: int | None = None
    state_bytes: int | None = None
    temporary_bytes: int | None = None
    ops: int | None = None
    waits: int | None = None
    compile_seconds: float | None = None
    recompiles: int | None = None


@dataclass(frozen=True)
class Effort:
    """How long to measure.

    Attributes:
        rounds: At most so many.
        seconds: A row is given this long, if at least three rounds (of a step that is longer than that: one) are done.
    """

    rounds: int
    seconds: float

    def enough(self, row: Row) -> bool:
        """Whether a row has been measured long enough; a round takes about twice its own step."""
        done = len(row.seconds)
        least = 1 if done and row.seconds[0] > self.seconds else 3
        return done >= self.rounds or (done >= least and 2 * sum(row.seconds) >= self.seconds)


class Bench:
    """One workload: its parameters, the fused AdamW, and a mover of memory; contenders come one by one, for memory."""

    def __init__(self, shapes: Shapes, device: torch.device, effort: Effort, mover_bytes: int) -> None:
        self.device = device
        self.effort = effort
        self.named: Named = build(shapes, device)
        self._start = [p.detach().clone() for _, p in self.named]
        self._mover = gauges.Mover(mover_bytes, device)
        self._base = next(c for c in contenders() if c.name == BASE).build(self.named)
        for _ in range(2):
            self._base.step()
            self._mover.speed()

    def measure(self, contender: Contender) -> Row:
        """All numbers of one contender; what does not run here says so in its row."""
        row = Row(contender.name, contender.ours)
        for (_, p), start in zip(self.named, self._start, strict=True):
            p.detach().copy_(start)
        try:
            self._measure(contender, row)
        except ImportError as error:
            row.status = f"not installed ({error.name})" if error.name else f"not installed: {error}"
        except Exception as error:
            row.status = (
                f"does not run here: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
            )
        gc.collect()
        return row

    def _measure(self, contender: Contender, row: Row) -> None:
        optimizer = contender.build(self.named)
        first = [gauges.clock(optimizer.step, self.device)]  # makes the state, and measures
        if contender.compiled or first[0] < self.effort.seconds:
            first.append(gauges.clock(optimizer.step, self.device))  # of the usual kind
        row.must_bytes = gauges.must_move(optimizer)
        row.state_bytes = gauges.state_bytes(optimizer)
        while not self.effort.enough(row):
            speed = self._mover.speed()
            base = gauges.clock(self._base.step, self.device)
            speed = (speed + self._mover.speed()) / 2  # and the same caches are left to both
            own = gauges.clock(optimizer.step, self.device)
            row.seconds.append(own)
            row.ratios.append(own / base)
            row.floors.append(row.must_bytes / speed / own)
        if contender.compiled:
            row.compile_seconds = max(0.0, sum(first) - 2 * statistics.median(row.seconds))
        if contender.compiled or self.device.type == "cuda":
            row.temporary_bytes = gauges.temporary_bytes(optimizer.step, self.device)
            row.ops = gauges.launches(optimizer.step, self.device)
            row.waits = gauges.cuda_waits(optimizer.step) if self.device.type == "cuda" else None
            return
        gauge = gauges.counter(optimizer)
        if contender.ours:  # at once: a step may be long
            with gauge:
                row.temporary_bytes = gauges.temporary_bytes(optimizer.step, self.device)
        else:
            row.temporary_bytes = gauges.temporary_bytes(optimizer.step, self.device)
            try:
                with gauge:
                    optimizer.step()
            except (
                RuntimeError
            ):  # one that compiles by itself: under a gauge its graphs refuse to run, and from then on
                return
        row.ops, row.waits = sum(gauge.calls.values()), sum(gauge.waits.values())


def recompiles(contender: Contender, shapes: Shapes) -> int:
    """Graphs made again while a schedule runs. On a small copy, without generating code: what is traced is the same."""
    torch._dynamo.reset()
    named = build(shapes)
    optimizer = contender.build(named)
    settled = 0
    with torch.compiler.set_stance("default", force_backend="eager"):
        for step in range(SCHEDULE):
            for group in optimizer.param_groups:
                group["lr"] = 1e-4 * (1 - step / (2 * SCHEDULE))
            optimizer.step()
            if step + 1 == SETTLED:
                settled = gauges.graphs()
    return gauges.graphs() - settled


def machine(device: torch.device) -> dict[str, Any]:
    """Where it was measured."""
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "processor": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "load": list(os.getloadavg()) if hasattr(os, "getloadavg") else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    listed = "; ".join(f"{key}: {title}" for key, (title, _) in WORKLOADS.items())
    parser.add_argument("--workload", nargs="+", choices=list(WORKLOADS), default=list(WORKLOADS), help=listed)
    parser.add_argument("--optimizers", nargs="+", metavar="TEXT", help="rows that contain one of these, or are =it")
    parser.add_argument("--compiled", action="store_true", help="all of this library's under torch.compile, too")
    parser.add_argument("--rounds", type=int, default=9, help="at most so many rounds a row (default 9)")
    parser.add_argument("--seconds", type=float, default=4.0, help="about so long a row, if three are done (default 4)")
    parser.add_argument("--minutes", type=float, default=15.0, help="rows not begun by then are left out (default 15)")
    parser.add_argument("--scale", type=float, default=1.0, help="share of each workload, above 0 (default 1)")
    parser.add_argument("--quick", action="store_true", help="1/256 of each workload, three rounds, no variants")
    parser.add_argument("--threads", type=int, help="of the CPU (default: torch's own choice)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=Path("runs/bench"), help="folder for bench.json and bench.png")
    parser.add_argument("--write", action="store_true", help=f"put the tables into {report.PAGE.name}")
    args = parser.parse_args(argv)
    if not 0 < args.scale <= 1:
        parser.error("--scale must be above 0 and at most 1")
    if args.rounds < 1:
        parser.error("--rounds must be at least 1")
    if args.quick:
        args.scale, args.rounds, args.seconds = min(args.scale, 1 / 256), min(args.rounds, 3), 1.0
    return args


def named(contender: Contender, text: str) -> bool:
    """Whether a text, in small letters, is part of a row's name, or, behind ``=``, all of it."""
    name = contender.name.lower()
    return text[1:] == name if text.startswith("=") else text in name


def main(argv: list[str] | None = None) -> None:
    """Print the tables; write them as JSON and as a picture."""
    args = parse(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    wanted = [text.lower() for text in args.optimizers or [""]]
    chosen = [c for c in contenders(args.compiled) if any(named(c, text) for text in wanted)]
    if args.quick:
        chosen = [c for c in chosen if not c.variant and (args.compiled or not (c.ours and c.compiled))]
    found: dict[str, Any] = {
        "machine": machine(device),
        "scale": args.scale,
        "rounds": args.rounds,
        "seconds": args.seconds,
        "workloads": {},
    }
    with tempfile.TemporaryDirectory() as cache:  # compiling is measured from nothing
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", cache)
        begin = time.monotonic()
        for place, key in enumerate(args.workload):
            until = begin + 60 * args.minutes * (place + 1) / len(args.workload)
            title, shapes = WORKLOADS[key][0], WORKLOADS[key][1](args.scale)
            bench = Bench(shapes, device, Effort(args.rounds, args.seconds), int(256e6 * max(args.scale, 0.25)))
            sizes = [p.numel() for _, p in bench.named]
            entry: dict[str, Any] = {"title": title, "tensors": len(sizes), "elements": sum(sizes), "rows": []}
            found["workloads"][key] = entry
            print("\n" + report.heading(key, entry) + "\n" + report.HEAD, flush=True)
            for contender in chosen:
                if time.monotonic() > until:
                    row = Row(contender.name, contender.ours, "left out: the time was up (--minutes)")
                else:
                    row = bench.measure(contender)
                if contender.compiled and contender.ours and not row.status:
                    row.recompiles = recompiles(contender, WORKLOADS[key][1](SMALL))
                entry["rows"].append(asdict(row))
                print(report.line(asdict(row)), flush=True)
            del bench
    print("\n" + report.LEGEND)
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "bench.json").write_text(json.dumps(found, indent=1))
    print(report.picture(found, args.out / "bench.png"))
    if args.write:
        report.write(report.markdown(found), "bench")


if __name__ == "__main__":
    logging.getLogger("hina_optim").setLevel(logging.ERROR)  # no loss is reported here, and each of them would say so
    main()
