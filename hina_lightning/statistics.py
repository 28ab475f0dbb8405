"""What optimizers tell of themselves, as numbers ready to be logged: the same for callbacks and for trackers.

Every rank must ask together: statistics of sharded parameters are sums over all shards.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hina_optim.unwrapping import unwrap_optimizer

__all__ = [
    "Found",
    "block_of",
    "find_with",
    "group_names",
    "host_values",
    "importance_by_block",
    "importance_scores",
    "learning_rates",
    "steps_taken",
]


class Found(NamedTuple):
    """An optimizer that has what is asked for.

    Attributes:
        optimizer: The optimizer itself, outside every wrapper.
        suffix: What follows its groups' names in metrics: nothing for the first optimizer of the training, then
            ``-1``, ``-2``, as in Lightning's LearningRateMonitor.
    """

    optimizer: Any
    suffix: str


def find_with(optimizers: Sequence[Any], methods: Sequence[str]) -> list[Found]:
    """Those optimizers, outside their wrappers, that have all of some methods."""
    return [
        Found(optimizer, f"-{index}" if index else "")
        for index, optimizer in enumerate(unwrap_optimizer(one) for one in optimizers)
        if all(callable(getattr(optimizer, method, None)) for method in methods)
    ]


def group_names(optimizer: Any) -> list[str]:
    """What the groups of an optimizer are called in metrics: their option ``name``, else ``group<i>``."""
    return [str(group.get("name") or f"group{i}") for i, group in enumerate(optimizer.param_groups)]


def host_values(values: Mapping[str, Tensor]) -> dict[str, float]:
    """Device numbers on the host, with one wait for the device, however many they are.

    Args:
        values: Tensors of one element, all on one device, or on the CPU.
    """
    if not values:
        return {}
    numbers = torch.stack([value.detach().reshape(()).float() for value in values.values()]).tolist()
    return dict(zip(values, numbers, strict=True))


def learning_rates(optimizer: Any, suffix: str = "") -> dict[str, float]:
    """The learning rates of an optimizer as things stand; ask just before a step, when its gradients are there.

    Args:
        optimizer: With ``lr_mask_statistics()``, outside its wrappers.
        suffix: What follows the names of its groups.

    Returns:
        ``lr/<group>``, the rate of the group; ``lr_eff/<group>``, its mean as it is applied; and, where a group has a
        mask, ``lr_mask/<group>/{mean,p05,p50,p95,at_min,at_max}`` and ``sign_agree/<group>``.
    """
    names = group_names(optimizer)
    rates = {
        f"lr/{name}{suffix}": float(group["lr"]) for name, group in zip(names, optimizer.param_groups, strict=True)
    }
    statistics = host_values(optimizer.lr_mask_statistics())
    return rates | {_with_suffix(key, suffix): value for key, value in statistics.items()}


def importance_scores(found: Iterable[Found]) -> dict[str, float]:
    """The score of every parameter by its name; empty until the optimizers have scores.

    Args:
        found: Optimizers with ``importance_statistics()``. Should a later one use a name again, its own is
            ``optimizer-1.<name>``.
    """
    statistics: dict[str, Tensor] = {}
    for optimizer, suffix in found:
        for key, value in optimizer.importance_statistics().items():
            name = key.removeprefix("importance/")
            statistics[f"optimizer{suffix}.{name}" if name in statistics else name] = value
    return host_values(statistics)


def importance_by_block(scores: Mapping[str, float], depth: int | None = None) -> dict[str, float]:
    """Mean score of the parameters of every block, blocks in the order of the parameters.

    Args:
        scores: By name of the parameter.
        depth: As in :func:`block_of`.
    """
    gathered: dict[str, list[float]] = {}
    for name, score in scores.items():
        gathered.setdefault(block_of(name, depth), []).append(score)
    return {block: sum(found) / len(found) for block, found in gathered.items()}


def block_of(name: str, depth: int | None) -> str:
    """The block of a parameter: the first ``depth`` parts of its name, or all up to the first number, or its module."""
    parts = name.split(".")
    if depth is None:
        first_number = next((i for i, part in enumerate(parts) if part.isdigit()), None)
        depth = max(len(parts) - 1, 1) if first_number is None else first_number + 1
    return ".".join(parts[:depth])


def _with_suffix(key: str, suffix: str) -> str:
    """A key with the suffix behind the group, whose name may have slashes of its own."""
    if key.startswith("lr_mask/"):
        group, _, statistic = key.rpartition("/")
        return f"{group}{suffix}/{statistic}"
    return key + suffix


def steps_taken(optimizer: Any) -> int:
    """How many steps an optimizer has taken: the most of any of its parameters."""
    return max((int(state["step"]) for state in optimizer.state.values() if "step" in state), default=0)
