"""Milliseconds per update of a training as it runs: its environments, its update and its logs, without evaluations.

    python benchmark/train_speed.py simpo_neg.py baselines/qsm.py
    OMP_NUM_THREADS=1 python benchmark/train_speed.py "simpo_neg.py num-particles=8" --frame "hidden-dim=64"

Flags of one script, or in --frame of all, are written as in sweep.py. Prints CSV: script, flags, milliseconds. speed.py
times the parts of an update one by one, with warm caches, so that they add up to less.
"""

import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import tyro
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator


@dataclass
class Args:
    scripts: tyro.conf.Positional[list[str]] = field(default_factory=lambda: ["simpo_neg.py"])  # each with its flags
    env_id: str = "HalfCheetah-v4"
    frame: str = ""  # flags that all scripts get
    steps_per_update: int = 5  # environment steps per update
    updates: int = 1000  # timed updates, in twenty parts, of which the median is printed; as many come before


def milliseconds(script, args):
    """Trains in a folder that goes away -> milliseconds per update, median over parts of the training's second half.

    Raises SystemExit with the last line of what the script said, if it failed, and for a flag that is set here.
    """
    path, *flags = script.split()
    part = -(-args.updates * args.steps_per_update // 100) * 5  # environment steps, a multiple of 5 environments
    steps = dict(learning_starts=1000, total_timesteps=1000 + 40 * part, log_every=part, eval_every=0)
    own = dict(env_id=args.env_id, steps_per_update=args.steps_per_update) | steps
    command = [sys.executable, Path(path).resolve(), *(f"--{name.replace('_', '-')}={own[name]}" for name in own)]
    for flag in [*args.frame.split(), *flags]:
        if flag.split("=")[0].replace("-", "_") in own:
            raise SystemExit(f"{flag}: {', '.join(own)} are this script's own; leave it out, or give its flag here")
    with tempfile.TemporaryDirectory() as folder:
        command += [f"--{flag}" for flag in [*args.frame.split(), *flags]]
        run = subprocess.run(command, cwd=folder, capture_output=True, text=True)
        if run.returncode:
            raise SystemExit(f"{path}: {(run.stderr or run.stdout).strip().splitlines()[-1]}")
        events = EventAccumulator(str(*Path(folder).glob("runs/*"))).Reload().Scalars("loss/critic")
    times = [event.wall_time for event in events][-21:]
    return 1e3 * args.steps_per_update / part * statistics.median(b - a for a, b in zip(times, times[1:], strict=False))


if __name__ == "__main__":
    args = tyro.cli(Args, description=__doc__)
    print("script,flags,milliseconds")
    for entry in args.scripts:
        script, *flags = entry.split()
        print(f"{Path(script).stem},{' '.join(flags)},{milliseconds(entry, args):.2f}", flush=True)
