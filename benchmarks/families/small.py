"""Small models of any type: its own config with small numbers, in a few variants, as not every type likes all."""

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from benchmarks.families.special import SPECIAL

WIDTH, HEADS, HEAD_WIDTH = 32, 4, 8
# the token that stands for a piece of an image
IMAGE = 98
ROPE = {"rope_type": "default", "rope_theta": 1e4}
# parameters; a model with more is not small
LIMIT = 20e6
SIZES: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "embed_dim", "dim", "hidden_dim", "embedding_size"), WIDTH),
    **dict.fromkeys(("image_size", "projection_dim", "word_embed_proj_dim", "attention_hidden_size"), WIDTH),
    **dict.fromkeys(("out_hidden_size", "output_hidden_size", "hidden_size_per_layer_input"), WIDTH),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads"), HEADS),
    **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads", "num_experts", "num_local_experts"), HEADS),
    **dict.fromkeys(("d_kv", "head_dim", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim"), HEAD_WIDTH),
    **dict.fromkeys(("qk_head_dim", "patch_size", "global_head_dim"), HEAD_WIDTH),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "encoder_ffn_dim", "decoder_ffn_dim", "d_ff", "n_inner"), 64),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "ffn_hidden_size", "mlp_dim"), 64),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers"), 4),
    **dict.fromkeys(("sliding_window", "attention_window", "local_attention", "n_routed_experts"), 4),
    **dict.fromkeys(("encoder_layers", "decoder_layers", "num_key_value_heads", "linear_num_key_heads"), 2),
    **dict.fromkeys(("depth", "num_global_key_value_heads", "spatial_merge_size"), 2),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank", "moe_intermediate_size", "num_mel_bins"), 16),
    **dict.fromkeys(("n_group", "topk_group", "bos_token_id", "decoder_start_token_id", "n_shared_experts"), 1),
    "num_conv_pos_embeddings": 8,
    "num_conv_pos_embedding_groups": 2,
    "first_k_dense_replace": 1,
    "num_experts_per_tok": 2,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "rotary_dim": 4,
    "vocab_size": 101,
    "vocab_size_per_layer_input": 101,
    "attention_dropout": 0.0,
    "use_cache": False,
    "initializer_range": 0.02,
    "max_source_positions": 32,
    "image_token_id": IMAGE,
    "image_token_index": IMAGE,
    "video_token_id": 97,
    "video_token_index": 97,
    "audio_token_id": 96,
    "audio_token_index": 96,
}
# what a type may leave None and still wants small
_ALSO_NONE = ("pad_token_id", "eos_token_id", "bos_token_id")


def small_models(model_type: str, model_class: type[PreTrainedModel]) -> Iterator[PreTrainedModel]:
    """Yield small models with eager attention, float64 and in eval mode, their attention far from uniform.

    Raises:
        ValueError: If no variant can be built; the message has the reason of each.
    """
    reasons: dict[str, None] = {}
    built = False
    for make in small_configs(CONFIG_MAPPING[model_type]()):
        try:
            if (size := parameters(model_class, make())) > LIMIT:
                reasons[f"{size / 1e6:.0f} million parameters remain"] = None
                continue
            torch.manual_seed(0)
            model = model_class._from_config(make(), attn_implementation="eager", experts_implementation="eager")
        except Exception as error:
            reasons[f"{type(error).__name__}: {error}"] = None
            continue
        built = True
        yield sharpened(model.double().eval())
    if not built:
        raise ValueError("; ".join(reasons))


def parameters(model_class: type[PreTrainedModel], config: PreTrainedConfig) -> int:
    """Return how many parameters a model would have, without the memory for them."""
    with torch.device("meta"):
        empty = model_class._from_config(config, attn_implementation="eager")
    return sum(parameter.numel() for parameter in empty.parameters())


def sharpened(model: PreTrainedModel) -> PreTrainedModel:
    """Return the model with larger matrices: at its initialisation attention is nearly uniform."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4 if parameter.ndim > 1 else 1)
    return model


def small_configs(base: PreTrainedConfig) -> Iterator[Callable[[], PreTrainedConfig]]:
    """Yield makers of small configs of the type of ``base``, the likeliest first. A maker may fail.

    Args:
        base: As it is by default, or as a config of which it is a part has it by default.
    """
    parts = {key: part for key in base.sub_configs if isinstance(part := getattr(base, key, None), PreTrainedConfig)}
    makers = {key: list(small_configs(part)) for key, part in parts.items()}
    for number, values in enumerate(_variants(base)):

        def make(values: dict[str, Any] = values, number: int = number) -> PreTrainedConfig:
            inside = {key: _first(each, number) for key, each in makers.items()}
            return type(base)(**values | inside)

        yield make


def _first(makers: list[Callable[[], PreTrainedConfig]], number: int) -> PreTrainedConfig:
    """Return the first config that can be made, beginning at the variant of this number."""
    error: Exception | None = None
    for make in itertools.chain(makers[number:], makers[:number]):
        try:
            return make()
        except Exception as reason:
            error = error or reason
    assert error is not None
    raise error


def _variants(base: PreTrainedConfig) -> Iterator[dict[str, Any]]:
    """Yield small values for what a config has: of several kinds of layers all, and as few or as many key heads."""
    special = SPECIAL.get(base.model_type, {})
    known = vars(base)
    sizes = {name: value for name, value in SIZES.items() if _is_size(name, known.get(name)) and name in known}
    layers = known.get("layer_types")
    as_many = {"num_key_value_heads": HEADS} if "num_key_value_heads" in sizes else {}
    if layers:
        kinds, count = list(dict.fromkeys(layers)), sizes.get("num_hidden_layers", len(layers))
        sizes["layer_types"] = [kinds[number % len(kinds)] for number in range(count)]
    unsaid = {name: SIZES[name] for name in ("head_dim", "num_key_value_heads") if known.get(name, 0) is None}
    for values in (sizes, sizes | as_many, sizes | unsaid, {key: value for key, value in sizes.items() if key != "head_dim"}):
        yield values | special
    if "rope_parameters" in known:
        rope = known["rope_parameters"] or ROPE
        # shares of half a head, for positions in images
        yield sizes | {"rope_parameters": rope | {"mrope_section": [1, 1, 2]}} | special
    if layers:
        yield {key: value for key, value in sizes.items() if key != "layer_types"} | special


def _is_size(name: str, value: object) -> bool:
    if value is None:
        return name in _ALSO_NONE
    return isinstance(value, int | float) and (not isinstance(value, bool) or name == "use_cache")
