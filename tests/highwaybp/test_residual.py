"""Which residual map a stack gets, and which stacks have none."""

import pytest
import torch
from torch import nn

from hf_highwaybp import HighwayBP, UnsupportedModelError
from tests.helpers.tiny_models import tiny_batch, tiny_model
from tests.highwaybp.toys import WIDTH, PostNorm, Residual, inputs, toy


@pytest.mark.parametrize(
    ("name", "factor"), [("gpt2", 1.0), ("llama", 1.0), ("vit", 1.0), ("bloom", 1.0), ("bert", 0.8)]
)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_default_map_follows_from_where_the_norm_sits(name, factor, checkpointing):
    """Oracle: the models' own documentation; only BERT normalizes the sum."""
    model = tiny_model(name).train()
    if checkpointing:
        model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    with HighwayBP(model, k=1) as hbp:
        assert "seen at the first forward pass" in hbp.describe()
        model(**tiny_batch(name))
    assert f"default: K = {factor}" in hbp.describe()


class PreNorm(Residual):
    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, hidden_states):
        return hidden_states + self.linear(self.norm(hidden_states)).tanh()


class BranchNorm(PreNorm):
    """The norm sits on the branch after the layer, as in OLMo-2: the stream itself is not normalized."""

    def forward(self, hidden_states):
        return hidden_states + self.norm(self.linear(hidden_states).tanh())


class Scaled(Residual):
    """A residual path with a factor, as in DeepNorm."""

    def forward(self, hidden_states):
        return 0.9 * hidden_states + self.linear(hidden_states).tanh()


class Reshaping(Residual):
    def forward(self, hidden_states):
        rows = hidden_states.unsqueeze(0).transpose(1, 2).reshape(WIDTH, -1)
        return rows.T + self.linear(hidden_states).tanh()


@pytest.mark.parametrize(
    ("make_block", "factor"),
    [(Residual, 1.0), (PreNorm, 1.0), (BranchNorm, 1.0), (Reshaping, 1.0), (PostNorm, 0.8), (Scaled, 0.8)],
)
def test_the_residual_path_is_read_from_the_graph(make_block, factor):
    model = toy(make_block)
    with HighwayBP(model, k=1) as hbp:
        model(inputs())
    assert f"K = {factor}" in hbp.describe()


class Product(Residual):
    """x * sigmoid(W x) multiplies two things that need gradients: no residual path."""

    def forward(self, hidden_states):
        return hidden_states * self.linear(hidden_states).sigmoid()


NOT_RESIDUAL = [
    lambda: nn.Linear(WIDTH, WIDTH),
    Product,
    lambda: nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH)),
]


@pytest.mark.parametrize("make_block", NOT_RESIDUAL)
@pytest.mark.parametrize("residual", ["default", "identity", 0.5])
def test_a_stack_without_a_residual_path_is_refused(make_block, residual):
    model = toy(make_block)
    with (
        HighwayBP(model, k=1, residual=residual),
        pytest.raises(UnsupportedModelError, match=r"Block 'layers\.0' has no residual path.*residual='zero'"),
    ):
        model(inputs())


@pytest.mark.parametrize("make_block", NOT_RESIDUAL)
@pytest.mark.parametrize("residual", ["zero", 0, lambda index, cotangent: 0.1 * cotangent])
def test_fixed_point_iteration_and_functions_need_no_residual_path(make_block, residual):
    """Oracle: autograd; what remains after k = 2 of 4 blocks is exact for the three upper ones."""
    model, x = toy(make_block), inputs()
    expected = torch.autograd.grad(model(x), list(model.layers[1].parameters()))
    with HighwayBP(model, k=2, residual=residual):
        found = torch.autograd.grad(model(x), list(model.layers[1].parameters()))
    assert all(torch.allclose(a, b, rtol=1e-12) for a, b in zip(expected, found, strict=True))


def test_a_residual_function_of_the_wrong_shape_is_refused():
    model = toy()
    with (
        HighwayBP(model, k=1, residual=lambda index, cotangent: cotangent.sum()),
        pytest.raises(ValueError, match=r"must return the shape of the cotangent, \(3, 6\), and returned \(\)"),
    ):
        model(inputs()).backward()


def test_a_function_is_named_in_the_description():
    assert "a function" in HighwayBP(toy(), k=1, residual=lambda index, cotangent: cotangent).describe()
    assert "zero: K = 0.0" in HighwayBP(toy(), k=1, residual="zero").describe()
    assert "0.25: K = 0.25" in HighwayBP(toy(), k=1, residual=0.25).describe()
    assert "exact" in HighwayBP(toy(), k=3).describe()


class Narrowing(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH - 1)

    def forward(self, hidden_states):
        return self.linear(hidden_states)


class Detaching(Residual):
    def forward(self, hidden_states):
        return super().forward(hidden_states).detach()


class Counting(Residual):
    def forward(self, hidden_states):
        return 3, super().forward(hidden_states).shape


@pytest.mark.parametrize(
    ("make_block", "what"),
    [(Narrowing, r"it is \[3, 5\]"), (Detaching, "requires_grad=False"), (Counting, "it is no tensor")],
)
def test_a_block_whose_output_is_no_stream_is_refused(make_block, what):
    model = toy(make_block)
    with HighwayBP(model, k=1, residual="zero"), pytest.raises(UnsupportedModelError, match=what):
        model(inputs())


def test_a_block_whose_first_argument_is_no_stream_is_refused():
    model = toy()
    with HighwayBP(model, k=1), pytest.raises(UnsupportedModelError, match=r"as its first argument .* got NoneType"):
        model.layers[0](hidden_states=None)
