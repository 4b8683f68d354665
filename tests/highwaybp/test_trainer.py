"""The callback in transformers.Trainer: at full k the training is the one without it."""

import logging

import pytest
import torch
from transformers import Trainer, TrainerCallback, TrainingArguments

from hf_highwaybp import AttachError, HighwayBP, HighwayCallback, HighwayConfig
from tests.helpers.tiny_models import LAYERS, tiny_batch, tiny_model

STEPS = 4
GENERATOR = torch.Generator().manual_seed(7)
ROWS = [{"input_ids": ids, "labels": ids} for ids in torch.randint(3, 101, (16, 8), generator=GENERATOR)]


def trainer(tmp_path, *callbacks, **arguments):
    """A Trainer on a fresh GPT-2 with dropout, accumulation over two batches and clipping."""
    settings = {
        "output_dir": str(tmp_path),
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "max_steps": STEPS,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "learning_rate": 1e-2,
        "max_grad_norm": 0.5,
        "seed": 3,
    }
    return Trainer(
        model=tiny_model("gpt2", dtype=torch.float64),
        args=TrainingArguments(**settings | arguments),
        train_dataset=ROWS,
        eval_dataset=ROWS,
        callbacks=list(callbacks),
    )


def curve(run):
    run.train()
    return [(log["loss"], log["grad_norm"]) for log in run.state.log_history if "loss" in log]


@pytest.mark.parametrize("k", [LAYERS - 1, None])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_training_at_full_k_has_the_loss_curve_of_plain_training(tmp_path, k, checkpointing):
    """Oracle: the Trainer without the callback; loss and gradient norm of every step."""
    arguments = {"activation_checkpointing": checkpointing}
    if checkpointing:
        arguments["activation_checkpointing_kwargs"] = {"use_reentrant": False}
    plain = curve(trainer(tmp_path, **arguments))
    highway = curve(trainer(tmp_path, HighwayCallback(k=k), **arguments))
    assert len(plain) == STEPS
    assert torch.allclose(torch.tensor(plain), torch.tensor(highway), rtol=1e-9, atol=0)


def test_training_at_k_zero_has_another_curve(tmp_path):
    """Negative control of the test above: the first gradient norm already differs."""
    plain, highway = curve(trainer(tmp_path)), curve(trainer(tmp_path, HighwayCallback(k=0)))
    assert plain[0][0] == highway[0][0]
    assert abs(plain[0][1] - highway[0][1]) > 1e-3 * plain[0][1]


def test_figures_and_probes_reach_the_log(tmp_path):
    callback = HighwayCallback(HighwayConfig(k=1), probe_batch=tiny_batch("gpt2"), probe_steps=[1], probe_every=3)
    run = trainer(tmp_path, callback)
    highway = curve(run)
    logs = [log for log in run.state.log_history if "loss" in log]
    assert [log["highway/k"] for log in logs] == [1.0] * STEPS
    assert [log["highway/exact"] for log in logs] == [0.0] * STEPS
    assert all(0 < log["highway/residual_norm"] < 1 for log in logs)
    assert [step for step, _ in callback.history] == [1, 3]
    assert [log.get("highway/cosine") for log in logs] == [
        callback.history[0][1].cosine, None, callback.history[1][1].cosine, None
    ]  # fmt: skip
    assert all(0.5 < report.cosine < 1 - 1e-6 for _, report in callback.history)
    assert highway != curve(trainer(tmp_path))


def test_probing_does_not_change_the_training(tmp_path):
    """Oracle: the same training without probes."""
    probed = HighwayCallback(k=1, probe_batch=tiny_batch("gpt2"), probe_every=1)
    assert curve(trainer(tmp_path, probed)) == curve(trainer(tmp_path, HighwayCallback(k=1)))
    assert len(probed.history) == STEPS


class Watching(TrainerCallback):
    """Sees whether the blocks are attached, and fails on request."""

    def __init__(self, fail_at=None):
        self.fail_at, self.attached = fail_at, []

    def on_step_begin(self, args, state, control, *, model, **kwargs):
        self.attached.append("forward" in model.transformer.h[0].__dict__)
        if state.global_step == self.fail_at:
            raise OSError("disk full")


def plain(run):
    return all("forward" not in block.__dict__ for block in run.model.transformer.h)


def test_the_model_is_attached_in_training_only(tmp_path):
    callback, watching = HighwayCallback(k=1), Watching()
    run = trainer(tmp_path, callback, watching)
    assert plain(run)
    run.train()
    assert watching.attached == [True] * STEPS
    assert plain(run)
    assert callback.engine is None


def test_an_exception_in_training_detaches_by_context_by_hand_and_at_the_next_training(tmp_path):
    callback, watching = HighwayCallback(k=1), Watching(fail_at=1)
    run = trainer(tmp_path, callback, watching)
    with pytest.raises(OSError, match="disk full"), callback:
        run.train()
    assert plain(run)
    with pytest.raises(OSError, match="disk full"):
        run.train()
    assert not plain(run)
    callback.detach()
    assert plain(run)
    with pytest.raises(OSError, match="disk full"):
        run.train()
    watching.fail_at = None
    run.train()
    assert plain(run)


@pytest.mark.parametrize(("k", "warned"), [(None, True), (LAYERS - 1, False), (1, False)])
def test_training_without_k_says_that_it_is_exact(tmp_path, caplog, k, warned):
    run = trainer(tmp_path, HighwayCallback(k=k))
    with caplog.at_level(logging.WARNING, logger="hf_highwaybp"):
        run.train()
    assert sum("k=None is exact and approximates nothing" in r.message for r in caplog.records) == warned
    logs = [log for log in run.state.log_history if "loss" in log]
    assert [log["highway/exact"] for log in logs] == [float(k != 1)] * STEPS


def test_two_callbacks_are_refused_and_the_way_out_works(tmp_path):
    """Oracle: the refused training leaves the model plain, and the one callback that is kept trains."""
    run = trainer(tmp_path, HighwayCallback(k=1), HighwayCallback(k=2))
    with pytest.raises(AttachError, match=r"another HighwayCallback, .*: keep one, e\.g\. trainer\.remove_callback"):
        run.train()
    assert plain(run)
    run.remove_callback(HighwayCallback)
    run.train()
    assert {log["highway/k"] for log in run.state.log_history if "loss" in log} == {2.0}
    assert plain(run)


def test_a_callback_on_an_attached_model_is_refused_and_the_engine_stays(tmp_path):
    run = trainer(tmp_path, HighwayCallback(k=1))
    with HighwayBP(run.model, k=2) as hbp:
        with pytest.raises(AttachError, match="or the model an attached HighwayBP"):
            run.train()
        assert hbp.attached
        assert not plain(run)


def test_evaluation_in_training_is_untouched(tmp_path):
    """Oracle: the evaluation loss before training, with the callback and without it."""
    arguments = {"eval_strategy": "steps", "eval_steps": 1, "learning_rate": 0.0}
    losses = []
    for callbacks in ([], [HighwayCallback(k=0)]):
        run = trainer(tmp_path, *callbacks, **arguments)
        run.train()
        losses.append([log["eval_loss"] for log in run.state.log_history if "eval_loss" in log])
        assert not any("highway/k" in log for log in run.state.log_history if "eval_loss" in log)
    assert losses[0] == losses[1]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"config": HighwayConfig(), "k": 1}, TypeError, "takes a config or k"),
        ({"config": 3}, TypeError, "config must be a HighwayConfig, got 3"),
        ({"k": -1}, ValueError, "k must be a whole number"),
        ({"residual": 2.0}, ValueError, "residual must be"),
        ({"probe_every": 0, "probe_batch": {}}, ValueError, "probe_every must be a number of steps from 1"),
        ({"probe_every": 2}, ValueError, "needs both probe_batch and"),
        ({"probe_batch": {}}, ValueError, "needs both probe_batch and"),
    ],
)
def test_wrong_settings_are_refused(arguments, error, message):
    with pytest.raises(error, match=message):
        HighwayCallback(**arguments)
