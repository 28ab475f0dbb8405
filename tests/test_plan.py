"""What a plan says is what the optimizer then holds, to the byte."""

from __future__ import annotations

import threading
import time
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import hina_optim
from hina_optim import create_optimizer, list_optimizers
from hina_optim.engine.layout import Shard
from hina_optim.engine.optimizer import HinaOptimizer
from hina_optim.memory import BudgetError, plan, plan_of
from hina_optim.memory.probes import GIB
from hina_optim.memory.shards import local_shapes
from tests.every_optimizer import LR, NAMES, OPTIONS, give_large, large
from tests.processes import on_ranks
from tests.shards import ThreadLayout, World
from tests.test_engine_memory import peak

PRECISIONS = ["fp32", "bf16", "8bit", "4bit"]


def held(optimizer: HinaOptimizer) -> dict[str, dict[str, int]]:
    """State name → dtype → bytes; a scale counts as what it scales."""
    counts: dict[str, Counter[str]] = {}
    for state in optimizer.state.values():
        for name, x in state.items():
            counts.setdefault(name.removesuffix("_scale"), Counter())[str(x.dtype)[6:]] += x.numel() * x.element_size()
    return {name: dict(kinds) for name, kinds in counts.items()}


def shapes_of(named: list[tuple[str, nn.Parameter]]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(p.shape) for name, p in named}


def test_every_optimizer_is_here() -> None:
    assert set(NAMES) == set(list_optimizers())


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", NAMES)
def test_the_plan_comes_true(name: str, precision: str) -> None:
    """Short rows, vectors, kernels, small tensors, a LoRA pair whose B is zero; everything switched on."""
    arguments = {**OPTIONS[name], "state_precision": precision, "lr": LR}
    planned = plan(large(), name, **arguments)
    named = large()
    optimizer = create_optimizer(name, named, **arguments)
    give_large(named, 0)
    optimizer.step()
    assert planned.state_bytes == optimizer.state_bytes() == plan_of(optimizer).state_bytes
    assert planned.state == held(optimizer)
    assert planned.parameter_bytes == planned.gradient_bytes == sum(p.numel() * 4 for _, p in named)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_bf16_parameters_with_compensation(precision: str) -> None:
    arguments: dict[str, Any] = {"state_precision": precision, "rounding": "kahan", "lr": LR}
    named = large(torch.bfloat16)
    optimizer = create_optimizer("HinaAdaptive", named, **arguments)
    planned = plan(large(torch.bfloat16), **arguments)
    optimizer.init_state()
    assert planned.state == held(optimizer)
    assert planned.parameter_bytes == sum(p.numel() * 2 for _, p in named)


@pytest.mark.parametrize(
    "arguments",
    [{"min_8bit_size": 0}, {"min_8bit_size": 10**9}, {"force_8bit": True}, {"factored_second_moment": True}],
)
def test_what_is_small_enough_for_8_bits(arguments: dict[str, Any]) -> None:
    arguments = {"state_precision": "8bit", "lr": LR, **arguments}
    optimizer = create_optimizer("HinaAdaptive", large(), **arguments)
    optimizer.init_state()
    assert plan(large(), **arguments).state == held(optimizer)


@pytest.mark.parametrize("name", NAMES)
def test_shapes_alone_say_the_same_but_for_zeros(name: str) -> None:
    arguments = {**OPTIONS[name], "lr": LR, "state_precision": "8bit"}
    named = [(n, nn.Parameter(torch.ones_like(p))) for n, p in large()]
    optimizer = create_optimizer(name, named, **arguments)
    optimizer.init_state()
    from_shapes = plan(shapes_of(named), name, **arguments)
    assert from_shapes.state == held(optimizer)
    keeps_anchor = "anchor" in from_shapes.state
    assert any("nothing is known to be zero" in note for note in from_shapes.notes) == keeps_anchor
    assert not any("nothing is known to be zero" in note for note in plan(named, name, **arguments).notes)


def test_groups_and_their_own_options() -> None:
    def groups() -> list[dict[str, Any]]:
        named = large()
        return [
            {"params": named[:3], "use_lr_mask": False},
            {"params": [p for _, p in named[3:]], "state_precision": "bf16"},
        ]

    with pytest.raises(ValueError, match="HinaAdaptive"):  # refused as the optimizer refuses it
        plan([{"params": large(), "betas": (2, 2)}])
    optimizer = create_optimizer("HinaAdaptive", groups(), lr=LR)
    optimizer.init_state()
    assert plan(groups(), lr=LR).state == held(optimizer)


def test_a_module_with_frozen_weights() -> None:
    model = nn.Sequential(nn.Linear(40, 30), nn.Linear(30, 20))
    model[0].requires_grad_(False)
    planned = plan(model, lr=LR)
    assert (planned.trained, planned.frozen) == (620, 1230)
    assert (planned.parameter_bytes, planned.gradient_bytes) == (4 * 1850, 4 * 620)
    with torch.device("meta"):
        meta = nn.Sequential(nn.Linear(40, 30), nn.Linear(30, 20))
    meta[0].requires_grad_(False)
    assert plan(meta, lr=LR).state_bytes == planned.state_bytes


# -- shards ------------------------------------------------------------------------------------------------------------


def cuts(sharding: str, named: list[tuple[str, nn.Parameter]], size: int, rank: int) -> list[tuple[int, int]]:
    """Where each parameter's flat range on a rank begins and ends, from the engines' own rules."""
    ranges, at = [], 0
    total = sum(p.numel() for _, p in named)
    each = (total + -total % (2 * size)) // size
    for _, p in named:
        n = p.numel()
        if sharding == "fsdp":
            chunks = p.detach().chunk(size, 0)
            sizes = [len(c) * (n // len(p)) for c in chunks] + [0] * size
            ranges.append((sum(sizes[:rank]), sum(sizes[: rank + 1])))
        elif sharding == "zero3":
            piece = -(-n // size)
            ranges.append((min(n, rank * piece), min(n, (rank + 1) * piece)))
        else:
            lie = range(max(at, rank * each), min(at + n, (rank + 1) * each))
            ranges.append((lie.start - at, lie.stop - at) if len(lie) else (0, 0))
        at += n
    return ranges


def on_threads(name: str, sharding: str, size: int, arguments: dict[str, Any]) -> list[dict[str, dict[str, int]]]:
    """What the optimizers of all ranks hold, each in a thread of its own."""
    world = World(size)
    found: list[Any] = [None] * size

    def rank_main(rank: int) -> None:
        try:
            layout = ThreadLayout(world, rank)
            local = []
            for (n, p), (start, stop) in zip(large(), cuts(sharding, large(), size, rank), strict=True):
                piece: Tensor = p.detach().reshape(-1)[start:stop].clone()
                if sharding == "fsdp":
                    piece = piece.reshape(-1, *p.shape[1:])
                local.append((n, nn.Parameter(piece)))
                layout.shards[local[-1][1]] = Shard(tuple(p.shape), start, stop)
            optimizer = create_optimizer(name, local, **arguments)
            optimizer.bind_layout(layout)
            optimizer.init_state()
            found[rank] = held(optimizer)
        except BaseException as error:
            found[rank] = error
            world.barrier.abort()

    threads = [threading.Thread(target=rank_main, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    errors = [e for e in found if isinstance(e, BaseException) and not isinstance(e, threading.BrokenBarrierError)]
    if errors:
        raise errors[0]
    return found


@pytest.mark.parametrize("sharding", ["fsdp", "zero1", "zero3"])
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", NAMES)
def test_on_every_rank(name: str, precision: str, sharding: Any) -> None:
    """Uneven shards, and empty ones: seven rows on three ranks, a kernel on none of some."""
    arguments = {**OPTIONS[name], "lr": LR, "state_precision": precision}
    ranks = on_threads(name, sharding, 3, arguments)
    named = large()
    whole = {"world_size": 3, "sharding": sharding, **arguments}
    for rank, real in enumerate(ranks):
        assert plan(named, name, rank=rank, **whole).state == real, f"rank {rank}"
    totals = [sum(sum(kinds.values()) for kinds in real.values()) for real in ranks]
    assert plan(named, name, **whole).state_bytes == max(totals)


def test_gradients_and_copies_of_shards() -> None:
    shapes = {"a": (10, 6), "b": (7,)}
    for sharding, expected in {
        "ddp": (268, 0, 268),
        "fsdp": (4 * 20, 0, 4 * 20),
        "zero1": (268, 4 * 18, 268),  # 67 padded to 72, by 4
        "zero2": (268, 4 * 18, 4 * 18),
        "zero3": (4 * 17, 4 * 17, 4 * 17),
    }.items():
        planned = plan(shapes, world_size=4, sharding=sharding, rank=0)  # type: ignore[arg-type]
        assert (planned.parameter_bytes, planned.master_bytes, planned.gradient_bytes) == expected, sharding
        assert planned.notes


@pytest.mark.parametrize(
    ("name", "shape", "count", "more"),
    [
        ("HinaAdaptive", (64, 32), 300, {}),
        ("HinaAdaptive", (1500, 700), 1, {}),
        ("HinaAdaptive", (1500, 700), 1, {"max_buffer_memory_mb": 8}),
        ("Automagic_CameAMP_COptim", (600, 500), 3, {"state_precision": "8bit"}),
        ("Automagic_CameAMP_Improved", (600, 500), 2, {}),
        ("HinaAdamWOptimizer", (300_001,), 1, {"state_precision": "8bit"}),
    ],
)
def test_a_step_takes_no_more_than_planned(name: str, shape: tuple[int, ...], count: int, more: dict[str, Any]) -> None:
    params = [nn.Parameter(torch.randn(shape)) for _ in range(count)]
    optimizer = create_optimizer(name, params, lr=LR, **more)
    optimizer.init_state()
    for p in params:
        p.grad = torch.randn_like(p)
    optimizer.step()
    most, _ = peak(optimizer.step)
    bound = plan_of(optimizer).temporary_bytes
    # one bound for all recipes, of which the leanest keeps a third of the values alive that the fullest does
    assert bound / 3 < most < bound


def _fully_sharded(rank: int, size: int) -> None:
    """The pieces that FSDP2 really makes."""
    mesh = init_device_mesh("cpu", (size,))
    model = nn.Sequential(nn.Linear(6, 7), nn.Linear(7, 1), nn.Conv2d(2, 5, 3))
    shapes = [tuple(p.shape) for p in model.parameters()]
    fully_shard(model, mesh=mesh)
    real = [tuple(p.to_local().shape) for p in model.parameters()]  # type: ignore[attr-defined]
    assert local_shapes(shapes, [0] * len(shapes), "fsdp", size, rank) == real


@pytest.mark.parametrize("size", [2, 4])
def test_pieces_of_fsdp_are_real_ones(size: int) -> None:
    on_ranks(size, _fully_sharded, size)


def test_pieces_are_complete() -> None:
    shapes = [(10, 6), (7,), (1, 300), (), (0, 3)]
    for sharding in ("fsdp", "zero1", "zero3"):
        for size in (1, 3, 16):
            every = [local_shapes(shapes, [0] * 5, sharding, size, rank) for rank in range(size)]
            for i, shape in enumerate(shapes):
                assert sum(torch.Size(one[i]).numel() for one in every) == torch.Size(shape).numel()


# -- large models ------------------------------------------------------------------------------------------------------


def llama(layers: int, width: int, hidden: int, kv: int, vocabulary: int) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocabulary, width)}
    for i in range(layers):
        at = f"model.layers.{i}"
        for name, shape in {
            "self_attn.q_proj": (width, width), "self_attn.k_proj": (kv, width), "self_attn.v_proj": (kv, width),
            "self_attn.o_proj": (width, width), "mlp.gate_proj": (hidden, width), "mlp.up_proj": (hidden, width),
            "mlp.down_proj": (width, hidden), "input_layernorm": (width,), "post_attention_layernorm": (width,),
        }.items():  # fmt: skip
            shapes[f"{at}.{name}.weight"] = shape
    return {**shapes, "model.norm.weight": (width,), "lm_head.weight": (vocabulary, width)}


@pytest.mark.parametrize(
    ("model", "size"),
    [(llama(32, 4096, 11008, 4096, 32000), 6_738_415_616), (llama(80, 8192, 28672, 1024, 128256), 70_553_706_496)],
    ids=["7B", "70B"],
)
def test_large_models_take_seconds(model: dict[str, tuple[int, ...]], size: int) -> None:
    begin = time.perf_counter()
    alone = plan(model, dtype=torch.bfloat16, state_precision="8bit", lr=LR)
    shared = plan(model, dtype=torch.bfloat16, sharding="zero2", world_size=64, vram_gb=200, lr=LR)
    fsdp = plan(model, dtype=torch.bfloat16, sharding="fsdp", world_size=64, vram_gb=80, lr=LR)
    assert time.perf_counter() - begin < 15
    assert alone.trained == size and alone.parameter_bytes == 2 * size
    assert shared.state_bytes == pytest.approx(17 * size / 64, rel=0.01)
    assert fsdp.state_bytes == pytest.approx(15 * size / 64, rel=0.01)  # anchors of bf16 weights


# -- the ladder, the budget, the text ----------------------------------------------------------------------------------


def test_which_rung_fits() -> None:
    shapes = {"a": (8000, 4000), "b": (512, 512)}
    planned = plan(shapes)
    assert planned.rung is None and all(rung.fits is None for rung in planned.rungs)
    names = [rung.name for rung in planned.rungs]
    assert names[:5] == ["as built", "anchor_device=cpu", "bf16", "8bit", "state_device=cpu"]
    totals = [rung.total_bytes for rung in planned.rungs]
    assert totals == sorted(totals, reverse=True) and totals[0] == planned.total_bytes
    for rung in planned.rungs:
        assert plan(shapes, vram_gb=(rung.total_bytes + 1) / GIB).rung == rung.name
    assert plan(shapes, vram_gb=(totals[-1] - 1000) / GIB).rung is None
    kept = plan(shapes, emergency_simplify=False, device="cpu")  # where there is no other place
    assert [rung.name for rung in kept.rungs] == ["as built", "bf16", "8bit"]
    assert [rung.name for rung in plan(shapes, memory_efficient=False).rungs] == ["as built"]


@pytest.mark.parametrize("name", NAMES)
def test_every_rung_of_a_plan_comes_true(name: str) -> None:
    arguments = {**OPTIONS[name], "state_precision": "fp32", "lr": LR}
    planned = plan(large(), name, **arguments)
    optimizer = create_optimizer(name, large(), **arguments)
    optimizer.init_state()
    for rung in planned.rungs[1:]:
        short = (hina_optim.memory.used_bytes(optimizer) - 1) / GIB
        report = hina_optim.memory.optimize_for_vram(optimizer, short)
        assert [action["rung"] for action in report["actions"]] == [rung.name]
        assert optimizer.state_bytes() == rung.state_bytes


def test_state_on_the_host() -> None:
    shapes = {"a": (8000, 4000), "b": (512, 512)}
    count = 8000 * 4000 + 512 * 512
    usual = plan(shapes)
    anchors = plan(shapes, anchor_device="cpu")
    assert (anchors.host_bytes, anchors.state_bytes) == (4 * count, usual.state_bytes)
    assert anchors.total_bytes - anchors.temporary_bytes == usual.total_bytes - usual.temporary_bytes - 4 * count
    assert anchors.total_bytes == next(r.total_bytes for r in usual.rungs if r.name == "anchor_device=cpu")
    everything = plan(shapes, state_device="cpu", state_precision="8bit")
    assert everything.host_bytes == sum(sum(everything.state[n].values()) for n in LIKE)
    assert "of it on the host" in str(everything) and "of it on the host" not in str(usual)
    assert plan(shapes, state_device="cpu", device="cpu").host_bytes == 0


LIKE = ("exp_avg", "exp_avg_sq", "lr_mask", "last_sign", "anchor")


def test_a_budget_below_the_parameters_is_an_error_with_the_plan() -> None:
    with pytest.raises(BudgetError, match=r"(?s)smaller than the parameters themselves, 3.81 MiB.*optimizer st") as e:
        plan({"a": (1000, 1000)}, vram_gb=0.003)
    assert e.value.plan.parameter_bytes == 4_000_000


def test_the_text() -> None:
    text = str(plan({"a": (1000, 1000)}, "Automagic_CameAMP_8bit", vram_gb=1.0, sharding="ddp", world_size=2))
    for words in ("1,000,000 parameters trained", "rank 0 of 2 (ddp)", "exp_avg", "uint8", "Within 1 GiB: as built",
                  "bytes a trained parameter", "activations not counted", "* DDP:"):  # fmt: skip
        assert words in text


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"sharding": "zero9"}, "plan: sharding='zero9' is not valid"),
        ({"world_size": 0}, "plan: world_size=0 is not valid"),
        ({"world_size": 2}, "with sharding='none'"),
        ({"sharding": "ddp", "world_size": 2, "rank": 2}, r"rank=2 is not valid: it must be an integer in \[0, 2\)"),
        ({"vram_gb": -1}, "plan: vram_gb=-1 is not valid"),
        ({"optimizer": "HinaAdaptve"}, "Did you mean 'HinaAdaptive'"),
        ({"state_precision": "int3"}, "state_precision='int3' is not valid"),
    ],
)
def test_bad_arguments_are_named(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plan({"a": (4, 4)}, **given)


@pytest.mark.parametrize("given", [torch.zeros(3), [3], [(3, "x")], {"a": (2.5, 1)}, {"a": "4x4"}])
def test_what_is_no_shape_is_refused(given: Any) -> None:
    with pytest.raises(TypeError, match="plan"):
        plan(given)


def test_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="no parameters"):
        plan({})
