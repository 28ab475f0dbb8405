"""One file instead of a folder, and back.

The file is in the format of safetensors: any of its readers can look at the tensors. The manifest is in its header.
"""

from __future__ import annotations

import json
import time
import uuid
import zlib
from collections.abc import Sequence
from dataclasses import replace
from os import PathLike
from pathlib import Path
from typing import BinaryIO

import torch
import torch.distributed as dist

from hina_lightning.sharded_state.errors import CheckpointError
from hina_lightning.sharded_state.loading import HEAD, LENGTH, open_checkpoint, read_boxes
from hina_lightning.sharded_state.manifest import Chunk, Manifest, split
from hina_lightning.sharded_state.ranks import Ranks
from hina_lightning.sharded_state.storage import PREFIX, Reader, as_bytes, commit, sync, written
from hina_optim.state.jobs import Read
from hina_optim.state.regions import whole

__all__ = ["consolidate", "spread"]

#: As safetensors calls them.
DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int8: "I8",
    torch.uint8: "U8",
}


def consolidate(
    path: str | PathLike[str], file: str | PathLike[str], *, process_group: dist.ProcessGroup | None = None
) -> None:
    """Make one file of a checkpoint; :func:`load` takes it like the folder.

    With several ranks all call it, and the first one works. Needs memory for one chunk (64 MB). An older file of that
    name is replaced once the new one is complete.

    Args:
        path: A folder of :func:`save`, or such a file.
        file: Where to write; by custom ``*.safetensors``.
        process_group: The ranks that call it; None for all.

    Raises:
        CheckpointError: The checkpoint is missing, incomplete or damaged, or the file cannot be written.
    """
    ranks = Ranks(process_group)

    def work() -> None:
        if ranks.rank == 0:
            _consolidate(path, Path(file))

    ranks.run(f"consolidating {Path(path)}", work)


def spread(path: str | PathLike[str], folder: str | PathLike[str]) -> None:
    """Make a folder of a checkpoint, as :func:`save` would in one process. For one process.

    Raises:
        CheckpointError: The checkpoint is missing, incomplete or damaged, or the folder cannot be written.
    """
    reader, to, token = open_checkpoint(path), Path(folder), uuid.uuid4().hex[:12]
    if to.exists() and not to.is_dir():
        raise CheckpointError(f"{to} is a file; give a folder.")
    reader.check_files()
    to.mkdir(parents=True, exist_ok=True)
    name = f"{PREFIX}-{token}-00000.bin"
    with written(to / name) as out:
        chunks = _copied(reader, out, 0)
        manifest = replace(reader.manifest, chunks=chunks, files=[(name, out.tell())], time=time.time_ns())
    commit(to, manifest, token)


def _order(manifest: Manifest) -> list[tuple[str, torch.dtype, tuple[int, ...]]]:
    """Tensors with wide elements first, so that each begins at a multiple of its element's size."""
    table = [(key, dtype, shape) for key, (dtype, shape) in manifest.tensors().items()]
    return sorted(table, key=lambda one: (-one[1].itemsize, one[0]))


def _copied(reader: Reader, out: BinaryIO, begin: int) -> dict[str, Sequence[Chunk]]:
    """Write all tensors whole, one after the other; ``begin`` is where the data begins in the file."""
    chunks: dict[str, Sequence[Chunk]] = {}
    for key, dtype, shape in _order(reader.manifest):
        mine = []
        for box in (part for one in whole(shape) for part in split(one, dtype.itemsize)):
            (value,) = read_boxes(reader, [Read(key, shape, dtype, (box,), torch.device("cpu"))])
            data = as_bytes(value)
            mine.append(Chunk(*box, file=0, at=out.tell() - begin, crc=zlib.crc32(data)))
            out.write(data)
        chunks[key] = mine
    return chunks


def _header(manifest: Manifest) -> bytes:
    """The length and the header; as long for the same boxes, whatever the checksums."""
    tensors, at = {}, 0
    for key, dtype, shape in _order(manifest):
        end = at + torch.Size(shape).numel() * dtype.itemsize
        tensors[key] = {"dtype": DTYPES[dtype], "shape": list(shape), "data_offsets": [at, end]}
        at = end
    blank = {"crc32": "0" * 8, "hina": manifest.body()}
    text = json.dumps({"__metadata__": blank, **tensors}, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    crc = f"{zlib.crc32(text):08x}".encode()
    return len(text).to_bytes(LENGTH, "little") + text.replace(HEAD + b"0" * 8, HEAD + crc, 1)


def _consolidate(path: str | PathLike[str], file: Path) -> None:
    reader = open_checkpoint(path)
    reader.check_files()
    planned: dict[str, Sequence[Chunk]] = {}
    total = 0
    for key, dtype, shape in _order(reader.manifest):
        mine = []
        for box in (part for one in whole(shape) for part in split(one, dtype.itemsize)):
            mine.append(Chunk(*box, file=0, at=total, crc=0))
            total += torch.Size(box[1]).numel() * dtype.itemsize
        planned[key] = mine
    manifest = replace(reader.manifest, chunks=planned, files=[("data", total)], time=time.time_ns())
    file.parent.mkdir(parents=True, exist_ok=True)
    draft = file.with_name(f"{file.name}.{uuid.uuid4().hex[:12]}.partial")
    with written(draft) as out:
        begin = len(_header(manifest))
        out.write(b"\0" * begin)
        manifest = replace(manifest, chunks=_copied(reader, out, begin))
        out.seek(0)
        out.write(_header(manifest))
    draft.replace(file)
    sync(file.parent)
