"""What changes under an optimizer: groups and options, parameters and state that frameworks replace, many at once."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import nn

from hina_optim import HinaAdaptive
from tests.optim_cases import EVERYTHING, NOTHING, SHAPES, give, named_params
from tests.test_engine_step import APART, BF16, LR, Named, build, close, equal, run, state_equal

# -- groups --------------------------------------------------------------------------------------------------------


def test_a_group_added_in_the_middle() -> None:
    """The old parameters go on as before, the new ones as in an optimizer of their own."""
    named, alone = named_params(), named_params()
    optimizer = HinaAdaptive(named[:6], lr=LR, **APART)
    old = HinaAdaptive(alone[:6], lr=LR, **APART)
    new = HinaAdaptive(alone[6:], lr=2e-4, weight_decay=0.3, **APART)
    run(named[:6], optimizer, 0)
    for step in range(6):
        if step == 3:
            optimizer.add_param_group({"params": named[6:], "lr": 2e-4, "weight_decay": 0.3, "name": "later"})
        give(named, step)
        give(alone, step)
        optimizer.step()
        old.step()
        if step >= 3:
            new.step()
    close(named, alone, 1e-6)
    assert optimizer.param_groups[1]["start_lr"] == 2e-4


def test_two_groups_keep_their_own_options() -> None:
    options: list[dict[str, Any]] = [
        {"lr": 1e-4, "betas": (0.8, 0.9), "use_grams": True, "warmup_steps": 3},
        {"lr": 5e-4, "weight_decay": 0.5, "use_lr_mask": False, "state_precision": "bf16", "use_spd": False},
    ]
    named, alone = named_params(), named_params()
    optimizer = HinaAdaptive(
        [{"params": named[:7], **options[0]}, {"params": named[7:], **options[1]}], **{**APART, "rounding": "nearest"}
    )
    others = [
        HinaAdaptive(part, **{**APART, "rounding": "nearest", **given})
        for part, given in zip((alone[:7], alone[7:]), options, strict=True)
    ]
    for step in range(6):
        give(named, step)
        give(alone, step)
        for o in (optimizer, *others):
            o.step()
    # the noise of bf16 state is drawn by the place of a parameter, which differs here
    close(named[:7], alone[:7], 1e-6)
    close(named[7:], alone[7:], 2e-3)


@pytest.mark.parametrize("interval", [1, 2, 3])
@pytest.mark.parametrize("halves", ["by place", "adapter pairs apart"])
def test_group_by_group_is_one_step(interval: int, halves: str) -> None:
    """ZeRO steps one group at a time, with the parameter lists of all others emptied; after a resume too."""
    options = {"relationship_discovery_interval": interval, "rank_interval": interval}
    trainings = []
    for _ in range(2):
        named = named_params()
        first = [pair for i, pair in enumerate(named) if ("lora_A" in pair[0] if halves != "by place" else i < 7)]
        second = [pair for pair in named if not any(pair[1] is p for _, p in first)]
        groups = [{"params": first, "lr": 1e-4}, {"params": second, "lr": 3e-4}]
        trainings.append((named, HinaAdaptive(groups, **{**EVERYTHING, **options})))
    (named, together), (other, apart) = trainings
    for step in range(9):
        give(named, step)
        give(other, step)
        together.step()
        if step == 4:  # right after measuring, for an interval of 3
            file = io.BytesIO()
            torch.save(apart.state_dict(), file)
            file.seek(0)
            fresh = [
                {"params": [(n, p) for n, p in other if any(p is q for q in g["params"])]} for g in apart.param_groups
            ]
            apart = HinaAdaptive(fresh, lr=LR, **{**EVERYTHING, **options})
            apart.load_state_dict(torch.load(file, weights_only=True))
        lists = [group["params"] for group in apart.param_groups]
        for g in range(2):
            for i, group in enumerate(apart.param_groups):
                group["params"] = lists[i] if i == g else []
            apart.step()
        for group, params in zip(apart.param_groups, lists, strict=True):
            group["params"] = params
    close(named, other, 1e-6)
    for (_, p), (_, q) in zip(named, other, strict=True):
        for key, value in together.state[p].items():
            torch.testing.assert_close(apart.state[q][key], value, rtol=1e-4, atol=1e-5, msg=key)


def test_many_groups() -> None:
    """Some recipes make a group of every parameter."""
    params = [nn.Parameter(torch.randn(3, 2).to(BF16)) for _ in range(140)]
    optimizer = HinaAdaptive([{"params": [p]} for p in params], lr=LR)
    before = [p.detach().clone() for p in params]
    for _ in range(3):
        for p in params:
            p.grad = torch.randn_like(p)
        optimizer.step()
    assert any(not torch.equal(p, q) for p, q in zip(params[:128], before[:128], strict=True))
    assert any(not torch.equal(p, q) for p, q in zip(params[128:], before[128:], strict=True))


def test_an_option_edited_in_the_middle() -> None:
    """Frameworks and users write into groups; it counts from the next step on, as if a checkpoint had been loaded."""
    named, optimizer = build()
    run(named, optimizer, 3)
    other = named_params()
    loaded = HinaAdaptive(other, lr=LR, **EVERYTHING)
    with torch.no_grad():
        for (_, p), (_, q) in zip(named, other, strict=True):
            q.copy_(p)
    saved = copy.deepcopy(optimizer.state_dict())
    edits = {"weight_decay": 0.4, "betas": (0.5, 0.8), "use_cautious": False, "spd_lambda": 0.5}
    saved["param_groups"][0].update(edits)
    loaded.load_state_dict(saved)
    optimizer.param_groups[0].update(edits)
    unedited = copy.deepcopy((named, optimizer))
    unedited[1].param_groups[0].update({k: optimizer.defaults[k] for k in edits})
    for pair, o in ((named, optimizer), (other, loaded), unedited):
        run(pair, o, range(3, 6))
    equal(named, other)
    assert not torch.equal(dict(named)["square"], dict(unedited[0])["square"])


def test_a_technique_switched_on_in_the_middle() -> None:
    """Its state begins afresh; everybody else's goes on."""
    named, optimizer = build(use_lr_mask=False, use_spd=False)
    run(named, optimizer, 3)
    moments = {name: optimizer.state[p]["exp_avg"].clone() for name, p in named}
    optimizer.param_groups[0]["use_lr_mask"] = True
    optimizer.init_state()
    for name, p in named:
        assert torch.equal(optimizer.state[p]["exp_avg"], moments[name])
        assert torch.equal(optimizer.state[p]["lr_mask"], torch.full_like(p, LR))
    run(named, optimizer, range(3, 5))


def test_group_dicts_replaced_by_copies() -> None:
    """Some frameworks hand the optimizer a new list of new dicts."""
    (named, optimizer), (other, expected) = build(), build()
    for step in range(4):
        if step == 2:
            optimizer.param_groups = [dict(group) for group in optimizer.param_groups]
        for pair, o in ((named, optimizer), (other, expected)):
            o.param_groups[0]["lr"] = LR / (1 + step)
            run(pair, o, range(step, step + 1))
    equal(named, other)


# -- parameters and state that change under the optimizer ------------------------------------------------------------


def test_parameters_replaced_by_new_objects() -> None:
    """FSDP2's set-up replaces every parameter; the state moves over, and nobody remembers the old ones."""
    (named, optimizer), (other, expected) = build(), build()
    for step in range(7):
        if step in (3, 4):
            swapped: Named = []
            for name, p in named:
                if step == 4 and name != "twin1":
                    swapped.append((name, p))
                    continue
                new = nn.Parameter(p.detach().clone())
                optimizer.state[new] = optimizer.state.pop(p)
                swapped.append((name, new))
            named = swapped
            optimizer.param_groups[0]["params"] = [p for _, p in named]
        run(named, optimizer, range(step, step + 1))
        run(other, expected, range(step, step + 1))
    equal(named, other)
    for (_, p), (_, q) in zip(named, other, strict=True):
        state_equal(optimizer.state[p], expected.state[q])
    assert set(optimizer.state) == {p for _, p in named}


def test_state_replaced_by_copies() -> None:
    """Lightning moves state to a device by writing new tensors into ``optimizer.state``."""
    (named, optimizer), (other, expected) = build(), build()
    for step in range(7):
        if step % 2:
            for p in optimizer.state:
                optimizer.state[p] = {k: v.clone() for k, v in optimizer.state[p].items()}
        elif step == 4:
            optimizer.state[named[4][1]]["exp_avg"] = optimizer.state[named[4][1]]["exp_avg"].clone()
        run(named, optimizer, range(step, step + 1))
        run(other, expected, range(step, step + 1))
    equal(named, other)
    for (_, p), (_, q) in zip(named, other, strict=True):
        state_equal(optimizer.state[p], expected.state[q])


@pytest.mark.parametrize("where", ["on another device", "emptied"])
def test_an_idle_parameter_is_in_nobodys_way(where: str) -> None:
    """Layer-wise training puts idle layers elsewhere; that is an error only once they are to be stepped."""
    named, optimizer = build(relationship_discovery_interval=2)
    at = [name for name, _ in named].index("square")
    run(named, optimizer, 3)
    idle = nn.Parameter(torch.empty(5, 5, device="meta") if where != "emptied" else torch.empty(0))
    optimizer.state[idle] = optimizer.state.pop(named[at][1])
    optimizer.param_groups[0]["params"][at] = idle
    others = named[:at] + named[at + 1 :]
    for step in range(3, 7):
        give(named, step)
        dict(named)["twin1"].grad = None if step % 2 else dict(named)["twin1"].grad
        optimizer.step()
        assert len(optimizer.state_dict()["state"]) == len(named)
    assert all(float(optimizer.state[p]["step"]) == (5 if name == "twin1" else 7) for name, p in others)


def test_a_deleted_state_begins_afresh() -> None:
    named, optimizer = build(**APART)
    run(named, optimizer, 3)
    square = dict(named)["square"]
    del optimizer.state[square]
    run(named, optimizer, range(3, 4))
    assert float(optimizer.state[square]["step"]) == 1
    assert float(optimizer.state[dict(named)["tall"]]["step"]) == 4


def test_a_model_that_changes_its_precision() -> None:
    """``model.bfloat16()`` in the middle of a run: the state follows, updates are rounded from then on."""
    named, optimizer = build(**APART)
    run(named, optimizer, 3)
    for _, p in named:
        p.grad = None
        p.data = p.data.to(BF16)
    run(named, optimizer, range(3, 6))
    for _, p in named:
        state = optimizer.state[p]
        assert p.dtype == BF16 and state["anchor"].dtype == BF16 and state["exp_avg"].dtype == torch.float32
        assert float(state["step"]) == 6


# -- many at once --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_thousand_small_ones_are_as_a_thousand_optimizers(dtype: torch.dtype) -> None:
    """Stacking changes no trajectory."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(), (3,), (4, 5), (2, 3, 2, 2), (1, 7)]
    together = [nn.Parameter(torch.randn(shapes[i % 5], generator=generator, dtype=dtype)) for i in range(1000)]
    chosen = range(0, 1000, 37)
    apart = {i: nn.Parameter(together[i].detach().clone()) for i in chosen}
    optimizer = HinaAdaptive(together, lr=LR, **APART)
    own = [HinaAdaptive([p], lr=LR, **APART) for p in apart.values()]
    for _ in range(4):
        for i, p in enumerate(together):
            p.grad = torch.randn(p.shape, generator=generator, dtype=dtype)
            if i in apart:
                apart[i].grad = p.grad.clone()
        optimizer.step()
        for o in own:
            o.step()
    for i, q in apart.items():
        torch.testing.assert_close(q, together[i], rtol=1e-6, atol=1e-7)


def test_names_do_not_matter_where_there_are_no_adapters() -> None:
    (named, optimizer), (other, _) = build(**NOTHING, lora_rank_penalty=False), build()
    unnamed = HinaAdaptive([p for _, p in other], lr=LR, **{**EVERYTHING, **NOTHING, "lora_rank_penalty": False})
    run(named, optimizer, 4)
    run(other, unnamed, 4)
    equal(named, other)
    assert unnamed.param_names()[:2] == ["group0.0", "group0.1"]
    assert optimizer.param_names() == list(SHAPES)


def test_two_models_with_the_same_names() -> None:
    """Two text encoders in one optimizer: their adapters pair up within each, and each has a name of its own."""
    first, second = named_params(seed=1), named_params(seed=2)
    optimizer = HinaAdaptive([{"params": first}, {"params": second}], lr=LR, **EVERYTHING)
    assert len(set(optimizer.param_names())) == 2 * len(SHAPES)
    for step in range(3):
        for named in (first, second):
            give(named, step)
        optimizer.step()
    found = optimizer.get_relationship_summary()["relationships"]
    adapters = [r["names"] for r in found if r["interaction_type"] == "adapter_pair"]
    assert len(adapters) == 2
    names = dict(zip(optimizer.param_names(), [id(p) for _, p in (*first, *second)], strict=True))
    ours = {id(p) for _, p in first}
    for pair in adapters:
        assert len({names[name] in ours for name in pair}) == 1
    # and a checkpoint gives each its own
    other = [named_params(seed=3), named_params(seed=4)]
    loaded = HinaAdaptive([{"params": n} for n in other], lr=LR, **EVERYTHING)
    loaded.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for here, there in zip((*first, *second), (*other[0], *other[1]), strict=True):
        state_equal(optimizer.state[here[1]], loaded.state[there[1]])


# -- anything, in any order ----------------------------------------------------------------------------------------

Training = tuple[Named, HinaAdaptive]


def two_groups(named: Named) -> HinaAdaptive:
    groups = [{"params": named[::2], "lr": 2e-4}, {"params": named[1::2], "weight_decay": 0.1}]
    return HinaAdaptive(groups, lr=LR, **{**EVERYTHING, "relationship_discovery_interval": 2})


def load_into_new(named: Named, optimizer: HinaAdaptive) -> Training:
    fresh = two_groups(named)
    fresh.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    return named, fresh


def swap_parameters(named: Named, optimizer: HinaAdaptive) -> Training:
    new = {p: nn.Parameter(p.detach().clone()) for _, p in named}
    for group in optimizer.param_groups:
        group["params"] = [new[p] for p in group["params"]]
    for p, q in new.items():
        if p in optimizer.state:
            optimizer.state[q] = optimizer.state.pop(p)
    return [(name, new[p]) for name, p in named], optimizer


def prime(named: Named, optimizer: HinaAdaptive) -> Training:
    rates = [group["lr"] for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    for _, p in named:
        p.grad = torch.zeros_like(p)
    optimizer.step()
    for group, lr in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = lr
    return named, optimizer


def clone_state(named: Named, optimizer: HinaAdaptive) -> Training:
    for p in list(optimizer.state):
        optimizer.state[p] = {k: v.clone() for k, v in optimizer.state[p].items()}
    return named, optimizer


def copy_groups(named: Named, optimizer: HinaAdaptive) -> Training:
    optimizer.param_groups = [dict(group) for group in optimizer.param_groups]
    return named, optimizer


def look(named: Named, optimizer: HinaAdaptive) -> Training:
    optimizer.get_optimization_info()
    optimizer.state_dict()
    optimizer.plan_for_vram(1.0)
    return named, optimizer


TRANSPARENT: dict[str, Callable[[Named, HinaAdaptive], Training]] = {
    "load into a new one": load_into_new,
    "deepcopy": lambda named, optimizer: copy.deepcopy((named, optimizer)),
    "swap parameters": swap_parameters,
    "prime": prime,
    "clone state": clone_state,
    "copy groups": copy_groups,
    "look": look,
}

some = st.one_of(st.just(set()), st.sets(st.integers(0, len(SHAPES) - 1), max_size=6))
doings = st.lists(st.sampled_from(sorted(TRANSPARENT)), max_size=2)


@settings(max_examples=20, deadline=None, derandomize=True, phases=[Phase.explicit, Phase.generate])
@given(st.lists(st.tuples(doings, some, some, st.booleans()), min_size=4, max_size=8))
def test_what_frameworks_do_between_steps_leaves_no_trace(
    steps: list[tuple[list[str], set[int], set[int], bool]],
) -> None:
    """Any sequence of it, where gradients lack, are not finite, and come group by group: the undisturbed trajectory."""
    training, plain = named_params(torch.float64), named_params(torch.float64)
    optimizer, expected = two_groups(training), two_groups(plain)
    for step, (between, without, bad, by_group) in enumerate(steps):
        for what in between:
            training, optimizer = TRANSPARENT[what](training, optimizer)
        for named in (training, plain):
            give(named, step)
            for i, (_, p) in enumerate(named):
                if i in bad and p.numel():
                    p.grad.view(-1)[-1] = torch.nan  # type: ignore[union-attr]
                if i in without:
                    p.grad = None
        expected.step()
        # group by group needs parameters that measure in the same step, and lists that were full after a swap
        in_phase = not any(missed for _, missed, _, _ in steps[: step + 1])
        by_group = by_group and in_phase and not {"clone state", "swap parameters"} & set(between)
        lists = [group["params"] for group in optimizer.param_groups]
        for chosen in ([0], [1]) if by_group else ([0, 1],):
            for g, group in enumerate(optimizer.param_groups):
                group["params"] = lists[g] if g in chosen else []
            optimizer.step()
        for group, params in zip(optimizer.param_groups, lists, strict=True):
            group["params"] = params
    for (name, p), (_, q) in zip(training, plain, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-11, msg=lambda m, name=name: f"{name}: {m}")
        mine, theirs = optimizer.state.get(p, {}), expected.state.get(q, {})
        for key in theirs:
            torch.testing.assert_close(mine[key], theirs[key], rtol=1e-6, atol=1e-8, msg=f"{name}.{key}")
