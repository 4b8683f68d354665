"""Pipelines as functions of raw pixels."""

import io
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel, ViTImageProcessorPil
from transformers.modeling_outputs import ImageClassifierOutput

from hf_certify import (
    InputImageError,
    SmoothedClassifier,
    UnsupportedModelError,
    UnsupportedProcessorError,
)
from hf_certify.noise import Stage, draw_noise
from hf_certify.spaces import space_of
from hf_certify.spaces.image import ImageSpace, _probe
from tests.certify.conftest import make_vit_pipeline

PROCESSORS = {
    "default": {},
    "imagenet": {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]},
    "scalar": {"image_mean": 0.1307, "image_std": 0.3081},
    "no normalise": {"do_normalize": False},
    "no rescale": {"do_rescale": False, "do_normalize": False},
    "normalise bytes": {"do_rescale": False, "image_mean": [127.0] * 3, "image_std": [128.0] * 3},
    "other factor": {"rescale_factor": 1 / 127.5, "image_mean": [1.0] * 3, "image_std": [1.0] * 3},
}


class LinearConfig(PreTrainedConfig):
    model_type = "linear-pixels"


class LinearModel(PreTrainedModel):
    """A fixed linear classifier of raw pixels, behind whatever normalisation its processor has: undone by formula."""

    config_class = LinearConfig

    def __init__(self, config: LinearConfig, processor: ViTImageProcessorPil, channels: int = 3) -> None:
        super().__init__(config)
        generator = torch.Generator().manual_seed(2)
        self.weight = torch.nn.Parameter(torch.randn(3, channels * 64, generator=generator))
        self.processor = processor
        self.seen: list[Tensor] = []
        self.eval()

    def forward(self, pixel_values: Tensor) -> ImageClassifierOutput:
        pixels = pixel_values.double()
        if self.processor.do_normalize:
            mean, std = (
                torch.tensor(np.broadcast_to(np.atleast_1d(value), (pixels.shape[1],)).copy())[:, None, None]
                for value in (self.processor.image_mean, self.processor.image_std)
            )
            pixels = pixels * std + mean
        if self.processor.do_rescale:
            pixels = pixels / self.processor.rescale_factor
        raw = pixels / 255
        self.seen.append(raw)
        return ImageClassifierOutput(logits=(raw - 0.5).flatten(1).float() @ self.weight.T)


def linear_pipeline(settings: dict[str, object], channels: int = 3) -> SimpleNamespace:
    processor = ViTImageProcessorPil(**({"size": {"height": 8, "width": 8}} | settings))
    config = LinearConfig(num_labels=3, num_channels=channels)
    return SimpleNamespace(
        task="image-classification", model=LinearModel(config, processor, channels), image_processor=processor
    )


@pytest.mark.parametrize("name", PROCESSORS)
def test_encode_and_normalize_reproduce_the_pixel_values_of_the_pipeline(name, images):
    """Oracle: the pipeline's own preprocessing."""
    pipe = make_vit_pipeline(**PROCESSORS[name])
    space = ImageSpace(pipe)
    for position, image in enumerate(images):
        raw = space.encode(image, position).x
        assert raw.dtype == torch.float32
        assert raw.shape == (3, 8, 8)
        assert 0 <= raw.min() <= raw.max() <= 1
        expected = pipe.preprocess(image)["pixel_values"].float()
        torch.testing.assert_close(
            space.model.normalize(raw)[None], expected, rtol=1e-5, atol=1e-5 * expected.abs().max()
        )


@pytest.mark.parametrize("name", PROCESSORS)
def test_clean_logits_are_those_of_the_pipeline(name, images):
    """Oracle: the pipeline itself, one image at a time."""
    pipe = make_vit_pipeline(**PROCESSORS[name])
    space = ImageSpace(pipe)
    for position, image in enumerate(images):
        with torch.inference_mode():
            logits = space.model(space.encode(image, position).x[None])[0]
        scores = {item["label"]: item["score"] for item in pipe(image, function_to_apply="none")}
        expected = [scores[pipe.model.config.id2label[label]] for label in range(3)]
        np.testing.assert_allclose(logits.numpy(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", PROCESSORS)
def test_the_model_sees_the_image_plus_noise_of_sigma_in_raw_pixels(name, images):
    """Oracle: the model undoes its processor's formula; what it then sees must be image / 255 + sigma * noise."""
    pipe = linear_pipeline(PROCESSORS[name])
    space = ImageSpace(pipe)
    smoothed = SmoothedClassifier(space.model, sigma=0.25, num_classes=3, seed=9, batch_size=64)
    smoothed.predict(space.encode(images[0], 0).x, n=64, index=0)
    resized = np.asarray(images[0].resize((8, 8), Image.Resampling.BILINEAR)).transpose(2, 0, 1)
    (noise,) = draw_noise((3, 8, 8), 64, seed=9, index=0, stage=Stage.PREDICTION)
    expected = torch.from_numpy(resized / 255) + 0.25 * noise.double()
    torch.testing.assert_close(pipe.model.seen[-1], expected, rtol=0, atol=2e-6)


def test_certificates_do_not_depend_on_the_normalisation(images):
    """One classifier of raw pixels behind seven processors: the votes, and so the radii, are the same."""
    certificates = set()
    for settings in PROCESSORS.values():
        space = ImageSpace(linear_pipeline(settings))
        smoothed = SmoothedClassifier(space.model, sigma=0.25, num_classes=3, seed=9)
        certificates.add(smoothed.certify(space.encode(images[0], 0).x, n=2000))
    assert len(certificates) == 1


def test_a_gray_model_takes_arrays_files_and_any_pil_image(tmp_path):
    """Oracle: the bytes themselves."""
    pixels = np.arange(64, dtype=np.uint8).reshape(8, 8)
    space = ImageSpace(linear_pipeline({"image_mean": [0.5], "image_std": [0.5]}, channels=1))
    Image.fromarray(pixels).save(tmp_path / "digit.png")
    gray = Image.fromarray(pixels)
    for image in (pixels, pixels[None], pixels[..., None], gray, gray.convert("RGB"), tmp_path / "digit.png"):
        assert torch.equal(space.encode(image, 0).x, torch.from_numpy(pixels / np.float32(255))[None])


def test_a_gray_image_is_replicated_for_a_model_of_colour():
    pixels = np.arange(64, dtype=np.uint8).reshape(8, 8)
    for image in (Image.fromarray(pixels), pixels):
        raw = ImageSpace(linear_pipeline({})).encode(image, 0).x
        assert torch.equal(raw, torch.from_numpy(pixels / np.float32(255)).expand(3, 8, 8))


@pytest.mark.parametrize("settings", [{"image_mean": 0.5, "image_std": 0.5}, {"do_normalize": False}])
def test_an_array_of_one_channel_for_a_model_of_colour_is_refused_with_the_way_out(settings):
    with pytest.raises(InputImageError, match=r"Input 2 must give 3 channels .*convert\('RGB'\)"):
        ImageSpace(linear_pipeline(settings)).encode(np.zeros((1, 8, 8), np.uint8), 2)


def test_an_array_that_does_not_fit_the_processor_is_refused_in_its_words():
    with pytest.raises(InputImageError, match="Input 2 must fit the image processor, which says: mean must have 1"):
        ImageSpace(linear_pipeline({})).encode(np.zeros((1, 8, 8), np.uint8), 2)


@pytest.mark.parametrize(
    ("image", "error", "message"),
    [
        (3.0, TypeError, "Input 5 must be a path, a PIL image or a uint8 array, got float"),
        ({"image": 1}, TypeError, "got dict: .* pass its image column"),
        (np.zeros((8, 8, 3)), TypeError, "got an array of float64: 8-bit values fix"),
        (np.zeros((1, 8, 8, 3), np.uint8), InputImageError, r"Input 5 must have shape .* got \[1, 8, 8, 3\]"),
        ("missing.png", InputImageError, "Input 5 must be a readable image file, got 'missing.png'"),
    ],
)
def test_inputs_that_are_not_images_are_refused_by_position(image, error, message, vit_pipeline):
    with pytest.raises(error, match=message):
        ImageSpace(vit_pipeline).encode(image, 5)


def test_a_damaged_file_is_refused_by_path(tmp_path, images, vit_pipeline):
    path = tmp_path / "half.png"
    images[2].save(path)
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(InputImageError, match=r"Input 1 must be a readable image file, got '.*half.png'"):
        ImageSpace(vit_pipeline).encode(path, 1)


class OffsetProcessor(ViTImageProcessorPil):
    def rescale(self, image: np.ndarray, scale: float, **kwargs: object) -> np.ndarray:
        return super().rescale(image, scale, **kwargs) - 1


class PaddingProcessor(ViTImageProcessorPil):
    def normalize(self, image: np.ndarray, mean: object, std: object, **kwargs: object) -> np.ndarray:
        padded = super().normalize(image, mean, std, **kwargs)
        padded[:, 0] = 0
        return padded


class TwoCropProcessor(ViTImageProcessorPil):
    def _preprocess(self, images: list[np.ndarray], **kwargs: object) -> object:
        return super()._preprocess(images * 2, **kwargs)


@pytest.mark.parametrize("kind", [OffsetProcessor, PaddingProcessor])
def test_a_processor_that_is_not_the_declared_affine_map_is_refused(kind, images, vit_pipeline):
    vit_pipeline.image_processor = kind(size={"height": 8, "width": 8})
    with pytest.raises(UnsupportedProcessorError, match=f"only rescale and normalise .* got {kind.__name__}"):
        ImageSpace(vit_pipeline).encode(images[0], 0)


def test_a_processor_of_several_crops_is_refused(images, vit_pipeline):
    vit_pipeline.image_processor = TwoCropProcessor(size={"height": 8, "width": 8})
    with pytest.raises(UnsupportedProcessorError, match="one tensor of pixel_values for an image"):
        ImageSpace(vit_pipeline).encode(images[0], 0)


@pytest.mark.parametrize(
    "settings", [{"image_std": [0.0] * 3}, {"rescale_factor": 0.0}, {"image_mean": [float("nan")] * 3}]
)
def test_a_processor_that_destroys_pixels_is_refused(settings, vit_pipeline):
    for name, value in settings.items():
        setattr(vit_pipeline.image_processor, name, value)
    with pytest.raises(UnsupportedProcessorError, match="the pixels could not be recovered"):
        ImageSpace(vit_pipeline)


def test_another_processor_backend_is_refused_with_the_way_out(vit_pipeline):
    vit_pipeline.image_processor = SimpleNamespace(backend="torchvision")
    with pytest.raises(UnsupportedProcessorError, match=r"'pil' backend, got 'torchvision' .* backend='pil'"):
        ImageSpace(vit_pipeline)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("num_labels", 1, "at least 2 classes, got num_labels=1"),
        ("problem_type", "multi_label_classification", "one label for an image, got problem_type='multi_label"),
    ],
)
def test_models_without_one_of_several_classes_are_refused(name, value, message, vit_pipeline):
    setattr(vit_pipeline.model.config, name, value)
    with pytest.raises(UnsupportedModelError, match=message):
        ImageSpace(vit_pipeline)


def test_other_pipelines_and_modes_are_refused(vit_pipeline):
    with pytest.raises(TypeError, match="pipe must be a transformers pipeline or a Space, got Linear"):
        space_of(torch.nn.Linear(2, 2))
    vit_pipeline.model.train()
    with pytest.raises(UnsupportedModelError, match="must be in evaluation mode"):
        ImageSpace(vit_pipeline)
    vit_pipeline.task = "text-generation"
    with pytest.raises(UnsupportedModelError, match=r"must be one of .*'image-classification'.* write a Space for it"):
        space_of(vit_pipeline)


def test_a_half_precision_model_runs_in_its_own_dtype(images, vit_pipeline):
    vit_pipeline.model.to(torch.bfloat16)
    space = ImageSpace(vit_pipeline)
    with torch.inference_mode():
        logits = space.model(space.encode(images[0], 0).x[None])
    assert logits.dtype == torch.bfloat16
    assert logits.shape == (1, 3)


class CubingProcessor(ViTImageProcessorPil):
    def rescale(self, image: np.ndarray, scale: float, **kwargs: object) -> np.ndarray:
        return super().rescale(image, scale, **kwargs) ** 3


@pytest.mark.parametrize(
    "settings",
    [{"size": {"height": 8, "width": 8}}, {"size": {"height": 300, "width": 300}}, {"do_resize": False}],
)
def test_a_processor_that_is_affine_on_black_and_white_alone_is_refused(settings, vit_pipeline):
    """A black and white image cannot tell x ** 3 from x; an image of all 8-bit values can."""
    vit_pipeline.image_processor = CubingProcessor(do_normalize=False, **settings)
    with pytest.raises(UnsupportedProcessorError, match="for an image of all 8-bit values differ"):
        ImageSpace(vit_pipeline)


@pytest.mark.parametrize(("mode", "channels"), [("RGB", 3), ("L", 1)])
def test_the_test_image_holds_every_value_in_every_channel(mode, channels):
    probe = _probe(mode).reshape(256 * 256, channels)
    assert all(len(np.unique(probe[:, channel])) == 256 for channel in range(channels))
    crop = Image.fromarray(_probe(mode)).resize((256, 256)).crop((32, 32, 224, 224))
    assert {0, 255} <= set(np.asarray(crop).reshape(-1, channels)[:, 0].tolist())


@pytest.mark.parametrize("shape", [(3, 16, 3), (3, 3, 3), (1, 16, 3), (4, 16, 3)])
def test_an_array_that_can_be_read_in_two_ways_is_refused(shape, vit_pipeline):
    """As a PIL image the same pixels are taken: those know their channels. Oracle: the first channel is red."""
    pixels = np.zeros(shape, np.uint8)
    pixels[..., 0] = 255
    space = ImageSpace(vit_pipeline)
    with pytest.raises(InputImageError, match=r"can be read in two ways: convert with Image\.fromarray"):
        space.encode(pixels, 0)
    assert space.encode(Image.fromarray(pixels), 0).x.mean((1, 2)).tolist() == [1, 0, 0]


def broken_png() -> bytes:
    """Return a PNG whose second chunk claims a wrong checksum and type, at which PIL raises SyntaxError."""
    file = io.BytesIO()
    Image.new("RGB", (64, 64)).save(file, "png")
    data = bytearray(file.getvalue())
    place = data.index(b"IDAT")
    data[place : place + 4] = b"\x00\x01\x02\x03"
    return bytes(data)


def test_whatever_a_broken_file_raises_names_the_input(tmp_path, vit_pipeline, monkeypatch):
    space = ImageSpace(vit_pipeline)
    (tmp_path / "broken.png").write_bytes(broken_png())
    with pytest.raises(InputImageError, match=r"Input 3 must be a readable image file, got '.*broken\.png'"):
        space.encode(tmp_path / "broken.png", 3)
    Image.new("RGB", (64, 64)).save(tmp_path / "bomb.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(InputImageError, match=r"Input 3 .*bomb\.png': .*exceeds limit"):
        space.encode(tmp_path / "bomb.png", 3)


def test_a_lazily_opened_image_that_cannot_be_read_names_the_input(tmp_path, images, vit_pipeline):
    path = tmp_path / "half.png"
    images[2].save(path)
    path.write_bytes(path.read_bytes()[:200])
    with Image.open(path) as opened, pytest.raises(InputImageError, match=r"Input 1 .* got '.*half\.png'"):
        ImageSpace(vit_pipeline).encode(opened, 1)


def test_a_folder_among_the_inputs_is_refused_with_the_way_out(tmp_path, vit_pipeline):
    with pytest.raises(InputImageError, match=r"got the folder .*: pass the files in it: sorted\(Path\(.*glob"):
        ImageSpace(vit_pipeline).encode(tmp_path, 0)


@pytest.mark.parametrize(
    "settings", [{"rescale_factor": None}, {"image_std": [0.5] * 2}, {"image_std": "half"}, {"image_mean": [None] * 3}]
)
def test_processor_settings_that_are_no_numbers_of_one_length_are_refused(settings, vit_pipeline):
    for name, value in settings.items():
        setattr(vit_pipeline.image_processor, name, value)
    with pytest.raises(UnsupportedProcessorError, match="image_mean and image_std of one length, got"):
        ImageSpace(vit_pipeline)


def test_more_means_than_channels_are_refused(vit_pipeline):
    vit_pipeline.image_processor.image_mean = vit_pipeline.image_processor.image_std = [0.5] * 4
    with pytest.raises(UnsupportedProcessorError, match="must hold 1 or 3 values for a model of 3 channels, got 4"):
        ImageSpace(vit_pipeline)


def test_a_head_of_another_width_than_num_labels_is_refused_with_the_name_of_the_setting(images, vit_pipeline):
    vit_pipeline.model.config.num_labels = 5
    space = ImageSpace(vit_pipeline)
    with pytest.raises(UnsupportedModelError, match=r"config\.num_labels=5 for each image, got shape \[1, 3\]"):
        space.model(space.encode(images[0], 0).x[None])


def test_a_model_that_returns_a_tuple_is_refused_with_the_way_out(images, vit_pipeline):
    """Whether its settings say so or only its output does."""
    space = ImageSpace(vit_pipeline)
    vit_pipeline.model.forward = lambda pixel_values: (torch.zeros(1, 3),)
    with pytest.raises(UnsupportedModelError, match=r"got tuple: set model\.config\.return_dict = True"):
        space.model(space.encode(images[0], 0).x[None])
    vit_pipeline.model.config.return_dict = False
    with pytest.raises(UnsupportedModelError, match=r"got return_dict=False: set model\.config\.return_dict = True"):
        ImageSpace(vit_pipeline)
