"""configure_optimizers with every optimizer there is: rates and their bounds, decay, presets, configs, profiles."""

from __future__ import annotations

import inspect

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.utils.data import DataLoader

import hina_optim
from hina_lightning import configure_optimizers
from hina_optim import ImprovedOptimizerConfig, OptimizerConfig, create_optimizer, get_optimizer_info, list_optimizers
from hina_optim.presets import PRESETS

NAMES = list_optimizers()
RATES = ("lr", "start_lr", "min_lr", "max_lr", "lr_bump")


class Net(LightningModule):
    def __init__(self, name, **options):
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.GELU(), nn.Linear(6, 2))
        self.name, self.options = name, options

    def training_step(self, batch, batch_idx):
        return nn.functional.mse_loss(self.body(batch[0]), batch[1])

    def configure_optimizers(self):
        return configure_optimizers(self, self.name, compile=False, **self.options)


def fit(model):
    generator = torch.Generator().manual_seed(1)
    data = [(torch.randn(4, generator=generator), torch.randn(2, generator=generator)) for _ in range(12)]
    quiet = dict(enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, logger=False)
    trainer = Trainer(accelerator="cpu", devices=1, max_epochs=2, **quiet)
    trainer.fit(model, DataLoader(data, batch_size=4))
    return trainer.optimizers[0]


def plain(optimizer):
    return [{name: value for name, value in group.items() if name != "params"} for group in optimizer.param_groups]


def groups(name, **options):
    return plain(configure_optimizers(Net(name), name, schedule=None, **options)["optimizer"])


@pytest.mark.parametrize("name", NAMES)
def test_it_trains_with_groups_and_a_schedule(name):
    model = Net(name, lr=1e-4, weight_decay=0.2, warmup=2, lr_multipliers={r"body\.3": 0.5})
    before = {key: value.clone() for key, value in model.state_dict().items()}
    optimizer = fit(model)
    assert type(optimizer) is getattr(hina_optim, name)
    assert [(g["name"], g["weight_decay"]) for g in optimizer.param_groups] == [
        ("decay", 0.2), ("no_decay", 0.0), (r"decay:x0.5:body\.3", 0.2), (r"no_decay:x0.5:body\.3", 0.0),
    ]  # fmt: skip
    names = ("0.weight", "0.bias", "1.weight", "1.bias", "3.weight", "3.bias")
    assert optimizer.param_names() == [f"body.{name}" for name in names]
    assert all(float(state["step"]) == 6 for state in optimizer.state.values())
    assert all(not torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("factor", [0.001, 20.0])
def test_a_multiplier_scales_the_rate_and_the_bounds_of_its_mask(name, factor):
    """Beyond the bounds of the other groups, where unscaled ones would be an error."""
    usual, _, scaled, _ = groups(name, lr=1e-4, lr_multipliers={r"body\.3": factor})
    alone = plain(create_optimizer(name, nn.Linear(2, 2), lr=1e-4))[0]
    for rate in RATES:
        assert (rate in usual) == (rate in alone)
        if rate in alone:
            assert usual[rate] == alone[rate]
            assert scaled[rate] == pytest.approx(factor * alone[rate])
    assert {k: v for k, v in scaled.items() if k not in (*RATES, "name")} == {
        k: v for k, v in usual.items() if k not in (*RATES, "name")
    }


@pytest.mark.parametrize("name", NAMES)
def test_every_way_to_name_it_builds_the_same(name):
    cls = getattr(hina_optim, name)
    expected = groups(name, lr=1e-4, weight_decay=0.3, use_agr=False)
    spelling = (get_optimizer_info(name).aliases or (name,))[0]
    ways = [
        dict(optimizer=cls, lr=1e-4, use_agr=False),
        dict(optimizer=spelling, lr=1e-4, use_agr=False),
        dict(optimizer=f"hina_optim.{name}", lr=1e-4, use_agr=False),
        dict(optimizer=lambda params: cls(params, lr=1e-4, weight_decay=0.3, use_agr=False)),
        dict(optimizer={"class_path": f"hina_optim.{name}", "init_args": {"lr": 1e-4, "use_agr": False}}),
    ]
    for way in ways:
        found = configure_optimizers(Net(name), schedule=None, weight_decay=0.3, **way)["optimizer"]
        assert plain(found) == expected


@pytest.mark.parametrize("preset", PRESETS, ids=lambda preset: f"{preset.optimizer}-{preset.name}")
def test_every_preset_reaches_every_group(preset):
    free = preset.arguments.keys() - {*RATES, "weight_decay"}
    for group in groups(preset.optimizer, lr=1e-4, preset=preset.name, lr_multipliers={r"body\.3": 0.5}):
        there = {name: group[name] for name in free if name in group}
        assert there == {name: preset.arguments[name] for name in there} and there


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("Automagic_CameAMP_Improved", ImprovedOptimizerConfig(lr=2e-5, edge_penalty=0.15, weight_decay=0.02)),
        ("RefactoredAutomagicCameAMP", OptimizerConfig(lr=2e-5, d_coef=1.5, weight_decay=0.02)),
    ],
)
def test_a_config_gives_what_is_not_given_beside_it(name, config):
    first, second, third, _ = groups(name, config=config, lr_multipliers={r"body\.3": 0.5})
    assert [g["lr"] for g in (first, second, third)] == pytest.approx([2e-5, 2e-5, 1e-5])
    assert [g["weight_decay"] for g in (first, second)] == [0.02, 0.0]
    assert first["d_coef"] == config.d_coef
    over = groups(name, config=config, lr=3e-5, weight_decay=0.5, d_coef=1.25)[0]
    assert (over["lr"], over["weight_decay"], over["d_coef"]) == (3e-5, 0.5, 1.25)
    # a mapping as LightningCLI makes it, with all defaults
    cls = getattr(hina_optim, name)
    defaults = {n: p.default for n, p in inspect.signature(cls).parameters.items() if n != "params"}
    spelled_out = {"class_path": f"hina_optim.{name}", "init_args": {**defaults, "config": config, "d_coef": 1.75}}
    mapped = plain(configure_optimizers(Net(name), spelled_out, schedule=None)["optimizer"])[0]
    assert (mapped["lr"], mapped["weight_decay"], mapped["d_coef"]) == (2e-5, 0.02, 1.75)
    assert mapped == {**first, "d_coef": 1.75}


@pytest.mark.parametrize("profile", ["memory_optimized", "quality_optimized", "balanced"])
def test_a_profile_never_touches_the_rate(profile):
    name = "Automagic_CameAMP_Improved_8Bit"
    expected = plain(create_optimizer(name, nn.Linear(2, 2), lr=1e-4, profile=profile))[0]
    for group in groups(name, lr=1e-4, profile=profile):
        assert {k: group[k] for k in expected if k not in ("name", "weight_decay")} == {
            k: v for k, v in expected.items() if k not in ("name", "weight_decay")
        }


def test_lora_plus_is_done_once():
    base = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 2))
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["0", "1"]))
    with pytest.raises(ValueError, match=r"lora_ratio=4 was given, and HinaAdamWOptimizer .* alora_ratio=16.0 itself"):
        configure_optimizers(model, "HinaAdamWOptimizer", lr=1e-4, lora_ratio=4, schedule=None)
    for options in (dict(alora_ratio=1.0), dict(use_alora=False)):
        built = configure_optimizers(model, "HinaAdamWOptimizer", lr=1e-4, lora_ratio=4, schedule=None, **options)
        assert [g["lr"] for g in built["optimizer"].param_groups] == pytest.approx([1e-4, 4e-4])


@pytest.mark.parametrize("name", NAMES)
def test_a_rate_that_nobody_gives_is_an_error(name):
    with pytest.raises(ValueError, match="give lr"):
        groups(name)


def test_roles_get_groups_and_rates_of_their_own() -> None:
    """A role that is asked for is there, with its factor; one that matches nothing is an error."""
    module = nn.Module()
    module.lokr_w1 = nn.Parameter(torch.randn(2, 2))
    module.lokr_w2_a, module.lokr_w2_b = nn.Parameter(torch.randn(4, 2)), nn.Parameter(torch.zeros(2, 4))
    built = configure_optimizers(module, "HinaAdamW", lr=1e-3, roles={"lokr_w2": 4.0}, schedule=None, alora_ratio=1.0)
    groups = {g["name"]: (g["lr"], len(g["params"])) for g in built["optimizer"].param_groups}
    assert sorted(groups.values()) == [(1e-3, 1), (4e-3, 2)], groups
    with pytest.raises(ValueError, match="loha"):
        configure_optimizers(module, "HinaAdamW", lr=1e-3, roles={"loha": 2.0}, schedule=None)
