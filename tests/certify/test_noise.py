"""Noise depends on its key alone."""

import numpy as np
import pytest
import torch

from hf_certify.noise import MAX_SEED, NOISE_SCHEMA, Stage, draw_noise, fresh_seed

KEY = {"seed": 2**100 + 7, "index": 3, "stage": Stage.ESTIMATION}


def all_noise(n: int, shape: tuple[int, ...] = (2, 3), **key: object) -> torch.Tensor:
    return torch.cat([chunk.clone() for chunk in draw_noise(shape, n, **(KEY | key))])


def test_known_answer_from_numpys_mersenne_twister():
    """Oracle: NumPy's generator and the Box-Muller transform, over the border between two blocks.

    torch computes logarithm and cosine in float32, hence the tolerance.
    """
    size, draws = 5, 4096 + 64
    ours = all_noise(draws, (size,)).numpy()
    for block, count in ((0, 4096), (1, 64)):
        twister = np.random.MT19937()
        words = np.random.SeedSequence(KEY["seed"], spawn_key=(NOISE_SCHEMA, 3, 1, block)).generate_state(624)
        twister.state = {"bit_generator": "MT19937", "state": {"key": words, "pos": 624}}
        uniform = (twister.random_raw(count * size) & 0xFFFFFF) / 2.0**24
        first, second = np.moveaxis(uniform.reshape(-1, 2, 8), 1, 0)
        radius, angle = np.sqrt(-2 * np.log(1 - first)), 2 * np.pi * second
        normal = np.stack((radius * np.cos(angle), radius * np.sin(angle)), axis=1).reshape(count, size)
        np.testing.assert_allclose(ours[block * 4096 :][:count], normal, atol=2e-5)


@pytest.mark.parametrize("n", [1, 63, 64, 65, 1000])
def test_the_first_draws_do_not_depend_on_how_many_are_asked_for(n):
    assert torch.equal(all_noise(n), all_noise(1000)[:n])


def test_another_generator_between_two_inputs_changes_nothing():
    forward = [all_noise(70, index=index) for index in (0, 1)]
    torch.manual_seed(5)
    backward = [all_noise(70, index=index) for index in (1, 0)]
    assert torch.equal(forward[0], backward[1])
    assert torch.equal(forward[1], backward[0])


@pytest.mark.parametrize(
    "other",
    [{"seed": 7}, {"seed": 2**100 + 7 + 2**32}, {"index": 4}, {"stage": Stage.SELECTION}, {"stage": Stage.PREDICTION}],
)
def test_another_seed_input_or_stage_has_other_noise(other):
    """Seeds that agree in their low 32 bits included: ``manual_seed`` would make them collide."""
    assert not torch.isclose(all_noise(64), all_noise(64, **other)).any()


def test_noise_is_standard_normal():
    """Mean, variance and the correlation of neighbours within 6.5 standard errors: chance below 1e-9."""
    noise = all_noise(20_000, (10,)).double().flatten()
    bound = 6.5 / len(noise) ** 0.5
    assert abs(noise.mean()) < bound
    assert abs(noise.var() - 1) < bound * 2**0.5
    assert abs((noise[1:] * noise[:-1]).mean()) < bound


def test_fresh_seeds_use_128_bits_and_differ():
    seeds = {fresh_seed() for _ in range(50)}
    assert len(seeds) == 50
    assert max(seeds).bit_length() > 110
    assert all(0 <= seed < MAX_SEED for seed in seeds)
