"""The command ``hina``: what a training will take, and what can be done with its files."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

from hina_lightning.cli.checkpoints import convert, shown
from hina_lightning.cli.planning import listed, planned
from hina_lightning.sharded_state import CheckpointError
from hina_optim.memory.planning import Sharding

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        arguments: Without the name of the program; None: those of this process.

    Returns:
        0; 1 after an error, which has been written to stderr; 2 if a plan does not fit its budget.
    """
    given = _parser().parse_args(arguments)
    try:
        match given.command:
            case "convert":
                convert(given.source, given.target, given.force)
            case "show":
                print(shown(given.path))
            case "list":
                print(listed())
            case "plan":
                return _plan(given)
    except (CheckpointError, OSError, ValueError, TypeError) as error:
        print(f"hina: {error}", file=sys.stderr)
        return 1
    return 0


def _plan(given: argparse.Namespace) -> int:
    if given.target is not None and given.lora is None:
        raise ValueError("--target says where LoRA pairs go; give --lora RANK, too.")
    found = planned(
        given.path,
        given.optimizer,
        given.arguments,
        preset=given.preset,
        train=given.train,
        lora=given.lora,
        target=given.target,
        sharding=given.sharding,
        world_size=given.world_size,
        vram_gb=given.vram_gb,
    )
    print(found)
    return 0 if given.vram_gb is None or found.rung is not None else 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="hina", description="Plan memory, and work with optimizer checkpoints.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")

    text = "say what training a model will take, from the heads of its files"
    plan = commands.add_parser("plan", help=text, description=f"{text[0].upper()}{text[1:]}. Activations not counted.")
    plan.add_argument("path", metavar="MODEL", type=Path, help="a .safetensors file, or a folder with such files")
    plan.add_argument(
        "--optimizer", default="HinaAdaptive", help="a name that `hina list` shows (default: %(default)s)"
    )
    plan.add_argument(
        "--optimizer-args", dest="arguments", metavar="NAME=VALUE", nargs="+", default=[], help="its arguments"
    )
    plan.add_argument("--preset", help="a set of arguments for a purpose")
    plan.add_argument("--train", metavar="REGEX", help="train only parameters with such names")
    plan.add_argument("--lora", metavar="RANK", type=_positive, help="freeze all, and train LoRA pairs beside matrices")
    plan.add_argument("--target", metavar="REGEX", help="with --lora: names of the matrices (default: no embeddings)")
    plan.add_argument("--sharding", default="none", choices=get_args(Sharding), help="default: %(default)s")
    plan.add_argument("--world-size", metavar="RANKS", type=_positive, default=1, help="default: %(default)s")
    plan.add_argument(
        "--vram-gb", metavar="GIB", type=float, help="memory of one device: what fits, and by which means"
    )

    text = "list the optimizers and their presets"
    commands.add_parser("list", help=text, description=f"{text[0].upper()}{text[1:]}.")

    one = commands.add_parser(
        "convert",
        help="make one file of a sharded checkpoint, or a folder of a file",
        description="Make one file of a sharded checkpoint (TO ends in .safetensors), or a folder of a file. Either is "
        "loaded by hina_lightning.sharded_state.load under any engine and number of ranks.",
    )
    one.add_argument("source", metavar="FROM", type=Path)
    one.add_argument("target", metavar="TO", type=Path)
    one.add_argument("--force", action="store_true", help="replace TO if it is there")

    text = "say what a checkpoint holds"
    show = commands.add_parser("show", help=text, description=f"{text[0].upper()}{text[1:]}.")
    show.add_argument("path", metavar="PATH", type=Path)
    return parser


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no integer >= 1")
    return int(text)
