"""Gradient hooks: on parameters they run once on the final gradient, on hidden states they are refused."""

import gc
import weakref

import pytest
import torch

from hf_highwaybp import BackwardError, HighwayBP
from tests.highwaybp.toys import gradients, inputs, largest_error, toy


@pytest.mark.parametrize("k", [2, 3, None])
@pytest.mark.parametrize("times", [1, 2])
def test_a_hook_on_a_parameter_runs_once_on_the_final_gradient(k, times):
    """Oracle: autograd with the same hook, also where a block is called twice; k = 2 is the negative control."""
    model, x, seen = toy(), inputs(), []

    def double(gradient):
        seen.append(gradient.clone())
        return 2 * gradient

    def loss():
        hidden = model.embed(x)
        for block in list(model.layers) * times:
            hidden = block(hidden)
        return model.head(hidden).square().mean()

    hooked = [model.layers[1].linear.weight, model.layers[0].linear.bias, model.embed.weight]
    handles = [parameter.register_hook(double) for parameter in hooked]
    expected, before = gradients(model, loss), list(seen)
    seen.clear()
    with HighwayBP(model, k=None if k is None else k + 4 * (times - 1)):
        found = gradients(model, loss)
        assert len(seen) == len(before) == len(hooked)
        assert (largest_error(expected, found) < 1e-12) == (k != 2)
        for handle in handles:
            handle.remove()
        model(x).backward()
    assert len(seen) == len(hooked)


def test_a_hook_on_a_parameter_runs_once_with_torch_autograd_grad():
    """Oracle: autograd with the same hook."""
    model, x = toy(), inputs()
    weight = model.layers[1].linear.weight
    weight.register_hook(lambda gradient: 2 * gradient)
    (expected,) = torch.autograd.grad(model(x), weight)
    with HighwayBP(model, k=3):
        (found,) = torch.autograd.grad(model(x), weight)
    assert torch.allclose(expected, found, rtol=1e-12)


def test_a_hook_after_accumulation_runs_once_and_sees_the_gradient():
    """Oracle: autograd."""
    model, x, seen = toy(), inputs(), []
    expected = gradients(model, lambda: model(x))
    model.layers[1].linear.weight.register_post_accumulate_grad_hook(lambda p: seen.append(p.grad.clone()))
    with HighwayBP(model, k=3):
        gradients(model, lambda: model(x))
    assert len(seen) == 1
    assert torch.allclose(seen[0], expected["layers.1.linear.weight"], rtol=1e-12)


def test_hooks_are_back_after_a_pass_that_fails():
    model, x = toy(), inputs()
    hook = model.layers[1].linear.weight.register_hook(lambda gradient: gradient)

    def fail(gradient):
        raise KeyError("inside")

    with HighwayBP(model, k=1):
        hidden = model.layers[1](model.layers[0](model.embed(x)))
        inner = model.layers[1].linear.weight._backward_hooks
        hidden.grad_fn.tape.segments[1].outputs[0].register_hook(fail)
        with pytest.raises(KeyError, match="inside"):
            hidden.sum().backward()
    assert model.layers[1].linear.weight._backward_hooks is inner
    assert hook.id in inner


@pytest.mark.parametrize("how", ["register_hook", "retain_grad"])
@pytest.mark.parametrize("direct", [False, True])
def test_a_hook_on_a_hidden_state_that_python_dropped_is_refused_and_not_called(how, direct):
    """The hook lives on in torch's graph when the tensor is gone, and would get the external part or None."""
    model, x, seen = toy(), inputs(), []
    with HighwayBP(model, k=3):
        hidden, total = model.embed(x), 0
        for index, block in enumerate(model.layers):
            hidden = block(hidden)
            if index == 1:
                hidden.register_hook(seen.append) if how == "register_hook" else hidden.retain_grad()
            total = total + model.head(hidden).square().mean() if direct or index == 3 else total
        del hidden
        with pytest.raises(BackwardError, match=r"block 'layers\.1' has a gradient hook or retain_grad"):
            total.backward()
    assert seen == []


def test_a_hook_that_was_taken_off_again_is_fine():
    """Oracle: autograd."""
    model, x = toy(), inputs()

    def loss():
        hidden = model.embed(x)
        for block in model.layers:
            hidden = block(hidden)
            hidden.register_hook(lambda gradient: None).remove()
        return model.head(hidden).square().mean()

    expected = gradients(model, loss)
    with HighwayBP(model, k=3):
        assert largest_error(expected, gradients(model, loss)) < 1e-12


def test_a_hook_on_the_last_hidden_state_that_is_read_is_exact():
    """Oracle: autograd; blocks above it ran and take no part."""
    model, x, seen = toy(), inputs(), []
    with HighwayBP(model, k=1):
        hidden = model.layers[1](model.layers[0](model.embed(x)))
        hidden.register_hook(seen.append)
        model.layers[2](hidden)
        hidden.square().sum().backward()
    assert torch.equal(seen[0], 2 * hidden.detach())


def test_a_stream_that_is_held_for_its_hooks_is_freed_with_the_graph_or_the_backward_pass():
    """Oracle: the reference counts, without Python's collector."""
    model, x = toy(), inputs()
    with HighwayBP(model, k=1):
        gc.disable()
        try:
            for backward in (False, True):
                hidden = model.layers[0](model.embed(x))
                stream = weakref.ref(hidden)
                hidden = model.layers[1](hidden)
                assert stream() is not None
                if backward:
                    hidden.sum().backward()
                else:
                    del hidden
                assert stream() is None
        finally:
            gc.enable()
