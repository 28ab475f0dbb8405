"""Packed signs: the codec, the trajectories with it, and state that was saved before there was any."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

from hina_optim.engine.layout import Layout
from hina_optim.state.conversion import converted
from hina_optim.state.precision import Codec, Storage, TensorCodec, codec_for, decoded
from hina_optim.state.regions import fits
from hina_optim.state.shard import Shard
from hina_optim.state.signs import SignCodec
from hina_optim.state.slot import Slot
from tests.every_optimizer import NAMES, give_large, large, make, reported
from tests.shards import run_sharded

SIGNS = Slot("last_sign", precision="int8", code="ternary")
Named = list[tuple[str, nn.Parameter]]


def signs(*shape: int) -> Tensor:
    return torch.randint(-1, 2, shape, generator=torch.Generator().manual_seed(0)).float()


@pytest.mark.parametrize(
    "shape", [(8,), (7,), (0,), (3, 12), (5, 17), (2, 4, 5, 2), (5, 3, 2, 3), (0, 8), (8, 0), (3, 1)]
)
def test_round_trip(shape: tuple[int, ...]) -> None:
    """A quarter of a byte each, with rows that fill their last byte and rows that do not, and ranges of rows."""
    codec, value = SignCodec(), signs(3, *shape)
    parts = codec.encode(value, None)
    assert parts[""].dtype == torch.uint8 and tuple(parts[""].shape[1:]) == codec.part_shape("", shape)
    assert torch.equal(decoded(codec, parts, value.shape), value)
    if len(shape) > 1 and shape[0] > 1:
        some = value[:, 1:2]
        assert torch.equal(decoded(codec, {"": parts[""][:, 1:2]}, some.shape), some)


def test_every_byte() -> None:
    """All 81 of them, from float32, float64 and int8; a zero with a sign is a zero."""
    value = torch.cartesian_prod(*[torch.tensor([-1.0, 0.0, 1.0])] * 4)[None]
    for dtype in (torch.float32, torch.float64, torch.int8):
        codec = SignCodec(torch.float64) if dtype == torch.float64 else SignCodec()
        packed = codec.encode(value.to(dtype), None)
        assert packed[""].unique().numel() == 81
        assert torch.equal(codec.decode(packed), value.to(codec.compute))
    assert torch.equal(SignCodec().encode(value * 1.0, None)[""], SignCodec().encode(value.to(torch.int8), None)[""])
    assert not SignCodec().encode(torch.full((1, 4), -0.0), None)[""].any()


def test_memory_that_is_not_contiguous() -> None:
    codec, value = SignCodec(), signs(2, 8, 4, 3, 3).contiguous(memory_format=torch.channels_last_3d)
    assert not value.is_contiguous()
    assert torch.equal(decoded(codec, codec.encode(value, None), value.shape), value)
    across = signs(2, 12, 8).transpose(1, 2)
    assert torch.equal(decoded(codec, codec.encode(across, None), across.shape), across)


def test_compiled_is_the_same() -> None:
    """Rows that fill their last byte, and rows that do not."""
    values = [signs(2, *shape) for shape in ((5, 24), (5, 18), (4, 3, 3, 3))]

    def run() -> list[Tensor]:
        out = []
        for value in values:
            parts = SignCodec().encode(value, None)
            out += [parts[""], decoded(SignCodec(), parts, value.shape)]
        return out

    for one, other in zip(torch.compile(run, fullgraph=True, dynamic=False)(), run(), strict=True):
        assert torch.equal(one, other)


def test_where_they_are_packed() -> None:
    """Where moments are in blocks: decided on the global shape, as the rules of 8 bits say."""

    def kind(storage: Storage, *shape: int) -> type:
        return type(codec_for(SIGNS, storage, torch.float32, shape))

    small, forced = Storage("8bit"), Storage("8bit", force_8bit=True)
    assert kind(small, 64, 64) is kind(small, 64, 8, 3, 3) is SignCodec
    assert kind(small, 63, 64) is kind(small, 4096) is kind(small, 4096, 15) is TensorCodec
    assert kind(Storage("8bit", min_8bit_size=0), 63, 64) is SignCodec
    assert kind(forced, 4, 3) is SignCodec and kind(forced, 8192) is kind(forced, 0, 4) is TensorCodec
    assert kind(Storage("bf16"), 64, 64) is kind(Storage("fp32"), 64, 64) is TensorCodec
    other = Slot("count", precision="int8")  # small integers that are not signs
    assert codec_for(other, forced, torch.float32, (64, 64)) == TensorCodec(torch.int8)


@pytest.mark.parametrize("shape", [(1200, 1700), (3, 40, 17), (3 << 20,), (7,)])
def test_converted_in_pieces(shape: tuple[int, ...]) -> None:
    """From bytes of their own and back: what does not change is not changed, also over several pieces."""
    plain: Codec = TensorCodec(torch.int8)
    value = signs(1, *shape).to(torch.int8)
    packed = converted(plain, SignCodec(), {"": value}, shape)
    assert torch.equal(packed[""], SignCodec().encode(value, None)[""])
    assert torch.equal(converted(SignCodec(), plain, packed, shape)[""], value)


class _Alone(TensorCodec):
    """A byte for every sign."""

    lead: ClassVar[int] = 0

    def __init__(self, compute: torch.dtype = torch.float32, bits: int = 2) -> None:
        super().__init__(torch.int8, compute)


@contextlib.contextmanager
def unpacked() -> Iterator[None]:
    """Signs have a byte of their own, as they had before they could share one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("hina_optim.state.precision.SignCodec", _Alone)
        yield


def trained(name: str, steps: range, named: Named | None = None, optimizer: Any = None, **more: Any) -> Any:
    named = large() if named is None else named
    optimizer = optimizer or make(name, named, **{"state_precision": "8bit", **more})
    for step in steps:
        give_large(named, step)
        reported(optimizer, step)
    return named, optimizer


def signed(optimizer: Any, named: Named) -> dict[str, Tensor]:
    values = {n: optimizer._buckets.decoded(p, "last_sign") for n, p in named}
    return {n: value for n, value in values.items() if value is not None}


@pytest.mark.parametrize("name", [name for name in NAMES if name != "HinaAdamWOptimizer"])  # it has no mask
def test_the_same_training_to_the_bit(name: str) -> None:
    """With packed signs as with a byte for each; and they take what was planned."""
    named, optimizer = trained(name, range(4))
    packed = [n for n, p in named if optimizer.state[p]["last_sign"].dtype == torch.uint8]
    assert {"blocks", "ragged", "kernel"} <= set(packed), "nothing was packed"
    assert optimizer.state_bytes() == optimizer.state_bytes("8bit")
    with unpacked():
        twins, twin = trained(name, range(4))
        assert twin.state_bytes() > optimizer.state_bytes()
        theirs = signed(twin, twins)
    for (n, p), (_, q) in zip(named, twins, strict=True):
        assert torch.equal(p, q), n
    for n, value in signed(optimizer, named).items():
        assert torch.equal(value, theirs[n]) and value.abs().max() == 1, n


@pytest.mark.parametrize("by_rows", [True, False], ids=["rows", "flat"])
def test_shards_pack_their_own(by_rows: bool) -> None:
    """Cut between rows, and anywhere, also within what would be a byte: as with a byte for each, to the bit."""
    start = [("w", torch.randn(37, 131)), ("kernel", torch.randn(11, 5, 3, 3) / 9), ("v", torch.randn(70))]
    generator = torch.Generator().manual_seed(1)
    steps = [[torch.randn(t.shape, generator=generator) for _, t in start] for _ in range(6)]

    def build(named: Any) -> Any:
        return make("Automagic_CameAMP", named, state_precision="8bit", min_8bit_size=0)

    found, _ = run_sharded(start, lambda t: steps[t], build, size=3, steps=6, by_rows=by_rows)
    with unpacked():
        expected, _ = run_sharded(start, lambda t: steps[t], build, size=3, steps=6, by_rows=by_rows)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


def test_a_cut_between_columns_goes_between_bytes() -> None:
    shape = (8, 64)
    box = Shard.box(shape, (0, 32), (8, 32))
    assert fits(box, (8, 32), 4) and not fits(Shard.box(shape, (0, 30), (8, 34)), (8, 34), 4)
    assert fits(Shard.box((8, 62), (0, 32), (8, 30)), (8, 30), 4), "the end of a row is one"


class _Columns(Layout):
    """The columns from ``begin`` on are here."""

    def __init__(self, columns: int, begin: int) -> None:
        self.columns, self.begin = columns, begin

    def shard(self, param: Tensor) -> Shard:
        rows = param.shape[0]
        return Shard.box((rows, self.columns), (0, self.begin), (rows, self.columns - self.begin))


def test_a_cut_through_a_byte_is_refused_and_nothing_is_converted() -> None:
    """By name, in the middle of a training, too; and one between bytes and blocks is not."""
    for begin, fine in ((256, True), (254, False)):
        weight = nn.Parameter(torch.zeros(32, 512 - begin))
        optimizer = make("Automagic_CameAMP", [("w", weight)], state_precision="bf16")
        optimizer.bind_layout(_Columns(512, begin))

        def step(weight: nn.Parameter = weight, optimizer: Any = optimizer) -> None:
            weight.grad = signs(*weight.shape)
            optimizer.step()

        step()
        assert optimizer.state[weight]["last_sign"].dtype == torch.int8, "any cut will do where each has its byte"
        if fine:
            optimizer.set_state_precision("8bit")
            assert tuple(optimizer.state[weight]["last_sign"].shape) == (32, 64)
        else:
            with pytest.raises(RuntimeError, match=r"w \(32, 512\) is cut between columns"):
                optimizer.set_state_precision("8bit")
            assert optimizer.param_groups[0]["state_precision"] == "bf16"
            assert optimizer.state_bytes() == optimizer.state_bytes("bf16")
        step()


@pytest.mark.parametrize("name", ["Automagic_CameAMP", "AdaptiveHinaAdamW"])
def test_a_checkpoint_from_before(name: str, tmp_path: Path) -> None:
    """One that holds a byte for each sign is loaded and goes on as it would have."""
    with unpacked():
        named, old = trained(name, range(3))
        torch.save({"optimizer": old.state_dict(), "weights": [p.detach().clone() for _, p in named]}, tmp_path / "old")
        assert old.state[named[0][1]]["last_sign"].dtype == torch.int8
        trained(name, range(3, 6), named, old)
    saved = torch.load(tmp_path / "old", weights_only=True)
    fresh = large()
    with torch.no_grad():
        for (_, p), w in zip(fresh, saved["weights"], strict=True):
            p.copy_(w)
    optimizer = make(name, fresh, state_precision="8bit")
    before = copy.deepcopy(saved["optimizer"])
    optimizer.load_state_dict(saved["optimizer"])
    assert optimizer.state[fresh[0][1]]["last_sign"].dtype == torch.uint8
    assert optimizer.state_bytes() == optimizer.state_bytes("8bit")
    for index, entry in before["state"].items():
        assert all(torch.equal(v, saved["optimizer"]["state"][index][k]) for k, v in entry.items()), "the caller's"
    trained(name, range(3, 6), fresh, optimizer)
    for (n, p), (_, q) in zip(named, fresh, strict=True):
        assert torch.equal(p, q), n


def test_a_sharded_checkpoint_of_torch_from_before(tmp_path: Path) -> None:
    """It loads into tensors of the shape that was saved only; whole, by way of a file, it is packed."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
    from torch.distributed.checkpoint.state_dict import (
        StateDictOptions,
        get_optimizer_state_dict,
        set_optimizer_state_dict,
    )

    def build() -> tuple[nn.Module, Any]:
        torch.manual_seed(0)
        model = nn.Linear(64, 70)
        return model, make("Automagic_CameAMP", model.named_parameters(), state_precision="8bit")

    def step(model: nn.Module, optimizer: Any, value: int) -> None:
        for p in model.parameters():
            p.grad = signs(*p.shape) * value
        optimizer.step()

    with unpacked():
        model, old = build()
        step(model, old, 1)
        dcp.save({"optimizer": get_optimizer_state_dict(model, old)}, checkpoint_id=tmp_path / "dcp")
        weights = [p.detach().clone() for p in model.parameters()]
        step(model, old, -2)
    dcp_to_torch_save(tmp_path / "dcp", tmp_path / "whole.pt")
    fresh, optimizer = build()
    with torch.no_grad():
        for p, w in zip(fresh.parameters(), weights, strict=True):
            p.copy_(w)
    saved = torch.load(tmp_path / "whole.pt", weights_only=True)["optimizer"]
    set_optimizer_state_dict(fresh, optimizer, saved, options=StateDictOptions(full_state_dict=True))
    assert optimizer.state[fresh.weight]["last_sign"].dtype == torch.uint8
    step(fresh, optimizer, -2)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), fresh.parameters(), strict=True))


@pytest.mark.slow
def test_a_compiled_step_keeps_them() -> None:
    """With state in 8 bits: the same signs as without the compiler, in rows that fill their last byte and others."""
    found = []
    for compiled in (False, True):
        named = [("even", nn.Parameter(torch.zeros(20, 64))), ("odd", nn.Parameter(torch.zeros(20, 33)))]
        optimizer = make("Automagic_CameAMP", named, state_precision="8bit", min_8bit_size=0, compile=compiled)
        generator = torch.Generator().manual_seed(0)
        for _ in range(3):
            for _, p in named:
                p.grad = torch.randn(p.shape, generator=generator)
                p.grad[:, ::3] = 0.0
            optimizer.step()
        assert all(optimizer.state[p]["last_sign"].dtype == torch.uint8 for _, p in named)
        found.append(signed(optimizer, named))
    for name, value in found[0].items():
        assert torch.equal(value, found[1][name]) and set(value.unique().tolist()) == {-1.0, 0.0, 1.0}
