"""The user's loop stays as it is: the oracle is the same loop without Highway-BP."""

import gc
import weakref

import pytest
import torch
from accelerate import Accelerator
from torch.utils.checkpoint import checkpoint

from hf_highwaybp import BackwardError, HighwayBP, UnsupportedModelError
from hf_highwaybp.tape import Tape
from tests.helpers.tiny_models import LAYERS, tiny_batch, tiny_model
from tests.highwaybp.toys import gradients, inputs, largest_error, toy


def test_losses_on_all_hidden_states_are_exact():
    """Oracle: autograd; the loss reads every captured hidden state and the logits."""
    model, batch = tiny_model("gpt2").train(), tiny_batch("gpt2")

    def loss():
        output = model(**batch, output_hidden_states=True)
        return output.loss + sum((i + 1) * h.sin().mean() for i, h in enumerate(output.hidden_states))

    expected = gradients(model, loss)
    with HighwayBP(model, k=LAYERS - 1):
        assert largest_error(expected, gradients(model, loss)) < 1e-12


@pytest.mark.parametrize("read", [0, 1, 2])
def test_blocks_above_the_last_one_read_take_no_part(read):
    """Oracle: autograd, which leaves the gradients of those blocks unset too."""
    model, batch = tiny_model("gpt2").train(), tiny_batch("gpt2")

    def loss():
        return model(**batch, output_hidden_states=True).hidden_states[read + 1].square().mean()

    expected = gradients(model, loss)
    with HighwayBP(model, k=read) as hbp:
        assert largest_error(expected, gradients(model, loss)) < 1e-12
    assert hbp.stats.blocks == read + 1


def test_several_forward_passes_before_one_backward_are_exact():
    """Oracle: autograd; two tapes live at once."""
    model, one, two = toy(), inputs(seed=1), inputs(seed=2)

    def loss():
        return model(one) * model(two)

    expected = gradients(model, loss)
    with HighwayBP(model, k=3):
        assert largest_error(expected, gradients(model, loss)) < 1e-12


def test_the_stack_run_twice_in_a_row_is_exact():
    """Oracle: autograd; the second run goes on where the first ends, so eight block calls are exact from k = 7."""
    model, x = toy(), inputs()

    def loss():
        hidden = model.embed(x)
        for block in [*model.layers, *model.layers]:
            hidden = block(hidden)
        return model.head(hidden).square().mean()

    expected = gradients(model, loss)
    for k in (6, 7):
        with HighwayBP(model, k=k):
            assert (largest_error(expected, gradients(model, loss)) < 1e-12) == (k == 7)


def test_one_block_called_again_and_again_is_exact():
    """Oracle: autograd; the blocks share one module, as in ALBERT."""
    model, x = toy(depth=1), inputs()

    def loss():
        hidden = model.embed(x)
        for _ in range(4):
            hidden = model.layers[0](hidden)
        return model.head(hidden).square().mean()

    expected = gradients(model, loss)
    with HighwayBP(model, k=None):
        assert largest_error(expected, gradients(model, loss)) < 1e-12


def test_gradient_accumulation_adds_up():
    """Oracle: autograd over the same two batches."""
    model, batches = toy(), [inputs(seed=1), inputs(seed=2)]

    def accumulate():
        model(batches[0]).backward()
        return model(batches[1])

    expected = gradients(model, accumulate)
    with HighwayBP(model, k=3):
        assert largest_error(expected, gradients(model, accumulate)) < 1e-12


def test_non_reentrant_checkpointing_is_exact():
    """Oracle: autograd with the same checkpointing, dropout on."""
    model, batch = tiny_model("gpt2").train(), tiny_batch("gpt2")
    model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    expected = gradients(model, lambda: model(**batch).loss)
    for k in (2, 3):
        with HighwayBP(model, k=k):
            found = gradients(model, lambda: model(**batch).loss)
        assert (largest_error(expected, found) < 1e-12) == (k == 3)


def test_reentrant_checkpointing_of_blocks_is_refused():
    model, batch = tiny_model("gpt2").train(), tiny_batch("gpt2")
    model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": True})
    with HighwayBP(model, k=1), pytest.raises(UnsupportedModelError, match="'use_reentrant': False"):
        model(**batch)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_around_the_whole_stack_is_exact(reentrant):
    """Oracle: autograd. The stack runs again in the backward pass, on a tape of its own."""
    model, x = toy(), inputs()

    def loss():
        return checkpoint(model, x.requires_grad_(), use_reentrant=reentrant)

    expected = gradients(model, loss)
    with HighwayBP(model, k=3):
        assert largest_error(expected, gradients(model, loss)) < 1e-12


@pytest.mark.parametrize("frozen", [(0,), (0, 1), (2,), (3,), (0, 1, 2, 3)])
@pytest.mark.parametrize("with_embedding", [True, False])
def test_frozen_blocks_are_exact(frozen, with_embedding):
    """Oracle: autograd; frozen parameters get no gradient, and frozen blocks at the bottom are not recorded."""
    model, x = toy(), inputs()
    for index in frozen:
        model.layers[index].requires_grad_(False)
    model.embed.requires_grad_(with_embedding)
    expected = gradients(model, lambda: model(x))
    with HighwayBP(model, k=None) as hbp:
        assert largest_error(expected, gradients(model, lambda: model(x))) < 1e-12
    recorded = 0 if hbp.stats is None else hbp.stats.blocks
    lowest = 0 if with_embedding else min(set(range(5)) - set(frozen))
    assert recorded == 4 - lowest


def test_gradients_by_torch_autograd_grad_are_exact():
    """Oracle: autograd; only the entries above the asked parameter run."""
    model, x = toy(), inputs()
    wanted = [model.layers[2].linear.weight, model.head.weight]
    expected = torch.autograd.grad(model(x), wanted)
    with HighwayBP(model, k=3) as hbp:
        found = torch.autograd.grad(model(x), wanted)
        assert hbp.stats.vjps == 2
        assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))
        expected_input = torch.autograd.grad(model(x.requires_grad_()), x)[0]
    assert torch.allclose(expected_input, torch.autograd.grad(model(x), x)[0], rtol=1e-12)


def test_an_accelerate_loop_trains_the_same_weights():
    """Oracle: the same loop without Highway-BP, with clipping and accumulation over two batches."""

    def train(use):
        model = toy()
        hbp = HighwayBP(model, k=3, enabled=use)
        accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
        prepared, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
        with hbp:
            for seed in range(4):
                with accelerator.accumulate(prepared):
                    accelerator.backward(prepared(inputs(seed=seed)))
                    if accelerator.sync_gradients:
                        accelerator.clip_grad_norm_(prepared.parameters(), 0.5)
                    optimizer.step()
                    optimizer.zero_grad()
        assert (hbp.stats is not None) == use
        return dict(model.named_parameters())

    assert largest_error(train(False), train(True)) < 1e-12


def test_k_and_enabled_hold_from_the_next_forward_pass():
    model, x = toy(), inputs()
    with HighwayBP(model, k=0) as hbp:
        loss = model(x)
        hbp.k = 2
        loss.backward()
        assert hbp.stats.k == 0
        model(x).backward()
        assert hbp.stats.k == 2
        hbp.enabled = False
        assert model.layers[0](x).grad_fn.name() == "AddBackward0"


def test_eval_and_no_grad_forwards_record_nothing():
    model, x = toy(), inputs()
    with HighwayBP(model, k=0) as hbp:
        with torch.no_grad():
            model(x)
        expected = gradients(model.eval(), lambda: model(x))
        assert hbp.stats is None
    assert largest_error(expected, gradients(model, lambda: model(x))) == 0


def test_a_forward_pass_that_is_dropped_frees_its_tape():
    """Oracle: the reference counts. No cycle through torch's graph, which Python's collector could not free."""
    model, x = toy(), inputs()
    with HighwayBP(model, k=1):
        gc.disable()
        try:
            hidden = model.layers[0](model.embed(x))
            tape = weakref.ref(hidden.grad_fn.tape)
            assert isinstance(tape(), Tape)
            del hidden
            assert tape() is None
        finally:
            gc.enable()


def test_a_second_backward_over_one_forward_is_refused():
    model, x = toy(), inputs()
    with HighwayBP(model, k=1):
        loss = model(x)
        loss.backward(retain_graph=True)
        with pytest.raises(BackwardError, match="add the losses and call backward once"):
            loss.backward()


def test_a_graph_of_the_backward_pass_is_refused():
    model, x = toy(), inputs()
    with HighwayBP(model, k=1), pytest.raises(BackwardError, match="create_graph"):
        torch.autograd.grad(model(x), model.layers[0].linear.weight, create_graph=True)


@pytest.mark.parametrize("how", ["retain_grad", "register_hook"])
def test_gradients_of_hidden_states_are_refused(how):
    """Only the external part is known at a gate; a hook would see it and take it for the gradient."""
    model, x = toy(), inputs()
    with HighwayBP(model, k=1):
        hidden = [model.embed(x)]
        for block in model.layers:
            hidden.append(block(hidden[-1]))
        if how == "retain_grad":
            hidden[2].retain_grad()
        else:
            hidden[2].register_hook(lambda gradient: None)
        with pytest.raises(BackwardError, match=r"block 'layers\.1' has a gradient hook or retain_grad"):
            hidden[-1].sum().backward()


def test_the_gradient_of_the_last_hidden_state_is_exact():
    """Oracle: autograd; nothing but the external part arrives there."""
    model, x = toy(), inputs()
    with HighwayBP(model, k=1):
        hidden = model.embed(x)
        for block in model.layers:
            hidden = block(hidden)
        hidden.retain_grad()
        hidden.square().sum().backward()
    assert torch.equal(hidden.grad, 2 * hidden.detach())


@pytest.mark.parametrize("change", [lambda h: h + 1, lambda h: h * 2, lambda h: h.clone()])
def test_a_stream_that_changes_between_blocks_is_refused(change):
    model, x = toy(), inputs()
    with HighwayBP(model, k=1):
        hidden = model.layers[0](model.embed(x))
        with pytest.raises(UnsupportedModelError, match=r"Block 'layers\.1' does not read the output of the block"):
            model.layers[1](change(hidden))


def test_a_block_in_eval_mode_within_the_stack_is_refused():
    model, x = toy(), inputs()
    model.layers[1].eval()
    with HighwayBP(model, k=1), pytest.raises(UnsupportedModelError, match=r"Block 'layers\.2' .* in eval mode"):
        model(x)


def test_a_stream_changed_in_place_between_blocks_is_refused():
    model, x = toy(), inputs()
    with HighwayBP(model, k=1):
        hidden = model.layers[0](model.embed(x))
        hidden.add_(1)
        with pytest.raises(UnsupportedModelError, match=r"Block 'layers\.1' does not read the output of the block"):
            model.layers[1](hidden)


def test_a_removed_override_is_refused_at_the_next_block():
    model, x = toy(), inputs()
    with HighwayBP(model, k=1):
        del model.layers[1].__dict__["forward"]
        with pytest.raises(UnsupportedModelError, match=r"Block 'layers\.2' .* forward was removed"):
            model(x)
