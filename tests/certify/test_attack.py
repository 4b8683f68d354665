"""An attack that finds nothing where a certificate says so, and finds it where there is something."""

import dataclasses

import numpy as np
import pytest
import torch
from torch import nn

from examples.end_to_end.data import mnist_subset
from hf_certify import (
    CertificationReport,
    EncodedInput,
    InvalidLogitsError,
    Space,
    UnsupportedModelError,
    VerificationError,
    certify_pipeline,
)
from hf_certify.attack import _inside, attack
from hf_certify.attack_report import AttackConfig
from hf_certify.perturbation import Perturbation
from tests.certify.toy_models import HalfSpace, Slabs, half_space

SIGMA = 0.5
QUIET = {"progress": False}


class Tensors(Space):
    """Inputs are tensors already."""

    units = "numbers"

    def __init__(self, model: nn.Module, num_classes: int = 2, outputs: tuple[int, ...] = ()) -> None:
        self.model, self.num_classes, self.outputs = model, num_classes, outputs

    def encode(self, item: torch.Tensor, position: int) -> EncodedInput:
        return EncodedInput(item, self.model)


def certified(space: Space, inputs: list[torch.Tensor], **settings: object) -> CertificationReport:
    return certify_pipeline(space, inputs, **({"sigma": SIGMA, "n": 20_000, "seed": 1} | QUIET | settings))


@pytest.mark.parametrize(("distance", "n"), [(0.2, 400_000), (0.7, 40_000), (1.1, 40_000)])
def test_on_a_half_space_nothing_is_found_inside_and_the_plane_is_crossed_just_outside(distance, n):
    """Oracle: the smoothed radius of a half-space is the distance to the plane."""
    model = half_space()
    x = distance * model.weight / model.weight.norm()
    space = Tensors(model)
    report = certified(space, [x, -x])
    found = attack(space, [x, -x], report, radii=[0.999 * distance, 1.05 * distance], seed=2, n=n, **QUIET)
    found.verify()
    for attempts in (found.attempts[:3], found.attempts[3:]):
        inside, below, above = attempts
        assert (inside.succeeded, below.succeeded, above.succeeded) == (False, False, True)
        # it went to the edge: the certificate was tested where it could break first
        assert 0.999 * inside.certified < inside.norm < inside.certified < below.norm < distance < above.norm
        assert above.norm <= 1.05 * distance
        assert above.prediction.p_value <= 1e-6
        assert sum(above.prediction.counts) == n
    assert [row.attacked for row in found.gap([0, 1])] == [1.0, 1.0, 0.0]
    assert [row.certified for row in found.gap([0, 1])] == [1.0, 0.0, 0.0]


def test_a_false_certificate_is_contradicted_loudly():
    """Negative control: a radius of more than twice the distance."""
    model = half_space()
    x = 0.3 * model.weight / model.weight.norm()
    space = Tensors(model)
    report = certified(space, [x, 3 * x])
    # the votes of the far point under the name of the near one
    far = report.certificates[1]
    forged = dataclasses.replace(report, certificates=(dataclasses.replace(far, index=0), far))
    found = attack(space, [x, 3 * x], forged, seed=2, **QUIET)
    assert [attempt.index for attempt in found.broken] == [0]
    with pytest.raises(
        VerificationError, match=r"got 1 of 2 certificates contradicted, the first for input 0: class 1"
    ):
        found.verify()


@pytest.fixture(scope="module")
def digits():
    """A small network on 28x28 digits, trained with noise for a few seconds, and digits it has not seen."""
    torch.manual_seed(0)
    pixels, labels = mnist_subset()
    x = torch.from_numpy(pixels.astype(np.float32) / 255).flatten(1)
    y = torch.from_numpy(labels)
    model = nn.Sequential(nn.Linear(784, 64), nn.ReLU(), nn.Linear(64, 10))
    optimizer = torch.optim.Adam(model.parameters(), 2e-3)
    for _ in range(600):
        rows = torch.randint(4800, (64,))
        noisy = x[rows] + SIGMA * torch.randn(64, 784)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(noisy), y[rows]).backward()
        optimizer.step()
    return Tensors(model.eval(), 10), list(x[-40:]), y[-40:].tolist()


def test_on_a_trained_network_nothing_is_found_inside_and_much_outside(digits):
    """Negative control: the same attack turns most digits at three times the certified radius."""
    space, inputs, labels = digits
    report = certified(space, inputs, n=2000)
    assert report.certified_accuracy(labels, [0.25])[0] > 0.7
    found = attack(space, inputs, report, radii=[0.5, 1.0, 2.0, 4.0], n=2000, seed=5, **QUIET)
    assert found.broken == ()
    found.verify()
    assert sum(attempt.radius == attempt.certified for attempt in found.attempts) >= 30
    rows = found.gap(labels)
    assert all(row.certified <= row.attacked and row.gap >= 0 for row in rows)
    assert rows[0].attacked > 0.7
    assert rows[-1].attacked < 0.1
    # accuracy can only fall with the radius
    assert [row.attacked for row in rows] == sorted((row.attacked for row in rows), reverse=True)
    turned = [attempt for attempt in found.attempts if attempt.succeeded]
    assert len(turned) > 25
    assert "inside certified radii 0 of" in found.summary(labels)


def test_the_gradient_matters(digits):
    """Negative control: as many steps in random directions turn nothing at a radius where the gradient turns most."""
    space, inputs, _ = digits
    report = certified(space, inputs[:10], n=2000)
    found = attack(space, inputs[:10], report, radii=[2.0], n=2000, seed=5, **QUIET)
    turned = {attempt.index for attempt in found.attempts if attempt.succeeded}
    assert len(turned) >= 8
    generator = torch.Generator().manual_seed(0)
    for index in turned:
        direction = torch.randn(784, generator=generator)
        moved = inputs[index] + 2.0 * direction / direction.norm()
        smoothed = certified(space, [moved], n=2000).certificates[0]
        assert smoothed.label == report.certificates[index].label


def test_the_same_seed_finds_the_same_and_another_one_does_not(digits):
    space, inputs, _ = digits
    report = certified(space, inputs[:2], n=500)
    first, again, other = (attack(space, inputs[:2], report, seed=seed, n=500, **QUIET) for seed in (1, 1, 2))
    assert first == again
    assert first.attempts != other.attempts
    assert attack(space, inputs[:2], report, n=500, steps=1, **QUIET).config.seed > 2**64


def test_a_box_keeps_the_point_inside_and_costs_the_attacker(digits):
    """Pixels of a digit are mostly 0, so half of all directions leave the box."""
    space, inputs, _ = digits
    report = certified(space, inputs[:10], n=1000)
    free, boxed = (
        attack(space, inputs[:10], report, radii=[1.0, 1.5, 2.0, 3.0], box=box, n=1000, seed=5, **QUIET)
        for box in (None, (0.0, 1.0))
    )
    assert sum(row.attacked for row in boxed.gap()) > sum(row.attacked for row in free.gap())
    with pytest.raises(ValueError, match=r"Inputs must lie in box=\(0.0, 0.5\), got values from 0 to"):
        attack(space, inputs[:10], report, box=(0.0, 0.5), seed=5, **QUIET)


def test_points_stay_strictly_inside_after_rounding():
    """Oracle: distances in float64, for balls down to the spacing of float32."""
    generator = torch.Generator().manual_seed(0)
    for ball in (1e-9, 1e-7, 1e-3, 0.5, 30.0):
        for _ in range(50):
            x = torch.rand(300, generator=generator)
            moved = x + 10 * ball * torch.randn(300, generator=generator)
            for box in (None, (0.0, 1.0)):
                point = _inside(x, moved, ball, box)
                assert float((point.double() - x.double()).norm()) <= ball
                assert box is None or (float(point.min()) >= 0 and float(point.max()) <= 1)
            if ball >= 1e-3:
                assert float((_inside(x, moved, ball, None).double() - x.double()).norm()) > 0.999 * ball


def test_of_several_answers_each_is_attacked_by_itself():
    """Oracle: two half-spaces at their own distances, side by side as two answers."""

    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.both = nn.ModuleList([HalfSpace(torch.tensor([1.0, 0.0])), HalfSpace(torch.tensor([0.0, 1.0]))])

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.stack([model(x) for model in self.both], dim=1)

    space = Tensors(Pair().eval(), outputs=(2,))
    x = torch.tensor([0.3, -0.8])
    report = certified(space, [x])
    found = attack(space, [x], report, radii=[0.32, 0.9], n=40_000, seed=2, **QUIET)
    found.verify()
    turned = {attempt.output: attempt.radius for attempt in found.attempts if attempt.succeeded}
    assert turned == {0: 0.32, 1: 0.9}
    assert [row.attacked for row in found.gap([0, 1])] == [1.0, 0.5, 0.0]


def test_an_abstention_is_attacked_only_outside():
    model = half_space()
    space = Tensors(model)
    report = certified(space, [torch.zeros(12)])
    assert report.abstentions == 1
    assert attack(space, [torch.zeros(12)], report, seed=1, **QUIET).attempts == ()
    (attempt,) = attack(space, [torch.zeros(12)], report, radii=[0.5], seed=1, **QUIET).attempts
    assert attempt.succeeded
    assert not attempt.inside


class Stepwise(Perturbation):
    """Noise of another kind."""

    def __init__(self, x: torch.Tensor) -> None:
        self.base = x

    def draw(self, n: int, **_: object) -> list[torch.Tensor]:
        return list(torch.zeros(n, 1, *self.base.shape))

    def write(self, drawn: torch.Tensor, rows: torch.Tensor) -> None:
        rows.copy_(self.base + drawn)


def test_what_cannot_be_attacked_is_refused():
    x = torch.ones(12)
    space = Tensors(half_space())
    report = certified(space, [x], n=50)
    with pytest.raises(UnsupportedModelError, match="norm must be 'l2' for attack and certificates, got 'linf', 'l2'"):
        attack(space, [x], report, norm="linf", **QUIET)
    with pytest.raises(VerificationError, match="1 of them, got 2"):
        attack(space, [x, x], report, **QUIET)
    slabs = Tensors(Slabs([0.0]).eval())
    with pytest.raises(UnsupportedModelError, match="a model through which no gradient comes"):
        attack(slabs, [x], certified(slabs, [x], n=50), **QUIET)
    space.perturbation = lambda encoded, config: Stepwise(encoded.x)
    with pytest.raises(UnsupportedModelError, match="noise must be Gaussian to be attacked in l2, got Stepwise"):
        attack(space, [x], report, **QUIET)


def test_a_gradient_that_is_not_finite_is_refused():
    class Root(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.stack((x.sum(1), 0 * (0 * x.sum(1)).abs().sqrt()), dim=1)

    space = Tensors(Root().eval())
    x = torch.ones(12)
    with pytest.raises(InvalidLogitsError, match="Input 0: gradients must be finite"):
        attack(space, [x], certified(space, [x], n=50), **QUIET)


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"steps": 0}, ValueError, "steps must be an int >= 1, got 0"),
        ({"samples": 2.0}, TypeError, "samples must be an int >= 1, got 2.0"),
        ({"step_size": 0.0}, ValueError, "step_size must be finite and > 0, got 0.0"),
        ({"radii": (1.0, 1.0)}, ValueError, "radii must be finite, > 0 and ascending"),
        ({"box": (1.0, 0.0)}, ValueError, "box must be .* with lowest < highest"),
        ({"alpha": 0.0}, ValueError, r"alpha must be in \(0, 1\)"),
        ({"seed": -1}, ValueError, "seed must be in"),
    ],
)
def test_settings_that_cannot_work_are_refused(settings, error, message):
    with pytest.raises(error, match=message):
        AttackConfig(**settings)
