"""The complete shapes of parameters that an engine has cut already, for whoever builds an optimizer from them."""

from __future__ import annotations

from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel

__all__ = ["complete_shapes"]


def complete_shapes(model: nn.Module) -> dict[nn.Parameter, tuple[int, ...]]:
    """Shapes as the model defines them, of parameters that have lost theirs.

    FSDP1 with ``use_orig_params=True`` shrinks a parameter to the vector of its elements that are here, ZeRO-3 to an
    empty one. Both tell its shape no more, and with that neither whether it decays nor what it is to an adapter.

    Args:
        model: The module that FSDP1 wrapped, or one with such modules, or with parameters of ``deepspeed.zero.Init``.

    Returns:
        Their shapes; nothing of parameters that are whole.
    """
    shapes: dict[nn.Parameter, tuple[int, ...]] = {}
    for module in model.modules():
        handle = getattr(module, "_handle", None) if isinstance(module, FullyShardedDataParallel) else None
        if handle is not None and handle._use_orig_params:
            flat = handle.flat_param
            shapes |= {p: tuple(shape) for p, shape in zip(flat._params, flat._shapes, strict=True)}
    for parameter in model.parameters():
        if hasattr(parameter, "ds_shape"):
            shapes[parameter] = tuple(parameter.ds_shape)
    return shapes
