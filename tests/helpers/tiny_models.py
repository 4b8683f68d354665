"""Tiny randomly initialised transformers models, one line to ask for by name, each with a batch that exercises it.

They have the real architecture and three or four layers, so that a claim about "GPT-2" is tested on GPT-2's own code.
"""

from collections.abc import Callable
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

VOCAB = 101
LAYERS = 4
SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "intermediate_size": 64,
}


def gpt2(**overrides: Any) -> PreTrainedModel:
    config = {"n_embd": 32, "n_layer": LAYERS, "n_head": 4, "vocab_size": VOCAB, "n_positions": 64, "use_cache": False}
    return transformers.GPT2LMHeadModel._from_config(
        transformers.GPT2Config(**config | {"bos_token_id": 1, "eos_token_id": 2}), **overrides
    )


def llama(**overrides: Any) -> PreTrainedModel:
    """Four query heads over two key heads, so that grouped heads are covered."""
    config = transformers.LlamaConfig(vocab_size=VOCAB, num_key_value_heads=2, use_cache=False, **SIZES)
    return transformers.LlamaForCausalLM._from_config(config, **overrides)


def bert(**overrides: Any) -> PreTrainedModel:
    return transformers.BertForMaskedLM._from_config(transformers.BertConfig(vocab_size=VOCAB, **SIZES), **overrides)


def vit(**overrides: Any) -> PreTrainedModel:
    config = transformers.ViTConfig(image_size=16, patch_size=4, num_labels=3, **SIZES)
    return transformers.ViTForImageClassification._from_config(config, **overrides)


def bloom(**overrides: Any) -> PreTrainedModel:
    config = transformers.BloomConfig(hidden_size=32, n_layer=LAYERS, n_head=4, vocab_size=VOCAB)
    return transformers.BloomForCausalLM._from_config(config, **overrides)


def t5(**overrides: Any) -> PreTrainedModel:
    config = transformers.T5Config(
        d_model=32, d_kv=8, d_ff=64, num_layers=LAYERS, num_heads=4, vocab_size=VOCAB, decoder_start_token_id=0
    )
    return transformers.T5ForConditionalGeneration._from_config(config, **overrides)


def bart(**overrides: Any) -> PreTrainedModel:
    config = transformers.BartConfig(
        d_model=32,
        encoder_layers=LAYERS,
        decoder_layers=LAYERS,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=64,
        decoder_ffn_dim=64,
        vocab_size=VOCAB,
        max_position_embeddings=64,
    )
    return transformers.BartForConditionalGeneration._from_config(config, **overrides)


BUILDERS: dict[str, Callable[..., PreTrainedModel]] = {
    "gpt2": gpt2,
    "llama": llama,
    "bert": bert,
    "vit": vit,
    "bloom": bloom,
    "t5": t5,
    "bart": bart,
}


def tiny_model(name: str, *, dtype: torch.dtype = torch.float64, seed: int = 0, **overrides: Any) -> PreTrainedModel:
    """Return the named model in eval mode; ``overrides`` go to ``_from_config``, e.g. ``attn_implementation``."""
    torch.manual_seed(seed)
    return BUILDERS[name](**overrides).to(dtype).eval()


def tiny_batch(name: str, *, dtype: torch.dtype = torch.float64, padding: str = "right") -> dict[str, torch.Tensor]:
    """Return a batch with labels for the named model; text comes as ``[3, 12]`` with two padded rows."""
    generator = torch.Generator().manual_seed(1)
    if name == "vit":
        pixels = torch.randn(3, 3, 16, 16, dtype=dtype, generator=generator)
        return {"pixel_values": pixels, "labels": torch.tensor([0, 1, 2])}
    ids = torch.randint(3, VOCAB, (3, 12), generator=generator)
    mask = torch.ones_like(ids)
    for row, length in ((1, 8), (2, 5)):
        if padding == "right":
            mask[row, length:] = 0
        else:
            mask[row, : 12 - length] = 0
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}
