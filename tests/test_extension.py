"""A user's own technique in a recipe of their own: every kind that there is, and errors for what cannot work."""

from __future__ import annotations

import copy
import io
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

from hina_optim import HinaAdaptive
from hina_optim import arguments as rule
from hina_optim.engine.optimizer import ENGINE_RULES, HinaOptimizer
from hina_optim.state.slot import Slot
from hina_optim.techniques.base import Flow, ParamInfo, PeriodicTechnique, Relations, Sums, Technique
from tests.optim_cases import EVERYTHING, NOTHING, give, gradients, named_params
from tests.shards import run_sharded

LR = 3e-4


class Momentum(Technique):
    """``b ← m·b + g``, ``u = b``: with state."""

    name: ClassVar[str] = "heavy_ball"
    reads: ClassVar[frozenset[str]] = frozenset({"grad"})
    writes: ClassVar[frozenset[str]] = frozenset({"update"})

    def __init__(self, momentum: float) -> None:
        self.momentum = momentum

    def slots(self, info: ParamInfo) -> tuple[Slot, ...]:
        return (Slot("momentum_buffer"),)

    def transform(self, flow: Flow) -> None:
        flow.new["momentum_buffer"] = self.momentum * flow.state["momentum_buffer"] + flow["grad"]
        flow["update"] = flow.new["momentum_buffer"]


class Sign(Technique):
    """``u ← sign(u)``: element-wise."""

    name: ClassVar[str] = "sign"
    reads: ClassVar[frozenset[str]] = frozenset({"update"})
    writes: ClassVar[frozenset[str]] = frozenset({"update"})

    def transform(self, flow: Flow) -> None:
        flow["update"] = flow["update"].sign()


class UnitNorm(Technique):
    """``u ← u / ‖u‖``: with a sum over the whole parameter."""

    name: ClassVar[str] = "unit_norm"
    sums_over: ClassVar[frozenset[str]] = frozenset({"update"})
    settles: ClassVar[frozenset[str]] = frozenset({"update"})

    def sums(self, flow: Flow) -> Sums:
        return {"square": flow["update"].square()}

    def settle(self, flow: Flow, totals: dict[str, Tensor]) -> None:
        flow["update"] = flow["update"] / totals["square"].sqrt().clamp_min(1e-12)


class Ramp(Technique):
    """Rates grow from 0 to 1 over the first steps: with time."""

    name: ClassVar[str] = "ramp"
    reads: ClassVar[frozenset[str]] = frozenset({"rate"})
    writes: ClassVar[frozenset[str]] = frozenset({"rate"})

    def __init__(self, steps: int) -> None:
        self.steps = steps

    def scalars(self, t: Tensor) -> dict[str, Tensor]:
        return {"share": (t / self.steps).clamp(max=1)}

    def transform(self, flow: Flow) -> None:
        flow["rate"] = flow["rate"] * flow.scalar(self, "share")


class Centered(Technique):
    """Rows of a matrix lose their mean: with the whole matrix, and only where there is one."""

    name: ClassVar[str] = "centered"
    writes: ClassVar[frozenset[str]] = frozenset({"update"})
    whole: ClassVar[tuple[str, ...]] = ("update",)

    def applies(self, info: ParamInfo) -> bool:
        return len(info.shape) == 2

    def whole_matrix(self, flow: Flow, *complete: Tensor) -> Tensor:
        (update,) = complete
        return update - update.mean(-1, keepdim=True)

    def transform(self, flow: Flow) -> None:
        flow["update"] = flow["centered.whole"]


class Share(PeriodicTechnique):
    """Rates follow the share of each parameter in the gradient of all, measured at intervals."""

    name: ClassVar[str] = "share"
    reads: ClassVar[frozenset[str]] = frozenset({"rate"})
    writes: ClassVar[frozenset[str]] = frozenset({"rate"})
    sums_over: ClassVar[frozenset[str]] = frozenset({"grad"})
    population: ClassVar[tuple[str, ...]] = ("share_measured", "share_factor")

    def __init__(self, interval: int) -> None:
        self.interval = interval

    def applies(self, info: ParamInfo) -> bool:
        return info.numel > 0

    def slots(self, info: ParamInfo) -> tuple[Slot, ...]:
        return (
            Slot("share_measured", shape=(), precision="fp32"),
            Slot("share_factor", shape=(), init=1.0, precision="fp32"),
        )

    def transform(self, flow: Flow) -> None:
        flow["rate"] = flow["rate"] * flow.per_param(flow.state["share_factor"])

    def sums(self, flow: Flow) -> Sums:
        return {"size": flow["grad"].abs()}

    def settle(self, flow: Flow, totals: dict[str, Tensor]) -> None:
        flow.new["share_measured"] = totals["size"].reshape(-1)

    def refresh(self, states: dict[str, Tensor], infos: list[ParamInfo], relations: Relations) -> dict[str, Tensor]:
        measured = states["share_measured"]
        return {"share_factor": measured / measured.sum().clamp_min(1e-30)}


class HeavyBall(HinaOptimizer):
    """A whole optimizer in one list."""

    RULES: ClassVar[dict[str, rule.Rule]] = {
        "lr": rule.NON_NEGATIVE,
        "momentum": rule.BELOW_ONE,
        **ENGINE_RULES,
    }

    def __init__(self, params: Any, lr: float = 1e-3, momentum: float = 0.9, interval: int = 3, **engine: Any) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "interval": interval, "extra": (), **engine})

    def recipe(self, group: dict[str, Any], info: ParamInfo) -> list[Technique]:
        known: dict[str, Technique] = {
            "share": Share(group["interval"]),
            "centered": Centered(),
            "unit_norm": UnitNorm(),
            "sign": Sign(),
            "ramp": Ramp(4),
        }
        first = [known[name] for name in group["extra"] if name == "share"]
        return [*first, Momentum(group["momentum"]), *(known[name] for name in group["extra"] if name != "share")]


def with_extra(params: Any, *extra: str, **options: Any) -> HeavyBall:
    optimizer = HeavyBall(params, lr=LR, **options)
    optimizer.param_groups[0]["extra"] = extra
    return optimizer


def expected(extra: tuple[str, ...], steps: int, interval: int = 3, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """The same in plain loops."""
    params = [p.detach().clone() for _, p in named_params(dtype)]
    buffers = [torch.zeros_like(p) for p in params]
    measured = [torch.zeros((), dtype=dtype) for _ in params]
    factors = [torch.ones((), dtype=dtype) for _ in params]
    for step in range(steps):
        grads = [g.to(dtype) for g in gradients(step)]
        if step % interval == 1 % interval:
            total = sum(measured, torch.zeros((), dtype=dtype))
            factors = [m / total for m in measured]
        if step % interval == 0:
            measured = [g.abs().sum() for g in grads]
        for p, b, g, factor in zip(params, buffers, grads, factors, strict=True):
            b.mul_(0.9).add_(g)
            u, rate = b.clone(), LR
            if "centered" in extra and p.ndim == 2:
                u = u - u.mean(-1, keepdim=True)
            if "unit_norm" in extra:
                u = u / u.norm().clamp_min(1e-12)
            if "sign" in extra:
                u = u.sign()
            if "ramp" in extra:
                rate *= min((step + 1) / 4, 1)
            if "share" in extra and p.numel():
                rate *= float(factor)
            p.sub_(rate * u)
    return params


KINDS = [
    (),
    ("sign",),
    ("unit_norm",),
    ("ramp",),
    ("centered",),
    ("share",),
    ("share", "centered", "unit_norm", "ramp"),
]


@pytest.mark.parametrize("extra", KINDS, ids="+".join)
def test_every_kind_against_plain_loops(extra: tuple[str, ...]) -> None:
    named = named_params(torch.float64)
    optimizer = with_extra(named, *extra)
    for step in range(8):
        give(named, step)
        optimizer.step()
    for (name, p), q in zip(named, expected(extra, 8), strict=True):
        torch.testing.assert_close(p.detach(), q, rtol=1e-9, atol=1e-12, msg=lambda m, name=name: f"{name}: {m}")


def test_a_recipe_of_ones_own_is_torchs_sgd() -> None:
    named, other = named_params(), named_params()
    mine = HeavyBall(named, lr=0.01, momentum=0.8)
    theirs = torch.optim.SGD([p for _, p in other], lr=0.01, momentum=0.8)
    for step in range(6):
        give(named, step)
        give(other, step)
        mine.step()
        theirs.step()
    for (name, p), (_, q) in zip(named, other, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7, msg=name)
        assert set(mine.state[p]) == {"step", "skipped", "momentum_buffer"}


@pytest.mark.parametrize("extra", [("unit_norm",), ("share", "centered", "unit_norm")], ids="+".join)
def test_on_shards(extra: tuple[str, ...]) -> None:
    """Nothing in a technique knows of shards, so nothing in it is to be done for them."""
    start = [(name, p.detach()) for name, p in named_params(torch.float64)]
    found, _ = run_sharded(start, gradients, lambda named: with_extra(named, *extra), size=3, steps=5, by_rows=False)
    for (name, _), a, b in zip(start, found, expected(extra, 5), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12, msg=name)


def test_in_chunks_and_in_bf16() -> None:
    """A large parameter is cut; bf16 weights and state are the engine's business."""
    p = nn.Parameter(torch.randn(600, 500))
    q = nn.Parameter(p.detach().bfloat16())
    plain = with_extra([p], "unit_norm")
    low = with_extra([q], "unit_norm", state_precision="bf16")
    start, buffer = p.detach().double().clone(), torch.zeros(600, 500, dtype=torch.float64)
    for step in range(3):
        g = torch.randn(600, 500, generator=torch.Generator().manual_seed(step))
        p.grad, q.grad = g, g.bfloat16()
        plain.step()
        low.step()
        buffer = 0.9 * buffer + g.double()
        start -= LR * buffer / buffer.norm()
    torch.testing.assert_close(p.detach().double(), start, rtol=1e-6, atol=1e-9)
    assert low.state[q]["momentum_buffer"].dtype == torch.bfloat16
    torch.testing.assert_close(low.state[q]["momentum_buffer"].double(), buffer, rtol=0.03, atol=0.03)


def test_its_state_is_saved_converted_and_loaded() -> None:
    """Between measuring and refresh, where a checkpoint would lose what is kept elsewhere."""
    kinds = ("share", "unit_norm")
    named, twin = named_params(), named_params()
    optimizer, loaded = with_extra(named, *kinds), with_extra(twin, *kinds)
    for step in range(8):
        if step == 4:
            file = io.BytesIO()
            torch.save(optimizer.state_dict(), file)
            file.seek(0)
            with torch.no_grad():
                for (_, p), (_, q) in zip(named, twin, strict=True):
                    q.copy_(p)
            loaded.load_state_dict(torch.load(file, weights_only=True))
        give(named, step)
        optimizer.step()
        if step >= 4:
            give(twin, step)
            loaded.step()
    for (name, p), (_, q) in zip(named, twin, strict=True):
        assert torch.equal(p, q), name
    copied = copy.deepcopy(optimizer)
    assert type(copied) is HeavyBall and copied.param_groups[0]["extra"] == kinds
    before = optimizer.state_bytes()
    assert optimizer.set_state_precision("bf16") == before - optimizer.state_bytes() > 0


def test_compiled() -> None:
    """The same functions, under ``torch.compile``."""
    shapes = [(4, 3), (4, 3)]
    runs = []
    for compiled in (False, True):
        params = [nn.Parameter(torch.full(s, 0.5)) for s in shapes]
        optimizer = with_extra(params, "unit_norm", "ramp", compile=compiled)
        for step in range(3):
            for i, p in enumerate(params):
                p.grad = torch.randn(4, 3, generator=torch.Generator().manual_seed(10 * step + i))
            optimizer.step()
        runs.append(params)
    for p, q in zip(*runs, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-8)


# -- in front of, between and behind the techniques of an optimizer that is there -----------------------------------


class Tuned(HinaAdaptive):
    """HinaAdaptive with techniques of a user's own; an option of its own in every group."""

    def recipe(self, group: dict[str, Any], info: ParamInfo) -> list[Technique]:
        chain = super().recipe(group, info)
        at = next(i for i, one in enumerate(chain) if one.name == "weight_decay")
        mine: list[Technique] = [UnitNorm()] if group.get("unit", True) else []
        return [Share(2), *chain[:at], *mine, *chain[at:]]


def test_beside_all_others() -> None:
    """With every technique on; a group switches it off for itself; lr 0 still stops everything."""
    named = named_params()
    optimizer = Tuned([{"params": named[:6]}, {"params": named[6:], "unit": False}], lr=LR, **EVERYTHING)
    for step in range(6):
        optimizer.param_groups[0]["lr"] = 0.0 if step == 4 else LR
        give(named, step)
        before = [p.detach().clone() for _, p in named]
        optimizer.step()
        if step == 4:
            for (name, p), q in zip(named[:6], before[:6], strict=True):
                assert torch.equal(p, q), name
    assert all(p.isfinite().all() for _, p in named)
    assert all("share_factor" in optimizer.state[p] for name, p in named if p.numel())


def test_where_it_stands_decides() -> None:
    """Unit norm of the update at the end: every step is as long as the rates say, whatever came before."""
    named = named_params(torch.float64)
    optimizer = Tuned(named, lr=LR, **{**EVERYTHING, **NOTHING, "weight_decay": 0.0, "lora_rank_penalty": False})
    for step in range(4):
        give(named, step)
        before = [p.detach().clone() for _, p in named]
        optimizer.step()
        for (name, p), q in zip(named, before, strict=True):
            if p.numel():
                factor = float(optimizer.state[p]["share_factor"])
                assert float((p.detach() - q).norm()) == pytest.approx(LR * factor, rel=1e-6), name


# -- what cannot work ----------------------------------------------------------------------------------------------


def refused(chain: list[Technique], error: type[Exception] = ValueError) -> str:
    """The message of a recipe's error; nothing has happened by then."""

    class Bad(HinaOptimizer):
        def __init__(self, params: Any) -> None:
            super().__init__(params, {"lr": LR})

        def recipe(self, group: dict[str, Any], info: ParamInfo) -> list[Technique]:
            return chain

    p = nn.Parameter(torch.ones(3))
    optimizer = Bad([p])
    p.grad = torch.ones(3)
    with pytest.raises(error) as raised:
        optimizer.step()
    assert torch.equal(p, torch.ones(3)) and not optimizer.state
    assert "Bad" in str(raised.value)
    return str(raised.value)


def test_errors_of_recipes() -> None:
    class Nameless(Technique):
        pass

    class Inventive(Technique):
        name = "inventive"
        reads = frozenset({"gradient"})

    class Settler(Technique):
        name = "settler"
        settles = frozenset({"update"})

    class Thief(Technique):
        name = "thief"

        def slots(self, info: ParamInfo) -> tuple[Slot, ...]:
            return (Slot("momentum_buffer", precision="fp32"),)

    message = refused([Nameless()])
    assert "Nameless" in message and "name" in message
    message = refused([Sign(), Sign()])
    assert "'sign'" in message and "twice" in message
    message = refused([Inventive()])
    assert "'gradient'" in message and "grad" in message and "incoming" in message
    message = refused([Settler()])
    assert "Settler" in message and "sums_over" in message
    message = refused([Momentum(0.9), Thief()])
    assert "'thief'" in message and "'momentum_buffer'" in message and "another name" in message


def test_an_optimizer_without_a_recipe() -> None:
    class Empty(HinaOptimizer):
        def __init__(self, params: Any) -> None:
            super().__init__(params, {"lr": LR})

    p = nn.Parameter(torch.ones(3))
    optimizer = Empty([p])
    p.grad = torch.ones(3)
    with pytest.raises(NotImplementedError, match=r"Empty must define recipe\(\)"):
        optimizer.step()


def test_options_of_ones_own_are_checked() -> None:
    p = nn.Parameter(torch.ones(3))
    with pytest.raises(ValueError, match=r"HeavyBall: momentum=1.5 .* \[0, 1\)"):
        HeavyBall([p], momentum=1.5)
    with pytest.raises(ValueError, match="HeavyBall: rounding='up'"):
        HeavyBall([p], rounding="up")

    class Strict(HeavyBall):
        REMOVED: ClassVar[dict[str, str]] = {"nesterov": "Use momentum."}

        def __init__(self, params: Any, lr: float = 1e-3, *, damping: float = 0.0) -> None:
            super().__init__(params, lr)

    with pytest.raises(TypeError, match=r"Strict: unknown argument 'dampin'.*'damping'"):
        Strict([p], dampin=1)  # type: ignore[call-arg]
    with pytest.raises(TypeError, match=r"'nesterov' was removed\. Use momentum\."):
        Strict([p], nesterov=True)  # type: ignore[call-arg]
