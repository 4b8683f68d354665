"""Every model type of transformers that can be built small is exactly chain attention, or refused by name.

The promise of the integration, held against model types that its authors never looked at. Minutes, so marked slow.
"""

import contextlib
import sys

import pytest
import torch
import transformers
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from hf_chainattn import ChainAttentionError, integration

GAMMA = 0.9
TOKENS = 10
SMALL = {
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "embed_dim", "dim", "hidden_dim", "embedding_size"), 32),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers"), 4),
    **dict.fromkeys(("encoder_layers", "decoder_layers", "num_key_value_heads", "linear_num_key_heads"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads"), 4),
    **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads", "num_experts", "num_local_experts"), 4),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "encoder_ffn_dim", "decoder_ffn_dim", "d_ff", "n_inner"), 64),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "ffn_hidden_size"), 64),
    **dict.fromkeys(("d_kv", "head_dim", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim", "patch_size"), 8),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank", "moe_intermediate_size", "num_mel_bins"), 16),
    **dict.fromkeys(("image_size", "projection_dim", "word_embed_proj_dim", "attention_hidden_size"), 32),
    **dict.fromkeys(("sliding_window", "attention_window", "local_attention", "n_routed_experts"), 4),
    **dict.fromkeys(("n_group", "topk_group", "bos_token_id", "decoder_start_token_id", "n_shared_experts"), 1),
    "num_conv_pos_embeddings": 8,
    "num_conv_pos_embedding_groups": 2,
    "first_k_dense_replace": 1,
    "num_experts_per_tok": 2,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "rotary_dim": 4,
    "vocab_size": 101,
    "attention_dropout": 0.0,
    "use_cache": False,
}
# right where they are compared, but not comparable: random masks in every forward, nan in eager too, a recurrence that
# padding leaks through, and an eager attention that is not the model file's own
NOT_COMPARABLE = {"vit_mae", "nemotron_asr_streaming_encoder", "recurrent_gemma", "tipsv2_text_model"}
CLASSES = sorted(
    {
        (model_type, name)
        for mapping in (
            modeling_auto.MODEL_MAPPING_NAMES,
            modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
            modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
        )
        for model_type, names in mapping.items()
        for name in ([names] if isinstance(names, str) else names)
        if model_type not in NOT_COMPARABLE and model_type in CONFIG_MAPPING and hasattr(transformers, name)
    }
)


def small_configs(model_type):
    """Configs with the small sizes that this type knows, in a few variants: not every type likes all of them."""
    kind = CONFIG_MAPPING[model_type]
    base = kind()
    sizes = {
        name: value
        for name, value in SMALL.items()
        if isinstance(getattr(base, name, None), int | float) or (name == "pad_token_id" and hasattr(base, name))
    }
    layers = getattr(base, "layer_types", None)
    if layers:
        kinds = list(dict.fromkeys(layers))
        count = sizes.get("num_hidden_layers", len(layers))
        yield kind(**sizes, layer_types=[kinds[index % len(kinds)] for index in range(count)])
    yield kind(**sizes)
    yield kind(**{name: value for name, value in sizes.items() if name != "head_dim"})
    yield kind(**sizes | ({"num_key_value_heads": 4} if "num_key_value_heads" in sizes else {}))


def small_model(model_type, name):
    """The model with eager attention in float64, weights far from their initialisation; skips what cannot be built."""
    model_class = getattr(transformers, name)
    configs = small_configs(model_type)
    while True:
        try:
            config = next(configs)
            with torch.device("meta"):
                size = sum(
                    p.numel() for p in model_class._from_config(config, attn_implementation="eager").parameters()
                )
            if size > 20e6:
                pytest.skip(f"{name} stays too large")
            torch.manual_seed(0)
            model = model_class._from_config(config, attn_implementation="eager").double().eval()
        except StopIteration:
            pytest.skip(f"{name} cannot be built small")
        except ChainAttentionError:
            raise
        except Exception:
            continue
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(4 if parameter.ndim > 1 else 1)
        return model


def in_a_dtype_that_runs(model):
    """The model in float64, or in float32 where its grouped products of experts know no other; and the tolerance."""
    try:
        first_output(model, inputs(model, None))
    except RuntimeError as error:
        if "mat_a to be Float32" not in str(error):
            raise
        return model.float(), 1e-3
    return model, 1e-6


def inputs(model, padding):
    dtype = model.dtype
    generator = torch.Generator().manual_seed(3)
    name = model.main_input_name
    if name == "pixel_values":
        side = model.config.image_size
        return {name: torch.randn(2, 3, side, side, generator=generator, dtype=dtype)}
    if name == "input_values":
        return {name: torch.randn(2, 4000, generator=generator, dtype=dtype)}
    mask = torch.ones(2, TOKENS, dtype=torch.long)
    if padding == "left":
        mask[1, :4] = 0
    elif padding == "right":
        mask[1, -4:] = 0
    ids = torch.randint(5, 100, (2, TOKENS), generator=generator)
    batch = {"input_ids": ids, "attention_mask": mask}
    if getattr(model.config, "is_encoder_decoder", False):
        batch["decoder_input_ids"] = ids[:, :7].flip(1)
    return batch


def first_output(model, batch):
    with torch.no_grad():
        output = model(**batch)[0]
    masked = "attention_mask" in batch and "decoder_input_ids" not in batch
    return output[batch["attention_mask"].bool()] if masked else output


def crossing(model):
    """The attention modules whose names say that they attend to an encoder."""
    return {
        module
        for name, module in model.named_modules()
        if any(word in name.rpartition(".")[2].lower() for word in ("cross", "encoder_attn", "encdec", "encoder_att"))
    }


def oracle(eager, seen, ordinary):
    """The model's own eager attention, its output replaced by the solve with the weights that it returns."""

    def forward(module, query, key, value, attention_mask, *args, **kwargs):
        output, weights = eager(module, query, key, value, attention_mask, *args, **kwargs)
        if module in ordinary:
            return output, weights
        seen.append(module)
        attention = torch.nan_to_num(weights.double())
        values = value.repeat_interleave(attention.shape[1] // value.shape[1], 1).double()
        identity = torch.eye(attention.shape[-1], dtype=torch.float64)
        walk = (1 - GAMMA) * attention @ torch.linalg.solve(identity - GAMMA * attention, values)
        return walk.to(output.dtype).transpose(1, 2).reshape(output.shape).contiguous(), weights

    return forward


@contextlib.contextmanager
def in_the_eager_path(monkeypatch, seen, ordinary):
    with monkeypatch.context() as patch:
        for name, module in list(sys.modules.items()):
            eager = getattr(module, "eager_attention_forward", None)
            if name.startswith("transformers.models.") and eager is not None:
                patch.setattr(module, "eager_attention_forward", oracle(eager, seen, ordinary))
        yield


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("model_type", "name"), CLASSES)
def test_a_model_type_is_chain_attention_or_refused(model_type, name, monkeypatch):
    """Oracle: a matrix inverse in the model's own eager path at gamma = 0.9, plain eager attention at gamma = 0."""
    # eager takes its softmax in float32, where the mask of a float64 model overflows to nan
    softmax = torch.nn.functional.softmax
    monkeypatch.setattr(torch.nn.functional, "softmax", lambda x, dim=None, **_: softmax(x, dim=dim))
    model = small_model(model_type, name)
    try:
        model, tolerance = in_a_dtype_that_runs(model)
    except Exception as error:
        pytest.skip(f"{name} does not take these inputs: {error}")
    counted = []
    chain = integration.chain_attention
    monkeypatch.setattr(integration, "chain_attention", lambda *a, **k: counted.append(1) or chain(*a, **k))
    for padding in (None, "left", "right"):
        batch = inputs(model, padding)
        try:
            ordinary, walked = (chained_output(model, batch, gamma) for gamma in (0.0, GAMMA))
        except ChainAttentionError:
            # refused by name, which is the other half of the promise
            return
        assert relative(ordinary, first_output(model, batch)) <= tolerance, f"gamma 0, padding {padding}"
        counted.clear()
        chained_output(model, batch, GAMMA)
        seen = []
        with in_the_eager_path(monkeypatch, seen, crossing(model)):
            assert relative(walked, first_output(model, batch)) <= tolerance, f"gamma {GAMMA}, padding {padding}"
        assert len(counted) == len(seen) > 0
        if "attention_mask" not in batch:
            break


def chained_output(model, batch, gamma):
    """The output with chain attention; the model is back on eager attention afterwards."""
    for part in model.modules():
        if hasattr(part, "set_attn_implementation"):
            part.config.chain_attention = {"gamma": gamma, "encoder": True}
    try:
        model.set_attn_implementation("chain")
        return first_output(model, batch)
    finally:
        model.set_attn_implementation("eager")


def relative(actual, expected):
    return ((actual - expected).abs().max() / expected.abs().max()).item()
