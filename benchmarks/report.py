"""What the benchmark found, as text, as Markdown and as a picture."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

PAGE = Path(__file__).parents[1] / "docs" / "performance.md"

COLUMNS = ("ms", "× fused", "quartiles", "floor", "temp MB", "state MB", "ops", "waits", "compile", "again")
WIDTHS = (9, 8, 13, 6, 9, 9, 7, 6, 8, 6)
NAME = 50
HEAD = f"{'optimizer':<{NAME}}" + "".join(f" {c:>{w}}" for c, w in zip(COLUMNS, WIDTHS, strict=True))
LEGEND = """× fused: time over that of torch's fused AdamW in the same round; median over the rounds, and quartiles.
floor: time of plainly moving the bytes that must be moved (gradient, weights, state) over the time of the step.
temp: bytes that torch's allocator handed out at most during a step (profiler on a CPU, allocator statistics on CUDA).
ops: dispatcher calls a step, views included; compiled: operators and graphs; CUDA: kernels. waits: host syncs a step.
compile: seconds of the first two steps beyond two others; again: graphs made in 200 steps after the first three."""


def heading(key: str, entry: dict[str, Any]) -> str:
    """The title of a workload."""
    return f"{key}: {entry['title']}: {entry['tensors']:,} tensors, {entry['elements'] / 1e6:.1f}M elements"


def quartiles(values: list[float]) -> tuple[float, float]:
    """Lower and upper quartile; of a single value, itself twice."""
    if len(values) < 2:
        return values[0], values[0]
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, high


def cells(row: dict[str, Any]) -> list[str]:
    """The cells of a row, in the order of :data:`COLUMNS`."""

    def shown(name: str, form: str, factor: float = 1.0) -> str:
        value = row[name]
        return "-" if value is None else format(value * factor if factor != 1.0 else value, form)

    low, high = quartiles(row["ratios"])
    return [
        f"{statistics.median(row['seconds']) * 1e3:.2f}",
        f"{statistics.median(row['ratios']):.2f}",
        f"{low:.2f}-{high:.2f}",
        f"{statistics.median(row['floors']):.0%}",
        shown("temporary_bytes", ".1f", 1e-6),
        shown("state_bytes", ".1f", 1e-6),
        shown("ops", ",d"),
        shown("waits", "d"),
        shown("compile_seconds", ".1f"),
        shown("recompiles", "d"),
    ]


def line(row: dict[str, Any]) -> str:
    """A row as text."""
    if row["status"]:
        return f"{row['name']:<{NAME}} {row['status']}"
    return f"{row['name']:<{NAME}}" + "".join(f" {c:>{w}}" for c, w in zip(cells(row), WIDTHS, strict=True))


def markdown(found: dict[str, Any]) -> str:
    """All tables, with where they were measured."""
    at = found["machine"]
    rounds = f"at most {found['rounds']} rounds, scale {found['scale']:g}"
    lines = [f"{at['device']} ({at['processor']}), {at['threads']} threads, torch {at['torch']}; {rounds}."]
    for key, entry in found["workloads"].items():
        lines += ["", f"**{heading(key, entry)}**", "", f"| optimizer | {' | '.join(COLUMNS)} |"]
        lines.append("|---|" + "---:|" * len(COLUMNS))
        for row in entry["rows"]:
            if row["status"]:
                lines.append(f"| {row['name']} | {row['status']} |" + " |" * (len(COLUMNS) - 1))
            else:
                lines.append(f"| {row['name']} | {' | '.join(cells(row))} |")
    return "\n".join(lines)


def write(text: str, mark: str, page: Path = PAGE) -> None:
    """Put a text between the marks of that name in a page."""
    begin, end = f"<!-- {mark}: begin -->", f"<!-- {mark}: end -->"
    before, found, rest = page.read_text().partition(begin)
    _, closed, after = rest.partition(end)
    if not found or not closed:
        raise ValueError(f"{page} has no lines {begin} and {end} to write between")
    page.write_text(f"{before}{begin}\n\n{text}\n\n{end}{after}")


def picture(found: dict[str, Any], path: Path) -> str:
    """Draw the ratios with their quartiles, a panel a workload; returns what was done."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return "No picture: matplotlib is not installed."
    panels = {key: [row for row in e["rows"] if not row["status"]] for key, e in found["workloads"].items()}
    tallest = max((len(rows) for rows in panels.values()), default=0)
    across = min(2, max(1, len(panels)))
    down = max(1, -(-len(panels) // across))
    figure = Figure(figsize=(7.5 * across, down * (1.0 + 0.22 * tallest)), layout="constrained")
    for i, (key, rows) in enumerate(panels.items()):
        axes = figure.add_subplot(down, across, i + 1)
        middle = [statistics.median(row["ratios"]) for row in rows]
        spread = [quartiles(row["ratios"]) for row in rows]
        errors = [
            [max(0.0, m - low) for m, (low, _) in zip(middle, spread, strict=True)],
            [max(0.0, high - m) for m, (_, high) in zip(middle, spread, strict=True)],
        ]
        colors = ["tab:blue" if row["ours"] else "tab:gray" for row in rows]
        axes.barh([row["name"] for row in rows], middle, xerr=errors, color=colors)
        axes.axvline(1.0, color="black", linewidth=0.8)
        axes.set(
            xscale="log", xlabel="time over that of torch's fused AdamW", title=heading(key, found["workloads"][key])
        )
        axes.title.set_fontsize(9)
        axes.invert_yaxis()
        axes.tick_params(labelsize=7)
    figure.savefig(path, dpi=110)
    return f"Picture: {path}"
