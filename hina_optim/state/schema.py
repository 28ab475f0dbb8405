"""What the metadata of portable state must look like; whatever else comes out of a file is refused, by name."""

from __future__ import annotations

from typing import Any

import torch

from hina_optim.state.plain import dtype_named
from hina_optim.state.portable import COUNTERS, VERSION, codec_of
from hina_optim.state.precision import TensorCodec

__all__ = ["checked", "tensors"]


def checked(metadata: Any) -> dict[str, Any]:
    """The metadata, if it is such.

    Raises:
        ValueError: It is not; names the field.
    """
    _is(metadata, dict, "the metadata")
    _has(metadata, {"version": int}, "the metadata")
    if metadata["version"] != VERSION:
        raise ValueError(f"the format has version {metadata['version']}, this library reads {VERSION}.")
    fields = {"optimizer": str, "named": bool, "described": dict, "groups": list, "params": list}
    _has(metadata, fields, "the metadata")
    for at, entry in enumerate(metadata["params"]):
        _param(entry, f"params[{at}]")
    names = [entry["name"] for entry in metadata["params"]]
    if len(set(names)) < len(names):
        raise ValueError("params has one name twice.")
    held: list[int] = []
    for at, group in enumerate(metadata["groups"]):
        _is(group, dict, f"groups[{at}]")
        _has(group, {"params": list, "options": dict}, f"groups[{at}]")
        for place in group["params"]:
            _is(place, int, f"groups[{at}].params")
        held += group["params"]
    if sorted(held) != list(range(len(names))):
        raise ValueError(f"the groups do not hold each of the {len(names)} parameters once.")
    return dict(metadata)


def _param(entry: Any, where: str) -> None:
    _is(entry, dict, where)
    _has(entry, {"name": str, "shape": list, "dtype": str}, where)
    _shape(entry["shape"], f"{where}.shape")
    dtype_named(entry["dtype"])
    if "told" in entry:
        _is(entry["told"], str, f"{where}.told")
    if entry.get("alone", True) is not True:
        raise ValueError(f"{where}.alone is {entry['alone']!r}, not true.")
    if "slots" not in entry:
        return
    _is(entry["slots"], dict, f"{where}.slots")
    for name, form in entry["slots"].items():
        at = f"{where}.slots.{name}"
        _is(form, dict, at)
        if form == {"form": "zero"}:
            continue
        codec = codec_of({key: value for key, value in form.items() if key not in ("shape", "decoded")})
        if "shape" in form:
            _shape(form["shape"], f"{at}.shape")
        more = ("shape" in form) + ("decoded" in form)
        if more > 1 or (more and not isinstance(codec, TensorCodec)):
            raise ValueError(f"{at} is {str(form)[:120]}, which is no form.")
        if "decoded" in form:
            _is(form["decoded"], dict, f"{at}.decoded")
            codec_of(form["decoded"])


def _shape(value: Any, where: str) -> None:
    _is(value, list, where)
    for length in value:
        _is(length, int, where)
        if not 0 <= length < 1 << 62:
            raise ValueError(f"{where} is {value}, which is no shape.")


def _is(value: Any, kind: type, where: str) -> None:
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise ValueError(f"{where} is {str(value)[:80]!r}, expected {kind.__name__}.")


def _has(value: dict[str, Any], fields: dict[str, type], where: str) -> None:
    for key, kind in fields.items():
        if key not in value:
            raise ValueError(f"{where} has no {key!r}.")
        _is(value[key], kind, f"{where}: {key}")


def tensors(metadata: dict[str, Any]) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Key → dtype and shape of every stored tensor that metadata tells of; it has been checked."""
    found: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
    for entry in metadata["params"]:
        if "slots" not in entry:
            continue
        found.update({f"{entry['name']}/{part}": (torch.float32, ()) for part in COUNTERS})
        for name, form in entry["slots"].items():
            if form == {"form": "zero"}:
                continue
            codec = codec_of({key: value for key, value in form.items() if key not in ("shape", "decoded")})
            shape = tuple(form.get("shape", entry["shape"]))
            for suffix, dtype in codec.parts.items():
                found[f"{entry['name']}/{name}{suffix}"] = (dtype, codec.part_shape(suffix, shape))
    return found
