"""baselines/dipo.py: the ascent of the actions, that the critics never see them, updates by hand; and it learns."""

import numpy as np
import torch
from test_baselines_frame import FAST, HAND, SMALL, ByHand

from baselines import dipo


def quadratic(obs, action):
    """Q = -(a - s)^2 per dimension; the other twin is larger and pulls the other way."""
    q = -(action - obs[:, None]).square().sum(-1)
    return torch.stack([q, 100 + 50 * action.sum(-1).abs()])


def test_ascent_reaches_the_clipped_maximiser():
    obs, action = torch.tensor([[0.4, -0.7], [3.0, -0.2]]), torch.tensor([[-1.0, 1.0], [0.0, 0.9]])
    result = dipo.ascend(quadratic, obs, action, 400, 0.03, 10.0)
    torch.testing.assert_close(result, torch.tensor([[0.4, -0.7], [1.0, -0.2]]), atol=1e-2, rtol=0)


def test_ascent_is_adam_with_the_norm_of_the_whole_batch_cut():
    torch.manual_seed(0)
    obs, action, max_norm = torch.randn(6, 2), 2 * torch.rand(6, 2) - 1, 1e-4  # small: Adam's eps is felt
    result = dipo.ascend(quadratic, obs, action, 15, 0.1, max_norm)
    a, s, m, v = action.double().numpy(), obs.double().numpy(), 0.0, 0.0
    for k in range(1, 16):
        g = 2 * (a - s)
        g = g * min(1, max_norm / np.sqrt((g**2).sum()))
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
        a = np.clip(a - 0.1 * (m / (1 - 0.9**k)) / (np.sqrt(v / (1 - 0.999**k)) + 1e-5), -1, 1)
    np.testing.assert_allclose(result.numpy(), a, rtol=1e-3, atol=1e-4)


def test_ascent_raises_the_smaller_q_and_leaves_the_critic():
    torch.manual_seed(0)
    critic, obs, action = dipo.Critic(3, 2, 32), torch.randn(64, 3), 2 * torch.rand(64, 2) - 1
    before = action.clone()
    result = dipo.ascend(critic, obs, action, 20, 0.03, 0.2)
    q_before, q_after = (critic(obs, x[:, None]).amin(0).mean() for x in (before, result))
    assert q_after > q_before + 0.001 and torch.equal(action, before) and result.abs().max() <= 1
    assert all(x.grad is None for x in critic.parameters())


def test_the_critics_rows_keep_the_actions_that_were_taken(run_script):
    """x' = x + 0.4 a holds in every row though the improved actions have moved; the critics learn from the rows."""
    flags = "--learning-starts 350 --total-timesteps 450 --eval-every 0"
    state = torch.load(run_script("baselines/dipo", *SMALL, *flags.split()) / "checkpoint.pt", weights_only=True)
    obs, next_obs, action, _, _ = state["rows"].T
    torch.testing.assert_close(next_obs - obs, 0.4 * action, rtol=0, atol=1e-6)
    moved = (state["improved"][:, 0] - action).abs()
    assert (moved > 0).float().mean() > 0.5 and moved.max() > 0.65  # in several updates more than 20 x 0.03


def test_without_write_back_every_climb_starts_at_the_action_taken(run_script):
    flags = "--learning-starts 350 --total-timesteps 450 --eval-every 0 --no-write-back"
    state = torch.load(run_script("baselines/dipo", *SMALL, *flags.split()) / "checkpoint.pt", weights_only=True)
    assert torch.equal(state["improved"], state["rows"][:, 2:3])


def test_improved_actions_start_as_the_taken_ones_also_past_the_capacity(run_script):
    flags = "--learning-starts 100 --total-timesteps 150 --eval-every 0 --buffer-size 37 --action-steps 0"
    state = torch.load(run_script("baselines/dipo", *SMALL, *flags.split()) / "checkpoint.pt", weights_only=True)
    assert state["improved"].shape == (37, 1) and torch.equal(state["improved"], state["rows"][:, 2:3])


def test_two_updates_by_hand(run_script):
    """The limit of the actions' gradient is so small that Adam's eps is felt, which otherwise undoes it."""
    flags = "--max-grad-norm 0.02 --action-steps 3 --action-grad-norm 1e-5 --action-lr 0.1 --discount 0.9"
    hand = ByHand(dipo, run_script("baselines/dipo", *HAND, *flags.split()), eps=1e-5)
    policy, critic = hand.policy, hand.critic
    improved = hand.rows[:, 6:8].clone()
    for global_step in (40, 45):
        hand.act(global_step, lambda obs: policy.sample(obs, 1, hand.generator)[:, 0])
        obs, next_obs, action, reward, terminated, _ = hand.batch()
        with torch.no_grad():
            q = hand.critic_target(next_obs, hand.policy_target.sample(next_obs, 1, hand.generator))[..., 0]
        target = reward + 0.9 * (1 - terminated) * torch.minimum(q[0], q[1])
        hand.critic_step(obs, action, target, max_norm=0.02)

        obs, *_, where = hand.batch()
        action = improved[where].clone().requires_grad_()
        adam = torch.optim.Adam([action], 0.1, eps=1e-5)
        for _ in range(3):
            (gradient,) = torch.autograd.grad(torch.minimum(*critic(obs, action[:, None])).sum(), action)
            action.grad = -gradient * min(1, 1e-5 * 2 / gradient.norm())
            adam.step()
            action.data = action.data.clip(-1, 1)
        improved[where] = action.detach()

        t = torch.randint(5, (32, 1), generator=hand.generator)
        angle, noise = torch.pi / 2 * ((t[..., None] + 1) / 5) ** 2, hand.randn(32, 1, 2)
        states, times = policy.embed(obs)
        action = action.detach()[:, None]
        predicted = policy.velocity(angle.cos() * action + angle.sin() * noise, states + times[t])
        error = (predicted - angle.cos() * noise + angle.sin() * action) ** 2
        hand.step(policy, hand.policy_adam, error.mean(), max_norm=0.02)
        hand.follow(hand.policy_target, policy)
        hand.follow(hand.critic_target, critic)
    hand.compare("policy", "policy_target", "critic", "critic_target")
    torch.testing.assert_close(hand.result["improved"], improved, rtol=1e-3, atol=1e-4)


def test_learns_the_point_mass(run_script):
    """From -4 (the first policy) to above -1 within 400 updates, by one draw."""
    run_dir = run_script("baselines/dipo", *FAST, *"--action-steps 5 --action-lr 0.1".split())
    assert torch.load(run_dir / "checkpoint.pt", weights_only=True)["evaluations"][-1]["mean"] > -1.0
