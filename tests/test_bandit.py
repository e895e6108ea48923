"""bandit.py: regret, intervals, independence of trials, and the command as a user types it."""

import csv
import itertools
import math
import runpy
import signal
import subprocess
import sys
from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from conftest import ROOT

import bandit
from bandit import METHODS, Args, Trial

SMALL = Args(rounds=6, updates=4, groups=2, seeds=2)
FLAGS = "--seeds 2 --rounds 3 --updates 2 --fit-updates 40 --groups 1".split()


def test_defaults_are_those_of_the_figures():
    args = Args()
    assert (args.solver, args.diffusion_steps, args.temperature, args.error_clip) == ("dpm", 8, 0.1, 300.0)
    assert (args.epsilon, args.num_particles, args.target_kl, args.particle_noise) == (0.3, 32, 1.5, 0.2)


def test_regret_on_a_known_integral():
    """E_{a ~ N(m, s^2)} exp(-(a - c)^2 / (2 w^2)) = w / sqrt(w^2 + s^2) exp(-(m - c)^2 / (2 (w^2 + s^2)))."""
    args = replace(SMALL, rounds=1, updates=1, groups=128, action_bound=30.0, diffusion_steps=40)
    for start, std, width, height in ((-1.0, 0.8, 0.3, 0.5), (0.9, 0.5, 0.6, 0.7)):
        base = Trial(distance=20.0, height=height, width=width, start=start, start_std=std)  # one bump is all it sees
        regret, _ = bandit.train([replace(base, seed=seed) for seed in range(4)], args)
        gap, peak = abs(abs(start) - 1) * 10, height if start < 0 else 1.0
        known = 1 - peak * width / math.hypot(width, std) * math.exp(-0.5 * gap**2 / (width**2 + std**2))
        assert regret[..., 0].mean() == pytest.approx(known, abs=0.008)


def test_optimum_is_one_at_half_the_distance():
    a = torch.linspace(-3, 3, 6001, dtype=torch.float64)
    r = bandit.reward(a, 2.0, 0.5, 0.3)
    assert r.max() == 1 and a[r.argmax()].item() == pytest.approx(1.0)
    local = r[a < 0]
    assert local.max() == 0.5 and a[local.argmax()].item() == pytest.approx(-1.0)


def test_trials_do_not_depend_on_their_company():
    args = replace(SMALL, seeds=3)
    together, draws = bandit.train(bandit.trials_for(bandit.ESCAPE, METHODS, args), args)
    assert together.shape == (4, 3, 7) and draws.shape == (4, 3, 7, 64)
    for m, method in enumerate(METHODS):
        trials = bandit.trials_for(bandit.ESCAPE, [method], args)
        alone, alone_draws = bandit.train(trials, args)
        assert np.array_equal(alone[0], together[m]) and np.array_equal(alone_draws[0], draws[m]), method
        pair, _ = bandit.train(trials[1:], args)
        assert np.array_equal(pair[0], together[m, 1:]), method
    assert len(np.unique(together.reshape(12, 7), axis=0)) == 12  # all methods and seeds differ


def test_a_policy_learns_from_its_rewards():
    """A few rounds halve the regret of every method where there is nothing to be trapped by."""
    args = Args(seeds=4, rounds=12)
    regret, _ = bandit.train(bandit.trials_for(bandit.BROAD, METHODS, args), args)
    assert (regret[..., -1].mean(1) < 0.5 * regret[..., 0].mean(1)).all(), regret.mean(1)


def test_what_a_round_trains_on(monkeypatch):
    """Actions with the noise and their rewards, a nu per group, the error clip, regrets of actions without the noise,

    a temperature with its lower bound, the falling learning rate.
    """
    actions, values, temperatures, rates, clips, shapes = [], [], [], [], set(), set()
    loss, reweight, step, dual_step = bandit.Policies.loss, bandit.reweight, torch.optim.Adam.step, bandit.dual_step

    def loss_seen(self, action, *rest):
        actions.append(action)
        clips.add(rest[-1])
        return loss(self, action, *rest)

    def reweight_seen(q, temperature, *rest):
        values.append(q)
        temperatures.append(temperature)
        return reweight(q, temperature, *rest)

    def step_seen(self, *rest):
        rates.append(self.param_groups[0]["lr"])
        return step(self, *rest)

    monkeypatch.setattr(bandit.Policies, "loss", loss_seen)
    monkeypatch.setattr(bandit, "reweight", reweight_seen)
    monkeypatch.setattr(torch.optim.Adam, "step", step_seen)
    monkeypatch.setattr(bandit, "dual_step", lambda log, w, *rest: shapes.add(w.shape) or dual_step(log, w, *rest))
    args = replace(SMALL, rounds=10, updates=1, groups=16, target_kl=3.4, min_temperature=0.06, lr=0.01)
    regret, draws = bandit.train(bandit.trials_for(bandit.ESCAPE, ["Linear"], args), args)
    drawn = bandit.reward(torch.from_numpy(draws), 2.0, 0.5, 0.3)
    np.testing.assert_allclose(regret, 1 - drawn.mean(-1), atol=1e-6)
    assert {q.shape for q in values} == shapes == {(2, 16, 32)} and clips == {300.0}  # each group has its nu and KL
    for k in range(10):
        noise = actions[k] - torch.from_numpy(draws[0, :, k])
        assert noise.mean().abs() < 0.03 and noise.std().item() == pytest.approx(0.2, rel=0.1)
        torch.testing.assert_close(values[k].view(2, -1), bandit.reward(actions[k], 2.0, 0.5, 0.3))
    temperatures = torch.stack(temperatures)
    assert (temperatures[0] - 0.1).abs().max() < 1e-9
    assert temperatures.min().item() == pytest.approx(0.06) and (temperatures < 0.0601).sum() > 4
    assert rates == pytest.approx([0.01 * (1 - 0.09 * k) for k in range(10)])


def test_every_update_has_times_and_noise_of_its_own(monkeypatch):
    seen, loss = [], bandit.Policies.loss
    monkeypatch.setattr(bandit.Policies, "loss", lambda self, *x: seen.append((x[2], x[3])) or loss(self, *x))
    args = replace(SMALL, rounds=2, updates=3)
    bandit.train(bandit.trials_for(bandit.ESCAPE, ["Linear", "Exp"], args), args)
    assert len(seen) == 6
    for (i, noise), (j, other) in itertools.combinations(seen, 2):
        assert (i != j).any() and (noise != other).all()
    assert all(len(row.unique()) == row.numel() for _, noise in seen for row in noise)


def test_figure_1_shows_what_its_labels_say(monkeypatch):
    """Stand-ins fitted to the signed target draw 1 and have velocity 3, then 4; those to its positive part -1 and 9."""

    class StandIn:
        schedule = bandit.noise_schedule("dpm", 8)

        def sample(self, noise, bound):
            return torch.tensor([[1.0], [-1.0]]).expand(2, 100)

        def velocity(self, x, i):
            return torch.stack([torch.full_like(x[0], self.parameters[0]), torch.full_like(x[0], 9.0)])

    def fit(weigh, args):
        a = torch.linspace(-3, 3, 100)
        assert weigh[0](a).min() == -args.epsilon and torch.equal(weigh[0](a).clamp(min=0), weigh[1](a))
        return StandIn(), [(1, [3.0]), (9, [4.0])]

    rows = []
    monkeypatch.setattr(bandit, "fit", fit)
    monkeypatch.setattr(bandit, "save", lambda args, name, figure, made: rows.extend(made))
    bandit.figure_1(replace(SMALL, diffusion_steps=8))
    series = {}
    for row in rows:
        series.setdefault((row["panel"], row["series"]), []).append((row["x"], row["y"]))
    for label, place in ("signed target", 1), ("positive part", -1):
        density = np.array(series["a", f"generated, fitted to the {label}"])
        assert density[density[:, 1].argmax(), 0] == pytest.approx(place, abs=0.1)
    for panel in "bc":
        assert {y for _, y in series[panel, r"learned $v_\theta$"]} == {4.0}
    assert any(math.isnan(y) for panel in "bc" for _, y in series[panel, "closed form (8)"])  # case II
    assert any("case II" in name for panel, name in series if panel == "d")
    assert all(x[0][1] != x[1][1] for (panel, _), x in series.items() if panel == "d")
    for panel, t in zip("bc", ("0.56", "0.25"), strict=True):
        best = np.array(series[panel, "closed form (8)"])[:, 1]
        distance = np.nanmedian(np.abs(best - 4))  # it is drawn in case I only
        assert series["d", f"case I, t = {t}"][-1][1] == pytest.approx(distance, rel=0.01)


def test_figures_2_and_3_show_their_stages_and_differences(tmp_path, monkeypatch):
    """The draws of round k are all at k - 1.95; what is plotted beside a regret is its difference from Square's."""
    seen, regret = [], np.random.default_rng(0).random((4, 2, 5))
    draws = np.tile(np.array([-1.95, -0.95, 0.05, 1.05, 2.05])[:, None], (4, 2, 1, 7))
    monkeypatch.setattr(bandit, "train", lambda trials, *_: (regret[: len(trials) // 2], draws))
    monkeypatch.setattr(bandit, "plot_regret", lambda ax, method, y, **_: seen.append(y))
    args = Args(seeds=2, rounds=4, save_dir=tmp_path)
    bandit.figure_2(args)
    rows = csv.DictReader(open(tmp_path / "figure2_histograms.csv"))
    at = [(row["stage"], float(row["x"])) for row in rows if float(row["share"]) == 1]
    assert at == 4 * [("start", -1.95), ("middle", 0.05), ("end", 2.05)]
    draws = np.full((4, 2, 5, 7), np.float32(0.3))  # draws at the bound are in the last bin
    bandit.figure_2(replace(args, action_bound=0.3))
    rows = csv.DictReader(open(tmp_path / "figure2_histograms.csv"))
    assert sum(float(row["share"]) for row in rows) == pytest.approx(4 * 3)
    seen.clear()
    bandit.figure_3(args)
    for m, (one, other) in enumerate(zip(seen[::2], seen[1::2], strict=True)):
        assert np.array_equal(one, regret[m % 3]) and np.array_equal(other, regret[m % 3] - regret[2])


def test_snapshots_of_a_fit_are_of_their_update_and_its_learning_rate_falls(monkeypatch):
    rates, step = [], torch.optim.Adam.step
    monkeypatch.setattr(torch.optim.Adam, "step", lambda self: rates.append(self.param_groups[0]["lr"]) or step(self))
    _, snapshots = bandit.fit([torch.ones_like], replace(SMALL, fit_updates=5, lr=0.6), batch=8)
    assert rates == pytest.approx([0.5, 0.4, 0.3, 0.2, 0.1])
    first, *_, last = (parameters for _, parameters in snapshots)
    assert all((a != b).any() for a, b in zip(first, last, strict=True))


def test_intervals_are_wilsons_and_the_bootstrap_s():
    assert bandit.share_interval(27, 30) == pytest.approx([0.9, 0.7438, 0.9654], abs=1e-4)
    x = np.random.default_rng(1).normal(3, 2, (400, 2))
    half = 1.96 * x.std(0) / 20
    mean, low, high = bandit.mean_interval(x)
    np.testing.assert_allclose([mean, low, high], [x.mean(0), x.mean(0) - half, x.mean(0) + half], atol=0.03)
    assert (low < mean).all() and (mean < high).all()


def test_summary_counts_by_hand():
    """Twenty rounds, and the last ten, of two regrets; the local optimum's is 0.5."""
    trials = bandit.trials_for(bandit.ESCAPE, ["Linear", "Square"], replace(SMALL, seeds=3))
    late = np.array([[[0.8, 0.21], [0.8, 0.24], [0.6, 0.6]], [[0.8, 0.21], [0.54, 0.54], [0.48, 0.48]]])
    regret = np.concatenate([np.ones((2, 3, 20)), late.repeat(5, axis=2)], axis=2)
    linear, square = bandit.summarise("x", trials, regret)
    assert (linear["reached"], linear["trapped"], linear["trials"]) == (0, 2, 3)
    assert (square["reached"], square["trapped"], square["minus_square"]) == (1, 2, 0)
    assert (square["share"], linear["share"]) == pytest.approx((1 / 3, 0))
    assert (linear["final"], linear["mean"]) == pytest.approx((0.541667, (20 + 5.41667) / 30))
    assert linear["minus_square"] == pytest.approx(0.1 / 9)
    for name in ("final", "mean", "share"):
        assert square[f"{name}_low"] < square[name] < square[f"{name}_high"], name
    above, _ = bandit.summarise("x", trials, np.stack([regret[1] + 0.25, regret[1]]))  # paired: no width
    assert [above[f"minus_square{end}"] for end in ("", "_low", "_high")] == pytest.approx([0.25] * 3)


# ----------------------------------------------------------------------------------------------------- command line


def run(monkeypatch, *flags, script="bandit"):
    monkeypatch.setattr(sys, "argv", [f"{script}.py", *map(str, flags)])
    monkeypatch.setattr(signal, "signal", lambda *_: None)  # this process keeps its own handlers
    runpy.run_path(str(ROOT / f"{script}.py"), run_name="__main__")


def start(*flags, **options):
    command = [sys.executable, bandit.__file__, *map(str, flags)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)


def test_every_figure_and_same_seed_same_files(tmp_path, monkeypatch):
    process = start(*FLAGS, cwd=tmp_path)
    output, progress = process.communicate()
    assert process.returncode == 0, progress
    made = tmp_path / "runs/bandit"
    names = [f"figure{i}.{kind}" for i in (1, 2, 3) for kind in ("csv", "png")]
    assert sorted(path.name for path in made.iterdir()) == sorted([*names, "figure2_histograms.csv", "summary.csv"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["runs"]
    assert all(method in output for method in METHODS) and "figure 3, sharp" in progress  # a table, and progress
    rows = list(csv.DictReader(open(made / "summary.csv")))
    assert [(row["figure"], row["setting"]) for row in rows] == [("2", "escape")] * 4 + [("3", "broad")] * 3 + [
        ("3", "sharp")
    ] * 3
    panel = {}
    for row in csv.DictReader(open(made / "figure1.csv")):
        panel.setdefault((row["panel"], row["series"]), []).append((float(row["x"]), float(row["y"])))
    (pi_old, target, positive), step = [[y for _, y in panel["a", name]] for _, name in list(panel)[:3]], 0.025
    assert step * sum(target) == pytest.approx(1, abs=2e-3) and step * sum(positive) == pytest.approx(1, abs=2e-3)
    weights = [y / p for y, p in zip(target, pi_old, strict=True)]
    assert min(weights) == pytest.approx(-Args().epsilon, rel=1e-3) and min(positive) == 0
    run(monkeypatch, "--figure", 2, *FLAGS, "--save-dir", tmp_path / "b")
    run(monkeypatch, "--figure", 2, *FLAGS, "--save-dir", tmp_path / "c", "--seed", 7)
    for name in ("figure2.csv", "figure2.png", "figure2_histograms.csv"):
        a, b, c = ((folder / name).read_bytes() for folder in (made, tmp_path / "b", tmp_path / "c"))
        assert a == b and a != c, name


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_it_with_128_and_its_number(tmp_path, number):
    process = start("--figure", 2, "--seeds", 2, "--rounds", 100_000, "--save-dir", tmp_path)
    assert "round" in process.stderr.read(120)  # the progress bar is there
    process.send_signal(number)
    _, rest = process.communicate(timeout=120)
    assert process.returncode == 128 + number and "Traceback" not in rest
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "flags, wrong",
    [
        ("--seeds 1", "--seeds must be at least 2; got 1"),
        ("--rounds 0", "--rounds must be at least 1; got 0"),
        ("--epsilon -1", "--epsilon must be at least 0 and finite; got -1"),
        ("--epsilon nan", "--epsilon must be at least 0 and finite; got nan"),
        ("--temperature 0", "--temperature must be above 0 and finite; got 0"),
        ("--figure 4", "--figure must be 1, 2, 3 or all; got 4"),
        ("--solver euler", "--solver must be dpm or ddpm; got euler"),
        ("--diffusion-steps 2", "--diffusion-steps must be at least 3 with --solver dpm; got 2"),
        ("--solver ddpm --diffusion-steps 0", "--diffusion-steps must be at least 1; got 0"),
        ("--target-kl 4", "--target-kl must be above 0 and below log(num_particles) = 3.47; got 4"),
        ("--save-dir /proc/nowhere", "--save-dir /proc/nowhere: cannot write there"),
    ],
)
def test_bad_values_get_one_line(tmp_path, monkeypatch, capsys, flags, wrong):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        run(monkeypatch, *flags.split())
    line = str(stop.value.code)
    assert wrong in line and "\n" not in line.strip() and len(line) < 300
    assert capsys.readouterr().out == ""
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("flags", ["--seeds many", "--sedes 3"])
def test_unreadable_flags_are_named(tmp_path, monkeypatch, capsys, flags):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        run(monkeypatch, *flags.split())
    assert stop.value.code == 2 and flags.split()[0] in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_help_explains_every_flag(monkeypatch, capsys):
    with pytest.raises(SystemExit) as stop:
        run(monkeypatch, "--help")
    text = capsys.readouterr().out
    assert stop.value.code == 0 and all(f"--{f.name.replace('_', '-')} " in text for f in fields(Args))
    assert all(symbol in text for symbol in ("lambda", "delta", "epsilon", "DPM-Solver++(2M)"))


def test_map_changes_what_it_says(tmp_path, monkeypatch):
    """benchmark/bandit_map.py on a small scale: the swept field reaches the trials, or the arguments."""
    monkeypatch.syspath_prepend(ROOT / "benchmark")
    import bandit_map

    seen = []

    def train(trials, args, name):
        seen.append((trials[0].distance, trials[0].height, args.error_clip, trials[-1].epsilon))
        return np.tile(np.linspace(1, 0, 81), (len({(t.method, t.epsilon) for t in trials}), 2, 1)), None

    monkeypatch.setattr(bandit_map, "train", train)
    monkeypatch.setattr(bandit_map, "DISTANCES", (1.2, 2.8))
    monkeypatch.setattr(bandit_map, "OTHERS", {"height": (0.3, 0.9), "error_clip": (5.0, 30.0)})
    bandit_map.escape_map(bandit_map.Args(seeds=2, save_dir=tmp_path))
    assert seen[:2] == [(1.2, 0.5, 300.0, 1.0), (2.8, 0.5, 300.0, 1.0)]
    assert seen[2:] == [(2.0, 0.3, 300.0, 0.3), (2.0, 0.9, 300.0, 0.3), (2.0, 0.5, 5.0, 0.3), (2.0, 0.5, 30.0, 0.3)]
    rows = list(csv.DictReader(open(tmp_path / "escape_map.csv")))
    assert len(rows) == 2 * 8 + 4 * 4 and {row["reached"] for row in rows} == {"2"}
