"""``python -m examples.chainattn.generate``: a language model of one chain layer follows copies when it generates.

Trains small GPT-2 models on programs such as ``3 > a ; a > b ; b > c``, unless their folders are there already: one
with a chain layer, others with ordinary attention. Then it loads them, lets ``generate()`` say what line after line
puts into its name, all from one cache, counts right answers by depth, and draws where an answer comes from.
"""

import copy
import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DynamicCache,
    GPT2Config,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Trainer,
)

from examples.chainattn.programs import (
    LINE,
    ProgramDataset,
    Programs,
    mixed_programs,
    new_tokenizer,
    sample_programs,
)
from examples.chainattn.runs import Run, options, planned, quietly_trained, results
from examples.chainattn.tables import program_tables
from examples.end_to_end.facts import machine_facts
from examples.end_to_end.training import training_arguments
from hf_chainattn import chain_walks, enable_chain_attention, plot_hops, plot_mixing
from hf_chainattn.tasks import accuracy_by_depth

MODELS = ("chain-1", "sdpa-1", "sdpa-2", "sdpa-4")
LINES = 20
BATCH, TEST_PROGRAMS = 32, 512
SHOWN = "7 > a ; 2 > b ; a > c ; b > d ; c > e ; d > f ; e > g ; g > ?"


def train(run: Run, folder: Path) -> list[float]:
    """Train a model with Trainer, save it with its tokenizer, and return the loss of each tenth of the steps."""
    tokenizer = new_tokenizer()
    config = GPT2Config(
        vocab_size=len(tokenizer),
        n_positions=LINE * LINES,
        n_embd=64,
        n_layer=run.layers,
        n_head=1,
        # no program comes twice, so that nothing can be learned by heart
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=tokenizer.pad_token_id,
        tie_word_embeddings=False,
    )
    if run.attention == "chain":
        config.chain_attention = {"gamma": 0.9}
    torch.manual_seed(run.seed)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=run.attention)
    programs = mixed_programs(run.steps * BATCH, lines=LINES, seed=run.seed + 1)
    arguments = training_arguments(
        str(folder),
        steps=run.steps,
        batch=BATCH,
        learning_rate=3e-3 if run.layers == 1 else 1e-3,
        warmup=min(100, run.steps // 10),
        seed=run.seed,
        weight_decay=0.01,
        disable_tqdm=True,
        logging_strategy="steps",
        logging_steps=max(run.steps // 10, 1),
    )
    losses = quietly_trained(Trainer(model, arguments, train_dataset=ProgramDataset(programs)))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return losses


def answers(model: PreTrainedModel, programs: Programs, *, told: int, use_cache: bool = True) -> Tensor:
    """Return what a model generates where each line after the first ``told`` would end, ``[N, lines - told]``.

    One cache keeps what was read, so that each turn reads only the tokens of its own line; without a cache it reads
    everything again. What was generated is not read: the program goes on with ``;`` instead.
    """
    found = []
    cache = {"past_key_values": DynamicCache(config=model.config)} if use_cache else {"use_cache": False}
    for stop in range(LINE * (told + 1) - 1, programs.ids.shape[1], LINE):
        text = programs.ids[:, :stop]
        longer = model.generate(text, attention_mask=torch.ones_like(text), max_new_tokens=1, do_sample=False, **cache)
        found.append(longer[:, -1])
    return torch.stack(found, 1)


def accuracy(model: PreTrainedModel, *, seed: int) -> dict[str, float]:
    """Return the share of right answers overall and by depth, for programs of two digits: guessing gives a half."""
    generator = torch.Generator().manual_seed(seed)
    programs = sample_programs(TEST_PROGRAMS, lines=LINES, chains=2, fresh=0.0, generator=generator)
    found = answers(model, programs, told=2)
    return accuracy_by_depth(found, programs.answers[:, 2:], programs.depth[:, 2:])


def result_of(run: Run, parent: Path) -> dict[str, Any]:
    """Train a model if there is none, load it from its folder, and return what is told of it."""
    folder = run.folder(parent)
    told = folder / "training.json"
    if not told.exists():
        begin = time.process_time()
        losses = train(run, folder)
        training = {"losses": losses, "seconds": time.process_time() - begin}
        told.write_text(json.dumps(training) + "\n", encoding="utf8")
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    return {**asdict(run), **json.loads(told.read_text("utf8")), "accuracy": accuracy(model, seed=run.seed + 100)}


def ask(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, prompts: list[str]) -> list[str]:
    """Return the answers to prompts of any lengths, generated in one batch that is padded on the left."""
    batch = tokenizer(prompts, padding=True, return_tensors="pt")
    text = model.generate(**batch, max_new_tokens=1, do_sample=False)
    return tokenizer.batch_decode(text[:, -1:])


def draw(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, prompt: str, folder: Path) -> list[Path]:
    """Draw where the answer to a prompt comes from, in one hop and in all, and how many moves away; return files."""
    from matplotlib import pyplot

    batch, words = tokenizer(prompt, return_tensors="pt"), prompt.split()
    walk = chain_walks(model, batch, max_moves=12)[0]
    # the same queries and keys, without going on after the first hop
    one_hop = chain_walks(enable_chain_attention(copy.deepcopy(model), gamma=0.0), batch)[0]
    figure, axes = pyplot.subplots(1, 2, figsize=(15, 7), layout="constrained")
    for axis, matrix, title in zip(axes, (one_hop.mixing, walk.mixing), ("one hop", "all hops"), strict=True):
        plot_mixing(matrix[0, 0], tokens=words, axes=axis).set_title(title)
    paths = [folder / "mixing.png", folder / "hops.png"]
    figure.savefig(paths[0], dpi=120)
    bars = plot_hops(walk.moves[0, 0, -1])
    bars.set_title(f"answer to {' '.join(words[-3:])}")
    bars.figure.savefig(paths[1], dpi=120)
    pyplot.close("all")
    return paths


def show(saved: Path, folder: Path) -> None:
    """Load a model with its tokenizer, print its answers to some prompts, and draw where the first comes from."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(saved).eval(), AutoTokenizer.from_pretrained(saved)
    prompts = [SHOWN, SHOWN.replace("g > ?", "f > ?"), "4 > x ; x > y ; y > ?"]
    print()
    for prompt, answer in zip(prompts, ask(model, tokenizer, prompts), strict=True):
        print(f"{prompt}  {answer}")
    print(f"\nPictures: {', '.join(map(str, draw(model, tokenizer, SHOWN, folder)))}")


def main(argv: list[str] | None = None) -> None:
    """Train what is missing, print accuracies and answers, and write figures and pictures."""
    parser = options(module="generate", text=__doc__, models=MODELS, steps=1000, deep_steps=2000)
    arguments = parser.parse_args(argv)
    facts = {**machine_facts(), "threads": 1, "trainings at a time": arguments.jobs}
    print(", ".join(f"{name} {value}" for name, value in facts.items()))
    runs, rows = planned(arguments), []
    for run, row in zip(runs, results(result_of, runs, arguments.out, jobs=arguments.jobs), strict=True):
        rows.append(row)
        print(f"{run}: {row['accuracy']['overall']:.3f} after {row['seconds']:.0f} s of one core", flush=True)
    result = {"facts": facts, "rows": rows}
    for table in program_tables(result):
        print(f"\n{table.title}\n{table.markdown()}")
    (arguments.out / "generate.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf8")

    for run in runs:
        if run.attention == "chain" and run.seed == 0:
            show(run.folder(arguments.out), arguments.out)


if __name__ == "__main__":
    main()
