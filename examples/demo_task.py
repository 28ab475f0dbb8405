"""The demo's task: from which package of Python's standard library does a snippet of 24 tokens come?

The snippets are cut from the source files of the Python that runs the demo. Files, not snippets, are dealt to the three
splits, so nothing that is measured comes from a file that was trained on. The lower layers of the encoder stay frozen;
what they make of every snippet is computed once (:func:`encode`) and replayed (:class:`StandIn`) in every step, which
changes nothing in the mathematics and saves most of the time.
"""

from __future__ import annotations

import os
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from demo_files import SNIPPET_TOKENS, DemoError
from torch import Tensor, nn

CLASSES = 18
#: In the order of preference: the first 18 that are installed (some distributions leave out idlelib or tkinter).
PACKAGES = (
    *("asyncio", "concurrent", "ctypes", "email", "encodings", "html", "http", "idlelib", "importlib", "json"),
    *("logging", "multiprocessing", "tkinter", "unittest", "urllib", "wsgiref", "xml", "zoneinfo"),
    *("curses", "turtledemo", "re"),
)
#: Snippets of each package in each split.
SIZES = {"train": 200, "tuning": 30, "test": 60}
SMALLEST_FILE = 3000  # bytes; shorter files hold little but imports
TEST_FOLDERS = {"test", "tests", "idle_test", "__pycache__"}


@dataclass(frozen=True)
class Split:
    """Snippets of one split.

    Attributes:
        ids: Token ids, ``[n, tokens]``.
        mask: Attention mask, ``[n, tokens]``.
        labels: Index of the package, ``[n]``.
        states: What the frozen layers make of the snippets, ``[n, tokens, width]``; None before :func:`encode`.
    """

    ids: Tensor
    mask: Tensor
    labels: Tensor
    states: Tensor | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, index: Tensor) -> dict[str, Tensor]:
        """A batch."""
        batch = {"ids": self.ids[index], "mask": self.mask[index], "labels": self.labels[index]}
        return batch if self.states is None else {**batch, "states": self.states[index]}

    def with_states(self, states: Tensor | None) -> Split:
        """The same snippets, encoded."""
        return replace(self, states=states)

    def every(self, n: int) -> Split:
        """Each ``n``-th snippet."""
        return Split(self.ids[::n], self.mask[::n], self.labels[::n], None if self.states is None else self.states[::n])

    def chunks(self, size: int) -> Chunks:
        """The whole split in order, in batches."""
        return Chunks(self, size)


class Chunks:
    """A split as the batches of an evaluation."""

    def __init__(self, split: Split, size: int) -> None:
        self.split, self.parts = split, torch.arange(len(split)).split(size)

    def __len__(self) -> int:
        return len(self.parts)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        return map(self.split.take, self.parts)


def load_encoder(model: str) -> tuple[nn.Module, Any]:
    """The pretrained encoder, frozen and without dropout, and its tokenizer; the hub is off for a local folder."""
    if Path(model).is_dir():
        os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from transformers import AutoModel, AutoTokenizer
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        encoder = AutoModel.from_pretrained(model, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(model)
    except (OSError, ValueError) as error:
        raise DemoError(f"MODEL={model!r} cannot be loaded: {error}") from error
    if tokenizer.pad_token is None or not tokenizer.is_fast:
        raise DemoError(f"MODEL={model!r} has no fast tokenizer with a padding token. Choose an encoder such as BERT.")
    return encoder.eval().requires_grad_(False), tokenizer


def layers_of(encoder: nn.Module) -> tuple[str, nn.ModuleList]:
    """The stack of layers and its name: the longest list of modules that hold linear layers."""
    stacks = [
        (name, module)
        for name, module in encoder.named_modules()
        if isinstance(module, nn.ModuleList) and any(isinstance(m, nn.Linear) for m in module.modules())
    ]
    if not stacks:
        raise DemoError("This model has no stack of layers with linear maps in it. Choose an encoder such as BERT.")
    return max(stacks, key=lambda stack: len(stack[1]))


def last_layers(encoder: nn.Module, count: int) -> dict[str, nn.Module]:
    """The last ``count`` layers (or all, if there are fewer) by their full names."""
    prefix, layers = layers_of(encoder)
    return {f"{prefix}.{i}": layers[i] for i in range(max(0, len(layers) - count), len(layers))}


def linear_names(layers: dict[str, nn.Module]) -> list[str]:
    """Full names of the linear maps in some layers: where LoRA goes."""
    return [
        f"{layer}.{name}"
        for layer, module in layers.items()
        for name, m in module.named_modules()
        if isinstance(m, nn.Linear)
    ]


class StandIn(nn.Module):
    """Takes the place of a frozen layer: hands on what it is given, or ``states`` where those are set.

    Args:
        layer: The layer; models may look at its plain attributes.
        outputs: How many values the layer returns as a tuple, of which the first are the states; 0 if it returns them
            alone.
    """

    def __init__(self, layer: nn.Module, outputs: int) -> None:
        super().__init__()
        self.__dict__.update({k: v for k, v in vars(layer).items() if k not in self.__dict__ and not k.startswith("_")})
        self.outputs = outputs
        self.states: Tensor | None = None

    def forward(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor | tuple[Tensor | None, ...]:
        """The states, in the form in which the layer would return them."""
        out = hidden if self.states is None else self.states
        return (out, *[None] * (self.outputs - 1)) if self.outputs else out


def replay(encoder: nn.Module, trained_layers: int, outputs: int) -> StandIn | None:
    """Replace the frozen layers by stand-ins; the last of them, returned, is to be given the states of each batch."""
    _, layers = layers_of(encoder)
    frozen = len(layers) - trained_layers
    last = None
    for i in range(frozen):
        layers[i] = last = StandIn(layers[i], outputs)
    return last


@torch.no_grad()
def encode(
    encoder: nn.Module, splits: dict[str, Split], trained_layers: int, progress: Callable[[int, int], None]
) -> tuple[dict[str, Split], int]:
    """Run the frozen layers over every snippet. Spends the encoder: stand-ins take the place of its upper layers.

    Args:
        encoder: As :func:`load_encoder` gave it.
        splits: Without states.
        trained_layers: How many layers are to be trained: the last ones.
        progress: Called with the number of snippets done and of all.

    Returns:
        The splits with states (without, if no layer is frozen), and how many values a layer of this model returns.
    """
    _, layers = layers_of(encoder)
    frozen = len(layers) - trained_layers
    if frozen <= 0:
        return splits, 0
    seen: list[Any] = []
    layers[frozen - 1].register_forward_hook(lambda module, given, out: seen.append(out))
    outputs, done, total, encoded = 0, 0, sum(map(len, splits.values())), {}
    for name, split in splits.items():
        states = []
        for chunk in split.chunks(64):
            seen.clear()
            encoder(input_ids=chunk["ids"], attention_mask=chunk["mask"])
            outputs = len(seen[0]) if isinstance(seen[0], tuple) else 0
            states.append(seen[0][0] if outputs else seen[0])
            for i in range(frozen, len(layers)):  # known only now; the first batch ran through the real ones
                if not isinstance(layers[i], StandIn):
                    layers[i] = StandIn(layers[i], outputs)
            done += len(chunk["ids"])
            progress(done, total)
        encoded[name] = split.with_states(torch.cat(states))
    return encoded, outputs


def snippets(tokenizer: Any, scale: float = 1.0) -> tuple[list[str], dict[str, Split]]:
    """Names of the packages, and the three splits (without states).

    Args:
        tokenizer: Cuts the files; a snippet is 24 of its tokens.
        scale: Factor on the number of snippets of each package.

    Raises:
        DemoError: If fewer than 8 packages are installed as source.
    """
    packages: dict[str, list[list[Path]]] = {}
    for name in PACKAGES:
        dealt = _deal(Path(sysconfig.get_path("stdlib")) / name)
        if dealt and len(packages) < CLASSES:
            packages[name] = dealt
    if len(packages) < 8:
        raise DemoError(
            f"Only {len(packages)} packages of the standard library are here as source files; the demo needs 8. "
            "Use a Python that comes with its library as .py files."
        )
    splits = {}
    for s, (split, size) in enumerate(SIZES.items()):
        texts, labels = [], []
        for label, files in enumerate(packages.values()):
            cut = _cut(tokenizer, files[s], max(2, round(size * scale)))
            texts += cut
            labels += [label] * len(cut)
        length = SNIPPET_TOKENS + tokenizer.num_special_tokens_to_add()
        out = tokenizer(texts, padding="max_length", truncation=True, max_length=length, return_tensors="pt")
        splits[split] = Split(out["input_ids"], out["attention_mask"], torch.tensor(labels))
    return list(packages), splits


def _deal(folder: Path) -> list[list[Path]]:
    """The files of a package for training, tuning and test; empty where there are fewer than three.

    Largest first: training gets the first file, test the second, tuning the third, and of the rest training every file
    but each fourth (tuning) and fifth (test).
    """
    files = [
        (path.stat().st_size, path.relative_to(folder).as_posix())
        for path in folder.rglob("*.py")
        if not TEST_FOLDERS & set(path.relative_to(folder).parts) and path.stat().st_size >= SMALLEST_FILE
    ]
    if len(files) < 3:
        return []
    dealt: list[list[Path]] = [[], [], []]
    for i, (_, name) in enumerate(sorted(files, key=lambda file: (-file[0], file[1]))):
        to = (0, 2, 1)[i] if i < 3 else (0, 0, 0, 1, 2)[(i - 3) % 5]
        dealt[to].append(folder / name)
    return dealt


def _cut(tokenizer: Any, files: list[Path], count: int) -> list[str]:
    """``count`` snippets (or as many as there are), evenly spread over all non-overlapping ones of the files."""
    cut = []
    for path in files:
        text = path.read_text(encoding="utf-8", errors="replace")
        spans = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)["offset_mapping"]
        for start in range(0, len(spans) - SNIPPET_TOKENS + 1, SNIPPET_TOKENS):
            cut.append(text[spans[start][0] : spans[start + SNIPPET_TOKENS - 1][1]])
    count = min(count, len(cut))
    return [cut[i * len(cut) // count] for i in range(count)]
