"""Tiny decoders of many families, with untied weights so large that a wrong cache cannot go unnoticed."""

import torch
import transformers
from transformers import PreTrainedModel

VOCAB = 97
WINDOW = 8
_COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 128,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_GROUPED = _COMMON | {"num_key_value_heads": 2}
_GEMMA = _GROUPED | {"head_dim": 8, "sliding_window": WINDOW}

# class of the model, class of its config, settings
FAMILIES = {
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", {**_COMMON, "n_inner": 64}),
    "llama": ("LlamaForCausalLM", "LlamaConfig", _GROUPED),
    "qwen2": ("Qwen2ForCausalLM", "Qwen2Config", _GROUPED),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", {**_GROUPED, "head_dim": 8}),
    "mistral": ("MistralForCausalLM", "MistralConfig", {**_GROUPED, "sliding_window": WINDOW}),
    "gemma2": ("Gemma2ForCausalLM", "Gemma2Config", _GEMMA),
    "gemma3": ("Gemma3ForCausalLM", "Gemma3TextConfig", {**_GEMMA, "sliding_window_pattern": 2}),
    "phi": ("PhiForCausalLM", "PhiConfig", _COMMON),
    "opt": ("OPTForCausalLM", "OPTConfig", {**_COMMON, "ffn_dim": 64, "word_embed_proj_dim": 32}),
    "gpt_neox": ("GPTNeoXForCausalLM", "GPTNeoXConfig", _COMMON),
    "bart": (
        "BartForConditionalGeneration",
        "BartConfig",
        {
            "vocab_size": VOCAB,
            "d_model": 32,
            "encoder_layers": 2,
            "decoder_layers": 3,
            "encoder_attention_heads": 4,
            "decoder_attention_heads": 4,
            "encoder_ffn_dim": 64,
            "decoder_ffn_dim": 64,
            "max_position_embeddings": 128,
            "tie_word_embeddings": False,
            "forced_eos_token_id": None,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "pad_token_id": 0,
            "decoder_start_token_id": 1,
        },
    ),
    "t5": (
        "T5ForConditionalGeneration",
        "T5Config",
        {
            "vocab_size": VOCAB,
            "d_model": 32,
            "d_kv": 8,
            "d_ff": 64,
            "num_layers": 3,
            "num_decoder_layers": 3,
            "num_heads": 4,
            "tie_word_embeddings": False,
            "eos_token_id": 2,
            "pad_token_id": 0,
            "decoder_start_token_id": 1,
        },
    ),
}
ENCODER_DECODERS = ("bart", "t5")


def decoder(family: str, attention: str, *, gamma: float = 0.9, seed: int = 0) -> PreTrainedModel:
    """Return a model in eval mode, float32, the same weights for both kinds of ``attention``, chain and ordinary."""
    kind, config_kind, settings = FAMILIES[family]
    config = getattr(transformers, config_kind)(**settings)
    # sdpa has no softcap
    attn_implementation = {"chain": "chain", "ordinary": "eager" if family == "gemma2" else "sdpa"}[attention]
    if attention == "chain":
        config.chain_attention = {"gamma": gamma}
    torch.manual_seed(seed)
    model = getattr(transformers, kind)._from_config(config, attn_implementation=attn_implementation).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(4)
    # a special token would end rows early, and short texts prove little
    model.generation_config.eos_token_id = None
    return model
