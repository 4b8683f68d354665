"""Solving with general matrices on several threads, where torch's own LU of a batch is wrong."""

import pytest
import torch

from hf_chainattn import chain_attention, chain_attention_reference
from hf_chainattn.linalg import lu_factor, lu_solve, solve


@pytest.fixture(autouse=True)
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("size", [150, 300, 600])
def test_a_batch_is_solved_on_two_threads(size):
    """Oracle: the residual."""
    matrix = torch.eye(size, dtype=torch.float64) - 0.9 * torch.rand(2, 3, size, size, dtype=torch.float64) / size
    right = torch.randn(2, 3, size, 5, dtype=torch.float64)
    assert (matrix @ solve(matrix, right) - right).abs().max() <= 1e-10
    factors, exchanges = lu_factor(matrix.flatten(0, 1))
    for adjoint, system in ((False, matrix), (True, matrix.mT)):
        solution = lu_solve(factors, exchanges, right.flatten(0, 1), adjoint=adjoint).view_as(right)
        assert (system @ solution - right).abs().max() <= 1e-10


def test_solve_is_differentiable_and_takes_an_empty_batch():
    """Oracle: finite differences."""
    matrix = torch.eye(3, dtype=torch.float64) + 0.1 * torch.randn(2, 3, 3, dtype=torch.float64)
    right = torch.randn(2, 3, 2, dtype=torch.float64)
    leaves = [matrix.requires_grad_(), right.requires_grad_()]
    assert torch.autograd.gradgradcheck(solve, leaves)
    assert solve(torch.zeros(0, 3, 3), torch.zeros(0, 3, 2)).shape == (0, 3, 2)


@pytest.mark.parametrize("impl", ["auto", "dense", "reference"])
def test_encoders_are_right_on_two_threads(impl):
    """Oracle: the reference on one thread."""
    query, key, value = torch.randn(3, 2, 4, 400, 16, dtype=torch.float64).unbind(0)
    output = chain_attention(query, key, value, gamma=0.9, is_causal=False, impl=impl)
    torch.set_num_threads(1)
    mask = torch.ones(400, 400, dtype=torch.bool)
    expected = chain_attention_reference(query, key, value, gamma=0.9, mask=mask)
    torch.testing.assert_close(output, expected, rtol=1e-10, atol=1e-12)
