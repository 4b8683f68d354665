"""The public function against the oracle: values, gradients, masks, precision, bad input."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hf_chainattn import UnsupportedCacheError, chain_attention, chain_attention_reference

GAMMAS = [0.0, 0.5, 0.9, 0.99]


def inputs(tokens, *, heads=4, groups=1, batch=2, dtype=torch.float64, seed=0, requires_grad=False):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(batch, heads, tokens, 8), (batch, heads // groups, tokens, 8), (batch, heads // groups, tokens, 5)]
    tensors = [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]
    return [tensor.requires_grad_(requires_grad) for tensor in tensors]


def oracle(query, key, value, **arguments):
    groups = query.shape[1] // key.shape[1]
    return chain_attention_reference(
        query, key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1), **arguments
    )


def relative(actual, expected):
    return (torch.linalg.norm(actual.double() - expected) / torch.linalg.norm(expected)).item()


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("tokens", [1, 2, 33])
@pytest.mark.parametrize("diagonal", ["kept", "removed"])
@pytest.mark.parametrize("gamma", GAMMAS)
def test_values_and_gradients_equal_the_oracle(gamma, diagonal, tokens, groups):
    """Oracle: the reference with autograd, float64, grouped heads repeated."""
    tensors = inputs(tokens, groups=groups, requires_grad=True)
    hop = torch.full((4,), gamma, dtype=torch.float64, requires_grad=True)
    output = chain_attention(*tensors, gamma=hop, diagonal=diagonal)
    expected = oracle(*tensors, gamma=hop, diagonal=diagonal)
    assert relative(output, expected) <= 1e-12
    cotangent = torch.randn_like(output)
    # at T = 1 attention is constant, so gradients of query and key are 0 up to rounding
    floor = 1e-12 * torch.linalg.norm(cotangent)
    got = torch.autograd.grad(output, (*tensors, hop), cotangent)
    want = torch.autograd.grad(expected, (*tensors, hop), cotangent)
    for actual, gradient in zip(got, want, strict=True):
        assert torch.linalg.norm(actual - gradient) <= 1e-10 * torch.linalg.norm(gradient) + floor


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("diagonal", ["kept", "removed"])
def test_gradcheck(diagonal, causal):
    """Oracle: finite differences, with a masked column and a bias that has a gradient."""
    tensors = [tensor[:, :2, :, :3] for tensor in inputs(5, batch=1)]
    bias = torch.randn(1, 2, 5, 5, dtype=torch.float64)
    bias[..., 1] = -torch.inf
    if causal:
        bias = bias.masked_fill(torch.ones(5, 5, dtype=torch.bool).triu(1), -torch.inf)
    gamma = torch.tensor([0.4, 0.9], dtype=torch.float64)
    arguments = [tensor.clone().requires_grad_() for tensor in (*tensors, gamma)]
    assert torch.autograd.gradcheck(
        lambda q, k, v, g: chain_attention(q, k, v, gamma=g, diagonal=diagonal, attn_mask=bias), arguments
    )


@pytest.mark.parametrize("tokens", [1, 7, 64])
def test_gamma_zero_is_ordinary_attention(tokens):
    """Oracle: torch's scaled_dot_product_attention."""
    query, key, value = inputs(tokens)
    expected = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)
    torch.testing.assert_close(chain_attention(query, key, value, gamma=0.0), expected, rtol=0, atol=1e-12)


@given(
    tokens=st.integers(1, 24),
    gamma=st.floats(0.0, 0.99),
    diagonal=st.sampled_from(["kept", "removed"]),
    density=st.floats(0.0, 1.0),
    causal=st.booleans(),
    additive=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_any_mask_equals_the_oracle(tokens, gamma, diagonal, density, causal, additive, seed):
    """Oracle: the reference under random masks, rows that see nothing among them."""
    query, key, value = inputs(tokens, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(2, 1, tokens, tokens, generator=generator) < density
    if causal:
        mask = mask.tril()
    given_mask = mask
    if additive:
        given_mask = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)
    # not causal: an additive mask that happens to hide nothing would otherwise be taken for a bias
    arguments = {"attn_mask": given_mask, "is_causal": False}
    output = chain_attention(query, key, value, gamma=gamma, diagonal=diagonal, **arguments)
    expected = oracle(query, key, value, gamma=gamma, diagonal=diagonal, mask=mask)
    torch.testing.assert_close(output, expected, rtol=1e-9, atol=1e-12)
    assert (output[~mask.any(-1).expand(2, 4, tokens)] == 0).all()


@pytest.mark.parametrize("diagonal", ["kept", "removed"])
@pytest.mark.parametrize("causal", [True, False])
def test_hidden_tokens_cannot_be_felt_at_all(causal, diagonal):
    """Oracle: bit equality when only the hidden tokens change, in float32, with attention sharp enough to pivot."""
    query, key, value = (8 * tensor for tensor in inputs(48, dtype=torch.float32))
    mask = torch.ones(48, 48, dtype=torch.bool)
    mask = mask.tril() if causal else mask
    mask = mask[None, None].repeat(2, 1, 1, 1)
    mask[0, ..., 40:] = False
    mask[1, ..., :9] = False
    outputs = []
    for seed in (1, 2):
        for row, hidden in ((0, slice(40, 48)), (1, slice(0, 9))):
            for tensor, other in zip((query, key, value), inputs(48, dtype=torch.float32, seed=seed), strict=True):
                tensor[row, :, hidden] = 20 * other[row, :, hidden]
        outputs.append(chain_attention(query, key, value, gamma=0.9, diagonal=diagonal, attn_mask=mask))
    assert torch.equal(outputs[0][0, :, :40], outputs[1][0, :, :40])
    assert torch.equal(outputs[0][1, :, 9:], outputs[1][1, :, 9:])
    if not causal:
        # negative control: the hidden tokens did change, and see the others
        assert not torch.equal(outputs[0][0, :, 40:], outputs[1][0, :, 40:])


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 2e-6), (torch.bfloat16, 6e-3), (torch.float16, 8e-4)])
@pytest.mark.parametrize("diagonal", ["kept", "removed"])
@pytest.mark.parametrize("gamma", GAMMAS)
def test_reduced_precision_costs_no_more_than_its_output_rounding(gamma, diagonal, dtype, bound):
    """Oracle: the reference in float64 on the same rounded inputs."""
    tensors = inputs(130, dtype=dtype)
    output = chain_attention(*tensors, gamma=gamma, diagonal=diagonal)
    assert output.dtype == dtype
    expected = oracle(*(tensor.double() for tensor in tensors), gamma=gamma, diagonal=diagonal)
    assert relative(output, expected) <= bound


def test_autocast_changes_nothing():
    tensors = inputs(20, dtype=torch.float32)
    plain = chain_attention(*tensors, gamma=0.9)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(chain_attention(*tensors, gamma=0.9), plain)


def test_softcap_bounds_the_logits():
    """Oracle: the reference with the capped logits handed over as a bias on queries of zero."""
    query, key, value = inputs(9)
    logits = query @ key.transpose(-2, -1) * 8**-0.5
    capped = 1.5 * torch.tanh(logits / 1.5)
    expected = chain_attention_reference(torch.zeros_like(query), key, value, gamma=0.9, bias=capped)
    torch.testing.assert_close(chain_attention(query, key, value, gamma=0.9, softcap=1.5), expected)


def test_implementations_agree_and_the_choice_is_respected():
    tensors = inputs(17)
    dense = chain_attention(*tensors, gamma=0.9, impl="dense")
    torch.testing.assert_close(chain_attention(*tensors, gamma=0.9, impl="reference"), dense, rtol=0, atol=1e-12)
    blocked = chain_attention(*tensors, gamma=0.9, impl="blocked")
    torch.testing.assert_close(blocked, dense, rtol=0, atol=1e-12)
    assert torch.equal(chain_attention(*tensors, gamma=0.9, impl="auto"), blocked)


def test_more_keys_than_queries_is_refused_by_name():
    query, key, value = inputs(6)
    message = r"1 queries and 6 keys.*chain_decode_step\(query, key, value, past_key, past_u, ...\).*use_cache=False"
    with pytest.raises(UnsupportedCacheError, match=message):
        chain_attention(query[:, :, -1:], key, value, gamma=0.9)
    with pytest.raises(ValueError, match="plain cached values"):
        chain_attention(query[:, :, -1:], key, value, gamma=0.9)


BAD = {
    "gamma of 1": ({"gamma": 1.0}, ValueError, r"gamma must be in \[0, 1\), got 1.0"),
    "gamma below 0": ({"gamma": -0.5}, ValueError, r"gamma must be in \[0, 1\)"),
    "gamma nan": ({"gamma": float("nan")}, ValueError, r"gamma must be in \[0, 1\)"),
    "gamma as text": ({"gamma": "0.9"}, TypeError, "gamma must be a number"),
    "gamma of wrong size": ({"gamma": torch.rand(3)}, ValueError, "1 or H = 4 elements"),
    "unknown diagonal": ({"diagonal": "gone"}, ValueError, "diagonal must be one of"),
    "unknown impl": ({"impl": "fast"}, ValueError, "impl must be one of"),
    "dropout of 1": ({"dropout_p": 1.0}, ValueError, "dropout_p must be in"),
    "integer mask": ({"attn_mask": torch.ones(6, 6, dtype=torch.long)}, TypeError, "boolean or floating point"),
    "mask of wrong size": ({"attn_mask": torch.ones(6, 5, dtype=torch.bool)}, ValueError, "broadcastable"),
    "mask of too many heads": ({"attn_mask": torch.ones(3, 6, 6, dtype=torch.bool)}, ValueError, "broadcastable"),
    "mask of one dimension": ({"attn_mask": torch.ones(6, dtype=torch.bool)}, ValueError, "broadcastable"),
    "padding as numbers": ({"key_padding_mask": torch.ones(2, 6)}, TypeError, "key_padding_mask must be boolean"),
    "padding of wrong size": ({"key_padding_mask": torch.ones(2, 5).bool()}, ValueError, r"\[B, T\] = \[2, 6\]"),
    "segments as numbers": ({"segment_ids": torch.ones(2, 6)}, TypeError, "segment_ids must be boolean or integer"),
    "segments of one row": ({"segment_ids": torch.ones(1, 6).long()}, ValueError, "segment_ids must have the shape"),
    "window as a flag": ({"window": True}, TypeError, "window must be an integer"),
    "half a window": ({"window": 1.5}, TypeError, "window must be an integer"),
    "softcap of 0": ({"softcap": 0.0}, ValueError, "softcap must be positive"),
    "softcap of nothing": ({"softcap": float("inf")}, ValueError, "softcap must be positive"),
    "scale as a tensor": ({"scale": torch.ones(())}, TypeError, "scale must be a number"),
    "dropout of None": ({"dropout_p": None}, TypeError, "dropout_p must be a number"),
    "mask as a list": ({"attn_mask": [[True]]}, TypeError, "attn_mask must be a tensor, got list"),
    "no window": ({"window": 0}, ValueError, "window must be at least 1"),
    "unknown reaction": ({"on_inexact": "ignore"}, ValueError, "on_inexact must be one of"),
    "reference with dropout": ({"impl": "reference", "dropout_p": 0.1}, ValueError, "knows neither"),
    "reference with U": ({"impl": "reference", "return_u": True}, ValueError, "knows neither"),
}


@pytest.mark.parametrize("case", list(BAD))
def test_bad_arguments_are_named(case):
    arguments, error, message = BAD[case]
    with pytest.raises(error, match=message):
        chain_attention(*inputs(6), **({"gamma": 0.5} | arguments))


@pytest.mark.parametrize("impl", ["auto", "blocked", "dense", "reference"])
@pytest.mark.parametrize("sizes", [(0, 6), (2, 0)])
def test_nothing_to_attend_to_gives_nothing(sizes, impl):
    """Oracle: the shape that scaled_dot_product_attention gives, and gradients of the inputs' shapes."""
    batch, tokens = sizes
    leaves = [torch.randn(batch, heads, tokens, 8, requires_grad=True) for heads in (4, 2, 2)]
    segments = torch.zeros(batch, tokens, dtype=torch.long)
    output = chain_attention(*leaves, gamma=0.9, segment_ids=segments, impl=impl)
    assert output.shape == (batch, 4, tokens, 8)
    assert [gradient.shape for gradient in torch.autograd.grad(output.sum(), leaves)] == [
        leaf.shape for leaf in leaves
    ]


# torch itself compiles a rule of forward mode with it, at the first use
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
def test_forward_mode_is_refused_and_the_dense_form_has_it():
    """Oracle: the reverse-mode Jacobian. Without the refusal torch would return zeros without a word."""
    query, key, value = (tensor[:1, :, :3] for tensor in inputs(3, groups=1))

    def function(impl):
        return lambda query: chain_attention(query, key, value, gamma=0.9, impl=impl)

    with pytest.raises(NotImplementedError, match="no forward-mode derivative: use impl='dense'"):
        torch.func.jacfwd(function("auto"))(query)
    forward = torch.func.jacfwd(function("dense"))(query)
    torch.testing.assert_close(forward, torch.autograd.functional.jacobian(function("auto"), query))


# torch has no rule for batches of this operator, takes them one by one, and says so
@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_vmap_without_gradients_equals_a_loop():
    query, key, value = inputs(6)
    many = torch.stack([query, query.flip(2)])
    found = torch.func.vmap(lambda each: chain_attention(each, key, value, gamma=0.9))(many)
    assert torch.equal(found, torch.stack([chain_attention(each, key, value, gamma=0.9) for each in many]))
    with pytest.raises(RuntimeError, match="functorch transforms"):
        torch.func.grad(lambda each: chain_attention(each, key, value, gamma=0.9).sum())(query)


def test_an_output_may_be_changed_in_place():
    """Oracle: the gradient of the same sum out of place."""
    leaves = inputs(6, requires_grad=True)
    output = chain_attention(*leaves, gamma=0.9)
    output += 1
    gradients = torch.autograd.grad(output.square().sum(), leaves)
    expected = torch.autograd.grad((chain_attention(*leaves, gamma=0.9) + 1).square().sum(), leaves)
    assert all(map(torch.equal, gradients, expected))


def test_shapes_that_do_not_fit_are_named():
    query, key, value = inputs(6)
    with pytest.raises(ValueError, match=r"query must have the shape \[B, H, T, D\]"):
        chain_attention(query[0], key, value, gamma=0.5)
    with pytest.raises(ValueError, match="must agree"):
        chain_attention(query, key, value[:1], gamma=0.5)
    with pytest.raises(ValueError, match="multiple of the key heads"):
        chain_attention(query, key[:, :3], value[:, :3], gamma=0.5)
    with pytest.raises(TypeError, match="query must be a floating point tensor"):
        chain_attention(query.long(), key, value, gamma=0.5)
