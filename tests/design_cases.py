"""Models and training loops for the tests of what the documents of the design show."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from hina_optim.engine.optimizer import HinaOptimizer


class Adapted(nn.Module):
    """A frozen linear layer with a LoRA beside it, in peft's names, and one with a LoKr, in LyCORIS' names."""

    def __init__(self, size: int = 16, rank: int = 4) -> None:
        super().__init__()
        self.q = nn.Linear(size, size).requires_grad_(False)
        self.q_lora_A = nn.Linear(size, rank, bias=False)
        self.q_lora_B = nn.Linear(rank, size, bias=False)
        nn.init.zeros_(self.q_lora_B.weight)
        self.k = nn.Module()
        self.k.lokr_w1 = nn.Parameter(torch.randn(4, 4) / 2)
        self.k.lokr_w2 = nn.Parameter(torch.zeros(size // 4, size // 4))

    def forward(self, x: Tensor) -> Tensor:
        x = self.q(x) + self.q_lora_B(self.q_lora_A(x))
        return x + nn.functional.linear(x, torch.kron(self.k.lokr_w1, self.k.lokr_w2))

    def named(self) -> list[tuple[str, nn.Parameter]]:
        """Trainable parameters by the names that the libraries give them."""
        return [
            ("model.q.lora_A.default.weight", self.q_lora_A.weight),
            ("model.q.lora_B.default.weight", self.q_lora_B.weight),
            ("lycoris_model_k.lokr_w1", self.k.lokr_w1),
            ("lycoris_model_k.lokr_w2", self.k.lokr_w2),
        ]


def adapted() -> Adapted:
    """The same one each time."""
    torch.manual_seed(0)
    return Adapted()


def image_model() -> nn.Module:
    """Convolution, matrix, biases, norm; the same each time."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1), nn.GroupNorm(2, 6), nn.GELU(), nn.Flatten(), nn.Linear(6 * 6 * 6, 8)
    )


def inputs(model: nn.Module) -> Tensor:
    """A batch for either model, the same each time."""
    generator = torch.Generator().manual_seed(1)
    shape = (8, 16) if isinstance(model, Adapted) else (8, 3, 6, 6)
    return torch.randn(shape, generator=generator)


def loss_of(model: nn.Module) -> Tensor:
    """Distance of the outputs from fixed targets."""
    output = model(inputs(model))
    return (output - torch.linspace(-1, 1, output.shape[1])).square().mean()


def train(model: nn.Module, optimizer: HinaOptimizer, steps: int = 12) -> list[float]:
    """The loop of the documents; returns the loss before each step, and after the last."""
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = loss_of(model)
        loss.backward()
        losses.append(loss.item())
        optimizer.step()
    return [*losses, loss_of(model).item()]


def learns(model: nn.Module, optimizer: HinaOptimizer, steps: int = 12) -> None:
    """The loss falls, every parameter moves, and all stays finite."""
    before = [p.detach().clone() for p in model.parameters() if p.requires_grad]
    losses = train(model, optimizer, steps)
    assert losses[-1] < losses[0], losses
    after = [p for p in model.parameters() if p.requires_grad]
    assert all(not torch.equal(x, y) and y.isfinite().all() for x, y in zip(before, after, strict=True))


def weights_after(
    build: Callable[..., HinaOptimizer], model: nn.Module | None = None, steps: int = 8, **options: Any
) -> list[Tensor]:
    """Weights of a fresh model after some steps of the optimizer with these options."""
    model = copy.deepcopy(image_model() if model is None else model)
    train(model, build([p for p in model.parameters() if p.requires_grad], **options), steps)
    return [p.detach().clone() for p in model.parameters() if p.requires_grad]


def acts(
    build: Callable[..., HinaOptimizer],
    options: dict[str, Any],
    without: dict[str, Any],
    model: nn.Module | None = None,
    steps: int = 8,
) -> bool:
    """Whether ``options`` lead elsewhere than the same with ``without`` on top."""
    one = weights_after(build, model, steps, **options)
    other = weights_after(build, model, steps, **{**options, **without})
    return any(not torch.equal(x, y) for x, y in zip(one, other, strict=True))


def lines(caplog: Any) -> list[str]:
    """What the package has logged for information."""
    return [r.getMessage() for r in caplog.records if r.name == "hina_optim" and r.levelno == logging.INFO]


def state_dtypes(optimizer: HinaOptimizer) -> set[torch.dtype]:
    """Dtypes of all state."""
    return {x.dtype for state in optimizer.state.values() for x in state.values() if isinstance(x, Tensor)}
