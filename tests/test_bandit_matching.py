"""bandit.py: weighted matching (7) leads to (8) and (10), on weights for which both are known exactly."""

import math

import pytest
import torch

import bandit

# Weights whose product with the old policy N(0, 1) is a mixture of Gaussians, so that (8) and (10) are known exactly:
# w(a) = sum_j c_j exp(-(a - m_j)^2 / (2 s_j^2)), normalised below.
POSITIVE = [(1.0, 0.8, 0.5), (0.3, -1.0, 0.6)]
SIGNED = [(1.0, 0.0, 1e6), (-1.25, 0.3, 0.5)]  # negative around 0.3, yet case I for all t >= T_SIGNED
T_SIGNED = 0.5
T = 40


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


@pytest.mark.parametrize("solver, power", [("dpm", 2), ("ddpm", 1)])
def test_loss_is_7_by_hand(solver, power, monkeypatch):
    """One policy, three actions, each with its own weight and time, and an error beyond the clip."""
    monkeypatch.setattr(bandit.Policies, "velocity", lambda self, x, i: 0.3 * x + i)
    zeros, generator = torch.zeros(1, 1), torch.Generator().manual_seed(0)
    policies = bandit.Policies(zeros, zeros + 1, [generator], [0], 4, bandit.noise_schedule(solver, 4))
    actions, weights, steps, noises = [0.5, -1.0, 2.0], [1.2, -0.3, 2.0], [0, 2, 3], [0.1, -0.7, 1.5]
    total = 0
    for action, weight, i, noise in zip(actions, weights, steps, noises, strict=True):
        t = ((i + 1) / 4) ** power
        alpha, sigma = math.cos(math.pi / 2 * t), math.sin(math.pi / 2 * t)
        error = 0.3 * (alpha * action + sigma * noise) + i - (alpha * noise - sigma * action)
        total += weight * min(error**2, 20.0) / 3
    rows = [torch.tensor([row]) for row in (actions, weights, steps, noises)]
    assert policies.loss(*rows, 20.0).tolist() == pytest.approx([total], rel=1e-5)


@pytest.fixture(scope="module")
def fitted():
    """Policies fitted by (7) to N(0, 1) with the positive, the signed and no weights, on t = 1/T, 2/T, ..., 1."""
    weigh = [signed_mixture(POSITIVE)[1], signed_mixture(SIGNED)[1], torch.ones_like]
    return bandit.fit(weigh, bandit.Args(fit_updates=1200, solver="ddpm", diffusion_steps=T))[0]


@pytest.mark.parametrize(
    "index, bumps, times, most", [(0, POSITIVE, (0.2, 0.5, 0.8), 0.05), (1, SIGNED, (T_SIGNED, 0.65, 0.8), 0.15)]
)
def test_learned_velocity_is_the_closed_form(fitted, index, bumps, times, most):
    parts, _ = signed_mixture(bumps)
    x = torch.linspace(-3, 3, 601)
    for t in times:
        density, velocity = path_density_and_velocity(parts, x.double(), t)
        assert (density > 0).all()  # case I
        with torch.no_grad():
            learned = fitted.velocity(x.expand(3, -1), round(T * t) - 1).double()
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
    draws = fitted.sample(torch.randn(3, T, 8_000, generator=generator), 6.0)
    assert kolmogorov(draws[0], positive, 0.0) < 0.03 < 0.1 < kolmogorov(draws[2], positive, 0.0)
    x = torch.randn(3, 8_000, generator=generator)
    with torch.no_grad():
        for i in range(T, round(T * T_SIGNED), -2):  # midpoint rule from t = i/T to (i - 2)/T
            half = x - math.pi / 2 / T * fitted.velocity(x, i - 1)
            x = x - math.pi / 2 * 2 / T * fitted.velocity(half, i - 2)
    assert kolmogorov(x[1], signed, T_SIGNED) < 0.045 < 0.09 < kolmogorov(x[2], signed, T_SIGNED)
