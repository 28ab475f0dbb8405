"""What a sharded step costs before there is a machine for it: collectives, their bytes, and state, from shapes alone.

The engine itself runs, on tensors without memory (the meta device), as one rank of as many as wanted; what it would
send is counted where it would be sent. tests/sharded/test_costs.py compares the figures with those of real processes.

    python -m benchmarks.sharding                        # 7B and 70B, full and LoRA, 8 to 1,024 ranks
    python -m benchmarks.sharding --write                # and put the table into docs/sharding.md
    python -m benchmarks.sharding --model 7B --ranks 8 64 --optimizer HinaAdaptive Automagic_CameAMP_8bit
"""

from __future__ import annotations

import argparse
import inspect
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hina_optim import create_optimizer, get_optimizer_info
from hina_optim.engine.layout import Layout, Shard
from hina_optim.memory.shards import local_parts

Shapes = dict[str, tuple[int, ...]]
Ranges = tuple[tuple[int, int], ...]
#: Ranks that share a node, for hybrid sharding.
NODE = 8
ENGINES = ("ddp", "fsdp2", "hsdp", "zero1", "zero3")
PAGE = Path(__file__).parent.parent / "docs" / "sharding.md"
BEGIN, END = "<!-- costs: made by benchmarks/sharding.py -->", "<!-- /costs -->"


@dataclass(frozen=True)
class Costs:
    """Of one rank.

    Attributes:
        sums: All-reduces of sums in an ordinary step (and of the scales of blocks that are cut), and their bytes.
        gathers: All-reduces that put complete matrices together, and their bytes.
        agreements: All-reduces on the host, and their bytes.
        state_bytes: Of this rank.
    """

    sums: tuple[int, int]
    gathers: tuple[int, int]
    agreements: tuple[int, int]
    state_bytes: int


class Simulated(Layout):
    """One rank of many, of which the others are not there."""

    sharded = True

    def __init__(
        self, shards: Mapping[Tensor, Shard], ranges: Mapping[Tensor, Ranges], zero: Sequence[bool], dimensions: int
    ) -> None:
        self._shards = shards
        self._ranges = ranges
        # what is asked when state is made: whether there is an error, and whether each parameter is not zero
        self._some = torch.tensor([0.0, *(float(not z) for z in zero)])
        self._dimensions = dimensions  # of the mesh: an agreement goes over each
        self.counts: dict[str, list[int]] = {}

    def clear(self) -> None:
        """Begin to count."""
        self.counts = {"sums": [0, 0], "gathers": [0, 0], "agreements": [0, 0]}

    def _count(self, what: str, size: int, times: int = 1) -> None:
        if size:
            self.counts[what][0] += times
            self.counts[what][1] += size * times

    def shard(self, param: Tensor) -> Shard:
        """As it was told."""
        return self._shards[param]

    def pattern(self, param: Tensor) -> Hashable:
        """Where it lies on all ranks."""
        return self.ranges(param)

    def ranges(self, param: Tensor) -> Ranges:
        """As it was told."""
        return self._ranges[param]

    def reduce(self, parts: Sequence[tuple[Tensor, Tensor]], largest: bool = False) -> list[Tensor]:
        """Count."""
        self._count("sums", sum(value.nbytes for _, value in parts))
        return super().reduce(parts, largest)

    def gather(self, parts: Sequence[tuple[Tensor, Tensor]]) -> list[Tensor]:
        """Count."""
        found = [self.put(self.shard(param), local) for param, local in parts]
        self._count("gathers", sum(value.nbytes for value in found))
        return found

    def total(self, vector: Tensor) -> Tensor:
        """Count."""
        self._count("agreements", vector.nbytes, self._dimensions)
        asked = vector.dtype == torch.float32 and vector.shape == self._some.shape
        return self._some.clone() if asked else vector


def transformer(width: int, feed: int, layers: int, keys: int, vocabulary: int = 32000) -> Shapes:
    """A language model of the LLaMA kind."""
    shapes: Shapes = {"embed": (vocabulary, width)}
    for i in range(layers):
        linear = {"q": (width, width), "k": (keys, width), "v": (keys, width), "o": (width, width)}
        linear |= {"gate": (feed, width), "up": (feed, width), "down": (width, feed)}
        shapes |= {f"layers.{i}.{name}.weight": shape for name, shape in linear.items()}
        shapes |= {f"layers.{i}.{name}": (width,) for name in ("norm1", "norm2")}
    return {**shapes, "norm": (width,), "head": (vocabulary, width)}


def adapted(shapes: Shapes, rank: int = 16) -> Shapes:
    """The LoRA of all its linear layers."""
    found: Shapes = {}
    for name, shape in shapes.items():
        if name.endswith(".weight"):
            stem = name.removesuffix(".weight")
            found[f"{stem}.lora_A.default.weight"] = (rank, shape[1])
            found[f"{stem}.lora_B.default.weight"] = (shape[0], rank)
    return found


MODELS = {"7B": transformer(4096, 11008, 32, 4096), "70B": transformer(8192, 28672, 80, 1024)}
MODELS |= {f"{name} LoRA": adapted(shapes) for name, shapes in list(MODELS.items())}


def cut(shapes: Shapes, engine: str, ranks: int, rank: int = 0) -> Iterator[tuple[str, tuple[int, ...], Shard, Ranges]]:
    """Name, local shape and shard of every parameter on a rank; its ranges on all where it is laid flat."""
    kind = {"fsdp2": "fsdp", "hsdp": "fsdp"}.get(engine, engine)
    every = list(shapes.values())
    flat = kind.startswith("zero")
    whose = list(range(ranks)) if flat else [rank]
    parts = [local_parts(every, [0] * len(every), kind, ranks, one) for one in whose]
    for (name, shape), *held in zip(shapes.items(), *parts, strict=True):
        ranges = tuple((one.start, one.start + torch.Size(one.shape).numel()) for one in held)
        at = whose.index(rank)
        yield name, held[at].shape, Shard(shape, *ranges[at]), ranges if flat else ()


def unbudgeted(optimizer: str) -> dict[str, Any]:
    """What keeps an optimizer from lowering its precision to meet the budget that it has by default."""
    known = inspect.signature(get_optimizer_info(optimizer).cls).parameters
    return {"memory_efficient": False} if "memory_efficient" in known else {}


def simulate(
    shapes: Shapes,
    engine: str,
    ranks: int,
    optimizer: str = "HinaAdaptive",
    node: int = NODE,
    rank: int = 0,
    **arguments: Any,
) -> Costs:
    """The costs of one ordinary step (nothing measures in it) of one rank.

    Args:
        shapes: Of all trained parameters.
        engine: One of :data:`ENGINES`.
        ranks: How many there are.
        optimizer: Its name.
        node: Under ``"hsdp"``, the ranks that cut the parameters; the others replicate.
        rank: Whose state; the first one has most, but for a few scales of 8-bit blocks that are cut.
        arguments: Of the optimizer.
    """
    named, shards, ranges = [], {}, {}
    among = min(node, ranks) if engine == "hsdp" else ranks
    for name, local, shard, everywhere in cut(shapes, engine, among, rank):
        p = nn.Parameter(torch.empty(local, dtype=torch.float32, device="meta"))
        named.append((name, p))
        shards[p], ranges[p] = shard, everywhere
    # in one piece: chunks are added up before anything is sent, and nothing here takes memory
    built: Any = create_optimizer(
        optimizer, named, lr=1e-4, **{"max_buffer_memory_mb": 10**9, **unbudgeted(optimizer), **arguments}
    )
    zero = ["lora_B" in name for name, _ in named]  # as adapters begin
    layout = Simulated(shards, ranges, zero, 2 if among < ranks else 1)
    layout.clear()
    if engine != "ddp" and ranks > 1:
        built.bind_layout(layout)
    built.init_state()
    for bucket in set(built._buckets._of.values()):  # a step in which nothing measures, as most are
        bucket.step = 2
        bucket.steps.fill_(2)
    for _, p in named:
        p.grad = torch.empty_like(p)
    layout.clear()
    built.step()
    found = {what: (times, size) for what, (times, size) in layout.counts.items()}
    return Costs(**found, state_bytes=built.state_bytes())


def rows(
    models: Sequence[str], ranks: Sequence[int], optimizers: Sequence[str], engines: Sequence[str]
) -> Iterator[str]:
    """The table."""
    yield "| model | optimizer | engine | ranks | sums a step | gathers a step | agreement | state a rank |"
    yield "|---|---|---|---:|---:|---:|---:|---:|"
    for model in models:
        for optimizer in optimizers:
            for engine in engines:
                for n in ranks:
                    c = simulate(MODELS[model], engine, n, optimizer)
                    cells = (*(f"{k} × {_size(b // k)}" if k else "–" for k, b in (c.sums, c.gathers, c.agreements)),)
                    yield f"| {model} | {optimizer} | {engine} | {n} | {' | '.join(cells)} | {_size(c.state_bytes)} |"
                    if engine == "ddp":
                        break


def _size(number: float) -> str:
    for unit in ("B", "kB", "MB"):
        if number < 1000:
            return f"{number:.3g} {unit}"
        number /= 1000
    return f"{number:.3g} GB"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--ranks", nargs="+", type=int, default=[8, 64, 1024])
    parser.add_argument("--optimizer", nargs="+", default=["HinaAdaptive", "Automagic_CameAMP_8bit"])
    parser.add_argument("--engine", nargs="+", choices=ENGINES, default=list(ENGINES))
    parser.add_argument("--write", action="store_true", help="put the table into docs/sharding.md")
    given = parser.parse_args()
    lines = []
    for line in rows(given.model, given.ranks, given.optimizer, given.engine):
        print(line, flush=True)
        lines.append(line)
    if given.write:
        text = PAGE.read_text(encoding="utf-8")
        before, rest = text.split(BEGIN)
        after = rest.split(END)[1]
        PAGE.write_text(f"{before}{BEGIN}\n{chr(10).join(lines)}\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
