"""The recipe of CAME and streams of gradients, for its tests."""

import torch
from harness import run_technique

from hina_optim.techniques.adopt import Momentum
from hina_optim.techniques.confidence import Confidence
from hina_optim.techniques.dual_momentum import DualMomentum
from hina_optim.techniques.factored import FactoredNormalization, UnfactoredNormalization
from hina_optim.techniques.multi_scale import MultiScaleMomentum
from hina_optim.techniques.rms_clip import RmsClip

TALL, WIDE, SQUARE, CONV2D, CONV3D = (9, 3), (3, 9), (5, 5), (4, 3, 3, 2), (2, 3, 2, 2, 2)
MATRICES = [TALL, WIDE, SQUARE, CONV2D, CONV3D, (1, 6), (6, 1)]
OTHERS = [(7,), (1,), (), (0,), (0, 3)]


def draw(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def recipe(
    betas=(0.8, 0.99, 0.999),
    eps=(1e-30, 1e-16),
    threshold=1.0,
    decay=1.0,
    floor=0.0,
    long_beta=None,
    alpha=None,
    scales=(),
    scale_beta=0.9,
):
    """The recipe of CAME, with the arguments of its reference."""
    chain = [MultiScaleMomentum(scales, scale_beta)] if scales else []
    chain += [FactoredNormalization(betas[1], eps[0]), UnfactoredNormalization(betas[1], eps[0]), RmsClip(threshold)]
    chain += [Momentum(betas[0], decay, floor)]
    chain += [DualMomentum(long_beta, alpha)] if long_beta is not None else []
    return [*chain, Confidence(betas[2], eps[1])]


def directions(chain, gradients):
    """The direction of every step and the state after it."""
    state = {}
    for t, grad in enumerate(gradients, 1):
        values, state = run_technique(chain, {"grad": grad}, state, t=t)
        yield values, state


def stream(kind, steps, shape=(2, 16, 24), dtype=torch.float32):
    """Gradients of a kind: what they have in common, ``mean``, and what they have not."""
    mean = draw(*shape, seed=7, dtype=dtype)
    for t in range(steps):
        noise = draw(*shape, seed=1000 + t, dtype=dtype)
        chance = torch.rand(shape, generator=torch.Generator().manual_seed(5000 + t), dtype=dtype)
        yield {
            "noise": noise,
            "drift": mean + noise,
            "strong drift": 3 * mean + noise,
            "constant": mean,
            "alternating": mean * (-1) ** t,
            "sparse rows": noise
            * (chance.flatten(2)[:, :, :1] < 0.1).reshape(shape[0], shape[1], *[1] * (len(shape) - 2)),
            "sparse": noise * (chance < 0.02),
            "one row at first": noise * (torch.arange(shape[1]) < 1 + t // 10).reshape(-1, *[1] * (len(shape) - 2)),
            "heavy tails": noise / chance.clamp(min=1e-4).sqrt(),
            "tiny": 1e-12 * noise,
            "huge": 1e12 * noise,
            "growing": noise * 1.2**t,
            "shrinking": noise * 1.2**-t,
        }[kind]


KINDS = [
    "noise",
    "drift",
    "strong drift",
    "constant",
    "alternating",
    "sparse rows",
    "sparse",
    "one row at first",
    "heavy tails",
    "tiny",
    "huge",
    "growing",
    "shrinking",
]
