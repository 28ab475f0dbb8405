"""How far state in 8 and 4 bits is from fp32 after 500 steps of the same gradients: the bounds of docs/memory.md."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import hina_optim
from hina_optim.state.precision import TensorCodec
from tests.every_optimizer import loss_of

SHAPE, STEPS, EARLY = (32, 256), 500, 50
PAGE = Path(__file__).parents[1] / "docs" / "memory.md"
FAMILIES = [
    "HinaAdaptive",
    "HinaAdamWOptimizer",
    "Automagic_CameAMP",
    "Automagic_CameAMP_Improved",
    "Automagic_CameAMP_COptim",
]


#: Precision → its table on the page, and how far the sum of a state may be off, which shows a drift; by state.
TABLES: dict[str, tuple[str, dict[str, float]]] = {
    "8bit": ("bounds", {}),
    # where an element is at the upper end, it can only be rounded down
    "4bit": ("bounds of 4 bits", {"lr_mask": 0.1}),
}


def bounds(precision: str) -> dict[str, float]:
    """State → largest ``‖x₈ − x‖ / ‖x‖``, as the page says."""
    mark = TABLES[precision][0]
    table = PAGE.read_text(encoding="utf-8").split(f"<!-- {mark}: begin -->")[1].split(f"<!-- {mark}: end -->")[0]
    rows = re.findall(r"^\| (`.+?`) \| ([\d.]+) % \|", table, re.MULTILINE)
    return {name: float(percent) / 100 for names, percent in rows for name in re.findall(r"`(\w+)`", names)}


def gradients() -> Iterator[Tensor]:
    """A signal that fades, and as much noise; columns of a block a decade apart."""
    generator = torch.Generator().manual_seed(0)
    spread = torch.logspace(-1, 0, SHAPE[1])
    signal = torch.randn(SHAPE, generator=generator) * spread
    for step in range(STEPS):
        yield 1e-2 * (signal * (1 - 0.5 * step / STEPS) + 0.5 * spread * torch.randn(SHAPE, generator=generator))


def run(name: str, precision: str) -> tuple[dict[str, Tensor], Any, list[str]]:
    """State at the end, decoded; how it is stored; and what has not changed since an early step."""
    weight = nn.Parameter(torch.randn(SHAPE, generator=torch.Generator().manual_seed(1)) / 16)
    optimizer = getattr(hina_optim, name)([("w", weight)], lr=3e-4, state_precision=precision)
    before: dict[str, Tensor] = {}
    for step, gradient in enumerate(gradients()):
        weight.grad = gradient
        if step == EARLY:
            before = {key: value.clone() for key, value in optimizer.state[weight].items()}
        optimizer.report_loss(loss_of(step))
        optimizer.step()
    same = [key for key, value in optimizer.state[weight].items() if torch.equal(value, before[key])]
    (bucket,) = set(optimizer._buckets._of.values())
    values = {slot.name: optimizer._buckets.decoded(weight, slot.name).double() for slot in bucket.slots}
    return values, bucket.codecs, same


@pytest.mark.slow
@pytest.mark.parametrize("precision", TABLES)
@pytest.mark.parametrize("name", FAMILIES)
def test_every_state_stays_within_its_bound(name: str, precision: str) -> None:
    """Neither far off, nor with a bias; and whatever is stored in few bits is written back."""
    exact, _, _ = run(name, "fp32")
    rough, codecs, same = run(name, precision)
    limits, sums = bounds(precision), TABLES[precision][1]
    coded = [slot for slot in exact if not isinstance(codecs[slot], TensorCodec)]
    assert "exp_avg" in coded
    for slot in coded:
        assert not any(slot + suffix in same for suffix in codecs[slot].parts), f"{slot} is never written back"
        if slot == "last_sign":  # exact; where a gradient depends on the weights, so does its sign
            assert (exact[slot] != rough[slot]).double().mean() <= limits[slot]
            continue
        off = rough[slot] - exact[slot]
        assert off.norm() <= limits[slot] * exact[slot].norm(), (slot, float(off.norm() / exact[slot].norm()))
        assert abs(off.sum()) <= sums.get(slot, 0.01) * exact[slot].abs().sum(), f"{slot} drifts"
    assert rough["exp_avg"].norm() > 0
