"""Damaged, incomplete and foreign checkpoints: one clear error on all ranks, and nothing changed."""

from __future__ import annotations

import copy
import json
import shutil
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from hina_lightning import sharded_state
from hina_lightning.sharded_state import CheckpointError
from hina_lightning.sharded_state.storage import MANIFEST
from hina_optim import Automagic_CameAMP, HinaAdaptive
from hina_optim.engine.optimizer import HinaOptimizer
from tests.optim_cases import NOTHING
from tests.test_resume import same_bits

LR = 1e-3
SHAPES: dict[str, tuple[int, ...]] = {"weight": (6, 20), "bias": (6,)}


def trained(steps: int = 2, shapes: dict[str, tuple[int, ...]] = SHAPES, **options: Any) -> HinaAdaptive:
    """A small optimizer with 8-bit and other state."""
    named = [(name, nn.Parameter(torch.ones(shape))) for name, shape in shapes.items()]
    told = {**NOTHING, "state_precision": "8bit", "min_8bit_size": 100, **options}
    optimizer = HinaAdaptive(named, lr=LR, **told)
    for step in range(steps):
        for i, (_, p) in enumerate(named):
            p.grad = torch.linspace(-1, 1, p.numel()).reshape(p.shape) * (step + 1) + i
        optimizer.step()
    return optimizer


def snapshot(optimizer: HinaOptimizer) -> dict[str, Any]:
    """All that a failed load must not change."""
    return copy.deepcopy({**optimizer.state_dict(), "aliases": optimizer._buckets.identities.aliases})


class Victim:
    """An optimizer that damaged checkpoints are loaded into."""

    def __init__(self) -> None:
        self.optimizer = trained(3)
        self.before = snapshot(self.optimizer)

    def refuses(self, path: Path) -> str:
        """The error, after which nothing has changed."""
        with pytest.raises(CheckpointError) as caught:
            sharded_state.load(path, self.optimizer)
        same_bits(snapshot(self.optimizer), self.before)
        return str(caught.value)


@pytest.fixture(scope="module")
def victim() -> Victim:
    return Victim()


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a checkpoint as folder and as file; put back after every damage."""
    path = tmp_path_factory.mktemp("good")
    sharded_state.save(path / "folder", trained(), extra={"step": 2})
    sharded_state.consolidate(path / "folder", path / "file.safetensors")
    return path


def files(good: Path) -> list[Path]:
    return [*sorted((good / "folder").iterdir()), good / "file.safetensors"]


def checkpoint_of(file: Path) -> Path:
    return file if file.suffix == ".safetensors" else file.parent


# -- bytes -------------------------------------------------------------------------------------------------------------


def damaged(file: Path, data: bytes, victim: Victim) -> str:
    """The error when a file holds this instead."""
    whole = file.read_bytes()
    try:
        file.write_bytes(data)
        return victim.refuses(checkpoint_of(file))
    finally:
        file.write_bytes(whole)


@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(0, 2), st.floats(0, 1, exclude_max=True), st.integers(1, 255))
def test_any_byte(good: Path, victim: Victim, which: int, where: float, flip: int) -> None:
    """Of any file of a folder, and of a single file."""
    file = files(good)[which]
    data = bytearray(file.read_bytes())
    data[int(where * len(data))] ^= flip
    assert str(checkpoint_of(file)) in damaged(file, bytes(data), victim)


def test_every_byte_of_the_heads(good: Path, victim: Victim) -> None:
    """Where formats, versions, lengths and checksums are."""
    for file, count in ((good / "folder" / MANIFEST, 100), (good / "file.safetensors", 50)):
        whole = file.read_bytes()
        for at in range(count):
            damaged(file, whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :], victim)


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(0, 2), st.floats(0, 1, exclude_max=True))
def test_truncated_anywhere(good: Path, victim: Victim, which: int, where: float) -> None:
    file = files(good)[which]
    whole = file.read_bytes()
    damaged(file, whole[: int(where * len(whole))], victim)


def test_more_than_was_written(good: Path, victim: Victim) -> None:
    for file in files(good):
        damaged(file, file.read_bytes() + b"\0", victim)


# -- fields --------------------------------------------------------------------------------------------------------


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where something can be replaced."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield (*path, key)
        yield from places(item, (*path, key))


def rewritten(path: Path, body: Any) -> None:
    """A manifest with a right checksum."""
    text = json.dumps(body).encode()
    head = json.loads(path.read_bytes().split(b"\n")[0])
    head = {**head, "bytes": len(text), "crc32": f"{zlib.crc32(text):08x}"}
    path.write_bytes(json.dumps(head).encode() + b"\n" + text)


ODD = st.one_of(
    st.sampled_from(["DELETE", None, True, -1, 0, 1, 7, 2**70, 0.5, 1e300, "", "x", "../x", [], [[]], {}, {"a": 1}]),
    st.sampled_from(
        [{"form": "zero"}, {"form": "tensor", "dtype": "float32"}, {"tensor": 1, "dtype": "int8"}, "uint8"]
    ),
    st.lists(st.integers(-1, 30), max_size=3),
)


@settings(max_examples=250, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_any_field(good: Path, victim: Victim, data: st.DataObject) -> None:
    """A manifest with a right checksum and a wrong value: refused, or a value that is as good as another."""
    file = good / "folder" / MANIFEST
    whole = file.read_bytes()
    body = json.loads(whole.split(b"\n")[1])
    path = data.draw(st.sampled_from(list(places(body))))
    value = data.draw(ODD)
    holder = body
    for key in path[:-1]:
        holder = holder[key]
    old = holder[path[-1]]
    if value == "DELETE":
        del holder[path[-1]]
    else:
        holder[path[-1]] = value
    harmless = path[0] in ("extra", "time", "ranks") or "options" in path or path[-1] == "alone" or "told" in path
    harmless = harmless or (path[-1] in ("dtype", "named") and path[:2] != ("tensors",))
    try:
        rewritten(file, body)
        if value == old or harmless:
            try:
                sharded_state.load(good / "folder", victim.optimizer)
            except CheckpointError:
                same_bits(snapshot(victim.optimizer), victim.before)
            else:
                victim.__init__()  # type: ignore[misc]
        else:
            victim.refuses(good / "folder")
    except BaseException:
        victim.__init__()  # type: ignore[misc]  # what was loaded is not what the next example expects
        raise
    finally:
        file.write_bytes(whole)


@pytest.mark.parametrize(
    ("path", "value", "named"),
    [
        (("state", "params", 0, "slots", "exp_avg", "block"), 2**70, "block"),
        (("state", "params", 0, "slots", "exp_avg_sq", "compute"), "uint8", "uint8"),
        (("state", "params", 0, "slots", "exp_avg_sq", "signed"), True, "never stored"),
        (("state", "described", "dict"), {"anything": 1}, "anything"),
        (("state", "described"), {"tuple": [1]}, "described"),
        (("tensors", "bias/step", "chunks", 0, 3), 0, "the same bytes"),
    ],
)
def test_fields_that_were_believed(good: Path, victim: Victim, path: tuple[Any, ...], value: Any, named: str) -> None:
    """Found by the test above, some of them harmless: nothing is read in a way in which nothing is written."""
    file = good / "folder" / MANIFEST
    whole = file.read_bytes()
    body = json.loads(whole.split(b"\n")[1])
    holder = body
    for key in path[:-1]:
        holder = holder[key]
    holder[path[-1]] = value
    try:
        rewritten(file, body)
        assert named in victim.refuses(good / "folder")
    finally:
        file.write_bytes(whole)


def test_chunks_that_overlap(good: Path, victim: Victim) -> None:
    """As many elements as there should be, some of them twice."""
    file = good / "folder" / MANIFEST
    whole = file.read_bytes()
    body = json.loads(whole.split(b"\n")[1])
    (chunk,) = body["tensors"]["weight/exp_avg"]["chunks"]
    half = [[0, 0], [3, 20], *chunk[2:]]
    body["tensors"]["weight/exp_avg"]["chunks"] = [half, half]
    try:
        rewritten(file, body)
        assert "overlap" in victim.refuses(good / "folder")
    finally:
        file.write_bytes(whole)


# -- what is told ----------------------------------------------------------------------------------------------------


def test_each_fault_is_named(good: Path, victim: Victim, tmp_path: Path) -> None:
    folder = tmp_path / "a"
    shutil.copytree(good / "folder", folder)
    binary = next(folder.glob("*.bin"))
    moved = binary.rename(tmp_path / "elsewhere")
    assert binary.name in victim.refuses(folder) and "missing" in victim.refuses(folder)
    moved.rename(binary)
    data = bytearray(binary.read_bytes())
    data[5] ^= 4
    binary.write_bytes(data)
    assert "weight/" in victim.refuses(folder) and binary.name in victim.refuses(folder)
    (folder / MANIFEST).unlink()
    assert "incomplete" in victim.refuses(folder) and "interrupted" in victim.refuses(folder)
    binary.unlink()
    assert "no checkpoint" in victim.refuses(folder)
    assert "nothing" in victim.refuses(tmp_path / "b")
    (tmp_path / "c").write_bytes(b"something else, longer than a header")
    assert "no consolidated" in victim.refuses(tmp_path / "c")


def edited(good: Path, to: Path, **changes: Any) -> Path:
    """A copy with other values in its metadata."""
    shutil.copytree(good / "folder", to)
    body = json.loads((to / MANIFEST).read_bytes().split(b"\n")[1])
    body["state"].update(changes)
    rewritten(to / MANIFEST, body)
    return to


def test_what_belongs_to_something_else_is_named(good: Path, victim: Victim, tmp_path: Path) -> None:
    def loaded(optimizer: HinaOptimizer, path: Path = good / "folder") -> str:
        before = snapshot(optimizer)
        with pytest.raises(CheckpointError) as caught:
            sharded_state.load(path, optimizer)
        same_bits(snapshot(optimizer), before)
        return str(caught.value)

    assert "lacks gain" in loaded(trained(shapes={"weight": (6, 20), "gain": (6,)}))
    assert "weight has shape (6, 21), in the checkpoint (6, 20)" in loaded(
        trained(shapes={**SHAPES, "weight": (6, 21)})
    )
    other = Automagic_CameAMP([(name, nn.Parameter(torch.ones(shape))) for name, shape in SHAPES.items()], lr=1e-6)
    assert "saved by HinaAdaptive" in loaded(other)
    body = json.loads((good / "folder" / MANIFEST).read_bytes().split(b"\n")[1])["state"]
    assert "version 99" in victim.refuses(edited(good, tmp_path / "version", version=99))
    groups = copy.deepcopy(body["groups"])
    del groups[0]["options"]["betas"]
    assert "betas" in victim.refuses(edited(good, tmp_path / "options", groups=groups))
    groups[0]["options"]["betas"] = {"tuple": [1.5, 0.9]}
    assert "betas" in victim.refuses(edited(good, tmp_path / "betas", groups=groups))
    two = [{**body["groups"][0], "params": [at]} for at in (0, 1)]
    assert "2 groups" in victim.refuses(edited(good, tmp_path / "groups", groups=two))
    params = copy.deepcopy(body["params"])
    del params[1]["slots"]["exp_avg"]
    assert "exp_avg" in victim.refuses(edited(good, tmp_path / "slots", params=params))
    nameless = HinaAdaptive([nn.Parameter(torch.ones(6, 20))], lr=LR, **NOTHING)
    assert "groups of [2] parameters" in loaded(nameless)


def test_techniques_that_were_not_saved(tmp_path: Path) -> None:
    """Options come from the checkpoint, so the techniques do; an optimizer with other rules of its own is another."""
    sharded_state.save(tmp_path / "a", trained(use_tam=True))
    optimizer = trained(steps=0)
    sharded_state.load(tmp_path / "a", optimizer)
    assert optimizer.param_groups[0]["use_tam"] and "torque" in next(iter(optimizer.state.values()))
