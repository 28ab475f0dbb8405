"""Every optimizer inside transformers' Trainer, and as sd-scripts builds one: by dotted path, from text."""

from __future__ import annotations

import ast
import importlib
import logging
import re
from inspect import signature

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments

import hina_optim
from hina_optim import create_optimizer, list_optimizers

NAMES = list_optimizers()
#: Those that make more of a training when they know its loss.
FOLLOWERS = [name for name in NAMES if "COptim" in name]


def bert(seed: int = 0) -> nn.Module:
    """A tiny BERT, randomly made; its table of words is large enough for 8 bits."""
    torch.manual_seed(seed)
    return BertForSequenceClassification(
        BertConfig(
            vocab_size=160, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=48,
            max_position_embeddings=16,
        )
    )  # fmt: skip


def tokens() -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        {"input_ids": torch.randint(160, (8,), generator=generator), "labels": torch.tensor(i % 2)} for i in range(12)
    ]


def trainer(folder, model=None, kind=Trainer, steps=5, save=0, **given):
    arguments = TrainingArguments(
        output_dir=str(folder), max_steps=steps, per_device_train_batch_size=4, use_cpu=True, report_to=[], seed=3,
        disable_tqdm=True, save_strategy="steps" if save else "no", save_steps=save or 500, logging_strategy="no",
        lr_scheduler_type="linear",
    )  # fmt: skip
    return kind(model=bert() if model is None else model, args=arguments, train_dataset=tokens(), **given)


def inner(optimizer):
    """Outside of accelerate's wrapper, which forwards no attribute."""
    return getattr(optimizer, "optimizer", optimizer)


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def same(one, two) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize("name", NAMES)
def test_class_and_arguments_given_to_the_trainer(name, tmp_path):
    """Five steps, and their last two once more in fresh objects, from the checkpoint of the third: equal bits."""
    cls = getattr(hina_optim, name)
    arguments = {"lr": 1e-4, **({"warmup_steps": 4} if "warmup_steps" in signature(cls).parameters else {})}
    whole = trainer(tmp_path, save=3, optimizer_cls_and_kwargs=(cls, arguments))
    begin = weights(whole.model)
    whole.train()
    optimizer = inner(whole.optimizer)
    assert type(optimizer) is cls
    assert all(group["start_lr"] == 1e-4 for group in optimizer.param_groups)
    assert all(float(state["step"]) == 5 for state in optimizer.state.values())
    end = weights(whole.model)
    assert all(torch.isfinite(value).all() and not torch.equal(value, begin[key]) for key, value in end.items())

    resumed = trainer(tmp_path, bert(seed=9), optimizer_cls_and_kwargs=(cls, arguments))
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert resumed.state.global_step == 5
    assert same(weights(resumed.model), end)


@pytest.mark.parametrize("name", NAMES)
def test_an_optimizer_handed_to_the_trainer(name, tmp_path):
    """With names, on an adapter, and the Trainer's own schedule."""
    model = get_peft_model(
        bert(), LoraConfig(r=2, target_modules=["query", "value"], modules_to_save=["classifier"]), adapter_name="style"
    )
    optimizer = create_optimizer(name, model, lr=1e-3)
    trained = set(optimizer.param_names())
    run = trainer(tmp_path, model, optimizers=(optimizer, None))
    begin = weights(model)
    run.train()
    assert inner(run.optimizer) is optimizer
    moved = {key for key, value in weights(model).items() if not torch.equal(value, begin[key])}
    # of a LoRA that begins with B = 0, all that trains has moved after five steps
    assert moved == trained and any("lora_A" in key for key in moved)


@pytest.mark.parametrize("name", FOLLOWERS)
def test_the_loss_reaches_an_optimizer_that_follows_it(name, tmp_path, caplog):
    """The Trainer steps without a closure and tells callbacks no loss: two lines of a subclass do."""

    class Reporting(Trainer):
        def training_step(self, *args, **kwargs):
            loss = super().training_step(*args, **kwargs)
            inner(self.optimizer).report_loss(loss)
            return loss

    cls = getattr(hina_optim, name)
    for kind, silent in ((Trainer, True), (Reporting, False)):
        caplog.clear()
        with caplog.at_level(logging.WARNING, logger="hina_optim"):
            trainer(tmp_path, kind=kind, optimizer_cls_and_kwargs=(cls, {"lr": 1e-4})).train()
        assert ("no loss was reported" in caplog.text) is silent


# -- sd-scripts --------------------------------------------------------------------------------------------------------


def built_as_by_sd_scripts(optimizer_type: str, optimizer_args: list[str], params, lr: float):
    """``--optimizer_type package.Class --optimizer_args "key=value" …``: dotted path, values read as literals."""
    kwargs = {}
    for argument in optimizer_args:
        key, _, value = argument.partition("=")
        kwargs[key] = ast.literal_eval(value)
    module, _, name = optimizer_type.rpartition(".")
    optimizer_class = getattr(importlib.import_module(module), name)
    return optimizer_class(params, lr=lr, **kwargs)


@pytest.mark.parametrize("name", NAMES)
def test_sd_scripts_builds_it_by_its_dotted_path(name):
    torch.manual_seed(0)
    layers = {"down": nn.Linear(12, 4, bias=False), "up": nn.Linear(4, 12, bias=False)}
    groups = [{"params": list(layers["down"].parameters()), "lr": 1e-4}, {"params": list(layers["up"].parameters())}]
    optimizer = built_as_by_sd_scripts(
        f"hina_optim.{name}", ["weight_decay=0.05", "use_cautious=False", "state_precision='bf16'"], groups, lr=5e-5
    )
    assert type(optimizer) is getattr(hina_optim, name)
    assert [group["start_lr"] for group in optimizer.param_groups] == [1e-4, 5e-5]
    assert all(g["weight_decay"] == 0.05 and g["state_precision"] == "bf16" for g in optimizer.param_groups)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    before = {key: layer.weight.detach().clone() for key, layer in layers.items()}
    for _ in range(3):
        loss = layers["up"](layers["down"](torch.randn(5, 12))).square().mean()
        loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
    assert all(not torch.equal(before[key], layer.weight) for key, layer in layers.items())


@pytest.mark.parametrize("name", NAMES)
def test_text_that_is_no_value_of_an_argument_is_named(name):
    with pytest.raises(TypeError, match="weight_deccay"):
        built_as_by_sd_scripts(f"hina_optim.{name}", ["weight_deccay=0.1"], [nn.Parameter(torch.ones(2))], 1e-4)
    with pytest.raises(ValueError, match="weight_decay='much'"):
        built_as_by_sd_scripts(f"hina_optim.{name}", ["weight_decay='much'"], [nn.Parameter(torch.ones(2))], 1e-4)


@pytest.mark.parametrize("name", [name for name in NAMES if name.lower().endswith("8bit")])
def test_8_bits_are_there_under_a_name_that_does_not_say_so(name):
    """sd-scripts asks for bitsandbytes, which is not needed here, where a name ends in ``8bit``."""
    other = re.sub("_?8bit$", "", name, flags=re.IGNORECASE)
    results = []
    for path, arguments in ((name, []), (other, ["state_precision='8bit'"])):
        torch.manual_seed(0)
        layer = nn.Linear(64, 80)
        optimizer = built_as_by_sd_scripts(f"hina_optim.{path}", arguments, layer.parameters(), 1e-4)
        for _ in range(3):
            layer(torch.randn(5, 64)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        assert any(value.dtype == torch.uint8 for state in optimizer.state.values() for value in state.values())
        results.append(weights(layer))
    assert same(*results)
