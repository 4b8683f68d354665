"""The benchmark of certification refuses wrong votes, compares loops that do the same, and says what it missed."""

import pytest
import torch
from scipy import stats

from benchmarks import certify as bench
from benchmarks.certify_memory import added
from benchmarks.certify_page import certify_tables
from benchmarks.registry import target
from hf_certify.noise import draw_noise

IMAGE = torch.rand(3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(("rows", "draws"), [(32, 100), (64, 64), (50, 49)])
def test_the_gate_lets_the_right_votes_pass(rows, draws):
    bench.gate(bench.convnet(8), IMAGE, rows=rows, draws=draws)


def test_the_gate_stops_votes_on_other_noise(monkeypatch):
    """Negative control: the noise of another input."""
    monkeypatch.setattr(bench, "draw_noise", lambda *args, index, **kwargs: draw_noise(*args, index=8, **kwargs))
    with pytest.raises(AssertionError, match="the loop counts"):
        bench.gate(bench.convnet(8), IMAGE, rows=64, draws=500)


def test_the_plain_loop_counts_the_same_distribution():
    """Oracle: a chi-squared test of the two samples of votes, which a right loop fails with chance 1e-9."""
    torch.manual_seed(0)
    model = bench.convnet(8)
    # an untrained head has one winner: votes are spread by noise on its logits
    model[-1].weight.data.mul_(20)
    plain = bench.plain(model, IMAGE, 100, 3000)
    loop = bench.SmoothedClassifier(model, sigma=bench.SIGMA, num_classes=10, seed=0).predict(IMAGE, n=3000).counts
    assert plain.sum() == 3000
    seen = [(a, b) for a, b in zip(plain.tolist(), loop, strict=True) if a + b > 0]
    assert len(seen) > 2
    assert stats.chi2_contingency(list(zip(*seen, strict=True))).pvalue > 1e-9


def test_memory_of_the_loop_does_not_grow_and_that_of_all_copies_does():
    """Peaks of this process; the stored figures come from fresh ones."""
    few, many = added("loop", 500), added("loop", 5000)
    assert many - few < 4
    assert added("at once", 5000) > 50


def test_the_section_names_missed_targets_and_groups_rows():
    rows = [
        {"part": "forward", "model": "ViT", "batch": 16, "ratio": 1.1},
        {"part": "forward", "case": "share", "share": 0.9, **target(0.9, at_least=0.95)},
        {"part": "plain", "model": "convnet 8", "batch": 64, "ratio": 1.4, **target(1.4, at_least=1.3)},
        {"part": "memory", "draws": 1000, "extra_MiB": 3.0},
    ]
    blocks = certify_tables(rows)
    assert blocks[0] == "1 of 2 targets are met. Missed: forward, share (>= 0.95)."
    assert [block.split("\n")[0] for block in blocks if block.startswith("###")] == [
        "### Over the forward passes alone",
        "### Over a plain loop",
        "### Extra memory",
    ]
    assert "**missed**" in "".join(blocks)
