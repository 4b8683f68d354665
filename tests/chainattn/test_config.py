"""The settings dataclass: check, default and save format in one."""

import json

import numpy as np
import pytest

from hf_chainattn import ChainAttentionConfig


def test_the_saved_form_round_trips():
    settings = ChainAttentionConfig(gamma=0.25, diagonal="removed")
    assert ChainAttentionConfig.from_value(settings.to_dict()) == settings
    assert ChainAttentionConfig.from_value(settings) is settings


@pytest.mark.parametrize(
    "settings",
    [
        {"gamma": [0.1, [0.2, 0.3]], "layers": [1]},
        {"learnable": True, "per_head": True},
        {"encoder": True, "gamma": 0.5, "diagonal": "removed"},
    ],
)
def test_every_setting_round_trips_through_json(settings):
    chosen = ChainAttentionConfig(**settings)
    stored = json.loads(json.dumps(chosen.to_dict()))
    assert ChainAttentionConfig.from_value(stored) == chosen
    assert set(stored) == {"gamma", "diagonal", *settings}


def test_gamma_of_a_layer():
    settings = ChainAttentionConfig(gamma=[0.1, [0.2, 0.3], 0.4], layers=[0, 1])
    assert [settings.of_layer(number) for number in range(3)] == [0.1, (0.2, 0.3), 0.0]
    assert settings.of_layer(1, in_encoder=True) == 0.0
    assert ChainAttentionConfig(encoder=True).of_layer(7, in_encoder=True) == 0.9


@pytest.mark.parametrize(
    ("layers", "error"), [("01", TypeError), (3, TypeError), ([-1], ValueError), ([0.5], ValueError)]
)
def test_bad_layers_are_refused(layers, error):
    with pytest.raises(error, match="layers must"):
        ChainAttentionConfig(layers=layers)


@pytest.mark.parametrize("gamma", [0.0, [0.5, 0.0]])
def test_a_learnable_gamma_does_not_begin_at_zero(gamma):
    with pytest.raises(ValueError, match="GammaSchedule"):
        ChainAttentionConfig(gamma=gamma, learnable=True)


def test_none_means_the_defaults():
    assert ChainAttentionConfig.from_value(None) == ChainAttentionConfig(gamma=0.9, diagonal="kept")


def test_a_numpy_number_is_stored_as_a_plain_one():
    stored = ChainAttentionConfig(gamma=np.float32(0.5)).to_dict()
    assert json.loads(json.dumps(stored)) == {"gamma": 0.5, "diagonal": "kept"}


@pytest.mark.parametrize("gamma", [1, 1.0, -1e-9, float("nan"), float("inf")])
def test_gamma_outside_its_range_is_refused(gamma):
    with pytest.raises(ValueError, match=r"gamma must be in \[0, 1\), got"):
        ChainAttentionConfig(gamma=gamma)


@pytest.mark.parametrize("gamma", ["0.9", None, True, ["0.9"], [[[0.9]]]])
def test_gamma_of_the_wrong_kind_is_refused(gamma):
    with pytest.raises(TypeError, match="gamma must be a number"):
        ChainAttentionConfig(gamma=gamma)


def test_unknown_keys_are_named_with_a_way_out():
    with pytest.raises(ValueError, match=r"unknown \['learned'\].*update"):
        ChainAttentionConfig.from_value({"gamma": 0.9, "learned": True})


def test_other_kinds_are_refused():
    with pytest.raises(TypeError, match="must be a dict"):
        ChainAttentionConfig.from_value([0.9])
