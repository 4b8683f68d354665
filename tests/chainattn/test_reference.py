"""The oracle itself, against the definition written with a matrix inverse."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hf_chainattn import chain_attention_reference


def inverse_form(query, key, value, gamma, diagonal, mask):
    """``(1-g) A inv(I - g A_c) V``, one head and one query at a time, with nothing vectorised."""
    batch, heads, tokens, width = query.shape
    result = torch.zeros_like(value)
    for b in range(batch):
        for h in range(heads):
            attention = torch.zeros(tokens, tokens, dtype=torch.float64)
            for t in range(tokens):
                seen = [j for j in range(tokens) if mask[b, h, t, j]]
                if seen:
                    logits = torch.stack([query[b, h, t] @ key[b, h, j] for j in seen]) / width**0.5
                    attention[t, seen] = logits.exp() / logits.exp().sum()
            inside = attention.clone()
            if diagonal == "removed":
                inside.fill_diagonal_(0.0)
            inverse = torch.linalg.inv(torch.eye(tokens, dtype=torch.float64) - gamma * inside)
            result[b, h] = (1 - gamma) * attention @ inverse @ value[b, h]
    return result


def masks(batch, tokens):
    causal = torch.ones(tokens, tokens, dtype=torch.bool).tril()
    full = torch.ones(batch, 1, tokens, tokens, dtype=torch.bool)
    left = full.clone()
    left[0, :, :, : tokens // 3] = False
    hidden_row = full.clone()
    hidden_row[:, :, tokens // 2] = False
    return {
        "causal": causal & full,
        "left padding": causal & left,
        "right padding": causal & left.flip(-1),
        "a row that sees nothing": causal & hidden_row,
        "bidirectional": full,
        "bidirectional with padding": left,
    }


@pytest.mark.parametrize("kind", list(masks(2, 3)))
@pytest.mark.parametrize("diagonal", ["kept", "removed"])
@pytest.mark.parametrize("gamma", [0.0, 0.5, 0.9, 0.99])
def test_reference_is_the_dense_inverse(gamma, diagonal, kind):
    """Oracle: the matrix inverse of each head in float64."""
    torch.manual_seed(0)
    query, key = torch.randn(2, 2, 3, 11, 4, dtype=torch.float64).unbind(0)
    value = torch.randn(2, 3, 11, 5, dtype=torch.float64)
    mask = masks(2, 11)[kind].expand(2, 3, 11, 11)
    expected = inverse_form(query, key, value, gamma, diagonal, mask)
    actual = chain_attention_reference(query, key, value, gamma=gamma, diagonal=diagonal, mask=mask)
    assert torch.linalg.norm(actual - expected) <= 1e-12 * torch.linalg.norm(expected)


@pytest.mark.parametrize("diagonal", ["kept", "removed"])
def test_reference_passes_gradcheck(diagonal):
    """Oracle: finite differences, in query, key, value and gamma."""
    torch.manual_seed(0)
    tensors = [torch.randn(1, 2, 5, 3, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    gamma = torch.tensor([0.3, 0.9], dtype=torch.float64, requires_grad=True)

    def function(query, key, value, gamma):
        return chain_attention_reference(query, key, value, gamma=gamma, diagonal=diagonal)

    assert torch.autograd.gradcheck(function, (*tensors, gamma))


@given(gamma=st.floats(0.0, 0.999), tokens=st.integers(1, 20), seed=st.integers(0, 2**31))
def test_kept_output_is_a_convex_mixture_of_values(gamma, tokens, seed):
    """Oracle: a walk ends somewhere with probability 1, so values of 1 stay 1 and no output leaves their range."""
    generator = torch.Generator().manual_seed(seed)
    query, key, value = torch.randn(3, 1, 1, tokens, 4, dtype=torch.float64, generator=generator).unbind(0)
    ones = chain_attention_reference(query, key, torch.ones_like(value), gamma=gamma)
    torch.testing.assert_close(ones, torch.ones_like(ones), rtol=0, atol=1e-9)
    mixed = chain_attention_reference(query, key, value, gamma=gamma)
    assert mixed.max() <= value.max() + 1e-9
    assert mixed.min() >= value.min() - 1e-9


def test_a_walk_of_copies_reaches_its_start_at_once():
    """Oracle: hop weights. Token t attends only to t - 1, so the first token is reached after t hops."""
    tokens, gamma = 6, 0.9
    logits = torch.full((tokens, tokens), -1e9, dtype=torch.float64)
    logits[0, 0] = 0
    logits[torch.arange(1, tokens), torch.arange(tokens - 1)] = 0
    zeros = torch.zeros(1, 1, tokens, 1, dtype=torch.float64)
    value = torch.eye(tokens, dtype=torch.float64)[None, None]
    mixing = chain_attention_reference(zeros, zeros, value, gamma=gamma, bias=logits)[0, 0]
    for t in range(1, tokens):
        for hop in range(1, t):
            assert mixing[t, t - hop].item() == pytest.approx((1 - gamma) * gamma ** (hop - 1), abs=1e-12)
        # the walk stays at the first token, which attends to itself
        assert mixing[t, 0].item() == pytest.approx(gamma ** (t - 1), abs=1e-12)


@pytest.mark.parametrize("gamma", [-0.1, 1.0, 1.5, float("nan")])
def test_reference_refuses_gamma_outside_its_range(gamma):
    query = torch.zeros(1, 1, 2, 2)
    with pytest.raises(ValueError, match=r"gamma must be in \[0, 1\)"):
        chain_attention_reference(query, query, query, gamma=gamma)


def test_reference_refuses_an_unknown_diagonal():
    query = torch.zeros(1, 1, 2, 2)
    with pytest.raises(ValueError, match="diagonal must be"):
        chain_attention_reference(query, query, query, gamma=0.5, diagonal="both")
