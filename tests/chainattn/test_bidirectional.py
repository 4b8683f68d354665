"""Chain attention where tokens see later ones, against the definition, and the honesty of its solvers."""

import logging
import pickle
import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hf_chainattn import bidirectional, chain_attention_reference, solvers
from hf_chainattn.bidirectional import full_backward, full_forward
from hf_chainattn.blocked_backward import Gradients
from hf_chainattn.errors import ChainAttentionError, InexactSolveError, InexactSolveWarning
from hf_chainattn.masks import AttentionMask
from hf_chainattn.solvers import System, solve

BATCH, HEADS, WIDTH, VALUE_WIDTH = 2, 4, 8, 5
SCALE = WIDTH**-0.5


def draw(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def inputs(tokens, *, groups=HEADS, dtype=torch.float64, seed=0):
    shapes = [(BATCH, HEADS, tokens, WIDTH), (BATCH, groups, tokens, WIDTH), (BATCH, groups, tokens, VALUE_WIDTH)]
    return [draw(*shape, seed=seed + place, dtype=dtype) for place, shape in enumerate(shapes)]


def bidirectional_mask(tokens):
    return {}, torch.ones(1, 1, tokens, tokens, dtype=torch.bool)


def padding(tokens):
    """The first batch row has its padding on the right, the second on the left."""
    present = torch.ones(BATCH, tokens, dtype=torch.bool)
    count = tokens // 3
    present[0, tokens - count :] = False
    present[1, :count] = False
    return {"key_padding_mask": present}, present[:, None, None].expand(-1, 1, tokens, -1)


def prefix(tokens):
    """As a prefix language model: the first third sees itself whole, the rest is causal."""
    visible = torch.ones(tokens, tokens, dtype=torch.bool).tril()
    visible[: tokens // 3 + 1, : tokens // 3 + 1] = True
    return {"attn_mask": visible}, visible[None, None]


def blind_row(tokens):
    visible = torch.ones(BATCH, 1, tokens, tokens, dtype=torch.bool)
    visible[1, :, tokens // 2] = False
    return {"attn_mask": visible}, visible


def unseen_column(tokens):
    visible = torch.ones(1, HEADS, tokens, tokens, dtype=torch.bool)
    visible[:, 1, :, tokens // 2] = False
    return {"attn_mask": visible}, visible


def packed_and_near(tokens):
    segments = (torch.arange(tokens) * 2 // max(tokens, 1)).expand(BATCH, -1)
    near = (torch.arange(tokens)[:, None] - torch.arange(tokens)).abs() < 7
    visible = (segments[:, None, :, None] == segments[:, None, None]) & near
    return {"segment_ids": segments, "window": 7}, visible


MASKS = [bidirectional_mask, padding, prefix, blind_row, unseen_column, packed_and_near]


class Case:
    """One call of the two functions, and the same call of the oracle."""

    def __init__(self, tensors, gamma, given_mask, visible, *, diagonal="kept", softcap=None, bias=None):
        self.tensors, self.visible, self.bias, self.softcap, self.diagonal = tensors, visible, bias, softcap, diagonal
        self.gamma = torch.as_tensor(gamma, dtype=tensors[0].dtype).expand(HEADS).contiguous()
        self.mask = AttentionMask(**given_mask, is_causal=False, tokens=tensors[0].shape[2])
        self.settings = {
            "kept": diagonal == "kept",
            "scale": SCALE,
            "softcap": softcap,
            "tolerance": None,
            "on_inexact": "raise",
        }

    def forward(self, **settings):
        return full_forward(*self.tensors, self.gamma, 1 - self.gamma, self.mask, **(self.settings | settings))

    def backward(self, saved, d_output, d_mixed=None, **settings):
        arguments = (*self.tensors, self.gamma, 1 - self.gamma, self.mask, *saved[1:])
        return full_backward(
            d_output, d_mixed, *arguments, with_gamma=True, bias=self.bias, **(self.settings | settings)
        )

    def oracle(self):
        """Return the output of the reference, and what it can be differentiated by."""
        leaves = [tensor.detach().double().requires_grad_() for tensor in (*self.tensors, self.gamma)]
        query, key, value = leaves[:3]
        key, value = (part.repeat_interleave(HEADS // part.shape[1], 1) for part in (key, value))
        bias = None if self.bias is None else self.bias.detach().double().requires_grad_()
        logits = bias
        if self.softcap is not None:
            capped = self.softcap * torch.tanh(query @ key.mT * SCALE / self.softcap)
            logits = capped if bias is None else capped + bias
            query = torch.zeros_like(query)
        arguments = {"gamma": leaves[3], "diagonal": self.diagonal, "mask": self.visible, "bias": logits}
        output = chain_attention_reference(query, key, value, scale=SCALE, **arguments)
        return output, leaves if bias is None else [*leaves, bias]

    def check(self, values=1e-12, gradients=1e-10):
        saved = self.forward()
        expected, leaves = self.oracle()
        assert relative(saved.output, expected) <= values
        cotangent = draw(*expected.shape, seed=9)
        want = torch.autograd.grad(expected, leaves, cotangent)
        got = self.backward(saved, cotangent.to(saved.output))
        # where attention cannot change at all, gradients are 0 up to rounding
        floor = gradients / 100 * torch.linalg.norm(cotangent) / (1 - self.gamma.max())
        for name, actual, gradient in zip(got._fields, got, want, strict=False):
            assert actual.shape == gradient.shape
            assert torch.linalg.norm(actual - gradient) <= gradients * torch.linalg.norm(gradient) + floor, name
        assert (len(want) == 5) == (got.bias is not None)


def relative(actual, expected):
    return (torch.linalg.norm(actual.double() - expected) / torch.linalg.norm(expected)).item()


@pytest.mark.parametrize("build", MASKS)
@pytest.mark.parametrize("tokens", [1, 2, 33, 130])
@pytest.mark.parametrize("diagonal", ["kept", "removed"])
@pytest.mark.parametrize("gamma", [0.0, 0.5, 0.9, 0.99, 0.999])
def test_values_and_gradients_equal_the_oracle(gamma, diagonal, tokens, build):
    """Oracle: the reference with autograd, float64."""
    Case(inputs(tokens), gamma, *build(tokens), diagonal=diagonal).check()


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("diagonal", ["kept", "removed"])
def test_heads_share_keys_and_have_their_own_gamma(groups, diagonal):
    """Oracle: the reference with the grouped heads repeated."""
    gamma = torch.tensor([0.0, 0.3, 0.9, 0.995], dtype=torch.float64)
    Case(inputs(21, groups=groups), gamma, *padding(21), diagonal=diagonal).check()


BIASES = [(1, HEADS, 1, 19), (HEADS, 19, 19), (19, 19), (BATCH, 1, 19, 19), (BATCH, 1, 1, 19), (1, 1, 19, 1), (1, 19)]


@pytest.mark.parametrize("shape", BIASES)
@pytest.mark.parametrize("softcap", [None, 1.5])
def test_a_bias_gets_its_gradient_in_its_own_shape(shape, softcap):
    """Oracle: the reference with autograd, given the same bias, and with a softcap the capped logits as bias."""
    bias = draw(*shape, seed=5)
    _, visible = padding(19)
    hidden = {"attn_mask": bias, "key_padding_mask": visible[:, 0, 0]}
    Case(inputs(19, groups=2), 0.9, hidden, visible, bias=bias, softcap=softcap).check()


@pytest.mark.parametrize("diagonal", ["kept", "removed"])
@pytest.mark.parametrize("build", [bidirectional_mask, padding, blind_row])
def test_softcap_bounds_the_logits(build, diagonal):
    """Oracle: the reference with the capped logits handed over as a bias on queries of zero."""
    Case(inputs(20), 0.9, *build(20), diagonal=diagonal, softcap=0.7).check()


@given(
    tokens=st.integers(1, 20),
    gamma=st.floats(0.0, 0.99),
    diagonal=st.sampled_from(["kept", "removed"]),
    density=st.floats(0.0, 1.0),
    groups=st.sampled_from([1, 2, 4]),
    seed=st.integers(0, 2**31),
)
def test_any_mask_equals_the_oracle(tokens, gamma, diagonal, density, groups, seed):
    """Oracle: the reference under random masks, given as additive ones, by -inf or as transformers writes it."""
    visible = torch.rand(BATCH, HEADS, tokens, tokens, generator=torch.Generator().manual_seed(seed)) < density
    added = draw(BATCH, HEADS, tokens, tokens, seed=seed, dtype=torch.float32)
    least = -torch.inf if seed % 2 else torch.finfo(torch.float32).min
    case = Case(
        inputs(tokens, groups=groups, seed=seed),
        gamma,
        {"attn_mask": added.masked_fill(~visible, least)},
        visible,
        diagonal=diagonal,
    )
    case.bias = added
    expected, leaves = case.oracle()
    saved = case.forward()
    torch.testing.assert_close(saved.output, expected, rtol=1e-9, atol=1e-12)
    assert (saved.output[~visible.any(-1)] == 0).all()
    case.bias = case.mask.attn_mask
    cotangent = draw(*expected.shape, seed=1)
    got, want = case.backward(saved, cotangent), torch.autograd.grad(expected, leaves, cotangent)
    torch.testing.assert_close(tuple(got), want, rtol=1e-8, atol=1e-10)


def dense(query, key, value, gamma, visible, bias, *, kept):
    """Return ``Y``, ``U``, ``U`` as read of the others, natural logs of the sums, and attention to the others."""
    key, value = (part.repeat_interleave(HEADS // part.shape[1], 1) for part in (key, value))
    logits = (query @ key.mT * SCALE + bias).masked_fill(~visible, -torch.inf)
    empty = ~visible.any(-1, keepdim=True)
    attention = torch.softmax(logits.masked_fill(empty, 0.0), -1).masked_fill(~visible, 0.0)
    off = attention * (1 - torch.eye(query.shape[2], dtype=query.dtype))
    hop = gamma.view(-1, 1, 1)
    system = torch.eye(query.shape[2], dtype=query.dtype) - hop * (attention if kept else off)
    mixed = torch.linalg.solve(system, (1 - hop) * value)
    sums = torch.logsumexp(logits.masked_fill(empty, torch.inf), -1, keepdim=True)
    return attention @ mixed, mixed, off @ mixed, sums, off.sum(-1, keepdim=True)


@pytest.mark.parametrize("diagonal", ["kept", "removed"])
@pytest.mark.parametrize("build", MASKS)
def test_the_record_is_what_it_says_unseen_tokens_included(build, diagonal):
    """Oracle: the definitions of the five parts, by an inverse."""
    given_mask, visible = build(25)
    case = Case(inputs(25, groups=2), 0.9, given_mask, visible, diagonal=diagonal)
    expected = dense(*case.tensors, case.gamma, visible, 0.0, kept=diagonal == "kept")
    saved = case.forward()
    torch.testing.assert_close(saved.log_sum * torch.log(torch.tensor(2.0)).double(), expected[3])
    for place in (0, 1, 2, 4):
        torch.testing.assert_close(saved[place], expected[place], rtol=1e-11, atol=1e-13)


class WithBoth(torch.autograd.Function):
    """Output and ``U`` of one case as a function of tensors, gamma and bias."""

    @staticmethod
    def forward(ctx, case, *leaves):
        case.tensors, case.gamma, case.bias = list(leaves[:3]), leaves[3], leaves[4]
        case.mask.attn_mask = leaves[4]
        ctx.case, ctx.saved = case, case.forward()
        return ctx.saved.output, ctx.saved.mixed

    @staticmethod
    def backward(ctx, d_output, d_mixed):
        return None, *ctx.case.backward(ctx.saved, d_output, d_mixed)


@pytest.mark.parametrize("diagonal", ["kept", "removed"])
@pytest.mark.parametrize("softcap", [None, 1.5])
def test_gradcheck_of_both_outputs(diagonal, softcap):
    """Oracle: finite differences, with padding and so with a cotangent of the U of unseen tokens."""
    given_mask, visible = padding(5)
    bias = draw(1, HEADS, 5, 5, seed=4)
    case = Case(
        inputs(5, groups=2), 0.9, given_mask | {"attn_mask": bias}, visible, diagonal=diagonal, softcap=softcap
    )
    gamma = torch.tensor([0.1, 0.5, 0.8, 0.9], dtype=torch.float64)
    leaves = [tensor.requires_grad_() for tensor in (*case.tensors, gamma, bias)]
    assert torch.autograd.gradcheck(lambda *leaves: WithBoth.apply(case, *leaves), leaves)


@pytest.mark.parametrize("at_once", [1, 2, 3, 4, 7])
def test_the_number_of_heads_held_together_changes_nothing(at_once, monkeypatch):
    """Oracle: all of them together; masks and bias differ between rows and heads."""
    given_mask, visible = padding(17)
    bias = draw(BATCH, HEADS, 1, 17, seed=3)
    segments = torch.stack([torch.arange(17) // 9, torch.arange(17) // 6])
    given_mask |= {"attn_mask": bias, "segment_ids": segments}
    case = Case(inputs(17, groups=2), torch.tensor([0.2, 0.5, 0.9, 0.99]), given_mask, visible, bias=bias)
    together = case.forward()
    cotangents = draw(*together.output.shape, seed=6), draw(*together.output.shape, seed=7)
    gradients = case.backward(together, *cotangents)
    held = []
    monkeypatch.setattr(bidirectional, "_ELEMENTS", at_once * 17 * 17)
    monkeypatch.setattr(
        bidirectional,
        "solve",
        lambda system, *rest, **more: held.append(len(system.off)) or solve(system, *rest, **more),
    )
    torch.testing.assert_close(tuple(case.forward()), tuple(together), rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(tuple(case.backward(together, *cotangents)), tuple(gradients), rtol=1e-12, atol=1e-13)
    assert max(held) <= at_once
    assert sum(held) == 2 * BATCH * HEADS


@pytest.fixture
def iterating(monkeypatch):
    """The iteration at any size, with as many products as it likes, and LU out of reach."""
    monkeypatch.setattr(solvers, "_CROSSOVER", {torch.float32: 1, torch.float64: 1})
    monkeypatch.setattr(solvers, "_LU_SHARE", 0.01)
    monkeypatch.setattr(solvers, "_NARROWEST", 1)
    monkeypatch.setattr(solvers, "_direct", lambda *problem: pytest.fail("LU was asked for"))


@pytest.mark.usefixtures("iterating")
@pytest.mark.parametrize("build", MASKS)
@pytest.mark.parametrize("tokens", [1, 2, 33, 130])
@pytest.mark.parametrize("diagonal", ["kept", "removed"])
@pytest.mark.parametrize("gamma", [0.0, 0.9, 0.99])
def test_the_iteration_equals_the_oracle(gamma, diagonal, tokens, build):
    """Oracle: the reference with autograd, float64; LU cannot have helped."""
    Case(inputs(tokens), gamma, *build(tokens), diagonal=diagonal).check(values=1e-11, gradients=1e-10)


@pytest.mark.parametrize("iterated", [False, True])
@pytest.mark.parametrize("diagonal", ["kept", "removed"])
def test_hidden_tokens_cannot_be_felt_at_all(diagonal, iterated, request):
    """Oracle: bit equality when only the hidden tokens change, in float32, with sharp attention."""
    if iterated:
        request.getfixturevalue("iterating")
    given_mask, _ = padding(48)
    present = given_mask["key_padding_mask"]
    tensors = inputs(48, dtype=torch.float32)
    tensors[0], tensors[1] = 2 * tensors[0], 2 * tensors[1]
    results = []
    for seed in (1, 2):
        for tensor, other in zip(tensors, inputs(48, dtype=torch.float32, seed=seed), strict=True):
            tensor.copy_(torch.where(present[:, None, :, None], tensor, 20 * other))
        results.append(Case(tensors, 0.9, given_mask, None, diagonal=diagonal).forward())
    hidden = ~present[:, None, :, None].expand_as(results[0].output)
    for first, second in zip(results[0], results[1], strict=True):
        assert torch.equal(
            first.masked_fill(hidden[..., : first.shape[-1]], 0), second.masked_fill(hidden[..., : first.shape[-1]], 0)
        )
    # negative control: the hidden tokens did change, and see the others
    assert not torch.equal(results[0].output, results[1].output)


@pytest.mark.parametrize("diagonal", ["kept", "removed"])
@pytest.mark.parametrize("gamma", [0.5, 0.9, 0.99, 0.999])
@pytest.mark.parametrize("sharpness", [1, 4])
def test_float32_costs_no_more_than_twice_a_naive_float32_solve(gamma, diagonal, sharpness):
    """Oracle: the reference in float64; the yardstick is the same reference in float32. Errors of 8 draws together."""
    ours, naive = torch.zeros(5), torch.zeros(5)
    for seed in range(0, 80, 10):
        tensors = inputs(130, dtype=torch.float32, seed=seed)
        tensors[0] *= sharpness
        case = Case(tensors, gamma, *padding(130), diagonal=diagonal)
        exact, leaves = case.oracle()
        plain = [leaf.detach().float().requires_grad_() for leaf in leaves]
        rival = chain_attention_reference(
            *plain[:3], gamma=plain[3], diagonal=diagonal, mask=case.visible, scale=SCALE
        )
        saved, cotangent = case.forward(), draw(*exact.shape, seed=9, dtype=torch.float32)
        want = (exact, *torch.autograd.grad(exact, leaves, cotangent.double()))
        got = (saved.output, *case.backward(saved, cotangent)[:4])
        other = (rival, *torch.autograd.grad(rival, plain, cotangent))
        ours += torch.tensor([relative(*pair) for pair in zip(got, want, strict=True)])
        naive += torch.tensor([relative(*pair) for pair in zip(other, want, strict=True)])
    assert (ours <= 2 * naive).all()


@pytest.mark.parametrize("gamma", [0.9, 0.999])
def test_tokens_that_mostly_see_themselves_lose_no_digits(gamma):
    """Oracle: the reference in float64. At 0.999 the reference in float32 is off by up to 3e-4."""
    tensors = inputs(130, dtype=torch.float32)
    tensors[1] = 4 * tensors[0] + 0.3 * tensors[1]
    case = Case(tensors, gamma, *padding(130))
    exact, leaves = case.oracle()
    saved, cotangent = case.forward(), draw(*exact.shape, seed=9, dtype=torch.float32)
    assert relative(saved.output, exact) <= 4e-6
    want = torch.autograd.grad(exact, leaves, cotangent.double())
    for name, actual, gradient in zip(Gradients._fields, case.backward(saved, cotangent), want, strict=False):
        assert relative(actual, gradient) <= 1e-5, name


def system(tokens, *, heads=2, gamma=0.9, dtype=torch.float64, attention=None):
    """Return a system of kept diagonal, its matrices in float64, and right-hand sides."""
    if attention is None:
        attention = torch.softmax(draw(heads, tokens, tokens, seed=1), -1)
    own = attention.diagonal(dim1=-2, dim2=-1).unsqueeze(-1)
    off = attention - torch.diag_embed(own.squeeze(-1))
    parts = System(off.to(dtype), torch.full_like(own, gamma).to(dtype), (1 - gamma * own).to(dtype))
    matrices = torch.diag_embed(parts.pivot.double().squeeze(-1)) - parts.rate.double() * parts.off.double()
    return parts, matrices, draw(len(off), tokens, VALUE_WIDTH, seed=2).to(dtype)


def backward_error(matrices, right, solution):
    """Return the worst normwise backward error of a column in the maximum norm, by the textbook formula in float64."""
    right, solution = right.double(), solution.double()
    residual = (right - matrices @ solution).abs().amax(-2)
    size = matrices.abs().sum(-1).amax(-1, keepdim=True)
    return (residual / (size * solution.abs().amax(-2) + right.abs().amax(-2))).max().item()


@pytest.mark.parametrize("adjoint", [False, True])
@pytest.mark.parametrize("iterated", [False, True])
def test_both_solvers_return_the_solution_and_what_is_read_of_it(iterated, adjoint, request):
    """Oracle: torch.linalg.solve, and the products written out; some heads and columns of zeros."""
    if iterated:
        request.getfixturevalue("iterating")
    parts, matrices, right = system(40, heads=3)
    right[1], right[2, :, 3] = 0.0, 0.0
    solution, read = solve(parts, right, adjoint=adjoint, tolerance=None, on_inexact="raise")
    expected = torch.linalg.solve(matrices.mT if adjoint else matrices, right)
    torch.testing.assert_close(solution, expected, rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(read, parts.off.mT @ (parts.rate * solution) if adjoint else parts.off @ solution)
    assert (solution[1] == 0).all()


@pytest.mark.usefixtures("iterating")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_iteration_keeps_its_tolerance_in_small_columns_too(dtype):
    """Oracle: the residual in float64, against each column by itself."""
    tolerance = {torch.float32: 3e-6, torch.float64: 1e-9}[dtype]
    parts, matrices, right = system(60, dtype=dtype)
    right *= torch.tensor([1.0, 1e-8, 1e12, 1e-3, 0.0], dtype=dtype)
    solution, _ = solve(parts, right, adjoint=False, tolerance=tolerance, on_inexact="raise")
    residual = (right.double() - matrices @ solution.double()).abs().amax(1)
    assert (residual <= 1.1 * tolerance * right.double().abs().amax(1)).all()


@pytest.mark.usefixtures("iterating")
def test_more_than_one_cycle_is_taken_if_one_does_not_do(monkeypatch):
    """Oracle: the solution by torch.linalg.solve; cycles that aim far too high are corrected by the true residual."""
    monkeypatch.setattr(solvers, "_AIM", 1e8)
    cycles, cycle = [], solvers._cycle
    monkeypatch.setattr(solvers, "_cycle", lambda *given, **limit: cycles.append(limit) or cycle(*given, **limit))
    parts, matrices, right = system(60)
    solution, _ = solve(parts, right, adjoint=False, tolerance=None, on_inexact="raise")
    torch.testing.assert_close(solution, torch.linalg.solve(matrices, right), rtol=1e-9, atol=1e-9)
    assert len(cycles) > 2


@pytest.mark.parametrize(("patience", "products"), [(1.35, range(5, 10)), (1e9, range(44, 47))])
def test_heads_the_iteration_fails_at_are_solved_by_lu(patience, products, monkeypatch, caplog):
    """Oracle: torch.linalg.solve. Walks around a ring are the worst case of GMRES, and the head beside it is easy."""
    monkeypatch.setattr(solvers, "_CROSSOVER", {torch.float64: 1})
    monkeypatch.setattr(solvers, "_PATIENCE", patience)
    monkeypatch.setattr(solvers, "_NARROWEST", 1)
    tokens = 300
    ring = torch.eye(tokens, dtype=torch.float64).roll(1, 0)
    easy = torch.full_like(ring, 1 / tokens)
    parts, matrices, right = system(tokens, gamma=0.999, attention=torch.stack([ring, easy]))
    with caplog.at_level(logging.DEBUG, "hf_chainattn.solvers"):
        solution, _ = solve(parts, right, adjoint=False, tolerance=None, on_inexact="raise")
    torch.testing.assert_close(solution, torch.linalg.solve(matrices, right), rtol=1e-9, atol=1e-10)
    taken = re.search(r"2 heads of 300 tokens: (\d+) products, 1 go to LU", caplog.text)
    assert int(taken[1]) in products
    assert "backward error" in caplog.text


@pytest.mark.parametrize("iterated", [False, True])
@pytest.mark.parametrize("adjoint", [False, True])
def test_the_residual_of_a_warning_is_the_true_one(adjoint, iterated, monkeypatch):
    """Oracle: the textbook formula in float64, of a solution spoilt on purpose."""
    parts, matrices, right = system(30, dtype=torch.float32)
    name = "_iterate" if iterated else "_direct"
    whole = getattr(solvers, name)
    monkeypatch.setattr(solvers, "_CROSSOVER", {torch.float32: 1 if iterated else 100})

    def spoilt(problem, tolerance):
        solution, _, _ = whole(problem, tolerance)
        solution[1, 7, 2] += 0.01
        read = problem.read(solution)
        return solution, read, problem.errors(solution, read)[1]

    monkeypatch.setattr(solvers, name, spoilt)
    arguments = {"adjoint": adjoint, "tolerance": None}
    with pytest.warns(InexactSolveWarning, match=r"backward error of .* larger tolerance") as caught:
        solution, _ = solve(parts, right, on_inexact="warn", **arguments)
    expected = backward_error(matrices.mT if adjoint else matrices, right, solution)
    assert caught[0].message.residual == pytest.approx(expected, rel=1e-3)
    with pytest.raises(InexactSolveError, match="float64") as error:
        solve(parts, right, on_inexact="raise", **arguments)
    assert error.value.residual == caught[0].message.residual


def test_a_tolerance_below_the_rounding_of_the_dtype_is_refused_forward_and_backward():
    """Oracle: one in a million times the unit of float32 cannot be reached, and a wider tolerance can."""
    case = Case(inputs(20, dtype=torch.float32), 0.9, *bidirectional_mask(20))
    with pytest.raises(InexactSolveError, match=r"tolerance is 1\.0e-13.*impl='dense'") as error:
        case.forward(tolerance=1e-13)
    assert 1e-13 < error.value.residual < 1e-6
    saved = case.forward(tolerance=1e-6)
    with pytest.raises(InexactSolveError):
        case.backward(saved, torch.ones_like(saved.output), tolerance=1e-13)
    with pytest.warns(InexactSolveWarning):
        warned = case.backward(saved, torch.ones_like(saved.output), tolerance=1e-13, on_inexact="warn")
    torch.testing.assert_close(warned.value, case.backward(saved, torch.ones_like(saved.output)).value)


@pytest.mark.parametrize("crossover", [1, 100])
def test_a_walk_that_never_ends_is_an_error(crossover, monkeypatch):
    """Oracle: tokens that see only themselves, at gamma 1: the matrix is 0."""
    monkeypatch.setattr(solvers, "_CROSSOVER", {torch.float64: crossover})
    case = Case(inputs(6), 1.0, {"window": 1}, None)
    with pytest.raises(InexactSolveError, match="gamma of 1"):
        case.forward()
    with pytest.raises(InexactSolveError, match="gamma of 1"):
        case.backward(Case(inputs(6), 0.9, {"window": 1}, None).forward(), draw(BATCH, HEADS, 6, VALUE_WIDTH))


def test_a_pivot_too_small_for_the_iteration_leads_to_lu(monkeypatch):
    """Oracle: torch.linalg.solve; dividing by this pivot overflows."""
    monkeypatch.setattr(solvers, "_CROSSOVER", {torch.float32: 1})
    ring = torch.eye(30, dtype=torch.float64).roll(1, 0)[None]
    parts, matrices, right = system(30, attention=ring, dtype=torch.float32)
    parts.pivot.fill_(1e-39)
    solution, _ = solve(parts, right, adjoint=False, tolerance=None, on_inexact="raise")
    expected = torch.linalg.solve(matrices - torch.eye(30), right.double())
    torch.testing.assert_close(solution.double(), expected, rtol=1e-6, atol=1e-6)


def test_a_walk_of_nan_is_nan():
    """Oracle: nan among the values stays in its head and column, as in any attention; it is the caller's."""
    tensors = inputs(6)
    tensors[2][0, 1, 3, 2] = torch.nan
    output = Case(tensors, 0.9, *bidirectional_mask(6)).forward().output
    assert output[0, 1, :, 2].isnan().all()
    assert output.isnan().sum() == 6
    tensors[0][1, 0, 2] = torch.nan
    assert Case(tensors, 0.9, *bidirectional_mask(6)).forward().output[1, 0].isnan().all()


def test_nan_does_not_enter_the_iteration(monkeypatch):
    """Oracle: nan comes out in the head where it went in, and nowhere else."""
    monkeypatch.setattr(solvers, "_CROSSOVER", {torch.float64: 1})
    parts, _, right = system(10)
    right[1, 2, 3] = torch.nan
    solution, _ = solve(parts, right, adjoint=False, tolerance=None, on_inexact="raise")
    assert solution[1, :, 3].isnan().all()
    assert solution.isnan().sum() == 10


def test_the_errors_keep_what_they_carry():
    error = pickle.loads(pickle.dumps(InexactSolveError("far off", 0.5)))
    assert (str(error), error.residual) == ("far off", 0.5)
    assert isinstance(error, ChainAttentionError)
    assert isinstance(error, ArithmeticError)
    assert issubclass(InexactSolveWarning, UserWarning)


def test_an_empty_batch_has_an_empty_result():
    case = Case([tensor[:0] for tensor in inputs(4)], 0.9, *bidirectional_mask(4))
    saved = case.forward()
    assert saved.output.shape == (0, HEADS, 4, VALUE_WIDTH)
    assert [part.shape[0] for part in case.backward(saved, saved.output)[:3]] == [0, 0, 0]
