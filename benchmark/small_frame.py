"""Means and paired differences of the small frame's last evaluations, with 95% t-intervals: mujoco/small_frame.csv.

python benchmark/small_frame.py                      # the tables of benchmark/README.md
python benchmark/small_frame.py --env-id Hopper-v4
"""

import csv
import itertools
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro
from scipy.stats import ttest_1samp


@dataclass
class Args:
    env_id: str = "HalfCheetah-v4"
    csv: Path = Path(__file__).parent / "mujoco/small_frame.csv"  # script, flags, env_id, seed, step, mean, std


def mean(values):
    """The mean as text, with its interval if there are two values or more."""
    if len(values) < 2:
        return f"{np.mean(values):.0f}"
    low, high = ttest_1samp(values, 0).confidence_interval(0.95)
    return f"{np.mean(values):.0f} [{low:.0f}, {high:.0f}]"


if __name__ == "__main__":
    args = tyro.cli(Args, description=__doc__)
    last = defaultdict(dict)  # method -> seed -> the return at the last step
    for row in sorted(csv.DictReader(args.csv.open()), key=lambda row: int(row["step"])):
        if row["env_id"] == args.env_id:
            last[f"{row['script']} {row['flags']}".strip()][int(row["seed"])] = float(row["mean"])
    if not last:
        raise SystemExit(f"{args.csv} has no run of --env-id {args.env_id}")
    for method, returns in last.items():
        print(f"{method}: {', '.join(f'{x:.0f}' for x in returns.values())}; {mean(list(returns.values()))}")
    for one, other in itertools.permutations(last, 2):
        seeds = sorted(last[one].keys() & last[other].keys())
        if len(seeds) > 1:
            differences = [last[one][seed] - last[other][seed] for seed in seeds]
            print(f"{one} minus {other}, {len(seeds)} seeds: {mean(differences)}")
