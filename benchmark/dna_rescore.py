"""Pred-Activity once more, by evaluation oracles that start from other seeds: does a row hang on the oracle?

    python benchmark/dna_rescore.py runs/RUN... --seeds 2 3 4 --out rescored.csv    # where the runs were made

dna_finetune.py starts both oracles from one seed; they are trained on different data. The runs are those of
dna_table.py, on one data set. A row per run, method and oracle's seed: the mean over the run's seeds of the median over
the sequences. The seed of dna_finetune.py, 1 by default, gives the table's numbers again.
"""

import csv
import json
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import tyro

sys.path.insert(0, str(Path(__file__).parent.parent))
import dna_finetune as dna  # noqa: E402


@dataclass
class Args:
    runs: tyro.conf.Positional[list[Path]]  # runs/RUN of dna_finetune.py (the first one), dna_guidance.py, drakes.py
    seeds: tuple[int, ...] = (2, 3, 4)  # of the oracles
    out: Path = Path("rescored.csv")


if __name__ == "__main__":
    args = tyro.cli(Args, description=__doc__)
    if not (args.runs and args.seeds and args.out.parent.is_dir()):
        raise SystemExit(
            f"give runs and --seeds, one or more of each, and an --out in a folder that is there: {args.out}"
        )
    try:
        made = dna.Args(**json.loads((args.runs[0] / "args.json").read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise SystemExit(f"{args.runs[0]} is no run of dna_finetune.py: {error}") from None
    x, y, (_, for_eval, held_out), _ = dna.read_data(made)
    drawn = {}  # (run, method) -> the sequences of each seed
    for run in args.runs:
        files = sorted(run.glob("*-seed*.fasta"))
        if not files:
            raise SystemExit(f"{run} has no METHOD-seedN.fasta; give finished runs")
        for file in files:
            lines = [line for line in file.read_text().split() if not line.startswith(">")]
            if {len(line) for line in lines} != {x.shape[1]}:
                raise SystemExit(f"{file}: its sequences are not of {x.shape[1]} bases as those of {args.runs[0]}")
            sequences = torch.tensor([[dna.LETTERS.index(letter) for letter in line] for line in lines])
            drawn.setdefault((run.name, file.name.rpartition("-seed")[0]), []).append(sequences)
    rows = []
    for seed in args.seeds:
        content = dna.train_oracle(x[for_eval], y[for_eval], False, replace(made, seed=seed))
        oracle = dna.Oracle(made.oracle_width, x.shape[1]).eval()
        oracle.load_state_dict(content["state"])
        correlation = np.corrcoef(dna.predict(oracle, x[held_out]), y[held_out])[0, 1]
        print(f"seed {seed}: correlation with held-out measurements {correlation:.3f}")
        for (run, method), seeds in drawn.items():
            score = np.mean([dna.predict(oracle, sequences).median().item() for sequences in seeds])
            rows.append(dict(run=run, method=method, oracle_seed=seed, pred_activity=round(float(score), 3)))
    with args.out.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    for run, method in drawn:
        scores = [row["pred_activity"] for row in rows if (row["run"], row["method"]) == (run, method)]
        print(f"{run:55} {method:12}", *(f"{score:6.2f}" for score in scores))
