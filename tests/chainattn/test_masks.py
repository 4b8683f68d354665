"""What a mask means: who decides about order, and what is found out by looking at it once."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hf_chainattn import chain_attention, chain_attention_reference
from hf_chainattn.masks import AttentionMask

TOKENS = 12
CAUSAL = torch.ones(TOKENS, TOKENS, dtype=torch.bool).tril()
PREFIX = CAUSAL.clone()
PREFIX[:4, :4] = True
EVERYTHING = torch.ones_like(CAUSAL)
PADDING = torch.arange(TOKENS) < 9
BIAS = torch.linspace(-1, 1, TOKENS * TOKENS, dtype=torch.float64).view(TOKENS, TOKENS)


def additive(mask):
    return torch.zeros(mask.shape, dtype=torch.float64).masked_fill(~mask, -math.inf)


# attn_mask, is_causal, who is visible, what is added
ORDER = {
    "nothing, causal": (None, True, CAUSAL, None),
    "nothing, not causal": (None, False, EVERYTHING, None),
    "one row, causal": (PADDING[None], True, CAUSAL & PADDING, None),
    "one row, not causal": (PADDING[None], False, EVERYTHING & PADDING, None),
    "one additive row, causal": (additive(PADDING[None]), True, CAUSAL & PADDING, None),
    "boolean causal": (CAUSAL, False, CAUSAL, None),
    "boolean prefix, flag says causal": (PREFIX, True, PREFIX, None),
    "boolean full, flag says causal": (EVERYTHING, True, EVERYTHING, None),
    "additive prefix, flag says causal": (additive(PREFIX), True, PREFIX, None),
    "additive and biased prefix, flag says causal": (BIAS + additive(PREFIX), True, PREFIX, BIAS),
    "bias, causal": (BIAS, True, CAUSAL, BIAS),
    "bias, not causal": (BIAS, False, EVERYTHING, BIAS),
}


@pytest.mark.parametrize("impl", ["auto", "dense", "reference"])
@pytest.mark.parametrize("case", list(ORDER))
def test_who_decides_about_order(case, impl):
    """Oracle: the reference under the visible keys that the documentation promises."""
    attn_mask, is_causal, visible, bias = ORDER[case]
    query, key, value = torch.randn(3, 2, 3, TOKENS, 5, dtype=torch.float64).unbind(0)
    output = chain_attention(query, key, value, gamma=0.9, attn_mask=attn_mask, is_causal=is_causal, impl=impl)
    expected = chain_attention_reference(query, key, value, gamma=0.9, mask=visible, bias=bias)
    torch.testing.assert_close(output, expected, rtol=1e-11, atol=1e-13)


@given(tokens=st.integers(1, 1200), batch=st.integers(1, 3), density=st.floats(0, 1), seed=st.integers(0, 2**31))
def test_the_reach_of_a_mask_is_found_exactly(tokens, batch, density, seed):
    """Oracle: nonzero entries of the whole mask."""
    generator = torch.Generator().manual_seed(seed)
    mask = (torch.rand(batch, 1, tokens, tokens, generator=generator) < density * 10 / tokens).tril()
    read = AttentionMask(mask, is_causal=False, tokens=tokens)
    assert read.triangular
    seen = mask.any(0)[0].nonzero()
    for start in {0, tokens // 2, tokens - 1}:
        stop = min(start + 7, tokens)
        earliest = [j for t, j in seen.tolist() if start <= t < stop]
        latest = [t for t, j in seen.tolist() if start <= j < stop]
        # sizes of tiles are multiples of 16
        assert min([start, *earliest]) - 16 < read.first_key(start, stop) <= min([start, *earliest])
        last = max([stop - 1, *latest])
        assert last < read.query_stop(start, stop) <= min(last + 16, tokens)


def test_a_causal_mask_written_out_costs_nothing_more():
    """Oracle: the flag of a call without a mask. A mask that differs in one entry is not taken for it."""
    assert AttentionMask(is_causal=True, tokens=700).plain
    causal = torch.ones(2, 1, 700, 700, dtype=torch.bool).tril()
    assert AttentionMask(causal, is_causal=False, tokens=700).plain
    causal[1, 0, 600, 13] = False
    assert not AttentionMask(causal, is_causal=True, tokens=700).plain
    causal[1, 0, 600, 13] = causal[0, 0, 13, 600] = True
    assert not AttentionMask(causal, is_causal=True, tokens=700).triangular


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_half_of_the_most_negative_number_hides_and_less_only_lowers(dtype):
    """Oracle: the reference with the key hidden, and with the bias added."""
    query, key, value = torch.randn(3, 1, 1, 4, 5, dtype=torch.float64).unbind(0)
    lowest = torch.finfo(dtype).min
    for entry, hides in ((lowest, True), (lowest / 2, True), (-math.inf, True), (lowest / 4, False)):
        bias = torch.zeros(4, 4, dtype=dtype)
        # the row sees nothing else, so that a lowered logit still takes all of the attention
        bias[2] = -math.inf
        bias[2, 1] = entry
        output = chain_attention(query, key, value, gamma=0.5, attn_mask=bias + additive(CAUSAL[:4, :4]).to(dtype))
        assert (output[0, 0, 2] == 0).all() == hides
