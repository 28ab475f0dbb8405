"""What a segment is given."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from hina_optim.engine.rules import Values

__all__ = ["Inputs"]


@dataclass
class Inputs:
    """What a segment reads, for one cell (``N`` parameters, or one chunk of one).

    Attributes:
        stored: ``grad``, ``param`` and every stored part of the state, as stored.
        scalars: ``lr`` (0-d), ``loss`` (``[N]``), ``seeds`` (int32 ``[N]``), ``index`` (int64 ``[1, …]``, low
            precisions and measuring only), ``row_index`` and ``column_index`` (int64, where not all rows are here), and
            ``"<technique>.<name>"`` ``[N]``.
        start: Global flat index of the first element of each parameter.
        chunk: Of a chunk of a flat range that is stored in blocks, its first element there and one past its last.
        laid: What graphs have made of this in an earlier segment; empty before.
    """

    stored: Values
    scalars: Values
    start: int = 0
    chunk: tuple[int, int] | None = None
    laid: tuple[Any, ...] = ()
