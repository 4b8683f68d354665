"""Bringing chain attention into a trained model with a rising gamma."""

import json

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback

from hf_chainattn import GammaSchedule, enable_chain_attention
from tests.chainattn.test_gates import IDS, Text, arguments
from tests.helpers.tiny_models import tiny_model


class Watch(TrainerCallback):
    def __init__(self):
        self.gammas = []

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.gammas.append(model.config.chain_attention["gamma"])


def chained():
    return enable_chain_attention(tiny_model("llama", dtype=torch.float32), gamma=0.0).train()


def test_gamma_rises_and_stays():
    """Oracle: the line itself, at every optimizer step of a training with accumulated gradients."""
    schedule, watch = GammaSchedule(start=0.0, end=0.8, warmup_ratio=0.5), Watch()
    model = chained()
    settings = arguments("unused", max_steps=8, gradient_accumulation_steps=2)
    Trainer(model, settings, train_dataset=Text(), callbacks=[schedule, watch]).train()
    assert watch.gammas == pytest.approx([0.0, 0.2, 0.4, 0.6, 0.8, 0.8, 0.8, 0.8])
    assert model.config.chain_attention["gamma"] == 0.8


def test_the_first_step_is_ordinary_attention():
    """Oracle: the loss of the same model with sdpa, bit by bit."""
    losses = []
    for model, callbacks in ((chained(), [GammaSchedule()]), (tiny_model("llama", dtype=torch.float32).train(), [])):
        trainer = Trainer(
            model, arguments("unused", max_steps=4, logging_steps=1), train_dataset=Text(), callbacks=callbacks
        )
        trainer.train()
        losses.append([log["loss"] for log in trainer.state.log_history if "loss" in log])
    assert losses[0][0] == losses[1][0]
    assert losses[0][2] != losses[1][2]


def test_a_checkpoint_of_the_rise_has_its_gamma_and_resumes_bit_by_bit(tmp_path):
    """Oracle: the same training without an interruption."""
    weights = []
    for interrupted in (False, True):
        folder = tmp_path / str(interrupted)
        settings = arguments(folder, max_steps=6, save_strategy="steps", save_steps=2)
        model = chained()
        Trainer(model, settings, train_dataset=Text(), callbacks=[GammaSchedule(end=0.9, warmup_ratio=1.0)]).train()
        if interrupted:
            checkpoint = folder / "checkpoint-2"
            stored = json.loads((checkpoint / "config.json").read_text())["chain_attention"]
            # the gamma that the weights were last trained with
            assert stored["gamma"] == pytest.approx(0.15)
            model = AutoModelForCausalLM.from_pretrained(checkpoint).train()
            trainer = Trainer(
                model, settings, train_dataset=Text(), callbacks=[GammaSchedule(end=0.9, warmup_ratio=1.0)]
            )
            trainer.train(resume_from_checkpoint=str(checkpoint))
        assert model.config.chain_attention["gamma"] == 0.9
        weights.append(model.state_dict())
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert model.eval()(IDS).logits.isfinite().all()


@pytest.mark.parametrize("adapter", [False, True])
def test_the_best_weights_come_back_with_their_gamma(adapter, tmp_path):
    """Oracle: the loss that Trainer found best. It is asked for the largest loss, which is not the last."""
    model = chained()
    if adapter:
        model = get_peft_model(model, LoraConfig(target_modules=["q_proj", "v_proj"]))
    settings = arguments(
        tmp_path,
        max_steps=6,
        save_strategy="steps",
        save_steps=2,
        eval_strategy="steps",
        eval_steps=2,
        load_best_model_at_end=True,
        metric_for_best_model="loss",
        greater_is_better=True,
    )
    schedule = GammaSchedule(end=0.9, warmup_ratio=1.0)
    trainer = Trainer(model, settings, train_dataset=Text(), eval_dataset=Text(), callbacks=[schedule])
    trainer.train()
    assert trainer.state.best_global_step < 6
    assert trainer.evaluate()["eval_loss"] == trainer.state.best_metric
    name = "adapter_config.json" if adapter else "config.json"
    stored = json.loads((tmp_path / f"checkpoint-{trainer.state.best_global_step}" / name).read_text())
    assert stored["chain_attention"] == model.config.chain_attention


def test_what_cannot_rise_is_refused():
    for model, message in (
        (tiny_model("llama", dtype=torch.float32), "attn_implementation='chain'"),
        (enable_chain_attention(tiny_model("llama", dtype=torch.float32), learnable=True), "one fixed gamma"),
        (enable_chain_attention(tiny_model("llama", dtype=torch.float32), gamma=[0.5] * 4), "one fixed gamma"),
    ):
        trainer = Trainer(model, arguments("unused", max_steps=1), train_dataset=Text(), callbacks=[GammaSchedule()])
        with pytest.raises(ValueError, match=message):
            trainer.train()


@pytest.mark.parametrize(
    ("values", "error"),
    [
        ({"end": 1.0}, ValueError),
        ({"start": -0.1}, ValueError),
        ({"warmup_ratio": 0.0}, ValueError),
        ({"end": "1"}, TypeError),
    ],
)
def test_bad_values_are_refused(values, error):
    with pytest.raises(error, match=r"gamma must be|warmup_ratio must be"):
        GammaSchedule(**values)
