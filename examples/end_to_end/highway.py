"""Part 2: a small GPT-2 on movie reviews, trained with exact gradients and with one iteration of Highway-BP."""

import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from examples.end_to_end.data import movie_sentences
from examples.end_to_end.training import training_arguments
from hf_highwaybp import HighwayBP, HighwayCallback, compare_exact

STEPS = 300
BATCH = 16
LENGTH = 64
VOCABULARY = 1024
HELD_BACK = 64
# what is compared with exact backpropagation: the method, and two controls that should be worse
VARIANTS: dict[str, dict[str, Any]] = {
    "k = 1": {"k": 1},
    "k = 0": {"k": 0},
    "fixed point, k = 1": {"k": 1, "residual": "zero"},
}


def token_rows() -> Tensor:
    """Return the sentences as rows of tokens ``[N, LENGTH]``, by a byte-level BPE vocabulary made from them."""
    sentences = movie_sentences()
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=["<|endoftext|>"], show_progress=False)
    tokenizer.train_from_iterator(sentences, trainer)
    ids = [token for encoded in tokenizer.encode_batch(sentences) for token in [*encoded.ids, 0]]
    return torch.tensor(ids[: len(ids) // LENGTH * LENGTH]).reshape(-1, LENGTH)


def build_model(seed: int) -> GPT2LMHeadModel:
    """Return an untrained GPT-2 of 8 blocks."""
    torch.manual_seed(seed)
    config = GPT2Config(
        n_layer=8,
        n_embd=64,
        n_head=4,
        n_positions=LENGTH,
        vocab_size=VOCABULARY,
        bos_token_id=0,
        eos_token_id=0,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        use_cache=False,
    )
    return GPT2LMHeadModel(config)


class GradientProbe(TrainerCallback):
    """Compares the gradients of every variant with exact ones at the start and in the middle of training."""

    def __init__(self, batch: dict[str, Tensor]) -> None:
        self.batch = batch
        self.cosines: list[dict[str, Any]] = []

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, *, model: nn.Module, **_: object
    ) -> None:
        """Probe the untrained model."""
        self._probe("start", 0, model)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, *, model: nn.Module, **_: object
    ) -> None:
        """Probe the half-trained model."""
        if state.global_step == args.max_steps // 2:
            self._probe("middle", state.global_step, model)

    def _probe(self, when: str, step: int, model: nn.Module) -> None:
        device = next(model.parameters()).device
        batch = {name: tensor.to(device) for name, tensor in self.batch.items()}
        cosine = {name: compare_exact(model, batch, **options).cosine for name, options in VARIANTS.items()}
        self.cosines.append({"when": when, "step": step, "cosine": cosine})


def train(callback: TrainerCallback, rows: Tensor, *, seed: int) -> tuple[list[tuple[int, float]], float]:
    """Train one model and return its curve of (step, training loss) and its loss on the rows held back."""
    model = build_model(seed)
    examples = [{"input_ids": row, "labels": row} for row in rows]
    with tempfile.TemporaryDirectory() as folder:
        arguments = training_arguments(
            folder,
            steps=STEPS,
            batch=BATCH,
            learning_rate=2e-3,
            warmup=30,
            seed=seed,
            per_device_eval_batch_size=HELD_BACK,
            logging_strategy="steps",
            logging_steps=20,
        )
        trainer = Trainer(
            model,
            arguments,
            train_dataset=examples[:-HELD_BACK],
            eval_dataset=examples[-HELD_BACK:],
            callbacks=[callback],
        )
        trainer.train()
        held_back_loss = trainer.evaluate()["eval_loss"]
    return [(log["step"], log["loss"]) for log in trainer.state.log_history if "loss" in log], held_back_loss


def step_time_ratio(batch: dict[str, Tensor], *, seed: int, rounds: int = 15) -> dict[str, Any]:
    """Return the time of a forward and backward pass with k = 1 over that with exact gradients, alternated."""
    model = build_model(seed)

    def step() -> None:
        model(**batch).loss.backward()
        model.zero_grad()

    def timed(work: Callable[[], None]) -> float:
        start = time.perf_counter()
        work()
        return time.perf_counter() - start

    ratios = []
    for _ in range(rounds + 1):
        plain = timed(step)
        with HighwayBP(model, k=1):
            ratios.append(timed(step) / plain)
    quartiles = statistics.quantiles(ratios[1:], n=4)
    return {"median": quartiles[1], "quartiles": [quartiles[0], quartiles[2]], "rounds": rounds}


def run(seed: int = 0) -> dict[str, Any]:
    """Return every figure of this part."""
    rows = token_rows()
    probe_rows = rows[-HELD_BACK : -HELD_BACK + BATCH]
    batch = {"input_ids": probe_rows, "labels": probe_rows}
    probe = GradientProbe(batch)
    methods: dict[str, TrainerCallback] = {"exact": probe, "k = 1": HighwayCallback(k=1)}
    curves, held_back, seconds = {}, {}, {}
    for name, callback in methods.items():
        start = time.perf_counter()
        curves[name], held_back[name] = train(callback, rows, seed=seed)
        seconds[name] = time.perf_counter() - start
    model = build_model(seed)
    return {
        "seed": seed,
        "steps": STEPS,
        "blocks": model.config.n_layer,
        "parameters": model.num_parameters(),
        "tokens": rows.numel(),
        "curves": curves,
        "held_back_loss": held_back,
        "cosines": probe.cosines,
        "step_time_ratio": step_time_ratio(batch, seed=seed),
        "seconds": seconds,
    }
