"""benchmark/upside_down.py: the share of steps in which the root of HalfCheetah-v4 is turned over."""

import sys

import numpy as np
import pytest
from conftest import ROOT, SMALL

import simpo_neg

sys.path.append(str(ROOT / "benchmark"))
from upside_down import upside_down


@pytest.mark.parametrize("angles, share", [([np.pi, 3 * np.pi, 0.4], 0.5), ([1.6, -1.6, 4], 0.75), ([1.5], 0)])
def test_share_of_steps(run_script, monkeypatch, angles, share):
    """The cheetah starts upright and is then put down at these angles instead of playing."""

    def evaluate(policy, critic, args):
        env = simpo_neg.make_env(args)
        env.reset(seed=0)
        for angle in angles:
            env.unwrapped.data.qpos[2] = angle
            env.observation(env.unwrapped._get_obs())
        return np.array([3.0, 5.0])

    run_dir = run_script("simpo_neg", *SMALL, "--env-id", "HalfCheetah-v4", "--total-timesteps", 10, "--eval-every", 0)
    monkeypatch.setattr(simpo_neg, "evaluate", evaluate)
    make_env = simpo_neg.make_env
    assert upside_down(run_dir, episodes=1) == (4, share)
    assert simpo_neg.make_env is make_env


def test_another_environment_is_refused(run_script):
    run_dir = run_script("simpo_neg", *SMALL, "--env-id", "Pendulum-v1", "--total-timesteps", 10, "--eval-every", 0)
    with pytest.raises(SystemExit, match="simpo_neg on Pendulum-v1; give runs of simpo_.*HalfCheetah-v4"):
        upside_down(run_dir, episodes=1)
