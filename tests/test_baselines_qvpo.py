"""baselines/qvpo.py: its weights, what the SiMPO paper says of them, two whole updates by hand, and that it learns."""

import pytest
import torch
from test_baselines_frame import FAST, HAND, ByHand

import simpo_power
from baselines import qvpo


def test_weights_of_three_actions():
    q = torch.tensor([[3.0, 0.0, 0.0], [-5.0, -1.0, -3.0], [2.0, 2.0, 2.0], [0.5, 0.9, 1.6]])
    assert qvpo.weigh(q, "adv").tolist() == [[2, 0, 0], [0, 2, 0], [0, 0, 0], [0, 0, pytest.approx(0.6)]]
    assert qvpo.weigh(q, "cut").tolist() == [[3, 0, 0], [0, 0, 0], [2, 2, 2], [0, 0, pytest.approx(1.6)]]  # above 1


def test_with_all_draws_kept_it_is_simpo_power_at_nu_equal_to_v():
    """Example 3.2, as gradients of the policy: equal, up to the mean advantage, which is SiMPO's lambda then."""
    torch.manual_seed(0)
    policy = qvpo.DiffusionPolicy(3, 2, 32, "dpm", 8)
    obs, actions, noise = torch.randn(1, 3), torch.rand(1, 16, 2), torch.randn(1, 16, 2)
    q, t = 10 * torch.randn(1, 16), torch.randint(8, (1, 16))
    advantage = (q - q.mean()).clamp(min=0).mean().item()
    weights, nu = simpo_power.reweight(q, advantage, 1.0)
    assert nu.item() == pytest.approx(q.mean().item(), abs=1e-5)
    simpo = torch.autograd.grad(policy.loss(obs, actions, weights, t, noise, torch.inf), policy.parameters())
    ours = torch.autograd.grad(
        policy.loss(obs, actions, qvpo.weigh(q, "adv"), t, noise, torch.inf), policy.parameters()
    )
    for x, y in zip(ours, simpo, strict=True):
        torch.testing.assert_close(x, advantage * y, rtol=1e-4, atol=1e-5)


def test_best_draw_is_by_the_smaller_twin_of_the_same_state():
    """Comparing batch rows instead of twins, or trusting one twin, takes other draws."""
    q = torch.tensor([[[1.0, 5.0, 2.0], [4.0, 0.0, 3.0]], [[1.5, 0.0, 3.0], [2.0, 9.0, 2.5]]])  # twin, state, draw

    class Policy:
        def sample(self, obs, num_actions, generator):
            return torch.arange(6.0).view(2, 3, 1)

    actions, values = qvpo.best_draw(Policy(), lambda obs, actions: q, torch.zeros(2, 1), 3, None)
    assert actions.tolist() == [[2], [5]] and values.tolist() == [2, 2.5]


@pytest.mark.parametrize("entropy_weight", [0.8, 0.0])
def test_two_updates_by_hand(run_script, entropy_weight):
    """Uniform actions fill [-1, 1] and meet their own state; targets come from the averaged policy; both norms are cut.

    The draws of the random numbers are the script's, all else is written anew.
    """
    flags = "--num-particles 6 --kept-draws 2 --uniform-actions 3 --max-grad-norm 0.002 --action-draws 3"
    flags += " --discount 0.9 --entropy-weight"
    hand = ByHand(qvpo, run_script("baselines/qvpo", *HAND, *flags.split(), str(entropy_weight)), eps=1e-5)
    policy, critic, generator = hand.policy, hand.critic, hand.generator

    def best_of_three(obs):
        draws = policy.sample(obs, 3, generator)
        with torch.no_grad():
            best = torch.minimum(*critic(obs, draws)).argmax(1)
        return torch.stack([x[i] for x, i in zip(draws, best, strict=True)])

    for global_step in (40, 45):
        hand.act(global_step, best_of_three)
        obs, next_obs, action, reward, terminated, _ = hand.batch()
        with torch.no_grad():
            q = hand.critic_target(next_obs, hand.policy_target.sample(next_obs, 3, generator))  # (2, 32, 3)
        target = reward + 0.9 * (1 - terminated) * torch.minimum(q[0], q[1]).max(-1).values
        hand.critic_step(obs, action, target, max_norm=0.002)

        draws = policy.sample(obs, 6, generator)
        with torch.no_grad():
            q = torch.minimum(*critic(obs, draws))
        uniform = torch.rand(32, 3, 2, generator=generator) * 2 - 1
        assert uniform.min() < -0.9 and uniform.max() > 0.9
        t, noise = torch.randint(5, (32, 5), generator=generator), hand.randn(32, 5, 2)
        angle = torch.pi / 2 * ((t + 1) / 5) ** 2
        states, times = policy.embed(obs)
        loss = 0
        for b in range(32):
            order, value = q[b].argsort(descending=True), q[b].mean()
            actions = [draws[b, order[0]], draws[b, order[1]], *uniform[b]]
            best, second = (max(q[b, order[j]] - value, 0) for j in (0, 1))
            share = max(entropy_weight * (1 - global_step / 45), 0.002) if entropy_weight else 0
            for k, weight in enumerate([best, second, *[share * best] * 3]):
                cos, sin, a, eps = angle[b, k].cos(), angle[b, k].sin(), actions[k], noise[b, k]
                predicted = policy.velocity((cos * a + sin * eps).view(1, 1, 2), states[b] + times[t[b, k]])
                error = ((predicted[0, 0] - (cos * eps - sin * a)) ** 2).mean()
                loss = loss + weight * error / (32 * 5)
        hand.step(policy, hand.policy_adam, loss, max_norm=0.002)
        hand.follow(hand.policy_target, policy)
        hand.follow(hand.critic_target, critic)
    hand.compare("policy", "policy_target", "critic", "critic_target")


def test_cut_gives_no_weight_where_all_values_are_below_1(run_script):
    """Rewards of Pendulum-v1 are negative; with the other weighting the same draws move the policy."""
    start = torch.manual_seed(20_001) and qvpo.DiffusionPolicy(3, 1, 32, "dpm", 5).state_dict()
    for weights in ("adv", "cut"):
        run_dir = run_script("baselines/qvpo", *HAND, "--env-id", "Pendulum-v1", "--weights", weights)
        policy = torch.load(run_dir / "checkpoint.pt", weights_only=True)["policy"]
        assert all(torch.equal(policy[name], x) for name, x in start.items()) == (weights == "cut")


def test_learns_the_point_mass(run_script):
    """From -4 (the first policy) to above -1 within 900 updates, by one draw."""
    run_dir = run_script("baselines/qvpo", *FAST, "--num-particles", "16", "--total-timesteps", "2000")
    assert torch.load(run_dir / "checkpoint.pt", weights_only=True)["evaluations"][-1]["mean"] > -1.0
