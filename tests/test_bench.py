"""The benchmark measures what it says: gauges against known numbers, workloads of the sizes told, whole runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks import bench, contenders, gauges, image_state, report, workloads
from hina_optim import HinaAdaptive

CPU = torch.device("cpu")


def millions(shapes: workloads.Shapes) -> float:
    return sum(torch.Size(shape).numel() for _, shape in shapes) / 1e6


class Step(torch.optim.Optimizer):
    """An optimizer of one's own making; ``run`` is its step."""

    def __init__(self, params: list[nn.Parameter], run: Any) -> None:
        super().__init__(params, {})
        self.run = run

    def step(self, closure: Any = None) -> None:
        self.run()


def watched(run: Any) -> gauges.Gauge:
    return gauges.watch(Step([nn.Parameter(torch.ones(1))], run))


# -- workloads --------------------------------------------------------------------------------------------------------


def test_workloads_have_the_sizes_that_are_told() -> None:
    sizes = {key: millions(make(1.0)) for key, (_, make) in workloads.WORKLOADS.items()}
    assert len(workloads.lora()) == 1000
    assert 59 < sizes["T"] < 62
    assert 30 < sizes["C"] < 50
    assert sizes["B"] == 2**26 / 1e6
    for key, (_, make) in workloads.WORKLOADS.items():
        assert millions(make(1 / 16)) < sizes[key] / 8
        assert len({name for name, _ in make(0.1)}) == len(make(0.1))


def test_parameters_are_the_same_each_time() -> None:
    first, second = (workloads.build(workloads.lora(0.001)) for _ in range(2))
    for (name, p), (_, q) in zip(first, second, strict=True):
        assert torch.equal(p, q) and p.grad is not None and q.grad is not None and torch.equal(p.grad, q.grad)
        assert p.grad.any() and bool(p.any()) != ("lora_B" in name)


# -- gauges -----------------------------------------------------------------------------------------------------------


def test_calls_and_bytes_of_operators() -> None:
    x, row = torch.ones(100, 10), torch.ones(100, 1)

    def run() -> None:
        y = x * row.expand(100, 10)  # an expanded dimension is not memory
        y.add_(x)
        y.view(-1)
        x.copy_(y)

    gauge = watched(run)
    assert gauge.calls == {"expand": 1, "mul": 1, "add_": 1, "view": 1, "copy_": 1}
    assert gauge.moved == {"mul": 4 * (1000 + 100 + 1000), "add_": 4 * 3000, "copy_": 4 * 2000}
    assert gauge.sites == {"elsewhere": sum(gauge.moved.values())}


def test_lists_of_tensors_count() -> None:
    many = [torch.ones(50) for _ in range(4)]
    gauge = watched(lambda: torch._foreach_add_(many, 1.0))
    assert gauge.calls == {"_foreach_add_": 1} and gauge.moved == {"_foreach_add_": 2 * 4 * 200}


def test_peak_is_that_of_the_allocator() -> None:
    x = torch.ones(10_000)

    def run() -> None:
        y = x + 1
        z = [y.view(100, 100) * 2 for _ in range(3)]
        del y
        z.pop()
        w = z[0] + z[1]
        w.mul_(2)

    assert watched(run).peak == 160_000
    assert gauges.temporary_bytes(run, CPU) == pytest.approx(160_000, abs=100)  # numbers become tensors of one element


def test_peak_of_a_step() -> None:
    """What tensors hold at once is what the allocator gives, but for what kernels take inside."""
    optimizer = HinaAdaptive(workloads.build([("w", (256, 256)), ("v", (256,))]), lr=1e-4, compile=False)
    optimizer.step()
    optimizer.step()
    found = gauges.watch(optimizer).peak
    assert found == pytest.approx(gauges.temporary_bytes(optimizer.step, CPU), rel=0.05)
    assert found > 10 * 256 * 256 * 4


def test_waits_are_reads_of_what_is_on_a_device() -> None:
    """A counter on the host may be read; a value that was computed may not."""
    p = nn.Parameter(torch.ones(3))
    x = p.detach()
    optimizer = Step([p], lambda: (float(optimizer.state[p]["step"]), float(x.sum()), x[x > 0], x[x.long()]))
    optimizer.state[p]["step"] = torch.tensor(1.0)
    assert gauges.watch(optimizer).waits == {"_local_scalar_dense": 1, "index": 1}


def test_sites_are_functions_of_the_library() -> None:
    optimizer = HinaAdaptive(workloads.build([("w", (64, 64))]), lr=1e-4, compile=False)
    for _ in range(2):
        optimizer.step()
    sites = gauges.watch(optimizer).sites
    assert sites["techniques/lr_mask.py transform"] > 0 and sites["techniques/spd.py sums"] > 0
    assert "elsewhere" not in sites


def test_bytes_that_must_be_moved() -> None:
    named = workloads.build([("w", (64, 64))])
    params = [p for _, p in named]
    adamw = torch.optim.AdamW(params, fused=True)
    adamw.step()
    per = gauges.must_move(adamw) / 64**2
    assert per == pytest.approx(4 * (1 + 2 + 2 * 2), rel=0.01)  # gradient; weights; two moments
    assert gauges.state_bytes(adamw) == pytest.approx(8 * 64**2, rel=0.01)
    ours = HinaAdaptive(named, lr=1e-4)
    ours.step()
    # two moments and the mask, last sign, and the anchor, which is only read
    assert gauges.must_move(ours) / 64**2 == pytest.approx(4 * 3 + 8 * 3 + 2 + 4, rel=0.01)


def test_calls_alone() -> None:
    """The fast gauge sees the same calls and waits, and nothing else."""
    optimizer = HinaAdaptive(workloads.build([("w", (64, 64))]), lr=1e-4, compile=False)
    for _ in range(2):
        optimizer.step()
    full = gauges.watch(optimizer)
    with gauges.counter(optimizer) as fast:
        optimizer.step()
    assert fast.calls == full.calls and not fast.moved and not fast.peak
    x = torch.ones(3)
    with gauges.Gauge(calls_only=True) as gauge:
        float(x.sum())
    assert gauge.waits == {"_local_scalar_dense": 1}


def test_launches_count_operators_once() -> None:
    x = torch.ones(10)
    assert gauges.launches(lambda: (x.reshape(2, 5) + 1).sum(), CPU) == 3


# -- rows -------------------------------------------------------------------------------------------------------------


def small_bench() -> bench.Bench:
    return bench.Bench(workloads.matrix(1 / 4096), CPU, bench.Effort(3, 10.0), 1 << 20)


def test_a_row() -> None:
    found = small_bench()
    start = found.named[0][1].detach().clone()
    chosen = {c.name: c for c in contenders.contenders()}
    row = found.measure(chosen["HinaAdaptive"])
    assert row.status == "" and row.ours
    assert len(row.seconds) == len(row.ratios) == len(row.floors) == 3 and min(row.ratios) > 0
    assert row.ops is not None and row.ops > 50 and row.waits == 0
    assert row.temporary_bytes is not None and row.temporary_bytes > start.nbytes
    assert row.compile_seconds is None and row.recompiles is None
    foreach = found.measure(chosen["torch AdamW, foreach"])
    assert foreach.status == "" and foreach.ops is not None and row.ops > foreach.ops
    assert foreach.state_bytes == pytest.approx(2 * start.nbytes, rel=0.01)


def test_what_is_not_there_or_fails_says_so() -> None:
    found = small_bench()

    def missing(named: workloads.Named) -> torch.optim.Optimizer:
        import no_such_library_as_this  # type: ignore[import-not-found]

        return no_such_library_as_this.AdamW(named)  # type: ignore[no-any-return]

    row = found.measure(contenders.Contender("a", missing))
    assert row.status == "not installed (no_such_library_as_this)" and not row.seconds
    row = found.measure(contenders.Contender("b", lambda named: torch.optim.AdamW([p for _, p in named], lr=-1.0)))
    assert row.status.startswith("does not run here: ValueError: Invalid learning rate")
    assert report.line(bench.asdict(row)).startswith("b  ") and "Invalid learning rate" in report.line(
        bench.asdict(row)
    )


def test_a_library_that_compiles_by_itself() -> None:
    """Its graphs refuse to run under the gauge; the row has its other numbers all the same."""

    def build(named: workloads.Named) -> torch.optim.Optimizer:
        add = torch.compile(lambda x: x + 1, fullgraph=True, backend="eager")
        return Step([p for _, p in named], lambda: add(named[0][1].detach()))

    row = small_bench().measure(contenders.Contender("x", build))
    assert row.status == "" and len(row.seconds) == 3
    assert row.ops is None and row.waits is None and row.temporary_bytes is not None
    assert " - " in report.line(bench.asdict(row))


def test_every_optimizer_and_variant_is_in_the_table() -> None:
    rows = contenders.contenders(compiled=True)
    names = [c.name for c in rows]
    assert names[0] == contenders.BASE and len(set(names)) == len(names)
    assert {"HinaAdaptive", "HinaAdaptive, 8bit", "HinaAdaptive, compiled", "bitsandbytes AdamW8bit"} <= set(names)
    assert "Automagic_CameAMP_Improved_8Bit, memory_optimized" in names
    named = workloads.build([("w", (64, 64))])
    for c in rows:
        if c.ours:
            assert c.build(named).param_groups[0]["compile"] is c.compiled


def test_effort() -> None:
    row = bench.Row("x", True)
    effort = bench.Effort(rounds=5, seconds=1.0)
    row.seconds = [0.1, 0.1]
    assert not effort.enough(row)
    row.seconds = [0.2, 0.2, 0.2]
    assert effort.enough(row)
    row.seconds = [0.01] * 4
    assert not effort.enough(row)
    row.seconds = [0.01] * 5
    assert effort.enough(row)
    row.seconds = [2.0]
    assert effort.enough(row)


def test_recompilations_are_counted() -> None:
    """An option that changes with every step is compiled in; the schedule's learning rate is not."""
    plain = next(c for c in contenders.contenders(compiled=True) if c.name == "HinaAdaptive, plain, compiled")
    assert bench.recompiles(plain, [("w", (8, 8))]) == 0

    class Stubborn(torch.optim.Optimizer):
        def __init__(self, named: workloads.Named) -> None:
            super().__init__([p for _, p in named], {"lr": 1.0})
            self.add = torch.compile(lambda x, box: x + box[0], fullgraph=True, dynamic=False)
            self.seen = 0

        def step(self, closure: Any = None) -> None:
            self.seen += self.seen < 6
            self.add(self.param_groups[0]["params"][0], [float(self.seen)])

    assert bench.recompiles(contenders.Contender("x", Stubborn, compiled=True), [("w", (8, 8))]) > 0


# -- the report -------------------------------------------------------------------------------------------------------


def test_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Table, JSON and picture of the rows that were asked for."""
    chosen = ["--workload", "B", "--optimizers", "fused", "=HinaAdaptive, plain", "torchao", "--rounds", "2"]
    bench.main([*chosen, "--scale", "0.001", "--out", str(tmp_path)])
    text = capsys.readouterr().out
    assert "B: one matrix: 1 tensors, 0.1M elements" in text
    assert "left out" not in text
    lines = [line for line in text.splitlines() if line.startswith(("torch", "Hina"))]
    assert [line.split("  ")[0] for line in lines] == [contenders.BASE, "torchao AdamW8bit", "HinaAdaptive, plain"]
    found = json.loads((tmp_path / "bench.json").read_text())
    rows = found["workloads"]["B"]["rows"]
    assert len(rows[0]["ratios"]) == 2 and found["machine"]["torch"] == torch.__version__
    assert (tmp_path / "bench.png").read_bytes().startswith(b"\x89PNG")
    table = report.markdown(found)
    assert table.count("\n| ") == 4
    assert len({line.count("|") for line in table.splitlines() if line.startswith("|")}) == 1


def test_a_run_ends_in_time(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bench.main(["--quick", "--workload", "B", "L", "--minutes", "0", "--out", str(tmp_path)])
    rows = [row for e in json.loads((tmp_path / "bench.json").read_text())["workloads"].values() for row in e["rows"]]
    assert len(rows) > 20 and all(row["status"] == "left out: the time was up (--minutes)" for row in rows)
    assert capsys.readouterr().out.count("left out") == len(rows)


@pytest.mark.parametrize("wrong", [["--scale", "0"], ["--scale", "2"], ["--rounds", "0"], ["--workload", "X"]])
def test_bad_arguments(wrong: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        bench.main(wrong)
    assert wrong[0] in capsys.readouterr().err


def test_quartiles() -> None:
    assert report.quartiles([2.0]) == (2.0, 2.0)
    assert report.quartiles([1.0, 2.0, 3.0, 4.0, 5.0]) == (2.0, 4.0)


def test_writing_between_marks(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("a\n<!-- x: begin -->\nold\n<!-- x: end -->\nb\n")
    report.write("new", "x", page)
    assert page.read_text() == "a\n<!-- x: begin -->\n\nnew\n\n<!-- x: end -->\nb\n"
    with pytest.raises(ValueError, match="y: begin"):
        report.write("new", "y", page)
    assert "new" in page.read_text()


def test_the_page_has_the_marks() -> None:
    text = report.PAGE.read_text()
    for mark in ("bench", "passes"):
        assert text.count(f"<!-- {mark}: begin -->") == text.count(f"<!-- {mark}: end -->") == 1


def test_leaves_are_plain_tensors() -> None:
    x = torch.ones(3)
    assert [type(v) for v in gauges.leaves({"a": [x, (x, 3)], "b": None})] == [Tensor, Tensor]


def test_ways_of_image_state_differ_in_state_alone() -> None:
    """One model, its patches and the first losses; what is kept decides the last digits."""
    found = {way: image_state.loss(options, 1e-3, 0, 6, 16) for way, options in image_state.WAYS.items()}
    first = found["fp32, whole"]
    assert len(set(found.values())) == len(found)
    assert all(abs(value / first - 1) < 0.1 for value in found.values()), found
