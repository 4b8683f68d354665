"""The settings dataclass: check, default and save format in one."""

import json

import numpy as np
import pytest

from hf_chainattn import ChainAttentionConfig


def test_the_saved_form_round_trips():
    settings = ChainAttentionConfig(gamma=0.25, diagonal="removed")
    assert ChainAttentionConfig.from_value(settings.to_dict()) == settings
    assert ChainAttentionConfig.from_value(settings) is settings


def test_none_means_the_defaults():
    assert ChainAttentionConfig.from_value(None) == ChainAttentionConfig(gamma=0.9, diagonal="kept")


def test_a_numpy_number_is_stored_as_a_plain_one():
    stored = ChainAttentionConfig(gamma=np.float32(0.5)).to_dict()
    assert json.loads(json.dumps(stored)) == {"gamma": 0.5, "diagonal": "kept"}


@pytest.mark.parametrize("gamma", [1, 1.0, -1e-9, float("nan"), float("inf")])
def test_gamma_outside_its_range_is_refused(gamma):
    with pytest.raises(ValueError, match=r"gamma must be in \[0, 1\), got"):
        ChainAttentionConfig(gamma=gamma)


@pytest.mark.parametrize("gamma", ["0.9", None, True, [0.9]])
def test_gamma_of_the_wrong_kind_is_refused(gamma):
    with pytest.raises(TypeError, match="gamma must be a number"):
        ChainAttentionConfig(gamma=gamma)


def test_unknown_keys_are_named_with_a_way_out():
    with pytest.raises(ValueError, match=r"unknown \['learnable'\].*update"):
        ChainAttentionConfig.from_value({"gamma": 0.9, "learnable": True})


def test_other_kinds_are_refused():
    with pytest.raises(TypeError, match="must be a dict"):
        ChainAttentionConfig.from_value([0.9])
