"""The demo's LightningModule, its batches, and the callback that saves a checkpoint which is either whole or absent."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from demo_task import Split, last_layers, linear_names, replay
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn

from hina_lightning import configure_optimizers

RANK = 8
LOG_EVERY = 5
WEIGHT_DECAY = 0.01
WARMUP = 0.1  # of the steps, for the schedule of every optimizer


class SnippetClassifier(LightningModule):
    """A frozen encoder with LoRA on the linear maps of its last layers, and a linear head on the mean over the tokens.

    Args:
        encoder: A pretrained encoder, fresh from ``load_encoder``.
        classes: How many packages there are.
        trained_layers: How many of the last layers get LoRA; what the others give comes with the batch.
        outputs: How many values a layer of the encoder returns.
        optimizer: Arguments of ``configure_optimizers``: ``optimizer``, ``lr`` and the optimizer's own.
    """

    def __init__(
        self, encoder: Any, classes: int, trained_layers: int, outputs: int, optimizer: dict[str, Any]
    ) -> None:
        super().__init__()
        from peft import LoraConfig, get_peft_model

        layers = last_layers(encoder, trained_layers)
        width = encoder.config.hidden_size
        self._replayed = [replay(encoder, trained_layers, outputs)]  # in a list: it is the encoder's module, not ours
        lora = LoraConfig(r=RANK, lora_alpha=2 * RANK, lora_dropout=0.0, target_modules=linear_names(layers))
        self.encoder = get_peft_model(encoder, lora).eval()  # no dropout, so a step depends on its number alone
        self.head = nn.Linear(width, classes)
        self.optimizer_arguments = optimizer
        self.seconds: list[tuple[float, float]] = []  # of every step so far: the optimizer's part, and all of it
        self._update_began = 0.0
        self.strict_loading = (
            False  # checkpoints hold what is trained; on_load_checkpoint checks that all of it is there
        )

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        """Logits ``[batch, classes]``."""
        if self._replayed[0] is not None:
            self._replayed[0].states = batch["states"]
        hidden = self.encoder(input_ids=batch["ids"], attention_mask=batch["mask"]).last_hidden_state
        weight = batch["mask"].unsqueeze(-1).to(hidden.dtype)
        logits: Tensor = self.head((hidden * weight).sum(1) / weight.sum(1))
        return logits

    def configure_optimizers(self) -> Any:
        """Groups, optimizer and schedule, the same call for every optimizer."""
        return configure_optimizers(
            self, weight_decay=WEIGHT_DECAY, schedule="cosine", warmup=WARMUP, **self.optimizer_arguments
        )

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Cross-entropy of a batch."""
        loss = F.cross_entropy(self(batch), batch["labels"])
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Loss and accuracy on the tuning split."""
        self._evaluate("tuning", batch)

    def test_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Loss and accuracy on the split that no choice has seen."""
        self._evaluate("test", batch)

    def _evaluate(self, split: str, batch: dict[str, Tensor]) -> None:
        logits, labels = self(batch), batch["labels"]
        count = len(labels)
        self.log(f"{split}/loss", F.cross_entropy(logits, labels), batch_size=count, prog_bar=split == "tuning")
        self.log(f"{split}/accuracy", (logits.argmax(1) == labels).float().mean(), batch_size=count)

    # -- time --------------------------------------------------------------------------------------------------------

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        """Called when the gradients are there: from here on, it is the optimizer's time."""
        self._update_began = time.perf_counter()

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Lightning computes forward and backward inside the optimizer's step; both times are kept."""
        began = time.perf_counter()
        super().optimizer_step(*args, **kwargs)
        ended = time.perf_counter()
        self.seconds.append((ended - self._update_began, ended - began))
        self.log("opt/state_gb", state_bytes(self.optimizers()) / 2**30)

    # -- checkpoints -------------------------------------------------------------------------------------------------

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Leave out the frozen weights: they are in the model's own files."""
        checkpoint["state_dict"] = {k: checkpoint["state_dict"][k] for k in self.trained_names()}
        checkpoint["seconds"] = self.seconds

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take up the times, and refuse a checkpoint that lacks something trained."""
        missing = set(self.trained_names()) - checkpoint["state_dict"].keys()
        if missing:
            raise ValueError(f"The checkpoint lacks {len(missing)} trained tensors, among them {min(missing)}.")
        self.seconds = [(float(update), float(step)) for update, step in checkpoint["seconds"]]

    def trained_names(self) -> list[str]:
        """Names of the parameters that are trained."""
        return [name for name, parameter in self.named_parameters() if parameter.requires_grad]


class Batches:
    """The batches of a run; that of a step depends on the seed and the number of the step alone, so a run can go on.

    Each pass over the split is a new permutation.

    Args:
        split: The training split.
        size: Snippets of a batch.
        steps: Steps of the whole run.
        seed: Of the order.
        start: Steps that have been taken: the first batch is that of step ``start``.
    """

    def __init__(self, split: Split, size: int, steps: int, seed: int, start: int) -> None:
        self.split, self.size, self.steps, self.seed, self.start = split, size, steps, seed, start

    def __len__(self) -> int:
        """Of the whole run: Lightning counts those that came before."""
        return self.steps

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        per_pass = max(1, len(self.split) // self.size)
        for step in range(self.start, self.steps):
            turn, place = divmod(step, per_pass)
            order = torch.randperm(len(self.split), generator=torch.Generator().manual_seed(self.seed * 10007 + turn))
            yield self.split.take(order[place * self.size : (place + 1) * self.size])


class LayerMasks(Callback):
    """Logs the learning-rate masks layer by layer: LRMaskMonitor does it for the optimizer's groups, which span layers.

    Logged metrics:
        - ``lr_mask/<layer>/mean``, ``min``, ``max``: over the elements of all matrices of the layer (or of the head).
    """

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Log what this step begins with, at the steps at which Lightning logs."""
        if (batch_idx + 1) % LOG_EVERY:
            return
        layers: dict[str, list[dict[str, float]]] = {}
        optimizer: Any = pl_module.optimizers(use_pl_optimizer=False)
        for name, numbers in optimizer.get_lr_mask_analysis()["parameter_analysis"].items():
            layer = re.sub(r"(\.\d+)\..*", r"\1", name) if re.search(r"\.\d+\.", name) else name.split(".")[0]
            layers.setdefault(layer, []).append(numbers)
        metrics = {}
        for layer, rows in layers.items():
            elements = sum(row["elements"] for row in rows)
            metrics[f"lr_mask/{layer}/mean"] = sum(row["mean"] * row["elements"] for row in rows) / elements
            metrics[f"lr_mask/{layer}/min"] = min(row["min"] for row in rows)
            metrics[f"lr_mask/{layer}/max"] = max(row["max"] for row in rows)
        for logger in trainer.loggers:
            logger.log_metrics(metrics, step=batch_idx)


class SaveCheckpoint(Callback):
    """Saves every few steps, under a temporary name first: a kill at any moment leaves the last whole checkpoint."""

    def __init__(self, path: Path, every: int) -> None:
        self.path, self.every = path, every

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        """Save after every ``every`` steps, and after the last one."""
        if trainer.global_step % self.every == 0 or trainer.global_step == trainer.max_steps:
            part = self.path.with_suffix(".part")
            trainer.save_checkpoint(part)
            with part.open("rb") as file:
                os.fsync(file.fileno())
            part.replace(self.path)


def read_checkpoint(path: Path) -> int | None:
    """The step of a checkpoint; None if there is none, or none that can be read."""
    if not path.exists():
        return None
    try:
        return int(torch.load(path, map_location="cpu", weights_only=True)["global_step"])
    except Exception as error:  # a damaged file can raise anything
        print(f"{path} cannot be read ({type(error).__name__}); this run starts over.")
        return None


def state_bytes(optimizer: Any) -> int:
    """Bytes of memory behind all tensors of an optimizer's state, shared memory counted once."""
    optimizer = getattr(optimizer, "optimizer", optimizer)  # inside Lightning's wrapper
    tensors = (x for state in optimizer.state.values() for x in state.values() if isinstance(x, Tensor))
    return sum({x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors}.values())
