"""What goes wrong on one rank is a clear error on all of them, or is put right on all of them; never a hang.

The ranks of a world catch what ``step()`` raises, so every one of them tells how it ended; a collective that some do
not join is an error of gloo, whose words no test here accepts.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

from hina_optim import HinaAdaptive
from hina_optim.engine import bookkeeping
from hina_optim.engine.optimizer import HinaOptimizer
from tests.optim_cases import EVERYTHING
from tests.sharded.engines import Built, build, gradients, joined, plain, same_bits
from tests.sharded.world import run

SHARDED = [
    ("fsdp2", 2),
    ("hsdp", 4),
    pytest.param("fsdp2", 4, marks=pytest.mark.sharded),
    pytest.param("fsdp2 tp", 4, marks=pytest.mark.sharded),
]
everywhere = pytest.mark.parametrize(("engine", "size"), SHARDED)
LAST = 3

Spoil = Callable[[int, int, Built, HinaOptimizer], None]


def snapshot(built: Built, optimizer: HinaOptimizer) -> dict[str, Tensor]:
    """Bits of all weights and state that are here."""
    found = {name: plain(p).clone() for name, p in built.named}
    for name, p in built.named:
        for slot, value in optimizer.state.get(p, {}).items():
            found[f"{name}/{slot}"] = plain(value).clone()
    return found


def spoiled(rank: int, engine: str, spoil: Spoil) -> list[tuple[str, list[str]]]:
    """Twice three steps, of which the first or the last is spoiled; its error here, and what changed in spite of it."""
    ended = []
    for when in (0, LAST - 1):
        built = build(engine)
        optimizer = HinaAdaptive(built.named, lr=1e-3)
        error = ""
        for step in range(LAST):
            built.give(gradients(built.shapes, step))
            if step != when:
                optimizer.step()
                continue
            spoil(rank, step, built, optimizer)
            before = snapshot(built, optimizer)
            try:
                optimizer.step()
            except Exception as raised:
                error = f"{type(raised).__name__}: {raised}"
                break
        after = snapshot(built, optimizer)
        dist.barrier()  # all are here: nobody waits in a step for another one
        ended.append((error, [key for key, value in before.items() if not same_bits(value, after[key])]))
    return ended


def refused(engine: str, size: int, spoil: Spoil, *words: str) -> None:
    """A step is refused on all ranks, at the first step and later, with these words on one; nothing changes."""
    for ended in zip(*run(spoiled, size, engine, spoil, limit=60.0), strict=True):
        errors = [error for error, _ in ended]
        assert all(errors), f"some ranks went on: {errors}"
        assert not any("gloo" in error or "Timed out" in error for error in errors), errors
        assert any(all(word in error for word in words) for error in errors), errors
        assert [changed for _, changed in ended] == [[]] * size


# -- gradients on some ranks only ------------------------------------------------------------------------------------


def no_gradient_at_all(rank: int, step: int, built: Built, optimizer: HinaOptimizer) -> None:
    if rank == 1:
        for _, p in built.named:
            p.grad = None


def one_gradient_missing(rank: int, step: int, built: Built, optimizer: HinaOptimizer) -> None:
    if rank == 0:
        dict(built.named)["up.base_layer.weight"].grad = None


def one_gradient_only(rank: int, step: int, built: Built, optimizer: HinaOptimizer) -> None:
    for name, p in built.named:
        if rank != 1 or name != "norm.weight":
            p.grad = None


@everywhere
def test_a_rank_with_no_gradient_at_all(engine: str, size: int) -> None:
    refused(engine, size, no_gradient_at_all, "some ranks have a gradient and others none")


@everywhere
def test_a_gradient_that_one_rank_lacks(engine: str, size: int) -> None:
    refused(engine, size, one_gradient_missing, "up.base_layer.weight", "some ranks have a gradient and others none")


@everywhere
def test_a_gradient_that_one_rank_alone_has(engine: str, size: int) -> None:
    refused(engine, size, one_gradient_only, "norm.weight", "some ranks have a gradient and others none")


def no_gradient_anywhere(rank: int, step: int, built: Built, optimizer: HinaOptimizer) -> None:
    for _, p in built.named:
        p.grad = None


def test_no_gradient_on_any_rank_is_no_step() -> None:
    for ended in run(spoiled, 2, "fsdp2", no_gradient_anywhere):
        (error, first), (late_error, late) = ended
        assert not error and not late_error
        assert first and not late  # by the steps after it


# -- gradients of the wrong kind -------------------------------------------------------------------------------------


def sparse_beside(rank: int) -> str:
    mesh = init_device_mesh("cpu", (2,))
    named = [("weight", nn.Parameter(distribute_tensor(torch.ones(4, 4), mesh, [Shard(0)])))]
    named.append(("embedding", nn.Parameter(torch.ones(4, 4))))
    optimizer = HinaAdaptive(named, lr=1e-3)
    for _, p in named:
        p.grad = torch.ones_like(p)
    if rank == 1:
        named[1][1].grad = torch.ones(4, 4).to_sparse()
    with pytest.raises(RuntimeError) as caught:
        optimizer.step()
    assert all(bool((plain(p) == 1).all()) for _, p in named)
    return str(caught.value)


def test_a_sparse_gradient_on_one_rank() -> None:
    here, there = run(sparse_beside, 2)
    assert "embedding" in there and "sparse" in there, there
    assert "another rank" in here, here


def bad_option(rank: int, step: int, built: Built, optimizer: HinaOptimizer) -> None:
    if rank == 1:
        optimizer.param_groups[0]["betas"] = (0.9, 2.0)


def bad_options(rank: int, step: int, built: Built, optimizer: HinaOptimizer) -> None:
    optimizer.param_groups[0]["betas"] = (0.9, 2.0)


def test_a_bad_option() -> None:
    refused("fsdp2", 2, bad_option)  # that it is bad, or that the groups differ
    refused("fsdp2", 2, bad_options, "2.0", "is not valid")


def other_lr(rank: int, step: int, built: Built, optimizer: HinaOptimizer) -> None:
    optimizer.param_groups[0]["lr"] = 1e-3 * (1 + rank)


@everywhere
def test_options_that_differ_between_ranks(engine: str, size: int) -> None:
    refused(engine, size, other_lr, "differ between the ranks")


def other_tensor_lr(rank: int, step: int, built: Built, optimizer: HinaOptimizer) -> None:
    optimizer.param_groups[0]["lr"] = torch.tensor(1e-3 * rank)


def test_rates_in_tensors_that_differ() -> None:
    """Zero on one rank: it alone would look whether this is a step at all."""
    refused("fsdp2", 2, other_tensor_lr, "differ between the ranks")


def other_order(rank: int, step: int, built: Built, optimizer: HinaOptimizer) -> None:
    if rank == 1:
        params = optimizer.param_groups[0]["params"]
        params[0], params[1] = params[1], params[0]


def test_parameters_in_another_order_on_one_rank() -> None:
    refused("fsdp2", 2, other_order, "differ between the ranks")


# -- what one rank does alone ----------------------------------------------------------------------------------------


def loads(rank: int, optimizer: HinaOptimizer) -> None:
    if rank == 1:
        optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))


def saves(rank: int, optimizer: HinaOptimizer) -> None:
    if rank == 0:
        optimizer.state_dict()


def moves(rank: int, optimizer: HinaOptimizer) -> None:
    if rank == 1:  # as a framework does that puts state on a device
        for state in optimizer.state.values():
            state["exp_avg"] = state["exp_avg"].clone()


def alone_between(rank: int, engine: str, act: Callable[[int, HinaOptimizer], None] | None) -> Any:
    built = build(engine)
    optimizer = HinaAdaptive(built.named, lr=3e-4)
    for step in range(5):
        if step in (1, 3) and act is not None:
            act(rank, optimizer)
        built.give(gradients(built.shapes, step))
        optimizer.step()
    return built.pieces()


@pytest.mark.parametrize("act", [loads, saves, moves], ids=lambda act: act.__name__)
def test_what_one_rank_does_alone_changes_nothing(act: Callable[[int, HinaOptimizer], None]) -> None:
    shapes = build("one").shapes
    expected = joined(run(alone_between, 2, "fsdp2", None), shapes)
    found = joined(run(alone_between, 2, "fsdp2", act, limit=60.0), shapes)
    for name in shapes:
        assert same_bits(found[name], expected[name]), name


def lost_state(rank: int, step: int, built: Built, optimizer: HinaOptimizer) -> None:
    if rank == 1 and not step:  # nothing to lose yet
        optimizer.param_groups[0]["lr"] *= 2
    elif rank == 1:
        del optimizer.state[dict(built.named)["up.base_layer.weight"]]


@pytest.mark.parametrize(("engine", "size"), [("fsdp2", 2), pytest.param("fsdp2 tp", 4, marks=pytest.mark.sharded)])
def test_state_that_one_rank_has_lost(engine: str, size: int) -> None:
    refused(engine, size, lost_state, "differ")


def without_room(rank: int, engine: str) -> tuple[list[str], Any]:
    """Memory runs out while the state of one rank is allocated, and is there when the step is taken again."""
    built = build(engine)
    optimizer = HinaAdaptive(built.named, lr=1e-3)
    made, errors = bookkeeping.Bucket, []

    def fails(*args: Any) -> None:
        raise MemoryError("no room for state")

    for step in range(LAST):
        built.give(gradients(built.shapes, step))
        if rank == 1 and step == 0:
            bookkeeping.Bucket = fails  # type: ignore[assignment, misc]
            with pytest.raises(torch.OutOfMemoryError, match="no room for state") as own:
                optimizer.step()
            bookkeeping.Bucket = made  # type: ignore[misc]
            errors.append(str(own.value))
        elif step == 0:
            with pytest.raises(RuntimeError, match="another rank cannot take this step") as other:
                optimizer.step()
            errors.append(str(other.value))
        optimizer.step()
    return errors, built.pieces()


@pytest.mark.parametrize(("engine", "size"), [("fsdp2", 2), pytest.param("fsdp2 tp", 4, marks=pytest.mark.sharded)])
def test_state_that_one_rank_has_no_room_for(engine: str, size: int) -> None:
    """All say so; the step can be taken again, and the training is the same."""
    shapes = build("one").shapes
    built = build("one")
    optimizer = HinaAdaptive(built.named, lr=1e-3)
    for step in range(LAST):
        built.give(gradients(built.shapes, step))
        optimizer.step()
    expected = joined([built.pieces()], shapes)
    ranks = run(without_room, size, engine, limit=60.0)
    assert all(len(errors) == 1 for errors, _ in ranks)
    found = joined([pieces for _, pieces in ranks], shapes)
    for name in shapes:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-5, atol=1e-7)


# -- what is not finite ----------------------------------------------------------------------------------------------


def with_nan(rank: int, engine: str, bad: bool) -> tuple[dict[str, tuple[Tensor, Tensor]], dict[str, float]]:
    built = build(engine)
    optimizer = HinaAdaptive(built.named, lr=1e-3, **EVERYTHING)
    for step in range(LAST):
        whole: dict[str, Any] = gradients(built.shapes, step)
        if bad and step == 1:
            whole["down.base_layer.weight"][-1, -1] = float("nan")  # one element, on one rank
            whole["norm.bias"][0] = float("inf")
        built.give(whole)
        optimizer.step()
    return built.pieces(), {name: float(plain(optimizer.state[p]["skipped"])) for name, p in built.named}


@pytest.mark.parametrize(("engine", "size"), [("fsdp2", 2), ("fsdp2", 4), ("fsdp2 tp", 4)])
def test_nan_in_one_shard_leaves_the_parameter_alone_on_all(engine: str, size: int) -> None:
    shapes = build("one").shapes
    pieces, skipped = with_nan(0, "one", True)
    expected = joined([pieces], shapes)
    ranks = run(with_nan, size, engine, True)
    found = joined([pieces for pieces, _ in ranks], shapes)
    for name in shapes:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-5, atol=1e-7, msg=lambda m, n=name: f"{n}: {m}")
    assert all(counts == skipped for _, counts in ranks)
    assert skipped["down.base_layer.weight"] == skipped["norm.bias"] == 1 and sum(skipped.values()) == 2


# -- parameters that lie otherwise -----------------------------------------------------------------------------------


def partial(rank: int) -> str:
    mesh = init_device_mesh("cpu", (2,))
    p = nn.Parameter(DTensor.from_local(torch.ones(4, 4), mesh, [Partial()]))
    optimizer = HinaAdaptive([("weight", p)], lr=1e-3)
    p.grad = DTensor.from_local(torch.ones(4, 4), mesh, [Partial()])
    with pytest.raises(RuntimeError) as caught:
        optimizer.step()
    return str(caught.value)


def test_a_partial_parameter_is_refused() -> None:
    for message in run(partial, 2):
        assert "Partial" in message or "_P" in message or "P(sum)" in message, message
        assert "Shard" in message and "redistribute" in message, message


def mixture(rank: int, placements: list[Any], plain_too: bool, gradient: list[Any]) -> list[Tensor]:
    """Train three parameters, one of them a DTensor in these placements, beside plain ones."""
    generator = torch.Generator().manual_seed(1)
    shapes = {"first": (5,), "weight": (6, 10), "last": (4, 3)}
    start = {name: torch.randn(*shape, generator=generator) for name, shape in shapes.items()}
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))

    def spread(name: str, value: Tensor, where: list[Any]) -> Tensor:
        return value.clone() if plain_too and name != "weight" else distribute_tensor(value, mesh, where)

    named = [
        (name, nn.Parameter(spread(name, value, placements if name == "weight" else [Shard(0)])))
        for name, value in start.items()
    ]
    optimizer = HinaAdaptive(named, lr=1e-3, **EVERYTHING)
    for _ in range(6):
        for name, p in named:
            g = torch.randn(*shapes[name], generator=generator)
            p.grad = spread(name, g, gradient if name == "weight" else [Shard(0)])
        optimizer.step()
    return [p.full_tensor().detach() if isinstance(p, DTensor) else p.detach() for _, p in named]


def mixture_alone() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    shapes = {"first": (5,), "weight": (6, 10), "last": (4, 3)}
    named = [(name, nn.Parameter(torch.randn(*shape, generator=generator))) for name, shape in shapes.items()]
    optimizer = HinaAdaptive(named, lr=1e-3, **EVERYTHING)
    for _ in range(6):
        for _, p in named:
            p.grad = torch.randn(p.shape, generator=generator)
        optimizer.step()
    return [p.detach() for _, p in named]


@pytest.mark.parametrize("plain_too", [False, True], ids=["all", "mixed"])
@pytest.mark.parametrize(
    ("placements", "gradient"),
    [
        ([Shard(0)], [Shard(0)]),
        ([Shard(1)], [Shard(1)]),
        ([Shard(0)], [Shard(1)]),
        ([Shard(0)], [Replicate()]),
        ([Replicate()], [Replicate()]),
        ([Replicate()], [Shard(0)]),
    ],
    ids=lambda where: str(where[0]),
)
@pytest.mark.parametrize("size", [2, pytest.param(4, marks=pytest.mark.sharded)])
def test_any_placement_and_plain_ones_beside(
    size: int, placements: list[Any], gradient: list[Any], plain_too: bool
) -> None:
    """Right, also where the gradient lies otherwise, and the same on all ranks."""
    expected = mixture_alone()
    for found in run(mixture, size, placements, plain_too, gradient):
        for mine, one in zip(found, expected, strict=True):
            torch.testing.assert_close(mine, one, rtol=1e-5, atol=1e-7)


class Scaled(nn.Module):
    """Has a parameter of rank 0, which FSDP2 does not take."""

    def __init__(self, trained: bool) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(2.0), requires_grad=trained)
        self.linear = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) * self.scale


def with_scalar(rank: int, trained: bool, sharded: bool) -> list[Tensor]:
    torch.manual_seed(0)
    model = Scaled(trained)
    if sharded:
        fully_shard(model, ignored_params={model.scale})
    optimizer = HinaAdaptive(model.named_parameters(), lr=1e-3, **EVERYTHING)
    for step in range(4):
        optimizer.zero_grad()
        x = torch.randn(8, 6, generator=torch.Generator().manual_seed(step))
        model(x).square().mean().backward()
        optimizer.step()
    return [p.full_tensor().detach() if isinstance(p, DTensor) else p.detach() for p in model.parameters()]


@pytest.mark.parametrize("trained", [False, True], ids=["frozen", "trained"])
def test_a_scalar_parameter_beside_sharded_ones(trained: bool) -> None:
    expected = with_scalar(0, trained, False)
    assert (float(expected[0]) == 2.0) is not trained
    for found in run(with_scalar, 2, trained, True):
        for mine, one in zip(found, expected, strict=True):
            torch.testing.assert_close(mine, one, rtol=1e-4, atol=1e-6)
