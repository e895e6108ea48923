"""Runs a script with each action held for several environment steps, as is usual for DM Control; flow-rl takes 2 there.

    python benchmark/action_repeat.py --script simpo_power.py --action-repeat 4 --env-id dm_control/cheetah-run-v0

All other flags are the script's; a step is then one held action. Rewards of the steps that an action is held for add
up; a --reward-landscape is taken once, after the last of them. stats.py does not see the repeat: give it one at a time.
"""

import argparse
import runpy
import sys
from pathlib import Path

import gymnasium as gym


class ActionRepeat(gym.Wrapper):
    """Holds each action for `repeat` steps, or until the episode ends, and returns the sum of their rewards."""

    def __init__(self, env, repeat):
        super().__init__(env)
        self.repeat = repeat

    def step(self, action):
        total = 0.0
        for _ in range(self.repeat):
            obs, reward, terminated, truncated, info = self.env.step(action)
            total += reward
            if terminated or truncated:
                break
        return obs, total, terminated, truncated, info


if __name__ == "__main__":
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw, allow_abbrev=False)
    parser.error = sys.exit  # one line, without the usage
    parser.add_argument("--script", required=True, help="from the repository's root: simpo_neg.py, baselines/qsm.py")
    parser.add_argument("--action-repeat", type=int, default=2)
    args, flags = parser.parse_known_args()
    script = Path(__file__).parent.parent / args.script
    if not script.is_file():
        raise SystemExit(f"--script {args.script}: there is no such file in {script.parent}")
    if args.action_repeat < 1:
        raise SystemExit(f"--action-repeat must be at least 1; got {args.action_repeat}")
    make = gym.make
    gym.make = lambda *names, **options: ActionRepeat(make(*names, **options), args.action_repeat)
    sys.argv = [str(script), *flags]
    runpy.run_path(str(script), run_name="__main__")
