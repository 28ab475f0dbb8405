"""What ZeRO and FSDP1 make of parameters, read element by element: every element has a number, and must be there."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import hina_optim
from hina_lightning.sharding import deepspeed, fsdp1
from hina_optim.engine.fragments import Fragment
from hina_optim.engine.optimizer import HinaOptimizer
from tests.sharded.flat import Layered, initialized, load_deepspeed, numbered, wrapped
from tests.sharded.world import run

BF16: dict[str, Any] = {"bf16": {"enabled": True}}
OFFLOAD: dict[str, Any] = {"zero_force_ds_cpu_optimizer": False}
#: What ZeRO calls itself, stage, options.
ZERO: list[tuple[str, int, dict[str, Any]]] = [
    ("DeepSpeedZeroOptimizer", 1, {}),
    ("BF16_Optimizer", 1, {**BF16, "data_types": {"grad_accum_dtype": "fp32"}}),
    ("DeepSpeedZeroOptimizer", 2, {}),
    ("DeepSpeedZeroOptimizer", 2, BF16),
    ("DeepSpeedZeroOptimizer", 2, {"zero": {"round_robin_gradients": True}}),
    ("DeepSpeedZeroOptimizer", 2, {**OFFLOAD, "zero": {"offload_optimizer": {"device": "cpu"}}}),
    ("DeepSpeedZeroOptimizer_Stage3", 3, {}),
    ("DeepSpeedZeroOptimizer_Stage3", 3, BF16),
    ("DeepSpeedZeroOptimizer_Stage3", 3, {"zero": {"sub_group_size": 20}}),
    ("DeepSpeedZeroOptimizer_Stage3", 3, {**OFFLOAD, "zero": {"offload_optimizer": {"device": "cpu"}}}),
]

Pieces = dict[str, tuple[int, int]]


def built(named: list[tuple[str, nn.Parameter]], way: str) -> tuple[HinaOptimizer, dict[str, int]]:
    """An optimizer, and the place of every parameter."""
    params: list[Any] = [p for _, p in named]
    names = {id(p): name for name, p in named}
    if way == "three named groups":
        groups: Any = [{"params": named[i::3]} for i in range(3)]
    elif way == "two groups, backwards":
        groups = [{"params": params[5:][::-1]}, {"params": params[:5][::-1]}]
    else:
        groups = params
    optimizer = hina_optim.HinaAdaptive(groups)
    places = {
        names[id(p)]: (g << 24) | i
        for g, group in enumerate(optimizer.param_groups)
        for i, p in enumerate(group["params"])
    }
    return optimizer, places


def check(found: list[Fragment], whole: dict[str, Tensor], places: dict[str, int], group: dist.ProcessGroup) -> Pieces:
    """Every fragment holds what it says, and all ranks together hold everything once."""
    assert [f.position for f in found] == sorted(places.values())
    for f in found:
        assert f.position == places[f.name]
        assert f.shard.shape == tuple(whole[f.name].shape)
        here = f.holder.detach().reshape(-1)[f.offset : f.offset + f.shard.numel].float()
        assert torch.equal(here, whole[f.name].reshape(-1)[f.shard.start : f.shard.stop]), (f.name, f.shard)
    pieces = {f.name: (f.shard.start, f.shard.stop) for f in found}
    everyone: list[Pieces] = [{}] * dist.get_world_size(group)
    dist.all_gather_object(everyone, pieces, group=group)
    for name, value in whole.items():
        seen = torch.zeros(value.numel(), dtype=torch.int64)
        for other in everyone:
            seen[slice(*other[name])] += 1
        assert bool((seen == 1).all()), name
    return pieces


def read_zero(rank: int, way: str) -> list[Pieces]:
    results = []
    for kind, stage, options in ZERO:
        model = numbered(Layered())
        whole = {name: p.detach().clone() for name, p in model.named_parameters()}
        optimizer, places = built(list(model.named_parameters()), way)
        zero = initialized(model, optimizer, stage, **options).optimizer
        assert type(zero).__name__ == kind and deepspeed.is_partitioned(zero)
        deepspeed.check_supported(zero, None)
        group = deepspeed.process_group(zero)
        results.append(check(deepspeed.fragments(zero, optimizer), whole, places, group))
    return results


@pytest.mark.parametrize(("size", "way"), [(2, "one group"), (4, "three named groups"), (2, "two groups, backwards")])
def test_every_element_is_where_zero_put_it(size: int, way: str) -> None:
    load_deepspeed()
    ranks = run(read_zero, size, way)
    for case, (_, stage, _) in enumerate(ZERO):
        pieces = [rank[case] for rank in ranks]
        cut = [name for name in pieces[0] if sum(a < b for a, b in (one[name] for one in pieces)) > 1]
        empty = [name for name in pieces[0] if any(a == b for a, b in (one[name] for one in pieces))]
        assert cut and (empty or stage == 3), "nothing that would be hard to find"
        rows = 5  # of the first weight: cut within a row
        if way == "one group" and stage == 3:
            assert any(start % rows for start, _ in (one["first.weight"] for one in pieces))


def read_frozen(rank: int) -> list[list[tuple[str, int]]]:
    results = []
    for stage in (2, 3):
        for named in (True, False):
            model = numbered(Layered())
            model.first.weight.requires_grad_(False)
            model.layer.lora_A["default"].weight.requires_grad_(False)
            params: Any = list(model.named_parameters()) if named else list(model.parameters())
            optimizer = hina_optim.HinaAdaptive(params)
            zero = initialized(model, optimizer, stage).optimizer
            results.append([(f.name, f.position) for f in deepspeed.fragments(zero, optimizer)])
    return results


def test_places_count_what_is_frozen() -> None:
    load_deepspeed()
    names = [name for name, _ in Layered().named_parameters()]
    trained = [(n, i) for i, n in enumerate(names) if n not in ("first.weight", "layer.lora_A.default.weight")]
    # the two factors have 7 elements each, in other shapes: shapes alone tell them, too
    assert run(read_frozen, 2) == [[trained] * 4] * 2


def read_fsdp1(rank: int, way: str) -> None:
    size = dist.get_world_size()
    strategies = ["FULL_SHARD", "SHARD_GRAD_OP", "NO_SHARD", *(["HYBRID_SHARD"] if size == 4 else [])]
    for strategy in strategies:
        for originals in (True, False):
            model = numbered(Layered())
            whole = {name: p.detach().clone() for name, p in model.named_parameters()}
            order = list(whole)
            model = wrapped(model, strategy, originals)
            clean = [(n.replace("_fsdp_wrapped_module.", ""), p) for n, p in model.named_parameters()]
            if originals:
                optimizer, places = built(clean, way)
            else:  # the flat ones come as their units do; what is in them keeps the order of the model
                optimizer, places = hina_optim.HinaAdaptive([p for _, p in clean]), {n: i for i, n in enumerate(order)}
            group = fsdp1.process_group(model, optimizer)
            expected = {"NO_SHARD": 1, "HYBRID_SHARD": 2}.get(strategy, size)
            assert dist.get_world_size(group) == expected
            found = fsdp1.fragments(model, optimizer)
            pieces = check(found, whole, places, group)
            if strategy != "NO_SHARD":
                assert any(0 < b - a < whole[n].numel() for n, (a, b) in pieces.items()), "nothing is cut"


@pytest.mark.parametrize(("size", "way"), [(2, "one group"), (4, "three named groups")])
def test_every_element_is_where_fsdp1_put_it(size: int, way: str) -> None:
    run(read_fsdp1, size, way)
