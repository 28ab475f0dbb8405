"""Callbacks of the Lightning Trainer, one file each: they log what an optimizer of ours tells, and keep its state."""

from hina_lightning.callbacks.importance_monitor import ImportanceMonitor
from hina_lightning.callbacks.layout_binding import LayoutBinding
from hina_lightning.callbacks.loss_context import LossContextReporter
from hina_lightning.callbacks.lr_mask_monitor import LRMaskMonitor
from hina_lightning.callbacks.rank_monitor import RankMonitor
from hina_lightning.callbacks.sharded_state import ShardedOptimizerState
from hina_lightning.callbacks.vram_guard import VRAMGuard

__all__ = [
    "ImportanceMonitor",
    "LRMaskMonitor",
    "LayoutBinding",
    "LossContextReporter",
    "RankMonitor",
    "ShardedOptimizerState",
    "VRAMGuard",
]
