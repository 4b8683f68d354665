"""A small language of copies, ``3 > a ; a > b ; b > c``: a model is asked what the last name holds now.

``a > b`` puts into b what is in a. A name is written to once, so what it holds is found by going back to what was put
into it, from there to where that name was written to, and so on: two hops for each copy. All of them go to earlier
tokens, so that one layer of chain attention can make them. (Written ``b = a``, a name would have to be bound to what
comes after it, which takes a layer before.)
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

PAD, END, TO = "_", ";", ">"
DIGITS = string.digits
# the question mark is a name as any other, so that a prompt may end in "b > ?"
NAMES = string.ascii_lowercase + "?"
WORDS = {word: number for number, word in enumerate([PAD, END, TO, *DIGITS, *NAMES])}
# tokens of a line
LINE = 4


def new_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer of words between spaces, which pads on the left for generation."""
    words = Tokenizer(WordLevel(WORDS, unk_token=PAD))
    words.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token=PAD, padding_side="left")


class Programs(NamedTuple):
    """Programs as tokens.

    Args:
        ids: ``[N, LINE * lines]``.
        labels: Likewise, -100 but at the last token of each line, which is ``;`` in ``ids``: the digit that the name
            before it holds now. So every line is a question for training, and no answer is ever read.
        depth: ``[N, lines]``, copies from the name back to its digit.
    """

    ids: Tensor
    labels: Tensor
    depth: Tensor

    @property
    def answers(self) -> Tensor:
        """The digit that each line puts into its name, ``[N, lines]``."""
        return self.labels[:, LINE - 1 :: LINE]


def sample_programs(
    count: int, *, lines: int, chains: int, fresh: float, branching: float = 0.25, generator: torch.Generator
) -> Programs:
    """Return random programs.

    Args:
        count: How many, ``N``.
        lines: In each, at most as many as there are names.
        chains: Lines at the beginning that put different digits into names. Further lines copy, each on one of these
            chains. Guessing the digit of a chain is right one time in ``chains``, if there are no other digits.
        fresh: How many of the further lines put a digit into a name instead, from 0 to 1.
        branching: How many copy any earlier name, and not the newest of a chain.
        generator: Of all randomness.

    Raises:
        ValueError: If there are more lines than names, or more chains than lines or digits.
    """
    if not 1 <= chains <= min(lines, len(DIGITS)) or lines > len(NAMES):
        raise ValueError(f"Programs need 1 <= chains <= lines <= {len(NAMES)}, got {chains} chains, {lines} lines.")
    rows = torch.arange(count)
    name = torch.rand(count, len(NAMES), generator=generator).argsort(1)[:, :lines] + WORDS[NAMES[0]]
    held = torch.zeros(count, lines, dtype=torch.long)
    held[:, :chains] = torch.rand(count, len(DIGITS), generator=generator).argsort(1)[:, :chains] + WORDS[DIGITS[0]]
    source, depth, newest = held.clone(), torch.zeros_like(held), torch.arange(chains).repeat(count, 1)
    for line in range(chains, lines):
        chain = torch.randint(chains, (count,), generator=generator)
        elsewhere = torch.rand(count, generator=generator) < branching
        copied = torch.where(elsewhere, torch.randint(line, (count,), generator=generator), newest[rows, chain])
        digit = torch.randint(len(DIGITS), (count,), generator=generator) + WORDS[DIGITS[0]]
        new = torch.rand(count, generator=generator) < fresh
        source[:, line] = torch.where(new, digit, name[rows, copied])
        held[:, line] = torch.where(new, digit, held[rows, copied])
        depth[:, line] = torch.where(new, 0, depth[rows, copied] + 1)
        newest[rows, chain] = line
    to, end = torch.full_like(name, WORDS[TO]), torch.full_like(name, WORDS[END])
    labels = torch.full((count, lines, LINE), -100)
    labels[..., -1] = held
    return Programs(torch.stack([source, to, name, end], -1).flatten(1), labels.flatten(1), depth)


def mixed_programs(count: int, *, lines: int, seed: int) -> Programs:
    """Return programs to train with, of one to six chains, with digits in any place.

    With many chains guessing helps little, so that a model begins to look; few are deep. A digit can be anywhere: else
    only the first lines would show a model with learned positions that a name is two tokens after its source.
    """
    generator = torch.Generator().manual_seed(seed)
    parts = [
        sample_programs(-(-count // 6), lines=lines, chains=chains, fresh=0.2, generator=generator)
        for chains in range(1, 7)
    ]
    return Programs(*(torch.cat(fields)[:count] for fields in zip(*parts, strict=True)))


class ProgramDataset(Dataset[dict[str, Tensor]]):
    """Programs as Trainer reads them."""

    def __init__(self, programs: Programs) -> None:
        self.programs = programs

    def __len__(self) -> int:
        return len(self.programs.ids)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.programs.ids[index], "labels": self.programs.labels[index]}
