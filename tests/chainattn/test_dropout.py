"""Dropout on the read-out: its mean, its gradients, and that a seed repeats it."""

import pytest
import torch

from hf_chainattn import chain_attention
from hf_chainattn import dropout as module
from hf_chainattn.masks import AttentionMask

TOKENS = 70


def draw(*, key_heads=2, tokens=TOKENS, requires_grad=False):
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, 4, tokens, 6), (2, key_heads, tokens, 6), (2, key_heads, tokens, 3)]
    tensors = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    return [tensor.requires_grad_(requires_grad) for tensor in tensors]


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("impl", ["auto", "dense"])
def test_the_mean_is_the_output_without_dropout(impl):
    """Oracle: the output without dropout; 4000 draws, a bound of 8 standard errors (chance below 1e-13 an entry)."""
    torch.manual_seed(0)
    tensors = [tensor[:1, :1] for tensor in draw(key_heads=4, tokens=6)]
    clean = chain_attention(*tensors, gamma=0.9)
    draws = torch.stack([chain_attention(*tensors, gamma=0.9, dropout_p=0.3, impl=impl) for _ in range(4000)])
    assert (draws[0] != clean).any()
    error = draws.std(0) / 4000**0.5
    assert ((draws.mean(0) - clean).abs() <= 8 * error + 1e-12).all()


@pytest.mark.parametrize("impl", ["auto", "dense"])
def test_a_generator_repeats_the_draw_and_leaves_the_global_one_alone(impl):
    tensors = draw()
    before = torch.get_rng_state()
    first, again = (chain_attention(*tensors, gamma=0.9, dropout_p=0.5, impl=impl, generator=seeded()) for _ in "ab")
    other = chain_attention(*tensors, gamma=0.9, dropout_p=0.5, impl=impl, generator=seeded(1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("case", ["causal", "bias", "softcap", "window and padding", "bidirectional"])
@pytest.mark.parametrize("diagonal", ["kept", "removed"])
def test_output_and_gradients_equal_dense_attention_with_the_same_weights_dropped(diagonal, case):
    """Oracle: autograd of the dense form, with the weights that fall given to it as a matrix."""
    bias = torch.randn(4, TOKENS, TOKENS, dtype=torch.float64, requires_grad=True)
    padding = torch.ones(2, TOKENS, dtype=torch.bool)
    padding[0, :9] = False
    arguments = {
        "causal": {},
        "bias": {"attn_mask": bias},
        "softcap": {"softcap": 1.0},
        "window and padding": {"window": 20, "key_padding_mask": padding},
        "bidirectional": {"is_causal": False, "attn_mask": padding[:, None, None]},
    }[case]
    leaves = [*draw(requires_grad=True), torch.full((4,), 0.9, dtype=torch.float64, requires_grad=True)]
    query, key, value, gamma = leaves
    leaves += [bias] if case == "bias" else []
    shared = {"gamma": gamma, "diagonal": diagonal, **arguments}
    output = chain_attention(query, key, value, dropout_p=0.4, generator=seeded(), **shared)
    cotangent = torch.randn_like(output)
    got = torch.autograd.grad(output, leaves, cotangent)

    # the same matrix of fallen weights: one stream for each block of rows, over the keys that the block may see
    mask = AttentionMask(
        *(arguments.get(name) for name in ("attn_mask", "key_padding_mask", "segment_ids", "window")),
        is_causal=arguments.get("is_causal", True),
        tokens=TOKENS,
    )
    seed = module.draw_seed(seeded())
    kept = torch.zeros(8, TOKENS, TOKENS, dtype=torch.float64)
    for rows, columns in module._panels(mask):
        kept[:, rows, columns] = module._kept(kept[:, rows, columns], 0.4, seed, rows.start)
    _, mixed = chain_attention(query, key, value, impl="dense", return_u=True, **shared)
    eye = torch.eye(TOKENS, dtype=torch.float64).expand(2, 2, -1, -1)
    weights = chain_attention(query, key, eye, impl="dense", **{**shared, "gamma": 0.0})
    expected = (weights * kept.view_as(weights)) @ mixed
    torch.testing.assert_close(output, expected, rtol=1e-10, atol=1e-12)
    want = torch.autograd.grad(expected, leaves, cotangent)
    for actual, gradient in zip(got, want, strict=True):
        torch.testing.assert_close(actual, gradient, rtol=1e-9, atol=1e-11)


def test_a_second_derivative_is_refused():
    leaves = draw(requires_grad=True)
    output = chain_attention(*leaves, gamma=0.9, dropout_p=0.2)
    (gradient,) = torch.autograd.grad(output.sum(), leaves[2], create_graph=True)
    with pytest.raises(NotImplementedError, match="impl='dense'"):
        torch.autograd.grad(gradient.sum(), leaves[0])
