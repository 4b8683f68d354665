"""Votes drawn again: what a report says, found by the model a second time."""

import dataclasses
import math
import random
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import numpy as np
from tqdm.auto import tqdm

from hf_certify.certify import as_sequence
from hf_certify.errors import VerificationError
from hf_certify.identity import require_same_inputs, require_same_model
from hf_certify.noise import Stage, fresh_seed
from hf_certify.provenance import machine_facts
from hf_certify.report import CertificationReport
from hf_certify.runner import count_sample
from hf_certify.spaces import space_of
from hf_certify.spaces.base import Space

if TYPE_CHECKING:
    from transformers import Pipeline


@dataclasses.dataclass(frozen=True, kw_only=True)
class Replay:
    """What a second drawing of some inputs found; there is one only if it confirms the report.

    Attributes:
        inputs: Which inputs were drawn again, ascending.
        differing: For each of them, the least number of votes that must have been cast differently.
        draws: Votes of each answer to each of them, ``n0 + n``.
        other_facts: Names of what votes may depend on through rounding and was another than in the run, such as the
            number of threads. If there is none, all votes are the same.
        seed: Root of the choice of inputs.
    """

    inputs: tuple[int, ...]
    differing: tuple[int, ...]
    draws: int
    other_facts: tuple[str, ...]
    seed: int

    def summary(self) -> str:
        """Return one sentence.

        Example:
            >>> Replay(inputs=(3, 5), differing=(0, 0), draws=1100, other_facts=(), seed=1).summary()
            '2 inputs drawn again (3, 5), 1100 votes each: all votes as in the report'
        """
        moved = sum(self.differing)
        found = "all votes as in the report" if moved == 0 else f"{moved} votes differ"
        reason = f", where these are others: {', '.join(self.other_facts)}" if self.other_facts else ""
        listed = ", ".join(map(str, self.inputs))
        return f"{len(self.inputs)} inputs drawn again ({listed}), {self.draws} votes each: {found}{reason}"


def replay(
    report: CertificationReport,
    pipe: "Pipeline | Space",
    inputs: Iterable[Any],
    k: int = 8,
    *,
    tolerance: float = 1e-4,
    seed: int | None = None,
    progress: bool = False,
) -> Replay:
    """Draw the votes of ``k`` random inputs again and compare them with those of the report.

    The report is verified first, then it is checked that model, processing and inputs are those that it names. The
    draws have the seed, the batch size and the numbers of the run. With the same machine, versions and number of
    threads all votes must be the same. Otherwise rounding may move those of draws next to a decision boundary, and
    the number that moved must stay below ``tolerance``.

    Of a report in which a share ``f`` of the inputs has wrong votes, ``k`` inputs find one with probability at least
    ``1 - (1 - f) ** k``. Costs ``n0 + n`` forward rows for each.

    Args:
        report: What is checked.
        pipe: The pipeline or space that was certified.
        inputs: All inputs of the run, in their order.
        k: How many of them to draw again, ``>= 1``; all, if there are fewer.
        tolerance: Largest share of differing votes in each of the two samples of an answer, in ``[0, 1)``, on another
            machine; rounded up to whole votes. Half precision needs more than the default, which is for float32.
        seed: Root of the choice of inputs; ``None`` takes 128 bits from the operating system.
        progress: Whether to show a bar that counts draws.

    Raises:
        VerificationError: If a certificate does not follow from its votes, if model, processing or inputs are others
            than those of the report, or if votes differ by more than is allowed.
        ValueError: If ``k`` or ``tolerance`` is out of range.

    Example:
        >>> import torch
        >>> from hf_certify import EncodedInput, Space, certify_pipeline
        >>> class Vectors(Space):
        ...     model = torch.nn.Linear(2, 3).eval()
        ...     num_classes = 3
        ...     units = "the two coordinates"
        ...     def encode(self, item, position):
        ...         return EncodedInput(torch.tensor(item), self.model)
        >>> inputs = [[0.5, 1.0], [1.0, 0.5]]
        >>> report = certify_pipeline(Vectors(), inputs, sigma=0.25, n=200, progress=False)
        >>> replay(report, Vectors(), inputs, k=1).differing
        (0,)
    """
    if k < 1:
        raise ValueError(f"k must be >= 1, got {k!r}: nothing would be drawn again.")
    if not 0 <= tolerance < 1:
        raise ValueError(f"tolerance must be in [0, 1), got {tolerance!r}.")
    report.verify()
    space = space_of(pipe)
    others = _other_facts(report, space)
    require_same_model(report, space)
    items = as_sequence(inputs, space.array_ndim)
    require_same_inputs(report, space, items)
    root = fresh_seed() if seed is None else seed
    chosen = sorted(random.Random(root).sample(range(len(items)), min(k, len(items))))
    differing = []
    with tqdm(total=len(chosen) * report.draws_per_input, unit="draw", unit_scale=True, disable=not progress) as bar:
        for index in chosen:
            differing.append(0)
            for stage in (Stage.SELECTION, Stage.ESTIMATION):
                stored = _stored(report, index, stage)
                draws = int(stored[0].sum())
                counted = count_sample(
                    space,
                    lambda position: space.encode(items[position], position),
                    report.config,
                    index,
                    stage,
                    draws,
                    on_draws=bar.update,
                )
                # a vote that moves is missing in one class and too much in another
                moved = np.abs(counted.reshape(stored.shape) - stored).sum(axis=1) // 2
                _require_few(int(moved.max()), draws, index, stage, tolerance if others else 0.0, others)
                differing[-1] += int(moved.sum())
    return Replay(
        inputs=tuple(chosen),
        differing=tuple(differing),
        draws=report.draws_per_input,
        other_facts=others,
        seed=root,
    )


def _stored(report: CertificationReport, index: int, stage: Stage) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Return the votes `[answers, K]` that the report holds of one sample of an input."""
    samples = [
        certificate.selection if stage is Stage.SELECTION else certificate.estimation
        for certificate in report.certificates
        if certificate.index == index
    ]
    return np.array(samples, dtype=np.int64)


def _other_facts(report: CertificationReport, space: Space) -> tuple[str, ...]:
    """Return the names of what may change votes through rounding and differs from the run.

    Raises:
        VerificationError: If the noise itself would be another.
    """
    now = machine_facts(space.device)
    if report.facts.get("noise_schema") != now["noise_schema"]:
        raise VerificationError(
            f"The noise of the run must be that of this version, noise_schema {now['noise_schema']}, got "
            f"{report.facts.get('noise_schema')!r} in the report: draw with the version of the package that wrote it."
        )
    return tuple(sorted(name for name, value in now.items() if report.facts.get(name) != value))


def _require_few(moved: int, draws: int, index: int, stage: Stage, tolerance: float, others: tuple[str, ...]) -> None:
    """Raise if more votes of one sample differ than rounding can explain."""
    allowed = math.ceil(tolerance * draws)
    if moved > allowed:
        where = f"with another {', '.join(others)}" if others else "on the machine and with the versions of the run"
        raise VerificationError(
            f"The votes of input {index}, {stage.name.lower()}, must be those of the report but for {allowed} of "
            f"{draws}, {where}, got {moved} that differ: the report does not come from this model and these inputs."
        )
