"""Highway-BP on one device: what a step costs, and how near its gradient is, by width and number of iterations."""

from collections.abc import Iterator

import torch
from transformers import GPT2Config, GPT2LMHeadModel

from benchmarks.registry import Row, alternate, benchmark, ratio
from hf_highwaybp import HighwayBP, compare_exact

BLOCKS = 8


@benchmark
def highway() -> Iterator[Row]:
    """Yield cosine with the exact gradient and time over an exact step, for an untrained GPT-2."""
    for width in (64, 128, 192):
        torch.manual_seed(0)
        config = GPT2Config(
            n_layer=BLOCKS,
            n_embd=width,
            n_head=4,
            n_positions=64,
            vocab_size=512,
            bos_token_id=0,
            eos_token_id=0,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            use_cache=False,
        )
        model = GPT2LMHeadModel(config)
        ids = torch.randint(config.vocab_size, (8, 64))
        batch = {"input_ids": ids, "labels": ids}
        if (error := compare_exact(model, batch, k=BLOCKS - 1).all_relative_error) > 1e-5:
            raise AssertionError(f"Highway-BP is not exact at k = {BLOCKS - 1}: relative error {error:.1e}")

        def step(model: GPT2LMHeadModel = model, batch: dict[str, torch.Tensor] = batch) -> None:
            model(**batch).loss.backward()
            model.zero_grad()

        for k in (0, 1, 2, None):

            def highway_step(k: int | None = k, model: GPT2LMHeadModel = model) -> None:
                with HighwayBP(model, k=k):
                    step()

            cosine = compare_exact(model, batch, k=k).cosine
            times = alternate({"highway": highway_step, "exact": step})
            yield {
                "width": width,
                "k": "exact" if k is None else k,
                "cosine": cosine,
                **ratio(times, "highway", "exact"),
            }
