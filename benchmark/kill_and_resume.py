"""Kills a training with signal 9 at random moments, resumes it each time, and compares it with an undisturbed one.

    python benchmark/kill_and_resume.py                     # 20 kills of a real run: HalfCheetah-v4, small networks
    python benchmark/kill_and_resume.py --kills 5 --seed 3

Prints one line per kill and writes benchmark/kill_and_resume.csv; the exit code is 1 if anything differs.
"""

import csv
import random
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

ROOT = Path(__file__).parent.parent
FLAGS = """--env-id HalfCheetah-v4
    --total-timesteps 12000 --learning-starts 1000 --checkpoint-every 400 --eval-every 3000
    --eval-episodes 2 --eval-draws 3 --num-particles 8 --target-kl 0.9 --hidden-dim 64 --diffusion-steps 10
    --batch-size 64 --no-compile --log-every 100"""


@dataclass
class Args:
    kills: int = 20
    """how many times the run is killed"""
    seed: int = 1
    """seed of the moments"""


def start(script, flags, folder):
    command = [sys.executable, ROOT / f"{script}.py", *flags]
    return subprocess.Popen(command, cwd=folder, stdout=subprocess.DEVNULL, stderr=open(folder / "stderr", "w"))


def newest_checkpoint(run_dir):
    return max((int(path.name[6:]) for path in run_dir.glob("checkpoint/state_*[0-9]")), default=0)


def disturbed_run(script, flags, folder, kills, generator, longest=3.0):
    """Trains in folder; after each new checkpoint waits up to `longest` seconds and kills. Yields the steps of the
    newest checkpoint at each kill; when the generator is exhausted the run has ended by itself."""
    process = start(script, flags, folder)
    before = 0
    for _ in range(kills):
        while process.poll() is None and not any(newest_checkpoint(run) > before for run in folder.glob("runs/*")):
            time.sleep(0.002)
        time.sleep(generator.uniform(0, longest))
        if process.poll() is not None:
            raise SystemExit(f"the run ended before the kill: {(folder / 'stderr').read_text()[-500:]}")
        process.send_signal(signal.SIGKILL)
        process.wait()
        (run_dir,) = folder.glob("runs/*")
        before = newest_checkpoint(run_dir)
        yield before
        process = start(script, ["--resume", run_dir.relative_to(folder)], folder)
    if process.wait():
        raise SystemExit(f"the run failed: {(folder / 'stderr').read_text()[-500:]}")


def results(folder):
    """Everything that must be equal: weights, evaluations without their seconds, scalars without speeds."""
    (run_dir,) = folder.glob("runs/*")
    model = torch.load(run_dir / "model.pt", weights_only=True)
    weights = {f"{part}.{name}": x for part in ("policy", "critic") for name, x in model[part].items()}
    with open(run_dir / "eval.csv") as file:
        rows = [{name: x for name, x in row.items() if name != "seconds"} for row in csv.DictReader(file)]
    scalars = []
    for path in sorted(run_dir.glob("events.*")):  # file by file, so that nothing is hidden from the comparison
        events = EventAccumulator(str(path), size_guidance={"scalars": 0})
        events.Reload()
        names = [name for name in events.Tags()["scalars"] if not name.startswith("speed")]
        scalars += [(name, event.step, event.value) for name in names for event in events.Scalars(name)]
    return weights, rows, sorted(scalars)


def differences(one, other):
    """What differs, in words; an empty list if nothing does."""
    (weights, rows, scalars), (other_weights, other_rows, other_scalars) = one, other
    found = [name for name, x in weights.items() if not torch.equal(x, other_weights[name])]
    found += ["eval.csv"] * (rows != other_rows) + ["TensorBoard scalars"] * (scalars != other_scalars)
    return found


if __name__ == "__main__":
    args = tyro.cli(Args, description=__doc__)
    generator = random.Random(args.seed)
    with tempfile.TemporaryDirectory() as calm, tempfile.TemporaryDirectory() as disturbed:
        if start("simpo_neg", FLAGS.split(), Path(calm)).wait():
            raise SystemExit((Path(calm) / "stderr").read_text())
        steps = []
        for step in disturbed_run("simpo_neg", FLAGS.split(), Path(disturbed), args.kills, generator):
            steps.append(step)
            print(f"kill {len(steps)}: the newest checkpoint is of step {step}", flush=True)
        found = differences(results(Path(calm)), results(Path(disturbed)))
    with open(Path(__file__).with_suffix(".csv"), "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["kill", "newest_checkpoint", "differences_at_the_end"])
        writer.writerows([i + 1, step, "; ".join(found)] for i, step in enumerate(steps))
    print(f"{args.kills} kills; different at the end: {', '.join(found) or 'nothing'}")
    raise SystemExit(bool(found))
