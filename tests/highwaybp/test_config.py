"""The settings: one dataclass that checks itself, saves itself and is a command line."""

import json
import logging

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import HfArgumentParser

from hf_highwaybp import HighwayBP, HighwayConfig
from tests.highwaybp.toys import toy


@given(
    k=st.none() | st.integers(0, 100),
    residual=st.sampled_from(["default", "identity", "zero"]) | st.floats(0, 1),
    blocks=st.none() | st.text(min_size=1),
    enabled=st.booleans(),
)
def test_settings_survive_json(k, residual, blocks, enabled):
    config = HighwayConfig(k, residual, blocks, enabled)
    assert HighwayConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("", HighwayConfig()),
        ("--k 2 --residual zero --blocks model.layers", HighwayConfig(2, "zero", "model.layers")),
        ("--residual 0.8 --no_enabled", HighwayConfig(residual=0.8, enabled=False)),
    ],
)
def test_settings_are_a_command_line(line, expected):
    (parsed,) = HfArgumentParser(HighwayConfig).parse_args_into_dataclasses(line.split())
    assert parsed == expected


def test_every_setting_has_a_help_text(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "400")
    with pytest.raises(SystemExit):
        HfArgumentParser(HighwayConfig).parse_args(["--help"])
    shown = capsys.readouterr().out
    assert all(f"--{name}" in shown for name in HighwayConfig().to_dict())
    assert "fixed-point iteration" in shown


@pytest.mark.parametrize("make", [HighwayConfig, lambda **values: HighwayBP(toy(), **values)])
@pytest.mark.parametrize(
    ("values", "error", "message"),
    [
        ({"k": -1}, ValueError, "k must be a whole number from 0, .* got -1"),
        ({"k": 1.5}, TypeError, "k must be a whole number from 0, .* got 1.5"),
        ({"k": True}, TypeError, "got True"),
        ({"residual": 1.5}, ValueError, r"a number in \[0, 1\], got 1.5"),
        ({"residual": -0.1}, ValueError, r"a number in \[0, 1\], got -0.1"),
        ({"residual": float("nan")}, ValueError, "got nan"),
        ({"residual": "full"}, ValueError, "one of .*'identity', 'zero'.* got 'full'"),
        ({"residual": [1.0]}, TypeError, r"got \[1.0\]"),
        ({"residual": True}, TypeError, "got True"),
    ],
)
def test_bad_values_are_refused(make, values, error, message):
    with pytest.raises(error, match=message):
        make(**values)


def test_wrong_kinds_are_refused():
    with pytest.raises(TypeError, match=r"blocks must be a dotted path .*, got 3"):
        HighwayConfig(blocks=3)
    with pytest.raises(TypeError, match="enabled must be True or False, got 'yes'"):
        HighwayConfig(enabled="yes")
    with pytest.raises(ValueError, match=r"blocks must be a dotted path .*, got ''"):
        HighwayConfig(blocks="")
    with pytest.raises(TypeError, match="enabled must be True or False, got 'false'"):
        HighwayBP(toy(), enabled="false")
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got str"):
        HighwayBP("gpt2")


def test_k_is_checked_when_it_is_changed():
    hbp = HighwayBP(toy(), k=1)
    with pytest.raises(ValueError, match="k must be a whole number"):
        hbp.k = -3
    assert hbp.k == 1


def test_enabled_is_checked_when_it_is_changed():
    hbp = HighwayBP(toy(), k=1)
    with pytest.raises(TypeError, match="enabled must be True or False, got 0"):
        hbp.enabled = 0
    assert hbp.enabled is True


def test_a_key_of_a_newer_version_is_left_out_and_logged(caplog):
    with caplog.at_level(logging.WARNING, logger="hf_highwaybp"):
        assert HighwayConfig.from_dict({"k": 2, "stages": 4}) == HighwayConfig(k=2)
    assert "['stages']" in caplog.text


def test_an_engine_takes_its_settings_from_a_config():
    hbp = HighwayBP.from_config(toy(), HighwayConfig(k=2, residual="zero", blocks="layers", enabled=False))
    assert (hbp.k, hbp.stack.path, hbp.enabled) == (2, "layers", False)
    assert "zero" in hbp.describe()
