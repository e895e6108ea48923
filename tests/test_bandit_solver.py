"""bandit.py: what the two solvers draw where the answer is known: a_0 ~ N(0.3, s^2), its velocity for the network's.

DRAWN has the deviations that float64 recursions written apart from the script give (DPM-Solver++(2M) with 8 calls on
(i/T)^2; ancestral steps with the variance of a_t given a_u, none in the last, with 20 on i/T).
"""

import math

import pytest
import torch

import bandit

STEPS = {"dpm": 8, "ddpm": 20}
DEVIATIONS = (0.05, 0.1, 0.2, 0.5, 0.8)
DRAWN = {"dpm": (0.041, 0.098, 0.212, 0.518, 0.780), "ddpm": (0.044, 0.109, 0.218, 0.518, 0.807)}
MEAN = 0.3


def policies_with_exact_velocity(solver, steps, monkeypatch):
    s = torch.tensor(DEVIATIONS)[:, None]

    def velocity(self, x, i):
        t = ((i + 1) / steps) ** (2 if solver == "dpm" else 1)
        alpha, sigma = math.cos(math.pi / 2 * t), math.sin(math.pi / 2 * t)
        action = MEAN + alpha * s**2 * (x - alpha * MEAN) / (alpha**2 * s**2 + sigma**2)  # E[a_0 | a_t = x]
        return alpha * (x - alpha * action) / sigma - sigma * action

    monkeypatch.setattr(bandit.Policies, "velocity", velocity)
    generator, zeros = torch.Generator().manual_seed(0), torch.zeros(len(s), 1)
    schedule = bandit.noise_schedule(solver, steps)
    return bandit.Policies(zeros, zeros + 1, [generator], [0] * len(s), 4, schedule), generator


@pytest.mark.parametrize("solver", STEPS)
def test_mean_and_deviation_of_the_draws(solver, monkeypatch):
    policies, generator = policies_with_exact_velocity(solver, STEPS[solver], monkeypatch)
    draws = policies.sample(torch.randn(len(DEVIATIONS), STEPS[solver], 100_000, generator=generator), 3.0)
    assert draws.mean(1).tolist() == pytest.approx([MEAN] * len(DEVIATIONS), abs=0.008)
    for drawn, known, s in zip(draws.std(1).tolist(), DRAWN[solver], DEVIATIONS, strict=True):
        assert drawn == pytest.approx(known, abs=0.0005 + 0.006 * s), s


@pytest.mark.parametrize("solver, low, high", [("dpm", 0.0, 0.3), ("ddpm", 0.4, 0.6)])
def test_order_of_the_solver(solver, low, high, monkeypatch):
    """Twice the steps: a quarter of the error in the deviation of dpm, half that of ddpm."""
    errors = []
    for steps in (40, 80):
        policies, generator = policies_with_exact_velocity(solver, steps, monkeypatch)
        noise = torch.randn(1, steps, 100_000, generator=generator)
        noise = (noise - noise.mean(-1, keepdim=True)) / noise.std(-1, keepdim=True)
        drawn = policies.sample(noise.expand(len(DEVIATIONS), -1, -1), 3.0).std(1)
        errors.append(drawn[2].item() / DEVIATIONS[2] - 1)
    assert low < errors[1] / errors[0] < high, errors


def test_dpm_is_deterministic_given_a_1(monkeypatch):
    policies, generator = policies_with_exact_velocity("dpm", 8, monkeypatch)
    noise = torch.randn(len(DEVIATIONS), 8, 1000, generator=generator)
    other = torch.cat([noise[:, :1], torch.randn(len(DEVIATIONS), 7, 1000, generator=generator)], 1)
    assert torch.equal(policies.sample(noise, 3.0), policies.sample(other, 3.0))


@pytest.mark.parametrize("solver", STEPS)
def test_predicted_action_is_held_in_the_bounds(solver, monkeypatch):
    policies, generator = policies_with_exact_velocity(solver, STEPS[solver], monkeypatch)
    draws = policies.sample(torch.randn(len(DEVIATIONS), STEPS[solver], 1000, generator=generator), 0.25)
    assert draws.max() == 0.25 and draws.min() >= -0.25


@pytest.mark.parametrize("solver", STEPS)
def test_trained_on_the_times_that_are_sampled(solver, monkeypatch):
    """Every step of the solver, and no other, is drawn equally often; noisy actions are those of its time."""
    steps, seen, loss = STEPS[solver], [], bandit.Policies.loss

    def spy(self, action, weights, i, noise, error_clip):
        seen.append(i.flatten())
        return loss(self, action, weights, i, noise, error_clip)

    monkeypatch.setattr(bandit.Policies, "loss", spy)
    args = bandit.Args(seeds=8, rounds=2, updates=20, fit_updates=20, solver=solver, diffusion_steps=steps)
    for learn in (
        lambda: bandit.train(bandit.trials_for(bandit.ESCAPE, ["Linear"], args), args),
        lambda: bandit.fit([torch.ones_like], args),
    ):
        seen.clear()
        learn()
        share = torch.cat(seen).bincount(minlength=steps) / sum(map(len, seen))
        assert share.tolist() == pytest.approx([1 / steps] * steps, rel=0.15)


def test_where_dpm_is_of_first_order():
    """The step from t = 1, the one after it, whose step before was infinitely long in log(alpha / sigma), the last."""
    t, alpha, sigma, from_t, from_0, extrapolate, std = bandit.noise_schedule("dpm", 8).unbind(1)
    assert extrapolate[[0, 6, 7]].tolist() == [0, 0, 0] and (extrapolate[1:6] > 0).all() and (std == 0).all()
    assert (from_t[0], from_0[0], alpha[7], sigma[7], t[7]) == (0, 1, 0, 1, 1)
