"""What accelerate and DeepSpeed do otherwise than they were asked, without a word: found before and after prepare."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from typing import Any

from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import nn
from torch.optim import Optimizer

from hina_optim.unwrapping import unwrap_optimizer

__all__ = [
    "deepspeed_clipping",
    "deepspeed_config",
    "launch",
    "own_parameters",
    "same_optimizers",
    "untouched",
]

_log = logging.getLogger(__name__)
_KEEP = (
    "Set `zero_force_ds_cpu_optimizer: false` in DeepSpeed's own configuration (a JSON file, named by "
    "`deepspeed_config_file` in accelerate's), or do without optimizer offload: this optimizer stores its state in 8 "
    "bits or in host memory by itself (state_precision='8bit', state_device='cpu')."
)


def launch(accelerator: Accelerator) -> None:
    """Refuse a training that is not the distributed one that was launched.

    Raises:
        RuntimeError: Several processes that know nothing of each other; FSDP or DeepSpeed that is not used.
    """
    kind = accelerator.distributed_type
    size = os.environ.get("WORLD_SIZE", "")
    if size.isdigit() and int(size) > accelerator.num_processes:
        raise RuntimeError(
            f"{size} processes were launched, but accelerate trains in {accelerator.num_processes} (distributed_type "
            f"{kind.value}): each would train a model of its own and overwrite the others' checkpoints. On machines "
            "without an accelerator device set ACCELERATE_USE_CPU=true, or use Accelerator(cpu=True)."
        )
    if _flag("ACCELERATE_USE_FSDP") and kind != DistributedType.FSDP:
        raise RuntimeError(
            f"FSDP was asked for, but accelerate trains with distributed_type {kind.value}: it uses FSDP only where "
            "several processes run on accelerator devices. Launch with at least two of them, or without use_fsdp."
        )
    if _flag("ACCELERATE_USE_DEEPSPEED") and kind != DistributedType.DEEPSPEED:
        raise RuntimeError(
            f"DeepSpeed was asked for, but accelerate trains with distributed_type {kind.value}: on the CPU it goes "
            "without. Launch on accelerator devices, or without use_deepspeed."
        )
    launched = "ACCELERATE_MIXED_PRECISION" in os.environ and "MASTER_ADDR" in os.environ and not size
    if launched and kind == DistributedType.NO:
        _log.warning(
            "`accelerate launch` seems to have started one process where several were asked for: on the CPU it ignores "
            "--num_processes. Use ACCELERATE_USE_CPU=true torchrun --nproc_per_node N instead, or --num_processes 1."
        )


def untouched(accelerator: Accelerator, optimizers: Sequence[Optimizer]) -> None:
    """Refuse an optimizer with state where the engine puts other tensors in the place of its parameters.

    Raises:
        RuntimeError: There is one.
    """
    if accelerator.distributed_type not in (DistributedType.FSDP, DistributedType.DEEPSPEED):
        return
    for optimizer in optimizers:
        if unwrap_optimizer(optimizer).state:
            raise RuntimeError(
                f"{type(optimizer).__name__} has state already, and {accelerator.distributed_type.value} replaces the "
                "parameters that it belongs to: prepare before the first step, init_state() or load_state_dict()."
            )


def deepspeed_config(accelerator: Accelerator) -> float | None:
    """Check DeepSpeed's configuration before anything is built from it.

    Returns:
        The norm at which gradients are to be clipped, 0 for not at all; None if that was left to DeepSpeed, or it is
        not used.

    Raises:
        ValueError: DeepSpeedCPUAdam would take the place of the optimizer.
    """
    if accelerator.distributed_type != DistributedType.DEEPSPEED:
        return None
    plugin: Any = accelerator.state.deepspeed_plugin
    config: dict[str, Any] = plugin.deepspeed_config
    offload = config.get("zero_optimization", {}).get("offload_optimizer") or {}
    if offload.get("device", "none") not in ("none", None) and config.get("zero_force_ds_cpu_optimizer", True):
        raise ValueError(
            f"With optimizer offload (device {offload['device']!r}) accelerate replaces the optimizer by "
            f"DeepSpeedCPUAdam, or DeepSpeed refuses it. {_KEEP}"
        )
    clipping = config.get("gradient_clipping", plugin.gradient_clipping)
    if clipping in (None, "auto"):
        _log.warning(
            "DeepSpeed clips gradients at norm 1.0 where nothing is said about it, which no other engine does. Give "
            "`gradient_clipping` (0.0 for none)."
        )
        return None
    if "gradient_clipping" not in config:
        _log.warning(
            "accelerate drops `gradient_clipping: %s`, and DeepSpeed would clip at 1.0; it has been given to DeepSpeed "
            "as it was asked for.",
            clipping,
        )
        config["gradient_clipping"] = float(clipping)
    return float(clipping)


def deepspeed_clipping(engine: Any, asked: float | None) -> None:
    """Check that a DeepSpeed engine clips gradients as it was asked to.

    Raises:
        RuntimeError: It does not.
    """
    if asked is not None and float(engine.gradient_clipping()) != asked:
        raise RuntimeError(
            f"DeepSpeed clips gradients at norm {engine.gradient_clipping()}, but gradient_clipping: {asked} was asked "
            "for. Put it into DeepSpeed's own configuration (deepspeed_config_file)."
        )


def same_optimizers(given: Sequence[Optimizer], prepared: Sequence[Optimizer]) -> None:
    """Check that the optimizers that step are those that were passed in.

    Raises:
        RuntimeError: One was replaced.
    """
    for before, after in zip(given, prepared, strict=True):
        wanted, found = unwrap_optimizer(before), unwrap_optimizer(after)
        if found is not wanted:
            raise RuntimeError(f"{type(wanted).__name__} was replaced by {type(found).__name__}. {_KEEP}")


def own_parameters(accelerator: Accelerator, optimizer: Any, models: Sequence[nn.Module]) -> None:
    """Check that an optimizer steps parameters of the prepared models, and not what they were before.

    Raises:
        RuntimeError: It steps something else; names it.
    """
    own = {id(p) for model in models for p in model.parameters()}
    every = [p for group in optimizer.param_groups for p in group["params"]]
    names = optimizer.param_names() if hasattr(optimizer, "param_names") else [str(tuple(p.shape)) for p in every]
    strangers = [name for name, p in zip(names, every, strict=True) if id(p) not in own]
    if not strangers:
        return
    remedy = "Build the optimizer from the parameters of the model that is given to prepare()."
    if accelerator.distributed_type == DistributedType.FSDP and not accelerator.is_fsdp2:
        remedy = "Set `fsdp_use_orig_params: true`: otherwise FSDP puts flat parameters in the place of the model's."
    more = f" and {len(strangers) - 5} more" if len(strangers) > 5 else ""
    raise RuntimeError(
        f"{type(optimizer).__name__} steps tensors that are no parameters of the prepared model: "
        f"{', '.join(strangers[:5])}{more}. The model would not train. {remedy}"
    )


def _flag(name: str) -> bool:
    return os.environ.get(name, "false").lower() in ("true", "1")
