"""The errors of this package that a caller may want to catch by name."""

import math


class ChainAttentionError(Exception):
    """Base class: catch it to catch everything that is special to chain attention."""


class UnsupportedModelError(ChainAttentionError):
    """This model, or this call of it, cannot run with chain attention; the message says why and what to do."""


class UnsupportedCacheError(ChainAttentionError, ValueError):
    """Keys and values came out of a cache: chain attention cannot continue from cached plain values."""


class AdapterError(ChainAttentionError, ValueError):
    """An adapter was trained with another attention than the model's, or would be saved without gates it trained."""


class InexactSolveError(ChainAttentionError, ArithmeticError):
    """A walk was not solved to the tolerance; the message says how far it is off and what to do.

    Args:
        message: What happened.
        residual: The backward error reached; see ``hf_chainattn.solvers.solve``.
    """

    def __init__(self, message: str, residual: float = math.nan) -> None:
        super().__init__(message)
        self.residual = residual


class InexactSolveWarning(UserWarning):
    """Given instead of an ``InexactSolveError`` where the caller asked for a warning; carries the same.

    Args:
        message: What happened.
        residual: The backward error reached; see ``hf_chainattn.solvers.solve``.
    """

    def __init__(self, message: str, residual: float = math.nan) -> None:
        super().__init__(message)
        self.residual = residual
