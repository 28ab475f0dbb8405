"""What edge, frequency, spatial and background techniques have in common: float64 reference, laws, where they apply."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from harness import run_technique
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hina_optim.reference import image as reference
from hina_optim.techniques.background import BackgroundRegularization
from hina_optim.techniques.base import Flow, ParamInfo, Technique
from hina_optim.techniques.edge import EdgeSuppression
from hina_optim.techniques.frequency import FrequencyPenalty
from hina_optim.techniques.spatial import SpatialAwareness

TECHNIQUES: dict[str, Callable[[], Technique]] = {
    "edge": lambda: EdgeSuppression(0.5, 0.25),
    "frequency": lambda: FrequencyPenalty(0.3),
    "spatial": lambda: SpatialAwareness(0.8),
    "background": BackgroundRegularization,
}
#: those that multiply every element by a number in (0, 1]
POINTWISE = ("edge", "spatial", "background")
SLOT = {"spatial": "spatial_variance", "background": "background"}
SHAPES: list[tuple[int, ...]] = [(), (7,), (0, 5), (1, 1), (2, 2), (1, 6), (6, 1), (3, 4), (10, 7), (4, 13), (2, 3, 5)]
SHAPES += [(3, 2, 3, 3), (2, 2, 1, 1), (2, 2, 1, 4), (2, 1, 3, 2, 4)]
every_technique = pytest.mark.parametrize("name", TECHNIQUES)


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def with_spikes(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Noise with some strong and some weak elements, so that every technique finds something to do."""
    return randn(*shape, seed=seed, dtype=dtype) * randn(*shape, seed=seed + 1, dtype=dtype).abs()


def trajectory(technique: Technique, grads: list[Tensor]) -> tuple[list[Tensor], dict[str, Tensor]]:
    state: dict[str, Tensor] = {}
    out = []
    for t, grad in enumerate(grads, 1):
        values, state = run_technique(technique, {"grad": grad}, state, t=t)
        out.append(values["grad"])
    return out, state


def reference_step(technique: Technique, grad: Tensor, state: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    if isinstance(technique, EdgeSuppression):
        return reference.edge_suppression(grad, technique.edge_penalty, technique.edge_threshold), state, None
    if isinstance(technique, FrequencyPenalty):
        return reference.frequency_penalty(grad, technique.frequency_penalty), state, None
    if isinstance(technique, SpatialAwareness):
        return reference.spatial_awareness(grad, state, technique.detail_preservation)
    return (*reference.background_regularization(grad, state), None)


def compare_with_reference(name: str, technique: Technique, grads: list[Tensor], rtol: float, atol: float) -> None:
    """Several steps of a batch against the loops, each parameter of the batch by itself."""
    state: dict[str, Tensor] = {}
    plain = [torch.zeros(grads[0].shape[1:], dtype=torch.float64) for _ in grads[0]]
    applies = technique.applies(ParamInfo(tuple(grads[0].shape[1:])))
    for t, grad in enumerate(grads, 1):
        values, state = run_technique(technique, {"grad": grad}, state, t=t)
        size = grad.abs().max().item() if grad.numel() else 1.0
        for i, one in enumerate(grad):
            expected, plain[i], bump = reference_step(technique, one, plain[i])
            torch.testing.assert_close(values["grad"][i].double(), expected, rtol=rtol, atol=atol * size)
            if applies and name in SLOT:
                torch.testing.assert_close(state[SLOT[name]][i].double(), plain[i], rtol=rtol, atol=atol * size**2)
            if applies and bump is not None:
                torch.testing.assert_close(values["bump_scale"][i].double(), bump, rtol=rtol, atol=atol)


@every_technique
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
def test_equals_reference(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    grads = [with_spikes(2, *shape, seed=10 * t, dtype=dtype) for t in range(4)]
    rtol, atol = (1e-10, 1e-12) if dtype == torch.float64 else (2e-5, 1e-6)
    compare_with_reference(name, TECHNIQUES[name](), grads, rtol, atol)


@settings(max_examples=25, deadline=None)
@given(
    shape=st.lists(st.integers(1, 6), min_size=1, max_size=4),
    exponent=st.integers(-12, 12),
    strength=st.sampled_from([0.05, 0.4, 1.0]),
    threshold=st.sampled_from([0.05, 0.27, 0.6]),
    seed=st.integers(0, 2**20),
)
def test_equals_reference_drawn(shape: list[int], exponent: int, strength: float, threshold: float, seed: int) -> None:
    grads = [with_spikes(2, *shape, seed=seed + 7 * t, dtype=torch.float64) * 10.0**exponent for t in range(2)]
    drawn = {
        "edge": EdgeSuppression(3 * strength, threshold),
        "frequency": FrequencyPenalty(strength),
        "spatial": SpatialAwareness(2 * strength),
        "background": BackgroundRegularization(),
    }
    for name, technique in drawn.items():
        compare_with_reference(name, technique, grads, 1e-9, 1e-12)


@every_technique
def test_acts(name: str) -> None:
    """On noise with spikes everyone finds something to do: the tests below do not pass by doing nothing."""
    grad = with_spikes(1, 16, 12)
    (out,), _ = trajectory(TECHNIQUES[name](), [grad])
    assert (out != grad).float().mean() > 0.05
    assert (out - grad).norm() > 1e-3 * grad.norm()


@every_technique
@pytest.mark.parametrize("scale", [1e3, 1e-3])
@pytest.mark.parametrize("shape", [(16, 12), (4, 3, 5, 5)], ids=str)
def test_scale_of_the_loss_does_not_matter(name: str, scale: float, shape: tuple[int, ...]) -> None:
    grads = [with_spikes(2, *shape, seed=10 * t) for t in range(3)]
    plain, _ = trajectory(TECHNIQUES[name](), grads)
    scaled, _ = trajectory(TECHNIQUES[name](), [scale * g for g in grads])
    for a, b in zip(plain, scaled, strict=True):
        torch.testing.assert_close(b / scale, a, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["edge", "frequency"])
@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_scale_does_not_matter_where_squares_vanish_or_overflow(name: str, scale: float) -> None:
    grad = with_spikes(2, 9, 8)
    (plain,), _ = trajectory(TECHNIQUES[name](), [grad])
    (scaled,), _ = trajectory(TECHNIQUES[name](), [scale * grad])
    torch.testing.assert_close(scaled / scale, plain, rtol=1e-5, atol=1e-6)


@every_technique
def test_odd_and_pure(name: str) -> None:
    grads = [with_spikes(2, 9, 8, seed=10 * t) for t in range(3)]
    before = [g.clone() for g in grads]
    plus, _ = trajectory(TECHNIQUES[name](), grads)
    minus, _ = trajectory(TECHNIQUES[name](), [-g for g in grads])
    for a, b, g, was in zip(plus, minus, grads, before, strict=True):
        assert torch.equal(b, -a)
        assert torch.equal(g, was)


@every_technique
@pytest.mark.parametrize("shape", [(16, 12), (5,), (2, 2, 3, 3, 3)], ids=str)
def test_energy_never_grows(name: str, shape: tuple[int, ...]) -> None:
    grads = [with_spikes(3, *shape, seed=10 * t) for t in range(3)]
    for grad, out in zip(grads, trajectory(TECHNIQUES[name](), grads)[0], strict=True):
        dims = tuple(range(1, grad.ndim))
        assert (out.square().sum(dims) <= grad.square().sum(dims) * (1 + 1e-6)).all()
        if name in POINTWISE:
            assert (out.abs() <= grad.abs()).all()
            assert torch.equal(out.sign(), grad.sign())


@every_technique
@pytest.mark.parametrize("shape", [(6, 5), (3, 2, 3, 3), (4,)], ids=str)
def test_zero_gradient_stays_zero(name: str, shape: tuple[int, ...]) -> None:
    zero = torch.zeros(1, *shape)
    outs, state = trajectory(TECHNIQUES[name](), [zero, with_spikes(1, *shape), zero])
    assert torch.equal(outs[0], zero)
    assert torch.equal(outs[2], zero)
    assert all(s.isfinite().all() for s in state.values())


@every_technique
@pytest.mark.parametrize("size", [1e-42, 1e-30, 1e15, 1e20, 1e30])
def test_extreme_gradients_stay_finite(name: str, size: float) -> None:
    grads = [with_spikes(1, 8, 8, seed=10 * t) * s for t, s in enumerate((size, size, 1.0))]
    outs, state = trajectory(TECHNIQUES[name](), grads)
    assert all(x.isfinite().all() for x in (*outs, *state.values()))


@every_technique
@pytest.mark.parametrize("shape", [(9, 8), (3, 2, 3, 3)], ids=str)
def test_batch_equals_singles(name: str, shape: tuple[int, ...]) -> None:
    """Parameters of very different size in one batch do not see each other."""
    sizes = torch.tensor([1.0, 1e-4, 1e4]).reshape(3, *([1] * len(shape)))
    grads = [with_spikes(3, *shape, seed=10 * t) * sizes for t in range(3)]
    batch, state = trajectory(TECHNIQUES[name](), grads)
    for i in range(3):
        alone, alone_state = trajectory(TECHNIQUES[name](), [g[i : i + 1] for g in grads])
        for a, b in zip(alone, batch, strict=True):
            torch.testing.assert_close(b[i : i + 1] / sizes[i], a / sizes[i], rtol=1e-5, atol=1e-7)
        for key, value in alone_state.items():
            torch.testing.assert_close(state[key][i : i + 1], value, rtol=1e-5, atol=0.0)


@every_technique
@pytest.mark.parametrize("shape", [(3, 4), (4, 3), (2, 2), (1, 3), (2, 3, 3, 4), (2, 2, 3)], ids=str)
def test_reads_nothing_but_the_gradient(name: str, shape: tuple[int, ...]) -> None:
    """Neither fresh memory (filled with NaN here) nor what lies around a strided view gets into the result."""
    grad = with_spikes(2, *shape)
    expected, _ = trajectory(TECHNIQUES[name](), [grad, grad])
    framed = torch.full((2, *(s + 2 for s in shape)), math.nan)
    view = framed[(slice(None), *(slice(1, -1) for _ in shape))]
    view.copy_(grad)
    turned = grad.transpose(0, -1).contiguous().transpose(0, -1)
    was = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    try:
        for layout in (grad, view, turned):
            outs, _ = trajectory(TECHNIQUES[name](), [layout, layout])
            for a, b in zip(expected, outs, strict=True):
                torch.testing.assert_close(b, a, rtol=1e-6, atol=1e-7)
    finally:
        torch.use_deterministic_algorithms(was)


@every_technique
def test_broadcast_gradient(name: str) -> None:
    """The gradient of a sum is one number expanded: all elements share their memory."""
    grad = torch.tensor([[[2.0], [-1.0], [7.0], [0.5]]]).expand(1, 4, 6)
    outs, _ = trajectory(TECHNIQUES[name](), [grad, grad])
    dense, _ = trajectory(TECHNIQUES[name](), [grad.contiguous(), grad.contiguous()])
    for a, b in zip(dense, outs, strict=True):
        torch.testing.assert_close(b, a)


@pytest.mark.parametrize("name", SLOT)
def test_state_is_returned_not_written(name: str) -> None:
    technique, grads = TECHNIQUES[name](), [with_spikes(1, 6, 5, seed=10 * t) for t in range(2)]
    key = SLOT[name]
    assert [slot.name for slot in technique.slots(ParamInfo((6, 5)))] == [key]
    _, first = run_technique(technique, {"grad": grads[0]})
    assert first[key].abs().sum() > 0
    kept = first[key].clone()
    _, second = run_technique(technique, {"grad": grads[1]}, first, t=2)
    assert torch.equal(first[key], kept)
    assert not torch.equal(second[key], kept)


@pytest.mark.parametrize("name", ["edge", "frequency"])
def test_stateless(name: str) -> None:
    assert TECHNIQUES[name]().slots(ParamInfo((6, 5))) == ()


@every_technique
def test_shards_with_global_totals_equal_the_whole(name: str) -> None:
    """All but whole_matrix sees a piece of the parameter, uneven and empty ones included."""
    technique, info = TECHNIQUES[name](), ParamInfo((9, 8))
    grad, old = with_spikes(2, 9, 8), with_spikes(2, 9, 8, seed=5).abs() * 0.2
    key = SLOT.get(name, "")
    values, state = run_technique(technique, {"grad": grad}, {key: old})
    pieces = [slice(0, 5), slice(5, 5), slice(5, 9)]
    whole = technique.whole_matrix(Flow({"grad": grad}, {}, {}, {}, info), grad) if technique.whole else None
    flows = [Flow({"grad": grad[:, p]}, {key: old[:, p]}, {}, {}, info) for p in pieces]
    totals: dict[str, Tensor] = {}
    for flow, piece in zip(flows, pieces, strict=True):
        if whole is not None:
            flow[f"{name}.whole"] = whole[:, piece]
        technique.transform(flow)
        for k, v in technique.sums(flow).items():
            assert isinstance(v, Tensor)
            totals[k] = totals.get(k, torch.zeros(2, 1, 1)) + v.sum((1, 2), keepdim=True)
    for flow in flows:
        technique.settle(flow, totals)
    torch.testing.assert_close(torch.cat([f["grad"] for f in flows], 1), values["grad"])
    if key:
        torch.testing.assert_close(torch.cat([f.new[key] for f in flows], 1), state[key])


@pytest.mark.parametrize("name", ["edge", "spatial", "background"])
@pytest.mark.parametrize("shape", [(50, 60), (4, 4, 3, 3)], ids=str)
def test_constant_gradient_is_untouched(name: str, shape: tuple[int, ...]) -> None:
    for value in (0.1, -1 / 3, 1e-5, 12345.678):
        grad = torch.full((1, *shape), value)
        outs, _ = trajectory(TECHNIQUES[name](), [grad] * 3)
        assert all(torch.equal(out, grad) for out in outs)


# where they apply, what they refuse, how they trace


@pytest.mark.parametrize(
    ("shape", "edge", "frequency", "spatial", "background"),
    [
        ((), False, False, False, False),
        ((1,), False, False, False, False),
        ((9,), False, False, False, True),
        ((0, 9), False, False, False, False),
        ((1, 1), False, False, False, False),
        ((2, 2), False, True, True, True),
        ((1, 3), True, True, True, True),
        ((64, 32, 1, 1), False, False, False, True),
        ((64, 32, 1), False, False, False, True),
        ((64, 32, 3), True, True, True, True),
        ((64, 32, 1, 2), False, True, True, True),
        ((0, 32, 3, 3), False, False, False, False),
    ],
)
def test_applies(shape: tuple[int, ...], edge: bool, frequency: bool, spatial: bool, background: bool) -> None:
    expected = {"edge": edge, "frequency": frequency, "spatial": spatial, "background": background}
    assert {name: make().applies(ParamInfo(shape)) for name, make in TECHNIQUES.items()} == expected


def test_switched_off_by_zero() -> None:
    assert not EdgeSuppression(0.0, 0.6).applies(ParamInfo((9, 9)))
    assert not FrequencyPenalty(0.0).applies(ParamInfo((9, 9)))


@pytest.mark.parametrize(
    ("make", "argument"),
    [
        (lambda: EdgeSuppression(-0.1, 0.6), "edge_penalty=-0.1"),
        (lambda: EdgeSuppression(math.inf, 0.6), "edge_penalty=inf"),
        (lambda: EdgeSuppression(0.1, 0.0), "edge_threshold=0.0"),
        (lambda: FrequencyPenalty(1.5), "frequency_penalty=1.5"),
        (lambda: FrequencyPenalty(math.nan), "frequency_penalty=nan"),
        (lambda: SpatialAwareness(-1.0), "detail_preservation=-1.0"),
    ],
)
def test_senseless_arguments(make: Callable[[], Technique], argument: str) -> None:
    with pytest.raises(ValueError, match=argument):
        make()


@every_technique
@pytest.mark.parametrize("shape", [(6, 5), (2, 3, 3, 3)], ids=str)
def test_traces_as_one_graph(name: str, shape: tuple[int, ...]) -> None:
    technique, info, key = TECHNIQUES[name](), ParamInfo(shape), SLOT.get(name, "")

    def step(grad: Tensor, old: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        flow = Flow({"grad": grad}, {key: old}, {}, {}, info)
        if technique.whole:
            flow[f"{name}.whole"] = technique.whole_matrix(flow, grad)
        technique.transform(flow)
        dims = tuple(range(1, grad.ndim))
        totals = {k: v.sum(dims, keepdim=True) for k, v in technique.sums(flow).items() if isinstance(v, Tensor)}
        technique.settle(flow, totals)
        return flow["grad"], flow.new

    grad, old = with_spikes(2, *shape), with_spikes(2, *shape, seed=5).abs() * 0.1
    torch._dynamo.reset()
    traced = torch.compile(step, fullgraph=True, backend="eager")(grad, old)
    torch.testing.assert_close(traced, step(grad, old))
