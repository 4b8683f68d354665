"""The public names, and the examples in the docstrings."""

import doctest
import importlib
import pkgutil
import subprocess
import sys

import pytest

import hf_highwaybp

MODULES = sorted(module.name for module in pkgutil.iter_modules(hf_highwaybp.__path__, "hf_highwaybp."))


@pytest.mark.parametrize("name", MODULES)
def test_the_examples_run(name):
    assert doctest.testmod(importlib.import_module(name)).failed == 0


def test_every_public_name_exists_and_is_documented():
    assert sorted(hf_highwaybp.__all__) == hf_highwaybp.__all__
    assert all(getattr(hf_highwaybp, name).__doc__ for name in hf_highwaybp.__all__)


def test_the_oracle_stands_alone():
    """Oracle: a fresh interpreter; the reference may load neither the engine nor a sibling package."""
    program = (
        "import sys, importlib.util as u;"
        "s = u.spec_from_file_location('reference', sys.argv[1]); m = u.module_from_spec(s);"
        "sys.modules['reference'] = m; s.loader.exec_module(m);"
        "assert not [n for n in sys.modules if n.startswith('hf_')]"
    )
    path = importlib.import_module("hf_highwaybp.reference").__file__
    assert subprocess.run([sys.executable, "-c", program, path], check=False).returncode == 0


def test_importing_the_package_imports_no_sibling_and_no_plotting():
    """Oracle: a fresh interpreter."""
    program = (
        "import sys, hf_highwaybp;"
        "assert not {'hf_chainattn', 'hf_certify', 'matplotlib', 'gradio', 'pandas'} & set(sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
