"""Pictures of a run, made from the metrics that Lightning's CSVLogger wrote.

The callbacks of :mod:`hina_lightning.callbacks` log under stable names; :func:`report` draws what it finds of them. One
training that was interrupted and resumed leaves several files of metrics; they are joined.
"""

from __future__ import annotations

import csv
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

__all__ = ["Series", "load_metrics", "report"]

#: More curves than this are drawn as a map (one row each) instead of lines.
MOST_LINES = 8
#: More groups than this share one map of the mean mask instead of a panel each.
MOST_PANELS = 12
#: Ranges of a mask, if they were logged: lower and upper edge, what it is called, color.
BANDS = (("min", "max", "smallest to largest", "C1"), ("p05", "p95", "5 to 95 % of the elements", "C0"))


class Series(NamedTuple):
    """One logged value over time.

    Attributes:
        steps: Optimizer steps at which it was logged, ascending.
        values: Its values there, finite.
    """

    steps: list[int]
    values: list[float]


Metrics = dict[str, Series]


def report(run_dir: str | Path, out_dir: str | Path | None = None) -> list[Path]:
    """Draw the pictures of one run.

    ======================  ==========================================================================================
    ``lr_mask.png``         learning-rate mask of each group, or whatever it was logged for: mean, median, ranges
    ``effective_lr.png``    learning rate that is really applied, beside the group's own, which the schedule sets
    ``importance.png``      importance of each block
    ``memory.png``          memory in use and size of the optimizer's state, with the moments at which memory was saved
    ``loss.png``            every metric whose name ends in ``loss``
    ======================  ==========================================================================================

    Args:
        run_dir: Folder of one run; every ``metrics.csv`` below it belongs to that run (see :func:`load_metrics`).
        out_dir: Where the pictures go; made if need be. None: ``run_dir``.

    Returns:
        The pictures that were written, in the order of the table; those for which nothing was logged are left out.

    Raises:
        FileNotFoundError: There is no ``metrics.csv`` below ``run_dir``.
        ModuleNotFoundError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            'The pictures need matplotlib: pip install "hina-lightning[report]"', name="matplotlib"
        ) from error

    metrics = load_metrics(run_dir)
    folder = Path(run_dir if out_dir is None else out_dir)
    folder.mkdir(parents=True, exist_ok=True)
    pictures: dict[str, Callable[[Any, Metrics], bool]] = {
        "lr_mask": _draw_masks,
        "effective_lr": _draw_effective_lr,
        "importance": _draw_importance,
        "memory": _draw_memory,
        "loss": _draw_loss,
    }
    written = []
    for name, draw in pictures.items():
        figure = Figure(figsize=(9, 5), layout="constrained")
        if draw(figure, metrics):
            path = folder / f"{name}.png"
            figure.savefig(path, dpi=120)
            written.append(path)
    return written


def load_metrics(run_dir: str | Path) -> Metrics:
    """Read every ``metrics.csv`` below a folder as one run.

    A resumed training logs into a new file and begins where its checkpoint was: rows of an earlier file from that step
    on were not part of what came out, and are dropped. Cells that are empty, not finite or cut off by a kill are too.

    Args:
        run_dir: Folder of one run.

    Returns:
        A series for each logged name.

    Raises:
        FileNotFoundError: There is no such file.
    """
    files = sorted(Path(run_dir).rglob("metrics.csv"), key=lambda file: file.stat().st_mtime)
    if not files:
        raise FileNotFoundError(
            f"No metrics.csv below {run_dir}. Give the Trainer a CSVLogger, and report() the folder it writes into."
        )
    legs = sorted(filter(None, map(_read, files)), key=lambda rows: rows[0][0])  # stable: among equals, oldest first
    metrics: Metrics = {}
    for i, rows in enumerate(legs):
        end = legs[i + 1][0][0] if i + 1 < len(legs) else math.inf
        for step, values in rows:
            if step >= end:
                break
            for name, value in values.items():
                series = metrics.setdefault(name, Series([], []))
                series.steps.append(step)
                series.values.append(value)
    return dict(sorted(metrics.items()))


def _read(file: Path) -> list[tuple[int, dict[str, float]]]:
    """Rows of one file by step: the step, and the cells that hold a finite number."""
    rows = []
    with file.open(newline="", encoding="utf-8", errors="replace") as opened:
        for row in csv.DictReader(opened):
            values = {k: v for k, v in ((k, _number(v)) for k, v in row.items()) if v is not None}
            step = values.pop("step", None)
            values.pop("epoch", None)
            if step is not None and values:
                rows.append((int(step), values))
    return sorted(rows, key=lambda row: row[0])


def _number(cell: Any) -> float | None:
    try:
        value = float(cell)
    except (TypeError, ValueError):
        return None
    return value if math.isfinite(value) else None


def _under(metrics: Metrics, prefix: str, suffix: str = "") -> Metrics:
    """The series named ``prefix…suffix``, by what stands between."""
    return {
        name[len(prefix) : len(name) - len(suffix)]: series
        for name, series in metrics.items()
        if name.startswith(prefix) and name.endswith(suffix)
    }


def _short(names: list[str]) -> dict[str, str]:
    """Dotted names by their last two parts, or as many as tell them apart."""
    short = {}
    for name in names:
        parts = name.split(".")
        others = [other for other in names if other != name]
        for count in range(2, len(parts) + 1):
            end = ".".join(parts[-count:])
            if not any(f".{other}".endswith(f".{end}") for other in others):
                break
        short[name] = ".".join(parts[-count:]) if len(parts) > 1 else name
    return short


def _natural(name: str) -> list[Any]:
    """Order in which layer 10 comes after layer 9, and what has a number before what has none."""
    parts = re.split(r"(\d+)", name)
    return [len(parts) == 1, [int(part) if part.isdigit() else part for part in parts]]


# -- pictures ----------------------------------------------------------------------------------------------------------


def _draw_masks(figure: Any, metrics: Metrics) -> bool:
    means = _under(metrics, "lr_mask/", "/mean")
    if not means:
        return False
    short = _short(list(means))
    means = dict(sorted(means.items(), key=lambda item: _natural(short[item[0]])))
    figure.suptitle("Learning-rate mask: each element's own rate, before the schedule")
    if len(means) > MOST_PANELS:
        _map(figure, figure.subplots(), {short[k]: v for k, v in means.items()}, "mean of the mask")
        return True
    columns = min(3, len(means))
    rows = -(-len(means) // columns)
    figure.set_size_inches(max(5, 3.6 * columns), 0.9 + 2.5 * rows)
    panels = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).flat
    for (name, mean), axes in zip(means.items(), panels, strict=False):
        for low, high, label, color in BANDS:
            lower, upper = (metrics.get(f"lr_mask/{name}/{edge}") for edge in (low, high))
            if lower and upper and lower.steps == upper.steps:
                axes.fill_between(*lower, upper.values, alpha=0.25, lw=0, color=color, label=label)
        median = metrics.get(f"lr_mask/{name}/p50")
        if median:
            axes.plot(*median, color="C0", label="median")
        axes.plot(*mean, "--", color="black", lw=1, label="mean")
        axes.set_title(short[name], fontsize="medium")
        _finish(axes)
    for unused in list(panels):
        unused.set_visible(False)
    for i, axes in enumerate(figure.axes[: len(means)]):
        lowest = i + columns >= len(means)
        axes.tick_params(labelbottom=lowest)
        axes.set_xlabel("optimizer step" if lowest else "")
        axes.set_ylabel("learning rate" if i % columns == 0 else "")
    legend = {
        label: handle for axes in figure.axes for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    figure.legend(legend.values(), legend.keys(), loc="outside lower center", ncols=4, frameon=False)
    return True


def _draw_effective_lr(figure: Any, metrics: Metrics) -> bool:
    effective, scheduled = _under(metrics, "lr_eff/"), _under(metrics, "lr/")
    if not effective:
        return False
    figure.suptitle("Effective learning rate: mean over the elements of what is applied")
    axes = figure.subplots()
    effective = dict(sorted(effective.items(), key=lambda item: _natural(item[0])))
    if len(effective) > MOST_LINES:
        _map(figure, axes, effective, "effective learning rate")
        return True
    _lines(axes, effective)
    shown: list[Series] = []
    for name in effective:
        series = scheduled.get(name)
        if series and series not in shown:  # groups often share a schedule: one line then
            axes.plot(*series, "--", color="black", lw=1, label="group's rate (schedule)" if not shown else None)
            shown.append(series)
    _finish(axes, "learning rate", legend=True)
    return True


def _draw_importance(figure: Any, metrics: Metrics) -> bool:
    blocks = _under(metrics, "importance/")
    if not blocks:
        return False
    short = _short(list(blocks))
    blocks = dict(
        sorted(((short[name], series) for name, series in blocks.items()), key=lambda item: _natural(item[0]))
    )
    figure.suptitle("Importance of the blocks, as the optimizer scores it")
    axes = figure.subplots()
    if len(blocks) > MOST_LINES:
        _map(figure, axes, blocks, "importance")
        return True
    _lines(axes, blocks)
    axes.axhline(1.0, color="black", lw=0.8, ls=":", label="average parameter")
    _finish(axes, "importance (1 = average)", legend=True)
    return True


def _draw_memory(figure: Any, metrics: Metrics) -> bool:
    process, state = _under(metrics, "mem/", "_gb"), _under(metrics, "opt/", "_gb")
    used, free = process.get("used"), process.get("free")
    if used and free and used.steps == free.steps:  # what is free says more as a limit, on the scale of what is used
        del process["free"]
        process["limit"] = Series(used.steps, [u + f for u, f in zip(used.values, free.values, strict=True)])
    panels = [
        (title, series)
        for title, series in (("process or device", process), ("optimizer", state))
        if any(max(s.values) > 0 for s in series.values())
    ]
    if not panels:
        return False
    figure.suptitle("Memory")
    rows = figure.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0]
    for axes, (title, series) in zip(rows, panels, strict=True):
        top = max(max(s.values) for s in series.values())
        unit, factor = ("GiB", 1.0) if top >= 0.1 else ("MiB", 1024.0)
        for name, (steps, values) in series.items():
            style = {"color": "black", "ls": "--", "lw": 1} if name == "limit" else {"marker": "."}
            axes.plot(steps, [factor * v for v in values], label=name.replace("_", " "), **style)
        for step in _rises(metrics.get("mem/actions")):
            axes.axvline(step, color="black", ls=":", lw=1)
        axes.set_title(title, fontsize="medium")
        axes.set_ylim(0, 1.08 * factor * top)
        _finish(axes, unit, legend=True)
        axes.label_outer()
    return True


def _draw_loss(figure: Any, metrics: Metrics) -> bool:
    losses = {name: series for name, series in metrics.items() if name.endswith("loss")}
    if not losses:
        return False
    figure.suptitle("Loss")
    axes = figure.subplots()
    for name, series in losses.items():
        axes.plot(*series, marker="o" if len(series.steps) <= 20 else None, lw=1.2, label=name)
    _finish(axes, "loss", legend=True)
    return True


def _rises(series: Series | None) -> list[int]:
    """Steps at which a count has grown."""
    if series is None:
        return []
    before = [0.0, *series.values]
    return [step for step, value, last in zip(series.steps, series.values, before, strict=False) if value > last]


def _lines(axes: Any, series: Metrics) -> None:
    """Curves, the first ones wider, so that one that lies under another still shows."""
    for i, (name, one) in enumerate(series.items()):
        axes.plot(*one, lw=1.4 + 0.9 * (len(series) - 1 - i), label=name, solid_capstyle="round")


def _finish(axes: Any, ylabel: str | None = None, *, legend: bool = False) -> None:
    axes.grid(alpha=0.3)
    axes.margins(x=0.02)
    if ylabel is not None:
        axes.set_xlabel("optimizer step")
        axes.set_ylabel(ylabel)
    if ylabel == "learning rate" or ylabel is None:
        axes.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    if legend:
        axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False, fontsize="small")


def _map(figure: Any, axes: Any, series: Metrics, quantity: str) -> None:
    """One row for each series, color for its value; for more of them than lines could be told apart."""
    figure.set_size_inches(10, max(4, 0.22 * len(series) + 1.5))
    steps = sorted({step for s in series.values() for step in s.steps})
    grid = [[dict(zip(*s, strict=True)).get(step, math.nan) for step in steps] for s in series.values()]
    mesh = axes.pcolormesh(range(len(steps) + 1), range(len(series) + 1), grid, cmap="viridis")
    every = max(1, len(steps) // 8)
    axes.set_xticks([i + 0.5 for i in range(0, len(steps), every)], [str(step) for step in steps[::every]])
    axes.set_yticks([i + 0.5 for i in range(len(series))], list(series), fontsize="x-small")
    axes.invert_yaxis()
    axes.set_xlabel("optimizer step")
    figure.colorbar(mesh, ax=axes, label=quantity)
