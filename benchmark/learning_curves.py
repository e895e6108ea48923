"""Makes the README's learning curves: runs the named trainings one after another, keeps each eval.csv, draws them.

python benchmark/learning_curves.py                       # redraw the pictures from the CSVs
python benchmark/learning_curves.py lin-neg-halfcheetah   # train it under runs/learning_curves/, then redraw
python benchmark/learning_curves.py all                   # train whatever has no CSV yet, then redraw
"""

import csv
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "benchmark" / "learning_curves"
VARIANTS = {  # label, colour (Okabe-Ito), command
    "exp": ("Exp", "#E69F00", "simpo_exp.py"),
    "linear": ("Linear", "#0072B2", "simpo_power.py --power 1"),
    "square": ("Square", "#009E73", "simpo_power.py --power 2"),
    "lin-neg": ("Lin. Neg.", "#D55E00", "simpo_neg.py --power 1 --epsilon 0.5"),
}
STYLES = {  # the commit that a curve was made in, at the end of its file's name
    "": "-",  # the present one
    "a27b718": "--",  # policy_lr falls over the shorter run
    "2077825": ":",  # so it does there, and lambda moves more slowly the smaller it is
}
GROUPS = {  # picture: (title, flags, step at which a run is stopped, variants); all else as in the paper's 1M steps
    "halfcheetah": ("HalfCheetah-v4", "--env-id HalfCheetah-v4", 50_000, list(VARIANTS)),
    "humanoid": ("Humanoid-v4", "--env-id Humanoid-v4", 30_000, ["lin-neg"]),
    "cheetah-run": (
        "dm_control/cheetah-run-v0, sqrt landscape",
        "--env-id dm_control/cheetah-run-v0 --reward-landscape sqrt",
        30_000,
        ["lin-neg"],
    ),
}
RUNS = {
    f"{variant}-{group}": (f"{VARIANTS[variant][2]} {flags} --eval-every 5000", stop)
    for group, (_, flags, stop, variants) in GROUPS.items()
    for variant in variants
}


def read(path):
    with open(path) as file:
        return list(csv.DictReader(file))


def run(name):
    """Trains with seed 1 in runs/learning_curves/NAME, going on where a stopped run was, and keeps its eval.csv."""
    folder = ROOT / "runs" / "learning_curves" / name
    folder.mkdir(parents=True, exist_ok=True)
    (script, *flags), stop = RUNS[name][0].split(), RUNS[name][1]
    for checkpoint in folder.glob("runs/*/checkpoint"):
        flags = ["--resume", checkpoint.parent]
    process = subprocess.Popen([sys.executable, ROOT / script, *flags], cwd=folder)
    while process.poll() is None and not any(
        float(row["step"]) >= stop for path in folder.glob("runs/*/eval.csv") for row in read(path)
    ):
        time.sleep(10)
    process.terminate()
    if process.wait() not in (0, -signal.SIGTERM, 128 + signal.SIGTERM):  # - if it was there before and had just begun
        raise SystemExit(f"{name} failed")
    (result,) = folder.glob("runs/*/eval.csv")
    shutil.copy(result, FOLDER / f"{name}.csv")


def draw():
    """One picture per group; NAME-COMMIT.csv was made by the same command in an older commit."""
    for group, (title, _, _, variants) in GROUPS.items():
        figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
        for variant in variants:
            label, colour, _ = VARIANTS[variant]
            for path in sorted(FOLDER.glob(f"{variant}-{group}*.csv")):
                commit, rows = path.stem.removeprefix(f"{variant}-{group}")[1:], read(path)
                step, mean, std = (np.array([float(row[key]) for row in rows]) for key in ("step", "mean", "std"))
                axes.plot(step, mean, STYLES[commit], color=colour, label=f"{label} {commit}", marker="o", markersize=3)
                axes.fill_between(step, mean - std, mean + std, color=colour, alpha=0.15, linewidth=0)
        if axes.lines:
            axes.set(xlabel="environment steps", ylabel="evaluation return (mean, std over episodes)", title=title)
            axes.legend(frameon=False)
            figure.savefig(FOLDER / f"{group}.png", dpi=110)
        plt.close(figure)


if __name__ == "__main__":
    wanted = sys.argv[1:]
    unknown = [name for name in wanted if name not in RUNS and name != "all"]
    if unknown:
        raise SystemExit(f"unknown run {unknown[0]}; known are all, {', '.join(RUNS)}")
    if wanted == ["all"]:
        wanted = [name for name in RUNS if not (FOLDER / f"{name}.csv").exists()]
    for name in wanted:
        run(name)
    draw()
