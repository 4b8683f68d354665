"""One call from a pipeline to a report."""

import os
from pathlib import Path

import datasets
import numpy as np
import pandas
import pytest
import torch
from PIL import Image
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel, ViTImageProcessorPil, pipeline
from transformers.modeling_outputs import ImageClassifierOutput

from hf_certify import (
    CertificationReport,
    InputImageError,
    ReportFolderError,
    SmoothedClassifier,
    UnsupportedModelError,
    certify_pipeline,
)
from hf_certify.spaces.image import ImageSpace

SETTINGS = {"sigma": 0.25, "n": 500, "seed": 3, "progress": False}


def certify(pipe: object, inputs: object, **settings: object) -> CertificationReport:
    return certify_pipeline(pipe, inputs, **(SETTINGS | settings))


def test_report_is_that_of_the_smoothed_classifier_input_by_input(vit_pipeline, images):
    """Oracle: the parts put together by hand."""
    space = ImageSpace(vit_pipeline)
    smoothed = SmoothedClassifier(space.model, sigma=0.25, num_classes=3, seed=3, batch_size=256)
    report = certify(vit_pipeline, images)
    expected = tuple(smoothed.certify(space.encode(image, i).x, n=500, index=i) for i, image in enumerate(images))
    assert report.certificates == expected
    assert not all(certificate.abstained for certificate in report.certificates)
    report.verify()


def test_every_kind_of_collection_gives_the_same_certificates(vit_pipeline, images):
    """A list, a generator, arrays, and a column of a datasets.Dataset that decodes lazily."""
    column = datasets.Dataset.from_dict({"image": images}, datasets.Features({"image": datasets.Image()}))["image"]
    expected = certify(vit_pipeline, images).certificates
    for inputs in ((image for image in images), [np.asarray(image) for image in images], column):
        assert certify(vit_pipeline, inputs).certificates == expected


def test_paths_give_the_certificates_of_their_images_and_are_recorded(vit_pipeline, images, image_folder):
    paths = sorted(image_folder.glob("*.png"))
    from_paths, from_images = certify(vit_pipeline, paths), certify(vit_pipeline, images)
    assert [certificate.source for certificate in from_paths.certificates] == [str(path) for path in paths]
    assert [c.estimation for c in from_paths.certificates] == [c.estimation for c in from_images.certificates]


def test_a_longer_list_leaves_the_certificates_of_its_beginning_alone(vit_pipeline, images):
    assert certify(vit_pipeline, images[:2]).certificates == certify(vit_pipeline, images).certificates[:2]


def test_equal_images_at_two_places_have_independent_noise(vit_pipeline, images):
    first, second = certify(vit_pipeline, [images[0]] * 2).certificates
    assert first.estimation != second.estimation


def test_seed_none_draws_one_and_records_it(vit_pipeline, images):
    report = certify(vit_pipeline, images[:1], seed=None)
    assert report.seed is not None
    assert certify(vit_pipeline, images[:1], seed=report.seed).certificates == report.certificates


def test_report_records_what_the_result_depends_on(vit_pipeline, images):
    report = certify(vit_pipeline, images)
    assert report.config.batch_size == 256
    assert report.facts["input_shapes"] == [[3, 8, 8]]
    assert report.facts["processor"] == "ViTImageProcessorPil"
    assert report.facts["processor_backend"] == "pil"
    assert report.facts["processor_config"]["image_mean"] == [0.5, 0.5, 0.5]
    assert report.facts["model"] == "ViTForImageClassification"
    assert report.facts["threads"] == torch.get_num_threads()
    assert report.facts["versions"]["torch"] == torch.__version__
    with torch.no_grad():
        next(vit_pipeline.model.parameters()).add_(1.0)
    assert certify(vit_pipeline, images).facts["weights_sha256"] != report.facts["weights_sha256"]


def test_progress_counts_draws(vit_pipeline, images, capsys):
    certify(vit_pipeline, images[:2], progress=True)
    assert "1.20k/1.20k" in capsys.readouterr().err


def test_the_pipeline_is_left_as_it_was(vit_pipeline, images):
    before = vit_pipeline(images[0])
    certify(vit_pipeline, images)
    assert vit_pipeline(images[0]) == before


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"sigma": -1.0}, ValueError, "sigma must be finite and > 0, got -1.0"),
        ({"alpha": 0}, ValueError, r"alpha must be in \(0, 1\), got 0"),
        ({"n": -5}, ValueError, "n must be an int >= 1, got -5"),
        ({"n": True}, TypeError, "n must be an int >= 1, got True of type bool"),
        ({"n0": 2.5}, TypeError, "n0 must be an int >= 1, got 2.5"),
        ({"n": 11, "interval": "cpm"}, ValueError, "n must be at least 12 for interval='cpm'"),
        ({"interval": "hoeffding"}, ValueError, "interval must be one of .* got 'hoeffding'"),
        ({"batch_size": -1}, ValueError, "batch_size must be an int >= 1 or 'auto', got -1"),
        ({"inputs": []}, ValueError, "inputs must hold at least one input, got none"),
        ({"inputs": iter(())}, ValueError, "inputs must hold at least one input, got none"),
        ({"inputs": "image.png"}, TypeError, "inputs must be a list, .* got str: wrap a single input in a list"),
        ({"inputs": 3}, TypeError, "inputs must be a list, .* got int"),
        ({"inputs": np.zeros((20, 20, 3), np.uint8)}, TypeError, r"got one array of shape \[20, 20, 3\]: its rows"),
        ({"inputs": datasets.Dataset.from_dict({"a": [1]})}, TypeError, "whole Dataset: pass a column of it"),
        ({"sigma": 1e-4, "inputs": ["nowhere.png"]}, ValueError, "sigma must be at least .* float32 would round"),
        ({"sigma": 1e39}, ValueError, "sigma must be at most"),
        ({"alpha": 1e-200}, ValueError, "alpha must be at least 1e-100"),
    ],
)
def test_mistakes_are_refused_with_one_sentence_before_any_forward_pass(
    settings, error, message, vit_pipeline, images
):
    vit_pipeline.model.register_forward_hook(lambda *_: pytest.fail("the model was run"))
    with pytest.raises(error, match=message):
        certify(vit_pipeline, **({"inputs": images} | settings))


def test_a_bad_image_at_the_end_is_found_before_any_forward_pass(vit_pipeline, images):
    vit_pipeline.model.register_forward_hook(lambda *_: pytest.fail("the model was run"))
    with pytest.raises(InputImageError, match=r"Input 4 must be a readable image file, got 'nowhere\.png'"):
        certify(vit_pipeline, [*images, "nowhere.png"])


def test_a_single_pil_image_is_refused_with_the_way_out(vit_pipeline, images):
    with pytest.raises(TypeError, match="got Image: wrap a single input in a list"):
        certify(vit_pipeline, images[0])


class DigitConfig(PreTrainedConfig):
    model_type = "digit-net"
    num_channels = 1


class DigitModel(PreTrainedModel):
    """A random convnet for one channel, as a user would wrap it."""

    config_class = DigitConfig

    def __init__(self, config: DigitConfig) -> None:
        super().__init__(config)
        self.net = nn.Sequential(nn.Conv2d(1, 4, 3, stride=2), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(1))
        self.head = nn.Linear(4 * 13 * 13, 10)
        self.post_init()

    def forward(self, pixel_values: torch.Tensor) -> ImageClassifierOutput:
        return ImageClassifierOutput(logits=self.head(self.net(pixel_values)))


def test_a_users_own_gray_convnet_is_certified_through_a_real_pipeline():
    """Arrays and gray PIL images of 28x28 give the same certificates; a model left in training mode is refused."""
    torch.manual_seed(0)
    processor = ViTImageProcessorPil(size={"height": 28, "width": 28}, image_mean=[0.13], image_std=[0.31])
    pipe = pipeline("image-classification", model=DigitModel(DigitConfig(num_labels=10)), image_processor=processor)
    digits = list(np.random.default_rng(0).integers(0, 256, (3, 28, 28), dtype=np.uint8))
    with pytest.raises(UnsupportedModelError, match=r"must be in evaluation mode, .*call model\.eval\(\)"):
        certify(pipe, digits)
    pipe.model.eval()
    report = certify(pipe, digits)
    assert report.facts["input_shapes"] == [[1, 28, 28]]
    assert certify(pipe, [Image.fromarray(digit) for digit in digits]).certificates == report.certificates


def test_a_series_with_labels_of_its_own_keeps_the_order_of_its_values(vit_pipeline, images):
    """Oracle: the list. Label 0 of this series is its last value."""
    series = pandas.Series(images[:3], index=[2, 1, 0])
    assert certify(vit_pipeline, series).certificates == certify(vit_pipeline, images[:3]).certificates


def test_an_array_of_images_is_a_collection(vit_pipeline, images):
    array = np.stack([np.asarray(image.resize((9, 9))) for image in images])
    assert certify(vit_pipeline, array).certificates == certify(vit_pipeline, list(array)).certificates


class ExtraState(nn.Module):
    def get_extra_state(self) -> dict[str, int]:
        return {"steps": 3}

    def set_extra_state(self, state: object) -> None:
        pass


def test_odd_names_of_model_classes_and_files_never_cost_a_finished_run(vit_pipeline, images, tmp_path):
    """The report is saved and loads as it was."""
    path = Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.png"))
    images[0].save(path)
    vit_pipeline.model.config.id2label = {0: 7, "1": "b", 2: None}
    vit_pipeline.model.config._name_or_path = tmp_path
    vit_pipeline.model.extra = ExtraState().eval()
    report = certify(vit_pipeline, [path])
    report.save(tmp_path / "out")
    assert CertificationReport.load(tmp_path / "out") == report
    assert report.facts["labels"] == {"0": "7", "1": "b", "2": "None"}


def test_what_could_not_be_saved_is_refused_before_any_forward_pass(vit_pipeline, images):
    vit_pipeline.model.register_forward_hook(lambda *_: pytest.fail("the model was run"))
    vit_pipeline.model.config.id2label = {0: "a", "0": "b", 1: "c"}
    with pytest.raises(UnsupportedModelError, match=r"one name for each of 3 classes.*Set model\.config\.id2label"):
        certify(vit_pipeline, images)
    vit_pipeline.model.config.id2label = {0: "a", 1: "b", 2: "c"}
    # JSON as Python writes it holds NaN, canonical JSON does not
    vit_pipeline.image_processor.threshold = float("nan")
    with pytest.raises(ReportFolderError, match="must hold plain values only"):
        certify(vit_pipeline, images)
