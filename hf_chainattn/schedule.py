"""Bringing chain attention into a trained model: gamma rises while it is fine-tuned."""

from typing import Any

from transformers import PreTrainedModel, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hf_chainattn.adapters import scheduled
from hf_chainattn.config import ChainAttentionConfig, check_gamma
from hf_chainattn.models import parts_of
from hf_chainattn.parts import uses_chain


class GammaSchedule(TrainerCallback):
    """A callback of Trainer that raises a fixed gamma linearly, and leaves it in the config and in checkpoints.

    With ``start=0.0`` the model computes ordinary attention at the first step, so that nothing of what it has learned
    is disturbed. Learning gamma from 0 instead does not work: it stays near 0.

    Gamma depends on the step alone. A run that goes on from a checkpoint goes on with the same values.

    Args:
        start: Gamma at the first step, in ``[0, 1)``.
        end: Gamma after the rise, in ``[0, 1)``.
        warmup_ratio: Share of all optimizer steps that the rise takes, in ``(0, 1]``.

    Raises:
        TypeError: If a value is no number.
        ValueError: If a value is outside its range.

    Example:
        >>> from hf_chainattn import GammaSchedule
        >>> schedule = GammaSchedule(start=0.0, end=0.9, warmup_ratio=0.5)  # Trainer(..., callbacks=[schedule])
        >>> [round(schedule.gamma(step, 100), 3) for step in (0, 25, 50, 100)]
        [0.0, 0.45, 0.9, 0.9]
    """

    def __init__(self, start: float = 0.0, end: float = 0.9, warmup_ratio: float = 0.5) -> None:
        for value in (start, end):
            check_gamma(value)
        if not 0.0 < warmup_ratio <= 1.0:
            raise ValueError(f"warmup_ratio must be in (0, 1], got {warmup_ratio!r}.")
        self.start, self.end, self.warmup_ratio = float(start), float(end), warmup_ratio

    def gamma(self, step: int, steps: int) -> float:
        """Return gamma at a step, from 0, of a training of so many optimizer steps."""
        share = min(1.0, step / (self.warmup_ratio * steps)) if steps > 0 else 1.0
        # at the end exactly what was asked for
        return self.end if share == 1.0 else self.start + share * (self.end - self.start)

    def on_init_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Let Trainer load an adapter of any step of the rise: gamma of the step is set before it is used."""
        if kwargs["model"] is not None:
            scheduled.update(parts_of(kwargs["model"]))

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Check the model and set gamma of the first step."""
        configs = _configs(kwargs["model"])
        if not configs:
            raise ValueError("GammaSchedule needs a model with attn_implementation='chain'.")
        for settings in map(ChainAttentionConfig.from_value, (config.chain_attention for config in configs)):
            if settings.learnable or not isinstance(settings.gamma, float):
                raise ValueError(
                    "GammaSchedule raises one fixed gamma: use it without learnable=True and without a list of gammas."
                )
        scheduled.update(parts_of(kwargs["model"]))
        self.on_step_begin(args, state, control, **kwargs)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Set gamma of the step."""
        _set(kwargs["model"], self.gamma(state.global_step, state.max_steps))

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Leave the last gamma in the model, or that of the best weights where Trainer has gone back to them."""
        went_back = args.load_best_model_at_end and state.best_model_checkpoint and state.best_global_step
        # the step before: a checkpoint is made when a step has been counted
        step = state.best_global_step - 1 if went_back else state.global_step
        _set(kwargs["model"], self.gamma(step, state.max_steps))
        scheduled.difference_update(parts_of(kwargs["model"]))


def _configs(model: PreTrainedModel) -> list[Any]:
    """Return the config of every part of a model that uses chain attention."""
    return [part.config for part in parts_of(model) if uses_chain(part.config)]


def _set(model: PreTrainedModel, gamma: float) -> None:
    for config in _configs(model):
        config.chain_attention = {**config.chain_attention, "gamma": gamma}
