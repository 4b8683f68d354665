"""A small language of copies, ``3 > a ; a > b ; b > ? 3``: who asks for a name follows it back to a digit.

``a > b ;`` puts into b what is in a; ``b > ? 3`` asks for b, and a digit answers. A name is written to once, so what
it holds is found by going back to where it was written, to what stood before it there, and so on: two hops for each
copy, one to the same name and one to its source. All go to earlier tokens, so that one layer of chain attention
can make them. (Written ``b = a``, a name would have to be bound to what comes after it, which takes a layer before.)
"""

import string
from typing import NamedTuple

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from torch import Tensor
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerFast

from hf_chainattn.tasks import ChainTrackConfig, sample_chain_track

PAD, END, TO, ASK = "_", ";", ">", "?"
DIGITS, NAMES = string.digits, string.ascii_lowercase
WORDS = {word: number for number, word in enumerate([PAD, END, TO, ASK, *DIGITS, *NAMES])}
# tokens of a statement, and of a question with its answer
LINE = 4


def new_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer of words between spaces, which pads on the left for generation."""
    words = Tokenizer(WordLevel(WORDS, unk_token=PAD))
    words.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token=PAD, padding_side="left")


class Programs(NamedTuple):
    """Programs as tokens.

    Args:
        ids: ``[N, LINE * lines]``, statements and questions with their answers.
        labels: Likewise, -100 but at the last token of each line: the digit that was put where the line says. So each
            statement is a question too while training, though ``ids`` shows no answer there. All else is random.
        depth: ``[N, questions]``, copies from the name that is asked for back to its digit.
    """

    ids: Tensor
    labels: Tensor
    depth: Tensor


def sample_programs(
    count: int, *, statements: int, questions: int, chains: int, at_end: bool, generator: torch.Generator
) -> Programs:
    """Return random programs; their statements are those of ChainTrack.

    Args:
        count: How many, ``N``.
        statements: In each.
        questions: In each.
        chains: Digits that are copied on, side by side. Guessing one of them is right one time in ``chains``.
        at_end: Whether all questions come after the statements, each for another name. Else they stand anywhere.
        generator: Of all randomness.
    """
    task = ChainTrackConfig(tokens=statements, chains=chains, names=len(NAMES), values=len(DIGITS))
    batch = sample_chain_track(task, count, generator=generator)
    digit, name = WORDS[DIGITS[0]], WORDS[NAMES[0]]
    source = torch.where(batch.source == task.names, batch.value + digit, batch.source + name)
    told = _lines(source, batch.name + name, torch.full_like(source, WORDS[END]))

    if at_end:
        after = torch.full((count, questions), statements - 1)
        asked = torch.rand(count, statements, generator=generator).argsort(-1)[:, :questions]
    else:
        after = torch.randint(statements, (count, questions), generator=generator).sort(-1).values
        asked = (torch.rand(count, questions, generator=generator) * (after + 1)).long()
    answer = batch.label.gather(1, asked)
    asks = _lines(batch.name.gather(1, asked) + name, torch.full_like(asked, WORDS[ASK]), answer + digit)

    # a question follows the statement after which it is asked
    order = torch.cat([torch.arange(statements).expand(count, -1), after], 1).argsort(dim=1, stable=True)
    lines = torch.cat([told, asks], 1).gather(1, order[..., None].expand(-1, -1, LINE))
    labels = torch.full_like(lines, -100)
    labels[..., -1] = torch.cat([batch.label, answer], 1).gather(1, order) + digit
    return Programs(lines.flatten(1), labels.flatten(1), batch.depth.gather(1, asked))


def _lines(first: Tensor, third: Tensor, last: Tensor) -> Tensor:
    """Return ``[N, lines, LINE]``: what goes where, and how the line ends."""
    return torch.stack([first, torch.full_like(first, WORDS[TO]), third, last], -1)


class ProgramDataset(Dataset[dict[str, Tensor]]):
    """Programs as Trainer reads them."""

    def __init__(self, programs: Programs) -> None:
        self.programs = programs

    def __len__(self) -> int:
        return len(self.programs.ids)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.programs.ids[index], "labels": self.programs.labels[index]}


def mixed_programs(count: int, *, statements: int, questions: int, seed: int) -> Programs:
    """Return programs to train with, of two to six chains: fewer are deeper, and with more guessing helps less."""
    generator = torch.Generator().manual_seed(seed)
    parts = [
        sample_programs(
            -(-count // 5),
            statements=statements,
            questions=questions,
            chains=chains,
            at_end=False,
            generator=generator,
        )
        for chains in range(2, 7)
    ]
    return Programs(*(torch.cat(fields)[:count] for fields in zip(*parts, strict=True)))
