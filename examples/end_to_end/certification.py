"""Part 3: a digit classifier trained with noise, wrapped as a pipeline and certified by randomized smoothing.

The pipeline turns every image into RGB, so noise and radius live in three equal channels: a change of the gray digit
by ``d`` has the l2 norm ``sqrt(3) * d`` there. The report gives both.
"""

import math
import tempfile
import time
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import (
    ResNetConfig,
    ResNetForImageClassification,
    Trainer,
    ViTImageProcessorPil,
    pipeline,
)

from examples.end_to_end.data import mnist_subset
from examples.end_to_end.training import training_arguments
from hf_certify import certify_pipeline

SIGMA = 0.5
DRAWS = 10_000
SELECTION_DRAWS = 100
ALPHA = 0.001
RADII = (0.0, 0.25, 0.5, 0.75)
CERTIFIED_IMAGES = 100
STEPS = 600
BATCH = 64
# the first is the rule that was chosen before the draws; the others re-read the same votes for comparison
INTERVALS = ("max_upper", "cohen", "cpm")
MEAN, STD = 0.1307, 0.3081


class NoisyBatches:
    """A collator that adds the noise of the smoothed classifier in raw pixels, then normalises as the processor does.

    Args:
        sigma: Standard deviation, for pixels in ``[0, 1]``.
        seed: Seed of the noise.
    """

    def __init__(self, sigma: float, seed: int) -> None:
        self.sigma = sigma
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self, examples: list[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
        """Return ``pixel_values`` ``[B, 3, 28, 28]`` and ``labels`` ``[B]``."""
        raw = torch.stack([image for image, _ in examples]).expand(-1, 3, -1, -1)
        noisy = raw + self.sigma * torch.randn(raw.shape, generator=self.generator)
        return {"pixel_values": (noisy - MEAN) / STD, "labels": torch.stack([label for _, label in examples])}


def train(images: Tensor, labels: Tensor, *, seed: int) -> ResNetForImageClassification:
    """Train a small ResNet on noisy digits through transformers' Trainer and return it in eval mode."""
    torch.manual_seed(seed)
    config = ResNetConfig(
        num_channels=3,
        embedding_size=24,
        hidden_sizes=[24, 48],
        depths=[1, 1],
        layer_type="basic",
        num_labels=10,
    )
    model = ResNetForImageClassification(config)
    with tempfile.TemporaryDirectory() as folder:
        arguments = training_arguments(
            folder,
            steps=STEPS,
            batch=BATCH,
            learning_rate=3e-3,
            warmup=50,
            seed=seed,
            remove_unused_columns=False,
        )
        dataset = torch.utils.data.TensorDataset(images, labels)
        Trainer(model, arguments, data_collator=NoisyBatches(SIGMA, seed), train_dataset=dataset).train()
    return model.eval()


def run(seed: int = 0) -> dict[str, Any]:
    """Return every figure of this part."""
    start = time.perf_counter()
    pixels, digits = mnist_subset()
    held_back = slice(len(digits) - CERTIFIED_IMAGES, None)
    training = slice(0, len(digits) - CERTIFIED_IMAGES)
    raw = torch.from_numpy(pixels[training][:, None].astype(np.float32) / 255)
    model = train(raw, torch.from_numpy(digits[training]), seed=seed)
    processor = ViTImageProcessorPil(
        do_resize=False, do_rescale=True, do_normalize=True, image_mean=[MEAN] * 3, image_std=[STD] * 3
    )
    pipe = pipeline("image-classification", model=model, image_processor=processor)
    images = [Image.fromarray(image).convert("RGB") for image in pixels[held_back]]
    labels = digits[held_back].tolist()
    trained = time.perf_counter()
    report = certify_pipeline(
        pipe, images, sigma=SIGMA, n0=SELECTION_DRAWS, n=DRAWS, alpha=ALPHA, interval=INTERVALS[0], seed=seed
    )
    intervals = {}
    for name in INTERVALS:
        view = report if name == INTERVALS[0] else report.with_interval(name)
        view.verify()
        gray = [radius * math.sqrt(3) for radius in RADII]
        intervals[name] = {
            "certified_accuracy": dict(zip(map(str, RADII), view.certified_accuracy(labels, RADII), strict=True)),
            "certified_accuracy_gray": dict(zip(map(str, RADII), view.certified_accuracy(labels, gray), strict=True)),
            "average_certified_radius": view.average_certified_radius(labels),
            "abstentions": view.abstentions,
            "draws_per_image": view.draws_per_input,
            "radii": [
                c.radius if c.label == label else 0.0 for c, label in zip(view.certificates, labels, strict=True)
            ],
        }
    return {
        "seed": seed,
        "sigma": SIGMA,
        "alpha": ALPHA,
        "images": len(images),
        "training_images": len(digits) - CERTIFIED_IMAGES,
        "parameters": model.num_parameters(),
        "chosen_before_the_draws": INTERVALS[0],
        "intervals": intervals,
        "seconds": {"train": trained - start, "certify": time.perf_counter() - trained},
    }
