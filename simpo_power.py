# /// script
# requires-python = ">=3.11"
# dependencies = [
#   "dm_control==1.0.50",
#   "gymnasium==1.4.0",
#   "matplotlib==3.11.2",
#   "moviepy==2.2.1",
#   "mujoco==3.17.0",
#   "numpy==2.4.6",
#   "shimmy==2.0.1",
#   "tensorboard==2.21.0",
#   "torch==2.13.0",
#   "tqdm==4.70.1",
#   "tyro==1.0.17",
#   "wandb==0.31.0",
# ]
# ///
"""SiMPO with power weights: Linear (--power 1) and Square (--power 2).

Paper: "SiMPO: Measure Matching for Online Diffusion Reinforcement Learning" (newer name: GeMPO). Top to bottom:
environments; twin critics; the diffusion policy with its weighted matching loss (7); the power weights of
example 3.3 and their normaliser (appendix E); replay buffer; evaluation; checkpoints and faults, to skip at
first; Algorithm 1 with the temperature rule (30).

    python simpo_power.py --env-id Humanoid-v4 --power 2
"""

import atexit
import copy
import csv
import hashlib
import io
import json
import math
import os
import pickle
import signal
import threading
import time
import warnings
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Literal

import gymnasium as gym
import mujoco
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
import tyro
from matplotlib.figure import Figure
from torch.nn.utils import parameters_to_vector
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm


@dataclass
class Args:
    env_id: str = "HalfCheetah-v4"
    """Gymnasium id with Box observations and actions, or a DM Control task such as dm_control/cheetah-run-v0"""
    reward_landscape: Literal["native", "sqrt", "linear", "square", "exp"] = "native"
    """reward as a function of speed (appendix F.2), on dm_control/cheetah-run-v0 and dm_control/walker-run-v0 only"""
    landscape_c: float = 3.0
    """steepness c of the exp landscape, (e^{c z} - 1) / (e^c - 1)"""
    total_timesteps: int = 1_000_000
    """environment steps, all environments together"""
    num_envs: int = 5
    """parallel environments"""
    seed: int = 1
    """seed of the networks, the environments and all draws"""

    # SiMPO
    power: float = 1.0
    """p: weights are max(y, 0)^p with y = (Q - nu)/lambda; 1 is Linear, 2 is Square"""
    num_particles: int = 32
    """K: actions drawn from the old policy per state"""
    target_kl: float = 1.5
    """delta: target KL of the weights from uniform, in (30); must stay below log K"""
    temperature: float = 1.0
    """lambda at the start; (30) tunes it from there"""
    temperature_lr: float = 3e-3
    """learning rate of log lambda"""
    old_policy_interval: int = 1000
    """updates between two refreshes of the frozen old policy pi_old"""
    particle_noise: float = 0.2
    """standard deviation of the Gaussian added to the K actions, in units of half the action range"""
    error_clip: float = 5.0
    """upper limit of a squared velocity error of (7) over (pi/2)^2, per action dimension; bounds the loss in case II"""

    # diffusion and optimisation (table in appendix F)
    diffusion_steps: int = 20
    """denoising steps T, on the cosine schedule"""
    hidden_dim: int = 256
    """units of each of the 3 hidden layers, in policy and critics"""
    batch_size: int = 256
    """states per update"""
    steps_per_update: int = 5
    """environment steps per update"""
    learning_starts: int = 5_000
    """environment steps with uniformly random actions before the first update"""
    buffer_size: int = 1_000_000
    """transitions that the replay buffer holds"""
    policy_lr: float = 3e-4
    """learning rate of the policy at the start"""
    policy_lr_end: float = 3e-5
    """learning rate of the policy at the end, reached linearly"""
    critic_lr: float = 3e-4
    """learning rate of the critics"""
    discount: float = 0.99
    """gamma, the discount per step"""
    tau: float = 0.005
    """step of the target critics towards the critics, per update"""

    # evaluation and output
    eval_every: int = 10_000
    """environment steps between evaluations, and one at the end; 0 turns evaluation off"""
    eval_episodes: int = 20
    """episodes per evaluation, in parallel environments"""
    eval_draws: int = 10
    """actions drawn per step in evaluation; the critics' favourite is taken"""
    log_every: int = 1_000
    """environment steps between logged losses, weights and speeds"""
    checkpoint_every: int = 5_000
    """environment steps between checkpoints in runs/<run_name>/checkpoint, and one at the end; 0: none"""
    resume: str = ""
    """runs/<run_name> of a stopped run: go on where its last checkpoint was; its arguments hold but where given anew"""
    capture_video: bool = False
    """record the first episode of every evaluation as runs/<run_name>/videos/*.mp4"""
    track: bool = False
    """send arguments and TensorBoard scalars to Weights & Biases, too (offline if there is no account)"""
    wandb_project: str = "simpo"
    """Weights & Biases project"""
    evaluate: str = ""
    """runs/<run_name> of a trained model: evaluate it and train nothing; its arguments hold but where given anew"""

    # machine
    device: str = "auto"
    """auto (the GPU if there is one), cpu, cuda, cuda:1, ..."""
    sampling_dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """precision of the network while actions are drawn, where no gradient flows; auto: bfloat16 if the machine can"""
    compile: bool = True
    """torch.compile the hot functions"""


# ---------------------------------------------------------------------------------------------------- environments


class RewardLandscape(gym.Wrapper):
    """Appendix F.2: reward a function of z = clip(speed / target, 0, 1); info["native_reward"] keeps the native one."""

    TARGET = {"dm_control/cheetah-run-v0": 10.0, "dm_control/walker-run-v0": 8.0}  # m/s

    def __init__(self, env, landscape, c, env_id):
        super().__init__(env)
        self.landscape, self.c, self.target = landscape, c, self.TARGET[env_id]

    def step(self, action):
        obs, reward, terminated, truncated, info = self.env.step(action)
        physics = self.unwrapped._env.physics
        speed = physics.speed() if hasattr(physics, "speed") else physics.horizontal_velocity()
        z = min(max(float(speed) / self.target, 0.0), 1.0)
        shaped = {"sqrt": z**0.5, "linear": z, "square": z**2, "exp": math.expm1(self.c * z) / math.expm1(self.c)}
        return obs, shaped[self.landscape], terminated, truncated, {**info, "native_reward": reward}


class Replayable(gym.wrappers.RecordEpisodeStatistics):
    """Episode k starts from a seed made of the first seed and k: its actions are then enough to return to any state."""

    def reset(self, *, seed=None, options=None):
        if seed is not None:
            self.first_seed, self.episode = seed, -1
        self.episode, self.actions = self.episode + 1, []
        seed = np.random.SeedSequence([self.first_seed, self.episode]).generate_state(1)[0]
        return super().reset(seed=int(seed), options=options)

    def step(self, action):
        self.actions.append(np.array(action))
        return super().step(action)

    def replay(self, episode, actions):
        self.episode = episode - 1
        obs, _ = self.reset()
        for action in actions.numpy():
            obs, *_ = self.step(action)
        return obs


def make_env(env_id, landscape="native", landscape_c=3.0, video_folder=None):
    """An environment with flat observations and actions rescaled to [-1, 1]. Raises SystemExit on an unfit id."""
    mujoco.set_mju_user_warning(warnings.warn)  # instead of a MUJOCO_LOG.TXT in the current directory
    registered = f"shimmy:{env_id}" if env_id.startswith("dm_control/") else env_id
    try:
        env = gym.make(registered, **({"render_mode": "rgb_array"} if video_folder else {}))
    except (gym.error.Error, ImportError) as error:
        raise SystemExit(f"--env-id {env_id}: {error}") from None
    obs_space, action_space = env.observation_space, env.action_space
    fit = isinstance(obs_space, (gym.spaces.Box, gym.spaces.Dict)) and isinstance(action_space, gym.spaces.Box)
    if not fit or not np.isfinite([action_space.low, action_space.high]).all():
        rule = "observations and actions must be continuous (Box), actions within bounds"
        raise SystemExit(f"--env-id {env_id}: {rule}; it has {obs_space} and {action_space}")
    if landscape != "native":
        env = RewardLandscape(env, landscape, landscape_c, env_id)
    if video_folder:
        env = gym.wrappers.RecordVideo(env, video_folder, episode_trigger=lambda episode: episode == 0)
    return gym.wrappers.RescaleAction(gym.wrappers.FlattenObservation(env), -1.0, 1.0)


# -------------------------------------------------------------------------------------------------------- networks


def mish(x):
    """x tanh(log(1 + e^x)), with one exponential."""
    n = x.float().clamp(max=20).exp()
    n = n * (n + 2)
    return (x * (n / (n + 2))).to(x.dtype)


class Critic(nn.Module):
    """Twin Q(s, a): two networks of 3 hidden Mish layers."""

    def __init__(self, obs_dim, action_dim, hidden_dim):
        super().__init__()
        sizes = [obs_dim + action_dim, hidden_dim, hidden_dim, hidden_dim, 1]
        self.twins = nn.ModuleList(nn.ModuleList(map(nn.Linear, sizes, sizes[1:])) for _ in range(2))

    @torch.compile(dynamic=False)
    def forward(self, obs, action):
        """obs (B, S), action (B, K, A) -> both Q (2, B, K); what depends on the state alone is done once per state."""
        q = []
        for first, second, third, last in self.twins:
            obs_weight, action_weight = first.weight.split([obs.shape[-1], action.shape[-1]], dim=1)
            h = mish(F.linear(obs, obs_weight, first.bias)[:, None] + F.linear(action, action_weight))  # (B, K, H)
            q.append(last(mish(third(mish(second(h))))).squeeze(-1))
        return torch.stack(q)


class DiffusionPolicy(nn.Module):
    """pi(a|s) as a diffusion model with velocity prediction on the cosine schedule, t = 1/T, 2/T, ..., 1."""

    def __init__(self, obs_dim, action_dim, hidden_dim, steps):
        super().__init__()
        self.action_dim, self.steps = action_dim, steps
        t = torch.arange(1, steps + 1, dtype=torch.float64) / steps  # (T,)
        frequencies = torch.exp(torch.linspace(0, math.log(64), 32, dtype=torch.float64))
        time_features = torch.cat([torch.sin(t[:, None] * frequencies), torch.cos(t[:, None] * frequencies)], dim=1)
        alpha, sigma = torch.cos(torch.pi / 2 * t), torch.sin(torch.pi / 2 * t)
        # One step goes from t to u = t - 1/T: given a_t and a_0, a_u has mean from_t a_t + from_0 a_0, deviation std.
        u = t - 1 / steps
        alpha_u, sigma_u = torch.cos(torch.pi / 2 * u), torch.sin(torch.pi / 2 * u)
        variance = sigma**2 - (alpha / alpha_u * sigma_u) ** 2  # of a_t given a_u
        from_t, from_0 = alpha / alpha_u * sigma_u**2 / sigma**2, alpha_u * variance / sigma**2
        std = (variance * sigma_u**2 / sigma**2).clamp(min=0).sqrt()
        schedule = torch.stack([alpha, sigma, from_t, from_0, std], dim=1)
        self.register_buffer("time_features", time_features.float(), persistent=False)  # (T, 64)
        self.register_buffer("schedule", schedule.float(), persistent=False)  # (T, 5)
        sizes = [action_dim + obs_dim + time_features.shape[1], hidden_dim, hidden_dim, hidden_dim, action_dim]
        self.layers = nn.ModuleList(map(nn.Linear, sizes, sizes[1:]))

    def embed(self, obs):
        """What s and t add to the first layer, whatever the action: obs (B, S) -> (B, 1, H), time (T, H)."""
        inputs = [self.action_dim, obs.shape[1], self.time_features.shape[1]]
        _, obs_weight, time_weight = self.layers[0].weight.split(inputs, dim=1)
        return F.linear(obs, obs_weight, self.layers[0].bias)[:, None], F.linear(self.time_features, time_weight)

    def velocity(self, noisy_action, embedding):
        """v_theta(a_t, s, t) times 2/pi: noisy_action (B, K, A), embedding of s and t (B, 1 or K, H) -> (B, K, A)."""
        first, second, third, last = self.layers
        h = mish(F.linear(noisy_action, first.weight[:, : self.action_dim]) + embedding)
        return last(mish(third(mish(second(h)))))

    @torch.compile(dynamic=False)
    def loss(self, obs, action, weights, t, noise, error_clip):
        """Velocity matching (7), times (2/pi)^2: obs (B, S), action and noise (B, K, A), weights and index t (B, K)."""
        obs_embedding, time_embedding = self.embed(obs)
        embedding = obs_embedding + F.one_hot(t, self.steps).float() @ time_embedding  # (B, K, H)
        alpha, sigma = self.schedule[t, :2].split(1, dim=-1)  # (B, K, 1)
        velocity = alpha * noise - sigma * action  # (alpha'_t a_0 + sigma'_t eps) 2/pi
        error = (self.velocity(alpha * action + sigma * noise, embedding) - velocity).square()
        return (weights[..., None] * error.clamp(max=error_clip)).mean()

    @torch.compile(dynamic=False)
    def denoise(self, noisy_action, embedding, schedule, noise):
        """One ancestral step a_t -> a_{t - 1/T}; the predicted a_0 = alpha a_t - sigma v 2/pi is kept in the bounds."""
        alpha, sigma, from_t, from_0, std = schedule
        velocity = self.velocity(noisy_action, embedding).float()
        action = (alpha * noisy_action - sigma * velocity).clamp(-1, 1)
        return from_t * noisy_action + from_0 * action + std * noise

    @torch.no_grad()
    def sample(self, obs, num_actions, generator, dtype=torch.float32):
        """obs (B, S) -> num_actions draws per state, (B, K, A) in [-1, 1]; all randomness comes from the generator."""
        shape = (self.steps + 1, len(obs), num_actions, self.action_dim)
        noise = torch.randn(shape, generator=generator, device=obs.device)
        # On a CPU go through the states in blocks whose activations stay in the L2 cache.
        block = max(1, 2048 // num_actions) if obs.device.type == "cpu" else len(obs)
        obs_embedding, time_embedding = self.embed(obs)  # always in float32: observations may be large
        actions = []
        with torch.autocast(obs.device.type, torch.bfloat16, enabled=dtype == torch.bfloat16):
            for embedding, eps in zip(obs_embedding.split(block), noise.split(block, dim=1), strict=True):
                action = eps[self.steps]  # a_1
                for i in reversed(range(self.steps)):
                    action = self.denoise(action, embedding + time_embedding[i], self.schedule[i], eps[i])
                actions.append(action)
        return torch.cat(actions)


# ------------------------------------------------------------------------------------------------------ reweighting


@torch.no_grad()
def reweight(q, temperature, power):
    """Weights w = g((q - nu) / temperature) of K actions, with nu such that they average 1: (5), (6), appendix E.

    g(y) = max(y, 0)^power. q (..., K), temperature > 0, power > 0; returns weights (..., K) and nu (..., 1) in q's
    dtype. No gradient flows through it.
    """
    K = q.shape[-1]
    q_max = q.double().amax(-1, keepdim=True)
    gap = (q_max - q.double()) / temperature  # (..., K) >= 0, so y = top - gap, where top = (q_max - nu) / temperature

    def g(y):
        return y.clamp(min=0) ** power

    sorted_gap = gap.sort(-1).values
    k = torch.arange(1, K + 1, device=q.device, dtype=torch.float64)
    s1, s2 = sorted_gap.cumsum(-1), (sorted_gap**2).cumsum(-1)
    if power == 1:
        active = k * sorted_gap - s1 < K  # (25)
        top = (K + s1) / k  # (24)
        top = top.gather(-1, active.sum(-1, keepdim=True) - 1)
        weights = g(top - gap)
    elif power == 2:
        active = s2 - 2 * sorted_gap * s1 + k * sorted_gap**2 < K  # (29)
        top = (s1 + (s1**2 - k * (s2 - K)).clamp(min=0).sqrt()) / k  # (28)
        top = top.gather(-1, active.sum(-1, keepdim=True) - 1)
        weights = g(top - gap)
    else:  # no closed form; the mean weight grows with the top one, which is in [1, K]: bisect it
        low, high = torch.ones_like(q_max), torch.full_like(q_max, K)
        for _ in range(60):
            middle = (low + high) / 2
            too_high = g(middle ** (1 / power) - gap).mean(-1, keepdim=True) > 1
            low, high = torch.where(too_high, low, middle), torch.where(too_high, middle, high)
        top = low ** (1 / power)
        below, above = g(top - gap), g(high ** (1 / power) - gap)  # of neighbouring tops, yet apart for small powers
        share = (1 - below.mean(-1, keepdim=True)) / (above - below).mean(-1, keepdim=True).clamp(min=1e-300)
        weights = below.lerp(above, share.clamp(0, 1))
    return weights.to(q.dtype), (q_max - temperature * top).to(q.dtype)


# ---------------------------------------------------------------------------------------------------- replay buffer


class ReplayBuffer:
    """A ring of the last `capacity` transitions, on the device."""

    def __init__(self, capacity, obs_dim, action_dim, device):
        self.capacity, self.added = capacity, 0
        self.sizes = [obs_dim, obs_dim, action_dim, 1, 1]
        self.rows = torch.empty(capacity, sum(self.sizes), device=device)

    def add(self, obs, next_obs, action, reward, terminated):
        """Arrays with one row per environment; the oldest rows make room."""
        columns = obs, next_obs, action, reward[:, None], terminated[:, None]
        self.put(torch.cat([torch.as_tensor(x, dtype=torch.float32, device=self.rows.device) for x in columns], dim=1))

    def put(self, rows):
        where = torch.arange(self.added, self.added + len(rows), device=rows.device) % self.capacity
        self.rows[where] = rows
        self.added += len(rows)

    def sample(self, batch_size, generator):
        """Uniform rows with replacement: obs (B, S), next_obs (B, S), action (B, A), reward (B,), terminated (B,)."""
        size = min(self.added, self.capacity)
        rows = self.rows[torch.randint(size, (batch_size,), generator=generator, device=self.rows.device)]
        obs, next_obs, action, reward, terminated = (x.contiguous() for x in rows.split(self.sizes, dim=1))
        return obs, next_obs, action, reward[:, 0], terminated[:, 0]


# ------------------------------------------------------------------------------------------------------- evaluation


def evaluate(policy, critic, args, sampling_dtype, video_folder=None, stop=()):
    """Returns of eval_episodes episodes, acting by the best of eval_draws draws: as trained (N,), native (N,).

    Environments, seeds and generator are its own, so that training goes on as if it had not been called. Ends early,
    with no meaningful result, as soon as there is something in stop.
    """
    device = policy.schedule.device
    folders = [video_folder] + [None] * (args.eval_episodes - 1)
    make = [lambda x=x: make_env(args.env_id, args.reward_landscape, args.landscape_c, x) for x in folders]
    envs = gym.vector.SyncVectorEnv(make)
    generator = torch.Generator(device).manual_seed(args.seed + 10_000)
    obs, _ = envs.reset(seed=args.seed + 10_000)
    returns, native_returns = np.zeros((2, args.eval_episodes))
    running = np.ones(args.eval_episodes, dtype=bool)
    while running.any() and not stop:
        obs = torch.as_tensor(obs, dtype=torch.float32, device=device)
        actions = policy.sample(obs, args.eval_draws, generator, sampling_dtype)  # (N, draws, A)
        with torch.no_grad():
            best = critic(obs, actions).amin(0).argmax(-1)
        actions = actions[torch.arange(len(obs), device=device), best].cpu().numpy()
        obs, reward, terminated, truncated, infos = envs.step(actions)
        returns += running * reward
        native_returns += running * infos.get("native_reward", reward)
        running &= ~(terminated | truncated)
    envs.close()
    return returns, native_returns


def write_evaluations(run_dir, evaluations):
    """runs/<run_name>/eval.csv, one row per evaluation, and learning_curve.png: mean and standard deviation."""
    with open(run_dir / "unfinished", "w", newline="") as file:
        table = csv.DictWriter(file, max(evaluations, key=len))  # --resume may have changed --eval-episodes
        table.writeheader()
        table.writerows(evaluations)
    os.replace(run_dir / "unfinished", run_dir / "eval.csv")
    step, mean, std = (np.array([row[name] for row in evaluations]) for name in ("step", "mean", "std"))
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    axes.plot(step, mean, marker="o", markersize=3)
    axes.fill_between(step, mean - std, mean + std, alpha=0.2)
    axes.set(xlabel="environment steps", ylabel="evaluation return (mean, standard deviation)", title=run_dir.name)
    figure.savefig(run_dir / "learning_curve.png", dpi=120)


# ------------------------------------------------- to skip at first: files, checkpoints, faults and the machine


def write(path, content):
    """torch.save and a SHA-256 of it, written aside and moved into place: a file of this name is always whole."""
    data = io.BytesIO()
    torch.save(content, data)
    aside = path.with_name("unfinished")
    try:
        with open(aside, "wb") as file:
            file.write(data.getbuffer())
            file.write(hashlib.sha256(data.getbuffer()).digest())
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)  # or it would fill what is left of a disk


def read(path, device="cpu"):
    """What `write` wrote, executing nothing from it. Raises OSError, or ValueError if it holds anything else."""
    data = path.read_bytes()
    if hashlib.sha256(data[:-32]).digest() != data[-32:]:
        raise ValueError("it is damaged, its SHA-256 is wrong")
    try:
        return torch.load(io.BytesIO(data[:-32]), map_location=device, weights_only=True)
    except pickle.UnpicklingError:
        raise ValueError("it holds more than tensors, numbers and strings") from None


def save(path, args, policy, critic):
    """What --evaluate needs."""
    networks = {"policy": policy.state_dict(), "critic": critic.state_dict()}
    write(path, {"script": Path(__file__).stem, "args": asdict(args)} | networks)


def load(path):
    """What `save` wrote."""
    try:
        return read(path)
    except (OSError, ValueError) as error:
        raise SystemExit(f"--evaluate: {path} is no trained model: {error}") from None


class Checkpoints:
    """The last two checkpoints of a run, in one folder: state_STEP each, and the buffer in files that they share.

    Each row of the buffer is written once, by the first checkpoint after it: the time does not grow with the buffer.
    """

    def __init__(self, folder):
        self.folder, self.files = folder, []  # of the newest one: state_STEP, rows_FIRST_END, ...

    def save(self, step, state, buffer):
        """Writes what the buffer gained since the last call, then the state; removes what no checkpoint needs."""
        self.folder.mkdir(exist_ok=True)
        oldest = max(0, buffer.added - buffer.capacity)
        ends = {name: int(name.split("_")[2]) for name in self.files[1:]}
        first = max([oldest, *ends.values()])
        files = [f"state_{step}", *(name for name in ends if ends[name] > oldest), f"rows_{first}_{buffer.added}"]
        where = torch.arange(first, buffer.added, device=buffer.rows.device) % buffer.capacity
        try:
            write(self.folder / files[-1], buffer.rows[where].cpu())
            write(self.folder / files[0], state | {"files": files})
        except OSError:
            (self.folder / files[-1]).unlink(missing_ok=True)
            raise
        for path in self.folder.iterdir():
            if path.name not in files + self.files:
                path.unlink()
        self.files = files

    def load(self):
        """The state of the newest checkpoint of which every file is whole."""
        states = self.folder.glob("state_*")
        for path in sorted(states, key=lambda path: int(path.name.split("_")[1]), reverse=True):
            try:
                state = read(path)
                for name in state["files"][1:]:
                    read(self.folder / name)
            except (OSError, ValueError) as error:
                print(f"{path} cannot be used: {error}")
                continue
            self.files = state["files"]
            return state
        raise SystemExit(f"--resume: there is no whole checkpoint in {self.folder}")

    def restore(self, buffer):
        """Fills the buffer with the rows of the checkpoint that was loaded, piece by piece to save memory."""
        buffer.added = int(self.files[1].split("_")[1])
        for name in self.files[1:]:
            buffer.put(read(self.folder / name, buffer.rows.device))


def attempt(path, write_it, *args):
    """Calls write_it(*args); if the disk is full or read-only, one warning names the path and training goes on."""
    try:
        write_it(*args)
    except OSError as error:
        error.__traceback__ = None  # TensorBoard raises the same error again and again; its traceback would grow
        warnings.warn(f"{path} cannot be written: {error.strerror or error}", stacklevel=1)


def catch_signals():
    """A list to which the first SIGINT or SIGTERM is added; the second one ends the process at once."""
    received = []

    def receive(signum, frame):
        received.append(signum)
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)

    signal.signal(signal.SIGINT, receive)
    signal.signal(signal.SIGTERM, receive)
    return received


def check(args):
    """Raises SystemExit with one line for the first argument that makes no sense."""
    at_least_1 = """total_timesteps num_envs num_particles old_policy_interval diffusion_steps hidden_dim batch_size
        steps_per_update buffer_size eval_episodes eval_draws log_every"""
    above_0 = "power temperature temperature_lr policy_lr critic_lr error_clip"
    at_least_0 = "checkpoint_every particle_noise policy_lr_end learning_starts eval_every seed"
    log_k = math.log(max(args.num_particles, 1))
    shaped, tasks = args.reward_landscape != "native", RewardLandscape.TARGET
    rules = [(name, getattr(args, name) >= 1, "at least 1") for name in at_least_1.split()]
    rules += [(name, 0 < getattr(args, name) < math.inf, "above 0 and finite") for name in above_0.split()]
    rules += [(name, 0 <= getattr(args, name) < math.inf, "at least 0 and finite") for name in at_least_0.split()]
    rules += [(name, 0 <= getattr(args, name) <= 1, "from 0 to 1") for name in ("discount", "tau")]
    rules += [("landscape_c", 0 < args.landscape_c <= 700, "above 0 and at most 700")]  # e^c must be finite
    rules += [("target_kl", 0 < args.target_kl < log_k, f"above 0 and below log(num_particles) = {log_k:.2f}")]
    rules += [("env_id", not shaped or args.env_id in tasks, f"{' or '.join(tasks)} for --reward-landscape")]
    for name, fulfilled, rule in rules:
        if not fulfilled:
            raise SystemExit(f"--{name.replace('_', '-')} must be {rule}; got {getattr(args, name)}")


def set_up_process(args):
    """The device and the dtype in which actions are drawn; sets warnings, rendering and torch.compile."""
    gym.logger.min_level = gym.logger.ERROR  # no warnings that the paper's v4 environments are outdated
    if not os.environ.get("DISPLAY"):
        os.environ.setdefault("MUJOCO_GL", "egl" if args.capture_video else "disable")  # only videos are rendered
    try:
        fastest = "cuda" if torch.cuda.is_available() else "cpu"
        device = torch.device(fastest if args.device == "auto" else args.device)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise SystemExit(f"--device {args.device}: {str(error).splitlines()[0]}") from None
    try:
        if args.compile:
            torch.compile(lambda x: x + 1)(torch.zeros(1, device=device))
    except Exception:
        print("torch.compile does not work on this machine (is there a C++ compiler?): running without it, slower")
        args.compile = False
    if not args.compile:
        torch.compiler.set_stance("force_eager")
    if args.sampling_dtype == "auto":
        if device.type == "cuda":
            has_bfloat16 = torch.cuda.is_bf16_supported(including_emulation=False)
        else:
            has_bfloat16 = torch.cpu.get_capabilities().get("avx512_bf16", False)
        return device, torch.bfloat16 if has_bfloat16 else torch.float32
    return device, getattr(torch, args.sampling_dtype)


if __name__ == "__main__":
    # Arguments. --evaluate and --resume take those of the run; flags given now win, except some that cannot change.
    args = tyro.cli(Args, description=__doc__)
    run_name = f"{args.env_id.replace('/', '-')}__{Path(__file__).stem}__{args.seed}__{datetime.now():%Y%m%d-%H%M%S-%f}"
    run_dir = Path(args.evaluate or args.resume or f"runs/{run_name}")
    checkpoints = Checkpoints(run_dir / "checkpoint")
    if args.evaluate or args.resume:
        state = load(run_dir / "model.pt") if args.evaluate else checkpoints.load()
        if state["script"] != Path(__file__).stem:
            raise SystemExit(f"{run_dir} was trained by {state['script']}.py; go on with that script")
        kept = state["args"] | ({"capture_video": False} if args.evaluate else {})
        args = tyro.cli(Args, description=__doc__, default=Args(**kept))
        fixed = """env_id reward_landscape landscape_c num_envs seed hidden_dim diffusion_steps buffer_size critic_lr
            temperature temperature_lr"""
        for name in fixed.split():
            if getattr(args, name) != state["args"][name]:
                raise SystemExit(f"{run_dir} was made with --{name.replace('_', '-')} {state['args'][name]}")
    check(args)
    device, sampling_dtype = set_up_process(args)

    # Environments and networks.
    make = [lambda: Replayable(make_env(args.env_id, args.reward_landscape, args.landscape_c))] * args.num_envs
    envs = gym.vector.SyncVectorEnv(make, autoreset_mode=gym.vector.AutoresetMode.SAME_STEP)
    obs_dim, action_dim = envs.single_observation_space.shape[0], envs.single_action_space.shape[0]
    torch.manual_seed(args.seed)  # the networks
    generator = torch.Generator(device).manual_seed(args.seed)  # every draw in training
    policy = DiffusionPolicy(obs_dim, action_dim, args.hidden_dim, args.diffusion_steps).to(device)
    critic = Critic(obs_dim, action_dim, args.hidden_dim).to(device)

    if args.evaluate:
        policy.load_state_dict(state["policy"])
        critic.load_state_dict(state["critic"])
        video_folder = str(run_dir / "videos") if args.capture_video else None
        returns, native_returns = evaluate(policy, critic, args, sampling_dtype, video_folder)
        print(f"{args.env_id}: return {returns.mean():.1f} +- {returns.std():.1f}, {len(returns)} episodes")
        if args.reward_landscape != "native":
            print(f"in the native reward: {native_returns.mean():.1f} +- {native_returns.std():.1f}")
        raise SystemExit

    # The run's directory and logs.
    if args.resume:
        for path in run_dir.glob("events.*"):  # what came after the checkpoint will be written again
            os.truncate(path, state["event_files"].get(path.name, 0))
    else:
        try:
            run_dir.mkdir(parents=True)
            (run_dir / "args.json").write_text(json.dumps(asdict(args), indent=2) + "\n")
        except OSError as error:
            raise SystemExit(f"cannot write to {run_dir}: {error.strerror}") from None
    if args.track:
        import wandb

        try:
            mode = os.environ.get("WANDB_MODE") or ("online" if wandb.login(prompt=False) else "offline")
        except wandb.Error as error:
            print(f"recording for Weights & Biases offline, upload it with wandb sync: {error}")
            mode = "offline"
        run = dict(name=run_dir.name, id=run_dir.name, resume="allow", config=asdict(args), dir=run_dir, mode=mode)
        wandb.init(**run, project=args.wandb_project, sync_tensorboard=True)
    writer = SummaryWriter(run_dir)
    atexit.register(attempt, run_dir / "events*", writer.close)
    threading.excepthook = lambda failure: None  # silences TensorBoard's thread: add_scalar raises its error again

    def log(scalars):
        for name, value in scalars.items():
            attempt(run_dir / "events*", writer.add_scalar, name, value, global_step)

    def check_finite(**quantities):
        for name, value in quantities.items():
            if not torch.as_tensor(value).isfinite().all():
                good = checkpoints.folder / checkpoints.files[0] if checkpoints.files else "none"
                raise SystemExit(f"stopped at step {global_step}: {name} is not finite; last good checkpoint: {good}")

    def passed(every):
        """How many multiples of `every` the last step passed; `every` 0 is never."""
        return every and global_step // every - max(0, global_step - args.num_envs) // every

    print(f"{run_dir} on {device}, actions drawn in {sampling_dtype}, {'compiled' if args.compile else 'not compiled'}")

    # Targets, temperature, optimisers, buffer; with --resume all as the checkpoint has it.
    old_policy = copy.deepcopy(policy).requires_grad_(False)
    critic_target = copy.deepcopy(critic).requires_grad_(False)
    log_temperature = torch.tensor(math.log(args.temperature), device=device, requires_grad=True)
    policy_optimizer = torch.optim.Adam(policy.parameters(), lr=args.policy_lr, fused=True)
    critic_optimizer = torch.optim.Adam(critic.parameters(), lr=args.critic_lr, fused=True)
    temperature_optimizer = torch.optim.Adam([log_temperature], lr=args.temperature_lr)
    buffer = ReplayBuffer(min(args.buffer_size, args.total_timesteps + args.num_envs), obs_dim, action_dim, device)
    global_step, num_updates, evaluations, latest, critic_loss = 0, 0, [], {}, None
    obs, _ = envs.reset(seed=args.seed)
    start = time.time()
    parts = dict(policy=policy, old_policy=old_policy, critic=critic, critic_target=critic_target)
    parts |= dict(policy_optimizer=policy_optimizer, critic_optimizer=critic_optimizer)
    parts |= dict(temperature_optimizer=temperature_optimizer)
    if args.resume:
        for name, part in parts.items():
            part.load_state_dict(state[name])
        log_temperature.data.fill_(state["log_temperature"])
        generator.set_state(state["generator"])
        global_step, num_updates, evaluations = state["global_step"], state["num_updates"], state["evaluations"]
        start -= state["seconds"]
        checkpoints.restore(buffer)
        obs = np.stack([env.replay(*episode) for env, episode in zip(envs.envs, state["episodes"], strict=True)])
        if not np.array_equal(obs, state["obs"].numpy()):
            warnings.warn("the environment does not replay exactly: this goes on, but not bit for bit", stacklevel=1)

    def checkpoint():
        check_finite(policy=parameters_to_vector(policy.parameters()), critic=parameters_to_vector(critic.parameters()))
        attempt(run_dir / "events*", writer.flush)
        episodes = [(env.episode, torch.tensor(np.array(env.actions))) for env in envs.envs]
        sizes = {path.name: path.stat().st_size for path in run_dir.glob("events.*")}
        state = {name: part.state_dict() for name, part in parts.items()}
        state |= dict(script=Path(__file__).stem, args=asdict(args), seconds=time.time() - start)
        state |= dict(global_step=global_step, num_updates=num_updates, evaluations=evaluations)
        state |= dict(log_temperature=log_temperature.item(), generator=generator.get_state(), event_files=sizes)
        state |= dict(episodes=episodes, obs=torch.tensor(obs))
        attempt(checkpoints.folder, checkpoints.save, global_step, state, buffer)

    K, B = args.num_particles, args.batch_size
    stop = catch_signals()
    progress = tqdm(total=args.total_timesteps, initial=global_step, unit="step", dynamic_ncols=True)
    while True:
        last = global_step >= args.total_timesteps

        # Checkpoint, when due, at the end, or asked to stop.
        due = passed(args.checkpoint_every) or last or stop
        if args.checkpoint_every and due and f"state_{global_step}" not in checkpoints.files:
            checkpoint()
        if stop:
            break

        # Evaluate, when due and at the end.
        if args.eval_every and (passed(args.eval_every) or last):
            video_folder = str(run_dir / "videos" / str(global_step)) if args.capture_video else None
            try:
                returns, native_returns = evaluate(policy, critic, args, sampling_dtype, video_folder, stop)
            except Exception as error:
                if not args.capture_video:
                    raise
                warnings.warn(f"going on without videos: {error}", stacklevel=1)
                args.capture_video = False
                continue
            if stop:
                continue
            latest["eval"] = returns.mean()
            row = dict(step=global_step, mean=returns.mean(), std=returns.std(), seconds=time.time() - start)
            row |= dict(native_mean=native_returns.mean(), native_std=native_returns.std())
            row |= {f"return_{i + 1}": value for i, value in enumerate(returns)}
            evaluations.append({name: round(float(value), 3) for name, value in row.items()})
            attempt(run_dir / "eval.csv", write_evaluations, run_dir, evaluations)
            attempt(run_dir / "model.pt", save, run_dir / "model.pt", args, policy, critic)
            log({"eval/return": returns.mean(), "eval/native_return": native_returns.mean()})
        if last:
            break
        global_step += args.num_envs

        # Act with one draw from the policy, and store. The next observation of a finished episode is its own last one.
        if global_step <= args.learning_starts:
            action = 2 * torch.rand(args.num_envs, action_dim, generator=generator, device=device) - 1
        else:
            obs_tensor = torch.as_tensor(obs, dtype=torch.float32, device=device)
            action = policy.sample(obs_tensor, 1, generator, sampling_dtype)[:, 0]
        next_obs, reward, terminated, truncated, infos = envs.step(action.cpu().numpy())
        done = terminated | truncated
        real_next_obs = next_obs.copy()
        for i in np.flatnonzero(done):
            real_next_obs[i] = infos["final_obs"][i]
        check_finite(observation=real_next_obs, reward=reward)
        buffer.add(obs, real_next_obs, action, reward, terminated)
        obs = next_obs
        if done.any():
            latest["train"] = infos["final_info"]["episode"]["r"][done].mean()
            log({"train/return": latest["train"]})

        for _ in range(passed(args.steps_per_update) if global_step > args.learning_starts else 0):
            batch_obs, batch_next_obs, batch_action, batch_reward, batch_terminated = buffer.sample(B, generator)

            # Critics: Bellman target with one action of the policy and the smaller target Q; time limits bootstrap.
            with torch.no_grad():
                next_action = policy.sample(batch_next_obs, 1, generator, sampling_dtype)  # (B, 1, A)
                next_q = critic_target(batch_next_obs, next_action).amin(0)[:, 0]  # (B,)
                target_q = batch_reward + args.discount * (1 - batch_terminated) * next_q
            q = critic(batch_obs, batch_action[:, None])[..., 0]  # (2, B)
            critic_loss = F.mse_loss(q, target_q.expand_as(q))
            critic_optimizer.zero_grad()
            critic_loss.backward()
            critic_optimizer.step()

            # K actions per state from the frozen old policy, their values and their weights (9).
            particles = old_policy.sample(batch_obs, K, generator, sampling_dtype)  # (B, K, A)
            particles += args.particle_noise * torch.randn(particles.shape, generator=generator, device=device)
            particles.clamp_(-1, 1)
            temperature = log_temperature.detach().exp()
            with torch.no_grad():
                particle_q = critic(batch_obs, particles).mean(0)  # (B, K)
            check_finite(critic_loss=critic_loss, q=particle_q)
            weights, nu = reweight(particle_q, temperature, args.power)

            # Policy: weighted velocity matching (7) on all K actions, one time and one noise each.
            t = torch.randint(args.diffusion_steps, (B, K), generator=generator, device=device)
            noise = torch.randn(particles.shape, generator=generator, device=device)
            policy_loss = policy.loss(batch_obs, particles, weights, t, noise, args.error_clip)
            policy_optimizer.zero_grad()
            policy_loss.backward()
            frac = min(global_step / args.total_timesteps, 1)
            policy_optimizer.param_groups[0]["lr"] = (1 - frac) * args.policy_lr + frac * args.policy_lr_end
            policy_optimizer.step()

            # Temperature: dual loss (30) with the entropy of the weights, clipped to be positive and normalised. Its
            # gradient moves log lambda: lambda stays positive, and its relative change per step does not depend on it.
            p = weights.clamp(min=1e-6)
            p = p / p.sum(-1, keepdim=True)
            entropy = -(p * p.log()).sum(-1).mean()
            temperature_loss = log_temperature * (args.target_kl - (math.log(K) - entropy))
            temperature_optimizer.zero_grad()
            temperature_loss.backward()
            temperature_optimizer.step()
            log_temperature.data.clamp_(min=-20)  # ties at the bounds of the actions can keep the KL below any target
            check_finite(policy_loss=policy_loss, temperature_loss=temperature_loss)

            # Target critics follow the critics, the old policy is replaced whole.
            with torch.no_grad():
                for target, online in zip(critic_target.parameters(), critic.parameters(), strict=True):
                    target.lerp_(online, args.tau)
            num_updates += 1
            if num_updates % args.old_policy_interval == 0:
                old_policy.load_state_dict(policy.state_dict())

        progress.update(args.num_envs)
        if critic_loss is not None and passed(args.log_every):
            scalars = {
                "loss/critic": critic_loss,
                "loss/policy": policy_loss,
                "q/mean": q.mean(),
                "q/particle_spread": particle_q.std(-1).mean(),
                "weights/temperature": temperature,
                "weights/entropy": entropy,
                "weights/share_negative": (weights < 0).float().mean(),
                "weights/negative_mass": weights.clamp(max=0).abs().mean(),
                "weights/max": weights.amax(-1).mean(),
                "weights/effective_actions": (weights.abs().sum(-1) ** 2 / weights.square().sum(-1)).mean(),
                "policy/action_spread": particles.std(1).mean(),
                "speed/steps_per_second": global_step / (time.time() - start),
            }
            log(scalars)
        progress.set_postfix({name: f"{value:.0f}" for name, value in latest.items()}, refresh=False)
    progress.close()
    envs.close()
    if stop:
        print(f"stopped at step {global_step}" + (f"; go on with --resume {run_dir}" if checkpoints.files else ""))
        raise SystemExit(128 + stop[0])
    try:
        save(run_dir / "model.pt", args, policy, critic)
    except OSError as error:
        raise SystemExit(f"trained, but {run_dir / 'model.pt'} cannot be written: {error.strerror}") from None
