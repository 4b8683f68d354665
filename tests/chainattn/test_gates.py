"""Learnable gamma: where it begins, its precision, the way to disk and back, and what an optimizer makes of it."""

import copy

import pytest
import torch
import transformers
from torch.utils.data import Dataset
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from hf_chainattn import (
    ChainGate,
    chain_attention,
    disable_chain_attention,
    enable_chain_attention,
    gate_parameter_groups,
    integration,
)
from tests.helpers.tiny_models import LAYERS, tiny_batch, tiny_model

IDS = torch.arange(3, 15)[None]


def gates(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, ChainGate)}


class Text(Dataset):
    def __len__(self):
        return 16

    def __getitem__(self, index):
        ids = torch.randint(3, 101, (12,), generator=torch.Generator().manual_seed(index))
        return {"input_ids": ids, "labels": ids}


def arguments(folder, **others):
    settings = {"per_device_train_batch_size": 4, "learning_rate": 1e-2, "report_to": [], "use_cpu": True, "seed": 0}
    return TrainingArguments(str(folder), **settings | {"save_strategy": "no", "disable_tqdm": True} | others)


@pytest.mark.parametrize(("per_head", "size"), [(False, 1), (True, 4)])
@pytest.mark.parametrize("name", ["gpt2", "llama", "bert"])
def test_a_gate_begins_at_gamma(name, per_head, size):
    """Oracle: the same model with the fixed gamma."""
    batch = tiny_batch(name, dtype=torch.float32)
    fixed = enable_chain_attention(tiny_model(name, dtype=torch.float32), gamma=0.7)(**batch).logits
    model = enable_chain_attention(tiny_model(name, dtype=torch.float32), gamma=0.7, learnable=True, per_head=per_head)
    assert [gate.bias.shape for gate in gates(model).values()] == [(size,)] * LAYERS
    torch.testing.assert_close(model(**batch).logits, fixed, rtol=1e-4, atol=1e-5)


def test_each_layer_and_head_begins_where_it_is_told_to():
    model = enable_chain_attention(
        tiny_model("llama"), gamma=[0.5, [0.1, 0.2, 0.3, 0.4], 0.6, 0.7], layers=[0, 1, 3], learnable=True
    )
    found = {name.split(".")[2]: gate().tolist() for name, gate in gates(model).items()}
    assert found == {
        "0": pytest.approx([0.5]),
        "1": pytest.approx([0.1, 0.2, 0.3, 0.4]),
        "3": pytest.approx([0.7]),
    }


def test_gradients_of_gates_are_those_of_gamma():
    """Oracle: autograd through the operation with gamma given as a leaf."""
    seen = []

    def watched(*args, gamma, **kwargs):
        seen.append(gamma)
        gamma.retain_grad()
        return chain_attention(*args, gamma=gamma, **kwargs)

    model = enable_chain_attention(tiny_model("llama"), gamma=0.6, learnable=True, per_head=True).train()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(integration, "chain_attention", watched)
        model(**tiny_batch("llama"), use_cache=False).loss.backward()
    for gate, gamma in zip(gates(model).values(), seen, strict=True):
        assert gate.bias.grad.abs().min() > 0
        torch.testing.assert_close(gate.bias.grad, gamma.grad * 0.6 * 0.4)


def test_gates_are_saved_and_loaded_with_the_weights(tmp_path):
    """Oracle: the loading report of transformers, and equal outputs."""
    model = enable_chain_attention(tiny_model("llama", dtype=torch.float32), gamma=0.6, learnable=True)
    with torch.no_grad():
        for number, gate in enumerate(gates(model).values()):
            gate.bias.fill_(number - 1.5)
    model.save_pretrained(tmp_path)
    again, report = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert torch.equal(again(IDS).logits, model(IDS).logits)
    assert torch.equal(again.generate(IDS, max_new_tokens=4), model.generate(IDS, max_new_tokens=4, use_cache=False))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_base_checkpoint_gets_gates_at_the_configured_gamma(tmp_path, dtype):
    """Oracle: the number itself, in float32, and not whatever was in memory."""
    tiny_model("llama", dtype=torch.float32).save_pretrained(tmp_path)
    model, report = AutoModelForCausalLM.from_pretrained(
        tmp_path,
        attn_implementation="chain",
        chain_attention={"gamma": 0.8, "learnable": True},
        dtype=dtype,
        output_loading_info=True,
    )
    assert {key.rpartition(".chain_gate")[1] for key in report["missing_keys"]} == {".chain_gate"}
    assert model.dtype == dtype
    for gate in gates(model).values():
        assert gate.bias.dtype == torch.float32
        torch.testing.assert_close(gate(), torch.tensor([0.8]))
    assert model(IDS).logits.dtype == dtype


def test_a_gate_stays_float32_where_its_model_is_cast():
    model = enable_chain_attention(tiny_model("gpt2", dtype=torch.float32), gamma=0.61, learnable=True)
    before = [gate.bias.detach().clone() for gate in gates(model).values()]
    model.to(torch.bfloat16)
    assert {parameter.dtype for name, parameter in model.named_parameters() if "gate" not in name} == {torch.bfloat16}
    assert all(torch.equal(gate.bias, bias) for gate, bias in zip(gates(model).values(), before, strict=True))


def test_disabling_takes_the_gates_away():
    """Oracle: bit equality of all weights and outputs."""
    model = tiny_model("llama")
    weights, logits = copy.deepcopy(model.state_dict()), model(IDS).logits
    enable_chain_attention(model, learnable=True, per_head=True)
    assert len(gates(model)) == LAYERS
    disable_chain_attention(model)
    assert not gates(model)
    after = model.state_dict()
    assert list(after) == list(weights)
    assert all(torch.equal(after[name], weights[name]) for name in weights)
    assert torch.equal(model(IDS).logits, logits)


def test_cross_attention_and_encoders_have_no_gate():
    model = enable_chain_attention(tiny_model("bart"), learnable=True)
    assert list(gates(model)) == [f"model.decoder.layers.{layer}.self_attn.chain_gate" for layer in range(LAYERS)]


def test_trainer_trains_gates_without_decaying_them(tmp_path):
    model = enable_chain_attention(tiny_model("llama", dtype=torch.float32), gamma=0.5, learnable=True).train()
    trainer = Trainer(model, arguments(tmp_path, max_steps=3, weight_decay=0.5), train_dataset=Text())
    assert not [name for name in trainer.get_decay_parameter_names(model) if "chain_gate" in name]
    before = [gate().item() for gate in gates(model).values()]
    trainer.train()
    assert all(
        gate().item() != pytest.approx(old, abs=1e-5) for gate, old in zip(gates(model).values(), before, strict=True)
    )


def test_gates_have_a_learning_rate_of_their_own():
    model = enable_chain_attention(tiny_model("gpt2", dtype=torch.float32), learnable=True)
    groups = gate_parameter_groups(model, learning_rate=1e-3, gate_lr=1e-1, weight_decay=0.2)
    assert [(group["lr"], group["weight_decay"]) for group in groups] == [(1e-3, 0.2), (1e-3, 0.0), (1e-1, 0.0)]
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))
    assert {id(parameter) for parameter in groups[2]["params"]} == {id(gate.bias) for gate in gates(model).values()}
    with pytest.raises(ValueError, match="no gates"):
        gate_parameter_groups(tiny_model("gpt2"), learning_rate=1e-3, gate_lr=1e-1)


def test_training_with_gates_resumes_bit_by_bit(tmp_path):
    """Oracle: the same training without an interruption."""
    weights = []
    for interrupted in (False, True):
        folder = tmp_path / str(interrupted)
        model = enable_chain_attention(tiny_model("llama", dtype=torch.float32), gamma=0.5, learnable=True).train()
        settings = arguments(folder, max_steps=6, save_strategy="steps", save_steps=3)
        Trainer(model, settings, train_dataset=Text()).train()
        if interrupted:
            again = AutoModelForCausalLM.from_pretrained(folder / "checkpoint-3").train()
            Trainer(again, settings, train_dataset=Text()).train(resume_from_checkpoint=str(folder / "checkpoint-3"))
            model = again
        weights.append(model.state_dict())
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert any("chain_gate" in name for name in weights[0])


def test_a_tower_without_chain_has_no_gate():
    text = transformers.LlamaConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=64)
    vision = transformers.CLIPVisionConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=64, image_size=16, patch_size=8
    )
    config = transformers.LlavaConfig(text_config=text, vision_config=vision)
    config.chain_attention = {"gamma": 0.5, "learnable": True}
    model = transformers.LlavaModel._from_config(config, attn_implementation="chain", dtype=torch.bfloat16)
    assert list(gates(model)) == ["language_model.layers.0.self_attn.chain_gate"]
    assert gates(model)["language_model.layers.0.self_attn.chain_gate"].bias.dtype == torch.float32
