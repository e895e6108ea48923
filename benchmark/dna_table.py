"""Table 3 whole: joins runs of dna_finetune.py, baselines/dna_guidance.py and baselines/drakes.py on the same models.

    python benchmark/dna_table.py runs/simulated__* --out benchmark/dna/simulated

Writes table.csv (mean and 95% t-interval over seeds), rows.csv (every seed), differences.csv (of every two methods,
paired by seed), score_likelihood.png, and curves.csv and rounds.png: what the reward oracle says and what is true over
the rounds of fine-tuning, thin lines being single seeds. A method's rows with the authors' lambdas or with --loss-clip
are named so. largest_fall is how far the oracle's median ever was below its best before. Seconds are of the fine-tuning
before and of one draw of the judged sequences, on the machine as it was.
"""

import csv
import itertools
import json
import math
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
import tyro
from scipy.stats import t as student_t

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

COLUMNS = {  # of the table: digits
    **dict(pred_activity=2, reward_oracle=2, true_activity=2, kmer_correlation=2, accessible=2, log_likelihood=1),
    **dict(distinct=3, distance=3, largest_fall=1, train_seconds=0, draw_seconds=0),
}
COLOURS = dict(zip("wd1 exp linear square lin-neg sqr-neg".split(), plt.cm.tab10.colors, strict=False))
COLOURS |= {"cfg": "tab:pink", "cg": "tab:gray", "smc": "gold", "tds": "navy"}
COLOURS |= {"pretrained": "black", "drakes": "tab:olive", "drakes-kl": "tab:cyan"}


@dataclass
class Args:
    runs: tyro.conf.Positional[list[Path]]  # folders of the runs, with rows.csv, args.json and perhaps curves.csv
    out: Path = Path("runs/dna_table")  # folder of the table and the pictures


def read(folder):
    """A run's rows and curves, methods named with their rule; its models and how it was judged; SystemExit without."""
    try:
        settings = json.loads((folder / "args.json").read_text())
        suffix = ", authors" if settings.get("temperature_rule") == "authors" else ""
        suffix += f", clip {settings['loss_clip']:g}" if settings.get("loss_clip", math.inf) < math.inf else ""
        models = Path(settings.get("models") or folder / "models.json")
        judged = json.loads((models.parent / "args.json").read_text())
        names = "data target sampling_steps eval_samples eval_elbo_draws top_share".split()
        judged = models.read_text(), *(judged.get(name) for name in names)
        tables = [list(csv.DictReader((folder / "rows.csv").open())), []]
        if (folder / "curves.csv").exists():
            tables[1] = list(csv.DictReader((folder / "curves.csv").open()))
        for row in tables[0] + tables[1]:
            row |= {key: float(x) for key, x in row.items() if key != "method" and x}
            row["method"] += suffix if row["method"] != "pretrained" else ""
        if len({row["seed"] for row in tables[0]}) < settings.get("seeds", 1):
            raise ValueError("seeds are missing")
    except (OSError, ValueError, KeyError) as error:
        raise SystemExit(f"{folder} is no finished run: {error}") from None
    rows, curves = tables
    for row in rows:
        mine = [c for c in curves if (c["method"], c["seed"]) == (row["method"], row["seed"])]
        row.setdefault("train_seconds", max((c["seconds"] for c in mine), default=0.0))  # of dna_finetune.py
        if rewards := [c["reward"] for c in mine if "reward" in c]:
            row["largest_fall"] = round(float(np.max(np.maximum.accumulate(rewards) - rewards)), 4)
    return rows, curves, judged


def interval(values):
    """Mean and the ends of its 95% t-interval; nan where one value says nothing."""
    mean, n = np.mean(values), len(values)
    half = student_t.ppf(0.975, n - 1) * np.std(values, ddof=1) / n**0.5 if n > 1 else np.nan
    return mean, mean - half, mean + half


def write(path, rows):
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, list(dict.fromkeys(key for row in rows for key in row)))
        writer.writeheader()
        writer.writerows(rows)


def colour(method):
    return COLOURS[method.split(",")[0]]


if __name__ == "__main__":
    args = tyro.cli(Args, description=__doc__)
    if not args.runs:
        raise SystemExit("give the directories of runs, runs/RUN")
    runs = [read(folder) for folder in args.runs]
    for folder, (_, _, judged) in zip(args.runs, runs, strict=True):
        if judged != runs[0][2]:
            raise SystemExit(f"{folder} has other models than {args.runs[0]}, or was judged otherwise: see args.json")
    rows = {}
    for folder, (found, _, _) in zip(args.runs, runs, strict=True):
        for row in found:
            before = rows.setdefault((row["method"], row["seed"]), row)
            if before is not row and row["method"] != "pretrained":
                raise SystemExit(f"{folder}: another run has {row['method']}, seed {row['seed']:g}, too; leave one out")
    rows = rows.values()
    curves = [row for _, curves, _ in runs for row in curves]
    methods = list(dict.fromkeys(row["method"] for row in rows))
    args.out.mkdir(parents=True, exist_ok=True)

    table = []
    for method in methods:
        mine, line = [row for row in rows if row["method"] == method], dict(method=method)
        line["seeds"] = " ".join(f"{row['seed']:g}" for row in mine)
        for name, digits in COLUMNS.items():
            values = [row[name] for row in mine if name in row]
            if len(values) == len(mine) and not np.isnan(values).any():
                mean, low, high = interval(values)
                line[name] = f"{mean:.{digits}f}" + f" [{low:.{digits}f}, {high:.{digits}f}]" * (len(values) > 1)
        table.append(line)
        print("  ".join(f"{line.get(name, ''):>22}" for name in ("method", *COLUMNS)))
    write(args.out / "table.csv", table)
    write(args.out / "rows.csv", list(rows))

    differences, by_key = [], {(row["method"], row["seed"]): row for row in rows}
    for low, high in itertools.combinations(methods, 2):
        seeds = [seed for method, seed in by_key if method == low and (high, seed) in by_key]
        line = dict(difference=f"{high} minus {low}", seeds=" ".join(f"{seed:g}" for seed in seeds))
        for name in ("pred_activity", "reward_oracle", "true_activity", "largest_fall"):
            pairs = [(by_key[high, seed].get(name, math.nan), by_key[low, seed].get(name, math.nan)) for seed in seeds]
            several = len(pairs) > 1 and not np.isnan(pairs).any()
            line[name] = "{:.2f} [{:.2f}, {:.2f}]".format(*interval([a - b for a, b in pairs])) if several else ""
        differences.append(line)
    write(args.out / "differences.csv", differences)
    write(args.out / "curves.csv", curves)

    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    for method in methods:
        mine = [row for row in rows if row["method"] == method]
        x, y = (np.array([row[name] for row in mine]) for name in ("log_likelihood", "pred_activity"))
        marker = "s" if "authors" in method else "o"
        axes.plot(x, y, marker, color=colour(method), alpha=0.4, markersize=4)
        axes.plot(x.mean(), y.mean(), marker, color=colour(method), markersize=9, label=method)
    axes.set(xlabel="log-likelihood under the pretrained model (ELBO, nats)", ylabel="Pred-Activity (large: mean)")
    axes.legend(fontsize=7, ncols=2)
    figure.savefig(args.out / "score_likelihood.png", dpi=120)

    names = {"reward": "reward oracle, median", "true_activity": "true activity, median"}
    names = {name: label for name, label in names.items() if any(name in row for row in curves)}
    if not names:  # no fine-tuning among the runs
        raise SystemExit
    figure, panels = plt.subplots(1, len(names), figsize=(5 * len(names), 3.6), layout="constrained", squeeze=False)
    for (name, label), ax in zip(names.items(), panels[0], strict=True):
        for method in dict.fromkeys(row["method"] for row in curves if "step" in row and name in row):
            mine = [row for row in curves if row["method"] == method]
            steps = sorted({row["step"] for row in mine})
            mean = [np.mean([row[name] for row in mine if row["step"] == step]) for step in steps]
            style = ":" if "clip" in method else "--" if "authors" in method else "-"
            ax.plot(steps, mean, style, color=colour(method), label=method)
            for seed in {row["seed"] for row in mine}:
                single = [(row["step"], row[name]) for row in mine if row["seed"] == seed]
                ax.plot(*zip(*sorted(single), strict=True), color=colour(method), linewidth=0.5, alpha=0.3)
        ax.set(xlabel="round", ylabel=label)
        if any("drakes" in row["method"] and name in row for row in curves):  # many updates
            ax.set_xlabel("round (DRAKES: update), square-root scale")
            ax.set_xscale("function", functions=(lambda x: np.sqrt(np.maximum(x, 0)), np.square))
            ax.set_xlim(left=0)
    figure.legend(*panels[0, 0].get_legend_handles_labels(), fontsize=7, loc="outside right upper")
    figure.savefig(args.out / "rounds.png", dpi=120)
