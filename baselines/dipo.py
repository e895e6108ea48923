"""DIPO: stored actions climb Q by its gradient, and the diffusion policy imitates them.

Paper: Yang et al., "Policy Representation via Diffusion Probability Model for Reinforcement Learning", arXiv
2305.13122. Next to each transition's action, which the critics learn from, stands an improved one, at first the same.
With Q the smaller of the twins:

    critics   y = r + gamma (1 - terminated) Q_target(s', a'), a' one draw of the averaged policy at s'
    actions   of another batch, 20 times: a <- clip(Adam step on -sum Q(s, a), -1, 1), the gradient's norm over the
              whole batch clipped at 0.1 per dimension, a new Adam each time; then a is written back
    policy    mean of |v - v_theta|^2 at these (s, a), all weights 1
    acting    one draw; so in evaluation

Adam undoes the gradient's size: in an update each coordinate can move by about 20 x 0.03 = 0.6 in a range of 2, and
again whenever it is drawn. In the authors' code (BellmanTimeHut/DIPO) nothing is written back, as its np.copyto fills a
copy: each climb starts at the action taken; --no-write-back. Other departures from it: velocities instead of noises in
the loss and this frame's solver with its 8 times, denser near 0, for 100 uniform ones of the cosine schedule, which
changes the weight between times (dpm has no step noise, as the original in evaluation; ddpm keeps its noise there); one
setting for all tasks (theirs: HalfCheetah 40 steps and 0.08, Hopper 0.3, Walker2d 0.08; gradient norms of 1 on Hopper
and 0.8 on Ant; HalfCheetah's averaged policy follows every 2nd update); the mean of the twins' losses for their sum,
also before the gradient's clip; this frame's updates per step (theirs: one), falling policy learning rate,
initialisation, bootstrapping at time limits, and 5,000 random steps for 10,000.

    python baselines/dipo.py --env-id HalfCheetah-v4
"""

import copy
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

    # DIPO
    action_steps: Natural = 20  # gradient steps on the improved actions per update
    action_lr: Positive = 0.03  # their learning rate, half the action range being 1
    action_grad_norm: Positive = 0.1  # limit of the norm of the whole batch's gradient, per dimension of the action
    write_back: bool = True  # the next climb of an action starts where this one ends, not at the action taken
    max_grad_norm: Positive = 2.0  # limit of the norm of the policy's and of the critics' gradient

    # diffusion and optimisation (table in appendix F)
    solver: Literal["dpm", "ddpm"] = "dpm"  # DPM-Solver++(2M), or DDPM with variance beta, as in SiMPO's own code
    diffusion_steps: Natural = 0  # T: denoising steps, and the only times that are trained; 0: 8 (dpm) or 20 (ddpm)
    hidden_dim: Count = 256  # units of each of the 3 hidden layers, in policy and critics
    batch_size: Count = 256  # states per update
    steps_per_update: Count = 5  # environment steps per update
    learning_starts: Natural = 5_000  # environment steps with uniformly random actions before the first update
    buffer_size: Count = 1_000_000  # transitions in the replay buffer; --resume is exact if running episodes fit
    policy_lr: Positive = 3e-4  # learning rate of the policy at the start
    policy_lr_end: NonNegative = 3e-5  # learning rate of the policy at the end, reached linearly
    critic_lr: Positive = 3e-4  # learning rate of the critics
    discount: Share = 0.99  # gamma, the discount per step
    tau: Share = 0.005  # soft update of the target networks

    # evaluation, output, machine
    eval_every: Natural = 10_000  # environment steps between evaluations, and one at the end; 0 turns evaluation off
    eval_episodes: Count = 20  # episodes per evaluation, in parallel environments
    eval_draws: Count = 1  # actions drawn per step in evaluation; the critics' favourite is taken
    log_every: Count = 1_000  # environment steps between logged losses, weights and speeds
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
        if self.solver == "dpm":
            rules["diffusion_steps"] = "at least 3 for --solver dpm", lambda steps: steps == 0 or steps >= 3
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
            obs_weight, action_weight = first.weight.split([obs.shape[1], action.shape[2]], dim=1)
            h = mish(F.linear(obs, obs_weight, first.bias)[:, None] + F.linear(action, action_weight))  # (B, K, H)
            q.append(last(mish(third(mish(second(h))))).squeeze(-1))
        return torch.stack(q)


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

    @torch.compile(dynamic=False)
    def loss(self, obs, action, weights, i, noise, error_clip):
        """(7) times (2/pi)^2 / A, errors clipped: obs (B, S), action, noise (B, K, A), weights, row i of t (B, K)."""
        obs_embedding, time_embedding = self.embed(obs)
        embedding = obs_embedding + F.one_hot(i, self.steps).float() @ time_embedding  # [i] adds gradients in any order
        alpha, sigma = self.step_coefficients[i, :2].split(1, dim=-1)  # (B, K, 1)
        target = alpha * noise - sigma * action  # (alpha'_t a_0 + sigma'_t eps) 2/pi
        error = (self.velocity(alpha * action + sigma * noise, embedding) - target).square()
        return (weights[..., None] * error.clamp(max=error_clip)).mean()

    @torch.compile(dynamic=True)
    def denoise(self, obs, noise):
        """From t = 1 to 0: obs (B, S), noise (1 for dpm or T for ddpm, B, K, A) -> actions (B, K, A) in [-1, 1]."""
        obs_embedding, time_embedding = self.embed(obs)  # always in float32: observations may be large
        noisy_action, action_0_before = noise[0], 0.0  # a_1; noise[i] is for step i > 0, step 0 adds none
        for i in reversed(range(len(time_embedding))):
            alpha, sigma, from_t, from_0, extrapolate, std = self.step_coefficients[i]
            velocity = self.velocity(noisy_action, obs_embedding + time_embedding[i])
            action_0 = (alpha * noisy_action - sigma * velocity).clamp(-1, 1)
            noisy_action = from_t * noisy_action + from_0 * (action_0 + extrapolate * (action_0 - action_0_before))
            action_0_before = action_0
            if self.solver == "ddpm" and i > 0:  # no noise in the last step
                noisy_action = noisy_action + std * noise[i]
        return noisy_action

    @torch.no_grad()
    def sample(self, obs, num_actions, generator):
        """obs (B, S) -> num_actions draws per state, (B, K, A) in [-1, 1]; all randomness comes from the generator."""
        steps = 1 if self.solver == "dpm" else self.steps
        noise = torch.randn(steps, len(obs), num_actions, self.action_dim, generator=generator, device=obs.device)
        # On a CPU go through the states in blocks whose activations stay in cache.
        block = max(1, 2048 // num_actions) if obs.device.type == "cpu" else len(obs)
        return torch.cat(list(map(self.denoise, obs.split(block), noise.split(block, dim=1))))


@torch.compile(dynamic=False)
def action_gradient(critic, obs, action):
    """d/da of minus the smaller Q, obs (B, S) and action (B, A) -> (B, A)."""
    return torch.func.grad(lambda a: -critic(obs, a[:, None]).amin(0).sum())(action)


@torch.no_grad()
def ascend(critic, obs, action, steps, lr, max_norm):
    """Actions (B, A) after `steps` clipped Adam steps up the smaller Q of obs (B, S)."""
    action = action.clone()
    optimizer = torch.optim.Adam([action], lr=lr, eps=1e-5, fused=True)
    for _ in range(steps):
        action.grad = action_gradient(critic, obs, action)
        nn.utils.clip_grad_norm_(action, max_norm)
        optimizer.step()
        action.clamp_(-1, 1)
    return action


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


class ReplayBuffer:
    """A ring of the last `capacity` transitions, on the device."""

    def __init__(self, capacity, obs_dim, action_dim, device):
        self.added, self.sizes = 0, [obs_dim, obs_dim, action_dim, 1, 1]
        self.rows = torch.empty(capacity, sum(self.sizes), device=device)

    def add(self, *columns):
        """obs, next_obs, action, reward, terminated, one row per environment; the oldest rows make room."""
        where = torch.arange(self.added, self.added + len(columns[0]), device=self.rows.device) % len(self.rows)
        self.rows[where] = torch.column_stack([torch.as_tensor(x).to(self.rows) for x in columns])
        self.added += len(where)

    def sample(self, batch_size, generator):
        """Uniform rows with replacement: obs (B, S), next_obs (B, S), action (B, A), reward (B,), terminated (B,)."""
        size = min(self.added, len(self.rows))
        rows = self.rows[torch.randint(size, (batch_size,), generator=generator, device=self.rows.device)]
        obs, next_obs, action, reward, terminated = (x.contiguous() for x in rows.split(self.sizes, dim=1))
        return obs, next_obs, action, reward[:, 0], terminated[:, 0]


def evaluate(policy, critic, args, stop_signals=()):
    """Undiscounted native returns (N,), acting by the best of eval_draws draws; meaningless after a stop signal."""
    folders = [f"{args.evaluate}/videos" if args.capture_video else None] + [None] * (args.eval_episodes - 1)
    envs = gym.vector.SyncVectorEnv([lambda folder=folder: make_env(args, video_folder=folder) for folder in folders])
    generator = torch.Generator(args.device).manual_seed(args.seed + 10_000)
    obs, _ = envs.reset(seed=args.seed + 10_000)
    returns, running = np.zeros(args.eval_episodes), np.ones(args.eval_episodes, dtype=bool)
    while running.any() and not stop_signals:
        obs = torch.as_tensor(obs, dtype=torch.float32, device=args.device)
        actions = policy.sample(obs, args.eval_draws, generator)  # (N, draws, A)
        with torch.no_grad():
            best = critic(obs, actions).amin(0).argmax(-1)
        obs, reward, terminated, truncated, _ = envs.step(actions[torch.arange(len(obs)), best].cpu().numpy())
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

    # Environments, networks, optimisers.
    envs = gym.vector.SyncVectorEnv([lambda: make_env(args, training=True)] * args.num_envs, autoreset_mode="Disabled")
    obs_dim, action_dim = envs.single_observation_space.shape[0], envs.single_action_space.shape[0]
    torch.manual_seed(args.seed + 20_000)  # networks; from the seed alone they'd have the numbers of the first actions
    device, dtype = generator.device, getattr(torch, args.policy_dtype)
    policy = DiffusionPolicy(obs_dim, action_dim, args.hidden_dim, args.solver, args.diffusion_steps, dtype).to(device)
    critic = Critic(obs_dim, action_dim, args.hidden_dim).to(device)
    policy_target, critic_target = copy.deepcopy(policy), copy.deepcopy(critic).requires_grad_(False)
    critic_optimizer = torch.optim.Adam(critic.parameters(), lr=args.critic_lr, eps=1e-5, fused=True)
    optimizer = torch.optim.Adam(policy.parameters(), lr=args.policy_lr, eps=1e-5, fused=True)
    parts = dict(policy=policy, policy_target=policy_target, critic=critic, critic_target=critic_target)
    parts |= dict(critic_optimizer=critic_optimizer, optimizer=optimizer)
    global_step, num_updates, evaluations, start, critic_loss = 0, 0, [], time.time(), None
    episode = np.array(saved["episode"]) - 1 if args.resume else np.full(args.num_envs, -1)  # number, per environment

    def reset(which):
        """Starts the next episode where `which` (num_envs,) says so, seeded by run, environment and episode number."""
        episode[which] += 1
        seeds = [np.random.SeedSequence([args.seed, i, n]).generate_state(1).item() for i, n in enumerate(episode)]
        return envs.reset(seed=seeds, options={"reset_mask": which})[0]

    for name in parts.keys() & saved.keys():  # those of models/ have policy and critic only
        parts[name].load_state_dict(saved[name])
    if args.evaluate:
        returns = evaluate(policy, critic, args)
        print(f"{args.env_id}: return {returns.mean():.1f} +- {returns.std():.1f}, {len(returns)} episodes")
        raise SystemExit

    # Replay buffer. Everything as the checkpoint has it; the running episodes' actions lead back to where they were.
    buffer = ReplayBuffer(args.buffer_size, obs_dim, action_dim, device)
    improved = torch.empty(len(buffer.rows), action_dim, device=device)  # what the policy fits, in the buffer's order
    obs = reset(np.ones(args.num_envs, dtype=bool))
    if saved:
        generator.set_state(saved["generator"].clone())
        global_step, num_updates, evaluations = saved["global_step"], saved["num_updates"], saved["evaluations"]
        start, buffer.added = start - saved["seconds"], saved["added"]
        buffer.rows[: len(saved["rows"])] = saved["rows"]
        improved[: len(saved["improved"])] = saved["improved"]
        for i, (env, length) in enumerate(zip(envs.envs, saved["lengths"], strict=True)):
            rows = torch.arange(-length, 0) * args.num_envs + buffer.added + i
            for action in buffer.rows[rows % len(buffer.rows), 2 * obs_dim : -2].cpu().numpy():
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
    print(f"{run_dir} on {device}, policy in {dtype}, compile={args.compile}, learns after step {args.learning_starts}")

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
        state |= dict(improved=torch.from_numpy(improved[: buffer.added].cpu().numpy()))
        state |= dict(generator=generator.get_state(), rows=rows, added=buffer.added, obs=torch.tensor(obs))
        state |= dict(episode=episode.tolist(), lengths=[env.episode_lengths for env in envs.envs])
        writer.flush()
        save(run_dir / "checkpoint.pt", state)

    B = args.batch_size
    progress = tqdm(total=args.total_timesteps, initial=global_step, unit="step", dynamic_ncols=True)
    while True:
        last = global_step >= args.total_timesteps

        # Evaluate, when due and at the end.
        if args.eval_every and (due(args.eval_every) or last) and global_step not in [e["step"] for e in evaluations]:
            returns = evaluate(policy, critic, args, stop_signals)
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

        # Act with one draw from the policy, and store.
        global_step += args.num_envs
        if global_step <= args.learning_starts:
            action = 2 * torch.rand(args.num_envs, action_dim, generator=generator, device=device) - 1
        else:
            action = policy.sample(torch.as_tensor(obs, dtype=torch.float32, device=device), 1, generator)[:, 0]
        next_obs, reward, terminated, truncated, infos = envs.step(action.cpu().numpy())
        check_finite(observation=np.float32([obs, next_obs]), reward=np.float32(reward))
        improved[torch.arange(buffer.added, buffer.added + args.num_envs, device=device) % len(improved)] = action
        buffer.add(obs, next_obs, action, reward, terminated)
        obs, done = next_obs, terminated | truncated
        if done.any():
            writer.add_scalar("train/return", infos["episode"]["r"][done].mean(), global_step)
            obs = reset(done)

        for _ in range(due(args.steps_per_update) if global_step > args.learning_starts else 0):
            batch_obs, batch_next_obs, batch_action, batch_reward, batch_terminated = buffer.sample(B, generator)

            # Critics: Bellman target with the averaged policy's action and the smaller target Q.
            next_action = policy_target.sample(batch_next_obs, 1, generator)  # (B, 1, A)
            next_q = critic_target(batch_next_obs, next_action).amin(0)[:, 0]  # (B,)
            target_q = batch_reward + args.discount * (1 - batch_terminated) * next_q
            q = critic(batch_obs, batch_action[:, None])[..., 0]  # (2, B)
            critic_loss = F.mse_loss(q, target_q.expand_as(q))
            critic_optimizer.zero_grad()
            critic_loss.backward()
            nn.utils.clip_grad_norm_(critic.parameters(), args.max_grad_norm)
            critic_optimizer.step()

            # The improved actions of another batch go uphill and back to their places.
            where = torch.randint(min(buffer.added, len(improved)), (B,), generator=generator, device=device)
            batch_obs, before = buffer.rows[where, :obs_dim], improved[where]  # (B, S), (B, A)
            max_norm = args.action_grad_norm * action_dim
            batch_improved = ascend(critic, batch_obs, before, args.action_steps, args.action_lr, max_norm)
            if args.write_back:
                improved[where] = batch_improved
            check_finite(critic_loss=critic_loss, improved_actions=batch_improved)

            # Policy: velocity matching on them.
            i = torch.randint(policy.steps, (B, 1), generator=generator, device=device)
            noise = torch.randn(B, 1, action_dim, generator=generator, device=device)
            ones = torch.ones(B, 1, device=device)
            policy_loss = policy.loss(batch_obs, batch_improved[:, None], ones, i, noise, math.inf)
            check_finite(policy_loss=policy_loss)
            optimizer.zero_grad()
            policy_loss.backward()
            nn.utils.clip_grad_norm_(policy.parameters(), args.max_grad_norm)
            frac = min(global_step / args.total_timesteps, 1)
            optimizer.param_groups[0]["lr"] = (1 - frac) * args.policy_lr + frac * args.policy_lr_end
            optimizer.step()

            # Target critics and averaged policy follow.
            with torch.no_grad():
                torch._foreach_lerp_(list(critic_target.parameters()), list(critic.parameters()), args.tau)
                torch._foreach_lerp_(list(policy_target.parameters()), list(policy.parameters()), args.tau)
            num_updates += 1

        progress.update(args.num_envs)
        if critic_loss is not None and due(args.log_every):
            for name, value in {
                "loss/critic": critic_loss,
                "loss/policy": policy_loss,
                "q/mean": q.mean(),
                "improved/step": (batch_improved - before).abs().mean(),
                "improved/saturated": (batch_improved.abs() == 1).float().mean(),
                "speed/steps_per_second": global_step / (time.time() - start),
            }.items():
                writer.add_scalar(name, value, global_step)
    progress.close()
    if stop_signals:
        print(f"stopped at step {global_step}; go on with --resume {run_dir}")
        raise SystemExit(128 + stop_signals[0])
