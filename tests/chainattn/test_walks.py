"""From a model and its inputs to mixing matrices: its own eager path is the oracle, and nothing is left behind."""

import copy
import importlib
import pickle

import pytest
import torch
import transformers
from transformers import DynamicCache

from hf_chainattn import (
    UnsupportedCacheError,
    chain_attention_reference,
    chain_walks,
    disable_chain_attention,
    enable_chain_attention,
    integration,
)
from hf_chainattn.models import dispatching_modules
from tests.chainattn.test_analysis import coefficients
from tests.chainattn.test_gates import gates
from tests.chainattn.test_models import MODELS, TEXT_MODELS, llava, sharpened
from tests.helpers.decoders import decoder
from tests.helpers.tiny_models import LAYERS, tiny_batch, tiny_model

# an ordinary layer, one number, and a number for each head
GAMMAS = [0.0, 0.9, [0.1, 0.5, 0.9, 0.95], 0.7]
SETTINGS = {"gamma": [0.5, *GAMMAS[1:]], "layers": [1, 2, 3]}


def of_heads(gamma):
    return torch.tensor(gamma if isinstance(gamma, list) else [gamma] * 4, dtype=torch.float64)


def reference_walks(name, batch, diagonal, monkeypatch):
    """Oracle: ``M`` and ``A`` of each layer by the reference, in the eager path of the model and with its mask."""
    found = []

    def forward(module, query, key, value, attention_mask, scaling=None, dropout=0.0, **kwargs):
        key, value = (tensor.repeat_interleave(query.shape[1] // key.shape[1], 1) for tensor in (key, value))
        visible = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool)
        if attention_mask is not None:
            visible = (attention_mask > -1e30).expand(*query.shape[:2], -1, -1)
        one = torch.eye(query.shape[2], dtype=torch.float64).expand(*query.shape[:2], -1, -1)
        gammas = (of_heads(GAMMAS[len(found)]), 0.0)
        matrix, attention = (
            chain_attention_reference(query, key, one, gamma=gamma, diagonal=diagonal, mask=visible, scale=scaling)
            for gamma in gammas
        )
        found.append((matrix, attention))
        return (matrix @ value).transpose(1, 2).contiguous(), None

    module = importlib.import_module(f"transformers.models.{name}.modeling_{name}")
    with monkeypatch.context() as patch:
        patch.setattr(module, "eager_attention_forward", forward)
        sharpened(name, attn_implementation="eager")(**batch)
    return found


@pytest.mark.parametrize("diagonal", ["kept", "removed"])
@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("name", MODELS)
def test_mixing_matrices_are_those_of_the_reference_in_the_eager_path(name, padding, diagonal, monkeypatch):
    """Oracle: see ``reference_walks``; grouped heads in Llama, all tokens see all in BERT and ViT."""
    batch = tiny_batch(name, padding=padding)
    expected = reference_walks(name, batch, diagonal, monkeypatch)
    walks = chain_walks(enable_chain_attention(sharpened(name), diagonal=diagonal, **SETTINGS), batch)
    assert [walk.layer for walk in walks] == list(range(LAYERS)) == list(range(len(expected)))
    for walk, gamma, (matrix, attention) in zip(walks, GAMMAS, expected, strict=True):
        assert torch.equal(walk.gamma, of_heads(gamma))
        assert (walk.mixing - matrix).abs().max() <= 1e-10
        # negative control: gamma is felt
        assert ((walk.mixing - attention).abs().max() > 1e-3) == (walk.layer > 0)


@pytest.mark.parametrize("diagonal", ["kept", "removed"])
@pytest.mark.parametrize("name", ["llama", "bert"])
def test_moves_are_those_of_the_generating_function(name, diagonal, monkeypatch):
    """Oracle: a Fourier transform of ``M(z)``, made of the attention of the eager path."""
    batch = tiny_batch(name)
    expected = reference_walks(name, batch, diagonal, monkeypatch)
    walks = chain_walks(enable_chain_attention(sharpened(name), diagonal=diagonal, **SETTINGS), batch, max_moves=6)
    for walk, (_, attention) in zip(walks, expected, strict=True):
        assert walk.moves.shape == (3, 4, 12, 7)
        for head, gamma in enumerate(walk.gamma.tolist()):
            by_hand = coefficients(attention[:, head : head + 1], gamma, diagonal, 6)
            torch.testing.assert_close(walk.moves[:, head : head + 1], by_hand, rtol=0, atol=1e-9)


@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("name", TEXT_MODELS)
def test_no_walk_of_a_token_ends_in_padding(name, padding):
    """Oracle: exactly 0; without the mask some do."""
    batch = tiny_batch(name, padding=padding)
    real = batch["attention_mask"].bool()
    to_padding = (real[:, :, None] & ~real[:, None, :])[:, None]
    model = enable_chain_attention(sharpened(name))
    for walk in chain_walks(model, batch):
        assert walk.mixing.masked_select(to_padding).abs().max() == 0
        assert (walk.mixing.sum(-1).movedim(1, -1)[real] - 1).abs().max() <= 1e-12
    del batch["attention_mask"]
    felt = max(walk.mixing.masked_select(to_padding).max() for walk in chain_walks(model, batch))
    assert (felt > 0) == (name == "bert" or padding == "left")


@pytest.mark.parametrize("family", ["mistral", "gemma2", "gpt_neox", "t5", "bart"])
def test_mixing_the_values_of_a_module_gives_what_its_heads_return(family, monkeypatch):
    """Oracle: the output of the operation, with windows, softcaps, partial rotation and biases of position."""
    called, operation = [], integration.chain_attention

    def watched(query, key, value, **settings):
        called.append((value, operation(query, key, value, **settings)))
        return called[-1][1]

    monkeypatch.setattr(integration, "chain_attention", watched)
    ids = torch.randint(3, 97, (2, 20), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, :6] = 0
    given = {"input_ids": ids, "attention_mask": mask, "use_cache": False}
    if family in ("t5", "bart"):
        given |= {"decoder_input_ids": ids, "decoder_attention_mask": mask}
    walks = chain_walks(decoder(family, "chain"), given)
    chains = [walk for walk in walks if walk.gamma.any()]
    assert len(chains) == len(called) == 3
    # what is ordinary by its settings is shown with gamma 0; cross-attention is not there
    encoder = {"t5": 3, "bart": 2}.get(family, 0)
    assert sum("encoder.layers" in walk.module or "encoder.block" in walk.module for walk in walks) == encoder
    assert len(walks) == 3 + encoder
    for walk, (value, output) in zip(chains, called, strict=True):
        value = value.repeat_interleave(walk.mixing.shape[1] // value.shape[1], 1)
        assert (walk.mixing @ value - output).norm() <= 1e-5 * output.norm()


def test_learned_gammas_are_shown():
    """Oracle: the same model with these gammas as fixed numbers."""
    batch = tiny_batch("llama")
    model = enable_chain_attention(sharpened("llama"), gamma=0.5, learnable=True, per_head=True)
    numbers = torch.rand(LAYERS, 4, generator=torch.Generator().manual_seed(0)) * 0.98 + 0.01
    with torch.no_grad():
        for gate, row in zip(gates(model).values(), numbers, strict=True):
            gate.bias.copy_(row.logit())
    fixed = enable_chain_attention(sharpened("llama"), gamma=numbers.tolist())
    for learned, given in zip(chain_walks(model, batch), chain_walks(fixed, batch), strict=True):
        torch.testing.assert_close(learned.gamma, given.gamma, rtol=1e-5, atol=0)
        torch.testing.assert_close(learned.mixing, given.mixing, rtol=0, atol=1e-6)


def test_half_precision_is_looked_at_in_float32():
    """Oracle: the matrices of the same weights in float32; the measure: how precise bfloat16 is."""
    batch = tiny_batch("llama")
    exact = chain_walks(enable_chain_attention(tiny_model("llama", dtype=torch.float32)), batch)
    model = enable_chain_attention(tiny_model("llama", dtype=torch.bfloat16))
    for half, single in zip(chain_walks(model, batch), exact, strict=True):
        assert half.mixing.dtype == half.moves.dtype == torch.float32
        assert (half.mixing - single.mixing).abs().max() <= 2.0**-6


def remains(model):
    return [name for name, module in dispatching_modules(model) if "_chain_observer" in module.__dict__]


@pytest.mark.parametrize("fails", [False, True])
def test_the_model_is_left_as_it_was(fails):
    """Oracle: bit equality of outputs, and what hangs on the modules, after an error too."""
    model, batch = enable_chain_attention(sharpened("llama")), tiny_batch("llama")
    before = model(**batch).logits
    keys = {name: set(module.__dict__) for name, module in model.named_modules()}
    if fails:
        with pytest.raises(ValueError, match="max_moves must be at least 0"):
            chain_walks(model, batch, max_moves=-1)
    else:
        assert not any(walk.mixing.requires_grad for walk in chain_walks(model, batch))
    assert remains(model) == []
    assert {name: set(module.__dict__) for name, module in model.named_modules()} == keys
    for each in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(each(**batch).logits, before)


def test_a_new_cache_changes_nothing_and_a_used_one_is_refused():
    """Oracle: the same call without a cache."""
    model, ids = decoder("mistral", "chain"), torch.arange(3, 23)[None]
    with_cache, without = (chain_walks(model, {"input_ids": ids, "use_cache": use}) for use in (True, False))
    for one, other in zip(with_cache, without, strict=True):
        assert torch.equal(one.mixing, other.mixing)
    cache = DynamicCache(config=model.config)
    model(ids, past_key_values=cache)
    with pytest.raises(UnsupportedCacheError, match="all tokens at once, got 3 queries and"):
        chain_walks(model, {"input_ids": ids[:, :3], "past_key_values": cache})
    assert remains(model) == []


def test_a_compiled_model_is_looked_at_without_the_compiler():
    """Oracle: the model before it was compiled."""
    model, batch = enable_chain_attention(sharpened("llama")), tiny_batch("llama")
    expected = chain_walks(model, batch)
    around = torch.compile(model, backend="eager")
    model.compile(backend="eager")
    for compiled in (model, around):
        compiled(**batch)
        for walk, plain in zip(chain_walks(compiled, batch), expected, strict=True):
            assert torch.equal(walk.mixing, plain.mixing)
            assert walk.module.removeprefix("_orig_mod.") == plain.module
    torch.compiler.reset()


def test_of_a_model_made_of_several_only_what_chains_is_shown():
    """Oracle: names of modules."""
    model = enable_chain_attention(transformers.LlavaModel._from_config(llava(), attn_implementation="sdpa"))
    names = [walk.module for walk in chain_walks(model, {"input_ids": torch.arange(3, 9)[None]})]
    assert names == ["language_model.layers.0.self_attn"]


@pytest.mark.parametrize(
    ("model", "inputs", "error", "message"),
    [
        (lambda: "gpt2", {}, TypeError, "must be a module of torch, got str"),
        (lambda: torch.nn.Linear(2, 2), {}, ValueError, "needs a model with attn_implementation='chain'"),
        (lambda: decoder("gpt2", "chain"), torch.arange(3), TypeError, "called with, by name, got Tensor"),
        (lambda: decoder("gpt2", "ordinary"), {}, ValueError, "needs a model with attn_implementation='chain'"),
        (
            lambda: disable_chain_attention(decoder("gpt2", "chain")),
            {},
            ValueError,
            "needs a model with attn_implementation='chain'",
        ),
    ],
)
def test_what_has_no_walks_is_refused(model, inputs, error, message):
    with pytest.raises(error, match=message):
        chain_walks(model(), inputs)
