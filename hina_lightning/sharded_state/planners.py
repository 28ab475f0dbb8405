"""What each rank writes and reads: boxes of whole tensors, each written once, whoever holds it."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadPlan,
    LoadPlanner,
    ReadItem,
    SavePlan,
    SavePlanner,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from hina_lightning.sharded_state.errors import CheckpointError
from hina_lightning.sharded_state.manifest import split
from hina_optim.state.jobs import Read
from hina_optim.state.portable import Piece
from hina_optim.state.regions import numel

__all__ = ["BoxLoadPlanner", "BoxSavePlanner"]

Table = dict[str, tuple[torch.dtype, tuple[int, ...]]]


class BoxSavePlanner(SavePlanner):
    """Plans the chunks of pieces.

    Args:
        pieces: What is on this rank.
        table: Key → dtype and shape of every tensor, on all ranks.
    """

    def __init__(self, pieces: Sequence[Piece], table: Table) -> None:
        self._pieces = pieces
        self._table = table
        self._where: dict[MetadataIndex, tuple[Piece, int, tuple[int, ...]]] = {}
        self._last: tuple[Piece, Tensor] | None = None

    def set_up_planner(self, state_dict: Any, storage_meta: Any = None, is_coordinator: bool = False) -> None:
        """Nothing to do: it has been told what there is."""

    def create_local_plan(self) -> SavePlan:
        """An item for every chunk that is here."""
        items = []
        for piece in self._pieces:
            if self._table.get(piece.key) != (piece.dtype, piece.shape):
                raise CheckpointError(f"{piece.key} is {piece.dtype} {piece.shape}, which its metadata does not say.")
            begin = 0
            for box in piece.boxes:
                for offset, size in split(box, piece.dtype.itemsize):
                    index = MetadataIndex(piece.key, torch.Size(offset))
                    self._where[index] = piece, begin, size
                    begin += numel(size)
                    chunk = ChunkStorageMetadata(torch.Size(offset), torch.Size(size))
                    data = TensorWriteData(chunk, TensorProperties(piece.dtype), torch.Size(piece.shape))
                    items.append(WriteItem(index, WriteItemType.SHARD, tensor_data=data))
        return SavePlan(items)

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        """Of replicas, the rank that has least to write writes."""
        holders: dict[MetadataIndex, list[int]] = {}
        chunks: dict[str, list[ChunkStorageMetadata]] = {key: [] for key in self._table}
        first: dict[MetadataIndex, WriteItem] = {}
        for rank, plan in enumerate(all_plans):
            for item in plan.items:
                holders.setdefault(item.index, []).append(rank)
                data = first.setdefault(item.index, item).tensor_data
                assert data is not None and item.tensor_data is not None  # of an item that this class has made
                if data.chunk != item.tensor_data.chunk:
                    raise CheckpointError(f"{item.index.fqn} is cut in other pieces on rank {rank} than on others.")
        load = [0] * len(all_plans)
        chosen: list[list[WriteItem]] = [[] for _ in all_plans]
        for index, ranks in holders.items():
            data = first[index].tensor_data
            assert data is not None
            rank = min(ranks, key=lambda one: load[one])
            load[rank] += numel(tuple(data.chunk.sizes)) * data.properties.dtype.itemsize
            chosen[rank].append(first[index])
            chunks[index.fqn].append(data.chunk)
        metadata = Metadata(
            {
                key: TensorStorageMetadata(TensorProperties(dtype), torch.Size(shape), chunks[key])
                for key, (dtype, shape) in self._table.items()
            }
        )
        return [SavePlan(items) for items in chosen], metadata

    def finish_plan(self, new_plan: SavePlan) -> SavePlan:
        """As it is."""
        return new_plan

    def resolve_data(self, write_item: WriteItem) -> Tensor:
        """The elements of a chunk; a piece that has to be decoded is so once."""
        piece, begin, size = self._where[write_item.index]
        if self._last is None or self._last[0] is not piece:
            self._last = None  # before the next one comes
            self._last = piece, piece.read()
        return self._last[1][begin : begin + numel(size)].to(piece.dtype).view(size)


class BoxLoadPlanner(LoadPlanner):
    """Plans which parts of which chunks make up what is wanted here.

    Args:
        reads: What is wanted.
        metadata: Which chunks there are.
    """

    def __init__(self, reads: Sequence[Read], metadata: Metadata) -> None:
        self._metadata = metadata
        self._reads = reads
        self._targets: dict[tuple[str, int], Tensor] = {}
        self._first: dict[str, int] = {}

    def read(self) -> list[Tensor]:
        """Tensors for what is wanted, flat; filled when the plan is carried out."""
        values = []
        for read in self._reads:
            flat = torch.empty(read.numel, dtype=read.dtype, device=read.device)
            begin = 0
            for at, (_, size) in enumerate(read.boxes):
                self._targets[read.key, at] = flat[begin : begin + numel(size)].view(size)
                begin += numel(size)
            values.append(flat)
        return values

    def set_up_planner(self, state_dict: Any, metadata: Metadata | None = None, is_coordinator: bool = False) -> None:
        """Nothing to do: it has been told what there is."""

    def create_local_plan(self) -> LoadPlan:
        """An item for every chunk that has elements of a box.

        Raises:
            CheckpointError: A tensor or part of one is not in the checkpoint.
        """
        items: list[ReadItem] = []
        for read in self._reads:
            saved = self._metadata.state_dict_metadata.get(read.key)
            if not isinstance(saved, TensorStorageMetadata):
                raise CheckpointError(f"{read.key} is not in the checkpoint.")
            if (saved.properties.dtype, tuple(saved.size)) != (read.dtype, read.shape):
                raise CheckpointError(
                    f"{read.key} is {saved.properties.dtype} {tuple(saved.size)} in the checkpoint, expected "
                    f"{read.dtype} {read.shape}."
                )
            boxes = [ChunkStorageMetadata(torch.Size(offset), torch.Size(size)) for offset, size in read.boxes]
            found = create_read_items_for_chunk_list(read.key, saved, boxes)
            if sum(numel(tuple(item.lengths)) for item in found) != read.numel:
                raise CheckpointError(f"parts of {read.key} are not in the checkpoint.")
            items += found
        return LoadPlan(items)

    def create_global_plan(self, global_plan: list[LoadPlan]) -> list[LoadPlan]:
        """As they are: every rank reads for itself."""
        return global_plan

    def finish_plan(self, central_plan: LoadPlan) -> LoadPlan:
        """As it is."""
        return central_plan

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        """Never called: there are tensors only."""
        raise CheckpointError(f"{read_item.dest_index.fqn} is no tensor.")

    def resolve_tensor(self, read_item: ReadItem) -> Tensor:
        """Where a part of a chunk goes."""
        index = read_item.dest_index
        assert index.index is not None  # of an item that torch has made for a list of boxes
        target = self._targets[index.fqn, index.index]
        for dim, (offset, length) in enumerate(zip(read_item.dest_offsets, read_item.lengths, strict=True)):
            target = target.narrow(dim, offset, length)
        return target

    def commit_tensor(self, read_item: ReadItem, tensor: Tensor) -> None:
        """Nothing to do: it was written in place."""
