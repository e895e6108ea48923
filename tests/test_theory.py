"""What the paper proves: policy improvement, the divergence behind each g, and the known methods as special cases."""

import numpy as np
import pytest
import torch
from scipy.special import softmax

import dna_finetune
import simpo_exp
import simpo_neg
import simpo_power

VARIANTS = {
    "exp": lambda q, t: simpo_exp.reweight(q, t)[0],
    "linear": lambda q, t: simpo_power.reweight(q, t, 1.0)[0],
    "square": lambda q, t: simpo_power.reweight(q, t, 2.0)[0],
    "p=0.5": lambda q, t: simpo_power.reweight(q, t, 0.5)[0],
    "lin-neg": lambda q, t: simpo_neg.reweight(q, t, 1.0, 0.5)[0],
    "sqr-neg": lambda q, t: simpo_neg.reweight(q, t, 2.0, 0.5)[0],
    "sqr-neg, epsilon 5": lambda q, t: simpo_neg.reweight(q, t, 2.0, 5.0)[0],
    # wd1 (example 3.4) is an increasing g too; its weights sum to 0, so the normalised measure is 1 + wd1
    "wd1": lambda q, t: 1 + dna_finetune.weigh("wd1", q, t, 0.0),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_theorem_3_5_the_target_improves_on_the_old_policy(name):
    """E_{pi*}[Q] >= E_{pi_k}[Q] for random critics, strictly wherever the actions differ in value."""
    generator = torch.Generator().manual_seed(0)
    for scale in (1e-2, 1.0, 1e3):
        states = torch.randn(500, 3, generator=generator, dtype=torch.float64)
        layer = torch.randn(5, 64, generator=generator, dtype=torch.float64)
        actions = 2 * torch.rand(500, 32, 2, generator=generator, dtype=torch.float64) - 1
        inputs = torch.cat([states[:, None].expand(500, 32, 3), actions], dim=-1)
        q = scale * torch.tanh(inputs @ layer).sum(-1)
        weights = VARIANTS[name](q, 1.0)
        assert ((weights * q).mean(-1) > q.mean(-1)).all()


def alpha_divergence(alpha):
    return lambda u: (u ** (alpha - 1) - 1) / (alpha - 1)  # f'


@pytest.mark.parametrize(
    "f_prime, weights_of",
    [
        pytest.param(np.log, lambda q, t: simpo_exp.reweight(q, t)[0], id="forward KL: f' = log u + 1, here less 1"),
        pytest.param(lambda u: u - 1, lambda q, t: simpo_power.reweight(q, t, 1.0)[0], id="chi^2"),
        pytest.param(alpha_divergence(1.5), lambda q, t: simpo_power.reweight(q, 2 * t, 2.0)[0], id="alpha = 3/2"),
        pytest.param(alpha_divergence(3.0), lambda q, t: simpo_power.reweight(q, t / 2, 0.5)[0], id="alpha = 3"),
    ],
)
def test_weights_solve_the_regularised_problem(f_prime, weights_of):
    """(4): the concave objective E[w q] - lambda E[f(w)] cannot be raised from w towards any corner of the simplex."""
    q = torch.randn(200, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for temperature in (0.3, 1.0, 3.0):
        w = weights_of(q, temperature).clamp(min=1e-300).numpy()
        slope = q.numpy() - temperature * f_prime(w)
        towards_corners = slope * 16 - (slope * w).sum(-1, keepdims=True)
        assert towards_corners.max() < 1e-6


def test_dpmd_is_the_softmax():
    q = torch.randn(50, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    weights, nu = simpo_exp.reweight(q, 0.2)
    np.testing.assert_allclose(weights.numpy(), 32 * softmax(q.numpy() / 0.2, axis=-1), rtol=1e-10)
    np.testing.assert_allclose(nu[:, 0].numpy(), 0.2 * np.log(np.exp(q.numpy() / 0.2).mean(-1)), rtol=1e-10)


def test_qvpo_is_linear_with_nu_at_the_value():
    """Example 3.2: at the temperature where nu = V = E[Q], the weights are max(Q - V, 0) / E[max(Q - V, 0)]."""
    for q in torch.randn(50, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0)):
        advantage = (q - q.mean()).clamp(min=0)
        weights, nu = simpo_power.reweight(q, float(advantage.mean()), 1.0)
        torch.testing.assert_close(nu[0], q.mean())
        torch.testing.assert_close(weights, advantage / advantage.mean())


def test_wd1_is_two_softmaxes_and_increases_with_q():
    q = torch.randn(50, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    wd1 = (VARIANTS["wd1"](q, 0.5) - 1).numpy() / 32
    np.testing.assert_allclose(wd1, softmax(q.numpy() / 0.5, -1) - softmax(-q.numpy() / 0.5, -1), rtol=1e-9, atol=1e-12)
    assert (np.diff(np.take_along_axis(wd1, q.numpy().argsort(-1), -1)) > 0).all()
