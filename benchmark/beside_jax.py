"""Milliseconds per update of simpo_neg.py and of the authors' JAX, one after the other: mujoco/speed.csv.

    python benchmark/beside_jax.py flow-rl jaxenv/bin/python    # the top of jax_speed.py says how to get both

Leave the machine alone for its 4 to 8 minutes. It runs speed.py (the sum of the parts) and jax_speed.py, and adds
their milliseconds to --csv; again, and there is a second turn. Of all turns of this machine the medians are printed.
"""

import csv
import re
import subprocess
import sys
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch
import tyro
from tqdm import tqdm

HERE = Path(__file__).parent
OBS_AND_ACTION = {"HalfCheetah-v4": ("17", "6"), "Humanoid-v4": ("376", "17")}  # their sizes
JAX = "the authors' JAX"
CPU = torch.cpu.get_capabilities()


@dataclass
class Args:
    flow_rl: tyro.conf.Positional[Path]  # the authors' code
    jax_python: tyro.conf.Positional[Path]  # Python of an environment that has JAX
    machine: str = CPU.get("cpu_name", "CPU")  # its name in the file
    csv: Path = HERE / "mujoco" / "speed.csv"


def milliseconds(command):
    """Runs it, and returns what it says an update takes."""
    result = subprocess.run(command, capture_output=True, text=True)
    found = re.search(r"^(?:all parts +)?([\d.]+) ms(?:$|, median)", result.stdout, flags=re.MULTILINE)
    if result.returncode or not found:
        last_line = (result.stderr.strip() or result.stdout.strip() or "no output").splitlines()[-1]
        raise SystemExit(f"{' '.join(map(str, command))} failed: {last_line}")
    return float(found[1])


if __name__ == "__main__":
    args = tyro.cli(Args, description=__doc__)
    for path in (args.flow_rl, args.jax_python):
        if not path.exists():
            raise SystemExit(f"{path}: there is no such file or folder")
    kinds = {"float32": [], "float32, ddpm": ["--solver", "ddpm"]}
    if CPU.get("avx512_bf16") or CPU.get("amx_bf16"):  # elsewhere it is emulated
        kinds = {"bfloat16": []} | kinds
    rows = [["machine", "env_id", "program", "milliseconds"]]
    if args.csv.exists():
        rows = list(csv.reader(args.csv.open()))
    for env_id in tqdm(OBS_AND_ACTION):
        jax = [args.jax_python, HERE / "jax_speed.py", args.flow_rl, *OBS_AND_ACTION[env_id]]
        ours = [sys.executable, HERE / "speed.py", "--env-id", env_id]
        commands = {kind: [*ours, "--policy-dtype", kind.split(",")[0], *more] for kind, more in kinds.items()}
        for kind, command in {JAX: jax, **commands}.items():
            rows.append([args.machine, env_id, kind, milliseconds(command)])
    with args.csv.open("w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows(rows)
    times = defaultdict(list)
    for machine, env_id, kind, value in rows[1:]:
        if machine == args.machine:
            times[env_id, kind].append(float(value))
    for (env_id, kind), values in times.items():
        share = median(values) / median(times[env_id, JAX])
        print(f"{env_id} {kind:16} {', '.join(f'{x:.0f}' for x in values)} ms, {share:.2f} of JAX's")
