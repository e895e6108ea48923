"""PPO, TD3 and SAC of Stable-Baselines3, and random actions, in the frame of SiMPO's scripts: classic rows of Table 2.

    python benchmark/classic.py --algo sac --env-id HalfCheetah-v4

Environments, seeds of the evaluation and eval.csv are those of simpo_neg.py; evaluation acts without noise. Frame of
appendix F: 5 environments, one update per 5 steps, 3 hidden layers of 256 Mish units; PPO: 4096 (here 4095) steps per
rollout, 10 passes. All else is Stable-Baselines3's default, for TD3 with the exploration noise of its paper. There is
no --resume: a run that is stopped begins again.
"""

import csv
import json
import os
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import gymnasium as gym
import numpy as np
import torch
import tyro
from stable_baselines3 import PPO, SAC, TD3
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.noise import NormalActionNoise
from stable_baselines3.common.vec_env import DummyVecEnv

sys.path.append(str(Path(__file__).parent.parent))
from simpo_neg import LANDSCAPE_SPEED, make_env  # noqa: E402


@dataclass
class Args:
    algo: Literal["ppo", "td3", "sac", "random"] = "sac"
    env_id: str = "HalfCheetah-v4"  # Gymnasium id with Box spaces, or a DM Control task: dm_control/cheetah-run-v0
    reward_landscape: Literal["native", "sqrt", "linear", "square", "exp"] = "native"  # in training, as in simpo_neg.py
    landscape_c: float = 3.0  # steepness of the exp landscape
    total_timesteps: int = 1_000_000  # environment steps, all environments together
    num_envs: int = 5  # parallel environments
    seed: int = 1
    hidden_dim: int = 256  # units of each of the 3 hidden layers, in policy and critics
    batch_size: int = 256  # transitions per update
    steps_per_update: int = 5  # environment steps per update; not for ppo
    learning_starts: int = 5_000  # environment steps with uniformly random actions before the first update; not for ppo
    buffer_size: int = 1_000_000  # transitions that the replay buffer holds; not for ppo
    eval_every: int = 10_000  # environment steps between evaluations, and one at the end
    eval_episodes: int = 20  # episodes per evaluation, in parallel environments
    device: str = "cuda" if torch.cuda.is_available() else "cpu"

    def __post_init__(self):
        for name, value in asdict(self).items():
            least = 0 if name in ("seed", "learning_starts") else 1
            if isinstance(value, int) and value < least:
                raise SystemExit(f"--{name.replace('_', '-')} must be at least {least}; got {value}")
        if not 0 < self.landscape_c < float("inf"):
            raise SystemExit(f"--landscape-c must be above 0 and finite; got {self.landscape_c}")
        if self.reward_landscape != "native" and self.env_id not in LANDSCAPE_SPEED:
            raise SystemExit(f"--reward-landscape is for --env-id {' or '.join(LANDSCAPE_SPEED)}; got {self.env_id}")
        uneven = self.num_envs % self.steps_per_update and self.steps_per_update % self.num_envs
        if self.algo in ("sac", "td3") and uneven:
            raise SystemExit("--num-envs must be a multiple of --steps-per-update, or the other way round")


def make_model(args, envs):
    """The learner with the paper's frame."""
    kwargs = dict(net_arch=[args.hidden_dim] * 3, activation_fn=torch.nn.Mish)
    common = dict(policy="MlpPolicy", env=envs, learning_rate=3e-4, gamma=0.99, seed=args.seed, device=args.device)
    common |= dict(policy_kwargs=kwargs, batch_size=args.batch_size)
    if args.algo == "ppo":
        return PPO(**common, n_steps=max(2, 4096 // args.num_envs), n_epochs=10)
    common |= dict(buffer_size=min(args.buffer_size, args.total_timesteps), learning_starts=args.learning_starts)
    # A step here is one of all environments together.
    common |= dict(train_freq=max(1, args.steps_per_update // args.num_envs), tau=0.005)
    common |= dict(gradient_steps=max(1, args.num_envs // args.steps_per_update))
    if args.algo == "sac":
        return SAC(**common)
    action_dim = envs.action_space.shape[0]
    return TD3(**common, action_noise=NormalActionNoise(np.zeros(action_dim), np.full(action_dim, 0.1)))


def evaluate(act, args):
    """Returns (N,) of one episode each; act takes observations (N, S) to actions (N, A) in [-1, 1]."""
    envs = gym.vector.SyncVectorEnv([lambda: make_env(args)] * args.eval_episodes)
    obs, _ = envs.reset(seed=args.seed + 10_000)
    returns, running = np.zeros(args.eval_episodes), np.ones(args.eval_episodes, dtype=bool)
    while running.any():
        obs, reward, terminated, truncated, _ = envs.step(act(obs))
        returns += running * reward
        running &= ~(terminated | truncated)
    envs.close()
    return returns


class Evaluation(BaseCallback):
    """Evaluates when due and at the end, where it also stops the training."""

    def __init__(self, args, run_dir):
        super().__init__()
        self.args, self.path, self.start, self.rows = args, run_dir / "eval.csv", time.time(), []

    def row(self, step, act):
        returns = evaluate(act, self.args)
        values = " ".join(f"{x:.2f}" for x in returns)
        self.rows.append([step, returns.mean(), returns.std(), time.time() - self.start, values])
        with open(self.path.with_suffix(".unfinished"), "w", newline="") as file:
            csv.writer(file).writerows([["step", "mean", "std", "seconds", "returns"], *self.rows])
        os.replace(file.name, self.path)
        print(f"step {step}: return {returns.mean():.1f} +- {returns.std():.1f}", flush=True)

    def _on_step(self):
        now, last = self.num_timesteps, self.num_timesteps >= self.args.total_timesteps
        if last or now // self.args.eval_every > (now - self.args.num_envs) // self.args.eval_every:
            self.row(now, lambda obs: self.model.predict(obs, deterministic=True)[0])
        return not last


if __name__ == "__main__":
    args = tyro.cli(Args, description=__doc__)
    try:
        torch.zeros((), device=args.device)
    except (RuntimeError, AssertionError) as error:
        raise SystemExit(f"--device {args.device}: {str(error).splitlines()[0]}") from None
    gym.logger.min_level = gym.logger.ERROR  # no warnings that the paper's v4 environments are outdated
    os.environ.setdefault("MUJOCO_GL", "disable")
    envs = DummyVecEnv([lambda: make_env(args, training=True)] * args.num_envs)
    name = f"{args.env_id}__classic__{args.seed}__{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}"
    run_dir = Path("runs", name.replace("/", "-").replace(":", "-"))
    run_dir.mkdir(parents=True)
    (run_dir / "args.json").write_text(json.dumps(asdict(args), indent=2) + "\n")
    evaluation = Evaluation(args, run_dir)
    if args.algo == "random":
        rng, shape = np.random.default_rng(args.seed), (args.eval_episodes, *envs.action_space.shape)
        for step in sorted({*range(args.eval_every, args.total_timesteps, args.eval_every), args.total_timesteps}):
            evaluation.row(step, lambda obs: rng.uniform(-1, 1, shape).astype(np.float32))
    else:
        make_model(args, envs).learn(args.total_timesteps, callback=evaluation)
