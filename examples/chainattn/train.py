"""``python -m examples.chainattn.train``: one chain layer against one and more ordinary layers, on ChainTrack.

A sequence is a list of statements, each one token: a name is set to a value, or to what an earlier name holds. At
every statement the model says what its name holds, which lies as many hops away as names were copied. Every model is
trained by Trainer, saved, loaded again and only then tested, at the length of training and at a longer one.
"""

import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaModel, LlamaPreTrainedModel, Trainer

import hf_chainattn  # noqa: F401  registers attn_implementation="chain"
from examples.chainattn.runs import Run, options, planned, quietly_trained, results
from examples.chainattn.tables import chaintrack_tables
from examples.end_to_end.chain import (
    LONGER,
    TASK,
    TEST_SEQUENCES,
    TRAINING_SEQUENCES,
    FreshNames,
    Sequences,
)
from examples.end_to_end.facts import machine_facts
from examples.end_to_end.training import training_arguments
from hf_chainattn.tasks import accuracy_by_depth, sample_chain_track

MODELS = ("chain-1", "sdpa-1", "sdpa-2", "sdpa-3", "sdpa-4")
WIDTH = 48


class ChainTrackModel(LlamaPreTrainedModel):
    """A Llama that reads the sum of three field embeddings as one token and answers at every token.

    A model class of one's own needs nothing for chain attention: the config asks for it.

    Args:
        config: Of a Llama, with the sizes ``names`` and ``values`` of the vocabularies.
    """

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__(config)
        width = config.hidden_size
        self.name = nn.Embedding(config.names + 1, width)
        self.source = nn.Embedding(config.names + 1, width)
        self.value = nn.Embedding(config.values + 1, width)
        self.model = LlamaModel(config)
        self.head = nn.Linear(width, config.values)
        self.post_init()

    def forward(
        self, name: Tensor, source: Tensor, value: Tensor, labels: Tensor | None = None
    ) -> dict[str, Tensor | None]:
        """Return loss and logits ``[B, T, values]``; the label of a token is its own, not the next one's."""
        embedded = self.name(name) + self.source(source) + self.value(value)
        logits = self.head(self.model(inputs_embeds=embedded).last_hidden_state)
        loss = None if labels is None else nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
        return {"loss": loss, "logits": logits}


def new_model(run: Run) -> ChainTrackModel:
    """Return an untrained model; all have the same width, and one head."""
    config = LlamaConfig(
        names=TASK.names,
        values=TASK.values,
        vocab_size=1,
        bos_token_id=None,
        eos_token_id=None,
        hidden_size=WIDTH,
        intermediate_size=4 * WIDTH,
        num_hidden_layers=run.layers,
        num_attention_heads=1,
        use_cache=False,
        attn_implementation=run.attention,
    )
    if run.attention == "chain":
        config.chain_attention = {"gamma": 0.9}
    torch.manual_seed(run.seed)
    return ChainTrackModel(config)


def train(run: Run, folder: Path) -> list[float]:
    """Train a model with Trainer, save it into ``folder``, and return the training loss of each tenth of the steps."""
    pool = sample_chain_track(TASK, TRAINING_SEQUENCES, generator=torch.Generator().manual_seed(run.seed + 1))
    arguments = training_arguments(
        str(folder),
        steps=run.steps,
        batch=32,
        learning_rate=2e-3,
        warmup=min(100, run.steps // 10),
        seed=run.seed,
        weight_decay=0.01,
        remove_unused_columns=False,
        disable_tqdm=True,
        logging_strategy="steps",
        logging_steps=max(run.steps // 10, 1),
    )
    collator, data = FreshNames(run.seed), Sequences(pool)
    trainer = Trainer(new_model(run), arguments, data_collator=collator, train_dataset=data)
    losses = quietly_trained(trainer)
    trainer.model.save_pretrained(folder)
    return losses


@torch.no_grad()
def accuracies(folder: Path, seed: int) -> dict[str, dict[str, float]]:
    """Load the model of a folder and return its accuracy overall and by depth, at both lengths."""
    model, held_back = ChainTrackModel.from_pretrained(folder).eval(), torch.Generator().manual_seed(seed + 2)
    found = {}
    for task in (TASK, LONGER):
        batch = sample_chain_track(task, TEST_SEQUENCES, generator=held_back)
        predicted = model(batch.name, batch.source, batch.value)["logits"].argmax(-1)
        found[f"T = {task.tokens}"] = accuracy_by_depth(predicted, batch.label, batch.depth)
    return found


def result_of(run: Run, folder: Path) -> dict[str, Any]:
    """Train, save, load and test one model, and return what is told of it."""
    begin = time.process_time()
    losses = train(run, run.folder(folder))
    seconds = time.process_time() - begin
    return {**asdict(run), "losses": losses, "seconds": seconds, "accuracy": accuracies(run.folder(folder), run.seed)}


def main(argv: list[str] | None = None) -> None:
    """Train and test all models with some seeds, print tables, and write the figures."""
    parser = options(module="train", text=__doc__, models=MODELS, steps=2000, deep_steps=4000)
    arguments = parser.parse_args(argv)
    facts = {**machine_facts(), "threads": 1, "trainings at a time": arguments.jobs}
    print(", ".join(f"{name} {value}" for name, value in facts.items()))
    runs, rows = planned(arguments), []
    for run, row in zip(runs, results(result_of, runs, arguments.out, jobs=arguments.jobs), strict=True):
        rows.append(row)
        print(
            f"{run}: {row['accuracy']['T = 30']['overall']:.3f} after {row['seconds']:.0f} s of one core", flush=True
        )
    result = {"facts": facts, "rows": rows}
    for table in chaintrack_tables(result):
        print(f"\n{table.title}\n{table.markdown()}")
    path = arguments.out / "chaintrack.json"
    path.write_text(json.dumps(result, indent=2) + "\n", encoding="utf8")
    print(f"\nFigures: {path}. Models: {arguments.out}")


if __name__ == "__main__":
    main()
