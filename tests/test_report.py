"""Pictures of a run: what is read of its metrics, which pictures come of it, what is said when something lacks."""

from __future__ import annotations

import csv
import math
import os
import sys
from pathlib import Path

import pytest
from lightning.pytorch.loggers import CSVLogger
from matplotlib.image import imread

from hina_lightning.report import load_metrics, report


def write_metrics(folder: Path, rows: list[dict[str, float]], age: int = 0) -> Path:
    """What Lightning's CSVLogger writes: one header for all, empty cells."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "metrics.csv"
    with file.open("w", newline="") as opened:
        writer = csv.DictWriter(opened, sorted(set().union(*rows)))
        writer.writeheader()
        writer.writerows(rows)
    os.utime(file, (1e9 - age, 1e9 - age))
    return file


def masked_rows(groups: list[str], steps: range) -> list[dict[str, float]]:
    rows = []
    for step in steps:
        row: dict[str, float] = {"step": step, "epoch": 0, "train/loss": 2 / (1 + step)}
        for i, group in enumerate(groups):
            rate = 1e-3 * (1 + 0.1 * i + 0.01 * step)
            row |= {f"lr/{group}": 1e-3, f"lr_eff/{group}": rate, f"lr_mask/{group}/mean": rate}
            row |= {
                f"lr_mask/{group}/p05": 0.9 * rate,
                f"lr_mask/{group}/p50": rate,
                f"lr_mask/{group}/p95": 1.1 * rate,
            }
            row |= {f"lr_mask/{group}/at_min": 0.0, f"lr_mask/{group}/at_max": 0.0}
            row[f"importance/encoder.layer.{i}"] = 1 + 0.1 * i
        row |= {"mem/used_gb": 1 + 0.01 * step, "mem/free_gb": 3 - 0.01 * step, "mem/actions": float(step > 5)}
        row["opt/state_gb"] = 1e-3
        rows.append(row)
    return rows


def test_all_pictures(tmp_path: Path) -> None:
    write_metrics(tmp_path / "run", masked_rows(["decay", "no_decay"], range(10)))
    pictures = report(tmp_path / "run", tmp_path / "pictures")
    names = ["lr_mask.png", "effective_lr.png", "importance.png", "memory.png", "loss.png"]
    assert pictures == [tmp_path / "pictures" / name for name in names]
    for picture in pictures:
        image = imread(picture)
        assert image.shape[0] > 300 and image.shape[1] > 500
        assert image.std() > 0.01  # something is drawn


def test_many_groups_become_maps(tmp_path: Path) -> None:
    few = tmp_path / "few"
    many = tmp_path / "many"
    write_metrics(few, masked_rows([f"group{i}" for i in range(3)], range(6)))
    write_metrics(many, masked_rows([f"group{i}" for i in range(60)], range(6)))
    for one, other in zip(report(few)[:3], report(many)[:3], strict=True):
        assert imread(other).shape[0] > 1.5 * imread(one).shape[0]  # a row for each


def test_only_what_was_logged_is_drawn(tmp_path: Path) -> None:
    write_metrics(tmp_path, [{"step": 1, "train/loss": 2.0}, {"step": 2, "train/loss": 1.0}])
    assert [picture.name for picture in report(tmp_path)] == ["loss.png"]


def test_real_logger(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path, name="csv")
    logger.log_metrics({"train/loss": 2.0}, step=0)
    logger.save()
    logger.log_metrics({"lr_eff/decay": 1e-3}, step=4)  # a column that comes later
    logger.log_metrics({"train/loss": 1.0}, step=4)
    logger.save()
    metrics = load_metrics(tmp_path)
    assert metrics["train/loss"] == ([0, 4], [2.0, 1.0])
    assert metrics["lr_eff/decay"] == ([4], [1e-3])


def test_legs_of_a_resumed_run_are_joined(tmp_path: Path) -> None:
    """Steps from which a later leg went on count once, as the later leg took them."""
    write_metrics(tmp_path / "a", [{"step": s, "x": s} for s in range(0, 8)], age=30)
    write_metrics(tmp_path / "b", [{"step": s, "x": 100 + s} for s in range(5, 9)], age=20)
    write_metrics(tmp_path / "c", [{"step": s, "x": 200 + s} for s in range(9, 12)], age=10)
    steps, values = load_metrics(tmp_path)["x"]
    assert steps == list(range(12))
    assert values == [0, 1, 2, 3, 4, 105, 106, 107, 108, 209, 210, 211]


def test_a_leg_that_starts_over_replaces_the_older_one(tmp_path: Path) -> None:
    write_metrics(tmp_path / "z_older", [{"step": s, "x": 1.0} for s in range(9)], age=20)
    write_metrics(tmp_path / "a_newer", [{"step": s, "x": 2.0} for s in range(4)], age=10)
    assert load_metrics(tmp_path)["x"] == ([0, 1, 2, 3], [2.0] * 4)


def test_cells_that_are_no_numbers(tmp_path: Path) -> None:
    file = write_metrics(tmp_path, [{"step": 0, "x": 1.0, "y": math.nan}, {"step": 1, "x": 2.0, "y": math.inf}])
    with file.open("a") as opened:
        opened.write("2,3.0\n3,4.0e\n,5.0,\n4")  # short rows, half a number, no step, and the end of a killed run
    assert load_metrics(tmp_path) == {"x": ([0, 1, 2], [1.0, 2.0, 3.0])}


def test_empty_file_is_passed_over(tmp_path: Path) -> None:
    (tmp_path / "dead").mkdir()
    (tmp_path / "dead" / "metrics.csv").touch()
    write_metrics(tmp_path / "alive", [{"step": 0, "x": 1.0}])
    assert load_metrics(tmp_path) == {"x": ([0], [1.0])}


def test_no_metrics(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"No metrics\.csv below .*CSVLogger"):
        report(tmp_path)


def test_matplotlib_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_metrics(tmp_path, [{"step": 0, "train/loss": 1.0}])
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ModuleNotFoundError, match=r"hina-lightning\[report\]"):
        report(tmp_path)
