"""What a run of simpo_*.py logs as it goes: lambda, weights, the values of the actions; mujoco/inside.csv and .png.

python benchmark/inside.py                      # draws the file
python benchmark/inside.py runs/RUN runs/RUN    # makes it from these runs' TensorBoard first, a hundred means of each
"""

import csv
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro
from matplotlib.figure import Figure
from small_frame import COLORS, PAPER
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

PANELS = {  # scalars of a run, and what they are
    "weights/temperature": "lambda, in units of Q",
    "weights/kl": "KL of the weights from uniform",
    "weights/share_negative": "share of negative weights",
    "weights/max": "largest of K weights of mean 1",
    "q/mean": "Q of the taken actions",
    "q/particle_spread": "deviation of Q among K actions",
}


@dataclass
class Args:
    runs: tyro.conf.Positional[tuple[Path, ...]] = ()  # directories of runs; none: --csv as it is
    csv: Path = Path(__file__).parent / "mujoco/inside.csv"  # method, seed, scalar, step, mean; the picture beside it


def rows_of(run_dir):
    """Rows (method, seed, scalar, step, mean) of a run, a hundred per scalar; SystemExit if it is none."""
    try:
        flags = json.loads((run_dir / "args.json").read_text())
        method = run_dir.resolve().name.split("__")[-3] + (f" power={p:g}" if (p := flags.get("power", 1)) != 1 else "")
        if method not in PAPER:
            raise ValueError(f"{method} is none of {', '.join(PAPER)}")
        events = EventAccumulator(str(run_dir), size_guidance={"scalars": 0}).Reload()
        for name in PANELS:
            points = np.array([(point.step, point.value) for point in events.Scalars(name)])
            for part in np.array_split(points, min(100, len(points))):
                yield method, flags["seed"], name, int(part[-1, 0]), f"{part[:, 1].mean():.4g}"
    except (OSError, LookupError, ValueError) as error:
        raise SystemExit(f"{run_dir} is no run of simpo_*.py: {error}") from None


if __name__ == "__main__":
    args = tyro.cli(Args, description=__doc__)
    if args.runs:
        rows = [row for run_dir in args.runs for row in rows_of(run_dir)]
        with args.csv.open("w", newline="") as file:
            csv.writer(file, lineterminator="\n").writerows([("method", "seed", "scalar", "step", "mean"), *rows])
    if not args.csv.is_file():
        raise SystemExit(f"--csv {args.csv}: there is no such file; give runs to make it from")
    with args.csv.open() as file:
        rows = list(csv.DictReader(file))
    figure = Figure(figsize=(11, 5), layout="constrained")
    for axes, (name, title) in zip(figure.subplots(2, 3, sharex=True).flat, PANELS.items(), strict=True):
        for method, seed in dict.fromkeys((row["method"], row["seed"]) for row in rows):
            own = [row for row in rows if (row["method"], row["seed"], row["scalar"]) == (method, seed, name)]
            steps, means = zip(*((int(row["step"]), float(row["mean"])) for row in own), strict=True)
            style = dict(color=COLORS[method], linestyle=["-", "--", ":"][int(seed) % 3])
            axes.plot(steps, means, **style, label=f"{PAPER[method]}, seed {seed}")
        axes.set_title(title, fontsize="medium")
    figure.axes[0].legend(fontsize="small", frameon=False)
    figure.supxlabel("environment steps", fontsize="medium")
    figure.savefig(args.csv.with_suffix(".png"), dpi=90)
