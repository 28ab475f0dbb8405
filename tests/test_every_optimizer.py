"""One suite that every named optimizer passes: resume, dtypes, shapes, shards, copies, bad gradients, changes."""

from __future__ import annotations

import copy
import functools
import io
import pickle
from typing import Any

import pytest
import torch
from torch import nn

from hina_optim.engine.optimizer import HinaOptimizer
from hina_optim.techniques.base import PeriodicTechnique
from tests.every_optimizer import LR, NAMES, OPTIONS, give_large, large, make, reported
from tests.optim_cases import give, gradients, named_params
from tests.shards import run_sharded

Named = list[tuple[str, nn.Parameter]]
STEPS = 11
every = pytest.mark.parametrize("name", NAMES)


def run(optimizer: HinaOptimizer, named: Named, steps: range, giver: Any = give) -> None:
    for step in steps:
        giver(named, step)
        reported(optimizer, step)


def same_bits(a: Any, b: Any) -> None:
    assert a.keys() == b.keys()
    for key in a:
        if isinstance(a[key], torch.Tensor):
            assert a[key].dtype == b[key].dtype and torch.equal(a[key], b[key]), key
        else:
            assert a[key] == b[key], key


def through_a_file(state: dict[str, Any]) -> dict[str, Any]:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    result: dict[str, Any] = torch.load(file, weights_only=True)
    return result


@every
@pytest.mark.parametrize("case", ["fp32", "bf16", "8bit", "4bit"])
def test_resume_is_exact(name: str, case: str) -> None:
    """Through a file that holds no code, at every phase of the training; all precisions of the state."""
    dtype = torch.bfloat16 if case == "bf16" else torch.float32
    arguments = {"state_precision": case}
    straight = large(dtype)
    expected = make(name, straight, **arguments)
    saved = {}
    for step in range(STEPS):
        if step in (1, 3, 6, 9):
            saved[step] = through_a_file(expected.state_dict()), [p.detach().clone() for _, p in straight]
        run(expected, straight, range(step, step + 1), give_large)
    for stop, (state, weights) in saved.items():
        named = large(dtype)
        optimizer = make(name, named, **arguments)
        optimizer.load_state_dict(state)
        with torch.no_grad():
            for (_, p), w in zip(named, weights, strict=True):
                p.copy_(w)
        run(optimizer, named, range(stop, STEPS), give_large)
        for (label, p), (_, q) in zip(named, straight, strict=True):
            assert torch.equal(p, q), f"{label}, resumed after {stop}"
            same_bits(optimizer.state[p], expected.state[q])


@every
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_shapes_and_dtypes(name: str, dtype: torch.dtype) -> None:
    """Every shape moves, and stays finite; zero gradients included."""
    named = named_params(dtype)
    before = [p.detach().clone() for _, p in named]
    optimizer = make(name, named, lr=1e-3)
    run(optimizer, named, range(6))
    for (label, p), start in zip(named, before, strict=True):
        assert torch.isfinite(p).all(), label
        # a few numbers in 16 bits may all be rounded back
        assert p.numel() < (8 if dtype.itemsize == 2 else 1) or not torch.equal(p, start), label
    for _, p in named:
        p.grad = torch.zeros_like(p)
    optimizer.step()
    assert all(torch.isfinite(p).all() for _, p in named)


@every
@pytest.mark.parametrize("by_rows", [True, False], ids=["rows", "flat"])
def test_shards_change_nothing(name: str, by_rows: bool) -> None:
    """Three uneven shards in one process, in float64, equal the whole; the loss is the same for all."""
    arguments: dict[str, Any] = {"state_precision": "fp32"}
    named = named_params(torch.float64)
    optimizer = make(name, named, **arguments)
    for step in range(8):
        give(named, step)
        optimizer.step()
    start = [(label, p.detach()) for label, p in named_params(torch.float64)]
    found, _ = run_sharded(
        start, gradients, lambda mine: make(name, mine, **arguments), size=3, steps=8, by_rows=by_rows
    )
    for (label, p), q in zip(named, found, strict=True):
        torch.testing.assert_close(q, p.detach(), rtol=1e-9, atol=1e-11, msg=lambda m, n=label: f"{n}: {m}")


@every
def test_chunks_change_nothing(name: str) -> None:
    """A small bound on temporary memory cuts matrices between rows; sums of another order round differently."""
    shape = (300, 520)
    results = []
    for megabytes in (1, 500):
        generator = torch.Generator().manual_seed(0)
        p = nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64))
        optimizer = make(name, [("w", p)], max_buffer_memory_mb=megabytes, state_precision="fp32")
        for step in range(6):
            p.grad = torch.randn(shape, generator=generator, dtype=torch.float64)
            reported(optimizer, step)
        results.append(p.detach())
    torch.testing.assert_close(*results, rtol=1e-9, atol=1e-11)


@every
def test_copies_are_independent_and_complete(name: str) -> None:
    """A copy and a pickle go on like the original, and do not touch it."""
    named = large()
    optimizer = make(name, named)
    run(optimizer, named, range(5), give_large)
    twins = [copy.deepcopy((optimizer, named)), pickle.loads(pickle.dumps((optimizer, named)))]
    run(optimizer, named, range(5, 8), give_large)
    for twin, theirs in twins:
        run(twin, theirs, range(5, 8), give_large)
        for (_, p), (_, q) in zip(named, theirs, strict=True):
            assert p is not q and torch.equal(p, q)
            same_bits(optimizer.state[p], twin.state[q])


@every
def test_a_bad_gradient_is_left_out(name: str) -> None:
    """A parameter with a gradient that is not finite keeps every bit, others go on, and it is named."""
    named = large()
    optimizer = make(name, named)
    run(optimizer, named, range(3), give_large)
    give_large(named, 3)
    victim = dict(named)["ragged"]
    assert victim.grad is not None
    victim.grad[1, 2] = torch.inf
    before = victim.detach().clone(), {k: v.clone() for k, v in optimizer.state[victim].items()}
    others = [p.detach().clone() for _, p in named if p is not victim]
    reported(optimizer, 3)
    assert torch.equal(victim, before[0])
    # what compares parameters digests the last step's measurement at the start of this one
    chain = optimizer._buckets.techniques(victim)
    compared = {slot for one in chain if isinstance(one, PeriodicTechnique) for slot in one.population}
    for key, value in optimizer.state[victim].items():
        assert key in compared | {"step", "skipped"} or torch.equal(value, before[1][key]), key
    assert all(not torch.equal(p, q) for p, q in zip([p for _, p in named if p is not victim], others, strict=True))
    assert optimizer.get_optimization_info()["training_stats"]["skipped_nonfinite"] == {"ragged": 1}


@every
def test_learning_rate_zero_moves_nothing(name: str) -> None:
    """In any phase, with any state."""
    named = large()
    optimizer = make(name, named)
    for step in range(12):
        give_large(named, step)
        still = step % 2 == 1
        optimizer.param_groups[0]["lr"] = 0.0 if still else LR
        before = [p.detach().clone() for _, p in named]
        reported(optimizer, step)
        if still:
            assert all(torch.equal(p, q) for (_, p), q in zip(named, before, strict=True)), step


@every
def test_groups_come_and_parameters_freeze(name: str) -> None:
    """A group added in the middle, a parameter without gradient for a while, and replaced parameters and state."""
    named = large()
    optimizer = make(name, named[:4])
    run(optimizer, named[:4], range(3), give_large)
    optimizer.add_param_group({"params": named[4:], "lr": LR / 2})
    run(optimizer, named, range(3, 5), give_large)
    frozen = named[1][1]
    frozen.requires_grad_(False)
    kept = frozen.detach().clone()
    for step in range(5, 8):
        give_large(named, step)
        frozen.grad = None
        reported(optimizer, step)
    assert torch.equal(frozen, kept)
    frozen.requires_grad_(True)
    run(optimizer, named, range(8, 10), give_large)
    assert not torch.equal(frozen, kept)
    assert [int(optimizer.state[p]["step"]) for _, p in named] == [10, 7, 10, 10, 7, 7, 7]
    # what an engine does that replaces parameters: nothing may be remembered by identity
    old, new = named[0][1], nn.Parameter(named[0][1].detach().clone())
    optimizer.param_groups[0]["params"][0] = new
    optimizer.state[new] = optimizer.state.pop(old)
    named[0] = ("blocks", new)
    run(optimizer, named, range(10, 11), give_large)
    assert int(optimizer.state[new]["step"]) == 11 and not torch.equal(new, old)


@every
def test_gradients_are_read_only(name: str) -> None:
    """step() leaves gradients as they are, and works with non-contiguous and channels-last parameters."""
    generator = torch.Generator().manual_seed(0)
    matrix = nn.Parameter(torch.randn(48, 96, generator=generator).t())
    kernel = nn.Parameter(torch.randn(16, 12, 3, 3, generator=generator).to(memory_format=torch.channels_last))
    plain = [nn.Parameter(matrix.detach().clone().contiguous()), nn.Parameter(kernel.detach().clone().contiguous())]
    first = make(name, [("m", matrix), ("k", kernel)], rounding="nearest")
    second = make(name, [("m", plain[0]), ("k", plain[1])], rounding="nearest")
    for step in range(5):
        for p, q in zip([matrix, kernel], plain, strict=True):
            q.grad = torch.randn(q.shape, generator=generator)
            p.grad = torch.empty_like(p).copy_(q.grad)
        kept = [p.grad.clone() for p in (matrix, kernel, *plain) if p.grad is not None]
        reported(first, step)
        reported(second, step)
        assert all(torch.equal(p.grad, g) for p, g in zip((matrix, kernel, *plain), kept, strict=True) if g is not None)
    torch.testing.assert_close(matrix.detach(), plain[0].detach(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(kernel.detach(), plain[1].detach(), rtol=1e-5, atol=1e-6)


@every
def test_grad_scaler_skips(name: str) -> None:
    """torch's GradScaler: an overflow skips the step, the next one is taken, unscaled."""
    named = large()
    optimizer = make(name, named)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    for step, overflow in enumerate([False, True, False]):
        before = [p.detach().clone() for _, p in named]
        give_large(named, step)
        for _, p in named:
            assert p.grad is not None
            p.grad.mul_(scaler.scale(torch.ones(())))
            if overflow:
                p.grad.view(-1)[0] = torch.inf
        scaler.step(optimizer)
        scaler.update()
        moved = [not torch.equal(p, q) for (_, p), q in zip(named, before, strict=True)]
        # the first gradient of a parameter moves nothing under ADOPT
        assert not any(moved) if overflow or (step == 0 and "Hina" in name) else all(moved)


@every
def test_a_closure_runs_once_with_gradients(name: str) -> None:
    model = nn.Linear(6, 3)
    optimizer = make(name, model.named_parameters())
    calls = []

    def closure() -> torch.Tensor:
        calls.append(torch.is_grad_enabled())
        optimizer.zero_grad()
        loss = model(torch.ones(4, 6)).square().mean()
        loss.backward()
        return loss

    losses = [float(optimizer.step(closure)) for _ in range(3)]
    assert calls == [True] * 3 and losses[2] < losses[0]


#: Recipes whose graphs take long: the last phase only, measuring in every step; lighter ones go through all phases.
LONG = {"HinaAdaptive", "Automagic_CameAMP_Improved", "RefactoredAutomagicCameAMP", "Automagic_CameAMP_Improved_8Bit"}


def twins(name: str) -> tuple[torch.Tensor, torch.Tensor, HinaOptimizer]:
    """The weights after some steps, eager and compiled."""
    torch._dynamo.reset()
    pair = []
    for compile_it in (False, True):
        generator = torch.Generator().manual_seed(0)
        p = nn.Parameter(torch.randn(16, 320, generator=generator))
        short: dict[str, Any] = {"warmup_steps": 2} if "warmup_steps" in OPTIONS[name] else {}
        if name in LONG:
            short = {"warmup_steps": 0, "rank_interval": 1}
        if name == "HinaAdaptive":
            short["relationship_discovery_interval"] = 1
        optimizer = make(name, [("w", p)], compile=compile_it, **short)
        for step in range(2 if name in LONG else 5):
            p.grad = torch.randn(16, 320, generator=generator) + 0.3
            reported(optimizer, step)
        pair.append(p.detach())
    return pair[0], pair[1], optimizer


@every
def test_every_segment_is_one_graph(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole graphs without breaks in every phase; they run as traced, to the bit."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    eager, compiled, _ = twins(name)
    torch.testing.assert_close(compiled, eager, rtol=1e-6, atol=1e-7)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["HinaAdamWOptimizer", "Automagic_CameAMP", "Automagic_CameAMP_8bit"])
def test_generated_code_equals_eager(name: str) -> None:
    """The same through the code generator, state in the class's own precision."""
    eager, compiled, optimizer = twins(name)
    # a code that rounds to its other neighbor moves a weight by a share of one step
    torch.testing.assert_close(compiled, eager, rtol=1e-5, atol=2e-6 if optimizer.STATE_PRECISION == "fp32" else 2 * LR)
