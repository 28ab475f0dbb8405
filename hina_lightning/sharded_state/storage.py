"""Where torch.distributed.checkpoint puts the bytes: a data file a rank, and one manifest that makes them a checkpoint.

Data files have new names in every save. The manifest comes last and replaces an older one in one move: until then the
older checkpoint is whole, and a folder without a manifest is no checkpoint.
"""

from __future__ import annotations

import contextlib
import os
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, ReadItem, SavePlan, SavePlanner, WriteItem
from torch.distributed.checkpoint.storage import StorageReader, StorageWriter, WriteResult
from torch.futures import Future

from hina_lightning.sharded_state.errors import CheckpointError
from hina_lightning.sharded_state.manifest import Chunk, Manifest
from hina_optim.state.regions import numel

__all__ = ["MANIFEST", "PREFIX", "Reader", "Writer", "as_bytes", "commit", "written"]

PREFIX = "hina_state"
MANIFEST = f"{PREFIX}.json"


def as_bytes(value: Tensor) -> memoryview:
    """The elements of a tensor as they are written."""
    host = value.detach().reshape(-1).to("cpu").contiguous()
    return memoryview(host.view(torch.uint8).numpy().data)


@contextlib.contextmanager
def written(path: Path) -> Iterator[BinaryIO]:
    """A file to be written, on disk when the context ends; gone if it ends with an error."""
    try:
        with path.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
    except BaseException:
        path.unlink(missing_ok=True)
        raise


def commit(folder: Path, manifest: Manifest, token: str) -> None:
    """Write a manifest, make it the folder's, and remove data files that are not its own.

    Once it is the folder's, nothing fails any more: whoever were told so would remove the data that it names.
    """
    draft = folder / f"{PREFIX}-{token}.partial"
    with written(draft) as file:
        file.write(manifest.to_bytes())
    draft.replace(folder / MANIFEST)
    mine = {name for name, _ in manifest.files}
    with contextlib.suppress(OSError):
        sync(folder)  # before older data goes
        for path in folder.glob(f"{PREFIX}-*"):
            if path.name not in mine:
                path.unlink(missing_ok=True)


def sync(folder: Path) -> None:
    """The names in a folder are on disk."""
    if hasattr(os, "O_DIRECTORY"):  # not on Windows
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


class Writer(StorageWriter):
    """Writes the chunks of one rank to one file, and on the coordinator the manifest.

    Args:
        folder: Made if need be.
        token: A name for this save, the same on all ranks, and another for each save.
        rank: This rank's number.
        ranks: How many they are.
        state: Metadata of the state.
        extra: What is saved with it.
    """

    def __init__(self, folder: Path, token: str, rank: int, ranks: int, state: dict[str, Any], extra: Any) -> None:
        self.folder = folder
        self._token = token
        self._path = folder / f"{PREFIX}-{token}-{rank:05d}.bin"
        self._ranks = ranks
        self._state = state
        self._extra = extra

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Nothing to do: there is a writer for each save."""

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Make the folder."""
        self.folder.mkdir(parents=True, exist_ok=True)

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        """As it is."""
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """As they are."""
        return plans

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Write this rank's chunks, one after the other."""
        results: list[WriteResult] = []
        if plan.items:
            with written(self._path) as file:
                for item in plan.items:
                    results.append(self._write(file, item, planner))
            sync(self.folder)
        future: Future[list[WriteResult]] = Future()
        future.set_result(results)
        return future

    def _write(self, file: BinaryIO, item: WriteItem, planner: SavePlanner) -> WriteResult:
        value = planner.resolve_data(item)
        assert isinstance(value, Tensor)  # the planner plans nothing else
        data = as_bytes(value)
        at = file.tell()
        file.write(data)
        return WriteResult(item.index, len(data), (self._path.name, at, zlib.crc32(data), tuple(value.shape)))

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Put the manifest together and make it the folder's."""
        sizes: dict[str, int] = {}
        chunks: dict[str, list[Chunk]] = {key: [] for key in metadata.state_dict_metadata}
        for result in (one for several in results for one in several):
            name, at, crc, size = result.storage_data
            sizes[name] = max(sizes.get(name, 0), at + result.size_in_bytes)
            offset = result.index.offset
            chunks[result.index.fqn].append(Chunk(tuple(offset or ()), size, list(sizes).index(name), at, crc))
        files = list(sizes.items())
        manifest = Manifest(self._state, chunks, files, self._ranks, time.time_ns(), self._extra)
        # what could not be read again is no checkpoint, and must not take the place of one
        Manifest.from_body(manifest.body(), str(self.folder))
        commit(self.folder, manifest, self._token)

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Folders only."""
        return not Path(checkpoint_id).is_file()

    def discard(self) -> None:
        """Remove what this rank has written, after an error."""
        self._path.unlink(missing_ok=True)


class Reader(StorageReader):
    """Reads chunks, each checked before anything is made of it.

    Args:
        manifest: Of the checkpoint.
        files: For every data file its path, and where its bytes begin there.
        where: The checkpoint, for errors.
    """

    def __init__(self, manifest: Manifest, files: Sequence[tuple[Path, int]], where: str) -> None:
        self.manifest = manifest
        self.where = where
        self._files = files
        table = manifest.tensors()
        self._dtypes = {key: dtype for key, (dtype, _) in table.items()}
        self._chunks = {(key, chunk.offset): chunk for key in table for chunk in manifest.chunks[key]}
        self._metadata = Metadata(
            {
                key: TensorStorageMetadata(
                    TensorProperties(dtype),
                    torch.Size(shape),
                    [ChunkStorageMetadata(torch.Size(c.offset), torch.Size(c.size)) for c in manifest.chunks[key]],
                )
                for key, (dtype, shape) in table.items()
            }
        )

    def check_files(self) -> None:
        """See that every data file is there, and as long as it was.

        Raises:
            CheckpointError: One is not.
        """
        for (path, begin), (name, nbytes) in zip(self._files, self.manifest.files, strict=True):
            if not path.is_file():
                raise CheckpointError(f"{self.where}: the data file {name} is missing.")
            have = path.stat().st_size - begin
            if have != nbytes:
                raise CheckpointError(f"{self.where}: the data file {name} has {have} bytes, expected {nbytes}.")

    def visit(self, items: Sequence[ReadItem], use: Callable[[ReadItem, Tensor], None]) -> None:
        """Read the chunks that items need, each once, and hand over what each item needs of it."""
        wanted: dict[tuple[str, tuple[int, ...]], list[ReadItem]] = {}
        for item in items:
            wanted.setdefault((item.storage_index.fqn, tuple(item.storage_index.offset or ())), []).append(item)
        with contextlib.ExitStack() as stack:
            opened: dict[int, BinaryIO] = {}
            for key in sorted(wanted, key=lambda key: (self._chunks[key].file, self._chunks[key].at)):
                file = self._chunks[key].file
                if file not in opened:
                    stack.pop_all().close()
                    opened = {file: stack.enter_context(self._files[file][0].open("rb"))}
                value = self._read(opened[file], key)
                for item in wanted[key]:
                    part = value
                    for dim, (offset, length) in enumerate(zip(item.storage_offsets, item.lengths, strict=True)):
                        part = part.narrow(dim, offset, length)
                    use(item, part)

    def _read(self, file: BinaryIO, key: tuple[str, tuple[int, ...]]) -> Tensor:
        chunk, dtype = self._chunks[key], self._dtypes[key[0]]
        data = bytearray(numel(chunk.size) * dtype.itemsize)
        file.seek(self._files[chunk.file][1] + chunk.at)
        if file.readinto(data) != len(data):  # type: ignore[attr-defined]
            raise CheckpointError(f"{self.where}: the data file {self.manifest.files[chunk.file][0]} is truncated.")
        if zlib.crc32(data) != chunk.crc:
            raise CheckpointError(
                f"{self.where}: {key[0]} is damaged: its bytes at {chunk.at} of the data file "
                f"{self.manifest.files[chunk.file][0]} are not those that were written."
            )
        return torch.frombuffer(data, dtype=dtype).view(chunk.size)

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Nothing to do: there is a reader for each load."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """Which tensors there are, and in which chunks."""
        return self._metadata

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Nothing to do: it is known already."""

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        """As it is."""
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        """As they are."""
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Copy what is planned to where the planner wants it."""

        def copy(item: ReadItem, part: Tensor) -> None:
            target = planner.resolve_tensor(item)
            target.copy_(part)
            planner.commit_tensor(item, target)

        self.visit(plan.items, copy)
        future: Future[None] = Future()
        future.set_result(None)
        return future

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Whatever exists."""
        return Path(checkpoint_id).exists()
