"""The parameters of a saved model by name, shape and dtype, read from the heads of its files."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hina_lightning.sharded_state.loading import LENGTH
from hina_lightning.sharded_state.single import DTYPES as STORED

__all__ = ["ModelFileError", "lora_of", "model_of"]

#: More than a head ever has; a length beyond it is that of another format.
LONGEST = 100_000_000
#: What safetensors calls the dtypes that parameters have.
DTYPES = {name: dtype for dtype, name in STORED.items()} | {
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "BOOL": torch.bool,
}


class ModelFileError(ValueError):
    """What was named is no model that can be read."""


def model_of(path: Path, train: str | None = None) -> nn.Module:
    """A module on the meta device with the parameters of a model; their values are not read.

    Integers, as quantized weights are, and booleans are frozen.

    Args:
        path: A ``.safetensors`` file, or a folder with such files.
        train: A regular expression; parameters whose names it is found in are trained, the others frozen. None: all.

    Raises:
        ModelFileError: There is nothing, it is something else, or no name fits ``train``.
    """
    root = nn.Module()
    wanted = _pattern(train or "")
    trained = 0
    for name, shape, dtype in _entries(path):
        chosen = dtype.is_floating_point and wanted.search(name) is not None
        trained += chosen
        _put(root, name, nn.Parameter(torch.empty(shape, dtype=dtype, device="meta"), requires_grad=chosen))
    if not trained:
        raise ModelFileError(f"{path}: no parameter's name fits {train!r}, so nothing would be trained.")
    return root


def lora_of(base: nn.Module, rank: int, target: str | None = None) -> nn.Module:
    """The same with everything frozen, and a LoRA pair beside each of its matrices.

    Args:
        base: Of :func:`model_of`; its trained parameters are those that may get a pair.
        rank: Of the pairs, ≥ 1.
        target: A regular expression for the names of the matrices. None: all matrices but embeddings, which are those
            with ``embed`` in their names.

    Raises:
        ModelFileError: No matrix fits.
    """
    wanted = None if target is None else _pattern(target)
    found = [
        (name, p)
        for name, p in base.named_parameters()
        if p.ndim == 2 and (wanted.search(name) is not None if wanted is not None else "embed" not in name)
    ]
    if not found:
        raise ModelFileError(f"there is no matrix whose name fits {target or 'anything but embed'!r}.")
    base.requires_grad_(False)
    for name, p in found:
        stem = name.removesuffix(".weight")
        for part, shape in (("lora_A", (rank, p.shape[1])), ("lora_B", (p.shape[0], rank))):
            _put(base, f"{stem}.{part}.weight", nn.Parameter(torch.empty(shape, device="meta")))
    return base


def _pattern(text: str) -> re.Pattern[str]:
    try:
        return re.compile(text)
    except re.error as error:
        raise ModelFileError(f"{text!r} is no regular expression: {error}.") from error


def _entries(path: Path) -> Iterator[tuple[str, tuple[int, ...], torch.dtype]]:
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    if not files:
        raise ModelFileError(f"{path} has no .safetensors files.")
    seen: set[str] = set()
    for file in files:
        for name, entry in _head(file).items():
            if name == "__metadata__":
                continue
            if name in seen:
                raise ModelFileError(f"{path}: {name} is in two files; name the one that is meant.")
            seen.add(name)
            if entry["dtype"] not in DTYPES:
                raise ModelFileError(f"{file}: {name} has the dtype {entry['dtype']}, which is not known.")
            yield name, tuple(entry["shape"]), DTYPES[entry["dtype"]]


def _head(file: Path) -> Mapping[str, Any]:
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(LENGTH), "little")
        text = opened.read(length) if length <= LONGEST else b""
    try:
        head = json.loads(text)
    except ValueError:
        head = None
    if not isinstance(head, dict) or not all(_fits(entry) for name, entry in head.items() if name != "__metadata__"):
        raise ModelFileError(f"{file} is no complete safetensors file.")
    return head


def _fits(entry: Any) -> bool:
    match entry:
        case {"dtype": str(), "shape": [*lengths]}:
            return all(type(n) is int and n >= 0 for n in lengths)
    return False


def _put(root: nn.Module, name: str, param: nn.Parameter) -> None:
    """Register a parameter under a dotted name."""
    *path, last = name.split(".")
    module = root
    for part in path:
        if part not in module._modules:
            module.add_module(part or "_", nn.Module())
        module = module.get_submodule(part)
    module.register_parameter(last, param)
