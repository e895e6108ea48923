"""bandit.py: weights, matching, regret and independence of trials, each against something it did not compute itself."""

import math
import runpy
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

import bandit
from bandit import METHODS, Args, Trial

SMALL = Args(rounds=6, updates=4, groups=2, sweep_seeds=2, seeds=2)

# ---------------------------------------------------------------------------------------------------------- weights


def weights_by_bisection(q, temperature, method, epsilon):
    """w = g((q - nu) / temperature) with nu bisected in float64 until the mean weight is 1."""
    g = {
        "Exp": lambda y: math.exp(min(y, 700)),
        "Linear": lambda y: max(y, 0.0),
        "Square": lambda y: max(y, 0.0) ** 2,
        "Lin. Neg.": lambda y: max(y, -epsilon),
    }[method]
    best, K = max(q), len(q)
    low, high = 0.0, 1.0  # of y_max = (max q - nu) / temperature
    if method == "Exp":
        low = -1.0
    while sum(g(high - (best - x) / temperature) for x in q) < K:
        high *= 2
    for _ in range(200):
        middle = (low + high) / 2
        if sum(g(middle - (best - x) / temperature) for x in q) < K:
            low = middle
        else:
            high = middle
    return [g(high - (best - x) / temperature) for x in q]


@settings(max_examples=200, deadline=None)
@given(
    q=st.lists(st.floats(-3, 3, width=32), min_size=1, max_size=40),
    temperature=st.floats(-3, 2).map(lambda x: 10**x),
    method=st.sampled_from(METHODS),
    epsilon=st.floats(0, 5),
    offset=st.sampled_from([0.0, -1000.0, 4096.0]),
)
@example(q=[i / 31 for i in range(32)], temperature=0.4, method="Lin. Neg.", epsilon=0.5, offset=0.0)
@example(q=[0.7], temperature=0.1, method="Lin. Neg.", epsilon=0.5, offset=0.0)
@example(q=[0.7] * 32, temperature=0.1, method="Square", epsilon=0.0, offset=4096.0)
@example(q=[1.0, 1.0, 0.0, 0.0], temperature=1e-3, method="Linear", epsilon=0.0, offset=0.0)
def test_weights_agree_with_bisection(q, temperature, method, epsilon, offset):
    q = torch.tensor(q, dtype=torch.float64) + offset
    weights, nu = bandit.reweight(q, temperature, method, epsilon)
    expected = torch.tensor(weights_by_bisection(q.tolist(), temperature, method, epsilon), dtype=torch.float64)
    assert weights.mean().item() == pytest.approx(1, abs=1e-9)
    torch.testing.assert_close(weights, expected, rtol=1e-6, atol=1e-7)
    top = (q - nu).max() / temperature  # nu is the one that the weights were made with
    assert {"Exp": top.exp(), "Square": top**2}.get(method, top).item() == pytest.approx(weights.max().item(), rel=1e-4)


def test_weights_batch_float32_without_gradient():
    q = torch.randn(3, 5, 32, generator=torch.Generator().manual_seed(0), requires_grad=True)
    temperature = torch.tensor([0.01, 0.1, 1.0]).view(3, 1, 1)
    for method in METHODS:
        weights, nu = bandit.reweight(q, temperature, method, 0.5)
        assert weights.dtype == nu.dtype == torch.float32 and not weights.requires_grad
        assert weights.shape == (3, 5, 32) and nu.shape == (3, 5, 1)
        for i in range(3):
            alone, _ = bandit.reweight(q[i, 2], temperature[i].item(), method, 0.5)
            torch.testing.assert_close(weights[i, 2], alone)
    assert bandit.reweight(q, 0.05, "Lin. Neg.", 0.5)[0].min() == -0.5


def test_dual_step_reaches_the_target_kl():
    q = torch.rand(1, 4, 32, generator=torch.Generator().manual_seed(0))
    for method in METHODS:
        log_temperature = torch.zeros(1, 1, 1, dtype=torch.float64)
        for _ in range(300):
            weights, _ = bandit.reweight(q, log_temperature.exp(), method, 0.3)
            log_temperature = bandit.dual_step(log_temperature, weights, torch.tensor([[1.5]]), 0.2)
        p = weights.double().clamp(min=1e-6) / weights.double().clamp(min=1e-6).sum(-1, keepdim=True)
        assert (math.log(32) + (p * p.log()).sum(-1)).mean().item() == pytest.approx(1.5, abs=1e-3), method


# --------------------------------------------------------------------------------------------------------- matching

# Weights whose product with the old policy N(0, 1) is a mixture of Gaussians, so that (8) and (10) are known exactly:
# w(a) = sum_j c_j exp(-(a - m_j)^2 / (2 s_j^2)), normalised below.
POSITIVE = [(1.0, 0.8, 0.5), (0.3, -1.0, 0.6)]
SIGNED = [(1.0, 0.0, 1e6), (-1.25, 0.3, 0.5)]  # negative around 0.3, yet case I for all t >= T_SIGNED
T_SIGNED = 0.5


def signed_mixture(bumps):
    """Components (mass, mean, std) of w pi_old with pi_old = N(0, 1), of total mass 1, and w as a function."""
    parts = []
    for c, m, s in bumps:
        variance = s**2 / (1 + s**2)
        parts.append(
            (c * math.sqrt(variance) * math.exp(-0.5 * m**2 / (1 + s**2)), m / (1 + s**2), math.sqrt(variance))
        )
    total = sum(part[0] for part in parts)
    w = lambda a: sum(c * torch.exp(-0.5 * ((a - m) / s) ** 2) for c, m, s in bumps) / total  # noqa: E731
    return [(mass / total, mean, std) for mass, mean, std in parts], w


def path_density_and_velocity(parts, x, t):
    """(10) and (8) in units of pi/2 from the components: each is Gaussian along the path, with a linear velocity."""
    alpha, sigma = math.cos(math.pi / 2 * t), math.sin(math.pi / 2 * t)
    density = velocity = 0
    for mass, mean, std in parts:
        variance = alpha**2 * std**2 + sigma**2
        p = mass * torch.exp(-0.5 * (x - alpha * mean) ** 2 / variance) / math.sqrt(2 * math.pi * variance)
        action = mean + alpha * std**2 / variance * (x - alpha * mean)  # E[a_0 | a_t = x] in this component
        density, velocity = density + p, velocity + p * (alpha * (x - alpha * action) / sigma - sigma * action)
    return density, velocity / density


def kolmogorov(draws, parts, t):
    """Largest gap between the draws' distribution function and that of (10)."""
    alpha, sigma = math.cos(math.pi / 2 * t), math.sin(math.pi / 2 * t)
    x = draws.double().sort().values
    cdf = sum(m * torch.special.ndtr((x - alpha * mu) / math.sqrt((alpha * s) ** 2 + sigma**2)) for m, mu, s in parts)
    return (cdf - (torch.arange(len(x)) + 0.5) / len(x)).abs().max().item()


@pytest.fixture(scope="module")
def fitted():
    """Policies fitted by (7) to N(0, 1) with the positive, the signed and no weights."""
    weigh = [signed_mixture(POSITIVE)[1], signed_mixture(SIGNED)[1], torch.ones_like]
    return bandit.fit(weigh, Args(fit_updates=1200))[0]


@pytest.mark.parametrize(
    "index, bumps, times, most", [(0, POSITIVE, (0.2, 0.5, 0.8), 0.05), (1, SIGNED, (T_SIGNED, 0.65, 0.8), 0.15)]
)
def test_learned_velocity_is_the_closed_form(fitted, index, bumps, times, most):
    parts, _ = signed_mixture(bumps)
    x = torch.linspace(-3, 3, 601)
    for t in times:
        density, velocity = path_density_and_velocity(parts, x.double(), t)
        assert (density > 0).all()  # case I
        time = torch.full((3, len(x)), t)
        with torch.no_grad():
            learned = fitted.velocity(x.expand(3, -1), time, fitted.time_features(time)).double()
        error = ((learned - velocity) ** 2 * density / density.sum()).sum(1).sqrt()  # root mean square under (10)
        assert error[index] < most, (t, error)
        assert error[2] > 3 * error[index], (t, error)  # an unweighted fit is far off


def test_figure_closed_form_is_the_closed_form():
    parts, w = signed_mixture(SIGNED)
    grid, x = torch.linspace(-8, 8, 4001, dtype=torch.float64), torch.linspace(-3, 3, 61, dtype=torch.float64)
    mass = torch.exp(-0.5 * grid**2) / math.sqrt(2 * math.pi) * (grid[1] - grid[0])
    velocity, expected_w = bandit.closed_form(x, 0.6, grid, mass, w(grid))
    torch.testing.assert_close(velocity, path_density_and_velocity(parts, x, 0.6)[1], rtol=1e-6, atol=1e-8)
    old, _ = path_density_and_velocity([(1.0, 0.0, 1.0)], x, 0.6)
    torch.testing.assert_close(expected_w, path_density_and_velocity(parts, x, 0.6)[0] / old, rtol=1e-6, atol=1e-8)


def test_generated_density_is_the_path(fitted):
    """(10): the sampler at t = 0 for positive weights; the flow's own ODE down to T_SIGNED for signed ones."""
    generator = torch.Generator().manual_seed(1)
    positive, signed = signed_mixture(POSITIVE)[0], signed_mixture(SIGNED)[0]
    draws = fitted.sample(torch.randn(3, 51, 8_000, generator=generator), 6.0)
    assert kolmogorov(draws[0], positive, 0.0) < 0.03 < 0.1 < kolmogorov(draws[2], positive, 0.0)
    x, steps = torch.randn(3, 8_000, generator=generator), 50
    with torch.no_grad():
        for i in range(steps):
            time = torch.full_like(x, 1 - (1 - T_SIGNED) * (i + 0.5) / steps)
            half = x - (1 - T_SIGNED) / steps / 2 * math.pi / 2 * fitted.velocity(x, time, fitted.time_features(time))
            x = x - (1 - T_SIGNED) / steps * math.pi / 2 * fitted.velocity(half, time, fitted.time_features(time))
    assert kolmogorov(x[1], signed, T_SIGNED) < 0.045 < 0.09 < kolmogorov(x[2], signed, T_SIGNED)


# -------------------------------------------------------------------------------------------------- regret and trials


def test_regret_on_a_known_integral():
    """E_{a ~ N(m, s^2)} exp(-(a - c)^2 / (2 w^2)) = w / sqrt(w^2 + s^2) exp(-(m - c)^2 / (2 (w^2 + s^2)))."""
    args = replace(SMALL, rounds=1, updates=1, groups=128, action_bound=30.0, diffusion_steps=100)
    for start, std, width, height in ((-1.0, 0.8, 0.3, 0.5), (0.9, 0.5, 0.6, 0.7)):
        base = Trial(distance=20.0, height=height, width=width, start=start, start_std=std)  # one bump is all it sees
        regret, _ = bandit.train([replace(base, seed=seed) for seed in range(4)], args)
        gap, peak = abs(abs(start) - 1) * 10, height if start < 0 else 1.0
        known = 1 - peak * width / math.hypot(width, std) * math.exp(-0.5 * gap**2 / (width**2 + std**2))
        assert regret[:, 0].mean().item() == pytest.approx(known, abs=0.008)


def test_optimum_is_one_at_half_the_distance():
    a = torch.linspace(-3, 3, 6001, dtype=torch.float64)
    r = bandit.reward(a, 2.0, 0.5, 0.3)
    assert r.max() == 1 and a[r.argmax()].item() == pytest.approx(1.0)
    lesser = r[a < 0]
    assert lesser.max() == 0.5 and a[lesser.argmax()].item() == pytest.approx(-1.0)


def test_trials_do_not_depend_on_their_company():
    base = replace(bandit.ESCAPE, start_std=1.0)
    trials = bandit.trials_for(base, METHODS, 3, SMALL)
    together, draws = bandit.train(trials, SMALL)
    for method in METHODS:
        i = [n for n, trial in enumerate(trials) if trial.method == method]
        alone, alone_draws = bandit.train([trials[n] for n in i], SMALL)
        assert torch.equal(alone, together[i]) and torch.equal(alone_draws, draws[i]), method
    one, _ = bandit.train([trials[7]], SMALL)
    chunks, _ = bandit.train(trials[::-1], replace(SMALL, batch_trials=5))
    assert one.shape == (1, 7) and torch.equal(one[0], together[7]) and torch.equal(chunks.flip(0), together)
    assert len({tuple(row.tolist()) for row in together}) == len(trials)  # all methods and seeds differ


def test_share_interval_is_wilsons():
    assert bandit.share_interval([True] * 27 + [False] * 3) == pytest.approx([0.9, 0.7438, 0.9654], abs=1e-4)


# ----------------------------------------------------------------------------------------------------- command line


def run(monkeypatch, *flags):
    monkeypatch.setattr(sys, "argv", ["bandit.py", *map(str, flags)])
    runpy.run_path(str(Path(bandit.__file__)), run_name="__main__")


def test_every_figure_and_same_seed_same_files(tmp_path, monkeypatch):
    small = "--seeds 2 --sweep-seeds 1 --rounds 3 --updates 2 --fit-updates 40 --groups 1".split()
    command = [sys.executable, bandit.__file__, *small, "--save-dir", tmp_path / "a"]
    output = subprocess.run(command, capture_output=True, text=True, check=True)
    names = [f"figure{i}.{kind}" for i in (1, 2, 3, 4) for kind in ("csv", "png")]
    names += ["figure2_histograms.csv", "figure3_sweeps.csv", "summary.csv"]
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == sorted(names)
    assert all(method in output.stdout for method in METHODS) and "figure 4" in output.stderr  # a table, and progress
    run(monkeypatch, "--figure", 2, *small, "--save-dir", tmp_path / "b")
    run(monkeypatch, "--figure", 2, *small, "--save-dir", tmp_path / "c", "--seed", 7)
    for name in ("figure2.csv", "figure2.png", "figure2_histograms.csv"):
        a, b, c = ((tmp_path / folder / name).read_bytes() for folder in "abc")
        assert a == b and a != c, name


@pytest.mark.parametrize(
    "flags, wrong",
    [
        ("--seeds 0", "--seeds must be at least 1; got 0"),
        ("--epsilon -1", "--epsilon must be at least 0 and finite; got -1"),
        ("--epsilon nan", "--epsilon must be at least 0 and finite; got nan"),
        ("--figure 5", "--figure must be one of 1, 2, 3, 4, all; got 5"),
        ("--target-kl 4", "--target-kl must be above 0 and below log(num_particles) = 3.47; got 4"),
        ("--save-dir /proc/nowhere", "--save-dir /proc/nowhere: cannot write there"),
        ("--device cuda:99", "--device cuda:99"),
        ("--seeds many", "--seeds"),
        ("--sedes 3", "--sedes"),
    ],
)
def test_bad_flags_get_one_line(tmp_path, monkeypatch, capsys, flags, wrong):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(bandit, "train", None)
    with pytest.raises(SystemExit) as stop:
        run(monkeypatch, *flags.split())
    line = str(stop.value.code)
    assert wrong in line and "\n" not in line.strip() and len(line) < 300
    assert capsys.readouterr().out == ""
    assert not list(tmp_path.rglob("*.png"))
