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
from pathlib import Path

import pytest

import hina_lightning
import hina_lightning.callbacks
import hina_optim
from hina_optim import HinaAdaptive

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


def test_every_argument_is_described() -> None:
    """LightningCLI makes its help of the docstring."""
    text = inspect.getdoc(HinaAdaptive) or ""
    described = set(re.findall(r"^\s+(\w+)(?: \([^)]*\))?:", text, re.MULTILINE))
    # one line may describe several arguments
    described |= {name for line in re.findall(r"^\s+((?:\w+, )+\w+):", text, re.MULTILINE) for name in line.split(", ")}
    missing = set(inspect.signature(HinaAdaptive).parameters) - described
    assert not missing, sorted(missing)


def test_every_technique_is_on_the_page_of_techniques() -> None:
    page = (ROOT / "docs" / "techniques.md").read_text(encoding="utf-8")
    files = {path.stem for path in (ROOT / "hina_optim" / "techniques").glob("*.py")} - {"__init__", "base", "stencils"}
    missing = {name for name in files if f"{name}.py" not in page and f"`{name}`" not in page}
    assert not missing, sorted(missing)
