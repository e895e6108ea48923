"""Runs at the paper's sizes beside the paper's return (Table 2): mujoco/paper_frame_SEED.csv and paper_frame.png.

python benchmark/paper_frame.py              # draws the files
python benchmark/paper_frame.py runs/RUN     # takes the run's eval.csv first: of a new seed, or the same run, gone on

A run of jax_curve.py at these sizes becomes paper_frame_jax_SEED.csv. Shaded: the deviation over episodes.
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
COMMON = dict(env_id="HalfCheetah-v4", hidden_dim=256, batch_size=256, num_particles=32, target_kl=1.5, policy_lr=3e-4)
SIZES = COMMON | dict(num_envs=5, steps_per_update=5, total_timesteps=1_000_000, critic_lr=3e-4, solver="dpm")
SIZES |= dict(particle_noise=0.2, error_clip=5.0, power=1.0, epsilon=0.5)  # of Lin. Neg. at the paper's sizes
JAX_SIZES = COMMON | dict(updates=1, reweight="linear", floor=-0.5)  # the same, of jax_curve.py, and theirs unchanged
JAX_SIZES |= dict(predict="noise", init="orthogonal", particles="free")
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
        sizes, prefix = (JAX_SIZES, "jax_") if "flow_rl" in settings else (SIZES, "")
        if [settings.get(name) for name in sizes] != list(sizes.values()):
            raise SystemExit(f"{args.run} is not of {sizes}")
        kept = HERE / f"paper_frame_{prefix}{settings['seed']}.csv"
        if kept.exists() and not new.read_text().startswith(kept.read_text()):
            raise SystemExit(f"{new} does not go on where {kept} ends: it is another run's; delete {kept.name} for it")
        shutil.copy(new, kept)
    figure = Figure(figsize=(11, 4), layout="constrained")
    first, whole = figure.subplots(1, 2, width_ratios=[2, 3])
    for path in sorted(HERE.glob("paper_frame_*.csv")):
        rows = list(csv.DictReader(path.open()))
        step, mean, std = (np.array([float(row[name]) for row in rows]) for name in ("step", "mean", "std"))
        method = "gempo_jax" if "jax" in path.stem else "simpo_neg"
        color, label = small_frame.COLORS[method], f"{small_frame.NAMES[method]}, the paper's sizes"
        first.plot(step, mean, color=color, marker=".", label=label)
        first.fill_between(step, mean - std, mean + std, color=color, alpha=0.2, linewidth=0)
        whole.plot(step, mean, color=color, linewidth=2.5, label=label)
        if "jax" not in path.stem:
            seed, white = path.stem.rpartition("_")[2], dict(facecolor="white", edgecolor="none", pad=0.5)
            whole.text(step[-1], mean[-1] - 700, f"seed {seed}", color=color, fontsize="small", bbox=white)
    for (method, _, _), curve in sorted(small_frame.read(HERE / "small_networks.csv").items()):
        color, label = small_frame.COLORS[method], f"{small_frame.NAMES[method]}, 64 units, batches of 64"
        whole.plot(*zip(*sorted(curve.items()), strict=True), color=color, linewidth=1, label=label)
    whole.axhline(PAPER, color="black", linestyle=":", label="the paper's second version, by a web listing")
    first.set(xlim=(0, 1.05e5), ylim=(-700, 5000), ylabel="return", title="the paper's sizes, first 100k steps")
    whole.set(xlim=(0, 1e6), title="HalfCheetah-v4, each seed")
    for axes, loc, corner in (first, "upper left", (0, 1)), (whole, "upper right", (1, 0.93)):
        handles, labels = axes.get_legend_handles_labels()
        once = dict(zip(labels, handles, strict=True))
        axes.legend(once.values(), once, fontsize="x-small", frameon=False, loc=loc, bbox_to_anchor=corner)
    figure.supxlabel("environment steps", fontsize="medium")
    figure.savefig(HERE / "paper_frame.png", dpi=100)
