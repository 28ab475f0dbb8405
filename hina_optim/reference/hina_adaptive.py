"""HinaAdaptive, written slowly: the chain of the AdamW family with all that it has but the rates of adapters.

Read :class:`~hina_optim.reference.adamw_family.ReferenceAdamW` for the steps; here are the options that it has beside
those of :class:`~hina_optim.reference.adamw_family.ReferenceAdaptiveHinaAdamW`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from hina_optim.reference.adamw_family import ReferenceAdamW, ReferenceAdaptiveHinaAdamW
from hina_optim.reference.common import IGNORED

__all__ = ["DEFAULTS", "IGNORED", "ReferenceHinaAdaptive"]

#: The arguments that change the mathematics, with the defaults of the optimizer.
DEFAULTS: dict[str, Any] = {
    **ReferenceAdaptiveHinaAdamW.DEFAULTS,
    "edge_suppression": False,
    "edge_penalty": 0.1,
    "edge_threshold": 0.6,
    "spatial_awareness": False,
    "frequency_penalty": 0.05,
    "detail_preservation": 0.8,
    "background_regularization": False,
    "factored_image_state": False,
    "lora_rank_penalty": False,
    "rank_penalty_strength": 0.01,
    "low_rank_emphasis": 1.2,
    "rank_target": 0.9,
    "rank_interval": 10,
}


class ReferenceHinaAdaptive(ReferenceAdamW):
    """HinaAdaptive: beside what AdaptiveHinaAdamW does, control of images and of rank."""

    DEFAULTS: ClassVar[Mapping[str, Any]] = DEFAULTS
