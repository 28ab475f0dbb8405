"""State of image techniques of which means of rows and columns are kept (the references compare it, too)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from hina_optim import Automagic_CameAMP_Improved_8Bit, HinaAdaptive
from hina_optim.reference.hina_adaptive import ReferenceHinaAdaptive
from tests.optim_cases import NOTHING
from tests.shards import run_sharded

SHAPES = [(6, 5), (4, 3, 2, 2), (7,), (2, 2), (3, 2, 1, 1)]
IMAGES: dict[str, Any] = {"spatial_awareness": True, "background_regularization": True, "use_lr_mask": True}
MEANS = {"spatial_variance_row", "spatial_variance_col", "background_row", "background_col"}


def start() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in SHAPES]


def gradients(step: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(step + 2)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in SHAPES]


@pytest.mark.parametrize("switched", [0, 4])
def test_it_is_what_the_means_of_whole_state_say(switched: int) -> None:
    """From the beginning, and from the middle of a training on: the means are those of what was there."""
    options: dict[str, Any] = {**NOTHING, **IMAGES, "lr": 1e-3, "max_lr": 1e-2}
    params = [nn.Parameter(w) for w in start()]
    optimizer = HinaAdaptive(params, **options, factored_image_state=switched == 0)
    reference = ReferenceHinaAdaptive(start(), **options, factored_image_state=switched == 0)
    for step in range(9):
        if step and step == switched:
            optimizer.change_options([{"factored_image_state": True}])
            reference.param_groups[0]["factored_image_state"] = True
        for p, g in zip(params, gradients(step), strict=True):
            p.grad = g
        optimizer.step()
        reference.step(gradients(step))
    assert optimizer.state[params[0]].keys() >= MEANS and not optimizer.state[params[3]].keys() & MEANS
    assert not {"spatial_variance", "background"} & optimizer.state[params[1]].keys()
    for p, q, w in zip(params, reference.params, start(), strict=True):
        moved = (q - w).abs().max()
        assert moved > 1e-4 and (p.detach() - q).abs().max() <= 1e-8 * moved


def test_whole_again() -> None:
    """Switched off, it begins with what the means say."""
    params = [nn.Parameter(w) for w in start()]
    optimizer = HinaAdaptive(params, **{**NOTHING, **IMAGES}, lr=1e-3, max_lr=1e-2, factored_image_state=True)  # type: ignore[arg-type]
    for p, g in zip(params, gradients(0), strict=True):
        p.grad = g
    optimizer.step()
    rows = optimizer.state[params[0]]["spatial_variance_row"].clone()
    optimizer.change_options([{"factored_image_state": False}])
    whole = optimizer._buckets.decoded(params[0], "spatial_variance")
    torch.testing.assert_close(whole.mean(1), rows)
    assert not MEANS & optimizer.state[params[0]].keys()


@pytest.mark.parametrize("by_rows", [True, False])
@pytest.mark.parametrize("more", [{}, {"max_buffer_memory_mb": 0.05}], ids=["whole", "chunks"])
def test_shards(by_rows: bool, more: dict[str, Any]) -> None:
    """Rows and ranges that are cut anywhere, empty ones too, and chunks of them: the trajectory of one process."""
    generator = torch.Generator().manual_seed(1)
    shapes = [(40, 50), (6, 5, 3, 3), (7,), (2, 2)]
    full = [(f"p{i}", torch.randn(s, generator=generator, dtype=torch.float64)) for i, s in enumerate(shapes)]

    def given(step: int) -> list[torch.Tensor]:
        own = torch.Generator().manual_seed(step + 2)
        return [torch.randn(s, generator=own, dtype=torch.float64) for s in shapes]

    def make(named: list[tuple[str, nn.Parameter]]) -> HinaAdaptive:
        options: dict[str, Any] = {**NOTHING, **IMAGES, **more, "lr": 1e-3, "max_lr": 1e-2}
        return HinaAdaptive(named, **options, factored_image_state=True)

    alone = [(name, nn.Parameter(value.clone())) for name, value in full]
    optimizer = make(alone)
    for step in range(5):
        for (_, p), g in zip(alone, given(step), strict=True):
            p.grad = g
        optimizer.step()
    found, _ = run_sharded(full, given, make, size=3, steps=5, by_rows=by_rows)
    for (_, p), value, (_, begin) in zip(alone, found, full, strict=True):
        moved = float((p.detach() - begin).abs().max())
        assert moved > 1e-4 and float((value.reshape(p.shape) - p.detach()).abs().max()) < 1e-10 * moved


def test_a_profile_with_everything_on() -> None:
    """2.6 bytes a parameter of a large matrix was the goal."""
    weight = nn.Parameter(torch.randn(512, 2048) / 32)
    optimizer = Automagic_CameAMP_Improved_8Bit([("w", weight)], profile="balanced", lr=1e-4)
    optimizer.init_state()
    assert {"exp_avg", "exp_avg_long", "lr_mask", "last_sign", *MEANS} <= optimizer.state[weight].keys()
    assert optimizer.state_bytes() / weight.numel() < 2.6
    features = optimizer.get_optimization_info()["features"]
    assert features["spatial_awareness"] and features["background_regularization"]
