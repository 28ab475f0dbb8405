"""Who is measured: every optimizer of this library in its variants, and what users would pick instead."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.workloads import Named
from hina_optim import create_optimizer, get_optimizer_info, list_optimizers
from hina_optim.parsing import argument_types
from hina_optim.profiles import PROFILES

LR = 1e-4
BASE = "torch AdamW, fused"

#: HinaAdaptive with every technique that needs no whole matrix.
ELEMENTWISE: dict[str, Any] = {"use_orthogonal_grad": True, "background_regularization": True, "use_loss_context": True}
#: HinaAdaptive as plain AdamW.
PLAIN: dict[str, Any] = {
    "use_spd": False,
    "use_cautious": False,
    "use_adopt_stability": False,
    "use_agr": False,
    "use_tam": False,
    "use_dynamic_adaptation": False,
    "use_lr_mask": False,
    "dynamic_weight_decay": False,
}


@dataclass(frozen=True)
class Contender:
    """One row of the table.

    Attributes:
        name: What the row is called.
        build: Makes the optimizer; raises ImportError where its library is not installed.
        ours: Whether it is this library's.
        compiled: Whether its step is compiled.
        variant: Whether it is this library's with other arguments than its own defaults.
    """

    name: str
    build: Callable[[Named], torch.optim.Optimizer]
    ours: bool = False
    compiled: bool = False
    variant: bool = False


def _others() -> list[Contender]:
    def torch_adamw(**how: bool) -> Callable[[Named], torch.optim.Optimizer]:
        return lambda named: torch.optim.AdamW([p for _, p in named], lr=LR, **how)

    def imported(module: str, name: str) -> Callable[[Named], torch.optim.Optimizer]:
        def make(named: Named) -> torch.optim.Optimizer:
            made: torch.optim.Optimizer = getattr(importlib.import_module(module), name)([p for _, p in named], lr=LR)
            return made

        return make

    return [
        Contender(BASE, torch_adamw(fused=True)),
        Contender("torch AdamW, foreach", torch_adamw(foreach=True)),
        Contender("torch Adafactor", imported("torch.optim", "Adafactor")),
        Contender("bitsandbytes AdamW8bit", imported("bitsandbytes.optim", "AdamW8bit")),
        Contender("torchao AdamW8bit", imported("torchao.optim", "AdamW8bit"), compiled=True),
        Contender("pytorch_optimizer CAME", imported("pytorch_optimizer", "CAME")),
        Contender("optimi AdamW", imported("optimi", "AdamW")),
    ]


def _ours(compiled: bool) -> list[Contender]:
    def make(name: str, arguments: dict[str, Any]) -> Callable[[Named], torch.optim.Optimizer]:
        return lambda named: create_optimizer(name, named, lr=LR, compile=compiled, **arguments)

    variants: list[tuple[str, str, dict[str, Any]]] = []
    names = list_optimizers()
    for name in names:
        variants.append((name, "", {}))
        if not any(other.startswith(name) and "8bit" in other.lower() for other in names):
            variants.append((name, "8bit", {"state_precision": "8bit"}))
        if "profile" in argument_types(get_optimizer_info(name).cls):
            variants += [(name, profile, {"profile": profile, "verbose": False}) for profile in PROFILES]
        if name == "HinaAdaptive":
            variants += [(name, "bf16", {"state_precision": "bf16"}), (name, "elementwise", ELEMENTWISE)]
            variants.append((name, "plain", PLAIN))
    made = []
    for name, variant, arguments in sorted(variants, key=lambda v: (v[0] != "HinaAdaptive", v[0])):
        row = ", ".join(part for part in (name, variant, "compiled" if compiled else "") if part)
        made.append(Contender(row, make(name, arguments), True, compiled, bool(variant)))
    return made


#: Compiled rows that are always there.
COMPILED = ("HinaAdaptive, compiled", "HinaAdaptive, plain, compiled")


def contenders(compiled: bool = False) -> list[Contender]:
    """All rows, the base first; with ``compiled``, all of this library's twice."""
    return [*_others(), *_ours(False), *(c for c in _ours(True) if compiled or c.name in COMPILED)]
