"""One training of the demo: from its last checkpoint to what was measured."""

from __future__ import annotations

import json
import logging
import shutil
import statistics
import sys
from pathlib import Path
from typing import Any

import torch
from demo_files import BATCH, THREADS, DemoError, write
from demo_model import LOG_EVERY, Batches, LayerMasks, SaveCheckpoint, SnippetClassifier, read_checkpoint, state_bytes
from demo_task import Chunks, Split, encode, load_encoder, snippets
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.callbacks import TQDMProgressBar
from lightning.pytorch.callbacks.progress.tqdm_progress import Tqdm
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

from hina_lightning.callbacks import ImportanceMonitor, LRMaskMonitor, VRAMGuard

for name in ("lightning.pytorch", "lightning.fabric"):  # imported, they have set their own level
    logging.getLogger(name).setLevel(logging.WARNING)

CHECKPOINT_EVERY = 10
CURVE_POINTS = 8
MEMORY_GB = 4.0


class Stopped(Exception):
    """The run was interrupted.

    Attributes:
        status: Exit status that says by what.
    """

    def __init__(self, status: int) -> None:
        super().__init__(status)
        self.status = status


class Bar(TQDMProgressBar):
    """A bar for the training alone: the evaluations in between take a moment each."""

    def init_validation_tqdm(self) -> Tqdm:
        """No bar."""
        return Tqdm(disable=True)

    init_test_tqdm = init_validation_tqdm

    def get_metrics(self, *args: Any) -> dict[str, Any]:
        """Losses only, not the version of the logger."""
        return {name: value for name, value in super().get_metrics(*args).items() if name != "v_num"}


class Task:
    """The snippets, with what the frozen layers make of them; read from ``cache`` where an earlier start left it there.

    Args:
        model: Local folder or hub name.
        layers: How many of the last layers are trained.
        scale: Factor on the number of snippets.
        cache: A file for the states. None: they are not kept.
    """

    def __init__(self, model: str, layers: int, scale: float, cache: Path | None) -> None:
        torch.set_num_threads(THREADS)
        self.model, self.layers = model, layers
        encoder, tokenizer = load_encoder(model)
        self.packages, self.splits = snippets(tokenizer, scale)
        if cache is not None and cache.exists():
            stored = torch.load(cache, weights_only=True)
            self.outputs: int = stored["outputs"]
            self.splits = {name: split.with_states(stored["states"][name]) for name, split in self.splits.items()}
            return
        self.splits, self.outputs = encode(encoder, self.splits, layers, _show_progress)
        if cache is not None:
            states = {name: split.states for name, split in self.splits.items()}
            part = cache.with_suffix(".part")
            torch.save({"states": states, "outputs": self.outputs}, part)
            part.replace(cache)

    def module(self, optimizer: dict[str, Any]) -> SnippetClassifier:
        """A new LightningModule; the initial weights of adapter and head follow torch's seed."""
        encoder, _ = load_encoder(self.model)
        return SnippetClassifier(encoder, len(self.packages), self.layers, self.outputs, optimizer)


def train(task: Task, name: str, optimizer: dict[str, Any], *, steps: int, seed: int, folder: Path) -> dict[str, Any]:
    """One run in its own folder, from its last checkpoint on.

    Args:
        task: What is learned.
        name: Of the optimizer, for the reader.
        optimizer: Arguments of ``configure_optimizers``.
        steps: Of the whole run.
        seed: Of initial weights and order.
        folder: For checkpoint and metrics.

    Returns:
        What was measured; from ``result.json`` if the run had ended before.

    Raises:
        Stopped: It was interrupted.
    """
    finished = folder / "result.json"
    if finished.exists():
        return dict(json.loads(finished.read_text(encoding="utf-8")))
    checkpoint = folder / "last.ckpt"
    step = read_checkpoint(checkpoint)
    if step is None:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
    print(f"{name}: {steps} steps" if step is None else f"{name}: goes on after step {step} of {steps}", flush=True)

    seed_everything(seed, verbose=False)
    module = task.module(optimizer)
    callbacks: list[Any] = [
        Bar(refresh_rate=1 if sys.stderr.isatty() else 20),
        SaveCheckpoint(checkpoint, CHECKPOINT_EVERY),
    ]
    if name == "HinaAdaptive":
        callbacks += [LRMaskMonitor(), LayerMasks(), ImportanceMonitor(), VRAMGuard(MEMORY_GB)]
    trainer = Trainer(
        **_common(steps),
        val_check_interval=max(1, steps // CURVE_POINTS),
        check_val_every_n_epoch=None,
        log_every_n_steps=LOG_EVERY,
        callbacks=callbacks,
        logger=[
            # one file for each start; report() joins them
            CSVLogger(folder, name="csv", version=f"from_{step or 0:06d}", flush_logs_every_n_steps=1),
            TensorBoardLogger(folder, name="tensorboard", version="", purge_step=step),
        ],
        default_root_dir=folder,
    )
    curve = task.splits["tuning"].every(3).chunks(90)
    batches = Batches(task.splits["train"], BATCH, steps, seed, step or 0)
    _fit(trainer, module, batches, curve, None if step is None else checkpoint)
    loss, accuracy = _measure(trainer, module, task.splits["test"])

    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    count = sum(parameter.numel() for parameter in trained)
    update, whole = (statistics.median(times) for times in zip(*module.seconds, strict=True))
    result = {
        "loss": loss,
        "accuracy": accuracy,
        "optimizer_ms": 1000 * update,
        "step_ms": 1000 * whole,
        "state_bytes_per_parameter": state_bytes(trainer.optimizers[0]) / count,
        "parameters": count,
        "tensors": len(trained),
        "learning_rate": optimizer["lr"],
    }
    write(finished, json.dumps(result, indent=2) + "\n")
    return result


def trial(task: Task, optimizer: dict[str, Any], *, steps: int, seed: int) -> float:
    """Loss on the tuning split after one run that leaves nothing behind."""
    seed_everything(seed, verbose=False)
    module = task.module(optimizer)
    trainer = Trainer(**_common(steps), limit_val_batches=0, logger=False, enable_progress_bar=False)
    _fit(trainer, module, Batches(task.splits["train"], BATCH, steps, seed, 0), None, None)
    return _measure(trainer, module, task.splits["tuning"])[0]


def _common(steps: int) -> dict[str, Any]:
    return {
        "accelerator": "cpu",
        "devices": 1,
        "max_epochs": 1,
        "max_steps": steps,
        "num_sanity_val_steps": 0,
        "enable_checkpointing": False,  # SaveCheckpoint does it
        "enable_model_summary": False,
    }


def _fit(
    trainer: Trainer, module: SnippetClassifier, batches: Batches, curve: Chunks | None, checkpoint: Path | None
) -> None:
    """``trainer.fit``, in which an interrupted run is not taken for a finished one.

    Raises:
        Stopped: On Ctrl-C, which Lightning turns into an exit of its own, or another signal to end.
    """
    try:
        trainer.fit(module, batches, curve, ckpt_path=checkpoint)
    except (SystemExit, KeyboardInterrupt):
        raise Stopped(143 if trainer.received_sigterm else 130) from None
    if trainer.global_step < batches.steps:
        raise DemoError(f"The training ended after {trainer.global_step} of {batches.steps} steps.")


def _measure(trainer: Trainer, module: SnippetClassifier, split: Split) -> tuple[float, float]:
    """Loss and accuracy on a split."""
    try:
        (measured,) = trainer.test(module, split.chunks(90), verbose=False)
    except (SystemExit, KeyboardInterrupt):
        raise Stopped(143 if trainer.received_sigterm else 130) from None
    return measured["test/loss"], measured["test/accuracy"]


def _show_progress(done: int, total: int) -> None:
    end = "\n" if done == total else ""
    if sys.stdout.isatty() or end:
        print(f"\rfrozen layers: {done} of {total} snippets", end=end, flush=True)
