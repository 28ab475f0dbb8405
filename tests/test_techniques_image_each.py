"""Edge suppression, frequency penalty, spatial awareness, background regularization: what each one is for."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from harness import run_technique
from torch import Tensor

from hina_optim.techniques.background import BackgroundRegularization
from hina_optim.techniques.base import ParamInfo, Technique
from hina_optim.techniques.edge import EdgeSuppression
from hina_optim.techniques.frequency import FrequencyPenalty
from hina_optim.techniques.spatial import SpatialAwareness
from hina_optim.techniques.stencils import neighborhood_variance


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def trajectory(technique: Technique, grads: list[Tensor]) -> tuple[list[Tensor], dict[str, Tensor]]:
    state: dict[str, Tensor] = {}
    out = []
    for t, grad in enumerate(grads, 1):
        values, state = run_technique(technique, {"grad": grad}, state, t=t)
        out.append(values["grad"])
    return out, state


# edge suppression


@pytest.mark.parametrize("shape", [(3, 3), (40, 70), (200, 5), (2, 3, 9), (2, 3, 5, 7), (1, 2, 3, 4, 5)], ids=str)
@pytest.mark.parametrize("offset", [0.0, 0.7, 1e3])
def test_edge_leaves_a_ramp(shape: tuple[int, ...], offset: float) -> None:
    grad = torch.full((1, *shape), offset)
    for axis, slope in zip(ParamInfo(shape).spatial_axes, (0.3, -1 / 7, 1.1), strict=False):
        size = shape[axis - 1]
        grad = grad + slope * torch.arange(float(size)).reshape([-1 if a == axis else 1 for a in range(grad.ndim)])
    values, _ = run_technique(EdgeSuppression(10.0, 0.6), {"grad": grad})
    assert torch.equal(values["grad"], grad)


@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize(("shape", "spike"), [((20, 30), (8, 9)), ((20, 30), (0, 29)), ((4, 5, 5, 5), (1, 2, 2, 2))])
def test_edge_damps_a_spike(sign: float, shape: tuple[int, ...], spike: tuple[int, ...]) -> None:
    grad = torch.full((1, *shape), 0.2)
    grad[(0, *spike)] = sign * 50
    values, _ = run_technique(EdgeSuppression(0.5, 0.6), {"grad": grad})
    out = values["grad"]
    assert 0 < sign * out[(0, *spike)].item() < 0.5 * 50
    # beyond the reach of a second difference (two elements, as its ends are repeated) nothing changes
    far = torch.ones(shape, dtype=torch.bool)
    kernel = spike[:-2]  # the other kernels of a convolution are no neighbors
    far[(*kernel, *(slice(max(i - 2, 0), i + 3) for i in spike[-2:]))] = False
    assert torch.equal(out[0][far], grad[0][far])


def test_edge_threshold_marks_about_three_times_the_average() -> None:
    grad = randn(1, 300, 300)
    marked = [
        (run_technique(EdgeSuppression(1.0, threshold), {"grad": grad})[0]["grad"] != grad).float().mean().item()
        for threshold in (0.2, 0.4, 0.6)
    ]
    # for normal values: the shares beyond one, two and three deviations
    assert marked == pytest.approx([0.317, 0.0455, 0.0027], rel=0.25)


# frequency penalty


def wave(rows: int, columns: int, down: int, across: int, phase: float = 0.4) -> Tensor:
    i, j = torch.arange(rows, dtype=torch.float64).reshape(-1, 1), torch.arange(columns, dtype=torch.float64)
    return (2 * math.pi * (down * i / rows + across * j / columns) + phase).cos().reshape(1, rows, columns)


@pytest.mark.parametrize("penalty", [0.05, 0.5, 1.0])
@pytest.mark.parametrize("shape", [(8, 8), (6, 10), (64, 2), (2, 3, 4, 4), (2, 2, 6), (1, 2, 2, 4, 6)], ids=str)
def test_frequency_shrinks_a_checkerboard(penalty: float, shape: tuple[int, ...]) -> None:
    first = ParamInfo(shape).spatial_axes[0] - 1
    board = torch.stack(torch.meshgrid(*(torch.arange(s) for s in shape), indexing="ij"))[first:].sum(0)
    grad = (1.0 - 2.0 * (board % 2)).unsqueeze(0) * 3
    values, _ = run_technique(FrequencyPenalty(penalty), {"grad": grad})
    torch.testing.assert_close(values["grad"], (1 - penalty) * grad, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("rows", "columns", "down", "across", "high"),
    [
        (10, 10, 0, 0, False),
        (10, 10, 1, 1, False),
        (10, 10, 3, 0, False),  # on the cutoff
        (10, 10, 0, 7, False),  # the mirror image of 3
        (50, 25, 9, 6, False),  # (0.18, 0.24): radius 0.3
        (10, 10, 4, 0, True),
        (8, 8, 2, 0, False),
        (8, 8, 0, 2, False),
        (8, 8, 2, 2, True),  # each axis is low, the radius is not
        (7, 9, 0, 3, True),
        (7, 9, 2, 0, False),
        (7, 9, 5, 0, False),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_frequency_tells_high_from_low(
    rows: int, columns: int, down: int, across: int, high: bool, dtype: torch.dtype
) -> None:
    grad = wave(rows, columns, down, across).to(dtype)
    values, _ = run_technique(FrequencyPenalty(0.4), {"grad": grad})
    torch.testing.assert_close(values["grad"], grad * (0.6 if high else 1.0), rtol=0, atol=2e-6)


def test_frequency_keeps_the_mean_and_is_linear() -> None:
    a, b = randn(2, 11, 14) + 3, randn(2, 11, 14, seed=1)
    f = lambda g: run_technique(FrequencyPenalty(0.7), {"grad": g})[0]["grad"]  # noqa: E731
    torch.testing.assert_close(f(a).mean((1, 2)), a.mean((1, 2)))
    torch.testing.assert_close(f(2 * a - b), 2 * f(a) - f(b), rtol=1e-5, atol=1e-5)


# spatial awareness


def test_spatial_leaves_the_flat_part() -> None:
    grad = torch.full((1, 16, 16), 0.3)
    grad[:, :, 8:] = randn(1, 16, 8)
    values, state = run_technique(SpatialAwareness(0.8), {"grad": grad})
    flat = (slice(None), slice(None), slice(0, 7))
    assert torch.equal(values["grad"][flat], grad[flat])
    assert torch.equal(state["spatial_variance"][flat], torch.zeros(1, 16, 7))
    assert torch.equal(values["bump_scale"][flat], torch.full((1, 16, 7), 0.5))
    assert (values["grad"][:, :, 9:].abs() < grad[:, :, 9:].abs()).float().mean() > 0.7
    assert values["bump_scale"].amax() == 1.5


def test_spatial_leaves_what_is_flat_up_to_rounding() -> None:
    """A constant gradient comes out of the Fourier transform with rounding that varies from element to element."""
    for value in (0.1, -37.7):
        grad = torch.full((1, 30, 37), value) * (1 + 1e-7 * randn(1, 30, 37))
        smooth, _ = run_technique(FrequencyPenalty(0.5), {"grad": grad})
        assert smooth["grad"].unique().numel() > 1
        values, _ = run_technique([FrequencyPenalty(0.5), SpatialAwareness(2.0)], {"grad": grad})
        assert torch.equal(values["grad"], smooth["grad"])


def test_spatial_follows_the_variance() -> None:
    grads = [randn(1, 6, 7, seed=t) for t in range(3)]
    _, state = trajectory(SpatialAwareness(0.8), grads)
    var = [neighborhood_variance(g, (1, 2)) for g in grads]
    torch.testing.assert_close(state["spatial_variance"], 0.081 * var[0] + 0.09 * var[1] + 0.1 * var[2])


def test_neighborhood_variance_of_known_patches() -> None:
    x = torch.arange(12.0).reshape(1, 3, 4)
    variance = neighborhood_variance(x, (1, 2))
    torch.testing.assert_close(variance[0, 1, 1], x[0, :3, :3].var(correction=0))
    torch.testing.assert_close(variance[0, 0, 0], x[0, :2, :2].var(correction=0))
    torch.testing.assert_close(variance[0, 2, 1], x[0, 1:3, :3].var(correction=0))
    # a large common offset does not drown the small differences
    torch.testing.assert_close(neighborhood_variance(x + 2**20, (1, 2)), variance)


@pytest.mark.parametrize(
    ("shape", "axes"),
    [
        ((2, 6, 7), (1, 2)),
        ((1, 2, 1), (1, 2)),
        ((1, 1, 2), (1, 2)),
        ((1, 3, 2), (1, 2)),
        ((2, 2, 2, 3, 2, 4), (3, 4, 5)),
    ],
    ids=str,
)
def test_neighborhood_variance_by_definition(shape: tuple[int, ...], axes: tuple[int, ...]) -> None:
    x = randn(*shape).double()
    variance = neighborhood_variance(x, axes)
    for place in itertools.product(*(range(size) for size in shape)):
        around = [slice(max(i - 1, 0), i + 2) if dim in axes else slice(i, i + 1) for dim, i in enumerate(place)]
        torch.testing.assert_close(variance[place], x[tuple(around)].var(correction=0), rtol=1e-12, atol=0)


def test_neighborhood_variance_of_equal_elements_is_exactly_zero() -> None:
    x = torch.full((1, 9, 9), 0.1)
    x[:, :, 6:] = -37.7
    variance = neighborhood_variance(x, (1, 2))
    assert (variance[:, :, :5] == 0).all() and (variance[:, :, 7:] == 0).all() and (variance[:, :, 5:7] > 0).all()


# background regularization


def test_background_halves_what_is_always_low() -> None:
    technique = BackgroundRegularization()
    grads = []
    for t in range(200):
        grad = randn(1, 8, 10, seed=t).sign() * (1 + 0.1 * randn(1, 8, 10, seed=t + 1000))
        grad[:, :, :3] *= 0.01
        grads.append(grad)
    outs, state = trajectory(technique, grads)
    low = state["background"][:, :, :3]
    assert (low > 0.99).all()
    torch.testing.assert_close(outs[-1][:, :, :3], grads[-1][:, :, :3] * 0.5, rtol=0.01, atol=0.0)
    assert (state["background"][:, :, 3:] < 0.01).all()
    # what wakes up is freed again
    awake = randn(1, 8, 10).sign()
    for _ in range(60):
        values, state = run_technique(technique, {"grad": awake}, state)
    assert (state["background"] < 0.05).all()
    torch.testing.assert_close(values["grad"], awake, rtol=0.03, atol=0.0)


def test_background_first_step_by_hand() -> None:
    grad = torch.tensor([[4.0, -4.0, 4.0, 1.0, -3.0]])  # mean 3.2, deviation 1.166: low is what is below 2.617
    values, state = run_technique(BackgroundRegularization(), {"grad": grad})
    torch.testing.assert_close(state["background"], torch.tensor([[0.0, 0.0, 0.0, 0.05, 0.0]]))
    torch.testing.assert_close(values["grad"], torch.tensor([[4.0, -4.0, 4.0, 0.975, -3.0]]))


def test_background_takes_no_rounding_for_a_background() -> None:
    grad = randn(1, 20, 20).sign() * (0.3 + 1e-5 * randn(1, 20, 20, seed=1))
    values, _ = run_technique(BackgroundRegularization(), {"grad": grad})
    assert torch.equal(values["grad"], grad)
