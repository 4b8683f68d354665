"""The operators inside torch.compile and torch.export: one graph, the same numbers, masks read at run time."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoModelForCausalLM, LlamaConfig, StaticCache

from hf_chainattn import chain_attention
from hf_chainattn.dropout import _backward_operator as dropout_backward
from hf_chainattn.dropout import draw_seed, read_out_with_dropout
from hf_chainattn.operator import _backward_operator, chain_attention_operator


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def draw(tokens=70, *, dtype=torch.float32, requires_grad=True):
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, 4, tokens, 8), (2, 2, tokens, 8), (2, 2, tokens, 5)]
    return [torch.randn(shape, generator=generator).to(dtype).requires_grad_(requires_grad) for shape in shapes]


CASES = {
    "causal": {},
    "removed": {"diagonal": "removed"},
    "window, softcap, padding": {"window": 9, "softcap": 3.0, "key_padding_mask": torch.arange(70).expand(2, -1) > 4},
    "bidirectional": {"is_causal": False},
    "dropout": {"dropout_p": 0.3},
}


@pytest.mark.parametrize("case", list(CASES))
def test_one_graph_gives_the_same_values_and_gradients(case):
    """Oracle: the same call without the compiler."""

    def function(query, key, value, gamma):
        return chain_attention(query, key, value, gamma=gamma.sigmoid(), **CASES[case])

    leaves = [*draw(), torch.linspace(-1, 3, 4, requires_grad=True)]
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    results = []
    for call in (function, compiled):
        torch.manual_seed(0)
        output = call(*leaves)
        results.append([output, *torch.autograd.grad(output.square().sum(), leaves)])
    for plain, traced in zip(*results, strict=True):
        torch.testing.assert_close(traced, plain, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("tokens", [70, 150])
def test_operators_return_the_strides_that_they_promise(tokens):
    """Oracle: the fake operators. A bias looked up in a table is often transposed, and inductor relies on strides."""
    query, key, value = draw(tokens, requires_grad=False)
    bias = torch.randn(tokens, tokens, 4).permute(2, 0, 1)
    gamma = torch.full((4,), 0.9)
    masks, settings = (None, None), (True, 0.3, None, False, None, "raise")
    output, *record = chain_attention_operator(
        query, key, value, gamma, 1 - gamma, bias, *masks, None, True, *settings
    )
    given = (query, key, value, gamma, 1 - gamma, bias, *masks)
    backward = (output, None, *given, *record, None, True, *settings, True, True)
    seed = draw_seed(None)
    dropped = (output, query, key, record[0], record[2], bias, *masks, seed, None, True, 0.3, None, 0.2, True)
    for operator, arguments in ((_backward_operator, backward), (dropout_backward, dropped)):
        real = operator(*arguments)
        with FakeTensorMode(allow_non_fake_inputs=True):
            fake = operator(*arguments)
        assert [tensor.stride() for tensor in real] == [tensor.stride() for tensor in fake]


def test_a_compiled_graph_reads_the_mask_it_is_given():
    """Oracle: the call without the compiler, for a causal mask, a prefix mask and a padded one in the same graph."""
    query, key, value = draw(requires_grad=False)
    graphs = []

    def backend(graph, example_inputs):
        graphs.append(graph)
        return graph

    def function(mask):
        return chain_attention(query, key, value, gamma=0.9, attn_mask=mask)

    compiled = torch.compile(function, fullgraph=True, backend=backend)
    causal = torch.ones(70, 70, dtype=torch.bool).tril()
    prefix, padded = causal.clone(), causal.clone()
    prefix[:20, :20], padded[:, :9] = True, False
    for mask in (causal, prefix, padded):
        torch.testing.assert_close(compiled(mask), function(mask))
    assert len(graphs) == 1


def test_a_model_compiles_into_one_graph_and_follows_its_settings():
    """Oracle: the model without the compiler, before and after gamma is changed in the config."""
    config = LlamaConfig(
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=50,
        use_cache=False,
    )
    config.chain_attention = {"gamma": 0.9}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="chain")
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    batch = {"input_ids": torch.arange(24).view(2, 12), "attention_mask": torch.ones(2, 12, dtype=torch.long)}
    batch["attention_mask"][0, 8:] = 0
    outputs = []
    for gamma in (0.9, 0.2):
        config.chain_attention = {"gamma": gamma}
        outputs.append(compiled(**batch).logits)
        torch.testing.assert_close(outputs[-1], model(**batch).logits)
    assert not torch.allclose(*outputs)
    outputs[-1].sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_export_keeps_the_operator():
    """Oracle: the module itself, on other numbers than those it was exported with."""

    class Layer(torch.nn.Module):
        def forward(self, query, key, value, padding):
            return chain_attention(query, key, value, gamma=0.9, key_padding_mask=padding)

    tensors = draw(requires_grad=False)
    program = torch.export.export(Layer(), (*tensors, torch.ones(2, 70, dtype=torch.bool)))
    assert "hf_chainattn.chain_attention" in program.graph_module.code
    other = [2 * tensor.flip(2) for tensor in tensors]
    padding = torch.arange(70).expand(2, -1) > 10
    torch.testing.assert_close(program.module()(*other, padding), Layer()(*other, padding))


@pytest.mark.parametrize(("causal", "tokens"), [(True, 20), (True, 140), (False, 20)])
def test_operators_are_registered_soundly(causal, tokens):
    """Oracle: torch.library.opcheck: schema, fake shapes, autograd registration, dynamic shapes."""
    query, key, value = draw(tokens)
    gamma = torch.full((4,), 0.9, requires_grad=True)
    bias = torch.randn(4, 1, tokens, requires_grad=True)
    masks = (bias, torch.ones(2, tokens).bool(), None, None, causal)
    settings = (0.3, None)
    arguments = (query, key, value, gamma, 1 - gamma.detach(), *masks, True, *settings, False, None, "raise")
    torch.library.opcheck(chain_attention_operator, arguments)
    with torch.no_grad():
        output, *record = chain_attention_operator(*arguments)
    inputs = [tensor.detach() for tensor in arguments[:5]]
    given = (masks[0].detach(), *masks[1:3])
    backward = (output, None, *inputs, *given, *record, *masks[3:], True, *settings, False, None, "raise", True, True)
    # the backward has no derivative, which its registration says
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(_backward_operator, backward, test_utils=checks)
    seed = draw_seed(None)
    read = (query, key, record[0].requires_grad_(), record[2], *masks, *settings, 0.2, seed)
    torch.library.opcheck(read_out_with_dropout, read)
    detached = [tensor.detach() for tensor in read[:4]]
    back = (output, *detached, *given, seed, *masks[3:], *settings, 0.2, True)
    torch.library.opcheck(dropout_backward, back, test_utils=checks)


def test_a_decode_step_compiles_once_for_all_tokens():
    """Oracle: the same steps without the compiler. The cache is static; the graph is one, whatever the position."""
    sizes = {"num_hidden_layers": 2, "hidden_size": 32, "intermediate_size": 64, "vocab_size": 64}
    config = LlamaConfig(num_attention_heads=4, num_key_value_heads=2, **sizes)
    config.chain_attention = {"gamma": 0.9}
    model = AutoModelForCausalLM.from_config(config, attn_implementation="chain").eval()
    ids = torch.randint(64, (2, 12), generator=torch.Generator().manual_seed(0))
    graphs, results = [], []

    def backend(graph, example_inputs):
        graphs.append(graph)
        return graph.forward

    for step in (model, torch.compile(model, fullgraph=True, backend=backend)):
        cache = StaticCache(config=config, max_cache_len=16)
        with torch.no_grad():
            logits = [model(ids[:, :6], past_key_values=cache).logits]
            for token in range(6, 12):
                position = torch.tensor([[token]])
                logits.append(step(ids[:, token : token + 1], past_key_values=cache, position_ids=position).logits)
        results.append(torch.cat(logits, 1))
    torch.testing.assert_close(results[1], results[0], rtol=1e-5, atol=1e-5)
    assert len(graphs) == 1
