"""The diffusion, trained on draws of a known density with known weights, generates what (8)-(10) say."""

import math

import numpy as np
import pytest
import torch
from scipy.stats import wasserstein_distance

import simpo_neg

CENTRES, WIDTH = torch.tensor([-0.6, 0.0, 0.6]), 0.1  # pi_old is a mixture of three Gaussians in each of two states
MASSES = torch.tensor([0.4, 0.3, 0.3])
MEAN_WEIGHTS = torch.tensor([[0.1, 0.8, 2.4], [2.2, 0.4, 0.0]])  # E[w | component], one row per state
STATES = torch.tensor([[-1.0], [1.0]])
BOUND = {False: 0.08, True: 0.13}  # of the Wasserstein distance; signed weights are noisier to fit


def fit(signed, steps=1500, batch=512, clip_negative=False):
    """A policy fitted to draws of pi_old. Signed weights are often negative but have the same mean given a_0.

    So E[w | a_t] > 0 everywhere (case I), and signed or not, the policy must generate the same distribution, (10).
    """
    torch.manual_seed(0)
    policy = simpo_neg.DiffusionPolicy(obs_dim=1, action_dim=1, hidden_dim=64, solver="dpm", steps=8)
    optimizer = torch.optim.Adam(policy.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        component = torch.multinomial(MASSES, 2 * batch, replacement=True).view(2, batch)
        action = (CENTRES[component] + WIDTH * torch.randn(2, batch))[..., None]
        weights = MEAN_WEIGHTS.gather(1, component)
        if signed:
            weights = weights + 2 * (torch.randint(2, weights.shape) * 2 - 1)
        if clip_negative:
            weights = weights.clamp(min=0)
        t, noise = torch.randint(8, (2, batch)), torch.randn(2, batch, 1)
        loss = policy.loss(STATES, action, weights, t, noise, error_clip=1e9)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return policy


def mixture(masses, size=20_000):
    """Exact draws of the mixture with these masses."""
    component = torch.multinomial(masses, size, replacement=True, generator=torch.Generator().manual_seed(2))
    return (CENTRES[component] + WIDTH * torch.randn(size, generator=torch.Generator().manual_seed(3))).numpy()


def distance(policy, state):
    """Wasserstein-1 between the policy's draws and the closed form (10) at t = 0: pi_old E[w | a_0] / Z."""
    draws = policy.sample(STATES, 20_000, torch.Generator().manual_seed(1))[state, :, 0]
    return wasserstein_distance(draws.numpy(), mixture(MASSES * MEAN_WEIGHTS[state]))


@pytest.fixture(scope="module")
def fitted():
    return {signed: fit(signed) for signed in (False, True)}


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("state", [0, 1])
def test_draws_follow_the_reweighted_density(fitted, signed, state):
    unweighted = wasserstein_distance(mixture(MASSES), mixture(MASSES * MEAN_WEIGHTS[state]))
    assert unweighted > 3 * BOUND[signed]  # so that the bound means something
    assert distance(fitted[signed], state) < BOUND[signed]


def test_dropping_negative_weights_generates_something_else():
    assert min(distance(fit(True, steps=600, clip_negative=True), state) for state in (0, 1)) > 2 * BOUND[True]


@pytest.mark.parametrize("signed", [False, True])
def test_learned_velocity_is_the_closed_form(fitted, signed):
    """(8): v* = E[w v_t(a_t | a_0) | a_t] / E[w | a_t], by sums over the components, where the path (10) has mass."""
    policy, errors, scale = fitted[signed], [], []
    centres, masses = CENTRES.double().numpy(), MASSES.double().numpy()
    for i in (2, 4, 6, 7):
        t = ((i + 1) / 8) ** 2
        alpha, sigma = np.cos(np.pi * t / 2), np.sin(np.pi * t / 2)
        x = np.linspace(-2.5, 2.5, 201)[:, None]
        # Per component, a_t is Gaussian, and E[a_0 | a_t] and E[eps | a_t] are linear in a_t.
        variance = (alpha * WIDTH) ** 2 + sigma**2
        path = masses * np.exp(-0.5 * (x - alpha * centres) ** 2 / variance)  # (X, components)
        action = centres + alpha * WIDTH**2 / variance * (x - alpha * centres)
        eps = sigma / variance * (x - alpha * centres)
        conditional = np.pi / 2 * (-sigma * action + alpha * eps)  # alpha'_t a_0 + sigma'_t eps
        noisy = torch.tensor(x, dtype=torch.float32).expand(2, -1, 1)
        with torch.no_grad():
            states, times = policy.embed(STATES)
            learned = np.pi / 2 * policy.velocity(noisy, states + times[i])[..., 0].double().numpy()
        for state in range(2):
            posterior = path * MEAN_WEIGHTS[state].double().numpy()
            expected = (posterior * conditional).sum(1) / posterior.sum(1)
            mass = posterior.sum(1) / posterior.sum()
            errors.append((mass * (learned[state] - expected) ** 2).sum())
            unweighted = (path * conditional).sum(1) / path.sum(1)
            scale.append((mass * (unweighted - expected) ** 2).sum())
    assert np.mean(errors) < 0.1 * np.mean(scale)


def test_first_layer_parts_add_up_to_the_whole_network():
    """embed and velocity together are a plain network of [a_t, s, t]."""
    torch.manual_seed(0)
    policy = simpo_neg.DiffusionPolicy(obs_dim=3, action_dim=2, hidden_dim=16, solver="dpm", steps=5)
    obs, noisy, i = torch.randn(4, 3), torch.randn(4, 7, 2), 2
    states, times = policy.embed(obs)
    h = torch.cat([noisy, obs[:, None].expand(4, 7, 3), policy.time_features[i].expand(4, 7, -1)], dim=-1)
    for layer in policy.layers[:-1]:
        h = torch.nn.functional.mish(layer(h))
    torch.testing.assert_close(policy.velocity(noisy, states + times[i]), policy.layers[-1](h), rtol=1e-4, atol=1e-5)


def test_critic_is_two_plain_networks():
    torch.manual_seed(0)
    critic = simpo_neg.Critic(obs_dim=3, action_dim=2, hidden_dim=16)
    obs, action = torch.randn(4, 3), torch.randn(4, 7, 2)
    q = critic(obs, action)
    assert q.shape == (2, 4, 7) and (q[0] - q[1]).abs().min() > 0  # twins that start equal stay equal
    for twin, values in zip(critic.twins, q, strict=True):
        h = torch.cat([obs[:, None].expand(4, 7, 3), action], dim=-1)
        for layer in twin[:-1]:
            h = torch.nn.functional.mish(layer(h))
        torch.testing.assert_close(values, twin[-1](h)[..., 0], rtol=1e-4, atol=1e-5)
    with pytest.raises(IndexError):  # else (B, A) would be each action at each state
        critic(obs, action[:, 0])


def test_mish_and_its_gradient():
    x = torch.linspace(-100, 100, 2001, requires_grad=True)
    ours, reference = simpo_neg.mish(x), torch.nn.functional.mish(x)
    torch.testing.assert_close(ours, reference)
    torch.testing.assert_close(*(torch.autograd.grad(y.sum(), x)[0] for y in (ours, reference)), rtol=1e-4, atol=1e-6)


def test_error_clip_bounds_the_loss_with_negative_weights():
    """Case II: with weights of -1 the loss is unbounded below without the clip, and at least -error_clip with it."""
    policy = simpo_neg.DiffusionPolicy(obs_dim=1, action_dim=1, hidden_dim=16, solver="dpm", steps=8)
    with torch.no_grad():
        policy.layers[-1].bias += 1000
    action, noise = torch.zeros(1, 8, 1), torch.randn(1, 8, 1)
    settings = STATES[:1], action, -torch.ones(1, 8), torch.randint(8, (1, 8)), noise
    assert policy.loss(*settings, error_clip=1e9) < -1e5
    assert policy.loss(*settings, error_clip=5.0) == -5.0


def shares_off(epsilon, error_clip):
    """Share of case I whose minimiser is over 0.1 (pi/2) from (8); of it with E[w | a_t] > 0.5; of the mass of (10).

    pi_old is N(0, 0.5^2) on [-1, 1], Q(s, a) = a, lambda gives the weights a KL of 1.5; sums over a grid of a_0. The
    minimiser is looked for downhill from (8), in steps of 0.01.
    """
    action, a_t = torch.linspace(-1, 1, 401, dtype=torch.float64), torch.linspace(-4, 4, 321, dtype=torch.float64)
    density = torch.softmax(-0.5 * (action / 0.5) ** 2, dim=0)
    draws = action[torch.searchsorted(density.cumsum(0), (torch.arange(4096) + 0.5) / 4096)]
    temperatures = torch.logspace(-2, 1, 121, dtype=torch.float64)
    weigh = [simpo_neg.reweight(draws, temperature, 1.0, epsilon) for temperature in temperatures]
    best = min(range(121), key=lambda j: abs(simpo_neg.kl(weigh[j][0]) - 1.5))
    w = ((action - weigh[best][1]) / temperatures[best]).clamp(min=-epsilon)
    policy, size = simpo_neg.DiffusionPolicy(1, 1, 8, "dpm", 8).double(), (len(a_t), len(action))
    policy.embed = lambda obs: (torch.zeros(len(obs), 1, 1), torch.zeros(8, 1))  # not used
    shares = torch.zeros(5, dtype=torch.float64)
    for i, (alpha, sigma) in enumerate(policy.step_coefficients[:, :2]):
        noise = (a_t[:, None] - alpha * action) / sigma  # (a_t, a_0)
        joint = torch.exp(-0.5 * noise**2) * density
        joint = joint / joint.sum()
        weights = joint / joint.sum(1, keepdim=True) * w
        expected_w = weights.sum(1)
        closed_form = (weights * (alpha * noise - sigma * action)).sum(1) / expected_w  # (8)
        particles, times = action[:, None].expand(*size, 1), torch.full(size, i)
        velocity = closed_form.clone()
        for _ in range(12):
            velocity.requires_grad_()
            policy.velocity = lambda noisy_action, embedding, v=velocity: v[:, None, None].expand(*size, 1)
            loss = policy.loss(torch.zeros(len(a_t), 1), particles, weights, times, noise[..., None], error_clip)
            (gradient,) = torch.autograd.grad(loss * action.numel() * a_t.numel(), velocity)
            velocity = velocity.detach() - 0.01 * gradient.sign() * (gradient.abs() > 1e-9)
        mass, moved = joint.sum(1) * (expected_w > 0), (velocity - closed_form).abs() > 0.1
        drawn = (joint @ w).clamp(min=0)  # (10)
        parts = mass, mass[moved], mass[moved & (expected_w > 0.5)], drawn, drawn[moved]
        shares += torch.stack([part.sum() for part in parts])
    case_1, off, heavy, drawn, drawn_off = shares.tolist()
    return off / case_1, heavy / off if off else 0, drawn_off / drawn


def test_the_error_clip_moves_the_minimiser_where_weights_are_negative():
    """Without it (8) is stationary; at 5, its default, too, where no weight is negative; else not in a fifth of case I.

    Nor is that only beside case II: half of it has a mean weight above 0.5.
    """
    assert shares_off(0.5, math.inf) == (0, 0, 0)
    assert shares_off(0.0, 5.0) == (0, 0, 0)
    assert shares_off(0.5, 5.0) == pytest.approx((0.22, 0.54, 0.08), abs=0.01)
