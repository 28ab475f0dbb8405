"""Commands before a training: ``hina plan`` and ``hina list``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from hina_lightning.cli.models import lora_of, model_of
from hina_optim import get_optimizer_info, list_optimizers
from hina_optim.memory import BudgetError, MemoryPlan, plan
from hina_optim.memory.planning import Sharding
from hina_optim.parsing import parse_arguments

__all__ = ["listed", "planned"]


def planned(
    path: Path,
    optimizer: str,
    arguments: Sequence[str],
    *,
    preset: str | None,
    train: str | None,
    lora: int | None,
    target: str | None,
    sharding: Sharding,
    world_size: int,
    vram_gb: float | None,
) -> MemoryPlan:
    """The plan of a saved model; one that says that nothing fits where the budget is too small.

    Raises:
        ValueError: A bad file, name or argument; says which.
        TypeError: An argument that the optimizer does not have.
    """
    given = parse_arguments(get_optimizer_info(optimizer).cls, arguments, {"profile": str | None})
    model = model_of(path, train)
    if lora is not None:
        model = lora_of(model, lora, target)
    try:
        return plan(
            model, optimizer, preset=preset, sharding=sharding, world_size=world_size, vram_gb=vram_gb, **given
        )  # fmt: skip
    except BudgetError as error:
        return error.plan


def listed() -> str:
    """All optimizers, what each is, and its presets."""
    lines = []
    for name in list_optimizers():
        info = get_optimizer_info(name)
        lines.append(f"{name}\n    {info.description}")
        if info.presets:
            lines.append(f"    presets: {', '.join(preset.name for preset in info.presets)}")
    return "\n".join(lines)
