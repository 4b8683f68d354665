"""Model families that would be silently wrong in one way or another: each is right, or refused by name."""

import pytest
import torch
import transformers
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.florence2.modeling_florence2 import Florence2VisionBackbone

from hf_chainattn import UnsupportedModelError, disable_chain_attention, enable_chain_attention

SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "vocab_size": 101,
}
IDS = torch.randint(3, 100, (2, 12), generator=torch.Generator().manual_seed(0))


def built(model_class, config):
    """The model in float64 with attention far from uniform."""
    torch.manual_seed(0)
    model = model_class._from_config(config, attn_implementation="eager").double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4 if parameter.ndim > 1 else 1)
    return model


def bigbird_pegasus():
    config = transformers.BigBirdPegasusConfig(
        d_model=32,
        decoder_layers=2,
        encoder_layers=1,
        decoder_attention_heads=4,
        encoder_attention_heads=4,
        decoder_ffn_dim=64,
        encoder_ffn_dim=64,
        vocab_size=101,
        max_position_embeddings=64,
        use_cache=False,
    )
    return built(transformers.BigBirdPegasusForCausalLM, config)


def test_a_decoder_whose_flag_says_bidirectional_cannot_see_the_future():
    """Oracle: bit equality of all earlier outputs when only the last token changes."""
    model = enable_chain_attention(bigbird_pegasus())
    other = IDS.clone()
    other[:, -1] = (other[:, -1] + 1) % 101
    with torch.no_grad():
        first, second = model(IDS).logits, model(other).logits
    assert torch.equal(first[:, :-1], second[:, :-1])
    assert not torch.equal(first[:, -1], second[:, -1])


@pytest.mark.parametrize("masked", [False, True])
def test_an_encoder_whose_flag_says_causal_sees_everything(masked):
    """Oracle: the model's own eager attention, which gamma = 0 must equal."""
    model = built(transformers.SplinterModel, transformers.SplinterConfig(**SIZES))
    mask = {"attention_mask": torch.ones_like(IDS)} if masked else {}
    with torch.no_grad():
        expected = model(IDS, **mask).last_hidden_state
        actual = enable_chain_attention(model, gamma=0.0)(IDS, **mask).last_hidden_state
    # eager takes its softmax in float32 there
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("model_class", "config_class", "more"),
    [
        ("Gemma2ForCausalLM", "Gemma2Config", {"num_key_value_heads": 2, "head_dim": 8, "sliding_window": 4}),
        ("MistralForCausalLM", "MistralConfig", {"num_key_value_heads": 2, "sliding_window": 4}),
        ("Qwen3ForCausalLM", "Qwen3Config", {"num_key_value_heads": 2, "head_dim": 8}),
        ("OPTForCausalLM", "OPTConfig", {"ffn_dim": 64, "word_embed_proj_dim": 32, "max_position_embeddings": 64}),
        ("DistilBertModel", "DistilBertConfig", {"dim": 32, "hidden_dim": 64, "n_layers": 2, "n_heads": 4}),
        ("ModernBertModel", "ModernBertConfig", {"pad_token_id": 0, "local_attention": 4}),
        ("AlbertModel", "AlbertConfig", {"embedding_size": 16}),
    ],
)
def test_windows_softcaps_and_shared_layers_are_honoured(model_class, config_class, more):
    """Oracle: the model's own eager attention, which gamma = 0 must equal, with left padding."""
    # in float64 eager itself gives nan: its softmax is float32, where the mask's most negative number is -inf
    model = built(getattr(transformers, model_class), getattr(transformers, config_class)(**SIZES | more)).float()
    mask = torch.ones_like(IDS)
    mask[1, :4] = 0
    with torch.no_grad():
        expected = model(IDS, attention_mask=mask)[0]
        zero = enable_chain_attention(model, gamma=0.0)(IDS, attention_mask=mask)[0]
        chained = enable_chain_attention(model, gamma=0.9)(IDS, attention_mask=mask)[0]
    real = mask.bool()
    torch.testing.assert_close(zero[real], expected[real], rtol=1e-4, atol=1e-4)
    assert (chained[real] - expected[real]).abs().max() > 1e-3


def deepseek_v32():
    config = CONFIG_MAPPING["deepseek_v32"](
        **SIZES,
        q_lora_rank=16,
        kv_lora_rank=16,
        qk_rope_head_dim=8,
        qk_nope_head_dim=8,
        v_head_dim=8,
        num_key_value_heads=4,
        n_routed_experts=4,
        n_shared_experts=1,
        num_experts_per_tok=2,
        moe_intermediate_size=16,
        first_k_dense_replace=2,
        n_group=1,
        topk_group=1,
        index_topk=4,
        index_n_heads=4,
        index_head_dim=16,
    )
    return built(transformers.DeepseekV32ForCausalLM, config)


def gpt_oss():
    config = transformers.GptOssConfig(**SIZES, num_key_value_heads=2, head_dim=8, num_local_experts=2)
    return built(transformers.GptOssForCausalLM, config)


@pytest.mark.parametrize(("model", "named"), [(deepseek_v32, "indices"), (gpt_oss, "s_aux")])
def test_sparse_patterns_and_sinks_are_refused_by_name(model, named):
    chained = enable_chain_attention(model())
    with pytest.raises(UnsupportedModelError, match=rf"hands \[.*'{named}'"):
        chained(IDS, use_cache=False)


def test_packing_by_sequence_lengths_is_refused_and_by_position_ids_is_exact():
    """Oracle: the second document alone."""
    config = transformers.LlamaConfig(**SIZES, num_key_value_heads=2)
    model = enable_chain_attention(built(transformers.LlamaForCausalLM, config))
    lengths = torch.tensor([0, 6, 12], dtype=torch.int32)
    with pytest.raises(UnsupportedModelError, match="cu_seq_lens_q"):
        model(IDS[:1], cu_seq_lens_q=lengths, cu_seq_lens_k=lengths, max_length_q=6, max_length_k=6, use_cache=False)
    positions = torch.arange(6).repeat(2)[None]
    with torch.no_grad():
        packed = model(IDS[:1], position_ids=positions, use_cache=False).logits[:, 6:]
        alone = model(IDS[:1, 6:], use_cache=False).logits
    torch.testing.assert_close(packed, alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("model_class", "config_class", "sizes"),
    [
        ("FalconModel", "FalconConfig", SIZES),
        ("GPTJModel", "GPTJConfig", {"n_embd": 32, "n_layer": 1, "n_head": 4, "rotary_dim": 4}),
        ("GPTNeoModel", "GPTNeoConfig", {"num_layers": 2, "attention_types": [[["global", "local"], 1]]}),
    ],
)
def test_models_with_a_table_of_attentions_are_refused_at_construction(model_class, config_class, sizes):
    """They look the name up themselves, and would end in a KeyError before any of our checks."""
    config = getattr(transformers, config_class)(**sizes)
    with pytest.raises(UnsupportedModelError, match="never calls the attention interface"):
        getattr(transformers, model_class)._from_config(config, attn_implementation="chain")


def test_differential_attention_is_refused():
    config = transformers.DiffLlamaConfig(**SIZES, num_key_value_heads=2)
    model = built(transformers.DiffLlamaForCausalLM, config)
    with pytest.raises(UnsupportedModelError, match="subtracts two attentions"):
        enable_chain_attention(model)


def test_a_failed_switch_leaves_no_entry_in_the_config(monkeypatch):
    model = built(transformers.LlamaForCausalLM, transformers.LlamaConfig(**SIZES))
    before = model.config.to_dict()

    def failing(*args, **kwargs):
        raise RuntimeError("no")

    monkeypatch.setattr(type(model), "set_attn_implementation", failing)
    with pytest.raises(RuntimeError, match="no"):
        enable_chain_attention(model)
    assert model.config.to_dict() == before


@pytest.mark.parametrize("use_cache", [False, True])
def test_attention_weights_are_those_of_ordinary_attention(use_cache):
    """Oracle: eager attention of the first layer, whose input is the same; with a mask, in a second pass too."""
    sizes = SIZES | {"num_key_value_heads": 2}
    model = built(transformers.LlamaForCausalLM, transformers.LlamaConfig(**sizes))
    mask = torch.ones_like(IDS)
    mask[0, :2] = 0
    found = []
    for implementation in ("eager", "chain"):
        model.set_attn_implementation(implementation)
        parts = [model(IDS, attention_mask=mask, use_cache=use_cache, output_attentions=True)]
        if use_cache:
            longer = torch.cat([mask, mask[:, -2:]], 1)
            past = parts[0].past_key_values
            parts.append(model(IDS[:, :2], attention_mask=longer, past_key_values=past, output_attentions=True))
        found.append([part.attentions[0] for part in parts])
    real = mask.bool()[:, None, :, None]
    # eager attention of a row that sees nothing is nan here
    chain, eager = (part[0].masked_fill(~real, 0.0) for part in (found[1], found[0]))
    torch.testing.assert_close(chain, eager, rtol=1e-4, atol=1e-6)
    for eager, chain in zip(found[0][1:], found[1][1:], strict=True):
        torch.testing.assert_close(chain, eager, rtol=1e-4, atol=1e-6)


def test_models_are_tagged_while_they_are_chains():
    """The tag that reaches the model card through push_to_hub."""
    model = built(transformers.LlamaForCausalLM, transformers.LlamaConfig(**SIZES))
    model.add_model_tags("mine")
    enable_chain_attention(model)
    enable_chain_attention(model, gamma=0.5)
    assert model.model_tags == ["mine", "chain-attention"]
    disable_chain_attention(model)
    assert model.model_tags == ["mine"]


def blip():
    """A text decoder that never dispatches beside a vision tower that does not either."""
    text = transformers.BlipTextConfig(**SIZES, encoder_hidden_size=32, bos_token_id=1, eos_token_id=2, sep_token_id=2)
    vision = transformers.BlipVisionConfig(**SIZES, image_size=16, patch_size=8)
    return transformers.BlipConfig(text_config=text.to_dict(), vision_config=vision.to_dict())


def git():
    """A text decoder that attends by itself beside a vision tower that dispatches."""
    vision = transformers.GitVisionConfig(**SIZES, image_size=16, patch_size=8)
    return transformers.GitConfig(**SIZES, vision_config=vision.to_dict(), bos_token_id=1, eos_token_id=2)


@pytest.mark.parametrize(
    ("model_class", "config", "switched", "built"),
    [
        ("BlipModel", blip, "never calls the attention interface", "never calls the attention interface"),
        ("GitModel", git, "attends in encoder.layer.0.attention.self", "from GIT_SELF_ATTENTION_CLASSES"),
    ],
)
def test_a_decoder_that_would_stay_ordinary_is_refused_and_left_alone(model_class, config, switched, built):
    """Without an error of ours: transformers only logs that such a part cannot switch."""
    kind = getattr(transformers, model_class)
    model = kind._from_config(config(), attn_implementation="eager")
    before = model.config.to_dict()
    with pytest.raises(UnsupportedModelError, match=switched):
        model.set_attn_implementation("chain")
    with pytest.raises(UnsupportedModelError, match=switched):
        enable_chain_attention(model)
    assert model.config.to_dict() == before
    assert not [module for module in model.modules() if module._forward_pre_hooks]
    with pytest.raises(UnsupportedModelError, match=built):
        kind._from_config(config(), attn_implementation="chain")


def test_the_tower_of_a_model_that_is_refused_can_still_be_asked_for():
    model = transformers.GitModel._from_config(git(), attn_implementation="eager")
    model.set_attn_implementation({"vision_config": "chain"})
    assert model.config.vision_config._attn_implementation == "chain"
    assert model.config._attn_implementation == "eager"


def test_a_part_that_no_model_runs_on_is_refused():
    """The settings of FLAVA's codebook stand in the config of FlavaModel, and nothing in that reads them."""
    parts = {f"{name}_config": SIZES | {"image_size": 16, "patch_size": 8} for name in ("text", "image", "multimodal")}
    model = transformers.FlavaModel._from_config(transformers.FlavaConfig(**parts), attn_implementation="eager")
    with pytest.raises(UnsupportedModelError, match="no transformers model inside that runs on it"):
        model.set_attn_implementation({"image_codebook_config": "chain"})
    assert model.config.image_codebook_config._attn_implementation != "chain"


def cohere_asr():
    """A decoder that runs on the config of the whole, beside an encoder with one of its own."""
    encoder = {**SIZES, "num_mel_bins": 16, "subsampling_conv_channels": 8, "max_position_embeddings": 64}
    sizes = {**SIZES, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64, "pad_token_id": 0}
    return transformers.CohereAsrConfig(**sizes, encoder_config=encoder | {"num_key_value_heads": 2})


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize(
    ("asked", "encoder"), [("chain", "sdpa"), ({"": "chain", "encoder_config": "chain"}, "chain")]
)
def test_beside_a_decoder_with_the_config_of_the_whole_a_part_is_asked_for_by_itself(late, asked, encoder, tmp_path):
    """Oracle: which implementation each has, now and after a reload."""
    kind, config = transformers.CohereAsrModel, cohere_asr()
    if isinstance(asked, dict):
        config.encoder_config.chain_attention = {"gamma": 0.4}
    model = kind._from_config(config, attn_implementation="sdpa" if late else asked)
    if late:
        model.set_attn_implementation(asked)
    model.save_pretrained(tmp_path)
    for each in (model, kind.from_pretrained(tmp_path)):
        assert each.config._attn_implementation == "chain"
        assert each.encoder.config._attn_implementation == encoder
        assert (each.encoder.config.chain_attention is not None) == (encoder == "chain")
    with pytest.raises(ValueError, match="ask for another encoder by part"):
        enable_chain_attention(model, encoder=True)


def t5gemma():
    softcap = {"attn_logit_softcapping": 0.5, "query_pre_attn_scalar": 1}
    side = {**SIZES, **softcap, "num_key_value_heads": 2, "head_dim": 8, "dropout_rate": 0.0}
    config = transformers.T5GemmaConfig(encoder=side, decoder=side, dropout_rate=0.0, vocab_size=101)
    return built(transformers.T5GemmaForConditionalGeneration, config).float()


def test_cross_attention_with_a_softcap_is_ordinary():
    """Oracle: the model's own eager attention, which gamma = 0 must equal; without the softcap it is another."""
    model = t5gemma()
    batch = {"input_ids": IDS, "decoder_input_ids": IDS[:, :7], "use_cache": False}
    with torch.no_grad():
        expected = model(**batch).logits
        zero = enable_chain_attention(model, gamma=0.0)(**batch).logits
        chained = enable_chain_attention(model, gamma=0.9)(**batch).logits
        for layer in model.model.decoder.layers:
            layer.cross_attn.attn_logit_softcapping = None
        assert (model(**batch).logits - chained).abs().max() > 1e-3
    torch.testing.assert_close(zero, expected, rtol=1e-4, atol=1e-4)
    assert (chained - expected).abs().max() > 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_mask_of_less_precision_than_the_queries_is_read_rightly(dtype):
    """Oracle: eager attention. With torch 2.13, sdpa reads such a mask wrongly on CPUs, from some length on."""
    ids = torch.randint(3, 100, (2, 64), generator=torch.Generator().manual_seed(0))
    model = built(transformers.LlamaForCausalLM, transformers.LlamaConfig(**SIZES, num_key_value_heads=2)).to(dtype)
    hidden = torch.rand(2, 1, 64, 64, generator=torch.Generator().manual_seed(1)) < 0.4
    hidden = (hidden | torch.ones(64, 64).triu(1).bool()) & ~torch.eye(64).bool()
    mask = torch.zeros(hidden.shape).masked_fill(hidden, -1e9)
    with torch.no_grad():
        expected = model(ids, attention_mask=mask, use_cache=False).logits
        zero = enable_chain_attention(model, gamma=0.0)(ids, attention_mask=mask, use_cache=False).logits
    torch.testing.assert_close(zero, expected, rtol=1e-4, atol=1e-4)


def test_a_forward_that_does_not_attend_is_refused(monkeypatch):
    """As exporters and kernels replace it: the outputs would be those of something else."""
    model = enable_chain_attention(built(transformers.LlamaForCausalLM, transformers.LlamaConfig(**SIZES)))
    attention = type(model.model.layers[0].self_attn)
    monkeypatch.setattr(attention, "forward", lambda self, hidden_states, **others: (hidden_states, None))
    with pytest.raises(UnsupportedModelError, match="did not call its attention function"):
        model(IDS, use_cache=False)
    disable_chain_attention(model)
    model(IDS, use_cache=False)


def test_the_number_of_logits_to_keep_is_no_matter_of_attention():
    """Some models hand it down to their attention modules. Oracle: the last logits of all."""
    model = enable_chain_attention(built(transformers.LlamaForCausalLM, transformers.LlamaConfig(**SIZES)))
    with torch.no_grad():
        states = model.model(IDS, use_cache=False, logits_to_keep=1).last_hidden_state
        assert torch.equal(states, model.model(IDS, use_cache=False).last_hidden_state)


def test_heads_that_a_module_does_not_tell_are_not_asked_for():
    """The tower of Florence-2 attends between channels too, in groups that are no heads."""
    sizes = {"embed_dim": [16, 32], "depths": [1, 1], "num_heads": [2, 2], "num_groups": [2, 2], "image_size": 32}
    stages = {"patch_size": [7, 3], "patch_stride": [4, 2], "patch_padding": [3, 1], "patch_prenorm": [False, True]}
    config = transformers.Florence2Config(vision_config=sizes | stages).vision_config
    model = Florence2VisionBackbone._from_config(config, attn_implementation="eager")
    enable_chain_attention(model, gamma=0.5)
    with pytest.raises(ValueError, match="per_head=True needs the number of heads"):
        enable_chain_attention(model, learnable=True, per_head=True)
