"""Models that accelerate has placed: modules have another forward, and weights are elsewhere until they are needed."""

import accelerate
import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module

from hf_chainattn import ChainGate, disable_chain_attention, enable_chain_attention
from hf_chainattn.models import dispatching_modules
from tests.helpers.adapters import IDS, Base, logits

LAYERS = 3
GATES = {"gamma": 0.8, "learnable": True, "per_head": True}
ON_DISK = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"} | {
    f"model.layers.{layer}": "cpu" if layer == 0 else "disk" for layer in range(LAYERS)
}


def everywhere(model):
    """A hook of accelerate on every module, attention itself among them."""
    for module in model.modules():
        add_hook_to_module(module, AlignDevicesHook(io_same_device=True))
    return model


# whether modules have a forward of accelerate then, and what places a model
PLACES = {
    "cpu": (False, lambda base, folder: base(device_map="cpu")),
    "auto": (False, lambda base, folder: base(device_map="auto")),
    "a dict": (False, lambda base, folder: base(device_map={"": "cpu"})),
    "layers on disk": (True, lambda base, folder: base(device_map=ON_DISK, offload_folder=folder)),
    "cpu_offload": (True, lambda base, folder: accelerate.cpu_offload(base(), execution_device="cpu")),
    "disk_offload": (True, lambda base, folder: accelerate.disk_offload(base(), folder, execution_device="cpu")),
    "dispatch_model": (
        True,
        lambda base, folder: accelerate.dispatch_model(
            base(), device_map=ON_DISK, offload_dir=folder, main_device="cpu", force_hooks=True
        ),
    ),
    "hooks everywhere": (True, lambda base, folder: everywhere(base())),
}


@pytest.fixture(scope="module")
def chain_checkpoint(checkpoint, tmp_path_factory):
    """A folder with a chain whose heads have learned gammas of their own."""
    folder = tmp_path_factory.mktemp("chain")
    model = Base(checkpoint, GATES)()
    torch.manual_seed(0)
    with torch.no_grad():
        for gate in (module for module in model.modules() if isinstance(module, ChainGate)):
            gate.bias.add_(torch.randn(4))
    model.save_pretrained(folder)
    return folder


def tokens(model):
    return model.generate(IDS, max_new_tokens=6, do_sample=False, eos_token_id=None, pad_token_id=0)


@pytest.mark.parametrize("place", list(PLACES))
def test_a_placed_model_computes_generates_and_switches_back(place, checkpoint, chain_checkpoint, tmp_path):
    """Oracle: the same model where it was loaded, and ordinary attention, bit by bit."""
    hooked, put = PLACES[place]
    model, plain = put(Base(chain_checkpoint), str(tmp_path)), Base(chain_checkpoint)()
    attention = model.model.layers[-1].self_attn
    assert ("forward" in vars(attention.q_proj)) == hooked
    assert [module for _, module in dispatching_modules(model)][-1] is attention
    assert torch.equal(logits(model), logits(plain))
    assert torch.equal(tokens(model), tokens(plain))
    assert not torch.equal(logits(model), logits(Base(checkpoint)()))
    disable_chain_attention(model)
    assert torch.equal(logits(model), logits(Base(checkpoint)()))
    assert not [module for module in model.modules() if module._forward_pre_hooks]


@pytest.mark.filterwarnings("ignore:Attempting to save a model with offloaded modules")
@pytest.mark.parametrize("place", ["auto", "layers on disk", "dispatch_model"])
def test_a_placed_model_is_saved_with_its_chain(place, chain_checkpoint, tmp_path):
    """Oracle: bit equality after a reload. What cpu_offload alone has moved, transformers itself cannot save."""
    model = PLACES[place][1](Base(chain_checkpoint), str(tmp_path / "offloaded"))
    model.save_pretrained(tmp_path / "saved")
    again = Base(tmp_path / "saved")()
    assert again.config.chain_attention == {"diagonal": "kept", **GATES}
    assert torch.equal(logits(again), logits(model))


@pytest.mark.parametrize("settings", [{"gamma": 0.8}, GATES])
@pytest.mark.parametrize("place", list(PLACES))
def test_a_model_becomes_a_chain_after_it_was_placed(place, settings, checkpoint, tmp_path):
    """Oracle: the same switch where it was loaded. New gates are where their layer computes, not where it is kept."""
    model = enable_chain_attention(PLACES[place][1](Base(checkpoint), str(tmp_path)), **settings)
    assert torch.equal(logits(model), logits(enable_chain_attention(Base(checkpoint)(), **settings)))
    assert torch.equal(tokens(model), tokens(enable_chain_attention(Base(checkpoint)(), **settings)))
