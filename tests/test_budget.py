"""``vram_budget_gb`` is kept from the first byte of state on, and what is done for it is said."""

from __future__ import annotations

import logging
from typing import Any, Literal

import pytest
import torch
from torch import nn

from hina_optim import HinaAdaptive
from hina_optim.memory import BudgetError, used_bytes

GIB = 1 << 30


def params() -> list[nn.Parameter]:
    made = [nn.Parameter(torch.randn(100, 100)) for _ in range(3)]
    for p in made:
        p.grad = torch.randn_like(p)
    return made


def needed(**arguments: object) -> int:
    optimizer = HinaAdaptive(params(), lr=1e-4, **arguments)  # type: ignore[arg-type]
    optimizer.step()
    return used_bytes(optimizer)


def test_within_the_budget_nothing_changes(caplog: pytest.LogCaptureFixture) -> None:
    optimizer = HinaAdaptive(params(), lr=1e-4, vram_budget_gb=(needed() + 1) / GIB)
    optimizer.step()
    assert optimizer.param_groups[0]["state_precision"] == "fp32"
    assert not caplog.records


def test_over_the_budget_the_state_is_bf16_and_it_is_said(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "hina_optim"):
        optimizer = HinaAdaptive(params(), lr=1e-4, vram_budget_gb=(needed() - 1000) / GIB)
        optimizer.step()
    state = next(iter(optimizer.state.values()))
    assert state["exp_avg"].dtype == state["exp_avg_sq"].dtype == state["lr_mask"].dtype == torch.bfloat16
    assert used_bytes(optimizer) == needed(state_precision="bf16") <= (needed() - 1000)
    assert "vram_budget_gb" in caplog.text and "bf16" in caplog.text


def test_further_over_the_budget_it_is_in_8_bits() -> None:
    budget = needed(state_precision="bf16") - 1000
    optimizer = HinaAdaptive(params(), lr=1e-4, vram_budget_gb=budget / GIB)
    optimizer.init_state()  # allocates at once, within the budget
    assert optimizer.param_groups[0]["state_precision"] == "8bit"
    assert used_bytes(optimizer) <= budget
    before = used_bytes(optimizer)
    optimizer.step()
    assert used_bytes(optimizer) == before


def test_a_budget_that_cannot_be_met_is_said(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "hina_optim"):
        optimizer = HinaAdaptive(params(), lr=1e-4, vram_budget_gb=130_000 / GIB)
        optimizer.step()
    assert "out of reach" in caplog.text and "use_lr_mask=False" in caplog.text


def test_a_budget_below_the_parameters_is_an_error_with_the_plan() -> None:
    """120 kB of parameters; nothing has changed then."""
    made = params()
    before = [p.detach().clone() for p in made]
    optimizer = HinaAdaptive(made, lr=1e-4, vram_budget_gb=100_000 / GIB)
    with pytest.raises(
        BudgetError, match=r"(?s)smaller than the parameters themselves, 117 KiB.*optimizer state"
    ) as raised:
        optimizer.step()
    assert raised.value.plan.parameter_bytes == 120_000
    assert not optimizer.state_bytes() and all(torch.equal(p, q) for p, q in zip(made, before, strict=True))


def test_a_budget_that_nobody_asked_for_switches_nothing_off() -> None:
    """The default is exceeded by many a model: the state becomes smaller, and that is all."""

    class Small(HinaAdaptive):
        def __init__(
            self,
            params: Any,
            lr: float = 1e-4,
            vram_budget_gb: float = 1000 / GIB,
            state_precision: Literal["fp32", "bf16", "8bit"] | None = None,
        ) -> None:
            super().__init__(params, lr=lr, vram_budget_gb=vram_budget_gb, state_precision=state_precision)

    optimizer = Small(params())
    optimizer.step()
    group = optimizer.param_groups[0]
    assert group["state_precision"] == "8bit" and group["use_lr_mask"] and group["use_spd"]


@pytest.mark.parametrize("precision", ["int4", "8 bit", 8])
def test_an_unknown_precision_is_named(precision: Any) -> None:
    with pytest.raises(ValueError, match=r"HinaAdaptive: state_precision=.* must be one of 'fp32', 'bf16', '8bit'"):
        HinaAdaptive(params(), state_precision=precision)
    optimizer = HinaAdaptive(params())
    with pytest.raises(ValueError, match="state_precision="):
        optimizer.set_state_precision(precision)


def test_memory_efficient_false_switches_the_budget_off(caplog: pytest.LogCaptureFixture) -> None:
    optimizer = HinaAdaptive(params(), lr=1e-4, vram_budget_gb=1000 / GIB, memory_efficient=False)
    optimizer.step()
    assert optimizer.param_groups[0]["state_precision"] == "fp32"
    assert not caplog.records


def test_the_prediction_is_exact() -> None:
    optimizer = HinaAdaptive(params(), lr=1e-4)
    predicted = {precision: optimizer.state_bytes(precision) for precision in ("fp32", "bf16")}
    before = used_bytes(optimizer)
    optimizer.step()
    assert optimizer.state_bytes() == predicted["fp32"]
    assert used_bytes(optimizer) == before
    assert optimizer.set_state_precision("bf16") == predicted["fp32"] - predicted["bf16"]
    assert optimizer.state_bytes() == predicted["bf16"]
