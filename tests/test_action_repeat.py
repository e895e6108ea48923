"""benchmark/action_repeat.py: rewards of held actions add up, episodes are that much shorter, and runs go on."""

import subprocess
import sys

import gymnasium as gym
import torch
from conftest import ROOT

sys.path.append(str(ROOT / "benchmark"))
from action_repeat import ActionRepeat


class Counting(gym.Env):
    """Pays 1, 2, 3, ... and ends with the 6th step."""

    action_space = observation_space = gym.spaces.Box(-1, 1, (1,))
    steps = 0

    def step(self, action):
        self.steps += 1
        return action * self.steps, float(self.steps), self.steps == 6, False, {}


def test_rewards_add_up_to_the_end_of_the_episode():
    env = ActionRepeat(Counting(), 4)
    obs, reward, terminated, _, _ = env.step(torch.ones(1))
    assert (obs.item(), reward, terminated) == (4, 1 + 2 + 3 + 4, False)
    obs, reward, terminated, _, _ = env.step(torch.ones(1))
    assert (obs.item(), reward, terminated) == (6, 5 + 6, True)


def run(folder, *flags):
    command = [sys.executable, ROOT / "benchmark/action_repeat.py", *" ".join(flags).split()]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True)


def test_a_script_sees_shorter_episodes_and_goes_on(tmp_path):
    # Pendulum-v1 lasts 200 steps, 25 held actions. 5 environments: 30 each are one episode and 5 of the next.
    ours = "--script simpo_exp.py --action-repeat 8 --env-id Pendulum-v1 --no-compile --eval-every 0 --hidden-dim 8"
    assert run(tmp_path, ours, "--total-timesteps 150").returncode == 0
    (folder,) = tmp_path.glob("runs/*")
    assert torch.load(folder / "checkpoint.pt")["lengths"] == [5] * 5
    result = run(tmp_path, ours, f"--total-timesteps 200 --resume {folder}")
    assert result.returncode == 0 and "not bit for bit" not in result.stderr
    assert torch.load(folder / "checkpoint.pt")["lengths"] == [15] * 5


def test_bad_input(tmp_path):
    repeat = "--script simpo_exp.py --action-repeat"
    for flags, why in {"--script none.py": "no such file", f"{repeat} 0": "at least 1", f"{repeat} x": "int"}.items():
        result = run(tmp_path, flags)
        assert result.returncode == 1 and why in result.stderr and len(result.stderr.splitlines()) == 1
    assert not list(tmp_path.iterdir())
