"""Part 1: one layer of chain attention against one layer of ordinary attention, on a task whose answers lie deep."""

import tempfile
import time
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import AutoModel, LlamaConfig, Trainer

import hf_chainattn  # noqa: F401  registers attn_implementation="chain"
from examples.end_to_end.training import training_arguments
from hf_chainattn.tasks import ChainTrackBatch, ChainTrackConfig, accuracy_by_depth, sample_chain_track

TASK = ChainTrackConfig(tokens=30, chains=3, names=48, values=8)
LONGER = ChainTrackConfig(tokens=48, chains=3, names=48, values=8)
STEPS = 2000
BATCH = 32
TRAINING_SEQUENCES = 20_000
TEST_SEQUENCES = 1024


class ChainTrackModel(nn.Module):
    """A one-layer Llama that reads the sum of three field embeddings and answers at every position.

    Args:
        task: Sizes of the vocabularies.
        attn_implementation: Anything transformers knows; ``"chain"`` after ``import hf_chainattn``.
        width: Hidden size.
    """

    def __init__(self, task: ChainTrackConfig, attn_implementation: str, width: int = 48) -> None:
        super().__init__()
        self.name = nn.Embedding(task.names + 1, width)
        self.source = nn.Embedding(task.names + 1, width)
        self.value = nn.Embedding(task.values + 1, width)
        config = LlamaConfig(
            vocab_size=1,
            bos_token_id=None,
            eos_token_id=None,
            hidden_size=width,
            intermediate_size=4 * width,
            num_hidden_layers=1,
            num_attention_heads=1,
            use_cache=False,
        )
        config.chain_attention = {"gamma": 0.9}
        self.backbone = AutoModel.from_config(config, attn_implementation=attn_implementation)
        self.head = nn.Linear(width, task.values)

    def forward(self, name: Tensor, source: Tensor, value: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Return loss and logits ``[B, T, values]``; the label of a position is its own, not the next one's."""
        embedded = self.name(name) + self.source(source) + self.value(value)
        logits = self.head(self.backbone(inputs_embeds=embedded).last_hidden_state)
        return {"loss": nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten()), "logits": logits}


class Sequences(Dataset[ChainTrackBatch]):
    """A fixed pool of sequences that hands out whole batches."""

    def __init__(self, pool: ChainTrackBatch) -> None:
        self.pool = pool

    def __len__(self) -> int:
        return len(self.pool.name)

    def __getitems__(self, indices: list[int]) -> ChainTrackBatch:
        return ChainTrackBatch(*(field[indices] for field in self.pool))


class FreshNames:
    """A collator that renames every batch at random, so that a model cannot learn names by heart."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self, batch: ChainTrackBatch) -> dict[str, Tensor]:
        """Return the keyword arguments of [`ChainTrackModel`]."""
        fresh = batch.relabel(torch.randperm(TASK.names, generator=self.generator))
        return {"name": fresh.name, "source": fresh.source, "value": fresh.value, "labels": fresh.label}


def train(attn_implementation: str, pool: ChainTrackBatch, *, seed: int) -> ChainTrackModel:
    """Train one model with transformers' Trainer and return it in eval mode."""
    torch.manual_seed(seed)
    model = ChainTrackModel(TASK, attn_implementation)
    with tempfile.TemporaryDirectory() as folder:
        arguments = training_arguments(
            folder,
            steps=STEPS,
            batch=BATCH,
            learning_rate=2e-3,
            warmup=100,
            seed=seed,
            weight_decay=0.01,
            remove_unused_columns=False,
        )
        Trainer(model, arguments, data_collator=FreshNames(seed), train_dataset=Sequences(pool)).train()
    return model.eval()


def evaluate(model: ChainTrackModel, batch: ChainTrackBatch, deepest_in_training: int) -> dict[str, float]:
    """Return the accuracy overall, by depth, and at depths that never occurred in training."""
    device = next(model.parameters()).device
    with torch.no_grad():
        fields = (field.to(device) for field in batch[:4])
        predicted = model(*fields)["logits"].argmax(-1).cpu()
    accuracy = accuracy_by_depth(predicted, batch.label, batch.depth)
    unseen = batch.depth > deepest_in_training
    if unseen.any():
        accuracy["unseen"] = (predicted == batch.label)[unseen].double().mean().item()
    return accuracy


def run(seed: int = 0) -> dict[str, Any]:
    """Return every figure of this part; about a minute on one core."""
    pool = sample_chain_track(TASK, TRAINING_SEQUENCES, generator=torch.Generator().manual_seed(seed + 1))
    held_back = torch.Generator().manual_seed(seed + 2)
    tests = {
        f"T = {task.tokens}": sample_chain_track(task, TEST_SEQUENCES, generator=held_back) for task in (TASK, LONGER)
    }
    deepest = int(pool.depth.max())
    result: dict[str, Any] = {"steps": STEPS, "seed": seed, "deepest_in_training": deepest, "models": {}}
    for attn_implementation in ("chain", "sdpa"):
        start = time.perf_counter()
        model = train(attn_implementation, pool, seed=seed)
        accuracy = {name: evaluate(model, batch, deepest) for name, batch in tests.items()}
        seconds = time.perf_counter() - start
        result["models"][attn_implementation] = {
            "accuracy": accuracy,
            "seconds": seconds,
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
        }
    return result
