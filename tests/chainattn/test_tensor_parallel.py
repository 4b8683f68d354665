"""Tensor parallelism is refused, here where one process plays two; test_distributed.py has two."""

import pytest
import torch
import transformers
from transformers import DistributedConfig

from hf_chainattn import UnsupportedModelError, enable_chain_attention
from tests.chainattn.test_models import llava
from tests.helpers.adapters import IDS
from tests.helpers.decoders import decoder

REFUSED = r"divided over .* by tensor parallelism, .*: load it without tp_plan"


def of_two(config):
    """The config as ``from_pretrained`` hands it to the model that it builds."""
    config.distributed_config = DistributedConfig(tp_size=2)
    return config


def test_a_model_that_will_be_divided_is_refused_before_it_is_loaded():
    """Ordinary attention is not, and neither is a plan for one process."""
    ordinary = transformers.LlamaConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=4)
    transformers.LlamaModel._from_config(of_two(ordinary), attn_implementation="sdpa")
    for config, model_class in ((ordinary, transformers.LlamaModel), (llava(), transformers.LlavaModel)):
        with pytest.raises(UnsupportedModelError, match=REFUSED):
            model_class._from_config(of_two(config), attn_implementation="chain")
        config.distributed_config = DistributedConfig(tp_plan="auto")
        assert config.distributed_config.tp_size == 1
        model_class._from_config(config, attn_implementation="chain")


def test_a_model_that_has_been_divided_is_refused_and_left_alone():
    model = decoder("llama", "ordinary")
    before = model.config.to_dict()
    model._tp_size = 2
    for switch in (enable_chain_attention, lambda model: model.set_attn_implementation({"": "chain"})):
        with pytest.raises(UnsupportedModelError, match=REFUSED):
            switch(model)
    assert model.config.to_dict() == before
    assert model.config._attn_implementation == "sdpa"
    assert not [module for module in model.modules() if module._forward_pre_hooks]


@pytest.mark.parametrize("use_cache", [False, True])
def test_a_layer_with_some_of_its_heads_is_refused_when_it_is_called(use_cache):
    """Half of the projections, as a process of two would have them: each head would be right, the rest would not."""
    model = decoder("llama", "chain")
    attention = model.model.layers[1].self_attn
    for name in ("q_proj", "k_proj", "v_proj"):
        weight = getattr(attention, name).weight
        weight.data = weight.data[: len(weight) // 2]
    attention.o_proj.weight.data = attention.o_proj.weight.data[:, :16]
    with pytest.raises(UnsupportedModelError, match="with 2 of 4 heads here"), torch.no_grad():
        model(IDS, use_cache=use_cache)
    model.set_attn_implementation("sdpa")
    assert model(IDS, use_cache=use_cache).logits.isfinite().all()
