"""small_frame.py on a sweep worked out by hand; the others on known clocks and scalars."""

import csv
import json
import runpy
import subprocess
import sys

import matplotlib.axes
import numpy as np
import pytest
from conftest import ROOT
from torch.utils.tensorboard import SummaryWriter

sys.path.append(str(ROOT / "benchmark"))
from inside import PANELS
from paper_frame import JAX_SIZES, SIZES
from small_frame import add, differences, draw, floor, read


def sweep(folder, env_id, flags, seed, returns):
    """A finished run of a sweep, evaluated after 100 and 300 steps."""
    folder = folder / "simpo_neg" / env_id / flags / str(seed)
    (folder / "runs/run").mkdir(parents=True)
    (folder / "finished").touch()
    rows = [f"{step},{x},0,9,{x}" for step, x in zip((100, 300), returns, strict=True)]
    (folder / "runs/run/eval.csv").write_text("\n".join(["step,mean,std,seconds,returns", *rows]))


def small_frame(folder, *flags):
    # After 100 steps 200 updates: 2 minutes for one method, 4 for the other, which then is halfway from 100 to 300.
    cost = "script,flags,milliseconds\nsimpo_neg,num-particles=8,600\nsimpo_neg,power=2,1200\n"
    (folder / "cost.csv").write_text(cost)
    files = f"--runs {folder / 'runs'} --csv {folder / 'out.csv'} --cost {folder / 'cost.csv'} --learning-starts=100"
    command = [sys.executable, "benchmark/small_frame.py", *files.split(), "--env-ids", *flags]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def test_small_frame_reads_a_sweep_and_compares_at_equal_computing_time(tmp_path):
    sweep(tmp_path / "runs", "Pendulum-v1", "num-particles=8", 1, (1, 7))
    sweep(tmp_path / "runs", "Pendulum-v1", "num-particles=8", 2, (3, 9))
    sweep(tmp_path / "runs", "Pendulum-v1", "power=2", 1, (5, 6))
    sweep(tmp_path / "runs", "Pendulum-v1", "power=2", 2, (1, 6))
    (tmp_path / "runs/simpo_neg/Pendulum-v1/power=2/3").mkdir()  # it has not finished
    result = small_frame(tmp_path, "Pendulum-v1")
    assert result.stdout.splitlines() == [
        "Pendulum-v1",
        "simpo_neg: 7, 9; 8 [-5, 21]",  # 8 +- 12.706 standard errors of 1
        "simpo_neg power=2: 6, 6; 6 [6, 6]",
        "simpo_neg minus simpo_neg power=2, 2 seeds: 2 [-11, 15]",
        "simpo_neg, 600.0 ms per update, within 2.0 minutes: 8 [-5, 21]",
        "simpo_neg power=2, 1200.0 ms per update, within 2.0 minutes: 4 [-8, 17]",
        "simpo_neg minus simpo_neg power=2, 2 seeds: 4 [-22, 29]",  # 7 - 5.5 and 9 - 3.5: 3.5 +- 12.706 x 2
        "",
    ]
    with open(tmp_path / "out.csv") as file:
        assert list(csv.reader(file))[1] == ["simpo_neg", "Pendulum-v1", "1", "100", "1.0"]
    result = small_frame(tmp_path, "Pendulum-v1", "--last=2")
    assert "simpo_neg: 4, 6; 5 [-8, 18]" in result.stdout.splitlines()  # the means of both evaluations
    lines = small_frame(tmp_path, "Pendulum-v1", "--minutes=3").stdout.splitlines()
    assert "simpo_neg, 600.0 ms per update, within 3.0 minutes: 8 [-5, 21]" in lines  # done after 2
    assert "simpo_neg power=2, 1200.0 ms per update, within 3.0 minutes: 5 [-1, 12]" in lines  # 5.75 and 4.75
    (tmp_path / "out.png").unlink()
    result = small_frame(tmp_path, "Pendulum-v1", "--seeds", "2")
    assert "simpo_neg: 9; 9" in result.stdout and not (tmp_path / "out.png").exists()
    result = small_frame(tmp_path, "Pendulum-v1", "--minutes=-1")
    assert result.returncode == 1 and result.stderr == "--minutes -1.0: it must be 0 or more\n"
    result = small_frame(tmp_path, "Pendulum-v1", "--last=0")
    assert result.returncode == 1 and result.stderr == "--last 0: it must be 1 or more\n"


def test_the_picture_has_the_means_over_steps_and_minutes(tmp_path, monkeypatch):
    drawn, plot = [], matplotlib.axes.Axes.plot
    monkeypatch.setattr(matplotlib.axes.Axes, "plot", lambda *x, **more: drawn.append(x[1:3]) or plot(*x, **more))
    curves = {"A": {"simpo_neg": {1: {100: 1.0, 300: 7.0}, 2: {100: 3.0, 300: 9.0}}, "qsm": {1: {100: 5.0, 300: 6.0}}}}
    draw(curves, lambda method, step: step / 100 if method == "simpo_neg" else step / 50, tmp_path / "a.png")
    means = [[list(x), list(y)] for x, y in drawn]
    assert means[:2] == [[[100, 300], [2, 8]], [[100, 300], [5, 6]]]
    assert means[2:] == [[[1, 3], [2, 8]], [[2, 6], [5, 6]]]


def test_the_picture_s_intervals_are_of_95(tmp_path, monkeypatch):
    """Of 1, 2, 3: 2 +- 4.303 / sqrt(3)."""
    drawn = []
    monkeypatch.setattr(matplotlib.axes.Axes, "fill_between", lambda *x, **more: drawn.append(x[2:4]))
    draw({"A": {"simpo_neg": {seed: {100: float(seed)} for seed in (1, 2, 3)}}}, lambda *_: 1.0, tmp_path / "a.png")
    assert drawn and np.ravel(drawn[0]) == pytest.approx([2 - 2.484, 2 + 2.484], abs=1e-3)


def test_differences_are_of_equal_seeds(capsys):
    differences({"a": {1: 5.0, 2: 7.0, 3: 9.0}, "b": {2: 1.0, 3: 5.0, 4: 0.0}})
    assert capsys.readouterr().out == "a minus b, 2 seeds: 5 [-8, 18]\n"  # of 6 and 4: 5 +- 12.706


def test_what_the_floor_changes_is_the_mean_of_both_powers(capsys):
    returns = {"simpo_power": {1: 1.0, 2: 2.0, 3: 9.0}, "simpo_neg": {1: 5.0, 2: 4.0, 3: 1.0}}
    floor(returns)
    assert not capsys.readouterr().out
    floor(returns | {"simpo_power power=2": {1: 2.0, 2: 3.0}, "simpo_neg power=2": {1: 10.0, 2: 9.0, 3: 5.0}})
    assert capsys.readouterr().out == "the floor, mean of both powers, 2 seeds: 5 [-8, 18]\n"  # of (4+8)/2, (2+6)/2


def test_a_task_without_the_methods_of_others_and_runs_of_unequal_length(tmp_path):
    rows = [f"simpo_neg power={p},B-v4,1,{step},{p}" for p in range(1, 8) for step in (100, 300)]
    csv_file = tmp_path / "a.csv"
    csv_file.write_text("\n".join(["method,env_id,seed,step,mean", "sac,A-v4,1,100,1", *rows]) + "\n")
    command = [sys.executable, "benchmark/small_frame.py", "--csv", csv_file, "--cost", "/dev/null"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0 and (tmp_path / "a.png").stat().st_size > 5000, result.stderr
    csv_file.write_text(csv_file.read_text() + "sac,B-v4,1,100,1\n")
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 1 and "runs of B-v4 end at different steps, [100, 300]" in result.stderr


def test_small_frame_adds_a_sweep_and_compares_over_tasks(tmp_path):
    kept = [
        f"simpo_neg power=2,Hopper-v4,{seed},{step},{x}" for seed, x in enumerate((4, 5, 6, 7)) for step in (100, 300)
    ]
    replaced = "simpo_neg,Hopper-v4,0,200,99"
    (tmp_path / "out.csv").write_text("\n".join(["method,env_id,seed,step,mean", replaced, *kept]))
    for seed in range(4):
        sweep(tmp_path / "runs", "Hopper-v4", "none", seed, (0, 6))  # beats 4 and 5, ties with 6: 2.5 of 4
        sweep(tmp_path / "runs", "Pendulum-v1", "none", seed, (0, 1))
        sweep(tmp_path / "runs", "Pendulum-v1", "power=2", seed, (9, 0))  # beaten by all: (0.625 + 1) / 2
    lines = small_frame(tmp_path, "Hopper-v4", "Pendulum-v1").stdout.splitlines()
    assert lines[0] == "Hopper-v4" and "simpo_neg: 6, 6, 6, 6; 6 [6, 6]" in lines
    assert "simpo_neg power=2: 4, 5, 6, 7; 6 [3, 8]" in lines
    assert lines[-1].startswith("2 tasks: chance that simpo_neg beats simpo_neg power=2 0.81 [0.")
    assert "99" not in (tmp_path / "out.csv").read_text()
    assert "has no run of Swimmer-v4" in small_frame(tmp_path, "Hopper-v4", "Swimmer-v4").stderr


def test_flags_of_the_task_and_of_a_launcher_are_no_part_of_the_method(tmp_path):
    for power, x in ("", 1), (" power=2", 2):
        flags = f"script=simpo_neg.py action-repeat=4 num-particles=8{power} reward-landscape=exp"
        sweep(tmp_path / "runs", "cheetah", flags, 1, (0, x))
    lines = small_frame(tmp_path, "cheetah action-repeat=4 reward-landscape=exp").stdout.splitlines()
    assert lines[:3] == ["cheetah action-repeat=4 reward-landscape=exp", "simpo_neg: 1; 1", "simpo_neg power=2: 2; 2"]


def test_returns_are_kept_to_three_digits(tmp_path):
    sweep(tmp_path / "runs", "cheetah", "none", 1, (0.12345, -7.0009))
    add(tmp_path / "runs", tmp_path / "out.csv")
    assert [row.split(",")[-1] for row in (tmp_path / "out.csv").read_text().split()[1:]] == ["0.123", "-7.001"]


def test_a_sweep_of_another_length_is_refused_and_the_file_kept(tmp_path):
    sweep(tmp_path / "runs", "cheetah", "none", 1, (0, 1))
    (tmp_path / "out.csv").write_text("method,env_id,seed,step,mean\nsimpo_neg,cheetah,1,300,5\nsac,cheetah,1,200,9\n")
    before = (tmp_path / "out.csv").read_text()
    with pytest.raises(SystemExit, match="runs of cheetah end at different steps, \\[200, 300\\]"):
        add(tmp_path / "runs", tmp_path / "out.csv")
    assert (tmp_path / "out.csv").read_text() == before


@pytest.mark.parametrize("name", "authors epsilon particles paper_loss precision solver target_kl".split())
def test_runs_that_a_comparison_took_from_the_small_frame_are_as_they_are_there(name):
    """Same method, task and seed: the same returns, so that neither file is made anew without the other."""
    small, other = (read(ROOT / f"benchmark/mujoco/{file}.csv") for file in ("small_frame", name))
    shared = small.keys() & other.keys()
    assert len(shared) >= 5 and all(small[run] == other[run] for run in shared)


def test_no_computing_before_the_first_update(tmp_path):
    sweep(tmp_path / "runs", "Pendulum-v1", "num-particles=8", 1, (1, 7))
    out = small_frame(tmp_path, "Pendulum-v1", "--learning-starts=1000").stdout
    assert "simpo_neg, 600.0 ms per update, within 0.0 minutes: 7\n" in out


def test_small_frame_writes_nothing_without_runs(tmp_path):
    (tmp_path / "out.csv").write_text("kept")
    command = [sys.executable, "benchmark/small_frame.py", f"--runs={tmp_path}", f"--csv={tmp_path / 'out.csv'}"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 1 and "no finished run" in result.stderr and len(result.stderr.splitlines()) == 1
    assert (tmp_path / "out.csv").read_text() == "kept"


def test_the_paper_frame_takes_no_other_run(tmp_path):
    kept = ROOT / "benchmark/mujoco/paper_frame_1.csv"
    before = kept.read_text()
    neg = SIZES | dict(seed=1)
    linear = {name: value for name, value in neg.items() if name != "epsilon"}  # simpo_power.py has none
    small, greedy = neg | dict(hidden_dim=64), neg | dict(target_kl=0.7)
    jax = JAX_SIZES | dict(flow_rl="flow-rl", seed=1, updates=5)
    runs = dict(other=neg, small=small, greedy=greedy, linear=linear, jax=jax)
    for name, settings in runs.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "args.json").write_text(json.dumps(settings))
        (tmp_path / name / "eval.csv").write_text(before.splitlines()[0] + "\n10000,1.0,0.0,1.0,1.00\n")
    for name, why in (
        ("other", "it is another run's"),
        ("small", "is not of"),
        ("greedy", "is not of"),
        ("linear", "is not of"),
        ("jax", "is not of {'env_id': 'HalfCheetah-v4', 'hidden_dim': 256"),
        ("none", "has no eval.csv"),
    ):
        folder = tmp_path / name
        result = subprocess.run(
            [sys.executable, "benchmark/paper_frame.py", folder], cwd=ROOT, capture_output=True, text=True
        )
        assert result.returncode == 1 and why in result.stderr and len(result.stderr.splitlines()) == 1
    assert kept.read_text() == before


def test_train_speed_takes_the_median_per_update_of_the_second_half(tmp_path):
    """A stand-in whose clock goes on by 1 ms a step in the second half, once by a minute, and by 9 ms a step before."""
    (tmp_path / "stand_in.py").write_text(
        "import sys; from torch.utils.tensorboard import SummaryWriter\n"
        "flags = dict(flag.lstrip('-').split('=') for flag in sys.argv[1:])\n"
        "part, end, clock = int(flags['log-every']), int(flags['total-timesteps']), 0\n"
        "assert end == 1000 + 40 * part and part == 50 and flags['eval-every'] == '0'\n"
        "assert flags['size'] == flags['width'] == '8'\n"
        "writer = SummaryWriter('runs/run')\n"
        "for step in range(1000 + part, end + 1, part):\n"
        "    clock += part * (0.001 if step > 1000 + 20 * part else 0.009) + 60 * (step == end)\n"
        "    writer.add_scalar('loss/critic', 0, step, walltime=1e9 + clock)\n"
        "writer.close()\n"
    )
    command = [
        sys.executable,
        ROOT / "benchmark/train_speed.py",
        "stand_in.py size=8",
        "--updates=200",
        "--frame=width=8",
    ]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert result.stdout == "script,flags,milliseconds\nstand_in,size=8,5.00\n"  # an update is 5 steps


@pytest.mark.parametrize(
    "flag, why", [("num-particles=1", "--num-particles must be at least 2"), ("eval-every=9", "eval-every=9: env_id, ")]
)
def test_train_speed_says_why_a_script_failed(flag, why):
    command = [sys.executable, "benchmark/train_speed.py", f"simpo_neg.py {flag}"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 1 and why in result.stderr.splitlines()[-1]


def test_inside_takes_means_over_hundredths_of_a_run(tmp_path):
    """300 points of each scalar, whose value is the step: a hundred means of three, the middle one."""
    run_dir = tmp_path / "Pendulum-v1__simpo_power__3__20260101-000000-1"
    run_dir.mkdir()
    (run_dir / "args.json").write_text('{"seed": 3, "power": 2.0}')
    with SummaryWriter(run_dir) as writer:
        for name in PANELS:
            for step in range(10, 3010, 10):
                writer.add_scalar(name, step, step)
    command = [sys.executable, ROOT / "benchmark/inside.py", run_dir, "--csv", tmp_path / "inside.csv"]
    subprocess.run(command, cwd=tmp_path, check=True)
    with open(tmp_path / "inside.csv") as file:
        rows = list(csv.DictReader(file))
    for name in PANELS:
        own = [
            (row["method"], row["seed"], int(row["step"]), float(row["mean"])) for row in rows if row["scalar"] == name
        ]
        assert own == [("simpo_power power=2", "3", 30 * i, 30 * i - 10) for i in range(1, 101)]
    assert (tmp_path / "inside.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    "name, text", [("a__simpo_neg__1__now", None), ("a__simpo_power__1__now", '{"power": 3}'), ("a", "{}"), ("a", "{")]
)
def test_inside_refuses_what_is_no_run_and_keeps_what_was_there(tmp_path, name, text):
    (tmp_path / name).mkdir()
    (tmp_path / "inside.csv").write_text("kept")
    if text:
        (tmp_path / name / "args.json").write_text(text)
    command = [sys.executable, ROOT / "benchmark/inside.py", tmp_path / name, "--csv", tmp_path / "inside.csv"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 1 and f"{tmp_path / name} is no run of simpo_*.py" in result.stderr
    assert len(result.stderr.splitlines()) == 1 and (tmp_path / "inside.csv").read_text() == "kept"


def beside_jax(folder, monkeypatch, said):
    """Runs it where said(command) is what each program prints."""
    monkeypatch.setattr(subprocess, "run", lambda what, **_: subprocess.CompletedProcess(what, 0, said(what), ""))
    command = ["beside_jax.py", *map(str, [folder, sys.executable]), "--csv", str(folder / "speed.csv"), "--machine=M"]
    monkeypatch.setattr(sys, "argv", command)
    runpy.run_path(str(ROOT / "benchmark/beside_jax.py"), run_name="__main__")


def test_beside_jax_takes_medians_over_turns(tmp_path, monkeypatch, capsys):
    def said(turn):
        def of(command):
            command = list(map(str, command))
            if "jax_speed.py" in command[1]:
                size = command[-2:]
                assert size in (["17", "6"], ["376", "17"])
                return f"{100 * turn * (1 + (size[0] == '376'))} ms, median of 8 (the first two compile and warm up)\n"
            part = 10 if "--solver" in command else 5
            return f"weights 9.00 ms\nall parts      {part * turn:.2f} ms\nits products    3.00 ms, measured\n"

        return of

    for turn in (1, 2, 6):
        beside_jax(tmp_path, monkeypatch, said(turn))
    lines = capsys.readouterr().out.splitlines()[-8:]
    assert any(x.split() == "HalfCheetah-v4 the authors' JAX 100, 200, 600 ms, 1.00 of JAX's".split() for x in lines)
    assert any(x.split() == "HalfCheetah-v4 float32 5, 10, 30 ms, 0.05 of JAX's".split() for x in lines)
    assert any(x.split() == "Humanoid-v4 float32, ddpm 10, 20, 60 ms, 0.05 of JAX's".split() for x in lines)
    before = (tmp_path / "speed.csv").read_text()
    with pytest.raises(SystemExit, match="jax_speed.py .* failed: no flowrl"):
        beside_jax(tmp_path, monkeypatch, lambda command: "no flowrl")
    assert (tmp_path / "speed.csv").read_text() == before
