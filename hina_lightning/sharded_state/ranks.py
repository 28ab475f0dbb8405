"""All ranks succeed, or all raise: no rank waits for one that has met an error."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

from hina_lightning.sharded_state.errors import CheckpointError

__all__ = ["Ranks"]

T = TypeVar("T")


class _Told(CheckpointError):
    """Another rank's error, which all have been told of."""


class Ranks:
    """The processes that save or load together; one alone where torch.distributed is not initialized.

    Attributes:
        group: Their process group; None for all.
        rank: This one's number among them.
        size: How many they are.
    """

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self.group = group
        self.active = dist.is_available() and dist.is_initialized()
        self.rank = dist.get_rank(group) if self.active else 0
        self.size = dist.get_world_size(group) if self.active else 1

    def _exchange(self, error: str | None, value: Any) -> list[Any]:
        """What every rank says, if none has met an error."""
        if not self.active:
            return [value]
        everyone: list[Any] = [None] * self.size
        dist.all_gather_object(everyone, (error, value), group=self.group)
        failed = [(rank, text) for rank, (text, _) in enumerate(everyone) if text is not None]
        if failed and error is None:
            more = f" (and {len(failed) - 1} more ranks)" if len(failed) > 1 else ""
            raise _Told(f"rank {failed[0][0]}{more}: {failed[0][1]}")
        return [answer for _, answer in everyone]

    def run(self, what: str, work: Callable[[], T]) -> list[T]:
        """Do something on every rank.

        Args:
            what: In words, for the error.
            work: Its result is sent to all ranks; small and plain.

        Returns:
            The result of every rank.

        Raises:
            CheckpointError: It failed on any rank. An error that does not tell of the checkpoint or the files (out of
                memory, say) is raised as it is where it happened.
        """
        try:
            return self._run(what, work)
        except _Told as told:
            raise CheckpointError(str(told)) from None

    def _run(self, what: str, work: Callable[[], T]) -> list[T]:
        try:
            value = work()
        except _Told:  # by all ranks, in the middle of the work
            raise
        except Exception as error:
            self._exchange(f"{what}: {type(error).__name__ if not str(error) else error}", None)
            if isinstance(error, CheckpointError) or not isinstance(error, (ValueError, OSError)):
                raise
            raise CheckpointError(f"{what}: {error}") from error
        return self._exchange(None, value)

    def all_of(self, flags: list[bool]) -> list[bool]:
        """Which flags are set on all ranks; within :meth:`run`, by all ranks."""
        everyone = self._exchange(None, bytes(flags))
        if any(len(told) != len(flags) for told in everyone):
            raise _Told(
                "the optimizers of the ranks hold other parameters or techniques: build them alike on all ranks."
            )
        return [all(column) for column in zip(*everyone, strict=True)]
