"""Runs scripts x environments x flags x seeds on this machine or a Ray cluster; the same command again goes on.

    python benchmark/sweep.py --scripts simpo_exp.py simpo_neg.py --env-ids HalfCheetah-v4 Hopper-v4 \
        --seeds 1 2 3 4 5 --flags "" "epsilon=1 power=2" --frame "total-timesteps=30000 hidden-dim=64"
    python benchmark/sweep.py --scripts simpo_exp.py "simpo_neg.py power=2" ...   # flags of one script only
    RAY_ADDRESS=auto python benchmark/sweep.py ...   # on a cluster; --out and the scripts on a disk that all nodes see

Each run has a folder of its own, OUT/SCRIPT/ENVIRONMENT/FLAGS/SEED/: `log`, `command`, `finished` if it is, and runs/
as the script makes it. A run that is killed, with its Ray worker or its node, is tried again from its checkpoint.
The table is printed and kept as OUT/table.csv. The exit code is 1 if a run failed. Memory is not reserved: where it is
short, a larger --cpus lets fewer runs at once.
"""

import fcntl
import itertools
import os
import shlex
import shutil
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

import numpy as np  # noqa: E402
import ray  # noqa: E402
import stats  # noqa: E402
import tyro  # noqa: E402
from tqdm import tqdm  # noqa: E402


@dataclass
class Args:
    scripts: list[str]  # paths, each with flags that it alone gets, if any: simpo_exp.py "simpo_neg.py power=2"
    env_ids: list[str]
    seeds: list[int]
    flags: list[str]  # without dashes; each is one more method: "" "epsilon=1 power=2" "no-compile"
    frame: str = ""  # flags that all runs get, written in the same way; not named in the table
    out: Path = Path("runs/sweep")  # folder of all runs
    cpus: float = 1  # CPU cores per run, and its threads
    gpus: float = 0  # GPUs per run; 0.25 puts four runs on one, 0 hides them from the runs
    retries: int = 10  # how often a run that was killed is tried again


class Killed(Exception):
    """The training was ended by a signal: it is worth another try."""


def train(folder, command, cpus, gpus):
    """Runs command in folder, or goes on where it was, unless it is finished; returns when it is.

    Raises Killed if a signal ended it, RuntimeError with one line that says why if it failed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    threads = str(max(1, int(cpus)))
    env = dict.fromkeys(["OMP_NUM_THREADS", "MKL_NUM_THREADS", "TORCHINDUCTOR_COMPILE_THREADS"], threads)
    env = os.environ | env | {"TQDM_DISABLE": "1"} | ({} if gpus else {"CUDA_VISIBLE_DEVICES": ""})
    # The training holds the lock, too, so that it is never joined by another one when this worker is killed.
    with open(folder / "lock", "a") as lock, open(folder / "log", "a") as log:
        fcntl.flock(lock, fcntl.LOCK_EX)
        lock.truncate(0)
        print(os.getpid(), "on", os.uname().nodename, file=lock, flush=True)
        if (folder / "command").exists() and (folder / "command").read_text() != shlex.join(command):
            raise RuntimeError(f"{folder} was made by another command, see {folder / 'command'}; choose another --out")
        (folder / "command.unfinished").write_text(shlex.join(command))
        os.replace(folder / "command.unfinished", folder / "command")
        if (folder / "finished").exists():
            return
        checkpoints = list(folder.glob("runs/*/checkpoint.pt"))
        if checkpoints:
            command = [*command, "--resume", str(checkpoints[0].parent.relative_to(folder))]
        else:  # it was killed before there was anything to go on from
            shutil.rmtree(folder / "runs", ignore_errors=True)
        print(f"$ {shlex.join(command)}", file=log, flush=True)
        # A watcher reads a pipe that this worker alone holds: when it dies, the training gets SIGTERM, saves and stops.
        shell = 'exec FD<&0; "$@" </dev/null FD<&- & run=$!; '
        shell += "{ read -r _ <&FD; kill -TERM $run; } 2>/dev/null & watch=$!; "
        shell += "exec FD<&-; wait $run; code=$?; kill $watch 2>/dev/null; exit $code"
        shell = shell.replace("FD", "4" if lock.fileno() == 3 else "3")
        options = dict(cwd=folder, env=env, pass_fds=[lock.fileno()], start_new_session=True)  # Ctrl-C is not for it
        options |= dict(stdin=subprocess.PIPE, stdout=log, stderr=log)
        code = subprocess.Popen(["sh", "-c", shell, "sh", sys.executable, *command], **options).wait()
        last = last_line((folder / "log").read_text(errors="replace"))
        if code < 0 or code > 128:
            raise Killed(f"killed by signal {-code if code < 0 else code - 128}, again and again; {folder}/log: {last}")
        if code:
            raise RuntimeError(f"exit code {code}; {folder}/log: {last}")
        if len(list(folder.glob("runs/*/eval.csv"))) != 1:
            raise RuntimeError(f"it ended well, yet {folder}/runs has no eval.csv")
        (folder / "finished").touch()


def last_line(text):
    """The last line, or what stands in the last box that tyro has drawn around its message, above its rule."""
    lines = text.splitlines()
    if lines[-1].startswith("╰"):
        box = [line.strip("│ ") for line in text.rpartition("╭")[2].splitlines()[1:-1]]
        return " ".join(itertools.takewhile(lambda line: not line.startswith("─"), box))
    return lines[-1]


if __name__ == "__main__":
    args = tyro.cli(Args, description=__doc__)
    if not (args.scripts and args.env_ids and args.seeds and args.flags):
        raise SystemExit('--scripts, --env-ids, --seeds and --flags need a value each; --flags "" adds none')
    if args.cpus <= 0 or args.gpus < 0 or args.retries < 0:
        raise SystemExit("--cpus must be above 0, --gpus and --retries at least 0")
    for entry in args.scripts:
        script = "".join(entry.split()[:1])
        if not Path(script).is_file():
            raise SystemExit(f"--scripts {script}: there is no such file")
    os.environ.setdefault("RAY_task_oom_retries", str(args.retries))  # of what Ray kills where memory runs short
    quiet = dict(log_to_driver=False, include_dashboard=False, logging_level="ERROR")
    ray.init(os.environ.get("RAY_ADDRESS", "local"), **quiet)
    stop_signals = []
    for number in (signal.SIGINT, signal.SIGTERM):  # in place of Ray's, which end in a traceback
        signal.signal(number, lambda number, _: stop_signals.append(number))
    for name, wanted in ("CPU", args.cpus), ("GPU", args.gpus):
        if wanted > max(node["Resources"].get(name, 0) for node in ray.nodes()):
            raise SystemExit(f"--{name.lower()}s {wanted}: no machine here has as many")
    options = dict(num_cpus=args.cpus, num_gpus=args.gpus, max_retries=args.retries, retry_exceptions=[Killed])
    task = ray.remote(train).options(**options)
    running = {}
    for entry, env_id, flags, seed in itertools.product(args.scripts, args.env_ids, args.flags, args.seeds):
        script, *own = entry.split()
        flags = " ".join([*own, *flags.split()])
        place = Path(script).stem, env_id.replace("/", "-"), flags.replace("/", "-") or "none", str(seed)
        folder = args.out.resolve().joinpath(*place)
        command = [str(Path(script).resolve()), "--env-id", env_id, "--seed", str(seed)]
        command += [f"--{flag}" for flag in [*args.frame.split(), *flags.split()]]
        running[task.remote(folder, command, args.cpus, args.gpus)] = folder, (script, env_id, flags), seed

    values = {method: {} for _, method, _ in running.values()}  # (script, environment, flags) -> {seed: return}
    failed, before = [], {folder for folder, *_ in running.values() if (folder / "finished").exists()}
    progress = tqdm(total=len(running) - len(before), unit="run", smoothing=0, dynamic_ncols=True)
    while running:
        done, _ = ray.wait(list(running), timeout=1)
        for run in done:
            folder, method, seed = running.pop(run)
            progress.update(folder not in before)
            try:
                ray.get(run)
                (path,) = folder.glob("runs/*/eval.csv")
                values[method][seed] = stats.read(path)[1][-1]
            except Exception as error:  # whatever it is, the others go on
                reason = str(getattr(error, "cause", None) or error).strip().splitlines()
                failed.append(f"FAILED {' '.join(method)} seed {seed}: {reason[0]}")
                progress.write(failed[-1])
        progress.refresh()
        if stop_signals:
            progress.write("interrupted: the trainings save and stop; the same command goes on with them")
            raise SystemExit(128 + stop_signals[0])
    progress.close()

    rows = []
    for (script, env_id, flags), returns in values.items():
        if not returns:
            continue
        figures = map(float, stats.interval(stats.iqm, np.array(list(returns.values()))))
        rows.append([Path(script).name, env_id, flags, " ".join(map(str, sorted(returns))), *figures])
    stats.write(args.out / "table.csv", "script environment flags seeds iqm low high".split(), rows)
    print(*failed, sep="\n")
    raise SystemExit(bool(failed))
