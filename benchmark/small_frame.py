"""Means and paired differences of the small frame's last evaluations, with 95% t-intervals: mujoco/small_frame.csv.

    python benchmark/small_frame.py                                               # the tables of benchmark/README.md
    python benchmark/small_frame.py --csv benchmark/mujoco/small_frame_30k.csv    # those of 30,000 steps
    python benchmark/small_frame.py --runs runs/baselines                         # makes the file from a sweep first

mujoco/cost.csv has the milliseconds per update, by train_speed.py on one core; with it, the returns at equal computing
time, evaluations left out, between two evaluations linearly, are printed. Both are drawn beside --csv, as .png.
"""

import csv
import itertools
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro
from matplotlib.figure import Figure
from scipy.stats import ttest_1samp

HERE = Path(__file__).parent / "mujoco"
PAPER = {  # its names of the weightings
    **{"simpo_exp": "Exp", "simpo_power": "Linear", "simpo_power power=2": "Square"},
    **{"simpo_neg": "Lin. Neg.", "simpo_neg power=2": "Sqr. Neg."},
}
OURS = {"policy-dtype=float32", "num-particles=8", "target-kl=0.7", "none"}  # flags that say nothing new here


@dataclass
class Args:
    env_id: str = "HalfCheetah-v4"
    csv: Path = HERE / "small_frame.csv"  # method, env_id, seed, step, mean
    cost: Path = HERE / "cost.csv"  # script, flags, milliseconds per update
    learning_starts: int = 5_000  # environment steps before the first update; then there is one for each
    runs: Path | None = None  # a sweep's --out: its finished runs become --csv


def label(script, flags):
    """A method's name: the script with the flags that it does not have from the frame."""
    return " ".join([script, *(flag for flag in flags.split() if flag not in OURS)])


def export(runs, path):
    """Writes every evaluation of a sweep's finished runs, SCRIPT/ENVIRONMENT/FLAGS/SEED below runs, to path."""
    rows = []
    for finished in runs.glob("*/*/*/*/finished"):
        script, env_id, flags, seed = finished.parts[-5:-1]
        (evaluations,) = finished.parent.glob("runs/*/eval.csv")
        for row in csv.DictReader(evaluations.open()):
            rows.append((label(script, flags), env_id, int(seed), int(row["step"]), round(float(row["mean"]), 3)))
    if not rows:
        raise SystemExit(f"--runs {runs}: there is no finished run of a sweep below it")
    with path.open("w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([("method", "env_id", "seed", "step", "mean"), *sorted(rows)])


def mean(values):
    """The mean as text, with its interval if there are two values or more."""
    if len(values) < 2:
        return f"{np.mean(values):.0f}"
    low, high = ttest_1samp(values, 0).confidence_interval(0.95)
    return f"{np.mean(values):.0f} [{low:.0f}, {high:.0f}]"


def draw(curves, minutes, path):
    """Means over seeds with t-intervals, over steps and over minutes; first SiMPO, then Lin. Neg. and all others."""
    ours = [method for method in PAPER if method in curves]
    others = [method for method in curves if method == "simpo_neg" or method not in PAPER]
    figure = Figure(figsize=(11, 7.5), layout="constrained")
    rows = figure.subplots(2, 2, sharex="col", sharey=True)
    for panels, group in zip(rows, (ours, others), strict=True):
        for i, method in enumerate(group):
            seeds = curves[method]
            steps = sorted(set.intersection(*(set(curve) for curve in seeds.values())))
            returns = np.array([[curve[step] for step in steps] for curve in seeds.values()])
            for panel, x in zip(panels, (steps, [minutes(method, step) for step in steps]), strict=True):
                if None not in x:
                    panel.plot(x, returns.mean(0), color=f"C{i}", label=f"{PAPER.get(method, method)} ({len(returns)})")
                    if len(returns) > 1:
                        low, high = ttest_1samp(returns, 0).confidence_interval(0.95)
                        panel.fill_between(x, low, high, color=f"C{i}", alpha=0.12, linewidth=0)
        panels[0].set(ylabel="return: mean over (seeds), 95% interval")
        panels[0].legend(fontsize="small", frameon=False)
    rows[1, 0].set(xlabel="environment steps")
    rows[1, 1].set(xlabel="minutes of one core, evaluations left out")
    figure.savefig(path, dpi=100)


if __name__ == "__main__":
    args = tyro.cli(Args, description=__doc__)
    if args.runs:
        export(args.runs, args.csv)
    if not args.csv.is_file():
        raise SystemExit(f"--csv {args.csv}: there is no such file")
    curves = defaultdict(lambda: defaultdict(dict))  # method -> seed -> step -> return
    for row in csv.DictReader(args.csv.open()):
        if row["env_id"] == args.env_id:
            curves[row["method"]][int(row["seed"])][int(row["step"])] = float(row["mean"])
    if not curves:
        raise SystemExit(f"{args.csv} has no run of --env-id {args.env_id}")
    last = {method: {seed: x[max(x)] for seed, x in sorted(seeds.items())} for method, seeds in curves.items()}
    for method, returns in last.items():
        print(f"{method}: {', '.join(f'{x:.0f}' for x in returns.values())}; {mean(list(returns.values()))}")
    for one, other in itertools.combinations(last, 2):
        seeds = sorted(last[one].keys() & last[other].keys())
        if len(seeds) > 1:
            differences = [last[one][seed] - last[other][seed] for seed in seeds]
            print(f"{one} minus {other}, {len(seeds)} seeds: {mean(differences)}")

    # Returns at equal computing time: what the method that is done first takes for all its steps.
    costs = {label(row["script"], row["flags"]): float(row["milliseconds"]) for row in csv.DictReader(args.cost.open())}

    def minutes(method, step):
        """Of computing up to this step; None where the cost is not known."""
        return max(0, step - args.learning_starts) * costs[method] / 60_000 if method in costs else None

    known = [method for method in curves if method in costs]
    budget = min((minutes(method, max(x)) for method in known for x in curves[method].values()), default=0)
    for method in known:
        step = args.learning_starts + 60_000 * budget / costs[method]
        values = [np.interp(step, sorted(x), [x[s] for s in sorted(x)]) for x in curves[method].values()]
        print(f"{method}, {costs[method]} ms per update, within {budget:.1f} minutes: {mean(values)}")
    other_task = "" if args.env_id == Args.env_id else f"_{args.env_id.replace('/', '-')}"
    draw(curves, minutes, args.csv.with_name(f"{args.csv.stem}{other_task}.png"))
