"""What importing the package does to transformers, and that all of it can be undone."""

import subprocess
import sys

import pytest
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig, PreTrainedModel

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
    assert surface() == registered


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
