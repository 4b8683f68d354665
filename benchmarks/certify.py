"""Certification: what the counting loop adds to the forward passes, against a plain loop, and its memory.

All of it in float32, noise of standard deviation 0.5.
"""

import functools
import statistics
from collections.abc import Callable, Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import ViTConfig, ViTForImageClassification

from benchmarks.certify_memory import memory
from benchmarks.registry import Row, alternate, benchmark, ratio, target
from hf_certify import SmoothedClassifier
from hf_certify.noise import Stage, draw_noise

SIGMA = 0.5
CLASSES = 10
VIT_DRAWS = 256
VIT_BATCHES = (16, 32, 64)
CONVNET_DRAWS = 8192
PLAIN_BATCHES = (64, 256, 1024)


@benchmark
def certify() -> Iterator[Row]:
    """Yield the rows of all parts."""
    for part, rows in {"forward": over_forward, "plain": over_plain, "memory": memory}.items():
        for row in rows():
            yield {"part": part, **row}


def over_forward() -> Iterator[Row]:
    """Yield the time of the loop over that of bare forward passes of a ViT, then its share of their throughput."""
    torch.manual_seed(0)
    config = ViTConfig(
        image_size=32,
        patch_size=4,
        hidden_size=192,
        intermediate_size=768,
        num_hidden_layers=5,
        num_attention_heads=3,
        num_labels=CLASSES,
    )
    model = ViTForImageClassification(config).eval()
    image = torch.rand(3, 32, 32)
    gate(model, image, rows=32, draws=100)
    cases: dict[str, Callable[[], object]] = {}
    for rows in VIT_BATCHES:
        smoothed = SmoothedClassifier(model, sigma=SIGMA, batch_size=rows, seed=0)
        cases[f"loop {rows}"] = functools.partial(smoothed.predict, image, n=VIT_DRAWS)
        cases[f"forward {rows}"] = functools.partial(forward, model, image, rows, VIT_DRAWS)
    times = alternate(cases, rounds=9)
    for rows in VIT_BATCHES:
        figures = ratio(times, f"loop {rows}", f"forward {rows}")
        speed = round(1e3 * VIT_DRAWS / figures["milliseconds"])
        yield {
            "model": "ViT",
            "parameters": model.num_parameters(),
            "batch": rows,
            "draws_per_second": speed,
            **figures,
        }
    # a slow moment of one round must hit both
    shares = [
        min(times[f"forward {rows}"][number] for rows in VIT_BATCHES)
        / min(times[f"loop {rows}"][number] for rows in VIT_BATCHES)
        for number in range(len(times["loop 16"]))
    ]
    share = statistics.median(shares)
    yield {"case": "share of forward passes alone, best batch of each", "share": share, **target(share, at_least=0.95)}


def over_plain() -> Iterator[Row]:
    """Yield the time of a plain loop over that of this one, by the batch size of the plain one."""
    for width in (8, 16):
        model = convnet(width)
        image = torch.rand(3, 32, 32)
        gate(model, image, rows=256, draws=1000)
        smoothed = SmoothedClassifier(model, sigma=SIGMA, num_classes=CLASSES, seed=0)
        cases: dict[str, Callable[[], object]] = {
            f"plain {rows}": functools.partial(plain, model, image, rows, CONVNET_DRAWS) for rows in PLAIN_BATCHES
        }
        cases["loop"] = functools.partial(smoothed.predict, image, n=CONVNET_DRAWS)
        times = alternate(cases, rounds=9)
        best = min(PLAIN_BATCHES, key=lambda rows: statistics.median(times[f"plain {rows}"]))
        for rows in PLAIN_BATCHES:
            figures = ratio(times, f"plain {rows}", "loop")
            speed = round(1e-3 * CONVNET_DRAWS / statistics.median(times["loop"]), 1)
            limit = target(figures["ratio"], at_least=1.3 if rows == best else None)
            yield {"model": f"convnet {width}", "batch": rows, "thousand_draws_per_second": speed, **figures, **limit}


def convnet(width: int) -> nn.Module:
    """Return two convolutions and a linear head for 3 x 32 x 32 pixels, in evaluation mode."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, width, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(width, width, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(width * 64, CLASSES),
    ).eval()


@torch.no_grad()
def plain(model: nn.Module, image: Tensor, rows: int, draws: int) -> NDArray[np.int64]:
    """Count votes as one writes it first: copies of the image, noise, argmax, a count on the host for each batch."""
    counts = np.zeros(CLASSES, dtype=np.int64)
    for first in range(0, draws, rows):
        batch = image.repeat((min(rows, draws - first), 1, 1, 1))
        noisy = batch + SIGMA * torch.randn_like(batch)
        labels = model(noisy).argmax(1).cpu().numpy()
        counts += np.bincount(labels, minlength=CLASSES)
    return counts


@torch.inference_mode()
def forward(model: nn.Module, image: Tensor, rows: int, draws: int) -> None:
    """Run the model on as many rows, without noise or votes."""
    batch = image.expand(rows, -1, -1, -1).contiguous()
    for _ in range(0, draws, rows):
        model(batch)


@torch.inference_mode()
def gate(model: nn.Module, image: Tensor, *, rows: int, draws: int) -> None:
    """Raise unless the loop counts the votes that the model casts on the noise of the run, made all at once.

    Raises:
        AssertionError: If it does not.
    """
    smoothed = SmoothedClassifier(model, sigma=SIGMA, num_classes=CLASSES, batch_size=rows, seed=0)
    chunks = draw_noise(tuple(image.shape), draws, seed=0, index=7, stage=Stage.PREDICTION)
    noise = torch.cat([chunk.clone() for chunk in chunks])
    # in the shape of the run, the last batch filled up, so that not even rounding differs
    padded = torch.cat([noise, noise.new_zeros(-draws % rows, *image.shape)])
    outputs = [model(image + SIGMA * batch) for batch in padded.split(rows)]
    logits = torch.cat([getattr(output, "logits", output) for output in outputs])[:draws]
    expected = logits.argmax(1).bincount(minlength=CLASSES).tolist()
    found = smoothed.predict(image, n=draws, index=7).counts
    if list(found) != expected:
        raise AssertionError(f"the loop counts {found}, the votes are {expected}")
