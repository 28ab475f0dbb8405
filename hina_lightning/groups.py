"""Parameter groups of a module: who decays, who is the B of an adapter, who learns at another rate."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import nn

from hina_optim import arguments as rule
from hina_optim.adapters.roles import role_of

__all__ = ["ParameterGroup", "group_parameters"]

#: Parts of a parameter's name that a wrapper adds: the same parameter keeps one name, compiled or not, wrapped or not.
_WRAPPERS = frozenset({"_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module"})

_NORMALIZATIONS: tuple[type[nn.Module], ...] = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm)

#: Adapter roles whose learning rate LoRA+ raises: LoRA's B, and LoKr's second factor, whole or itself a product.
_RAISED_ROLES = frozenset({"lora_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b"})

_OWNER = "configure_optimizers"


@dataclass
class ParameterGroup:
    """Parameters that an optimizer treats alike.

    Attributes:
        name: Unique and stable: ``decay``, ``no_decay``, ``lora_b``, and with a multiplier ``decay:x0.1:<regex>``.
        decays: Whether weight decay applies.
        factor: What the learning rate is multiplied by.
        params: Fully qualified names with their parameters, in the module's order.
    """

    name: str
    decays: bool
    factor: float
    params: list[tuple[str, nn.Parameter]] = field(default_factory=list)


def group_parameters(
    module: nn.Module,
    *,
    lr_multipliers: Mapping[str, float] | None = None,
    lora_ratio: float | None = None,
) -> list[ParameterGroup]:
    r"""Sort the trainable parameters of a module into groups.

    Biases, the parameters of normalization layers, and whatever else has fewer than two dimensions do not decay; all
    others do, embeddings included. Frozen parameters (``requires_grad=False``) are left out, a parameter that is used
    in several places (tied) is there once, under its first name, and no group is empty.

    Args:
        module: Any module; it is not changed.
        lr_multipliers: ``{regex: factor}``. The first regular expression that is found (``re.search``) in a fully
            qualified name of a parameter gives the factor, > 0, for its learning rate; a tied parameter answers to all
            its names.
        lora_ratio: LoRA+ (arXiv 2402.12354): learning rate of every adapter's B (LoKr: w2) over that of A, > 0.

    Returns:
        The groups, in a fixed order: without multiplier first, then in the order of ``lr_multipliers``.

    Raises:
        ValueError: The module has no trainable parameter; a regular expression is not valid, or decides for no
            trainable parameter; ``lora_ratio`` is given and there is no adapter's B; a factor is not a finite
            number > 0.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 3), nn.LayerNorm(3), nn.Linear(3, 1))
        >>> for group in group_parameters(model, lr_multipliers={r"^2\.": 0.1}):
        ...     print(group.name, group.factor, [name for name, _ in group.params])
        decay 1.0 ['0.weight']
        no_decay 1.0 ['0.bias', '1.weight', '1.bias']
        decay:x0.1:^2\. 0.1 ['2.weight']
        no_decay:x0.1:^2\. 0.1 ['2.bias']
    """
    multipliers = _compiled(lr_multipliers or {})
    if lora_ratio is not None:
        rule.check(_OWNER, "lora_ratio", lora_ratio, rule.POSITIVE)
    parameters = _trainable(module)
    normalization = _normalization_parameters(module)

    found: dict[tuple[int, str], ParameterGroup] = {}
    for names, parameter in parameters:
        name = names[0]
        is_bias = name.rpartition(".")[2] == "bias"
        decays = parameter.ndim > 1 and not is_bias and id(parameter) not in normalization
        base, factor = "decay" if decays else "no_decay", 1.0
        if lora_ratio is not None and role_of(name, parameter.shape) in _RAISED_ROLES:
            base, factor = "lora_b", float(lora_ratio)
        order = 0
        for position, (pattern, multiplier) in enumerate(multipliers, start=1):
            if any(pattern.search(n) for n in names):
                base, factor, order = f"{base}:x{multiplier:g}:{pattern.pattern}", factor * multiplier, position
                break
        group = found.setdefault((order, base), ParameterGroup(base, decays, factor))
        group.params.append((name, parameter))

    _refuse_idle_patterns(multipliers, {order for order, _ in found}, module)
    if lora_ratio is not None and not any(group.name.startswith("lora_b") for group in found.values()):
        raise ValueError(
            f"{_OWNER}: lora_ratio={lora_ratio!r} was given, but no trainable parameter of {type(module).__name__} is "
            "the B of an adapter (lora_B, lora_up, lokr_w2, …). Add the adapter before the optimizer is configured, or "
            "leave lora_ratio out."
        )
    return [found[key] for key in sorted(found)]


def clean_name(name: str) -> str:
    """A fully qualified name without the parts that torch.compile, checkpoint wrappers and FSDP add."""
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def _compiled(lr_multipliers: Mapping[str, float]) -> list[tuple[re.Pattern[str], float]]:
    compiled = []
    for pattern, factor in lr_multipliers.items():
        positive = rule.Rule(
            "a finite number > 0 (to freeze parameters, call requires_grad_(False) on them)", rule.POSITIVE.holds
        )
        rule.check(_OWNER, f"lr_multipliers[{pattern!r}]", factor, positive)
        try:
            compiled.append((re.compile(pattern), float(factor)))
        except re.error as error:
            raise ValueError(f"{_OWNER}: lr_multipliers: {pattern!r} is not a regular expression: {error}.") from None
    return compiled


def _trainable(module: nn.Module) -> list[tuple[list[str], nn.Parameter]]:
    """Every trainable parameter once, with all its names, in the module's order."""
    names: dict[nn.Parameter, list[str]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        names.setdefault(parameter, []).append(clean_name(name))
    trainable = [(n, p) for p, n in names.items() if p.requires_grad]
    if not trainable:
        frozen = f"all {len(names)} are frozen (requires_grad=False)" if names else "it has no parameters at all"
        raise ValueError(f"{_OWNER}: {type(module).__name__} has no trainable parameter: {frozen}.")
    return trainable


def _normalization_parameters(module: nn.Module) -> set[int]:
    """Identities, used within one call only, of the parameters that normalization layers hold themselves."""
    layers = (m for m in module.modules() if isinstance(m, _NORMALIZATIONS) or type(m).__name__.endswith("Norm"))
    return {id(p) for layer in layers for p in layer.parameters(recurse=False)}


def _refuse_idle_patterns(patterns: list[tuple[re.Pattern[str], float]], used: set[int], module: nn.Module) -> None:
    for position, (pattern, _) in enumerate(patterns, start=1):
        if position in used:
            continue
        matched = [n for n, _ in module.named_parameters(remove_duplicate=False) if pattern.search(clean_name(n))]
        if not matched:
            example = next(clean_name(n) for n, p in module.named_parameters() if p.requires_grad)
            why = f"is found in no parameter name of {type(module).__name__}; a name looks like {example!r}"
        else:
            why = f"is found only in parameters that are frozen or that an earlier pattern took, such as {matched[0]!r}"
        raise ValueError(f"{_OWNER}: lr_multipliers: the pattern {pattern.pattern!r} {why}.")
