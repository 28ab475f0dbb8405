"""Loading: every rank reads what it needs, whatever the engine and the number of ranks that saved."""

from __future__ import annotations

import contextlib
import json
import logging
import zlib
from collections.abc import Iterable, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint import state_dict_loader

from hina_lightning.sharded_state.errors import CheckpointError
from hina_lightning.sharded_state.manifest import Manifest
from hina_lightning.sharded_state.planners import BoxLoadPlanner
from hina_lightning.sharded_state.ranks import Ranks
from hina_lightning.sharded_state.saving import quietly
from hina_lightning.sharded_state.storage import MANIFEST, PREFIX, Reader
from hina_optim import unwrap_optimizer
from hina_optim.state.jobs import Job, Read
from hina_optim.state.receiving import Plan, Source, receiving

__all__ = ["is_complete", "latest", "load", "open_checkpoint", "read_boxes"]

log = logging.getLogger("hina_lightning")

#: Bytes that are read in one go, about.
BATCH = 1 << 28
#: A file in the format of safetensors begins with the length of its header, 8 bytes.
LENGTH = 8
#: Then comes this, and a checksum of the header in which itself counts as zeros.
HEAD = b'{"__metadata__":{"crc32":"'


def load(
    path: str | PathLike[str],
    optimizer: Any,
    *,
    storage: Source = "optimizer",
    model: nn.Module | None = None,
    process_group: dist.ProcessGroup | None = None,
) -> Any:
    """Load an optimizer's options and state, saved under any engine and by any number of ranks.

    All ranks call it, before the first step (ZeRO and FSDP1: after the optimizer was bound to its engine) or between
    two. Numbers come back as they were saved, to the bit, where they are stored the same way; where not (8-bit state in
    a flat partition that cuts its blocks, another ``state_precision``) they are converted, and a line in the log says
    so. Everything is checked first, on all ranks.

    An optimizer without state needs memory for its new state and one chunk (64 MB), no more; where state is converted,
    for one more tensor as it was saved. One that has state lets go of it, after every chunk has been read and checked
    once before; if a disk or memory then fails all the same, it is left without state.

    Args:
        path: A folder of :func:`save`, or a file of :func:`consolidate`.
        optimizer: Of the class that was saved, also in the wrappers of Lightning, accelerate or DeepSpeed.
        storage: Whose options say how state is stored (``state_precision``, ``state_device``, …): ``"optimizer"``, as
            it was built, or ``"checkpoint"``, as it was when it was saved.
        model: Gives parameters their names if the optimizer was built without.
        process_group: The ranks that load together; None for all.

    Returns:
        The ``extra`` that was saved.

    Raises:
        CheckpointError: It is missing, incomplete, damaged, or of another optimizer or model. All ranks raise it, and
            options and state are as they were.
    """
    if storage not in ("optimizer", "checkpoint"):
        raise ValueError(f"storage={storage!r} is neither 'optimizer' nor 'checkpoint'.")
    ranks = Ranks(process_group)
    optimizer = unwrap_optimizer(optimizer)
    what = f"loading {Path(path)}"
    with contextlib.ExitStack() as stack:
        opened: list[tuple[Reader, Plan]] = []

        def prepare() -> int:
            reader = open_checkpoint(path)
            planned = receiving(optimizer, reader.manifest.state, storage=storage, model=model)
            try:
                plan = stack.enter_context(planned)
            except (TypeError, KeyError, AttributeError, IndexError, OverflowError) as error:
                # an option of a kind that no rule looked for
                raise CheckpointError(f"it does not fit the optimizer: {type(error).__name__}: {error}") from error
            reader.check_files()
            if optimizer.state:
                _verify(reader, [read for job in plan.jobs for read in job.reads])
            opened.append((reader, plan))
            return zlib.crc32(reader.manifest.body().encode())

        digests = ranks.run(what, prepare)
        if len(set(digests)) > 1:
            raise CheckpointError(
                f"{what}: the ranks see other checkpoints there: is it a folder that all of them see?"
            )
        ((reader, plan),) = opened
        entries: dict[Tensor, dict[str, Tensor]] = {}

        def read() -> None:
            if optimizer.state:
                plan.release()
            for batch in _batches(plan.jobs):
                values = iter(read_boxes(reader, [one for job in batch for one in job.reads]))
                for job in batch:
                    entries.setdefault(job.param, {}).update(job.build([next(values) for _ in job.reads]))

        ranks.run(what, read)
        try:
            ranks.run(what, lambda: plan.install(entries))
        except BaseException:
            plan.revert()
            raise
        if plan.notes and ranks.rank == 0:
            log.warning("%s: %s", what, "; ".join(plan.notes))
        return reader.manifest.extra


def _batches(jobs: Iterable[Job]) -> Iterable[list[Job]]:
    """Jobs that are done together: many small ones, or one large one."""
    batch: list[Job] = []
    size = 0
    for job in jobs:
        nbytes = sum(read.nbytes for read in job.reads)
        if batch and size + nbytes > BATCH:
            yield batch
            batch, size = [], 0
        batch.append(job)
        size += nbytes
    if batch:
        yield batch


def read_boxes(reader: Reader, reads: Sequence[Read]) -> list[Tensor]:
    """What is wanted, flat; by torch.distributed.checkpoint, on this rank alone."""
    planner = BoxLoadPlanner(reads, reader.read_metadata())
    values = planner.read()
    with quietly(reader.where):
        state_dict_loader.load({}, storage_reader=reader, planner=planner, no_dist=True)
    return values


def _verify(reader: Reader, reads: Sequence[Read]) -> None:
    """Read every chunk that will be needed, keeping none."""
    plan = BoxLoadPlanner(reads, reader.read_metadata()).create_local_plan()
    reader.visit(plan.items, lambda item, part: None)


def open_checkpoint(path: str | PathLike[str]) -> Reader:
    """What is at ``path``; its manifest has been read and checked, its data files have not.

    Raises:
        CheckpointError: There is no complete checkpoint.
    """
    where = Path(path)
    if where.is_file():
        return _open_file(where)
    if not where.is_dir():
        raise CheckpointError(f"{where}: there is nothing.")
    try:
        data = (where / MANIFEST).read_bytes()
    except FileNotFoundError:
        if any(where.glob(f"{PREFIX}-*")):
            raise CheckpointError(
                f"{where} is incomplete: it has data files, but no {MANIFEST}. The save was interrupted; load an older "
                "checkpoint."
            ) from None
        raise CheckpointError(f"{where} is no checkpoint: it has no {MANIFEST}.") from None
    manifest = Manifest.from_bytes(data, str(where / MANIFEST))
    return Reader(manifest, [(where / name, 0) for name, _ in manifest.files], str(where))


def _open_file(path: Path) -> Reader:
    with path.open("rb") as file:
        length = int.from_bytes(file.read(LENGTH), "little")
        header = file.read(length) if length <= path.stat().st_size else b""
    if not header.startswith(HEAD) or len(header) < length:
        raise CheckpointError(f"{path} is damaged, or no consolidated optimizer state.")
    at = len(HEAD)
    blank = header[:at] + b"0" * 8 + header[at + 8 :]
    if header[at : at + 8] != f"{zlib.crc32(blank):08x}".encode():
        raise CheckpointError(f"{path} is damaged: the checksum of its header is not that of its content.")
    try:
        body = json.loads(header)["__metadata__"]["hina"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{path} is damaged: there is no manifest in its header.") from error
    manifest = Manifest.from_body(body, str(path))
    return Reader(manifest, [(path, LENGTH + length)] * len(manifest.files), str(path))


def is_complete(path: str | PathLike[str]) -> bool:
    """Whether there is a checkpoint whose manifest is whole and whose data files have the length that it says."""
    try:
        open_checkpoint(path).check_files()
    except CheckpointError:
        return False
    return True


def latest(folder: str | PathLike[str]) -> Path | None:
    """The last complete checkpoint among the folders and files directly in ``folder``; None if there is none.

    The last one that was completed, whatever the names. What an interrupted save left is passed over.
    """
    found = []
    for path in sorted(Path(folder).iterdir()) if Path(folder).is_dir() else []:
        with contextlib.suppress(CheckpointError):
            reader = open_checkpoint(path)
            reader.check_files()
            found.append((reader.manifest.time, path))
    return max(found)[1] if found else None
