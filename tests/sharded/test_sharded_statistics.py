"""What a sharded optimizer tells of itself is about all elements, and the same on all ranks as in one process."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from torch import Tensor

from tests.every_optimizer import NAMES, loss_of
from tests.sharded.cells import made
from tests.sharded.engines import build, gradients
from tests.sharded.world import run

METHODS = (
    "get_effective_lrs",
    "get_avg_learning_rate",
    "get_learning_rates",
    "lr_mask_statistics",
    "get_lr_mask_analysis",
    "importance_statistics",
    "get_importance_analysis",
    "get_relationship_summary",
    "diagnose_lora_pairing",
    "param_names",
)


def told(rank: int, engine: str, name: str, kind: str) -> dict[str, Any]:
    """What every method says after some steps, its tensors as numbers."""
    built = build(engine)
    optimizer = made(name, built.named, kind)
    for step in range(6):
        built.give(gradients(built.shapes, step))
        optimizer.report_loss(loss_of(step))
        optimizer.step()
    built.give(gradients(built.shapes, 6))
    return {method: numbers(getattr(optimizer, method)()) for method in METHODS if hasattr(optimizer, method)}


def numbers(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.tolist()
    if isinstance(value, dict):
        return {str(k): numbers(v) for k, v in value.items()}
    return [numbers(v) for v in value] if isinstance(value, (list, tuple)) else value


def differences(one: Any, other: Any, path: str = "") -> Iterator[str]:
    if isinstance(one, dict) and isinstance(other, dict) and one.keys() == other.keys():
        for key in one:
            yield from differences(one[key], other[key], f"{path}/{key}")
    elif isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
        for i, pair in enumerate(zip(one, other, strict=True)):
            yield from differences(*pair, f"{path}[{i}]")
    elif isinstance(one, float) and isinstance(other, float):
        if not abs(one - other) <= 1e-5 * max(abs(one), 1e-9):
            yield f"{path}: {other}, in one process {one}"
    elif one != other:
        yield f"{path}: {other}, in one process {one}"


@pytest.mark.parametrize(
    ("name", "engine", "size", "kind"),
    [
        ("HinaAdaptive", "fsdp2 tp", 4, "fp32"),
        ("Automagic_CameAMP_Improved_8Bit", "fsdp2", 2, "8bit"),
        *[
            pytest.param(name, engine, size, kind, marks=pytest.mark.sharded)
            for name in NAMES
            for engine, size in (("fsdp2", 4), ("hsdp", 4), ("fsdp2 tp", 4), ("ddp", 2))
            for kind in ("fp32", "8bit")
        ],
    ],
)
def test_statistics_are_those_of_one_process(name: str, engine: str, size: int, kind: str) -> None:
    expected = told(0, "one", name, kind)
    assert len(expected) > 3
    for rank, found in enumerate(run(told, size, engine, name, kind)):
        wrong = list(differences(expected, found))
        assert not wrong, f"rank {rank}:\n" + "\n".join(wrong[:10])
