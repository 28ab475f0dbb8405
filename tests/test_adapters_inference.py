"""What shapes, order and initial zeros prove of parameters without names, and what they do not."""

from __future__ import annotations

import tempfile

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from hina_optim.adapters import infer_roles


def lora(r: int, inner: int, out: int, kernel: tuple[int, ...] = ()) -> list[torch.Tensor]:
    return [torch.randn(r, inner, *kernel), torch.zeros(out, r, *(1 for _ in kernel))]


def loha(r: int, inner: int, out: int, zero: int | None = 2) -> list[torch.Tensor]:
    made = [torch.randn(out, r), torch.randn(r, inner), torch.randn(out, r), torch.randn(r, inner)]
    if zero is not None:
        made[zero].zero_()
    return made


def roles(params: list[torch.Tensor]) -> list[str | None]:
    return infer_roles(params).roles


AB = ["lora_a", "lora_b"]
LOHA = ["loha_w1_a", "loha_w1_b", "loha_w2_a", "loha_w2_b"]


def test_layers_one_after_the_other_with_one_rank_and_with_several():
    assert roles(lora(4, 16, 32) + lora(4, 32, 16) + lora(4, 16, 64)) == AB * 3
    assert roles(lora(4, 16, 32) + lora(2, 32, 16) + lora(8, 16, 64)) == AB * 3
    assert roles(loha(4, 16, 32) + loha(4, 32, 16) + lora(4, 16, 64)) == LOHA * 2 + AB


def test_convolutions():
    found = infer_roles(lora(4, 8, 32, (3, 3)) + lora(4, 32, 16, (1, 1)) + lora(4, 32, 16, (3,)))
    assert found.roles == AB * 3
    assert found.pairs == [(0, 1), (2, 3), (4, 5)] and found.adapters == [[0, 1], [2, 3], [4, 5]]


def test_loha_has_two_pairs_and_is_one_adapter():
    found = infer_roles([torch.ones(5), *loha(2, 16, 12)])
    assert found.pairs == [(1, 2), (3, 4)] and found.adapters == [[1, 2, 3, 4]]


def test_a_bottleneck_of_the_model_is_no_adapter():
    torch.manual_seed(0)
    bottleneck = nn.Sequential(nn.Linear(64, 8, bias=False), nn.Linear(8, 32, bias=False))
    found = infer_roles(list(bottleneck.parameters()))
    assert found.roles == [None, None] and found.unknown == {"product": [0, 1]}
    assert "bottleneck" in found.report and "model.named_parameters()" in found.report


def test_a_bottleneck_does_not_hide_the_adapters_elsewhere():
    bottleneck = [torch.randn(8, 64), torch.randn(32, 8)]
    assert roles([*bottleneck, *lora(4, 64, 32)]) == [None, None, *AB]


def test_a_zero_layer_behind_a_bias_is_no_adapter():
    """The initialization of many a diffusion model: the last of two layers is zero."""
    model = nn.Sequential(nn.Linear(64, 8), nn.Linear(8, 32))
    nn.init.zeros_(model[1].weight)
    assert roles(list(model.parameters())) == [None] * 4


@pytest.mark.parametrize(
    "params",
    [
        pytest.param([torch.randn(8, 12), torch.zeros(32, 8)], id="rank not well below"),
        pytest.param([torch.randn(8, 32), torch.zeros(12, 8)], id="rank not well below the other"),
        pytest.param(lora(4, 16, 32)[::-1], id="B first"),
        pytest.param([torch.zeros(4, 16), torch.zeros(32, 4)], id="both zero"),
        pytest.param([torch.zeros(4, 16), torch.randn(32, 4)], id="A zero"),
        pytest.param([torch.randn(4, 16), torch.ones(16), torch.zeros(32, 4)], id="a vector in between"),
        pytest.param([torch.randn(4, 16), torch.zeros(32, 2)], id="grouped convolution"),
        pytest.param([torch.randn(4, 4, 3, 3), torch.zeros(32, 4, 1, 1)], id="the core of a Tucker decomposition"),
        pytest.param([*lora(4, 16, 32), torch.randn(4, 16)], id="half an adapter too many"),
        pytest.param([*lora(4, 16, 32), torch.zeros(32, 32)], id="another zero matrix"),
        pytest.param(loha(4, 16, 32, zero=3), id="peft's LoHa, or a square LoKr"),
        pytest.param(loha(4, 16, 32, zero=None), id="trained LoHa"),
        pytest.param(
            [torch.zeros(4, 16), torch.randn(4, 16), torch.zeros(8, 4), torch.randn(8, 4)], id="two LoKr of peft"
        ),
        pytest.param(
            # the middle layer has not learned anything: with its neighbors it looks like a LoHa
            [torch.randn(4, 16), torch.randn(16, 4), *lora(4, 16, 16), torch.randn(4, 16), torch.randn(16, 4)],
            id="three LoRA, two of them trained",
        ),
        pytest.param([p.to("meta") for p in lora(4, 16, 32)], id="no values"),
        pytest.param([p.flatten() for p in lora(4, 16, 32)], id="flat partitions"),
        pytest.param([torch.randn(0, 16), torch.zeros(32, 0)], id="empty"),
        pytest.param([], id="nothing"),
    ],
)
def test_what_is_not_proven_is_not_guessed(params):
    found = infer_roles(params)
    assert found.roles == [None] * len(params)
    assert found.pairs == [] and found.adapters == []
    assert sorted(i for places in found.unknown.values() for i in places) == list(range(len(params)))
    assert bool(found.report) == bool(params)


def test_reasons():
    assert infer_roles([*lora(4, 16, 32), torch.zeros(32, 32)]).unknown == {"doubtful": [0, 1], "matrix": [2]}
    assert infer_roles([torch.randn(4, 16), torch.randn(32, 4), torch.ones(3)]).unknown == {
        "product": [0, 1],
        "vector": [2],
    }
    meta = infer_roles([p.to("meta") for p in lora(4, 16, 32)])
    assert meta.unknown == {"hidden": [0, 1]} and "meta" in meta.report


def test_all_known_has_nothing_to_report():
    found = infer_roles(lora(4, 16, 32))
    assert found.unknown == {} and found.report == ""


def test_the_report_counts_and_stays_short():
    report = infer_roles([*lora(4, 16, 32), *(torch.ones(3) for _ in range(1000))]).report
    assert "2 of 1002" in report and "- 1000 (at 2, 3, 4, 5, 6, 7, 8, 9, …): one dimension" in report
    assert len(report) < 600


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtypes(dtype):
    params = [p.to(dtype) for p in lora(4, 16, 32)]
    assert roles(params) == AB
    params[1][3, 2] = torch.finfo(dtype).smallest_normal
    assert roles(params) == [None, None]


def test_a_value_that_is_not_finite_is_not_zero():
    for bad in (float("nan"), float("inf")):
        params = lora(4, 16, 32)
        params[1][0, 0] = bad
        assert roles(params) == [None, None]


def test_values_are_looked_at_only_where_shapes_fit(monkeypatch):
    calls = []
    norm = torch._foreach_norm
    monkeypatch.setattr(torch, "_foreach_norm", lambda *args: calls.append(1) or norm(*args))
    infer_roles([torch.zeros(64, 64), torch.zeros(64), torch.randn(32, 64)])
    assert calls == []
    infer_roles(lora(4, 16, 32) * 50)
    assert calls == [1]


def test_nothing_is_changed_and_no_graph_is_made():
    params = [nn.Parameter(p) for p in lora(4, 16, 32)]
    before = [p.detach().clone() for p in params]
    infer_roles(params)
    assert all(torch.equal(p, old) and p.grad is None for p, old in zip(params, before, strict=True))


SIDE = st.integers(8, 20)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.one_of(
            st.tuples(st.just("lora"), st.integers(1, 4), SIDE, SIDE),
            st.tuples(st.just("loha"), st.integers(1, 4), SIDE, SIDE),
            st.tuples(st.just("vector"), st.integers(1, 4), SIDE, SIDE),
            st.tuples(st.just("matrix"), st.integers(1, 4), SIDE, SIDE),
            st.tuples(st.just("trained"), st.integers(1, 4), SIDE, SIDE),
        ),
        max_size=8,
    )
)
def test_whatever_is_inferred_is_true(made):
    params: list[torch.Tensor] = []
    truth: list[str | None] = []
    for kind, r, inner, out in made:
        if kind in ("lora", "loha"):
            params += lora(r, inner, out) if kind == "lora" else loha(r, inner, out)
            truth += AB if kind == "lora" else LOHA
        elif kind == "trained":
            params += [torch.randn(r, inner), torch.randn(out, r)]
            truth += AB
        else:
            params += [torch.randn(out) if kind == "vector" else torch.randn(out, inner)]
            truth.append(None)
    found = infer_roles(params)
    assert all(role is None or role == true for role, true in zip(found.roles, truth, strict=True))
    if all(kind != "trained" for kind, *_ in made):  # matrices of 8 and more share no rank with adapters of 4 and less
        assert found.roles == truth


def _sharded(rank: int, store: str) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    torch.manual_seed(0)
    whole = [*lora(1, 16, 32), *lora(3, 16, 33), torch.randn(2, 16), torch.randn(33, 2)]
    whole[5][20:] = 0  # all that the second process has of it is zero
    params = [distribute_tensor(p, mesh, [Shard(0)]) for p in whole]  # of a rank of 1 the second process has nothing
    params += [distribute_tensor(p, mesh, [Replicate()]) for p in lora(4, 16, 32)]
    found = infer_roles([*params, *lora(4, 16, 32)])
    assert found.roles == [*AB, *AB, None, None, *AB, *AB], found
    dist.destroy_process_group()


@pytest.mark.slow
def test_shards_answer_together():
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_sharded, (f"{folder}/store",), nprocs=2)
