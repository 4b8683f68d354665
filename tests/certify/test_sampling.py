"""The counting loop."""

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from hf_certify.errors import InvalidLogitsError, UnsupportedModelError
from hf_certify.noise import Stage, draw_noise
from hf_certify.perturbation import GaussianNoise
from hf_certify.sampling import count_votes, default_batch_size, require_eval_mode
from tests.certify.toy_models import Slabs, half_space

X = torch.linspace(-0.5, 0.5, 12)


def noise(n: int) -> Iterator[Tensor]:
    return draw_noise((12,), n, seed=1, index=0, stage=Stage.ESTIMATION)


def votes(model: nn.Module, chunks: object, batch_size: int = 50, num_classes: int = 2) -> list[int]:
    counts = count_votes(model, GaussianNoise(X, 0.7), chunks, num_classes=num_classes, batch_size=batch_size)
    assert counts.dtype == np.int64
    return counts.tolist()


class Recorder(nn.Module):
    """Predicts class 0 and keeps every batch."""

    def __init__(self) -> None:
        super().__init__()
        self.batches: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        self.batches.append(x.clone())
        return torch.zeros(len(x), 2)


def test_votes_equal_those_of_one_large_batch():
    """Oracle: all noisy inputs at once, counted by NumPy."""
    model = Slabs([-0.8, 0.1, 0.3])
    model.eval()
    noisy = X + 0.7 * torch.cat([chunk.clone() for chunk in noise(1000)])
    expected = np.bincount(model(noisy).argmax(1).numpy(), minlength=4).tolist()
    assert votes(model, noise(1000), num_classes=4) == expected


@pytest.mark.parametrize("batch_size", [1, 7, 64, 100, 999, 1000, 4096])
def test_votes_do_not_depend_on_the_batch_size(batch_size):
    assert votes(half_space(), noise(1000), batch_size) == votes(half_space(), noise(1000), 50)


@pytest.mark.parametrize("cut", [1, 13, 64, 1000])
def test_forward_passes_are_bit_identical_however_the_noise_is_cut(cut):
    draws = torch.cat([chunk.clone() for chunk in noise(1000)])
    ours, other = Recorder().eval(), Recorder().eval()
    votes(ours, noise(1000))
    votes(other, draws.split(cut))
    assert torch.equal(torch.stack(ours.batches), torch.stack(other.batches))


def test_the_last_batch_is_padded_and_the_padding_is_not_counted():
    model = Recorder().eval()
    assert votes(model, noise(130), batch_size=50) == [130, 0]
    assert [len(batch) for batch in model.batches] == [50, 50, 50]
    assert torch.equal(model.batches[-1][30:], X.expand(20, -1))


def test_progress_adds_up_to_the_draws():
    reported: list[int] = []
    so_far: list[int] = []

    def on_batch(draws: int, counts: Tensor) -> None:
        reported.append(draws)
        so_far.append(int(counts.sum()))

    count_votes(half_space(), GaussianNoise(X, 1.0), noise(130), num_classes=2, batch_size=50, on_batch=on_batch)
    assert reported == [50, 50, 30]
    assert so_far == [50, 100, 130]


def test_a_module_in_training_mode_is_named():
    model = nn.Sequential(nn.Linear(12, 2), nn.Dropout()).eval()
    model[1].train()
    with pytest.raises(
        UnsupportedModelError, match=r"evaluation mode, got 1 in training mode \(first: '1'\): call model"
    ):
        require_eval_mode(model)
    with pytest.raises(UnsupportedModelError, match="evaluation mode"):
        votes(model, noise(10))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_logits_that_are_not_finite_are_never_votes(value):
    class Broken(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.where(x[:, :2] > 1.5, value, x[:, :2])

    with pytest.raises(InvalidLogitsError, match="got NaN or infinity: a NaN cannot be a vote"):
        votes(Broken().eval(), noise(1000))


def test_logits_of_another_shape_are_refused():
    with pytest.raises(UnsupportedModelError, match=r"logits of shape \[50, 3\], got \[50, 2\]"):
        votes(half_space(), noise(10), num_classes=3)
    with pytest.raises(UnsupportedModelError, match=r"logits of shape \[50, 2\], got 'tuple'"):
        votes(nn.LSTM(12, 2).eval(), noise(10))


def test_auto_batch_size_falls_with_model_size_and_input_size():
    assert default_batch_size(nn.Linear(10, 2), 784, 100_000) == 256
    assert default_batch_size(nn.Linear(1000, 2000), 784, 100_000) == 128
    assert default_batch_size(nn.Linear(4000, 4000), 784, 100_000) == 32
    # never more rows than draws, nor more than 64 MiB of input
    assert default_batch_size(nn.Linear(10, 2), 784, 200) == 200
    assert default_batch_size(nn.Linear(10, 2), 2**20, 100_000) == 16


def test_batch_normalisation_without_running_statistics_is_refused():
    """Negative control: with them, the same network is accepted."""
    mixing = nn.Sequential(nn.Linear(12, 2), nn.BatchNorm1d(2, track_running_stats=False)).eval()
    with pytest.raises(UnsupportedModelError, match="must use running statistics, got '1' without"):
        require_eval_mode(mixing)
    require_eval_mode(nn.Sequential(nn.Linear(12, 2), nn.BatchNorm1d(2)).eval())
