"""The package as a whole: imports, and examples that run."""

import doctest
import importlib
import pkgutil
import subprocess
import sys
import tokenize
from pathlib import Path

import pytest

import hf_certify

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
