"""Several ranks in forked processes: their results, errors and hangs come back to the test.

A rank is a fork of the test's own process, so nothing is imported again and what the test has computed is there: two
ranks cost about 0.3 s. A collective that waits for longer than 20 s is an error of its rank; a world that takes longer
than its limit is killed, and the failure shows where each rank was.

    def rank_main(rank: int, shape: tuple[int, ...]) -> Tensor: ...

    values = run(rank_main, 4, (3, 5))         # one value a rank; raises WorldError if any rank fails
    found = outcomes(rank_main, 4, (3, 5))     # the same, but errors are returned, by rank
    run(main, 2, launched=True)                # as torchrun starts them: RANK, … are set and nothing is initialized
"""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import multiprocessing
import os
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

__all__ = ["Outcome", "WorldError", "outcomes", "run"]

#: Seconds after which a collective gives up.
PATIENCE = 20.0
#: Seconds that the other ranks get after one has died without a word, or with an error.
GRACE = PATIENCE + 5.0
#: What gloo says on a rank whose peer is gone: a consequence, shown after the causes.
CONSEQUENCES = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "Timed out waiting")
PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class Outcome:
    """How a rank ended.

    Attributes:
        rank: Which.
        value: What its function returned; None after an error.
        error: Type and message of its error, or how it ended without one (``"killed by SIGKILL"``); None without one.
        trace: The traceback, or of a rank that was killed for hanging, where it was.
    """

    rank: int
    value: Any = None
    error: str | None = None
    trace: str = ""


class WorldError(AssertionError):
    """At least one rank failed; the message has every rank's error, causes before consequences."""

    def __init__(self, failed: Sequence[Outcome], size: int) -> None:
        ordered = sorted(failed, key=lambda o: any(words in (o.error or "") for words in CONSEQUENCES))
        parts, shown = [], set()
        for o in ordered:
            again = o.error in shown  # a traceback is read once
            parts.append(f"rank {o.rank} of {size}: {o.error}" + ("" if again else f"\n{o.trace}"))
            shown.add(o.error)
        super().__init__("\n".join([f"{len(failed)} of {size} ranks failed", *parts]))
        self.outcomes = tuple(ordered)


def run(function: Callable[..., Any], size: int, *args: Any, launched: bool = False, limit: float = 120.0) -> list[Any]:
    """``function(rank, *args)`` on every rank.

    Args:
        function: Runs in a fork; what it returns is pickled.
        size: Number of ranks.
        args: Passed on, without pickling.
        launched: Set the environment of torchelastic for the frameworks that initialize the process group themselves,
            instead of doing it.
        limit: Seconds after which all are killed.

    Returns:
        What each rank returned.

    Raises:
        WorldError: A rank raised, died or hung.
    """
    found = outcomes(function, size, *args, launched=launched, limit=limit)
    failed = [o for o in found if o.error is not None]
    if failed:
        raise WorldError(failed, size)
    return [o.value for o in found]


def outcomes(
    function: Callable[..., Any], size: int, *args: Any, launched: bool = False, limit: float = 120.0
) -> list[Outcome]:
    """:func:`run` that returns errors instead of raising; see there."""
    context = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory(prefix="world") as name, contextlib.ExitStack() as stack:
        folder = Path(name)
        # the store lives here, so that no rank ends it and no port is guessed
        store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False) if launched else None
        port = store.port if store is not None else 0
        ranks = [
            context.Process(target=_rank_main, args=(rank, size, folder, port, function, args), name=f"rank{rank}")
            for rank in range(size)
        ]
        stack.callback(_end, ranks)
        sys.stdout.flush()
        sys.stderr.flush()
        for process in ranks:
            process.start()
        hung = _watch(ranks, folder, limit)
        _end(ranks)
        return [_outcome(rank, process, folder, rank in hung, limit) for rank, process in enumerate(ranks)]


def _watch(ranks: Sequence[Any], folder: Path, limit: float) -> set[int]:
    """Wait for all; returns the ranks that did not end, after they have written down where they are."""
    deadline = time.monotonic() + limit
    failed = False
    while alive := [p for p in ranks if p.is_alive()]:
        left = deadline - time.monotonic()
        if left <= 0:
            break
        wait([p.sentinel for p in alive], timeout=min(left, 1.0))
        if not failed and any(_failed(rank, p, folder) for rank, p in enumerate(ranks)):
            failed, deadline = True, min(deadline, time.monotonic() + GRACE)
    hung = {rank for rank, p in enumerate(ranks) if p.is_alive()}
    for rank in hung:
        with contextlib.suppress(ProcessLookupError):
            os.kill(ranks[rank].pid, signal.SIGUSR1)
    if hung:
        time.sleep(0.5)
    return hung


def _failed(rank: int, process: Any, folder: Path) -> bool:
    return (folder / f"error{rank}").exists() or process.exitcode not in (None, 0)


def _end(ranks: Sequence[Any]) -> None:
    """Kill what still runs, with all that it has started."""
    for process in ranks:
        if process.pid is None:
            continue
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        process.join()


def _outcome(rank: int, process: Any, folder: Path, hung: bool, limit: float) -> Outcome:
    value, error, trace = (folder / f"{kind}{rank}" for kind in ("value", "error", "trace"))
    if value.exists():
        return Outcome(rank, value=torch.load(value, weights_only=False))
    if error.exists():
        what, _, where = error.read_text().partition("\0")
        return Outcome(rank, error=what, trace=where)
    if hung:
        where = trace.read_text() if trace.exists() else ""
        return Outcome(
            rank, error=f"hung: killed after {limit:.0f} s, or {GRACE:.0f} s after another rank", trace=where
        )
    code = process.exitcode or 0
    how = f"killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code} and no result"
    return Outcome(rank, error=how)


# -- in the fork -----------------------------------------------------------------------------------------------------


def _rank_main(
    rank: int, size: int, folder: Path, port: int, function: Callable[..., Any], args: tuple[Any, ...]
) -> None:
    os.setpgid(0, 0)
    if sys.platform == "linux":  # a test run that is killed leaves no rank behind
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    torch.set_num_threads(1)
    trace = (folder / f"trace{rank}").open("w")
    faulthandler.register(signal.SIGUSR1, file=trace, all_threads=True)
    code = 0
    try:
        _connect(rank, size, folder, port)
        value = function(rank, *args)
        partial = folder / f"partial{rank}"
        torch.save(value, partial)
        partial.rename(folder / f"value{rank}")
    except BaseException as error:
        code = 1
        text = "".join(traceback.format_exception(error))
        partial = folder / f"partial{rank}"
        partial.write_text(f"{type(error).__name__}: {error}\0{text}")
        partial.rename(folder / f"error{rank}")
    sys.stdout.flush()
    sys.stderr.flush()
    if code == 0 and dist.is_initialized():
        with contextlib.suppress(Exception):
            dist.destroy_process_group()
    # without the exit handlers of the test's process, and without waiting for threads of a framework
    os._exit(code)


def _connect(rank: int, size: int, folder: Path, port: int) -> None:
    if sys.platform == "linux":
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    if not port:
        dist.init_process_group(
            "gloo",
            init_method=f"file://{folder}/store",
            rank=rank,
            world_size=size,
            timeout=timedelta(seconds=PATIENCE),
        )
        return
    one = {"GROUP_RANK": 0, "GROUP_WORLD_SIZE": 1, "TORCHELASTIC_RESTART_COUNT": 0, "TORCHELASTIC_MAX_RESTARTS": 0}
    mine = {"RANK": rank, "LOCAL_RANK": rank, "ROLE_RANK": rank}
    all_of = {"WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size, "ROLE_WORLD_SIZE": size}
    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_USE_AGENT_STORE": True}
    who = {"TORCHELASTIC_RUN_ID": folder.name, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": 1}
    os.environ.update({k: str(v) for k, v in {**one, **mine, **all_of, **where, **who}.items()})
