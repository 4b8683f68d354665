"""The package as a whole: imports, and examples that run."""

import doctest
import importlib
import pkgutil
import re
import subprocess
import sys
import tokenize
from pathlib import Path

import pytest

import hf_certify
from hf_certify import Certificate
from hf_certify.radius import format_down

MODULES = [name for _, name, _ in pkgutil.walk_packages(hf_certify.__path__, "hf_certify.")]


def test_import_is_light_in_a_fresh_interpreter():
    """Neither plotting nor tables nor the sibling packages nor transformers itself come with ``import hf_certify``."""
    heavy = ["matplotlib", "pandas", "gradio", "datasets", "transformers", "hf_chainattn", "hf_highwaybp"]
    code = f"import sys, hf_certify; print([name for name in {heavy} if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_oracle_and_package_do_not_import_each_other():
    """Oracle: the import lines themselves, read as tokens."""
    for path in Path(hf_certify.__file__).parent.rglob("*.py"):
        with tokenize.open(path) as file:
            imports = [line for line in file if line.startswith(("import ", "from "))]
        if path.name == "reference.py":
            assert not any("hf_certify" in line for line in imports)
        else:
            assert not any("reference" in line for line in imports)


def test_public_names_exist_and_are_sorted():
    assert hf_certify.__all__ == sorted(hf_certify.__all__)
    assert all(hasattr(hf_certify, name) for name in hf_certify.__all__)


@pytest.mark.parametrize("name", MODULES)
def test_examples_in_docstrings_run(name):
    failed, _ = doctest.testmod(importlib.import_module(name))
    assert failed == 0


def test_examples_in_the_readme_run():
    readme = Path(hf_certify.__file__).with_name("README.md")
    failed, attempted = doctest.testfile(str(readme), module_relative=False)
    assert failed == 0
    assert attempted > 0


def test_the_numbers_of_draws_in_the_guide_are_those_that_are_enforced():
    """Oracle: at the quoted number unanimous votes give a radius above 0, and with one draw fewer they do not."""
    guide = (Path(hf_certify.__file__).parents[1] / "docs" / "certify.md").read_text("utf8")
    rows = re.findall(r"^\| (0\.\d+) \| (\d+) \| (\d+) \| (\d+) \| (\d+) \| (\d+) \|$", guide, re.MULTILINE)
    assert len(rows) == 6
    for alpha, classes, *least in rows:
        for interval, n in zip(("cohen", "max_upper", "cpm", "bonferroni"), map(int, least), strict=True):
            rest = [0] * (int(classes) - 1)
            radii = [
                Certificate.from_counts(
                    [9, *rest], [draws, *rest], sigma=1, alpha=float(alpha), interval=interval
                ).radius
                for draws in (n - 1, n)
            ]
            assert radii[0] == 0 < radii[1]


def test_the_radii_in_the_guide_are_those_of_unanimous_votes():
    guide = (Path(hf_certify.__file__).parents[1] / "docs" / "certify.md").read_text("utf8")
    quoted = re.findall(r"(\d\.\d\d) sigma at ([\d,]*\d)", guide)
    assert len(quoted) == 4
    for radius, draws in quoted:
        certificate = Certificate.from_counts([9, 0], [int(draws.replace(",", "")), 0], sigma=1.0)
        assert format_down(certificate.radius, 2) == radius
