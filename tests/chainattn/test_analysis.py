"""Mixing matrices against the oracle, moves against walks counted one by one, and what the pictures say."""

import builtins

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hf_chainattn import chain_attention_reference, hop_distribution, mixing_matrix, plot_hops, plot_mixing

GAMMAS = [0.0, 0.5, 0.9, 0.999]


def inputs(tokens, *, heads=4, groups=1, batch=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(batch, heads, tokens, 8), (batch, heads // groups, tokens, 8)]
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]


def causal(tokens):
    return torch.ones(tokens, tokens, dtype=torch.bool).tril()


def masks(tokens):
    left = torch.ones(2, 1, 1, tokens, dtype=torch.bool)
    left[0, ..., : tokens // 3] = False
    blocks = torch.arange(tokens) // 3
    return {
        "causal": causal(tokens)[None, None],
        "left padding": causal(tokens) & left,
        "a token that sees nothing": causal(tokens)[None, None] & (torch.arange(tokens) != 2)[:, None],
        "bidirectional": torch.ones(1, 1, tokens, tokens, dtype=torch.bool),
        "bidirectional with padding": left.expand(2, 1, tokens, tokens),
        "blocks": (blocks[:, None] >= blocks)[None, None],
    }


def attention_of(query, key, mask):
    """Softmax attention in float64, written down once more, 0 in a row that sees nothing."""
    key = key.repeat_interleave(query.shape[1] // key.shape[1], 1)
    logits = (query @ key.mT / query.shape[-1] ** 0.5).masked_fill(~mask, -torch.inf)
    return torch.softmax(logits, -1).masked_fill(~mask, 0.0)


def coefficients(attention, gamma, diagonal, most):
    """Oracle: ``M(z)`` at roots of unity, by a complex inverse; its Fourier transform gives the coefficients."""
    count = 1024
    angles = torch.arange(count, dtype=torch.float64) * (2 * torch.pi / count)
    roots = torch.polar(torch.ones_like(angles), angles).view(count, 1, 1, 1, 1)
    own = torch.diag_embed(attention.diagonal(dim1=-2, dim2=-1)).to(torch.complex128)
    moving = (attention - own) * roots
    inside = own + moving if diagonal == "kept" else moving
    inverse = torch.linalg.inv(torch.eye(attention.shape[-1]) - gamma * inside)
    values = (1 - gamma) * (own + moving) @ inverse
    return torch.fft.fft(values, dim=0).real[: most + 1].sum(-1).movedim(0, -1) / count


def walks(attention, start, gamma, diagonal, longest):
    """Oracle: every walk of at most ``longest`` hops from ``start``, one after the other; its weight by its moves."""
    found = [0.0] * (longest + 1)
    tokens = range(len(attention))

    def go_on(place, hops, moves, weight):
        for target in tokens:
            if attention[place][target] == 0 or (diagonal == "removed" and hops and target == place):
                continue
            reached = weight * attention[place][target]
            count = moves + (target != place)
            found[count] += (1 - gamma) * reached
            if hops + 1 < longest:
                go_on(target, hops + 1, count, gamma * reached)

    go_on(start, 0, 0, 1.0)
    return found


@pytest.mark.parametrize("kind", list(masks(3)))
@pytest.mark.parametrize("diagonal", ["kept", "removed"])
@pytest.mark.parametrize("gamma", GAMMAS)
def test_mixing_values_gives_the_output(gamma, diagonal, kind):
    """Oracle: the reference, and the row sums of the convention."""
    query, key = inputs(11, groups=2)
    value = torch.randn(2, 4, 11, 5, dtype=torch.float64)
    mask = masks(11)[kind]
    matrix = mixing_matrix(query, key, gamma=gamma, diagonal=diagonal, attn_mask=mask)
    repeated = key.repeat_interleave(2, 1)
    expected = chain_attention_reference(query, repeated, value, gamma=gamma, diagonal=diagonal, mask=mask)
    assert torch.linalg.norm(matrix @ value - expected) <= 1e-12 * torch.linalg.norm(expected)
    assert matrix.min() >= 0
    assert matrix.sum(-1).max() <= 1 + 1e-12
    sums = matrix.sum(-1)[mask.any(-1).expand(2, 4, 11)]
    # walks that come to a token that sees nothing are lost
    low = 1 - gamma if diagonal == "removed" or kind == "a token that sees nothing" else 1.0
    assert sums.min() >= low - 1e-12


@pytest.mark.parametrize(
    "function", [mixing_matrix, lambda *given, **named: hop_distribution(*given, max_moves=7, **named)]
)
@pytest.mark.parametrize("diagonal", ["kept", "removed"])
def test_scale_softcap_gamma_of_each_head_and_autocast(diagonal, function):
    """Oracle: the same logits handed over as a bias, head by head, and the same call without autocast."""
    query, key = inputs(7, groups=2)
    gammas = torch.tensor([0.0, 0.5, 0.9, 0.99], dtype=torch.float64)
    given = {"diagonal": diagonal, "scale": 0.8, "softcap": 1.5}
    everything = function(query, key, gamma=gammas, **given)
    bias = torch.tanh(query @ key.repeat_interleave(2, 1).mT * 0.8 / 1.5) * 1.5
    for head, gamma in enumerate(gammas.tolist()):
        one = [torch.zeros(2, 1, 7, 1, dtype=torch.float64)] * 2
        expected = function(*one, gamma=gamma, diagonal=diagonal, attn_mask=bias[:, head : head + 1])
        torch.testing.assert_close(everything[:, head : head + 1], expected, rtol=0, atol=1e-13)
    half = [tensor.bfloat16() for tensor in (query, key)]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = function(*half, gamma=gammas, **given)
    assert inside.dtype == torch.float32
    assert inside.equal(function(*half, gamma=gammas, **given))


@pytest.mark.parametrize("kind", list(masks(3)))
@pytest.mark.parametrize("diagonal", ["kept", "removed"])
@pytest.mark.parametrize("gamma", [0.0, 0.5, 0.9])
def test_moves_are_the_coefficients_of_the_generating_function(gamma, diagonal, kind):
    """Oracle: a Fourier transform of ``M(z)`` on the unit circle, inverted as complex matrices."""
    query, key = inputs(6, groups=2)
    mask = masks(6)[kind]
    actual = hop_distribution(query, key, gamma=gamma, max_moves=20, diagonal=diagonal, attn_mask=mask)
    expected = coefficients(attention_of(query, key, mask), gamma, diagonal, 20)
    assert actual.shape == (2, 4, 6, 21)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-13)


@pytest.mark.parametrize("tokens", [3, 4])
@pytest.mark.parametrize("diagonal", ["kept", "removed"])
def test_moves_are_those_of_all_walks(diagonal, tokens):
    """Oracle: enumeration of walks. Those that were cut off weigh at most ``gamma ** hops``."""
    gamma, longest = 0.2, 20
    query, key = inputs(tokens, heads=1, batch=1, seed=tokens)
    attention = attention_of(query, key, causal(tokens))[0, 0].tolist()
    actual = hop_distribution(query, key, gamma=gamma, max_moves=longest, diagonal=diagonal)[0, 0]
    expected = [walks(attention, start, gamma, diagonal, longest) for start in range(tokens)]
    torch.testing.assert_close(
        actual, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=gamma**longest + 1e-15
    )


def test_moves_among_tokens_that_all_see_one_another_are_those_of_all_walks():
    """Oracle: enumeration of walks in both directions, with the weight of the longer ones as the tolerance."""
    gamma, longest = 0.05, 9
    query, key = inputs(3, heads=1, batch=1)
    attention = attention_of(query, key, torch.ones(3, 3, dtype=torch.bool))[0, 0].tolist()
    for diagonal in ("kept", "removed"):
        given = {"gamma": gamma, "max_moves": longest, "diagonal": diagonal, "is_causal": False}
        actual = hop_distribution(query, key, **given)[0, 0]
        expected = [walks(attention, start, gamma, diagonal, longest) for start in range(3)]
        torch.testing.assert_close(
            actual, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=2 * gamma**longest
        )


@given(
    gamma=st.floats(0.0, 0.95),
    tokens=st.integers(1, 12),
    bidirectional=st.booleans(),
    seed=st.integers(0, 2**31),
    most=st.integers(0, 30),
)
def test_moves_that_are_not_counted_are_rarer_than_hops(gamma, tokens, bidirectional, seed, most):
    """Oracle: more than ``K`` moves need more than ``K`` hops, whose weight is ``gamma ** K``."""
    query, key = inputs(tokens, seed=seed)
    moves = hop_distribution(query, key, gamma=gamma, max_moves=most, is_causal=not bidirectional)
    assert moves.min() >= 0
    assert moves.sum(-1).max() <= 1 + 1e-12
    assert moves.sum(-1).min() >= 1 - gamma**most - 1e-12
    if most >= tokens - 1 and not bidirectional:
        torch.testing.assert_close(moves.sum(-1), torch.ones_like(moves[..., 0]), rtol=0, atol=1e-12)
        assert bool((moves[..., tokens:] == 0).all())


@pytest.mark.parametrize("gamma", GAMMAS)
@pytest.mark.parametrize("diagonal", ["kept", "removed"])
def test_a_copy_chain_has_the_geometric_law(diagonal, gamma):
    """Oracle: token ``t`` reads ``t - k`` with ``(1 - gamma) gamma^(k - 1)``, and token 0 keeps what is left."""
    tokens = 6
    query = torch.zeros(1, 1, tokens, 4, dtype=torch.float64)
    mask = torch.ones(tokens - 1, dtype=torch.bool).diag(-1)
    mask[0, 0] = True
    moves = hop_distribution(query, query, gamma=gamma, max_moves=tokens, diagonal=diagonal, attn_mask=mask)[0, 0]
    matrix = mixing_matrix(query, query, gamma=gamma, diagonal=diagonal, attn_mask=mask)[0, 0]
    expected = torch.zeros(tokens, tokens + 1, dtype=torch.float64)
    for t in range(tokens):
        for k in range(1, t + 1):
            expected[t, k] = (1 - gamma) * gamma ** (k - 1)
        # kept, a walk that reached token 0 stays until it halts; removed, only a first hop from 0 itself may stay
        expected[t, t] = (gamma ** max(t - 1, 0)) * (1.0 if diagonal == "kept" else 1 - gamma)
    torch.testing.assert_close(moves, expected, rtol=0, atol=1e-14)
    by_distance = torch.stack([torch.cat([row[: t + 1].flip(0), row[t + 1 :]]) for t, row in enumerate(matrix)])
    torch.testing.assert_close(by_distance, expected[:, :tokens], rtol=0, atol=1e-14)


def test_staying_is_no_move():
    """Oracle: a token that attends to itself alone is read without a move, whatever gamma is."""
    query = torch.zeros(1, 1, 3, 4)
    given = {"gamma": 0.9, "max_moves": 2, "attn_mask": torch.eye(3, dtype=torch.bool)}
    assert hop_distribution(query, query, **given)[0, 0].tolist() == [[1.0, 0.0, 0.0]] * 3
    removed = hop_distribution(query, query, diagonal="removed", **given)[0, 0]
    torch.testing.assert_close(removed, torch.tensor([[0.1, 0.0, 0.0]] * 3))


@pytest.mark.parametrize("function", [mixing_matrix, hop_distribution])
@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"key": torch.zeros(1, 2, 4, 8)}, ValueError, "same tokens"),
        ({"key": torch.zeros(1, 3, 3, 8)}, ValueError, "multiple of the key heads"),
        ({"key": None}, TypeError, "key must be a floating point tensor"),
        ({"gamma": 1.0}, ValueError, "gamma must be in"),
        ({"diagonal": "both"}, ValueError, "diagonal must be one of"),
        ({"attn_mask": torch.ones(2, 3, dtype=torch.bool)}, ValueError, "attn_mask must be broadcastable"),
        ({"attn_mask": torch.ones(3, 3, dtype=torch.long)}, TypeError, "attn_mask must be boolean or floating point"),
    ],
)
def test_what_cannot_work_is_refused(function, changes, error, message):
    arguments = {"query": torch.zeros(1, 2, 3, 8), "key": torch.zeros(1, 2, 3, 8), "gamma": 0.9}
    if function is hop_distribution:
        arguments["max_moves"] = 2
    function(**arguments)
    with pytest.raises(error, match=message):
        function(**{**arguments, **changes})


@pytest.mark.parametrize(
    ("max_moves", "error", "message"),
    [(-1, ValueError, "at least 0"), (1.0, TypeError, "an integer"), (True, TypeError, "an integer")],
)
def test_a_number_of_moves_is_a_whole_number(max_moves, error, message):
    query = torch.zeros(1, 2, 3, 8)
    with pytest.raises(error, match=f"max_moves must be {message}"):
        hop_distribution(query, query, gamma=0.9, max_moves=max_moves)


@pytest.fixture
def pyplot():
    pyplot = pytest.importorskip("matplotlib.pyplot", reason="the extra `plots` is not installed")
    yield pyplot
    pyplot.close("all")


def tick_names(axis):
    return [label.get_text() for label in axis.get_ticklabels()]


def test_the_picture_of_a_mixing_matrix_shows_its_weights_and_names(pyplot):
    """Oracle: the matrix itself. A token may hold what would be a formula or a line break."""
    matrix = torch.tensor([[1.0, 0.0, 0.0], [0.25, 0.75, 0.0], [0.5, 0.25, 0.25]], dtype=torch.bfloat16)
    axes = plot_mixing(matrix, tokens=["a", "$b$_", "\n"])
    assert axes.images[0].get_array().tolist() == matrix.tolist()
    assert axes.images[0].get_clim() == (0.0, 1.0)
    assert tick_names(axes.xaxis) == tick_names(axes.yaxis) == ["a", "$b$_", "\\n"]
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("value read from", "output of")
    assert [other.get_ylabel() for other in axes.figure.axes if other is not axes] == ["weight"]
    axes.figure.canvas.draw()


@pytest.mark.parametrize("count", [1, 40, 41])
def test_names_are_written_where_they_can_be_read(pyplot, count):
    axes = plot_mixing(torch.eye(count), tokens=[f"token {number}" for number in range(count)])
    axes.figure.canvas.draw()
    assert tick_names(axes.xaxis).count("token 0") == (count <= 40)


def test_pictures_are_drawn_where_they_are_told_to_and_never_shown(pyplot, monkeypatch):
    monkeypatch.setattr(pyplot, "show", lambda: pytest.fail("a picture was shown"))
    _, (left, middle, right) = pyplot.subplots(1, 3)
    assert plot_mixing(torch.zeros(2, 2), axes=left) is left
    assert plot_hops(torch.tensor([0.5, 0.25]), axes=middle) is middle
    assert plot_hops(torch.tensor([[0.5, 0.25]]), axes=right) is right
    assert len(pyplot.get_fignums()) == 1


def test_the_pictures_of_moves_show_shares_and_the_rest(pyplot):
    """Oracle: the shares, and 1 less their sum."""
    moves = torch.tensor([[0.5, 0.25, 0.125], [1.0, 0.0, 0.0]])
    bars = plot_hops(moves[0])
    assert [bar.get_height() for bar in bars.patches] == [0.5, 0.25, 0.125, 0.125]
    assert tick_names(bars.xaxis) == ["0", "1", "2", "rest"]
    table = plot_hops(moves, tokens=["a", "b"])
    assert table.images[0].get_array().tolist() == [[0.5, 0.25, 0.125, 0.125], [1.0, 0.0, 0.0, 0.0]]
    assert tick_names(table.yaxis) == ["a", "b"]
    for axes in (bars, table):
        axes.figure.canvas.draw()


@pytest.mark.parametrize(
    ("draw", "message"),
    [
        (lambda: plot_mixing(torch.zeros(2, 3)), "one sequence and one head"),
        (lambda: plot_mixing(torch.zeros(1, 1, 2, 2)), "one sequence and one head"),
        (lambda: plot_mixing(torch.zeros(2, 2), tokens=["a"]), "a name for each of the 2 rows, got 1"),
        (lambda: plot_hops(torch.zeros(1, 2, 3)), "distribution must have the shape"),
        (lambda: plot_hops(torch.zeros(0)), "distribution must have the shape"),
        (lambda: plot_hops(torch.zeros(2, 3), tokens=["a", "b", "c"]), "a name for each of the 2 rows, got 3"),
    ],
)
def test_a_picture_of_something_else_is_refused(draw, message):
    with pytest.raises(ValueError, match=message):
        draw()


@pytest.mark.parametrize("draw", [lambda: plot_mixing(torch.eye(2)), lambda: plot_hops(torch.ones(1))])
def test_without_matplotlib_the_error_says_how_to_install_it(draw, monkeypatch):
    real = builtins.__import__

    def without_matplotlib(name, *rest):
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without_matplotlib)
    with pytest.raises(ImportError, match=r"pip install \"hf-chain-highway-certify\[plots\]\""):
        draw()
