"""benchmark/stats.py against cases worked out by hand and against a bootstrap that goes through every resample."""

import csv
import itertools
import json
import runpy
import subprocess
import sys

import matplotlib.axes
import numpy as np
import pytest
from conftest import ROOT

from benchmark import stats


def test_iqm_drops_a_quarter_at_each_end_of_all_runs_together():
    assert stats.iqm(np.array([7.0, 0, 100, 3, 2, -50, 4, 5])) == 3.5  # the mean of 2, 3, 4, 5
    assert stats.iqm(np.array([1.0, 2, 3, 4, 90])) == 3  # 5 / 4 is rounded down: one of each end
    assert stats.iqm(np.array([0.0, 1]), np.array([10.0, 30])) == 5.5  # of 0, 1, 10, 30; not the mean of two IQMs
    batch = np.array([[1.0, 2, 3, 4, 90], [0, 0, 5, 6, 7]])
    assert stats.iqm(batch).tolist() == pytest.approx([3, 11 / 3])


def test_improvement_counts_pairs_and_averages_tasks():
    x, y = [np.array([1.0, 2, 3]), np.array([5.0, 6])], [np.array([2.0, 2, 0]), np.array([6.0])]
    first, second = (1 + 2 + 3) / 9, 0.5 / 2  # pairs won, of equal ones half
    assert stats.improvement(*x, *y) == pytest.approx((first + second) / 2)
    assert stats.improvement(*y, *x) == pytest.approx(1 - (first + second) / 2)


def test_profile_is_the_share_of_runs_above():
    share, low, high = stats.profile(np.array([0.0, 1, 2.5, 4]), np.array([1.0, 1, 2, 2]), np.array([3.0, 3, 4, 4]))
    assert share.tolist() == [1, 0.75, 0.5, 0]
    assert low.tolist() == [1, 0.5, 0.5, 0] and high.tolist() == [1, 1, 0.5, 0]  # 2s among four draws: none to all


def test_area_is_the_mean_height():
    assert stats.area(np.array([0, 10, 30]), np.array([0.0, 10, 10])) == pytest.approx((50 + 200) / 30)
    assert stats.area(np.array([5]), np.array([[3.0], [4.0]])).tolist() == [3, 4]


def assert_exact(low, high, statistic, *tasks):
    """2.5% of all equally likely resamples, each task drawn from its own runs, are below low, and above high."""
    resamples = itertools.product(*(itertools.product(task, repeat=len(task)) for task in tasks))
    values = np.array([statistic(*map(np.array, resample)) for resample in resamples])
    error = 0.005  # of 20,000 random resamples: 4 standard deviations
    for below, end in (values - low, low), (high - values, high):
        assert (below < -1e-9).mean() < 0.025 + error and (below < 1e-9).mean() > 0.025 - error, end


def mean_of_middle_half(*tasks):
    runs = sorted(np.concatenate(tasks))
    cut = len(runs) // 4
    return sum(runs[cut : len(runs) - cut]) / (len(runs) - 2 * cut)


def share_won(x, y):
    return sum((a > b) + (a == b) / 2 for a in x for b in y) / (len(x) * len(y))


@pytest.mark.parametrize("seed", range(3))
def test_intervals_equal_those_over_every_resample(seed):
    rng = np.random.default_rng(seed)
    tasks = rng.normal(0, 1, 4), rng.normal(10, 1, 4)  # far apart: runs drawn from both together would vary by 10
    value, low, high = stats.interval(stats.iqm, *tasks, resamples=20_000)
    assert value == pytest.approx(mean_of_middle_half(*tasks))
    assert_exact(low, high, mean_of_middle_half, *tasks)

    x, y = rng.normal(0.5, 1, 4), rng.normal(0, 1, 4)
    value, low, high = stats.interval(stats.improvement, x, y, resamples=20_000)
    assert value == pytest.approx(share_won(x, y))
    assert_exact(low, high, share_won, x, y)


@pytest.mark.parametrize("runs", [1, 3])
def test_few_runs_have_no_interval(runs):
    value, low, high = stats.interval(stats.iqm, np.full(runs, 3.0), np.arange(5.0))
    assert np.isfinite(value) and np.isnan(low) and np.isnan(high)


def make_run(folder, script, seed, means, every=10, **args):
    run = (
        folder
        / "runs"
        / f"{args['env_id'].replace('/', '-')}__{script}__{seed}__20260101-000000-{len(list(folder.rglob('eval.csv')))}"
    )
    run.mkdir(parents=True)
    (run / "args.json").write_text(json.dumps(dict(args, seed=seed, resume="")))
    rows = [f"{every * (i + 1)},{mean},0,1.5,{mean}" for i, mean in enumerate(means)]
    (run / "eval.csv").write_text("\n".join(["step,mean,std,seconds,returns", *rows]) + "\n")
    return run


def command(folder, *flags):
    words = [sys.executable, ROOT / "benchmark" / "stats.py", "runs", "--out", "results", *flags]
    return subprocess.run(words, cwd=folder, capture_output=True, text=True)


def read(path):
    with open(path) as file:
        return list(csv.DictReader(file))


def test_command_compares_at_steps_that_all_runs_reached_on_a_common_scale(tmp_path):
    for env_id, scale in ("A-v0", 1), ("dm_control/B", 100):
        for seed in (1, 2):
            make_run(tmp_path, "classic", seed, [scale, scale * (2 * seed - 1), scale], env_id=env_id, algo="random")
            make_run(tmp_path, "classic", seed, [scale * 4, scale * (3 + 2 * seed)], env_id=env_id, algo="sac")
            # Seed 2 has gone further than all others: what it did there is not compared.
            more = [scale * 1000] * (seed == 2)
            first = scale * (2 if env_id == "A-v0" else 4)
            make_run(tmp_path, "simpo_neg", seed, [first, scale * 4 * seed, *more], env_id=env_id, power=1.0)
    make_run(tmp_path, "simpo_exp", 1, [4, 2], env_id="A-v0")  # on one task only: not among all
    result = command(tmp_path, "--zero", "classic algo=random", "--one", "classic algo=sac")
    assert result.returncode == 0, result.stderr
    table = {(row["task"], row["method"]): row for row in read(tmp_path / "results" / "table.csv")}
    assert len(table) == 10 and ("all", "simpo_exp") not in table
    assert float(table["A-v0", "simpo_exp"]["iqm"]) == 0  # its end, not its best
    # (4 - 2) / (6 - 2) and (8 - 2) / (6 - 2); scaled curves from 0, on B from 0.5, to these ends; of all: areas of
    # 0.25, 0.5, 0.75 and 1.
    expected = ("A-v0", "2", "20", 0.5), ("dm_control/B", "2", "20", 0.75), ("all", "2 2", "20 20", 0.625)
    for task, seeds, step, area in expected:
        row = table[task, "simpo_neg"]
        assert (row["seeds"], row["step"]) == (seeds, step)
        assert [float(row[x]) for x in ("iqm", "area")] == [1, area]
    assert table["A-v0", "simpo_neg"]["low"] == "nan"  # two seeds are too few
    chance = {
        (row["task"], row["method"], row["than"]): float(row["probability"])
        for row in read(tmp_path / "results" / "improvement.csv")
    }
    assert chance["all", "simpo_neg", "classic algo=sac"] == 0.5
    assert chance["all", "simpo_neg", "classic algo=random"] == 1
    for name in ("curves.png", "profiles.png"):
        assert (tmp_path / "results" / name).read_bytes().startswith(b"\x89PNG")
    assert {line.split()[0] for line in result.stdout.splitlines() if line} == {"task", "A-v0", "dm_control/B", "all"}


def test_curves_are_means_and_profiles_of_the_last_returns(tmp_path, monkeypatch):
    for seed in (1, 2):
        make_run(tmp_path, "falls", seed, [8, 4, seed], env_id="A-v0")
        make_run(tmp_path, "stays", seed, [9, 9, 9], env_id="A-v0")
    drawn, plot = {}, matplotlib.axes.Axes.plot

    def watched(self, *points, label=None, **kwargs):
        drawn[label] = points
        return plot(self, *points, label=label, **kwargs)

    monkeypatch.setattr(matplotlib.axes.Axes, "plot", watched)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", "stats.py runs --out results".split())
    runpy.run_path(str(ROOT / "benchmark" / "stats.py"), run_name="__main__")
    assert drawn["falls (2)"][1].tolist() == [8, 4, 1.5] and drawn["stays (2)"][1].tolist() == [9, 9, 9]
    assert np.interp([0.9, 1.5, 2.1], *drawn["falls"]).tolist() == [1, 0.5, 0]  # not of areas


def test_seeds_may_differ_where_a_method_is_not_on_all_tasks(tmp_path):
    for env_id in ("A-v0", "B-v0", "C-v0"):
        for method, end in ("random", 0), ("sac", 7):
            make_run(tmp_path, method, 1, [0, end], env_id=env_id)
    for env_id, seed in ("A-v0", 1), ("B-v0", 1), ("B-v0", 2):
        make_run(tmp_path, "simpo_exp", seed, [0, 7], env_id=env_id)
    result = command(tmp_path, "--zero", "random", "--one", "sac")
    assert result.returncode == 0, result.stderr


def test_intervals_are_drawn_around_the_curves(tmp_path, monkeypatch):
    drawn, returns = [], np.array([[1.0, 5.0], [2.0, 7.0], [3.0, 6.0], [9.0, 8.0], [4.0, 0.0]])
    monkeypatch.setattr(matplotlib.axes.Axes, "fill_between", lambda *x, **more: drawn.append(x[1:4]))
    stats.draw_curves({"A": {"sac": (np.array([10, 20]), returns)}}, tmp_path / "a.png")
    ((steps, low, high),) = drawn
    middle = np.array([3, 6])  # of the middle three
    assert steps.tolist() == [10, 20] and (low < middle).all() and (middle < high).all()


def test_command_has_no_scale_for_all_tasks_by_itself(tmp_path):
    for env_id, landscape in ("A-v0", "native"), ("A-v0", "sqrt"):
        make_run(tmp_path, "simpo_exp", 1, [1, 7], env_id=env_id, reward_landscape=landscape)
    assert command(tmp_path).returncode == 0
    table = read(tmp_path / "results" / "table.csv")
    assert [(row["task"], float(row["iqm"]), row["low"]) for row in table] == [
        ("A-v0", 7, "nan"),
        ("A-v0 sqrt", 7, "nan"),
    ]
    assert not (tmp_path / "results" / "profiles.png").exists()


def test_command_refuses_what_it_cannot_compare(tmp_path):
    assert "no eval.csv below runs" in command(tmp_path).stderr
    one = make_run(tmp_path, "simpo_exp", 1, [1, 7], env_id="A-v0")
    assert "--zero and --one must be methods with runs on A-v0: simpo_exp" in command(tmp_path, "--one", "sac").stderr
    same = command(tmp_path, "--zero", "simpo_exp", "--one", "simpo_exp").stderr
    assert same.startswith("--one must return more than --zero; on A-v0")
    make_run(tmp_path, "random", 1, [0, 0], env_id="A-v0")
    make_run(tmp_path, "random", 1, [0, 0], env_id="B-v0")
    for seed in (1, 2):
        make_run(tmp_path, "simpo_exp", seed, [1, 7], env_id="B-v0")
    (error,) = command(tmp_path, "--zero", "random", "--one", "simpo_exp").stderr.splitlines()
    assert "simpo_exp must have as many seeds on each task" in error and "{'A-v0': 1, 'B-v0': 2}" in error
    two = make_run(tmp_path, "simpo_exp", 1, [1, 7], env_id="A-v0")
    (error,) = command(tmp_path).stderr.splitlines()
    assert "two runs of one seed" in error and one.name in error and two.name in error
    assert not (tmp_path / "results").exists()
