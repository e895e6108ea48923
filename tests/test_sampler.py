"""What `sample` draws, where the answer is known: a_0 ~ N(0.3, s^2), exact velocity in place of the network's."""

import math

import numpy as np
import pytest
import torch

import simpo_neg

# Deviation of the draws for each s, from benchmarks of the same solvers in another program (float64, 400,000 draws).
PUBLISHED = {
    ("dpm", 8): {0.05: 0.041, 0.1: 0.098, 0.2: 0.212, 0.5: 0.518},
    ("ddpm", 20): {0.05: 0.044, 0.1: 0.109, 0.2: 0.218, 0.5: 0.518},
}


def exact_policy(solver, steps, deviation, mean=0.3):
    """A policy whose velocity, in units of pi/2, is that of the Gaussian: E[alpha eps - sigma a_0 | a_t]."""
    policy = simpo_neg.DiffusionPolicy(1, 1, 8, solver, steps)
    t = (np.arange(1, steps + 1) / steps) ** {"dpm": 2, "ddpm": 1}[solver]

    def velocity(action, embedding):
        alpha, sigma = (f(math.pi / 2 * t[policy.index]) for f in (math.cos, math.sin))
        variance = alpha**2 * deviation**2 + sigma**2
        action_0 = mean + alpha * deviation**2 * (action - alpha * mean) / variance
        noise = sigma * (action - alpha * mean) / variance
        policy.index -= 1
        return alpha * noise - sigma * action_0

    def embed(obs):
        policy.index = steps - 1
        return torch.zeros(len(obs), 1, 1), torch.zeros(steps, 1)

    policy.velocity, policy.embed = velocity, embed
    return policy


@pytest.fixture(autouse=True)
def eager():
    torch.compiler.set_stance("force_eager")
    yield
    torch.compiler.set_stance("default")


@pytest.mark.parametrize("solver, steps", PUBLISHED)
@pytest.mark.parametrize("deviation", [0.05, 0.1, 0.2])
def test_draws_have_the_known_mean_and_deviation(monkeypatch, solver, steps, deviation):
    """Other variances than the authors' beta fail: the posterior's gives 0.025, 0.066, 0.154 for ddpm."""
    policy = exact_policy(solver, steps, deviation)
    draws = policy.sample(torch.zeros(1000, 1), 200, torch.Generator().manual_seed(0))  # blocks of 10 states
    assert draws.shape == (1000, 200, 1) and draws.abs().max() <= 1
    assert draws.mean().item() == pytest.approx(0.3, abs=0.01)
    assert draws.std().item() == pytest.approx(PUBLISHED[solver, steps][deviation], abs=0.0025)
