"""ChainTrack: statements that copy from one another, so that an answer lies as many hops away as its chain is deep."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

DEPTHS = ((0, 0), (1, 1), (2, 3), (4, 7), (8, 15), (16, 31))


@dataclass(frozen=True)
class ChainTrackConfig:
    """Size of the task.

    Args:
        tokens: Statements in a sequence, one token each.
        chains: Chains that grow side by side. Beyond the reach of a model, guessing scores ``1 / chains``.
        names: Size of the vocabulary of names; each is used once in a sequence at most.
        values: Size of the vocabulary of values.

    Raises:
        ValueError: If there are fewer tokens or values than chains, or fewer names than tokens.
    """

    tokens: int = 30
    chains: int = 3
    names: int = 48
    values: int = 8

    def __post_init__(self) -> None:
        if not 1 <= self.chains <= min(self.tokens, self.values) or self.tokens > self.names:
            raise ValueError(f"ChainTrack needs 1 <= chains <= tokens <= names and chains <= values, got {self}.")


class ChainTrackBatch(NamedTuple):
    """Statements, answers and how far away they are; every tensor is int64 of shape ``[B, T]``.

    Args:
        name: The name that the statement defines.
        source: The name it copies from; the index ``names`` stands for "none".
        value: The value it sets; the index ``values`` stands for "none".
        label: The value of the statement's chain: the answer at every position.
        depth: Hops from the statement to the one that holds its value.
    """

    name: Tensor
    source: Tensor
    value: Tensor
    label: Tensor
    depth: Tensor

    def relabel(self, permutation: Tensor) -> "ChainTrackBatch":
        """Return the same statements under other names. ``permutation`` is ``[names]``; "none" stays "none"."""
        extended = torch.cat([permutation, permutation.new_tensor([len(permutation)])])
        return self._replace(name=extended[self.name], source=extended[self.source])


def sample_chain_track(config: ChainTrackConfig, batch: int, *, generator: torch.Generator) -> ChainTrackBatch:
    """Return random sequences. The first ``chains`` statements open a chain each, the others continue a random one.

    Args:
        config: Size of the task.
        batch: Number of sequences, ``B``.
        generator: A CPU generator; all randomness comes from it.

    Example:
        >>> import torch
        >>> from hf_chainattn.tasks import ChainTrackConfig, sample_chain_track
        >>> sample_chain_track(ChainTrackConfig(), 4, generator=torch.Generator().manual_seed(0)).label.shape
        torch.Size([4, 30])
    """
    rows = torch.arange(batch)
    name = torch.rand(batch, config.names, generator=generator).argsort(-1)[:, : config.tokens]
    opening = torch.rand(batch, config.values, generator=generator).argsort(-1)[:, : config.chains]
    chain = torch.randint(config.chains, (batch, config.tokens), generator=generator)
    chain[:, : config.chains] = torch.arange(config.chains)
    source = torch.full((batch, config.tokens), config.names)
    value = torch.full((batch, config.tokens), config.values)
    value[:, : config.chains] = opening
    depth = torch.zeros(batch, config.tokens, dtype=torch.long)
    last_name = torch.full((batch, config.chains), config.names)
    last_depth = torch.full((batch, config.chains), -1)
    for token in range(config.tokens):
        continued = chain[:, token]
        source[:, token] = last_name[rows, continued]
        last_depth[rows, continued] += 1
        depth[:, token] = last_depth[rows, continued]
        last_name[rows, continued] = name[:, token]
    return ChainTrackBatch(name, source, value, opening.gather(1, chain), depth)


def accuracy_by_depth(predicted: Tensor, label: Tensor, depth: Tensor) -> dict[str, float]:
    """Return the share of right answers overall and by depth, e.g. ``{"overall": .9, "0": 1.0, "2-3": .8}``.

    Args:
        predicted: ``[B, T]``.
        label: ``[B, T]``.
        depth: ``[B, T]``. Depths that do not occur are left out.
    """
    right = predicted == label
    result = {"overall": right.double().mean().item()}
    for low, high in DEPTHS:
        among = (depth >= low) & (depth <= high)
        if among.any():
            result[str(low) if low == high else f"{low}-{high}"] = right[among].double().mean().item()
    return result
