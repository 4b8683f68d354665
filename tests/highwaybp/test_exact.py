"""At k = L - 1 Highway-BP is backpropagation: the oracle is torch's own backward pass of the untouched model."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_highwaybp import HighwayBP
from tests.helpers.tiny_models import LAYERS, tiny_batch, tiny_model
from tests.highwaybp.toys import PostNorm, Residual, gradients, inputs, largest_error, toy

TRANSFORMERS = ("gpt2", "llama", "bert", "vit", "bloom")


@pytest.mark.parametrize("k", [LAYERS - 1, LAYERS + 5, None])
@pytest.mark.parametrize("name", TRANSFORMERS)
def test_k_from_blocks_minus_one_equals_backpropagation_in_one_sweep(name, k):
    """Oracle: autograd, dropout on with the same seed, padding in the batch; one VJP for each block."""
    model, batch = tiny_model(name).train(), tiny_batch(name)
    expected = gradients(model, lambda: model(**batch).loss)
    with HighwayBP(model, k=k) as hbp:
        found = gradients(model, lambda: model(**batch).loss)
    assert largest_error(expected, found) < 1e-12
    assert hbp.stats.exact
    assert hbp.stats.vjps == LAYERS
    assert hbp.stats.update_norms == ()


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_errors_shrink_with_k_and_are_there(name):
    """Negative control of the test above: below k = L - 1 the gradients differ from autograd's, ever less."""
    model, batch = tiny_model(name).train(), tiny_batch(name)
    expected = gradients(model, lambda: model(**batch).loss)
    errors = []
    for k in range(LAYERS - 1):
        with HighwayBP(model, k=k):
            found = gradients(model, lambda: model(**batch).loss)
        total = sum(float((expected[n] - found[n]).square().sum()) for n in expected)
        errors.append(total)
    assert errors[0] > errors[1] > errors[2] > 1e-12 * errors[0]


@pytest.mark.parametrize("k", [0, 1, 2])
def test_an_approximate_pass_costs_one_vjp_less_in_every_iteration(k):
    """Oracle: counting. Iteration t leaves out the t settled blocks at the top; the last pass visits all."""
    model, batch = tiny_model("gpt2").train(), tiny_batch("gpt2")
    with HighwayBP(model, k=k) as hbp:
        model(**batch).loss.backward()
    assert hbp.stats.vjps == LAYERS + sum(LAYERS - t for t in range(1, k + 1))
    assert len(hbp.stats.update_norms) == k
    assert (hbp.stats.k, hbp.stats.exact, hbp.stats.blocks) == (k, False, LAYERS)


@settings(max_examples=25)
@given(
    depth=st.integers(1, 6),
    extra=st.integers(0, 2),
    rows=st.integers(1, 4),
    residual=st.sampled_from(["default", "identity", "zero", 0.8, 0.3]),
    post_norm=st.booleans(),
)
def test_every_residual_map_is_exact_at_k_of_depth_minus_one(depth, extra, rows, residual, post_norm):
    """Oracle: autograd. K only says how the error is carried while it is there."""
    model, x = toy(PostNorm if post_norm else Residual, depth), inputs(rows)
    expected = gradients(model, lambda: model(x))
    with HighwayBP(model, k=depth - 1 + extra, residual=residual):
        found = gradients(model, lambda: model(x))
    assert largest_error(expected, found) < 1e-12


def test_iterating_to_the_end_equals_the_single_exact_sweep():
    """The two ways of solving agree: k = L - 2 of L blocks leaves the first block's cotangent wrong, and no other."""
    model, x = toy(depth=4), inputs()
    expected = gradients(model, lambda: model(x))
    with HighwayBP(model, k=2):
        found = gradients(model, lambda: model(x))
    later = {name for name in expected if not name.startswith(("layers.0", "embed"))}
    assert largest_error({n: expected[n] for n in later}, {n: found[n] for n in later}) < 1e-12
    assert not torch.allclose(expected["layers.0.linear.weight"], found["layers.0.linear.weight"], rtol=1e-9)


def test_low_precision_streams_are_solved_in_float32():
    """Under bfloat16 autocast exact Highway-BP stays within rounding of autograd under the same autocast."""
    model, batch = tiny_model("gpt2", dtype=torch.float32).train(), tiny_batch("gpt2")

    def loss():
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return model(**batch).loss

    expected = gradients(model, loss)
    with HighwayBP(model, k=None):
        found = gradients(model, loss)
    assert largest_error(expected, found) < 2e-2
