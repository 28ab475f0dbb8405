"""What is raised when a checkpoint cannot be written or read."""

from __future__ import annotations

__all__ = ["CheckpointError"]


class CheckpointError(ValueError):
    """A checkpoint is damaged, incomplete, or of something else; or it could not be written. Raised on all ranks."""
