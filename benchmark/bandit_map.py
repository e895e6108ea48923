"""Where the claims of Figures 2 and 3 hold: python benchmark/bandit_map.py [bandit.py's flags]

escape_map: share of trials that stay at the local optimum, where they start (Figure 2), over distance of the optima and
epsilon, and over one other setting at a time. sweeps: regret on broad and sharp optima as in Figure 3, over
width, height and target KL. The paper has neither. PNG and CSV files go to --save-dir, by default runs/bandit_map.
"""

import sys
from dataclasses import dataclass, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
import matplotlib.pyplot as plt
import numpy as np
import tyro

import bandit
from bandit import BROAD, COLOURS, ESCAPE, METHODS, SHARP, share_interval, summarise, train, trials_for

DISTANCES, EPSILONS = (1.2, 1.6, 2.0, 2.4, 2.8), (0.1, 0.2, 0.3, 0.5, 1.0)
COLUMNS = [(method, 0.0) for method in METHODS[:3]] + [("Lin. Neg.", epsilon) for epsilon in EPSILONS]
OTHERS = {
    "start_std": (0.4, 0.6, 0.8, 1.0),
    "height": (0.3, 0.5, 0.7, 0.9),
    "width": (0.2, 0.3, 0.4),
    "target_kl": (0.5, 1.0, 1.5, 2.0),
    "error_clip": (5.0, 30.0, 100.0, 300.0, 1e3, 1e4),
    "particle_noise": (0.0, 0.05, 0.1, 0.2, 0.3),
}
LABELS = {
    "start_std": "deviation of the start (action)",
    "distance": "distance of the optima (action)",
    "height": "local / global reward",
    "width": "width of the optima (action)",
    "target_kl": r"target KL $\delta$ (nats)",
    "error_clip": "error clip",
    "particle_noise": "particle noise (action)",
}


@dataclass
class Args(bandit.Args):
    figure: tyro.conf.Suppress[bandit.Figure] = "all"
    seeds: bandit.Several = 12  # trials per method and setting
    save_dir: Path = Path("runs/bandit_map")  # folder for the PNG and CSV files


def plot_sweeps(axes, name, base, sweeps, methods, quantity, args):
    """One panel per swept field of Trial or Args: "mean" regret or share "trapped", with its interval; summaries."""
    rows = []
    for ax, (field, values) in zip(axes, sweeps.items(), strict=False):
        of_trial = hasattr(base, field)
        for value in values:
            changed = args if of_trial else replace(args, **{field: value})
            trials = trials_for(replace(base, **{field: value}) if of_trial else base, methods, args)
            setting = f"{name}{field} = {value:g}"
            rows += summarise(setting, trials, train(trials, changed, setting)[0])
        for m, method in enumerate(methods):
            mine = [r for r in rows if r["method"] == method and r["setting"].startswith(f"{name}{field} =")]
            if quantity == "trapped":
                y, low, high = np.transpose([share_interval(r["trapped"], r["trials"]) for r in mine])
            else:
                y, low, high = (np.array([r[quantity + end] for r in mine]) for end in ("", "_low", "_high"))
            x = np.array(values) * (1 + 0.01 * (m - 1))  # side by side
            style = dict(color=COLOURS[method], marker="o", markersize=4, linewidth=1.2, capsize=2)
            ax.errorbar(x, y, np.maximum([y - low, high - y], 0), label=method, **style)
        ax.set_xlabel(LABELS[field])
    return rows


def escape_map(args):
    summary = []
    for distance in DISTANCES:
        base = replace(ESCAPE, distance=distance)
        trials = [t for method, e in COLUMNS for t in trials_for(base, [method], replace(args, epsilon=e))]
        summary += summarise(f"distance = {distance:g}", trials, train(trials, args, f"distance = {distance:g}")[0])
    figure, axes = plt.subplot_mosaic("mmabc;mmdef", figsize=(17, 7), layout="constrained")
    ax = axes.pop("m")
    trapped, better = np.reshape([(r["trapped"], r["reached"]) for r in summary], (len(DISTANCES), len(COLUMNS), 2)).T
    image = ax.imshow(trapped.T / args.seeds, cmap="cividis", vmin=0, vmax=1, aspect="auto", origin="lower")
    for j, i in np.ndindex(trapped.shape):
        colour = "white" if trapped[j, i] < args.seeds / 2 else "black"
        ax.text(j, i, f"{trapped[j, i]}, {better[j, i]}", ha="center", va="center", color=colour, fontsize=9)
    ax.set_xticks(range(len(COLUMNS)), [f"{epsilon:g}" if epsilon else method for method, epsilon in COLUMNS])
    ax.set_yticks(range(len(DISTANCES)), DISTANCES)
    ax.set(xlabel=r"method; numbers: Lin. Neg. with this $\epsilon$", ylabel=LABELS["distance"])
    ax.set_title(f"trials trapped at the local optimum, trials that end better, of {args.seeds}")
    figure.colorbar(image, ax=ax, label="share trapped")
    summary += plot_sweeps(axes.values(), "", ESCAPE, OTHERS, METHODS, "trapped", args)
    for ax in axes.values():
        ax.set(ylabel="share trapped", ylim=(-0.05, 1.05))
    axes["e"].set_xscale("log")
    axes["a"].legend(fontsize=8)
    bandit.save(args, "escape_map", figure, summary)


def sweeps(args):
    fields = {"width": (), "target_kl": (0.5, 1.0, 1.5, 2.0), "height": (0.6, 0.8, 0.95)}
    figure, axes = plt.subplots(2, 3, figsize=(10, 6), layout="constrained")
    summary = []
    for row, (name, base) in zip(axes, (("broad", BROAD), ("sharp", SHARP)), strict=True):
        fields["width"] = [round(factor * base.width, 3) for factor in (0.6, 0.8, 1.0, 1.25, 1.6)]
        summary += plot_sweeps(row, f"{name}, ", base, fields, METHODS[:3], "mean", args)
        for ax in row:
            ax.set(ylabel="regret, mean over rounds", ylim=(0, None), title=f"{name} optima")
    axes[0, 0].legend(fontsize=8)
    bandit.save(args, "sweeps", figure, summary)


if __name__ == "__main__":
    args = tyro.cli(Args, description=__doc__)
    if args.num_particles < 8:
        raise SystemExit(f"--num-particles must be at least 8, as target KL goes up to 2; got {args.num_particles}")
    bandit.prepare(args)
    escape_map(args)
    sweeps(args)
