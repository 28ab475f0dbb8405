"""A table of the cells of the matrix at the end of a run, from all workers."""

from __future__ import annotations

from typing import Any

CELL = "cell"


def pytest_terminal_summary(terminalreporter: Any) -> None:
    cells: dict[str, dict[str, dict[str, str]]] = {}
    for reports in terminalreporter.stats.values():
        for report in reports:
            for key, value in getattr(report, "user_properties", ()):
                if key == CELL:
                    kind, optimizer, where, result = value
                    cells.setdefault(kind, {}).setdefault(optimizer, {})[where] = result
    if not cells:
        return
    terminalreporter.section("sharded matrix")
    terminalreporter.line(
        "The largest difference of a parameter from one process after 20 steps, relative to how far it moved; '=': "
        "weights and state equal to the bit. After it, the share of codes that are others."
    )
    for kind, rows in cells.items():
        columns = sorted({where for row in rows.values() for where in row})
        terminalreporter.line("")
        terminalreporter.line(f"| {kind} | " + " | ".join(columns) + " |")
        terminalreporter.line("|---" * (len(columns) + 1) + "|")
        for optimizer, row in sorted(rows.items()):
            terminalreporter.line(f"| {optimizer} | " + " | ".join(row.get(where, "") for where in columns) + " |")
