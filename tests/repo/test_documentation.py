"""What the README and the guides show runs as written, names what exists, and quotes only measured figures."""

import ast
import doctest
import importlib
import json
import pkgutil
import re
import statistics
from pathlib import Path

import pytest

from benchmarks.page import page as benchmarks_page
from examples.end_to_end import readme

ROOT = Path(__file__).parents[2]
PACKAGES = ["hf_chainattn", "hf_highwaybp", "hf_certify"]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *sorted(ROOT.glob("hf_*/README.md"))]
SNIPPETS = [
    pytest.param(code, id=f"{page.relative_to(ROOT)}-{number}")
    for page in PAGES
    for number, code in enumerate(
        re.findall(r"^```python\n(.*?)^```", page.read_text("utf8"), re.DOTALL | re.MULTILINE)
    )
]


def modules():
    for package in PACKAGES:
        yield package
        for module in pkgutil.walk_packages([str(ROOT / package)], f"{package}."):
            yield module.name


@pytest.mark.parametrize("code", SNIPPETS)
def test_a_snippet_runs_as_written(code, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if code.startswith(">>>"):
        test = doctest.DocTestParser().get_doctest(code, {}, "snippet", None, 0)
        assert doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE).run(test).failed == 0
    else:
        exec(compile(code, "snippet", "exec"), {"__name__": "snippet"})


def test_the_first_screen_has_a_snippet_for_each_package():
    code = "\n".join(
        re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text("utf8"), re.DOTALL | re.MULTILINE)
    )
    assert [package for package in PACKAGES if package not in code] == []


@pytest.mark.parametrize("name", list(modules()))
def test_the_examples_of_a_module_run(name):
    result = doctest.testmod(importlib.import_module(name), optionflags=doctest.NORMALIZE_WHITESPACE)
    assert result.failed == 0


@pytest.mark.parametrize("package", PACKAGES)
def test_every_public_name_is_in_the_guide_and_documented(package):
    guide = (ROOT / "docs" / f"{package.removeprefix('hf_')}.md").read_text("utf8")
    module = importlib.import_module(package)
    assert [name for name in module.__all__ if f"`{name}`" not in guide] == []
    assert [name for name in module.__all__ if not getattr(module, name).__doc__] == []


def test_the_tables_of_the_readme_are_those_of_the_stored_run():
    text = readme.README.read_text("utf8")
    assert readme.with_results(text, json.loads(readme.STORED.read_text("utf8"))) == text


def test_links_inside_the_repository_lead_somewhere():
    broken = []
    for page in [*PAGES, ROOT / "CONTRIBUTING.md"]:
        for target in re.findall(r"\]\(([^)\s#]+\.\w+)\)", page.read_text("utf8")):
            if not target.startswith("http") and not (page.parent / target).exists():
                broken.append(f"{page.name}: {target}")
    assert broken == []


def test_every_target_the_readme_names_exists():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text("utf8"), re.MULTILINE))
    named = set(re.findall(r"(?:`|^)make ([a-z-]+)", (ROOT / "README.md").read_text("utf8"), re.MULTILINE))
    assert {"demo", "test"} <= named
    assert named <= targets


def test_source_files_are_short():
    long = {
        str(path.relative_to(ROOT)): count
        for folder in (*PACKAGES, "examples", "benchmarks")
        for path in (ROOT / folder).rglob("*.py")
        if (count := len(path.read_text("utf8").splitlines())) > 450
    }
    assert long == {}


def test_functions_are_short():
    """A function fits on a screen: 60 lines, its docstring not counted."""
    long = []
    for package in PACKAGES:
        for path in (ROOT / package).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text("utf8"))):
                if isinstance(node, ast.FunctionDef):
                    first = node.body[1] if ast.get_docstring(node) and len(node.body) > 1 else node.body[0]
                    if node.end_lineno - first.lineno + 1 > 60:
                        long.append(f"{path.relative_to(ROOT)}:{node.name}")
    assert long == []


def test_the_page_on_benchmarks_is_that_of_the_stored_runs():
    assert (ROOT / "docs" / "benchmarks.md").read_text("utf8") == benchmarks_page()


def test_the_guide_quotes_the_stored_run_of_the_upgrade():
    guide = " ".join((ROOT / "docs" / "chainattn.md").read_text("utf8").split())
    rows = json.loads((ROOT / "docs" / "results" / "upgrade.json").read_text("utf8"))
    before, ramp, jump, ordinary = (
        f"{statistics.median(row[name] for row in rows):.3f}" for name in ("before", "ramp", "jump", "ordinary")
    )
    assert f"answers {before} of the questions" in guide
    assert f"it is {ramp} with the schedule, {jump} with gamma at 0.9" in guide
    assert f"and {ordinary} with ordinary attention" in guide
