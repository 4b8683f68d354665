"""Adapters of PEFT carry what attention they were trained with, and no model that uses another one takes them."""

import json
import subprocess
import sys

import peft
import pytest
import torch
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from peft.config import PeftConfigMixin
from peft.utils import hotswap
from transformers import AutoModelForCausalLM, Trainer
from transformers.integrations.peft import PeftAdapterMixin

import hf_chainattn
from hf_chainattn import AdapterError, GammaSchedule, adapters, disable_chain_attention, enable_chain_attention
from tests.chainattn.test_gates import arguments
from tests.chainattn.test_models import llava
from tests.helpers.adapters import LORA, ROUTES, Base, logits
from tests.helpers.decoders import VOCAB, decoder

SETTINGS = {"gamma": 0.8}


def adapted(model, **others):
    """A model with an adapter whose weights are not 0."""
    torch.manual_seed(1)
    return get_peft_model(model, LoraConfig(**LORA | {"init_lora_weights": False} | others)).eval()


@pytest.fixture(scope="module")
def adapter(checkpoint, tmp_path_factory):
    """A folder with an adapter of a chain, and the logits it gave."""
    folder = tmp_path_factory.mktemp("adapter")
    model = adapted(Base(checkpoint, SETTINGS)())
    model.save_pretrained(folder)
    return str(folder), logits(model)


def recorded(folder):
    return json.loads((folder / "adapter_config.json").read_text()).get("chain_attention")


@pytest.mark.parametrize(
    "settings",
    [
        None,
        {"gamma": 0.8, "diagonal": "kept"},
        {"gamma": 0.5, "diagonal": "removed", "layers": [0, 2]},
        {"gamma": [0.1, [0.2, 0.3, 0.4, 0.5], 0.6], "diagonal": "kept"},
        {"gamma": 0.9, "diagonal": "kept", "learnable": True, "per_head": True},
    ],
)
def test_the_folder_of_an_adapter_says_what_attention_its_model_used(settings, checkpoint, tmp_path):
    """Oracle: the form that config.json has; whatever PEFT writes beside it is as it was."""
    base = Base(checkpoint, settings)
    adapted(base()).save_pretrained(tmp_path)
    assert recorded(tmp_path) == settings
    hf_chainattn.unregister()
    try:
        adapted(Base(checkpoint)()).save_pretrained(tmp_path / "plain")
    finally:
        hf_chainattn.register()
    theirs = json.loads((tmp_path / "plain" / "adapter_config.json").read_text())
    ours = json.loads((tmp_path / "adapter_config.json").read_text())
    assert {key: value for key, value in ours.items() if key != "chain_attention"} == theirs


@pytest.mark.parametrize("route", list(ROUTES))
def test_on_an_equal_base_the_logits_are_bit_equal(route, checkpoint, adapter):
    """Oracle: the logits before the adapter was saved."""
    folder, before = adapter
    assert torch.equal(logits(ROUTES[route](Base(checkpoint, SETTINGS), folder)), before)


OTHERS = {
    "ordinary": None,
    "gamma": {"gamma": 0.7},
    "diagonal": {"gamma": 0.8, "diagonal": "removed"},
    "layers": {"gamma": 0.8, "layers": [0, 1]},
    "learnable": {"gamma": 0.8, "learnable": True},
}


@pytest.mark.parametrize(
    ("other", "route"),
    [*((other, "PeftModel.from_pretrained") for other in OTHERS), *(("gamma", route) for route in list(ROUTES)[1:])],
)
def test_on_another_attention_an_adapter_is_refused(other, route, checkpoint, adapter, monkeypatch):
    """Negative control: without the comparison it is loaded, and computes something else."""
    folder, before = adapter
    base = Base(checkpoint, OTHERS[other])
    with pytest.raises(AdapterError, match=r"trained with chain attention at .*0\.8.*, and this model uses"):
        ROUTES[route](base, folder)
    if route == "PeftModel.from_pretrained":
        monkeypatch.setattr(adapters, "check", lambda *_: None)
        # a gate that begins at 0.8 is 0.8 up to rounding
        assert other == "learnable" or (logits(ROUTES[route](base, folder)) - before).abs().max() > 1e-2


@pytest.mark.parametrize("route", ["PeftModel.from_pretrained", "transformers' load_adapter"])
def test_a_model_that_refused_an_adapter_is_as_it_was(route, checkpoint, adapter):
    """Oracle: names and values of all parameters, and that the way out which the error names is one."""
    folder, before = adapter
    model = Base(checkpoint)()
    weights = dict(model.state_dict())
    with pytest.raises(AdapterError) as refused:
        ROUTES[route](lambda: model, folder)
    assert list(model.state_dict()) == list(weights)
    assert all(parameter.requires_grad for parameter in model.parameters())
    way_out = str(refused.value).partition("enable_chain_attention")[2].partition(", or give")[0]
    eval(f"enable_chain_attention{way_out}", {"enable_chain_attention": enable_chain_attention, "model": model})
    assert torch.equal(logits(ROUTES[route](lambda: model, folder)), before)


def test_an_adapter_of_ordinary_attention_is_refused_by_a_chain(checkpoint, tmp_path):
    """Gamma 0 is ordinary attention; and the way out which the error names is one."""
    adapted(Base(checkpoint)()).save_pretrained(tmp_path)
    assert recorded(tmp_path) is None
    with pytest.raises(AdapterError, match=r"trained with ordinary attention, .* Load it into an ordinary model"):
        PeftModel.from_pretrained(Base(checkpoint, SETTINGS)(), tmp_path)
    zero = PeftModel.from_pretrained(Base(checkpoint, {"gamma": 0.0})(), tmp_path)
    model = PeftModel.from_pretrained(Base(checkpoint)(), tmp_path)
    torch.testing.assert_close(logits(zero), logits(model), rtol=1e-4, atol=1e-4)
    enable_chain_attention(model.get_base_model(), **SETTINGS)
    assert (logits(model) - logits(zero)).abs().max() > 1e-2


def test_a_base_that_was_saved_as_a_chain_needs_nothing_more(tmp_path):
    """Oracle: bit equality, where the adapter's folder is all that is named."""
    decoder("llama", "chain", gamma=0.6).save_pretrained(tmp_path / "base")
    model = adapted(AutoModelForCausalLM.from_pretrained(tmp_path / "base"))
    model.save_pretrained(tmp_path / "adapter")
    for auto in (AutoModelForCausalLM, AutoPeftModelForCausalLM):
        assert torch.equal(logits(auto.from_pretrained(tmp_path / "adapter")), logits(model))


def test_in_a_fresh_process(checkpoint, adapter, tmp_path):
    """Oracle: the logits of this process. PEFT is imported by the user alone, when his model is there already."""
    folder, before = adapter
    torch.save(before, tmp_path / "logits.pt")
    script = f"""
import importlib.util, sys
import hf_chainattn, torch
waiting = list(sys.meta_path)
hf_chainattn.unregister()
assert waiting[-len(sys.meta_path):] == sys.meta_path != waiting
hf_chainattn.register()
from transformers import AutoModelForCausalLM
def base(**asked): return AutoModelForCausalLM.from_pretrained({checkpoint!r}, **asked)
ordinary, chain = base(), base(attn_implementation="chain", chain_attention={SETTINGS!r})
assert importlib.util.find_spec("peft").origin.endswith("__init__.py")
assert "peft" not in sys.modules
from peft import PeftModel
try:
    PeftModel.from_pretrained(ordinary, {folder!r})
except hf_chainattn.AdapterError:
    print("refused")
logits = PeftModel.from_pretrained(chain, {folder!r})(input_ids=torch.arange(5, 25)[None], use_cache=False).logits
print(torch.equal(logits, torch.load({str(tmp_path / "logits.pt")!r})))
"""
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=250)
    assert result.stdout.split() == ["refused", "True"], result.stderr


def test_without_the_package_peft_says_that_there_is_something_it_does_not_know(checkpoint, adapter):
    """The least that an adapter can do in a process that never heard of chain attention."""
    hf_chainattn.unregister()
    try:
        with pytest.warns(UserWarning, match=r"Unexpected keyword arguments \['chain_attention'\]"):
            PeftModel.from_pretrained(Base(checkpoint)(), adapter[0])
    finally:
        hf_chainattn.register()


def test_what_a_config_knows_it_keeps(checkpoint, adapter, tmp_path):
    """A config that is loaded and saved by itself, without a model."""
    config = peft.PeftConfig.from_pretrained(adapter[0])
    config.save_pretrained(tmp_path)
    assert recorded(tmp_path) == {"gamma": 0.8, "diagonal": "kept"}
    assert "chain_attention" not in config.to_dict()


def test_an_adapter_that_is_not_used_keeps_what_it_was_trained_with(checkpoint, adapter, tmp_path):
    """Two adapters in one model, whose gamma changed between them."""
    model = PeftModel.from_pretrained(Base(checkpoint, SETTINGS)(), adapter[0], "old")
    model.add_adapter("new", LoraConfig(**LORA))
    model.set_adapter("new")
    enable_chain_attention(model.get_base_model(), gamma=0.3)
    model.save_pretrained(tmp_path)
    assert recorded(tmp_path / "old") == {"gamma": 0.8, "diagonal": "kept"}
    assert recorded(tmp_path / "new") == {"gamma": 0.3, "diagonal": "kept"}
    PeftModel.from_pretrained(Base(checkpoint, {"gamma": 0.3})(), tmp_path / "new")
    with pytest.raises(AdapterError):
        PeftModel.from_pretrained(Base(checkpoint, {"gamma": 0.3})(), tmp_path / "old")


def test_adapters_of_transformers_itself_are_saved_with_it_too(checkpoint, tmp_path):
    """Oracle: bit equality after add_adapter, save_pretrained and a load by either library."""
    model = Base(checkpoint, SETTINGS)()
    torch.manual_seed(1)
    model.add_adapter(LoraConfig(**LORA | {"init_lora_weights": False}))
    model.save_pretrained(tmp_path)
    assert recorded(tmp_path) == {"gamma": 0.8, "diagonal": "kept"}
    for route in ("PeftModel.from_pretrained", "transformers' load_adapter"):
        assert torch.equal(logits(ROUTES[route](Base(checkpoint, SETTINGS), tmp_path)), logits(model))
    with pytest.raises(AdapterError):
        ROUTES["transformers' load_adapter"](Base(checkpoint), tmp_path)


def test_a_soft_prompt_is_an_adapter_too(checkpoint, tmp_path):
    """Oracle: bit equality, and the refusal."""
    torch.manual_seed(1)
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    model = get_peft_model(Base(checkpoint, SETTINGS)(), config)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(Base(checkpoint, SETTINGS)(), tmp_path)
    assert torch.equal(logits(again), logits(model))
    with pytest.raises(AdapterError):
        PeftModel.from_pretrained(Base(checkpoint)(), tmp_path)


def test_an_adapter_is_not_swapped_for_one_of_another_attention(checkpoint, adapter, tmp_path):
    """Oracle: the logits of the model that the weights came from."""
    folder, before = adapter
    model = adapted(Base(checkpoint, SETTINGS)(), r=LORA["r"])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.mul_(1.5 if "lora_" in name else 1.0)
    hotswap.hotswap_adapter(model, folder, "default")
    assert torch.equal(logits(model), before)
    adapted(Base(checkpoint, {"gamma": 0.3})()).save_pretrained(tmp_path)
    with pytest.raises(AdapterError):
        hotswap.hotswap_adapter(model, str(tmp_path), "default")
    assert torch.equal(logits(model), before)


def test_parts_of_a_model_are_told_apart(tmp_path):
    """A chain in the text decoder is none in the vision tower; what is wrapped around a model does not matter."""
    import transformers

    def base(*, tower):
        config = llava()
        asked = {"vision_config" if tower else "text_config": "chain"}
        config.chain_attention = {"gamma": 0.7}
        return transformers.LlavaForConditionalGeneration._from_config(config, attn_implementation=asked)

    lora = LoraConfig(target_modules=["q_proj"], r=2)
    get_peft_model(base(tower=False), lora).save_pretrained(tmp_path)
    assert recorded(tmp_path) == {"text_config": {"gamma": 0.7, "diagonal": "kept"}}
    PeftModel.from_pretrained(base(tower=False), tmp_path)
    with pytest.raises(AdapterError, match=r"in text_config, and .* in vision_config, .*Switch the same parts"):
        PeftModel.from_pretrained(base(tower=True), tmp_path)
    wrapped = torch.nn.Sequential(torch.nn.Identity(), base(tower=False))
    assert adapters.attention_of(wrapped) == recorded(tmp_path)
    pair = torch.nn.ModuleList([base(tower=True), base(tower=False)])
    assert list(adapters.attention_of(pair)) == ["0.vision_config", "1.text_config"]


def test_merging_an_adapter_keeps_the_chain(checkpoint, adapter, tmp_path):
    """Oracle: the logits before; bit equality after a reload. Switched back, nothing of the chain is left."""
    folder, before = adapter
    model = PeftModel.from_pretrained(Base(checkpoint, SETTINGS)(), folder).merge_and_unload()
    torch.testing.assert_close(logits(model), before, rtol=1e-4, atol=1e-4)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert again.config.chain_attention == {"gamma": 0.8, "diagonal": "kept"}
    assert torch.equal(logits(again), logits(model))
    disable_chain_attention(model)
    assert not [module for module in model.modules() if module._forward_pre_hooks]


def train(model, folder, *, callbacks=(), resume=None):
    settings = arguments(folder, max_steps=4, save_strategy="steps", save_steps=2)
    rows = torch.randint(3, VOCAB, (16, 12), generator=torch.Generator().manual_seed(0))
    texts = [{"input_ids": row, "labels": row} for row in rows]
    Trainer(model, settings, train_dataset=texts, callbacks=list(callbacks)).train(resume_from_checkpoint=resume)


def fresh(checkpoint, gamma):
    torch.manual_seed(0)
    return get_peft_model(Base(checkpoint, {"gamma": gamma})(), LoraConfig(**LORA | {"lora_dropout": 0.0}))


def test_an_adapter_is_trained_and_resumed_by_trainer(checkpoint, tmp_path):
    """Oracle: the same training without an interruption, bit by bit."""
    whole = fresh(checkpoint, 0.8)
    train(whole, tmp_path / "run")
    stopped = tmp_path / "run" / "checkpoint-2"
    assert recorded(stopped) == {"gamma": 0.8, "diagonal": "kept"}
    again = fresh(checkpoint, 0.8)
    train(again, tmp_path / "again", resume=str(stopped))
    assert torch.equal(logits(again), logits(whole))
    assert not torch.equal(logits(again), logits(fresh(checkpoint, 0.8)))
    with pytest.raises(AdapterError):
        train(fresh(checkpoint, 0.5), tmp_path / "other", resume=str(stopped))


def test_an_adapter_is_trained_and_resumed_with_a_rising_gamma(checkpoint, tmp_path):
    """Oracle: the same training without an interruption, bit by bit; each checkpoint has its own gamma."""

    def rise():
        return [GammaSchedule(start=0.0, end=0.8, warmup_ratio=1.0)]

    whole = fresh(checkpoint, 0.0)
    train(whole, tmp_path / "run", callbacks=rise())
    stopped = tmp_path / "run" / "checkpoint-2"
    assert recorded(stopped)["gamma"] == pytest.approx(0.2)
    again = fresh(checkpoint, 0.0)
    train(again, tmp_path / "again", callbacks=rise(), resume=str(stopped))
    assert torch.equal(logits(again), logits(whole))
    # after the training the model is like any other
    assert not adapters.scheduled
    with pytest.raises(AdapterError):
        again.load_adapter(stopped, "default")


def test_unregistering_gives_everything_back():
    """Oracle: the functions of both libraries, and the finders of modules."""

    def surface():
        return (
            [vars(PeftAdapterMixin)[name] for name in ("add_adapter", "load_adapter")],
            [vars(PeftConfigMixin)[name] for name in ("save_pretrained", "from_peft_type")],
            [vars(PeftModel)[name] for name in ("__init__", "save_pretrained", "load_adapter", "from_pretrained")],
            [vars(peft.PeftMixedModel)[name] for name in ("__init__", "load_adapter", "from_pretrained")],
            hotswap.hotswap_adapter_from_state_dict,
            list(sys.meta_path),
        )

    wrapped = surface()
    hf_chainattn.unregister()
    try:
        plain = surface()
        functions = [
            *plain[0],
            plain[1][0],
            *plain[2][:3],
            *plain[3][:2],
            plain[4],
            *(method.__func__ for method in (plain[1][1], plain[2][3], plain[3][2])),
        ]
        assert {function.__module__.partition(".")[0] for function in functions} == {"peft", "transformers"}
        assert not [function for function in functions if hasattr(function, "__wrapped__")]
    finally:
        hf_chainattn.register()
    again = surface()
    assert again[2][1].__wrapped__ is plain[2][1] is wrapped[2][1].__wrapped__
    # those that wait for an import are new ones
    assert list(map(type, again[5])) == list(map(type, wrapped[5]))
