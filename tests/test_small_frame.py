"""benchmark/small_frame.py on a sweep worked out by hand; benchmark/train_speed.py on a short training."""

import csv
import subprocess
import sys

from conftest import ROOT


def test_small_frame_reads_a_sweep_and_compares_at_equal_computing_time(tmp_path):
    for flags, seed, returns in ("num-particles=8", 1, (1, 7)), ("num-particles=8", 2, (3, 9)), ("power=2", 1, (5, 6)):
        folder = tmp_path / "runs/simpo_neg/Pendulum-v1" / flags / str(seed)
        (folder / "runs/run").mkdir(parents=True)
        (folder / "finished").touch()
        rows = [f"{step},{x},0,9,{x}" for step, x in zip((100, 300), returns, strict=True)]
        (folder / "runs/run/eval.csv").write_text("\n".join(["step,mean,std,seconds,returns", *rows]))
    (tmp_path / "runs/simpo_neg/Pendulum-v1/power=2/2").mkdir()  # it has not finished
    # After 100 steps 200 updates: 2 minutes for one method, 4 for the other, which thus has 100 updates only.
    (tmp_path / "cost.csv").write_text(
        "script,flags,milliseconds\nsimpo_neg,num-particles=8,600\nsimpo_neg,power=2,1200\n"
    )
    files = f"--runs {tmp_path / 'runs'} --csv {tmp_path / 'out.csv'} --cost {tmp_path / 'cost.csv'}"
    command = [
        sys.executable,
        "benchmark/small_frame.py",
        "--env-id=Pendulum-v1",
        "--learning-starts=100",
        *files.split(),
    ]
    lines = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    assert lines == [
        "simpo_neg: 7, 9; 8 [-5, 21]",  # 8 +- 12.706 standard errors of 1
        "simpo_neg power=2: 6; 6",
        "simpo_neg, 600.0 ms per update, within 2.0 minutes: 8 [-5, 21]",
        "simpo_neg power=2, 1200.0 ms per update, within 2.0 minutes: 5",
    ]
    with open(tmp_path / "out.csv") as file:
        assert list(csv.reader(file))[1] == ["simpo_neg", "Pendulum-v1", "1", "100", "1.0"]


def test_train_speed_prints_a_time_or_what_the_script_said():
    frame = "no-compile hidden-dim=8 batch-size=4 diffusion-steps=3 policy-dtype=float32"
    command = [sys.executable, "benchmark/train_speed.py", "--updates=40", "--env-id=Pendulum-v1", "--frame", frame]
    good = subprocess.run(
        [*command, "simpo_neg.py num-particles=4 target-kl=0.7"], cwd=ROOT, capture_output=True, text=True
    )
    header, row = good.stdout.splitlines()
    script, flags, milliseconds = row.split(",")
    assert (header, script, flags) == ("script,flags,milliseconds", "simpo_neg", "num-particles=4 target-kl=0.7")
    assert float(milliseconds) > 0
    bad = subprocess.run([*command, "simpo_neg.py num-particles=0"], cwd=ROOT, capture_output=True, text=True)
    assert bad.returncode == 1 and "--num-particles must be at least 1" in bad.stderr
