"""The task: its answers can be found by hand, and its depths are what they say."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hf_chainattn.tasks import ChainTrackConfig, accuracy_by_depth, sample_chain_track


def answers_by_lookup(config, batch):
    """Follow every statement with a dictionary, one sequence at a time."""
    labels, depths = [], []
    for names, sources, values in zip(*(batch[i].tolist() for i in range(3)), strict=True):
        known = {}
        for name, source, value in zip(names, sources, values, strict=True):
            known[name] = (value, 0) if source == config.names else (known[source][0], known[source][1] + 1)
            assert (source == config.names) == (value != config.values)
            labels.append(known[name][0])
            depths.append(known[name][1])
    shape = batch.label.shape
    return torch.tensor(labels).reshape(shape), torch.tensor(depths).reshape(shape)


@given(
    tokens=st.integers(1, 48),
    chains=st.integers(1, 8),
    relabelled=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_labels_and_depths_follow_from_the_statements(tokens, chains, relabelled, seed):
    """Oracle: a dictionary that executes the statements."""
    config = ChainTrackConfig(tokens=tokens, chains=min(chains, tokens))
    generator = torch.Generator().manual_seed(seed)
    batch = sample_chain_track(config, 3, generator=generator)
    if relabelled:
        batch = batch.relabel(torch.randperm(config.names, generator=generator))
    labels, depths = answers_by_lookup(config, batch)
    assert torch.equal(batch.label, labels)
    assert torch.equal(batch.depth, depths)
    assert all(len(set(row)) == tokens for row in batch.name.tolist())


def test_the_same_seed_gives_the_same_task():
    first, second = (
        sample_chain_track(ChainTrackConfig(), 5, generator=torch.Generator().manual_seed(3)) for _ in range(2)
    )
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_accuracy_by_depth_counts_each_range_by_itself():
    depth = torch.tensor([[0, 1, 2, 3, 4]])
    label = torch.zeros(1, 5, dtype=torch.long)
    predicted = torch.tensor([[0, 1, 0, 1, 0]])
    assert accuracy_by_depth(predicted, label, depth) == {"overall": 0.6, "0": 1.0, "1": 0.0, "2-3": 0.5, "4-7": 1.0}


@pytest.mark.parametrize("sizes", [{"chains": 0}, {"chains": 9}, {"tokens": 49}, {"tokens": 2}])
def test_sizes_that_cannot_be_are_refused(sizes):
    with pytest.raises(ValueError, match="1 <= chains <= tokens <= names"):
        ChainTrackConfig(**sizes)
