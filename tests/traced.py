"""Graphs that are run as traced, without generated code."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch._dynamo.utils import counters


@contextlib.contextmanager
def traced() -> Iterator[None]:
    """Run what is compiled as traced; a break in a graph is an error.

    So it is with ``fullgraph=True`` where code is generated, but this stance of torch's forgets it.
    """
    before = counters["graph_break"].copy()
    with torch.compiler.set_stance("default", force_backend="eager"):
        yield
    broken = counters["graph_break"] - before
    assert not broken, f"graphs break: {dict(broken)}"
