"""Settings reach every layer they are for, survive a reload, and are refused where they would do nothing."""

import copy

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from hf_chainattn import (
    UnsupportedCacheError,
    UnsupportedModelError,
    disable_chain_attention,
    enable_chain_attention,
)
from tests.chainattn.test_gates import gates
from tests.chainattn.test_generation import ids_of
from tests.helpers.decoders import decoder
from tests.helpers.tiny_models import LAYERS, tiny_model

IDS = torch.arange(3, 15)[None]
BERT = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32, "vocab_size": 50}


def logits(model, ids=IDS):
    given = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {"use_cache": False}
    with torch.no_grad():
        return model.eval()(input_ids=ids, **given).logits


def test_settings_reach_stacks_with_copies_of_the_config(tmp_path):
    """Oracle: T5 with gamma 0 is T5; its copies of the config follow every change, and a reload."""
    model = decoder("t5", "ordinary")
    plain = logits(model)
    enable_chain_attention(model, gamma=0.0)
    torch.testing.assert_close(logits(model), plain, rtol=1e-4, atol=1e-3)
    enable_chain_attention(model, gamma=0.9, encoder=True, learnable=True)
    assert len(gates(model)) == 6
    found = logits(model)
    assert (found - plain).abs().max() > 0.1
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    torch.testing.assert_close(logits(again), found)
    disable_chain_attention(again)
    torch.testing.assert_close(logits(again), plain, rtol=1e-4, atol=1e-3)


def test_a_stack_that_is_switched_by_itself_is_not_saved_as_ordinary(tmp_path):
    """T5 gives its stacks copies of its config, of which a checkpoint knows nothing."""
    model = decoder("t5", "ordinary")
    plain = logits(model)
    enable_chain_attention(model.decoder, gamma=0.5)
    assert (logits(model) - plain).abs().max() > 0.1
    adapted = get_peft_model(copy.deepcopy(model), LoraConfig(target_modules=["q"]))
    for each in (model, adapted):
        with pytest.raises(UnsupportedModelError, match="saved without the chain attention of decoder"):
            each.save_pretrained(tmp_path)
    enable_chain_attention(model, gamma=0.5)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(type(model).from_pretrained(tmp_path)), logits(model))


def test_an_encoder_with_a_config_of_its_own_is_asked_for_by_part(tmp_path):
    config = transformers.EncoderDecoderConfig.from_encoder_decoder_configs(
        transformers.BertConfig(**BERT), transformers.BertConfig(**BERT)
    )
    config.decoder_start_token_id = config.pad_token_id = 1
    model = transformers.EncoderDecoderModel(config=config).eval()
    plain = model.encoder(IDS)[0]
    with pytest.raises(ValueError, match="ask for another encoder by part"):
        enable_chain_attention(model, encoder=True)
    model.set_attn_implementation({"encoder": "chain"})
    changed = model.encoder(IDS)[0]
    assert (changed - plain).abs().max() > 1e-5
    model.save_pretrained(tmp_path)
    assert torch.equal(transformers.EncoderDecoderModel.from_pretrained(tmp_path).eval().encoder(IDS)[0], changed)


def test_settings_of_the_whole_go_to_the_part_that_is_asked_for(tmp_path):
    text = transformers.LlamaConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=64)
    vision = transformers.CLIPVisionConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=64, image_size=16, patch_size=8
    )
    plain = transformers.LlavaModel._from_config(transformers.LlavaConfig(text_config=text, vision_config=vision))
    plain.save_pretrained(tmp_path)
    model = transformers.LlavaModel.from_pretrained(
        tmp_path, attn_implementation={"vision_config": "chain"}, chain_attention={"gamma": 0.3}
    )
    assert model.config.vision_config.chain_attention == {"gamma": 0.3, "diagonal": "kept"}
    assert model.config.chain_attention is None
    disable_chain_attention(model)
    assert "attn_implementation" not in model.config.vision_config.to_dict()
    assert "attn_implementation" not in model.config.to_dict()


def test_a_list_for_the_layers_of_a_decoder_survives_a_reload(tmp_path):
    config = tiny_model("bart").config
    config.encoder_layers, config.decoder_layers = 3, 2
    model = enable_chain_attention(transformers.BartForConditionalGeneration(config), gamma=[0.9, 0.5])
    model.save_pretrained(tmp_path)
    again = transformers.BartForConditionalGeneration.from_pretrained(tmp_path)
    assert torch.equal(logits(again), logits(model))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"layers": [2, LAYERS]}, f"layers must be below {LAYERS}"),
        ({"gamma": [0.5] * (LAYERS + 1)}, f"each of {LAYERS} layers"),
        ({"gamma": [[0.5] * 3] * LAYERS}, "each of 4 heads"),
        ({"per_head": True}, "learnable gamma"),
        ({"encoder": True}, "encoder=True is for"),
    ],
)
def test_settings_that_would_do_nothing_are_refused(settings, message):
    """The model is as it was."""
    model = tiny_model("llama")
    before, names = model.config.to_dict(), [name for name, _ in model.named_parameters()]
    with pytest.raises(ValueError, match=message):
        enable_chain_attention(model, **settings)
    assert model.config.to_dict() == before
    assert [name for name, _ in model.named_parameters()] == names


def test_other_settings_of_gates_make_other_gates(tmp_path):
    model = enable_chain_attention(tiny_model("llama", dtype=torch.float32), gamma=0.9, learnable=True)
    enable_chain_attention(model, gamma=0.5, learnable=True, per_head=True)
    assert [gate().tolist() for gate in gates(model).values()] == [pytest.approx([0.5] * 4)] * LAYERS
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), logits(model))


def test_what_gates_learned_survives_a_switch_to_sdpa_and_back():
    model = enable_chain_attention(tiny_model("llama"), gamma=0.9, learnable=True)
    with torch.no_grad():
        for gate in gates(model).values():
            gate.bias.fill_(0.0)
    before = logits(model)
    model.set_attn_implementation("sdpa")
    model.set_attn_implementation("chain")
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize("learnable", [False, True])
def test_a_change_of_learnable_in_the_config_alone_is_refused(learnable):
    model = enable_chain_attention(tiny_model("llama"), gamma=0.9, learnable=learnable)
    model.config.chain_attention = {"gamma": 0.5, "learnable": not learnable}
    with pytest.raises(UnsupportedModelError, match="change that with enable_chain_attention"):
        logits(model)


@pytest.mark.parametrize("change", [{"gamma": 0.3}, {"diagonal": "removed"}])
def test_a_cache_is_not_continued_with_other_settings(change):
    model = decoder("llama", "chain")
    with torch.no_grad():
        cache = model(ids_of()[:, :5], use_cache=True).past_key_values
    enable_chain_attention(model, **change)
    with pytest.raises(UnsupportedCacheError, match="was filled with chain attention at"), torch.no_grad():
        model(ids_of()[:, 5:], past_key_values=cache)


def deepseek():
    return transformers.DeepseekV3ForCausalLM(
        transformers.DeepseekV3Config(
            hidden_size=32,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=4,
            vocab_size=97,
            moe_intermediate_size=16,
            n_routed_experts=4,
            n_group=1,
            topk_group=1,
            num_experts_per_tok=2,
            kv_lora_rank=8,
            q_lora_rank=8,
            qk_rope_head_dim=8,
            qk_nope_head_dim=8,
            v_head_dim=8,
            first_k_dense_replace=1,
        )
    )


def doge():
    return transformers.DogeForCausalLM(
        transformers.DogeConfig(
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=4,
            intermediate_size=32,
            vocab_size=97,
            keep_window_size=4,
            max_position_embeddings=64,
        )
    )


@pytest.mark.parametrize("build", [deepseek, doge])
def test_a_model_whose_cache_holds_something_else_is_refused_with_one(build):
    """DeepSeek caches what it makes keys and values from, Doge makes its mask from cached values."""
    torch.manual_seed(0)
    model = enable_chain_attention(build().eval())
    assert logits(model, ids_of()).isfinite().all()
    with pytest.raises(UnsupportedModelError, match="use_cache=False"), torch.no_grad():
        model(ids_of(), use_cache=True)
