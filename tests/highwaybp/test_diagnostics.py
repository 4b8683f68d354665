"""The measured distance to exact gradients, and that measuring leaves no trace."""

import math
import random

import numpy as np
import pytest
import torch
from torch import nn

from hf_highwaybp import AttachError, HighwayBP, compare_exact
from hf_highwaybp.diagnostics import _figures
from tests.helpers.tiny_models import LAYERS, tiny_batch, tiny_model
from tests.highwaybp.toys import Residual, gradients, inputs, toy


def toy_loss(model, batch):
    return model(batch["x"])


@pytest.mark.parametrize("name", ["gpt2", "llama", "bert", "vit"])
def test_the_cosine_is_one_at_full_k_and_less_below(name):
    """Oracle: k = L - 1 is exact; k = 0 is the negative control. Dropout is on and the same in both passes."""
    model, batch = tiny_model(name), tiny_batch(name)
    full, none = (compare_exact(model, batch, k=k) for k in (LAYERS - 1, 0))
    assert full.cosine == pytest.approx(1.0, abs=1e-14)
    assert full.relative_error < 1e-12
    assert none.cosine < 0.999
    assert none.relative_error > 0.01
    assert none.loss == full.loss
    assert none.block_cosines[-1] == pytest.approx(1.0, abs=1e-14)
    assert max(none.block_relative_errors[:-1]) > 0.01
    assert len(none.block_cosines) == len(none.block_names) == LAYERS


def test_fixed_point_iteration_is_a_control_that_is_worse():
    """Oracle: with K = 0 and k = 0 the lower blocks get no gradient at all, so their cosine is not defined."""
    model, batch = tiny_model("gpt2"), tiny_batch("gpt2")
    highway, control = (compare_exact(model, batch, k=0, residual=residual) for residual in ("default", "zero"))
    assert control.cosine < highway.cosine
    assert math.isnan(control.block_cosines[0])
    assert control.block_relative_errors[0] == 1.0


def test_the_figures_are_those_of_gradients_taken_by_hand():
    """Oracle: the definition, on two backward passes of the test's own."""
    model, x = toy(), inputs()
    report = compare_exact(model, {"x": x}, k=1, loss_fn=toy_loss)
    exact = gradients(model, lambda: model(x))
    with HighwayBP(model, k=1):
        found = gradients(model, lambda: model(x))
    a, b = (torch.cat([g.flatten() for n, g in grads.items() if "layers" in n]) for grads in (exact, found))
    assert report.cosine == pytest.approx(float(torch.cosine_similarity(a, b, dim=0)), rel=1e-12)
    assert report.relative_error == pytest.approx(float((a - b).norm() / a.norm()), rel=1e-10)
    a, b = (torch.cat([g.flatten() for g in grads.values()]) for grads in (exact, found))
    assert report.all_cosine == pytest.approx(float(torch.cosine_similarity(a, b, dim=0)), rel=1e-12)
    assert report.all_relative_error == pytest.approx(float((a - b).norm() / a.norm()), rel=1e-10)
    assert str(report).startswith("Highway-BP on layers (4 x Residual), k = 1, default: K = 1.0: cosine 0.")


class Counting(Residual):
    """Has a buffer that every forward pass changes, and draws random numbers."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(6)
        self.dropout = nn.Dropout(0.5)

    def forward(self, hidden_states):
        return hidden_states + self.dropout(self.linear(self.norm(hidden_states)))


@pytest.mark.parametrize("fail", [False, True])
def test_measuring_leaves_no_trace(fail):
    """Oracle: gradients by identity, buffers and generator state by value, modes, and the instance dicts."""
    model, x = toy(Counting).eval(), inputs()
    model.layers[2].train()
    model.head.weight.grad = torch.ones_like(model.head.weight)
    gradients_before = [p.grad for p in model.parameters()]
    modes = [m.training for m in model.modules()]
    buffers = {n: b.clone() for n, b in model.named_buffers()}
    state = torch.get_rng_state()
    if fail:
        with pytest.raises(KeyError, match="labels"):
            compare_exact(model, {"x": x}, k=1, loss_fn=lambda model, batch: model(batch["x"]) + batch["labels"])
    else:
        assert compare_exact(model, {"x": x}, k=3, loss_fn=toy_loss).cosine == pytest.approx(1, abs=1e-14)
    assert all(p.grad is g for p, g in zip(model.parameters(), gradients_before, strict=True))
    assert modes == [m.training for m in model.modules()]
    assert all(torch.equal(b, buffers[n]) for n, b in model.named_buffers())
    assert torch.equal(state, torch.get_rng_state())
    assert all("forward" not in block.__dict__ for block in model.layers)


class Drawing(Residual):
    """Draws from numpy and Python, counts in buffers, in place and by new objects, and scales with the count."""

    def __init__(self):
        super().__init__()
        self.register_buffer("count", torch.zeros(1))
        self.register_buffer("late", None)

    def forward(self, hidden_states):
        self.count += 1
        self.late = self.count.clone() if self.late is None else self.late + 1
        draw = random.random() + np.random.rand()  # noqa: NPY002
        return hidden_states + (self.linear(hidden_states) * float(self.count + self.late)).tanh() * draw


def test_both_passes_start_from_the_same_generators_and_buffers_and_give_them_back():
    """Oracle: k = L - 1 is exact if and only if both passes draw and count alike."""
    model, x = toy(Drawing).eval(), inputs()
    before = [dict(module._buffers) for module in model.modules()]
    random.seed(1)
    np.random.seed(1)  # noqa: NPY002
    states = random.getstate(), np.random.get_state()[1].copy()  # noqa: NPY002
    report = compare_exact(model, {"x": x}, k=3, loss_fn=toy_loss)
    assert report.cosine == pytest.approx(1, abs=1e-14)
    assert report.relative_error < 1e-12
    assert random.getstate() == states[0]
    assert np.array_equal(np.random.get_state()[1], states[1])  # noqa: NPY002
    for module, buffers in zip(model.modules(), before, strict=True):
        assert module._buffers.keys() == buffers.keys()
        assert all(module._buffers[name] is value for name, value in buffers.items())
    assert all(float(block.count) == 0 for block in model.layers)


def test_hooks_on_accumulated_gradients_do_not_run_and_inputs_keep_their_gradient():
    model, x, seen = toy(), inputs().requires_grad_(), []
    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(seen.append)
    compare_exact(model, {"x": x}, k=1, loss_fn=toy_loss)
    assert seen == []
    assert x.grad is None
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_batch_that_is_no_dict_is_refused_without_a_loss_function():
    ids = tiny_batch("gpt2")["input_ids"]
    with pytest.raises(TypeError, match=r"batch must be a dict of the model's keyword arguments, got Tensor\."):
        compare_exact(tiny_model("gpt2"), ids, k=1)


def test_a_model_without_a_loss_is_refused():
    model, batch = tiny_model("gpt2"), tiny_batch("gpt2")
    with pytest.raises(TypeError, match="put labels into the batch, or pass loss_fn"):
        compare_exact(model, {"input_ids": batch["input_ids"]}, k=1)


def test_an_attached_model_is_refused():
    model = toy()
    with HighwayBP(model, k=1), pytest.raises(AttachError, match="detach that one first"):
        compare_exact(model, {"x": inputs()}, k=1, loss_fn=toy_loss)


def test_zero_gradients_have_no_cosine():
    zero, one = {0: torch.zeros(3)}, {0: torch.ones(3)}
    cosine, error = _figures(zero, zero, [0])
    assert math.isnan(cosine)
    assert math.isnan(error)
    assert _figures(zero, one, [0])[1] == math.inf
