"""No tensor goes around the stream unseen: each leak raises, named by block and tensor, and harmless ones do not."""

import pytest
import torch
import transformers
from torch import nn

from hf_highwaybp import EscapedTensorError, HighwayBP
from tests.helpers.tiny_models import SIZES, tiny_batch, tiny_model
from tests.highwaybp.toys import WIDTH, Residual, gradients, inputs, largest_error, toy


class Sharing(nn.Module):
    """Block 0 leaves a tensor in a dict, as layers that share keys and values do."""

    def __init__(self, index):
        super().__init__()
        self.index = index
        self.linear, self.value = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, hidden_states, shared=None):
        value = self.value(hidden_states).tanh()
        if self.index == 0:
            shared["kv"] = value
        read = shared["kv"] if self.index == 2 else value
        return hidden_states + self.linear(hidden_states).tanh() * read


class SharingStack(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(WIDTH, WIDTH)
        self.layers = nn.ModuleList(Sharing(index) for index in range(4))

    def forward(self, x):
        hidden, shared = self.embed(x), {}
        for block in self.layers:
            hidden = block(hidden, shared=shared)
        return hidden.square().mean()


@pytest.mark.parametrize("k", [0, 1, 3, None])
def test_a_tensor_passed_on_in_a_dict_is_refused_by_block_and_key(k):
    torch.manual_seed(0)
    model = SharingStack().double()
    with (
        HighwayBP(model, k=k),
        pytest.raises(EscapedTensorError, match=r"Block 'layers\.2' .* inside block 'layers\.0' .*shared\['kv'\]"),
    ):
        model(inputs())


class Captured(Residual):
    """Keeps its last branch as an attribute, as recorded attention weights are kept."""

    def forward(self, hidden_states):
        self.branch = self.linear(hidden_states).tanh()
        return hidden_states + self.branch


def test_a_captured_tensor_may_leave_the_block_and_may_not_enter_the_loss():
    model, x = toy(Captured), inputs()
    expected = gradients(model, lambda: model(x))
    with HighwayBP(model, k=None):
        assert largest_error(expected, gradients(model, lambda: model(x))) < 1e-12
        loss = model(x) + model.layers[2].branch.sum()
        with pytest.raises(EscapedTensorError, match=r"made inside block 'layers\.2'"):
            loss.backward()


def test_a_captured_tensor_is_caught_when_only_some_gradients_are_asked_for():
    """torch.autograd.grad runs only the nodes that lead to what it was asked for, and the leaf is one of them."""
    model, x = toy(Captured), inputs()
    with HighwayBP(model, k=None):
        loss = model(x) + model.layers[2].branch.sum()
        with pytest.raises(EscapedTensorError, match=r"made inside block 'layers\.2'"):
            torch.autograd.grad(loss, model.layers[0].linear.weight)
        with pytest.raises(EscapedTensorError, match=r"made inside block 'layers\.2'"):
            torch.autograd.grad(model(x) + model.layers[2].branch.sum(), model.embed.weight)


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_an_untouched_cache_is_no_escape_and_a_differentiated_one_is(name):
    """Oracle: autograd. In train mode the models return a cache whose tensors need gradients."""
    model, batch = tiny_model(name).train(), tiny_batch(name)
    expected = gradients(model, lambda: model(**batch, use_cache=True).loss)
    with HighwayBP(model, k=3):
        assert largest_error(expected, gradients(model, lambda: model(**batch, use_cache=True).loss)) < 1e-12
        output = model(**batch, use_cache=True)
        keys = output.past_key_values.layers[1].keys
        assert keys.requires_grad
        with pytest.raises(EscapedTensorError, match=r"block '.*\.1' .*key/value cache"):
            (output.loss + keys.sum()).backward()


def test_attention_weights_may_be_returned_and_not_differentiated():
    model, batch = tiny_model("gpt2", attn_implementation="eager").train(), tiny_batch("gpt2")
    expected = gradients(model, lambda: model(**batch, output_attentions=True).loss)
    with HighwayBP(model, k=3):
        found = gradients(model, lambda: model(**batch, output_attentions=True).loss)
        output = model(**batch, output_attentions=True)
        with pytest.raises(EscapedTensorError, match="attention weights"):
            (output.loss + output.attentions[0].sum()).backward()
    assert largest_error(expected, found) < 1e-12


def test_router_logits_may_be_returned_and_not_differentiated():
    """The router loss of Mixtral reads tensors captured inside the blocks; without it, autograd is the oracle."""
    torch.manual_seed(0)
    config = transformers.MixtralConfig(
        vocab_size=101, num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2, use_cache=False, **SIZES
    )
    model, batch = transformers.MixtralForCausalLM(config).train(), tiny_batch("llama")
    expected = gradients(model, lambda: model(**batch).loss)
    with HighwayBP(model, k=3):
        assert largest_error(expected, gradients(model, lambda: model(**batch).loss)) < 1e-5
        with pytest.raises(EscapedTensorError, match="router logits"):
            model(**batch, output_router_logits=True).loss.backward()


class Aside(Residual):
    def forward(self, hidden_states, extra, late=None):
        more = 0 if late is None else late
        return hidden_states + (self.linear(hidden_states) * extra).tanh() + more


def run_aside(model, x, extra, late=None):
    hidden = model.embed(x)
    for index, block in enumerate(model.layers):
        hidden = block(hidden, extra, late=late if index == 2 else None)
    return hidden.square().mean()


def test_a_side_input_that_every_block_gets_receives_its_gradient():
    """Oracle: autograd, for the side input as for the parameters."""
    model, x = toy(Aside), inputs()
    source = torch.linspace(0.5, 1.5, WIDTH, dtype=torch.float64, requires_grad=True)
    expected = gradients(model, lambda: run_aside(model, x, source * 2))
    expected_source, source.grad = source.grad, None
    with HighwayBP(model, k=3):
        found = gradients(model, lambda: run_aside(model, x, source * 2))
    assert largest_error(expected | {"source": expected_source}, found | {"source": source.grad}) < 1e-12


def test_a_side_input_that_comes_late_is_refused_by_block_and_argument():
    model, x = toy(Aside), inputs()
    late = torch.ones(WIDTH, dtype=torch.float64, requires_grad=True)
    with (
        HighwayBP(model, k=3),
        pytest.raises(EscapedTensorError, match=r"Argument 'late' of block 'layers\.2'"),
    ):
        run_aside(model, x, torch.ones(WIDTH, dtype=torch.float64), late)


def test_an_earlier_hidden_state_as_an_argument_is_refused():
    model, x = toy(Aside), inputs()
    with HighwayBP(model, k=3):
        hidden = model.layers[0](model.embed(x), torch.ones(WIDTH, dtype=torch.float64))
        with pytest.raises(EscapedTensorError, match=r"Argument 'extra' of block 'layers\.1'"):
            model.layers[1](hidden, hidden)


class Outsider(Residual):
    """Reads a parameter that is not its own."""

    table = None

    def forward(self, hidden_states):
        return super().forward(hidden_states) * self.table[0].sum()


def test_a_parameter_outside_the_block_is_refused():
    model = toy(Outsider)
    Outsider.table = [model.head.weight]
    with HighwayBP(model, k=1), pytest.raises(EscapedTensorError, match=r"parameter or leaf of shape \[1, 6\]"):
        model(inputs())
