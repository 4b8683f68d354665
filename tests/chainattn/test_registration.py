"""What importing the package does to transformers, and that all of it can be undone."""

import functools
import subprocess
import sys

import pytest
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    GPT2Config,
    GPT2Model,
    PreTrainedConfig,
    PreTrainedModel,
)

import hf_chainattn
from hf_chainattn import integration


@pytest.fixture(autouse=True)
def _always_registered():
    yield
    hf_chainattn.register()


def surface():
    return (
        dict(AttentionInterface._global_mapping),
        dict(AttentionMaskInterface._global_mapping),
        PreTrainedModel.post_init,
        PreTrainedModel.set_attn_implementation,
        getattr(PreTrainedConfig, "chain_attention", "absent"),
    )


def test_import_registers_function_and_mask():
    assert hf_chainattn.is_registered()
    assert AttentionInterface._global_mapping["chain"] is integration.chain_attention_forward
    assert AttentionMaskInterface._global_mapping["chain"] is integration.chain_mask


def test_register_and_unregister_are_idempotent_and_restore_everything():
    registered = surface()
    hf_chainattn.register()
    assert surface() == registered
    hf_chainattn.unregister()
    plain = surface()
    hf_chainattn.unregister()
    assert surface() == plain
    assert not hf_chainattn.is_registered()
    assert plain[-1] == "absent"
    assert "chain" not in plain[0] | plain[1]
    assert plain[2].__module__ == plain[3].__module__ == "transformers.modeling_utils"
    assert not hasattr(plain[2], "__wrapped__")
    hf_chainattn.register()
    again = surface()
    assert again[:2] == registered[:2]
    assert (again[2].__wrapped__, again[3].__wrapped__, again[4]) == (plain[2], plain[3], None)


def test_a_name_held_by_another_library_is_refused():
    hf_chainattn.unregister()
    AttentionInterface.register("chain", print)
    try:
        with pytest.raises(RuntimeError, match="Another library"):
            hf_chainattn.register()
        assert not hf_chainattn.is_registered()
        assert not hasattr(PreTrainedConfig, "chain_attention")
    finally:
        del AttentionInterface._global_mapping["chain"]


def test_a_wrapper_of_another_library_is_left_in_place(monkeypatch):
    """It holds ours, which steps aside while the name is not registered."""
    ours = PreTrainedModel.post_init

    @functools.wraps(ours)
    def theirs(model):
        ours(model)

    monkeypatch.setattr(PreTrainedModel, "post_init", theirs)
    hf_chainattn.unregister()
    assert PreTrainedModel.post_init is theirs
    config = GPT2Config(n_layer=1, n_head=2, n_embd=8, vocab_size=11, bos_token_id=1, eos_token_id=2)
    assert not hasattr(GPT2Model(config).config, "chain_attention")


def test_unregistered_is_what_transformers_was_before_the_import():
    """Oracle: a fresh interpreter, where the package has not been imported yet."""
    script = """
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig, PreTrainedModel
def surface():
    functions = dict(AttentionInterface._global_mapping), dict(AttentionMaskInterface._global_mapping)
    methods = PreTrainedModel.post_init, PreTrainedModel.set_attn_implementation
    return functions, methods, hasattr(PreTrainedConfig, "chain_attention")
before = surface()
import hf_chainattn
assert surface() != before
hf_chainattn.unregister()
assert surface() == before
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120)


def test_the_private_parts_of_transformers_we_stand_on_are_there():
    """Fails loudly when a newer transformers moves what the integration needs."""
    assert isinstance(AttentionInterface._global_mapping, dict)
    assert isinstance(AttentionMaskInterface._global_mapping, dict)
    assert callable(PreTrainedModel.post_init)
    assert callable(PreTrainedModel.set_attn_implementation)
    config = PreTrainedConfig()
    config._attn_implementation_internal = "probe"
    assert config._attn_implementation == "probe"
    assert isinstance(PreTrainedConfig.sub_configs, dict)
