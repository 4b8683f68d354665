"""The check before the clock: output and gradients of the timed inputs against the definition in float64."""

import functools

import torch
from torch import Tensor

from benchmarks.chain_cases import ATTENTIONS, GAMMA, WIDTH, both, chain, inputs, threads
from hf_chainattn import chain_attention_reference

# relative errors in the Euclidean norm; a gradient passes through two solves and a difference
OUTPUT_LIMIT, GRADIENT_LIMIT = 2e-6, 1e-5
# tokens: up to here whole sequences are checked, and up to there by the oracle of the package
WHOLE, SOLVED = 1024, 4096


@functools.cache
def gate(batch: int, tokens: int, diagonal: str = "kept", window: int | None = None, cores: int = 1) -> float:
    """Return the largest relative error of chain attention on the inputs of a case.

    Computed on the whole inputs, by ``cores`` threads. Compared up to 1024 tokens in all heads of the first and the
    last sequence, above in the last head of the last sequence.

    Raises:
        AssertionError: If it is too large.
    """
    parts, cotangent = inputs(batch, tokens)
    with threads(cores):
        found = both(chain(diagonal, window), parts, cotangent)
    heads = slice(None) if tokens <= WHOLE else slice(-1, None)
    worst = 0.0
    for sequence in {0, batch - 1} if tokens <= WHOLE else {batch - 1}:
        here = [tensor.detach()[sequence, heads].unsqueeze(0) for tensor in (*parts, cotangent, *found)]
        exact = oracle(*(tensor.double() for tensor in here[:4]), diagonal=diagonal, window=window)
        worst = max(worst, _error(here[4:], exact, f"chain attention at B = {batch}, T = {tokens}"))
    return worst


@functools.cache
def gate_baselines(tokens: int) -> None:
    """Check the three ways that chain attention is compared with, on one sequence.

    Raises:
        AssertionError: If one of them is wrong, ordinary attention being chain attention with gamma = 0.
    """
    parts, cotangent = inputs(1, tokens)
    doubled = [tensor.detach().double() for tensor in (*parts, cotangent)]
    for gamma, names in ((0.0, ("sdpa", "eager")), (GAMMA, ("naive",))):
        exact = oracle(*doubled, gamma=gamma)
        for name in names:
            _error(list(both(ATTENTIONS[name], parts, cotangent)), exact, f"{name} at T = {tokens}")


def _error(found: list[Tensor], exact: tuple[Tensor, ...], what: str) -> float:
    errors = [float((a - b).norm() / b.norm()) for a, b in zip(found, exact, strict=True)]
    # put so that nan fails
    if not (errors[0] <= OUTPUT_LIMIT and all(error <= GRADIENT_LIMIT for error in errors[1:])):
        raise AssertionError(f"{what} is wrong: relative errors of output, dq, dk, dv {errors}")
    return max(errors)


def oracle(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cotangent: Tensor,
    *,
    gamma: float = GAMMA,
    diagonal: str = "kept",
    window: int | None = None,
) -> tuple[Tensor, ...]:
    """Return output and gradients in float64, ``[1, H, T, 64]``, by autograd through the reference of the package.

    Above 4096 tokens, where that would take 20 GB, by hand; one head, diagonal kept, no window.
    """
    tokens = query.shape[2]
    if tokens > SOLVED:
        _check_by_hand()
        return by_hand(query, key, value, cotangent)
    parts = [tensor.requires_grad_() for tensor in (query, key, value)]
    mask = torch.ones(tokens, tokens, dtype=torch.bool).tril()
    if window is not None:
        mask = mask.triu(1 - window)
    # on two threads torch factorises a batch of large matrices wrongly: github.com/pytorch/pytorch/issues/142815
    with threads(1):
        output = chain_attention_reference(*parts, gamma=gamma, diagonal=diagonal, mask=mask)
        return output.detach(), *torch.autograd.grad(output, parts, cotangent)


def by_hand(query: Tensor, key: Tensor, value: Tensor, cotangent: Tensor, *, rows: int = 1024) -> tuple[Tensor, ...]:
    """Return output and gradients of one head, ``[1, 1, T, 64]``, from one ``[T, T]`` matrix and its two solves.

    With ``A`` the attention matrix, ``U = (1 - g) (I - g A)^-1 V``, ``Y = A U`` and ``z = (I - g A)^-T dY``:
    ``dV = (1 - g) A^T z`` and ``dS = A * (z U^T - rowsum(z * Y))``.
    """
    query, key, value, cotangent = (tensor[0, 0] for tensor in (query, key, value, cotangent))
    scale, tokens = WIDTH**-0.5, len(query)
    walk = query @ key.T
    for start in range(0, tokens, rows):
        block = walk[start : start + rows]
        hidden = torch.ones(block.shape, dtype=torch.bool).triu(start + 1)
        block.copy_(torch.softmax(block.mul_(scale).masked_fill_(hidden, -torch.inf), dim=-1))
    walk.mul_(-GAMMA).diagonal().add_(1)
    mixed = torch.linalg.solve_triangular(walk, (1 - GAMMA) * value, upper=False)
    output = (mixed - (1 - GAMMA) * value) / GAMMA
    adjoint = torch.linalg.solve_triangular(walk.T, cotangent, upper=True)
    d_value = (1 - GAMMA) * (adjoint - cotangent) / GAMMA
    d_query, d_key = torch.zeros_like(query), torch.zeros_like(key)
    for start in range(0, tokens, rows):
        here = slice(start, start + rows)
        attention = walk[here] / -GAMMA
        attention.diagonal(start).add_(1 / GAMMA)
        d_logits = adjoint[here] @ mixed.T - (adjoint[here] * output[here]).sum(-1, keepdim=True)
        d_logits.mul_(attention).mul_(scale)
        d_query[here] = d_logits @ key
        d_key += d_logits.T @ query[here]
    return tuple(tensor[None, None] for tensor in (output, d_query, d_key, d_value))


@functools.cache
def _check_by_hand() -> None:
    """Check the oracle of long sequences against that of the package."""
    parts, cotangent = inputs(1, 300)
    one = [tensor.detach()[:, :1].double() for tensor in (*parts, cotangent)]
    for found, exact in zip(by_hand(*one, rows=128), oracle(*one), strict=True):
        if not (found - exact).norm() <= 1e-11 * exact.norm():
            raise AssertionError("the oracle of long sequences is wrong")
