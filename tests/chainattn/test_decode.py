"""Decoding from a cache of keys and ``U`` against the oracle on the whole sequence, however it is cut into chunks."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hf_chainattn import chain_attention, chain_attention_reference, chain_decode_step

GAMMAS = [0.0, 0.5, 0.9, 0.999]
CHUNKS = [7, 1, 1, 12, 16]


def inputs(tokens, *, heads=4, groups=1, batch=2, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(batch, heads, tokens, 8), (batch, heads // groups, tokens, 8), (batch, heads // groups, tokens, 5)]
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


def oracle(query, key, value, **arguments):
    groups = query.shape[1] // key.shape[1]
    return chain_attention_reference(
        query, key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1), **arguments
    )


def decode(query, key, value, chunks, attn_mask=None, cache_dtype=None, **arguments):
    """Chunk after chunk, with a cache that grows by what each step returns."""
    past_key = key[:, :, :0]
    past_u = value.new_zeros(*query.shape[:2], 0, value.shape[-1]).to(cache_dtype or value.dtype)
    outputs, start = [], 0
    for size in chunks:
        stop = start + size
        rows = attn_mask
        if attn_mask is not None:
            rows = attn_mask[..., start:stop, :stop] if attn_mask.shape[-2] > 1 else attn_mask[..., :stop]
        new = [tensor[:, :, start:stop] for tensor in (query, key, value)]
        output, u = chain_decode_step(*new, past_key, past_u, attn_mask=rows, **arguments)
        past_key = torch.cat([past_key, new[1]], 2)
        past_u = torch.cat([past_u, u.to(past_u.dtype)], 2)
        outputs.append(output)
        start = stop
    return torch.cat(outputs, 2), past_u


def relative(actual, expected):
    return (torch.linalg.norm(actual.double() - expected) / torch.linalg.norm(expected)).item()


def causal(tokens):
    return torch.ones(tokens, tokens, dtype=torch.bool).tril()


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("diagonal", ["kept", "removed"])
@pytest.mark.parametrize("gamma", GAMMAS)
def test_chunks_chained_equal_the_whole(gamma, diagonal, groups):
    """Oracle: the reference on all tokens at once for ``Y``, and ``(I - g A_c) U = (1 - g) V`` for ``U``."""
    tensors = inputs(sum(CHUNKS), groups=groups)
    output, u = decode(*tensors, CHUNKS, gamma=gamma, diagonal=diagonal)
    assert relative(output, oracle(*tensors, gamma=gamma, diagonal=diagonal)) <= 1e-12
    query, key, value = tensors[0], *(part.repeat_interleave(groups, 1) for part in tensors[1:])
    logits = (query @ key.mT / 8**0.5).masked_fill(~causal(sum(CHUNKS)), -torch.inf)
    attention = torch.softmax(logits, -1)
    inside = attention if diagonal == "kept" else attention.tril(-1)
    assert relative(u - gamma * inside @ u, (1 - gamma) * value) <= 1e-12


@pytest.mark.parametrize("scale", [None, 0.7])
@pytest.mark.parametrize("diagonal", ["kept", "removed"])
@pytest.mark.parametrize("tokens", [1, 2, 19])
def test_an_empty_past_is_chain_attention_on_the_chunk(tokens, diagonal, scale):
    """Oracle: the reference."""
    tensors = inputs(tokens, groups=2)
    output, _ = decode(*tensors, [tokens], gamma=0.9, diagonal=diagonal, scale=scale)
    assert relative(output, oracle(*tensors, gamma=0.9, diagonal=diagonal, scale=scale)) <= 1e-12


@pytest.mark.parametrize("diagonal", ["kept", "removed"])
def test_a_prompt_of_chain_attention_is_continued(diagonal):
    """Oracle: the reference on the whole; the prompt's ``U`` comes from ``chain_attention(..., return_u=True)``."""
    query, key, value = inputs(20, groups=2)
    arguments = {"gamma": 0.9, "diagonal": diagonal}
    _, u = chain_attention(query[:, :, :15], key[:, :, :15], value[:, :, :15], return_u=True, **arguments)
    new = [tensor[:, :, 15:] for tensor in (query, key, value)]
    output, _ = chain_decode_step(*new, key[:, :, :15], u, **arguments)
    assert relative(output, oracle(query, key, value, **arguments)[:, :, 15:]) <= 1e-12


@given(
    chunks=st.lists(st.integers(1, 6), min_size=1, max_size=6),
    gamma=st.floats(0.0, 0.99),
    diagonal=st.sampled_from(["kept", "removed"]),
    density=st.floats(0.0, 1.0),
    additive=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_any_cut_and_any_mask_equal_the_whole(chunks, gamma, diagonal, density, additive, seed):
    """Oracle: the reference with the same random mask below the diagonal, rows that see nothing among them."""
    tokens = sum(chunks)
    generator = torch.Generator().manual_seed(seed)
    query, key, value = inputs(tokens, batch=1, heads=2, seed=seed)
    mask = (torch.rand(1, 2, tokens, tokens, generator=generator) < density) & causal(tokens)
    expected = chain_attention_reference(query, key, value, gamma=gamma, diagonal=diagonal, mask=mask)
    given_mask = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo().min) if additive else mask
    # an additive chunk that hides nothing would be a bias, and causal: the same here
    output, _ = decode(query, key, value, chunks, given_mask, gamma=gamma, diagonal=diagonal)
    assert output.isfinite().all()
    torch.testing.assert_close(output, expected, rtol=0, atol=1e-12 * (1 + expected.abs().max().item()))


def masks(tokens):
    row = torch.arange(tokens)
    left = torch.ones(2, 1, 1, tokens, dtype=torch.bool)
    left[0, ..., :9] = False
    window = causal(tokens) & (row[:, None] - row < 5)
    return {
        "left padding": causal(tokens) & left,
        "right padding": causal(tokens) & left.flip(-1),
        "sliding window": window,
        "window and padding": window & left,
        "a token that sees nothing": causal(tokens) & (row != tokens // 2)[:, None],
        "packed": causal(tokens) & (row[:, None] // 10 == row // 10),
    }


@pytest.mark.parametrize("form", ["boolean", "minus infinity", "smallest number"])
@pytest.mark.parametrize("kind", list(masks(3)))
@pytest.mark.parametrize("diagonal", ["kept", "removed"])
def test_masks(diagonal, kind, form):
    """Oracle: the reference with the same boolean mask."""
    tensors = inputs(sum(CHUNKS), groups=2)
    mask = masks(sum(CHUNKS))[kind]
    written = mask
    if form != "boolean":
        low = -torch.inf if form == "minus infinity" else torch.finfo(torch.bfloat16).min
        written = torch.zeros(mask.shape, dtype=torch.bfloat16).masked_fill(~mask, low)
    output, _ = decode(*tensors, CHUNKS, written, gamma=0.9, diagonal=diagonal)
    assert relative(output, oracle(*tensors, gamma=0.9, diagonal=diagonal, mask=mask)) <= 1e-12


@pytest.mark.parametrize("diagonal", ["kept", "removed"])
def test_one_row_for_all_queries_stays_causal(diagonal):
    """Oracle: the reference with the causal mask and the hidden columns, or the bias."""
    tensors = inputs(sum(CHUNKS))
    row = torch.rand(2, 1, 1, sum(CHUNKS), generator=torch.Generator().manual_seed(1)) < 0.6
    output, _ = decode(*tensors, CHUNKS, row, gamma=0.9, diagonal=diagonal)
    expected = oracle(*tensors, gamma=0.9, diagonal=diagonal, mask=row & causal(sum(CHUNKS)))
    assert relative(output, expected) <= 1e-12
    for shape in [(4, 1, sum(CHUNKS)), (1, 4, sum(CHUNKS), sum(CHUNKS))]:
        bias = torch.randn(shape, dtype=torch.float64)
        output, _ = decode(*tensors, CHUNKS, bias, gamma=0.9, diagonal=diagonal)
        assert relative(output, oracle(*tensors, gamma=0.9, diagonal=diagonal, bias=bias)) <= 1e-12


@pytest.mark.parametrize("diagonal", ["kept", "removed"])
@pytest.mark.parametrize("gamma", GAMMAS)
def test_new_tokens_that_see_one_another_both_ways(gamma, diagonal):
    """Oracle: the reference with a full mask in which every chunk is open inside and closed to later chunks."""
    tensors = inputs(sum(CHUNKS), groups=2)
    chunk = torch.repeat_interleave(torch.arange(len(CHUNKS)), torch.tensor(CHUNKS))
    mask = chunk[:, None] >= chunk
    output, _ = decode(*tensors, CHUNKS, mask, gamma=gamma, diagonal=diagonal)
    expected = oracle(*tensors, gamma=gamma, diagonal=diagonal, mask=mask)
    assert relative(output, expected) <= 1e-12
    # negative control: this mask is not the causal one
    assert gamma == 0.999 or relative(expected, oracle(*tensors, gamma=gamma, diagonal=diagonal)) > 0.05
    # an additive mask that hides something decides alone too
    additive = torch.zeros(mask.shape).masked_fill(~mask, -torch.inf)
    additive[:, 0] = -torch.inf
    output, _ = decode(*tensors, CHUNKS, additive, gamma=gamma, diagonal=diagonal)
    expected = oracle(*tensors, gamma=gamma, diagonal=diagonal, mask=additive == 0)
    assert relative(output, expected) <= 1e-12


@pytest.mark.parametrize("diagonal", ["kept", "removed"])
def test_softcap(diagonal):
    """Oracle: the reference, with the difference between capped and plain logits as a bias."""
    query, key, value = inputs(sum(CHUNKS))
    logits = query @ key.mT * 0.8
    bias = torch.tanh(logits / 1.5) * 1.5 - logits
    output, _ = decode(query, key, value, CHUNKS, gamma=0.9, diagonal=diagonal, softcap=1.5, scale=0.8)
    expected = oracle(query, key, value, gamma=0.9, diagonal=diagonal, bias=bias, scale=0.8)
    assert relative(output, expected) <= 1e-12
    assert relative(expected, oracle(query, key, value, gamma=0.9, diagonal=diagonal, scale=0.8)) > 0.01


@pytest.mark.parametrize("diagonal", ["kept", "removed"])
@pytest.mark.parametrize("gamma", [0.5, 0.9, 0.99])
def test_a_cache_of_u_in_bfloat16_costs_what_one_of_v_costs(gamma, diagonal):
    """Oracle: the reference in float64. The measure: ordinary attention with its cache of values rounded likewise."""
    tensors = inputs(256)
    expected = oracle(*tensors, gamma=gamma, diagonal=diagonal)
    single = [tensor.float() for tensor in tensors]
    output, u = decode(*single, [64] + [1] * 192, gamma=gamma, diagonal=diagonal, cache_dtype=torch.bfloat16)
    assert u.dtype == torch.bfloat16
    ordinary = oracle(*tensors, gamma=0.0)
    rounded = oracle(*tensors[:2], tensors[2].bfloat16().double(), gamma=0.0)
    assert 1e-4 < relative(output, expected) <= min(3e-3, relative(rounded, ordinary))
    exact, _ = decode(*single, [64] + [1] * 192, gamma=gamma, diagonal=diagonal)
    assert relative(exact, expected) <= 2e-6


@pytest.mark.parametrize("tokens", [1, 5])
def test_half_precision_is_computed_in_float32_also_under_autocast(tokens):
    """Oracle: the same call on inputs that were widened by hand, rounded once at the end."""
    query, key, value = inputs(tokens, groups=2, dtype=torch.bfloat16)
    past_key, past_u = torch.randn(2, 2, 9, 8).bfloat16(), torch.randn(2, 4, 9, 5).bfloat16()
    tensors = (query, key, value, past_key, past_u)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output, u = chain_decode_step(*tensors, gamma=0.9)
    expected = chain_decode_step(*(tensor.float() for tensor in tensors), gamma=0.9)
    assert output.dtype == u.dtype == torch.bfloat16
    assert output.equal(expected[0].bfloat16())
    assert u.equal(expected[1].bfloat16())


def test_nothing_cancels_as_gamma_nears_one():
    """Oracle: the reference in float64 on the float32 inputs; tokens that look almost only at themselves."""
    query = torch.randn(1, 1, 64, 8, generator=torch.Generator().manual_seed(0)) * 3
    value = torch.randn(1, 1, 64, 5, generator=torch.Generator().manual_seed(1))
    gamma = 0.9999
    for chunks in ([1] * 64, [8] * 8):
        output, _ = decode(query, query, value, chunks, gamma=gamma)
        expected = oracle(query.double(), query.double(), value.double(), gamma=gamma)
        assert relative(output, expected) <= 5e-6


@pytest.mark.parametrize("open_chunk", [True, False])
@pytest.mark.parametrize("tokens", [1, 3])
@pytest.mark.parametrize("diagonal", ["kept", "removed"])
def test_gradcheck(diagonal, tokens, open_chunk):
    """Oracle: finite differences, first and second, with an additive mask in which a token sees nothing."""
    generator = torch.Generator().manual_seed(0)
    new, past = [(1, 2, tokens, 3), (1, 1, tokens, 3), (1, 1, tokens, 2)], [(1, 1, 4, 3), (1, 2, 4, 2)]
    shapes = [*new, *past, (2, tokens, 4 + tokens)]
    tensors = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    tensors[-1][..., 1] = -torch.inf
    if tokens > 1:
        tensors[-1][:, 1] = -torch.inf
        if not open_chunk:
            tensors[-1][..., 4:] += torch.full((tokens, tokens), -torch.inf, dtype=torch.float64).triu(1)
    tensors.append(torch.tensor([0.4, 0.9], dtype=torch.float64))
    tensors = [tensor.requires_grad_() for tensor in tensors]

    def step(query, key, value, past_key, past_u, bias, gamma):
        new = (query, key, value)
        return chain_decode_step(*new, past_key, past_u, gamma=gamma, diagonal=diagonal, attn_mask=bias)

    assert torch.autograd.gradcheck(step, tensors)
    assert torch.autograd.gradgradcheck(step, tensors, fast_mode=True)


@pytest.mark.parametrize("diagonal", ["kept", "removed"])
def test_gradients_through_a_chain_of_chunks_equal_those_of_the_whole(diagonal):
    """Oracle: autograd of the reference, in query, key, value and gamma."""
    tensors = [tensor.requires_grad_() for tensor in inputs(sum(CHUNKS), groups=2)]
    gamma = torch.tensor([0.3, 0.6, 0.9, 0.99], dtype=torch.float64, requires_grad=True)
    output, _ = decode(*tensors, CHUNKS, gamma=gamma, diagonal=diagonal)
    expected = oracle(*tensors, gamma=gamma, diagonal=diagonal)
    cotangent = torch.randn(output.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    got = torch.autograd.grad(output, (*tensors, gamma), cotangent)
    want = torch.autograd.grad(expected, (*tensors, gamma), cotangent)
    for actual, gradient in zip(got, want, strict=True):
        assert relative(actual, gradient) <= 1e-10


def test_a_cache_of_plain_values_gives_another_result():
    """Negative control: with as many key heads as query heads nothing but the result tells ``V`` from ``U``."""
    query, key, value = inputs(20)
    new = [tensor[:, :, 19:] for tensor in (query, key, value)]
    output, _ = chain_decode_step(*new, key[:, :, :19], value[:, :, :19], gamma=0.9)
    assert relative(output, oracle(query, key, value, gamma=0.9)[:, :, 19:]) > 0.5


def wrong(**changes):
    """A call that fits, with some arguments replaced."""
    query, key, value = inputs(3, groups=2)
    arguments = {
        "query": query,
        "key": key,
        "value": value,
        "past_key": torch.zeros(2, 2, 4, 8),
        "past_u": torch.zeros(2, 4, 4, 5),
        "gamma": 0.9,
    }
    return chain_decode_step(**{**arguments, **changes})


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"past_u": torch.zeros(2, 2, 4, 5)}, ValueError, "U is per query head"),
        ({"past_u": torch.zeros(2, 4, 3, 5)}, ValueError, "past_u must have the shape"),
        ({"past_u": torch.zeros(2, 4, 4, 6)}, ValueError, "past_u must have the shape"),
        ({"past_u": torch.zeros(2, 4, 4, 5, dtype=torch.long)}, TypeError, "past_u must be a floating point tensor"),
        ({"past_u": None}, TypeError, "past_u must be a floating point tensor"),
        ({"past_key": torch.zeros(2, 4, 4, 8)}, ValueError, "past_key must have the shape"),
        ({"past_key": torch.zeros(2, 2, 4, 7)}, ValueError, "past_key must have the shape"),
        ({"past_key": torch.zeros(2, 4, 8)}, ValueError, "past_key must have the shape"),
        ({"gamma": 1.0}, ValueError, "gamma must be in"),
        ({"gamma": "0.9"}, TypeError, "gamma must be a number"),
        ({"diagonal": "both"}, ValueError, "diagonal must be one of"),
        ({"attn_mask": torch.ones(3, 7, dtype=torch.long)}, TypeError, "attn_mask must be boolean or floating point"),
        ({"attn_mask": torch.ones(3, 3, dtype=torch.bool)}, ValueError, "attn_mask must be broadcastable"),
        ({"attn_mask": torch.ones(7, dtype=torch.bool)}, ValueError, "attn_mask must be broadcastable"),
        ({"key": torch.zeros(2, 2, 7, 8), "value": torch.zeros(2, 2, 7, 5)}, ValueError, "same tokens"),
    ],
)
def test_what_cannot_work_is_refused(changes, error, message):
    wrong()
    with pytest.raises(error, match=message):
        wrong(**changes)
