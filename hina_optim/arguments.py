"""Rules for hyper-parameters: what a value must be, and the error that names argument, value and rule."""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

__all__ = ["Rule", "check", "check_all", "nearest", "reject_unknown"]


@dataclass(frozen=True)
class Rule:
    """What a value must be: ``text`` completes the sentence "… must be", ``holds`` decides."""

    text: str
    holds: Callable[[Any], bool]


def _number(x: Any) -> bool:
    if isinstance(x, torch.Tensor):
        return x.numel() == 1
    return isinstance(x, (int, float)) and not isinstance(x, bool) and math.isfinite(x)


def _float(x: Any) -> float:
    return float(x)


NON_NEGATIVE = Rule("a finite number >= 0", lambda x: _number(x) and _float(x) >= 0 and math.isfinite(_float(x)))
POSITIVE = Rule("a finite number > 0", lambda x: _number(x) and _float(x) > 0 and math.isfinite(_float(x)))
UNIT = Rule("a number in [0, 1]", lambda x: _number(x) and 0 <= _float(x) <= 1)
BELOW_ONE = Rule("a number in [0, 1)", lambda x: _number(x) and 0 <= _float(x) < 1)
AT_LEAST_ONE = Rule("a finite number >= 1", lambda x: _number(x) and _float(x) >= 1)
COUNT = Rule("an integer >= 0", lambda x: isinstance(x, int) and not isinstance(x, bool) and x >= 0)
INTERVAL = Rule("an integer >= 1", lambda x: isinstance(x, int) and not isinstance(x, bool) and x >= 1)
INTEGER = Rule("an integer", lambda x: isinstance(x, int) and not isinstance(x, bool))
FLAG = Rule("True or False", lambda x: isinstance(x, bool))
HOST_OR_NONE = Rule('"cpu" or None', lambda x: x is None or x == "cpu")
OPTIONAL_FLAG = Rule("True, False or None", lambda x: x is None or isinstance(x, bool))
BETAS = Rule(
    "two numbers in [0, 1)",
    lambda x: isinstance(x, (tuple, list)) and len(x) == 2 and all(BELOW_ONE.holds(b) for b in x),
)


def one_of(*choices: str) -> Rule:
    """One of a few words."""
    return Rule("one of " + ", ".join(repr(c) for c in choices), lambda x: isinstance(x, str) and x in choices)


def check(owner: str, name: str, value: Any, rule: Rule) -> None:
    """Raise ValueError unless the rule holds.

    Args:
        owner: What the argument belongs to, the name of a class or function.
        name: The argument.
        value: What was given.
        rule: What it must be.

    Raises:
        ValueError: Names owner, argument, value and rule.
    """
    try:
        good = rule.holds(value)
    except (TypeError, ValueError):
        good = False
    if not good:
        raise ValueError(f"{owner}: {name}={value!r} is not valid: {name} must be {rule.text}.")


def check_all(owner: str, values: Mapping[str, Any], rules: Mapping[str, Rule]) -> None:
    """:func:`check` every value that has a rule."""
    for name, rule in rules.items():
        if name in values:
            check(owner, name, values[name], rule)


def nearest(word: str, known: Iterable[str]) -> str:
    """Words to append to an error: the known word nearest to a mistyped one, or all of them when none is near."""
    known = list(known)
    near = difflib.get_close_matches(word, known, n=1, cutoff=0.6) or [k for k in known if k.lower() == word.lower()]
    return f"Did you mean {near[0]!r}?" if near else f"Known: {', '.join(sorted(known))}."


def reject_unknown(owner: str, given: Iterable[str], known: Iterable[str], removed: Mapping[str, str]) -> None:
    """Raise TypeError for an argument that does not exist.

    Args:
        owner: Name of the class.
        given: Argument names that were given.
        known: Argument names that exist.
        removed: ``{name: what to use instead}`` for arguments that existed once.

    Raises:
        TypeError: Names the argument and the nearest known one, or what replaced it.
    """
    known = list(known)
    for name in given:
        if name in removed:
            raise TypeError(f"{owner}: the argument {name!r} was removed. {removed[name]}")
        if name not in known:
            raise TypeError(f"{owner}: unknown argument {name!r}. {nearest(name, known)}")
