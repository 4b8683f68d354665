"""All votes of a run: continued from a journal, shared between processes."""

import os
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from hf_certify.config import CertifyConfig
from hf_certify.errors import InvalidLogitsError
from hf_certify.journal import Journal, Sample
from hf_certify.noise import BLOCK_DRAWS, Stage
from hf_certify.processes import Processes
from hf_certify.sampling import count_votes
from hf_certify.spaces.base import EncodedInput, Space

Votes = NDArray[np.int64]


def count_all(
    space: Space,
    encode: Callable[[int], EncodedInput],
    total: int,
    config: CertifyConfig,
    *,
    processes: Processes,
    journal: str | os.PathLike[str] | None,
    header: Mapping[str, Any],
    on_draws: Callable[[int], object],
) -> dict[int, tuple[Votes, Votes]]:
    """Return the votes of the selection and of the estimation sample of every input, each `[*outputs, K]`.

    Process ``r`` of ``c`` counts inputs ``r, r + c, ...``. Votes depend on neither, nor on interruptions, on one kind
    of machine.

    Args:
        space: What is certified.
        encode: Gives an input by its number.
        total: Number of inputs.
        config: Settings, with the seed and the batch size that are used.
        processes: Which of them this is.
        journal: Folder to record votes in and to continue from, or ``None``.
        header: What the votes depend on, see ``Journal``.
        on_draws: Called with numbers of draws that are done, also with those that were done before.

    Raises:
        JournalError: If the folder belongs to another run.
        InvalidLogitsError: If a logit is NaN or infinite.
    """
    with ExitStack() as stack:
        book, known = None, {}
        if journal is not None:
            # process 0 writes the header that the others compare with
            if processes.rank > 0:
                processes.wait()
            book = stack.enter_context(Journal(journal, header, rank=processes.rank))
            if processes.rank == 0:
                processes.wait()
            known = book.samples()
            # nobody writes before everybody has read
            processes.wait()
        counted = {}
        for index in range(processes.rank, total, processes.count):
            counted[index] = tuple(
                count_sample(
                    space,
                    encode,
                    config,
                    index,
                    stage,
                    draws,
                    known=known.get((index, stage)),
                    journal=book,
                    on_draws=on_draws,
                )
                for stage, draws in ((Stage.SELECTION, config.n0), (Stage.ESTIMATION, config.n))
            )
    return processes.gather(counted)


def count_sample(
    space: Space,
    encode: Callable[[int], EncodedInput],
    config: CertifyConfig,
    index: int,
    stage: Stage,
    draws: int,
    *,
    known: Sample | None = None,
    journal: Journal | None = None,
    on_draws: Callable[[int], object] = lambda _: None,
) -> Votes:
    """Return the votes `[*outputs, K]` of one sample of one input.

    Args:
        space: What is certified.
        encode: Gives an input by its number; not called if nothing is left to count.
        config: Settings, with the seed and the batch size that are used.
        index: Which input.
        stage: Which sample of it.
        draws: How many.
        known: Votes of the first draws, which are not counted again.
        journal: Where to record what is counted.
        on_draws: Called with numbers of draws that are done, also with those that are known.

    Raises:
        InvalidLogitsError: If a logit is NaN or infinite.
    """
    done = Sample(0, np.zeros((*space.outputs, space.num_classes), dtype=np.int64)) if known is None else known
    on_draws(done.draws)
    if done.draws >= draws:
        return done.counts
    encoded = encode(index)
    perturbation = space.perturbation(encoded, config)
    progress = _Progress(index, stage, done.draws, draws, journal, on_draws)
    try:
        counts = count_votes(
            encoded.model,
            perturbation,
            # a record ends with a whole batch, so the batches after it are those of a run without interruption
            perturbation.draw(draws, seed=int(config.seed or 0), index=index, stage=stage, start=done.draws),
            num_classes=space.num_classes,
            batch_size=int(config.batch_size),
            outputs=space.outputs,
            on_batch=progress,
        )
    except InvalidLogitsError as error:
        raise InvalidLogitsError(f"Input {index}: {error}") from error
    return done.counts + counts


class _Progress:
    """Writes a record whenever enough draws have come together, and at the end."""

    def __init__(
        self,
        index: int,
        stage: Stage,
        first: int,
        draws: int,
        journal: Journal | None,
        on_draws: Callable[[int], object],
    ) -> None:
        self.index, self.stage, self.first, self.draws = index, stage, first, draws
        self.journal, self.on_draws = journal, on_draws
        self.waiting = 0
        self.recorded: Votes | None = None

    def __call__(self, draws: int, counts: Tensor) -> None:
        self.on_draws(draws)
        self.waiting += draws
        last = self.first + self.waiting == self.draws
        if self.journal is None or not (last or self.waiting >= BLOCK_DRAWS):
            return
        votes = counts.cpu().numpy().copy()
        new = votes if self.recorded is None else votes - self.recorded
        self.journal.record(self.index, self.stage, self.first, self.waiting, new)
        self.first, self.waiting, self.recorded = self.first + self.waiting, 0, votes
