"""Profiles of the 8-bit optimizers: what to give up for memory, or to spend for quality.

``profile="balanced"`` is an argument of the optimizer itself, so that it works from a command line, from
:class:`~hina_optim.optimizers.Improved8BitOptimizerConfig` and from code alike. Arguments given beside it override the
profile. A profile never sets a learning rate. (A *preset*, by contrast, is a choice of
:func:`~hina_optim.registry.create_optimizer`, for a purpose.)
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from hina_optim.arguments import nearest

__all__ = ["PROFILES", "profile_arguments"]

#: Name → arguments, both read-only. Names are case-sensitive.
PROFILES: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        # the least memory: all state in few bits that can be, and nothing beside the mask that keeps state of its own.
        # The original design has 8 bits and says nothing of the long momentum, which leaves 3.3 bytes a parameter; what
        # it is for asks for less: 4 bits without it are 1.2
        "memory_optimized": MappingProxyType(
            {
                "state_precision": "4bit",
                "force_8bit": True,
                "min_8bit_size": 1024,
                "enable_dual_momentum": False,
                "edge_suppression": False,
                "spatial_awareness": False,
                "background_regularization": False,
                "frequency_penalty": 0.0,
                "lora_rank_penalty": False,
                "verbose": False,
            }
        ),
        # everything on, and stronger than by default
        "quality_optimized": MappingProxyType(
            {
                "edge_suppression": True,
                "edge_penalty": 0.15,
                "background_regularization": True,
                "spatial_awareness": True,
                "lora_rank_penalty": True,
                "frequency_penalty": 0.08,
                "rank_penalty_strength": 0.02,
                "verbose": True,
            }
        ),
        # everything on, at the default strengths, and 2.2 bytes a parameter; 5.3 with 8 bits and whole image state, as
        # the original design would have it
        "balanced": MappingProxyType(
            {
                "state_precision": "4bit",
                "factored_image_state": True,
                "min_8bit_size": 4096,
                "edge_suppression": True,
                "edge_penalty": 0.1,
                "background_regularization": True,
                "spatial_awareness": True,
                "lora_rank_penalty": True,
                "frequency_penalty": 0.05,
                "verbose": True,
            }
        ),
    }
)


def profile_arguments(name: str) -> dict[str, Any]:
    """The arguments of a profile, as a new dictionary.

    Args:
        name: One of :data:`PROFILES`, exactly as written there.

    Raises:
        ValueError: There is no such profile (names the nearest), or more than one was named.

    Example:
        >>> {**profile_arguments("memory_optimized"), "edge_suppression": True}["edge_suppression"]
        True
    """
    given: Any = name  # from a command line or a configuration file it may be anything
    if not isinstance(given, str):
        raise ValueError(
            f"profile={given!r} is not valid: profile must be one of {', '.join(map(repr, PROFILES))}. Profiles cannot "
            "be combined; other arguments may be given beside one, and override it."
        )
    if name not in PROFILES:
        raise ValueError(f"There is no profile named {name!r} (names are case-sensitive). {nearest(name, PROFILES)}")
    return dict(PROFILES[name])
