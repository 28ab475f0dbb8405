"""Weights from a checkpoint of DeepSpeed that another number of processes saved.

DeepSpeed keeps the optimizer's partition of each process, and with it the weights in full precision, and loads them in
the same number of processes only. The state of our optimizers comes from elsewhere; the weights it can put together.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch.distributed as dist
from torch import Tensor

__all__ = ["of_another_world"]


@contextlib.contextmanager
def of_another_world(engine: Any) -> Iterator[None]:
    """Within this, ``engine.load_checkpoint`` loads weights and counters, whatever the number of processes that saved.

    Every process reads the complete weights, in float32, into host memory for a while.

    Args:
        engine: A DeepSpeedEngine.
    """
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    load = engine.load_checkpoint

    def load_checkpoint(folder: str, tag: str | None = None, *args: Any, **kwargs: Any) -> Any:
        found = load(folder, tag, *args, **{**kwargs, "load_optimizer_states": False})
        _set_weights(engine, get_fp32_state_dict_from_zero_checkpoint(folder, tag))
        return found

    engine.load_checkpoint = load_checkpoint
    if engine.zero_optimization_partition_weights():  # stage 3 would take frozen weights for those of its own rank
        engine.load_module_state_dict = lambda *args, **kwargs: None
    try:
        yield
    finally:
        del engine.load_checkpoint
        engine.__dict__.pop("load_module_state_dict", None)


def _set_weights(engine: Any, complete: Mapping[str, Tensor]) -> None:
    """Give an engine complete weights: those that it computes with, and those in full precision that it steps."""
    import deepspeed

    named = {**dict(engine.module.named_parameters()), **dict(engine.module.named_buffers())}
    missing = [name for name, p in named.items() if name not in complete and getattr(p, "requires_grad", False)]
    if missing:
        raise RuntimeError(f"the checkpoint of DeepSpeed has no weights of {', '.join(missing[:5])}: another model.")
    for name, p in named.items():
        if name not in complete:  # a buffer that is not saved
            continue
        # stage 3 takes what the first rank has, and keeps its part
        with deepspeed.zero.GatheredParameters([p] if hasattr(p, "ds_id") else [], modifier_rank=0):
            if dist.get_rank() == 0 or not hasattr(p, "ds_id"):
                p.data.copy_(complete[name])
        if p.requires_grad:
            deepspeed.utils.safe_set_full_fp32_param(p, complete[name].to(p.device).float())
