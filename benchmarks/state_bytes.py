"""Bytes of optimizer state a parameter, on the matrices of a transformer, beside other optimizers: ``python
benchmarks/state_bytes.py --write`` puts the tables into docs/memory.md.

Other libraries' optimizers take a real step on the CPU and are asked for every tensor that they keep; what is not
installed is left out. Ours are planned, which is the same to the byte (tests/test_plan.py).
"""

from __future__ import annotations

import argparse
import importlib
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hina_optim import get_optimizer_info, list_optimizers
from hina_optim.memory import plan
from hina_optim.parsing import argument_types
from hina_optim.profiles import PROFILES
from hina_optim.state.precision import PRECISIONS

PAGE = Path(__file__).parents[1] / "docs" / "memory.md"
#: A block of width 1024: query, key and value; output; up and down.
SHAPES = ((3072, 1024), (1024, 1024), (4096, 1024), (1024, 4096))
#: What each profile is to come down to.
GOALS = {"memory_optimized": 1.2, "balanced": 2.6, "quality_optimized": 8.0}

PROFILED = "Automagic_CameAMP_Improved_8Bit"
#: What else to give beside a profile, for more or for less.
WAYS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("memory_optimized", {"state_precision": "8bit"}),
    ("memory_optimized", {"enable_dual_momentum": True}),
    ("memory_optimized", {"state_precision": "8bit", "use_lr_mask": False}),
    ("balanced", {"state_precision": "8bit"}),
    ("balanced", {"factored_image_state": False}),
    ("balanced", {"state_precision": "8bit", "enable_dual_momentum": False}),
)

Build = Callable[[list[torch.nn.Parameter]], torch.optim.Optimizer]


def parameters() -> list[torch.nn.Parameter]:
    """The block, with gradients."""
    generator = torch.Generator().manual_seed(0)
    made = []
    for shape in SHAPES:
        p = torch.nn.Parameter(torch.randn(shape, generator=generator) * 0.02)
        p.grad = torch.randn(shape, generator=generator) * 1e-3
        made.append(p)
    return made


def leaves(value: Any) -> Iterable[Tensor]:
    """Plain tensors within a state, also those inside tensor subclasses."""
    if isinstance(value, dict):
        for item in value.values():
            yield from leaves(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from leaves(item)
    elif isinstance(value, Tensor) and hasattr(value, "__tensor_flatten__"):
        names, _ = value.__tensor_flatten__()
        yield from (getattr(value, name) for name in names)
    elif isinstance(value, Tensor):
        yield value


def measure(build: Build) -> tuple[float, dict[str, float]]:
    """Bytes a parameter after a step, whole and by state name; a tensor that is shared counts once."""
    params = parameters()
    optimizer = build(params)
    optimizer.step()
    count = sum(p.numel() for p in params)
    seen: set[int] = set()
    names: Counter[str] = Counter()
    for state in optimizer.state.values():
        for name, value in state.items():
            for x in leaves(value):
                key = x.data_ptr() if x.numel() else id(x)
                if key not in seen:
                    seen.add(key)
                    names[name.removesuffix("_scale")] += x.numel() * x.element_size()
    per = {name: size / count for name, size in names.items()}
    return sum(per.values()), per


def others() -> dict[str, Build]:
    """What is installed of other libraries."""
    found: dict[str, Build] = {
        "torch AdamW": lambda p: torch.optim.AdamW(p),
        "torch AdamW, amsgrad": lambda p: torch.optim.AdamW(p, amsgrad=True),
        "torch Adafactor": lambda p: torch.optim.Adafactor(p),
        "torch SGD, momentum": lambda p: torch.optim.SGD(p, momentum=0.9),
    }
    for label, module, name in (
        ("bitsandbytes AdamW8bit", "bitsandbytes.optim", "AdamW8bit"),
        ("bitsandbytes AdEMAMix8bit", "bitsandbytes.optim", "AdEMAMix8bit"),
        ("bitsandbytes Lion8bit", "bitsandbytes.optim", "Lion8bit"),
        ("torchao AdamW8bit", "torchao.optim", "AdamW8bit"),
        ("torchao AdamW4bit", "torchao.optim", "AdamW4bit"),
        ("torchao AdamWFp8", "torchao.optim", "AdamWFp8"),
        ("CAME (came-pytorch)", "came_pytorch", "CAME"),
    ):
        try:
            cls = getattr(importlib.import_module(module), name)
        except (ImportError, AttributeError):
            continue
        found[label] = lambda p, cls=cls: cls(p, lr=1e-4)  # type: ignore[misc]
    return found


def ours(name: str, **arguments: Any) -> tuple[float, dict[str, float]]:
    """One of this library's: bytes a parameter, whole and by state name."""
    planned = plan(SHAPES, name, lr=1e-4, **arguments)
    per = {state: sum(kinds.values()) / planned.trained for state, kinds in planned.state.items()}
    return planned.state_bytes / planned.trained, per


def by_precision(name: str, **arguments: Any) -> str:
    """The bytes of one of ours in every precision, and what they are in 8 bits; cells of a row."""
    found = {precision: ours(name, state_precision=precision, **arguments) for precision in PRECISIONS}
    return " | ".join([*(f"{total:.2f}" for total, _ in found.values()), parts(found["8bit"][1])])


def profiled() -> list[str]:
    """Optimizers that have profiles."""
    return [name for name in list_optimizers() if "profile" in argument_types(get_optimizer_info(name).cls)]


def against_goal(profile: str, label: str, total: float, per: dict[str, float]) -> str:
    """One row: bytes beside the goal of a profile."""
    goal = GOALS[profile]
    reached = "reached" if total <= goal else "not reached"
    return f"| `{profile}` | {label} | {total:.2f} | {goal} ({reached}) | {parts(per)} |"


def parts(per: dict[str, float]) -> str:
    """The state names that take more than a hundredth of a byte."""
    large = sorted(((name, size) for name, size in per.items() if size >= 0.01), key=lambda item: -item[1])
    return ", ".join(f"`{name}` {size:.2f}" for name, size in large)


def tables() -> str:
    """All tables, as Markdown."""
    lines = ["| optimizer | bytes a parameter | state |", "|---|---:|---|"]
    for label, build in others().items():
        try:
            total, per = measure(build)
        except Exception as error:  # a library that does not run here says so in its row
            lines.append(f"| {label} | | does not run here ({type(error).__name__}) |")
            continue
        lines.append(f"| {label} | {total:.2f} | {parts(per)} |")
    header = f"{' | '.join(PRECISIONS)} | state in 8 bits |", f"|---|{'---:|' * len(PRECISIONS)}---|"
    lines += ["", f"| optimizer, as it comes | {header[0]}", header[1]]
    for name in list_optimizers():
        lines.append(f"| `{name}` | {by_precision(name)} |")
    lines += ["", f"| optimizer, and also | {header[0]}", header[1]]
    for name in list_optimizers():
        if "factored_second_moment" in argument_types(get_optimizer_info(name).cls):
            numbers = by_precision(name, factored_second_moment=True)
            lines.append(f"| `{name}`, `factored_second_moment=True` | {numbers} |")
    lines += ["", "| profile | optimizer | bytes a parameter | goal | state |", "|---|---|---:|---:|---|"]
    for profile in PROFILES:
        for name in profiled():
            lines.append(against_goal(profile, f"`{name}`", *ours(name, profile=profile)))
    lines += ["", "| profile | and also | bytes a parameter | goal | state |", "|---|---|---:|---:|---|"]
    for profile, more in WAYS:
        said = ", ".join(f"`{option}={value!r}`" for option, value in more.items())
        lines.append(against_goal(profile, said, *ours(PROFILED, profile=profile, **more)))
    return "\n".join(lines)


def write(text: str) -> None:
    """Put the tables between the marks of the page."""
    begin, end = "<!-- tables: begin -->", "<!-- tables: end -->"
    page = PAGE.read_text()
    before, _, rest = page.partition(begin)
    _, _, after = rest.partition(end)
    PAGE.write_text(f"{before}{begin}\n\n{text}\n\n{end}{after}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help=f"write the tables into {PAGE.name}")
    given = parser.parse_args()
    made = tables()
    print(made)
    if given.write:
        write(made)
