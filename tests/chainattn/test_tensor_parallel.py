"""Tensor parallelism is refused: before a model is loaded, once it is divided, and where something else divides it."""

import pytest
import torch
import transformers
from torch import distributed
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from transformers import AutoModelForCausalLM, DistributedConfig

from hf_chainattn import UnsupportedModelError, enable_chain_attention
from tests.chainattn.test_models import llava
from tests.helpers.adapters import IDS
from tests.helpers.decoders import decoder
from tests.helpers.two_processes import in_two_processes

REFUSED = r"divided over .* by tensor parallelism, .*: load it without tp_plan"
CHAIN = {"attn_implementation": "chain", "chain_attention": {"gamma": 0.8}}


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


def attempt(action):
    """What an action raised: the name of the class and the message."""
    try:
        action()
    except Exception as error:
        return type(error).__name__, str(error)
    return "nothing", ""


def work(rank, folder, checkpoint):
    """Real tensor parallelism: of transformers, by either argument, and of PyTorch itself."""
    ids = IDS[:, :8]
    plan = {"distributed_config": DistributedConfig(tp_size=2)}

    def load(**arguments):
        return AutoModelForCausalLM.from_pretrained(checkpoint, **arguments)

    errors = [attempt(lambda: load(**CHAIN, **plan)), attempt(lambda: load(**CHAIN, tp_size=2))]
    with torch.no_grad():
        whole, divided = load()(ids).logits, load(**plan)
        assert divided._tp_size == 2
        # the plan is carried out: the weights are divided, and ordinary attention is right with them
        torch.testing.assert_close(divided(ids).logits, whole, rtol=1e-4, atol=1e-3)
        errors.append(attempt(lambda: enable_chain_attention(divided)))
        chain = load(**CHAIN)
        mesh = distributed.device_mesh.init_device_mesh("cpu", (2,))
        for layer in chain.model.layers:
            styles = {name: ColwiseParallel() for name in ("q_proj", "k_proj", "v_proj")}
            parallelize_module(layer.self_attn, mesh, styles | {"o_proj": RowwiseParallel()})
        errors.append(attempt(lambda: chain(ids)))
        chain.set_attn_implementation("sdpa")
        torch.testing.assert_close(chain(ids).logits, whole, rtol=1e-4, atol=1e-3)
    return errors


def test_real_tensor_parallelism_is_refused_in_every_process(checkpoint, tmp_path):
    """Control: the same divided model runs with ordinary attention."""
    for errors in in_two_processes(tmp_path, work, checkpoint):
        assert [name for name, _ in errors] == ["UnsupportedModelError"] * 4
        assert all("by tensor parallelism" in message for _, message in errors)
        assert "with 2 of 4 heads here" in errors[-1][1]
