"""Highway-BP in ``transformers.Trainer``."""

import logging
import weakref
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any, ClassVar

from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hf_highwaybp.config import HighwayConfig
from hf_highwaybp.diagnostics import GradientReport, compare_exact
from hf_highwaybp.errors import AttachError
from hf_highwaybp.highway import HighwayBP

logger = logging.getLogger(__name__)


class HighwayCallback(TrainerCallback):
    """Trains with Highway-BP from ``on_train_begin`` to ``on_train_end``; evaluation is untouched.

    Adds ``highway/k``, ``highway/exact`` (1.0 or 0.0) and, if anything was iterated, ``highway/residual_norm`` (the
    last update over the cotangents, as 2-norms) to the logs and, if probed since the last log, ``highway/cosine``. The
    Trainer calls its own reporters before this callback, so the figures are in ``trainer.state.log_history``, and in
    reporters that come later in the list of callbacks.

    The Trainer has no event for an exception in training. To get the blocks' own forward back then, use the callback
    as a context (``with callback: trainer.train()``) or call ``detach``; a new training starts afresh in any case.

    Args:
        config: All settings; ``None`` makes them from the rest.
        k: Number of iterations; ``None`` for exact, which approximates nothing and is logged as a warning. It is not
            stored in checkpoints: pass it again to resume.
        residual: The residual map, as for ``HighwayBP``.
        blocks: The stack, as for ``HighwayBP``.
        probe_batch: Keyword arguments of the model; moved to the device of the model.
        probe_steps: Global steps after which ``compare_exact`` runs on the batch.
        probe_every: The same after every so many steps.

    Attributes:
        history: Global step and report of every probe.

    Raises:
        TypeError: If ``config`` is given beside another setting, or is no ``HighwayConfig``.
        ValueError: If a setting is out of range, or probe steps and a probe batch do not come together.

    Example:
        >>> HighwayCallback(k=2).config.k
        2
    """

    # callbacks in training, so that the refusal of a second one can leave the model as it was
    _attached: ClassVar["weakref.WeakSet[HighwayCallback]"] = weakref.WeakSet()

    def __init__(
        self,
        config: HighwayConfig | None = None,
        *,
        k: int | None = None,
        residual: str | float = "default",
        blocks: str | None = None,
        probe_batch: Mapping[str, Any] | None = None,
        probe_steps: Sequence[int] = (),
        probe_every: int | None = None,
    ) -> None:
        if config is not None and (k is not None or residual != "default" or blocks is not None):
            raise TypeError("HighwayCallback takes a config or k, residual and blocks, and got both.")
        if config is not None and not isinstance(config, HighwayConfig):
            raise TypeError(f"config must be a HighwayConfig, got {config!r}: a number of iterations is passed as k=.")
        if probe_every is not None and probe_every < 1:
            raise ValueError(f"probe_every must be a number of steps from 1, got {probe_every!r}.")
        if (probe_batch is None) != (probe_every is None and not probe_steps):
            raise ValueError("A probe needs both probe_batch and one of probe_steps and probe_every.")
        self.config = config or HighwayConfig(k=k, residual=residual, blocks=blocks)
        self.history: list[tuple[int, GradientReport]] = []
        self._batch, self._steps, self._every = probe_batch, frozenset(probe_steps), probe_every
        self._engine: HighwayBP | None = None
        self._cosine: float | None = None

    @property
    def engine(self) -> HighwayBP | None:
        """The engine on the model in training, ``None`` outside of training."""
        return self._engine

    def detach(self) -> None:
        """Give the blocks their own forward back; nothing happens outside of training."""
        if self._engine is not None:
            self._engine.detach()
            self._engine = None
        self._attached.discard(self)

    def __enter__(self) -> "HighwayCallback":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.detach()

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        *,
        model: nn.Module,
        **kwargs: object,
    ) -> None:
        """Attach to the model.

        Raises:
            AttachError: If the blocks have an engine already; that of another callback is detached, as this ends the
                training.
        """
        # an earlier training may have ended in an exception
        self.detach()
        engine = HighwayBP.from_config(model, self.config)
        try:
            engine.attach()
        except AttachError as error:
            for other in list(self._attached):
                if other.engine is not None and set(other.engine.stack.blocks) & set(engine.stack.blocks):
                    other.detach()
            raise AttachError(
                "This Trainer has another HighwayCallback, or the model an attached HighwayBP: keep one, e.g. "
                "trainer.remove_callback(HighwayCallback)."
            ) from error
        self._engine = engine
        self._attached.add(self)
        if self.config.k is None and self.config.enabled:
            logger.warning("HighwayCallback: k=None is exact and approximates nothing: pass k=1 to approximate.")

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Detach from the model."""
        self.detach()

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        *,
        model: nn.Module,
        **kwargs: object,
    ) -> None:
        """Probe the gradients if this step asks for it."""
        step = state.global_step
        if step in self._steps or (self._every is not None and step % self._every == 0):
            self._probe(step, model)

    def _probe(self, step: int, model: nn.Module) -> None:
        engine = self._engine
        if engine is None or self._batch is None:
            return
        device = next(model.parameters()).device
        batch = {key: value.to(device) if hasattr(value, "to") else value for key, value in self._batch.items()}
        engine.detach()
        try:
            report = compare_exact(model, batch, k=engine.k, residual=self.config.residual, blocks=self.config.blocks)
        finally:
            engine.attach()
        self.history.append((step, report))
        self._cosine = report.cosine

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        *,
        logs: dict[str, float],
        **kwargs: object,
    ) -> None:
        """Add the figures of the last backward pass to the log of a training step."""
        stats = None if self._engine is None else self._engine.stats
        if stats is None or "loss" not in logs:
            return
        norm, cosine = stats.residual_norm, self._cosine
        figures = {
            "highway/k": float(stats.k),
            "highway/exact": float(stats.exact),
            "highway/residual_norm": norm,
            "highway/cosine": cosine,
        }
        self._cosine = None
        known = {name: value for name, value in figures.items() if value is not None}
        logs.update(known)
        state.log_history[-1].update(known)
