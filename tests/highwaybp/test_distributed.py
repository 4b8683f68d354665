"""DistributedDataParallel around an attached model: two processes against one."""

import multiprocessing

import pytest
import torch
from torch import distributed
from torch.nn.parallel import DistributedDataParallel

from hf_highwaybp import HighwayBP
from tests.highwaybp.toys import gradients, inputs, largest_error, toy


def worker(rank, folder, k):
    """One of two ranks: one batch under no_sync, one with the gradients averaged, in many small buckets."""
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    model = toy()
    wrapped = DistributedDataParallel(model, bucket_cap_mb=1e-4)
    with HighwayBP(model, k=k):
        with wrapped.no_sync():
            wrapped(inputs(seed=rank)).backward()
        wrapped(inputs(seed=10 + rank)).backward()
    if rank == 0:
        torch.save({name: p.grad for name, p in model.named_parameters()}, f"{folder}/gradients.pt")
    distributed.destroy_process_group()


@pytest.mark.parametrize("k", [1, 3])
def test_two_processes_have_the_mean_gradient_of_one(tmp_path, k):
    """Oracle: Highway-BP in this process on all four batches, which at k = 3 is autograd."""
    context = multiprocessing.get_context("spawn")
    ranks = [context.Process(target=worker, args=(rank, str(tmp_path), k)) for rank in range(2)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(120)
    assert [rank.exitcode for rank in ranks] == [0, 0]
    model = toy()
    with HighwayBP(model, k=k):
        expected = gradients(model, lambda: sum(model(inputs(seed=seed)) for seed in (0, 1, 10, 11)) / 2)
    assert largest_error(expected, torch.load(tmp_path / "gradients.pt")) < 1e-12
