"""Compiled steps: the trajectory of eager ones, whole graphs only, and no recompilation while a schedule runs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters

from benchmarks.gauges import temporary_bytes
from hina_optim import Automagic_CameAMP, HinaAdaptive
from hina_optim.engine.compiled import compiler
from hina_optim.engine.optimizer import HinaOptimizer
from tests.optim_cases import EVERYTHING, NOTHING
from tests.traced import traced

LR = 3e-4
Params = list[nn.Parameter]


def build(
    shapes: list[tuple[int, ...]], dtype: torch.dtype, kind: type[HinaOptimizer] = HinaAdaptive, **arguments: Any
) -> tuple[Params, HinaOptimizer]:
    generator = torch.Generator().manual_seed(0)
    params = [nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in shapes]
    return params, kind(params, lr=LR, **arguments)


def take_step(params: Params, optimizer: HinaOptimizer, step: int) -> None:
    """One step of a schedule; gradients have a drift, so that signs agree."""
    generator = torch.Generator().manual_seed(100 + step)
    for p in params:
        p.grad = (torch.randn(p.shape, generator=generator) + 0.3).to(p.dtype)
    optimizer.param_groups[0]["lr"] = LR * (1 - step / 20)
    optimizer.step()


def graphs() -> int:
    return int(counters["stats"]["unique_graphs"])


def run_both(
    shapes: list[tuple[int, ...]],
    dtype: torch.dtype = torch.float32,
    steps: int = 12,
    settled: int = 2,
    **arguments: Any,
) -> tuple[Params, Params, HinaOptimizer, HinaOptimizer]:
    """Eager and compiled side by side; after ``settled`` steps nothing is compiled any more, and no graph breaks."""
    torch._dynamo.reset()
    counters.clear()
    eager, first = build(shapes, dtype, **arguments)
    compiled, second = build(shapes, dtype, compile=True, **arguments)
    before = 0
    for step in range(steps):
        take_step(eager, first, step)
        assert graphs() == before, "eager steps compile nothing"
        take_step(compiled, second, step)
        if step >= settled:
            assert graphs() == before, f"compiled again in step {step + 1}"
        before = graphs()
    assert before > 0
    assert not counters["graph_break"]
    assert not counters["recompiles"]
    return eager, compiled, first, second


def compare(eager: Params, compiled: Params, first: HinaOptimizer, second: HinaOptimizer) -> None:
    for p, q in zip(eager, compiled, strict=True):
        torch.testing.assert_close(q, p, rtol=1e-5, atol=1e-6)
        for key, value in first.state[p].items():
            torch.testing.assert_close(
                second.state[q][key], value, rtol=2e-4, atol=1e-6, msg=lambda m, k=key: f"{k}: {m}"
            )


def test_compile_is_asked_for() -> None:
    """Without it nothing is compiled: a first step must not take minutes unasked."""
    counters.clear()
    params, optimizer = build([(3, 2)], torch.float32)
    take_step(params, optimizer, 0)
    assert graphs() == 0


@pytest.mark.slow
def test_default() -> None:
    """Two matrices that are stacked, and a vector; measuring steps and others."""
    compare(*run_both([(64, 48), (64, 48), (96,)], relationship_discovery_interval=4))


@pytest.mark.slow
def test_what_sums_are_made_of_is_not_kept() -> None:
    """A graph of a large matrix takes no memory of its size: several sums of the same values are one loop."""
    (weights,), optimizer = build([(256, 2048)], torch.float32, compile=True)
    for step in range(3):
        take_step([weights], optimizer, step)
    assert temporary_bytes(optimizer.step, weights.device) < weights.numel()  # a quarter of one value an element


@pytest.mark.slow
def test_everything() -> None:
    """All techniques, Fourier transforms and singular values between the graphs."""
    options = {"relationship_discovery_interval": 2, "rank_interval": 2}
    compare(*run_both([(6, 5)], settled=2, **{**EVERYTHING, **options}))


@pytest.mark.slow
def test_images_by_rows_and_columns() -> None:
    """What is low in an element goes from one segment to the next, in matrices, kernels, and where nothing is saved."""
    images = {"spatial_awareness": True, "background_regularization": True, "factored_image_state": True}
    compare(*run_both([(12, 10), (6, 4, 3, 3), (2, 2)], settled=2, **{**NOTHING, **images}))


def test_a_large_parameter_in_chunks() -> None:
    """One graph a segment, for any number of chunks of any size."""
    small = {"max_buffer_memory_mb": 1}
    compare(*run_both([(640, 500)], steps=4, settled=1, **{**NOTHING, "use_cautious": True, **small}))
    assert graphs() == 2


def test_the_number_of_graphs_does_not_grow_with_the_number_of_shapes() -> None:
    """Stacks, large matrices, vectors: one graph a segment for all; a few odd elements run without one."""
    shapes: list[tuple[int, ...]] = [(64, 48), (64, 48), (32, 16), (96,), (96,), (4, 3, 4, 4), (160, 112), (5, 3), (1,)]
    compare(*run_both(shapes, steps=3, settled=1, **NOTHING))
    assert graphs() == 2


def test_elements_that_make_no_lines() -> None:
    """A parameter of a prime number of elements: all but the last few share the graphs of the others."""
    compare(*run_both([(64, 48), (20_011,)], steps=3, settled=1, **NOTHING))
    assert graphs() == 2


@pytest.mark.slow
def test_rows_and_columns() -> None:
    """A stack of matrices and one alone, through the code generator; lr masks, factored moments, confidence, decay."""
    compare(*run_both([(64, 48), (64, 48), (96, 160)], steps=6, settled=1, kind=Automagic_CameAMP))


@pytest.mark.parametrize("state_precision", ["fp32", "bf16"])
def test_every_kind_of_matrix(state_precision: str) -> None:
    """Narrow, wide, odd, tall ones, kernels, and a vector: as traced, without a code generator."""
    shapes: list[tuple[int, ...]] = [(64, 16), (16, 640), (33, 20), (33, 20), (7, 5), (1, 48), (12, 3, 4, 4), (640, 96)]
    with traced():
        arguments = {"kind": Automagic_CameAMP, "state_precision": state_precision}
        eager, compiled, first, second = run_both([*shapes, (96,)], steps=4, settled=1, **arguments)
    by_shape = [b.info.shape for b in second._buckets.prepare() if second._buckets.program(b).lines is None]
    assert not by_shape
    if state_precision == "fp32":
        compare(eager, compiled, first, second)
    for p, q in zip(eager, compiled, strict=True):  # the same noise: few values round to their other neighbor
        assert ((p - q).abs() > 1e-6).float().mean() < 0.02


def test_graphs_of_matrices_do_not_depend_on_their_shapes() -> None:
    """Nor on how many there are, nor on how large ones are cut."""
    counted = []
    few: list[tuple[int, ...]] = [(64, 128), (96, 80), (96, 80)]
    many: list[tuple[int, ...]] = [*few, (128, 320), (128, 96), (160, 96), (160, 96), (640, 512)]
    for shapes in (few, many):
        with traced():
            compare(*run_both(shapes, steps=3, settled=1, kind=Automagic_CameAMP, max_buffer_memory_mb=1))
        counted.append(graphs())
    assert counted[0] == counted[1]


def test_a_bad_gradient_of_a_matrix() -> None:
    """Weights, moments, and what is kept of rows and columns stay; a neighbor in the stack goes on."""
    with traced():
        params, optimizer = build([(64, 48), (64, 48)], torch.float32, Automagic_CameAMP, compile=True)
        for step in range(2):
            take_step(params, optimizer, step)
        before = [p.detach().clone() for p in params]
        state = {k: v.clone() for k, v in optimizer.state[params[0]].items() if isinstance(v, torch.Tensor)}
        params[0].grad[2, 1] = torch.nan  # type: ignore[index]
        optimizer.step()
    assert torch.equal(params[0], before[0]) and not torch.equal(params[1], before[1])
    moved = {k for k, v in state.items() if not torch.equal(optimizer.state[params[0]][k], v)}
    assert moved == {"skipped", "step"} & state.keys()


def test_no_recompilation_in_a_schedule() -> None:
    """200 steps, of which some measure: the graphs of the first."""
    torch._dynamo.reset()
    params, optimizer = build([(64, 48), (32, 16)], torch.float32, compile=True, relationship_discovery_interval=7)
    with traced():
        take_step(params, optimizer, 0)
        before = graphs()
        assert before
        for step in range(1, 200):
            for p in params:
                p.grad = torch.ones_like(p)
            optimizer.param_groups[0]["lr"] = LR * (1 - step / 400)
            optimizer.step()
    assert graphs() == before


def test_without_a_compiler(caplog: pytest.LogCaptureFixture) -> None:
    """It is said, and the steps are the eager ones."""
    from torch._inductor import config

    eager, first = build([(64, 48)], torch.float32)
    params, second = build([(64, 48)], torch.float32, compile=True)
    compiler.cache_clear()
    try:
        with config.patch({"cpp.cxx": ("no-such-compiler",)}), caplog.at_level("WARNING", "hina_optim"):
            for step in range(3):
                take_step(eager, first, step)
                take_step(params, second, step)
    finally:
        compiler.cache_clear()
    assert [r for r in caplog.records if "no C++ compiler" in r.message]
    assert torch.equal(params[0], eager[0])


def test_bf16_with_stochastic_rounding() -> None:
    """The same noise: only where the last bit of float32 decides may a weight round to its other neighbor."""
    eager, compiled, _, _ = run_both([(64, 48)], torch.bfloat16, steps=6, settled=1, **NOTHING)
    p, q = eager[0].detach(), compiled[0].detach()
    moved = p != build([(64, 48)], torch.bfloat16)[0][0]
    assert moved.float().mean() > 0.2
    assert (p != q).float().mean() < 0.01
    torch.testing.assert_close(q, p, rtol=2**-6, atol=1e-6)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_bad_gradient(bad: float) -> None:
    """Compilers fold what only matters for values that are not finite."""
    params, optimizer = build([(64, 48), (64, 48)], torch.float32, compile=True, **NOTHING)
    for step in range(2):
        take_step(params, optimizer, step)
    before = [p.detach().clone() for p in params]
    moments = optimizer.state[params[0]]["exp_avg"].clone()
    params[0].grad[2, 1], params[1].grad[0, 0] = bad, 1.0  # type: ignore[index]
    optimizer.step()
    assert torch.equal(params[0], before[0]) and not torch.equal(params[1], before[1])
    assert torch.equal(optimizer.state[params[0]]["exp_avg"], moments)
    assert [float(optimizer.state[p]["skipped"]) for p in params] == [1.0, 0.0]


def test_learning_rate_as_a_tensor() -> None:
    """Numbers and tensors, in turns: the same graphs."""
    params, optimizer = build([(64, 48)], torch.float32, compile=True, **NOTHING)
    take_step(params, optimizer, 0)
    before = graphs()
    assert before
    for step in range(1, 5):
        params[0].grad = torch.ones_like(params[0])
        optimizer.param_groups[0]["lr"] = torch.tensor(LR / step) if step % 2 else LR / step
        optimizer.step()
    assert graphs() == before
