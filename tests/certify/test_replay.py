"""Drawing again confirms an honest report and finds out the others."""

import dataclasses

import numpy as np
import pytest
import torch

from hf_certify import Certificate, VerificationError, certify_pipeline
from hf_certify.identity import shorten
from hf_certify.replay import replay
from tests.certify.conftest import make_vit_pipeline

N = 500


@pytest.fixture
def report(vit_pipeline, images):
    return certify_pipeline(vit_pipeline, images, sigma=0.25, n=N, seed=3, batch_size=100, progress=False)


def with_votes_moved(report, index, votes):
    """Return a report that is consistent in itself, with votes moved from the leader of an input to another class."""
    certificates = list(report.certificates)
    old = certificates[index]
    estimation = np.array(old.estimation)
    leader = estimation.argmax()
    estimation[leader] -= votes
    estimation[(leader + 1) % len(estimation)] += votes
    certificates[index] = Certificate.from_counts(
        old.selection, estimation.tolist(), sigma=old.sigma, alpha=old.alpha, index=index
    )
    forged = dataclasses.replace(report, certificates=tuple(certificates))
    forged.verify()
    return forged


def with_facts(report, **facts):
    return dataclasses.replace(report, facts=report.facts | facts)


@pytest.mark.parametrize("interval", ["max_upper", "cohen"])
def test_an_honest_report_is_confirmed_vote_by_vote(report, vit_pipeline, images, interval):
    found = replay(report.with_interval(interval), vit_pipeline, images, k=9, progress=True)
    assert (found.inputs, found.differing, found.other_facts) == ((0, 1, 2, 3), (0, 0, 0, 0), ())
    assert found.summary().endswith("(0, 1, 2, 3), 600 votes each: all votes as in the report")


def test_the_inputs_are_chosen_by_the_seed_and_without_one_at_random(report, vit_pipeline, images):
    assert (
        replay(report, vit_pipeline, images, k=2, seed=1).inputs
        == replay(report, vit_pipeline, images, 2, seed=1).inputs
    )
    seeds = {replay(report, vit_pipeline, images, k=1).seed for _ in range(2)}
    assert len(seeds) == 2
    assert {replay(report, vit_pipeline, images, k=1, seed=seed).inputs for seed in range(12)} == {
        (i,) for i in range(4)
    }


def test_a_single_vote_that_was_moved_is_found(report, vit_pipeline, images):
    """Negative control for ``verify``, which such a report passes."""
    forged = with_votes_moved(report, 2, 1)
    with pytest.raises(VerificationError, match=r"votes of input 2, estimation, .* but for 0 of 500, on the machine"):
        replay(forged, vit_pipeline, images, k=4)
    # an input that is not drawn again tells nothing
    untouched = next(seed for seed in range(9) if 2 not in replay(report, vit_pipeline, images, k=1, seed=seed).inputs)
    assert replay(forged, vit_pipeline, images, k=1, seed=untouched).differing == (0,)


def test_on_another_machine_as_many_votes_may_differ_as_the_tolerance_says(report, vit_pipeline, images):
    other = with_facts(with_votes_moved(report, 2, 1), threads=64)
    found = replay(other, vit_pipeline, images, k=4)
    assert (found.differing, found.other_facts) == ((0, 0, 1, 0), ("threads",))
    assert found.summary().endswith("1 votes differ, where these are others: threads")
    many = with_facts(with_votes_moved(report, 2, 6), threads=64)
    with pytest.raises(VerificationError, match=r"but for 1 of 500, with another threads, got 6 that differ"):
        replay(many, vit_pipeline, images, k=4)
    with pytest.raises(VerificationError, match=r"but for 5 of 500"):
        replay(many, vit_pipeline, images, k=4, tolerance=0.01)
    assert replay(many, vit_pipeline, images, k=4, tolerance=0.011).differing == (0, 0, 6, 0)


def test_what_is_not_what_was_certified_is_named_before_any_draw(report, vit_pipeline, images):
    vit_pipeline.model.register_forward_hook(lambda *_: pytest.fail("the model was run"))
    cases = [
        (report, images[:3], "The inputs must be those that were certified, 4 of them, got 3"),
        (report, [images[0], images[1], images[3], images[2]], "Input 2 must be the one that was certified"),
        (with_facts(report, noise_schema=0), images, r"noise_schema 1, got 0 in the report"),
        (with_facts(report, space="other pixels"), images, "got another space: 'raw pixels"),
        (with_facts(report, dtype="float16"), images, "got another dtype: 'float32', and 'float16' in the report"),
        (dataclasses.replace(report, certificates=report.certificates[1:]), images, "Certificate 0 must be about"),
    ]
    for wrong, inputs, message in cases:
        with pytest.raises(VerificationError, match=message):
            replay(wrong, vit_pipeline, inputs)


def test_another_model_or_processor_is_named(report, images):
    other = make_vit_pipeline(image_mean=[0.4, 0.5, 0.5])
    with pytest.raises(VerificationError, match="got another processor_config"):
        replay(report, other, images)
    other = make_vit_pipeline()
    with torch.no_grad():
        other.model.classifier.bias[0].add_(1e-3)
    with pytest.raises(VerificationError, match=r"got another weights_sha256: '[0-9a-f]{56}"):
        replay(report, other, images)
    # where it was loaded from does not matter
    other = make_vit_pipeline()
    other.model.config._name_or_path = "elsewhere"
    assert sum(replay(report, other, images, k=1).differing) == 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"k": 0}, "k must be >= 1, got 0"), ({"tolerance": 1.0}, r"tolerance must be in \[0, 1\), got 1.0")],
)
def test_settings_out_of_range_are_refused(report, vit_pipeline, images, settings, message):
    with pytest.raises(ValueError, match=message):
        replay(report, vit_pipeline, images, **settings)


def test_long_values_are_cut_in_messages():
    assert shorten({"a": "b" * 200}).endswith("...")
