"""Runs at the paper's sizes beside the paper's return (Table 2): mujoco/paper_frame_SEED.csv and paper_frame.png.

python benchmark/paper_frame.py              # draws the files
python benchmark/paper_frame.py runs/RUN     # takes the run's eval.csv first: of a new seed, or the same run, gone on
"""

import csv
import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import small_frame
import tyro
from matplotlib.figure import Figure

HERE = Path(__file__).parent / "mujoco"
SIZES = dict(env_id="HalfCheetah-v4", hidden_dim=256, batch_size=256, num_particles=32, steps_per_update=5)
SIZES |= dict(num_envs=5, total_timesteps=1_000_000, target_kl=1.5, policy_lr=3e-4, critic_lr=3e-4, solver="dpm")
SIZES |= dict(particle_noise=0.2, error_clip=5.0, power=1.0, epsilon=0.5)  # of Lin. Neg. at the paper's sizes
PAPER = 13_900  # best variant of its second version on HalfCheetah-v4 after 1M steps, by a listing on the web


@dataclass
class Args:
    run: tyro.conf.Positional[Path | None] = None  # runs/<run_name>; none: the files as they are


if __name__ == "__main__":
    args = tyro.cli(Args, description=__doc__)
    if args.run:
        new = args.run / "eval.csv"
        if not new.is_file():
            raise SystemExit(f"{args.run} has no eval.csv; give the directory of a run, runs/<run_name>")
        settings = json.loads((args.run / "args.json").read_text())
        if [settings.get(name) for name in SIZES] != list(SIZES.values()):
            raise SystemExit(f"{args.run} is not of {SIZES}")
        kept = HERE / f"paper_frame_{settings['seed']}.csv"
        if kept.exists() and not new.read_text().startswith(kept.read_text()):
            raise SystemExit(f"{new} does not go on where {kept} ends: it is another run's; delete {kept.name} for it")
        shutil.copy(new, kept)
    axes = Figure(figsize=(7, 3.5), layout="constrained").subplots()
    label = "Lin. Neg., the paper's sizes (256 units, batches of 256, K = 32), each seed; shaded: deviation"
    for path in sorted(HERE.glob("paper_frame_*.csv")):
        rows = list(csv.DictReader(path.open()))
        step, mean, std = (np.array([float(row[name]) for row in rows]) for name in ("step", "mean", "std"))
        axes.plot(step, mean, color=small_frame.COLORS["simpo_neg"], linewidth=2.5, label=label)
        axes.fill_between(step, mean - std, mean + std, color=small_frame.COLORS["simpo_neg"], alpha=0.2, linewidth=0)
        label = None
    labelled = set()
    for (method, _, _), curve in sorted(small_frame.read(HERE / "small_networks.csv").items()):
        name = None if method in labelled else f"{small_frame.NAMES[method]}, 64 units, batches of 64, each seed"
        labelled.add(method)
        style = dict(color=small_frame.COLORS[method], linewidth=1, label=name)
        axes.plot(*zip(*sorted(curve.items()), strict=True), **style)
    axes.axhline(PAPER, color="black", linestyle=":", label="the paper's second version, by a web listing")
    axes.set(xlim=(0, 1e6), xlabel="environment steps", ylabel="return", title="HalfCheetah-v4")
    axes.legend(fontsize="x-small", frameon=False, loc="upper right", bbox_to_anchor=(1, 0.95))
    axes.figure.savefig(HERE / "paper_frame.png", dpi=100)
