"""Parameter groups by decay, adapter role and regex, without Lightning: adapter_groups and group_parameters."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from hina_optim import HinaAdaptive
from hina_optim.adapters import ROLES, adapter_groups, group_parameters, role_of

peft = pytest.importorskip("peft")
lycoris = pytest.importorskip("lycoris")


class Tiny(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(10, 16)
        self.linear = nn.Linear(16, 24)
        self.conv = nn.Conv2d(8, 12, 3)
        self.norm = nn.LayerNorm(12)


def from_peft(config) -> nn.Module:
    return peft.get_peft_model(Tiny(), config)


def from_lycoris(algo: str, **options) -> nn.Module:
    lycoris.LycorisNetwork.apply_preset({"target_module": ["Linear", "Conv2d"]})
    network = lycoris.create_lycoris(Tiny(), 1.0, linear_dim=1, conv_dim=1, algo=algo, factor=4, **options)
    network.apply_to()
    return network


LAYERS = ["linear", "conv"]
MODELS = {
    "peft lora": lambda: from_peft(peft.LoraConfig(r=2, target_modules=[*LAYERS, "embedding"])),
    "peft lora, bias": lambda: from_peft(peft.LoraConfig(r=2, target_modules=LAYERS, lora_bias=True)),
    "peft dora": lambda: from_peft(peft.LoraConfig(r=2, target_modules=LAYERS, use_dora=True)),
    "peft lokr": lambda: from_peft(peft.LoKrConfig(r=1, target_modules=LAYERS, decompose_both=True)),
    "peft loha": lambda: from_peft(peft.LoHaConfig(r=2, target_modules=LAYERS)),
    "lycoris lora": lambda: from_lycoris("lora"),
    "lycoris dora": lambda: from_lycoris("lora", dora_wd=True),
    "lycoris lokr": lambda: from_lycoris("lokr", use_scalar=True, dora_wd=True),
    "lycoris loha": lambda: from_lycoris("loha", dora_wd=True),
}
PAIRED = [name for name in MODELS if "loha" not in name]


def named(groups: list[dict]) -> dict[str, list[str]]:
    return {group["name"]: [name for name, _ in group["params"]] for group in groups}


def trainable(model: nn.Module) -> list[str]:
    return [name for name, p in model.named_parameters() if p.requires_grad]


# -- real adapters -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PAIRED)
def test_no_group_is_empty_and_every_parameter_is_in_one(name):
    model = MODELS[name]()
    groups = adapter_groups(model, lr=1e-4, ratio=16, weight_decay=0.01)
    assert all(group["params"] for group in groups)
    assert sorted(n for group in groups for n, _ in group["params"]) == sorted(trainable(model))
    assert len(named(groups)) == len(groups)
    raised = {n for group in groups if group["lr"] != 1e-4 for n, _ in group["params"]}
    shapes = {n: p.shape for n, p in model.named_parameters()}
    second = {"lora_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b"}
    assert raised == {n for n in shapes if n in trainable(model) and role_of(n, shapes[n]) in second}
    assert sorted({group["lr"] for group in groups}) == pytest.approx([1e-4, 16e-4])
    optimizer = torch.optim.AdamW(groups, lr=1.0)
    assert [group["lr"] for group in optimizer.param_groups] == [group["lr"] for group in groups]


@pytest.mark.parametrize("name", MODELS)
def test_magnitudes_biases_and_scalars_do_not_decay_and_matrices_do(name):
    model = MODELS[name]()
    decay = {n: g["weight_decay"] for g in adapter_groups(model, lr=1e-4, weight_decay=0.01) for n, _ in g["params"]}
    for n, p in model.named_parameters():
        if p.requires_grad:
            vector = p.ndim < 2 or role_of(n, p.shape) == "lora_magnitude"
            assert decay[n] == (0.0 if vector else 0.01), n
    expected = {"dora": 1, "lokr": 1, "loha": 1} if name.startswith("lycoris") else {"dora": 1, "lora, bias": 1}
    assert (0.0 in decay.values()) == (name.split(" ", 1)[1] in expected)


@pytest.mark.parametrize("name", MODELS)
def test_every_role_that_is_there_can_be_asked_for_and_every_other_is_an_error(name):
    model = MODELS[name]()
    present = {role_of(n, p.shape) for n, p in model.named_parameters() if p.requires_grad} - {None}
    for role in ROLES:
        if any(one == role or one.startswith(f"{role}_") for one in present):
            groups = adapter_groups(model, lr=1.0, roles={role: 3.0})
            asked = {n for g in groups if g["lr"] == 3.0 for n, _ in g["params"]}
            assert {role_of(n, p.shape) for n, p in model.named_parameters() if n in asked} <= {
                one for one in present if one == role or one.startswith(f"{role}_")
            }
            assert asked
        else:
            with pytest.raises(ValueError, match=rf"roles\['{role}'\]=3.0 was given, but no trainable") as error:
                adapter_groups(model, lr=1.0, roles={role: 3.0})
            assert all(one in str(error.value) for one in present)


def test_loraplus_says_nothing_of_loha():
    for library in ("peft", "lycoris"):
        with pytest.raises(ValueError, match=r"ratio=16 was given, but no .* Adapter roles found: .*loha_w1_a \(2\)"):
            adapter_groups(MODELS[f"{library} loha"](), lr=1e-4, ratio=16)
    groups = adapter_groups(MODELS["peft loha"](), lr=1.0, roles={"loha_w2": 2.0})
    assert {(g["name"], g["lr"], len(g["params"])) for g in groups} == {("decay", 1.0, 4), ("loha_w2", 2.0, 4)}


# -- how groups compose ------------------------------------------------------------------------------------------------


def parameters(*names: str) -> list[tuple[str, nn.Parameter]]:
    shapes = {"lora_A": (2, 8), "lora_B": (8, 2), "bias": (8,), "dora_scale": (8, 1)}
    return [(n, nn.Parameter(torch.ones(next((s for part, s in shapes.items() if part in n), (8, 8))))) for n in names]


ADAPTER = ("q.weight", "q.bias", "q.lora_A", "q.lora_B", "q.dora_scale", "v.lora_A", "v.lora_B")


def test_roles_regex_and_decay_multiply():
    groups = adapter_groups(
        parameters(*ADAPTER),
        lr=1e-3,
        ratio=4,
        roles={"lora_magnitude": 0.5},
        lr_multipliers={r"^v\.": 0.1},
        weight_decay=0.2,
    )
    assert [(g["name"], g["lr"], g["weight_decay"], [n for n, _ in g["params"]]) for g in groups] == [
        ("decay", 1e-3, 0.2, ["q.weight", "q.lora_A"]),
        ("lora_b", 4e-3, 0.2, ["q.lora_B"]),
        ("lora_magnitude:no_decay", 0.5e-3, 0.0, ["q.dora_scale"]),
        ("no_decay", 1e-3, 0.0, ["q.bias"]),
        (r"decay:x0.1:^v\.", pytest.approx(1e-4), 0.2, ["v.lora_A"]),
        (r"lora_b:x0.1:^v\.", pytest.approx(4e-4), 0.2, ["v.lora_B"]),
    ]


def test_existing_groups_are_split_and_keep_their_options():
    unet, text = parameters(*ADAPTER), [(f"te.{n}", p) for n, p in parameters("a.lora_A", "a.lora_B", "norm.bias")]
    groups = adapter_groups(
        [{"params": unet, "name": "unet", "lr": 1e-4, "betas": (0.8, 0.9)}, {"params": text, "weight_decay": 0.3}],
        lr=2e-5,
        ratio=10,
        weight_decay=0.1,
    )
    assert {g["name"]: (round(g["lr"], 9), g["weight_decay"], g.get("betas")) for g in groups} == {
        "unet": (1e-4, 0.1, (0.8, 0.9)),
        "unet:lora_b": (1e-3, 0.1, (0.8, 0.9)),
        "unet:no_decay": (1e-4, 0.0, (0.8, 0.9)),
        "group1": (2e-5, 0.3, None),
        "group1:lora_b": (2e-4, 0.3, None),
        "group1:no_decay": (2e-5, 0.0, None),
    }
    assert named(groups)["unet:no_decay"] == ["q.bias", "q.dora_scale"]


def test_splitting_twice_splits_no_further_and_a_request_may_be_met_by_one_group_only():
    groups = adapter_groups(
        [{"params": parameters("q.weight", "q.bias"), "name": "head"}, {"params": parameters("q.lora_A", "q.lora_B")}],
        lr=1e-3,
        ratio=4,
    )
    assert list(named(groups)) == ["head", "head:no_decay", "group1", "group1:lora_b"]
    again = adapter_groups(groups, lr=1.0)
    assert [(g["name"], g["lr"], [n for n, _ in g["params"]]) for g in again] == [
        (g["name"], g["lr"], [n for n, _ in g["params"]]) for g in groups
    ]


def test_a_group_that_does_not_decay_needs_no_split_for_it():
    groups = [{"params": parameters("q.weight", "q.bias", "q.lora_B"), "name": "head", "weight_decay": 0}]
    assert named(adapter_groups(groups, lr=1e-3)) == {"head": ["q.weight", "q.bias", "q.lora_B"]}
    assert list(named(adapter_groups(groups, lr=1e-3, ratio=2))) == ["head", "head:lora_b"]


def test_the_narrower_role_decides():
    groups = adapter_groups(parameters(*ADAPTER), lr=1.0, roles={"lora": 0.5, "lora_b": 3.0})
    assert {(g["name"], g["lr"]) for g in groups} == {
        ("decay", 1.0),
        ("no_decay", 1.0),
        ("lora", 0.5),
        ("lora:no_decay", 0.5),
        ("lora_b", 3.0),
    }


def test_names_and_order_do_not_depend_on_the_order_of_parameters():
    forward = adapter_groups(parameters(*ADAPTER), lr=1e-3, ratio=4)
    backward = adapter_groups(parameters(*reversed(ADAPTER)), lr=1e-3, ratio=4)
    assert [g["name"] for g in forward] == [g["name"] for g in backward]


def test_bounds_of_a_masked_rate_move_with_it():
    groups = adapter_groups(
        parameters(*ADAPTER), lr=1e-4, ratio=16, min_lr=1e-7, max_lr=1e-3, lr_bump=3e-6, use_lr_mask=True
    )
    raised = next(g for g in groups if g["name"] == "lora_b")
    assert (raised["min_lr"], raised["max_lr"], raised["lr_bump"]) == pytest.approx((16e-7, 16e-3, 48e-6))
    assert groups[0]["max_lr"] == 1e-3 and raised["use_lr_mask"] is True
    optimizer = HinaAdaptive(groups, lr=1e-4, compile=False)
    assert [g["name"] for g in optimizer.param_groups] == [g["name"] for g in groups]
    assert set(optimizer.param_names()) == set(ADAPTER)


def test_the_ratio_is_that_of_the_first_steps():
    """An optimizer whose first step is the learning rate shows what it got."""
    members = parameters("q.lora_A", "q.lora_B")
    optimizer = torch.optim.Adam(adapter_groups(members, lr=1e-3, ratio=16), eps=1e-12)
    for _, p in members:
        p.grad = torch.ones_like(p)
    optimizer.step()
    a, b = (1 - p.detach() for _, p in members)
    torch.testing.assert_close(b.mean() / a.mean(), torch.tensor(16.0), rtol=1e-3, atol=0)


def test_frozen_and_tied_parameters():
    model = nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Linear(4, 4)})
    model["b"].weight = model["a"].weight
    model["b"].bias.requires_grad_(False)
    assert named(adapter_groups(model, lr=1e-3)) == {"decay": ["a.weight"], "no_decay": ["a.bias"]}
    frozen = [("x.weight", nn.Parameter(torch.ones(2, 2), requires_grad=False))]
    groups = adapter_groups([{"params": frozen}, {"params": parameters("q.weight")}], lr=1e-3)
    assert named(groups) == {"group1": ["q.weight"]}


def test_norms_of_a_model_do_not_decay_whatever_their_shape():
    model = nn.ModuleDict({"norm": nn.LayerNorm((2, 3)), "linear": nn.Linear(2, 3)})
    assert named(adapter_groups(model, lr=1e-3))["no_decay"] == ["norm.weight", "norm.bias", "linear.bias"]


def test_names_are_those_of_the_model_that_is_not_compiled():
    model = nn.Sequential(nn.Linear(2, 2))
    assert named(adapter_groups(torch.compile(model), lr=1e-3)) == named(adapter_groups(model, lr=1e-3))


def test_a_role_for_a_module():
    groups = group_parameters(MODELS["peft dora"](), lora_ratio=2, roles={"lora_magnitude": 0.1})
    assert [(g.name, g.factor, g.decays) for g in groups] == [
        ("decay", 1.0, True),
        ("lora_b", 2.0, True),
        ("lora_magnitude:no_decay", 0.1, False),
    ]


# -- bad input ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("params", "options", "message"),
    [
        (ADAPTER, dict(ratio=0), r"adapter_groups: ratio=0 is not valid: ratio must be a finite number > 0"),
        (ADAPTER, dict(ratio=math.nan), "ratio=nan is not valid"),
        (ADAPTER, dict(lr=-1.0), "lr=-1.0 is not valid: lr must be a finite number >= 0"),
        (ADAPTER, dict(roles={"lora_c": 2.0}), r"there is no role 'lora_c'. Did you mean 'lora_"),
        (ADAPTER, dict(roles={"lora_b": -2.0}), r"roles\['lora_b'\]=-2.0 is not valid"),
        (ADAPTER, dict(roles={"lokr": 2.0}), r"lokr.*was given.*roles found: lora_a \(2\), lora_b \(2\), lora_magn"),
        (ADAPTER, dict(roles={"lora_b": 2.0}, ratio=4), r"ratio=4 and roles\['lora_b'\]=2.0 both decide for lora_b"),
        (
            ADAPTER,
            dict(roles={"lora": 2, "lora_a": 2, "lora_b": 2, "lora_magnitude": 2}),
            "other entries of roles decide for lora_a, lora_b, lora_magnitude",
        ),
        (ADAPTER, dict(lr_multipliers={"nowhere": 2.0}), "found in no parameter name of the given parameters"),
        (("q.weight",), dict(ratio=4), r"no trainable parameter of the given parameters is .* found: none"),
        ((), dict(), "the given parameters has no trainable parameter: it has no parameters at all"),
    ],
)
def test_bad_values_are_named(params, options, message):
    with pytest.raises(ValueError, match=message):
        adapter_groups(parameters(*params), **{"lr": 1e-3, **options})


def test_parameters_without_names_are_refused_with_the_remedy():
    model = MODELS["peft lora"]()
    for given in (model.parameters(), [{"params": list(model.parameters())}]):
        with pytest.raises(ValueError, match=r"Pass a model or model.named_parameters\(\)"):
            adapter_groups(given, lr=1e-3)


def test_two_groups_of_one_name_are_refused():
    groups = [{"params": parameters(n), "name": "x"} for n in ("a.weight", "b.weight")]
    with pytest.raises(ValueError, match="two groups are called 'x'"):
        adapter_groups(groups, lr=1e-3)
    with pytest.raises(ValueError, match="lr of group 'x'"):
        adapter_groups([{**groups[0], "lr": -1.0}], lr=1e-3)


def test_all_frozen():
    with pytest.raises(ValueError, match="Linear has no trainable parameter: all 2 are frozen"):
        adapter_groups(nn.Linear(2, 2).requires_grad_(False), lr=1e-3)
