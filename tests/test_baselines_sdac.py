"""baselines/sdac.py: its draws, that its optimum is exp(Q / lambda), whole updates by hand, and that it learns."""

import numpy as np
import pytest
import torch
from scipy.stats import kstest, truncnorm, wasserstein_distance
from test_baselines_frame import FAST, HAND, ByHand

from baselines import sdac


@pytest.mark.parametrize("alpha, noisy_action", [(0.9997, 1.05), (0.9997, -1.1), (0.6, 0.1), (0.36, 3.5), (0.01, -4.0)])
def test_clean_actions_are_truncated_normals(alpha, noisy_action):
    """Also in the tails, where float32 or the right tail would lose the digits: a_t is up to 5 deviations away."""
    sigma = np.sqrt(1 - alpha**2)
    tensors = [torch.tensor([[[x]]], dtype=torch.float64) for x in (noisy_action, alpha, sigma)]
    draws = sdac.draw_clean_actions(*tensors, 20_000, torch.Generator().manual_seed(0))
    assert draws.shape == (1, 20_000, 1) and draws.abs().max() <= 1
    mean, std = noisy_action / alpha, sigma / alpha
    exact = truncnorm((-1 - mean) / std, (1 - mean) / std, mean, std)
    assert kstest(draws.flatten().double().numpy(), exact.cdf).pvalue > 1e-3


def test_clean_actions_of_pure_noise_are_uniform():
    policy = sdac.DiffusionPolicy(1, 1, 8, "dpm", 8)
    alpha, sigma = policy.step_coefficients[-1, :2].view(2, 1, 1, 1)
    draws = sdac.draw_clean_actions(torch.full((1, 1, 1), 3.0), alpha, sigma, 20_000, torch.Generator().manual_seed(0))
    assert kstest(draws.flatten().double().numpy(), "uniform", (-1, 2)).pvalue > 1e-3


def test_the_optimum_samples_exp_q_over_lambda(monkeypatch):
    """The sampler with the minimiser of the loss, tabulated per time on a grid of a_t, against the exact density."""
    temperature, steps, grid = 0.5, 40, torch.linspace(-5, 5, 401)

    def q(action):
        return torch.cos(5 * action) + action / 2  # three maxima of different size

    policy, generator = sdac.DiffusionPolicy(1, 1, 8, "dpm", steps), torch.Generator().manual_seed(0)
    table = []
    for alpha, sigma in policy.step_coefficients[:, :2]:
        inside = grid.clamp(-alpha - 5 * sigma, alpha + 5 * sigma)[:, None, None]
        particles = sdac.draw_clean_actions(inside, alpha, sigma, 500, generator)  # (401, 500, 1)
        weights = torch.softmax(q(particles) / temperature, dim=1)
        mean_action = (weights * particles).sum((1, 2))
        table.append((alpha * inside[:, 0, 0] - mean_action) / sigma)

    def velocity(noisy_action, embedding):
        where = ((noisy_action + 5) / 10 * 400).clamp(0, 399.999)
        left, values = where.long(), table[int(embedding.flatten()[0])]
        return torch.lerp(values[left], values[left + 1], where - left)

    monkeypatch.setattr(policy, "velocity", velocity)
    monkeypatch.setattr(policy, "embed", lambda obs: (torch.zeros(len(obs), 1, 1), torch.arange(1.0 * steps)[:, None]))
    draws = policy.sample(torch.zeros(1, 1), 20_000, generator).flatten().numpy()
    actions = torch.linspace(-1, 1, 2001)
    density = torch.softmax(q(actions) / temperature, 0).numpy()
    distance = wasserstein_distance(draws, actions.numpy(), v_weights=density)
    assert distance < 0.02 < 0.1 < wasserstein_distance(actions.numpy(), actions.numpy(), v_weights=density)


def test_two_updates_by_hand(run_script):
    """The loss here is the sum of w_j |v_j - v_theta|^2, each v_j a velocity; quantiles are SciPy's."""
    flags = "--num-particles 7 --temperature 0.5 --discount 0.9"
    hand = ByHand(sdac, run_script("baselines/sdac", *HAND, *flags.split()))
    policy, critic = hand.policy, hand.critic
    for global_step in (40, 45):
        hand.act(global_step, lambda obs: policy.sample(obs, 1, hand.generator)[:, 0])
        obs, next_obs, action, reward, terminated, _ = hand.batch()
        with torch.no_grad():
            q = hand.critic_target(next_obs, policy.sample(next_obs, 1, hand.generator))[..., 0]
        hand.critic_step(obs, action, reward + 0.9 * (1 - terminated) * torch.minimum(q[0], q[1]))

        t = torch.randint(5, (32, 1), generator=hand.generator)
        angle = torch.pi / 2 * ((t[..., None] + 1) / 5) ** 2
        cos, sin = angle.cos().clamp(min=1e-6), angle.sin()
        noisy = cos * action[:, None] + sin * hand.randn(32, 1, 2)
        u = torch.rand(32, 7, 2, generator=hand.generator, dtype=torch.float64).numpy()
        mean, std = (noisy / cos).double().numpy(), (sin / cos).double().numpy()
        exact = truncnorm((-1 - mean) / std, (1 - mean) / std, mean, std)
        particles = torch.tensor(np.where(mean < 0, exact.isf(u), exact.ppf(u)), dtype=torch.float32).clip(-1, 1)
        with torch.no_grad():
            weights = (torch.minimum(*critic(obs, particles)) / 0.5).exp()
        weights = weights / weights.sum(1, keepdim=True)  # (32, 7)
        velocity = cos * (noisy - cos * particles) / sin - sin * particles  # (32, 7, 2)
        states, times = policy.embed(obs)
        error = (policy.velocity(noisy, states + times[t]) - velocity) ** 2
        hand.step(policy, hand.policy_adam, (weights[..., None] * error).sum(1).mean())
        hand.follow(hand.critic_target, critic)
    hand.compare("policy", "critic", "critic_target", policy_loss=False)  # that differs by a constant


def test_learns_the_point_mass(run_script):
    """From -4 (the first policy) to above -1 within 400 updates, by one draw."""
    run_dir = run_script("baselines/sdac", *FAST, "--num-particles", "32")
    assert torch.load(run_dir / "checkpoint.pt", weights_only=True)["evaluations"][-1]["mean"] > -1.0
