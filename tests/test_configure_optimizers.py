"""Groups, optimizer and schedule from hina_lightning.configure_optimizers, in real fits."""

from __future__ import annotations

import copy
import logging
import math

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from peft import LoKrConfig, LoraConfig, get_peft_model
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

from hina_lightning import Schedule, configure_optimizers, group_parameters
from hina_optim import HinaAdaptive, create_optimizer

ADAMW = "torch.optim.AdamW"


class Net(LightningModule):
    """A regression whose ``configure_optimizers`` is ours."""

    def __init__(self, **options):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(7, 4)
        self.body = nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.GELU(), nn.Linear(6, 1))
        self.options = {"optimizer": ADAMW, "lr": 1e-3, **options}

    def training_step(self, batch, batch_idx):
        index, target = batch
        return nn.functional.mse_loss(self.body(self.embed(index)).squeeze(-1), target)

    def configure_optimizers(self):
        return configure_optimizers(self, **self.options)


class RatesOfSteps(Callback):
    """The learning rate of every group at every optimizer step."""

    def __init__(self):
        self.rates = []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.rates.append([group["lr"] for group in optimizer.param_groups])


def batches(count):
    generator = torch.Generator().manual_seed(1)
    data = [
        (torch.randint(7, (1,), generator=generator)[0], torch.randn((), generator=generator)) for _ in range(4 * count)
    ]
    return DataLoader(data, batch_size=4)


def trainer(**options):
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return Trainer(**{"accelerator": "cpu", "devices": 1, "max_epochs": 1, **quiet, **options})


def by_name(groups):
    return {group.name: [name for name, _ in group.params] for group in groups}


def names_in(optimizer):
    return [group["name"] for group in optimizer.param_groups]


# -- groups ------------------------------------------------------------------------------------------------------------


def test_biases_and_norms_do_not_decay_and_embeddings_do():
    assert by_name(group_parameters(Net())) == {
        "decay": ["embed.weight", "body.0.weight", "body.3.weight"],
        "no_decay": ["body.0.bias", "body.1.weight", "body.1.bias", "body.3.bias"],
    }


def test_parameters_of_normalization_layers_do_not_decay_whatever_their_shape():
    class ScaleNorm(nn.Module):
        def __init__(self):
            super().__init__()
            self.gain = nn.Parameter(torch.ones(2, 3))
            self.inner = nn.Linear(2, 2, bias=False)

    model = nn.ModuleDict({"two": nn.LayerNorm((2, 3)), "own": ScaleNorm(), "batch": nn.BatchNorm1d(3)})
    groups = by_name(group_parameters(model))
    assert groups["decay"] == ["own.inner.weight"]
    assert {"two.weight", "own.gain", "batch.weight"} <= set(groups["no_decay"])


def test_frozen_parameters_are_left_out_and_no_group_is_empty():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[0].requires_grad_(False)
    model[1].bias.requires_grad_(False)
    assert by_name(group_parameters(model)) == {"decay": ["1.weight"]}


def test_all_frozen_or_empty_is_an_error_that_says_so():
    with pytest.raises(ValueError, match=r"Linear has no trainable parameter: all 2 are frozen"):
        configure_optimizers(nn.Linear(2, 2).requires_grad_(False), ADAMW, lr=1e-3, total_steps=5)
    with pytest.raises(ValueError, match="it has no parameters at all"):
        configure_optimizers(nn.ReLU(), ADAMW, lr=1e-3, total_steps=5)


def test_tied_parameters_are_there_once_and_answer_to_all_names():
    model = nn.ModuleDict({"embed": nn.Embedding(5, 3), "head": nn.Linear(3, 5, bias=False)})
    model["head"].weight = model["embed"].weight
    assert by_name(group_parameters(model)) == {"decay": ["embed.weight"]}
    assert by_name(group_parameters(model, lr_multipliers={"^head": 0.5})) == {"decay:x0.5:^head": ["embed.weight"]}


def test_names_are_the_same_for_a_compiled_module():
    model = Net()
    plain = by_name(group_parameters(model))
    model.body = torch.compile(model.body)
    assert by_name(group_parameters(model)) == plain


def test_the_first_matching_pattern_decides_and_order_is_stable():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2))
    groups = group_parameters(model, lr_multipliers={r"^0\.": 0.1, r"^[01]\.w": 2})
    assert [(g.name, g.factor, [n for n, _ in g.params]) for g in groups] == [
        ("decay", 1.0, ["2.weight"]),
        ("no_decay", 1.0, ["1.bias", "2.bias"]),
        (r"decay:x0.1:^0\.", 0.1, ["0.weight"]),
        (r"no_decay:x0.1:^0\.", 0.1, ["0.bias"]),
        (r"decay:x2:^[01]\.w", 2.0, ["1.weight"]),
    ]


@pytest.mark.parametrize(
    ("patterns", "message"),
    [
        (
            {"decoder": 0.1},
            r"the pattern 'decoder' is found in no parameter name of Net; a name looks like 'embed.weight'",
        ),
        (
            {"body": 0.1, r"body\.0": 2.0},
            r"'body\\\\.0' is found only in parameters that are frozen or that an earlier",
        ),
        ({"body(": 0.1}, "is not a regular expression"),
        ({"body": 0.0}, r"lr_multipliers\['body'\]=0.0 is not valid.*> 0 \(to freeze"),
        ({"body": math.nan}, "not valid"),
    ],
)
def test_a_pattern_that_decides_nothing_or_is_senseless_is_an_error(patterns, message):
    with pytest.raises(ValueError, match=message):
        configure_optimizers(Net(), ADAMW, lr=1e-3, total_steps=5, lr_multipliers=patterns)


def test_a_pattern_for_frozen_parameters_is_an_error():
    model = Net()
    model.embed.requires_grad_(False)
    with pytest.raises(ValueError, match="only in parameters that are frozen"):
        group_parameters(model, lr_multipliers={"embed": 0.1})


# -- LoRA+ -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "config", [LoraConfig(r=2, target_modules=["0", "3"]), LoKrConfig(r=2, target_modules=["0", "3"])]
)
def test_lora_ratio_raises_the_second_factor_and_its_bounds(config):
    model = Net().body
    adapted = get_peft_model(nn.Sequential(*model), config)
    optimizer = configure_optimizers(adapted, lr=1e-4, lora_ratio=16, schedule=None)["optimizer"]
    a, b = optimizer.param_groups
    assert (a["name"], b["name"]) == ("decay", "lora_b")
    assert (a["lr"], b["lr"]) == pytest.approx((1e-4, 16e-4))
    for bound in ("min_lr", "max_lr", "lr_bump"):
        assert b[bound] == pytest.approx(16 * a[bound])
    second = {"lora_B", "lokr_w2", "lokr_w2_a", "lokr_w2_b"}
    raised = {id(p) for p in b["params"]}
    for name, parameter in adapted.named_parameters():
        if parameter.requires_grad:
            assert (id(parameter) in raised) == bool(second & set(name.split("."))), name


def test_lora_ratio_and_multiplier_multiply():
    adapted = get_peft_model(
        nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), LoraConfig(r=2, target_modules=["0", "1"])
    )
    optimizer = configure_optimizers(
        adapted, ADAMW, lr=1e-3, schedule=None, lora_ratio=4, lr_multipliers={r"model\.1\.": 0.5}
    )["optimizer"]
    rates = {group["name"]: group["lr"] for group in optimizer.param_groups}
    assert rates == {
        "decay": 1e-3,
        "lora_b": 4e-3,
        r"decay:x0.5:model\.1\.": 0.5e-3,
        r"lora_b:x0.5:model\.1\.": 2e-3,
    }


def test_lora_ratio_without_an_adapter_is_an_error():
    with pytest.raises(
        ValueError, match=r"lora_ratio=16 was given, but no trainable parameter of Net is the B of an adapter"
    ):
        configure_optimizers(Net(), ADAMW, lr=1e-3, total_steps=5, lora_ratio=16)


# -- optimizer ---------------------------------------------------------------------------------------------------------


def test_every_way_to_name_an_optimizer_builds_the_same():
    ways = {
        "class path": dict(optimizer=ADAMW, lr=2e-3, weight_decay=0.1, betas=(0.8, 0.9)),
        "class": dict(optimizer=torch.optim.AdamW, lr=2e-3, weight_decay=0.1, betas=(0.8, 0.9)),
        "factory": dict(optimizer=lambda g: torch.optim.AdamW(g, lr=2e-3, weight_decay=0.1, betas=(0.8, 0.9))),
        "mapping": dict(
            optimizer={"class_path": ADAMW, "init_args": {"lr": 2e-3, "weight_decay": 0.1, "betas": (0.8, 0.9)}}
        ),
    }
    seen = []
    for way in ways.values():
        optimizer = configure_optimizers(Net(), schedule=None, lr_multipliers={"embed": 0.1}, **way)["optimizer"]
        seen.append([{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups])
    assert all(one == seen[0] for one in seen[1:])
    assert [(g["name"], g["lr"], g["weight_decay"], g["betas"]) for g in seen[0]] == [
        ("decay", 2e-3, 0.1, (0.8, 0.9)),
        ("no_decay", 2e-3, 0.0, (0.8, 0.9)),
        ("decay:x0.1:embed", pytest.approx(2e-4), 0.1, (0.8, 0.9)),
    ]


def test_lr_given_here_wins_over_the_one_of_a_factory_or_mapping():
    for optimizer in (lambda g: torch.optim.AdamW(g, lr=1.0), {"class_path": ADAMW, "init_args": {"lr": 1.0}}):
        built = configure_optimizers(Net(), optimizer, lr=2e-3, weight_decay=0.3, schedule=None)["optimizer"]
        assert [g["lr"] for g in built.param_groups] == [2e-3, 2e-3]
        assert [g["weight_decay"] for g in built.param_groups] == [0.3, 0.0]


def test_registered_name_with_preset_and_arguments():
    optimizer = configure_optimizers(
        Net(), preset="language", lr=1e-4, schedule=None, warmup_steps=7, lr_multipliers={"embed": 0.1}
    )["optimizer"]
    assert type(optimizer) is HinaAdaptive
    expected = create_optimizer("HinaAdaptive", Net(), preset="language", lr=1e-4, warmup_steps=7).param_groups[0]
    decay, no_decay, embed = optimizer.param_groups
    for option in ("lora_rank_penalty", "warmup_steps", "min_lr", "max_lr", "lr_bump", "weight_decay", "betas"):
        assert decay[option] == expected[option]
    assert no_decay["weight_decay"] == 0.0
    for rate in ("lr", "min_lr", "max_lr", "lr_bump"):
        assert embed[rate] == pytest.approx(0.1 * expected[rate])
    assert set(optimizer.param_names()) == {name for name, _ in Net().named_parameters()}


def test_a_multiplier_keeps_a_group_at_the_edge_of_its_mask_valid():
    optimizer = configure_optimizers(Net(), lr=1e-3, schedule=None, lr_multipliers={"embed": 4.0})["optimizer"]
    assert optimizer.param_groups[-1]["max_lr"] == pytest.approx(4e-3)  # lr 4e-3 would be above an unscaled bound


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        (dict(optimizer="HinaAdaptiv", lr=1e-3), ValueError, "HinaAdaptive"),
        (dict(optimizer="torch.optim.AdamX", lr=1e-3), ValueError, "not an importable class path"),
        (dict(optimizer="no_such_package.Adam", lr=1e-3), ValueError, "not an importable class path"),
        (dict(optimizer=nn.Linear, lr=1e-3), ValueError, "is not a torch.optim.Optimizer"),
        (dict(optimizer=3, lr=1e-3), ValueError, "must be a name, a class path"),
        (dict(optimizer={"class": "AdamW"}, lr=1e-3), ValueError, "class_path"),
        (dict(optimizer=ADAMW, lr=1e-3, preset="language"), ValueError, "preset='language' needs the name"),
        (dict(optimizer=ADAMW), ValueError, "give lr"),
        (dict(), ValueError, "give lr"),
        (dict(optimizer=ADAMW, lr=-1.0), ValueError, "lr=-1.0 is not valid: lr must be a finite number >= 0"),
        (dict(optimizer=ADAMW, lr=math.nan), ValueError, "lr=nan is not valid"),
        (dict(optimizer=ADAMW, lr=1e-3, weight_decay=-0.1), ValueError, "weight_decay=-0.1 is not valid"),
        (dict(optimizer=ADAMW, lr=1e-3, schedule="cosin"), ValueError, "'cosine', 'linear', 'constant', or None"),
        (dict(optimizer=ADAMW, lr=1e-3, warmup=1.0), ValueError, r"warmup=1.0 is not valid.*\[0, 1\)"),
        (dict(optimizer=ADAMW, lr=1e-3, warmup=-1), ValueError, "warmup=-1 is not valid"),
        (dict(optimizer=ADAMW, lr=1e-3, schedule=None, warmup=5), ValueError, "warmup=5 needs a schedule"),
        (dict(optimizer=ADAMW, lr=1e-3, end_factor=2.0), ValueError, "end_factor=2.0 is not valid"),
        (dict(optimizer=ADAMW, lr=1e-3, total_steps=0), ValueError, "total_steps=0 is not valid"),
        (dict(optimizer=ADAMW, lr=1e-3, lora_ratio=0), ValueError, "lora_ratio=0 is not valid"),
        (dict(lr=1e-3, spd_lamda=0.1), TypeError, "spd_lambda"),
    ],
)  # fmt: skip
def test_bad_values_are_named(given, error, message):
    with pytest.raises(error, match=message):
        configure_optimizers(Net(), **{"total_steps": 10, **given})


def test_two_calls_give_equal_and_independent_configurations():
    model = Net()
    before = copy.deepcopy(model.state_dict())
    one, two = (configure_optimizers(model, lr=1e-3, total_steps=10, warmup=2) for _ in range(2))
    plain = [[{k: v for k, v in g.items() if k != "params"} for g in c["optimizer"].param_groups] for c in (one, two)]
    assert plain[0] == plain[1]
    assert one["lr_scheduler"]["scheduler"].state_dict() == two["lr_scheduler"]["scheduler"].state_dict()
    assert {k: v for k, v in one["lr_scheduler"].items() if k != "scheduler"} == {
        "interval": "step",
        "frequency": 1,
        "name": "lr",
    }
    one["optimizer"].step()
    one["lr_scheduler"]["scheduler"].step()
    assert two["optimizer"].param_groups[0]["lr"] == 0.5e-3
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


# -- schedule ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("shape", ["cosine", "linear"])
def test_schedule_steps_with_the_optimizer_under_accumulation(shape, accumulate):
    rates = RatesOfSteps()
    model = Net(schedule=shape, warmup=0.25, lr_multipliers={"embed": 0.1})
    # 9 batches: the last step of an epoch accumulates fewer
    trainer(accumulate_grad_batches=accumulate, max_epochs=2, callbacks=[rates]).fit(model, batches(9))
    total = 2 * math.ceil(9 / accumulate)
    schedule = Schedule(shape, round(0.25 * total), total)
    assert rates.rates == [
        pytest.approx([1e-3 * schedule(s), 1e-3 * schedule(s), 1e-4 * schedule(s)]) for s in range(total)
    ]


def test_warmup_in_steps_and_max_steps():
    rates = RatesOfSteps()
    trainer(max_steps=6, max_epochs=-1, callbacks=[rates]).fit(Net(schedule="linear", warmup=2), batches(4))
    assert [r[0] for r in rates.rates] == pytest.approx([0.5e-3, 1e-3, 1e-3, 0.75e-3, 0.5e-3, 0.25e-3])


def test_constant_schedule_and_none_need_no_trainer():
    config = configure_optimizers(Net(), ADAMW, lr=1e-3, schedule="constant", warmup=4)
    assert [g["lr"] for g in config["optimizer"].param_groups] == [0.25e-3] * 2
    assert "lr_scheduler" not in configure_optimizers(Net(), ADAMW, lr=1e-3, schedule=None)


def test_without_a_trainer_the_number_of_steps_must_be_given():
    with pytest.raises(ValueError, match=r"Net has no trainer to tell the number of steps. Give total_steps"):
        configure_optimizers(Net(), ADAMW, lr=1e-3)
    with pytest.raises(ValueError, match="no trainer"):
        configure_optimizers(nn.Linear(2, 2), ADAMW, lr=1e-3, schedule="constant", warmup=0.1)


class Endless(IterableDataset):
    def __iter__(self):
        while True:
            yield torch.tensor(1), torch.tensor(0.5)


@pytest.mark.parametrize("options", [{"max_epochs": -1}, {"max_epochs": 2}])
def test_an_endless_training_is_an_error(options):
    data = DataLoader(Endless(), batch_size=2)
    with pytest.raises(ValueError, match=r"the training is endless.*Give total_steps"):
        trainer(**options).fit(Net(), data)
    rates = RatesOfSteps()
    trainer(max_steps=2, callbacks=[rates]).fit(Net(total_steps=4, schedule="linear"), data)
    assert [r[0] for r in rates.rates] == pytest.approx([1e-3, 0.75e-3])


def test_a_warmup_longer_than_the_training_is_said(caplog):
    with caplog.at_level(logging.WARNING, logger="hina_lightning"):
        configure_optimizers(Net(), ADAMW, lr=1e-3, total_steps=5, warmup=8)
    assert "warm-up of 8 steps is not over when the training ends, after 5" in caplog.text


def test_fast_dev_run_and_a_fit_without_batches_work():
    trainer(fast_dev_run=True).fit(Net(warmup=100), batches(3))
    trainer(limit_train_batches=0).fit(Net(warmup=0.1), batches(3))


# -- resume ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", [ADAMW, "HinaAdaptive"])
@pytest.mark.parametrize("stop", [4, 7])  # at the end of an epoch and within one
def test_resume_ends_where_an_uninterrupted_run_does(tmp_path, optimizer, stop):
    def options():
        given = dict(optimizer=optimizer, warmup=3, lr_multipliers={"embed": 0.5})
        return (
            {**given, "compile": False, "relationship_discovery_interval": 3} if optimizer == "HinaAdaptive" else given
        )

    data = DataLoader(batches(1).dataset * 4, batch_size=4)  # one batch, again and again
    whole, seen = Net(**options()), RatesOfSteps()
    trainer(max_epochs=3, callbacks=[seen]).fit(whole, data)

    class Interrupt(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if trainer.global_step == stop:
                raise KeyError("killed")

    half, first = Net(**options()), RatesOfSteps()
    save = ModelCheckpoint(tmp_path, every_n_train_steps=stop, save_top_k=-1, filename="at")
    with pytest.raises(KeyError, match="killed"):
        trainer(max_epochs=3, enable_checkpointing=True, callbacks=[first, save, Interrupt()]).fit(half, data)
    resumed, second = Net(**options()), RatesOfSteps()
    for parameter in resumed.parameters():  # nothing of the end may come from the same initial weights
        parameter.data.zero_()
    trainer(max_epochs=3, callbacks=[second]).fit(resumed, data, ckpt_path=tmp_path / "at.ckpt", weights_only=True)

    assert first.rates + second.rates == seen.rates
    assert len(seen.rates) == 12
    for (name, expected), (_, found) in zip(whole.named_parameters(), resumed.named_parameters(), strict=True):
        assert torch.equal(expected, found), name


def test_continuing_for_longer_stretches_the_schedule_and_says_so(tmp_path, caplog):
    save = ModelCheckpoint(tmp_path, filename="end")
    trainer(max_epochs=1, enable_checkpointing=True, callbacks=[save]).fit(Net(schedule="linear"), batches(4))
    rates = RatesOfSteps()
    with caplog.at_level(logging.WARNING, logger="hina_lightning"):
        trainer(max_epochs=2, callbacks=[rates]).fit(
            Net(schedule="linear"), batches(4), ckpt_path=tmp_path / "end.ckpt"
        )
    assert [r[0] for r in rates.rates] == pytest.approx([1e-3 * (1 - s / 8) for s in range(4, 8)])
    assert "total_steps: 4 -> 8" in caplog.text


# -- hosts -------------------------------------------------------------------------------------------------------------


def test_learning_rate_monitor_accepts_the_groups(tmp_path):
    monitor = LearningRateMonitor()
    logger = CSVLogger(tmp_path)
    model = Net(lr_multipliers={"embed": 0.1, r"body\.3": 2.0})
    trainer(logger=logger, log_every_n_steps=1, callbacks=[monitor]).fit(model, batches(2))
    assert sorted(monitor.lrs) == sorted(
        ["lr/decay", "lr/no_decay", "lr/decay:x0.1:embed", r"lr/decay:x2:body\.3", r"lr/no_decay:x2:body\.3"]
    )
    assert monitor.lrs["lr/decay:x0.1:embed"] == pytest.approx([1e-4, 0.5e-4])


def test_two_optimizers_in_manual_optimization(tmp_path):
    class Two(Net):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False

        def configure_optimizers(self):
            return [
                configure_optimizers(part, lr=1e-3, total_steps=3, schedule="linear", name=name, compile=False)
                for part, name in ((self.embed, "lr-embed"), (self.body, "lr-body"))
            ]

        def training_step(self, batch, batch_idx):
            for optimizer in self.optimizers():
                optimizer.zero_grad()
            self.manual_backward(super().training_step(batch, batch_idx))
            for optimizer, scheduler in zip(self.optimizers(), self.lr_schedulers(), strict=True):
                optimizer.step()
                scheduler.step()

    monitor = LearningRateMonitor()
    fit = trainer(logger=CSVLogger(tmp_path), log_every_n_steps=1, callbacks=[monitor])
    fit.fit(Two(), batches(3))
    assert set(monitor.lrs) == {"lr-embed/decay", "lr-body/decay", "lr-body/no_decay"}
    assert all(lrs == pytest.approx([1e-3, 2e-3 / 3, 1e-3 / 3]) for lrs in monitor.lrs.values())
    assert [names_in(o) for o in fit.optimizers] == [["decay"], ["decay", "no_decay"]]
