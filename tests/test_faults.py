"""What survives a kill, a signal, a full or read-only disk, a damaged file and a number that is not finite."""

import csv
import hashlib
import io
import os
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import small_envs
import torch
from conftest import ROOT, SMALL

import simpo_neg
from benchmark.kill_and_resume import differences, disturbed_run, results, start

# The buffer is smaller than the run, and --log-every, --eval-every and --checkpoint-every fall on different steps.
FLAGS = ["--env-id", "small_envs:PointMass-v0", *SMALL, "--learning-starts", "100", "--total-timesteps", "600"]
FLAGS += ["--checkpoint-every", "60", "--eval-every", "90", "--buffer-size", "150", "--log-every", "35"]
FLAGS += ["--old-policy-interval", "10"]


@pytest.fixture
def run_in(tmp_path, monkeypatch, run_script):
    """Like run_script, in a directory of that name; returns the run's directory and the SystemExit's code, if any."""

    def run(name, script, *flags):
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        monkeypatch.chdir(folder)
        try:
            run_script(script, *flags)
            code = None
        except SystemExit as end:
            code = end.code
        finally:
            for number in (signal.SIGINT, signal.SIGTERM):
                signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
        (run_dir,) = (folder / "runs").iterdir()
        return run_dir, code

    return run


def at_step(monkeypatch, number, do):
    """Calls do(result) in the number-th call of PointMass.step; what it returns, if anything, is the step's result.

    Returns a list of one element per call.
    """
    calls, step = [], small_envs.PointMass.step

    def counting(self, action):
        result = step(self, action)
        calls.append(None)
        return (do(result) or result) if len(calls) == number else result

    monkeypatch.setattr(small_envs.PointMass, "step", counting)
    return calls


def test_kill_9_and_resume_bit_for_bit(tmp_path):
    """Three kills of real processes; benchmark/kill_and_resume.py does it twenty times on HalfCheetah."""
    flags = "--env-id Pendulum-v1 --num-envs 3 --learning-starts 300 --total-timesteps 2400 --checkpoint-every 100"
    flags = [*flags.split(), *SMALL, "--eval-every", "800", "--eval-episodes", "2"]
    for name in ("calm", "disturbed"):
        (tmp_path / name).mkdir()
    calm = start("simpo_neg", flags, tmp_path / "calm")
    kills = list(disturbed_run("simpo_neg", flags, tmp_path / "disturbed", 3, random.Random(1), longest=0.3))
    assert len(kills) == 3 and kills == sorted(set(kills)) and calm.wait() == 0
    assert not differences(results(tmp_path / "calm"), results(tmp_path / "disturbed"))


@pytest.mark.parametrize("script", ["simpo_exp", "simpo_power", "simpo_neg"])
@pytest.mark.parametrize("number, signum", [(333, signal.SIGTERM), (530, signal.SIGINT)])
def test_a_signal_ends_it_in_order_and_resume_makes_the_same(run_in, monkeypatch, tmp_path, script, number, signum):
    """Call 333 is in training (in the middle of an episode), call 530 in an evaluation."""
    run_in("calm", script, *FLAGS)
    with monkeypatch.context() as patch:
        calls = at_step(patch, number, lambda result: os.kill(os.getpid(), signum))
        run_dir, code = run_in("stopped", script, *FLAGS)
    assert code == 128 + signum and number <= len(calls) < number + 5  # 5 environments: within one step
    assert run_in("stopped", script, "--resume", run_dir)[1] is None
    assert not differences(results(tmp_path / "calm"), results(tmp_path / "stopped"))


def test_damaged_checkpoints(run_in, monkeypatch, tmp_path, capsys):
    """A flipped byte anywhere in the newest state or in the rows that only it needs leads to the one before."""
    run_in("calm", "simpo_neg", *FLAGS)
    with monkeypatch.context() as patch:
        at_step(patch, 700, lambda result: os.kill(os.getpid(), signal.SIGTERM))
        run_dir, _ = run_in("stopped", "simpo_neg", *FLAGS)
    folder = run_dir / "checkpoint"
    newest, before = sorted(folder.glob("state_*"), key=lambda path: -int(path.name[6:]))
    rows = max(folder.glob("rows_*"), key=lambda path: int(path.name.split("_")[2]))
    (folder / "unfinished").write_bytes(b"half a checkpoint")
    generator = np.random.default_rng(0)
    for i, path in enumerate([newest, newest, rows]):
        copy = tmp_path / f"copy{i}" / "runs" / run_dir.name
        shutil.copytree(run_dir, copy)
        data = bytearray(path.read_bytes())
        data[generator.integers(len(data))] ^= 1 << generator.integers(8)
        (copy / "checkpoint" / path.name).write_bytes(data)
        capsys.readouterr()
        assert run_in(f"copy{i}", "simpo_neg", "--resume", copy)[1] is None
        assert f"{newest.name} cannot be used: it is damaged" in capsys.readouterr().out
        assert not differences(results(tmp_path / "calm"), results(tmp_path / f"copy{i}"))
    for path in (newest, before):
        path.write_bytes(path.read_bytes()[:-1])
    assert "no whole checkpoint" in run_in("stopped", "simpo_neg", "--resume", run_dir)[1]


def test_resume_refuses_what_does_not_fit(run_in):
    run_dir, _ = run_in("run", "simpo_neg", *FLAGS[:-2], "--total-timesteps", "60")
    assert "trained by simpo_neg.py" in run_in("run", "simpo_exp", "--resume", run_dir)[1]
    code = run_in("run", "simpo_neg", "--resume", run_dir, "--env-id", "Hopper-v4")[1]
    assert "made with --env-id small_envs:PointMass-v0" in code
    code = run_in("run", "simpo_neg", "--resume", run_dir, "--buffer-size", "300")[1]
    assert "made with --buffer-size 150" in code
    assert "--epsilon must be" in run_in("run", "simpo_neg", "--resume", run_dir, "--epsilon", "-1")[1]
    assert "no whole checkpoint" in run_in("run", "simpo_neg", "--resume", "runs/nothing")[1]


def test_resume_takes_new_flags(run_in):
    """More steps, and more episodes in an evaluation: one table still holds both."""
    sparse = ["--steps-per-update", "30", "--log-every", "5"]  # logs before the first update after a resume
    run_dir, _ = run_in("run", "simpo_neg", *FLAGS, "--total-timesteps", "180", *sparse)
    flags = ["--total-timesteps", "270", "--eval-episodes", "7", "--no-compile"]
    assert run_in("run", "simpo_neg", "--resume", run_dir, *flags) == (run_dir, None)
    rows = list(csv.DictReader((run_dir / "eval.csv").open()))
    assert [float(row["step"]) for row in rows] == [90, 180, 270]
    assert [row["return_7"] != "" for row in rows] == [False, True, True]  # the last checkpoint precedes the evaluation


def test_loading_executes_nothing(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "evil"),)

    data = io.BytesIO()
    torch.save({"args": Evil()}, data)
    (tmp_path / "model.pt").write_bytes(data.getvalue() + hashlib.sha256(data.getvalue()).digest())
    with pytest.raises(ValueError, match="more than tensors"):
        simpo_neg.read(tmp_path / "model.pt")
    assert not (tmp_path / "evil").exists()


def nan_observation(result):
    return (np.full(1, np.nan, np.float32), *result[1:])


def nan_reward(result):
    return (result[0], float("inf"), *result[2:])


@pytest.mark.parametrize("do, name", [(nan_observation, "observation"), (nan_reward, "reward")])
def test_what_the_environment_gives_is_not_finite(run_in, monkeypatch, tmp_path, do, name):
    """It stops; and events that were on the disk, but not in the last checkpoint, are not there twice after it."""
    writers, make = [], torch.utils.tensorboard.SummaryWriter
    monkeypatch.setattr(
        torch.utils.tensorboard, "SummaryWriter", lambda path: writers.append(make(path)) or writers[-1]
    )
    flags = [*FLAGS, "--eval-every", "300"]
    run_in("calm", "simpo_neg", *flags)
    with monkeypatch.context() as patch:
        at_step(patch, 299, do)  # of 5 environments: in step 300, before any evaluation
        run_dir, code = run_in("run", "simpo_neg", *flags)
    last = run_dir.relative_to(Path.cwd()) / "checkpoint" / "state_240"
    assert code == f"stopped at step 300: {name} is not finite; last good checkpoint: {last}"
    writers[-1].close()  # as at the end of a process
    run_in("run", "simpo_neg", "--resume", run_dir)
    assert not differences(results(tmp_path / "calm"), results(tmp_path / "run"))


def test_a_loss_is_not_finite(run_in, monkeypatch):
    calls, mse_loss = iter(range(1, 10**9)), torch.nn.functional.mse_loss
    broken = lambda q, target: mse_loss(q, target) * (float("nan") if next(calls) == 30 else 1)  # noqa: E731
    monkeypatch.setattr(torch.nn.functional, "mse_loss", broken)
    run_dir, code = run_in("run", "simpo_neg", *FLAGS)
    assert "stopped at step 250: critic_loss is not finite" in code and "state_240" in code
    state = simpo_neg.read(run_dir / "checkpoint" / "state_240")
    assert all(x.isfinite().all() for part in ("policy", "critic") for x in state[part].values())


def on_small_disk(tmp_path, commands):
    """Runs bash commands in an empty tmpfs of 9 MB that only they see; $DISK is it, $RUN the training's command."""
    flags = ["--env-id", "Pendulum-v1", *SMALL, "--learning-starts", "100", "--total-timesteps", "800"]
    flags += ["--checkpoint-every", "100", "--eval-every", "200", "--eval-episodes", "2", "--log-every", "5"]
    run = " ".join([sys.executable, str(ROOT / "simpo_neg.py"), *flags])
    variables = os.environ | {"DISK": str(tmp_path), "RUN": run, "SIMPO": f"{sys.executable} {ROOT / 'simpo_neg.py'}"}
    script = f"set -e; mount -t tmpfs -o size=9m tmpfs $DISK; cd $DISK; {commands}"
    command = ["unshare", "--user", "--map-root-user", "--mount", "bash", "-c", script]
    if not shutil.which("unshare") or subprocess.run([*command[:4], "true"], capture_output=True).returncode:
        pytest.skip("needs Linux namespaces to mount a small disk")
    result = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=variables)
    return result.returncode, result.stdout


def test_full_disk(tmp_path):
    """Training reaches its end, names once what is missing, exits with 1; given space again, --resume completes it."""
    rc, output = on_small_disk(
        tmp_path,
        """$RUN & until ls runs/*/eval.csv; do sleep 0.05; done; dd if=/dev/zero of=fill || true
        wait %1 || test $? = 1; echo AND NOW; ls runs/*/checkpoint; rm fill
        $SIMPO --resume runs/*; tail -n 1 runs/*/eval.csv; ls runs/*""",
    )
    assert rc == 0, output
    first, second = output.split("AND NOW")
    for name in ("checkpoint", "model.pt", "events*"):
        assert first.count(f"/{name} cannot be written: No space left on device\n") == 1 + (name == "model.pt"), first
    assert "unfinished" not in second, second  # a failed write gives its space back
    assert "trained, but" in first and "Traceback" not in output
    assert "\n800.0," in second and "model.pt" in second and "cannot be" not in second, second


def test_directory_turns_read_only(tmp_path):
    rc, output = on_small_disk(
        tmp_path,
        """$RUN & until ls runs/*/eval.csv; do sleep 0.05; done
        until mount -o remount,ro $DISK; do :; done; wait %1 || test $? = 1; echo AND NOW; mount -o remount,rw $DISK
        $SIMPO --resume runs/*; tail -n 1 runs/*/eval.csv; ls runs/*""",
    )
    assert rc == 0, output
    first, second = output.split("AND NOW")
    assert first.count("/checkpoint cannot be written: Read-only file system") == 1, first
    assert "trained, but" in first and "Traceback" not in output
    assert "\n800.0," in second and "model.pt" in second and "cannot be" not in second, second


def test_no_video_encoder(run_in, monkeypatch):
    monkeypatch.setitem(sys.modules, "moviepy", None)  # makes its import fail
    flags = ["--env-id", "Pendulum-v1", *SMALL, "--total-timesteps", "60", "--eval-every", "30", "--capture-video"]
    with pytest.warns(UserWarning, match="going on without videos: MoviePy is not installed") as warned:
        run_dir, code = run_in("run", "simpo_neg", *flags)
    assert code is None and len((run_dir / "eval.csv").read_text().splitlines()) == 3
    assert sum("videos" in str(w.message) for w in warned) == 1


def test_no_network_for_track(run_in, monkeypatch):
    """With an account but no server: the run is recorded offline."""
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("WANDB_SILENT", "true")
    flags = ["--env-id", "Pendulum-v1", *SMALL, "--total-timesteps", "60", "--eval-every", "0", "--track"]
    run_dir, code = run_in("run", "simpo_neg", *flags)
    assert code is None and list(run_dir.glob("wandb/offline-run-*/*.wandb"))
