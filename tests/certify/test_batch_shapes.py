"""What the number of rows of a forward pass changes: the last bits of logits, and votes that hang on them."""

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from hf_certify.noise import Stage, draw_noise
from hf_certify.perturbation import GaussianNoise
from hf_certify.sampling import count_votes

DRAWS = 3000
X = torch.rand(3, 12, 12, generator=torch.Generator().manual_seed(0))


class Recorder(nn.Module):
    """Keeps what goes into a model and what comes out."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.inputs: list[Tensor] = []
        self.logits: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        logits = self.model(x)
        self.inputs.append(x.clone())
        self.logits.append(logits)
        return logits


def convnet(split: float) -> nn.Module:
    """Return a small network whose classes 0 and 1 differ by about ``split`` of a logit."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3, stride=2), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 4)
    ).eval()
    with torch.no_grad():
        head = model[-1]
        head.bias[:2] += 2.0
        head.weight[1] = head.weight[0] + split * torch.randn(144)
        head.bias[1] = head.bias[0]
    return model


@pytest.mark.parametrize("split", [1e-7, 0.1])
def test_noise_is_the_same_at_every_batch_size_and_votes_differ_only_where_logits_nearly_tie(split):
    """Oracle: the logits themselves. With a split of 1e-7 half of the draws nearly tie, so that votes do differ."""
    found = {}
    for rows in (1, 7, 256):
        model = Recorder(convnet(split)).eval()
        counts = count_votes(
            model,
            GaussianNoise(X, 0.5),
            draw_noise((3, 12, 12), DRAWS, seed=1, index=0, stage=Stage.ESTIMATION),
            num_classes=4,
            batch_size=rows,
        )
        assert all(len(batch) == rows for batch in model.inputs)
        found[rows] = torch.cat(model.inputs)[:DRAWS], torch.cat(model.logits)[:DRAWS], counts
    inputs, logits, counts = found[256]
    top = logits.double().topk(2).values
    for rows in (1, 7):
        others, other_logits, other_counts = found[rows]
        assert torch.equal(inputs, others)
        difference = float((logits.double() - other_logits.double()).abs().max())
        differing = logits.argmax(1) != other_logits.argmax(1)
        margins = (top[:, 0] - top[:, 1])[differing]
        assert bool((margins < 4 * difference).all())
        assert np.abs(counts - other_counts).sum() // 2 <= int(differing.sum())
        if split == 0.1:
            assert (counts == other_counts).all()
        else:
            # negative control: rounding does decide some votes here, unless it is the same at every batch size
            assert difference == 0 or int(differing.sum()) > 0
