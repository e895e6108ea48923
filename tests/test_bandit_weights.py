"""bandit.py: the weights of the four methods against bisection, and the temperature rule (30) at its fixed point."""

import math

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

import bandit
from bandit import METHODS


def reweight(q, temperature, method, epsilon):
    return bandit.reweight(q, temperature, bandit.POWER[method], epsilon if method == "Lin. Neg." else 0.0)


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
    weights, nu = reweight(q, temperature, method, epsilon)
    expected = torch.tensor(weights_by_bisection(q.tolist(), temperature, method, epsilon), dtype=torch.float64)
    assert weights.mean().item() == pytest.approx(1, abs=1e-9)
    torch.testing.assert_close(weights, expected, rtol=1e-6, atol=1e-7)
    y_max = (q - nu).max() / temperature  # nu is the one that the weights were made with
    greatest = {"Exp": y_max.exp(), "Square": y_max**2}.get(method, y_max)
    assert greatest.item() == pytest.approx(weights.max().item(), rel=1e-4)


def test_weights_batch_float32_without_gradient():
    q = torch.randn(3, 5, 32, generator=torch.Generator().manual_seed(0), requires_grad=True)
    temperature = torch.tensor([0.01, 0.1, 1.0]).view(3, 1, 1)
    for method in METHODS:
        weights, nu = reweight(q, temperature, method, 0.5)
        assert weights.dtype == nu.dtype == torch.float32 and not weights.requires_grad
        assert weights.shape == (3, 5, 32) and nu.shape == (3, 5, 1)
        for i in range(3):
            alone, _ = reweight(q[i, 2], temperature[i].item(), method, 0.5)
            torch.testing.assert_close(weights[i, 2], alone)
    assert reweight(q, 0.05, "Lin. Neg.", 0.5)[0].min() == -0.5


def test_dual_step_reaches_the_target_kl():
    equal = torch.ones(1, 1, 32)  # their KL is 0
    assert bandit.dual_step(torch.zeros(1, 1, 1), equal, 1.5, 0.2).item() == pytest.approx(-0.2 * 1.5)
    q = torch.rand(1, 4, 32, generator=torch.Generator().manual_seed(0))
    for method in METHODS:
        log_temperature = torch.zeros(1, 1, 1, dtype=torch.float64)
        for _ in range(300):
            weights, _ = reweight(q, log_temperature.exp(), method, 0.3)
            log_temperature = bandit.dual_step(log_temperature, weights, 1.5, 0.2)
        p = weights.double().clamp(min=1e-6) / weights.double().clamp(min=1e-6).sum(-1, keepdim=True)
        assert (math.log(32) + (p * p.log()).sum(-1)).mean().item() == pytest.approx(1.5, abs=1e-3), method


def test_the_clip_of_the_entropy_is_a_millionth():
    """All weight on one of 32: the entropy is that of 31 shares of 1e-6 / 32, about 31e-6 / 32 (1 + log 32e6)."""
    weights = torch.zeros(1, 1, 32)
    weights[..., 0] = 32
    step = bandit.dual_step(torch.zeros(1, 1, 1, dtype=torch.float64), weights, math.log(32), 1.0).item()
    assert step == pytest.approx(-1.771e-5, rel=1e-3)


def test_floor_per_trial():
    """Linear and Lin. Neg. are one call with a column of floors."""
    q = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(0))
    weights, nu = bandit.reweight(q, 0.05, 1, torch.tensor([0.0, 0.4], dtype=torch.float64).view(2, 1, 1))
    for i, floor in enumerate((0.0, 0.4)):
        alone, nu_alone = bandit.reweight(q[i], 0.05, 1, floor)
        assert torch.equal(weights[i], alone) and torch.equal(nu[i], nu_alone)
        assert alone.min().item() == pytest.approx(-floor)
