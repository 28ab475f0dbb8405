"""The manifest of a checkpoint: what it holds, where each chunk is, and a checksum of every byte. JSON, nothing else.

A chunk is a box of a stored tensor, in row-major order, little-endian, as raw bytes of a data file.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch

from hina_lightning.sharded_state.errors import CheckpointError
from hina_optim.state.plain import from_plain, to_plain
from hina_optim.state.regions import Box, numel
from hina_optim.state.schema import checked, tensors

__all__ = ["CHUNK", "FORMAT", "VERSION", "Chunk", "Manifest", "split"]

FORMAT = "hina-sharded-state"
VERSION = 1
#: Most bytes of a chunk; what has to be in memory at once beside the state.
CHUNK = 1 << 26


@dataclass(frozen=True)
class Chunk:
    """Where a box of a stored tensor is.

    Attributes:
        offset: Where it begins in the tensor, in every dimension.
        size: How long it is in every dimension.
        file: Index of the data file.
        at: First byte in it.
        crc: CRC-32 of its bytes.
    """

    offset: tuple[int, ...]
    size: tuple[int, ...]
    file: int
    at: int
    crc: int


@dataclass(frozen=True)
class Manifest:
    """What a checkpoint says of itself.

    Attributes:
        state: Metadata of :func:`hina_optim.state.portable.export`.
        chunks: Those of every stored tensor, by its key.
        files: Name and bytes of every data file.
        ranks: How many processes wrote it.
        time: When it was written: nanoseconds since 1970.
        extra: What was given to be saved with it.
    """

    state: dict[str, Any]
    chunks: Mapping[str, Sequence[Chunk]]
    files: Sequence[tuple[str, int]]
    ranks: int
    time: int
    extra: Any

    def tensors(self) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Key → dtype and shape of every stored tensor."""
        return tensors(self.state)

    def body(self) -> str:
        """As JSON."""
        table = self.tensors()
        return json.dumps(
            {
                "ranks": self.ranks,
                "time": self.time,
                "extra": to_plain(self.extra, "extra"),
                "files": [list(file) for file in self.files],
                "tensors": {
                    key: {
                        "dtype": str(dtype).removeprefix("torch."),
                        "shape": list(shape),
                        "chunks": [[c.offset, c.size, c.file, c.at, f"{c.crc:08x}"] for c in self.chunks[key]],
                    }
                    for key, (dtype, shape) in table.items()
                },
                "state": self.state,
            },
            allow_nan=False,
            separators=(",", ":"),
        )

    def to_bytes(self) -> bytes:
        """Two lines: what it is and the checksum of the second, and the second."""
        body = self.body().encode()
        head = {"format": FORMAT, "version": VERSION, "bytes": len(body), "crc32": f"{zlib.crc32(body):08x}"}
        return json.dumps(head).encode() + b"\n" + body

    @classmethod
    def from_bytes(cls, data: bytes, where: str) -> Manifest:
        """Read what :meth:`to_bytes` wrote.

        Raises:
            CheckpointError: It is not that, byte for byte.
        """
        head, _, body = data.partition(b"\n")
        try:
            told = json.loads(head)
        except (ValueError, RecursionError) as error:
            raise CheckpointError(f"{where} is damaged, or no manifest: its first line is no JSON.") from error
        if not isinstance(told, dict) or told.get("format") != FORMAT:
            raise CheckpointError(f"{where} is damaged, or no manifest: its first line does not say {FORMAT!r}.")
        if told.get("version") != VERSION:
            raise CheckpointError(f"{where} has format version {told.get('version')!r}, this library reads {VERSION}.")
        if told.get("bytes") != len(body):
            raise CheckpointError(f"{where} is truncated: {len(body)} bytes of {told.get('bytes')!r} are there.")
        if told.get("crc32") != f"{zlib.crc32(body):08x}":
            raise CheckpointError(f"{where} is damaged: its checksum is not that of its content.")
        return cls.from_body(body, where)

    @classmethod
    def from_body(cls, body: bytes | str, where: str) -> Manifest:
        """Read what :meth:`body` wrote, and check that it is all there and fits together.

        Raises:
            CheckpointError: It does not; names the field.
        """
        try:
            return cls._parsed(json.loads(body))
        except (ValueError, TypeError, KeyError, IndexError, RuntimeError, OverflowError, RecursionError) as error:
            # whatever else a wrong value of a field leads to is a wrong value all the same
            why = str(error) if isinstance(error, ValueError) else f"{type(error).__name__} {error}"
            raise CheckpointError(f"{where} is damaged: {why}") from error

    @classmethod
    def _parsed(cls, body: Any) -> Manifest:
        state = checked(body["state"])
        files = []
        for name, nbytes in body["files"]:
            if not isinstance(name, str) or not name or set(name) & set("/\\\0") or name in (".", ".."):
                raise ValueError(f"{name!r} is no name of a data file.")
            files.append((name, _count(nbytes, name)))
        expected, told = tensors(state), body["tensors"]
        if set(expected) != set(told):
            odd = sorted(set(expected) ^ set(told))
            raise ValueError(f"tensors do not fit the state: {', '.join(odd[:5])}.")
        chunks = {}
        for key, (dtype, shape) in expected.items():
            entry = told[key]
            if entry["dtype"] != str(dtype).removeprefix("torch.") or entry["shape"] != list(shape):
                raise ValueError(f"{key} is {entry['dtype']} {entry['shape']}, expected {dtype} {list(shape)}.")
            chunks[key] = [_chunk(key, dtype, files, *one) for one in entry["chunks"]]
            _check_cover(key, shape, chunks[key])
        _check_bytes(expected, chunks, files)
        time, ranks = _count(body["time"], "time"), _count(body["ranks"], "ranks")
        return cls(state, chunks, files, ranks, time, from_plain(body["extra"], "extra"))


def _count(value: Any, what: str) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise ValueError(f"{what} has the number {str(value)[:80]!r}.")
    return value


def _chunk(
    key: str, dtype: torch.dtype, files: list[tuple[str, int]], offset: Any, size: Any, file: Any, at: Any, crc: Any
) -> Chunk:
    if not isinstance(offset, list) or not isinstance(size, list):
        raise ValueError(f"a chunk of {key} begins at {offset!r} and has the size {size!r}.")
    lengths = tuple(_count(n, key) for n in size)
    chunk = Chunk(tuple(_count(o, key) for o in offset), lengths, _count(file, key), _count(at, key), int(crc, 16))
    if chunk.at + numel(lengths) * dtype.itemsize > files[chunk.file][1]:
        raise ValueError(f"a chunk of {key} lies beyond the end of {files[chunk.file][0]}.")
    return chunk


def _check_cover(key: str, shape: tuple[int, ...], chunks: Sequence[Chunk]) -> None:
    """Chunks make up all of a tensor, each element once."""
    total = 0
    open_: list[Chunk] = []
    for chunk in sorted(chunks, key=lambda one: one.offset):
        if len(chunk.offset) != len(shape) or len(chunk.size) != len(shape):
            raise ValueError(f"a chunk of {key} has {len(chunk.offset)} dimensions, not {len(shape)}.")
        if any(o + n > length or not n for o, n, length in zip(chunk.offset, chunk.size, shape, strict=True)):
            raise ValueError(f"a chunk of {key} lies outside of it.")
        total += numel(chunk.size)
        # sorted by rows: only those that have not ended yet can overlap
        open_ = [one for one in open_ if not shape or one.offset[0] + one.size[0] > chunk.offset[0]]
        if any(_overlap(one, chunk) for one in open_):
            raise ValueError(f"two chunks of {key} overlap.")
        open_.append(chunk)
    if total != numel(shape):
        raise ValueError(f"the chunks of {key} have {total} elements of {numel(shape)}.")


def _check_bytes(
    table: Mapping[str, tuple[torch.dtype, tuple[int, ...]]],
    chunks: Mapping[str, Sequence[Chunk]],
    files: Sequence[tuple[str, int]],
) -> None:
    """No two chunks are said to lie in the same bytes."""
    ranges = sorted(
        (chunk.file, chunk.at, chunk.at + numel(chunk.size) * dtype.itemsize, key)
        for key, (dtype, _) in table.items()
        for chunk in chunks[key]
    )
    for (file, _, end, one), (next_file, begin, _, other) in pairwise(ranges):
        if file == next_file and begin < end:
            raise ValueError(f"chunks of {one} and {other} lie in the same bytes of {files[file][0]}.")


def _overlap(a: Chunk, b: Chunk) -> bool:
    return all(x < y + m and y < x + n for x, n, y, m in zip(a.offset, a.size, b.offset, b.size, strict=True))


def split(box: Box, itemsize: int) -> list[Box]:
    """A box in pieces of at most :data:`CHUNK` bytes, in the order of its elements; the same on all ranks."""
    offset, size = box
    if numel(size) * itemsize <= CHUNK:
        return [box]
    dim = next(d for d, n in enumerate(size) if n > 1)
    row = numel(size[dim + 1 :]) * itemsize
    rows = max(1, CHUNK // row)
    pieces: list[Box] = []
    for first in range(0, size[dim], rows):
        count = min(rows, size[dim] - first)
        part = (
            (*offset[:dim], offset[dim] + first, *offset[dim + 1 :]),
            (*size[:dim], count, *size[dim + 1 :]),
        )
        pieces += split(part, itemsize)
    return pieces
