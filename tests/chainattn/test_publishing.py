"""What is said about a model where it is saved or published, and a saved model that brings its code along."""

import logging
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
from huggingface_hub import ModelCard
from huggingface_hub.errors import EntryNotFoundError
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

from hf_chainattn import (
    UnsupportedModelError,
    disable_chain_attention,
    enable_chain_attention,
    gamma_by_layer,
    save_with_code,
    update_model_card,
)
from tests.helpers.decoders import decoder

HEADING = "## How attention is computed"
CONFIG = {"n_layer": 3, "n_head": 2, "n_embd": 16, "vocab_size": 50, "bos_token_id": 0, "eos_token_id": 0}
TOKENS = torch.tensor([[3, 7, 5, 11]])


def gpt2(**settings):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(GPT2Config(**CONFIG))
    return enable_chain_attention(model, **settings) if settings else model


def card_in(folder):
    return (Path(folder) / "README.md").read_text(encoding="utf-8")


class FakeHub:
    """Takes what is uploaded: file name -> content."""

    def __init__(self, existing_card=None):
        self.files, self.existing_card = {}, existing_card

    def create_repo(self, repo_id, **_):
        return SimpleNamespace(repo_id=repo_id)

    def create_commit(self, repo_id, operations, **_):
        self.files = {op.path_in_repo: Path(op.path_or_fileobj).read_bytes() for op in operations}

    def upload_folder(self, repo_id, folder_path, **_):
        self.files = {path.name: path.read_bytes() for path in Path(folder_path).iterdir() if path.is_file()}

    def load_card(self, name, **_):
        if Path(name).is_file():
            return ModelCard(Path(name).read_text(encoding="utf-8"))
        if self.existing_card is None:
            raise EntryNotFoundError(f"no card in {name}")
        return ModelCard(self.existing_card)

    @property
    def card(self):
        return self.files["README.md"].decode()


@pytest.fixture
def hub(monkeypatch):
    fake = FakeHub()
    for module in (transformers.utils.hub, transformers.modeling_utils, transformers.trainer):
        monkeypatch.setattr(module, "hf_api", lambda: fake)
    monkeypatch.setattr(ModelCard, "load", fake.load_card)
    return fake


def test_gamma_by_layer_tells_chained_layers_from_ordinary_ones():
    model = gpt2(gamma=0.9, layers=[0, 2])
    assert gamma_by_layer(model) == {f"transformer.h.{n}.attn": g for n, g in enumerate((0.9, 0.0, 0.9))}
    enable_chain_attention(model, gamma=[0.5, [0.2, 0.4], 0.0])
    assert list(gamma_by_layer(model).values()) == [0.5, (0.2, 0.4), 0.0]
    disable_chain_attention(model)
    assert set(gamma_by_layer(model).values()) == {0.0}


def test_gamma_by_layer_gives_a_learned_gamma_as_it_is_now():
    model = gpt2(gamma=0.9, learnable=True)
    with torch.no_grad():
        model.transformer.h[1].attn.chain_gate.bias.zero_()
    assert list(gamma_by_layer(model).values()) == pytest.approx([0.9, 0.5, 0.9])


def test_encoder_and_cross_attention_count_as_ordinary():
    gammas = gamma_by_layer(decoder("bart", "chain"))
    chained = {name for name, gamma in gammas.items() if gamma != 0.0}
    assert chained == {f"model.decoder.layers.{n}.self_attn" for n in range(3)}
    assert len(gammas) == 2 + 3 + 3


def test_one_log_line_lists_the_layers_and_their_gamma(caplog):
    with caplog.at_level(logging.INFO, logger="hf_chainattn"):
        gpt2(gamma=0.9, layers=[1])
    assert caplog.messages[-1] == (
        "GPT2LMHeadModel computes chain attention: ordinary attention in transformer.h.*.attn (2); "
        "gamma 0.9 in transformer.h.*.attn (1)."
    )


def test_a_saved_model_says_how_its_attention_is_computed(tmp_path):
    model = gpt2(gamma=0.9, layers=[1, 2], diagonal="removed")
    model.save_pretrained(tmp_path)
    card = card_in(tmp_path)
    assert card.count(HEADING) == 1
    assert "| `transformer.h.*.attn` | 2 | gamma 0.9 | removed |" in card
    assert "import hf_chainattn\nfrom transformers import GPT2LMHeadModel\n" in card
    assert ModelCard(card).data.tags == ["chain-attention"]


def test_the_card_quotes_what_transformers_says_without_the_import(tmp_path):
    """Oracle: a fresh interpreter that does not import the package."""
    gpt2(gamma=0.9).save_pretrained(tmp_path)
    script = f"from transformers import AutoModelForCausalLM as A; A.from_pretrained({str(tmp_path)!r})"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    quoted = next(line.strip() for line in card_in(tmp_path).splitlines() if "ValueError" in line)
    assert quoted in result.stderr


def test_a_card_of_the_user_keeps_what_it_says_and_is_written_once(tmp_path):
    mine = "---\nlicense: mit\ntags:\n- mine\n---\n\n# Mine\n\nWords \\1 of my own.\n"
    (tmp_path / "README.md").write_text(mine, encoding="utf-8")
    model = gpt2(gamma=0.9)
    model.save_pretrained(tmp_path)
    first = card_in(tmp_path)
    assert "Words \\1 of my own." in first
    assert ModelCard(first).data.tags == ["mine", "chain-attention"]
    assert ModelCard(first).data.license == "mit"
    model.save_pretrained(tmp_path)
    assert card_in(tmp_path) == first
    enable_chain_attention(model, gamma=0.5).save_pretrained(tmp_path)
    assert card_in(tmp_path) == first.replace("gamma 0.9", "gamma 0.5")


def test_the_section_stays_where_the_user_put_it(tmp_path):
    model = gpt2(gamma=0.9)
    model.save_pretrained(tmp_path)
    (tmp_path / "README.md").write_text(card_in(tmp_path) + "\n## After\n\nMine.\n", encoding="utf-8")
    enable_chain_attention(model, gamma=0.5).save_pretrained(tmp_path)
    card = card_in(tmp_path)
    assert card.index("gamma 0.5") < card.index("## After")
    assert card.count(HEADING) == 1


def test_an_ordinary_model_saved_over_it_takes_section_and_tag_away(tmp_path):
    model = gpt2(gamma=0.9)
    model.save_pretrained(tmp_path)
    disable_chain_attention(model).save_pretrained(tmp_path)
    assert HEADING not in card_in(tmp_path)
    assert "chain-attention" not in card_in(tmp_path)


def test_an_ordinary_model_gets_no_card_from_us(tmp_path):
    gpt2().save_pretrained(tmp_path)
    assert not (tmp_path / "README.md").exists()
    update_model_card(gpt2(), tmp_path)
    assert not (tmp_path / "README.md").exists()


def test_a_process_that_does_not_save_writes_no_card(tmp_path):
    gpt2(gamma=0.9).save_pretrained(tmp_path, is_main_process=False)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("existing", [None, "---\ntags:\n- theirs\n---\n\n# There before\n"])
def test_push_to_hub_of_a_model_keeps_section_and_tag(hub, existing):
    hub.existing_card = existing
    gpt2(gamma=0.9).push_to_hub("me/model")
    assert hub.card.count(HEADING) == 1
    assert "chain-attention" in ModelCard(hub.card).data.tags
    assert existing is None or "# There before" in hub.card
    assert b'"attn_implementation": "chain"' in hub.files["config.json"]


def test_save_pretrained_with_push_to_hub_keeps_section_and_tag(hub, tmp_path):
    gpt2(gamma=0.9).save_pretrained(tmp_path, push_to_hub=True, repo_id="me/model")
    assert hub.card.count(HEADING) == 1
    assert "chain-attention" in ModelCard(hub.card).data.tags


@pytest.mark.filterwarnings("ignore:`loss_type=None`")
def test_push_to_hub_of_trainer_keeps_section_and_tag(hub, tmp_path):
    """Trainer writes the whole card anew, after it has saved the model."""
    rows = torch.randint(50, (4, 8), generator=torch.Generator().manual_seed(0))
    arguments = TrainingArguments(
        str(tmp_path), max_steps=1, report_to=[], save_strategy="no", use_cpu=True, disable_tqdm=True
    )
    data = [{"input_ids": row, "labels": row} for row in rows]
    trainer = Trainer(gpt2(gamma=0.9, learnable=True), arguments, train_dataset=data)
    trainer.train()
    trainer.push_to_hub()
    assert "generated automatically" in hub.card
    assert hub.card.count(HEADING) == 1
    assert "gamma 0.9 (learned)" in hub.card
    assert {"chain-attention", "generated_from_trainer"} <= set(ModelCard(hub.card).data.tags)


def test_a_model_saved_with_its_code_runs_without_the_package(tmp_path):
    """Oracle: the model that was saved. The package cannot be imported in the other interpreter."""
    model = decoder("llama", "chain")
    enable_chain_attention(model, gamma=[0.9, 0.5, 0.7], learnable=True)
    save_with_code(model, tmp_path / "saved")
    assert not hasattr(model.config, "auto_map") or model.config.auto_map is None
    script = f"""
import sys
class NotInstalled:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "hf_chainattn":
            raise ImportError(name)
sys.meta_path.insert(0, NotInstalled())
import torch
from transformers import AutoModelForCausalLM
ids = torch.tensor({TOKENS.tolist()})
model = AutoModelForCausalLM.from_pretrained("saved", trust_remote_code=True)
model.save_pretrained("again")
for folder in ("saved", "again"):
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    print(model.generate(ids, max_new_tokens=12, do_sample=False).tolist())
"""
    environment = os.environ | {"HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"}
    result = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=240
    )
    assert result.returncode == 0, result.stderr
    expected = str(model.generate(TOKENS, max_new_tokens=12, do_sample=False).tolist())
    assert result.stdout.splitlines() == [expected, expected]
    assert "trust_remote_code=True" in card_in(tmp_path / "saved")
    # the class of transformers loads it too, given the package
    reloaded = type(model).from_pretrained(tmp_path / "saved").eval()
    assert torch.equal(reloaded(TOKENS).logits, model(TOKENS).logits)


def test_only_a_model_with_chain_attention_is_saved_with_its_code(tmp_path):
    with pytest.raises(UnsupportedModelError, match="does not use chain attention"):
        save_with_code(gpt2(), tmp_path)

    class Own(GPT2LMHeadModel):
        pass

    with pytest.raises(UnsupportedModelError, match="Own is not a class that an Auto class"):
        save_with_code(enable_chain_attention(Own(GPT2Config(**CONFIG))), tmp_path)
