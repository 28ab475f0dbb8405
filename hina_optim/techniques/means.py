"""Means of rows and columns, which stand for state of every element of a matrix."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from hina_optim.techniques.base import ByColumn, ByRow, Flow, ParamInfo, Slot, Sums

__all__ = ["SMALLEST", "Means", "relative", "saves"]

#: An ε below this counts as this: float32 knows no smaller number that can be divided by.
SMALLEST = 1e-37


def saves(info: ParamInfo) -> bool:
    """Whether rows and columns are fewer numbers than elements; decided on the global shape."""
    return info.is_matrix and info.rows + info.columns < info.numel


@dataclass(frozen=True)
class Means:
    """A running average of which only the means over rows and columns of the matrix view are kept.

    They stand for ``R_i·C_j / mean(R)``, which is exact where the average has rank 1. A mean of running averages is the
    running average of the means: ``R`` and ``C`` are those of the average that would have been kept, whenever it was
    given up.

    Attributes:
        of: Name of the state that they stand for; theirs is that with ``_row`` and ``_col``.

    Source: *Adafactor: Adaptive Learning Rates with Sublinear Memory Cost*, arXiv 1804.04235, section 3.
    """

    of: str

    def names(self) -> tuple[str, str]:
        """Names of the two."""
        return f"{self.of}_row", f"{self.of}_col"

    def declared(self, info: ParamInfo) -> tuple[Slot, Slot]:
        """One number a row and one a column."""
        row, column = self.names()
        return (
            Slot(row, shape=(info.rows,), precision="fp32", mean_of=(self.of, "row")),
            Slot(column, shape=(info.columns,), precision="fp32", mean_of=(self.of, "column")),
        )

    def sums(self, value: Tensor) -> Sums:
        """What :meth:`follow` needs of the value that is averaged."""
        return {"rows": ByRow(value), "columns": ByColumn(value)}

    def held(self, flow: Flow) -> tuple[Tensor, Tensor]:
        """The means as they are, ``[N, rows]`` and ``[N, columns]``."""
        row, column = self.names()
        return flow.state[row], flow.state[column]

    def follow(self, flow: Flow, totals: dict[str, Tensor], keep: float | Tensor) -> tuple[Tensor, Tensor]:
        """The means after this step: ``keep`` times the old ones, and the rest of those of the value."""
        row, column = self.names()
        rows = keep * flow.state[row] + (1 - keep) / flow.columns * totals["rows"]
        columns = keep * flow.state[column] + (1 - keep) / flow.rows * totals["columns"]
        flow.new[row], flow.new[column] = rows, columns
        return rows, columns


def relative(means: Tensor) -> Tensor:
    """Means of rows, or of columns, over their own mean; 0 where all are 0."""
    return means / means.mean(1, keepdim=True).clamp(min=SMALLEST)
