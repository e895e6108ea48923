"""At which floor do negative weights break? Runs dna_finetune.py for several epsilons: benchmark/dna/epsilon.csv, .png.

python benchmark/dna_epsilon.py            # further flags go to dna_finetune.py, such as --seeds 3
"""

import csv
import subprocess
import sys
from pathlib import Path

import matplotlib
import numpy as np

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

ROOT, OUT = Path(__file__).parent.parent, Path(__file__).parent / "dna"
EPSILONS = (0.1, 0.5, 1.0, 2.0, 4.0, 16.0)
COLOURS = {"lin-neg": "#D55E00", "sqr-neg": "#56B4E9"}
PANELS = {
    "pred_activity": "Pred-Activity",
    "true_activity": "true activity",
    "log_likelihood": "log-likelihood (ELBO, nats)",
    "distinct": "share of distinct sequences",
    "lowest_loss": "lowest loss of a batch",
}

rows = []
for epsilon in EPSILONS:
    flags = ["--methods", *COLOURS, "--epsilon", str(epsilon), *sys.argv[1:]]
    subprocess.run([sys.executable, ROOT / "dna_finetune.py", *flags], check=True)
    newest = max(Path("runs").glob("*__dna_finetune__*/rows.csv"), key=lambda path: path.stat().st_mtime)
    rows += [dict(epsilon=epsilon) | row for row in csv.DictReader(open(newest)) if row["method"] in COLOURS]

OUT.mkdir(exist_ok=True)
with open(OUT / "epsilon.csv", "w", newline="") as file:
    table = csv.DictWriter(file, rows[0])
    table.writeheader()
    table.writerows(rows)

figure, axes = plt.subplots(1, len(PANELS), figsize=(3 * len(PANELS), 3), layout="constrained")
for ax, (name, label) in zip(axes, PANELS.items(), strict=True):
    for method, colour in COLOURS.items():
        values = [[float(r[name]) for r in rows if r["method"] == method and r["epsilon"] == e] for e in EPSILONS]
        ax.plot(EPSILONS, [np.mean(v) for v in values], marker="o", markersize=4, color=colour, label=method)
    ax.set(xlabel=r"$\epsilon$", ylabel=label)
    ax.set_xscale("symlog", linthresh=0.1)
axes[0].legend(fontsize=8)
figure.savefig(OUT / "epsilon.png", dpi=120)
