"""baselines/dacer.py: gradients of both losses, the entropy, alpha's direction, updates by hand, and that it learns."""

import math

import numpy as np
import pytest
import torch
from test_baselines_frame import FAST, HAND, ByHand

from baselines import dacer


def test_the_critics_give_a_mean_and_the_softplus_of_the_other_output():
    torch.manual_seed(0)
    critic, obs, action = dacer.Critic(3, 2, 16), torch.randn(5, 3), torch.randn(5, 4, 2)
    means, deviations = critic.distribution(obs, action)
    for i, layers in enumerate(critic.twins):
        h = torch.cat([obs[:, None].expand(5, 4, 3), action], dim=-1)
        for layer in layers[:3]:
            h = layer(h)
            h = h * torch.tanh(torch.log(1 + h.exp()))
        mean, raw = layers[3](h).unbind(-1)
        torch.testing.assert_close(means[i], mean)
        torch.testing.assert_close(deviations[i], torch.log(1 + raw.exp()))


def test_gradient_of_the_critics_loss_is_the_gaussian_likelihoods():
    """With b so large that nothing is clipped; factors are (b^2 + 0.1), and d^2 / (d^2 + 0.1), d^3 / (d^3 + 0.1)."""
    torch.manual_seed(0)
    mean, deviation = torch.randn(2, 6).double().requires_grad_(), (torch.rand(2, 6).double() + 0.3).requires_grad_()
    target, b = torch.randn(6).double(), torch.tensor([20.0, 30.0], dtype=torch.float64)
    ours = torch.autograd.grad(dacer.distributional_loss(mean, deviation, target, target, b), (mean, deviation))
    likelihood = torch.distributions.Normal(mean, deviation).log_prob(target)
    exact = torch.autograd.grad(-likelihood.sum(), (mean, deviation))
    for x, y, power in zip(ours, exact, (2, 3), strict=True):
        d = deviation.detach() ** power
        torch.testing.assert_close(x, (b[:, None] ** 2 + 0.1) * d / (d + 0.1) * y / 6)


def test_each_twin_clips_the_draw_around_its_own_mean():
    mean, deviation = torch.zeros(2, 1), torch.ones(2, 1, requires_grad=True)
    mean[1] = 10.0
    loss = dacer.distributional_loss(mean, deviation, torch.zeros(1), torch.tensor([100.0]), torch.tensor([1.0, 2.0]))
    (gradient,) = torch.autograd.grad(loss, deviation)
    expected = [-(1 + 0.1) * (3.0**2 - 1) / 1.1, -(4 + 0.1) * (6.0**2 - 1) / 1.1]
    assert gradient[:, 0].tolist() == pytest.approx(expected)


@pytest.mark.parametrize("solver", ["dpm", "ddpm"])
def test_gradient_through_the_sampler_is_the_finite_difference(monkeypatch, solver):
    """In float64 and with the same noise; some actions are clipped and have none."""
    monkeypatch.setattr(dacer, "mish", torch.nn.functional.mish)  # the script's goes through float32
    monkeypatch.setattr(torch.Tensor, "float", lambda x: x)
    torch.manual_seed(0)
    policy, obs = dacer.DiffusionPolicy(2, 2, 16, solver, 5).double(), torch.randn(4, 2).double()
    randn = torch.randn
    monkeypatch.setattr(torch, "randn", lambda *shape, **kwargs: randn(*shape, **kwargs, dtype=torch.float64))

    def total():
        action = dacer.act(policy, obs, 3, 0.3, torch.Generator().manual_seed(0))
        return (action * torch.arange(1, 7).view(3, 2)).square().sum()

    gradients = torch.autograd.grad(total(), list(policy.parameters()))
    for x, gradient in zip(policy.parameters(), gradients, strict=True):
        direction = randn(x.shape, dtype=torch.float64)
        with torch.no_grad():
            x += 1e-6 * direction
            above = total()
            x -= 2e-6 * direction
            below = total()
            x += 1e-6 * direction
        assert (gradient * direction).sum().item() == pytest.approx((above - below).item() / 2e-6, rel=1e-4, abs=1e-5)
        assert gradient.abs().max() > 0


def test_noise_is_added_and_the_sum_clipped():
    policy, obs = dacer.DiffusionPolicy(1, 2, 8, "dpm", 5), torch.zeros(1, 1)
    quiet, loud = (dacer.act(policy, obs, 4000, std, torch.Generator().manual_seed(0)).detach() for std in (0.0, 0.1))
    inside = loud.abs() < 1
    assert (loud - quiet)[inside & (quiet.abs() < 0.6)].std().item() == pytest.approx(0.1, rel=0.05)
    assert loud.abs().max() == 1


@pytest.mark.parametrize("A", [1, 6, 17])
def test_entropy_of_a_known_gaussian(A):
    """Of 200 actions per state; the estimate's bias, about -A (A + 3) / (4 N), is -0.44 at A = 17."""
    torch.manual_seed(0)
    factor = torch.randn(A, A) / A + torch.eye(A) / 2
    actions = torch.randn(256, 200, A) @ factor.T
    exact = A / 2 * math.log(2 * math.pi * math.e) + factor.double().det().abs().log().item()
    assert dacer.gaussian_entropy(actions).item() == pytest.approx(exact - A * (A + 3) / 800, abs=0.04)


def test_a_dimension_without_spread_counts_as_a_deviation_of_1e_3():
    """Its entropy alone would be minus infinity, and alpha's next value not a number."""
    torch.manual_seed(0)
    actions = torch.randn(64, 200, 2)
    actions[..., 1] = 1.0  # saturated
    alone = dacer.gaussian_entropy(actions[..., :1]).item()
    saturated = math.log(2 * math.pi * math.e * 1e-6) / 2
    assert dacer.gaussian_entropy(actions).item() == pytest.approx(alone + saturated, abs=1e-4)


@pytest.mark.parametrize("target, direction", [(5.0, 1), (-5.0, -1)])
def test_alpha_rises_below_the_target_entropy_and_falls_above(run_script, target, direction):
    flags = ["--alpha-interval", 1, "--target-entropy", target, "--alpha", 2]
    state = torch.load(run_script("baselines/dacer", *HAND, *flags) / "checkpoint.pt", weights_only=True)
    assert state["log_alpha"].item() == pytest.approx(math.log(2) + direction * 2 * 0.03, abs=1e-3)


@pytest.mark.parametrize("policy_delay", [1, 2])
def test_two_updates_by_hand(run_script, monkeypatch, policy_delay):
    """The draw of the target is of the twin with the smaller mean in each row, not of a row with a smaller mean.

    In the first alpha is stepped and, with a delay only there, the policy and the targets. z is drawn four times as
    wide, so that its bounds count.
    """
    randn = torch.randn
    monkeypatch.setattr(torch, "randn", lambda *shape, **kwargs: (1 + 3 * (len(shape) == 1)) * randn(*shape, **kwargs))
    flags = "--seed 6 --alpha 1 --noise-scale 0.3 --alpha-interval 2 --entropy-draws 9 --target-entropy 1"
    flags += f" --policy-delay {policy_delay} --alpha-lr 0.5 --reward-scale 0.4 --discount 0.9"
    hand = ByHand(dacer, run_script("baselines/dacer", *HAND, *flags.split()))
    policy, critic, b, log_alpha = hand.policy, hand.critic, None, torch.zeros(1, requires_grad=True)
    alpha_adam = torch.optim.Adam([log_alpha], 0.5)

    def act(obs, draws):
        noise = hand.randn(2, len(obs), draws, 2)
        return (policy.denoise(obs, noise[:1]) + 0.3 * alpha * noise[1]).clip(-1, 1)

    for global_step in (40, 45):
        alpha = log_alpha.exp().item()
        hand.act(global_step, lambda obs: act(obs, 1)[:, 0])
        obs, next_obs, action, reward, terminated, _ = hand.batch()
        with torch.no_grad():
            means, deviations = (x[..., 0] for x in hand.critic_target.distribution(next_obs, act(next_obs, 1)))
        z, y, y_z = hand.randn(32).clip(-3, 3), torch.zeros(32), torch.zeros(32)
        twins = [0 if means[0, i] < means[1, i] else 1 for i in range(32)]
        assert len(set(twins)) == 2 or global_step == 40
        for i, j in enumerate(twins):
            y[i] = 0.4 * reward[i] + 0.9 * (1 - terminated[i]) * means[j, i]
            y_z[i] = 0.4 * reward[i] + 0.9 * (1 - terminated[i]) * (means[j, i] + deviations[j, i] * z[i])
        m, d = (x[..., 0] for x in critic.distribution(obs, action[:, None]))
        loss = 0
        spread = d.detach().mean(1)
        b = spread if b is None else 0.7 * b + 0.3 * spread
        for i in (0, 1):
            m0, d0 = m[i].detach(), d[i].detach()
            bounded = torch.maximum(torch.minimum(y_z, m0 + 3 * b[i]), m0 - 3 * b[i])
            terms = m[i] * (y - m0) / (d0**2 + 0.1) + d[i] * ((m0 - bounded) ** 2 - d0**2) / (d0**3 + 0.1)
            loss = loss - (b[i] ** 2 + 0.1) * terms.mean()
        hand.step(critic, hand.critic_adam, loss)

        if global_step == 40 or policy_delay == 1:
            hand.step(policy, hand.policy_adam, -torch.minimum(*critic(obs, act(obs, 1))).mean())
            hand.follow(hand.critic_target, critic)
            hand.critic_target.b.zero_()  # the targets' own is not used
        if global_step == 40:
            actions = act(obs, 9).detach().double().numpy()
            covariances = [np.cov(x, rowvar=False, bias=True) + 1e-6 * np.eye(2) for x in actions]
            entropy = np.mean([np.log(2 * np.pi * np.e) + np.log(np.linalg.det(x)) / 2 for x in covariances])
            assert 1 < entropy < 2
            (log_alpha * (entropy - 1 * 2)).sum().backward()
            alpha_adam.step()
    critic.b.copy_(b)
    hand.compare("policy", "critic", "critic_target")
    assert hand.result["log_alpha"].item() == pytest.approx(log_alpha.item(), abs=1e-4)
    assert hand.logged.Scalars("policy/entropy")[-1].value == pytest.approx(entropy, abs=3e-3)  # of noisy actions


def test_learns_the_point_mass(run_script):
    """From -4 (the first policy) to above -1 within 900 updates, with little noise from the start.

    At four times this learning rate seed 2 ended saturated in all states, where no gradient comes back.
    """
    flags = "--alpha 1 --policy-delay 1 --policy-lr 5e-4 --policy-lr-end 5e-4 --total-timesteps 2000"
    run_dir = run_script("baselines/dacer", *FAST, *flags.split())
    assert torch.load(run_dir / "checkpoint.pt", weights_only=True)["evaluations"][-1]["mean"] > -1.0
