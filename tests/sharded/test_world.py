"""The harness itself: values, errors, deaths and hangs of ranks come back, quickly, and nothing is left running."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import psutil
import pytest
import torch
import torch.distributed as dist

from tests.sharded import world
from tests.sharded.world import WorldError, outcomes, run


def summed(rank: int, value: torch.Tensor) -> tuple[int, torch.Tensor]:
    total = value * (rank + 1)
    dist.all_reduce(total)
    return dist.get_world_size(), total


def test_values_come_back_from_every_rank() -> None:
    values = run(summed, 3, torch.ones(2))
    assert [size for size, _ in values] == [3, 3, 3]
    for _, total in values:
        torch.testing.assert_close(total, torch.full((2,), 6.0))


def one_fails(rank: int) -> None:
    if rank == 1:
        raise KeyError("of rank one")
    dist.barrier()


def test_an_error_names_its_rank_and_place() -> None:
    began = time.monotonic()
    with pytest.raises(WorldError, match=r"rank 1 of 2: KeyError: 'of rank one'") as caught:
        run(one_fails, 2)
    assert "in one_fails" in caught.value.outcomes[0].trace and caught.value.outcomes[0].rank == 1
    assert time.monotonic() - began < world.PATIENCE


def one_dies(rank: int) -> int:
    if rank == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return rank


def test_a_death_is_an_outcome() -> None:
    found = outcomes(one_dies, 2)
    assert found[0].error == "killed by SIGKILL" and found[1].value == 1


def hangs(rank: int, folder: Path) -> None:
    started = subprocess.Popen(["sleep", "1000"])  # what a rank has started ends with it
    (folder / str(rank)).write_text(str(started.pid))
    while rank == 1:
        time.sleep(0.1)


def test_a_hang_is_killed_and_shows_where(tmp_path: Path) -> None:
    with pytest.raises(WorldError, match="rank 1 of 2: hung") as caught:
        run(hangs, 2, tmp_path, limit=2.0)
    assert len(caught.value.outcomes) == 1 and "in hangs" in caught.value.outcomes[0].trace
    for file in tmp_path.iterdir():
        pid = int(file.read_text())
        assert not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


def from_environment(rank: int) -> list[int]:
    assert not dist.is_initialized() and os.environ["RANK"] == os.environ["LOCAL_RANK"] == str(rank)
    dist.init_process_group("gloo")
    return [int(i) for i in summed(rank, torch.ones(1))[1]]


def test_launched_ranks_initialize_themselves() -> None:
    assert run(from_environment, 2, launched=True) == [[3], [3]]
    assert "RANK" not in os.environ
