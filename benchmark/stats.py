"""Statistics of runs after Agarwal et al. (arXiv 2108.13264): what a few seeds say, with bootstrap intervals.

    python benchmark/stats.py runs/sweep                          # every run below, its eval.csv and args.json
    python benchmark/stats.py runs/sweep --zero "classic algo=random" --one "classic algo=sac"   # tasks on one scale

Prints and writes table.csv (per method and task: interquartile mean of the last evaluation, and area under the curve)
and improvement.csv (chance that one method's run beats another's); draws curves.png and, if all tasks share one scale,
profiles.png. Intervals are of 95%, by the percentile bootstrap over seeds, tasks resampled separately. With few seeds
they are too narrow: of normal returns, those of the IQM of one task hold the truth in 90% of all cases with five seeds,
in 93% with ten; those of a chance in 90%, but of one near 1, 0.9, in 68%, ten seeds 86%. Below four seeds (75% with
three) none is given. A run that has not finished cuts all of its task.
Not named statistics.py, which would hide Python's own module from torch.compile.
"""

import csv
import json
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
import scipy.stats
import tyro

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

TASK = ["env_id", "reward_landscape"]  # arguments of a run that say what is to be learned; others, what learns it
IGNORED = [*TASK, "seed", "resume", "evaluate"]


def iqm(*tasks, axis=-1):
    """Interquartile mean of all runs of all tasks: without the lowest and the highest quarter, rounded down."""
    return scipy.stats.trim_mean(np.concatenate(tasks, axis), 0.25, axis)


def improvement(*tasks, axis=-1):
    """Chance that a run of X beats one of Y on the same task, ties half, mean over tasks: X's tasks, then Y's."""
    tasks = [np.moveaxis(task, axis, -1) for task in tasks]
    pairs = zip(tasks[: len(tasks) // 2], tasks[len(tasks) // 2 :], strict=True)
    signs = [np.sign(x[..., :, None] - y[..., None, :]).mean((-2, -1)) for x, y in pairs]
    return (np.mean(signs, axis=0) + 1) / 2


def area(steps, returns):
    """Area under the learning curve over its length, in units of a return: steps (T,), returns (..., T) -> (...)."""
    if len(steps) == 1:
        return returns[..., 0]
    return np.trapezoid(returns, steps) / (steps[-1] - steps[0])


def interval(statistic, *tasks, resamples=5000):
    """Stratified percentile bootstrap: statistic(*tasks, axis) on arrays (..., n) -> value, low and high of 95%.

    Low and high are NaN if a task has fewer than four runs: they would say too little of the spread.
    """
    value = statistic(*tasks, axis=-1)
    if min(task.shape[-1] for task in tasks) < 4:
        return value, np.full_like(value, np.nan), np.full_like(value, np.nan)
    options = dict(vectorized=True, axis=-1, method="percentile", n_resamples=resamples)
    ends = scipy.stats.bootstrap(tasks, statistic, rng=np.random.default_rng(0), **options).confidence_interval
    return value, ends.low, ends.high


def profile(thresholds, *tasks, resamples=1000):
    """Performance profile: share of runs above each of the thresholds (T,), tasks (n,) -> value, low, high (T,)."""
    above = [(task > thresholds[:, None]).astype(float) for task in tasks]  # (T, n)
    return interval(lambda *tasks, axis: np.concatenate(tasks, axis).mean(axis), *above, resamples=resamples)


def read(path):
    """An eval.csv -> steps (T,) and mean returns (T,)."""
    with open(path) as file:
        rows = list(csv.DictReader(file))
    return np.array([int(row["step"]) for row in rows]), np.array([float(row["mean"]) for row in rows])


def collect(paths):
    """Folders -> {task: {method: (steps (T,), returns (seeds, T))}}, at the steps that all runs of the task have.

    A method is the script with those arguments that are not the same in all its runs; the run's directory is named
    ENVIRONMENT__SCRIPT__SEED__TIME. Raises SystemExit if there is no run, a seed is there twice or no step is shared.
    """
    found, values = [], defaultdict(set)  # (script, argument) -> its values
    for path in sorted(file for folder in paths for file in Path(folder).rglob("eval.csv")):
        if not (path.parent / "args.json").exists() or path.parent.name.count("__") < 3:
            raise SystemExit(f"{path.parent} is no run: no args.json, or not named ENVIRONMENT__SCRIPT__SEED__TIME")
        args, script = json.loads((path.parent / "args.json").read_text()), path.parent.name.rsplit("__", 3)[1]
        found.append((path, script, args))
        for name, value in args.items():
            values[script, name].add(value)
    if not found:
        raise SystemExit(f"no eval.csv below {', '.join(map(str, paths))}")
    curves = defaultdict(lambda: defaultdict(dict))
    for path, script, args in found:
        flags = [f"{k}={v}" for k, v in args.items() if len(values[script, k]) > 1 and k not in IGNORED]
        task = " ".join(args[name] for name in TASK if args.get(name, "native") != "native")
        seeds = curves[task][" ".join([script, *flags])]
        if args["seed"] in seeds:
            raise SystemExit(f"two runs of one seed: {path.parent} and {seeds[args['seed']][0].parent}")
        seeds[args["seed"]] = path, dict(zip(*read(path), strict=True))
    result = {}
    for task, methods in curves.items():
        steps = sorted(set.intersection(*(set(curve) for runs in methods.values() for _, curve in runs.values())))
        if not steps:
            raise SystemExit(f"{task}: there is no step at which all runs were evaluated")
        result[task] = {
            method: (np.array(steps), np.array([[curve[step] for step in steps] for _, curve in runs.values()]))
            for method, runs in sorted(methods.items())
        }
    return result


def draw_curves(curves, path):
    """Learning curves, interquartile mean over seeds with its interval, one panel per task."""
    figure, panels = plt.subplots(
        1, len(curves), figsize=(4 * len(curves) + 1, 3.6), layout="constrained", squeeze=False
    )
    for panel, (task, methods) in zip(panels[0], curves.items(), strict=True):
        for method, (steps, returns) in methods.items():
            middle, low, high = interval(iqm, returns.T)
            panel.plot(steps, middle, label=f"{method} ({len(returns)})")
            panel.fill_between(steps, low, high, alpha=0.2, linewidth=0)
        panel.set(title=task, xlabel="environment steps")
        panel.legend(fontsize="small", frameon=False)
    panels[0, 0].set_ylabel("return: IQM over (seeds), 95% interval")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def draw_profiles(scores, path, label):
    """Performance profiles, scores {method: one array (seeds,) per task}."""
    runs = np.concatenate([task for tasks in scores.values() for task in tasks])
    thresholds = np.linspace(runs.min() - 0.05 * np.ptp(runs), runs.max(), 200)
    figure, panel = plt.subplots(figsize=(5, 3.6), layout="constrained")
    for method, tasks in scores.items():
        share, low, high = profile(thresholds, *tasks)
        panel.plot(thresholds, share, label=method)
        panel.fill_between(thresholds, low, high, alpha=0.2, linewidth=0)
    panel.set(xlabel=label, ylabel="share of runs above it")
    panel.legend(fontsize="small", frameon=False)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def write(path, header, rows):
    """Writes rows as CSV and prints them in columns."""
    rows = [header, *([f"{x:.4g}" if isinstance(x, float) else str(x) for x in row] for row in rows)]
    with open(path, "w", newline="") as file:
        csv.writer(file).writerows(rows)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


@dataclass
class Args:
    runs: tyro.conf.Positional[list[Path]]  # folders: each run below them counts
    out: Path = Path("runs/statistics")  # folder of tables and pictures
    zero: str = ""  # method whose mean return is 0 on each task's scale; with --one, returns are scaled before all else
    one: str = ""  # method whose mean return is 1


if __name__ == "__main__":
    args = tyro.cli(Args, description=__doc__)
    curves = collect(args.runs)
    names = sorted({method for methods in curves.values() for method in methods})
    for task, methods in curves.items() if args.zero or args.one else ():
        for name in (args.zero, args.one):
            if name not in methods:
                raise SystemExit(f"--zero and --one must be methods with runs on {task}: {', '.join(methods)}")
        zero, one = (methods[name][1][:, -1].mean() for name in (args.zero, args.one))
        if one <= zero:
            raise SystemExit(f"--one must return more than --zero; on {task} it is {one:.4g}, not above {zero:.4g}")
        curves[task] = {name: (steps, (returns - zero) / (one - zero)) for name, (steps, returns) in methods.items()}
    for name in names if len(curves) > 1 and args.one else ():
        counts = {task: len(methods[name][1]) for task, methods in curves.items() if name in methods}
        if len(counts) == len(curves) and len(set(counts.values())) > 1:
            raise SystemExit(f"{name} must have as many seeds on each task, for a row of all tasks; it has {counts}")
    last = {task: {name: x[:, -1] for name, (_, x) in methods.items()} for task, methods in curves.items()}
    areas = {task: {name: area(*run) for name, run in methods.items()} for task, methods in curves.items()}
    args.out.mkdir(parents=True, exist_ok=True)

    # A method's row for each task, and one for all tasks where these have one scale.
    groups = [(task, [task]) for task in curves] + [("all", list(curves))] * (len(curves) > 1 and args.one != "")
    rows, pairs = [], []
    for label, tasks in groups:
        common = [name for name in names if all(name in curves[task] for task in tasks)]
        for name in common:
            seeds = " ".join(str(len(last[task][name])) for task in tasks)
            step = " ".join(str(curves[task][name][0][-1]) for task in tasks)
            figures = [*interval(iqm, *(last[task][name] for task in tasks))]
            figures += interval(iqm, *(areas[task][name] for task in tasks))
            rows.append([label, name, seeds, step, *map(float, figures)])
            for other in common:
                if other != name:
                    samples = [last[task][method] for method in (name, other) for task in tasks]
                    pairs.append([label, name, other, *map(float, interval(improvement, *samples))])
    write(args.out / "table.csv", "task method seeds step iqm low high area area_low area_high".split(), rows)
    print()
    write(args.out / "improvement.csv", "task method than probability low high".split(), pairs)
    draw_curves(curves, args.out / "curves.png")
    if len(groups) == 1 or args.one:
        scores = {name: [last[task][name] for task in groups[-1][1]] for name in common}
        draw_profiles(scores, args.out / "profiles.png", "scaled return" if args.one else "return")
