"""The ladder of memory down and up again: exact predictions, kept trajectories, the same rungs on all ranks."""

from __future__ import annotations

import copy
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from hina_optim import HinaAdaptive, create_optimizer
from hina_optim.engine.optimizer import HinaOptimizer
from hina_optim.memory import LADDER, optimize_for_vram, plan_for_vram, relax_vram, used_bytes
from hina_optim.memory.ladder import GIVEN_UP
from hina_optim.memory.probes import GIB
from hina_optim.state.conversion import PIECE
from tests.every_optimizer import LR, NAMES, OPTIONS, give_large, large
from tests.far_device import FAR, FarMode
from tests.processes import on_ranks
from tests.test_engine_memory import peak
from tests.test_out_of_memory import Scarce, places

TINY = 1e-9
Named = list[tuple[str, nn.Parameter]]


def trained(steps: int = 3, name: str = "HinaAdaptive", **arguments: Any) -> tuple[Named, HinaOptimizer]:
    named = large()
    optimizer = create_optimizer(name, named, **{"lr": LR, **arguments})
    go_on(named, optimizer, 0, steps)
    return named, optimizer


def go_on(named: Named, optimizer: HinaOptimizer, start: int, stop: int) -> None:
    for step in range(start, stop):
        give_large(named, step)
        optimizer.step()


def precisions(optimizer: HinaOptimizer) -> list[str]:
    return [group["state_precision"] for group in optimizer.param_groups]


def below(optimizer: HinaOptimizer, rungs: int) -> float:
    """A target that takes just so many rungs."""
    planned = plan_for_vram(optimizer, TINY)["actions"][:rungs]
    return (used_bytes(optimizer) - sum(action["bytes_predicted"] for action in planned) + 1) / GIB


# -- down --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_each_rung_saves_what_it_predicts(name: str) -> None:
    options = {**OPTIONS[name], "state_precision": "fp32"}
    _, optimizer = trained(name=name, **options)
    planned = plan_for_vram(optimizer, TINY)
    report = optimize_for_vram(optimizer, TINY)
    assert [a["rung"] for a in report["actions"]][:2] == ["bf16", "8bit"]
    assert [a["bytes_saved"] for a in report["actions"]] == [a["bytes_predicted"] for a in report["actions"]]
    assert [{**a, "bytes_saved": 0} for a in report["actions"]] == planned["actions"]
    assert report["used_bytes_after"] == planned["used_bytes_after"] == used_bytes(optimizer)


@pytest.mark.parametrize(("rungs", "precision"), [(0, "fp32"), (1, "bf16"), (2, "8bit")])
def test_it_goes_only_as_far_as_needed(rungs: int, precision: str) -> None:
    _, optimizer = trained()
    assert optimize_for_vram(optimizer, below(optimizer, rungs))["reached"]
    assert precisions(optimizer) == [precision]


def test_a_group_that_is_lower_already_stays() -> None:
    """A rung lowers what is above it; a group that the user put below it does not grow."""
    named = large()
    optimizer = HinaAdaptive([{"params": named[:3], "state_precision": "8bit"}, {"params": named[3:]}], lr=LR)
    go_on(named, optimizer, 0, 2)
    report = optimize_for_vram(optimizer, (used_bytes(optimizer) - 1) / GIB)
    assert precisions(optimizer) == ["8bit", "bf16"] and [a["rung"] for a in report["actions"]] == ["bf16"]
    assert report["actions"][0]["bytes_saved"] == report["actions"][0]["bytes_predicted"] > 0
    relax_vram(optimizer, 1.0)
    assert precisions(optimizer) == ["8bit", "fp32"]


@pytest.mark.parametrize("rungs", [1, 2])
def test_the_trajectory_goes_on_within_the_precision(rungs: int) -> None:
    named, optimizer = trained(4)
    again, kept = trained(4)
    start = [p.detach().clone() for _, p in named]
    optimize_for_vram(optimizer, below(optimizer, rungs))
    go_on(named, optimizer, 4, 14)
    go_on(again, kept, 4, 14)
    for (name, p), (_, q), s in zip(named, again, start, strict=True):
        way = (q - s).norm()
        assert way > 0
        # cautious masks flip where momentum and gradient nearly cancel; the bound is on the whole way
        assert (p - q).norm() < (0.01 if rungs == 1 else 0.1) * way, name


def test_techniques_are_switched_off_last_and_by_name(caplog: pytest.LogCaptureFixture) -> None:
    named, optimizer = trained()
    with caplog.at_level(logging.INFO, "hina_optim"):
        report = optimize_for_vram(optimizer, TINY)
    names = [action["rung"] for action in report["actions"]]
    off = ["use_dynamic_adaptation=False", "use_spd=False", "use_lr_mask=False"]
    assert names == ["bf16", "8bit", "factored_second_moment=True", *off]
    levels = {record.getMessage().split()[1]: record.levelname for record in caplog.records}
    assert {name: levels[name] for name in names} == dict(zip(names, ["INFO"] * 2 + ["WARNING"] * 4, strict=True))
    assert all(not {"anchor", "lr_mask", "last_sign", "importance"} & set(state) for state in optimizer.state.values())
    go_on(named, optimizer, 3, 5)
    assert all(p.isfinite().all() for _, p in named)


def test_images_are_factored_before_anything_is_switched_off() -> None:
    """And are whole again on the way back; without image techniques there is nothing to save, and no such rung."""
    named, optimizer = trained(spatial_awareness=True, background_regularization=True)
    full = used_bytes(optimizer)
    report = optimize_for_vram(optimizer, below(optimizer, 4))
    names = [action["rung"] for action in report["actions"]]
    assert names[2:] == ["factored_second_moment=True", "factored_image_state=True"]
    assert {"spatial_variance_row", "background_col"} <= optimizer.state[named[0][1]].keys()
    go_on(named, optimizer, 3, 5)
    relax_vram(optimizer, 1.0)
    assert used_bytes(optimizer) == full and not optimizer.param_groups[0]["factored_image_state"]
    assert {"spatial_variance", "background"} <= optimizer.state[named[0][1]].keys()
    go_on(named, optimizer, 5, 7)
    assert all(p.isfinite().all() for _, p in named)


@pytest.mark.parametrize("option", ["adaptive_features", "emergency_simplify"])
def test_nothing_is_switched_off_unless_both_allow_it(option: str) -> None:
    _, optimizer = trained(**{option: False})
    report = optimize_for_vram(optimizer, TINY)
    assert [action["rung"] for action in report["actions"]] == ["bf16", "8bit"] and not report["reached"]
    assert optimizer.param_groups[0]["use_lr_mask"]


def test_converting_takes_a_piece_more() -> None:
    """Beyond the state: the new form of one kind of state of one parameter, and some decoded pieces."""
    shape = (1500, 3000)

    def run() -> None:
        made.append(HinaAdaptive([nn.Parameter(weights[i]) for i in range(3)], lr=LR))
        made[0].init_state()
        full.append(made[0].state_bytes())
        for precision in ("bf16", "8bit", "fp32"):
            made[0].set_state_precision(precision)

    weights = torch.randn(3, *shape)
    made: list[HinaOptimizer] = []
    full: list[int] = []
    most, _ = peak(run)
    assert full[0] > 15 * weights.numel()
    assert most < full[0] + 4 * shape[0] * shape[1] + 2 * 4 * PIECE


@pytest.mark.parametrize("shape", [(1500, 900), (900, 50, 30), (3, 700_000)])
def test_converted_in_pieces_or_at_once_is_the_same(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    p = nn.Parameter(torch.randn(shape))
    optimizer = HinaAdaptive([p], lr=LR)
    p.grad = torch.randn(shape)
    optimizer.step()
    optimizer.step()
    state = {name: x.clone() for name, x in optimizer.state[p].items()}
    bucket = optimizer._buckets._of[p]
    optimizer.set_state_precision("8bit")
    for name in ("exp_avg", "exp_avg_sq", "lr_mask"):
        codec = bucket.codecs[name]
        at_once = codec.encode(state[name][None], None)
        assert set(at_once) == set(codec.parts) and codec.parts[""] == torch.uint8
        for suffix, part in at_once.items():
            assert torch.equal(optimizer.state[p][name + suffix], part[0]), name + suffix


# -- up ----------------------------------------------------------------------------------------------------------------


def test_up_again_as_far_as_there_is_room(caplog: pytest.LogCaptureFixture) -> None:
    named, optimizer = trained()
    full = used_bytes(optimizer)
    optimize_for_vram(optimizer, TINY)
    small = used_bytes(optimizer)
    report = relax_vram(optimizer, (small + 10) / GIB)
    assert report["actions"] == [] and not report["reached"] and report["message"]
    afresh = 4 * dict(named)["layer.lora_B.default.weight"].numel() - 4  # where it began is not zero any more
    mask = 2 * sum(p.numel() for _, p in named)  # 8 bits and a sign, and fp32 where it is small
    report = relax_vram(optimizer, (small + mask + 10_000) / GIB)
    assert [action["rung"] for action in report["actions"]] == ["use_lr_mask=False"]
    assert optimizer.param_groups[0]["use_lr_mask"] and not optimizer.param_groups[0]["use_spd"]
    with caplog.at_level(logging.INFO, "hina_optim"):
        report = relax_vram(optimizer, (full + afresh) / GIB)
    assert report["reached"] and report["message"] == ""
    for action in report["actions"]:
        assert action["bytes_saved"] == action["bytes_predicted"] < 0
        assert action["rung"] in caplog.text
    assert used_bytes(optimizer) == report["used_bytes_after"] == full + afresh
    assert precisions(optimizer) == ["fp32"] and not optimizer.param_groups[0][GIVEN_UP]
    go_on(named, optimizer, 3, 6)
    assert all(p.isfinite().all() for _, p in named)


def test_never_above_what_the_user_chose() -> None:
    _, optimizer = trained(state_precision="bf16", use_spd=False, use_dynamic_adaptation=False)
    full = used_bytes(optimizer)
    assert relax_vram(optimizer, 1.0)["actions"] == []
    optimize_for_vram(optimizer, TINY)
    relax_vram(optimizer, 1.0)
    assert precisions(optimizer) == ["bf16"] and not optimizer.param_groups[0]["use_spd"]
    assert used_bytes(optimizer) == full


def test_the_layout_is_in_the_checkpoint_and_so_is_the_way_back(tmp_path: Path) -> None:
    named, optimizer = trained()
    optimize_for_vram(optimizer, below(optimizer, 2))
    torch.save(optimizer.state_dict(), tmp_path / "state.pt")
    go_on(named, optimizer, 3, 5)

    _, other = trained(0)
    resumed = [(name, nn.Parameter(p.detach().clone())) for name, p in large()]
    other = create_optimizer("HinaAdaptive", resumed, lr=LR)
    other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert precisions(other) == ["8bit"]
    assert other.state_bytes() == optimizer.state_bytes()
    relax_vram(other, 1.0)
    assert precisions(other) == ["fp32"]
    assert copy.deepcopy(other).param_groups[0][GIVEN_UP] == {}


def test_a_bad_budget_is_named() -> None:
    _, optimizer = trained(0)
    with pytest.raises(ValueError, match="relax_vram: budget_gb="):
        relax_vram(optimizer, 0)


# -- several processes -------------------------------------------------------------------------------------------------


def _one_rank_is_short(rank: int, folder: str) -> None:
    _, optimizer = trained(1)
    used = used_bytes(optimizer)
    # the last rank alone must come down by one byte; then by more than the first rung gives; then nobody
    report = optimize_for_vram(optimizer, (used - 1) / GIB if rank == 1 else 1.0)
    assert precisions(optimizer) == ["bf16"] and report["reached"]
    report = optimize_for_vram(optimizer, TINY if rank == 1 else 1.0, ladder=SMALL)
    assert precisions(optimizer) == ["8bit"] and not report["reached"]
    assert ("another rank" in report["message"]) == (rank != 1)
    assert not optimize_for_vram(optimizer, 1.0)["actions"]
    # up: one rank without room holds all
    assert not relax_vram(optimizer, 1.0 if rank else TINY)["actions"]
    relax_vram(optimizer, 1.0)
    assert precisions(optimizer) == ["fp32"]
    Path(folder, f"rank{rank}").write_text(str(float(sum(p.double().sum() for _, p in large()))))


def _budget_on_one_rank(rank: int) -> None:
    named = large()
    optimizer = HinaAdaptive(named, lr=LR, vram_budget_gb=0.0007 if rank == 0 else 4.0)
    give_large(named, 0)
    optimizer.step()
    assert precisions(optimizer) == ["8bit"]


SMALL = LADDER[:4]


@pytest.mark.parametrize("size", [2, 4])
def test_all_ranks_take_the_rungs_that_one_needs(size: int, tmp_path: Path) -> None:
    on_ranks(size, _one_rank_is_short, str(tmp_path))
    assert len(list(tmp_path.iterdir())) == size


def test_all_ranks_begin_in_the_precision_that_one_needs() -> None:
    on_ranks(2, _budget_on_one_rank)


# -- to the host -------------------------------------------------------------------------------------------------------


def test_what_is_on_the_host_counts_no_more() -> None:
    """With a device that says it is another: anchors, then all state, and back."""
    with FarMode():
        named = [(name, nn.Parameter(p.detach().to(FAR))) for name, p in large()]
        optimizer = HinaAdaptive(named, lr=LR, emergency_simplify=False)
        for _, p in named:
            p.grad = torch.ones_like(p)
        optimizer.step()
        full, held = used_bytes(optimizer), optimizer.state_bytes()
        report = optimize_for_vram(optimizer, TINY)
        assert [a["rung"] for a in report["actions"]] == ["anchor_device=cpu", "bf16", "8bit", "state_device=cpu"]
        assert [a["bytes_saved"] for a in report["actions"]] == [a["bytes_predicted"] for a in report["actions"]]
        assert {optimizer.state[p]["exp_avg"].device.type for _, p in named} == {"cpu"}
        optimizer.step()
        report = relax_vram(optimizer, 1.0)
        assert report["reached"] and [a["rung"] for a in report["actions"]][-1] == "anchor_device=cpu"
        assert (used_bytes(optimizer), optimizer.state_bytes()) == (full, held)
        assert {optimizer.state[p]["exp_avg"].device.type for _, p in named} == {FAR.type}


# -- out of memory -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("up", [False, True])
def test_out_of_memory_while_converting_leaves_all_state_whole(up: bool) -> None:
    """At any allocation: what was learned is there, all of it stored as the options say, and as before or a rung on.

    The optimizer steps on, and the next walk finishes the work.
    """
    _, base = trained(2)
    if up:
        optimize_for_vram(base, below(base, 2))

    def walk(optimizer: HinaOptimizer) -> None:
        if up:
            relax_vram(optimizer, 1.0)
        else:
            optimize_for_vram(optimizer, TINY, SMALL)

    walk(copy.deepcopy(base))  # tables of codes are made once
    done = copy.deepcopy(base)
    with Scarce() as watch:
        walk(done)
    for first in places(watch.count, 24):
        optimizer = copy.deepcopy(base)
        params = [p for group in optimizer.param_groups for p in group["params"]]
        learned = [optimizer._buckets.decoded(p, "exp_avg") for p in params]
        with pytest.raises(torch.OutOfMemoryError), Scarce(first):
            walk(optimizer)
        (precision,) = precisions(optimizer)
        assert optimizer.state_bytes() == optimizer.state_bytes(precision), "nothing is half converted"
        for p, before in zip(params, learned, strict=True):
            now = optimizer._buckets.decoded(p, "exp_avg")
            assert before is not None and now is not None
            assert (now - before).abs().max() <= 0.02 * before.abs().max()
            p.grad = torch.ones_like(p)
        optimizer.step()
        walk(optimizer)
        assert precisions(optimizer) == precisions(done)
        assert optimizer.state_bytes() == done.state_bytes()
