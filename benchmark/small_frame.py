"""Means and paired differences of the small frame's last evaluations, with 95% t-intervals: mujoco/small_frame.csv.

    python benchmark/small_frame.py                               # the numbers of benchmark/README.md
    python benchmark/small_frame.py --csv benchmark/mujoco/small_frame_30k.csv
    python benchmark/small_frame.py --runs runs/small             # adds a sweep's runs to the file first

Over more than one task: the chance that a run of one method beats one of the other on the same task (stats.py).
mujoco/cost.csv has the milliseconds per update, by train_speed.py on one core; with it, the returns at equal computing
time, evaluations left out, between two evaluations linearly, are printed. All is drawn beside --csv, as .png.
"""

import csv
import itertools
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import stats
import tyro
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from scipy.stats import ttest_1samp

HERE = Path(__file__).parent / "mujoco"
PAPER = {  # its names of the weightings
    **{"simpo_exp": "Exp", "simpo_power": "Linear", "simpo_power power=2": "Square"},
    **{"simpo_neg": "Lin. Neg.", "simpo_neg power=2": "Sqr. Neg."},
}
NAMES = PAPER | {  # in a picture's legend
    **{"classic algo=random": "random actions", "classic algo=sac": "SAC", "gempo_jax": "authors' JAX"},
    **{"classic algo=td3": "TD3", "classic algo=ppo": "PPO"},
    "simpo_noise": "Lin. Neg., errors times alpha_t^2",
    "simpo_noise_but_1": "Lin. Neg., the same, but times 1 at t = 1",
    **{"simpo_orthogonal": "Lin. Neg., orthogonal", "simpo_unclipped": "Lin. Neg., particles not clipped"},
    "simpo_neg temperature=0.125 temperature-lr=3e-4": "Lin. Neg., lambda as theirs",
    "gempo_jax predict=velocity": "authors' JAX, velocity",
    "simpo_all solver=ddpm policy-lr-end=3e-4 temperature=0.125 temperature-lr=3e-4": "Lin. Neg., all of these",
    "gempo_jax predict=velocity init=pytorch particles=clipped": "authors' JAX, three changes",
    **{"qsm": "QSM", "qvpo": "QVPO", "dipo": "DIPO", "sdac num-particles=64 temperature=0.2": "SDAC"},
    **{"dacer": "DACER", "dacer policy-delay=1": "DACER, delay 1", "dppo rollout-steps=200 batch-size=1000": "DPPO"},
}
COLORS = {  # Okabe and Ito's, as in bandit.py
    **dict(zip(PAPER, ("#E69F00", "#0072B2", "#009E73", "#D55E00", "#CC79A7"), strict=True)),
    **{"classic algo=sac": "black", "classic algo=random": "grey", "gempo_jax": "navy"},
}
OURS = {"policy-dtype=float32", "num-particles=8", "target-kl=0.7", "none"}  # flags that say nothing new here
TASK = "action-repeat=", "reward-landscape="  # flags that make another task


@dataclass
class Args:
    env_ids: tuple[str, ...] = ()  # none: all tasks of --csv
    seeds: tuple[int, ...] = ()  # none: all; of some of them nothing is drawn
    csv: Path = HERE / "small_frame.csv"  # method, env_id, seed, step, mean
    last: int = 1  # a run's return is the mean of so many evaluations, its last ones
    cost: Path = HERE / "cost.csv"  # script, flags, milliseconds per update
    minutes: float = 0.0  # computing time to compare returns at; 0: what the method that is done first takes
    learning_starts: int = 5_000  # environment steps before the first update; then there is one for each
    runs: Path | None = None  # a sweep's --out: its finished runs are added to --csv, in place of equal ones


def label(script, flags):
    """A method's name: the script with the flags that it has neither from the frame nor from the task."""
    paths = [Path(flag.removeprefix("script=")) for flag in flags.split() if flag.startswith("script=")]
    launched = [path.stem.removeprefix("baselines-") for path in paths]
    own = [flag for flag in flags.split() if flag not in OURS and not flag.startswith(("script=", *TASK))]
    return " ".join([*(launched or [script]), *own])


def read(path):
    """{(method, task, seed): {step: return}} of a file of evaluations; none if there is no such file."""
    runs = defaultdict(dict)
    if path.is_file():
        with path.open() as file:
            for row in csv.DictReader(file):
                runs[row["method"], row["env_id"], int(row["seed"])][int(row["step"])] = float(row["mean"])
    return runs


def check_lengths(runs, path):
    """SystemExit if runs of one task end at different steps."""
    ends = defaultdict(set)
    for (_, task, _), curve in runs.items():
        ends[task].add(max(curve))
    for task, steps in ends.items():
        if len(steps) > 1:
            raise SystemExit(f"{path}: runs of {task} end at different steps, {sorted(steps)}")


def add(sweep, path):
    """Adds a sweep's finished runs, SCRIPT/ENVIRONMENT/FLAGS/SEED below sweep, to path, in place of equal ones."""
    runs = read(path)
    finished = sorted(sweep.glob("*/*/*/*/finished"))
    if not finished:
        raise SystemExit(f"--runs {sweep}: there is no finished run of a sweep below it")
    for file in finished:
        script, env_id, flags, seed = file.parts[-5:-1]
        (evaluations,) = file.parent.glob("runs/*/eval.csv")
        steps, returns = stats.read(evaluations)
        task = " ".join([env_id, *(flag for flag in flags.split() if flag.startswith(TASK))])
        curve = dict(zip(steps.tolist(), returns.round(3).tolist(), strict=True))
        runs[label(script, flags), task, int(seed)] = curve
    check_lengths(runs, f"{sweep} with {path}")
    rows = [(*run, *point) for run, curve in sorted(runs.items()) for point in curve.items()]
    with path.open("w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([("method", "env_id", "seed", "step", "mean"), *rows])


def name_of(method):
    """What a legend calls it: its longest beginning that has a name, and the flags after that."""
    start = max((name for name in NAMES if f"{method} ".startswith(f"{name} ")), key=len, default="")
    return NAMES.get(start, "") + method[len(start) :]


def mean(values):
    """The mean as text, with its interval if there are two values or more."""
    if len(values) < 2:
        return f"{np.mean(values):.0f}"
    low, high = ttest_1samp(values, 0).confidence_interval(0.95)
    return f"{np.mean(values):.0f} [{low:.0f}, {high:.0f}]"


def differences(returns):
    """Prints those of every two methods, paired by seed: returns {method: {seed: return}}."""
    for one, other in itertools.combinations(returns, 2):
        pairs = [returns[one][seed] - returns[other][seed] for seed in returns[one].keys() & returns[other].keys()]
        if len(pairs) > 1:
            print(f"{one} minus {other}, {len(pairs)} seeds: {mean(pairs)}")


def floor(returns):
    """Prints what the floor changes, the mean of both powers, over the seeds that all four methods have."""
    by_power = [[returns.get(name + power, {}) for name in ("simpo_neg", "simpo_power")] for power in ("", " power=2")]
    seeds = set.intersection(*(set(seeds) for methods in by_power for seeds in methods))
    if len(seeds) > 1:
        values = [np.mean([neg[seed] - positive[seed] for neg, positive in by_power]) for seed in seeds]
        print(f"the floor, mean of both powers, {len(seeds)} seeds: {mean(values)}")


def draw(curves, minutes, path):
    """Means over seeds, a column per task: SiMPO; Lin. Neg. and others, by steps; these and Linear by minutes.

    t-intervals from three seeds on, all along or, in a row of more than three methods, at the end, beside the line. A
    row that compares nothing is left out; up to six methods share one. The legend has the number of seeds, by task.
    """
    known = list(dict.fromkeys(method for methods in curves.values() for method in methods if method not in PAPER))
    colors = itertools.cycle("C9 C4 C8 C5 gold magenta limegreen tan teal".split())
    color = COLORS | dict(zip((method for method in known if method not in COLORS), colors, strict=False))
    others = ["simpo_neg", *known]
    timed = [method for method in ["simpo_power", *others] if minutes(method, 0) is not None]
    rows = [("weightings", list(PAPER), False), ("Lin. Neg. beside others", others, False)]
    rows += [("the same by computing\ntime, where measured", timed, True)]
    if len({method for methods in curves.values() for method in methods}) <= 6:
        rows[:2] = [("", [*PAPER, *known], False)]
    rows = [row for row in rows if any(len(methods.keys() & row[1]) > 1 for methods in curves.values())]
    rows = rows or [("", [*PAPER, *known], False)]  # one method alone
    figure = Figure(figsize=(2 + max(7, 4 * len(curves)), 3.5 * len(rows)), layout="constrained")
    panels = figure.subplots(len(rows), len(curves), squeeze=False)
    for row, (title, methods, by_minutes) in zip(panels, rows, strict=True):
        methods = [method for method in methods if any(method in curves_of for curves_of in curves.values())]
        for panel, (env_id, curves_of) in zip(row, curves.items(), strict=True):
            length = max(step for seeds in curves_of.values() for curve in seeds.values() for step in curve)
            unit = "held actions" if "action-repeat=" in env_id else "environment steps"
            panel.set(xlabel="minutes of one core, evaluations left out" if by_minutes else unit)
            panel.set(title=env_id.replace(" ", "\n") if row[0] is panels[0, 0] else "")
            for i, method in enumerate(method for method in methods if method in curves_of):
                seeds = list(curves_of[method].values())
                steps = sorted(set.intersection(*map(set, seeds)))
                returns = np.array([[curve[step] for step in steps] for curve in seeds])
                x = np.array([minutes(method, step) for step in steps] if by_minutes else steps)
                panel.plot(x, returns.mean(0), color=color[method])
                if len(seeds) > 2:
                    low, high = ttest_1samp(returns, 0).confidence_interval(0.95)
                    if len(methods) <= 3:
                        panel.fill_between(x, low, high, color=color[method], alpha=0.12, linewidth=0)
                    else:
                        end = x[-1] + (0 if by_minutes else (1 + i) * 0.02 * np.ptp(x))
                        mean = returns.mean(0)[-1]
                        panel.errorbar(end, mean, high[-1] - mean, color=color[method], marker=".")
            if not by_minutes:
                panel.axvline(length, color="grey", linewidth=0.5)
                panel.set_xticks(np.linspace(0, length, 6))
        counts = [", ".join(str(len(curves_of.get(method, ""))) for curves_of in curves.values()) for method in methods]
        names = [f"{name_of(method)} ({count})" for method, count in zip(methods, counts, strict=True)]
        lines = [Line2D([], [], color=color[method]) for method in methods]
        place = dict(loc="upper left", bbox_to_anchor=(1, 1), alignment="left")
        place |= dict(title=f"{title} (seeds, by panel)".strip(), fontsize="small", frameon=False)
        row[-1].legend(lines, names, **place)
    figure.supylabel("return, 95% interval")
    figure.savefig(path, dpi=100)


if __name__ == "__main__":
    args = tyro.cli(Args, description=__doc__)
    if args.last < 1:
        raise SystemExit(f"--last {args.last}: it must be 1 or more")
    if args.minutes < 0:
        raise SystemExit(f"--minutes {args.minutes}: it must be 0 or more")
    if args.runs:
        add(args.runs, args.csv)
    runs = read(args.csv)
    if not runs:
        raise SystemExit(f"--csv {args.csv}: there is no such file, or no run in it")
    check_lengths(runs, args.csv)
    env_ids = args.env_ids or sorted({env_id for _, env_id, _ in runs})
    curves = {env_id: defaultdict(dict) for env_id in env_ids}  # task -> method -> seed -> step -> return
    for (method, env_id, seed), curve in sorted(runs.items()):
        if env_id in curves and (not args.seeds or seed in args.seeds):
            curves[env_id][method][seed] = curve
    for env_id, methods in curves.items():
        if not methods:
            raise SystemExit(f"{args.csv} has no run of {env_id}, or none with these --seeds")
    if not args.cost.exists():
        raise SystemExit(f"--cost {args.cost}: there is no such file; /dev/null: no costs")
    costs = {label(row["script"], row["flags"]): float(row["milliseconds"]) for row in csv.DictReader(args.cost.open())}

    def minutes(method, step):
        """Of computing up to this step; None where the cost is not known."""
        return max(0, step - args.learning_starts) * costs[method] / 60_000 if method in costs else None

    last = {}  # task -> method -> seed -> return
    for env_id, methods in curves.items():
        print(env_id)
        last[env_id] = {
            method: {seed: np.mean([x[s] for s in sorted(x)[-args.last :]]) for seed, x in seeds.items()}
            for method, seeds in methods.items()
        }
        for method, returns in last[env_id].items():
            print(f"{method}: {', '.join(f'{x:.0f}' for x in returns.values())}; {mean(list(returns.values()))}")
        differences(last[env_id])
        floor(last[env_id])

        # Returns at equal computing time; a method that is done before has its last return.
        known = [method for method in methods if method in costs]
        ends = [minutes(method, max(x)) for method in known for x in methods[method].values()]
        budget = args.minutes or min(ends, default=0)
        within = {}  # method -> seed -> return
        for method in known:
            step = args.learning_starts + 60_000 * budget / costs[method]
            within[method] = {
                seed: np.interp(step, *np.transpose(sorted(x.items()))) for seed, x in methods[method].items()
            }
            values = list(within[method].values())
            print(f"{method}, {costs[method]} ms per update, within {budget:.1f} minutes: {mean(values)}")
        differences(within)
        print()

    shared = [method for method in next(iter(last.values())) if all(method in methods for methods in last.values())]
    for one, other in itertools.combinations(shared, 2) if len(last) > 1 else ():
        samples = [np.array(list(last[env_id][method].values())) for method in (one, other) for env_id in last]
        value, low, high = stats.interval(stats.improvement, *samples)
        print(f"{len(last)} tasks: chance that {one} beats {other} {value:.2f} [{low:.2f}, {high:.2f}]")
    if not args.seeds:
        draw(curves, minutes, args.csv.with_suffix(".png"))
