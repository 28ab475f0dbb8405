"""Second moments that become row and column means in the middle of a training, and whole ones again."""

from __future__ import annotations

import copy
import functools
import logging
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hina_optim import HinaAdaptive
from hina_optim.engine.layout import Shard
from hina_optim.engine.optimizer import HinaOptimizer
from hina_optim.memory import optimize_for_vram, plan_for_vram, relax_vram, used_bytes
from hina_optim.memory.ladder import FactorSecondMoment
from hina_optim.memory.probes import GIB
from hina_optim.reference.adamw_family import ReferenceAdamW
from hina_optim.reference.hina_adaptive import ReferenceHinaAdaptive
from tests.every_optimizer import LR, NAMES, OPTIONS, give_large, large, make
from tests.optim_cases import NOTHING
from tests.processes import on_ranks
from tests.shards import ThreadLayout, World, cut, piece_of, run_sharded
from tests.test_ladder import TINY, Named, go_on
from tests.test_out_of_memory import Scarce, places

FAMILY = [name for name in NAMES if "Came" not in name]
RUNG = (FactorSecondMoment("some"),)
MEANS = {"exp_avg_sq_row", "exp_avg_sq_col"}


def trained(steps: int, name: str = "HinaAdaptive", **arguments: Any) -> tuple[Named, HinaOptimizer]:
    named = large()
    optimizer = make(name, named, **arguments)
    go_on(named, optimizer, 0, steps)
    return named, optimizer


def kept(optimizer: HinaOptimizer, p: Tensor) -> dict[str, Tensor]:
    found = {name: optimizer._buckets.decoded(p, name) for name in (*MEANS, "exp_avg_sq") if name in optimizer.state[p]}
    return {name: value for name, value in found.items() if value is not None}


# -- the same as the definition ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("adopt", [True, False])
def test_converted_as_the_reference_says(adopt: bool) -> None:
    """Whole, factored and whole again, in float64 to the 8th digit."""
    shapes = [(6, 5), (4, 3, 2, 2), (7,), (2, 2), (1, 9)]
    generator = torch.Generator().manual_seed(1)
    start = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    options = {**NOTHING, "use_adopt_stability": adopt, "lr": LR, "betas": (0.9, 0.9)}
    params = [nn.Parameter(w.clone()) for w in start]
    optimizer = HinaAdaptive(params, **options)
    reference: ReferenceAdamW = ReferenceHinaAdaptive(start, **options)
    for step in range(9):
        if step in (3, 6):
            optimizer.change_options([{"factored_second_moment": step == 3}])
            reference.param_groups[0]["factored_second_moment"] = step == 3
            names = {bool(MEANS & set(optimizer.state[p])) for p in params[:2]}
            assert names == {step == 3} and not any(MEANS & set(optimizer.state[p]) for p in params[2:])
        grads = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
        for p, g in zip(params, grads, strict=True):
            p.grad = g
        optimizer.step()
        reference.step(grads)
    for p, q, w in zip(params, reference.params, start, strict=True):
        moved = (q - w).abs().max()
        assert moved > 1e-4 and (p.detach() - q).abs().max() <= 1e-8 * moved


@pytest.mark.parametrize("name", FAMILY)
def test_when_it_is_factored_does_not_matter(name: str) -> None:
    """The mean of running averages is the running average of the means."""
    named, late = trained(4, name, state_precision="fp32", use_orthogonal_grad=False)
    others, early = trained(4, name, state_precision="fp32", use_orthogonal_grad=False, factored_second_moment=True)
    late.change_options([{"factored_second_moment": True}])
    for (label, p), (_, q) in zip(named, others, strict=True):
        one, two = kept(late, p), kept(early, q)
        assert one.keys() == two.keys() == ({"exp_avg_sq"} if label == "vector" else MEANS)
        if OPTIONS[name].get("lora_rank_penalty"):
            continue  # the gradient follows the weights, which the second moment has moved
        for key in one:
            torch.testing.assert_close(one[key], two[key], rtol=2e-5, atol=0)


def test_of_rank_one_nothing_is_lost() -> None:
    p = nn.Parameter(torch.randn(40, 30))
    optimizer = HinaAdaptive([p], lr=LR, use_agr=False)
    r, c = torch.rand(40, 1) + 0.1, torch.rand(1, 30) + 0.1
    p.grad = r * c
    optimizer.step()
    before = optimizer.state[p]["exp_avg_sq"].clone()
    relax = [{"factored_second_moment": on} for on in (True, False)]
    optimizer.change_options(relax[:1])
    assert set(optimizer.state[p]) >= MEANS and "exp_avg_sq" not in optimizer.state[p]
    optimizer.change_options(relax[1:])
    torch.testing.assert_close(optimizer.state[p]["exp_avg_sq"], before, rtol=1e-5, atol=0)


def test_before_any_gradient_zeros_stay_zeros() -> None:
    p = nn.Parameter(torch.randn(4, 6))
    optimizer = HinaAdaptive([p], lr=LR)
    optimizer.init_state()
    for on in (True, False):
        optimizer.change_options([{"factored_second_moment": on}])
        assert all(float(x.abs().sum()) == 0 for x in kept(optimizer, p).values())


@pytest.mark.parametrize("shape", [(1500, 900), (900, 50, 30)])
@pytest.mark.parametrize("precision", ["fp32", "8bit"])
def test_in_pieces_as_at_once(shape: tuple[int, ...], precision: str) -> None:
    """Parameters of more than a piece."""
    torch.manual_seed(0)
    p = nn.Parameter(torch.randn(shape))
    optimizer = HinaAdaptive([p], lr=LR, state_precision=precision)  # type: ignore[arg-type]
    p.grad = torch.randn(shape)
    optimizer.step()
    v = kept(optimizer, p)["exp_avg_sq"].double().flatten(1)
    optimizer.change_options([{"factored_second_moment": True}])
    means = kept(optimizer, p)
    torch.testing.assert_close(means["exp_avg_sq_row"].double(), v.mean(1), rtol=1e-6, atol=0)
    torch.testing.assert_close(means["exp_avg_sq_col"].double(), v.mean(0), rtol=1e-6, atol=0)
    optimizer.change_options([{"factored_second_moment": False}])
    estimate = v.mean(1)[:, None] * v.mean(0)[None] / v.mean()
    back = kept(optimizer, p)["exp_avg_sq"].double().flatten(1)
    error = (back - estimate).abs().max() / estimate.max()
    assert error < (1e-6 if precision == "fp32" else 0.02)


# -- shards ------------------------------------------------------------------------------------------------------------


def _sharded(size: int, by_rows: bool, precision: str) -> tuple[list[dict[str, Tensor]], list[Tensor], World]:
    """Whole, factored, whole: the means that every rank then has, and the weights after all."""
    world = World(size)
    found: list[dict[str, Tensor]] = [{} for _ in range(size)]
    weights: list[list[Tensor]] = [[] for _ in range(size)]
    errors: list[BaseException] = []

    def main(rank: int) -> None:
        try:
            layout, named, full = ThreadLayout(world, rank), [], large()
            places = [cut(tuple(t.shape), rank, size, by_rows) for _, t in full]
            for (name, t), (a, b) in zip(full, places, strict=True):
                p = nn.Parameter(piece_of(t.detach(), a, b, by_rows))
                layout.shards[p] = Shard(tuple(t.shape), a, b)
                named.append((name, p))
            optimizer = HinaAdaptive(named, lr=LR, state_precision=precision)  # type: ignore[arg-type]
            optimizer.bind_layout(layout)
            for step in range(6):
                if step in (2, 4):
                    before = world.reductions
                    world.barrier.wait()
                    optimizer.change_options([{"factored_second_moment": step == 2}])
                    if rank == 0 and step == 2:
                        assert world.reductions == before + 1, "one exchange for all parameters"
                    if step == 2:
                        found[rank] = {
                            f"{name}.{key}": x
                            for name, p in named
                            for key, x in kept(optimizer, p).items()
                            if key in MEANS
                        }
                give_large(full, step)
                for (_, p), (_, t), (a, b) in zip(named, full, places, strict=True):
                    assert t.grad is not None
                    p.grad = piece_of(t.grad, a, b, by_rows)
                world.barrier.wait()
                optimizer.step()
            weights[rank] = [p.detach().reshape(-1) for _, p in named]
        except BaseException as error:
            errors.append(error)
            world.barrier.abort()

    threads = [threading.Thread(target=main, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return found, [torch.cat(parts) for parts in zip(*weights, strict=True)], world


@pytest.mark.parametrize("by_rows", [True, False], ids=["rows", "flat"])
def test_shards_convert_as_one_process_does(by_rows: bool) -> None:
    (whole,), alone, _ = _sharded(1, True, "fp32")
    found, together, _ = _sharded(3, by_rows, "fp32")
    assert len(whole) == 2 * 6
    for rank in found:
        assert rank.keys() == whole.keys()
        for key, value in rank.items():
            torch.testing.assert_close(value, whole[key], rtol=1e-6, atol=0)
    for one, two, (name, start) in zip(alone, together, large(), strict=True):
        moved = (one - start.detach().reshape(-1)).abs().max()
        assert moved > 0 and (one - two).abs().max() <= 1e-3 * moved, name


def test_one_rank_alone_must_not_convert() -> None:
    """An option edited by hand, where others would wait for sums: refused, and nothing is lost."""
    world = World(1)
    layout, p = ThreadLayout(world, 0), nn.Parameter(torch.randn(4, 6))
    layout.shards[p] = Shard((4, 6), 0, 24)
    optimizer = HinaAdaptive([p], lr=LR)
    optimizer.bind_layout(layout)
    p.grad = torch.randn(4, 6)
    optimizer.step()
    weights, before = p.detach().clone(), optimizer.state[p]["exp_avg_sq"].clone()
    optimizer.param_groups[0]["factored_second_moment"] = True
    with pytest.raises(ValueError, match=r"change_options\(\) on all ranks"):
        optimizer.step()
    assert torch.equal(p, weights) and torch.equal(optimizer.state[p]["exp_avg_sq"], before)
    optimizer.param_groups[0]["factored_second_moment"] = False
    optimizer.step()
    optimizer.change_options([{"factored_second_moment": True}])
    assert set(optimizer.state[p]) >= MEANS


@pytest.mark.parametrize("by_rows", [True, False, None], ids=["rows", "flat", "chunks"])
def test_without_adopt_in_pieces(by_rows: bool | None) -> None:
    """Sums over rows and columns of a large matrix in chunks, and of shards, are those of the whole."""
    options: dict[str, Any] = {**NOTHING, "lr": LR, "factored_second_moment": True}
    full = [("p", torch.randn(300, 1000, generator=torch.Generator().manual_seed(0)))]

    def gradients(step: int) -> list[Tensor]:
        return [torch.randn(300, 1000, generator=torch.Generator().manual_seed(step + 1))]

    def alone(megabytes: float) -> Tensor:
        p = nn.Parameter(full[0][1].clone())
        optimizer = HinaAdaptive([("p", p)], **options, max_buffer_memory_mb=megabytes)
        for step in range(3):
            p.grad = gradients(step)[0]
            optimizer.step()
        return p.detach()

    if by_rows is None:
        mine = alone(5)
    else:
        build = functools.partial(HinaAdaptive, **options)
        (mine,), _ = run_sharded(full, gradients, build, size=3, steps=3, by_rows=by_rows)
    torch.testing.assert_close(mine, alone(500), rtol=1e-5, atol=1e-7)


# -- the ladder --------------------------------------------------------------------------------------------------------


def test_the_rung_saves_what_it_says_and_is_said(caplog: pytest.LogCaptureFixture) -> None:
    named, optimizer = trained(3)
    planned = plan_for_vram(optimizer, TINY, RUNG)
    with caplog.at_level(logging.WARNING, "hina_optim"):
        report = optimize_for_vram(optimizer, TINY, RUNG)
    (action,) = report["actions"]
    full = sum(p.numel() for name, p in named if name != "vector")
    means = sum(p.shape[0] + p.numel() // p.shape[0] for name, p in named if name != "vector")
    assert action["bytes_saved"] == action["bytes_predicted"] == 4 * (full - means)
    assert planned["used_bytes_after"] == report["used_bytes_after"] == used_bytes(optimizer)
    assert "factored_second_moment=True saved" in caplog.text
    go_on(named, optimizer, 3, 6)
    assert all(p.isfinite().all() for _, p in named)
    report = relax_vram(optimizer, 1.0, RUNG)
    assert report["reached"] and report["actions"][0]["bytes_saved"] == -action["bytes_saved"]
    assert not optimizer.param_groups[0]["factored_second_moment"]
    go_on(named, optimizer, 6, 8)
    assert all(p.isfinite().all() for _, p in named)


@pytest.mark.parametrize("why", [{"emergency_simplify": False}, {"use_adopt_stability": False, "amsgrad": True}])
def test_not_where_it_must_not(why: dict[str, Any]) -> None:
    _, optimizer = trained(2, **why)
    assert not optimize_for_vram(optimizer, TINY, RUNG)["actions"]
    assert not any(MEANS & set(state) for state in optimizer.state.values())


def test_amsgrad_and_factors_exclude_each_other() -> None:
    with pytest.raises(ValueError, match="amsgrad=True keeps the largest"):
        HinaAdaptive(large(), use_adopt_stability=False, amsgrad=True, factored_second_moment=True)


def test_the_way_goes_on_close_to_that_of_the_whole_moment() -> None:
    """Gradients whose squares have rank 1 in the mean: the direction is that of the whole moment, but for its noise."""

    def run(change: bool) -> Tensor:
        torch.manual_seed(0)
        p = nn.Parameter(torch.zeros(64, 48))
        optimizer = HinaAdaptive([p], **{**NOTHING, "lr": LR, "betas": (0.9, 0.99), "use_adopt_stability": True})
        scale = (torch.rand(64, 1) + 0.1) * (torch.rand(1, 48) + 0.1)
        way = torch.randn(64, 48)
        for step in range(60):
            if step == 20 and change:
                optimizer.change_options([{"factored_second_moment": True}])
            p.grad = scale * (way + torch.randn(64, 48))
            optimizer.step()
        return p.detach()

    whole, factored = run(False), run(True)
    cosine = torch.nn.functional.cosine_similarity(whole.flatten(), factored.flatten(), dim=0)
    assert 0.9 < cosine < 1 and 0.8 < factored.norm() / whole.norm() < 1.25


def test_the_checkpoint_holds_the_means_and_the_way_back(tmp_path: Path) -> None:
    named, optimizer = trained(3)
    optimize_for_vram(optimizer, TINY, RUNG)
    torch.save(optimizer.state_dict(), tmp_path / "state.pt")
    resumed = [(name, nn.Parameter(p.detach().clone())) for name, p in named]
    other = make("HinaAdaptive", resumed)
    other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    for one, of in ((named, optimizer), (resumed, other)):
        go_on(one, of, 3, 5)
    assert all(torch.equal(p, q) for (_, p), (_, q) in zip(named, resumed, strict=True))
    assert other.state_bytes() == optimizer.state_bytes()
    relax_vram(other, 1.0, RUNG)
    assert not other.param_groups[0]["factored_second_moment"]
    assert all("exp_avg_sq" in state and not MEANS & set(state) for state in other.state.values())


def test_the_portable_checkpoint_too(tmp_path: Path) -> None:
    from hina_lightning.sharded_state import load, save

    named, optimizer = trained(3, state_precision="8bit")
    optimize_for_vram(optimizer, TINY, RUNG)
    save(tmp_path / "state", optimizer)
    resumed = [(name, nn.Parameter(p.detach().clone())) for name, p in named]
    other = make("HinaAdaptive", resumed, state_precision="8bit")
    load(tmp_path / "state", other)
    for one, of in ((named, optimizer), (resumed, other)):
        go_on(one, of, 3, 5)
    assert all(torch.equal(p, q) for (_, p), (_, q) in zip(named, resumed, strict=True))


@pytest.mark.parametrize("up", [False, True])
def test_out_of_memory_leaves_it_as_it_was(up: bool) -> None:
    """At any allocation: all of the old state, or all of the new."""
    _, base = trained(2)
    if up:
        base.change_options([{"factored_second_moment": True}])
    whole = [{"factored_second_moment": not up}]
    done = copy.deepcopy(base)
    with Scarce() as watch:
        done.change_options(whole)
    for first in places(watch.count, 24):
        optimizer = copy.deepcopy(base)
        params = [p for group in optimizer.param_groups for p in group["params"]]
        before = [kept(optimizer, p) for p in params]
        with pytest.raises(torch.OutOfMemoryError), Scarce(first):
            optimizer.change_options(whole)
        changed = optimizer.param_groups[0]["factored_second_moment"] is not up
        of = done if changed else base
        theirs = [p for group in of.param_groups for p in group["params"]]
        for p, q, old in zip(params, theirs, before, strict=True):
            expected = kept(of, q) if changed else old
            assert {name: x for name, x in kept(optimizer, p).items()}.keys() == expected.keys()
            assert all(torch.equal(x, expected[name]) for name, x in kept(optimizer, p).items())
            p.grad = torch.ones_like(p)
        optimizer.step()


def _with_fsdp2(rank: int) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    torch.manual_seed(0)
    model, alone = (nn.Linear(12, 7) for _ in range(2))
    alone.load_state_dict(model.state_dict())
    fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
    sharded, whole = (HinaAdaptive(m.named_parameters(), lr=LR, emergency_simplify=True) for m in (model, alone))
    for step in range(6):
        for m, optimizer in ((model, sharded), (alone, whole)):
            m(torch.full((3, 12), step + 1.0)).square().mean().backward()
            if step == 3:
                # one rank alone is short; then there is room again
                report = optimize_for_vram(optimizer, TINY if rank == 1 or m is alone else 1.0, RUNG)
                assert [a["rung"] for a in report["actions"]] == ["factored_second_moment=True"]
                assert {a["bytes_saved"] for a in report["actions"]} == {
                    a["bytes_predicted"] for a in report["actions"]
                }
            if step == 5:
                relax_vram(optimizer, 1.0, RUNG)
            optimizer.step()
            optimizer.zero_grad()
        if step == 3:
            mine, theirs = (o.state[next(iter(m.parameters()))] for m, o in ((model, sharded), (alone, whole)))
            for name in MEANS:
                torch.testing.assert_close(mine[name], theirs[name], rtol=1e-5, atol=0)
    for p, q in zip(model.parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(p.full_tensor(), q.detach(), rtol=1e-4, atol=1e-6)  # type: ignore[attr-defined]


def test_under_fsdp2_with_one_rank_that_is_short() -> None:
    on_ranks(2, _with_fsdp2)


def test_used_bytes_of_a_budget_from_the_first_step() -> None:
    """The budget needs the rung: no state has been made yet, and none is made whole."""
    named = large()
    probe = make("HinaAdaptive", large())
    give_large(named, 0)
    for (_, p), (_, q) in zip(named, large(), strict=True):
        q.grad = p.grad
    lowest = plan_for_vram(probe, TINY)["used_bytes_after"] + sum(p.nbytes for _, p in named)
    optimizer = make("HinaAdaptive", named, vram_budget_gb=(lowest + 1) / GIB)
    optimizer.step()
    assert optimizer.param_groups[0]["factored_second_moment"]
    assert all(MEANS & set(optimizer.state[p]) for name, p in named if name != "vector")
