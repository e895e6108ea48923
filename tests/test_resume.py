"""--resume: whatever ends a run, it goes on to what it would have become, bit for bit; what does not fit is refused."""

import csv
import os
import random
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import small_envs
import torch
from conftest import ROOT, SMALL

import simpo_neg
from benchmark.kill_and_resume import differences, read_checkpoint, results, start

# The buffer is smaller than the run, and --log-every, --eval-every and --checkpoint-every fall on different steps.
FLAGS = ["--env-id", "small_envs:PointMass-v0", *SMALL, "--learning-starts", "100", "--total-timesteps", "600"]
FLAGS += ["--checkpoint-every", "60", "--eval-every", "90", "--buffer-size", "150", "--log-every", "35"]
FLAGS += ["--old-policy-interval", "10"]


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


def test_kill_9_and_resume_bit_for_bit(tmp_path, run_in):
    """A kill of a real process; benchmark/kill_and_resume.py does it twenty times on HalfCheetah, compiled."""
    flags = "--env-id Pendulum-v1 --num-envs 3 --learning-starts 300 --total-timesteps 2400 --checkpoint-every 100"
    flags = [*flags.split(), *SMALL, "--eval-every", "800", "--eval-episodes", "2", "--solver", "ddpm"]
    killed = tmp_path / "killed"
    killed.mkdir()
    process = start("simpo_neg", flags, killed)
    assert run_in("calm", "simpo_neg", *flags)[1] is None  # meanwhile
    while process.poll() is None and (read_checkpoint(killed) or {"global_step": 0})["global_step"] < 400:
        time.sleep(0.01)
    time.sleep(random.Random(1).uniform(0, 0.1))
    process.kill()
    assert process.wait() == -signal.SIGKILL
    (run_dir,) = killed.glob("runs/*")
    assert 0 < read_checkpoint(killed)["global_step"] < 2400
    assert run_in("killed", "simpo_neg", "--resume", run_dir)[1] is None
    assert not differences(results(tmp_path / "calm"), results(killed))


def test_signals_end_it_in_order_and_resume_makes_the_same(run_in, monkeypatch, tmp_path):
    """The first comes in training, in the middle of an episode, the second one in an evaluation."""
    run_in("calm", "simpo_neg", *FLAGS)
    flags = FLAGS
    for number, signum in [(333, signal.SIGTERM), (100, signal.SIGINT)]:
        with monkeypatch.context() as patch:
            calls = at_step(patch, number, lambda result, signum=signum: os.kill(os.getpid(), signum))
            run_dir, code = run_in("stopped", "simpo_neg", *flags)
        assert code == 128 + signum and number <= len(calls) < number + 5  # 5 environments: within one step
        flags = ["--resume", run_dir]
    state = read_checkpoint(tmp_path / "stopped")
    assert len(state["rows"]) == 150  # the buffer, which has come round
    assert state["global_step"] == 270 and state["evaluations"][-1]["step"] == 180
    assert run_in("stopped", "simpo_neg", *flags)[1] is None
    assert not differences(results(tmp_path / "calm"), results(tmp_path / "stopped"))


def test_a_second_signal_ends_it_at_once(run_in, monkeypatch, tmp_path):
    def exit_now(code):
        raise SystemExit(code)

    def twice(result):
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(os, "_exit", exit_now)
    calls = at_step(monkeypatch, 172, twice)
    assert run_in("run", "simpo_neg", *FLAGS, "--eval-every", "0")[1] == 128 + signal.SIGTERM
    assert len(calls) == 172 and read_checkpoint(tmp_path / "run")["global_step"] == 120


def test_a_signal_ends_an_evaluation_of_a_run_at_once(run_in, shared_run, monkeypatch):
    signal.signal(signal.SIGINT, signal.default_int_handler)  # as in a new process
    calls = at_step(monkeypatch, 7, lambda result: os.kill(os.getpid(), signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        run_in("refused", "simpo_neg", "--evaluate", shared_run)
    assert len(calls) == 7


def test_no_damaged_checkpoint_is_loaded_as_another(run_in, tmp_path):
    """A flipped bit is refused, or stands where nothing does; a file cut anywhere is refused."""
    run_dir, _ = run_in("run", "simpo_neg", *FLAGS, "--total-timesteps", "120")
    whole, path = (run_dir / "checkpoint.pt").read_bytes(), tmp_path / "damaged.pt"
    generator, refused = np.random.default_rng(0), 0
    original = simpo_neg.load(run_dir / "checkpoint.pt")
    for _ in range(200):
        data = bytearray(whole)
        data[generator.integers(len(data))] ^= 1 << generator.integers(8)
        path.unlink(missing_ok=True)
        path.write_bytes(data)
        try:
            assert not differences(simpo_neg.load(path), original)
        except SystemExit as end:
            assert str(end.code).startswith(f"{path} cannot be used: ") and "\n" not in end.code
            refused += 1
    assert refused > 100
    for size in [0, *generator.integers(len(whole), size=10)]:
        path.unlink()
        path.write_bytes(whole[:size])
        with pytest.raises(SystemExit, match="cannot be used"):
            simpo_neg.load(path)


def test_a_damaged_run_is_refused_and_a_half_written_file_ignored(run_in, tmp_path):
    run_dir, _ = run_in("run", "simpo_neg", *FLAGS, "--total-timesteps", "120")
    path = run_dir / "checkpoint.pt"
    shutil.copytree(tmp_path / "run", tmp_path / "calm")
    (run_dir / "checkpoint.unfinished").write_bytes(path.read_bytes()[:1000])
    for folder in ("run", "calm"):
        (copy,) = (tmp_path / folder / "runs").iterdir()
        assert run_in(folder, "simpo_neg", "--resume", copy, "--total-timesteps", "180")[1] is None
    assert not differences(results(tmp_path / "calm"), results(tmp_path / "run"))
    path.write_bytes(path.read_bytes()[:-1])
    for flag in ("--resume", "--evaluate"):
        before = {file: file.read_bytes() for file in run_dir.iterdir()}
        assert f"{path} cannot be used: " in run_in("run", "simpo_neg", flag, run_dir)[1]
        assert before == {file: file.read_bytes() for file in run_dir.iterdir()}


def test_loading_executes_nothing(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "evil"),)

    torch.save({"args": Evil()}, tmp_path / "checkpoint.pt")
    with pytest.raises(SystemExit, match="cannot be used"):
        simpo_neg.load(tmp_path / "checkpoint.pt")
    assert not (tmp_path / "evil").exists()


def test_a_checkpoint_is_replaced_whole(tmp_path, monkeypatch):
    """While the new one is written, the old one is there; nothing is written into it."""
    path = tmp_path / "checkpoint.pt"
    simpo_neg.save(path, {"x": torch.zeros(3)})

    def fails(state, file):
        file.write(b"half")
        raise OSError("no space")

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", fails)
        with pytest.raises(OSError, match="no space"):
            simpo_neg.save(path, {"x": torch.ones(3)})
    assert torch.equal(simpo_neg.load(path)["x"], torch.zeros(3))
    simpo_neg.save(path, {"x": torch.ones(3)})
    assert torch.equal(simpo_neg.load(path)["x"], torch.ones(3)) and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    "changed",
    [
        *("--env-id Hopper-v4", "--buffer-size 300", "--seed 2", "--num-envs 4", "--hidden-dim 64"),
        *("--solver ddpm", "--diffusion-steps 6", "--critic-lr 1e-3", "--temperature 1", "--temperature-lr 1"),
        *("--device cpu:0", "--landscape-c 1", "--reward-landscape exp", "--power 2", "--epsilon 0.25"),
        *("--num-particles 4", "--batch-size 3", "--policy-lr 1", "--policy-dtype bfloat16", "--steps-per-update 7"),
    ],
)
def test_resume_refuses_what_cannot_change(run_in, shared_run, changed):
    name = changed.split()[0][2:].replace("-", "_")
    code = run_in("refused", "simpo_neg", "--resume", shared_run, *changed.split())[1]
    assert code.startswith(f"{shared_run} was made ") and code.endswith(f"with other {name}")


def test_resume_refuses_other_scripts_and_bad_values(run_in, shared_run, tmp_path):
    for script in ("simpo_exp", "simpo_power"):
        code = run_in("refused", script, "--resume", shared_run)[1]
        assert code == f"{shared_run} was made by simpo_neg.py, not by {script}.py as it is now"
    torch.save({"weight": torch.zeros(1)}, tmp_path / "checkpoint.pt")
    assert run_in("refused", "simpo_neg", "--evaluate", tmp_path)[1].startswith(f"{tmp_path} was made by None.py")
    code = run_in("refused", "simpo_neg", "--resume", shared_run, "--eval-episodes", "0")[1]
    assert code == "--eval-episodes must be at least 1; got 0"
    code = run_in("refused", "simpo_neg", "--evaluate", shared_run, "--target-kl", "2.1")[1]
    assert "--target-kl must be above 0 and below log(num_particles) = 2.08" in code
    code = run_in("refused", "simpo_neg", "--evaluate", shared_run, "--resume", shared_run)[1]
    assert code == f"--resume must be left out with --evaluate; got {shared_run}"


@pytest.mark.parametrize("change", [dict.popitem, lambda args: args.update(new_flag=1)])
def test_a_checkpoint_of_another_version_is_refused(run_in, shared_run, tmp_path, change):
    state = torch.load(shared_run / "checkpoint.pt", weights_only=True)
    change(state["args"])
    torch.save(state, tmp_path / "checkpoint.pt")
    for flag in ("--resume", "--evaluate"):
        code = run_in("refused", "simpo_neg", flag, tmp_path)[1]
        assert code == f"{tmp_path} was made by simpo_neg.py, not by simpo_neg.py as it is now"


@pytest.fixture
def shared_run(run_in, tmp_path):
    """A small run, and a directory "refused" with a link to it, for run_in to find a run there."""
    run_dir, _ = run_in("run", "simpo_neg", *FLAGS, "--total-timesteps", "10")
    (tmp_path / "refused").mkdir()
    (tmp_path / "refused" / "runs").symlink_to(tmp_path / "run" / "runs")
    before = {file: file.read_bytes() for file in run_dir.iterdir()}
    yield run_dir
    assert before == {file: file.read_bytes() for file in run_dir.iterdir()}  # nothing is destroyed


def test_resume_takes_new_flags(run_in, tmp_path):
    """More steps, more episodes in an evaluation."""
    sparse = ["--steps-per-update", "30", "--log-every", "5"]  # logs before the first update after a resume
    run_dir, _ = run_in("run", "simpo_neg", *FLAGS, "--total-timesteps", "180", *sparse)
    flags = "--total-timesteps 270 --eval-episodes 7 --no-compile --log-every 10".split()
    assert run_in("run", "simpo_neg", "--resume", run_dir, *flags) == (run_dir, None)
    rows = list(csv.DictReader((run_dir / "eval.csv").open()))
    assert [float(row["step"]) for row in rows] == [90, 180, 270]
    assert [len(row["returns"].split()) for row in rows] == [5, 5, 7]
    assert float(rows[1]["seconds"]) < float(rows[2]["seconds"])  # the clock goes on
    args = read_checkpoint(tmp_path / "run")["args"]
    assert args["eval_episodes"] == 7 and args["log_every"] == 10 and args["buffer_size"] == 150


def test_an_environment_that_does_not_replay_is_said(run_in, monkeypatch):
    run_dir, _ = run_in("run", "simpo_neg", *FLAGS, "--total-timesteps", "175")
    step = small_envs.PointMass.step

    def noisy(self, action):
        self.x += 0.01
        return step(self, action)

    monkeypatch.setattr(small_envs.PointMass, "step", noisy)
    with pytest.warns(UserWarning, match="does not replay exactly"):
        assert run_in("run", "simpo_neg", "--resume", run_dir, "--total-timesteps", "180")[1] is None


def test_ctrl_c_while_a_kernel_is_compiled(tmp_path):
    """The terminal sends it to the compiler, too, which ends: no traceback, and the checkpoint of step 0 stays."""
    flags = "--env-id Pendulum-v1 --device cpu --hidden-dim 32 --learning-starts 10 --eval-every 0".split()
    slow = tmp_path / "g++"  # so that the signal meets it, not what comes before or after
    slow.write_text('#!/bin/sh\ncase "$*" in *.main.cpp*) touch compiles; sleep 60 ;; esac\nexec g++ "$@"\n')
    slow.chmod(0o755)
    environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache"), "CXX": str(slow)}
    command = [sys.executable, ROOT / "simpo_neg.py", *flags]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    process = subprocess.Popen(command, cwd=tmp_path, env=environment, start_new_session=True, **pipes)
    while process.poll() is None and not list(tmp_path.glob("**/compiles")):
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGINT)
    output, _ = process.communicate()
    assert process.returncode == 128 + signal.SIGINT and "Traceback" not in output, output
    assert read_checkpoint(tmp_path)["global_step"] == 0
