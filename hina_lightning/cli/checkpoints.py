"""Commands for checkpoints of optimizers: ``hina show`` and ``hina convert``."""

from __future__ import annotations

from collections import Counter
from datetime import datetime, timezone
from pathlib import Path

from hina_lightning import sharded_state
from hina_lightning.sharded_state.loading import open_checkpoint

__all__ = ["convert", "shown"]

FILES = (".safetensors",)


def convert(source: Path, target: Path, force: bool) -> None:
    """Make one file of a sharded checkpoint, or a folder of a file."""
    if target.exists() and not force:
        raise sharded_state.CheckpointError(f"{target} is there already; give another name, or --force.")
    if target.suffix in FILES:
        sharded_state.consolidate(source, target)
    else:
        sharded_state.spread(source, target)


def shown(path: Path) -> str:
    """What a checkpoint holds, in words."""
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
