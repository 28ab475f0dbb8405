"""Steps of ZeRO and FSDP1 as their engines make them: by group, by sub-group, clipped, accumulated, offloaded.

Gradients are given exactly (:class:`tests.sharded.flat.Given`): one process that gets the same ones is the yardstick.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel

from hina_lightning.sharding import bind
from hina_optim.engine.fragments import FlatLayout
from hina_optim.engine.optimizer import HinaOptimizer
from tests.every_optimizer import LR, large, loss_of, make
from tests.sharded.flat import Given, initialized, load_deepspeed, wrapped
from tests.sharded.world import run

STEPS = 10  # every phase, interval and warm-up; the matrix takes 20
OFFLOAD = {"offload_optimizer": {"device": "cpu"}}
BF16 = {"bf16": {"enabled": True}}


@dataclass(frozen=True)
class Case:
    """What is stepped, and how.

    Attributes:
        name: Of the optimizer; everything is on.
        engine: ``"zero2"`` or ``"FULL_SHARD"``.
        options: DeepSpeed's configuration; of FSDP1 ``originals``.
        groups: 2 deals parameters out in turn, so that the factors of the LoRA pair are in different groups.
        clip: The largest norm of all gradients together; 0 for none.
        parts: Micro-batches a step.
        bf16: Whether the model computes in bf16, and with that its gradients.
        state: Precision of the state.
        moves: Whether everything is moved away and back between two steps.
    """

    name: str
    engine: str
    options: dict[str, Any] = field(default_factory=dict)
    groups: int = 1
    clip: float = 0.0
    parts: int = 1
    bf16: bool = False
    state: str = "fp32"
    moves: bool = False


#: Two ranks.
PAIR = [
    Case("HinaAdaptive", "zero1", groups=2, moves=True),
    Case("Automagic_CameAMP_Improved", "zero2", {"gradient_clipping": 0.5}, clip=0.5),
    Case("AdaptiveHinaAdamW", "zero2", {"zero_force_ds_cpu_optimizer": False, "zero": OFFLOAD}, parts=2),
    Case("HinaAdaptive", "zero2", {"zero": {"round_robin_gradients": True}}, state="bf16"),
    # every parameter a sub-group: the factors of the LoRA pair are never stepped together
    Case("HinaAdaptive", "zero3", {"zero": {"sub_group_size": 1}}),
    Case("RefactoredAutomagicCameAMP", "zero3", {"zero": {"sub_group_size": 4000}}, groups=2),
    Case("Automagic_CameAMP", "zero3", {"zero_force_ds_cpu_optimizer": False, "zero": OFFLOAD}, state="bf16"),
    Case("HinaAdaptive", "zero0", BF16, bf16=True),
    Case("HinaAdaptive", "zero1", {**BF16, "data_types": {"grad_accum_dtype": "fp32"}}, groups=2, bf16=True),
    Case("HinaAdaptive", "zero3", BF16, bf16=True),
    Case("HinaAdaptive", "FULL_SHARD", {"originals": True}, groups=2),
    Case("Automagic_CameAMP_COptim", "SHARD_GRAD_OP", {"originals": False}, parts=2),
    Case("HinaAdamWOptimizer", "NO_SHARD", {"originals": False}),
    Case("HinaAdaptive", "NO_SHARD", {"originals": True}),
]
#: Four ranks.
FOUR = [
    Case("HinaAdaptive", "zero2", groups=2),
    Case("Automagic_CameAMP_Improved", "zero3", {"zero": {"sub_group_size": 3000}}),
    Case("Automagic_CameAMP", "HYBRID_SHARD", {"originals": True}),
    Case("HinaAdaptive", "FULL_SHARD", {"originals": False}),
]

Weights = dict[str, Tensor]


def start(bf16: bool = False) -> Weights:
    """First weights, in float32; where the model computes in bf16, such as it can hold."""
    dtype = torch.bfloat16 if bf16 else torch.float32
    return {name if name.endswith(".weight") else f"{name}.weight": p.detach().to(dtype).float() for name, p in large()}


def gradients(step: int) -> Weights:
    noise, drift = torch.Generator().manual_seed(500 + step), torch.Generator().manual_seed(11)
    shapes = {name: value.shape for name, value in start().items()}
    return {n: torch.randn(s, generator=noise) + torch.randn(s, generator=drift) for n, s in shapes.items()}


def optimizer_of(case: Case, model: nn.Module) -> HinaOptimizer:
    every = list(model.named_parameters())
    groups = [{"params": every[i :: case.groups], "lr": LR * (1 + i)} for i in range(case.groups)]
    return make(case.name, groups, state_precision=case.state)


def alone(case: Case) -> Weights:
    """The same in one process; under bf16 the float32 weights that belong to bf16 gradients."""
    torch.set_num_threads(1)
    model = Given(start(case.bf16))
    optimizer = optimizer_of(case, model)
    for step in range(STEPS):
        given = gradients(step)
        for name, p in model.named_parameters():
            p.grad = given[name].bfloat16().float() if case.bf16 else given[name]
        if case.clip:
            nn.utils.clip_grad_norm_(model.parameters(), case.clip)
        optimizer.report_loss(loss_of(step))
        optimizer.step()
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def with_zero(case: Case) -> Weights:
    import deepspeed

    stage = int(case.engine[-1])
    model = Given(start())
    optimizer = optimizer_of(case, model)
    options = {key: dict(value) if isinstance(value, dict) else value for key, value in case.options.items()}
    engine = initialized(model, optimizer, stage, gradient_accumulation_steps=case.parts, **options)
    bind(optimizer, engine)
    layout = optimizer._layout
    assert isinstance(layout, FlatLayout) == (stage > 0)
    for step in range(STEPS):
        for part in range(case.parts):  # parts of different weight, whose mean is the gradient
            given = {name: 2 * g * (part + 1) / (case.parts + 1) for name, g in gradients(step).items()}
            optimizer.report_loss(loss_of(step))
            engine.backward(engine(given))
            engine.step()
        if case.moves and step == 7:
            engine.offload_states(pin_memory=False)
            engine.reload_states()
    bind(optimizer, engine)
    assert optimizer._layout is layout, "bound again"
    masters = {}
    if stage == 0:
        for p, (name, _) in zip(optimizer.param_groups[0]["params"], model.named_parameters(), strict=True):
            masters[name] = p.detach().clone()
        return masters
    for name, p in engine.module.named_parameters():
        with deepspeed.zero.GatheredParameters([p]) if stage == 3 else contextlib.nullcontext():
            masters[name] = p.detach().clone()
    return masters


def with_fsdp1(case: Case) -> Weights:
    model = wrapped(Given(start()), case.engine, case.options["originals"], ("blocks", "kernel"))
    optimizer = optimizer_of(case, model)
    bind(optimizer, model)
    for step in range(STEPS):
        optimizer.zero_grad()
        for part in range(case.parts):
            model(
                {name: 2 * g * (part + 1) / (case.parts + 1) / case.parts for name, g in gradients(step).items()}
            ).backward()
        optimizer.report_loss(loss_of(step))
        optimizer.step()
    with FullyShardedDataParallel.summon_full_params(model):
        return {n.replace("_fsdp_wrapped_module.", ""): p.detach().clone() for n, p in model.named_parameters()}


def rank_main(rank: int, cases: list[Case]) -> list[Weights]:
    return [with_zero(case) if case.engine.startswith("zero") else with_fsdp1(case) for case in cases]


CASES = {2: PAIR, 4: FOUR}


@pytest.fixture(scope="module", params=[2, pytest.param(4, marks=pytest.mark.sharded)], ids="{} ranks".format)
def ranks(request: pytest.FixtureRequest) -> tuple[list[Case], list[list[Weights]]]:
    """All cases of a size, in one world."""
    load_deepspeed()
    cases = CASES[request.param]
    return cases, run(rank_main, request.param, cases, limit=240)


def test_steps_are_those_of_one_process(ranks: tuple[list[Case], list[list[Weights]]]) -> None:
    cases, results = ranks
    for number, case in enumerate(cases):
        check(case, [rank[number] for rank in results])


def check(case: Case, found: list[Weights]) -> None:
    expected, begin = alone(case), start(case.bf16)
    for name, value in expected.items():
        for other in found[1:]:
            assert torch.equal(other[name], found[0][name]), f"{case}: {name} differs between ranks"
        here = found[0][name]
        if here.dtype == torch.bfloat16:  # of the model's weights, which are rounded: here and there to the other side
            wanted = value.bfloat16().double()
            assert bool(((here.double() - wanted).abs() <= wanted.abs() * 2.0**-7 + 1e-6).all()), (case, name)
            assert int((here.double() != wanted).sum()) <= max(1, value.numel() / 1000), (case, name)
            continue
        moved = (value.double() - begin[name].double()).norm()
        assert (here.double() - value.double()).norm() < 1e-4 * moved, (case, name)
        # a threshold may fall to the other side for one element in thousands
        close = torch.isclose(here, value, rtol=1e-6, atol=1e-6)
        assert int((~close).sum()) <= value.numel() / 1000, (case, name)
