"""How much of its time HalfCheetah-v4 spends upside down: python benchmark/upside_down.py runs/RUN runs/RUN ...

Plays episodes as in evaluation and prints CSV: run, mean return, share of the steps whose root angle (observation 1,
radians, 0 upright) has a negative cosine.
"""

import importlib
import sys
from dataclasses import dataclass
from pathlib import Path

import gymnasium as gym
import numpy as np
import torch
import tyro

sys.path.insert(0, str(Path(__file__).parent.parent))


@dataclass
class Args:
    runs: tyro.conf.Positional[tuple[Path, ...]]  # directories of runs of simpo_*.py
    episodes: int = 5  # per run


class RootAngle(gym.ObservationWrapper):
    """Appends the root angle of every observation to `angles`."""

    def __init__(self, env, angles):
        super().__init__(env)
        self.angles = angles

    def observation(self, observation):
        self.angles.append(observation[1])
        return observation


def upside_down(run, episodes):
    """Mean return of the episodes, and the share of their steps spent upside down."""
    state = importlib.import_module("simpo_neg").load(run / "checkpoint.pt")
    if state["args"]["env_id"] != "HalfCheetah-v4" or not state["script"].startswith("simpo_"):
        raise SystemExit(
            f"{run}: {state['script']} on {state['args']['env_id']}; give runs of simpo_*.py on HalfCheetah-v4"
        )
    script = importlib.import_module(state["script"])
    args = script.Args(**state["args"] | dict(device="cpu", eval_episodes=episodes, capture_video=False))
    policy = script.DiffusionPolicy(
        17, 6, args.hidden_dim, args.solver, args.diffusion_steps, getattr(torch, args.policy_dtype)
    )
    critic = script.Critic(17, 6, args.hidden_dim)
    policy.load_state_dict(state["policy"])
    critic.load_state_dict(state["critic"])
    make, angles = script.make_env, []
    try:
        script.make_env = lambda *names, **options: RootAngle(make(*names, **options), angles)
        returns = script.evaluate(policy, critic, args)
    finally:
        script.make_env = make
    return returns.mean(), np.mean(np.cos(angles) < 0)


if __name__ == "__main__":
    args = tyro.cli(Args, description=__doc__)
    if not args.runs or args.episodes < 1:
        raise SystemExit("give the directories of runs, runs/<run_name>, and --episodes 1 or more")
    torch.compiler.set_stance("force_eager")
    gym.logger.min_level = gym.logger.ERROR
    print("run,return,upside_down")
    for run in args.runs:
        value, share = upside_down(run, args.episodes)
        print(f"{run.name},{value:.0f},{share:.3f}", flush=True)
