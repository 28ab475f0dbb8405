"""One small model on every engine, with gradients that are the same to the bit on all of them.

Where the elements of a parameter lie is not asked of the engine: the model is built once with the flat index of every
element in its place, sharded, and read. The same *places* then put known gradients onto any engine and tell what of a
complete parameter a rank has.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

__all__ = ["ENGINES", "Adapted", "Built", "Engine", "Model", "build", "gradients", "joined"]

BATCH, LENGTH, WORDS = 8, 64, 30


class Adapted(nn.Module):
    """A linear layer with a LoRA pair, named as peft names them."""

    def __init__(self, inside: int, out: int, rank: int) -> None:
        super().__init__()
        self.base_layer = nn.Linear(inside, out)
        self.lora_A = nn.ModuleDict({"default": nn.Linear(inside, rank, bias=False)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(rank, out, bias=False)})

    def forward(self, x: Tensor) -> Tensor:
        low: Tensor = self.lora_B["default"](self.lora_A["default"](x))
        return self.base_layer(x) + low


class Model(nn.Module):
    """Words → embedding → 13x48 with rank 4 → norm → kernels of 3x3 → 7x512 with rank 1: rows that no world divides."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(WORDS, 48)
        self.up = Adapted(48, 13, rank=4)
        self.norm = nn.LayerNorm(13)
        self.conv = nn.Conv2d(13, 8, 3, padding=1)
        self.down = Adapted(512, 7, rank=1)

    def forward(self, words: Tensor) -> Tensor:
        x = self.norm(self.up(self.embed(words)))
        x = torch.tanh(self.conv(x.transpose(1, 2).unflatten(2, (8, 8))))
        out: Tensor = self.down(x.flatten(1))
        return out

    def blocks(self) -> list[nn.Module]:
        """What is sharded each for itself."""
        return [self.embed, self.up, self.norm, self.conv, self.down]

    def parts(self) -> list[Model]:
        """Itself."""
        return [self]


class Several(nn.Module):
    """Copies of the model, of which the first is run: the same shapes, more parameters."""

    def __init__(self, copies: int) -> None:
        super().__init__()
        self.copies = nn.ModuleList(Model() for _ in range(copies))

    def forward(self, words: Tensor) -> Tensor:
        out: Tensor = self.copies[0](words)
        return out

    def blocks(self) -> list[nn.Module]:
        """Those of all."""
        return [block for model in self.parts() for block in model.blocks()]

    def parts(self) -> list[Model]:
        """The copies."""
        return [model for model in self.copies if isinstance(model, Model)]


Spreadable = Model | Several


def initialize(model: nn.Module, value: Callable[[int, str, Tensor], Tensor]) -> None:
    """Fill every parameter with ``value(number, name, parameter)``."""
    with torch.no_grad():
        for i, (name, p) in enumerate(model.named_parameters()):
            p.copy_(value(i, name, p))


def weights(number: int, name: str, p: Tensor) -> Tensor:
    """First weights, the same everywhere; the LoRA B is zero, as adapters begin."""
    if "lora_B" in name:
        return torch.zeros_like(p)
    generator = torch.Generator().manual_seed(100 + number)
    return (torch.randn(p.shape, generator=generator, dtype=torch.float64) / 8).to(p.dtype)


def indices(number: int, name: str, p: Tensor) -> Tensor:
    """The flat index of every element."""
    return torch.arange(p.numel(), dtype=p.dtype).reshape(p.shape)


def gradients(shapes: Mapping[str, Sequence[int]], step: int) -> dict[str, Tensor]:
    """Complete gradients of one step, float64: noise and a drift."""
    noise, drift = torch.Generator().manual_seed(1000 + step), torch.Generator().manual_seed(7)
    found = {}
    for name, shape in shapes.items():
        a = torch.randn(*shape, generator=noise, dtype=torch.float64)
        found[name] = a + torch.randn(*shape, generator=drift, dtype=torch.float64)
    return found


def batch(step: int, part: int, parts: int) -> tuple[Tensor, Tensor]:
    """This part of the global batch of one step: words and targets."""
    generator = torch.Generator().manual_seed(50 + step)
    words = torch.randint(WORDS, (BATCH, LENGTH), generator=generator)
    targets = torch.randn(BATCH, 7, generator=generator)
    mine = slice(part * BATCH // parts, (part + 1) * BATCH // parts)
    return words[mine], targets[mine]


@dataclass
class Built:
    """The model on one engine and rank.

    Attributes:
        model: What to call forward on.
        named: Its parameters as an optimizer gets them, with the names of the unwrapped model.
        shapes: Name → complete shape.
        places: Name → global flat index, int64, of every element that is here, in their order here.
        part: Which part of the data is this rank's.
        parts: How many there are.
    """

    model: nn.Module
    named: list[tuple[str, nn.Parameter]]
    shapes: dict[str, tuple[int, ...]]
    places: dict[str, Tensor]
    part: int
    parts: int

    def local(self, name: str) -> Tensor:
        """What is here of a parameter, plain."""
        return plain(dict(self.named)[name])

    def give(self, complete: Mapping[str, Tensor | None]) -> None:
        """Set ``.grad`` of every parameter to what is here of a complete gradient; None where there is none."""
        for name, p in self.named:
            whole = complete[name]
            if whole is None:
                p.grad = None
                continue
            local = plain(p)
            here = whole.reshape(-1)[self.places[name]].reshape(local.shape).to(local.dtype)
            p.grad = like(p, here)

    def backward(self, step: int) -> Tensor:
        """A real forward and backward on this rank's part of the batch; the loss of the global batch."""
        words, targets = batch(step, self.part, self.parts)
        for _, p in self.named:
            p.grad = None
        out = self.model(words)
        loss = (out.to(targets.dtype) - targets).square().mean()
        loss.backward()
        return loss.detach()

    def pieces(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Name → places and values of what is here: for :func:`joined`."""
        return {name: (self.places[name], plain(p).reshape(-1).clone()) for name, p in self.named}


def plain(value: Tensor) -> Tensor:
    """What is here, as a plain tensor."""
    local = value.detach()
    return local.to_local() if isinstance(local, DTensor) else local


def like(p: Tensor, local: Tensor) -> Tensor:
    """A local value, in the layout of a parameter."""
    if not isinstance(p, DTensor):
        return local
    return DTensor.from_local(local, p.device_mesh, p.placements, run_check=False, shape=p.shape, stride=p.stride())


def joined(
    ranks: Sequence[Mapping[str, tuple[Tensor, Tensor]]], shapes: Mapping[str, Sequence[int]]
) -> dict[str, Tensor]:
    """Complete tensors from the pieces of all ranks; what several of them have must be equal to the bit.

    Raises:
        AssertionError: Replicas differ, or elements are nowhere.
    """
    found = {}
    for name, shape in shapes.items():
        whole = torch.zeros(torch.Size(shape).numel(), dtype=ranks[0][name][1].dtype)
        seen = torch.zeros(whole.shape, dtype=torch.bool)
        for rank, pieces in enumerate(ranks):
            places, values = pieces[name]
            again = seen[places]
            assert same_bits(whole[places][again], values[again]), (
                f"{name}: rank {rank} has another value than a replica"
            )
            whole[places], seen[places] = values, True
        assert seen.all(), f"{name}: {int((~seen).sum())} elements are on no rank"
        found[name] = whole.reshape(*shape)
    return found


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equal, NaN and the sign of zero included."""
    bits = [t.contiguous().reshape(-1).view(torch.uint8) for t in (a, b)]
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(*bits)


# -- engines ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Engine:
    """How a model is spread.

    Attributes:
        sizes: Worlds that it fits.
        spread: Shards or wraps a model; returns what to call, and the mesh dimension that divides the data (None: all
            ranks have the same data).
        looser: Why its real backward does not give the gradients of one process, else "".
        refuses: Kinds of state that the optimizer refuses there, and a word of the reason.
    """

    sizes: tuple[int, ...]
    spread: Callable[[Spreadable], tuple[nn.Module, DeviceMesh | None]]
    looser: str = ""
    refuses: Mapping[str, str] = field(default_factory=dict)


def _one(model: Spreadable) -> tuple[nn.Module, DeviceMesh | None]:
    return model, None


def _ddp(model: Spreadable) -> tuple[nn.Module, DeviceMesh | None]:
    return DistributedDataParallel(model), init_device_mesh("cpu", (dist.get_world_size(),))


def _fully(model: Spreadable, mesh: DeviceMesh, **options: Any) -> nn.Module:
    for block in model.blocks():
        fully_shard(block, mesh=mesh, **options)
    fully_shard(model, mesh=mesh, **options)
    return model


def _fsdp2(**options: Any) -> Callable[[Spreadable], tuple[nn.Module, DeviceMesh | None]]:
    def spread(model: Spreadable) -> tuple[nn.Module, DeviceMesh | None]:
        mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("data",))
        return _fully(model, mesh, **options), mesh

    return spread


def _another_dimension(p: nn.Parameter) -> Shard:
    """The last one that divides evenly, as FSDP2 wants it of all but the first."""
    even = [d for d in range(1, p.ndim) if p.shape[d] % dist.get_world_size() == 0]
    return Shard(even[-1] if even else 0)


def _hsdp(model: Spreadable) -> tuple[nn.Module, DeviceMesh | None]:
    mesh = init_device_mesh("cpu", (2, dist.get_world_size() // 2), mesh_dim_names=("replicate", "shard"))
    _fully(model, mesh)
    return model, mesh["replicate", "shard"]._flatten("data")


def _tensor_parallel(model: Spreadable, mesh: DeviceMesh) -> None:
    plan = {
        "up.base_layer": ColwiseParallel(output_layouts=Replicate()),
        "down.base_layer": RowwiseParallel(input_layouts=Replicate()),
    }
    for part in model.parts():
        parallelize_module(part, mesh, plan)


def _tp(model: Spreadable) -> tuple[nn.Module, DeviceMesh | None]:
    _tensor_parallel(model, init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("tensor",)))
    return model, None


def _fsdp2_tp(model: Spreadable) -> tuple[nn.Module, DeviceMesh | None]:
    mesh = init_device_mesh("cpu", (2, dist.get_world_size() // 2), mesh_dim_names=("data", "tensor"))
    _tensor_parallel(model, mesh["tensor"])
    return _fully(model, mesh["data"]), mesh["data"]


#: Name → engine.
ENGINES: dict[str, Engine] = {
    "one": Engine((1,), _one),
    "ddp": Engine((2, 4), _ddp),
    "fsdp2": Engine((2, 4), _fsdp2()),
    "fsdp2 last": Engine(
        (2, 4),
        _fsdp2(shard_placement_fn=_another_dimension),
        refuses=dict.fromkeys(("8bit", "4bit"), "is cut between columns"),
    ),
    "fsdp2 offload": Engine((2,), _fsdp2(offload_policy=CPUOffloadPolicy(pin_memory=False))),
    "fsdp2 mixed": Engine(
        (2,), _fsdp2(mp_policy=MixedPrecisionPolicy(torch.bfloat16, torch.float32)), "it computes in bf16"
    ),
    "hsdp": Engine((4,), _hsdp),
    "tp": Engine((2,), _tp),
    "fsdp2 tp": Engine((4,), _fsdp2_tp),
}


def build(engine: str, dtype: torch.dtype = torch.float32, copies: int = 0) -> Built:
    """The model with its first weights on an engine; called by all ranks.

    Args:
        engine: Name in :data:`ENGINES`.
        dtype: Of the weights.
        copies: With more than 0, a model of as many copies.
    """

    def fresh(dtype: torch.dtype, value: Callable[[int, str, Tensor], Tensor]) -> Spreadable:
        model: Spreadable = (Several(copies) if copies else Model()).to(dtype)
        initialize(model, value)
        return model

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        probe = fresh(torch.float64, indices)
        shapes = {name: tuple(p.shape) for name, p in probe.named_parameters()}
        ENGINES[engine].spread(probe)
        places = {name: plain(p).reshape(-1).to(torch.int64) for name, p in probe.named_parameters()}
        model = fresh(dtype, weights)
        wrapped, data = ENGINES[engine].spread(model)
    part, parts = (data.get_local_rank(), data.size()) if data is not None else (0, 1)
    return Built(wrapped, list(model.named_parameters()), shapes, places, part, parts)
