"""Which list of blocks is taken for the stack."""

import logging

import pytest
from torch import nn

from hf_highwaybp import HighwayBP, UnsupportedModelError
from hf_highwaybp.stacks import find_stack
from tests.helpers.tiny_models import LAYERS, tiny_batch, tiny_model
from tests.highwaybp.toys import WIDTH, PostNorm, Residual, gradients, inputs, largest_error, toy


@pytest.mark.parametrize(
    ("name", "path"),
    [("gpt2", "transformer.h"), ("llama", "model.layers"), ("bert", "bert.encoder.layer"), ("vit", "vit.layers")],
)
def test_the_stack_of_a_transformer_is_found(name, path):
    """Oracle: the models' attribute names."""
    stack = find_stack(tiny_model(name))
    assert stack.path == path
    assert stack.names == tuple(f"{path}.{index}" for index in range(LAYERS))


@pytest.mark.parametrize(
    ("name", "paths"),
    [("t5", ["encoder.block", "decoder.block"]), ("bart", ["model.encoder.layers", "model.decoder.layers"])],
)
def test_two_stacks_of_equal_standing_are_refused_by_name(name, paths):
    with pytest.raises(UnsupportedModelError, match="Several stacks of equal standing") as refusal:
        HighwayBP(tiny_model(name))
    assert all(f"{path} ({LAYERS} x " in str(refusal.value) for path in paths)
    assert f"blocks={paths[0]!r}" in str(refusal.value)


@pytest.mark.parametrize("path", ["model.encoder.layers", "model.decoder.layers"])
def test_a_named_stack_of_an_encoder_decoder_model_is_exact(path):
    """Oracle: autograd; the decoder blocks read the encoder's output as a side input."""
    model, batch = tiny_model("bart").train(), tiny_batch("bart")
    expected = gradients(model, lambda: model(**batch).loss)
    with HighwayBP(model, k=LAYERS - 1, blocks=path) as hbp:
        assert largest_error(expected, gradients(model, lambda: model(**batch).loss)) < 1e-12
    assert hbp.stats.blocks == LAYERS


def test_both_stacks_of_an_encoder_decoder_model_take_an_engine_each():
    """Oracle: autograd."""
    model, batch = tiny_model("bart").train(), tiny_batch("bart")
    expected = gradients(model, lambda: model(**batch).loss)
    with HighwayBP(model, blocks="model.encoder.layers"), HighwayBP(model, blocks="model.decoder.layers"):
        assert largest_error(expected, gradients(model, lambda: model(**batch).loss)) < 1e-12


def test_lists_inside_blocks_and_small_lists_do_not_compete():
    class Experts(Residual):
        def __init__(self):
            super().__init__()
            self.experts = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(8))

    model = toy(Experts)
    model.heads = nn.ModuleList(nn.Linear(WIDTH, 1) for _ in range(2))
    assert find_stack(model).path == "layers"
    model.heads = nn.ModuleList(nn.Linear(WIDTH, 50) for _ in range(2))
    with pytest.raises(UnsupportedModelError, match="equal standing"):
        find_stack(model)


def test_a_model_without_a_stack_is_refused():
    with pytest.raises(UnsupportedModelError, match=r"No stack .* in Linear.*module lists seen: none"):
        HighwayBP(nn.Linear(2, 2))


def test_a_mixed_stack_needs_to_be_named():
    model = toy()
    model.layers[1] = PostNorm().double()
    with pytest.raises(UnsupportedModelError, match=r"layers \(4 x PostNorm / Residual\).*blocks='layers'"):
        HighwayBP(model)
    x = inputs()
    expected = gradients(model, lambda: model(x))
    with HighwayBP(model, k=3, blocks="layers") as hbp:
        assert largest_error(expected, gradients(model, lambda: model(x))) < 1e-12
    assert "K = 0.8 and 1.0" in hbp.describe()


def test_a_part_of_the_stack_may_be_given_as_modules():
    """Oracle: autograd; blocks outside the part are ordinary parts of the model."""
    model, x = toy(), inputs()
    expected = gradients(model, lambda: model(x))
    with HighwayBP(model, k=1, blocks=list(model.layers[1:3])) as hbp:
        assert largest_error(expected, gradients(model, lambda: model(x))) < 1e-12
    assert hbp.stats.blocks == 2
    assert hbp.stack.names == ("layers.1", "layers.2")


def test_a_single_block_is_exact_at_k_zero_and_says_so(caplog):
    """Oracle: autograd."""
    model, x = toy(depth=1), inputs()
    expected = gradients(model, lambda: model(x))
    with caplog.at_level(logging.WARNING, logger="hf_highwaybp"), HighwayBP(model, k=0):
        assert largest_error(expected, gradients(model, lambda: model(x))) < 1e-12
    assert "nothing to approximate, k = 0 is exact" in caplog.text


def test_a_sequential_is_told_ways_that_work():
    """Oracle: autograd, for an engine made as the message says."""
    model = nn.Sequential(Residual(), Residual()).double()
    with pytest.raises(UnsupportedModelError, match=r"blocks='path\.to\.list'\), or blocks=list\(model\) for an nn"):
        HighwayBP(model, k=1)
    with pytest.raises(ValueError, match=r"in Sequential, got 'layers'; it has '0', '1'\."):
        HighwayBP(model, k=1, blocks="layers")
    with pytest.raises(ValueError, match=r"in Sequential, got ''; it has '0', '1'\."):
        HighwayBP(model, k=1, blocks="")
    expected = gradients(model, lambda: model(inputs()).square().mean())
    with HighwayBP(model, k=1, blocks=list(model)):
        assert largest_error(expected, gradients(model, lambda: model(inputs()).square().mean())) < 1e-12


def test_a_long_list_of_names_is_cut():
    model = nn.Sequential(*(Residual() for _ in range(14)))
    with pytest.raises(ValueError, match=r"'11', \.\.\.\.$"):
        HighwayBP(model, blocks="layers")


def test_sharding_engines_are_refused_by_name():
    class FullyShardedDataParallel(nn.Module):
        def __init__(self, module):
            super().__init__()
            self.module = module

    for wrapper in (FullyShardedDataParallel, nn.DataParallel):
        with pytest.raises(UnsupportedModelError, match=f"not tested with {wrapper.__name__}"):
            HighwayBP(wrapper(toy()))
    model = toy()
    model.head.weight.ds_id = 0
    with pytest.raises(UnsupportedModelError, match="sharded parameters"):
        HighwayBP(model)


@pytest.mark.parametrize(
    ("blocks", "error", "message"),
    [
        ("nowhere.layers", ValueError, "in Stack, got 'nowhere.layers'; it has 'embed', 'layers', 'head', 'empty'"),
        ("layers.0.linaer", ValueError, r"got 'layers\.0\.linaer'; 'layers\.0' has 'linear'\."),
        ("head.layers", ValueError, r"got 'head\.layers'; 'head' has no modules"),
        ("", ValueError, "in Stack, got ''; it has 'embed'"),
        ("head", TypeError, "'head' is a Linear"),
        ("empty", ValueError, "'empty' is empty"),
        ([], ValueError, "at least one module"),
        ([nn.Linear(1, 1)], ValueError, r"modules of Stack, and these are not: \['Linear'\]"),
        ([1, 2], TypeError, "a dotted path or a sequence of modules"),
        (3, TypeError, "a dotted path or a sequence of modules"),
    ],
)
def test_wrong_blocks_are_refused(blocks, error, message):
    model = toy()
    model.empty = nn.ModuleList()
    with pytest.raises(error, match=message):
        HighwayBP(model, blocks=blocks)
