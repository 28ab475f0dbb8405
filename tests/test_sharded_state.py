"""Portable optimizer state in one process: exact, by name, converted where asked, replaced in one move."""

from __future__ import annotations

import copy
import itertools
import json
import logging
import pickle
import tracemalloc
import zlib
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from hina_lightning import sharded_state
from hina_lightning.cli import main
from hina_lightning.sharded_state import manifest as manifests
from hina_lightning.sharded_state import storage
from hina_lightning.sharded_state.loading import open_checkpoint
from hina_lightning.sharded_state.storage import MANIFEST
from hina_optim import HinaAdaptive
from hina_optim.engine.layout import Shard
from hina_optim.engine.optimizer import HinaOptimizer
from hina_optim.state.blockwise import BlockCodec
from hina_optim.state.regions import block_boxes, covering_scales, decode_elements
from tests.every_optimizer import LR, NAMES, give_large, large, make, reported
from tests.optim_cases import give, named_params
from tests.test_resume import same_bits

Named = list[tuple[str, nn.Parameter]]
KINDS: dict[str, tuple[torch.dtype, dict[str, Any]]] = {
    "fp32": (torch.float32, {"state_precision": "fp32"}),
    "bf16": (torch.float32, {"state_precision": "bf16"}),
    "8bit": (torch.float32, {"state_precision": "8bit"}),
    "kahan": (torch.bfloat16, {"rounding": "kahan"}),
    "float64": (torch.float64, {}),
}


def trained(name: str = "HinaAdaptive", steps: int = 4, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    """Large and small parameters, one of them never with a gradient, after some steps."""
    named = [*large(dtype), *((f"small.{n}", p) for n, p in named_params(dtype)), ("idle", nn.Parameter(torch.ones(3)))]
    optimizer = make(name, named, **options)
    run(named, optimizer, 0, steps)
    return named, optimizer


def run(named: Named, optimizer: HinaOptimizer, first: int, steps: int) -> None:
    for step in range(first, first + steps):
        give_large(named[:7], step)
        give(named[7:-1], step)
        reported(optimizer, step)


def copied(named: Named, to: Named) -> None:
    with torch.no_grad():
        for (_, p), (_, q) in zip(named, to, strict=True):
            q.copy_(p)


def said(caplog: pytest.LogCaptureFixture) -> list[str]:
    """Our own messages; torch logs too."""
    return [record.getMessage() for record in caplog.records if record.name == "hina_lightning"]


@pytest.mark.parametrize("kind", KINDS)
def test_all_comes_back_to_the_bit(kind: str, tmp_path: Path) -> None:
    """Options, state, what is stacked: five more steps are those of the run that goes on."""
    dtype, options = KINDS[kind]
    named, optimizer = trained(dtype=dtype, **options)
    sharded_state.save(tmp_path / "a", optimizer, extra={"step": 4, "pair": (1, None), "inf": float("inf")})
    other, loaded = trained(dtype=dtype, steps=0, **options)
    extra = sharded_state.load(tmp_path / "a", loaded)
    assert extra == {"step": 4, "pair": (1, None), "inf": float("inf")} and isinstance(extra["pair"], tuple)
    same_bits(loaded.state_dict(), optimizer.state_dict())
    copied(named, other)
    run(named, optimizer, 4, 5)
    run(other, loaded, 4, 5)
    same_bits(loaded.state_dict(), optimizer.state_dict())
    same_bits([p.detach() for _, p in other], [p.detach() for _, p in named])


@pytest.mark.parametrize("name", NAMES)
def test_every_optimizer(name: str, tmp_path: Path) -> None:
    """By folder and by single file, into one that has other state already."""
    _, optimizer = trained(name, steps=3)
    sharded_state.save(tmp_path / "a", optimizer)
    sharded_state.consolidate(tmp_path / "a", tmp_path / "a.safetensors")
    _, loaded = trained(name, steps=1)
    sharded_state.load(tmp_path / "a.safetensors", loaded)
    same_bits(loaded.state_dict(), optimizer.state_dict())


def test_saving_changes_nothing(tmp_path: Path) -> None:
    named, optimizer = trained(state_precision="8bit")
    other, undisturbed = trained(state_precision="8bit")
    for step in range(4, 6):
        sharded_state.save(tmp_path / "a", optimizer)
        run(named, optimizer, step, 1)
        run(other, undisturbed, step, 1)
    same_bits(optimizer.state_dict(), undisturbed.state_dict())
    same_bits([p.detach() for _, p in named], [p.detach() for _, p in other])


def test_parameters_are_found_by_name(tmp_path: Path) -> None:
    """In another order, in groups in another order, under the names that wrappers give."""
    named = large()
    groups = [{"params": named[:3], "lr": 1e-4, "name": "a"}, {"params": named[3:], "lr": 2e-4, "name": "b"}]
    optimizer = HinaAdaptive(groups)
    give_large(named, 0)
    optimizer.step()
    sharded_state.save(tmp_path / "a", optimizer)
    again = [(f"module._orig_mod.{n}", p) for n, p in large()]
    loaded = HinaAdaptive([{"params": again[3:][::-1], "name": "b"}, {"params": again[:3][::-1], "name": "a"}], lr=LR)
    sharded_state.load(tmp_path / "a", loaded)
    assert [group["lr"] for group in loaded.param_groups] == [2e-4, 1e-4]
    for (name, p), (_, q) in zip(named, again, strict=True):
        same_bits(dict(loaded.state[q]), dict(optimizer.state[p]), name)


def test_without_names_places_serve_and_it_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 3))
    optimizer, named = HinaAdaptive(model.parameters(), lr=LR), HinaAdaptive(model.named_parameters(), lr=LR)
    model(torch.ones(2, 5)).sum().backward()
    optimizer.step()
    sharded_state.save(tmp_path / "nameless", optimizer)
    sharded_state.save(tmp_path / "named", optimizer, model=model)
    metadata = [open_checkpoint(tmp_path / n).manifest.state for n in ("nameless", "named")]
    assert [m["named"] for m in metadata] == [False, True]
    assert [p["name"] for p in metadata[1]["params"]] == ["0.weight", "0.bias", "1.weight", "1.bias"]
    with caplog.at_level(logging.WARNING, "hina_lightning"):
        sharded_state.load(tmp_path / "named", named)
        assert not said(caplog)
        sharded_state.load(tmp_path / "nameless", named)
    assert "places in the groups" in said(caplog)[0]
    same_bits(list(named.state_dict()["state"].values()), list(optimizer.state_dict()["state"].values()))
    with pytest.raises(sharded_state.CheckpointError, match="no parameter of the model"):
        sharded_state.save(tmp_path / "x", optimizer, model=nn.Linear(5, 4))


@pytest.mark.parametrize(("there", "here"), [("8bit", "bf16"), ("fp32", "8bit"), ("bf16", "fp32"), ("8bit", "fp32")])
def test_another_precision_is_converted_and_said(
    there: str, here: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """As set_state_precision() does it; ``storage="checkpoint"`` takes the saved one instead."""
    _, optimizer = trained(state_precision=there)
    sharded_state.save(tmp_path / "a", optimizer)
    _, loaded = trained(steps=0, state_precision=here)
    with caplog.at_level(logging.WARNING, "hina_lightning"):
        sharded_state.load(tmp_path / "a", loaded)
    (line,) = said(caplog)
    assert " becomes " in line
    assert loaded.param_groups[0]["state_precision"] == here
    _, kept = trained(steps=0, state_precision=here)
    sharded_state.load(tmp_path / "a", kept, storage="checkpoint")
    same_bits(kept.state_dict(), optimizer.state_dict())
    optimizer.set_state_precision(here)
    same_bits(loaded.state_dict()["state"], optimizer.state_dict()["state"])
    with pytest.raises(ValueError, match="neither"):
        sharded_state.load(tmp_path / "a", loaded, storage="mine")  # type: ignore[arg-type]


def test_options_that_are_tensors(tmp_path: Path) -> None:
    named = large()
    optimizer = HinaAdaptive(named, lr=torch.tensor(LR, dtype=torch.float64))
    give_large(named, 0)
    optimizer.step()
    sharded_state.save(tmp_path / "a", optimizer)
    loaded = HinaAdaptive(large(), lr=torch.tensor(1e-4, dtype=torch.float64))
    sharded_state.load(tmp_path / "a", loaded)
    lr = loaded.param_groups[0]["lr"]
    assert isinstance(lr, Tensor) and lr.dtype == torch.float64 and lr.item() == LR
    optimizer.param_groups[0]["odd"] = object()
    with pytest.raises(sharded_state.CheckpointError, match="option odd of group 0 is a object"):
        sharded_state.save(tmp_path / "b", optimizer)
    assert not (tmp_path / "b").exists()


def test_before_the_first_step(tmp_path: Path) -> None:
    """Nothing is kept, and nothing is left of what was there."""
    _, fresh = trained(steps=0)
    sharded_state.save(tmp_path / "a", fresh)
    _, used = trained()
    sharded_state.load(tmp_path / "a", used)
    assert not any(used.state.values())


# -- files -------------------------------------------------------------------------------------------------------------


def test_a_new_save_replaces_the_old_one(tmp_path: Path) -> None:
    named, optimizer = trained()
    sharded_state.save(tmp_path, optimizer, extra=1)
    (tmp_path / "model.ckpt").write_text("another's")
    before = {path.name for path in tmp_path.iterdir()}
    run(named, optimizer, 4, 1)
    sharded_state.save(tmp_path, optimizer, extra=2)
    after = {path.name for path in tmp_path.iterdir()}
    assert before & after == {MANIFEST, "model.ckpt"} and len(after) == 3
    _, loaded = trained(steps=0)
    assert sharded_state.load(tmp_path, loaded) == 2
    same_bits(loaded.state_dict(), optimizer.state_dict())


def test_an_interrupted_save_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever write fails: the old checkpoint is there, and nothing else."""
    named, optimizer = trained()
    sharded_state.save(tmp_path / "a", optimizer)
    expected = copy.deepcopy(optimizer.state_dict())
    run(named, optimizer, 4, 1)
    files = sorted(path.name for path in (tmp_path / "a").iterdir())
    for stop in (1, 2, 40, 330):
        numbers = itertools.count(1)

        def crc32(data: bytes, stop: int = stop, numbers: Iterator[int] = numbers) -> int:
            if next(numbers) == stop:
                raise OSError("disk full")
            return zlib.crc32(data)

        with monkeypatch.context() as patch:
            patch.setattr(storage, "zlib", SimpleNamespace(crc32=crc32))
            with pytest.raises(sharded_state.CheckpointError, match="disk full"):
                sharded_state.save(tmp_path / "a", optimizer)
        assert sorted(path.name for path in (tmp_path / "a").iterdir()) == files
        _, loaded = trained(steps=0)
        sharded_state.load(tmp_path / "a", loaded)
        same_bits(loaded.state_dict(), expected)
    for stop in (1, 2, 3):  # the data, the name of its file, the manifest
        numbers = itertools.count(1)

        def fsync(handle: int, stop: int = stop, numbers: Iterator[int] = numbers) -> None:
            if next(numbers) == stop:
                raise OSError("disk gone")

        with monkeypatch.context() as patch:
            patch.setattr(storage.os, "fsync", fsync)
            with pytest.raises(sharded_state.CheckpointError, match="disk gone"):
                sharded_state.save(tmp_path / "a", optimizer)
        assert sorted(path.name for path in (tmp_path / "a").iterdir()) == files
        assert sharded_state.is_complete(tmp_path / "a")


def test_a_failure_after_the_manifest_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The new checkpoint is there: nobody may be told that it is not, and remove its data."""
    _, optimizer = trained(steps=1)
    sharded_state.save(tmp_path, optimizer, extra=1)
    numbers = itertools.count(1)

    def fsync(handle: int) -> None:
        if next(numbers) > 3:
            raise OSError("disk gone")

    monkeypatch.setattr(storage.os, "fsync", fsync)
    sharded_state.save(tmp_path, optimizer, extra=2)
    assert next(numbers) == 5
    _, loaded = trained(steps=0)
    assert sharded_state.load(tmp_path, loaded) == 2


def test_the_latest_complete_one(tmp_path: Path) -> None:
    _, optimizer = trained(steps=1)
    assert sharded_state.latest(tmp_path) is None and sharded_state.latest(tmp_path / "nowhere") is None
    for name in ("step-100", "step-20", "step-30", "step-40"):
        sharded_state.save(tmp_path / name, optimizer)
    (tmp_path / "step-40" / MANIFEST).unlink()
    next((tmp_path / "step-30").glob("*.bin")).write_bytes(b"")
    (tmp_path / "notes").mkdir()
    assert sharded_state.latest(tmp_path) == tmp_path / "step-20"
    assert [sharded_state.is_complete(tmp_path / n) for n in ("step-20", "step-30", "step-40", "notes")] == [
        True,
        False,
        False,
        False,
    ]


def test_large_tensors_are_cut_into_chunks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks that are smaller than a row, and what they hold is the same."""
    monkeypatch.setattr(manifests, "CHUNK", 512)

    def build() -> tuple[Named, HinaAdaptive]:
        named = [("ragged", nn.Parameter(torch.ones(20, 300))), ("cube", nn.Parameter(torch.ones(4, 9, 9)))]
        return named, HinaAdaptive(named, lr=LR, state_precision="8bit")

    named, optimizer = build()
    for _, p in named:
        p.grad = torch.randn(p.shape)
    optimizer.step()
    sharded_state.save(tmp_path / "a", optimizer)
    sharded_state.consolidate(tmp_path / "a", tmp_path / "b")
    for path in ("a", "b"):
        manifest = open_checkpoint(tmp_path / path).manifest
        assert [len(manifest.chunks[f"{n}/anchor"]) for n in ("ragged", "cube")] == [3 * 20, 4]
        _, loaded = build()
        sharded_state.load(tmp_path / path, loaded)
        same_bits(loaded.state_dict(), optimizer.state_dict())


def test_nothing_is_unpickled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, optimizer = trained(steps=1)
    sharded_state.save(tmp_path / "a", optimizer, extra={"step": 1})
    sharded_state.consolidate(tmp_path / "a", tmp_path / "b")

    def refused(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("unpickled")

    for name in ("load", "loads", "Unpickler"):
        monkeypatch.setattr(pickle, name, refused)
    monkeypatch.setattr(torch, "load", refused)
    for path in ("a", "b"):
        _, loaded = trained(steps=0)
        assert sharded_state.load(tmp_path / path, loaded) == {"step": 1}


def test_others_can_read_the_single_file(tmp_path: Path) -> None:
    """It is in the format of safetensors."""
    from safetensors import safe_open

    named, optimizer = trained(state_precision="8bit", steps=2)
    sharded_state.save(tmp_path / "a", optimizer)
    sharded_state.consolidate(tmp_path / "a", tmp_path / "a.safetensors")
    with safe_open(tmp_path / "a.safetensors", "pt") as file:
        kept = {f"{n}/{part}": v for n, p in named for part, v in optimizer.state[p].items()}
        for n, p in named:  # signs, four of which share a byte here, are saved in a byte each
            if n != "idle" and kept[f"{n}/last_sign"].dtype == torch.uint8:
                kept[f"{n}/last_sign"] = optimizer._buckets.decoded(p, "last_sign").to(torch.int8)
        zero = {key for key, v in kept.items() if key.endswith("/anchor") and v.ndim == 0 and "scalar" not in key}
        assert set(file.keys()) == kept.keys() - zero and zero  # of an anchor that is zero there is nothing
        for key in file.keys():  # noqa: SIM118  it is no dict
            same_bits(file.get_tensor(key), kept[key].clone(), key)


def test_loading_needs_no_more_than_the_state_and_a_chunk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Host memory of a load, counted by what Python and torch's reading allocate, beside that of the state."""
    monkeypatch.setattr(manifests, "CHUNK", 1 << 16)
    monkeypatch.setattr("hina_lightning.sharded_state.loading.BATCH", 1 << 18)

    def build() -> tuple[Named, HinaAdaptive]:
        named = [(f"w{i}", nn.Parameter(torch.zeros(512, 256))) for i in range(4)]
        return named, HinaAdaptive(named, lr=LR)

    named, optimizer = build()
    for _, p in named:
        p.grad = torch.ones_like(p)
    optimizer.step()
    sharded_state.save(tmp_path / "a", optimizer)
    sizes: list[int] = []
    real = torch.frombuffer
    monkeypatch.setattr(torch, "frombuffer", lambda data, **kw: sizes.append(len(data)) or real(data, **kw))
    _, loaded = build()
    tracemalloc.start()
    sharded_state.load(tmp_path / "a", loaded)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert max(sizes) <= 1 << 16 and sum(sizes) >= optimizer.state_bytes() - 100
    assert peak < 3 << 20, "buffers of chunks pile up"  # torch's own memory is not counted: the state itself


# -- blocks -----------------------------------------------------------------------------------------------------------


@st.composite
def shards(draw: st.DrawFn) -> tuple[Shard, tuple[int, ...], BlockCodec]:
    """Any shard, its local shape, and blocks of a few elements."""
    shape = tuple(draw(st.lists(st.integers(1, 9), min_size=1, max_size=3)))
    codec = BlockCodec(draw(st.booleans()), draw(st.sampled_from([1, 2, 3, 4, 8])))
    total = int(torch.Size(shape).numel())
    how = draw(st.sampled_from(["flat", "rows", "box"]))
    if how == "flat" or len(shape) == 1:
        rows = st.integers(0, shape[0]).map(lambda n: n * (total // shape[0]))
        start, stop = sorted([draw(st.integers(0, total) | rows), draw(st.integers(0, total) | rows)])
        return Shard(shape, start, stop), (stop - start,), codec
    offset, size = [0] * len(shape), list(shape)
    for dim in [0] if how == "rows" else [0, 1]:
        offset[dim] = draw(st.integers(0, shape[dim] - 1))
        size[dim] = draw(st.integers(1, shape[dim] - offset[dim]))
    return Shard.box(shape, tuple(offset), tuple(size)), tuple(size), codec


@settings(max_examples=400, deadline=None)
@given(shards())
def test_blocks_of_a_shard(case: tuple[Shard, tuple[int, ...], BlockCodec]) -> None:
    """Where a shard's blocks are the whole parameter's, its scales are a part of them; elsewhere they are not."""
    shard, local_shape, codec = case
    every = torch.arange(torch.Size(shard.shape).numel()).reshape(shard.shape)
    index = shard.index(torch.device("cpu"))
    mine = _blocks(index.reshape(local_shape), codec.block)
    boxes = block_boxes(shard, local_shape, codec)
    assert (boxes is not None) == (set(mine) <= set(_blocks(every, codec.block)))
    value = every + 1.0  # every block has another scale
    complete = codec.encode(value[None], None)
    if boxes is not None:
        found = [_at(complete["_scale"][0], box).reshape(-1) for box in boxes]
        here = codec.encode(value.reshape(-1)[index].reshape(1, *local_shape), None)
        assert torch.equal(torch.cat([torch.empty(0), *found]), here["_scale"].reshape(-1))
    scales = [_at(complete["_scale"][0], box).reshape(-1) for box in covering_scales(shard, codec)]
    codes = complete[""].reshape(-1)[index]
    values = decode_elements(shard, codec, codes, torch.cat([torch.empty(0), *scales]))
    assert torch.equal(values, codec.decode(complete).reshape(-1)[index])


def _blocks(index: Tensor, block: int) -> list[tuple[int, ...]]:
    """Which elements are in each block."""
    lines = index.reshape(index.shape[0], -1) if index.ndim > 1 else index.reshape(1, -1)
    return [tuple(part.tolist()) for line in lines for part in line.split(block) if part.numel()]


def _at(value: Tensor, box: tuple[tuple[int, ...], tuple[int, ...]]) -> Tensor:
    return value[tuple(slice(o, o + n) for o, n in zip(*box, strict=True))]


# -- the command ------------------------------------------------------------------------------------------------------


def test_convert_and_show(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Folder → file → folder, and what it holds in words."""
    _, optimizer = trained(steps=2)
    sharded_state.save(tmp_path / "a", optimizer, extra={"step": 2})
    assert main(["convert", str(tmp_path / "a"), str(tmp_path / "b.safetensors")]) == 0
    assert main(["convert", str(tmp_path / "b.safetensors"), str(tmp_path / "c")]) == 0
    _, loaded = trained(steps=0)
    assert sharded_state.load(tmp_path / "c", loaded) == {"step": 2}
    same_bits(loaded.state_dict(), optimizer.state_dict())
    capsys.readouterr()
    assert main(["show", str(tmp_path / "c")]) == 0
    text = capsys.readouterr().out
    for words in ("HinaAdaptive", "22 parameters", "exp_avg", "step", "1 process"):
        assert words in text
    assert main(["convert", str(tmp_path / "a"), str(tmp_path / "b.safetensors")]) == 1
    assert "--force" in capsys.readouterr().err
    assert main(["convert", "--force", str(tmp_path / "a"), str(tmp_path / "b.safetensors")]) == 0
    assert main(["show", str(tmp_path / "nothing")]) == 1
    assert "nothing" in capsys.readouterr().err


def test_the_manifest_is_plain_json(tmp_path: Path) -> None:
    _, optimizer = trained(steps=1)
    sharded_state.save(tmp_path, optimizer)
    head, body = (tmp_path / MANIFEST).read_bytes().split(b"\n")
    assert json.loads(head)["format"] == "hina-sharded-state"
    assert json.loads(body)["tensors"]["ragged/exp_avg"]["shape"] == [70, 300]
