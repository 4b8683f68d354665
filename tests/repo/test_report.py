"""The report of the demo: one file that needs nothing else, and the same numbers as its JSON."""

import copy
import json
import re

import pytest

from examples.end_to_end import readme
from examples.end_to_end.report import write_report
from examples.end_to_end.tables import TABLES, down


@pytest.fixture
def stored():
    return json.loads(readme.STORED.read_text("utf8"))


def test_the_page_needs_no_other_file_and_no_network(stored, tmp_path):
    text = write_report(tmp_path, stored).read_text("utf8")
    assert re.findall(r"""(?:src|href)=["'](?!#)([^"']*)""", text) == []
    assert re.findall(r"url\((?!#)[^)]*\)|@import|<script|<link", text) == []
    assert text.count("<svg") == len(stored["parts"]) == 3


def test_page_and_json_show_the_same_numbers(stored, tmp_path):
    text = write_report(tmp_path, stored).read_text("utf8")
    assert json.loads((tmp_path / "report.json").read_text("utf8")) == stored
    for part, result in stored["parts"].items():
        for table in TABLES[part](result):
            for row in table.rows:
                assert all(f"<td>{cell}</td>" in text for cell in row)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.html", "report.json"]


def test_a_run_in_which_nothing_was_certified_still_has_a_report(stored, tmp_path):
    run = copy.deepcopy(stored)
    for figures in run["parts"]["certification"]["intervals"].values():
        figures["radii"] = [0.0] * len(figures["radii"])
    assert "max_upper" in write_report(tmp_path, run).read_text("utf8")


@pytest.mark.parametrize("hundredths", range(101))
def test_a_share_keeps_its_digits(hundredths):
    """0.57 is just below its decimal in binary, and must not lose its last digit."""
    assert down(hundredths / 100, 2) == f"{hundredths // 100}.{hundredths % 100:02d}"


def test_a_share_is_cut_off_and_never_rounded_up():
    assert down(0.9999) == "0.999"


def test_the_stored_run_reaches_its_targets(stored):
    """What the project promises of `make demo`; the run behind the README must show it."""
    models = stored["parts"]["chain"]["models"]
    assert models["chain"]["accuracy"]["T = 30"]["overall"] >= 0.99
    assert models["chain"]["accuracy"]["T = 48"]["16-31"] >= 0.95
    assert models["sdpa"]["accuracy"]["T = 30"]["overall"] <= 0.6
    cosines = {probe["when"]: probe["cosine"] for probe in stored["parts"]["highway"]["cosines"]}
    assert min(cosines["start"]["k = 1"], cosines["middle"]["k = 1"]) >= 0.95
    assert stored["parts"]["certification"]["intervals"]["max_upper"]["certified_accuracy"]["0.25"] >= 0.85
    assert stored["seconds"] <= 480
