"""The blocked operator against the oracle: every mask, convention, width and precision, forward and backward."""

import contextlib
import math
from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hf_chainattn import blocked, blocked_backward, chain_attention, chain_attention_reference, operator, tiles
from hf_chainattn.masks import AttentionMask

GAMMAS = [0.0, 0.5, 0.9, 0.99, 0.999]
TOKENS = [1, 2, 63, 64, 65, 130, 257, 1000]
HEADS = 4


def draw(tokens, *, key_heads=HEADS, batch=2, width=8, value_width=5, dtype=torch.float64, spread=1.0, seed=0):
    """Return query, key and value; logits have a standard deviation of ``spread`` squared."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(HEADS, width), (key_heads, width), (key_heads, value_width)]
    tensors = [torch.randn(batch, heads, tokens, size, generator=generator) for heads, size in shapes]
    return [tensor.mul(scale).to(dtype) for tensor, scale in zip(tensors, (spread, spread, 1), strict=True)]


def oracle(query, key, value, *, gamma, diagonal, mask=None, bias=None, softcap=None):
    """The reference, with grouped heads repeated, and softcapped logits handed over as a bias."""
    key, value = (part.repeat_interleave(HEADS // key.shape[1], 1) for part in (key, value))
    if softcap is not None:
        capped = softcap * torch.tanh(query @ key.mT / math.sqrt(query.shape[-1]) / softcap)
        query, bias = torch.zeros_like(query), capped if bias is None else capped + bias
    return chain_attention_reference(query, key, value, gamma=gamma, diagonal=diagonal, mask=mask, bias=bias)


def relative(actual, expected):
    return (torch.linalg.norm(actual.double() - expected) / torch.linalg.norm(expected)).item()


def mask_cases(tokens):
    """For each kind of mask: the arguments of ``chain_attention``, and who is visible in plain booleans."""
    rows, columns = torch.arange(tokens)[:, None], torch.arange(tokens)[None]
    causal = (columns <= rows).expand(2, 1, tokens, tokens)
    left, right = torch.ones(2, tokens, dtype=torch.bool), torch.ones(2, tokens, dtype=torch.bool)
    left[0, : tokens // 3], right[1, tokens - tokens // 3 :] = False, False
    packed = torch.stack([torch.arange(tokens) // 50, torch.arange(tokens) // 37])
    shuffled = torch.randint(3, (2, tokens), generator=torch.Generator().manual_seed(0))
    no_row = causal.clone()
    no_row[:, :, tokens // 2] = False
    same, same_shuffled = (ids[:, None, :, None] == ids[:, None, None] for ids in (packed, shuffled))
    random = causal & (torch.rand(2, HEADS, tokens, tokens, generator=torch.Generator().manual_seed(1)) < 0.3)
    additive = torch.zeros(random.shape, dtype=torch.float64)
    return {
        "causal": ({}, causal),
        "causal, written out": ({"attn_mask": causal}, causal),
        "left padding": ({"key_padding_mask": left}, causal & left[:, None, None]),
        "right padding": ({"key_padding_mask": right.long()}, causal & right[:, None, None]),
        "left padding as a mask": ({"attn_mask": causal & left[:, None, None]}, causal & left[:, None, None]),
        "one row for all queries": ({"attn_mask": right[:, None, None]}, causal & right[:, None, None]),
        "window": ({"window": 20}, causal & (rows - columns < 20)),
        "window as a mask": ({"attn_mask": causal & (rows - columns < 20)}, causal & (rows - columns < 20)),
        "window of one": ({"window": 1}, causal & (rows == columns)),
        "packed": ({"segment_ids": packed}, causal & same),
        "mixed segments": ({"segment_ids": shuffled}, causal & same_shuffled),
        "a row that sees nothing": ({"attn_mask": no_row}, no_row),
        "random, one for each head": ({"attn_mask": random}, random),
        "additive, -inf": ({"attn_mask": additive.masked_fill(~random, -math.inf)}, random),
        "additive, finfo.min": ({"attn_mask": additive.masked_fill(~random, torch.finfo(torch.float64).min)}, random),
        "all at once": (
            {"attn_mask": random, "key_padding_mask": left, "segment_ids": packed, "window": 30},
            random & left[:, None, None] & same & (rows - columns < 30),
        ),
    }


MASKS = list(mask_cases(2))


def compare(tensors, gamma, diagonal, arguments, expected_arguments, bias=None):
    """Hold output and all gradients against the oracle; return the output."""
    leaves = [tensor.clone().requires_grad_() for tensor in tensors]
    hop = torch.full((HEADS,), gamma, dtype=torch.float64, requires_grad=True)
    leaves.append(hop)
    if bias is not None:
        leaves.append(bias)
    output = chain_attention(*leaves[:3], gamma=hop, diagonal=diagonal, impl="blocked", **arguments)
    expected = oracle(*leaves[:3], gamma=hop, diagonal=diagonal, **expected_arguments)
    assert torch.linalg.norm(output - expected) <= 1e-12 * torch.linalg.norm(expected)
    cotangent = torch.randn_like(output)
    got = torch.autograd.grad(output, leaves, cotangent)
    want = torch.autograd.grad(expected, leaves, cotangent)
    # where a gradient is 0 in exact arithmetic both sides hold rounding
    floor = 1e-12 * torch.linalg.norm(cotangent) / (1 - gamma)
    for actual, gradient in zip(got, want, strict=True):
        assert actual.shape == gradient.shape
        assert torch.linalg.norm(actual - gradient) <= 1e-10 * torch.linalg.norm(gradient) + floor
    return output


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("diagonal", ["kept", "removed"])
@pytest.mark.parametrize("gamma", GAMMAS)
def test_values_and_all_gradients_equal_the_oracle(gamma, diagonal, tokens):
    """Oracle: the reference with autograd in float64; 1, 2 and 4 query heads for each key head."""
    for key_heads in (4,) if tokens == 1000 else (4, 2, 1):
        compare(draw(tokens, key_heads=key_heads, batch=1 if tokens == 1000 else 2), gamma, diagonal, {}, {})


@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("diagonal", ["kept", "removed"])
@pytest.mark.parametrize("tokens", [2, 65, 200])
def test_every_mask_equals_the_oracle(tokens, diagonal, kind):
    """Oracle: the reference with autograd under the same mask written out; rows that see nothing give exact zeros."""
    arguments, visible = mask_cases(tokens)[kind]
    for gamma in (0.0, 0.9, 0.999):
        for key_heads in (4, 2):
            output = compare(draw(tokens, key_heads=key_heads), gamma, diagonal, arguments, {"mask": visible})
            assert (output[~visible.any(-1).expand(2, HEADS, tokens)] == 0).all()


@pytest.mark.parametrize(
    "shape", [(1, HEADS, 1, 130), (HEADS, 130, 130), (130, 130), (2, 1, 130, 130), (2, 1, 130, 1)]
)
@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("diagonal", ["kept", "removed"])
def test_a_bias_gets_a_gradient_in_its_own_shape(diagonal, softcap, shape):
    """Oracle: autograd of the reference. A bias that hides nothing leaves the causal mask in place."""
    bias = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    arguments, expected = {"attn_mask": bias, "softcap": softcap}, {"bias": bias, "softcap": softcap}
    compare(draw(130, key_heads=2), 0.9, diagonal, arguments, expected, bias)


@pytest.mark.parametrize("diagonal", ["kept", "removed"])
def test_a_bias_that_hides_keys_gets_no_gradient_there(diagonal):
    """Oracle: autograd of the reference, the hidden part given as a boolean mask."""
    visible = mask_cases(130)["random, one for each head"][1]
    finite = torch.randn(visible.shape, dtype=torch.float64, requires_grad=True)
    bias = finite.masked_fill(~visible, -math.inf)
    compare(draw(130), 0.9, diagonal, {"attn_mask": bias}, {"bias": finite, "mask": visible}, finite)


def test_alibi_equals_the_oracle():
    """Oracle: the reference with the same linear bias."""
    distance = torch.arange(200)[None] - torch.arange(200)[:, None]
    slopes = 2.0 ** -torch.arange(1, HEADS + 1, dtype=torch.float64)
    alibi = slopes[:, None, None] * distance
    compare(draw(200), 0.99, "kept", {"attn_mask": alibi}, {"bias": alibi})


@pytest.mark.parametrize("diagonal", ["kept", "removed"])
@pytest.mark.parametrize("spread", [1.0, math.sqrt(6.0)])
@pytest.mark.parametrize("tokens", TOKENS)
def test_float32_is_as_exact_as_promised(tokens, spread, diagonal):
    """Oracle: the reference in float64; the rival: the reference in float32. Logits up to a deviation of 6."""
    for gamma in GAMMAS:
        tensors = draw(tokens, width=64, value_width=64, batch=1, dtype=torch.float32, spread=spread)
        exact = oracle(*(tensor.double() for tensor in tensors), gamma=gamma, diagonal=diagonal)
        error = relative(chain_attention(*tensors, gamma=gamma, diagonal=diagonal), exact)
        naive = relative(oracle(*tensors, gamma=gamma, diagonal=diagonal), exact)
        if gamma <= 0.99:
            assert error <= 1e-6
        # nothing is asked below one rounding of float32: who gets that wrong by less is a matter of luck
        assert error <= max(2 * naive, torch.finfo(torch.float32).eps / 2)


@pytest.mark.parametrize("diagonal", ["kept", "removed"])
@pytest.mark.parametrize("gamma", GAMMAS)
def test_float32_gradients_are_no_worse_than_those_of_the_naive_solve(gamma, diagonal):
    """Oracle: autograd of the reference in float64; the rival: the same in float32."""
    tensors = draw(700, width=64, value_width=64, batch=1, dtype=torch.float32, spread=2.0)
    cotangent = torch.randn(tensors[2].shape)
    exact, naive, ours = [], [], []
    for store, dtype, function in (
        (exact, torch.float64, oracle),
        (naive, torch.float32, oracle),
        (ours, torch.float32, chain_attention),
    ):
        leaves = [tensor.to(dtype).requires_grad_() for tensor in tensors]
        store.extend(
            torch.autograd.grad(function(*leaves, gamma=gamma, diagonal=diagonal), leaves, cotangent.to(dtype))
        )
    # logits are computed anew in the backward pass, in tiles of another shape, and some CPUs round those differently:
    # three errors of the size of one where the rival has one
    for best, rival, gradient in zip(exact, naive, ours, strict=True):
        assert relative(gradient, best) <= 3 * relative(rival, best)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("diagonal", ["kept", "removed"])
@pytest.mark.parametrize("gamma", GAMMAS)
def test_half_precision_costs_one_rounding_of_the_output(gamma, diagonal, dtype):
    """Oracle: the reference in float64 on the same rounded inputs, rounded once at the end."""
    tensors = draw(257, dtype=dtype, spread=2.0)
    cotangent = torch.randn(tensors[2].shape).to(dtype)
    found, exact = [], []
    for store, work, function in ((found, dtype, chain_attention), (exact, torch.float64, oracle)):
        leaves = [tensor.detach().to(work).requires_grad_() for tensor in tensors]
        output = function(*leaves, gamma=gamma, diagonal=diagonal)
        store.extend([output, *torch.autograd.grad(output, leaves, cotangent.to(work))])
    # the rest is the error of float32
    for ours, best, rest in zip(found, exact, (1e-6, 1e-5, 1e-5, 1e-5), strict=True):
        assert ours.dtype == dtype
        assert relative(ours, best) <= 1.001 * relative(best.to(dtype), best) + rest


@contextlib.contextmanager
def blocks_of(rows):
    """Let no sequence be short, and take it in blocks of so many rows; ``None``: as ever."""
    if rows is None:
        yield
        return
    with (
        mock.patch.object(operator, "SHORT", 0),
        mock.patch.object(blocked, "block_of", return_value=rows),
        mock.patch.object(blocked_backward, "block_of", return_value=rows),
    ):
        yield


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("diagonal", ["kept", "removed"])
@pytest.mark.parametrize("rows", [None, 3], ids=["one block", "three blocks"])
def test_gradcheck(rows, diagonal, softcap):
    """Oracle: finite differences in query, key, value, gamma and bias, with the output and U both used."""
    torch.manual_seed(0)
    query, key, value = draw(7, key_heads=2, batch=1, width=3, value_width=2)
    bias = torch.randn(1, HEADS, 7, 7, dtype=torch.float64).masked_fill(torch.ones(7, 7).triu(1).bool(), -math.inf)
    bias[..., 3, :] = bias[..., 1] = -math.inf
    gamma = torch.tensor([0.0, 0.4, 0.9, 0.99], dtype=torch.float64)
    # a hidden logit has no derivative by differences: only the finite part is an argument
    hidden = bias == -math.inf
    leaves = [tensor.clone().requires_grad_() for tensor in (query, key, value, gamma, bias.masked_fill(hidden, 0.0))]

    def function(query, key, value, gamma, finite):
        mask = finite.masked_fill(hidden, -math.inf)
        return chain_attention(
            query, key, value, gamma=gamma, diagonal=diagonal, attn_mask=mask, softcap=softcap, return_u=True
        )

    with blocks_of(rows):
        assert torch.autograd.gradcheck(function, leaves)


@given(
    tokens=st.integers(1, 140),
    gamma=st.floats(0.0, 0.999),
    diagonal=st.sampled_from(["kept", "removed"]),
    key_heads=st.sampled_from([1, 2, 4]),
    density=st.floats(0.0, 1.0),
    window=st.none() | st.integers(1, 150),
    segments=st.integers(1, 4),
    padding=st.integers(0, 20),
    block=st.sampled_from([None, 5, 32, 48]),
    seed=st.integers(0, 2**31),
)
def test_any_mix_of_masks_equals_the_oracle(
    tokens, gamma, diagonal, key_heads, density, window, segments, padding, block, seed
):
    """Oracle: autograd of the reference under the masks intersected by hand."""
    generator = torch.Generator().manual_seed(seed)
    rows, columns = torch.arange(tokens)[:, None], torch.arange(tokens)[None]
    mask = (torch.rand(2, 1, tokens, tokens, generator=generator) < density) & (columns <= rows)
    ids = torch.randint(segments, (2, tokens), generator=generator)
    real = torch.arange(tokens) >= torch.tensor([padding, 0])[:, None]
    visible = mask & (ids[:, None, :, None] == ids[:, None, None]) & real[:, None, None]
    if window is not None:
        visible = visible & (rows - columns < window)
    leaves = [tensor.requires_grad_() for tensor in draw(tokens, key_heads=key_heads, seed=seed)]
    arguments = {"attn_mask": mask, "segment_ids": ids, "key_padding_mask": real, "window": window}
    with blocks_of(block):
        output = chain_attention(*leaves, gamma=gamma, diagonal=diagonal, **arguments)
        gradients = torch.autograd.grad(output.square().sum(), leaves)
    expected = oracle(*leaves, gamma=gamma, diagonal=diagonal, mask=visible)
    torch.testing.assert_close(output, expected, rtol=1e-9, atol=1e-12)
    for gradient, best in zip(gradients, torch.autograd.grad(expected.square().sum(), leaves), strict=True):
        torch.testing.assert_close(gradient, best, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("kind", ["causal", "left padding", "window", "a row that sees nothing", "packed"])
def test_nothing_is_read_before_it_is_written(kind):
    """Oracle: fresh memory filled with nan by torch."""
    arguments, _ = mask_cases(700)[kind]
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.utils.deterministic.fill_uninitialized_memory
        leaves = [tensor.float().requires_grad_() for tensor in draw(700, key_heads=2, width=8, value_width=8)]
        output = chain_attention(*leaves, gamma=0.9, impl="blocked", **arguments)
        gradients = torch.autograd.grad(output.sum(), leaves)
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(tensor.isfinite().all() for tensor in (output, *gradients))


@pytest.mark.parametrize("diagonal", ["kept", "removed"])
@pytest.mark.parametrize("gamma", [0.9, 0.999])
def test_the_way_without_the_private_kernel_gives_the_same(monkeypatch, gamma, diagonal):
    """Oracle: the reference in float64, with and without PyTorch's fused kernel for earlier keys."""
    tensors = draw(1100, batch=1, width=16, value_width=16, key_heads=2)
    expected = oracle(*tensors, gamma=gamma, diagonal=diagonal)
    calls = []
    fused = tiles.Tiles.fused_read
    monkeypatch.setattr(tiles.Tiles, "fused_read", lambda *args: calls.append(0) or fused(*args))
    assert relative(chain_attention(*tensors, gamma=gamma, diagonal=diagonal), expected) <= 1e-12
    assert len(calls) == 2
    monkeypatch.setattr(tiles, "_FLASH", "a_name_that_torch_does_not_have")
    assert relative(chain_attention(*tensors, gamma=gamma, diagonal=diagonal), expected) <= 1e-12
    assert len(calls) == 2


def test_a_second_derivative_is_refused_and_the_dense_form_has_one():
    """Oracle: gradgradcheck of the dense form."""
    leaves = [tensor.requires_grad_() for tensor in draw(4, batch=1, width=2, value_width=2)]
    output = chain_attention(*leaves, gamma=0.9)
    (gradient,) = torch.autograd.grad(output.sum(), leaves[0], create_graph=True)
    with pytest.raises(NotImplementedError, match="impl='dense'"):
        torch.autograd.grad(gradient.sum(), leaves[0])
    assert torch.autograd.gradgradcheck(lambda *qkv: chain_attention(*qkv, gamma=0.9, impl="dense"), leaves)


def test_blocked_refuses_a_mask_that_shows_the_future():
    tensors = draw(6)
    mask = torch.ones(6, 6, dtype=torch.bool).tril()
    mask[0, 3] = True
    with pytest.raises(ValueError, match="impl='blocked' needs a mask in which no token sees a later one"):
        chain_attention(*tensors, gamma=0.9, attn_mask=mask, impl="blocked")


class Largest(TorchDispatchMode):
    """Notes the largest piece of memory behind any tensor that an operation returns."""

    def __init__(self):
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self.bytes = max(self.bytes, tensor.untyped_storage().nbytes())
        return result


@pytest.mark.parametrize("kind", ["nothing", "attn_mask", "key_padding_mask", "segment_ids", "window"])
def test_no_piece_of_memory_grows_with_the_square_of_the_tokens(kind):
    """Oracle: the sizes of all tensors inside forward and backward, at T and 4 T; the given mask is linear itself."""
    sizes = []
    for tokens in (600, 2400):
        places = torch.arange(tokens).expand(2, -1)
        masks = {
            "attn_mask": (places > 70)[:, None, None],
            "key_padding_mask": places < 500,
            "segment_ids": places // 90,
            "window": 100,
        }
        given = {name: mask if name == kind else None for name, mask in masks.items()}
        query, key, value = (tensor.float() for tensor in draw(tokens, key_heads=2, width=8, value_width=8))
        gamma, halting = torch.full((HEADS,), 0.9), torch.full((HEADS,), 0.1)
        # the fused kernel takes the plain case alone
        settings = {"kept": True, "scale": 1.0, "softcap": None if kind == "nothing" else 5.0}
        with Largest() as largest:
            mask = AttentionMask(**given, is_causal=True, tokens=tokens)
            saved = blocked.blocked_forward(query, key, value, gamma, halting, mask, **settings)
            record = (gamma, halting, mask, *saved[1:])
            blocked_backward.blocked_backward(
                saved.output, saved.mixed, query, key, value, *record, **settings, with_gamma=True, bias=None
            )
        sizes.append(largest.bytes)
    # blocks are twice as wide from 2048 tokens on
    assert sizes[1] <= 8.1 * sizes[0]


@pytest.mark.parametrize("kind", ["window", "window as a mask", "packed"])
def test_work_is_proportional_to_what_is_seen(monkeypatch, kind):
    """Oracle: the number of logits computed. Doubling T doubles it; without the mask it grows fourfold."""
    counts = []
    products = tiles.Tiles._products
    monkeypatch.setattr(
        tiles.Tiles,
        "_products",
        lambda self, rows, columns: (
            counts.append((rows.stop - rows.start) * (columns.stop - columns.start)) or products(self, rows, columns)
        ),
    )
    totals = []
    for tokens in (800, 1600):
        leaves = [tensor.requires_grad_() for tensor in draw(tokens, width=4, value_width=4)]
        chain_attention(*leaves, gamma=0.9, **mask_cases(tokens)[kind][0]).sum().backward()
        totals.append(sum(counts))
        counts.clear()
    assert 1.9 * totals[0] <= totals[1] <= 2.2 * totals[0]
