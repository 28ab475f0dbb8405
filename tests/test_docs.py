"""What the documentation shows runs: examples in docstrings, and the Python of README.md and docs/.

Blocks of one file run in order in one namespace, in an empty folder. A block whose first line is a comment that begins
with ``# not run`` is only compiled.
"""

from __future__ import annotations

import doctest
import importlib
import inspect
import pkgutil
import re
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import hina_lightning
import hina_lightning.callbacks
import hina_optim
from hina_optim import get_optimizer_info, list_optimizers
from hina_optim.catalog import RECORDS
from hina_optim.engine.optimizer import HinaOptimizer
from hina_optim.memory import LADDER
from hina_optim.optimizers.inspection import FEATURES
from hina_optim.optimizers.options import OPTIONS
from hina_optim.techniques.base import ParamInfo, Technique
from hina_optim.techniques.strategies import MomentumStrategy, RegularizationStrategy

ROOT = Path(__file__).parents[1]
PAGES = sorted(p for p in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")) if p.exists())
#: Excerpts, which need what stands around them.
EXCERPTS = {"CONTRIBUTING.md"}
BLOCK = re.compile(r"^```python[^\n]*\n(.*?)^```\s*$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")


def modules() -> list[str]:
    found = []
    for package in (hina_optim, hina_lightning, hina_lightning.callbacks):
        found.append(package.__name__)
        found += [m.name for m in pkgutil.walk_packages(package.__path__, package.__name__ + ".")]
    return sorted(set(found))


def blocks(page: Path) -> list[tuple[int, str]]:
    """Line of the first line of code, and code."""
    text = page.read_text(encoding="utf-8")
    return [(text.count("\n", 0, m.start(1)) + 1, m[1]) for m in BLOCK.finditer(text)]


def examples() -> list[doctest.DocTest]:
    finder = doctest.DocTestFinder(exclude_empty=True)
    every = [test for name in modules() for test in finder.find(importlib.import_module(name), name)]
    return [test for test in every if test.examples]


@pytest.mark.parametrize("test", examples(), ids=lambda test: test.name)
def test_examples_in_docstrings(test: doctest.DocTest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    said: list[str] = []
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    runner.run(test, out=said.append)
    assert runner.failures == 0, "".join(said)


def test_there_are_examples() -> None:
    """A search that finds nothing would pass too."""
    names = {test.name for test in examples()}
    assert {"hina_optim.registry.create_optimizer", "hina_optim.adapters.roles.find_pairs"} <= names
    assert PAGES and any(blocks(page) for page in PAGES)


def promised(source: str) -> list[str]:
    """What a block says that it prints: the comment behind a print, and the comment lines that end the block."""
    lines = source.rstrip().splitlines()
    ending: list[str] = []
    while lines and lines[-1].startswith("# "):
        ending.insert(0, lines.pop()[2:])
    behind = [m[1] for m in (re.match(r"\s*print\(.*\)  # (.+)$", line) for line in lines) if m]
    return behind + ending if any("print(" in line or "show(" in line for line in lines) else behind


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_code_of_a_page(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Runs as written and prints what it says; a failure names file and line."""
    module = types.ModuleType(f"page_{page.stem}")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["train.py"])
    for line, source in blocks(page):
        code = compile("\n" * (line - 1) + source, str(page), "exec")
        if page.name in EXCERPTS or source.startswith("# not run"):
            continue
        capsys.readouterr()
        exec(code, module.__dict__)
        printed = capsys.readouterr().out.splitlines()
        for words in promised(source):
            pattern = re.escape(words).replace("…", ".*")
            assert any(re.fullmatch(pattern, row) for row in printed), f"{page.name}:{line}: {words!r} not in {printed}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_of_a_page(page: Path) -> None:
    """Files and headings that a page points to are there."""
    for target in LINK.findall(BLOCK.sub("", page.read_text(encoding="utf-8"))):
        if "://" in target or target.startswith("mailto:"):
            continue
        name, _, anchor = target.partition("#")
        file = (page.parent / name).resolve() if name else page
        assert file.exists(), f"{page.name}: {target}"
        if anchor and file.suffix == ".md":
            headings = re.findall(r"^#+ (.+)$", file.read_text(encoding="utf-8"), re.MULTILINE)
            slugs = {re.sub(r"[^\w\- ]", "", h.lower()).strip().replace(" ", "-") for h in headings}
            assert anchor in slugs, f"{page.name}: {target}"


@pytest.mark.parametrize("name", list_optimizers())
def test_every_argument_is_described(name: str) -> None:
    """LightningCLI makes its help of the docstring."""
    cls = get_optimizer_info(name).cls
    told = next(one for one in cls.__mro__ if "__init__" in vars(one))  # where the arguments are
    described = set(re.findall(r"^\s+(\w+): ", inspect.getdoc(told) or "", re.MULTILINE))
    missing = set(inspect.signature(cls).parameters) - described
    assert not missing, sorted(missing)


def page_of(name: str) -> str:
    return (ROOT / "docs" / name).read_text(encoding="utf-8")


def tables_of(text: str, heading: str) -> list[list[list[str]]]:
    """The cells of the tables between a heading and the next one, without their first two rows."""
    section = re.split(r"^#+ ", text.split(f"{heading}\n", 1)[1], maxsplit=1, flags=re.MULTILINE)[0]
    tables = re.findall(r"(?:^\|.*\n)+", section, re.MULTILINE)
    return [
        [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()[2:]] for table in tables
    ]


def test_every_technique_is_on_the_page_of_techniques() -> None:
    page = page_of("techniques.md")
    folder = ROOT / "hina_optim" / "techniques"
    files = {path.stem for path in folder.glob("*.py")} - {"__init__", "base", "means", "products", "stencils"}
    missing = {name for name in files if f"`{name}.py`" not in page}
    assert not missing, sorted(missing)
    modules = [importlib.import_module(f"hina_optim.techniques.{name}") for name in files]
    classes = {c for m in modules for c in vars(m).values() if inspect.isclass(c) and issubclass(c, Technique)}
    names = {c.name for c in classes if c.name}
    assert len(names) > 30
    for heading in ("## The recipes", "## What each keeps and needs"):
        listed = {name for row in tables_of(page, heading)[0] for name in re.findall(r"`(\w+)`", row[0])}
        assert names <= listed, (heading, sorted(names - listed))


#: Columns of the table of recipes → names of the optimizers.
COLUMNS = (
    ("HinaAdaptive",),
    ("AdaptiveHinaAdamW",),
    ("HinaAdamWOptimizer",),
    ("Automagic_CameAMP", "Automagic_CameAMP_8bit"),
    ("Automagic_CameAMP_Improved", "Automagic_CameAMP_Improved_8Bit"),
    ("RefactoredAutomagicCameAMP",),
    ("Automagic_CameAMP_COptim", "Automagic_CameAMP_COptim8bit"),
)
#: Options under which every technique that an optimizer can have is in one of its recipes.
VARIANTS: list[dict[str, Any]] = [
    {},
    dict(use_loss_context=True, use_orthogonal_grad=True, edge_suppression=True, spatial_awareness=True),
    dict(background_regularization=True, factored_image_state=True),
    dict(background_regularization=True, lora_rank_penalty=True, use_grams=True, full_finetune=True),
    dict(use_adopt_stability=False, use_ada_decay=False),
    dict(regularization=[type("R", (RegularizationStrategy,), {"apply": lambda self, grad, **kwargs: grad})()]),
    dict(momentum=type("M", (MomentumStrategy,), {"apply": lambda self, grad, moment, **kwargs: grad})()),
]
PART = ParamInfo((8, 16), role="lokr_w2", paired=True)


def recipe_of(name: str, **options: Any) -> list[str]:
    cls: Callable[..., HinaOptimizer] = get_optimizer_info(name).cls
    known = inspect.signature(cls).parameters
    optimizer = cls(
        [torch.nn.Parameter(torch.ones(8, 16))], lr=1e-4, **{k: v for k, v in options.items() if k in known}
    )
    chains = [optimizer.recipe(optimizer.param_groups[0], info) for info in (PART, ParamInfo((8, 16)))]
    assert {one.name for one in chains[1]} <= {one.name for one in chains[0]}
    return [one.name for one in chains[0]]


@pytest.mark.parametrize("column", range(len(COLUMNS)), ids=lambda i: COLUMNS[i][0])
def test_the_table_of_recipes_is_that_of_the_recipes(column: int) -> None:
    """Which techniques there are by default and on request, and in which order."""
    (table,) = tables_of(page_of("techniques.md"), "## The recipes")
    rows = [(str(row[0].split("`")[1]), row[1 + column]) for row in table]
    order = [name for name, _ in rows]
    for name in COLUMNS[column]:
        recipes = [recipe_of(name, **options) for options in VARIANTS]
        assert {one for one, mark in rows if mark == "on"} == set(recipes[0])
        assert {one for one, mark in rows if mark} == set().union(*recipes)
        for recipe in recipes:
            assert recipe == [one for one in order if one in recipe]


def test_every_optimizer_is_on_the_page_of_optimizers() -> None:
    assert sorted(name for names in COLUMNS for name in names) == list_optimizers()
    page, readme = page_of("optimizers.md"), (ROOT / "README.md").read_text(encoding="utf-8")
    for record in RECORDS:
        assert all(f"`{name}`" in page for name in (record.name, *record.aliases)), record.name
        assert any(f"`{name}`" in readme for name in (record.name, *record.aliases)), record.name
    told = {row[0].strip("`"): float(row[2]) for row in tables_of(page, "## Which for what")[1]}
    assert told == {r.name: inspect.signature(r.cls).parameters["lr"].default for r in RECORDS}
    public = [name for name in hina_optim.__all__ if not name.startswith("_")]
    pages = "".join(path.read_text(encoding="utf-8") for path in PAGES)
    assert not [name for name in public if not re.search(rf"\b{name}\b", pages)]


def test_every_argument_is_somewhere_in_the_documentation() -> None:
    pages = "".join(page_of(name) for name in ("techniques.md", "optimizers.md", "inspection.md", "architecture.md"))
    missing = [name for name in OPTIONS if not re.search(rf"\b{name}\b", pages)]
    assert not missing


def test_what_inspection_tells_is_on_its_page() -> None:
    page = page_of("inspection.md")
    for name in (*FEATURES, *(rung.name for rung in LADDER)):
        assert f"`{name}`" in page, name
    optimizer = hina_optim.create_optimizer("Automagic_CameAMP_Improved", torch.nn.Linear(8, 4), lr=1e-4)
    reports = [
        optimizer.get_optimization_info(),  # type: ignore[attr-defined]
        optimizer.get_memory_efficiency_report(),  # type: ignore[attr-defined]
        optimizer.diagnose_lora_pairing(),  # type: ignore[attr-defined]
    ]
    missing = [key for report in reports for key in report if f"`{key}`" not in page]
    assert not missing
