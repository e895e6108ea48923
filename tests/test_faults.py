"""What a full or read-only disk, a number that is not finite and a missing account do: one line, nothing destroyed."""

import os
import re
import resource
import shutil
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from conftest import ROOT, SMALL
from test_resume import FLAGS, at_step

import simpo_neg
from benchmark.kill_and_resume import differences, read_checkpoint, results

TRACK = ["--track", "--env-id", "Pendulum-v1", *SMALL, "--learning-starts", "100", "--eval-every", "0"]
TRACK += ["--log-every", "50"]

# In an empty disk of 1 MB that only this process sees: trains to step 200, fills the disk, goes on, makes room, ...
SMALL_DISK = """
import os, runpy, subprocess, sys, traceback
script = sys.argv[1]
def run(*flags):
    sys.argv = [script, *flags]
    try:
        runpy.run_path(script, run_name="__main__")
        print("ENDED", flush=True)
    except BaseException as error:
        sys.excepthook(type(error), error, error.__traceback__)
run(*"FLAGS --total-timesteps 200".split())
(run_dir,) = os.listdir("runs")
resume = ["--resume", f"runs/{run_dir}", "--total-timesteps", "800"]
subprocess.run("dd if=/dev/zero of=fill bs=4k".split(), stderr=subprocess.DEVNULL)
print("FULL", flush=True)
run(*resume)
os.remove("fill")
subprocess.run("mount -o remount,ro .".split(), check=True)
print("READ-ONLY", flush=True)
run(*resume)
subprocess.run("mount -o remount,rw .".split(), check=True)
print("ROOM", flush=True)
run(*resume)
print("TABLE", *open(f"runs/{run_dir}/eval.csv"), flush=True)
"""


def test_full_and_read_only_disk(tmp_path):
    """The run stops with one line that names the path; given room, --resume goes on from the last checkpoint."""
    flags = ["--env-id", "Pendulum-v1", *SMALL, "--learning-starts", "100", "--checkpoint-every", "100"]
    flags += ["--eval-every", "200", "--eval-episodes", "2", "--log-every", "5"]
    (tmp_path / "driver.py").write_text(SMALL_DISK.replace("FLAGS", " ".join(flags)))
    (tmp_path / "disk").mkdir()
    commands = f"cd {tmp_path}/disk; mount -t tmpfs -o size=1m tmpfs .; cd {tmp_path}/disk; "
    commands += f"exec {sys.executable} ../driver.py {ROOT}/simpo_neg.py"
    command = ["unshare", "--user", "--map-root-user", "--mount", "bash", "-c", f"set -e; {commands}"]
    if not shutil.which("unshare") or subprocess.run([*command[:4], "true"], capture_output=True).returncode:
        pytest.skip("needs Linux namespaces to mount a small disk")
    env = os.environ | {"TQDM_DISABLE": "1", "MPLCONFIGDIR": str(tmp_path)}
    result = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=env)
    parts = re.split("^(FULL|READ-ONLY|ROOM|TABLE)", result.stdout, flags=re.M)
    assert parts[1::2] == ["FULL", "READ-ONLY", "ROOM", "TABLE"], result.stdout
    first, full, read_only, room, table = parts[::2]
    assert "ENDED" in first and "ENDED" in room and "stopped" not in first + room, result.stdout
    for text, reason in [(full, "No space left on device"), (read_only, "Read-only file system")]:
        (line,) = [line for line in text.splitlines() if "stopped" in line]
        assert reason in line and re.search(r"--resume runs/Pendulum-v1__simpo_neg__1__\S+$", line), text
        assert "Traceback" not in text and "ENDED" not in text, text
    assert re.findall(r"^ *(\w+),", table, flags=re.M) == ["step", "200", "400", "600", "800"], table


def test_a_write_that_fails_within_a_checkpoint(run_script, capsys):
    """In the middle of a large record torch.save raises RuntimeError: still one line, and the old checkpoint stays."""
    flags = ["--env-id", "small_envs:PointMass-v0", *SMALL, "--learning-starts", "20000", "--eval-every", "0"]
    run_dir = run_script("simpo_neg", *flags, "--total-timesteps", "10000")
    before = (run_dir / "checkpoint.pt").read_bytes()
    capsys.readouterr()
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, limit[1]))
    try:
        with pytest.raises(RuntimeError) as error:
            run_script("simpo_neg", "--resume", run_dir, "--total-timesteps", "10100")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    sys.excepthook(error.type, error.value, error.tb)
    *_, line = capsys.readouterr().err.splitlines()  # after the progress bar
    assert line.startswith("stopped: [Errno 27] File too large") and line.endswith(f"--resume {run_dir}")
    assert (run_dir / "checkpoint.pt").read_bytes() == before


def nan_observation(result):
    return (np.full(1, np.nan, np.float32), *result[1:])


def huge_observation(result):
    return (np.full(1, 1e39), *result[1:])  # finite, but not in float32


def infinite_reward(result):
    return (result[0], float("inf"), *result[2:])


@pytest.mark.parametrize(
    "do, name, every, kept_step",
    [
        (nan_observation, "observation", 60, 240),
        (huge_observation, "observation", 0, 0),
        (infinite_reward, "reward", 0, 0),
    ],
)
def test_what_the_environment_gives_is_not_finite(run_in, monkeypatch, tmp_path, do, name, every, kept_step):
    """It stops; and events that were on the disk, but not in the checkpoint, are not shown twice after it."""
    flags = [*FLAGS, "--eval-every", "300", "--checkpoint-every", str(every)]
    run_in("calm", "simpo_neg", *flags)
    writers, make = [], torch.utils.tensorboard.SummaryWriter
    with monkeypatch.context() as patch:
        kept = lambda *args, **kwargs: writers.append(make(*args, **kwargs)) or writers[-1]  # noqa: E731
        patch.setattr(torch.utils.tensorboard, "SummaryWriter", kept)
        at_step(patch, 299, do)  # of 5 environments: in step 300, before any evaluation
        run_dir, code = run_in("run", "simpo_neg", *flags)
    run = run_dir.relative_to(tmp_path / "run")
    assert code == f"stopped at step 300: {name} is not finite; --resume {run} goes back"
    writers[-1].close()  # as at the end of a process
    assert read_checkpoint(tmp_path / "run")["global_step"] == kept_step
    assert run_in("run", "simpo_neg", "--resume", run_dir)[1] is None
    assert not differences(results(tmp_path / "calm"), results(tmp_path / "run"))


def test_an_error_of_the_environment_is_shown_whole(run_in, monkeypatch, capsys):
    """Also one that was raised while it handled an OSError: only torch.save's hides what counts."""

    def no_terrain(result):
        try:
            open("terrain.npy")
        except FileNotFoundError:
            raise ValueError("no terrain for level 7") from None

    at_step(monkeypatch, 299, no_terrain)
    run_dir, code = run_in("run", "simpo_neg", *FLAGS)
    error = capsys.readouterr().err
    assert code == 1 and "ValueError: no terrain for level 7" in error and "Traceback" in error
    assert ":" not in run_dir.name  # of small_envs:PointMass-v0; Windows, scp and rsync take it for something else


@pytest.mark.parametrize("function, name", [("mse_loss", "critic_loss"), ("one_hot", "policy_loss")])
def test_a_loss_is_not_finite(run_in, monkeypatch, function, name):
    calls, whole = iter(range(1, 10**9)), getattr(torch.nn.functional, function)
    broken = lambda *inputs: whole(*inputs) * (float("nan") if next(calls) == 30 else 1)  # noqa: E731
    monkeypatch.setattr(torch.nn.functional, function, broken)
    run_dir, code = run_in("run", "simpo_neg", *FLAGS)
    assert code.startswith(f"stopped at step 250: {name} is not finite; --resume runs/")
    state = simpo_neg.load(run_dir / "checkpoint.pt")
    assert state["global_step"] == 240
    assert all(x.isfinite().all() for part in ("policy", "critic") for x in state[part].values())


def test_networks_that_are_not_finite_are_never_saved(run_in, monkeypatch):
    """A loss that is finite in the last update, whose step is not: the checkpoint stays the one before."""
    monkeypatch.setattr(torch, "_foreach_lerp_", lambda mine, theirs, tau: theirs[0].fill_(float("inf")))
    run_dir, code = run_in("run", "simpo_neg", *FLAGS, "--learning-starts", "115", "--total-timesteps", "120")
    assert code.startswith("stopped at step 120: critic.twins.0.0.weight is not finite")
    assert simpo_neg.load(run_dir / "checkpoint.pt")["global_step"] == 60


@pytest.fixture
def wandb():
    """As it is in a new process: it keeps settings, and changes TensorBoard."""
    import wandb

    wandb.teardown()
    yield wandb
    wandb.finish()
    wandb.teardown()
    wandb.tensorboard.unpatch()


def test_no_account_for_track(run_in, wandb, monkeypatch, tmp_path, capsys):
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    run_dir, code = run_in("run", "simpo_neg", *TRACK, "--total-timesteps", "10")
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "stopped" in line]
    assert code == 1 and "API key" in line and "--resume runs/" in line


def test_track_offline(run_in, wandb, monkeypatch):
    """Arguments and scalars go to Weights & Biases; without an account, to files that `wandb sync` takes."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    flags = [*TRACK, "--env-id", "small_envs:PointMass-v0", "--total-timesteps", "150"]
    run_dir, code = run_in("run", "simpo_neg", *flags)
    assert code is None
    wandb.finish()
    (file,) = run_dir.glob("wandb/offline-run-*/*.wandb")
    deadline = time.time() + 60  # another process writes it
    while not (b"old_policy_interval" in file.read_bytes() and b"loss/critic" in file.read_bytes()):
        assert time.time() < deadline, file.read_bytes()
        time.sleep(0.1)
