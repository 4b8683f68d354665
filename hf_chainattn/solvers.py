"""Solvers of the walk where tokens see later ones: LU, an iteration for long sequences, and one check of both.

The system of each head is ``M = diag(pivot) - diag(rate) off``, with ``off`` the attention to other tokens. Its rows
are diagonally dominant. Letters: ``N`` heads at hand, ``T`` tokens, ``E`` value width.
"""

import logging
import sys
import warnings
from typing import NamedTuple

import torch
from torch import Tensor

from hf_chainattn.errors import InexactSolveError, InexactSolveWarning
from hf_chainattn.linalg import lu_factor, lu_solve

_logger = logging.getLogger(__name__)

# tokens from which the iteration is tried. Its time over that of LU, one thread, E = 64, random logits of deviation 1
# and 3, gamma 0.9 and 0.99: 0.6 to 1.6 at T = 1024, 0.3 to 1.1 at 2048, 0.2 to 0.6 at 4096; in float64 to 2.2 there
_CROSSOVER = {torch.float32: 2048, torch.float64: sys.maxsize}
# LU costs about as much as T / (1.3 E) products with their orthogonalisation: the iteration is given no more. Fewer
# than 32 columns take as long as 32
_LU_SHARE, _NARROWEST = 1.3, 32
_TOLERANCES = {torch.float32: 1e-6, torch.float64: 1e-12}
# LU leaves a backward error of some roundings; an iteration that has come to so many is as good
_ROUNDINGS = 4
# the iteration estimates its residual over all columns, the check takes the worst of them
_AIM = 0.3
# the forecast needs so many products, and may be too high by this factor, since GMRES gets faster on its way
_LOOK_BACK, _PATIENCE = 4, 1.35


class System(NamedTuple):
    """The matrices ``diag(pivot) - diag(rate) off`` of some heads.

    Args:
        off: ``[N, T, T]``, attention with a zero diagonal, nowhere negative.
        rate: ``[N, T, 1]``, gamma, and 0 in rows that leave the system.
        pivot: ``[N, T, 1]``, positive.
    """

    off: Tensor
    rate: Tensor
    pivot: Tensor

    def read(self, vectors: Tensor, *, adjoint: bool) -> Tensor:
        """Return ``off vectors``, or ``off^T diag(rate) vectors``, ``[N, T, E]``."""
        return torch.bmm(self.off.mT, self.rate * vectors) if adjoint else torch.bmm(self.off, vectors)


def solve(
    system: System, right: Tensor, *, adjoint: bool, tolerance: float | None, on_inexact: str
) -> tuple[Tensor, Tensor]:
    """Return the solution of ``M x = right`` or ``M^T x = right``, and what ``system.read`` gives of it.

    By LU, and on long sequences in float32 by restarted GMRES. That aims at a residual of ``tolerance`` times the
    right-hand side, column by column, and ends at one that is mere rounding; heads that do not get there at the cost
    of an LU are solved by LU after all.

    Whatever solved it is checked by the normwise backward error ``|right - M x| / (|M| |x| + |right|)`` in the maximum
    norm, the worst over columns and heads: the solution is exact for a matrix and a right-hand side that differ from
    the given ones by no more than this. LU, refined once where that is needed, leaves some roundings of the dtype (six
    at 4096 tokens in float32 with a gamma of 0.9999), so the default tolerance is met for every gamma below 1.

    Args:
        system: The matrices.
        right: ``[N, T, E]``, float32 or float64.
        adjoint: Whether to solve the transposed systems.
        tolerance: Largest backward error that counts as solved. ``None``: 1e-6, or 1e-12 in float64.
        on_inexact: What to do about a larger one, ``"raise"`` or ``"warn"``.

    Returns:
        Two tensors ``[N, T, E]``. Where the inputs are not finite the solution is not either, without complaint. LU
        takes O(N T^3) and the memory of two more matrices, the iteration O(N T^2 E) a product, of which there are
        fewer than ``T / E``.

    Raises:
        InexactSolveError: If the check fails and ``on_inexact`` is ``"raise"``.
    """
    tolerance = _TOLERANCES[right.dtype] if tolerance is None else tolerance
    problem = _Problem(system, right, _sizes(system, adjoint=adjoint), adjoint)
    iterate = right.shape[1] >= _CROSSOVER[right.dtype]
    # the iteration divides by the pivots, and carries what is not finite into every column
    iterate = iterate and bool(problem.finite() & (system.pivot > 0).all())
    solution, read, errors = (_iterate if iterate else _direct)(problem, tolerance)
    error = float(errors.amax())
    _logger.debug("%d heads of %d tokens: backward error %.1e.", *right.shape[:2], error)
    if not error <= tolerance:
        _complain(problem, error, tolerance, on_inexact)
    return solution, read


class _Problem(NamedTuple):
    """Systems, right-hand sides ``[N, T, E]``, norms of the matrices ``[N, 1]``, and whether they are transposed."""

    system: System
    right: Tensor
    sizes: Tensor
    adjoint: bool

    def finite(self) -> Tensor:
        return self.right.isfinite().all() & self.sizes.isfinite().all()

    def read(self, vectors: Tensor) -> Tensor:
        return self.system.read(vectors, adjoint=self.adjoint)

    def residual(self, solution: Tensor, read: Tensor) -> Tensor:
        """Return ``right - M solution``, given what was read of the solution."""
        walked = read if self.adjoint else self.system.rate * read
        return self.right - self.system.pivot * solution + walked

    def errors(self, solution: Tensor, read: Tensor) -> tuple[Tensor, Tensor]:
        """Return residual over right-hand side and backward error, the worst of each head's columns, ``[N]`` each."""
        residual, largest, given = (
            part.abs().amax(1) for part in (self.residual(solution, read), solution, self.right)
        )
        # nothing given and nothing left over: 0 / 0 is 0 here
        tiny = torch.finfo(given.dtype).tiny
        return (residual / (given + tiny)).amax(1), (residual / (self.sizes * largest + given + tiny)).amax(1)

    def of_heads(self, heads: Tensor) -> "_Problem":
        system = System(*(part[heads] for part in self.system))
        return _Problem(system, self.right[heads], self.sizes[heads], self.adjoint)


def _sizes(system: System, *, adjoint: bool) -> Tensor:
    """Return the maximum norm of each matrix, ``[N, 1]``."""
    read = system.read(torch.ones_like(system.pivot), adjoint=adjoint)
    return (system.pivot + (read if adjoint else system.rate * read)).amax(1)


def _complain(problem: _Problem, error: float, tolerance: float, on_inexact: str) -> None:
    """Raise or warn, unless the inputs were not finite."""
    right = problem.right
    if not bool(problem.finite()):
        # nan and inf go through here as through any other attention, for those who look for them in gradients
        return
    message = (
        f"The walk of {right.shape[1]} tokens was solved with a backward error of {error:.1e} in {right.dtype}, and "
        f"the tolerance is {tolerance:.1e}: use float64, a larger tolerance, or impl='dense', which does not check. "
        "At a gamma of 1 there is no solution."
    )
    if on_inexact == "raise":
        raise InexactSolveError(message, error)
    warnings.warn(InexactSolveWarning(message, error), stacklevel=2)


def _direct(problem: _Problem, tolerance: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return the solution by LU, what is read of it, and the backward error of each head."""
    system, right, _, adjoint = problem
    matrix = system.off * -system.rate
    matrix.diagonal(dim1=-2, dim2=-1).copy_(system.pivot.squeeze(-1))
    # of the transposed matrix, in each column of which the pivot is the largest: no row is ever exchanged. A singular
    # matrix gives inf or nan, which the check finds; raising would make a GPU wait
    factors, exchanges = lu_factor(matrix.mT)
    solution = lu_solve(factors, exchanges, right, adjoint=not adjoint)
    read = problem.read(solution)
    errors = problem.errors(solution, read)[1]
    if bool((errors > tolerance).any()):
        rest = problem.residual(solution, read)
        solution = solution + lu_solve(factors, exchanges, rest, adjoint=not adjoint)
        read = problem.read(solution)
        errors = problem.errors(solution, read)[1]
    return solution, read, errors


def _iterate(problem: _Problem, tolerance: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return the solution by GMRES, what is read of it, and the backward errors; where it fails, all three by LU."""
    heads, tokens, width = problem.right.shape
    budget = max(2, int(tokens / (_LU_SHARE * max(width, _NARROWEST))))
    # columns of one size, so that small features are as exact as large ones; by a power of two no digit is touched
    exponent = torch.frexp(problem.right.abs().amax(1, keepdim=True)).exponent.clamp(-100, 100)
    scaled = problem._replace(right=torch.ldexp(problem.right, -exponent))
    aim = _AIM * tolerance * _norms(scaled.right)
    solution, read = torch.zeros_like(scaled.right), torch.zeros_like(scaled.right)
    errors = solution.new_full((heads,), torch.inf)
    products, hopeless, done = 0, False, torch.zeros_like(errors, dtype=torch.bool)
    while products + 2 <= budget and not hopeless and not bool(done.all()):
        # a head that is done keeps its solution, whatever the others need
        residual = scaled.residual(solution, read).masked_fill(done[:, None, None], 0.0)
        step, used, hopeless = _cycle(problem, residual, aim, limit=budget - products - 1)
        solution = solution + step
        read, products = problem.read(solution), products + used + 1
        relative, errors = scaled.errors(solution, read)
        done = (relative <= tolerance) | (errors <= _ROUNDINGS * torch.finfo(solution.dtype).eps)
    solution, read = torch.ldexp(solution, exponent), torch.ldexp(read, exponent)
    failed = (~done).nonzero().flatten()
    _logger.debug("%d heads of %d tokens: %d products, %d go to LU.", heads, tokens, products, len(failed))
    if len(failed):
        solution[failed], read[failed], errors[failed] = _direct(problem.of_heads(failed), tolerance)
    return solution, read, errors


def _cycle(problem: _Problem, residual: Tensor, aim: Tensor, *, limit: int) -> tuple[Tensor, int, bool]:
    """Return what one cycle of GMRES adds to the solution, its number of products, and whether more are in vain.

    A vector is the whole ``[T, E]`` of a head. Preconditioned by the pivots from the right, so that the residual is
    the true one.

    Args:
        problem: The systems.
        residual: What is left of the right-hand side, ``[N, T, E]``.
        aim: Norm of the residual that is wanted, ``[N, 1, 1]``.
        limit: Most products.
    """
    finfo = torch.finfo(residual.dtype)
    length = _norms(residual)
    basis = residual.new_empty(len(residual), limit + 1, residual[0].numel())
    basis[:, :1] = residual.flatten(1)[:, None] / length.clamp(min=finfo.tiny)
    # the small problem is solved on the host in float64: the host looks at every product anyway
    aim, target = aim.double().cpu(), torch.zeros(len(residual), limit + 1, 1, dtype=torch.float64)
    target[:, :1] = length.double().cpu()
    small = torch.zeros(len(residual), limit + 1, limit, dtype=torch.float64)
    history: list[Tensor] = []
    for count in range(1, limit + 1):
        column = _extend(problem, basis, count)
        if not bool(column.isfinite().all()):
            # a pivot so small that dividing by it overflows
            return torch.zeros_like(residual), count, True
        small[:, : count + 1, count - 1] = -column
        small[:, count - 1, count - 1] += 1
        matrix, goal = small[:, : count + 1, :count], target[:, : count + 1]
        weights = torch.linalg.lstsq(matrix, goal).solution
        history.append(_norms(goal - matrix @ weights))
        # the norm of the weights is that of the solution: below its rounding nothing is gained
        enough = torch.maximum(aim, finfo.eps * _norms(weights))
        waiting = history[-1] > enough
        in_time = waiting & (_forecast(history, enough) <= _PATIENCE * limit)
        if not bool(in_time.any()):
            break
    step = torch.bmm(weights.mT.to(residual), basis[:, :count])
    return step.view_as(residual) / problem.system.pivot, count, bool(waiting.any())


def _extend(problem: _Problem, basis: Tensor, count: int) -> Tensor:
    """Append a vector to an orthonormal basis, and return the walk of the last one in the basis.

    The basis is that of the walk ``diag(rate) off diag(1 / pivot)`` alone: with the identity added, what is new in a
    vector would be lost in rounding.

    Args:
        problem: The systems.
        basis: ``[N, limit + 1, T * E]``, of which ``count`` vectors are there.
        count: At least 1.

    Returns:
        ``[N, count + 1]``, float64, on the host.
    """
    known = basis[:, :count]
    new = problem.read(known[:, -1].view_as(problem.right) / problem.system.pivot)
    new = (new if problem.adjoint else problem.system.rate * new).flatten(1)[:, None]
    # not twice: up to some fifty products this saves none, and what rounding leaves askew the true residual tells
    parts = torch.bmm(new, known.mT)
    new = torch.baddbmm(new, parts, known, alpha=-1)
    after = _norms(new)
    basis[:, count : count + 1] = new / after.clamp(min=torch.finfo(basis.dtype).tiny)
    return torch.cat([parts, after], -1)[:, 0].double().cpu()


def _forecast(history: list[Tensor], aim: Tensor) -> Tensor:
    """Return how many products each head will need at the best rate it has had; as many as now if too early."""
    count = torch.full_like(aim, len(history))
    if len(history) <= _LOOK_BACK:
        return count
    logs = torch.stack(history).log()
    # not the last rate: near gamma = 1 GMRES halts for some products, until it has found the stationary walk
    rate = ((logs[_LOOK_BACK:] - logs[:-_LOOK_BACK]) / _LOOK_BACK).amin(0)
    return count + (aim.log() - logs[-1]) / rate.clamp(max=-1e-12)


def _norms(vectors: Tensor) -> Tensor:
    """Return the norm of what each head has, ``[N, 1, 1]``."""
    return torch.linalg.vector_norm(vectors.flatten(1), dim=1)[:, None, None]
