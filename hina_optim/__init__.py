"""Optimizers for low-memory fine-tuning, written as readable lists of techniques."""

from hina_optim.optimizers.hina_adaptive import HinaAdaptive
from hina_optim.registry import create_optimizer, get_optimizer_info, list_optimizers, list_presets

__version__ = "0.1.0"

__all__ = [
    "HinaAdaptive",
    "__version__",
    "create_optimizer",
    "get_optimizer_info",
    "list_optimizers",
    "list_presets",
]
