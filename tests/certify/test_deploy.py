"""The smoothed classifier in the place of its pipeline."""

import json
import multiprocessing
import types

import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn
from transformers.pipelines.pt_utils import KeyDataset

from hf_certify import (
    ABSTAIN,
    Certificate,
    EncodedInput,
    Prediction,
    ReportFolderError,
    SmoothedPipeline,
    Space,
    UnsupportedModelError,
    certify_pipeline,
    smooth_pipeline,
)
from hf_certify.noise import Stage, draw_noise
from tests.certify.conftest import make_vit_pipeline
from tests.certify.toy_models import half_space


class Tensors(Space):
    """Inputs are tensors already."""

    num_classes = 2
    units = "numbers"

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def encode(self, item: torch.Tensor, position: int) -> EncodedInput:
        return EncodedInput(item, self.model)


def test_answers_look_like_those_of_the_pipeline(vit_pipeline, images):
    """Oracle: the pipeline itself, for one input and for a list."""
    smoothed = smooth_pipeline(vit_pipeline, sigma=0.25, n=200, seed=1)
    for inputs in (images[0], images):
        for top_k in (1, 2, 5):
            ours, theirs = smoothed(inputs, top_k=top_k), vit_pipeline(inputs, top_k=top_k)
            shape = [[len(answer), sorted(answer[0])] for answer in ([ours] if inputs is images[0] else ours)]
            assert shape == [
                [len(answer), sorted(answer[0])] for answer in ([theirs] if inputs is images[0] else theirs)
            ]
    answer = smoothed(images[1])
    assert {entry["label"] for entry in answer} == set(vit_pipeline.model.config.id2label.values())
    scores = [entry["score"] for entry in answer]
    assert scores == sorted(scores, reverse=True)
    assert sum(scores) == pytest.approx(1.0)


def test_every_kind_of_input_that_the_pipeline_takes(vit_pipeline, images, image_folder):
    paths = sorted(map(str, image_folder.glob("*.png")))
    expected = smooth_pipeline(vit_pipeline, sigma=0.25, n=200, seed=1)(images)
    for inputs in (
        paths,
        tuple(images),
        [np.asarray(image) for image in images],
        KeyDataset([{"image": path} for path in paths], "image"),
    ):
        assert smooth_pipeline(vit_pipeline, sigma=0.25, n=200, seed=1)(inputs) == expected
    lazy = smooth_pipeline(vit_pipeline, sigma=0.25, n=200, seed=1)(image for image in images)
    assert isinstance(lazy, types.GeneratorType)
    assert list(lazy) == expected
    one = smooth_pipeline(vit_pipeline, sigma=0.25, n=200, seed=1)
    assert [one(np.asarray(images[0])), one(paths[1])] == expected[:2]


def test_the_score_is_the_share_of_votes():
    """Oracle: votes on the noise itself, counted by hand."""
    x = 0.3 * torch.ones(12)
    smoothed = smooth_pipeline(Tensors(half_space()), sigma=0.5, n=300, seed=4)
    smoothed(-x)
    noise = torch.cat([chunk.clone() for chunk in draw_noise((12,), 300, seed=4, index=1, stage=Stage.PREDICTION)])
    votes = half_space()(x + 0.5 * noise).argmax(1).bincount(minlength=2) / 300
    assert smoothed(x) == [{"label": f"LABEL_{k}", "score": pytest.approx(float(votes[k]))} for k in (0, 1)]


def test_it_says_so_when_it_cannot_decide():
    smoothed = smooth_pipeline(Tensors(half_space()), sigma=0.5, n=200, seed=1)
    answer = smoothed(torch.zeros(12), top_k=None)
    assert answer[0] == {"label": ABSTAIN, "score": 0.0}
    # it takes a place of its own, so that the number of entries is that of the pipeline
    assert len(answer) == 2
    assert answer[1]["score"] >= 0.5
    assert smoothed(torch.zeros(12), top_k=1) == answer[:1]
    assert smoothed.predict(torch.zeros(12)).label is None


@pytest.mark.parametrize(("alpha_certificate", "alpha_predict"), [(0.05, 0.05), (0.001, 0.01), (0.2, 0.001)])
def test_inside_a_certified_radius_it_contradicts_at_most_as_often_as_both_alphas_allow(
    alpha_certificate, alpha_predict
):
    """Exact, not simulated: binomial sums over all votes of a half-space, for every distance to the plane.

    The worst point inside a certified radius is the one nearest to the plane. For each possible number of votes the
    package says which certificate and which prediction follow.
    """
    n, counts = 60, np.arange(61)
    certificates = [
        Certificate.from_counts([1, 0], [k, n - k], sigma=1.0, alpha=alpha_certificate, interval="cohen")
        for k in counts
    ]
    radii = np.array([certificate.radius for certificate in certificates])
    predicted = [Prediction.from_counts([k, n - k], alpha=alpha_predict).label for k in counts]

    def chance(radii: np.ndarray, label: int) -> float:
        """Return the largest chance of a certificate for class 0 and an answer ``label`` at the edge of its radius."""
        answers = np.array([found == label for found in predicted])
        found = []
        for distance in np.linspace(0.0, 3.0, 301):
            certified = stats.binom.pmf(counts, n, stats.norm.cdf(distance)) * (radii > 0)
            at_edge = stats.binom.pmf(counts[:, None], n, stats.norm.cdf(distance - radii)[None, :])
            found.append(float(certified @ (at_edge * answers[:, None]).sum(0)))
        return max(found)

    assert chance(radii, 1) <= alpha_certificate + alpha_predict
    # negative controls: it does answer, and radii of three times the length would be noticed
    assert chance(0.1 * radii, 0) > 0.9
    assert chance(3 * radii, 1) > 0.5


def test_repeated_questions_have_noise_of_their_own(vit_pipeline, images):
    smoothed = smooth_pipeline(vit_pipeline, sigma=0.25, n=300)
    answers = {smoothed.predict(images[0]).counts for _ in range(8)} | {
        tuple(entry["score"] for entry in answer) for answer in smoothed([images[0]] * 8)
    }
    assert len(answers) > 8
    seeded = smooth_pipeline(vit_pipeline, sigma=0.25, n=300, seed=1)
    again = smooth_pipeline(vit_pipeline, sigma=0.25, n=300, seed=1)
    first = [seeded.predict(images[0]) for _ in range(4)]
    assert len({prediction.counts for prediction in first}) > 1
    assert [again.predict(images[0]) for _ in range(4)] == first


def _ask(smoothed, queue):
    torch.set_num_threads(1)
    queue.put([smoothed.predict(torch.linspace(-0.1, 0.1, 12)).counts for _ in range(3)])


def test_copies_in_other_processes_have_noise_of_their_own():
    """A server that forks must not give the same noise to all of its workers."""
    smoothed = smooth_pipeline(Tensors(half_space()), sigma=0.5, n=100_000)
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    workers = [context.Process(target=_ask, args=(smoothed, queue)) for _ in range(2)]
    for worker in workers:
        worker.start()
    counts = [tuple(found) for _ in workers for found in queue.get(timeout=60)]
    for worker in workers:
        worker.join()
    assert len(set(counts)) == 6


def test_it_answers_as_certified(vit_pipeline, images):
    report = certify_pipeline(vit_pipeline, images, sigma=0.25, n=2000, seed=2, progress=False)
    assert report.abstentions < len(images)
    names = vit_pipeline.model.config.id2label
    answers = smooth_pipeline(vit_pipeline, sigma=0.25, n=1000, seed=3)(images, top_k=1)
    for certificate, (entry,) in zip(report.certificates, answers, strict=True):
        if not certificate.abstained:
            assert entry["label"] in (names[certificate.label], ABSTAIN)


def test_saved_and_loaded_it_gives_the_same_answers(vit_pipeline, images, tmp_path):
    smoothed = smooth_pipeline(vit_pipeline, 0.25, 300, 0.01, batch_size=50, seed=1)
    smoothed.save_pretrained(tmp_path / "model")
    loaded = SmoothedPipeline.from_pretrained(tmp_path / "model", seed=1)
    assert loaded.config == smoothed.config
    assert loaded(images) == smoothed(images)
    stored = json.loads((tmp_path / "model" / "smoothing.json").read_text())
    assert stored == {
        "schema": 1,
        "task": "image-classification",
        "space": "raw pixels in [0, 1] at model resolution",
        "sigma": 0.25,
        "n": 300,
        "alpha": 0.01,
        "batch_size": 50,
    }
    # the seed stays a secret
    assert SmoothedPipeline.from_pretrained(tmp_path / "model").config.seed is None


def test_a_folder_that_was_not_saved_or_was_edited_is_refused(vit_pipeline, tmp_path):
    vit_pipeline.save_pretrained(tmp_path)
    with pytest.raises(ReportFolderError, match=r"must have a readable smoothing\.json"):
        SmoothedPipeline.from_pretrained(tmp_path)
    smooth_pipeline(vit_pipeline, sigma=0.25).save_pretrained(tmp_path)
    path = tmp_path / "smoothing.json"
    values = json.loads(path.read_text())
    path.write_text(json.dumps(values | {"schema": 9}))
    with pytest.raises(ReportFolderError, match="with schema 1, got"):
        SmoothedPipeline.from_pretrained(tmp_path)
    path.write_text(json.dumps(values | {"space": "raw audio"}))
    with pytest.raises(
        UnsupportedModelError, match="must have the space that it was saved with, 'raw audio', got 'raw"
    ):
        SmoothedPipeline.from_pretrained(tmp_path)


def test_what_cannot_answer_is_refused(vit_pipeline):
    with pytest.raises(
        ValueError, match=r"n must be at least 11 for alpha=0\.001, got 10: every answer would abstain"
    ):
        smooth_pipeline(vit_pipeline, sigma=0.25, n=10)
    with pytest.raises(ValueError, match="sigma must be finite and > 0"):
        smooth_pipeline(vit_pipeline, sigma=0.0)
    with pytest.raises(ValueError, match="top_k must be an int >= 1 or None, got 0"):
        smooth_pipeline(vit_pipeline, sigma=0.25)("image.png", top_k=0)
    with pytest.raises(UnsupportedModelError, match="Only a smoothed transformers pipeline can be saved, got Tensors"):
        smooth_pipeline(Tensors(half_space()), sigma=0.25).save_pretrained("nowhere")
    several = Tensors(half_space())
    several.outputs = (3,)
    with pytest.raises(UnsupportedModelError, match="must give one answer to an input"):
        smooth_pipeline(several, sigma=0.25)
    vit_pipeline.model.config.id2label = {0: "a", 1: "ABSTAIN", 2: "c"}
    with pytest.raises(UnsupportedModelError, match="No class may be named 'ABSTAIN'"):
        smooth_pipeline(vit_pipeline, sigma=0.25)
    training = make_vit_pipeline()
    training.model.train()
    with pytest.raises(UnsupportedModelError, match="must be in evaluation mode"):
        smooth_pipeline(training, sigma=0.25)


@pytest.mark.parametrize("alpha", [0.5, 2**-10, 0.001, 0.2])
def test_the_least_number_of_votes_is_the_least_that_can_decide(alpha):
    """Oracle: predictions from unanimous votes."""
    least = next(n for n in range(1, 99) if Prediction.from_counts([n, 0], alpha=alpha).label == 0)
    smooth_pipeline(Tensors(half_space()), sigma=0.5, n=least, alpha=alpha)
    if least > 1:
        with pytest.raises(ValueError, match=f"n must be at least {least} "):
            smooth_pipeline(Tensors(half_space()), sigma=0.5, n=least - 1, alpha=alpha)
