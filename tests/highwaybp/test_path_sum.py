"""Below k = L - 1 Highway-BP is a sum over paths: the oracle enumerates them with dense Jacobians."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from hf_highwaybp import HighwayBP
from hf_highwaybp.reference import path_sum_gradients
from tests.helpers.tiny_models import tiny_model
from tests.highwaybp.toys import Residual, inputs, toy

FACTORS = {"identity": 1.0, 0.8: 0.8, "zero": 0.0}


def relative(expected, found):
    """Relative error; the absolute one where the path sum is zero, as it is for K = 0 and too few iterations."""
    return float((expected - found).norm() / (expected.norm() or 1.0))


@pytest.mark.parametrize("residual", FACTORS)
@pytest.mark.parametrize("k", [0, 1, 2, 3])
def test_gradients_are_the_sum_over_paths_with_at_most_k_jacobians(k, residual):
    """Oracle: enumeration of all 2 ** 3 paths; the loss reads two of the four blocks."""
    model, x = toy(depth=4), inputs()

    def loss(outputs):
        return model.head(outputs[-1]).square().mean() + outputs[1].sin().sum()

    stream = model.embed(x).detach()
    sums = path_sum_gradients(list(model.layers), loss, stream, k=k, factors=[FACTORS[residual]] * 4)
    leaf = stream.clone().requires_grad_()
    with HighwayBP(model, k=k, residual=residual):
        outputs = [leaf]
        for block in model.layers:
            outputs.append(block(outputs[-1]))
        loss(outputs[1:]).backward()
    for block, expected in zip(model.layers, sums.parameters, strict=True):
        for parameter, gradient in zip(block.parameters(), expected, strict=True):
            assert relative(gradient, parameter.grad) < 1e-12
    assert relative(sums.stream, leaf.grad) < 1e-12


@pytest.mark.parametrize(("name", "residual"), [("gpt2", "identity"), ("bert", 0.8), ("gpt2", "zero")])
@pytest.mark.parametrize("k", [0, 1, 2])
def test_transformer_blocks_give_the_path_sum(name, residual, k):
    """Oracle: enumeration, on the blocks of GPT-2 and BERT in one sequence of three tokens."""
    model = tiny_model(name)
    blocks = model.transformer.h if name == "gpt2" else model.bert.encoder.layer
    for module in model.modules():
        # the oracle calls each block several times, so it must not draw masks
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    if name == "bert":
        model.set_attn_implementation("eager")
    stream = torch.randn(1, 3, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    target = torch.randn(1, 3, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    sums = path_sum_gradients(
        list(blocks), lambda outputs: (outputs[-1] * target).sum(), stream, k=k, factors=[FACTORS[residual]] * 4
    )
    leaf = stream.clone().requires_grad_()
    model.train()
    with HighwayBP(model, k=k, residual=residual):
        hidden = leaf
        for block in blocks:
            hidden = block(hidden)
        (hidden * target).sum().backward()
    assert relative(sums.stream, leaf.grad) < 1e-12
    for block, expected in zip(blocks, sums.parameters, strict=True):
        found = torch.cat([parameter.grad.flatten() for parameter in block.parameters()])
        assert relative(torch.cat([gradient.flatten() for gradient in expected]), found) < 1e-12


@settings(max_examples=15)
@given(depth=st.integers(2, 4), k=st.integers(0, 4), factors=st.lists(st.floats(0, 1), min_size=4, max_size=4))
def test_a_factor_of_its_own_for_each_block_gives_the_path_sum(depth, k, factors):
    """Oracle: enumeration; the residual map is the user's function."""
    model, x = toy(Residual, depth), inputs(1)
    stream = model.embed(x).detach()
    sums = path_sum_gradients(
        list(model.layers), lambda o: model.head(o[-1]).square().mean(), stream, k=k, factors=factors
    )
    with HighwayBP(model, k=k, residual=lambda index, cotangent: factors[index] * cotangent):
        model(x).backward()
    for block, expected in zip(model.layers, sums.parameters, strict=False):
        assert torch.allclose(block.linear.weight.grad, expected[0], rtol=1e-11, atol=1e-14)


def test_the_oracle_at_full_k_is_backpropagation():
    """Oracle of the oracle: autograd."""
    model, x = toy(depth=3), inputs()
    stream = model.embed(x).detach().requires_grad_()
    hidden = stream
    for block in model.layers:
        hidden = block(hidden)
    hidden.square().sum().backward()
    sums = path_sum_gradients(list(model.layers), lambda o: o[-1].square().sum(), stream, k=2, factors=[0.4] * 3)
    assert relative(stream.grad, sums.stream) < 1e-13
    assert relative(model.layers[0].linear.weight.grad, sums.parameters[0][0]) < 1e-13


def test_the_oracle_counts_paths_of_scalar_blocks():
    """Oracle: the binomial sum. For h -> (1 + a) h and K = 1 there are C(L - 1, m) paths with m times a."""
    block = nn.Linear(1, 1, bias=False).double()
    nn.init.constant_(block.weight, 1.5)
    one = torch.ones(1, dtype=torch.float64)
    for k, expected in ((0, 1.0), (1, 1 + 3 * 0.5), (2, 1 + 3 * 0.5 + 3 * 0.25), (3, 1.5**3)):
        sums = path_sum_gradients([block] * 4, lambda outputs: outputs[-1].sum(), one, k=k, factors=[1.0] * 4)
        assert float(sums.cotangents[0]) == pytest.approx(expected, rel=1e-14)
