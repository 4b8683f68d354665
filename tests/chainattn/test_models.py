"""Chain attention inside real transformers models: equality, padding, refusals, and the way to disk and back."""

import copy
import importlib
import json
import pickle

import pytest
import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM

import hf_chainattn
from hf_chainattn import (
    UnsupportedModelError,
    chain_attention,
    disable_chain_attention,
    enable_chain_attention,
    integration,
)
from tests.helpers.tiny_models import LAYERS, tiny_batch, tiny_model

MODELS = ["gpt2", "llama", "bert", "vit"]
TEXT_MODELS = ["gpt2", "llama", "bert"]


def sharpened(name, *, dtype=torch.float64, **arguments):
    """The tiny model with larger attention weights: at its initialisation attention is nearly uniform."""
    model = tiny_model(name, dtype=dtype, **arguments)
    with torch.no_grad():
        for module in model.modules():
            if "Attention" in type(module).__name__:
                for parameter in module.parameters(recurse=True):
                    if parameter.ndim == 2:
                        parameter.mul_(3)
    return model


def chained(name, gamma, *, diagonal="kept", dtype=torch.float64):
    return enable_chain_attention(sharpened(name, dtype=dtype), gamma=gamma, diagonal=diagonal)


def logits_of(model, batch):
    with torch.no_grad():
        return model(**{key: value for key, value in batch.items() if key != "labels"}).logits


def real(batch, logits):
    """The logits at positions that are not padding."""
    return logits[batch["attention_mask"].bool()] if "attention_mask" in batch else logits


def inverse_oracle(gamma, diagonal):
    """An eager attention function in float64 that inverts the matrix, fed by transformers' own eager mask."""

    def forward(module, query, key, value, attention_mask, scaling=None, dropout=0.0, **kwargs):
        groups = query.shape[1] // key.shape[1]
        key, value = (tensor.repeat_interleave(groups, dim=1).double() for tensor in (key, value))
        scores = query.double() @ key.mT * (query.shape[-1] ** -0.5 if scaling is None else scaling)
        if attention_mask is None:
            hidden = torch.zeros_like(scores, dtype=torch.bool)
        else:
            hidden = attention_mask.expand_as(scores) < -1e30
        weights = scores.exp() * ~hidden
        attention = weights / weights.sum(-1, keepdim=True).clamp_min(1e-300)
        inside = attention * (1 - torch.eye(scores.shape[-1])) if diagonal == "removed" else attention
        inverse = torch.linalg.inv(torch.eye(scores.shape[-1], dtype=torch.float64) - gamma * inside)
        output = (1 - gamma) * attention @ inverse @ value
        return output.to(query.dtype).transpose(1, 2).contiguous(), None

    return forward


@pytest.fixture
def count_dispatches(monkeypatch):
    calls = []

    def counting(query, *args, **kwargs):
        calls.append(query.shape)
        return chain_attention(query, *args, **kwargs)

    monkeypatch.setattr(integration, "chain_attention", counting)
    return calls


@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
@pytest.mark.parametrize("name", MODELS)
def test_gamma_zero_equals_sdpa(name, dtype, tolerance, padding):
    """Oracle: the same weights with attn_implementation="sdpa"."""
    batch = tiny_batch(name, dtype=dtype, padding=padding)
    expected = logits_of(sharpened(name, dtype=dtype, attn_implementation="sdpa"), batch)
    actual = logits_of(chained(name, 0.0, dtype=dtype), batch)
    assert (real(batch, actual) - real(batch, expected)).abs().max() <= tolerance


@pytest.mark.parametrize("diagonal", ["kept", "removed"])
@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("name", MODELS)
def test_gamma_of_nine_tenths_equals_a_matrix_inverse_in_the_eager_path(
    name, padding, diagonal, monkeypatch, count_dispatches
):
    """Oracle: the matrix inverse, patched into the model's own eager function; sdpa is the negative control."""
    batch = tiny_batch(name, padding=padding)
    model = chained(name, 0.9, diagonal=diagonal)
    actual = real(batch, logits_of(model, batch))
    assert len(count_dispatches) == LAYERS
    module = importlib.import_module(f"transformers.models.{name}.modeling_{name}")
    monkeypatch.setattr(module, "eager_attention_forward", inverse_oracle(0.9, diagonal))
    expected = real(batch, logits_of(sharpened(name, attn_implementation="eager"), batch))
    assert (actual - expected).abs().max() <= 1e-10
    ordinary = real(batch, logits_of(sharpened(name, attn_implementation="sdpa"), batch))
    assert (actual - ordinary).abs().max() > 1e-3


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("name", TEXT_MODELS)
def test_padding_cannot_leak(name, padding, dtype):
    """Oracle: bit equality when only what stands in the padding changes."""
    batch = tiny_batch(name, padding=padding)
    model = chained(name, 0.9, dtype=dtype)
    padded = batch["attention_mask"] == 0
    other = batch | {"input_ids": torch.where(padded, (batch["input_ids"] + 17) % 101, batch["input_ids"])}
    assert torch.equal(real(batch, logits_of(model, batch)), real(batch, logits_of(model, other)))
    # negative control: without the mask the change is felt, by causal models where the padding comes first
    for each in (batch, other):
        del each["attention_mask"]
    felt = not torch.equal(logits_of(model, batch)[~padded], logits_of(model, other)[~padded])
    assert felt == (name == "bert" or padding == "left")


@pytest.mark.parametrize("name", MODELS)
def test_training_gradients_reach_every_parameter(name):
    model = chained(name, 0.9).train()
    model(**tiny_batch(name)).loss.backward()
    missing = [key for key, p in model.named_parameters() if p.grad is None or not torch.isfinite(p.grad).all()]
    unused = {"vit.pooler", "bert.pooler"}
    assert not [key for key in missing if key.rsplit(".dense", 1)[0] not in unused]


def test_gradient_checkpointing_changes_nothing():
    """Oracle: the gradients without checkpointing."""
    gradients = []
    for checkpointing in (False, True):
        model = chained("llama", 0.9).train()
        if checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": False})
        model(**tiny_batch("llama")).loss.backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    for plain, checkpointed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, checkpointed, rtol=0, atol=1e-14)


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_generation_without_cache_is_greedy_search(name):
    """Oracle: an argmax loop over whole-sequence forwards."""
    model = chained(name, 0.9)
    prompt = tiny_batch(name)["input_ids"][:1]
    generated = model.generate(prompt, max_new_tokens=5, do_sample=False, use_cache=False, eos_token_id=None)
    expected = prompt
    for _ in range(5):
        expected = torch.cat([expected, logits_of(model, {"input_ids": expected})[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(generated, expected)


def test_models_that_cannot_chain_are_refused_and_left_alone():
    reason = "never calls the attention interface"
    with pytest.raises(UnsupportedModelError, match=reason):
        tiny_model("bloom", attn_implementation="chain")
    model = tiny_model("bloom")
    before = model.config.to_dict(), model.config._attn_implementation
    with pytest.raises(UnsupportedModelError, match=reason):
        enable_chain_attention(model)
    with pytest.raises(UnsupportedModelError, match=reason):
        model.set_attn_implementation("chain")
    assert (model.config.to_dict(), model.config._attn_implementation) == before
    assert not [module for module in model.modules() if module._forward_pre_hooks or module._forward_hooks]


def test_a_model_that_reads_the_mask_elsewhere_is_refused():
    config = transformers.NllbMoeConfig(
        d_model=32, encoder_layers=1, decoder_layers=1, encoder_ffn_dim=32, decoder_ffn_dim=32, vocab_size=11
    )
    with pytest.raises(UnsupportedModelError, match="outside of its attention"):
        transformers.NllbMoeModel._from_config(config, attn_implementation="chain")


def bert_decoder(**settings):
    return transformers.BertConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        vocab_size=11,
        is_decoder=True,
        **settings,
    )


def test_states_that_a_module_does_not_read_do_not_make_it_cross_attention():
    """BERT's self-attention hands on what its cross-attention would read: refused, not taken for ordinary."""
    model = enable_chain_attention(transformers.BertModel(bert_decoder()))
    states = torch.zeros(1, 3, 32)
    with pytest.raises(UnsupportedModelError, match=r"hands \['encoder_hidden_states'\]"):
        model.encoder.layer[0].attention.self(states, encoder_hidden_states=states)


def test_cross_attention_is_ordinary_even_where_lengths_agree(count_dispatches):
    """Oracle: the number of chains, and that what is crossed to can be longer, shorter and of any order."""
    model = transformers.BertLMHeadModel._from_config(
        bert_decoder(add_cross_attention=True), attn_implementation="chain"
    ).eval()
    ids, states = torch.arange(6).expand(2, -1), torch.randn(2, 6, 32)
    with torch.no_grad():
        first = model(ids, encoder_hidden_states=states, use_cache=False).logits
        turned = model(ids, encoder_hidden_states=states.flip(1), use_cache=False).logits
        doubled = model(ids, encoder_hidden_states=states.repeat(1, 2, 1), use_cache=False).logits
    # a softmax over all states asks for no order, and for no more than their shares
    torch.testing.assert_close(turned, first)
    torch.testing.assert_close(doubled, first)
    assert len(count_dispatches) == 3 * 2


def llava():
    text = transformers.LlamaConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=64)
    vision = transformers.CLIPVisionConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=64, image_size=16, patch_size=8
    )
    return transformers.LlavaConfig(text_config=text, vision_config=vision)


REQUESTS = {
    "the whole": "chain",
    "the whole in a dict": {"": "chain", "text_config": "chain", "vision_config": "sdpa"},
    "the part": {"text_config": "chain"},
}


@pytest.mark.parametrize("request_", list(REQUESTS))
@pytest.mark.parametrize("late", [False, True])
def test_of_a_model_made_of_several_the_text_decoder_becomes_a_chain(request_, late, tmp_path):
    """Oracle: which implementation each part has, now and after a reload, and where the settings are."""
    config, asked = llava(), REQUESTS[request_]
    if request_ == "the part":
        config.text_config.chain_attention = {"gamma": 0.7}
    else:
        config.chain_attention = {"gamma": 0.7}
    if late:
        model = transformers.LlavaModel._from_config(config, attn_implementation="sdpa")
        model.set_attn_implementation(asked)
    else:
        model = transformers.LlavaModel._from_config(config, attn_implementation=asked)
    model.save_pretrained(tmp_path)
    for each in (model, transformers.LlavaModel.from_pretrained(tmp_path)):
        assert each.language_model.config._attn_implementation == "chain"
        assert each.language_model.config.chain_attention == {"gamma": 0.7, "diagonal": "kept"}
        assert each.vision_tower.config._attn_implementation == "sdpa"
        assert each.vision_tower.config.chain_attention is None
        assert each.config._attn_implementation == "sdpa"
    changed = transformers.LlavaModel.from_pretrained(tmp_path, chain_attention={"gamma": 0.2})
    assert changed.language_model.config.chain_attention == {"gamma": 0.2, "diagonal": "kept"}


def test_a_tower_becomes_a_chain_where_it_is_asked_to():
    model = transformers.LlavaModel._from_config(
        llava(), attn_implementation={"text_config": "sdpa", "vision_config": "chain"}
    )
    assert model.vision_tower.config.chain_attention == {"gamma": 0.9, "diagonal": "kept"}
    assert model.language_model.config._attn_implementation == "sdpa"


def test_a_failing_switch_restores_every_part():
    model = transformers.LlavaModel._from_config(llava(), attn_implementation="sdpa")
    model.language_model.config.chain_attention = {"gamma": 2.0}
    with pytest.raises(ValueError, match="gamma must be in"):
        model.set_attn_implementation({"": "chain", "vision_config": "chain"})
    assert model.config._attn_implementation == "sdpa"
    assert model.language_model.config._attn_implementation == "sdpa"
    assert model.vision_tower.config._attn_implementation == "sdpa"
    assert not [module for module in model.modules() if module._forward_pre_hooks or module._forward_hooks]


def test_the_encoder_of_an_encoder_decoder_is_ordinary_unless_asked(count_dispatches):
    """Oracle: how many chains there are."""
    batch = {"input_ids": torch.arange(5, 15)[None], "decoder_input_ids": torch.arange(5, 9)[None]}
    for encoder, chains in ((False, LAYERS), (True, 2 * LAYERS)):
        model = enable_chain_attention(tiny_model("bart"), encoder=encoder)
        count_dispatches.clear()
        model(**batch, use_cache=False)
        assert len(count_dispatches) == chains


@pytest.mark.parametrize(
    ("settings", "gammas"),
    [
        ({"gamma": [0.1, 0.2, 0.3, 0.4]}, [0.1, 0.2, 0.3, 0.4]),
        ({"gamma": 0.5, "layers": [1, 3]}, [0.0, 0.5, 0.0, 0.5]),
        ({"gamma": [0.5, [0.1, 0.2, 0.3, 0.4], 0.6, 0.7]}, [0.5, [0.1, 0.2, 0.3, 0.4], 0.6, 0.7]),
    ],
)
def test_gamma_can_differ_between_layers_and_heads(settings, gammas, monkeypatch, tmp_path):
    """Oracle: what the operation is called with; 0 is left to sdpa. The settings survive a reload."""
    seen = []

    def watched(*args, gamma, **kwargs):
        seen.append(gamma.tolist() if isinstance(gamma, torch.Tensor) else gamma)
        return chain_attention(*args, gamma=gamma, **kwargs)

    monkeypatch.setattr(integration, "chain_attention", watched)
    model = enable_chain_attention(tiny_model("llama"), **settings)
    model.save_pretrained(tmp_path)
    for each in (model, AutoModelForCausalLM.from_pretrained(tmp_path)):
        seen.clear()
        each(torch.arange(5)[None], use_cache=False)
        assert seen == [gamma for gamma in gammas if gamma != 0.0]


def test_a_list_of_gammas_has_an_entry_for_every_layer():
    model = tiny_model("llama")
    with pytest.raises(ValueError, match="entry for each of 4 layers, got 3"):
        enable_chain_attention(model, gamma=[0.5, 0.5, 0.5])
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("value", [{"gamma": 1.0}, {"gamma": -1}, {"gama": 0.5}, {"diagonal": "none"}])
def test_bad_settings_fail_at_construction(value):
    config = transformers.GPT2Config(n_layer=1, n_head=2, n_embd=8, vocab_size=11)
    config.chain_attention = value
    with pytest.raises(ValueError, match=r"gamma must be in|unknown \['gama'\]|diagonal must be"):
        AutoModelForCausalLM.from_config(config, attn_implementation="chain")


def test_a_config_that_is_no_dict_is_named():
    config = transformers.GPT2Config(n_layer=1, n_head=2, n_embd=8, vocab_size=11)
    config.chain_attention = 0.9
    with pytest.raises(TypeError, match="must be a dict"):
        AutoModelForCausalLM.from_config(config, attn_implementation="chain")


@pytest.mark.parametrize("name", MODELS)
def test_a_saved_model_reloads_as_chain_with_its_settings(name, tmp_path):
    """Oracle: bit equality of the outputs before and after."""
    model = chained(name, 0.7, diagonal="removed")
    model.save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text())
    assert stored["attn_implementation"] == "chain"
    assert stored["chain_attention"] == {"gamma": 0.7, "diagonal": "removed"}
    reloaded = type(model).from_pretrained(tmp_path, dtype=torch.float64).eval()
    assert reloaded.config._attn_implementation == "chain"
    batch = tiny_batch(name)
    assert torch.equal(logits_of(reloaded, batch), logits_of(model, batch))
    reloaded.save_pretrained(tmp_path / "again")
    assert json.loads((tmp_path / "again" / "config.json").read_text()) == stored


def test_settings_travel_through_from_pretrained(tmp_path):
    tiny_model("gpt2").save_pretrained(tmp_path)
    settings = {"gamma": 0.5, "diagonal": "removed"}
    model = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="chain", chain_attention=settings)
    assert model.config.chain_attention == settings
    assert AutoConfig.from_pretrained(tmp_path, chain_attention=settings).chain_attention == settings


def test_without_the_package_a_chain_checkpoint_fails_by_name(tmp_path):
    chained("gpt2", 0.9).save_pretrained(tmp_path)
    hf_chainattn.unregister()
    try:
        with pytest.raises(ValueError, match="chain"):
            AutoModelForCausalLM.from_pretrained(tmp_path)
    finally:
        hf_chainattn.register()


@pytest.mark.parametrize("name", MODELS)
def test_disabling_leaves_the_model_as_it_was(name):
    """Oracle: a model that never had chain attention; outputs, config and hooks."""
    never = sharpened(name, attn_implementation="sdpa")
    model = disable_chain_attention(chained(name, 0.9))
    batch = tiny_batch(name)
    assert torch.equal(logits_of(model, batch), logits_of(never, batch))
    assert model.config.to_dict() == never.config.to_dict()
    assert not [module for module in model.modules() if module._forward_pre_hooks]
    assert not [module for module in model.modules() if module._forward_pre_hooks_with_kwargs]


def test_copies_and_pickles_keep_chain_attention():
    model = chained("llama", 0.9)
    batch = tiny_batch("llama")
    for clone in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(logits_of(clone, batch), logits_of(model, batch))
        disable_chain_attention(clone)
        assert not [module for module in clone.modules() if module._forward_pre_hooks]
    assert torch.equal(logits_of(model, batch), logits_of(chained("llama", 0.9), batch))


def test_a_model_switched_behind_our_back_is_refused():
    model = tiny_model("gpt2")
    model.config._attn_implementation = "chain"
    with pytest.raises(UnsupportedModelError, match="enable_chain_attention"):
        logits_of(model, tiny_batch("gpt2"))


def test_a_part_switched_by_itself_reloads_as_chain(tmp_path):
    """Oracle: bit equality of the part's outputs; the whole is saved without knowing of the switch."""
    model = transformers.LlavaModel._from_config(llava(), attn_implementation="sdpa")
    enable_chain_attention(model.language_model, gamma=0.3)
    model.save_pretrained(tmp_path)
    reloaded = transformers.LlavaModel.from_pretrained(tmp_path)
    assert reloaded.language_model.config.chain_attention == {"gamma": 0.3, "diagonal": "kept"}
    assert reloaded.language_model.config._attn_implementation == "chain"
    assert reloaded.vision_tower.config._attn_implementation == "sdpa"
    ids = torch.arange(3, 12)[None]
    assert torch.equal(
        reloaded.language_model.eval()(ids, use_cache=False)[0], model.language_model.eval()(ids, use_cache=False)[0]
    )


def test_parts_that_do_not_exist_are_named():
    model = tiny_model("llama")
    with pytest.raises(UnsupportedModelError, match=r"got \['text_confg'\]"):
        model.set_attn_implementation({"text_confg": "chain"})


def test_switching_back_and_forth_keeps_the_settings():
    model = chained("llama", 0.5, diagonal="removed")
    model.set_attn_implementation("sdpa")
    model.set_attn_implementation("chain")
    assert model.config.chain_attention == {"gamma": 0.5, "diagonal": "removed"}


def test_what_is_saved_is_what_is_used(tmp_path):
    """A model switched past the setter must not come back as something else."""
    model = chained("llama", 0.5)
    model.config._attn_implementation = "sdpa"
    model.save_pretrained(tmp_path)
    assert "attn_implementation" not in json.loads((tmp_path / "config.json").read_text())


def test_two_models_that_share_a_config_are_not_switched_together():
    config = tiny_model("llama").config
    first, second = transformers.LlamaForCausalLM(config), transformers.LlamaForCausalLM(config)
    enable_chain_attention(first)
    ids = torch.arange(3, 9)[None]
    first(ids, use_cache=False)
    with pytest.raises(UnsupportedModelError, match="was not prepared"):
        second(ids, use_cache=False)


def test_something_that_is_no_model_is_named():
    with pytest.raises(TypeError, match="must be a transformers PreTrainedModel, got Linear"):
        enable_chain_attention(torch.nn.Linear(2, 2))


def test_disabling_works_after_the_package_is_unregistered():
    model = chained("gpt2", 0.9)
    hf_chainattn.unregister()
    try:
        disable_chain_attention(model)
    finally:
        hf_chainattn.register()
    assert not [module for module in model.modules() if module._forward_pre_hooks]
    assert "chain_attention" not in model.config.to_dict()


def test_a_model_with_settings_says_nothing_and_one_without_says_so(monkeypatch):
    said = []
    monkeypatch.setattr("hf_chainattn.models.logger.warning_once", said.append)
    chained("gpt2", 0.9)
    assert said == []
    tiny_model("gpt2", attn_implementation="chain")
    assert all("has no `chain_attention` entry in its config and takes gamma=0.9" in message for message in said)
    assert said
