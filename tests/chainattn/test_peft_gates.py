"""Learnable gammas and PEFT: frozen aloud, or trained as copies of their gates that are saved with the adapter."""

import copy

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, Trainer

from hf_chainattn import AdapterError, ChainGate, adapters, enable_chain_attention, gate_parameter_groups
from tests.chainattn.test_gates import arguments
from tests.helpers.adapters import IDS, LORA, ROUTES, Base, logits
from tests.helpers.decoders import VOCAB, decoder

SETTINGS = {"gamma": 0.8, "learnable": True, "per_head": True}
WITH_GATES = LORA | {"modules_to_save": ["chain_gate"]}


def chained(**others):
    return enable_chain_attention(decoder("llama", "ordinary"), **SETTINGS | others)


def moved(model):
    """Give the gates that are trained other values, each its own."""
    torch.manual_seed(2)
    with torch.no_grad():
        for gate in trained_gates(model):
            gate.bias.add_(torch.randn_like(gate.bias))
    return model


def trained_gates(model):
    return [module for module in model.modules() if isinstance(module, ChainGate) and module.bias.requires_grad]


@pytest.fixture
def said(monkeypatch):
    messages = []
    monkeypatch.setattr(adapters.logger, "warning", messages.append)
    return messages


@pytest.mark.parametrize("library", ["peft", "transformers"])
def test_gates_that_an_adapter_freezes_are_named_aloud(library, said):
    """A model without gates, one whose gates are trained, and one that is only used say nothing."""

    def adapt(model, **config):
        get_peft_model(model, LoraConfig(**config)) if library == "peft" else model.add_adapter(LoraConfig(**config))

    adapt(chained(learnable=False, per_head=False), **LORA)
    adapt(chained(), **WITH_GATES)
    adapt(chained(), **LORA, bias="all")
    adapt(chained(), **LORA, inference_mode=True)
    assert said == []
    adapt(chained(), **LORA)
    assert len(said) == 1
    assert "gamma stays what it is" in said[0]
    assert "modules_to_save=['chain_gate']" in said[0]


@pytest.mark.parametrize("config", [WITH_GATES, LORA | {"bias": "all"}])
def test_gradients_of_gates_are_those_without_peft(config):
    """Oracle: the same model without an adapter; a new one changes nothing."""
    batch = {"input_ids": IDS, "labels": IDS, "use_cache": False}
    plain = chained()
    plain(**batch).loss.backward()
    model = get_peft_model(chained(), LoraConfig(**config))
    model(**batch).loss.backward()
    expected, found = ([gate.bias.grad for gate in trained_gates(each)] for each in (plain, model))
    assert len(found) == 3
    assert all(grad.abs().max() > 0 for grad in found)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("route", list(ROUTES))
def test_gates_are_trained_and_saved_with_their_adapter(route, checkpoint, tmp_path):
    """Oracle: bit equality of logits and gates after a reload, in one model from a checkpoint without gates."""
    base = Base(checkpoint, SETTINGS)
    model = get_peft_model(base(), LoraConfig(**WITH_GATES))
    texts = [{"input_ids": row, "labels": row} for row in torch.randint(3, VOCAB, (8, 12))]
    settings = arguments(tmp_path, max_steps=3, save_strategy="steps", save_steps=3, learning_rate=0.1)
    Trainer(model, settings, train_dataset=texts).train()
    learned = [gate() for gate in trained_gates(model)]
    assert all((gamma - 0.8).abs().max() > 1e-3 for gamma in learned)
    again = ROUTES[route](base, tmp_path / "checkpoint-3")
    assert torch.equal(logits(again), logits(model))


def test_gates_of_an_adapter_of_transformers_itself_are_saved(checkpoint, tmp_path):
    """Oracle: bit equality after a reload by either library."""
    base = Base(checkpoint, SETTINGS)
    model = base()
    model.add_adapter(LoraConfig(**WITH_GATES))
    moved(model).save_pretrained(tmp_path)
    for route in ("PeftModel.from_pretrained", "transformers' load_adapter"):
        assert torch.equal(logits(ROUTES[route](base, tmp_path)), logits(model))
    assert not torch.equal(logits(base()), logits(model))


def test_gates_that_are_trained_by_hand_are_not_lost(tmp_path):
    """Saved they would begin again at the gamma of the settings, so that saving is refused, by both libraries."""
    model = get_peft_model(chained(), LoraConfig(**LORA))
    native = chained()
    native.add_adapter(LoraConfig(**LORA))
    for each in (model, native):
        for module in each.modules():
            if isinstance(module, ChainGate):
                module.requires_grad_(True)
        with pytest.raises(AdapterError, match=r"the adapter 'default' does not save them: .*'chain_gate'"):
            each.save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())


def test_gates_are_saved_with_all_biases(checkpoint, tmp_path):
    """Oracle: bit equality after a reload."""
    base = Base(checkpoint, SETTINGS)
    model = moved(get_peft_model(base(), LoraConfig(**LORA, bias="all")))
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(base(), tmp_path)), logits(model))
    assert not torch.equal(logits(base()), logits(model))


@pytest.mark.parametrize(
    "route", ["PeftModel.from_pretrained", "transformers' load_adapter", "transformers' AutoModel"]
)
def test_copies_of_gates_stay_float32_in_a_bfloat16_model(route, checkpoint, tmp_path):
    """Oracle: the values, which bfloat16 would round."""
    base = Base(checkpoint, SETTINGS, dtype=torch.bfloat16)
    model = moved(get_peft_model(base(), LoraConfig(**WITH_GATES)))
    model.save_pretrained(tmp_path)
    values = [gate.bias.detach() for gate in trained_gates(model)]
    again = ROUTES[route](base, tmp_path)
    found = [
        module.chain_gate.modules_to_save["default"].bias for module in again.modules() if hasattr(module, "q_proj")
    ]
    assert all(torch.equal(one, other) for one, other in zip(found, values, strict=True))
    assert {bias.dtype for bias in found} == {torch.float32}


def test_each_adapter_has_its_own_gates(checkpoint, tmp_path):
    """Oracle: the logits of each by itself, and of the base where adapters are off."""
    base = Base(checkpoint, SETTINGS)
    expected = []
    for name in ("one", "two"):
        torch.manual_seed(len(expected))
        model = get_peft_model(base(), LoraConfig(**WITH_GATES | {"init_lora_weights": False}))
        with torch.no_grad():
            for gate in trained_gates(model):
                gate.bias.fill_(len(expected) + 0.5)
        model.save_pretrained(tmp_path / name)
        expected.append(logits(model))
    model = PeftModel.from_pretrained(base(), tmp_path / "one", "one")
    model.load_adapter(tmp_path / "two", "two")
    for name, before in zip(("one", "two"), expected, strict=True):
        model.set_adapter(name)
        assert torch.equal(logits(model), before)
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(base()))


def test_a_switch_to_sdpa_and_back_keeps_what_the_copies_learned():
    model = moved(get_peft_model(chained(), LoraConfig(**WITH_GATES)))
    before = logits(model)
    model.get_base_model().set_attn_implementation("sdpa")
    assert (logits(model) - before).abs().max() > 1e-2
    model.get_base_model().set_attn_implementation("chain")
    assert torch.equal(logits(model), before)
    clone = copy.deepcopy(model)
    assert torch.equal(logits(clone), before)


def test_merging_takes_over_what_the_copies_learned(tmp_path):
    """Oracle: bit equality of the gates, before and after a reload."""
    model = moved(get_peft_model(chained(), LoraConfig(**WITH_GATES)))
    learned = [gate.bias for gate in trained_gates(model)]
    merged = model.merge_and_unload()
    merged.save_pretrained(tmp_path)
    for each in (merged, AutoModelForCausalLM.from_pretrained(tmp_path)):
        gates = [module for module in each.modules() if isinstance(module, ChainGate)]
        assert all(torch.equal(gate.bias, bias) for gate, bias in zip(gates, learned, strict=True))
        assert [name for name, _ in each.named_modules() if name.endswith("modules_to_save")] == []


def test_a_learning_rate_of_their_own_goes_to_the_copies():
    model = get_peft_model(chained(), LoraConfig(**WITH_GATES))
    groups = gate_parameter_groups(model, learning_rate=1e-3, gate_lr=1e-1)
    assert [group["lr"] for group in groups] == [1e-3, 1e-1]
    assert [id(parameter) for parameter in groups[1]["params"]] == [id(gate.bias) for gate in trained_gates(model)]
    with pytest.raises(ValueError, match=r"no gates that are trained: .*modules_to_save=\['chain_gate'\]"):
        gate_parameter_groups(get_peft_model(chained(), LoraConfig(**LORA)), learning_rate=1e-3, gate_lr=1e-1)
