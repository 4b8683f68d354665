"""Generation with a cache: the time of a token with chain attention over that with sdpa, and how large caches are."""

import functools
from collections.abc import Iterator

import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

import hf_chainattn  # noqa: F401  makes attn_implementation="chain" known
from benchmarks.chain_times import clock
from benchmarks.registry import Row, ratio, target

CASES = ((1024, 8), (1024, 2), (4096, 8), (4096, 2))
LAYERS, HEADS, WIDTH = 4, 8, 64
# tokens that a round generates
TOKENS = 8


def model_with(attn_implementation: str, key_heads: int) -> LlamaForCausalLM:
    """Return a Llama of four layers, 512 wide, with the same weights for every implementation."""
    torch.manual_seed(0)
    config = LlamaConfig(
        num_hidden_layers=LAYERS,
        hidden_size=HEADS * WIDTH,
        intermediate_size=4 * HEADS * WIDTH,
        num_attention_heads=HEADS,
        num_key_value_heads=key_heads,
        vocab_size=1000,
        max_position_embeddings=8192,
        attn_implementation=attn_implementation,
    )
    if attn_implementation == "chain":
        config.chain_attention = {"gamma": 0.9}
    return LlamaForCausalLM(config).eval()


@torch.no_grad()
def filled(model: LlamaForCausalLM, ids: torch.Tensor) -> DynamicCache:
    """Return the cache of a prompt ``[1, T]``."""
    cache = DynamicCache(config=model.config)
    model(ids, past_key_values=cache, logits_to_keep=1)
    return cache


@torch.no_grad()
def decode(model: LlamaForCausalLM, cache: DynamicCache) -> torch.Tensor:
    """Return the logits of some tokens, given one by one; the cache is as before."""
    logits = [model(torch.tensor([[token]]), past_key_values=cache).logits for token in range(TOKENS)]
    cache.crop(-TOKENS)
    return torch.cat(logits, 1)


def gate(model: LlamaForCausalLM, cache: DynamicCache, ids: torch.Tensor) -> float:
    """Return how far logits with the cache are from those of the whole sequence without one, relatively.

    Raises:
        AssertionError: If that is too far.
    """
    with torch.no_grad():
        whole = model(torch.cat([ids, torch.arange(TOKENS)[None]], 1), use_cache=False, logits_to_keep=TOKENS).logits
    error = float((decode(model, cache) - whole).norm() / whole.norm())
    if not error <= 1e-5:
        raise AssertionError(f"decoding with a cache is wrong: relative error {error:.1e}")
    return error


def mebibytes(cache: DynamicCache) -> float:
    """Return the size of keys and values in a cache."""
    return sum(part.nbytes for layer in cache.layers for part in (layer.keys, layer.values)) / 2**20


def decode_over_sdpa() -> Iterator[Row]:
    """Yield the time of a token with chain attention over that with sdpa."""
    for tokens, key_heads in CASES:
        ids = torch.randint(1000, (1, tokens), generator=torch.Generator().manual_seed(tokens))
        models = {name: model_with(name, key_heads) for name in ("chain", "sdpa")}
        caches = {name: filled(model, ids) for name, model in models.items()}
        error = max(gate(models[name], caches[name], ids) for name in models)
        times = clock({name: functools.partial(decode, models[name], caches[name]) for name in models})
        figures = ratio(times, "chain", "sdpa")
        # of one token
        figures["milliseconds"] /= TOKENS
        yield {
            "tokens": tokens,
            "key_heads": key_heads,
            "relative_error": error,
            **figures,
            "cache_MiB": mebibytes(caches["chain"]),
            "sdpa_cache_MiB": mebibytes(caches["sdpa"]),
            **target(figures["ratio"], at_most=1.2),
        }
