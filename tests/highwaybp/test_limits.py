"""Models that Highway-BP cannot record are refused by name, and their near neighbours are exact."""

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from hf_highwaybp import HighwayBP, UnsupportedModelError
from tests.highwaybp.toys import PostNorm, Residual, gradients, inputs, largest_error, toy


@pytest.mark.parametrize("k", [1, 3, None])
def test_a_parameter_shared_with_the_model_below_the_stack_is_refused_by_name(k):
    model, x = toy(), inputs()
    model.layers[1].linear.weight = model.embed.weight
    with (
        HighwayBP(model, k=k),
        pytest.raises(UnsupportedModelError, match=r"'layers\.1\.linear\.weight' also makes the input .*'layers\.0'"),
    ):
        model(x)


def test_a_frozen_parameter_shared_with_the_model_below_the_stack_is_exact():
    """Oracle: autograd."""
    model, x = toy(), inputs()
    model.layers[1].linear.weight = model.embed.weight
    model.embed.weight.requires_grad_(False)
    expected = gradients(model, lambda: model(x))
    with HighwayBP(model, k=3):
        assert largest_error(expected, gradients(model, lambda: model(x))) < 1e-12


def test_a_parameter_shared_with_the_model_above_the_stack_or_between_blocks_is_exact():
    """Oracle: autograd."""
    model, x = toy(), inputs()
    model.layers[1].linear.weight = model.layers[3].linear.weight
    model.last = nn.Linear(6, 6).double()
    model.last.weight = model.layers[3].linear.weight

    def loss():
        hidden = model.embed(x)
        for block in model.layers:
            hidden = block(hidden)
        return model.last(hidden).square().mean()

    expected = gradients(model, loss)
    with HighwayBP(model, k=3):
        assert largest_error(expected, gradients(model, loss)) < 1e-12


def run(model, x):
    hidden = model.embed(x)
    for block in model.layers:
        hidden = block(hidden)
    return hidden


def test_a_model_fed_with_its_own_output_is_refused_and_with_a_detached_one_is_exact():
    """Oracle: autograd, with the output detached in between."""
    model, x = toy(), inputs()
    with HighwayBP(model, k=3), pytest.raises(UnsupportedModelError, match=r"must not be fed from itself.*detach it"):
        run(model, run(model, x))

    def loss():
        first = run(model, x)
        return (first + run(model, first.detach())).square().mean()

    expected = gradients(model, loss)
    with HighwayBP(model, k=3):
        assert largest_error(expected, gradients(model, loss)) < 1e-12


class InPlace(Residual):
    """x += f(x)."""

    def forward(self, hidden_states):
        hidden_states += self.linear(hidden_states).tanh()
        return hidden_states


class InPlacePart(Residual):
    """Writes into a slice of its input."""

    def forward(self, hidden_states):
        hidden_states[:, 0] += 1
        return hidden_states + self.linear(hidden_states).tanh()


@pytest.mark.parametrize("block", [InPlace, InPlacePart])
def test_a_block_that_changes_its_input_in_place_is_refused_by_name(block):
    model, x = toy(block), inputs()
    with (
        HighwayBP(model, k=1),
        pytest.raises(UnsupportedModelError, match=r"Block 'layers\.0' must leave .*x = x \+ f\(x\) instead of"),
    ):
        model(x)


@pytest.mark.parametrize("block", [Residual, PostNorm])
@pytest.mark.parametrize("k", [2, 3])
def test_a_stream_changed_in_place_after_the_stack_is_exact(block, k):
    """Oracle: autograd; a loss reads the stream before the change too. k = 2 is the negative control."""
    model, x = toy(block), inputs()

    def loss():
        hidden = run(model, x)
        before = hidden.sum()
        hidden += 1
        hidden[:, 0] *= 2
        return model.head(hidden).square().mean() + before

    expected = gradients(model, loss)
    with HighwayBP(model, k=k):
        assert (largest_error(expected, gradients(model, loss)) < 1e-12) == (k == 3)


class Saving(Residual):
    """Its last operation saves the output for the backward pass."""

    def forward(self, hidden_states):
        return super().forward(hidden_states).tanh()


def test_a_change_in_place_of_what_a_block_saved_is_still_seen_by_torch():
    """Oracle: autograd raises the same error without Highway-BP, and neither does without the change."""
    model, x = toy(Saving), inputs()

    def loss(change):
        hidden = run(model, x)
        return (hidden.mul_(2) if change else hidden).square().mean()

    expected = gradients(model, lambda: loss(False))
    with HighwayBP(model, k=3, residual="zero") as hbp:
        for enabled in (False, True):
            hbp.enabled = enabled
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                loss(True).backward()
        assert largest_error(expected, gradients(model, lambda: loss(False))) < 1e-12


class Normalized(Residual):
    """Makes its matrix anew in every forward pass."""

    def forward(self, hidden_states):
        self.made = self.linear.weight / self.linear.weight.norm()
        return hidden_states + (hidden_states @ self.made).tanh()


def test_a_loss_on_weights_made_inside_a_block_raises_and_one_on_its_parameters_is_exact():
    """Oracle: autograd for the second."""
    model, x = toy(Normalized), inputs()
    for parameter in (block.linear.bias for block in model.layers):
        parameter.requires_grad_(False)
    with HighwayBP(model, k=1), pytest.raises(RuntimeError, match="backward through the graph a second time"):
        (model(x) + model.layers[1].made.sum()).backward()

    def loss():
        return model(x) + model.layers[1].linear.weight.sum()

    expected = gradients(model, loss)
    with HighwayBP(model, k=3):
        assert largest_error(expected, gradients(model, loss)) < 1e-12


@pytest.mark.parametrize(("k", "calls"), [(0, 1), (1, 2), (2, 3), (None, 1)])
def test_backward_hooks_inside_a_block_fire_once_for_each_vjp(k, calls):
    """Oracle: counting, at the second of four blocks; forward hooks fire once."""
    model, x, seen = toy(), inputs(), []
    model.layers[1].linear.register_full_backward_hook(lambda *_: seen.append("backward"))
    model.layers[1].linear.register_forward_hook(lambda *_: seen.append("forward"))
    with HighwayBP(model, k=k):
        model(x).backward()
    assert seen == ["forward", *["backward"] * calls]


class Twice(Residual):
    """Returns its stream twice, and its input."""

    def forward(self, hidden_states):
        stream = super().forward(hidden_states)
        return stream, stream, hidden_states


def test_a_block_that_returns_one_tensor_twice_is_exact():
    """Oracle: autograd of the same stack with one output; the doubles are only looked at."""
    model, x = toy(), inputs()
    expected = gradients(model, lambda: run(model, x).square().mean())

    def loss():
        hidden = model.embed(x)
        for block in model.layers:
            hidden, again, before = block(hidden)
            assert torch.equal(again, hidden)
            assert before.shape == x.shape
        return hidden.square().mean()

    for block in model.layers:
        block.__class__ = Twice
    with HighwayBP(model, k=3):
        assert largest_error(expected, gradients(model, loss)) < 1e-12


class Tripping(Residual):
    def forward(self, hidden_states):
        raise RuntimeError("not about places")


def test_other_errors_inside_a_block_come_through():
    with HighwayBP(toy(Tripping), k=1) as hbp, pytest.raises(RuntimeError, match="not about places"):
        hbp.stack.blocks[0](inputs().requires_grad_())


# what torch's compiler does while it traces is no concern of this package
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("what", ["model", "blocks", "wrapped blocks"])
def test_compiled_models_are_refused_or_exact(what, backend):
    """Oracle: autograd; torch runs what it cannot trace uncompiled, and only that may be recorded."""
    model, x = toy(), inputs()
    expected = gradients(model, lambda: model(x))
    if what == "model":
        model.compile(backend=backend)
    for index, block in enumerate(model.layers):
        if what == "blocks":
            block.compile(backend=backend)
        elif what == "wrapped blocks":
            model.layers[index] = torch.compile(block, backend=backend)
    with HighwayBP(model, k=3, residual="zero"):
        if backend == "aot_eager":
            with pytest.raises(UnsupportedModelError, match="attach to the uncompiled model"):
                model(x)
        else:
            found = gradients(model, lambda: model(x))
            found = {name.replace("_orig_mod.", ""): value for name, value in found.items()}
            assert largest_error(expected, found) < 1e-12
    torch.compiler.reset()


def test_a_block_that_is_being_compiled_is_refused(monkeypatch):
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    with HighwayBP(toy(), k=1) as hbp, pytest.raises(UnsupportedModelError, match="attach to the uncompiled model"):
        hbp.stack.blocks[0](inputs().requires_grad_())


def test_checkpointing_around_the_stack_still_sees_a_model_fed_from_itself():
    model, x = toy(), inputs().requires_grad_()
    with HighwayBP(model, k=1), pytest.raises(UnsupportedModelError, match="must not be fed from itself"):
        checkpoint(lambda: run(model, run(model, x)), use_reentrant=False)
