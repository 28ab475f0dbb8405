"""Roles, pairs, adapters and what is inferred without names, on modules that the adapter libraries build."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from hina_optim.adapters import find_adapters, find_pairs, infer_roles, lokr_stats, lora_stats, role_of

peft = pytest.importorskip("peft")
lycoris = pytest.importorskip("lycoris")


class Tiny(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(64, 48)
        self.conv = nn.Conv2d(16, 32, 3)
        self.second = nn.Linear(48, 36)
        self.norm = nn.LayerNorm(36)


LAYERS = ("linear", "conv", "second")


def from_peft(config) -> nn.Module:
    torch.manual_seed(0)
    return peft.get_peft_model(Tiny(), config)


def from_lycoris(algo: str, rank: int = 2, **options) -> nn.Module:
    torch.manual_seed(0)
    lycoris.LycorisNetwork.apply_preset({"target_module": ["Linear", "Conv2d"]})
    network = lycoris.create_lycoris(
        Tiny(), 1.0, linear_dim=rank, linear_alpha=1, conv_dim=rank, conv_alpha=1, algo=algo, **options
    )
    network.apply_to()
    return network


class Kohya(nn.Module):
    """A layer's LoRA with the names and shapes of sd-scripts' module."""

    def __init__(self, layer: nn.Module, rank: int) -> None:
        super().__init__()
        if isinstance(layer, nn.Conv2d):
            self.lora_down = nn.Conv2d(layer.in_channels, rank, layer.kernel_size, bias=False)
            self.lora_up = nn.Conv2d(rank, layer.out_channels, 1, bias=False)
        else:
            self.lora_down = nn.Linear(layer.in_features, rank, bias=False)
            self.lora_up = nn.Linear(rank, layer.out_features, bias=False)
        nn.init.zeros_(self.lora_up.weight)
        self.register_buffer("alpha", torch.tensor(1.0))


class KohyaSplit(nn.Module):
    """One LoRA a part of a fused projection, as sd-scripts has it for FLUX."""

    def __init__(self, layer: nn.Linear, rank: int, parts: int) -> None:
        super().__init__()
        downs, ups = [], []
        for _ in range(parts):
            downs.append(nn.Linear(layer.in_features, rank, bias=False))
            ups.append(nn.Linear(rank, layer.out_features // parts, bias=False))
        self.lora_down, self.lora_up = nn.ModuleList(downs), nn.ModuleList(ups)


class KohyaDyLoRA(nn.Module):
    """Ranks one by one, in lists of parameters."""

    def __init__(self, layer: nn.Linear, rank: int) -> None:
        super().__init__()
        self.lora_A = nn.ParameterList([torch.randn(1, layer.in_features) for _ in range(rank)])
        self.lora_B = nn.ParameterList([torch.zeros(layer.out_features, 1) for _ in range(rank)])


class OneTrainerDoRA(nn.Module):
    """OneTrainer keeps the magnitude on the module itself, so that it comes first."""

    def __init__(self, layer: nn.Linear, rank: int) -> None:
        super().__init__()
        self.dora_scale = nn.Parameter(layer.weight.detach().norm(dim=1, keepdim=True))
        self.lora_down = nn.Linear(layer.in_features, rank, bias=False)
        self.lora_up = nn.Linear(rank, layer.out_features, bias=False)
        nn.init.zeros_(self.lora_up.weight)
        self.register_buffer("alpha", torch.tensor(1.0))


class OneTrainerLoHa(nn.Module):
    """Convolutions keep the layout of convolution weights: w1_b ``(r, in, k, k)``, w1_a ``(out, r, 1, 1)``."""

    def __init__(self, layer: nn.Conv2d, rank: int) -> None:
        super().__init__()
        out, kernel = layer.out_channels, layer.kernel_size
        self.hada_w1_a = nn.Parameter(torch.randn(out, rank, 1, 1))
        self.hada_w1_b = nn.Parameter(torch.randn(rank, layer.in_channels, *kernel))
        self.hada_w2_a = nn.Parameter(torch.zeros(out, rank, 1, 1))
        self.hada_w2_b = nn.Parameter(torch.randn(rank, layer.in_channels, *kernel))


def network(prefix: str, build, **layers: nn.Module) -> nn.Module:
    """Adapters beside the model, each under the flat name that kohya's networks give it."""
    return nn.ModuleDict({f"{prefix}_{name}": build(layer) for name, layer in layers.items()})


def trainable(model: nn.Module) -> tuple[list[str], list[tuple[int, ...]], list[nn.Parameter]]:
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    return [n for n, _ in named], [tuple(p.shape) for _, p in named], [p for _, p in named]


def members(model: nn.Module) -> list[set[str | None]]:
    """The roles in each adapter."""
    names, shapes, _ = trainable(model)
    return [{role_of(names[i], shapes[i]) for i in adapter} for adapter in find_adapters(names, shapes)]


def layer_of(name: str) -> str:
    return next(layer for layer in LAYERS if f"_{layer}." in name or f".{layer}." in name)


LOKR_HALVES = {"lokr_w1_a", "lokr_w1_b", "lokr_w2_a", "lokr_w2_b"}
LOHA = {"loha_w1_a", "loha_w1_b", "loha_w2_a", "loha_w2_b"}
LORA = {"lora_a", "lora_b"}

CASES = {
    "peft lora": (lambda: from_peft(peft.LoraConfig(r=2, target_modules=[*LAYERS])), [LORA] * 3),
    "peft rslora": (lambda: from_peft(peft.LoraConfig(r=2, target_modules=[*LAYERS], use_rslora=True)), [LORA] * 3),
    "peft dora": (
        lambda: from_peft(peft.LoraConfig(r=2, target_modules=[*LAYERS], use_dora=True)),
        [LORA | {"lora_magnitude"}] * 3,
    ),
    "peft lokr": (
        lambda: from_peft(peft.LoKrConfig(r=2, target_modules=[*LAYERS])),
        [{"lokr_w1", "lokr_w2_a", "lokr_w2_b"}] * 3,
    ),
    "peft lokr, both in halves": (
        lambda: from_peft(peft.LoKrConfig(r=1, target_modules=[*LAYERS], decompose_both=True)),
        [LOKR_HALVES] * 3,
    ),
    "peft lokr, Tucker": (
        lambda: from_peft(peft.LoKrConfig(r=1, target_modules=["conv"], use_effective_conv2d=True)),
        [{"lokr_w1", "lokr_w2_a", "lokr_w2_b", "lokr_t2"}],
    ),
    "peft loha": (lambda: from_peft(peft.LoHaConfig(r=2, target_modules=[*LAYERS])), [LOHA] * 3),
    "peft loha, Tucker": (
        lambda: from_peft(peft.LoHaConfig(r=2, target_modules=["conv"], use_effective_conv2d=True)),
        [LOHA | {"loha_t1", "loha_t2"}],
    ),
    "lycoris lora": (lambda: from_lycoris("lora"), [LORA] * 3),
    "lycoris dora": (lambda: from_lycoris("lora", dora_wd=True), [LORA | {"lora_magnitude"}] * 3),
    "lycoris dora over inputs": (
        lambda: from_lycoris("lora", dora_wd=True, wd_on_output=False),
        [LORA | {"lora_magnitude"}] * 3,
    ),
    "lycoris lora, Tucker": (lambda: from_lycoris("locon", use_tucker=True), [LORA, LORA | {"lora_mid"}, LORA]),
    "lycoris loha": (lambda: from_lycoris("loha"), [LOHA] * 3),
    "lycoris loha, Tucker and dora": (
        lambda: from_lycoris("loha", use_tucker=True, dora_wd=True),
        [
            LOHA | {"lora_magnitude"},
            LOHA | {"lora_magnitude", "loha_t1", "loha_t2"},
            LOHA | {"lora_magnitude"},
        ],
    ),
    "lycoris lokr": (lambda: from_lycoris("lokr", factor=4), [{"lokr_w1", "lokr_w2_a", "lokr_w2_b"}] * 3),
    "lycoris lokr, both in halves": (
        lambda: from_lycoris("lokr", rank=1, factor=4, decompose_both=True),
        [LOKR_HALVES] * 3,
    ),
    "lycoris lokr, Tucker": (
        lambda: from_lycoris("lokr", factor=4, use_tucker=True),
        [
            {"lokr_w1", "lokr_w2_a", "lokr_w2_b"},
            {"lokr_w1", "lokr_w2_a", "lokr_w2_b", "lokr_t2"},
            {"lokr_w1", "lokr_w2_a", "lokr_w2_b"},
        ],
    ),
    "lycoris lokr, whole, with a scalar": (
        lambda: from_lycoris("lokr", factor=4, full_matrix=True, use_scalar=True),
        [{"lokr_w1", "lokr_w2"}] * 3,
    ),
    "lycoris lokr and dora": (
        lambda: from_lycoris("lokr", factor=4, dora_wd=True),
        [{"lokr_w1", "lokr_w2_a", "lokr_w2_b", "lora_magnitude"}] * 3,
    ),
    "kohya": (
        lambda: network("lora_unet", lambda x: Kohya(x, 2), conv=nn.Conv2d(16, 32, 3), linear=nn.Linear(64, 48)),
        [LORA] * 2,
    ),
    "kohya, split": (
        lambda: network("lora_unet", lambda x: KohyaSplit(x, 2, 3), linear=nn.Linear(64, 48)),
        [LORA] * 3,
    ),
    "kohya dylora": (lambda: network("lora_te", lambda x: KohyaDyLoRA(x, 3), linear=nn.Linear(64, 48)), [LORA] * 3),
    "onetrainer dora": (
        lambda: network("lora_unet", lambda x: OneTrainerDoRA(x, 2), linear=nn.Linear(64, 48)),
        [LORA | {"lora_magnitude"}],
    ),
    "onetrainer loha": (
        lambda: network("lora_unet", lambda x: OneTrainerLoHa(x, 2), conv=nn.Conv2d(16, 32, 3)),
        [LOHA],
    ),
}  # fmt: skip

REAL = [name for name in CASES if name.startswith(("peft", "lycoris"))]


@pytest.mark.parametrize("case", CASES)
def test_every_adapter_of_a_library_is_one(case):
    build, expected = CASES[case]
    model = build()
    assert members(model) == expected
    names, shapes, _ = trainable(model)
    adapters = find_adapters(names, shapes)
    assert sorted(i for adapter in adapters for i in adapter) == [
        i for i, (name, shape) in enumerate(zip(names, shapes, strict=True)) if role_of(name, shape)
    ]
    left = [name for name, shape in zip(names, shapes, strict=True) if role_of(name, shape) is None]
    assert all(name.endswith(".scalar") for name in left)


@pytest.mark.parametrize("case", REAL)
def test_an_adapter_is_that_of_one_layer(case):
    model = CASES[case][0]()
    names, shapes, _ = trainable(model)
    for adapter in find_adapters(names, shapes):
        assert len({layer_of(names[i]) for i in adapter}) == 1


@pytest.mark.parametrize("case", CASES)
def test_pairs_are_within_an_adapter_and_multiply(case):
    names, shapes, params = trainable(CASES[case][0]())
    adapter_of = {i: n for n, adapter in enumerate(find_adapters(names, shapes)) for i in adapter}
    pairs = find_pairs(names, shapes)
    assert len({i for pair in pairs for i in pair}) == 2 * len(pairs)
    for i, j in pairs:
        assert adapter_of[i] == adapter_of[j]
        role = role_of(names[i], shapes[i])
        if role == "lora_a":
            params[j].flatten(1) @ params[i].flatten(1)
        elif role != "lokr_w1":
            params[i].flatten(1) @ params[j].flatten(1)


@pytest.mark.parametrize(
    ("case", "expected"),
    [
        ("lycoris lora", 3),
        ("lycoris lora, Tucker", 2),
        ("lycoris loha", 6),
        ("lycoris loha, Tucker and dora", 4),
        ("lycoris lokr", 3),
        ("lycoris lokr, both in halves", 6),
        ("lycoris lokr, Tucker", 2),
        ("lycoris lokr, whole, with a scalar", 3),
        ("peft lokr, Tucker", 0),
        ("peft loha, Tucker", 0),
        ("kohya, split", 3),
        ("kohya dylora", 3),
    ],
)
def test_factors_around_a_core_are_no_pair(case, expected):
    names, shapes, _ = trainable(CASES[case][0]())
    assert len(find_pairs(names, shapes)) == expected


@pytest.mark.parametrize(("algo", "options"), [("lora", {}), ("loha", {}), ("lokr", {"factor": 4})])
def test_pairs_of_lycoris_give_the_change_of_the_layer(algo, options):
    """What the techniques take for granted of the two factors of a product, up to the library's scale."""
    model = from_lycoris(algo, **options)
    names, shapes, params = trainable(model)
    for p in params:
        nn.init.normal_(p)
    pairs = {names[i]: (params[i], params[j]) for i, j in find_pairs(names, shapes)}
    for layer in LAYERS:
        module = getattr(model, f"lycoris_{layer}")
        change = module.get_diff_weight()[0].flatten(1)
        prefix = f"lycoris_{layer}."
        if algo == "lora":
            a, b = pairs[f"{prefix}lora_down.weight"]
            expected = b.flatten(1) @ a.flatten(1)
        elif algo == "loha":
            (a1, b1), (a2, b2) = pairs[f"{prefix}hada_w1_a"], pairs[f"{prefix}hada_w2_a"]
            expected = (a1 @ b1) * (a2 @ b2)
        else:
            a2, b2 = pairs[f"{prefix}lokr_w2_a"]
            w1, w2 = module.lokr_w1, (a2 @ b2)
            kernel = math.prod(module.shape[2:])
            w2 = w2.reshape(w2.shape[0], -1, kernel)
            expected = torch.kron(w1[..., None], w2).flatten(1)
        torch.testing.assert_close(change / change.norm(), expected / expected.norm())


STATISTICS = {
    "peft dora": ((3, 3, 3), (0, 0, 0, 0)),
    "lycoris lora, Tucker": ((3, 3, 3), (0, 0, 0, 0)),
    "lycoris loha": ((0, 0, 0), (0, 0, 0, 0)),
    "lycoris lokr": ((0, 0, 0), (3, 6, 3, 3)),
    "lycoris lokr, Tucker": ((0, 0, 0), (3, 7, 3, 3)),
    "peft lokr, both in halves": ((0, 0, 0), (6, 6, 3, 3)),
    "lycoris lokr, whole, with a scalar": ((0, 0, 0), (3, 3, 3, 3)),
}


@pytest.mark.parametrize("case", STATISTICS)
def test_statistics(case):
    names, shapes, _ = trainable(CASES[case][0]())
    lora, lokr = STATISTICS[case]
    assert lora_stats(names, shapes) == dict(zip(("lora_a_params", "lora_b_params", "lora_pairs"), lora, strict=True))
    assert lokr_stats(names, shapes) == dict(
        zip(("lokr_w1_params", "lokr_w2_params", "lokr_pairs", "lokr_groups"), lokr, strict=True)
    )


# -- without names -----------------------------------------------------------------------------------------------------

PROVEN = {
    "peft lora",
    "peft rslora",
    "peft dora",
    "lycoris lora",
    "lycoris dora",
    "lycoris dora over inputs",
    "lycoris loha",
    "kohya",
    "onetrainer dora",
    "onetrainer loha",
}


@pytest.mark.parametrize("case", CASES)
def test_what_is_inferred_without_names_is_true_and_the_rest_is_reported(case):
    names, shapes, params = trainable(CASES[case][0]())
    found = infer_roles(params)
    truth = [role_of(name, shape) for name, shape in zip(names, shapes, strict=True)]
    known = [i for i, role in enumerate(found.roles) if role is not None]
    assert [found.roles[i] for i in known] == [truth[i] for i in known]
    assert set(found.pairs) <= set(find_pairs(names, shapes))
    assert sorted(i for places in found.unknown.values() for i in places) == sorted(set(range(len(params))) - {*known})
    if case in PROVEN:
        assert {truth[i] for i in range(len(params)) if i not in known} <= {"lora_magnitude"}
        assert sorted(found.pairs) == find_pairs(names, shapes)
        assert [sorted(a) for a in found.adapters] == [
            [i for i in adapter if truth[i] != "lora_magnitude"] for adapter in find_adapters(names, shapes)
        ]
    else:
        assert known == [] and found.pairs == [] and found.adapters == []
    if len(known) < len(params):
        assert "model.named_parameters()" in found.report


@pytest.mark.parametrize("case", sorted(PROVEN))
def test_nothing_is_inferred_of_a_trained_adapter(case):
    _, _, params = trainable(CASES[case][0]())
    with torch.no_grad():
        for p in params:
            p.add_(0.01)
    found = infer_roles(params)
    assert set(found.roles) == {None}
    assert found.unknown["product"]


def test_frozen_weights_in_between_do_not_matter():
    model = from_peft(peft.LoraConfig(r=2, target_modules=[*LAYERS]))
    names = [n for n, _ in model.named_parameters()]
    shapes = [tuple(p.shape) for p in model.parameters()]
    found = infer_roles(list(model.parameters()))
    assert sorted(found.pairs) == find_pairs(names, shapes)
    assert len(found.pairs) == 3


def test_the_two_groups_of_loraplus_are_not_guessed_from():
    """sd-scripts hands over A's and B's in two groups, without names."""
    _, _, params = trainable(CASES["kohya"][0]())
    for part in (params[0::2], params[1::2]):
        found = infer_roles(part)
        assert set(found.roles) == {None}
        assert "lora_a" not in found.report and "named_parameters" in found.report
