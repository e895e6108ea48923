"""DPPO: PPO on the denoising steps of a diffusion policy, whose log-probabilities are known, as they are Gaussian.

Paper: Ren et al., "Diffusion Policy Policy Optimization", 2024, arXiv 2409.00588; here from scratch, not fine-tuning.
A draw is a chain of T steps from a_t to a_u, t = 1 to u = 0. To PPO each of them is an action, whose advantage is the
environment step's, A, by V(s) and GAE. After every 1,000 steps of each environment:

    acting    a_u = mu + std z, mu = from_t a_t + from_0 clip(predicted a_0, -1, 1), z = clip(N(0, I), -3, 3), std that
              of the posterior of a_u given a_t and a_0, in training at least 0.1; only the environment clips a_0
    ratio     r = exp(l - l_old), l = mean over dimensions of clip(log N(a_u; mu, std^2), -5, 2)
    policy    mean of -min(r B, clip(r, 0.9, 1.1) B), B = gamma_den^i A, A normalised in the minibatch, i steps to go
    critic    mean of (V(s) - R)^2, R = A + V_old(s), rewards over the deviation of their discounted sums, within +-10
    epochs    10 over shuffled pairs of environment step and denoising step; they end where mean(r - 1 - log r) > 1

Departures from the authors' code (irom-princeton/dppo, cfg/gym/scratch): running moments of observations and the bounds
of actions (ranges of a data set); time limits bootstrap (terminal); 200 iterations, 5 environments (450, 10); 20 steps
of this frame's schedule, its velocities, networks (10, noises, residual, 512 ReLU); V's loss without a factor: Adam.

    python baselines/dppo.py --env-id HalfCheetah-v4
"""

import json
import math
import os
import shutil
import signal
import sys
import sysconfig
import threading
import time
import warnings
import zipfile
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Annotated, Literal

import gymnasium as gym
import mujoco
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
import tyro
from matplotlib.figure import Figure
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

# What a flag's value must be is part of its type, and what it means is the comment beside it: --help shows that.
Count = Annotated[int, "at least 1", lambda n: n >= 1]
Natural = Annotated[int, "at least 0", lambda n: n >= 0]
Positive = Annotated[float, "above 0 and finite", lambda x: 0 < x < math.inf]
NonNegative = Annotated[float, "at least 0 and finite", lambda x: 0 <= x < math.inf]
Share = Annotated[float, "from 0 to 1", lambda x: 0 <= x <= 1]
CPU, GPU = torch.cpu.get_capabilities(), torch.cuda.is_available()  # BF16: is it fast here? On Intel only with AMX
BF16 = torch.cuda.is_bf16_supported(False) if GPU else CPU.get("avx512_bf16" if "AMD" in str(CPU) else "amx_bf16")
CXX = shutil.which(os.environ.get("CXX", "g++")) and Path(sysconfig.get_path("include"), "Python.h").exists()
LANDSCAPE_SPEED = {"dm_control/cheetah-run-v0": 10.0, "dm_control/walker-run-v0": 8.0}  # where z = 1, m/s


@dataclass
class Args:
    env_id: str = "HalfCheetah-v4"  # Gymnasium id with Box spaces, or a DM Control task: dm_control/cheetah-run-v0
    reward_landscape: Literal["native", "sqrt", "linear", "square", "exp"] = "native"  # to train on (appendix F.2)
    landscape_c: Positive = 3.0  # steepness c of the exp landscape, (e^{c z} - 1) / (e^c - 1)
    total_timesteps: Count = 1_000_000  # environment steps, all environments together
    num_envs: Count = 5  # parallel environments
    seed: Annotated[int, "from 0 to 2^31 - 1", lambda n: 0 <= n < 2**31] = 1  # of networks, environments, all draws

    # DPPO
    rollout_steps: Count = 1000  # steps of each environment per iteration; what is left in the end trains nothing
    num_epochs: Count = 10  # passes over an iteration's (environment step, denoising step) pairs
    batch_size: Annotated[int, "at least 2", lambda n: n >= 2] = 5000  # pairs per minibatch
    clip_range: Positive = 0.1  # limit of the ratio's distance from 1
    max_kl: Positive = 1.0  # approximate KL from the old policy at which an iteration ends
    gae_lambda: Share = 0.95  # lambda of the generalised advantage estimates
    denoising_discount: Share = 1.0  # gamma_den: factor of the advantage per denoising step still to go
    min_std: Positive = 0.1  # least std of a denoising step in training, in units of half the action range

    # diffusion and optimisation
    diffusion_steps: Count = 20  # T: denoising steps, and the only times that are trained
    hidden_dim: Count = 256  # units of each of the 3 hidden layers, in policy and critic
    policy_lr: Positive = 1e-4  # learning rate of the policy
    critic_lr: Positive = 1e-3  # learning rate of the critic
    discount: Share = 0.99  # gamma, the discount per step

    # evaluation, output, machine
    eval_every: Natural = 10_000  # environment steps between evaluations, and one at the end; 0 turns evaluation off
    eval_episodes: Count = 20  # episodes per evaluation, in parallel environments
    checkpoint_every: Natural = 50_000  # environment steps between checkpoints; 0: only at the start and at the end
    resume: str = ""  # runs/<run_name>: go on from its checkpoint; length, evaluation, output and --compile may change
    evaluate: str = ""  # runs/<run_name>: evaluate its checkpoint, train nothing; arguments hold but where given anew
    capture_video: bool = False  # with --evaluate: record the first episode as runs/<run_name>/videos/*.mp4
    track: bool = False  # send arguments and TensorBoard scalars to Weights & Biases, too
    wandb_project: str = "simpo"  # Weights & Biases project
    device: str = "cuda" if GPU else "cpu"  # cpu, cuda, cuda:1, ...; cpu beside a GPU: --policy-dtype float32, too
    policy_dtype: Literal["float32", "bfloat16"] = "bfloat16" if BF16 else "float32"  # of the policy's matrix products
    compile: bool = bool(CXX) and os.name != "nt"  # torch.compile what is hot; needs a C++ compiler, Python's headers

    def check(self):
        """SystemExit with one line for the first argument that makes no sense."""
        rules = {field.name: field.type.__metadata__ for field in fields(self) if hasattr(field.type, "__metadata__")}
        rules["capture_video"] = "used with --evaluate", lambda video: self.evaluate or not video
        rules["resume"] = "left out with --evaluate", lambda run: not (run and self.evaluate)
        if self.reward_landscape != "native":
            rules["env_id"] = f"{' or '.join(LANDSCAPE_SPEED)} for --reward-landscape", LANDSCAPE_SPEED.__contains__
        for name, (rule, holds) in rules.items():
            if not holds(getattr(self, name)):
                raise SystemExit(f"--{name.replace('_', '-')} must be {rule}; got {getattr(self, name)}")


def mish(x):
    """x tanh(log(1 + e^x)), with one exponential, in float32."""
    n = x.float().clamp(max=20).exp()
    n = n * (n + 2)
    return (x * (n / (n + 2))).to(x.dtype)


class Critic(nn.Module):
    """V(s): 3 hidden Mish layers."""

    def __init__(self, obs_dim, hidden_dim):
        super().__init__()
        sizes = [obs_dim, hidden_dim, hidden_dim, hidden_dim, 1]
        self.value = nn.ModuleList(map(nn.Linear, sizes, sizes[1:]))

    @torch.compile(dynamic=False)
    def forward(self, obs):
        """obs (B, S) -> V (B,)."""
        first, second, third, last = self.value
        return last(mish(third(mish(second(mish(first(obs))))))).squeeze(-1)


class DiffusionPolicy(nn.Module):
    """pi(a|s) as a diffusion model with velocity prediction: a_t = alpha_t a_0 + sigma_t eps, the cosine schedule."""

    def __init__(self, obs_dim, action_dim, hidden_dim, solver, steps, dtype=torch.float32):
        super().__init__()
        self.action_dim, self.solver, self.dtype = action_dim, solver, dtype
        self.steps = steps = steps or {"dpm": 8, "ddpm": 20}[solver]
        t = torch.linspace(0, 1, steps + 1, dtype=torch.float64) ** (2 if solver == "dpm" else 1)  # dpm: denser near 0
        alphas, sigmas = torch.cos(torch.pi / 2 * t), torch.sin(torch.pi / 2 * t)  # (T + 1,)
        # A step goes from t to the time u below it: a_u = from_t a_t + from_0 d + std z, d: predicted a_0, extrapolated
        alpha_u, sigma_u, alpha, sigma, t = alphas[:-1], sigmas[:-1], alphas[1:], sigmas[1:], t[1:]  # (T,)
        if solver == "ddpm":  # the mean of a_u given a_t and a_0, the deviation of a_t given a_u
            variance = sigma**2 - (alpha / alpha_u * sigma_u) ** 2
            from_t, from_0 = alpha / alpha_u * sigma_u**2 / sigma**2, alpha_u * variance / sigma**2
            std, extrapolate = variance.sqrt(), torch.zeros(steps)
        else:  # Lu et al. 2022, arXiv 2211.01095: d = a_0 + extrapolate (a_0 - a_0 of the step before)
            from_t, std = sigma_u / sigma, torch.zeros(steps)
            from_0 = alpha_u - alpha * from_t
            h = torch.log(alpha_u / sigma_u) - torch.log(alpha / sigma)  # infinite at t = 1 (if exact) and u = 0
            extrapolate = F.pad(h[1:-2] / (2 * h[2:-1]), (1, 2))  # h / (2 h before); 0: the first two steps, the last
        coefficients = torch.stack([alpha, sigma, from_t, from_0, extrapolate, std], dim=1)  # (T, 6), row i for t_{i+1}
        angles = t[:, None] * torch.exp(torch.linspace(0, math.log(64), 32, dtype=torch.float64))  # (T, 32)
        self.register_buffer("step_coefficients", coefficients.float(), persistent=False)
        self.register_buffer("time_features", torch.cat([angles.sin(), angles.cos()], dim=1).float(), persistent=False)
        sizes = [action_dim + obs_dim + 64, hidden_dim, hidden_dim, hidden_dim, action_dim]
        self.layers = nn.ModuleList(map(nn.Linear, sizes, sizes[1:]))

    def embed(self, obs):
        """What s and t add to the first layer, whatever the action: obs (B, S) -> (B, 1, H), time (T, H)."""
        obs_weight, time_weight = self.layers[0].weight[:, self.action_dim :].tensor_split([obs.shape[1]], dim=1)
        return F.linear(obs, obs_weight, self.layers[0].bias)[:, None], F.linear(self.time_features, time_weight)

    def velocity(self, noisy_action, embedding):
        """v_theta(a_t, s, t) times 2/pi: noisy_action (B, K, A), embedding of s and t (B, 1 or K, H) -> (B, K, A)."""
        first, second, third, last = self.layers
        with torch.autocast(noisy_action.device.type, torch.bfloat16, enabled=self.dtype == torch.bfloat16):
            h = mish(F.linear(noisy_action, first.weight[:, : self.action_dim]) + embedding)
            return last(mish(third(mish(second(h))))).float()

    def step_std(self, min_std):
        """Std of each step (T,): the posterior's of a_u given a_t and a_0, 0 in row 0, at least min_std."""
        sigma, std = self.step_coefficients[:, 1], self.step_coefficients[:, 5]  # std is of a_t given a_u
        return (F.pad(sigma[:-1], (1, 0)) / sigma * std).clamp(min=min_std)

    def step_mean(self, noisy_action, embedding, i):
        """mu: noisy_action (B, A) at the time of row i, an int or (B,), embedding of s and t (B, H) -> (B, A)."""
        alpha, sigma, from_t, from_0 = self.step_coefficients[i, :4].split(1, dim=-1)  # (1,) or (B, 1)
        action_0 = (alpha * noisy_action - sigma * self.velocity(noisy_action, embedding)).clamp(-1, 1)
        return from_t * noisy_action + from_0 * action_0

    @torch.compile(dynamic=False)
    def log_prob(self, obs, noisy_action, next_action, i, std):
        """l of the steps of rows i (B,): obs (B, S), a_t and a_u (B, A), std (T,) -> (B,)."""
        obs_embedding, time_embedding = self.embed(obs)
        one_hot = F.one_hot(i, self.steps).float()  # the gradient of time_embedding[i] is not deterministic
        mean, std = self.step_mean(noisy_action, obs_embedding[:, 0] + one_hot @ time_embedding, i), std[i][:, None]
        log_prob = -(((next_action - mean) / std) ** 2) / 2 - std.log() - math.log(2 * math.pi) / 2
        return log_prob.clamp(-5, 2).mean(-1)

    @torch.compile(dynamic=False)
    def loss(self, obs, noisy_action, next_action, i, std, old_log_prob, advantage, clip_range):
        """PPO's, and what shows how far the policy went: approximate KL, share of clipped ratios; old l, B (B,)."""
        log_ratio = self.log_prob(obs, noisy_action, next_action, i, std) - old_log_prob
        ratio = log_ratio.exp()
        clipped = ratio.clamp(1 - clip_range, 1 + clip_range)
        loss = -torch.minimum(ratio * advantage, clipped * advantage).mean()
        return loss, (ratio - 1 - log_ratio).mean(), (ratio != clipped).float().mean()

    @torch.compile(dynamic=True)
    def denoise(self, obs, noise, std):
        """From t = 1 to 0: obs (B, S), noise (T + 1, B, A), std (T,) -> the chain (B, T + 1, A), a_0 first."""
        obs_embedding, time_embedding = self.embed(obs)  # always in float32: observations may be large
        chain = [noise[-1]]  # a_1
        for i in reversed(range(len(time_embedding))):
            mean = self.step_mean(chain[0], obs_embedding[:, 0] + time_embedding[i], i)
            chain.insert(0, mean + std[i] * noise[i].clamp(-3, 3))
        return torch.stack(chain, dim=1)

    @torch.no_grad()
    def sample(self, obs, std, generator):
        """obs (B, S), std (T,) -> a draw per state with its chain (B, T + 1, A), a_0 first; may leave [-1, 1]."""
        shape = self.steps + 1, len(obs), self.action_dim
        return self.denoise(obs, torch.randn(shape, generator=generator, device=obs.device), std)


@torch.no_grad()
def gae(reward, value, next_value, terminated, done, discount, gae_lambda):
    """Advantages A of N steps in E environments, all (N, E): time limits bootstrap, every end cuts the sum."""
    delta = reward + discount * (1 - terminated) * next_value - value
    advantage, following = torch.empty_like(delta), 0.0
    for n in reversed(range(len(delta))):
        advantage[n] = following = delta[n] + discount * gae_lambda * (1 - done[n]) * following
    return advantage


class RunningMoments(nn.Module):
    """Mean and variance of all rows so far, on the CPU in float64; they start as those of 1e-4 rows, 0 and 1."""

    def __init__(self, dim):
        super().__init__()
        self.register_buffer("mean", torch.zeros(dim, dtype=torch.float64))
        self.register_buffer("var", torch.ones(dim, dtype=torch.float64))
        self.register_buffer("count", torch.tensor(1e-4, dtype=torch.float64))

    def update(self, rows):
        """rows (B, dim), by the merge of Chan et al."""
        rows = torch.as_tensor(rows, dtype=torch.float64)
        share, delta = len(rows) / (self.count + len(rows)), rows.mean(0) - self.mean
        self.var += share * (rows.var(0, correction=0) - self.var + (1 - share) * delta**2)
        self.mean += share * delta
        self.count += len(rows)

    def normalize(self, rows, device):
        """rows (B, dim) -> with mean 0 and variance 1, within +-10, in float32."""
        rows = (torch.as_tensor(rows, dtype=torch.float64) - self.mean) / (self.var + 1e-8).sqrt()
        return rows.clamp(-10, 10).float().to(device)


def shaped_reward(physics, args):
    """Appendix F.2: the reward landscapes from flat to steep, functions of z = clip(speed / target, 0, 1) in [0, 1]."""
    speed = physics.speed() if hasattr(physics, "speed") else physics.horizontal_velocity()
    z, c = min(max(float(speed) / LANDSCAPE_SPEED[args.env_id], 0.0), 1.0), args.landscape_c
    exp = math.exp(c * (z - 1)) * math.expm1(-c * z) / math.expm1(-c)  # without e^c, which may overflow
    return {"sqrt": z**0.5, "linear": z, "square": z**2, "exp": exp}[args.reward_landscape]


def make_env(args, training=False, video_folder=None):
    """Flat observations, actions in [-1, 1], in training the landscape's reward; SystemExit if the id does not fit."""
    mujoco.set_mju_user_warning(lambda text: "deprecated" in text or warnings.warn(text, stacklevel=2))  # not to a file
    env_id = f"shimmy:{args.env_id}" if args.env_id.startswith("dm_control/") else args.env_id
    try:
        env = gym.make(env_id, **({"render_mode": "rgb_array"} if video_folder else {}))
        if video_folder:  # through the model's first camera, if it has one: it follows, the default one may not
            if hasattr(base := env.unwrapped, "mujoco_renderer"):  # of Gymnasium
                base.mujoco_renderer.camera_id = min(0, base.model.ncam - 1)
            elif env_id != args.env_id:  # of DM Control
                base.render_kwargs["camera_id"], base.metadata["render_fps"] = 0, 1 / base._env.control_timestep()
            env = gym.wrappers.RecordVideo(env, video_folder, episode_trigger=lambda episode: episode == 0)
        obs_space, space = gym.spaces.flatten_space(env.observation_space), env.action_space
    except (gym.error.Error, ImportError, RuntimeError, TypeError, ValueError) as error:
        raise SystemExit(f"--env-id {args.env_id}: {error}") from None
    fits = isinstance(obs_space, gym.spaces.Box) and isinstance(space, gym.spaces.Box) and space.dtype.kind == "f"
    if not fits or space.low.ndim != 1 or not space.is_bounded() or (space.low >= space.high).any():
        raise SystemExit(f"--env-id {args.env_id} needs Box spaces, bounded 1-D actions, low < high: got {space!r:.60}")
    env = gym.wrappers.TransformAction(env, lambda a: a.clip(space.low, space.high), space)
    env = gym.wrappers.RescaleAction(gym.wrappers.FlattenObservation(env), -1.0, 1.0)  # rounds, hence the clip
    if training and args.reward_landscape != "native":
        env = gym.wrappers.TransformReward(env, lambda native_reward: shaped_reward(env.unwrapped._env.physics, args))
    return gym.wrappers.RecordEpisodeStatistics(env) if training else env


class RolloutBuffer:
    """The transitions since the last update, on the device: a row per environment for each step in turn."""

    def __init__(self, capacity, obs_dim, chain_dim, device):
        self.added, self.sizes = 0, [obs_dim, obs_dim, chain_dim, 1, 1, 1]
        self.rows = torch.empty(capacity, sum(self.sizes), device=device)

    def add(self, *columns):
        """obs, next_obs, chain, reward, terminated, done, one row per environment."""
        rows = torch.cat([torch.as_tensor(x).to(self.rows).view(len(x), -1) for x in columns], dim=1)
        self.rows[self.added : self.added + len(rows)] = rows
        self.added += len(rows)


def evaluate(policy, obs_moments, args, stop_signals=()):
    """Undiscounted native returns (N,), acting by one draw, no noise in its last step; no use after a stop signal."""
    folders = [f"{args.evaluate}/videos" if args.capture_video else None] + [None] * (args.eval_episodes - 1)
    envs = gym.vector.SyncVectorEnv([lambda folder=folder: make_env(args, video_folder=folder) for folder in folders])
    generator = torch.Generator(args.device).manual_seed(args.seed + 10_000)
    obs, _ = envs.reset(seed=args.seed + 10_000)
    returns, running = np.zeros(args.eval_episodes), np.ones(args.eval_episodes, dtype=bool)
    while running.any() and not stop_signals:
        actions = policy.sample(obs_moments.normalize(obs, args.device), policy.step_std(0.0), generator)[:, 0]
        obs, reward, terminated, truncated, _ = envs.step(actions.cpu().numpy())
        returns[running] += reward[running]
        running &= ~(terminated | truncated)
    envs.close()
    return returns


def write_evaluations(run_dir, evaluations):
    """runs/<run_name>/eval.csv, one row per evaluation, and learning_curve.png: mean and standard deviation."""
    table = [evaluations[0].keys(), *(row.values() for row in evaluations)]
    (run_dir / "eval.unfinished").write_text("".join(",".join(map(str, row)) + "\n" for row in table))
    os.replace(run_dir / "eval.unfinished", run_dir / "eval.csv")
    step, mean, std = (np.array([row[name] for row in evaluations]) for name in ("step", "mean", "std"))
    axes = Figure(figsize=(6, 4), layout="constrained").subplots()
    axes.plot(step, mean, marker="o", markersize=3)
    axes.fill_between(step, mean - std, mean + std, alpha=0.2)
    axes.set(xlabel="environment steps", ylabel="evaluation return (mean, standard deviation)", title=run_dir.name)
    axes.figure.savefig(run_dir / "learning_curve.png", dpi=120)


def save(path, state):
    """torch.save, written aside and moved into place: a file of this name is always whole."""
    with open(path.with_suffix(".unfinished"), "wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(file.name, path)


def load(path):
    """What `save` wrote, executing nothing from it; SystemExit if it is missing or damaged."""
    try:
        if zipfile.ZipFile(path).testzip():  # torch.load does not look at the checksums that torch.save writes
            raise ValueError("a checksum is wrong")
        return torch.load(path, map_location="cpu", mmap=os.name != "nt", weights_only=True)
    except Exception as error:  # what a damaged zip file can raise is not documented
        raise SystemExit(f"{path} cannot be used: {str(error).splitlines()[0]}") from None


if __name__ == "__main__":
    # Arguments. --resume and --evaluate take those of the run; flags given now win where they may change.
    args, script, saved = tyro.cli(Args, description=__doc__), Path(__file__).stem, {}
    run_name = f"{args.env_id}__{script}__{args.seed}__{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}"
    run_dir = Path(args.evaluate or args.resume or "runs/" + run_name.replace("/", "-").replace(":", "-"))
    if args.evaluate or args.resume:
        saved = load(run_dir / "checkpoint.pt")
        if saved.get("script") != script or saved["args"].keys() != vars(args).keys():
            raise SystemExit(f"{run_dir} was made by {saved.get('script')}.py, not by {script}.py as it is now")
        if not args.evaluate and "rows" not in saved:
            raise SystemExit(f"{run_dir} has no replay buffer")
        here = dict(resume="", evaluate="", compile=saved["args"]["compile"] and Args.compile)
        args = tyro.cli(Args, description=__doc__, default=Args(**saved["args"] | here))
        free = "total_timesteps eval_every eval_episodes eval_draws log_every checkpoint_every track wandb_project"
        fixed = {"env_id", "hidden_dim"} if args.evaluate else vars(args).keys() - {*free.split(), "resume", "compile"}
        if changed := [name for name in saved["args"] if name in fixed and getattr(args, name) != saved["args"][name]]:
            raise SystemExit(f"{run_dir} was made with other {', '.join(changed)}")
    args.check()

    # The machine.
    warnings.filterwarnings("ignore", ".*(out of date|precision lowered|TensorFloat32)")  # v4: "out of date"
    os.environ.setdefault("MUJOCO_GL", {"linux": "egl"}.get(sys.platform, "glfw") if args.capture_video else "disable")
    torch.compiler.set_stance("default" if args.compile else "force_eager")  # @torch.compile heeds it
    torch._inductor.config.cpp_wrapper = args.device == "cpu"  # no Python between the kernels of a compiled function
    try:
        generator = torch.Generator(torch.zeros(1, device=args.device).double().device).manual_seed(args.seed)
    except Exception as error:  # which one depends on the device, and MPS has no doubles
        raise SystemExit(f"--device {args.device}: {str(error).splitlines()[0].split('. ')[0]}; use cpu") from None
    stop_signals = []  # the first signal asks for a checkpoint and the end, the second one ends at once
    for number in () if args.evaluate else (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, _: os._exit(128 + number) if stop_signals else stop_signals.append(number))

    # Environments, networks, optimisers, running moments.
    envs = gym.vector.SyncVectorEnv([lambda: make_env(args, training=True)] * args.num_envs, autoreset_mode="Disabled")
    obs_dim, action_dim = envs.single_observation_space.shape[0], envs.single_action_space.shape[0]
    torch.manual_seed(args.seed + 20_000)  # networks; from the seed alone they'd have the numbers of the first actions
    device, dtype = generator.device, getattr(torch, args.policy_dtype)
    policy = DiffusionPolicy(obs_dim, action_dim, args.hidden_dim, "ddpm", args.diffusion_steps, dtype).to(device)
    critic = Critic(obs_dim, args.hidden_dim).to(device)
    stds = policy.step_std(args.min_std)  # (T,)
    groups = [{"params": policy.parameters()}, {"params": critic.parameters(), "lr": args.critic_lr}]
    optimizer = torch.optim.Adam(groups, lr=args.policy_lr, fused=True)
    obs_moments, return_moments = RunningMoments(obs_dim), RunningMoments(1)
    parts = dict(policy=policy, critic=critic, optimizer=optimizer)
    parts |= dict(obs_moments=obs_moments, return_moments=return_moments)
    global_step, num_updates, evaluations, start = 0, 0, [], time.time()
    episode = np.array(saved["episode"]) - 1 if args.resume else np.full(args.num_envs, -1)  # number, per environment
    episode_actions = [[] for _ in range(args.num_envs)]  # its actions so far
    discounted_reward = np.zeros(args.num_envs)  # its sum of gamma^k r over the rewards of k steps ago

    def reset(which):
        """Starts the next episode where `which` (num_envs,) says so, seeded by run, environment and episode number."""
        episode[which] += 1
        seeds = [np.random.SeedSequence([args.seed, i, n]).generate_state(1).item() for i, n in enumerate(episode)]
        return envs.reset(seed=seeds, options={"reset_mask": which})[0]

    for name in parts.keys() & saved.keys():  # those of models/ have policy and critic only
        parts[name].load_state_dict(saved[name])
    if args.evaluate:
        returns = evaluate(policy, obs_moments, args)
        print(f"{args.env_id}: return {returns.mean():.1f} +- {returns.std():.1f}, {len(returns)} episodes")
        raise SystemExit

    # Rollout buffer. Everything as the checkpoint has it; the running episodes' actions lead back to where they were.
    buffer = RolloutBuffer(args.rollout_steps * args.num_envs, obs_dim, (policy.steps + 1) * action_dim, device)
    obs = reset(np.ones(args.num_envs, dtype=bool))
    if saved:
        generator.set_state(saved["generator"].clone())
        global_step, num_updates, evaluations = saved["global_step"], saved["num_updates"], saved["evaluations"]
        start, buffer.added = start - saved["seconds"], saved["added"]
        buffer.rows[: len(saved["rows"])] = saved["rows"]
        discounted_reward = saved["discounted_reward"].numpy()
        for i, (env, actions) in enumerate(zip(envs.envs, saved["episode_actions"], strict=True)):
            episode_actions[i] = list(actions.numpy())
            for action in episode_actions[i]:
                obs[i], *_ = env.step(action)
        if not np.array_equal(obs, saved["obs"].numpy()):
            warnings.warn("an episode does not replay exactly: this goes on, but not bit for bit", stacklevel=1)

    # The run's directory and logs. A file that cannot be written, or no account for --track, ends it with one line.
    def report(kind, error, traceback):
        if stop_signals and "Inductor" in str(kind):  # Ctrl-C ends a running compiler, too
            os._exit(128 + stop_signals[0])
        why = error.__context__ if kind is RuntimeError else error  # torch.save hides the OSError
        if not isinstance(why, OSError) and "wandb" not in str(kind):
            return sys.__excepthook__(kind, error, traceback)
        print(f"\nstopped: {why}; once that is mended, start again, or --resume {run_dir}", file=sys.stderr)

    sys.excepthook = report
    threading.excepthook = lambda failure: None  # of TensorBoard's thread, whose errors add_scalar raises again
    run_dir.mkdir(parents=True, exist_ok=bool(saved))
    (run_dir / "args.json").write_text(json.dumps(asdict(args), indent=2) + "\n")
    if args.track:
        import wandb

        run = dict(project=args.wandb_project, id=run_dir.name, config=asdict(args), dir=run_dir)
        wandb.init(**run, name=run_dir.name, resume="allow", sync_tensorboard=True)  # WANDB_MODE=offline: no account
    writer = SummaryWriter(run_dir, purge_step=global_step + 1 if saved else None)  # hides what will come again
    print(f"{run_dir} on {device}, policy in {dtype}, compile={args.compile}, learns every {len(buffer.rows)} steps")

    def check_finite(**quantities):
        for name, value in quantities.items():
            if not torch.as_tensor(value).isfinite().all():
                raise SystemExit(f"stopped at step {global_step}: {name} is not finite; --resume {run_dir} goes back")

    def due(every):
        """How many multiples of `every` the last step reached; `every` 0 is never."""
        return every and global_step // every - max(0, global_step - args.num_envs) // every

    def checkpoint():
        check_finite(**{f"{name}.{n}": x for name in ("policy", "critic") for n, x in parts[name].named_parameters()})
        state = {name: part.state_dict() for name, part in parts.items()}
        state |= dict(script=script, args=asdict(args), global_step=global_step, num_updates=num_updates)
        state |= dict(evaluations=evaluations, seconds=time.time() - start)
        rows = torch.from_numpy(buffer.rows[: buffer.added].cpu().numpy())  # a slice would save its whole storage
        state |= dict(generator=generator.get_state(), rows=rows, added=buffer.added, obs=torch.tensor(obs))
        state |= dict(episode=episode.tolist(), episode_actions=[torch.tensor(np.array(x)) for x in episode_actions])
        state |= dict(discounted_reward=torch.tensor(discounted_reward))
        writer.flush()
        save(run_dir / "checkpoint.pt", state)

    progress = tqdm(total=args.total_timesteps, initial=global_step, unit="step", dynamic_ncols=True)
    while True:
        last = global_step >= args.total_timesteps

        # Evaluate, when due and at the end.
        if args.eval_every and (due(args.eval_every) or last) and global_step not in [e["step"] for e in evaluations]:
            returns = evaluate(policy, obs_moments, args, stop_signals)
            if not stop_signals:
                mean, std, seconds = np.round([returns.mean(), returns.std(), time.time() - start], 3).tolist()
                tqdm.write(f"step {global_step}: return {mean:.1f} +- {std:.1f}")
                writer.add_scalar("eval/return", mean, global_step)
                returns = " ".join(f"{x:.2f}" for x in returns)
                evaluations.append(dict(step=global_step, mean=mean, std=std, seconds=seconds, returns=returns))
                write_evaluations(run_dir, evaluations)

        # Checkpoint: at the start, when due, at the end, when asked to stop.
        if global_step == 0 or due(args.checkpoint_every) or last or stop_signals:
            checkpoint()
            if last or stop_signals:
                break

        # Act with one draw from the policy, and store its chain.
        global_step += args.num_envs
        obs_moments.update(obs)
        normalized_obs = obs_moments.normalize(obs, device)
        chain = policy.sample(normalized_obs, stds, generator)  # (num_envs, T + 1, A)
        action = chain[:, 0].cpu().numpy()
        next_obs, reward, terminated, truncated, infos = envs.step(action)
        check_finite(observation=np.float32([obs, next_obs]), reward=np.float32(reward))
        done = terminated | truncated
        buffer.add(normalized_obs, obs_moments.normalize(next_obs, device), chain, reward, terminated, done)
        discounted_reward = reward + args.discount * discounted_reward
        return_moments.update(discounted_reward[:, None])
        discounted_reward = discounted_reward * ~done
        for i, actions in enumerate(episode_actions):
            episode_actions[i] = [] if done[i] else [*actions, action[i]]
        obs = next_obs
        if done.any():
            writer.add_scalar("train/return", infos["episode"]["r"][done].mean(), global_step)
            obs = reset(done)

        if buffer.added == len(buffer.rows):
            # Pair n is step n % T of the chain in row n // T, here with its log-probability before the update.
            T, B = policy.steps, args.batch_size
            states, next_states, chains, *others = buffer.rows.split(buffer.sizes, dim=1)
            a_t, a_u = chains[:, action_dim:].reshape(-1, action_dim), chains[:, :-action_dim].reshape(-1, action_dim)
            with torch.no_grad():
                pairs = torch.arange(len(a_t), device=device).split(B)
                old_log_prob = torch.cat([policy.log_prob(states[n // T], a_t[n], a_u[n], n % T, stds) for n in pairs])
                values, next_values = (critic(x).view(-1, args.num_envs) for x in (states, next_states))

            # Advantages, and what V should be, for rewards in units of the deviation of their discounted sums.
            rewards, terminated, done = (x.view(-1, args.num_envs) for x in others)  # (N / num_envs, num_envs)
            rewards = (rewards / (return_moments.var.item() + 1e-8) ** 0.5).clamp(-10, 10)
            advantages = gae(rewards, values, next_values, terminated, done, args.discount, args.gae_lambda)
            returns, advantages = (values + advantages).flatten(), advantages.flatten()  # (N,)

            # Epochs of minibatches; what does not fill one is left out until the next shuffle.
            num_minibatches = max(1, len(a_t) // B)
            for k in range(args.num_epochs * num_minibatches):
                if k % num_minibatches == 0:
                    pairs = torch.randperm(len(a_t), generator=generator, device=device).split(B)
                n = pairs[k % num_minibatches]
                obs_n, i = states[n // T], n % T
                critic_loss = F.mse_loss(critic(obs_n), returns[n // T])
                advantage = advantages[n // T]
                advantage = (advantage - advantage.mean()) / (advantage.std(correction=0) + 1e-8)
                advantage *= args.denoising_discount**i
                batch = obs_n, a_t[n], a_u[n], i, stds, old_log_prob[n], advantage
                policy_loss, kl, share_clipped = policy.loss(*batch, args.clip_range)
                check_finite(critic_loss=critic_loss, policy_loss=policy_loss)
                optimizer.zero_grad()
                (critic_loss + policy_loss).backward()  # they share no parameter
                optimizer.step()
                num_updates += 1
                if kl > args.max_kl:
                    break
            buffer.added = 0

        progress.update(args.num_envs)
        if buffer.added == 0:  # there was an update
            for name, value in {
                "loss/critic": critic_loss,
                "loss/policy": policy_loss,
                "value/explained_variance": 1 - advantages.var() / returns.var(),
                "policy/kl": kl,
                "policy/share_clipped": share_clipped,
                "policy/epochs": (k + 1) / num_minibatches,
                "speed/steps_per_second": global_step / (time.time() - start),
            }.items():
                writer.add_scalar(name, value, global_step)
    progress.close()
    if stop_signals:
        print(f"stopped at step {global_step}; go on with --resume {run_dir}")
        raise SystemExit(128 + stop_signals[0])
