"""Parameter groups: who decays, who is which part of an adapter, who learns at another rate."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from torch import nn

from hina_optim import arguments as rule
from hina_optim.adapters.roles import ROLES, Role, clean_name, role_of

__all__ = ["LORA_PLUS", "Named", "ParameterGroup", "Sorter", "group_parameters", "named_of", "normalization_parameters"]

#: Names with their parameter: every name of a tied one, the first of which it goes by.
Named = list[tuple[list[str], nn.Parameter]]

_NORMALIZATIONS: tuple[type[nn.Module], ...] = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm)

#: Adapter roles whose learning rate LoRA+ raises: LoRA's B, and LoKr's second factor, whole or itself a product. It
#: says nothing of LoHa, whose four factors have no such order.
LORA_PLUS: frozenset[Role] = frozenset({"lora_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b"})

_FACTOR = rule.Rule(
    "a finite number > 0 (to freeze parameters, call requires_grad_(False) on them)", rule.POSITIVE.holds
)


@dataclass
class ParameterGroup:
    """Parameters that an optimizer treats alike.

    Attributes:
        name: Unique and stable: ``decay``, ``no_decay``, ``lora_b`` and so on for roles with a factor of their own
            (``lora_magnitude:no_decay`` where they do not decay), and with a multiplier ``decay:x0.1:<regex>``.
        decays: Whether weight decay applies.
        factor: What the learning rate is multiplied by.
        params: Fully qualified names with their parameters, in the module's order.
    """

    name: str
    decays: bool
    factor: float
    params: list[tuple[str, nn.Parameter]] = field(default_factory=list)


@dataclass
class _Claim:
    """A factor that was requested for some roles."""

    label: str
    asked: str
    what: str
    factor: float
    roles: frozenset[Role]


def group_parameters(
    module: nn.Module,
    *,
    lr_multipliers: Mapping[str, float] | None = None,
    lora_ratio: float | None = None,
    roles: Mapping[str, float] | None = None,
    shapes: Mapping[nn.Parameter, tuple[int, ...]] | None = None,
) -> list[ParameterGroup]:
    r"""Sort the trainable parameters of a module into groups.

    Biases, the parameters of normalization layers, magnitudes of DoRA, and whatever else has fewer than two dimensions
    do not decay; all others do, embeddings included. Frozen parameters (``requires_grad=False``) are left out, a
    parameter that is used in several places (tied) is there once, under its first name, and no group is empty.

    Args:
        module: Any module; it is not changed.
        lr_multipliers: ``{regex: factor}``. The first regular expression that is found (``re.search``) in a fully
            qualified name of a parameter gives the factor, > 0, for its learning rate; a tied parameter answers to all
            its names. It multiplies the factor of the parameter's role.
        lora_ratio: LoRA+ (arXiv 2402.12354): learning rate of every adapter's B (LoKr: w2) over that of A, > 0.
        roles: ``{role: factor}``, factor > 0 for the learning rate of all parameters of a role of
            :data:`~hina_optim.adapters.roles.ROLES`, or of all that begin like it: ``"lokr_w2"`` is the whole factor
            and both halves, ``"loha"`` all of LoHa. Where two fit, the narrower one decides.
        shapes: Complete shapes of parameters that an engine has cut and that do not tell theirs any more.

    Returns:
        The groups, in a fixed order: without multiplier first, then in the order of ``lr_multipliers``.

    Raises:
        ValueError: The module has no trainable parameter; a regular expression is not valid, or decides for no
            trainable parameter; a role is not known, or no trainable parameter has it; ``lora_ratio`` is given and
            there is no adapter's B; ``lora_ratio`` and ``roles`` both decide for a role; a factor is not a finite
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
    what = type(module).__name__
    sorter = Sorter("group_parameters", what, lr_multipliers=lr_multipliers, lora_ratio=lora_ratio, roles=roles)
    groups = sorter.sort(named_of(module), normalization_parameters(module), shapes=shapes)
    sorter.finish()
    return groups


class Sorter:
    """Sorts named parameters into groups, and knows in the end which of the requests decided for nothing.

    Args:
        owner: The function that an error names.
        what: Whose parameters they are, for errors.
        lr_multipliers: As for :func:`group_parameters`.
        lora_ratio: As for :func:`group_parameters`; ``ratio`` in errors where the owner calls it so.
        roles: As for :func:`group_parameters`.
        ratio_name: What the owner calls ``lora_ratio``.

    Raises:
        ValueError: As :func:`group_parameters`, for values that are wrong whatever the parameters are.
    """

    def __init__(
        self,
        owner: str,
        what: str,
        *,
        lr_multipliers: Mapping[str, float] | None = None,
        lora_ratio: float | None = None,
        roles: Mapping[str, float] | None = None,
        ratio_name: str = "lora_ratio",
    ) -> None:
        self._owner = owner
        self._what = what
        self._patterns = [self._compiled(p, f) for p, f in (lr_multipliers or {}).items()]
        self._claims = [self._role_claim(role, factor) for role, factor in (roles or {}).items()]
        if lora_ratio is not None:
            rule.check(owner, ratio_name, lora_ratio, rule.POSITIVE)
            self._claims.append(self._ratio_claim(ratio_name, lora_ratio))
        # the widest first: a narrower one overwrites it
        widest = sorted(self._claims, key=lambda claim: -len(claim.roles))
        self._claim_of: dict[Role, _Claim] = {role: claim for claim in widest for role in claim.roles}
        self._idle_claims = {claim.label: claim for claim in self._claims}
        self._idle_patterns = {pattern.pattern for pattern, _ in self._patterns}
        self._found: Counter[Role] = Counter()
        self._names: list[tuple[str, bool]] = []

    def sort(
        self,
        named: Named,
        normalization: frozenset[int] = frozenset(),
        *,
        by_decay: bool = True,
        shapes: Mapping[nn.Parameter, tuple[int, ...]] | None = None,
    ) -> list[ParameterGroup]:
        """Groups of the trainable ones among some parameters; none is empty.

        Args:
            named: Names and parameters.
            normalization: Identities, used within this call only, of parameters that do not decay.
            by_decay: False where none of them decays anyhow, so that they need no groups of their own.
            shapes: As for :func:`group_parameters`.

        Returns:
            The groups: without multiplier first, then in the order of the multipliers, by name within each.
        """
        groups: dict[tuple[int, str], ParameterGroup] = {}
        for names, parameter in named:
            self._names += [(name, parameter.requires_grad) for name in names]
            if not parameter.requires_grad:
                continue
            shape = (shapes or {}).get(parameter, tuple(parameter.shape))
            role = role_of(names[0], shape)
            is_bias = names[0].rpartition(".")[2] == "bias"
            decays = len(shape) > 1 and not is_bias and id(parameter) not in normalization
            decays = not by_decay or (decays and role != "lora_magnitude")
            base, factor, order = "decay" if decays else "no_decay", 1.0, 0
            if role is not None:
                self._found[role] += 1
                claim = self._claim_of.get(role)
                if claim is not None:
                    self._idle_claims.pop(claim.label, None)
                    base, factor = claim.label if decays else f"{claim.label}:no_decay", claim.factor
            for position, (pattern, multiplier) in enumerate(self._patterns, start=1):
                if any(pattern.search(name) for name in names):
                    self._idle_patterns.discard(pattern.pattern)
                    base, factor, order = f"{base}:x{multiplier:g}:{pattern.pattern}", factor * multiplier, position
                    break
            group = groups.setdefault((order, base), ParameterGroup(base, decays, factor))
            group.params.append((names[0], parameter))
        return [groups[key] for key in sorted(groups)]

    def finish(self) -> None:
        """Refuse requests that decided for none of the parameters sorted so far.

        Raises:
            ValueError: Nothing is trainable, or a multiplier, a role or the ratio decided for nothing.
        """
        if not any(trainable for _, trainable in self._names):
            count = len(self._names)
            frozen = f"all {count} are frozen (requires_grad=False)" if count else "it has no parameters at all"
            raise ValueError(f"{self._owner}: {self._what} has no trainable parameter: {frozen}.")
        for pattern, _ in self._patterns:
            if pattern.pattern in self._idle_patterns:
                raise ValueError(f"{self._owner}: lr_multipliers: {self._why_idle(pattern)}")
        for claim in self._idle_claims.values():
            found = ", ".join(f"{role} ({self._found[role]})" for role in ROLES if role in self._found)
            taken = claim.roles & self._found.keys()
            why = (
                f"other entries of roles decide for {', '.join(sorted(taken))}"
                if taken
                else f"no trainable parameter of {self._what} is {claim.what}. Adapter roles found: {found or 'none'}. "
                "Add the adapter before the groups are made, and give parameters their names"
            )
            raise ValueError(f"{self._owner}: {claim.asked} was given, but {why}; or leave it out.")

    def _compiled(self, pattern: str, factor: float) -> tuple[re.Pattern[str], float]:
        rule.check(self._owner, f"lr_multipliers[{pattern!r}]", factor, _FACTOR)
        try:
            return re.compile(pattern), float(factor)
        except re.error as error:
            raise ValueError(
                f"{self._owner}: lr_multipliers: {pattern!r} is not a regular expression: {error}."
            ) from None

    def _role_claim(self, label: str, factor: float) -> _Claim:
        rule.check(self._owner, f"roles[{label!r}]", factor, _FACTOR)
        covered = frozenset(role for role in ROLES if role == label or role.startswith(f"{label}_"))
        if not covered:
            raise ValueError(f"{self._owner}: roles: there is no role {label!r}. {rule.nearest(label, ROLES)}")
        what = label if len(covered) == 1 else f"any of {', '.join(sorted(covered))}"
        return _Claim(label, f"roles[{label!r}]={factor!r}", what, float(factor), covered)

    def _ratio_claim(self, ratio_name: str, ratio: float) -> _Claim:
        for claim in self._claims:
            both = ", ".join(sorted(claim.roles & LORA_PLUS))
            if both:
                given = f"{ratio_name}={ratio!r} and {claim.asked}"
                raise ValueError(f"{self._owner}: {given} both decide for {both}; give one.")
        what = "the B of an adapter (lora_B, lora_up, lokr_w2, …)"
        return _Claim("lora_b", f"{ratio_name}={ratio!r}", what, float(ratio), LORA_PLUS)

    def _why_idle(self, pattern: re.Pattern[str]) -> str:
        matched = [name for name, _ in self._names if pattern.search(name)]
        if matched:
            return (
                f"the pattern {pattern.pattern!r} is found only in parameters that are frozen or that an earlier "
                f"pattern took, such as {matched[0]!r}."
            )
        example = next(name for name, trainable in self._names if trainable)
        return (
            f"the pattern {pattern.pattern!r} is found in no parameter name of {self._what}; a name looks like "
            f"{example!r}."
        )


def named_of(source: nn.Module | Iterable[tuple[str, nn.Parameter]]) -> Named:
    """Every parameter once, with all its names, in the order of the first."""
    pairs = source.named_parameters(remove_duplicate=False) if isinstance(source, nn.Module) else source
    names: dict[nn.Parameter, list[str]] = {}
    for name, parameter in pairs:
        names.setdefault(parameter, []).append(clean_name(name))
    return [(listed, parameter) for parameter, listed in names.items()]


def normalization_parameters(module: nn.Module) -> frozenset[int]:
    """Identities of the parameters that normalization layers hold themselves, to be used at once and forgotten."""
    layers = (m for m in module.modules() if isinstance(m, _NORMALIZATIONS) or type(m).__name__.endswith("Norm"))
    return frozenset(id(p) for layer in layers for p in layer.parameters(recurse=False))
