"""Shared pipelines and images: tiny, random, offline."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    ImageClassificationPipeline,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessorPil,
    pipeline,
)

torch.set_num_threads(1)


def make_vit_pipeline(**processor_settings: object) -> ImageClassificationPipeline:
    """Return a random 3-class ViT for 8x8 images with its processor; the same weights at every call."""
    torch.manual_seed(0)
    config = ViTConfig(
        image_size=8,
        patch_size=4,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_labels=3,
        # the default of .02 makes all logits equal to within noise
        initializer_range=0.5,
    )
    settings = {"size": {"height": 8, "width": 8}} | processor_settings
    return pipeline(
        "image-classification",
        model=ViTForImageClassification(config).eval(),
        image_processor=ViTImageProcessorPil(**settings),
    )


@pytest.fixture
def vit_pipeline() -> ImageClassificationPipeline:
    return make_vit_pipeline()


@pytest.fixture
def images() -> list[Image.Image]:
    """Four RGB images of different sizes, none of them the size of the model."""
    generator = np.random.default_rng(0)
    shapes = [(9, 8), (8, 11), (20, 16), (5, 5)]
    return [Image.fromarray(generator.integers(0, 256, (*shape, 3), dtype=np.uint8)) for shape in shapes]


@pytest.fixture
def image_folder(tmp_path: Path, images: list[Image.Image]) -> Path:
    folder = tmp_path / "images"
    folder.mkdir()
    for number, image in enumerate(images):
        image.save(folder / f"{number}.png")
    (folder / "notes.txt").write_text("not an image")
    return folder
