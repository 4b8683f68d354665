"""What the Trainer runs of all three parts have in common."""

from typing import Any

import torch
from transformers import TrainingArguments


def training_arguments(
    folder: str, *, steps: int, batch: int, learning_rate: float, warmup: int, seed: int, **more: Any
) -> TrainingArguments:
    """Return arguments for a short run with a cosine schedule that keeps nothing and reports to nobody.

    Args:
        folder: Where the Trainer may write; nothing is left there.
        steps: Optimizer steps.
        batch: Examples in a step, on each device.
        learning_rate: Peak of the schedule.
        warmup: Steps until the peak.
        seed: Of the order of the examples.
        more: Any further field of ``TrainingArguments``.
    """
    return TrainingArguments(
        folder,
        max_steps=steps,
        per_device_train_batch_size=batch,
        learning_rate=learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=warmup,
        seed=seed,
        report_to=[],
        save_strategy="no",
        dataloader_pin_memory=torch.accelerator.is_available(),
        **{"logging_strategy": "no", **more},
    )
