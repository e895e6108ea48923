"""baselines/qsm.py: the gradient of Q, the sampler on a quadratic Q, whole updates by hand, and that it learns."""

import numpy as np
import pytest
import torch
from test_baselines_frame import FAST, HAND, ByHand

from baselines import qsm


def test_gradient_of_q_is_the_finite_difference_also_outside_the_bounds():
    torch.manual_seed(0)
    critic, obs, action, h = qsm.Critic(3, 2, 16).double(), torch.randn(8, 3).double(), 2 * torch.randn(8, 1, 2), 1e-2
    gradient = qsm.q_gradient(critic, obs, action.double())
    for i in range(2):
        step = h * torch.eye(2, dtype=torch.float64)[i]
        difference = (critic(obs, action + step) - critic(obs, action - step)).mean(0) / (2 * h)
        torch.testing.assert_close(gradient[..., i], difference, rtol=1e-2, atol=1e-4)
    assert action.abs().max() > 1.5 and all(x.grad is None for x in critic.parameters())


@pytest.mark.parametrize("solver, steps", [("ddpm", 20), ("dpm", 8)])
def test_on_a_quadratic_q_the_sampler_is_a_linear_recursion(monkeypatch, solver, steps):
    """Q = -k/2 |a - m|^2 has eps* = sigma k (a_t - m); mean and variance follow step by step, without the clamp of a_0.

    The loss of that noise is 0. For ddpm the recursion is written with betas, for dpm with lambda = log(alpha/sigma).
    """
    k, m = 3.0, torch.tensor([0.3, -0.5])
    policy = qsm.DiffusionPolicy(1, 2, 8, solver, steps)
    alphas, sigmas = policy.step_coefficients[:, :2].double().T.numpy()

    def velocity(noisy_action, embedding):
        i = embedding.long()  # the index of the time, put in the place of the embedding
        alpha, sigma = policy.step_coefficients[i][..., 0, :2].split(1, dim=-1)
        return (sigma * k * (noisy_action - m) - sigma * noisy_action) / alpha.where(i < steps - 1, torch.inf)

    monkeypatch.setattr(policy, "velocity", velocity)
    monkeypatch.setattr(policy, "embed", lambda obs: (torch.zeros(len(obs), 1, 1), torch.arange(1.0 * steps)[:, None]))
    monkeypatch.setattr(torch.Tensor, "clamp", lambda x, *bounds: x)
    t, noisy_action = torch.randint(steps - 1, (64, 1)), torch.randn(64, 1, 2)
    target = policy.step_coefficients[t, 1:2] * k * (noisy_action - m)
    assert policy.loss(torch.zeros(64, 1), noisy_action, t, target) < 1e-9

    mean, variance = np.zeros(2), 1.0
    draws = policy.sample(torch.zeros(1, 1), 200_000, torch.Generator().manual_seed(0))[0].double()
    if solver == "ddpm":
        for i in reversed(range(steps)):
            alpha, sigma = alphas[i], sigmas[i]
            alpha_u, sigma_u = (alphas[i - 1], sigmas[i - 1]) if i else (1.0, 0.0)
            slope, offset = (1 - sigma**2 * k) / alpha, sigma**2 * k / alpha * m.numpy()  # a_0 = slope a_t + offset
            if i == steps - 1:  # u = 0 and alpha = 0
                slope, offset = 0.0, 0.0
            beta = 1 - (alpha / alpha_u) ** 2
            a = np.sqrt(1 - beta) * sigma_u**2 / sigma**2 + alpha_u * beta / sigma**2 * slope
            mean = a * mean + alpha_u * beta / sigma**2 * offset
            variance = a**2 * variance + beta * (i > 0)  # the last step adds no noise
    else:
        rows = [np.array([1.0, 0.0, 0.0]), np.zeros(3)]  # a_t, a_0 of the step before, as [a_T, m_1, m_2] -> numbers
        for i in reversed(range(steps)):
            alpha, sigma = alphas[i], sigmas[i]
            alpha_u, sigma_u = (alphas[i - 1], sigmas[i - 1]) if i else (1.0, 0.0)
            action, action_0_before = rows
            action_0 = np.zeros(3)
            if i < steps - 1:
                action_0 = (1 - sigma**2 * k) / alpha * action + sigma**2 * k / alpha * np.array([0, *m.numpy()])
            d = action_0
            if 0 < i < steps - 2:  # second order
                lam = [np.log(alphas[j] / sigmas[j]) for j in (i + 1, i, i - 1)]
                d = action_0 + (lam[2] - lam[1]) / (2 * (lam[1] - lam[0])) * (action_0 - action_0_before)
            rows = [sigma_u / sigma * action + (alpha_u - alpha * sigma_u / sigma) * d, action_0]
        mean, variance = rows[0][1:], rows[0][0] ** 2
    assert draws.mean(0).numpy() == pytest.approx(mean, abs=5 * np.sqrt(variance / 200_000) + 1e-5)
    assert draws.var(0).numpy() == pytest.approx(np.full(2, variance), rel=0.02)
    assert np.abs(mean - m.numpy()).max() < 0.2  # towards the maximum of Q, not away from it


@pytest.mark.parametrize("q_scale", [0, 50])
def test_two_updates_by_hand(run_script, q_scale):
    flags = f"--q-scale {q_scale} --temperature 0.3 --exploration-noise 0.2 --discount 0.9"
    hand = ByHand(qsm, run_script("baselines/qsm", *HAND, *flags.split()), solver="ddpm")
    policy, critic = hand.policy, hand.critic

    def explore(obs):
        return (policy.sample(obs, 1, hand.generator) + 0.2 * hand.randn(len(obs), 1, 2)).clip(-1, 1)

    for global_step in (40, 45):
        hand.act(global_step, lambda obs: explore(obs)[:, 0])
        obs, next_obs, action, reward, terminated, _ = hand.batch()
        with torch.no_grad():
            q = hand.critic_target(next_obs, explore(next_obs))[..., 0]
        hand.critic_step(obs, action, reward + 0.9 * (1 - terminated) * torch.minimum(q[0], q[1]))

        t = torch.randint(5, (32, 1), generator=hand.generator)
        angle = torch.pi / 2 * (t[..., None] + 1) / 5
        noisy = (angle.cos() * action[:, None] + angle.sin() * hand.randn(32, 1, 2)).requires_grad_()
        q = critic(obs, noisy)
        gradient = torch.autograd.grad((q[0] + q[1]).sum() / 2, noisy)[0]
        target = -50 * gradient if q_scale else -angle.sin() * gradient / gradient.abs().mean() / 0.3
        states, times = policy.embed(obs)
        noise = angle.sin() * noisy.detach() + angle.cos() * policy.velocity(noisy.detach(), states + times[t])
        hand.step(policy, hand.policy_adam, ((noise - target) ** 2).mean())
        hand.follow(hand.critic_target, critic)
    hand.compare("policy", "critic", "critic_target")


def test_learns_the_point_mass(run_script):
    """From -4 (the first policy) to above -1 within 400 updates, by one draw."""
    run_dir = run_script("baselines/qsm", *FAST)
    assert torch.load(run_dir / "checkpoint.pt", weights_only=True)["evaluations"][-1]["mean"] > -1.0
