"""Saving: every rank writes what it holds, each element once."""

from __future__ import annotations

import json
import uuid
import warnings
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from os import PathLike
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint import state_dict_saver
from torch.distributed.checkpoint.api import CheckpointException

from hina_lightning.sharded_state.errors import CheckpointError
from hina_lightning.sharded_state.planners import BoxSavePlanner
from hina_lightning.sharded_state.ranks import Ranks
from hina_lightning.sharded_state.storage import Writer
from hina_optim import unwrap_optimizer
from hina_optim.state.plain import to_plain
from hina_optim.state.portable import Piece, export
from hina_optim.state.schema import checked, tensors

__all__ = ["save"]


def save(
    path: str | PathLike[str],
    optimizer: Any,
    *,
    extra: Any = None,
    model: nn.Module | None = None,
    process_group: dist.ProcessGroup | None = None,
) -> None:
    """Save an optimizer's options and state, to be loaded under any engine and number of ranks.

    All ranks call it, between two steps. The folder must be one that all of them see. A checkpoint that is there
    already stays what it is until the new one is complete; then the new one takes its place.

    Needs memory for one chunk (64 MB) on the host, and a byte an element of one tensor for signs that share bytes.

    Args:
        path: The folder; made if need be. Only files whose names begin with ``hina_state`` are touched.
        optimizer: Of :mod:`hina_optim`, also in the wrappers of Lightning, accelerate or DeepSpeed.
        extra: What else is to be saved, as :func:`load` gives it back: None, numbers, strings, and tuples, lists and
            dicts of them. That of the first rank counts.
        model: Gives parameters their names if the optimizer was built without; names make a checkpoint independent of
            their order.
        process_group: The ranks that save together; None for all.

    Raises:
        CheckpointError: It cannot be saved: an option or ``extra`` is no plain value, the ranks' optimizers differ, or
            a file cannot be written. All ranks raise it, and an older checkpoint is as it was.
    """
    ranks = Ranks(process_group)
    optimizer = unwrap_optimizer(optimizer)
    folder = Path(path)
    pieces: list[Piece] = []
    state: dict[str, Any] = {}

    def prepare() -> tuple[int, str]:
        found, parts = export(optimizer, ranks.all_of, model)
        state.update(found)
        pieces.extend(parts)
        checked(found)
        to_plain(extra, "extra")
        if folder.exists() and not folder.is_dir():
            raise CheckpointError("it is a file; give a folder.")
        return zlib.crc32(json.dumps(found).encode()), uuid.uuid4().hex[:12]

    answers = ranks.run(f"saving {folder}", prepare)
    odd = [rank for rank, (digest, _) in enumerate(answers) if digest != answers[0][0]]
    if odd:
        raise CheckpointError(
            f"saving {folder}: the optimizer of rank {odd[0]} is another than that of rank 0 (parameters, options such "
            "as lr, or what has state): build it alike on all ranks, and let schedulers follow the same numbers."
        )
    writer = Writer(folder, answers[0][1], ranks.rank, ranks.size, state, extra)
    # only where all ranks know that it failed: one that merely lost the others cannot tell whether they finished
    with quietly(f"saving {folder}", writer.discard):
        state_dict_saver.save(
            {},
            storage_writer=writer,
            planner=BoxSavePlanner(pieces, tensors(state)),
            process_group=ranks.group,
            no_dist=not ranks.active,
        )


@contextmanager
def quietly(what: str, failed: Callable[[], None] | None = None) -> Iterator[None]:
    """Errors of torch.distributed.checkpoint as ours; without its remarks about a single process, which is none.

    Args:
        what: In words, for errors.
        failed: Called if all ranks have agreed that it failed.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        try:
            yield
        except CheckpointException as error:
            if failed is not None:
                failed()
            rank, (cause, _) = sorted(error.failures.items())[0]
            if not isinstance(cause, (ValueError, OSError)):
                raise RuntimeError(f"{what}: rank {rank}: {type(cause).__name__}: {cause}") from cause
            raise CheckpointError(f"{what}: rank {rank}: {cause}") from cause
