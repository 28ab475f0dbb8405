"""What users and frameworks do to an optimizer between steps does to a sharded one what it does in one process."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.tensor.debug import CommDebugMode

from hina_optim import HinaAdaptive
from hina_optim.engine.optimizer import HinaOptimizer
from tests.every_optimizer import NAMES, loss_of
from tests.optim_cases import EVERYTHING, NOTHING
from tests.sharded.cells import KINDS, made
from tests.sharded.engines import Built, build, gradients, joined
from tests.sharded.world import run

Pieces = dict[str, tuple[Tensor, Tensor]]
Life = Callable[[Built], None]
STEPS = 8
OTHERS = [("ddp", 2), ("fsdp2", 2), ("fsdp2", 4), ("hsdp", 4), ("tp", 2)]
PLACES = [("fsdp2 tp", 4), *[pytest.param(*place, marks=pytest.mark.sharded) for place in OTHERS]]
everywhere = pytest.mark.parametrize(("engine", "size"), PLACES)


def taken(built: Built, optimizer: HinaOptimizer, steps: range, closure: bool = False) -> None:
    for step in steps:
        built.give(gradients(built.shapes, step))
        optimizer.report_loss(loss_of(step))
        optimizer.step((lambda: torch.tensor(loss_of(step))) if closure else None)  # noqa: B023


def lived(rank: int, engine: str, life: Life, dtype: torch.dtype = torch.float64) -> Pieces:
    built = build(engine, dtype)
    life(built)
    return built.pieces()


def same(engine: str, size: int, life: Life, dtype: torch.dtype = torch.float64, close: float = 1e-9) -> None:
    """A life ends with the same weights on an engine as in one process."""
    shapes = build("one").shapes
    expected = joined([lived(0, "one", life, dtype)], shapes)
    found = joined(run(lived, size, engine, life, dtype), shapes)
    start = joined([build("one", dtype).pieces()], shapes)
    for name, value in expected.items():
        moved = (value - start[name]).double().norm()
        assert moved > 0, name
        error = float((found[name] - value).double().norm() / moved)
        assert error <= close, f"{name} is off by {error}"


# -- groups ----------------------------------------------------------------------------------------------------------


def in_groups(built: Built) -> list[dict[str, Any]]:
    def of(*words: str) -> list[tuple[str, Any]]:
        return [(name, p) for name, p in built.named if any(word in name for word in words)]

    return [
        {"params": of("embed", "norm", "conv"), "name": "base", "weight_decay": 0.0},
        {"params": of("up."), "name": "up", "lr": 1e-4},
        {"params": of("down."), "name": "down", "weight_decay": 0.1},
    ]


def groups_and_a_schedule(built: Built) -> None:
    optimizer = HinaAdaptive(in_groups(built), lr=3e-4, **EVERYTHING)
    for step in range(STEPS):
        for group in optimizer.param_groups:
            group["lr"] *= 0.9
        taken(built, optimizer, range(step, step + 1))


def group_by_group(built: Built) -> None:
    """As DeepSpeed steps: the lists of all other groups are empty."""
    optimizer = HinaAdaptive(in_groups(built), lr=3e-4, **EVERYTHING)
    lists = [group["params"] for group in optimizer.param_groups]
    for step in range(STEPS):
        built.give(gradients(built.shapes, step))
        for g, params in enumerate(lists):
            for h, group in enumerate(optimizer.param_groups):
                group["params"] = params if g == h else []
            optimizer.step()
        for group, params in zip(optimizer.param_groups, lists, strict=True):
            group["params"] = params


def a_group_comes_later(built: Built) -> None:
    first, second, third = in_groups(built)
    optimizer = HinaAdaptive([first, second], lr=3e-4, **EVERYTHING)
    taken(built, optimizer, range(3))
    optimizer.add_param_group(third)
    taken(built, optimizer, range(3, STEPS))


def freezing(built: Built) -> None:
    """Some have a gradient in some steps only, on all ranks alike."""
    optimizer = HinaAdaptive(built.named, lr=3e-4, **EVERYTHING)
    for step in range(STEPS):
        whole: dict[str, Any] = gradients(built.shapes, step)
        if step % 3 == 1:
            whole["up.base_layer.weight"] = whole["norm.bias"] = None
        built.give(whole)
        optimizer.step()


def adapters_only(built: Built) -> None:
    """A small optimizer for the adapters, another one for all else."""
    mine = [(name, p) for name, p in built.named if "lora" in name]
    optimizer = HinaAdaptive(mine, lr=3e-4, **EVERYTHING)
    others = HinaAdaptive([(name, p) for name, p in built.named if "lora" not in name], lr=3e-4, **NOTHING)
    for step in range(STEPS):
        built.give(gradients(built.shapes, step))
        optimizer.step()
        others.step()


def with_a_closure(built: Built) -> None:
    optimizer = HinaAdaptive(built.named, lr=3e-4, use_loss_context=True)
    taken(built, optimizer, range(STEPS), closure=True)


# -- state -----------------------------------------------------------------------------------------------------------


def initialized_first(built: Built) -> None:
    optimizer = HinaAdaptive(built.named, lr=3e-4, **EVERYTHING)
    optimizer.init_state()
    taken(built, optimizer, range(STEPS))


def with_a_copy(built: Built) -> None:
    """Its state goes through a state dict in the middle of the training, as a framework's ``prepare`` takes it."""
    optimizer = HinaAdaptive(built.named, lr=3e-4, **EVERYTHING)
    taken(built, optimizer, range(3))
    other = HinaAdaptive(built.named, lr=3e-4, **EVERYTHING)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    taken(built, other, range(3, STEPS))


def without_moments_of_adopt(built: Built) -> None:
    """An option is changed in the middle."""
    optimizer = HinaAdaptive(built.named, lr=3e-4)
    taken(built, optimizer, range(3))
    optimizer.param_groups[0]["use_adopt_stability"] = False
    optimizer.param_groups[0]["use_lr_mask"] = False
    taken(built, optimizer, range(3, STEPS))


LIVES = [
    groups_and_a_schedule,
    group_by_group,
    a_group_comes_later,
    freezing,
    adapters_only,
    with_a_closure,
    initialized_first,
    with_a_copy,
    without_moments_of_adopt,
]


@everywhere
@pytest.mark.parametrize("life", LIVES, ids=lambda life: life.__name__)
def test_lives(engine: str, size: int, life: Life) -> None:
    same(engine, size, life)


def converted(built: Built) -> None:
    """Elements only: to the bit, whatever is rounded when."""
    optimizer = HinaAdaptive(built.named, lr=3e-4, min_8bit_size=500, **NOTHING)
    taken(built, optimizer, range(2))
    for i, precision in enumerate(("8bit", "4bit", "bf16", "fp32")):
        optimizer.set_state_precision(precision)
        taken(built, optimizer, range(2 + 2 * i, 4 + 2 * i))
    optimizer.set_state_device("cpu")
    taken(built, optimizer, range(10, 12))
    assert optimizer.state_bytes() > 0


@everywhere
def test_state_is_converted_alike(engine: str, size: int) -> None:
    if engine == "fsdp2 last":
        pytest.skip("8 bits are refused between columns")
    same(engine, size, converted, torch.float32, close=0.0)


def swapped(rank: int, name: str) -> Pieces:
    """The optimizer is built with plain parameters, which a framework replaces by DTensors (accelerate, FSDP2)."""
    whole, built = build("one", torch.float64), build("fsdp2", torch.float64)
    optimizer = made(name, whole.named, "fp64")
    new = dict(built.named)
    for group in optimizer.param_groups:
        names = {p: n for n, p in whole.named}
        group["params"] = [new[names[p]] for p in group["params"]]
    taken(built, optimizer, range(STEPS))
    return built.pieces()


@pytest.mark.parametrize(
    "name", [n if n == "HinaAdaptive" else pytest.param(n, marks=pytest.mark.sharded) for n in NAMES]
)
def test_parameters_may_be_replaced_by_sharded_ones(name: str) -> None:
    shapes = build("one").shapes

    def life(built: Built) -> None:
        taken(built, made(name, built.named, "fp64"), range(STEPS))

    expected = joined([lived(0, "one", life)], shapes)
    found = joined(run(swapped, 2, name), shapes)
    for p, value in expected.items():
        torch.testing.assert_close(found[p], value, rtol=1e-9, atol=1e-12, msg=lambda m, n=p: f"{n}: {m}")


# -- real training ---------------------------------------------------------------------------------------------------


def really(built: Built) -> None:
    optimizer = HinaAdaptive(built.named, lr=3e-4, **EVERYTHING)
    for step in range(STEPS):
        loss = built.backward(step)
        optimizer.report_loss(loss)
        optimizer.step()


@pytest.mark.parametrize(
    ("engine", "size"),
    [
        ("fsdp2", 2),
        *[
            pytest.param(*place, marks=pytest.mark.sharded)
            for place in [
                ("ddp", 4),
                ("fsdp2", 4),
                ("fsdp2 last", 4),
                ("fsdp2 offload", 2),
                ("hsdp", 4),
                ("fsdp2 tp", 4),
            ]
        ],
    ],
)
def test_real_training(engine: str, size: int) -> None:
    """Forward and backward in float64 by the engine, whose gradients are summed in another order."""
    same(engine, size, really, torch.float64, close=1e-7)


@pytest.mark.parametrize(("engine", "size"), [("ddp", 2), pytest.param("hsdp", 4, marks=pytest.mark.sharded)])
def test_replicas_of_bf16_weights_stay_equal(engine: str, size: int) -> None:
    """To the bit after 20 steps of real training, though every weight is rounded at random."""
    found = run(lived, size, engine, rounded, torch.bfloat16)
    weights = joined(found, build("one").shapes)  # raises where replicas differ
    start = joined([build("one", torch.bfloat16).pieces()], build("one").shapes)
    assert all(not torch.equal(weights[name], start[name]) for name in weights if "weight" in name)


def rounded(built: Built) -> None:
    optimizer = HinaAdaptive(built.named, lr=3e-4, **EVERYTHING)
    for step in range(20):
        optimizer.report_loss(built.backward(step))
        optimizer.step()


# -- collectives -----------------------------------------------------------------------------------------------------


def counted(rank: int, engine: str, copies: int, options: dict[str, Any]) -> tuple[dict[str, int], int]:
    """Collectives of a step, and the phases that it had."""
    built = build(engine, copies=copies)
    optimizer = HinaAdaptive(built.named, lr=3e-4, **options)
    taken(built, optimizer, range(3))
    built.give(gradients(built.shapes, 3))
    with CommDebugMode() as mode:
        optimizer.step()
    buckets = set(optimizer._buckets._of.values())
    phases = max(len(program.segments) - 1 for bucket in buckets for program in bucket.programs.values())
    return {str(op).rpartition(".")[2]: n for op, n in mode.get_comm_counts().items()}, phases


@pytest.mark.parametrize(
    ("engine", "size", "agreement", "cut"),
    [("fsdp2", 2, 1, 1), ("hsdp", 4, 2, 1), ("fsdp2 tp", 4, 2, 2), ("ddp", 2, 0, 0), ("tp", 2, 1, 1)],
)
@pytest.mark.parametrize("options", [NOTHING, {}], ids=["AdamW", "default"])
def test_collectives_of_a_step(engine: str, size: int, agreement: int, cut: int, options: dict[str, Any]) -> None:
    """One agreement on the host and one sum a phase, each once for a dimension of the mesh, however many parameters."""
    for copies in (1, 3):
        for counts, phases in run(counted, size, engine, copies, options):
            assert phases >= 1
            assert counts == ({"allreduce_": agreement + cut * phases} if cut else {}), (copies, counts, phases)


@pytest.mark.sharded
@pytest.mark.parametrize("kind", ["fp32", "8bit"])
@pytest.mark.parametrize("name", NAMES)
def test_collectives_of_every_optimizer_do_not_grow(name: str, kind: str) -> None:
    first, second = (run(counted_of, 2, name, kind, copies)[0] for copies in (1, 3))
    assert first == second and 0 < sum(first.values()) < 30


def counted_of(rank: int, name: str, kind: str, copies: int) -> dict[str, int]:
    built = build("fsdp2", KINDS[kind][0], copies)
    optimizer = made(name, built.named, kind)
    taken(built, optimizer, range(3))
    built.give(gradients(built.shapes, 3))
    optimizer.report_loss(1.0)
    with CommDebugMode() as mode:
        optimizer.step()
    return {str(op): n for op, n in mode.get_comm_counts().items()}
