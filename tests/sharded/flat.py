"""Small models on DeepSpeed's ZeRO and FSDP1, with parameters that these cut anywhere."""

from __future__ import annotations

import contextlib
import gc
import importlib
import io
import logging
import os
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy

os.environ.setdefault("DS_ACCELERATOR", "cpu")

Made = Callable[[list[tuple[str, nn.Parameter]]], torch.optim.Optimizer]


class Layered(nn.Module):
    """Parameters of odd sizes: 7x5 rows cut in the middle, a scalar, a vector, a kernel, a LoRA pair, a tied weight."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(5, 7)
        self.block = nn.ModuleDict({"kernel": nn.Conv2d(2, 3, 3), "scale": nn.Linear(1, 1)})
        self.layer = nn.Module()
        self.layer.lora_A = nn.ModuleDict({"default": nn.Linear(7, 1, bias=False)})
        self.layer.lora_B = nn.ModuleDict({"default": nn.Linear(1, 7, bias=False)})
        self.last = nn.Linear(7, 4)
        self.last.tied = self.last.weight

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.first(x))
        h = h + self.layer.lora_B["default"](self.layer.lora_A["default"](h))
        image = h[:, :2, None, None].expand(-1, 2, 4, 4)
        seen = self.block["kernel"](image).flatten(1)[:, :7]
        out: Tensor = self.last(h + seen) * self.block["scale"](torch.ones(1))
        return out


def numbered(model: nn.Module) -> nn.Module:
    """Give every element of the model another value, small whole numbers that bf16 holds where there are few enough."""
    at = 0
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.arange(at, at + p.numel()).reshape(p.shape))
            at += p.numel()
    return model


def load_deepspeed() -> None:
    """Import what DeepSpeed imports at its first initialization: once in the test's process, not in every fork."""
    no_compiling()
    importlib.import_module("deepspeed.runtime.zero.muon.original_muon")  # seconds: it compiles with torch


def no_compiling() -> None:
    """Keep DeepSpeed from compiling an all-reduce through shared memory: minutes, for what inference alone uses."""
    import deepspeed.ops

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def initialized(model: nn.Module, optimizer: torch.optim.Optimizer, stage: int, **options: Any) -> Any:
    """A DeepSpeedEngine.

    Args:
        model: What to train.
        optimizer: Built with its parameters.
        stage: Of ZeRO.
        options: ``zero``: more options of ``zero_optimization``; the others are those of the configuration's top level.
    """
    import deepspeed

    no_compiling()
    gc.freeze()  # DeepSpeed collects garbage at every initialization: not among all that the test's process imported
    os.environ.setdefault("LOCAL_RANK", str(torch.distributed.get_rank()))
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    zero = {"stage": stage, **options.pop("zero", {})}
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "gradient_clipping": 0.0,
        **options,
    }
    with contextlib.redirect_stdout(io.StringIO()):
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config, dist_init_required=False)
    return engine


def wrapped(model: nn.Module, strategy: str, originals: bool, inner: Iterable[str] = ("first", "last")) -> nn.Module:
    """A model under FSDP1, some of its children units of their own."""
    options: dict[str, Any] = {
        "sharding_strategy": ShardingStrategy[strategy],
        "use_orig_params": originals,
        "device_id": torch.device("cpu"),
    }
    if strategy.startswith("HYBRID") or strategy.startswith("_HYBRID"):
        from torch.distributed.device_mesh import init_device_mesh

        options["device_mesh"] = init_device_mesh("cpu", (2, torch.distributed.get_world_size() // 2))
    for name in inner:
        setattr(model, name, FullyShardedDataParallel(getattr(model, name), **options))
    return FullyShardedDataParallel(model, **options)


class Held(nn.Module):
    """One parameter, and a loss whose gradient is what it is given."""

    def __init__(self, value: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(value.clone())

    def forward(self, gradient: Tensor) -> Tensor:
        return (self.weight * gradient.to(self.weight.dtype)).sum().float()


class Given(nn.Module):
    """Parameters by name, and a forward pass after which every gradient is exactly what was given.

    Args:
        values: Name (``"a.b.weight"``) → first value.
    """

    def __init__(self, values: dict[str, Tensor]) -> None:
        super().__init__()
        self.paths = [name.removesuffix(".weight") for name in values]
        for path, value in zip(self.paths, values.values(), strict=True):
            *parents, last = path.split(".")
            at: nn.Module = self
            for part in parents:
                if part not in dict(at.named_children()):
                    at.add_module(part, nn.Module())
                at = getattr(at, part)
            at.add_module(last, Held(value))

    def forward(self, gradients: dict[str, Tensor]) -> Tensor:
        return torch.stack([self.get_submodule(path)(gradients[f"{path}.weight"]) for path in self.paths]).sum()
