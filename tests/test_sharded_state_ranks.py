"""Faults that one rank of several sees, and ranks that are killed: all raise, and what was complete still loads."""

from __future__ import annotations

import copy
import json
import multiprocessing
import os
import shutil
import signal
import time
import zlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from hina_lightning import sharded_state
from hina_lightning.sharded_state import CheckpointError, storage
from hina_lightning.sharded_state.storage import MANIFEST
from tests.sharded.world import outcomes, run
from tests.sharded_state_cases import Run, begin, start
from tests.test_resume import same_bits
from tests.test_sharded_state_faults import rewritten, trained


def one_rank_sees_it(rank: int, folder: Path) -> list[tuple[str, str]]:
    """Every rank has a copy; the last one's is damaged in one way after the other."""
    begin(rank)
    size = torch.distributed.get_world_size()
    one = start("fsdp2", "8bit")
    one.step(2)
    sharded_state.save(folder / "a", one.optimizer, extra={"step": 2})
    mine = folder / f"mine{rank}"
    shutil.copytree(folder / "a", mine)
    one.step(1)
    torch.distributed.barrier()
    before = here(one)
    binary = sorted(mine.glob("*.bin"))[0]
    found = []
    for name in ("missing", "byte", "truncated", "manifest", "incomplete", "other", "memory"):
        whole = {path: path.read_bytes() for path in mine.iterdir()}
        if rank == size - 1:
            if name == "missing":
                binary.unlink()
            elif name == "byte":
                data = bytearray(whole[binary])
                for at in range(0, len(data), 64):
                    data[at] ^= 1
                binary.write_bytes(data)
            elif name == "truncated":
                binary.write_bytes(whole[binary][:-1])
            elif name == "manifest":
                (mine / MANIFEST).write_bytes(whole[mine / MANIFEST][:-5])
            elif name == "incomplete":
                (mine / MANIFEST).unlink()
            elif name == "other":
                body = json.loads(whole[mine / MANIFEST].split(b"\n")[1])
                rewritten(mine / MANIFEST, {**body, "time": 1})
        if name == "memory" and rank == size - 1:

            def full(*args: Any, **kwargs: Any) -> Any:
                raise torch.OutOfMemoryError("no memory")

            torch.frombuffer = full  # type: ignore[assignment]
        begun = time.monotonic()
        try:
            sharded_state.load(mine, one.optimizer)
            found.append((name, "loaded"))
        except (CheckpointError, torch.OutOfMemoryError) as error:
            found.append((name, str(error)))
        assert time.monotonic() - begun < 10
        for path, data in whole.items():
            path.write_bytes(data)
        same_bits(here(one), before)
    return found


def here(one: Run) -> Any:
    """This rank's state, bit for bit."""
    layout = one.optimizer._layout
    state = {
        m.name: {key: layout.unwrap(m.param, value).clone() for key, value in sorted(m.state.items())}
        for m in one.members()
    }
    return [state, copy.deepcopy([{k: v for k, v in g.items() if k != "params"} for g in one.optimizer.param_groups])]


@pytest.mark.parametrize("size", [2, 4])
def test_a_fault_that_one_rank_sees_is_raised_by_all(size: int, tmp_path: Path) -> None:
    ranks = run(one_rank_sees_it, size, tmp_path)
    words = {
        "missing": "missing",
        "byte": "damaged",
        "truncated": "bytes, expected",
        "manifest": "truncated",
        "incomplete": "incomplete",
        "other": "see other checkpoints",
        "memory": "no memory",
    }
    for rank, found in enumerate(ranks):
        assert [name for name, _ in found] == list(words)
        for name, text in found:
            assert words[name] in text, (rank, name, text)
            if rank < size - 1 and name != "other":
                assert f"rank {size - 1}" in text


def faults_of_saving(rank: int, folder: Path) -> list[str]:
    begin(rank)
    last = rank == torch.distributed.get_world_size() - 1
    one = start("fsdp2", "fp32")
    one.step(2)
    sharded_state.save(folder / "a", one.optimizer, extra={"step": 2})
    one.step(1)
    found = []
    group = one.optimizer.param_groups[0]
    lr = group["lr"]

    def attempt() -> None:
        try:
            sharded_state.save(folder / "a", one.optimizer)
            found.append("saved")
        except CheckpointError as error:
            found.append(str(error))

    group["lr"] = lr * 2 if last else lr
    attempt()
    group["lr"] = lr
    if last:
        group["odd"] = object()
    attempt()
    group.pop("odd", None)

    def crc32(data: bytes) -> int:
        raise OSError("disk full")

    if last:
        storage.zlib = SimpleNamespace(crc32=crc32)  # type: ignore[assignment]
    attempt()
    return found


@pytest.mark.parametrize("size", [2, 4])
def test_a_save_that_fails_on_one_rank_fails_on_all(size: int, tmp_path: Path) -> None:
    """And the older checkpoint is there."""
    ranks = run(faults_of_saving, size, tmp_path)
    for found in ranks:
        assert "another than that of rank 0" in found[0]
        assert "option odd" in found[1]
        assert "disk full" in found[2]
    assert len(list((tmp_path / "a").iterdir())) == size + 1
    one = start("one", "fp32")
    assert sharded_state.load(tmp_path / "a", one.optimizer) == {"step": 2}


def no_memory_on_one_rank(rank: int, folder: Path) -> str:
    begin(rank)
    one = start("fsdp2", "8bit")
    one.step(2)
    sharded_state.save(folder / "a", one.optimizer)
    fresh = start("fsdp2", "8bit", lr=1e-4)
    if rank == 1:

        def full(alone: Any) -> None:
            raise torch.OutOfMemoryError("no room for the stacks")

        fresh.optimizer._buckets.restore = full  # type: ignore[method-assign]
    with pytest.raises((CheckpointError, torch.OutOfMemoryError)) as caught:
        sharded_state.load(folder / "a", fresh.optimizer)
    assert not any(fresh.optimizer.state.values())
    assert fresh.optimizer.param_groups[0]["lr"] == 1e-4
    return type(caught.value).__name__ + str(caught.value)


def test_a_rank_without_memory(tmp_path: Path) -> None:
    """It raises what happened, the others that it did; no rank keeps what one could not take."""
    first, second = run(no_memory_on_one_rank, 2, tmp_path)
    assert "CheckpointError" in first and "rank 1" in first and "no room" in first
    assert "OutOfMemoryError" in second


# -- killed ------------------------------------------------------------------------------------------------------------


def until_killed(rank: int, folder: Path, when: str) -> None:
    """Save after each step, until rank 1 (or 0) is killed in or after the fourth save."""
    begin(rank)
    one = start("fsdp2", "8bit")
    commit = storage.commit
    for step in range(1, 6):
        one.step(1)
        if step == 4 and (when, rank) in (("writing", 1), ("committing", 0)):
            storage.zlib = SimpleNamespace(crc32=_kill)  # type: ignore[assignment]
            if when == "committing":
                storage.zlib = zlib
                storage.commit = _kill  # type: ignore[assignment]
        if step == 4 and (when, rank) == ("committed", 0):
            storage.commit = lambda *given: _kill(commit(*given))  # type: ignore[assignment]
        sharded_state.save(folder / f"step-{step}", one.optimizer, extra={"step": step})
        if step == 4 and (when, rank) == ("between", 1):
            _kill()


def _kill(*args: Any) -> Any:
    os.kill(os.getpid(), signal.SIGKILL)


def go_on(rank: int, folder: Path | None) -> Any:
    """From the last complete checkpoint, or from the beginning, to step 6."""
    begin(rank)
    one = start("fsdp2", "8bit")
    if folder is not None:
        path = sharded_state.latest(folder)
        assert path is not None
        steps = int(path.name.split("-")[1])
        one.step(steps)  # the weights, which another file would hold
        one.optimizer.state.clear()
        one.taken = sharded_state.load(path, one.optimizer)["step"]
        assert one.taken == steps
    begun = one.taken
    one.step(6 - begun)
    return begun, here(one), {name: value for name, (_, value) in one.pieces().items()}


@pytest.mark.parametrize(("when", "last"), [("between", 4), ("writing", 3), ("committing", 3), ("committed", 4)])
def test_a_rank_that_is_killed(when: str, last: int, tmp_path: Path) -> None:
    """Between two steps, while it writes, before and after the manifest: what is complete goes on as if nothing was."""
    ended = outcomes(until_killed, 2, tmp_path, when)
    assert any("SIGKILL" in (one.error or "") for one in ended)
    assert all(one.error is not None for one in ended)
    assert [path.name for path in sorted(tmp_path.iterdir()) if sharded_state.is_complete(path)] == [
        f"step-{step}" for step in range(1, last + 1)
    ]
    if last == 3:
        with pytest.raises(CheckpointError, match="step-4 is incomplete"):
            sharded_state.load(tmp_path / "step-4", start("one", "8bit").optimizer)
    for found, expected in zip(run(go_on, 2, tmp_path), run(go_on, 2, None), strict=True):
        assert found[0] == last
        same_bits(found[1:], expected[1:])


def save_for_ever(path: Path) -> None:
    torch.set_num_threads(1)
    optimizer = trained(1)
    params = [p for group in optimizer.param_groups for p in group["params"]]
    for step in range(1, 10_000):
        sharded_state.save(path, optimizer, extra={"step": step, "first": params[1][0].item()})
        optimizer.step()


def test_killed_at_any_moment(tmp_path: Path) -> None:
    """The same folder again and again: there is a complete checkpoint, never an older one than before."""
    path, seen = tmp_path / "a", 0
    for moment in (0.31, 0.5, 0.42, 0.37):
        process = multiprocessing.get_context("fork").Process(target=save_for_ever, args=(path,))
        process.start()
        deadline = time.monotonic() + 20
        while not sharded_state.is_complete(path) and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(moment)
        process.kill()
        process.join()
        step = sharded_state.load(path, trained(steps=0))["step"]
        assert step >= 1
        seen = max(seen, step)
    assert seen > 1
    optimizer = trained()
    sharded_state.save(path, optimizer)
    assert len(list(path.iterdir())) == 2, "what killed saves left was not removed"
