"""Generation with caches: cached and uncached logits and tokens agree, for every family, cache and strategy."""

import copy
import gc
import io
import json
import pickle
import subprocess
import sys
import weakref

import pytest
import torch
from transformers import DynamicCache, EncoderDecoderCache, StaticCache
from transformers.cache_utils import (
    Cache,
    DynamicIndexedLayer,
    Fp8QuantizedLayer,
    LinearAttentionAndFullAttentionLayer,
)

from hf_chainattn import UnsupportedCacheError, disable_chain_attention, enable_chain_attention
from hf_chainattn.cache import ChainLayer
from tests.helpers.decoders import ENCODER_DECODERS, FAMILIES, VOCAB, WINDOW, decoder

TOKENS = 3 * WINDOW
CHUNKS = {
    "prefill": [TOKENS],
    "prefill, then token by token": [11] + [1] * (TOKENS - 11),
    "token by token": [1] * TOKENS,
    "chunks": [5, 7, TOKENS - 12],
    "window at once, then chunks": [WINDOW, 1, 6, TOKENS - WINDOW - 7],
}


def ids_of(tokens=TOKENS, batch=2, seed=0):
    return torch.randint(3, VOCAB, (batch, tokens), generator=torch.Generator().manual_seed(seed))


def inputs(family, ids, mask=None):
    """The arguments of a forward pass, and under which name the tokens that are decoded go."""
    if family in ENCODER_DECODERS:
        given = {"input_ids": ids_of(9, len(ids), seed=1), "decoder_input_ids": ids}
        return given | ({} if mask is None else {"decoder_attention_mask": mask}), "decoder_"
    return {"input_ids": ids} | ({} if mask is None else {"attention_mask": mask}), ""


@torch.no_grad()
def in_chunks(model, family, chunks, mask=None, cache=None):
    """Logits of the same tokens, given in chunks, with a cache."""
    given, prefix = inputs(family, ids_of(), mask)
    logits, start = [], 0
    for size in chunks:
        stop = start + size
        now = given | {f"{prefix}input_ids": given[f"{prefix}input_ids"][:, start:stop]}
        if mask is not None:
            now[f"{prefix}attention_mask"] = mask[:, :stop]
        result = model(**now, past_key_values=cache, use_cache=True)
        cache, start = result.past_key_values, stop
        logits.append(result.logits)
    return torch.cat(logits, 1)


@torch.no_grad()
def at_once(model, family, mask=None):
    return model(**inputs(family, ids_of(), mask)[0], use_cache=False).logits


@pytest.mark.parametrize("chunks", list(CHUNKS))
@pytest.mark.parametrize("family", list(FAMILIES))
def test_logits_with_a_cache_are_those_without(family, chunks):
    """Oracle: the whole sequence at once, without a cache; three windows long."""
    model = decoder(family, "chain")
    whole = at_once(model, family)
    assert (in_chunks(model, family, CHUNKS[chunks]) - whole).abs().max() <= 1e-5 * whole.abs().max()
    # the model is one in which the chain matters
    assert (at_once(decoder(family, "ordinary"), family) - whole).abs().max() > 0.05 * whole.abs().max()


@pytest.mark.parametrize("family", list(FAMILIES))
def test_a_cache_of_plain_values_fails_the_same_test(family, monkeypatch):
    """Negative control: what the cache holds is felt."""

    def keep_plain_values(self, u):
        self.waiting, self.used = 0, True

    monkeypatch.setattr(ChainLayer, "commit", keep_plain_values)
    model = decoder(family, "chain")
    whole = at_once(model, family)
    for chunks in ("prefill, then token by token", "token by token", "chunks"):
        assert (in_chunks(model, family, CHUNKS[chunks]) - whole).abs().max() > 1e-2 * whole.abs().max()


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2", "opt"])
def test_left_padding_is_not_felt(family):
    """Oracle: the row alone and without padding, in one pass."""
    mask = torch.ones(2, TOKENS, dtype=torch.long)
    mask[1, :7] = 0
    model = decoder(family, "chain")
    whole = at_once(model, family, mask)
    for chunks in CHUNKS.values():
        if sum(chunks[:1]) < 8:
            continue
        found = in_chunks(model, family, chunks, mask)
        real = mask.bool()
        assert (found[real] - whole[real]).abs().max() <= 1e-5 * whole.abs().max()


@pytest.mark.parametrize("family", [family for family in FAMILIES if family not in ENCODER_DECODERS])
@pytest.mark.parametrize("chunks", ["prefill, then token by token", "token by token", "window at once, then chunks"])
def test_a_static_cache_gives_the_same_logits(family, chunks):
    """Oracle: the whole sequence at once. Gemma, Mistral: static windows."""
    model = decoder(family, "chain")
    whole = at_once(model, family)
    cache = StaticCache(config=model.config, max_cache_len=TOKENS + 3)
    assert (in_chunks(model, family, CHUNKS[chunks], cache=cache) - whole).abs().max() <= 1e-5 * whole.abs().max()
    # the same memory once more
    cache.reset()
    assert (in_chunks(model, family, CHUNKS[chunks], cache=cache) - whole).abs().max() <= 1e-5 * whole.abs().max()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", ["gpt2", "llama", "mistral"])
def test_half_precision_costs_what_it_costs_ordinary_attention(family, dtype):
    """Oracle: each implementation's own float32 logits; the measure: how far sdpa is off with its cache."""
    errors = {}
    for implementation in ("chain", "ordinary"):
        model = decoder(family, implementation)
        exact = at_once(model, family)
        found = in_chunks(model.to(dtype), family, CHUNKS["prefill, then token by token"])
        errors[implementation] = ((found.float() - exact).norm() / exact.norm()).item()
    assert errors["chain"] <= 2.5 * errors["ordinary"]


STRATEGIES = {
    "greedy": {},
    "sampling": {"do_sample": True, "top_k": 12},
    "beams": {"num_beams": 3},
    "sampled beams": {"num_beams": 3, "do_sample": True},
    "prompt lookup": {"prompt_lookup_num_tokens": 3},
    "assistant": {"assistant": True},
}
CACHES = ["dynamic", "static"]


def generated(model, family, strategy, cache, batch, padded):
    """Tokens that a model generates, with their scores; ``cache`` None: without."""
    options = dict(STRATEGIES[strategy])
    if options.pop("assistant", False):
        # another model, so that some of its proposals are refused
        options["assistant_model"] = decoder(family, "ordinary", seed=1)
        options["assistant_model"].generation_config.num_assistant_tokens = 3
    prompt = ids_of(12, batch, seed=2)
    # something to look up
    prompt[:, 6:9] = prompt[:, 2:5]
    mask = torch.ones_like(prompt)
    if padded:
        mask[0, :4] = 0
        prompt[0, :4] = 0
    if cache is None:
        options["use_cache"] = False
    elif cache == "static":
        options |= {"cache_implementation": "static", "disable_compile": True}
    torch.manual_seed(0)
    return model.generate(prompt, attention_mask=mask, max_new_tokens=14, min_new_tokens=14, pad_token_id=0, **options)


# with random weights T5, which sees no more of places than their distance, repeats one token, which proves nothing
@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("strategy", list(STRATEGIES))
@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "t5"])
def test_generate_gives_the_tokens_that_it_gives_without_a_cache(family, strategy, cache):
    """Oracle: generation without a cache, greedy where the strategy needs one; only what sdpa can do is asked for."""
    compared = 0
    for batch, padded in ((1, False), (2, False), (2, True)):
        if padded and family in ENCODER_DECODERS:
            continue
        try:
            generated(decoder(family, "ordinary"), family, strategy, cache, batch, padded)
        except (ValueError, RuntimeError, NotImplementedError, AttributeError, TypeError):
            continue
        model = decoder(family, "chain")
        found = generated(model, family, strategy, cache, batch, padded)
        # both of these decode greedily, only faster
        plain = "greedy" if strategy in ("prompt lookup", "assistant") else strategy
        assert torch.equal(found, generated(model, family, plain, None, batch, padded))
        assert len(found.unique()) > 8
        compared += 1
    # only assisted decoding has combinations that transformers does not offer at all
    assert compared or strategy in ("prompt lookup", "assistant")


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_a_recorded_past_can_be_cropped(family):
    """Oracle: the tokens that remain, from a new cache; with windows, beyond their length."""
    model = decoder(family, "chain")
    ids = ids_of()
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(ids[:, :12], past_key_values=cache)
        for layer in cache.layers:
            if hasattr(layer, "activate_past_recording"):
                layer.activate_past_recording()
        model(ids[:, 12:15], past_key_values=cache)
        # three guesses, of which one is right
        model(torch.cat([ids[:, 15:16], ids[:, :2]], 1), past_key_values=cache)
        cache.crop(-2)
        found = model(ids[:, 16:20], past_key_values=cache).logits
    whole = at_once(model, family)[:, 16:20]
    assert (found - whole).abs().max() <= 1e-5 * whole.abs().max()


def test_batches_of_a_cache_can_be_repeated_selected_and_reordered():
    """Oracle: the rows treated alike in the whole sequence."""
    model = decoder("llama", "chain")
    ids = ids_of()
    with torch.no_grad():
        cache = model(ids[:, :10], use_cache=True).past_key_values
        cache.batch_repeat_interleave(2)
        cache.reorder_cache(torch.tensor([3, 0, 1, 2]))
        cache.batch_select_indices(torch.tensor([0, 1, 3]))
        rows = ids.repeat_interleave(2, 0)[[3, 0, 1, 2]][[0, 1, 3]]
        found = model(rows[:, 10:], past_key_values=cache).logits
        whole = model(rows, use_cache=False).logits[:, 10:]
    assert (found - whole).abs().max() <= 1e-5 * whole.abs().max()


def test_a_growing_cache_seldom_moves():
    """Oracle: places in memory, and logits. Room is made once for many tokens, and again after a reordering."""
    model = decoder("llama", "chain")
    ids, places = ids_of(), []
    with torch.inference_mode():
        cache = model(ids[:, :8]).past_key_values
        logits = []
        for token in range(8, TOKENS):
            logits.append(model(ids[:, token : token + 1], past_key_values=cache).logits)
            places.append(cache.layers[0].values.data_ptr())
            if token == 15:
                cache.reorder_cache(torch.tensor([0, 1]))
    assert len(set(places[:8])) == len(set(places[8:])) == 1
    whole = at_once(model, "llama")[:, 8:]
    assert (torch.cat(logits, 1) - whole).abs().max() <= 1e-5 * whole.abs().max()
    # outside of inference mode, what was made inside cannot be written to
    with torch.no_grad():
        model(ids[:, :1], past_key_values=cache)
    again = copy.deepcopy(cache)
    with torch.no_grad():
        first, second = (model(ids[:, 1:2], past_key_values=each).logits for each in (cache, again))
    assert torch.equal(first, second)


def test_the_cache_holds_a_row_of_u_for_every_query_head():
    model = decoder("llama", "chain")
    cache = model(ids_of(), use_cache=True).past_key_values
    assert all(layer.keys.shape[1] == 2 and layer.values.shape[1] == 4 for layer in cache.layers)


def test_gradients_pass_through_a_cache():
    """Oracle: the gradient of the same loss without a cache."""
    gradients = []
    for use_cache in (False, True):
        model = decoder("llama", "chain").train()
        if use_cache:
            first = model(ids_of()[:, :10], use_cache=True)
            rest = model(ids_of()[:, 10:], past_key_values=first.past_key_values).logits
            logits = torch.cat([first.logits, rest], 1)
        else:
            logits = model(ids_of(), use_cache=False).logits
        logits.logsumexp(-1).sum().backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    for plain, cached in zip(*gradients, strict=True):
        assert (plain - cached).norm() <= 1e-4 * plain.norm()


@pytest.mark.parametrize("fails", [False, True])
def test_a_model_keeps_nothing_of_a_cache(fails):
    """Oracle: a weak reference; the model can be copied, pickled and saved, after an error in its forward too."""
    model = decoder("llama", "chain")
    cache = DynamicCache(config=model.config)
    model(ids_of(), past_key_values=cache)
    if fails:
        with pytest.raises(RuntimeError):
            model(ids_of(batch=3), past_key_values=cache)
    gone = weakref.ref(cache.layers[0])
    del cache
    gc.collect()
    assert gone() is None
    ids = ids_of()
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(again(ids).logits, model(ids).logits)
    torch.save(model, io.BytesIO())


def test_a_cache_that_lost_a_forward_pass_is_refused():
    model = decoder("llama", "chain")
    cache = DynamicCache(config=model.config)
    with pytest.raises(ValueError, match="attn_mask must be broadcastable"), torch.no_grad():
        # a mask that does not fit: the layers were updated, and nothing was attended to
        model(ids_of(), attention_mask=torch.ones(2, 1, 5, 7).bool(), past_key_values=cache)
    with pytest.raises(UnsupportedCacheError, match="did not finish"):
        model(ids_of(), past_key_values=cache)


def test_caches_do_not_change_hands():
    """A chain's cache is no cache of plain values, and the other way round."""
    chain, ordinary = decoder("gpt2", "chain"), decoder("gpt2", "ordinary")
    ids = ids_of()
    with torch.no_grad():
        plain = ordinary(ids, use_cache=True).past_key_values
        with pytest.raises(UnsupportedCacheError, match="filled without chain attention"):
            chain(ids, past_key_values=plain)
        mixed = chain(ids, use_cache=True).past_key_values
        with pytest.raises(UnsupportedCacheError, match="model without it"):
            ordinary(ids, past_key_values=mixed)
        mixed = chain(ids, use_cache=True).past_key_values
        disable_chain_attention(chain)
        with pytest.raises(UnsupportedCacheError, match="model without it"):
            chain(ids, past_key_values=mixed)


@pytest.mark.parametrize("kind", [Fp8QuantizedLayer, DynamicIndexedLayer, LinearAttentionAndFullAttentionLayer])
def test_other_kinds_of_layers_are_refused_by_name(kind):
    cache = Cache(layers=[kind() for _ in range(3)])
    with pytest.raises(UnsupportedCacheError, match=f"cannot keep its mixed values in a {kind.__name__}"):
        decoder("llama", "chain")(ids_of(), past_key_values=cache)


def test_an_offloaded_cache_is_refused():
    cache = DynamicCache()
    cache.offloading = True
    with pytest.raises(UnsupportedCacheError, match="offloaded"):
        decoder("llama", "chain")(ids_of(), past_key_values=cache)


def test_cross_attention_stays_ordinary():
    """Oracle: BART with gamma = 0 everywhere is ordinary BART, cross-attention included; its caches too."""
    ordinary, chain = decoder("bart", "ordinary"), decoder("bart", "chain", gamma=0.0)
    whole = at_once(ordinary, "bart")
    cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
    found = in_chunks(chain, "bart", CHUNKS["chunks"], cache=cache)
    assert (found - whole).abs().max() <= 1e-5 * whole.abs().max()
    assert all(isinstance(layer, ChainLayer) for layer in cache.self_attention_cache.layers)
    assert not any(isinstance(layer, ChainLayer) for layer in cache.cross_attention_cache.layers)


@pytest.mark.parametrize("imported", [True, False])
def test_a_saved_model_generates_the_same_in_a_fresh_process(imported, tmp_path):
    """Oracle: the tokens of this process; without the package, the error of transformers that the guide quotes."""
    model = enable_chain_attention(decoder("llama", "chain"), gamma=0.8, learnable=True, per_head=True)
    model.generation_config.pad_token_id = 0
    model.save_pretrained(tmp_path)
    script = (
        f"{'import hf_chainattn; ' if imported else ''}import torch; from transformers import AutoModelForCausalLM; "
        f"model = AutoModelForCausalLM.from_pretrained({str(tmp_path)!r}); "
        "print(model.generate(torch.arange(5, 15)[None], max_new_tokens=12, do_sample=False)[0].tolist())"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=200)
    if not imported:
        assert result.returncode == 1
        assert 'Specified `attn_implementation="chain"` is not supported' in result.stderr
        return
    tokens = model.generate(torch.arange(5, 15)[None], max_new_tokens=12, do_sample=False)[0].tolist()
    assert json.loads(result.stdout.splitlines()[-1]) == tokens
