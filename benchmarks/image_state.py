"""What is lost where image techniques keep means of rows and columns, or where state has few bits: ``python -m
benchmarks.image_state`` trains a small flow-matching model on photographs and prints the loss on others.

The photographs come with scikit-image. All runs of a seed have the same initial weights, patches and noise. The
learning rate is the best of a grid for the first way, with all state in fp32, found on a seed that is not reported.
"""

from __future__ import annotations

import argparse
import functools
import statistics
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from skimage import data
from torch import Tensor, nn
from torch.nn import functional as F

from hina_optim import create_optimizer

NAME = "Automagic_CameAMP_Improved_8Bit"
TRAINED, HELD_OUT = ("astronaut", "coffee", "chelsea", "rocket"), ("stereo_motorcycle", "retina")
SIDE, BATCH, WIDTH = 16, 16, 32
RATES = (8e-4, 1.6e-3, 3.2e-3, 6.4e-3, 1.28e-2, 2.56e-2)
TUNING_SEED = 100
OFF = {"edge_suppression": False, "spatial_awareness": False, "background_regularization": False}
#: Way → options beside ``profile="balanced"``; others are told relative to the first.
WAYS: dict[str, dict[str, Any]] = {
    "fp32, whole": {"state_precision": "fp32", "factored_image_state": False},
    "fp32, means": {"state_precision": "fp32"},
    "8 bits, whole": {"state_precision": "8bit", "factored_image_state": False},
    "8 bits, means": {"state_precision": "8bit"},
    "4 bits, whole": {"factored_image_state": False},
    "4 bits, means (the profile)": {},
    "fp32, no image techniques": {"state_precision": "fp32", **OFF},
}


class Block(nn.Module):
    """Residual block: two kernels, and a perceptron over channels."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = (nn.Conv2d(WIDTH, WIDTH, 3, padding=1) for _ in range(2))
        self.norm = nn.GroupNorm(4, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        """``x``: [N, WIDTH, SIDE, SIDE], ``time``: [N, WIDTH]."""
        x = x + self.second(F.silu(self.first(F.silu(self.norm(x) + time[:, :, None, None]))))
        return x + self.down(F.silu(self.up(x.movedim(1, -1)))).movedim(-1, 1)


class Velocity(nn.Module):
    """Velocity of a patch on its way from noise."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.leave = nn.Conv2d(3, WIDTH, 3, padding=1), nn.Conv2d(WIDTH, 3, 3, padding=1)
        self.time = nn.Sequential(nn.Linear(16, WIDTH), nn.SiLU(), nn.Linear(WIDTH, WIDTH))
        self.blocks = nn.ModuleList(Block() for _ in range(2))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """``x``: [N, 3, SIDE, SIDE], ``t``: [N] in [0, 1]."""
        angles = t[:, None] * torch.pi * 2.0 ** torch.arange(-1, 7)
        time = self.time(torch.cat((angles.sin(), angles.cos()), 1))
        x = self.enter(x)
        for block in self.blocks:
            x = block(x, time)
        return self.leave(x)


@functools.cache
def photographs(names: tuple[str, ...]) -> list[Tensor]:
    """Images in [-1, 1], ``[3, height, width]``."""
    found = [getattr(data, name)() for name in names]
    pictures = [image[0] if isinstance(image, tuple) else image for image in found]
    return [torch.from_numpy(np.ascontiguousarray(one)).movedim(-1, 0)[:3].float() / 127.5 - 1 for one in pictures]


def batches(images: list[Tensor], size: int, seed: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Patches on the way from noise, the time, and the velocity."""
    generator = torch.Generator().manual_seed(seed)

    def below(n: int) -> int:
        return int(torch.randint(n, (), generator=generator))

    while True:
        patches = []
        for _ in range(size):
            image = images[below(len(images))]
            y, x = below(image.shape[1] - SIDE), below(image.shape[2] - SIDE)
            patches.append(image[:, y : y + SIDE, x : x + SIDE])
        clean = torch.stack(patches)
        noise = torch.randn(clean.shape, generator=generator)
        t = torch.rand(size, generator=generator)
        yield torch.lerp(clean, noise, t[:, None, None, None]), t, noise - clean


def loss(options: dict[str, Any], lr: float, seed: int, steps: int, patches: int = 1024) -> float:
    """Mean squared error on ``patches`` of held-out photographs after ``steps``, the rate falling to zero."""
    torch.manual_seed(seed)
    model = Velocity()
    # the mask has time to move, and most of these matrices are small
    given = {"warmup_steps": steps // 2, "min_lr": lr / 10, "max_lr": 10 * lr, "force_8bit": True}
    optimizer = create_optimizer(
        NAME, model.named_parameters(), profile="balanced", lr=lr, verbose=False, **given, **options
    )
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: min((t + 1) / 20, 1 - t / steps))
    stream = batches(photographs(TRAINED), BATCH, seed)
    for _ in range(steps):
        x, t, velocity = next(stream)
        F.mse_loss(model(x, t), velocity).backward()
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
    with torch.no_grad():
        x, t, velocity = next(batches(photographs(HELD_OUT), patches, 0))
        return float(F.mse_loss(model(x, t), velocity))


def main() -> None:
    """Tune, train all ways with all seeds, print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--lr", type=float, help="instead of the best of the grid")
    args = parser.parse_args()
    baseline = next(iter(WAYS))
    if args.lr is None:
        tuned = {rate: loss(WAYS[baseline], rate, TUNING_SEED, args.steps) for rate in RATES}
        print("tuned:", ", ".join(f"{rate:g}: {value:.4f}" for rate, value in tuned.items()), flush=True)
        args.lr = min(tuned, key=lambda rate: tuned[rate])
    print(f"\n{NAME}, profile balanced, lr {args.lr:g}, {args.steps} steps\n")
    print("| state | " + " | ".join(f"seed {seed}" for seed in range(args.seeds)) + " | mean |")
    print("|---|" + "---:|" * (args.seeds + 1))
    base: list[float] = []
    for way, options in WAYS.items():
        found = [loss(options, args.lr, seed, args.steps) for seed in range(args.seeds)]
        if way == baseline:
            base = found
            cells = [f"{one:.4f}" for one in (*found, statistics.mean(found))]
        else:
            off = [100 * (one / was - 1) for one, was in zip(found, base, strict=True)]
            cells = [f"{one:+.2f} %" for one in (*off, statistics.mean(off))]
        print(f"| {way} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
