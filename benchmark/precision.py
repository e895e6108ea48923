"""Does drawing actions in bfloat16 cost return? Trains with both precisions, several seeds, and compares the returns.

python benchmark/precision.py          # trains what runs/precision/ lacks, as many at a time as there are cores
python benchmark/precision.py --draw   # only benchmark/precision.{csv,png} and the table, from what is there

The settings are smaller than the paper's, and lambda starts where longer runs bring it: a run learns in half an hour.
"""

import csv
import itertools
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import matplotlib
import numpy as np
from scipy import stats

matplotlib.use("Agg")
import matplotlib.pyplot as plt

ROOT = Path(__file__).parent.parent
DTYPES, SEEDS = ["float32", "bfloat16"], [1, 2, 3]
FLAGS = {
    "HalfCheetah-v4": "--total-timesteps 50000 --batch-size 256 --target-kl 0.7 --temperature 0.05"
    " --old-policy-interval 200",
    "Hopper-v4": "--total-timesteps 30000 --batch-size 64 --temperature 0.02",
}
SHARED_FLAGS = "--num-particles 8 --learning-starts 2000 --eval-every 5000 --eval-episodes 10 --checkpoint-every 0"


def train(seed, env_id, dtype):
    folder = ROOT / "runs" / "precision" / f"{env_id}-{dtype}-{seed}"
    if (folder / "finished").exists():
        return
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    command = [sys.executable, ROOT / "simpo_neg.py", "--env-id", env_id, "--sampling-dtype", dtype]
    command += ["--seed", str(seed), *FLAGS[env_id].split(), *SHARED_FLAGS.split()]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with open(folder / "log", "w") as log:
        subprocess.run(command, cwd=folder, check=True, env=environment, stdout=log, stderr=log)
    (folder / "finished").touch()


def interval(values):
    """Mean and 95% Student interval over the first axis."""
    mean, half = values.mean(0), stats.sem(values) * stats.t.ppf(0.975, len(values) - 1)
    return mean, mean - half, mean + half


def compare():
    """Writes the table and the picture, at the steps that every run of an environment has reached."""
    rows = []
    figure, axes = plt.subplots(1, len(FLAGS), figsize=(9, 3.5), layout="constrained")
    for env_id, ax in zip(FLAGS, axes, strict=True):
        curves = {}
        for dtype, seed in itertools.product(DTYPES, SEEDS):
            (path,) = ROOT.glob(f"runs/precision/{env_id}-{dtype}-{seed}/runs/*/eval.csv")
            curves[dtype, seed] = {float(row["step"]): float(row["mean"]) for row in csv.DictReader(path.open())}
        steps = sorted(set.intersection(*map(set, curves.values())))
        rows += [[env_id, *run, int(step), curve[step]] for run, curve in curves.items() for step in steps]
        returns = {dtype: np.array([[curves[dtype, seed][x] for x in steps] for seed in SEEDS]) for dtype in DTYPES}
        for dtype, colour in zip(DTYPES, ["#0072B2", "#D55E00"], strict=True):
            mean, low, high = interval(returns[dtype])
            ax.plot(steps, mean, "o-", color=colour, markersize=3, label=dtype)
            ax.plot(steps, returns[dtype].T, color=colour, linewidth=0.5, alpha=0.6)
            ax.fill_between(steps, low, high, color=colour, alpha=0.1, linewidth=0)
            print(f"{env_id} {dtype}: mean over evaluations {returns[dtype].mean(1).round(1)} by seed")
        difference = interval((returns["bfloat16"] - returns["float32"]).mean(1))
        print(f"{env_id} bfloat16 - float32: {difference[0]:.1f} [{difference[1]:.1f}, {difference[2]:.1f}]")
        ax.set(xlabel="environment steps", ylabel="evaluation return", title=env_id)
        ax.legend(frameon=False)
    figure.savefig(ROOT / "benchmark" / "precision.png", dpi=110)
    with open(ROOT / "benchmark" / "precision.csv", "w", newline="") as file:
        csv.writer(file).writerows([["env_id", "dtype", "seed", "step", "mean"], *rows])


if __name__ == "__main__":
    if sys.argv[1:] != ["--draw"]:
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(lambda job: train(*job), itertools.product(SEEDS, FLAGS, DTYPES)))
    compare()
