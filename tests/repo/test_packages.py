"""The packages stand alone, are light to import, and are shipped with their types."""

import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

PACKAGES = ["hf_chainattn", "hf_highwaybp", "hf_certify"]
HEAVY = ["matplotlib", "pandas", "gradio", "datasets", "evaluate", "statsmodels"]


@pytest.mark.parametrize("package", PACKAGES)
def test_importing_a_package_brings_neither_siblings_nor_plots(package):
    """Oracle: the modules of a fresh interpreter."""
    unwanted = [name for name in (*PACKAGES, *HEAVY) if name != package]
    script = f"import sys, {package}; print([name for name in {unwanted!r} if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=120)
    assert result.stdout.strip() == "[]"


@pytest.mark.parametrize("package", PACKAGES)
def test_a_package_ships_its_types_and_its_readme(package):
    folder = Path(__file__).parents[2] / package
    assert (folder / "py.typed").is_file()
    assert (folder / "README.md").is_file()
    assert (folder / "reference.py").is_file()


def test_the_distribution_declares_what_it_installs():
    names = {requirement.split(">")[0].split("<")[0] for requirement in metadata.requires("hf-chain-highway-certify")}
    assert {"torch", "transformers", "accelerate", "safetensors", "scipy", "tqdm", "typer"} <= names
    scripts = metadata.entry_points(group="console_scripts")
    assert scripts["hf-certify"].value == "hf_certify.cli:app"
