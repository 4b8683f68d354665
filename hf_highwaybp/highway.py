"""Highway-BP beside the user's own training loop."""

import functools
import logging
from collections.abc import Sequence
from types import TracebackType

from torch import nn

from hf_highwaybp.config import HighwayConfig, check_enabled, check_k
from hf_highwaybp.engine import Engine
from hf_highwaybp.override import BlockForward, put_on
from hf_highwaybp.residual import ResidualChoice, ResidualMap
from hf_highwaybp.stacks import Stack, check_unsharded, find_stack
from hf_highwaybp.stats import HighwayStats

logger = logging.getLogger(__name__)


@functools.cache
def _say_once(message: str) -> None:
    logger.warning(message)


class HighwayBP:
    """Approximates backpropagation through a stack of residual blocks by ``k`` iterations along the residual path.

    While attached, ``loss.backward()`` fills in the gradients of Highway-BP; the loop around it stays as it is.
    Only forward passes in train mode with gradients enabled are recorded, and each serves one backward pass.
    Gradients are those of backpropagation from ``k = L - 1`` for ``L`` blocks. Source: arXiv 2501.17086.

    Mutated: the ``forward`` of each block, at the level of the instance, from ``attach`` to ``detach``. Both may be
    called twice. Leaving the context detaches, after an exception too.

    Args:
        model: Any module with one stack of blocks, in the user's hands before and after.
        k: Number of iterations, from 0; ``None`` for exact gradients in one sweep.
        residual: The residual map K: "default" (1 where the residual path is the identity, 0.8 where a norm or
            another rescaling lies on it), "identity", "zero" (fixed-point iteration), a factor in ``[0, 1]``, or a
            function of the block's index and a cotangent ``[...]`` that returns their product, ``[...]``.
        blocks: Dotted path to the stack or its modules in order; ``None`` finds it.
        enabled: ``False`` leaves every pass as it is.

    Raises:
        UnsupportedModelError: If the model has no stack of blocks, or several of equal standing, or is in the hands of
            FSDP, DeepSpeed or ``nn.DataParallel``.
        TypeError: If an argument is of the wrong kind.
        ValueError: If ``k`` is negative, ``residual`` outside ``[0, 1]`` or ``blocks`` not in the model.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> class Block(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.linear = nn.Linear(4, 4)
        ...     def forward(self, x):
        ...         return x + self.linear(x).tanh()
        >>> model = nn.Sequential(*(Block() for _ in range(3)))
        >>> with HighwayBP(model, k=1, blocks=list(model)) as hbp:
        ...     model(torch.ones(2, 4)).sum().backward()
        >>> hbp.stats.k, hbp.stats.exact, hbp.stats.blocks
        (1, False, 3)
    """

    def __init__(
        self,
        model: nn.Module,
        k: int | None = None,
        residual: str | float | ResidualMap | None = "default",
        blocks: str | Sequence[nn.Module] | None = None,
        enabled: bool = True,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}.")
        check_unsharded(model)
        self._engine = Engine(find_stack(model, blocks), check_k(k), ResidualChoice(residual))
        self._engine.enabled = check_enabled(enabled)
        self._overrides: list[BlockForward] = []
        if len(self.stack.blocks) == 1:
            logger.warning("%s holds one block: there is nothing to approximate, k = 0 is exact.", self.stack.path)

    @classmethod
    def from_config(cls, model: nn.Module, config: HighwayConfig) -> "HighwayBP":
        """Return an engine for ``model`` with the settings of ``config``.

        Raises:
            UnsupportedModelError: If the model has no stack of blocks, or several of equal standing.
            ValueError: If ``config.blocks`` is not in the model.
        """
        return cls(model, k=config.k, residual=config.residual, blocks=config.blocks, enabled=config.enabled)

    def attach(self) -> "HighwayBP":
        """Put the engine on the blocks and return it; nothing happens if it is there already.

        Raises:
            AttachError: If a block belongs to another engine.
        """
        if not self._overrides:
            self._overrides = put_on(self._engine)
            _say_once(
                "Highway-BP saves no time on one device: k iterations cost up to k further backward passes through "
                "the activations. It shows what the approximation does to training."
            )
        return self

    def detach(self) -> None:
        """Give the blocks their own forward back; nothing happens if they have it already."""
        for override in self._overrides:
            override.remove()
        self._overrides = []

    def __enter__(self) -> "HighwayBP":
        return self.attach()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.detach()

    @property
    def attached(self) -> bool:
        """Whether the blocks' forward is this engine's."""
        return bool(self._overrides)

    @property
    def stack(self) -> Stack:
        """The blocks and their names."""
        return self._engine.stack

    @property
    def k(self) -> int | None:
        """Number of iterations; a new value holds from the next forward pass on."""
        return self._engine.k

    @k.setter
    def k(self, value: int | None) -> None:
        self._engine.k = check_k(value)

    @property
    def enabled(self) -> bool:
        """Whether forward passes are recorded; a new value holds from the next forward pass on."""
        return self._engine.enabled

    @enabled.setter
    def enabled(self, value: bool) -> None:
        self._engine.enabled = check_enabled(value)

    @property
    def stats(self) -> HighwayStats | None:
        """Account of the last backward pass, ``None`` before the first; reading it waits for the devices."""
        log = self._engine.last_pass
        return None if log is None else log.freeze()

    def describe(self) -> str:
        """Return one line on the stack, ``k`` and the factors K, which are known after the first forward pass."""
        count = len(self.stack.blocks)
        choice = self._engine.residual
        if choice.needs_path and choice.setting == "default" and not choice.paths:
            residual = "default, seen at the first forward pass"
        elif callable(choice.setting):
            residual = "a function"
        else:
            factors = sorted({f"{choice.factor(index)}" for index in range(count)})
            residual = f"{choice.setting}: K = {' and '.join(factors)}"
        k = "exact" if self.k is None or self.k >= count - 1 else f"k = {self.k}"
        return f"Highway-BP on {self.stack.path} ({count} x {type(self.stack.blocks[0]).__name__}), {k}, {residual}"
