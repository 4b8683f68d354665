"""Attaching changes the forward of each block and nothing else, and detaching gives back the model that was."""

import copy
import io
import logging

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module

from hf_highwaybp import AttachError, HighwayBP, highway
from tests.helpers.tiny_models import tiny_batch, tiny_model
from tests.highwaybp.toys import gradients, inputs, largest_error, toy


def snapshot(model):
    """Everything that a user could see change: instance dicts by identity, weights and buffers by value."""
    slots = [dict(module.__dict__) for module in model.modules()]
    return slots, {name: value.clone() for name, value in model.state_dict().items()}


def unchanged(model, before):
    slots, state = before
    for module, old in zip(model.modules(), slots, strict=True):
        assert module.__dict__.keys() == old.keys()
        assert all(module.__dict__[key] is value for key, value in old.items())
    return all(torch.equal(value, model.state_dict()[name]) for name, value in state.items())


@pytest.mark.parametrize("name", ["gpt2", "llama", "bert", "vit"])
def test_the_model_is_bit_identical_after_detach(name):
    """Oracle: the instance dict of every module, all weights, and the logits before."""
    model, batch = tiny_model(name), tiny_batch(name)
    before, logits = snapshot(model), model(**batch).logits
    with HighwayBP(model, k=1) as hbp:
        assert all("forward" in block.__dict__ for block in hbp.stack.blocks)
        model.train()
        torch.autograd.grad(model(**batch).loss, next(model.parameters()), allow_unused=True)
        model.eval()
        assert torch.equal(logits, model(**batch).logits)
    assert all("forward" not in block.__dict__ for block in hbp.stack.blocks)
    assert unchanged(model, before)
    assert torch.equal(logits, model(**batch).logits)


def test_an_exception_inside_the_context_detaches():
    model = toy()
    before = snapshot(model)
    with pytest.raises(KeyError), HighwayBP(model, k=1):
        raise KeyError("user")
    assert unchanged(model, before)


def test_an_exception_inside_a_block_detaches_and_leaves_the_model_usable():
    """Oracle: autograd after the exception."""
    model, x = toy(), inputs()
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"), HighwayBP(model, k=3):
        model.layers[0](torch.ones(2, 5, dtype=torch.float64))
    expected = gradients(model, lambda: model(x))
    with HighwayBP(model, k=3):
        assert largest_error(expected, gradients(model, lambda: model(x))) < 1e-12


def test_attach_and_detach_may_be_called_twice():
    model = toy()
    before = snapshot(model)
    hbp = HighwayBP(model, k=1)
    assert hbp.attach() is hbp
    forward = model.layers[0].forward
    hbp.attach()
    assert model.layers[0].forward is forward
    assert hbp.attached
    hbp.detach()
    hbp.detach()
    assert not hbp.attached
    assert unchanged(model, before)


def test_two_engines_on_one_stack_are_refused_and_the_first_stays():
    model, x = toy(), inputs()
    with HighwayBP(model, k=1) as first:
        with pytest.raises(AttachError, match=r"Block 'layers\.0' already belongs to a HighwayBP"):
            HighwayBP(model, k=2).attach()
        model(x).backward()
        assert first.stats.k == 1


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_a_copy_of_the_attached_model_is_a_plain_model(how):
    """Oracle: autograd. The copy has plain gradients at k = 0 of the original, which stays attached."""
    model, batch = tiny_model("gpt2").train(), tiny_batch("gpt2")
    expected = gradients(model, lambda: model(**batch).loss)
    with HighwayBP(model, k=0) as hbp:
        if how == "deepcopy":
            copied = copy.deepcopy(model)
        else:
            buffer = io.BytesIO()
            torch.save(model, buffer)
            buffer.seek(0)
            copied = torch.load(buffer, weights_only=False)
        block = copied.transformer.h[0]
        assert block.forward.__self__ is block
        assert block.forward.__func__ is type(block).forward
        assert largest_error(expected, gradients(copied, lambda: copied(**batch).loss)) == 0
        assert hbp.stats is None
        assert largest_error(expected, gradients(model, lambda: model(**batch).loss)) > 1e-3
    with HighwayBP(copied, k=3):
        assert largest_error(expected, gradients(copied, lambda: copied(**batch).loss)) < 1e-12


def test_save_pretrained_of_the_attached_model_writes_the_same_bytes(tmp_path):
    model = tiny_model("gpt2")
    model.save_pretrained(tmp_path / "plain")
    with HighwayBP(model, k=0):
        model.save_pretrained(tmp_path / "attached")
    plain, attached = ((tmp_path / kind / "model.safetensors").read_bytes() for kind in ("plain", "attached"))
    assert plain == attached


class Doubling(ModelHook):
    """Changes the output of a module, so that its presence shows."""

    def post_forward(self, module, output):
        return 2 * output


@pytest.mark.parametrize("hook_first", [True, False])
@pytest.mark.parametrize("remove_hook_first", [True, False])
def test_accelerate_hooks_compose_in_every_order(hook_first, remove_hook_first):
    """Oracle: autograd of the model with the hook alone, and the untouched model at the end."""
    model, x = toy(), inputs()
    before = snapshot(model)
    hbp = HighwayBP(model, k=3, residual="zero")
    block = model.layers[3]
    add_hook_to_module(block, Doubling())
    expected = gradients(model, lambda: model(x))
    if not hook_first:
        remove_hook_from_module(block)
    hbp.attach()
    if not hook_first:
        add_hook_to_module(block, Doubling())
    assert largest_error(expected, gradients(model, lambda: model(x))) < 1e-12
    steps = [lambda: remove_hook_from_module(block), hbp.detach]
    for step in steps if remove_hook_first else reversed(steps):
        step()
    model.layers[3].__dict__.pop("forward", None)
    assert unchanged(model, before)
    assert hbp.stats.blocks == 4


def test_the_limit_on_one_device_is_logged_once(caplog):
    highway._say_once.cache_clear()
    with caplog.at_level(logging.WARNING, logger="hf_highwaybp"):
        for _ in range(2):
            HighwayBP(toy(), k=1).attach().detach()
    assert sum("saves no time on one device" in record.message for record in caplog.records) == 1
