"""baselines/dppo.py: log-probabilities, gradients and advantages against known ones, a run by hand, and the frame."""

import math
import signal

import gymnasium as gym
import numpy as np
import pytest
import torch
from small_envs import PointMass, TwoEnds
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.distributions import DiagGaussianDistribution
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_baselines_frame import FRAME, Interrupted, definitions, fields, main_blocks, read

from baselines import dppo
from benchmark.kill_and_resume import differences, results

SCRIPT = "baselines/dppo"
SMALL = "--no-compile --policy-dtype float32 --hidden-dim 32 --diffusion-steps 5 --eval-episodes 5".split()


class ByHand:
    """The Gaussian steps of a chain of T steps, by Ho et al. 2020, (6) and (7)."""

    def __init__(self, policy, min_std):
        self.policy = policy
        angle = torch.pi / 2 * torch.arange(policy.steps + 1, dtype=torch.float64) / policy.steps
        alpha, sigma = angle.cos(), angle.sin()
        beta = 1 - (alpha[1:] / alpha[:-1]) ** 2
        from_t, from_0 = (1 - beta).sqrt() * (sigma[:-1] / sigma[1:]) ** 2, alpha[:-1] * beta / sigma[1:] ** 2
        self.rows = torch.stack([alpha[1:], sigma[1:], from_t, from_0], dim=1).float()
        self.std = (beta.sqrt() * sigma[:-1] / sigma[1:]).clip(min=min_std).float()

    def mean(self, obs, a_t, i):
        """Of row i, an int: obs (B, S), a_t (B, A)."""
        alpha, sigma, from_t, from_0 = self.rows[i]
        states, times = self.policy.embed(obs)
        velocity = self.policy.velocity(a_t[:, None], states + times[i])[:, 0]
        return from_t * a_t + from_0 * (alpha * a_t - sigma * velocity).clip(-1, 1)

    def log_prob(self, obs, a_t, a_u, i):
        """Of rows i (B,), the mean over dimensions: (B,)."""
        found = []
        for k, *one in zip(i.tolist(), obs.split(1), a_t.split(1), a_u.split(1), strict=True):
            normal = torch.distributions.Normal(self.mean(*one[:2], k), self.std[k])
            found.append(normal.log_prob(one[2]).clip(-5, 2).mean())
        return torch.stack(found)


@pytest.fixture(params=[0.1, 0.02])  # the second has densities above e^2
def case(request, monkeypatch):
    """40 steps of a policy's chains, 8 of each row; with twice the noise, and some predictions outside [-1, 1]."""
    torch.manual_seed(0)
    policy, obs = dppo.DiffusionPolicy(4, 3, 32, "ddpm", 5), torch.randn(8, 4)
    with torch.no_grad():
        policy.layers[-1].weight *= 6
    randn, stds = torch.randn, policy.step_std(request.param)
    monkeypatch.setattr(torch, "randn", lambda *shape, **kwargs: 2 * randn(*shape, **kwargs))
    chain = policy.sample(obs, stds, torch.Generator().manual_seed(1))
    noise = torch.randn(6, 8, 3, generator=torch.Generator().manual_seed(1))
    n, i = torch.arange(40) // 5, torch.arange(40) % 5
    return policy, request.param, (obs[n], chain[n, i + 1], chain[n, i], i), noise[i, n]


def test_log_prob_of_a_step_is_the_normals(case):
    policy, min_std, steps, _ = case
    ours = policy.log_prob(*steps, policy.step_std(min_std))
    torch.testing.assert_close(ours, ByHand(policy, min_std).log_prob(*steps), rtol=1e-4, atol=1e-4)


def test_sampled_steps_have_the_log_prob_of_their_noise(case):
    """Sampler and log-probability have the same mean and std, and the noise is cut at 3."""
    policy, min_std, steps, noise = case
    assert (noise.abs() > 3).any()
    z, std = noise.clip(-3, 3), ByHand(policy, min_std).std[steps[3]][:, None]
    exact = -(z**2) / 2 - std.log() - math.log(2 * math.pi) / 2
    assert exact.min() < -5 and (exact.max() > 2) == (min_std < 0.05)
    ours = policy.log_prob(*steps, policy.step_std(min_std))
    torch.testing.assert_close(ours, exact.clip(-5, 2).mean(-1), rtol=1e-3, atol=1e-3)


def test_std_of_the_steps():
    """The posterior's, 0 in the last step; of 20 steps the last two are below 0.1."""
    policy = dppo.DiffusionPolicy(1, 1, 8, "ddpm", 20)
    free, bounded = policy.step_std(0.0), policy.step_std(0.1)
    torch.testing.assert_close(free, ByHand(policy, 0).std, rtol=1e-4, atol=1e-6)
    assert free[0] == 0 and (free > 1e-3).sum() == 19
    assert torch.equal(bounded[2:], free[2:]) and bounded[:2].tolist() == pytest.approx([0.1, 0.1])


def test_first_ratio_is_1_and_its_gradient_is_reinforces(case):
    policy, min_std, steps, _ = case
    stds, advantage = policy.step_std(min_std), torch.randn(40)
    old = policy.log_prob(*steps, stds).detach()
    loss, kl, share_clipped = policy.loss(*steps, stds, old, advantage, 0.1)
    assert loss.item() == pytest.approx(-advantage.mean().item(), abs=1e-6)
    assert kl.item() == pytest.approx(0, abs=1e-6) and share_clipped.item() == 0
    ours = torch.autograd.grad(loss, policy.parameters())
    reinforce = -(advantage * ByHand(policy, min_std).log_prob(*steps)).mean()
    for x, y in zip(ours, torch.autograd.grad(reinforce, policy.parameters()), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-3, atol=1e-4)


def test_one_denoising_step_is_gaussian_ppo():
    """Of the mean clip(-velocity) and the std 0.1, given s and a_1: loss and gradient, with some ratios clipped."""
    torch.manual_seed(0)
    policy, obs = dppo.DiffusionPolicy(4, 1, 32, "ddpm", 1), torch.randn(200, 4)
    stds, i = policy.step_std(0.1), torch.zeros(200, dtype=torch.long)
    a_0, a_1 = policy.sample(obs, stds, torch.Generator().manual_seed(0)).unbind(1)
    old, advantage = policy.log_prob(obs, a_1, a_0, i, stds).detach(), torch.randn(200)
    with torch.no_grad():
        policy.layers[-1].bias += 0.02
    loss, kl, share_clipped = policy.loss(obs, a_1, a_0, i, stds, old, advantage, 0.1)

    states, times = policy.embed(obs)
    mean = -policy.velocity(a_1[:, None], states + times[0])[:, 0].clip(-1, 1)
    gaussian = DiagGaussianDistribution(1).proba_distribution(mean, torch.full((1,), math.log(0.1)))
    log_ratio = gaussian.log_prob(a_0) - old
    ratio = log_ratio.exp()
    gain = torch.where(advantage > 0, ratio.clip(max=1.1), ratio.clip(min=0.9)) * advantage
    assert loss.item() == pytest.approx(-gain.mean().item(), abs=1e-5)
    assert kl.item() == pytest.approx((ratio - 1 - log_ratio).mean().item(), abs=1e-5) and kl > 0.01
    assert (
        share_clipped.item() == pytest.approx(((ratio - 1).abs() > 0.1).float().mean().item()) and share_clipped > 0.3
    )
    ours, gaussians = (torch.autograd.grad(x, policy.parameters()) for x in (loss, -gain.mean()))
    for x, y in zip(ours, gaussians, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-3, atol=1e-4)


def test_policy_gradient_of_a_linear_chain_is_exact(monkeypatch):
    """Predicting a_0 = c a_t + b, the return -(a_0 - 0.5)^2 has gradients in c and b in closed form."""
    policy, parameters = dppo.DiffusionPolicy(1, 1, 8, "ddpm", 4), torch.tensor([0.2, 0.1], requires_grad=True)
    hand, N = ByHand(policy, 0.2), 200_000
    embedding = hand.rows[:, :2]  # alpha and sigma of the row, in place of what s and t add
    monkeypatch.setattr(policy, "embed", lambda obs: (torch.zeros(len(obs), 1, 2), embedding))

    def velocity(a_t, alpha_sigma):
        alpha, sigma = alpha_sigma.split(1, dim=-1)
        return (alpha * a_t - parameters[0] * a_t - parameters[1]) / sigma

    monkeypatch.setattr(policy, "velocity", velocity)
    obs, stds = torch.zeros(N, 1), policy.step_std(0.2)
    chain = policy.sample(obs, stds, torch.Generator().manual_seed(0))
    gain = -((chain[:, 0, 0] - 0.5) ** 2)
    losses = []
    for k in range(4):
        steps = obs, chain[:, k + 1], chain[:, k], torch.full((N,), k)
        losses.append(policy.loss(*steps, stds, policy.log_prob(*steps, stds).detach(), gain - gain.mean(), 0.1)[0])
    (ours,) = torch.autograd.grad(-sum(losses), parameters)

    mean, variance = torch.zeros(()), torch.ones(())
    for k in (3, 2, 1, 0):
        factor = hand.rows[k, 2] + hand.rows[k, 3] * parameters[0]
        mean, variance = factor * mean + hand.rows[k, 3] * parameters[1], factor**2 * variance + hand.std[k] ** 2
    (exact,) = torch.autograd.grad(-((mean - 0.5) ** 2) - variance, parameters)
    torch.testing.assert_close(ours, exact, rtol=0.05, atol=0.01)


def test_gae_is_stable_baselines3s():
    """It has time limits as collect_rollouts does: V of the last observation, discounted, is part of the reward."""
    rng, (N, E) = np.random.default_rng(0), (50, 3)
    reward, value, last = rng.normal(size=(N, E)), rng.normal(size=(N, E)), rng.normal(size=E)
    terminated, truncated = rng.random((2, N, E)) < 0.15
    terminated[-1], truncated[-1] = [True, False, False], [False, True, False]
    done, next_value = terminated | truncated, np.concatenate([value[1:], last[None]])
    next_value[done] = rng.normal(size=done.sum())  # of the last observation, not of the reset one

    buffer = RolloutBuffer(N, *[dppo.gym.spaces.Box(-1, 1, (1,))] * 2, "cpu", 0.95, 0.9, E)
    buffer.rewards[:] = reward + 0.9 * (truncated & ~terminated) * next_value
    buffer.values[:], buffer.episode_starts[1:] = value, done[:-1]
    buffer.compute_returns_and_advantage(torch.tensor(last), done[-1])
    tensors = [torch.tensor(x, dtype=torch.float64) for x in (reward, value, next_value, terminated, done)]
    np.testing.assert_allclose(dppo.gae(*tensors, 0.9, 0.95), buffer.advantages, rtol=1e-4, atol=1e-5)


def test_running_moments():
    """As if the first 1e-4 rows had mean 0 and variance 1; what is far away is cut to 10."""
    rows = 3 + 2 * np.random.default_rng(0).normal(size=(40, 2))
    moments = dppo.RunningMoments(2)
    for part in np.split(rows, [1, 6, 30]):
        moments.update(part)
    mean = rows.sum(0) / 40.0001
    deviation = np.sqrt((1e-4 + (rows**2).sum(0)) / 40.0001 - mean**2)
    batch = np.array([[1.0, -2.0], [500.0, -500.0]])
    expected = ((batch - mean) / deviation).clip(-10, 10)
    np.testing.assert_allclose(moments.normalize(batch, "cpu"), expected, rtol=1e-5)


class Spike(PointMass):
    """Pays 1 in its 60th step, else nothing."""

    total_steps = 0

    def step(self, action):
        self.total_steps += 1
        obs, _, *end = super().step(action)
        return obs, float(self.total_steps == 60), *end


def test_a_reward_of_twenty_deviations_counts_as_ten(run_script):
    """With discount 0 what V should be is the reward, 20 deviations once in 400 steps: a mean square of 1/4, not 1."""
    if "Spike-v0" not in gym.registry:
        gym.register("Spike-v0", Spike)
    flags = "--env-id Spike-v0 --num-envs 1 --rollout-steps 400 --total-timesteps 400 --batch-size 2000 --num-epochs 1"
    flags += " --discount 0 --eval-every 0 --no-compile --device cpu --hidden-dim 8 --diffusion-steps 5"
    run_dir = run_script("baselines/dppo", *flags.split(), "--critic-lr", 1e-9)
    logged = EventAccumulator(str(run_dir)).Reload()
    assert 0.2 < logged.Scalars("loss/critic")[-1].value < 0.35


@pytest.mark.parametrize("max_kl", [1e9, 2e-3])
def test_two_iterations_by_hand(run_script, max_kl):
    """All of it written anew but the networks: terminal and other ends, epochs, 40 of 200 pairs left out in each."""
    flags = "--env-id small_envs:TwoEnds-v0 --rollout-steps 8 --total-timesteps 80 --batch-size 80 --num-epochs 3"
    flags += " --clip-range 0.02 --gae-lambda 0.8 --discount 0.9 --denoising-discount 0.7 --min-std 0.3 --seed 4"
    flags += f" --policy-lr 0.01 --critic-lr 0.02 --eval-every 0 --max-kl {max_kl}"
    run_dir = run_script(SCRIPT, *SMALL, *flags.split())
    result = torch.load(run_dir / "checkpoint.pt", weights_only=True)

    torch.manual_seed(20_004)
    policy, critic, generator = dppo.DiffusionPolicy(3, 2, 32, "ddpm", 5), dppo.Critic(3, 32), torch.Generator()
    adams = torch.optim.Adam(policy.parameters(), 0.01), torch.optim.Adam(critic.parameters(), 0.02)
    hand, generator, updates = ByHand(policy, 0.3), generator.manual_seed(4), 0
    envs, episode, ends = [TwoEnds() for _ in range(5)], [0] * 5, set()

    def reset(e):
        seed = np.random.SeedSequence([4, e, episode[e]]).generate_state(1)[0]
        episode[e] += 1
        return envs[e].reset(seed=int(seed))[0]

    def deviation(rows):
        """And mean, of all rows, and 1e-4 rows of mean 0 and variance 1."""
        total = len(rows) + 1e-4
        mean = np.sum(rows, axis=0) / total
        return np.sqrt((np.sum(np.square(rows), axis=0) + 1e-4) / total - mean**2), mean

    def normalized(x):
        std, mean = deviation(seen)
        return torch.tensor((x - mean) / std).clip(-10, 10).float()

    seen, sums, now, obs = [], [], np.zeros(5), np.stack([reset(e) for e in range(5)])
    for _ in range(2):
        rollout = []
        for _ in range(8):
            seen.extend(np.float64(obs))
            x, noise = normalized(obs), torch.randn(6, 5, 2, generator=generator)
            chain = [noise[5]]
            for i in (4, 3, 2, 1, 0):
                chain.append((hand.mean(x, chain[-1], i) + hand.std[i] * noise[i].clip(-3, 3)).detach())
            stepped = [env.step(a) for env, a in zip(envs, chain[-1].clip(-1, 1).numpy(), strict=True)]
            next_obs, reward, terminated, truncated = (np.array([y[k] for y in stepped]) for k in range(4))
            rollout.append((x, normalized(next_obs), chain, reward, terminated, terminated | truncated))
            ends.update(zip(terminated.tolist(), truncated.tolist(), strict=True))
            now = 0.9 * now + reward
            sums.extend(now)
            obs = np.stack([reset(e) if (terminated | truncated)[e] else next_obs[e] for e in range(5)])
            now[terminated | truncated] = 0

        scale, _ = deviation(sums)
        advantages = {}  # by step and environment
        with torch.no_grad():
            for e in range(5):
                following = 0
                for n, (x, x_next, _, reward, terminated, done) in reversed(list(enumerate(rollout))):
                    value, next_value = critic(torch.stack([x[e], x_next[e]])).tolist()
                    error = reward[e] / scale + (0 if terminated[e] else 0.9 * next_value) - value
                    following = error + (0 if done[e] else 0.9 * 0.8 * following)
                    advantages[n, e] = following, following + value
        pairs = [(n, e, i) for n in range(8) for e in range(5) for i in range(5)]
        columns = [torch.stack([rollout[n][0][e] for n, e, _ in pairs])]
        columns += [torch.stack([rollout[n][2][5 - (i + k)][e] for n, e, i in pairs]) for k in (1, 0)]
        columns.append(torch.tensor([i for _, _, i in pairs]))
        with torch.no_grad():
            old = hand.log_prob(*columns)
        A, R = torch.tensor([advantages[n, e] for n, e, _ in pairs]).T
        epochs = 0.0
        for batch in (b for _ in range(3) for b in torch.randperm(200, generator=generator).split(80)[:2]):
            a = (A[batch] - A[batch].mean()) / A[batch].std(correction=0) * 0.7 ** columns[3][batch]
            log_ratio = hand.log_prob(*(x[batch] for x in columns)) - old[batch]
            ratio = log_ratio.exp()
            policy_loss = -torch.where(a > 0, ratio.clip(max=1.02), ratio.clip(min=0.98)).mul(a).mean()
            critic_loss = ((critic(columns[0][batch]) - R[batch]) ** 2).mean()
            for adam, loss in zip(adams, (policy_loss, critic_loss), strict=True):
                adam.zero_grad()
                loss.backward()
                adam.step()
            updates, epochs = updates + 1, epochs + 1 / 2
            kl = (ratio - 1 - log_ratio).mean().item()
            if kl > max_kl:
                break

    assert {(True, False), (False, True)} <= ends and (updates == 12) == (max_kl > 1) and updates > 4
    assert result["num_updates"] == updates and result["discounted_reward"].tolist() == pytest.approx(now, rel=1e-3)
    assert result["return_moments"]["var"].sqrt().item() == pytest.approx(scale, rel=1e-4)
    logged = EventAccumulator(str(run_dir)).Reload()
    share = ((ratio - 1).abs() > 0.02).float().mean().item()
    by_hand = {"loss/critic": critic_loss.item(), "loss/policy": policy_loss.item(), "policy/share_clipped": share}
    by_hand["value/explained_variance"] = 1 - np.var([a for a, _ in advantages.values()]) / np.var(
        [r for _, r in advantages.values()]
    )
    for name, value in (by_hand | {"policy/kl": kl, "policy/epochs": epochs}).items():
        assert logged.Scalars(name)[-1].value == pytest.approx(value, rel=1e-2, abs=1e-4), name
    for part, module in dict(policy=policy, critic=critic).items():
        for name, x in module.state_dict().items():
            torch.testing.assert_close(result[part][name], x, rtol=1e-3, atol=2e-4, msg=lambda m, n=name: f"{n}: {m}")


def test_learns_the_point_mass(run_script):
    """To above -1 from below -3, where it stays with --policy-lr 1e-12 (seeds 1 to 3: -4.5, -4.1, -3.5)."""
    flags = "--env-id small_envs:PointMass-v0 --total-timesteps 1500 --rollout-steps 20 --batch-size 125 --discount 0.9"
    run_dir = run_script(SCRIPT, *SMALL, *flags.split(), "--policy-lr", 2e-3, "--eval-every", 1500)
    assert torch.load(run_dir / "checkpoint.pt", weights_only=True)["evaluations"][-1]["mean"] > -1.0


def test_evaluation_takes_the_posteriors_noise_and_leaves_the_moments():
    class Policy:
        seen = []

        def step_std(self, min_std):
            return min_std

        def sample(self, obs, stds, generator):
            self.seen.append((obs, stds))
            return torch.tensor([[[-0.5], [9.0]]]).expand(3, 2, 1)  # a_0 is the first

    args, moments = dppo.Args(env_id="small_envs:PointMass-v0", eval_episodes=3, device="cpu"), dppo.RunningMoments(1)
    moments.update(np.array([[1.0], [5.0]]))
    before = {name: x.clone() for name, x in moments.state_dict().items()}
    returns = dppo.evaluate(Policy(), moments, args)
    (first, std), (second, _), *others = Policy.seen
    assert std == 0.0 and len(others) == 8
    torch.testing.assert_close(second - first, torch.full((3, 1), -0.5 * 0.4 / 2), rtol=1e-3, atol=1e-4)
    x = first[:, 0].double() * 2 + 3
    assert returns.tolist() == pytest.approx(sum(-((x - 0.2 * n) ** 2) for n in range(1, 11)).tolist(), rel=1e-3)
    assert all(torch.equal(x, before[name]) for name, x in moments.state_dict().items())


def test_resume_is_bit_for_bit_and_evaluate_agrees(run_in, tmp_path, capsys):
    """Stopped twice in the middle of an episode of the third rollout; checkpoints of another script are refused."""
    flags = "--env-id Interrupted-v0 --rollout-steps 30 --batch-size 250 --num-epochs 2 --total-timesteps 500"
    flags = [*SMALL, *flags.split(), "--eval-every", 200]
    Interrupted.left = 10**9
    _, code = run_in("whole", SCRIPT, *flags)
    assert code is None
    Interrupted.left = 50 + 385  # the first evaluation's and its own
    stopped, code = run_in("stopped", SCRIPT, *flags)
    assert code == 128 + signal.SIGTERM
    state = torch.load(stopped / "checkpoint.pt", weights_only=True)
    assert len(state["rows"]) == state["added"] == 85 and [len(x) for x in state["episode_actions"]] == [7] * 5
    _, code = run_in("stopped", SCRIPT, "--evaluate", stopped, "--discount", 1.5)
    assert code == "--discount must be from 0 to 1; got 1.5"
    _, code = run_in("stopped", SCRIPT, "--resume", stopped, "--policy-lr", 1)
    assert code.endswith("was made with other policy_lr")
    Interrupted.left = 35 + 5  # the steps that lead back there, and five more, in the same episodes
    for end in (128 + signal.SIGTERM, None):
        _, code = run_in("stopped", SCRIPT, "--resume", stopped)
        assert code == end
    expected, found = results(tmp_path / "whole"), results(tmp_path / "stopped")
    assert not differences(expected, found) and expected["checkpoint.pt"]["num_updates"] == 3 * 6
    assert len(expected["TensorBoard"]["policy/kl"]) == 3 and len(expected["eval.csv"]) == 3
    capsys.readouterr()
    _, code = run_in("stopped", SCRIPT, "--evaluate", stopped)
    assert code is None and f"return {float(found['eval.csv'][-1]['mean']):.1f} +- " in capsys.readouterr().out
    _, code = run_in("stopped", "baselines/sdac", "--evaluate", stopped)
    assert code == f"{stopped} was made by dppo.py, not by sdac.py as it is now"


BAD = "--discount 1.5|--num-envs 0|--env-id Nowhere-v0|--diffusion-steps 0|--rollout-steps 0|--num-epochs 0|--min-std 0"
BAD += "|--batch-size 0|--clip-range 0|--max-kl nan|--gae-lambda 2|--denoising-discount -1|--device nonsense"
BAD += "|--capture-video|--resume runs/nothing|--evaluate runs/nothing"


@pytest.mark.parametrize("flags", BAD.split("|"))
def test_bad_flags_get_one_line(run_script, flags):
    with pytest.raises(SystemExit) as end:
        run_script(SCRIPT, *SMALL, "--total-timesteps", 1, "--eval-every", 0, *flags.split())
    assert flags.split()[-1] in end.value.code and len(end.value.code.splitlines()) == 1


OFF_POLICY_LINES = """\
policy = DiffusionPolicy(obs_dim, action_dim, args.hidden_dim, args.solver, args.diffusion_steps, dtype).to(device)
returns = evaluate(policy, critic, args)
for i, (env, length) in enumerate(zip(envs.envs, saved["lengths"], strict=True)):
rows = torch.arange(-length, 0) * args.num_envs + buffer.added + i
for action in buffer.rows[rows % len(buffer.rows), 2 * obs_dim : -2].cpu().numpy():
print(f"{run_dir} on {device}, policy in {dtype}, compile={args.compile}, learns after step {args.learning_starts}")
returns = evaluate(policy, critic, args, stop_signals)
next_obs, reward, terminated, truncated, infos = envs.step(action.cpu().numpy())
obs, done = next_obs, terminated | truncated
for _ in range(due(args.steps_per_update) if global_step > args.learning_starts else 0):
batch_obs, batch_next_obs, batch_action, batch_reward, batch_terminated = buffer.sample(B, generator)
if critic_loss is not None and due(args.log_every):
""".splitlines()  # of the main's parts that have nothing to do with the algorithm, those that this script has otherwise


def test_the_frame_is_simpo_negs_to_the_letter_but_for_what_is_on_policy():
    own = {"Args", "Critic", "ReplayBuffer", "evaluate", "reweight", "kl"}
    own |= {f"DiffusionPolicy.{name}" for name in ("loss", "denoise", "sample")}
    frame, ours = definitions(FRAME), definitions(SCRIPT)
    assert {name for name in frame if ours.get(name) != frame[name]} == own
    off_policy = "solver steps_per_update learning_starts buffer_size policy_lr_end tau eval_draws log_every"
    simpo = "power epsilon num_particles target_kl temperature temperature_lr old_policy_interval particle_noise"
    kept, lines = fields(FRAME), fields(SCRIPT)
    other = {"diffusion_steps", "hidden_dim", "batch_size", "policy_lr", "critic_lr"}
    assert {name for name in kept if name not in lines} == {*off_policy.split(), *simpo.split(), "error_clip"}
    assert {name for name in kept if name in lines and lines[name] != kept[name]} == other
    text = [line.strip() for line in read(SCRIPT).splitlines()]
    changed = [line.strip() for block in main_blocks(FRAME) for line in block.splitlines() if line.strip() not in text]
    assert changed == OFF_POLICY_LINES
    assert len(text) <= 560
