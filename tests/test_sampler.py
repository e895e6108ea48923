"""What `sample` draws, where the answer is known: a_0 ~ N(0.3, s^2), exact velocity in place of the network's."""

import math

import numpy as np
import pytest
import torch

import simpo_neg

# Deviation of the draws for each s, from benchmarks of the same solvers in another program (float64, 400,000 draws).
PUBLISHED = {
    ("dpm", 8): {0.05: 0.041, 0.1: 0.098, 0.2: 0.212},
    ("ddpm", 20): {0.05: 0.044, 0.1: 0.109, 0.2: 0.218},
}


def predict(action, alpha, sigma, deviation, mean):
    """E[a_0 | a_t] of the Gaussian, and E[eps | a_t]."""
    variance = alpha**2 * deviation**2 + sigma**2
    action_0 = mean + alpha * deviation**2 * (action - alpha * mean) / variance
    return action_0, sigma * (action - alpha * mean) / variance


def exact_policy(solver, steps, deviation, mean=0.3):
    """A policy whose velocity, in units of pi/2, is that of the Gaussian: E[alpha eps - sigma a_0 | a_t]."""
    policy = simpo_neg.DiffusionPolicy(1, 1, 8, solver, steps)
    t = (np.arange(1, steps + 1) / steps) ** {"dpm": 2, "ddpm": 1}[solver]

    def velocity(action, embedding):
        alpha, sigma = (f(math.pi / 2 * t[policy.index]) for f in (math.cos, math.sin))
        action_0, noise = predict(action, alpha, sigma, deviation, mean)
        policy.index -= 1
        return alpha * noise - sigma * action_0

    def embed(obs):
        policy.index = steps - 1
        return torch.zeros(len(obs), 1, 1), torch.zeros(steps, 1)

    policy.velocity, policy.embed = velocity, embed
    return policy


def simulate(solver, steps, deviation, mean=0.3, draws=200_000):
    """The solvers as their papers write them, in float64, with the predicted a_0 clamped to [-1, 1]."""
    rng = np.random.default_rng(0)
    angle = np.pi / 2 * (np.arange(steps + 1) / steps) ** {"dpm": 2, "ddpm": 1}[solver]
    alpha, sigma = np.cos(angle), np.sin(angle)
    x, before = rng.standard_normal(draws), None
    for i in range(steps, 0, -1):  # from time i to time i - 1
        action_0 = predict(x, alpha[i], sigma[i], deviation, mean)[0].clip(-1, 1)
        if i == 1:
            return action_0
        if solver == "ddpm":  # Ho et al. 2020, (7) and algorithm 2, with sigma_t^2 = beta_t
            beta = 1 - alpha[i] ** 2 / alpha[i - 1] ** 2
            x = (alpha[i - 1] * beta * action_0 + alpha[i] / alpha[i - 1] * sigma[i - 1] ** 2 * x) / sigma[i] ** 2
            x += np.sqrt(beta) * rng.standard_normal(draws)
        else:  # Lu et al. 2022, DPM-Solver++(2M), algorithm 2; first order after an infinite step
            half_log_snr = np.log(np.maximum(alpha, 1e-300)) - np.log(np.maximum(sigma, 1e-300))
            d = action_0
            if i < steps - 1:
                r = (half_log_snr[i] - half_log_snr[i + 1]) / (half_log_snr[i - 1] - half_log_snr[i])
                d = (1 + 1 / (2 * r)) * action_0 - before / (2 * r)
            shrink = np.exp(half_log_snr[i] - half_log_snr[i - 1]) if i < steps else 0.0
            x = sigma[i - 1] / sigma[i] * x - alpha[i - 1] * (shrink - 1) * d
        before = action_0


def draw(solver, steps, deviation, mean=0.3):
    policy = exact_policy(solver, steps, deviation, mean)
    draws = policy.sample(torch.zeros(1000, 1), 200, torch.Generator().manual_seed(0))  # blocks of 10 states
    assert draws.shape == (1000, 200, 1) and draws.abs().max() <= 1
    return draws.numpy()


@pytest.mark.parametrize("solver, steps", PUBLISHED)
@pytest.mark.parametrize("deviation", [0.05, 0.1, 0.2])
def test_draws_have_the_known_mean_and_deviation(solver, steps, deviation):
    """Other variances than the authors' beta fail: the posterior's gives 0.025, 0.066, 0.154 for ddpm."""
    draws = draw(solver, steps, deviation)
    assert draws.mean() == pytest.approx(0.3, abs=0.01)
    assert draws.std() == pytest.approx(PUBLISHED[solver, steps][deviation], abs=0.0025)


@pytest.mark.parametrize("solver, steps", [*PUBLISHED, ("dpm", 3), ("dpm", 20), ("ddpm", 5)])
@pytest.mark.parametrize("deviation", [0.1, 0.5])
def test_draws_are_those_of_an_independent_simulation(solver, steps, deviation):
    """Where a_0 leaves [-1, 1] now and then, too: the prediction is clamped in every step."""
    draws, expected = draw(solver, steps, deviation), simulate(solver, steps, deviation)
    quantiles = np.linspace(0.01, 0.99, 25)
    np.testing.assert_allclose(np.quantile(draws, quantiles), np.quantile(expected, quantiles), atol=0.01)
    assert draws.mean() == pytest.approx(expected.mean(), abs=0.005)
    assert draws.std() == pytest.approx(expected.std(), abs=0.004)


@pytest.mark.parametrize("solver, steps", PUBLISHED)
def test_no_noise_in_the_last_step(solver, steps):
    """An action that is certain is drawn exactly."""
    np.testing.assert_allclose(draw(solver, steps, deviation=0.0), 0.3, atol=1e-5)


@pytest.mark.parametrize("solver", ["dpm", "ddpm"])
def test_every_state_and_every_draw_has_its_own_noise(solver):
    """500 equal states in blocks of 64 and a rest: no two of them see the same, and a generator decides them all."""
    torch.manual_seed(0)
    policy = simpo_neg.DiffusionPolicy(3, 2, 16, solver, 5)
    draws = policy.sample(torch.ones(500, 3), 32, torch.Generator().manual_seed(0))
    assert draws.shape == (500, 32, 2)
    rows = draws.view(-1, 2)
    inside = rows[(rows.abs() < 1).all(1)]
    assert len(inside) > 0.5 * len(rows) and len(inside.unique(dim=0)) > 0.999 * len(inside)
    again, other = (policy.sample(torch.ones(500, 3), 32, torch.Generator().manual_seed(seed)) for seed in (0, 1))
    assert torch.equal(draws, again) and len(torch.cat([inside, other.view(-1, 2)]).unique(dim=0)) > len(rows)


def test_blocks_keep_states_and_draws_together():
    """Draws of a state are near what the state asks for, wherever it stands among the blocks."""
    torch.manual_seed(0)
    policy = simpo_neg.DiffusionPolicy(1, 1, 16, "dpm", 8)
    target = torch.linspace(-0.9, 0.9, 300)[torch.randperm(300)]

    def velocity(action, embedding):
        alpha, sigma = embedding[..., :1], embedding[..., 1:2]
        goal = embedding[..., 2:]
        return (alpha * (action - alpha * goal) - sigma**2 * goal) / sigma  # alpha eps - sigma a_0, for a_0 = goal

    coefficients = policy.step_coefficients[:, :2]
    policy.embed = lambda obs: (
        torch.cat([torch.zeros(len(obs), 1, 2), obs[:, None]], -1),
        torch.cat([coefficients, torch.zeros(8, 1)], 1),
    )
    policy.velocity = velocity
    draws = policy.sample(target[:, None], 32, torch.Generator().manual_seed(0))
    torch.testing.assert_close(draws[..., 0], target[:, None].expand(300, 32), rtol=0, atol=1e-4)
