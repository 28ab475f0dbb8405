"""Several processes, forked and connected by gloo."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def on_ranks(size: int, run: Callable[..., None], *args: Any) -> None:
    """Run in forked processes that are connected by gloo."""
    with tempfile.TemporaryDirectory() as folder:
        mp.start_processes(_entry, (run, size, folder, args), nprocs=size, start_method="fork")


def _entry(rank: int, run: Callable[..., None], size: int, folder: str, args: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=size)
    try:
        run(rank, *args)
    finally:
        dist.destroy_process_group()
