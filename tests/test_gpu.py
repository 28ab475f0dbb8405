"""What only a GPU can show: the CPU's trajectory, and no wait of the host for the device within a step."""

from __future__ import annotations

import pytest
import torch

from hina_optim import HinaAdaptive
from tests.optim_cases import EVERYTHING, give, named_params

pytestmark = pytest.mark.gpu


def train(device: str, steps: int = 10, **arguments: object) -> list[torch.Tensor]:
    named = [(n, torch.nn.Parameter(p.detach().to(device))) for n, p in named_params(torch.float64)]
    optimizer = HinaAdaptive(named, lr=3e-4, **arguments)  # type: ignore[arg-type]
    for step in range(steps):
        give(named, step)
        optimizer.step()
    return [p.detach().cpu() for _, p in named]


@pytest.mark.parametrize("arguments", [{}, EVERYTHING], ids=["default", "all"])
def test_the_cpu_trajectory(arguments: dict[str, object]) -> None:
    for a, b in zip(train("cpu", **arguments), train("cuda", **arguments), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)


def test_compiled_equals_eager() -> None:
    for a, b in zip(train("cuda"), train("cuda", compile=True), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)


def test_no_host_sync_in_a_step() -> None:
    params = [torch.nn.Parameter(torch.randn(64, 64, device="cuda")) for _ in range(5)]
    optimizer = HinaAdaptive(params, lr=1e-4)
    for p in params:
        p.grad = torch.randn_like(p)
    optimizer.step()
    optimizer.step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            optimizer.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
