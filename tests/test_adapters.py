"""Roles and pairs of adapters: real modules of peft, and the names of the other libraries."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from hina_optim.adapters import (
    ROLES,
    diagnose_lora_pairing,
    find_adapters,
    find_pairs,
    infer_roles,
    lokr_stats,
    lora_stats,
    role_of,
)

peft = pytest.importorskip("peft")


class Tiny(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(10, 6)
        self.linear = nn.Linear(6, 8)
        self.conv = nn.Conv2d(8, 12, 3)
        self.norm = nn.LayerNorm(12)


def adapted(config: object) -> dict[str, nn.Parameter]:
    model = peft.get_peft_model(Tiny(), config)
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def roles(parameters: dict[str, nn.Parameter]) -> dict[str, str | None]:
    """Role of each parameter, under its name from the adapted module on."""
    return {name.removeprefix("base_model.model."): role_of(name, p.shape) for name, p in parameters.items()}


def paired_names(parameters: dict[str, nn.Parameter]) -> set[tuple[str, str]]:
    names = [name.removeprefix("base_model.model.") for name in parameters]
    return {(names[a], names[b]) for a, b in find_pairs(list(parameters), [p.shape for p in parameters.values()])}


def test_peft_lora_on_linear_convolution_and_embedding():
    parameters = adapted(peft.LoraConfig(r=4, target_modules=["linear", "conv", "embedding"]))
    assert roles(parameters) == {
        "embedding.lora_embedding_A.default": "lora_a",
        "embedding.lora_embedding_B.default": "lora_b",
        "linear.lora_A.default.weight": "lora_a",
        "linear.lora_B.default.weight": "lora_b",
        "conv.lora_A.default.weight": "lora_a",
        "conv.lora_B.default.weight": "lora_b",
    }
    assert paired_names(parameters) == {
        ("embedding.lora_embedding_A.default", "embedding.lora_embedding_B.default"),
        ("linear.lora_A.default.weight", "linear.lora_B.default.weight"),
        ("conv.lora_A.default.weight", "conv.lora_B.default.weight"),
    }


def test_the_products_of_peft_pairs_are_the_changes_of_the_weights():
    """What the rank penalty takes for granted: B·A, in the matrix view, is the change up to scale and transposition."""
    torch.manual_seed(0)
    model = peft.get_peft_model(Tiny(), peft.LoraConfig(r=4, target_modules=["linear", "conv", "embedding"]))
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    names = list(parameters)
    found = find_pairs(names, [p.shape for p in parameters.values()])
    assert len(found) == 3
    for i, j in found:
        a, b = parameters[names[i]], parameters[names[j]]
        with torch.no_grad():
            a.normal_()
            b.normal_()
            layer = model.get_submodule(names[i].partition(".lora_")[0])
            change = layer.get_delta_weight("default").flatten(1) / layer.scaling["default"]
            product = b.flatten(1) @ a.flatten(1)
        torch.testing.assert_close(product.T if "embedding" in names[i] else product, change)


def test_peft_dora_has_magnitudes():
    parameters = adapted(peft.LoraConfig(r=4, target_modules=["linear", "conv"], use_dora=True))
    found = roles(parameters)
    assert [n for n, role in found.items() if role == "lora_magnitude"] == [
        "linear.lora_magnitude_vector.default.weight",
        "conv.lora_magnitude_vector.default.weight",
    ]
    assert sorted(role for role in found.values() if role) == ["lora_a"] * 2 + ["lora_b"] * 2 + ["lora_magnitude"] * 2
    assert len(paired_names(parameters)) == 2


def test_peft_lora_bias_has_no_role():
    parameters = adapted(peft.LoraConfig(r=4, target_modules=["linear"], lora_bias=True))
    assert roles(parameters)["linear.lora_B.default.bias"] is None
    assert len(paired_names(parameters)) == 1


def test_peft_adapters_of_different_names_stay_apart():
    config = peft.LoraConfig(r=4, target_modules=["linear"])
    model = peft.get_peft_model(Tiny(), config)
    model.add_adapter("other", peft.LoraConfig(r=2, target_modules=["linear"]))
    parameters = {name: p for name, p in model.named_parameters() if "lora_" in name}
    assert paired_names(parameters) == {
        ("linear.lora_A.default.weight", "linear.lora_B.default.weight"),
        ("linear.lora_A.other.weight", "linear.lora_B.other.weight"),
    }


def test_peft_grouped_convolution_is_no_single_product():
    class Grouped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(8, 12, 3, groups=2)

    with pytest.warns(UserWarning, match="groups > 1"):
        model = peft.get_peft_model(Grouped(), peft.LoraConfig(r=4, target_modules=["conv"]))
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert sorted(role for role in roles(parameters).values() if role) == ["lora_a", "lora_b"]
    assert paired_names(parameters) == set()


@pytest.mark.parametrize("decompose", [False, True])
def test_peft_lokr(decompose):
    config = peft.LoKrConfig(r=1, target_modules=["linear", "conv"], decompose_both=decompose)
    parameters = adapted(config)
    found = roles(parameters)
    assert found and all(role and role.startswith("lokr_w") for role in found.values())
    for name, role in found.items():
        assert f".{role}." in name
    firsts = {first.split(".")[1] for first, _ in paired_names(parameters)}
    assert firsts == ({"lokr_w1_a", "lokr_w2_a"} if decompose else {"lokr_w2_a"})


def test_peft_lokr_of_two_whole_factors():
    parameters = adapted(peft.LoKrConfig(r=64, target_modules=["linear"]))
    assert paired_names(parameters) == {("linear.lokr_w1.default", "linear.lokr_w2.default")}


@pytest.mark.parametrize("tucker", [False, True])
def test_peft_loha(tucker):
    config = peft.LoHaConfig(r=2, target_modules=["linear", "conv"], use_effective_conv2d=tucker)
    parameters = adapted(config)
    factors = ["loha_w1_a", "loha_w1_b", "loha_w2_a", "loha_w2_b"]
    cores = ["loha_t1", "loha_t2"] if tucker else []
    assert sorted(role for role in roles(parameters).values() if role) == sorted(factors * 2 + cores)
    layers = ["linear"] if tucker else ["linear", "conv"]  # with a core in between they are not two factors
    assert paired_names(parameters) == {
        (f"{layer}.hada_{w}_a.default", f"{layer}.hada_{w}_b.default") for layer in layers for w in ("w1", "w2")
    }


NAMES = [
    # kohya sd-scripts
    ("lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight", (4, 320, 1, 1), "lora_a"),
    ("lora_unet_down_blocks_0_attentions_0_proj_in.lora_up.weight", (320, 4, 1, 1), "lora_b"),
    ("lora_te_text_model_encoder_layers_0_mlp_fc1.lora_down.weight", (4, 768), "lora_a"),
    ("lora_unet_mid_block.lora_down.0.weight", (4, 320), "lora_a"),
    # OneTrainer
    ("transformer.blocks.0.attn.to_q.lora_down.weight", (16, 64), "lora_a"),
    ("transformer.blocks.0.attn.to_q.lora_up.weight", (64, 16), "lora_b"),
    ("transformer.blocks.0.attn.to_q.dora_scale", (64, 1), "lora_magnitude"),
    # LyCORIS
    ("lycoris_unet_conv.lora_mid.weight", (4, 4, 3, 3), "lora_mid"),
    ("lycoris_blocks_0.dora_scale", (64, 1), "lora_magnitude"),
    ("lycoris_blocks_0.lokr_w1", (4, 4), "lokr_w1"),
    ("lycoris_blocks_0.lokr_w1_a", (4, 2), "lokr_w1_a"),
    ("lycoris_blocks_0.lokr_w1_b", (2, 4), "lokr_w1_b"),
    ("lycoris_blocks_0.lokr_w2", (16, 16), "lokr_w2"),
    ("lycoris_blocks_0.lokr_w2_a", (16, 2), "lokr_w2_a"),
    ("lycoris_blocks_0.lokr_w2_b", (2, 16), "lokr_w2_b"),
    ("lycoris_blocks_0.lokr_t2", (2, 2, 3, 3), "lokr_t2"),
    ("lycoris_blocks_0.hada_w1_a", (64, 4), "loha_w1_a"),
    ("lycoris_blocks_0.hada_w2_b", (4, 64), "loha_w2_b"),
    ("lycoris_blocks_0.hada_t1", (4, 4, 3, 3), "loha_t1"),
    # peft before DoRA magnitudes became modules, and state dicts without the name of the adapter
    ("base_model.model.q.lora_magnitude_vector.default", (64,), "lora_magnitude"),
    ("base_model.model.q.lora_A.weight", (8, 64), "lora_a"),
    # wrappers of other frameworks in between
    ("_fsdp_wrapped_module.q._orig_mod.lora_B.default.weight", (64, 8), "lora_b"),
    # no adapter, or not a factor of one
    ("lora_unet_mid_block.alpha", (), None),
    ("lycoris_blocks_0.scalar", (1,), None),
    ("model.layers.0.lora_projection.weight", (64, 64), None),
    ("explorer_lora_a_head.weight", (64, 64), None),
    ("q.lora_B.default.bias", (64,), None),
    ("weight", (64, 64), None),
    ("", (), None),
]


@pytest.mark.parametrize(("name", "shape", "role"), NAMES)
def test_names_of_other_libraries(name, shape, role):
    assert role_of(name, shape) == role
    assert role is None or role in ROLES


def test_pairs_of_other_libraries():
    names = [
        "lora_unet_a.lora_up.weight",
        "lora_unet_a.lora_down.weight",
        "lora_unet_split.lora_down.0.weight",
        "lora_unet_split.lora_down.1.weight",
        "lora_unet_split.lora_up.1.weight",
        "lora_unet_split.lora_up.0.weight",
        "lycoris_x.lokr_w1",
        "lycoris_x.lokr_w2",
        "lycoris_y.lokr_w1",
        "lycoris_y.lokr_w2_a",
        "lycoris_y.lokr_w2_b",
        "lycoris_z.lora_down.weight",
        "lycoris_z.lora_mid.weight",
        "lycoris_z.lora_up.weight",
        "alone.lora_down.weight",
        "mismatched.lora_A.weight",
        "mismatched.lora_B.weight",
        "model.weight",
    ]
    shapes: list[tuple[int, ...]] = [
        (8, 4),
        (4, 8),
        (4, 8),
        (4, 8),
        (8, 4),
        (8, 4),
        (2, 2),
        (4, 4),
        (2, 2),
        (4, 2),
        (2, 4),
    ]
    shapes += [(4, 8, 1, 1), (4, 4, 3, 3), (8, 4, 1, 1), (4, 8), (8, 16), (32, 4), (9, 9)]
    assert set(find_pairs(names, shapes)) == {(1, 0), (2, 5), (3, 4), (6, 7), (9, 10)}


def test_a_thousand_pairs_are_found_at_once():
    names = [f"layers.{i}.q.lora_A.default.weight" for i in range(1000)]
    names += [f"layers.{i}.q.lora_B.default.weight" for i in range(1000)]
    shapes = [(4, 16)] * 1000 + [(16, 4)] * 1000
    assert find_pairs(names, shapes) == [(i, 1000 + i) for i in range(1000)]


@pytest.mark.parametrize("function", [find_pairs, find_adapters, lora_stats, lokr_stats])
def test_as_many_shapes_as_names(function):
    with pytest.raises(ValueError, match=f"{function.__name__}: 2 names but 1 shapes"):
        function(["a", "b"], [(2, 2)])


def test_an_adapter_is_one_whatever_wraps_its_parts():
    names = [
        "_fsdp_wrapped_module.q.lora_A.default._fsdp_wrapped_module.weight",
        "_fsdp_wrapped_module.q._orig_mod.lora_B.default.weight",
        "_fsdp_wrapped_module.q.lora_magnitude_vector.default",  # older peft; a module with a weight in newer
        "_fsdp_wrapped_module.q.weight",
        "_fsdp_wrapped_module.v.lora_A.default.weight",
    ]
    shapes = [(2, 8), (8, 2), (8,), (8, 8), (2, 8)]
    assert find_adapters(names, shapes) == [[0, 1, 2], [4]]
    assert find_pairs(names, shapes) == [(0, 1)]


def test_adapters_of_different_names_and_layers_stay_apart():
    names = [f"{layer}.lora_{half}.{adapter}.weight" for layer in "qv" for adapter in ("x", "y") for half in "AB"]
    shapes = [(2, 8) if "_A" in name else (8, 2) for name in names]
    assert find_adapters(names, shapes) == [[0, 1], [2, 3], [4, 5], [6, 7]]


# -- statistics --------------------------------------------------------------------------------------------------------


def test_half_an_adapter_is_counted_but_no_pair():
    names = ["q.lora_A.weight", "v.lora_A.weight", "v.lora_B.weight", "k.lora_B.weight", "k.weight"]
    shapes = [(2, 8), (2, 8), (8, 2), (8, 2), (8, 8)]
    assert lora_stats(names, shapes) == {"lora_a_params": 2, "lora_b_params": 2, "lora_pairs": 1}
    assert lokr_stats(names, shapes) == {
        "lokr_w1_params": 0,
        "lokr_w2_params": 0,
        "lokr_pairs": 0,
        "lokr_groups": 0,
    }
    names, shapes = ["q.lokr_w1", "v.lokr_w2_a", "v.lokr_w2_b"], [(2, 2), (4, 1), (1, 4)]
    assert lokr_stats(names, shapes) == {
        "lokr_w1_params": 1,
        "lokr_w2_params": 2,
        "lokr_pairs": 0,
        "lokr_groups": 2,
    }


def test_diagnosis_finds_counterparts_in_other_groups():
    found = diagnose_lora_pairing(
        {
            "decay": (["q.lora_A.weight", "v.lora_A.weight", "q.weight"], [(2, 8), (2, 8), (8, 8)]),
            "lora_b": (["q.lora_B.weight", "k.lora_B.weight"], [(8, 2), (8, 2)]),
            "others": (["x.lokr_w1", "x.lokr_w2"], [(2, 2), (4, 4)]),
        }
    )
    assert found["total_groups"] == 3
    first, second, third = found["groups"].values()
    keys = {"lora_a_count", "lora_b_count", "pairs_count", "unpaired_a", "unpaired_b", "parameter_details"}
    assert first.keys() == second.keys() == third.keys() == keys
    assert (first["lora_a_count"], first["lora_b_count"], first["pairs_count"]) == (2, 0, 1)
    assert (first["unpaired_a"], first["unpaired_b"]) == (["v.lora_A.weight"], [])
    assert (second["lora_a_count"], second["lora_b_count"], second["pairs_count"]) == (0, 2, 1)
    assert (second["unpaired_a"], second["unpaired_b"]) == ([], ["k.lora_B.weight"])
    assert (third["lora_a_count"], third["pairs_count"]) == (0, 0)
    q = first["parameter_details"][0]
    assert q == {
        "name": "q.lora_A.weight",
        "shape": (2, 8),
        "role": "lora_a",
        "adapter": 0,
        "partner": "q.lora_B.weight",
    }
    assert first["parameter_details"][2] == {
        "name": "q.weight",
        "shape": (8, 8),
        "role": None,
        "adapter": None,
        "partner": None,
    }
    assert third["parameter_details"][1]["partner"] == "x.lokr_w1"


def test_diagnosis_with_a_core_is_a_pair_without_a_partner():
    names = ["q.lora_down.weight", "q.lora_mid.weight", "q.lora_up.weight"]
    group = diagnose_lora_pairing({"all": (names, [(2, 8, 1, 1), (2, 2, 3, 3), (8, 2, 1, 1)])})["groups"]["all"]
    assert (group["pairs_count"], group["unpaired_a"], group["unpaired_b"]) == (1, [], [])
    assert [detail["partner"] for detail in group["parameter_details"]] == [None] * 3


def test_statistics_of_roles_that_were_inferred():
    params = [torch.randn(2, 8), torch.zeros(12, 2), torch.randn(12)]
    found = infer_roles(params)
    names, shapes = ["0", "1", "2"], [tuple(p.shape) for p in params]
    assert lora_stats(names, shapes) == {"lora_a_params": 0, "lora_b_params": 0, "lora_pairs": 0}
    known = {"roles": found.roles, "adapters": found.adapters}
    assert lora_stats(names, shapes, **known) == {"lora_a_params": 1, "lora_b_params": 1, "lora_pairs": 1}
    group = diagnose_lora_pairing({"all": (names, shapes)}, **known, pairs=found.pairs)["groups"]["all"]
    assert (group["pairs_count"], group["unpaired_a"]) == (1, [])
    assert [d["partner"] for d in group["parameter_details"]] == ["1", "0", None]
    with pytest.raises(ValueError, match="3 names but 1 roles"):
        lora_stats(names, shapes, roles=["lora_a"])


def test_diagnosis_of_unequal_lists_names_the_group():
    with pytest.raises(ValueError, match="group 'b' has 2 names but 1 shapes"):
        diagnose_lora_pairing({"a": (["x"], [(2,)]), "b": (["x", "y"], [(2,)])})
