"""reweight of each script: equal to an independent float64 solution, with the properties that the paper asks of it."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import simpo_exp
import simpo_neg
import simpo_power

POWERS = [0.5, 1.0, 1.5, 2.0, 3.0]
EPSILONS = [0.0, 0.1, 0.5, 1.0, 3.0]
DEVICES = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]


def bisect(q, temperature, g):
    """One row, in float64 throughout: the nu at which the weights g((q - nu) / temperature) average 1."""
    x = (q - q.max()) / temperature
    low, high = -1.0, 1.0
    while g(x - low).mean() < 1:
        low *= 2
    while g(x - high).mean() > 1:
        high *= 2
    for _ in range(200):
        middle = 0.5 * (low + high)
        low, high = (middle, high) if g(x - middle).mean() > 1 else (low, middle)
    return g(x - middle)


def g_exp(y):
    return np.exp(np.minimum(y, 700.0))


def g_signed(y, power, epsilon):
    return np.where(y > 0, np.abs(y) ** power, np.maximum(y, -epsilon))


def variants():
    yield simpo_exp.reweight, (), g_exp
    for p in POWERS:
        yield simpo_power.reweight, (p,), lambda y, p=p: g_signed(y, p, 0.0)
        for e in EPSILONS:
            yield simpo_neg.reweight, (p, e), lambda y, p=p, e=e: g_signed(y, p, e)


@st.composite
def cases(draw):
    """A batch of values of any scale, offset and shape, with or without ties, and a temperature for their spread."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    shape = draw(st.sampled_from([(1,), (2,), (7,), (3, 32), (2, 2, 5), (1, 64)]))
    q = rng.standard_normal(shape) if draw(st.booleans()) else rng.standard_cauchy(shape)
    if draw(st.booleans()):
        q = np.round(q)  # ties
    if draw(st.integers(0, 9)) == 0:
        q = np.zeros(shape)
    q = q * 10.0 ** draw(st.integers(-3, 3)) + draw(st.sampled_from([0.0, 1.0, -1e3, 1e6, -1e6]))
    q = torch.tensor(np.clip(q, -1e6, 1e6), dtype=draw(st.sampled_from([torch.float32, torch.float64])))
    spread = float(q.double().max() - q.double().min()) or 1.0
    return q, spread * 10.0 ** draw(st.floats(-6, 6))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("reweight, settings_of_g, g", variants())
def test_equal_to_float64_bisection_and_keeps_the_order(reweight, settings_of_g, g, device):

    @settings(max_examples=60, deadline=None, derandomize=True, database=None)
    @given(cases())
    def check(case):
        q, temperature = case[0], torch.tensor(case[1], dtype=case[0].dtype)  # a tensor, as in training
        weights, nu = (x.cpu() for x in reweight(q.to(device), temperature, *settings_of_g))
        assert weights.shape == q.shape and nu.shape == (*q.shape[:-1], 1)
        assert weights.dtype == nu.dtype == q.dtype
        rows, w = q.double().reshape(-1, q.shape[-1]).numpy(), weights.double().reshape(-1, q.shape[-1]).numpy()
        expected = np.stack([bisect(row, temperature.item(), g) for row in rows])
        largest = expected.max(axis=-1, keepdims=True)
        np.testing.assert_array_less(np.abs(w - expected) / largest, 1e-5)
        np.testing.assert_allclose(w.mean(-1), 1, rtol=1e-5 if q.dtype == torch.float32 else 1e-9)
        for row, row_weights in zip(rows, w, strict=True):
            assert (np.diff(row_weights[np.argsort(row)]) >= -1e-12).all()
            assert all(np.ptp(row_weights[row == value]) == 0 for value in np.unique(row))

    check()


@pytest.mark.parametrize("power", POWERS)
def test_floor_zero_is_exactly_the_power_script(power):
    q = torch.randn(200, 32, generator=torch.Generator().manual_seed(0))
    for temperature in (0.01, 1.0, 100.0):
        for ours, theirs in zip(
            simpo_neg.reweight(q, temperature, power, 0.0), simpo_power.reweight(q, temperature, power), strict=True
        ):
            assert torch.equal(ours, theirs)


@pytest.mark.parametrize("reweight, settings_of_g, g", variants())
def test_nu_is_the_normaliser(reweight, settings_of_g, g):
    q = torch.randn(50, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    weights, nu = reweight(q, 0.3, *settings_of_g)
    np.testing.assert_allclose(g(((q - nu) / 0.3).numpy()), weights.numpy(), rtol=1e-6, atol=1e-7)


def test_floor_is_reached_and_never_passed():
    q = torch.randn(50, 32, generator=torch.Generator().manual_seed(2))
    for power in (1.0, 2.0):
        weights, _ = simpo_neg.reweight(q, 0.05, power, 0.7)
        assert weights.min() == pytest.approx(-0.7) and (weights < 0).float().mean() > 0.5


def test_no_gradient_flows_into_the_weights():
    q = torch.randn(4, 8, requires_grad=True)
    temperature = torch.tensor(1.0, requires_grad=True)
    for reweight, settings_of_g, _ in variants():
        weights, nu = reweight(q, temperature, *settings_of_g)
        assert not weights.requires_grad and not nu.requires_grad


@pytest.mark.parametrize("power", [0.1, 0.25, 8.0])
def test_extreme_powers_average_one(power):
    q = torch.randn(100, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    for temperature in (1e-3, 1.0, 1e3):
        for weights, _ in (
            simpo_power.reweight(q, temperature, power),
            simpo_neg.reweight(q, temperature, power, 0.5),
        ):
            torch.testing.assert_close(weights.mean(-1), torch.ones(100, dtype=torch.float64), rtol=1e-9, atol=0)


@pytest.mark.parametrize("reweight, settings_of_g, g", variants())
def test_a_grid_of_temperatures_at_once(reweight, settings_of_g, g):
    """As the search for lambda's start needs it: temperatures (G, 1, 1) give weights (G, B, K)."""
    q = torch.randn(6, 8, generator=torch.Generator().manual_seed(4))
    grid = torch.logspace(-8, 8, 9)
    weights, _ = reweight(q, grid[:, None, None], *settings_of_g)
    assert weights.shape == (9, 6, 8)
    for temperature, at_once in zip(grid, weights, strict=True):
        torch.testing.assert_close(at_once, reweight(q, temperature, *settings_of_g)[0])


def test_kl_is_of_the_weights_clipped_to_be_positive():
    weights = torch.tensor(
        [[[2.5, 1.5, -0.5, 0.5], [1.0, 1.0, 1.0, 1.0]], [[4.0, 0.0, 0.0, 0.0], [4.0, 0.0, 0.0, 0.0]]]
    )
    p = weights.double().numpy().clip(min=1e-6)
    p /= p.sum(-1, keepdims=True)
    expected = (p * np.log(4 * p)).sum(-1).mean(-1)
    assert simpo_neg.kl(weights).tolist() == pytest.approx(expected, abs=1e-6)
