"""Running out of memory inside ``step()``: it is carried through, or nothing is half-done and the error says so."""

from __future__ import annotations

import copy
import functools
import logging
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from hina_optim import Automagic_CameAMP_Improved, HinaAdamW, HinaAdaptive
from hina_optim.engine.exhaustion import is_out_of_memory
from hina_optim.engine.layout import Layout
from hina_optim.engine.optimizer import HinaOptimizer
from hina_optim.engine.runner import Runner
from tests.optim_cases import NOTHING

#: Two stacked, one alone, one that is cut into three chunks.
SHAPES = [(8, 6), (8, 6), (5,), (90, 100)]
WORDS = "CUDA out of memory. Tried to allocate some."

CASES: dict[str, tuple[type[HinaOptimizer], dict[str, Any]]] = {
    "adaptive": (HinaAdaptive, dict(lr=1e-3)),
    "adaptive 8bit": (HinaAdaptive, dict(lr=1e-3, state_precision="8bit", min_8bit_size=0)),
    "adaptive 4bit": (HinaAdaptive, dict(lr=1e-3, state_precision="4bit", min_8bit_size=0)),
    "images bf16": (
        HinaAdaptive,
        dict(lr=1e-3, state_precision="bf16", edge_suppression=True, lora_rank_penalty=True, rank_interval=1),
    ),
    "plain": (HinaAdaptive, dict(lr=1e-3, **NOTHING)),
    "adamw": (HinaAdamW, dict(lr=1e-3, weight_decay=0.1)),
    "came": (Automagic_CameAMP_Improved, dict(lr=1e-4)),
}


class Scarce(TorchDispatchMode):
    """An allocator that fails on the ``first``-th allocation (from 0), once or from then on."""

    def __init__(self, first: int | None = None, lasting: bool = False) -> None:
        super().__init__()
        self.first, self.lasting, self.count = first, lasting, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if allocates(func):
            at, self.count = self.count, self.count + 1
            if self.first is not None and (at == self.first or (self.lasting and at > self.first)):
                raise torch.OutOfMemoryError(WORDS)
        return func(*args, **(kwargs or {}))


@functools.cache
def allocates(func: Any) -> bool:
    """Whether an operation returns a tensor that is neither one it was given nor a view of one."""
    return any("Tensor" in str(r.type) and r.alias_info is None for r in func._schema.returns)


def trained(
    name: str,
    dtype: torch.dtype = torch.float32,
    steps: int = 2,
    shapes: Sequence[tuple[int, ...]] = SHAPES,
    **more: Any,
) -> tuple[list[nn.Parameter], HinaOptimizer]:
    """Parameters and their optimizer after some steps, with the gradient of the next one."""
    kind, arguments = CASES[name]
    generator = torch.Generator().manual_seed(0)
    params = [nn.Parameter((torch.randn(s, generator=generator) * 0.1).to(dtype)) for s in shapes]
    named = [(f"p{i}", p) for i, p in enumerate(params)]
    optimizer = kind(named, **{**arguments, "max_buffer_memory_mb": 0.1, **more})  # type: ignore[call-arg, arg-type]
    for step in range(steps + 1):
        for p in params:
            p.grad = (torch.randn(p.shape, generator=generator) * 0.01).to(dtype)
        if step < steps:
            optimizer.step()
    return params, optimizer


def everything(params: list[nn.Parameter], optimizer: HinaOptimizer) -> dict[str, Tensor]:
    """Weights and state, by name."""
    found = {f"p{i}": p.detach().clone() for i, p in enumerate(params)}
    for i, p in enumerate(params):
        found |= {f"p{i}.{k}": v.clone() for k, v in optimizer.state[p].items()}
    return found


def differing(one: dict[str, Tensor], other: dict[str, Tensor]) -> list[str]:
    assert one.keys() == other.keys()
    return [k for k in one if not torch.equal(one[k], other[k])]


def again(base: tuple[list[nn.Parameter], HinaOptimizer]) -> tuple[list[nn.Parameter], HinaOptimizer]:
    """A copy of both, gradients included."""
    params, optimizer = copy.deepcopy(base)
    for p, q in zip(params, base[0], strict=True):
        p.grad = None if q.grad is None else q.grad.clone()
    return params, optimizer


def allocations(base: tuple[list[nn.Parameter], HinaOptimizer]) -> int:
    optimizer = again(base)[1]
    with Scarce() as watch:
        optimizer.step()
    return watch.count


def places(count: int, most: int) -> Iterator[int]:
    """All of them, or ``most`` of them spread evenly."""
    yield from sorted({round(k * (count - 1) / (most - 1)) for k in range(most)}) if count > most else range(count)


def test_the_watch_counts_what_takes_memory() -> None:
    x = torch.ones(4)
    with Scarce() as watch:
        x.add_(1)
        x[1:].view(3, 1).mul_(2)
        assert watch.count == 0
        x + 1
        torch.empty(3)
    assert watch.count == 2
    with pytest.raises(torch.OutOfMemoryError), Scarce(0):
        x + 1


@pytest.mark.parametrize(
    ("name", "dtype", "most"),
    [
        ("plain", torch.float32, 10_000),
        *((name, torch.float32, 20) for name in CASES if name != "plain"),
        ("adaptive 8bit", torch.bfloat16, 20),
    ],
)
def test_one_failed_allocation(name: str, dtype: torch.dtype, most: int, caplog: pytest.LogCaptureFixture) -> None:
    """Wherever it is: the step ends as if nothing had been, or has not begun and can be taken again."""
    base = trained(name, dtype)
    calm = again(base)
    calm[1].step()
    wanted, start = everything(*calm), [p.detach().clone() for p in base[0]]
    carried = 0
    count = allocations(base)
    assert count > 80
    for n in places(count, most):
        params, optimizer = again(base)
        caplog.clear()
        try:
            with Scarce(n):
                optimizer.step()
            carried += 1
            assert "out of memory" in caplog.text
        except torch.OutOfMemoryError as error:
            assert "Nothing was changed" in str(error) and WORDS in str(error)
            assert all(torch.equal(p, s) for p, s in zip(params, start, strict=True)), n
            optimizer.step()
        assert differing(everything(params, optimizer), wanted) == [], n
    assert carried > 10


@pytest.mark.parametrize("name", CASES)
def test_no_memory_from_some_point_on(name: str) -> None:
    """An error; each parameter is as before or as after, with its state, and the message says how many are."""
    base = trained(name)
    calm = again(base)
    calm[1].step()
    before, after = everything(*base), everything(*calm)
    told = set()
    for n in places(allocations(base), 20):
        params, optimizer = again(base)
        with pytest.raises(torch.OutOfMemoryError) as caught, Scarce(n, lasting=True):
            optimizer.step()
        now = everything(params, optimizer)
        done = 0
        for i, p in enumerate(params):
            mine = [k for k in now if k == f"p{i}" or k.startswith(f"p{i}.")]
            stepped = {k: torch.equal(now[k], after[k]) for k in mine}
            if all(stepped.values()):
                done += 1
                continue
            assert float(optimizer.state[p]["step"]) == 2
            if "p3 was updated in part" in str(caught.value) and i == 3:
                whole_elements(now, before, after)
                told.add("in part")
                continue
            # what a measurement of the step before left is digested, and digesting it again changes nothing
            left = [k for k in mine if not torch.equal(now[k], before[k])]
            assert torch.equal(now[f"p{i}"], before[f"p{i}"]) and all(now[k].ndim < 2 for k in left), (n, left)
        if "Nothing was changed" in str(caught.value):
            assert done == 0
            told.add("nothing")
        else:
            assert f"{done} of {len(params)} parameters were updated" in str(caught.value)
            told.add("some")
    assert {"nothing", "some"} <= told


def whole_elements(now: dict[str, Tensor], before: dict[str, Tensor], after: dict[str, Tensor]) -> None:
    """Of a parameter that is updated in part, every element and its state are of one step."""
    names = [k for k in now if k.startswith("p3") and now[k].shape == now["p3"].shape]
    assert len(names) > 2
    old = torch.stack([now[k] == before[k] for k in names]).all(0)
    new = torch.stack([now[k] == after[k] for k in names]).all(0)
    assert (old | new).all() and (old & ~new).any() and (new & ~old).any()


def test_training_goes_on_after_a_step_that_was_cut_short() -> None:
    """Parameters that took it are one step ahead, and so is their state; all of them train on."""
    base = trained("adaptive")
    for n in places(allocations(base), 6):
        params, optimizer = again(base)
        with pytest.raises(torch.OutOfMemoryError), Scarce(n, lasting=True):
            optimizer.step()
        steps = [float(optimizer.state[p]["step"]) for p in params]
        assert set(steps) <= {2.0, 3.0}
        for _ in range(2):
            optimizer.step()
        assert [float(optimizer.state[p]["step"]) for p in params] == [s + 2 for s in steps]
        optimizer.load_state_dict(optimizer.state_dict())


def test_a_stack_that_was_updated_in_part() -> None:
    """Of thirty parameters that run in three cells, some have taken the step: they and only they are one step ahead."""
    base = trained("plain", shapes=[(20, 16)] * 30)
    assert len(set(base[1]._buckets._of.values())) == 1
    calm = again(base)
    calm[1].step()
    before, after = everything(*base), everything(*calm)
    parted = 0
    for n in places(allocations(base), 12):
        params, optimizer = again(base)
        with pytest.raises(torch.OutOfMemoryError), Scarce(n, lasting=True):
            optimizer.step()
        now, steps = everything(params, optimizer), []
        for i, p in enumerate(params):
            mine = [k for k in now if k == f"p{i}" or k.startswith(f"p{i}.")]
            steps.append(float(optimizer.state[p]["step"]))
            assert all(torch.equal(now[k], (after if steps[-1] == 3 else before)[k]) for k in mine), (n, i)
        parted += len(set(steps)) == 2
        for _ in range(2):
            optimizer.step()
        assert [float(optimizer.state[p]["step"]) for p in params] == [s + 2 for s in steps]
    assert parted > 3


def test_no_memory_for_the_state() -> None:
    """The first step: state is allocated before any weight changes."""
    base = trained("adaptive", steps=0)
    calm = again(base)
    calm[1].step()
    wanted = everything(*calm)
    for n in places(allocations(base), 20):
        params, optimizer = again(base)
        try:
            with Scarce(n):
                optimizer.step()
        except torch.OutOfMemoryError as error:
            assert "Nothing was changed" in str(error)
            assert all(torch.equal(p, q) for p, q in zip(params, base[0], strict=True))
            optimizer.step()
        assert differing(everything(params, optimizer), wanted) == [], n


def test_other_errors_pass_and_are_counted() -> None:
    """An interruption in the middle: what has taken the step has taken it, and no more."""
    params, optimizer = trained("adaptive")

    class Interrupt(Scarce):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            try:
                return super().__torch_dispatch__(func, types, args, kwargs)
            except torch.OutOfMemoryError:
                raise KeyboardInterrupt from None

    before = [p.detach().clone() for p in params]
    with pytest.raises(KeyboardInterrupt), Interrupt(allocations((params, optimizer)) * 2 // 3):
        optimizer.step()
    moved = [not torch.equal(p, b) for p, b in zip(params, before, strict=True)]
    assert any(moved) and not all(moved)
    assert [float(optimizer.state[p]["step"]) for p in params] == [3.0 if m else 2.0 for m in moved]


def test_out_of_memory_in_the_closure_is_the_models() -> None:
    _, optimizer = trained("adamw")

    def closure() -> float:
        raise torch.OutOfMemoryError(WORDS)

    with pytest.raises(torch.OutOfMemoryError) as caught:
        optimizer.step(closure)
    assert str(caught.value) == WORDS


def test_errors_of_allocators_are_told_from_others() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 60, dtype=torch.uint8)
    assert is_out_of_memory(caught.value)
    assert is_out_of_memory(MemoryError()) and is_out_of_memory(torch.OutOfMemoryError("x"))
    assert is_out_of_memory(RuntimeError("MPS backend out of memory (MPS allocated: 1 GB)"))
    assert not is_out_of_memory(RuntimeError("shape mismatch")) and not is_out_of_memory(ValueError("out of memory"))


class Reserving(Runner):
    """Sets memory aside on a CPU, too."""

    RESERVING = frozenset({"cpu"})


class Upto(TorchDispatchMode):
    """Has ``most`` bytes for the eight pieces in which memory is set aside."""

    def __init__(self, most: int) -> None:
        super().__init__()
        self.most = most

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.empty.memory_format and result.nbytes * 8 > self.most:
            raise torch.OutOfMemoryError(WORDS)
        return result


def test_a_step_remembers_how_much_there_was(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """The next one does not ask in vain again, unless it is asked for another size."""
    monkeypatch.setattr(Runner, "RESERVING", frozenset({"cpu"}))
    p = nn.Parameter(torch.ones(600, 500))
    p.grad = torch.ones_like(p)
    optimizer = HinaAdamW([("weight", p)], lr=1e-3, max_buffer_memory_mb=64)
    for size, said in ((64, 2), (64, 0), (32, 1)):
        caplog.clear()
        optimizer.param_groups[0]["max_buffer_memory_mb"] = size
        with Upto(20_000_000):
            optimizer.step()
        assert len([r for r in caplog.records if "in pieces of" in r.getMessage()]) == said


def test_memory_is_set_aside_before_anything_changes(caplog: pytest.LogCaptureFixture) -> None:
    """With too little, in smaller pieces; with none, not at all."""
    p = nn.Parameter(torch.ones(600, 500))
    p.grad = torch.ones_like(p)
    optimizer = HinaAdamW([("weight", p)], lr=1e-3)
    work = optimizer._buckets.prepare()
    programs = [(b, optimizer._buckets.program(b)) for b in work]
    runner = Reserving(Layout(), 64_000_000)
    with pytest.raises(torch.OutOfMemoryError, match="Nothing was changed"), Upto(1000):
        runner.step(programs)
    assert runner.updated == {} and (p == 1).all()
    for most, pieces in ((30_000_000, 64_000_000), (20_000_000, 16_000_000)):
        caplog.clear()
        runner = Reserving(Layout(), 64_000_000)
        with caplog.at_level(logging.WARNING, "hina_optim"), Upto(most):
            runner._reserve(programs)
        assert runner.max_bytes == pieces and bool(caplog.records) == (pieces < 64_000_000)
    runner.step(programs)
    assert [*runner.updated.values()] == [[(0, 1)]]
