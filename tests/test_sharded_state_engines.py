"""One checkpoint for all engines: what one saved, any other loads, and goes on as the run that was not interrupted."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch

from hina_lightning.sharded_state.loading import open_checkpoint
from hina_optim.state.portable import codec_of
from tests.every_optimizer import NAMES
from tests.sharded import engines
from tests.sharded.world import run
from tests.sharded_state_cases import EVERYWHERE, Complete, Where, contents, load_main, own_steps_main, save_main

#: What `make test` runs: each with each.
DIAGONAL: list[Where] = [("one", 1), ("fsdp2", 2), ("fsdp1", 2), ("zero3", 2)]
#: Kinds of state other than fp32, in the whole matrix.
SOME: list[Where] = [
    ("one", 1),
    ("ddp", 2),
    ("fsdp2", 2),
    ("fsdp2", 4),
    ("hsdp", 4),
    ("fsdp1", 4),
    ("zero1", 2),
    ("zero3", 4),
]
#: How far the weights may be from the uninterrupted run after five more steps, relative to how far they moved: sums are
#: rounded otherwise.
FAR = {"fp32": 1e-4, "bf16": 1e-4, "8bit": 1e-4, "4bit": 1e-4}
LIMIT = 300.0


class Saved:
    """What every engine saved, each once."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        model = engines.Model()
        engines.initialize(model, engines.weights)
        self.first: Complete = {name: p.detach() for name, p in model.named_parameters()}
        self.shapes = {name: tuple(p.shape) for name, p in self.first.items()}
        self.of = functools.cache(self._of)

    def _of(self, where: Where, kind: str, name: str) -> tuple[Path, Complete, Complete]:
        """The checkpoint; the weights when it was saved, and five steps later."""
        path = self.folder / f"{where[0]}-{where[1]}-{kind}-{name}"
        ranks = run(save_main, where[1], where, kind, path, {"optimizer": name}, limit=LIMIT)
        between, end = (engines.joined([found[i] for found in ranks], self.shapes) for i in (0, 1))
        return path, between, end


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Saved:
    return Saved(tmp_path_factory.mktemp("saved"))


def values(path: Path) -> Complete:
    """Every slot of a checkpoint, decoded, and as it is stored."""
    stored, found = contents(path), {}
    for entry in open_checkpoint(path).manifest.state["params"]:
        for slot, form in entry.get("slots", {}).items():
            if form == {"form": "zero"}:
                continue
            key = f"{entry['name']}/{slot}"
            codec = codec_of(form)
            found[key] = codec.decode({suffix: stored[key + suffix][None] for suffix in codec.parts})[0]
            found |= {f"{key}{suffix} stored": stored[key + suffix] for suffix in codec.parts}
    return found


def check(saved: Saved, to: Where, froms: list[Where], kind: str, folder: Path, name: str = "HinaAdaptive") -> None:
    """Load on one engine what others saved; every pair that fails is named."""
    made = [saved.of(where, kind, name) for where in froms]
    files = [(path, between) for path, between, _ in made]
    ranks = run(load_main, to[1], to, kind, files, folder, {"optimizer": name}, limit=LIMIT)
    wrong = []
    for i, (where, (path, _, end)) in enumerate(zip(froms, made, strict=True)):
        weights = engines.joined([found[i] for found in ranks], saved.shapes)
        wrong += [f"{where} → {to}: {text}" for text in _differences(saved, path, folder / str(i), weights, end, kind)]
        if where == to and any(not torch.equal(weights[name], end[name]) for name in end) and to[0] not in ("fsdp1",):
            wrong.append(f"{where} → {to}: the same engine does not go on to the bit")
    assert not wrong, "\n".join(wrong)


def _differences(saved: Saved, path: Path, again: Path, weights: Complete, end: Complete, kind: str) -> list[str]:
    wrong = []
    a, b = values(path), values(again)
    if a.keys() != b.keys():
        wrong.append(f"state is lost or new: {sorted(a.keys() ^ b.keys())}")
    for key in a.keys() & b.keys():
        if not engines.same_bits(a[key], b[key]):
            off = float((a[key].double() - b[key].double()).abs().max())
            wrong.append(f"{key} differs by {off}")
    for name, value in end.items():
        moved = float((value - saved.first[name]).norm())
        error = float((weights[name] - value).norm()) / moved
        if error > FAR[kind]:
            wrong.append(f"{name} is {error} of its way from the uninterrupted run")
    return wrong


@pytest.mark.parametrize("to", DIAGONAL, ids=lambda w: f"{w[0]}-{w[1]}")
def test_what_one_engine_saved_another_goes_on_with(saved: Saved, to: Where, tmp_path: Path) -> None:
    check(saved, to, DIAGONAL, "fp32", tmp_path)


@pytest.mark.parametrize(
    ("to", "kind"),
    [
        (("one", 1), "8bit"),
        (("fsdp1", 2), "8bit"),
        (("zero3", 2), "8bit"),
        (("one", 1), "4bit"),
        (("fsdp1", 2), "4bit"),
    ],
    ids=["one", "fsdp1", "zero3", "one, 4 bits", "fsdp1, 4 bits"],
)
def test_state_in_8_and_4_bits(saved: Saved, to: Where, kind: str, tmp_path: Path) -> None:
    """To the bit everywhere: also where flat partitions cut blocks and bytes."""
    check(saved, to, [("one", 1), ("fsdp2", 2), ("fsdp1", 2)], kind, tmp_path)


@pytest.mark.sharded
@pytest.mark.parametrize("to", EVERYWHERE, ids=lambda w: f"{w[0]}-{w[1]}")
def test_every_pair(saved: Saved, to: Where, tmp_path: Path) -> None:
    """Every engine and number of ranks loads what every other saved."""
    check(saved, to, EVERYWHERE, "fp32", tmp_path)


@pytest.mark.sharded
@pytest.mark.parametrize("kind", ["bf16", "8bit", "4bit"])
@pytest.mark.parametrize("to", SOME, ids=lambda w: f"{w[0]}-{w[1]}")
def test_pairs_with_state_in_16_and_8_bits(saved: Saved, to: Where, kind: str, tmp_path: Path) -> None:
    check(saved, to, SOME, kind, tmp_path)


@pytest.mark.sharded
@pytest.mark.parametrize("kind", ["fp32", "8bit"])
@pytest.mark.parametrize("name", NAMES)
def test_every_optimizer(saved: Saved, name: str, kind: str, tmp_path: Path) -> None:
    """Rows, columns and numbers that belong to no shard, too."""
    check(saved, ("fsdp2", 2), [("one", 1), ("fsdp1", 2)], kind, tmp_path / "rows", name)
    check(saved, ("fsdp1", 2), [("fsdp2", 2)], kind, tmp_path / "flat", name)


@pytest.mark.parametrize("engine", ["zero1", "zero3"])
def test_steps_of_deepspeed_itself(engine: str, tmp_path: Path) -> None:
    """It steps one group or part of a group after the other: what was loaded goes on to the bit."""
    for end, again in run(own_steps_main, 2, engine, tmp_path / "a"):
        assert end.keys() == again.keys()
        for name, (_, value) in end.items():
            assert torch.equal(value, again[name][1]), name


def test_all_save_the_same_blocks(saved: Saved) -> None:
    """What FSDP2, FSDP1 and ZeRO save in 8 bits is what one process does: codes and scales of the same blocks."""
    forms: dict[str, Any] = {}
    for where in (("one", 1), ("fsdp2", 2), ("fsdp1", 2), ("zero3", 2)):
        path = saved.of(where, "8bit", "HinaAdaptive")[0]
        forms[where[0]] = {
            f"{entry['name']}/{slot}": form
            for entry in open_checkpoint(path).manifest.state["params"]
            for slot, form in entry["slots"].items()
        }
    assert all(found == forms["one"] for found in forms.values())
    blocks = {key for key, form in forms["one"].items() if form["form"] == "blocks"}
    assert len(blocks) > 10
