"""Certification: draws in a second, and the part of them that is not the model's own work."""

from collections.abc import Iterator

import torch
from torch import nn

from benchmarks.registry import Row, alternate, benchmark, ratio
from hf_certify import SmoothedClassifier

DRAWS = 8192


@benchmark
def certify() -> Iterator[Row]:
    """Yield the time to draw and count over the time of the bare forward passes, by size of the model."""
    for width in (8, 32):
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Conv2d(3, width, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(width * 49, 10),
        ).eval()
        image = torch.rand(3, 28, 28)
        smoothed = SmoothedClassifier(model, sigma=0.5, num_classes=10, batch_size=512, seed=0)
        certificate = smoothed.certify(image, n0=128, n=DRAWS)
        certificate.verify()

        def draw(smoothed: SmoothedClassifier = smoothed, image: torch.Tensor = image) -> None:
            smoothed.certify(image, n0=128, n=DRAWS)

        def forward(model: nn.Sequential = model, image: torch.Tensor = image) -> None:
            batch = image.expand(512, -1, -1, -1).contiguous()
            with torch.inference_mode():
                for _ in range((DRAWS + 128) // 512 + 1):
                    model(batch)

        times = alternate({"certify": draw, "forward": forward}, rounds=9)
        row = ratio(times, "certify", "forward")
        yield {"width": width, "draws_per_second": round((DRAWS + 128) / row["milliseconds"] * 1e3), **row}
