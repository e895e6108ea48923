"""benchmark/sweep.py: whatever is killed, runs end as undisturbed ones do; a failed one is named and stops no other."""

import csv
import os
import runpy
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
from conftest import ROOT

sys.path.append(str(ROOT / "benchmark"))
from sweep import last_line

# It has the flags, files and signals of a training, and computes a chain of numbers, 10 to a checkpoint. While there is
# a file of its name in the folder $HOLD, it gets no further than step 35: then it can be killed at leisure.
STAND_IN = """
import argparse, json, os, signal, sys, time
from pathlib import Path
parser = argparse.ArgumentParser()
for flag in ("--env-id", "--seed", "--resume"):
    parser.add_argument(flag)
parser.add_argument("--crash", action="store_true")
args = parser.parse_args()
if args.crash:
    os.kill(os.getpid(), signal.SIGKILL)
stop = []
signal.signal(signal.SIGTERM, lambda number, _: stop.append(number))
run = Path(args.resume or f"runs/stand_in__{args.seed}__{time.time_ns()}")
run.mkdir(parents=True, exist_ok=True)
Path("machine").write_text(os.environ["OMP_NUM_THREADS"] + " " + os.environ.get("CUDA_VISIBLE_DEVICES", "all"))
checkpoint = run / "checkpoint.pt"
new = [0, int(args.seed or 0) * len(args.env_id or ""), [], args.env_id, args.seed]
state = json.loads(checkpoint.read_text()) if args.resume else new
step, x, rows, args.env_id, args.seed = state
while step < 60:
    while step == 35 and not stop and Path(os.environ["HOLD"], args.env_id + args.seed).exists():
        time.sleep(0.02)
    step, x = step + 1, x * 48271 % 65537
    with open("steps", "a") as file:
        print(os.getpid(), step, file=file)
    if step % 10 == 0:
        rows.append(f"{step},{x},0,{time.time()},{x}")
        header = "step,mean,std,seconds,returns"
        (run / "eval.csv").write_text("\\n".join([header, *rows]) + "\\n")
    if step % 10 == 0 or stop:
        (run / "unfinished").write_text(json.dumps([step, x, rows, args.env_id, args.seed]))
        os.replace(run / "unfinished", checkpoint)
    if stop:
        sys.exit(128 + stop[0])
"""


@pytest.fixture
def sweep(tmp_path, monkeypatch):
    """Starts `sweep.py FLAGS --out OUT` in tmp_path, where stand_in.py is; what still runs at the end is killed."""
    (tmp_path / "stand_in.py").write_text(STAND_IN)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("RAY_worker_niceness", "0")  # by itself 15
    monkeypatch.setenv("HOLD", str(tmp_path / "hold"))
    (tmp_path / "hold").mkdir()
    started = []

    def start(*flags):
        command = [sys.executable, ROOT / "benchmark" / "sweep.py", *flags, "--out", "OUT"]
        pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        started.append(subprocess.Popen(command, cwd=tmp_path, **pipes))
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.communicate()


def wait_for(condition):
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def evaluations(folder):
    """eval.csv of the only run in folder, without the seconds that it took."""
    (path,) = folder.glob("runs/*/eval.csv")
    with open(path) as file:
        return [{name: x for name, x in row.items() if name != "seconds"} for row in csv.DictReader(file)]


def undisturbed(folder, script, *flags):
    folder.mkdir()
    subprocess.run([sys.executable, script, *flags], cwd=folder, check=True, capture_output=True)
    return evaluations(folder)


def wait_for_steps(folder, steps):
    wait_for(lambda: (folder / "steps").exists() and len((folder / "steps").read_text().splitlines()) >= steps)


def kill_worker(folder):
    """Kills the Ray worker of a run, and not the training, which is another process."""
    os.kill(int((folder / "lock").read_text().split()[0]), signal.SIGKILL)


def processes(folder):
    """Process ids in the order in which they trained in folder, and the steps that they made."""
    pids, steps = zip(*(map(int, line.split()) for line in (folder / "steps").read_text().splitlines()), strict=True)
    turns = [pid for pid, before in zip(pids, (None, *pids), strict=False) if pid != before]
    return turns, list(steps)


def test_killed_runs_end_as_undisturbed_ones_and_failures_are_named(sweep, tmp_path):
    flags = ["--scripts", "stand_in.py", "--env-ids", "A", "dm/BC", "--seeds", "1", "2", "--retries", "2", "--flags"]
    flags += ["", "crash", "no-such-flag=1"]
    (tmp_path / "hold" / "A1").touch()
    (tmp_path / "hold" / "A2").touch()
    process = sweep(*flags)
    place = tmp_path / "OUT" / "stand_in"
    runs = {(env, seed): place / env.replace("/", "-") / "none" / seed for env in ("A", "dm/BC") for seed in "12"}
    wait_for_steps(runs["A", "1"], 35)
    kill_worker(runs["A", "1"])
    wait_for_steps(runs["A", "1"], 36)  # the training has got SIGTERM: it makes one more step and stops
    (tmp_path / "hold" / "A1").unlink()
    killed = runs["A", "2"]
    wait_for_steps(killed, 35)
    os.kill(processes(killed)[0][-1], signal.SIGKILL)
    (tmp_path / "hold" / "A2").unlink()
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 1

    # The four good runs: as if nothing had been, the disturbed ones in two turns and not from the start again.
    for (env, seed), folder in runs.items():
        expected = undisturbed(tmp_path / f"{env[0]}{seed}", tmp_path / "stand_in.py", "--env-id", env, "--seed", seed)
        assert len(expected) == 6 and evaluations(folder) == expected
        turns, steps = processes(folder)
        assert len(turns) == (2 if env == "A" else 1) and steps.count(1) == 1 and steps[-1] == 60
    _, steps = processes(runs["A", "1"])
    assert steps == list(range(1, 61))  # it was asked to stop, and saved

    # The others: named with their flags and the last line of the log, tried again only where a signal ended them.
    failures = set(line for line in output.splitlines() if line.startswith("FAILED"))
    assert len(failures) == 8
    for env in ("A", "dm/BC"):
        for seed in "12":
            crashed, wrong = (
                place / env.replace("/", "-") / flags / seed / "log" for flags in ("crash", "no-such-flag=1")
            )
            assert crashed.read_text().count("$ ") == 3
            assert wrong.read_text().count("$ ") == 1
            (line,) = (line for line in failures if str(wrong) in line)
            assert f"{env} no-such-flag=1 seed {seed}" in line
            assert line.endswith("stand_in.py: error: unrecognized arguments: --no-such-flag=1")

    # The table: of two runs the interquartile mean is the mean; they are too few for an interval.
    with open(tmp_path / "OUT" / "table.csv") as file:
        table = list(csv.DictReader(file))
    assert [(row["script"], row["environment"], row["flags"], row["seeds"]) for row in table] == [
        ("stand_in.py", env, "", "1 2") for env in ("A", "dm/BC")
    ]
    for row in table:
        ends = [float(evaluations(runs[row["environment"], seed])[-1]["mean"]) for seed in "12"]
        assert float(row["iqm"]) == pytest.approx(sum(ends) / 2, rel=1e-3) and row["low"] == row["high"] == "nan"


def test_interrupted_sweep_goes_on_and_runs_nothing_twice(sweep, tmp_path):
    flags = [*"--scripts stand_in.py --env-ids A --seeds 1 2 3 --flags".split(), ""]
    folders = [tmp_path / "OUT" / "stand_in" / "A" / "none" / seed for seed in "123"]
    (tmp_path / "hold" / "A3").touch()
    first = sweep(*flags)
    wait_for_steps(folders[2], 35)
    wait_for(lambda: (folders[0] / "finished").exists())
    first.send_signal(signal.SIGTERM)
    assert first.wait(60) == 128 + signal.SIGTERM
    (tmp_path / "hold" / "A3").unlink()
    second = sweep(*flags)
    output, _ = second.communicate(timeout=60)
    assert second.returncode == 0 and "1 2 3" in output
    for folder in folders:
        turns, steps = processes(folder)
        assert steps == list(range(1, 61))  # none is lost, none is made twice
        assert len(turns) == (2 if folder is folders[2] else 1) or folder is folders[1]


def test_two_never_train_in_one_folder(tmp_path, sweep):
    code = "import sys; from pathlib import Path; import sweep; sweep.train(Path('run'), sys.argv[1:], 2, 0)"
    command = [sys.executable, "-c", code, str(tmp_path / "stand_in.py"), "--env-id", "A", "--seed", "1"]
    start = dict(cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT / "benchmark")})
    (tmp_path / "hold" / "A1").touch()
    workers = [subprocess.Popen(command, **start), subprocess.Popen(command, **start)]
    wait_for_steps(tmp_path / "run", 35)
    ((training,), steps) = processes(tmp_path / "run")
    os.kill(training, signal.SIGSTOP)  # the worker of this training dies, and the training does not notice
    (holder,) = (x for x in workers if x.pid == int((tmp_path / "run" / "lock").read_text().split()[0]))
    (waiter,) = (x for x in workers if x is not holder)
    holder.kill()
    (tmp_path / "hold" / "A1").unlink()
    time.sleep(1)
    waits = waiter.poll() is None and len(processes(tmp_path / "run")[0]) == 1
    os.kill(training, signal.SIGCONT)
    assert waits
    assert waiter.wait(30) == 0
    turns, steps = processes(tmp_path / "run")
    assert len(turns) == 2 and steps == list(range(1, 61))
    assert (tmp_path / "run" / "machine").read_text() == "2 "  # threads, and no GPU

    before = (tmp_path / "run" / "log").read_text()
    assert subprocess.run(command, **start).returncode == 0  # it is finished: nothing is done
    other = subprocess.run([*command, "--crash"], **start, capture_output=True, text=True)
    assert other.returncode == 1 and "was made by another command" in other.stderr
    assert (tmp_path / "run" / "log").read_text() == before


def test_commands_have_the_flags_of_frame_script_and_method_in_this_order(tmp_path, monkeypatch):
    """The later ones win. Ray is replaced: nothing runs."""
    made = []
    task = SimpleNamespace(remote=lambda folder, command, *_: made.append((folder, command)) or len(made))
    ray = SimpleNamespace(init=lambda *_, **__: None, nodes=lambda: [{"Resources": {"CPU": 9}}])
    ray.remote = lambda _: SimpleNamespace(options=lambda **_: task)
    ray.wait, ray.get = lambda runs, timeout: (runs, []), lambda run: 1 / 0
    monkeypatch.setitem(sys.modules, "ray", ray)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "out").mkdir()
    (tmp_path / "a.py").touch()
    flags = ["--scripts", "a.py p=2", "--env-ids", "E", "--seeds", "3", "4", "--flags", "q=1 r=5", "--frame", "q=0 s=1"]
    monkeypatch.setattr(sys, "argv", ["sweep.py", *flags, "--out", "out"])
    with pytest.raises(SystemExit):
        runpy.run_path(str(ROOT / "benchmark/sweep.py"), run_name="__main__")
    for seed, (folder, command) in zip("34", made, strict=True):
        assert folder == tmp_path / "out/a/E/p=2 q=1 r=5" / seed
        assert command == f"{tmp_path / 'a.py'} --env-id E --seed {seed} --q=0 --s=1 --p=2 --q=1 --r=5".split()


def test_last_line_of_a_log_is_all_of_a_box():
    box = ["╭─ Unrecognized options ─╮", "│ No such options: --a,  │", "│ --b                    │"]
    box += ["│ ────────────────────── │", "│ For full helptext, ... │", "╰────────────────────────╯"]
    assert last_line("\n".join(["$ simpo_neg.py", *box])) == "No such options: --a, --b"
    assert last_line("Traceback\nValueError: no") == "ValueError: no"


def test_a_training_ends_the_same_after_its_worker_was_killed(sweep, tmp_path):
    script = ROOT / "simpo_neg.py"
    frame = "total-timesteps=500 learning-starts=50 eval-every=250 checkpoint-every=100 eval-episodes=2 eval-draws=2"
    frame += " num-particles=4 target-kl=0.7 hidden-dim=16 batch-size=16 diffusion-steps=3 no-compile device=cpu"
    process = sweep(
        "--scripts", str(script), "--env-ids", "Pendulum-v1", "--seeds", "1", "--flags", "", "--frame", frame
    )
    folder = tmp_path / "OUT" / "simpo_neg" / "Pendulum-v1" / "none" / "1"
    wait_for(lambda: list(folder.glob("runs/*/checkpoint.pt")))
    kill_worker(folder)
    flags = ["--env-id", "Pendulum-v1", "--seed", "1", *(f"--{flag}" for flag in frame.split())]
    expected = undisturbed(tmp_path / "alone", script, *flags)
    process.communicate(timeout=120)
    assert process.returncode == 0
    again = [line for line in (folder / "log").read_text().splitlines() if line.startswith("$") and "--resume" in line]
    assert again and all("--env-id" in line for line in again)  # a launcher needs its flags then, too
    assert len(expected) == 2 and evaluations(folder) == expected
