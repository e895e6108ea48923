"""Kills a training with signal 9 at random moments, resumes it each time, and compares it with an undisturbed one.

    python benchmark/kill_and_resume.py --kills 5 --seed 3  # of a HalfCheetah-v4 run: small networks, compiled
    python benchmark/kill_and_resume.py --out benchmark/kill_and_resume.csv     # 20 kills

Prints one line per kill and writes the steps as CSV; the exit code is 1 if anything differs.
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
    --total-timesteps 30000 --learning-starts 1000 --checkpoint-every 400 --eval-every 7500
    --eval-episodes 2 --eval-draws 3 --num-particles 8 --target-kl 0.9 --hidden-dim 64
    --batch-size 64 --compile --log-every 100"""


@dataclass
class Args:
    kills: int = 20  # how many times the run is killed
    seed: int = 1  # seed of the moments
    out: Path = Path("kill_and_resume.csv")


def start(script, flags, folder):
    command = [sys.executable, ROOT / f"{script}.py", *flags]
    return subprocess.Popen(command, cwd=folder, stdout=subprocess.DEVNULL, stderr=open(folder / "stderr", "w"))


def read_checkpoint(folder):
    """The checkpoint of the only run in the folder, or None if it has none yet."""
    paths = list(folder.glob("runs/*/checkpoint.pt"))
    return torch.load(paths[0], weights_only=True) if paths else None


def disturbed_run(script, flags, folder, kills, generator, longest=3.0):
    """Trains in folder; after each new checkpoint waits up to `longest` seconds and kills. Yields the step of the
    checkpoint at each kill; when the generator is exhausted the run has ended by itself, perhaps after fewer kills."""
    process, before = start(script, flags, folder), 0
    for _ in range(kills):
        step = before
        while process.poll() is None and step <= before:
            time.sleep(0.02)
            step = (read_checkpoint(folder) or {"global_step": 0})["global_step"]
        time.sleep(generator.uniform(0, longest))
        if process.poll() is not None:  # it was faster
            break
        process.send_signal(signal.SIGKILL)
        process.wait()
        before = read_checkpoint(folder)["global_step"]
        yield before
        (run_dir,) = folder.glob("runs/*")
        process = start(script, ["--resume", run_dir.relative_to(folder)], folder)
    if process.wait():
        raise SystemExit(f"the run failed: {(folder / 'stderr').read_text()[-500:]}")


def results(folder):
    """Everything that must be equal: the checkpoint, eval.csv without its seconds, scalars without speeds."""
    (run_dir,) = folder.glob("runs/*")
    state = read_checkpoint(folder)
    del state["args"], state["seconds"], state["evaluations"]  # args name the run; evaluations are eval.csv
    with open(run_dir / "eval.csv") as file:
        rows = [{name: x for name, x in row.items() if name != "seconds"} for row in csv.DictReader(file)]
    events = EventAccumulator(str(run_dir), size_guidance={"scalars": 0}).Reload()  # what TensorBoard shows
    names = [name for name in events.Tags()["scalars"] if not name.startswith("speed")]
    scalars = {name: [(event.step, event.value) for event in events.Scalars(name)] for name in names}
    return {"checkpoint.pt": state, "eval.csv": rows, "TensorBoard": scalars}


def differences(one, other, path=""):
    """The places where two nested results differ; an empty list if nothing does."""
    if isinstance(one, torch.Tensor):
        return [] if torch.equal(one, other) else [path]
    if isinstance(one, (dict, list)) and type(one) is type(other) and len(one) == len(other):
        keys = one if isinstance(one, dict) else range(len(one))
        if isinstance(one, list) or one.keys() == other.keys():
            return [found for key in keys for found in differences(one[key], other[key], f"{path}/{key}")]
    return [] if one == other else [path]


if __name__ == "__main__":
    args = tyro.cli(Args, description=__doc__)
    if not args.out.parent.is_dir():
        raise SystemExit(f"--out {args.out}: there is no such folder")
    generator = random.Random(args.seed)
    with tempfile.TemporaryDirectory() as calm, tempfile.TemporaryDirectory() as disturbed:
        if start("simpo_neg", FLAGS.split(), Path(calm)).wait():
            raise SystemExit((Path(calm) / "stderr").read_text())
        steps = []
        for step in disturbed_run("simpo_neg", FLAGS.split(), Path(disturbed), args.kills, generator):
            steps.append(step)
            print(f"kill {len(steps)}: the newest checkpoint is of step {step}", flush=True)
        found = differences(results(Path(calm)), results(Path(disturbed)))
    with open(args.out, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["kill", "newest_checkpoint", "differences_at_the_end"])
        writer.writerows([i + 1, step, "; ".join(found)] for i, step in enumerate(steps))
    print(f"{len(steps)} kills; different at the end: {', '.join(found) or 'nothing'}")
    raise SystemExit(bool(found))
