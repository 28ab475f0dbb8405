"""Arguments written as text, as on a command line, read into the types that a constructor declares.

Nothing is evaluated: a value is read by the rules of its annotation and of Python's literals, or refused.
"""

from __future__ import annotations

import ast
import difflib
import inspect
import itertools
import re
import types
import typing
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, Union

from hina_optim.arguments import Rule, reject_unknown

__all__ = ["argument_types", "parse_arguments"]

#: ``name =``, at the beginning of a text or after a space or comma; dashes before and within the name are allowed.
_NAME = re.compile(r"(?:^|(?<=[\s,;]))-{0,2}([A-Za-z_][\w-]*)\s*=(?!=)")
_TRUE = frozenset({"true", "yes", "on", "1"})
_FALSE = frozenset({"false", "no", "off", "0"})
_CLOSING = {"(": ")", "[": "]", "{": "}"}


def parse_arguments(
    target: Callable[..., Any], strings: Iterable[str], extra: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Read ``name=value`` strings into arguments of a class or function.

    A string may hold one argument or several, separated by spaces or commas (``"profile=balanced lr=2e-4"``), with or
    without ``--`` in front. What a value may look like follows from the annotation of the argument:

    =============== ==================================================================================================
    annotation      text
    =============== ==================================================================================================
    ``bool``        ``True``, ``yes``, ``on``, ``1`` and ``False``, ``no``, ``off``, ``0``, in any case
    ``int``         ``500``; also ``1e3`` and ``500.0``, which are whole
    ``float``       ``1e-3``, ``5``
    ``str``         bare or quoted; bare without spaces, commas, quotes or brackets. So are the words of a ``Literal``
    ``tuple, list`` ``(0.9, 0.99)``, ``[0.9, 0.99]`` or ``0.9,0.99``
    ``… | None``    ``None`` or ``null``, else as the rest
    =============== ==================================================================================================

    Of several types, the one that the text is a literal of wins: ``4`` is an int and ``0.9`` a float for
    ``int | float``. Ranges are the constructor's to check.

    Args:
        target: A class or function with annotated parameters.
        strings: The texts; empty ones are passed over.
        extra: Further argument name → annotation, for what a caller takes beside the target's own.

    Returns:
        Argument name → value, in the order given.

    Raises:
        ValueError: A text without ``name=``, or a value that is not of the argument's type; names the argument, what
            was given, and what it must be.
        TypeError: An argument that does not exist (names the nearest), that was removed (names what to use instead),
            that is given twice, or that no text can express; or something that is not a string.

    Example:
        >>> from hina_optim import HinaAdaptive
        >>> parse_arguments(HinaAdaptive, ["--lr=2e-4 use_tam=no", "betas=0.9,0.99", "state_precision=bf16"])
        {'lr': 0.0002, 'use_tam': False, 'betas': (0.9, 0.99), 'state_precision': 'bf16'}
    """
    owner = getattr(target, "__name__", str(target))
    known = {**argument_types(target), **(extra or {})}
    rules: Mapping[str, Rule] = getattr(target, "RULES", {})
    removed: Mapping[str, str] = getattr(target, "REMOVED", {})
    result: dict[str, Any] = {}
    for string in strings:
        if not isinstance(string, str):
            raise TypeError(f"{owner}: {string!r} is not a string of the form name=value.")
        for name, text in _items(owner, string):
            reject_unknown(owner, [name], known, removed)
            if name in result:
                raise TypeError(f"{owner}: {name} is given twice, as {result[name]!r} and as {text!r}.")
            try:
                result[name] = _read(text, known[name])
            except _Unwritable as error:
                raise TypeError(f"{owner}: {name} cannot be written as text; pass it as {name}=… in Python.") from error
            except ValueError:
                expected = rules[name].text if name in rules else _describe(known[name])
                raise ValueError(
                    f"{owner}: {name}={text!r} is not valid: {name} must be {expected}.{_near(text, known[name])}"
                ) from None
    return result


def argument_types(target: Callable[..., Any]) -> dict[str, Any]:
    """Argument name → annotation, resolved; without ``self`` and ``params``.

    Where a subclass passes ``**options`` on, the arguments of the classes above it count as well.
    """
    layers: Iterable[Any] = [target]
    if isinstance(target, type):
        layers = [vars(cls)["__init__"] for cls in target.__mro__ if "__init__" in vars(cls) and cls is not object]
    found: dict[str, Any] = {}
    for layer in layers:
        hints = typing.get_type_hints(layer)
        passes_on = False
        for parameter in inspect.signature(layer).parameters.values():
            if parameter.kind is parameter.VAR_KEYWORD:
                passes_on = True
            elif parameter.kind is not parameter.VAR_POSITIONAL and parameter.name not in ("self", "params"):
                found.setdefault(parameter.name, hints.get(parameter.name, Any))
        if not passes_on:
            break
    return found


# -- names -------------------------------------------------------------------------------------------------------------


def _items(owner: str, string: str) -> Iterator[tuple[str, str]]:
    """The ``(name, text of the value)`` in one string."""
    string = string.strip()
    if len(string) > 1 and string[0] == string[-1] and string[0] in "'\"" and string[0] not in string[1:-1]:
        string = string[1:-1].strip()  # a shell within a shell leaves its quotes
    covered = _covered(string)
    starts = [match for match in _NAME.finditer(string) if not covered[match.start(1)]]
    before = string[: starts[0].start()] if starts else string
    if before.strip(" \t\r\n,;"):
        raise ValueError(f"{owner}: {before.strip()!r} is not of the form name=value.")
    ends = [*(match.start() for match in starts[1:]), len(string)]
    for match, end in zip(starts, ends, strict=False):
        text = string[match.end() : end].strip()
        yield match[1].replace("-", "_"), text.rstrip(" \t\r\n,;")


def _covered(string: str) -> list[bool]:
    """For every character, whether it stands within quotes or brackets."""
    result: list[bool] = []
    closing: list[str] = []
    quote, escaped = "", False
    for character in string:
        result.append(bool(quote or closing))
        if quote:
            if escaped:
                escaped = False
            elif character == "\\":
                escaped = True
            elif character == quote:
                quote = ""
        elif character in "'\"":
            quote = character
        elif character in _CLOSING:
            closing.append(_CLOSING[character])
        elif closing and character == closing[-1]:
            closing.pop()
    return result


# -- values ------------------------------------------------------------------------------------------------------------


class _Unwritable(TypeError):
    """No text means a value of this type."""


def _read(text: str, annotation: Any) -> Any:
    """A value of the annotated type, or ValueError."""
    members = _members(annotation)
    if not text:
        raise ValueError("no value")
    if type(None) in members and text.lower() in ("none", "null"):
        return None
    # a bare word reads as anything: str comes last
    members = sorted((member for member in members if member is not type(None)), key=lambda member: member is str)
    for exact in (True, False):
        for member in members:
            try:
                return _read_one(text, member, exact and len(members) > 1)
            except ValueError:
                continue
    if members and not any(map(_writable, members)):
        raise _Unwritable
    raise ValueError("no type fits")


def _read_one(text: str, annotation: Any, exact: bool) -> Any:
    """A value of one type; ``exact``: only where the text is a literal of just that type."""
    origin = typing.get_origin(annotation)
    if annotation is bool:
        return _bool(text, exact)
    if annotation is int:
        return int(text) if exact else _whole(text)
    if annotation is float:
        if exact and re.fullmatch(r"[+-]?\d+", text):
            raise ValueError("an int")
        return float(text)
    if annotation is str:
        return _word(text)
    if origin is Literal:
        return _choice(text, typing.get_args(annotation))
    if annotation in (tuple, list, Sequence) or origin in (tuple, list, Sequence):
        return _sequence(text, annotation)
    if annotation in (dict, Mapping) or origin in (dict, Mapping):
        value = _literal(text)
        if not isinstance(value, dict):
            raise ValueError("not a dict")
        return value
    if annotation is Any:
        try:
            return _literal(text)
        except ValueError:
            return _word(text)
    raise ValueError("cannot be read")


def _bool(text: str, exact: bool) -> bool:
    word = text.lower()
    if word in _TRUE and not (exact and word == "1"):
        return True
    if word in _FALSE and not (exact and word == "0"):
        return False
    raise ValueError("neither true nor false")


def _whole(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        value = float(text)
        if not value.is_integer() or abs(value) > 2**53:
            raise ValueError("not whole") from None
        return int(value)


def _word(text: str) -> str:
    if text[0] in "'\"":
        value = _literal(text)
        if not isinstance(value, str):
            raise ValueError("not a string")
        return value
    if re.search(r"[\s,;='\"()\[\]{}\x00-\x1f\x7f]", text):
        raise ValueError("needs quotes")
    return text


def _choice(text: str, choices: tuple[Any, ...]) -> Any:
    for choice in choices:
        if text in (repr(choice), str(choice)):
            return choice
    if text[0] in "'\"" and _word(text) in choices:
        return _word(text)
    raise ValueError("not a choice")


def _sequence(text: str, annotation: Any) -> Any:
    """``(a, b)``, ``[a, b]`` or ``a, b``."""
    if text[0] in "([" and text[-1] == _CLOSING[text[0]] and all(_covered(text)[1:]):
        text = text[1:-1]
    covered = _covered(text)
    edges = [-1, *(i for i, c in enumerate(text) if c == "," and not covered[i]), len(text)]
    parts = [text[a + 1 : b].strip() for a, b in itertools.pairwise(edges)]
    if parts[-1] == "":
        parts.pop()  # a trailing comma, or nothing at all
    kind = typing.get_origin(annotation) or annotation
    types_ = typing.get_args(annotation) or (Any, ...)
    if kind is not tuple:
        return [_read(part, types_[0]) for part in parts]
    if len(types_) == 2 and types_[1] is Ellipsis:
        types_ = (types_[0],) * len(parts)
    if len(parts) != len(types_):
        raise ValueError("another length")
    return tuple(_read(part, each) for part, each in zip(parts, types_, strict=True))


def _literal(text: str) -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Python's remarks on how a literal is written
            return ast.literal_eval(text)
    except (SyntaxError, TypeError, MemoryError, RecursionError):
        raise ValueError("not a literal") from None


# -- types -------------------------------------------------------------------------------------------------------------


def _members(annotation: Any) -> list[Any]:
    """The types of a union, or the one type."""
    if typing.get_origin(annotation) in (Union, types.UnionType):
        return list(typing.get_args(annotation))
    return [annotation]


def _near(text: str, annotation: Any) -> str:
    """The word of a ``Literal`` that is nearest to a mistyped one, as a sentence, if one is near."""
    words = [w for m in _members(annotation) if typing.get_origin(m) is Literal for w in typing.get_args(m)]
    near = difflib.get_close_matches(text.strip("'\"").lower(), [w for w in words if isinstance(w, str)], n=1)
    return f" Did you mean {near[0]!r}?" if near else ""


def _writable(annotation: Any) -> bool:
    kind = typing.get_origin(annotation) or annotation
    return kind in (bool, int, float, str, tuple, list, dict, Sequence, Mapping, Literal, Any)


def _describe(annotation: Any) -> str:
    """What a value must be, in words."""
    words = []
    for member in _members(annotation):
        origin, args = typing.get_origin(member), typing.get_args(member)
        if origin is Literal:
            words.append("one of " + ", ".join(map(repr, args)))
        elif origin in (tuple, list, Sequence):
            inner = [_describe(arg) for arg in args if arg is not Ellipsis]
            words.append(f"({', '.join(inner)}{', …' if len(inner) != len(args) or origin is not tuple else ''})")
        elif member is type(None):
            words.append("None")
        else:
            names = {bool: "True or False", int: "an integer", float: "a number", str: "a word"}
            words.append(names.get(member, getattr(member, "__name__", str(member))))
    return " or ".join(words)
