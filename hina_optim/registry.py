"""Names → optimizers: one record each, which feeds listing, construction, the documentation and the tests."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import Tensor, nn

from hina_optim.arguments import nearest
from hina_optim.engine.optimizer import HinaOptimizer
from hina_optim.optimizers.hina_adaptive import HinaAdaptive
from hina_optim.presets import PRESETS, Preset

__all__ = [
    "OptimizerInfo",
    "Paper",
    "create_optimizer",
    "get_optimizer_info",
    "list_optimizers",
    "list_presets",
]


class Paper(NamedTuple):
    """A source: title and arXiv number."""

    title: str
    arxiv: str

    @property
    def url(self) -> str:
        """Where to read it."""
        return f"https://arxiv.org/abs/{self.arxiv}"


@dataclass(frozen=True)
class OptimizerInfo:
    """All that is known of an optimizer without building it.

    Attributes:
        name: The name of the class.
        cls: The class.
        description: One sentence.
        aliases: Other spellings of the name that are understood.
        papers: What it builds upon.
        capabilities: What can be relied on, in words that tests iterate over.
        state_precisions: What its state may be stored in, highest first.
        tags: Words to find it by.
    """

    name: str
    cls: type[HinaOptimizer]
    description: str
    aliases: tuple[str, ...] = ()
    papers: tuple[Paper, ...] = ()
    capabilities: frozenset[str] = frozenset()
    state_precisions: tuple[str, ...] = ("fp32", "bf16")
    tags: frozenset[str] = frozenset()
    presets: tuple[Preset, ...] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "presets", tuple(preset for preset in PRESETS if preset.optimizer == self.name))


_RECORDS = (
    OptimizerInfo(
        name="HinaAdaptive",
        cls=HinaAdaptive,
        description=(
            "ADOPT or AdamW with gradient regularization, a learning rate for every element, and learning rate that "
            "moves to the parameters that matter."
        ),
        aliases=("hina_adaptive",),
        papers=(
            Paper("Decoupled Weight Decay Regularization", "1711.05101"),
            Paper("ADOPT: Modified Adam Can Converge with Any β2 with the Optimal Rate", "2411.02853"),
            Paper("Adaptive Gradient Regularization", "2407.16944"),
            Paper("Torque-Aware Momentum", "2412.18790"),
            Paper("Cautious Optimizers: Improving Training with One Line of Code", "2411.16085"),
            Paper("Grams: Gradient Descent with Adaptive Momentum Scaling", "2412.17107"),
            Paper("Rethinking Weight Decay for Robust Fine-Tuning of Foundation Models", "2411.01713"),
            Paper("Grokking at the Edge of Numerical Stability", "2501.04697"),
        ),
        capabilities=frozenset(
            {"lr_mask", "importance", "relationships", "lora", "vram_budget", "compile", "exact_resume", "closure"}
        ),
        tags=frozenset({"adam", "adopt", "lora", "fine-tuning", "low-memory"}),
    ),
)
_BY_NAME = {spelling: info for info in _RECORDS for spelling in (info.name, *info.aliases)}


def create_optimizer(
    name: str,
    params_or_model: nn.Module | Iterable[Tensor] | Iterable[dict[str, Any]] | Iterable[tuple[str, Tensor]],
    preset: str | None = None,
    **arguments: Any,
) -> HinaOptimizer:
    """Build an optimizer by name.

    Args:
        name: As listed by :func:`list_optimizers`, or in the spelling of a function (``"hina_adaptive"``).
        params_or_model: A module, of which every parameter that requires grad is taken with its name; or parameters,
            named parameters or groups, as for any optimizer of torch.
        preset: A set of arguments for a purpose; see :func:`list_presets`. It never sets the learning rate.
        **arguments: Of the class. They override the preset.

    Raises:
        ValueError: No such optimizer or preset (names the nearest), a module without a parameter that requires grad,
            or an argument with a bad value.
        TypeError: An argument that the class does not have (names the nearest).

    Example:
        >>> import torch
        >>> model = torch.nn.Linear(4, 2)
        >>> optimizer = create_optimizer("HinaAdaptive", model, preset="language", lr=3e-4, warmup_steps=100)
        >>> optimizer.param_groups[0]["warmup_steps"], optimizer.param_groups[0]["lora_rank_penalty"]
        (100, True)
    """
    info = get_optimizer_info(name)
    given = {**_preset(info, preset).arguments, **arguments} if preset is not None else arguments
    return info.cls(_params(params_or_model), **given)


def list_optimizers(filter: str | None = None) -> list[str]:
    """Names of all optimizers, sorted.

    Args:
        filter: A pattern for the name (``"hina*"``, case ignored) or a tag or capability (``"lora"``). None: all.
    """
    return sorted(
        info.name
        for info in _RECORDS
        if filter is None
        or fnmatch.fnmatchcase(info.name.lower(), filter.lower())
        or filter in info.tags | info.capabilities
    )


def list_presets(optimizer: str | None = None) -> list[str]:
    """Names of all presets, sorted; of one optimizer, or of any.

    Raises:
        ValueError: No such optimizer.
    """
    records = _RECORDS if optimizer is None else (get_optimizer_info(optimizer),)
    return sorted({preset.name for info in records for preset in info.presets})


def get_optimizer_info(name: str) -> OptimizerInfo:
    """The record of an optimizer.

    Raises:
        ValueError: No such optimizer; names the nearest.
    """
    info = _BY_NAME.get(name)
    if info is None:
        raise ValueError(f"There is no optimizer named {name!r}. {nearest(str(name), _names())}")
    return info


def _names() -> list[str]:
    return [info.name for info in _RECORDS]


def _preset(info: OptimizerInfo, name: str) -> Preset:
    for preset in info.presets:
        if preset.name == name:
            return preset
    known = [preset.name for preset in info.presets]
    raise ValueError(f"{info.name} has no preset named {name!r}. {nearest(str(name), known)}")


def _params(params_or_model: Any) -> Any:
    if not isinstance(params_or_model, nn.Module):
        return params_or_model
    named = [(name, p) for name, p in params_or_model.named_parameters() if p.requires_grad]
    if not named:
        raise ValueError(
            f"{type(params_or_model).__name__} has no parameter that requires grad: unfreeze what is to be trained, or "
            "add the adapter before the optimizer."
        )
    return named
