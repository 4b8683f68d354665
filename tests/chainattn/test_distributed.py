"""Two processes with half of a batch each are one process with all of it, and none of them gets half of the heads."""

import pytest
import torch
from accelerate import Accelerator
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from transformers import DistributedConfig, Trainer, TrainerCallback

from hf_chainattn import ChainGate, GammaSchedule, enable_chain_attention
from tests.chainattn.test_gates import Text, arguments
from tests.helpers.adapters import IDS, Base
from tests.helpers.tiny_models import VOCAB, tiny_model
from tests.helpers.two_processes import in_two_processes

SETTINGS = {
    "a fixed gamma": {"gamma": 0.8},
    "a gamma of each head": {"gamma": 0.8, "learnable": True, "per_head": True},
}
STEPS, ROWS = 3, 4
HALVES = [slice(0, ROWS // 2), slice(ROWS // 2, ROWS)]


def chained(settings):
    """Llama in float64, its gates too, so that what differs is not their rounding."""
    model = enable_chain_attention(tiny_model("llama"), **settings).train()
    for module in model.modules():
        if isinstance(module, ChainGate):
            module.bias = torch.nn.Parameter(module.bias.detach().double())
    return model


def train(settings, part=slice(None)):
    """Gradients of the last of some steps, and the parameters after it, with a part of each batch in this process."""
    model = chained(settings)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    accelerator = Accelerator(cpu=True)
    wrapped, optimizer = accelerator.prepare(model, optimizer)
    rows = torch.randint(3, VOCAB, (STEPS, ROWS, 12), generator=torch.Generator().manual_seed(0))
    for batch in rows[:, part]:
        optimizer.zero_grad()
        accelerator.backward(wrapped(input_ids=batch, labels=batch).loss)
        optimizer.step()
    return {name: (parameter.grad, parameter.detach()) for name, parameter in model.named_parameters()}


class Watch(TrainerCallback):
    def __init__(self):
        self.gammas = []

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.gammas.append(model.config.chain_attention["gamma"])


def train_with_trainer(folder, settings, rows):
    model, watch = chained(settings), Watch()
    callbacks = [watch] if settings.get("learnable") else [GammaSchedule(end=0.8, warmup_ratio=1.0), watch]
    settings = arguments(folder, max_steps=4, per_device_train_batch_size=rows)
    Trainer(model, settings, train_dataset=Text(), callbacks=callbacks).train()
    return {name: parameter.detach() for name, parameter in model.named_parameters()}, watch.gammas


def sharded(checkpoint, **arguments):
    """Gradients of a model whose checkpoint has no gates, each of them whole again."""
    model = Base(checkpoint, SETTINGS["a gamma of each head"], **arguments)()
    model(IDS, labels=IDS, use_cache=False).loss.backward()
    grads = {name: parameter.grad for name, parameter in model.named_parameters()}
    return {name: grad.full_tensor() if isinstance(grad, DTensor) else grad for name, grad in grads.items()}


def attempt(action):
    """What an action raised: the name of the class and the message."""
    try:
        action()
    except Exception as error:
        return type(error).__name__, str(error)
    return "nothing", ""


def tensor_parallel(checkpoint):
    """What comes of real tensor parallelism: of transformers, by either argument, and of PyTorch itself."""
    ids, plan = IDS[:, :8], {"distributed_config": DistributedConfig(tp_size=2)}
    ordinary, chain = Base(checkpoint), Base(checkpoint, {"gamma": 0.8})
    errors = [attempt(lambda: chain(**plan)), attempt(lambda: chain(tp_size=2))]
    with torch.no_grad():
        whole, divided = ordinary()(ids).logits, ordinary(**plan)
        # the plan is carried out, and ordinary attention is right with it
        assert divided._tp_size == 2
        torch.testing.assert_close(divided(ids).logits, whole, rtol=1e-4, atol=1e-3)
        errors.append(attempt(lambda: enable_chain_attention(divided)))
        model, mesh = chain(), init_device_mesh("cpu", (2,))
        styles = {name: ColwiseParallel() for name in ("q_proj", "k_proj", "v_proj")} | {"o_proj": RowwiseParallel()}
        for layer in model.model.layers:
            parallelize_module(layer.self_attn, mesh, styles)
        errors.append(attempt(lambda: model(ids)))
        model.set_attn_implementation("sdpa")
        torch.testing.assert_close(model(ids).logits, whole, rtol=1e-4, atol=1e-3)
    return errors


def work(rank, folder, checkpoint):
    """All that one of the two processes does: starting it takes longer."""
    assert Accelerator(cpu=True).num_processes == 2
    by_hand = {name: train(settings, HALVES[rank]) for name, settings in SETTINGS.items()}
    with_trainer = {name: train_with_trainer(folder, settings, 2) for name, settings in SETTINGS.items()}
    fully_sharded = sharded(checkpoint, distributed_config=DistributedConfig(fsdp_size=2))
    return by_hand, with_trainer, fully_sharded, tensor_parallel(checkpoint)


@pytest.fixture(scope="module")
def two(tmp_path_factory, checkpoint):
    return in_two_processes(tmp_path_factory.mktemp("two"), work, checkpoint)


@pytest.mark.parametrize("name", list(SETTINGS))
def test_gradients_and_parameters_are_those_of_one_process(name, two):
    """Oracle: one process with the whole batches, in float64. Negative control: one process with half of each."""
    alone, half = train(SETTINGS[name]), train(SETTINGS[name], HALVES[0])
    assert len([parameter for parameter in alone if "chain_gate" in parameter]) == 4 * ("learnable" in SETTINGS[name])
    for by_hand, *_ in two:
        for parameter, expected in alone.items():
            torch.testing.assert_close(by_hand[name][parameter], expected, rtol=1e-10, atol=1e-14)
            assert not torch.allclose(by_hand[name][parameter][0], half[parameter][0], rtol=1e-3, atol=0)


@pytest.mark.parametrize("name", list(SETTINGS))
def test_trainer_in_two_processes_is_trainer_in_one(name, two, tmp_path):
    """Oracle: one process with batches of twice the size; gamma rises alike in all processes."""
    alone, gammas = train_with_trainer(tmp_path, SETTINGS[name], 4)
    for _, with_trainer, *_ in two:
        found, seen = with_trainer[name]
        assert seen == gammas
        for parameter, expected in alone.items():
            torch.testing.assert_close(found[parameter], expected, rtol=1e-8, atol=1e-12)
    if name == "a fixed gamma":
        assert gammas == pytest.approx([0.0, 0.2, 0.4, 0.6])


def test_gates_are_made_where_parameters_are_divided_over_processes(checkpoint, two):
    """Oracle: the gradients in one process. Gates that a checkpoint lacks begin at gamma in every part of them."""
    expected = sharded(checkpoint)
    assert sum("chain_gate" in name for name in expected) == 3
    for *_, found, _ in two:
        assert list(found) == list(expected)
        for name, grad in expected.items():
            torch.testing.assert_close(found[name], grad, rtol=1e-4, atol=1e-6 * grad.abs().max().item())


def test_real_tensor_parallelism_is_refused_in_every_process(two):
    """Control: the same divided models run with ordinary attention."""
    for *_, errors in two:
        assert [name for name, _ in errors] == ["UnsupportedModelError"] * 4
        assert all("by tensor parallelism" in message for _, message in errors)
        assert "with 2 of 4 heads here" in errors[-1][1]
