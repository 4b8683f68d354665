"""``python -m examples.chainattn.upgrade``: bring chain attention into a layer trained with ordinary attention.

Trains one ordinary layer on ChainTrack, then fine-tunes copies of it: with gamma rising from 0 (``GammaSchedule``),
with gamma at its end from the first step on, and with ordinary attention as before. Writes a JSON of the accuracies.
"""

import argparse
import copy
import json
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer, TrainerCallback

from examples.end_to_end.chain import (
    TASK,
    TEST_SEQUENCES,
    TRAINING_SEQUENCES,
    ChainTrackModel,
    FreshNames,
    Sequences,
    evaluate,
    train,
)
from examples.end_to_end.training import training_arguments
from hf_chainattn import GammaSchedule, enable_chain_attention
from hf_chainattn.tasks import ChainTrackBatch, sample_chain_track

GAMMA = 0.9
# half of what the ordinary layer was trained for
STEPS = 1000


def ramp(model: ChainTrackModel) -> list[TrainerCallback]:
    """Let gamma rise over the first half of the steps."""
    enable_chain_attention(model.backbone, gamma=0.0)
    return [GammaSchedule(start=0.0, end=GAMMA, warmup_ratio=0.5)]


def jump(model: ChainTrackModel) -> list[TrainerCallback]:
    """Begin with the gamma of the end."""
    enable_chain_attention(model.backbone, gamma=GAMMA)
    return []


def ordinary(model: ChainTrackModel) -> list[TrainerCallback]:
    """Change nothing, as a control: the further steps alone do not help."""
    return []


WAYS: dict[str, Callable[[ChainTrackModel], list[TrainerCallback]]] = {
    "ramp": ramp,
    "jump": jump,
    "ordinary": ordinary,
}


def fine_tuned(base: ChainTrackModel, way: str, pool: ChainTrackBatch, *, seed: int) -> ChainTrackModel:
    """Return a copy of a trained model after some more training in one of the ways."""
    model = copy.deepcopy(base).train()
    callbacks = WAYS[way](model)
    with tempfile.TemporaryDirectory() as folder:
        arguments = training_arguments(
            folder,
            steps=STEPS,
            batch=32,
            learning_rate=2e-3,
            warmup=50,
            seed=seed,
            weight_decay=0.01,
            remove_unused_columns=False,
            disable_tqdm=True,
        )
        collator, data = FreshNames(seed + 100), Sequences(pool)
        Trainer(model, arguments, data_collator=collator, train_dataset=data, callbacks=callbacks).train()
    return model.eval()


def run(seed: int) -> dict[str, Any]:
    """Return the accuracies of the trained layer, and of its copies."""
    pool = sample_chain_track(TASK, TRAINING_SEQUENCES, generator=torch.Generator().manual_seed(seed + 1))
    test = sample_chain_track(TASK, TEST_SEQUENCES, generator=torch.Generator().manual_seed(seed + 2))
    deepest = int(pool.depth.max())
    base = train("sdpa", pool, seed=seed)
    models = {"before": base, **{way: fine_tuned(base, way, pool, seed=seed) for way in WAYS}}
    return {"seed": seed, **{name: evaluate(model, test, deepest)["overall"] for name, model in models.items()}}


def main() -> None:
    """Run some seeds, and print and write the accuracies."""
    parser = argparse.ArgumentParser(prog="python -m examples.chainattn.upgrade", description=__doc__)
    parser.add_argument("--seeds", type=int, default=3, help="default: %(default)s")
    parser.add_argument("--out", type=Path, default=Path("runs/upgrade.json"), help="default: %(default)s")
    arguments = parser.parse_args()
    rows = []
    for seed in range(arguments.seeds):
        rows.append(run(seed))
        print(
            ", ".join(f"{name} {value:.3f}" if name != "seed" else f"seed {value}" for name, value in rows[-1].items())
        )
    for name in ("before", *WAYS):
        print(f"{name}: median accuracy {statistics.median(row[name] for row in rows):.3f}")
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf8")
    print(f"written to {arguments.out}")


if __name__ == "__main__":
    main()
