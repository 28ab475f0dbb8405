"""What all tests share: one thread a worker, tests for a GPU skipped with the reason, seeds."""

from __future__ import annotations

import os

import pytest
import torch
from hypothesis import settings

from hina_optim.state import codebooks
from tests.sharded.table import pytest_terminal_summary  # noqa: F401 (a hook: the table of the matrix)

# The same examples in every run: whether a change lands must not depend on luck. HYPOTHESIS_PROFILE=search draws new
# ones.
settings.register_profile("same", derandomize=True, print_blob=True)
settings.register_profile("search", derandomize=False, print_blob=True)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "same"))


def pytest_configure(config: pytest.Config) -> None:
    torch.set_num_threads(1)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device, and this machine has none")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _tables_of_its_own(request: pytest.FixtureRequest) -> None:
    """Tables of 8-bit codes keep a copy for each device; the far device of some tests is the meta device of others."""
    if hasattr(request.module, "FAR"):
        for tables in (codebooks.dynamic_tables, codebooks.log_tables):
            tables.cache_clear()
