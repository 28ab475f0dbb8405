"""What :func:`bind` accepts, what it refuses, and that a flat partition is never stepped without it."""

from __future__ import annotations

import re
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy
from torch.nn.parallel import DistributedDataParallel

import hina_optim
from hina_lightning.sharding import bind
from hina_optim.engine.fragments import FlatLayout
from hina_optim.engine.layout import Layout
from tests.sharded.flat import Given, Layered, initialized, load_deepspeed, wrapped
from tests.sharded.test_flat_steps import gradients, start
from tests.sharded.world import run


def refused(what: Callable[[], object], message: str) -> None:
    """``what()`` raises an error that says so, and how to do better."""
    try:
        what()
    except (RuntimeError, TypeError) as error:
        assert re.search(message, str(error)), error
    else:
        raise AssertionError(f"not refused: {message}")


def engine_of(stage: int, model: nn.Module | None = None, **options: Any) -> tuple[Any, Any]:
    model = Layered() if model is None else model
    optimizer = hina_optim.HinaAdaptive(model.parameters())
    return initialized(model, optimizer, stage, **options), optimizer


def zero_refuses(rank: int) -> None:
    for stage in (1, 2, 3):  # unbound: no weight moves
        model = Given(start())
        engine, optimizer = engine_of(stage, model)
        engine.backward(engine(gradients(0)))
        refused(engine.step, r"hina_lightning\.sharding\.bind\(optimizer, engine\)")
        assert not any(optimizer.state.values())

    engine, optimizer = engine_of(2)
    other = hina_optim.HinaAdaptive(Layered().parameters())
    refused(lambda: bind(other, engine), "the engine steps a HinaAdaptive, not this HinaAdaptive")
    refused(lambda: bind(torch.optim.AdamW(Layered().parameters()), nn.Linear(1, 1)), "AdamW is not an optimizer of")
    engine, optimizer = engine_of(2, zero={"elastic_checkpoint": True})
    refused(lambda: bind(optimizer, engine), "remove it from zero_optimization")
    engine, optimizer = engine_of(2, checkpoint={"load_universal": True})
    refused(lambda: bind(optimizer, engine), r"remove checkpoint\.load_universal")

    model = Layered()
    model.first.bias.requires_grad_(False)
    optimizer = hina_optim.HinaAdaptive(model.named_parameters())
    engine = initialized(model, optimizer, 0, bf16={"enabled": True})
    refused(lambda: bind(optimizer, engine), "leaves out what is frozen")
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))  # which of the two is frozen cannot be told
    model[0].requires_grad_(False)
    engine, optimizer = engine_of(1, model)
    refused(lambda: bind(optimizer, engine), "neither names nor shapes tell which")

    # wrong on one rank only: an error on all
    model = Layered()
    engine, optimizer = engine_of(2, model)
    if rank == 1:
        model.first.weight.data = model.first.weight.data.clone()
    refused(
        lambda: bind(optimizer, engine), r"is not in ZeRO's flat tensor.*" + ("" if rank == 1 else r"\(on rank 1\)")
    )
    assert type(optimizer._layout) is Layout


def replaced(rank: int) -> None:
    """accelerate swaps the optimizer for DeepSpeedCPUAdam where it is offloaded."""
    from deepspeed.ops.adam import DeepSpeedCPUAdam

    model = Layered()
    ours = hina_optim.HinaAdaptive(model.parameters())
    swapped = DeepSpeedCPUAdam.__new__(DeepSpeedCPUAdam)  # its constructor compiles for a minute
    swapped.opt_id, swapped.ds_opt_adam = 0, SimpleNamespace(destroy_adam=lambda _: None)
    torch.optim.Optimizer.__init__(swapped, model.parameters(), {"lr": 0.1, "amsgrad": False})
    engine = initialized(model, swapped, 2, zero={"offload_optimizer": {"device": "cpu"}})
    for given in (ours, swapped, engine.optimizer):
        refused(lambda given=given: bind(given, engine), 'DeepSpeedCPUAdam.*"zero_force_ds_cpu_optimizer": false')


def fsdp1_refuses(rank: int) -> None:
    for originals in (True, False):
        model = wrapped(Given(start()), "FULL_SHARD", originals, ("blocks",))
        optimizer = hina_optim.HinaAdaptive(model.parameters())
        model(gradients(0)).backward()
        refused(optimizer.step, r"hina_lightning\.sharding\.bind\(optimizer, model\)")

    before = hina_optim.HinaAdaptive((model := Layered()).parameters())
    model = wrapped(model, "FULL_SHARD", False)
    refused(lambda: bind(before, model), "in none of the modules that FSDP1 wrapped")

    model = Given(start())
    optimizer = hina_optim.HinaAdaptive(model.parameters())
    model(gradients(0)).backward()
    optimizer.step()
    model(gradients(1)).backward()
    optimizer.step()
    model = wrapped(model, "FULL_SHARD", True, ())
    refused(lambda: bind(optimizer, model), "has state already")

    model = Layered()
    model.block["kernel"].to(memory_format=torch.channels_last)
    model = wrapped(model, "FULL_SHARD", True)
    refused(lambda: bind(hina_optim.HinaAdaptive(model.parameters()), model), r"no channels_last")

    model = Layered()
    here = torch.device("cpu")
    model.first = FullyShardedDataParallel(
        model.first, sharding_strategy=ShardingStrategy.NO_SHARD, use_orig_params=True, device_id=here
    )
    model = FullyShardedDataParallel(model, use_orig_params=True, device_id=here)
    refused(lambda: bind(hina_optim.HinaAdaptive(model.parameters()), model), "give all units the same")


def accepted(rank: int) -> None:
    from accelerate import Accelerator
    from accelerate.optimizer import AcceleratedOptimizer
    from accelerate.utils.deepspeed import DeepSpeedOptimizerWrapper
    from lightning.pytorch.core.optimizer import LightningOptimizer

    Accelerator(cpu=True)
    for plain in (Layered(), DistributedDataParallel(Layered())):  # nothing to do
        optimizer = hina_optim.HinaAdaptive(plain.parameters())
        bind(optimizer, plain)
        assert type(optimizer._layout) is Layout
    for options in ({}, {"bf16": {"enabled": True}}):
        engine, optimizer = engine_of(0, **options)
        bind(optimizer, engine)
        assert type(optimizer._layout) is Layout

    # any wrappers; the engine may be missing where the wrappers hold DeepSpeed's optimizer
    engine, optimizer = engine_of(2)
    for given, model in (
        (engine.optimizer, engine),
        (DeepSpeedOptimizerWrapper(engine.optimizer), engine),
        (engine.optimizer, engine.module),
        (LightningOptimizer(engine.optimizer), engine),
        (optimizer, SimpleNamespace(_forward_module=engine)),
    ):
        bind(given, model)
        layout = optimizer._layout
        assert isinstance(layout, FlatLayout)
        bind(optimizer, engine)
        assert optimizer._layout is layout, "bound again to the same"
        optimizer._layout = Layout()

    model = wrapped(Layered(), "FULL_SHARD", True)
    optimizer = hina_optim.HinaAdaptive(model.parameters())
    holder = nn.ModuleDict({"model": model})  # as in a LightningModule
    bind(AcceleratedOptimizer(optimizer, device_placement=False), holder)
    assert isinstance(optimizer._layout, FlatLayout)
    assert next(iter(optimizer._layout.fragments.values())).name == "model.first.weight"


def everything(rank: int) -> None:
    zero_refuses(rank)
    replaced(rank)
    fsdp1_refuses(rank)
    accepted(rank)


def test_bind_accepts_what_it_should_and_refuses_the_rest() -> None:
    load_deepspeed()
    run(everything, 2)
