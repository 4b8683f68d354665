"""Projected gradient descent on the smoothed classifier: what an attacker finds where nothing should be found.

The gradient is that of the smoothed soft classifier, averaged over noisy copies (expectation over the noise, as in
arXiv 1906.04584). What it finds is judged by a fresh sample of hard votes, so an attempt that succeeds is evidence
whatever the gradient was.
"""

import dataclasses
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from hf_certify.attack_report import STRICTLY, AttackConfig, AttackReport, Attempt
from hf_certify.certificate import Certificate
from hf_certify.certify import as_sequence
from hf_certify.errors import InvalidLogitsError, UnsupportedModelError
from hf_certify.identity import require_same_inputs, require_same_model
from hf_certify.noise import Stage, fresh_seed
from hf_certify.partition import rank_classes
from hf_certify.perturbation import GaussianNoise
from hf_certify.processes import Processes
from hf_certify.report import CertificationReport
from hf_certify.sampling import checked_logits, count_votes, require_eval_mode
from hf_certify.smoothing import Prediction
from hf_certify.spaces import space_of
from hf_certify.spaces.base import EncodedInput, Space

if TYPE_CHECKING:
    from transformers import Pipeline


def attack(
    pipe: "Pipeline | Space",
    inputs: Iterable[Any],
    report: CertificationReport,
    *,
    norm: str = "l2",
    steps: int = 20,
    step_size: float | None = None,
    samples: int = 32,
    radii: Sequence[float] = (),
    box: tuple[float, float] | None = None,
    n: int = 10_000,
    alpha: float = 1e-6,
    seed: int | None = None,
    progress: bool = True,
) -> AttackReport:
    """Attack the smoothed classifier inside every certified radius, and in larger balls.

    Inside a certified radius no attempt may succeed, except with the failure probability of the certificate; call
    ``verify`` on the result. ``radii`` show that the same attack does succeed elsewhere, and give the gap between
    certified and attacked accuracy. Every answer is attacked in its certified ball, then in the larger balls of
    ``radii`` until one falls. Costs ``3 * steps * samples + n`` forward rows or their like for an attempt. Processes
    that ``accelerate launch`` starts share the attempts.

    Args:
        pipe: The pipeline or space that was certified; its model must be differentiable.
        inputs: All inputs of the run, in their order.
        report: What is attacked.
        norm: ``l2``: the norm of the certificates.
        steps: Steps along the gradient, see ``AttackConfig``.
        step_size: Length of a step.
        samples: Noisy copies in every step; they are one batch.
        radii: Balls to search besides the certified ones, ascending.
        box: Lowest and highest value of a perturbed input. The smoothed classifier and its certificates are about all
            of space, so ``None`` is the stronger attack; ``(0, 1)`` keeps to valid images.
        n: Draws of each verdict.
        alpha: Failure probability of each verdict, in ``(0, 1)``.
        seed: Root of all noise of the attack; ``None`` draws one.
        progress: Whether to show a bar that counts answers.

    Raises:
        VerificationError: If a certificate does not follow from its votes, or model, processing or inputs are others
            than those of the report.
        TypeError: If a setting is of the wrong kind.
        ValueError: If a setting is out of range, or an input lies outside ``box``.
        UnsupportedModelError: If the space has another norm or no Gaussian noise, or no gradient reaches the input.
        InvalidLogitsError: If a logit or a gradient is NaN or infinite.

    Example:
        >>> from hf_certify import certify_pipeline
        >>> class Line(Space):
        ...     model = torch.nn.Linear(1, 2).eval()
        ...     num_classes = 2
        ...     units = "the coordinate"
        ...     def encode(self, item, position):
        ...         return EncodedInput(torch.tensor(item), self.model)
        >>> _ = Line.model.weight.data.copy_(torch.tensor([[1.0], [-1.0]])), Line.model.bias.data.zero_()
        >>> report = certify_pipeline(Line(), [[0.5]], sigma=0.5, n=1000, seed=0, progress=False)
        >>> found = attack(Line(), [[0.5]], report, radii=[1.0], seed=0, progress=False)
        >>> found.verify()  # the plane is 0.5 away
        >>> [(row.radius, row.attacked) for row in found.gap([0])]
        [(0.0, 1.0), (1.0, 0.0)]
    """
    processes = Processes.current()
    config = AttackConfig(
        steps=steps,
        step_size=step_size,
        samples=samples,
        radii=tuple(radii),
        box=box,
        n=n,
        alpha=alpha,
        seed=processes.from_first(fresh_seed()) if seed is None else seed,
    )
    report.verify()
    space = space_of(pipe)
    if norm != "l2" or space.norm != norm:
        raise UnsupportedModelError(
            f"The norm must be 'l2' for attack and certificates, got {norm!r}, {space.norm!r}."
        )
    require_eval_mode(space.model)
    require_same_model(report, space)
    items = as_sequence(inputs, space.array_ndim)
    require_same_inputs(report, space, items)
    found: dict[int, list[Attempt]] = {}
    shared = range(processes.rank, len(report.certificates), processes.count)
    for place in tqdm(shared, unit="answer", disable=not progress or processes.rank > 0):
        certificate = report.certificates[place]
        target = _Target(space, space.encode(items[certificate.index], certificate.index), certificate, report, config)
        found[place] = list(target.attempts(place * (len(config.radii) + 1)))
    found = processes.gather(found)
    return AttackReport(
        report=report, config=config, attempts=tuple(attempt for place in sorted(found) for attempt in found[place])
    )


class _Target:
    """One answer to one input, under attack."""

    def __init__(
        self,
        space: Space,
        encoded: EncodedInput,
        certificate: Certificate,
        report: CertificationReport,
        config: AttackConfig,
    ) -> None:
        noise = space.perturbation(encoded, report.config)
        if not isinstance(noise, GaussianNoise):
            raise UnsupportedModelError(
                f"The noise must be Gaussian to be attacked in l2, got {type(noise).__name__} in {space.units!r}."
            )
        if config.box is not None and not bool(((encoded.x >= config.box[0]) & (encoded.x <= config.box[1])).all()):
            raise ValueError(
                f"Inputs must lie in box={config.box!r}, got values from {float(encoded.x.min()):g} to "
                f"{float(encoded.x.max()):g} in input {certificate.index}."
            )
        self.space, self.encoded, self.certificate = space, encoded, certificate
        self.noise, self.config, self.settings = noise, config, report.config
        self.answer = certificate.output or 0
        leader = int(rank_classes(torch.tensor(certificate.estimation).numpy())[0])
        self.label = leader if certificate.label is None else certificate.label

    def attempts(self, number: int) -> Iterator[Attempt]:
        """Yield an attempt for every ball until one succeeds; ``number`` and those after it name their noise."""
        certified = self.certificate.radius
        balls = [certified] if certified > 0 else []
        for radius in (*balls, *(radius for radius in self.config.radii if radius > certified)):
            moved = self._search(radius * (1 - STRICTLY), number)
            attempt = Attempt(
                index=self.certificate.index,
                output=self.certificate.output,
                label=self.label,
                certified=certified,
                radius=radius,
                norm=_distance(self.encoded.x, moved),
                prediction=self._verdict(moved, number),
            )
            yield attempt
            if attempt.succeeded:
                return
            number += 1

    def _search(self, ball: float, number: int) -> Tensor:
        """Return the point of the ball at which the smoothed soft classifier is least sure of the label."""
        config, x = self.config, self.encoded.x
        step = 2.5 * ball / config.steps if config.step_size is None else config.step_size
        draws = (config.steps + 1) * config.samples
        noise = self.noise.draw(draws, seed=int(config.seed or 0), index=number, stage=Stage.ATTACK)
        moved, best, lowest = x, x, math.inf
        for count, drawn in enumerate(_batches(noise, config.samples)):
            margin, gradient = self._margin(moved, drawn.to(x.device))
            # the start is no attack, so it is no candidate
            if count > 0 and margin < lowest:
                best, lowest = moved, margin
            if count < config.steps:
                # no gradient, no step
                length = float(gradient.double().norm()) or 1.0
                moved = _inside(x, moved - step / length * gradient, ball, config.box)
        return best

    def _margin(self, moved: Tensor, drawn: Tensor) -> tuple[float, Tensor]:
        """Return by how much the label leads the smoothed soft classifier, on the log scale, and its gradient."""
        with torch.enable_grad():
            leaf = moved.detach().clone().requires_grad_()
            shape = (len(drawn), *self.space.outputs, self.space.num_classes)
            logits = checked_logits(self.encoded.model(leaf + self.noise.sigma * drawn), shape)
            scores = logits.float().reshape(len(drawn), -1, shape[-1])[:, self.answer].log_softmax(-1).logsumexp(0)
            margin = scores[self.label] - torch.cat((scores[: self.label], scores[self.label + 1 :])).max()
            gradient = torch.autograd.grad(margin, leaf, allow_unused=True)[0] if margin.requires_grad else None
        if gradient is None:
            raise UnsupportedModelError(
                "The logits must depend on the input by differentiable steps, got a model through which no gradient "
                "comes: attack it without torch.no_grad or argmax inside."
            )
        if not bool(torch.isfinite(gradient).all()):
            raise InvalidLogitsError(f"Input {self.certificate.index}: gradients must be finite, got NaN or infinity.")
        return float(margin.detach()), gradient

    def _verdict(self, moved: Tensor, number: int) -> Prediction:
        """Return what the smoothed classifier predicts at a point, from votes that the search has not seen."""
        at_point = dataclasses.replace(self.encoded, x=moved)
        noise = self.space.perturbation(at_point, self.settings)
        counts = count_votes(
            at_point.model,
            noise,
            noise.draw(self.config.n, seed=int(self.config.seed or 0), index=number, stage=Stage.PREDICTION),
            num_classes=self.space.num_classes,
            batch_size=int(self.settings.batch_size),
            outputs=self.space.outputs,
        )
        votes = counts.reshape(-1, self.space.num_classes)[self.answer]
        return Prediction.from_counts(votes, alpha=self.config.alpha)


def _distance(x: Tensor, moved: Tensor) -> float:
    """Return the l2 distance of two float32 tensors, in float64."""
    return float((moved.double() - x.double()).norm())


def _inside(x: Tensor, moved: Tensor, ball: float, box: tuple[float, float] | None) -> Tensor:
    """Return ``moved`` projected into the box and the ball around ``x``, also after rounding to float32."""
    offset, scale = moved - x, 1.0
    while True:
        point = x + scale * offset
        if box is not None:
            point = point.clamp(*box)
        distance = _distance(x, point)
        if distance <= ball:
            return point
        scale *= min(ball / distance, 1 - 1e-7)


def _batches(chunks: Iterable[Tensor], rows: int) -> Iterator[Tensor]:
    """Yield the draws of all chunks in batches of ``rows``; what is left at the end is dropped."""
    held: list[Tensor] = []
    for chunk in chunks:
        for row in chunk.clone():
            held.append(row)
            if len(held) == rows:
                yield torch.stack(held)
                held = []
