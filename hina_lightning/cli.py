"""The command ``hina``: what can be done with the files of a training run."""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path

from hina_lightning import sharded_state
from hina_lightning.sharded_state.loading import open_checkpoint

__all__ = ["main"]

FILES = (".safetensors",)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        arguments: Without the name of the program; None: those of this process.

    Returns:
        0, or 1 after an error, which has been written to stderr.
    """
    parser = argparse.ArgumentParser(prog="hina", description="Work with optimizer checkpoints of hina-lightning.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    convert = commands.add_parser(
        "convert",
        help="make one file of a sharded checkpoint, or a folder of a file",
        description="Make one file of a sharded checkpoint (TO ends in .safetensors), or a folder of a file. Either is "
        "loaded by hina_lightning.sharded_state.load under any engine and number of ranks.",
    )
    convert.add_argument("source", metavar="FROM", type=Path)
    convert.add_argument("target", metavar="TO", type=Path)
    convert.add_argument("--force", action="store_true", help="replace TO if it is there")
    show = commands.add_parser("show", help="say what a checkpoint holds", description="Say what a checkpoint holds.")
    show.add_argument("path", metavar="PATH", type=Path)
    given = parser.parse_args(arguments)
    try:
        if given.command == "convert":
            _convert(given.source, given.target, given.force)
        else:
            print(_shown(given.path))
    except (sharded_state.CheckpointError, OSError) as error:
        print(f"hina: {error}", file=sys.stderr)
        return 1
    return 0


def _convert(source: Path, target: Path, force: bool) -> None:
    if target.exists() and not force:
        raise sharded_state.CheckpointError(f"{target} is there already; give another name, or --force.")
    if target.suffix in FILES:
        sharded_state.consolidate(source, target)
    else:
        sharded_state.spread(source, target)


def _shown(path: Path) -> str:
    reader = open_checkpoint(path)
    reader.check_files()
    manifest, table = reader.manifest, reader.manifest.tensors()
    params, groups = manifest.state["params"], manifest.state["groups"]
    sizes: Counter[str] = Counter()
    for key, (dtype, shape) in table.items():
        count = 1
        for length in shape:
            count *= length
        sizes[key.rsplit("/", 1)[1]] += count * dtype.itemsize
    when = datetime.fromtimestamp(manifest.time / 1e9, tz=timezone.utc).strftime("%Y-%m-%d %H:%M:%S UTC")
    lines = [
        f"{path}: {manifest.state['optimizer']}, complete",
        f"  written {when} by {manifest.ranks} process{'es' if manifest.ranks > 1 else ''}",
        f"  {len(params)} parameters in {len(groups)} group{'s' if len(groups) > 1 else ''}, "
        f"{sum('slots' in one for one in params)} with state"
        + ("" if manifest.state["named"] else "; they have no names, so their places count"),
    ]
    for at, group in enumerate(groups):
        options = group["options"]
        told = ", ".join(f"{key} {options[key]}" for key in ("lr", "weight_decay", "state_precision") if key in options)
        lines.append(f"  group {options.get('name', at)}: {len(group['params'])} parameters, {told}")
    lines.append(f"  state: {sum(sizes.values()) / 1e6:.3f} MB in {len(manifest.files)} file(s)")
    lines += [f"    {name}: {nbytes / 1e6:.3f} MB" for name, nbytes in sizes.most_common()]
    if manifest.extra is not None:
        lines.append(f"  extra: {manifest.extra}")
    return "\n".join(lines)
