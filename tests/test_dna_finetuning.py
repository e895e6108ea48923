"""dna_finetune.py: the weights by name, their temperatures, and that fine-tuning ends where the weights say."""

import inspect
import itertools
import math

import numpy as np
import pytest
import torch
from test_dna_model import ALL, Table, exact_elbo, index, law, random_law, total_variation

import dna_finetune as dna
import simpo_neg

METHODS = dna.get_args(dna.Method)


def tune(method, p, reward, **settings):
    """A table that starts at the posterior of p (64,) and is tuned for reward (64,); also its lowest loss."""
    settings = dict(num_particles=512, rounds=120, lr=0.02, sampling_steps=200, elbo_draws=1) | settings
    settings = dict(samples_from="pretrained", temperature=0.7, sampling_dtype="float32") | settings
    table = Table(p).requires_grad_(False)
    made = dna.finetune(table, lambda x: reward[index(x)], 3, method, 1, dna.Args(**settings), {})
    table.load_state_dict(made["state"])
    return table, min(row["lowest_loss"] for row in made["curve"])


def closed_form(method, p, reward, temperature=0.7):
    """p w / Z (5) with nu such that E_p[w] = 1: every sequence as often as its probability says, of 20,000."""
    number = (20_000 * p).round().long()
    q = reward.repeat_interleave(number)
    weights = dna.weigh(method, q, temperature * q.double().std(), 0.0)
    return torch.zeros(64).index_add(0, torch.arange(64).repeat_interleave(number), weights / len(q))


@pytest.mark.parametrize("method", ["exp", "linear", "square"])
def test_tuned_optimum_is_the_reweighted_distribution(method):
    p, reward = random_law(6), torch.randn(64, generator=torch.Generator().manual_seed(7))
    target = closed_form(method, p, reward)
    tuned, lowest = tune(method, p, reward)
    fitted = exact_elbo(tuned).exp()
    assert total_variation(fitted / fitted.sum(), target) < 0.08
    assert total_variation(p, target) > 0.25 and lowest > 0  # an unweighted fit would stay at p
    for other in {"exp", "linear", "square"} - {method}:
        assert total_variation(fitted, closed_form(other, p, reward)) > total_variation(fitted, target)


def test_on_policy_rounds_repeat_the_reweighting_and_a_kl_term_holds_back():
    p, reward = random_law(8), torch.randn(64, generator=torch.Generator().manual_seed(9))
    mean = {}
    for name, settings in dict(once={}, again=dict(samples_from="tuned"), held=dict(kl_weight=5.0)).items():
        tuned, _ = tune("linear", p, reward, rounds=40, num_particles=128, **settings)
        mean[name] = (law(tuned, 3) * reward).sum().item()
    start = (p * reward).sum().item()
    assert mean["again"] > mean["once"] + 0.3 > start + 0.6
    assert start - 0.1 < mean["held"] < start + 0.5 * (mean["once"] - start)


def test_the_kl_term_is_that_of_the_tuned_model_from_the_pretrained_one(monkeypatch):
    """With weights of 1 in the first update and of 0 in the second, the second loss is that term alone."""
    p, reward, first = random_law(8), torch.zeros(64), Table(random_law(8)).requires_grad_(False)
    settings = dict(updates=1, lr=1.0, kl_weight=2.0, elbo_draws=8)
    updates = itertools.count()
    monkeypatch.setattr(dna, "weigh", lambda method, q, *_: torch.full_like(q, float(next(updates) == 0)))
    once, _ = tune("linear", p, reward, rounds=1, **settings)
    updates = itertools.count()
    _, loss = tune("linear", p, reward, rounds=2, **settings)
    x = ALL[torch.multinomial(p, 20_000, replacement=True, generator=torch.Generator().manual_seed(2))]
    noisy, masked, factor = (y[:, 0] for y in dna.corrupt(x, 1, torch.Generator().manual_seed(3)))
    forward, backward = (
        2
        * (factor * masked * torch.distributions.kl_divergence(*map(torch.distributions.Categorical, pair)))
        .sum(-1)
        .mean()
        / 3
        for pair in itertools.permutations([once(noisy).exp(), first(noisy).exp()])
    )
    assert loss == pytest.approx(forward.item(), rel=0.05) and abs(backward - forward) > 0.15 * forward


def test_every_round_draws_and_every_update_masks_anew_and_the_curve_says_what_came(monkeypatch):
    drawn, masks, calls = [], [], []
    sample, corrupt = dna.sample, dna.corrupt

    def record_sample(denoiser, count, length, steps, *others, **more):
        calls.append((count, length, steps))
        drawn.append(sample(denoiser, count, length, steps, *others, **more))
        return drawn[-1]

    def record_corrupt(x, draws, generator):
        assert x is drawn[-1] and draws == 3
        noisy, masked, factor = corrupt(x, draws, generator)
        masks.append(masked)
        return noisy, masked, factor

    monkeypatch.setattr(dna, "sample", record_sample)
    monkeypatch.setattr(dna, "corrupt", record_corrupt)
    p, reward = random_law(8), torch.randn(64, generator=torch.Generator().manual_seed(9))
    args = dna.Args(num_particles=16, rounds=3, updates=2, elbo_draws=3, sampling_steps=7, target_kl=0.5)
    table, judges = Table(p).requires_grad_(False), dict(first_letter=lambda x: x[:, 0].float())
    curve = dna.finetune(table, lambda x: reward[index(x)], 3, "lin-neg", 1, args, judges)["curve"]
    assert calls == [(16, 3, 7)] * 3 and len(masks) == 6
    assert not any(torch.equal(one, other) for one, other in itertools.combinations(masks, 2))
    for row, x in zip(curve, drawn, strict=True):
        q = reward[index(x)]
        weights = dna.weigh("lin-neg", q, dna.solve_temperature("lin-neg", q, args), args.epsilon)
        assert row["reward"] == sorted(q.tolist())[7] and row["first_letter"] == sorted(x[:, 0].tolist())[7]
        assert row["distinct"] == len(set(map(tuple, x.tolist()))) / 16 < 1
        assert row["largest_weight"] == pytest.approx(max(weights.tolist()))
        negative = [-w for w in weights.tolist() if w < 0]
        assert row["negative_mass"] == pytest.approx(sum(negative) / 16) and negative


def test_the_gradient_is_cut_at_its_norm():
    """So small a gradient is below Adam's eps of 1e-8, which otherwise makes every step lr."""
    p, start = random_law(8), Table(random_law(8)).logits.detach()
    for grad_norm, low, high in ((1e-11, 0, 1e-3), (1.0, 0.99, 1.01)):
        tuned, _ = tune("linear", p, torch.zeros(64), rounds=1, updates=1, lr=1.0, grad_norm=grad_norm)
        assert low <= (tuned.logits - start).abs().max() <= high


def test_negative_weights_push_below_what_positive_ones_reach():
    p, reward = random_law(8), torch.randn(64, generator=torch.Generator().manual_seed(9))
    worst = reward.argsort()[:20]
    linear, _ = tune("linear", p, reward, rounds=60, num_particles=128, temperature=0.3)
    negative, _ = tune("lin-neg", p, reward, rounds=60, num_particles=128, temperature=0.3, epsilon=2.0)
    assert law(negative, 3)[worst].sum() < 0.7 * law(linear, 3)[worst].sum()


def test_reweight_equals_the_rl_scripts_to_the_letter():
    assert inspect.getsource(dna.reweight) == inspect.getsource(simpo_neg.reweight)


def test_weights_by_name():
    K, q = 32, torch.randn(3, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    np.testing.assert_allclose(dna.weigh("exp", q, 0.4, 9.0), K * torch.softmax(q / 0.4, -1))
    wd1 = K * (torch.softmax(q / 0.4, -1) - torch.softmax(-q / 0.4, -1))
    np.testing.assert_allclose(dna.weigh("wd1", q, 0.4, 9.0), wd1, atol=1e-12)
    for method, lowest in {"linear": 0, "square": 0, "lin-neg": -0.3, "sqr-neg": -0.3}.items():
        w = dna.weigh(method, q, 0.4, 0.3)
        np.testing.assert_allclose(w.mean(-1), 1)
        assert w.min() == lowest
        power = 2 if method in ("square", "sqr-neg") else 1
        y = ((q - simpo_neg.reweight(q, 0.4, power, -lowest)[1]) / 0.4).numpy()
        np.testing.assert_allclose(w, np.where(y > 0, np.abs(y) ** power, np.maximum(y, lowest)), atol=1e-9)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e4])
def test_temperature_reaches_the_target_kl(method, scale):
    q = scale * torch.randn(2, 64, generator=torch.Generator().manual_seed(1)) + 5 * scale
    temperature = dna.solve_temperature(method, q, dna.Args(target_kl=1.2, epsilon=0.4))
    w = dna.weigh("exp" if method == "wd1" else method, q, temperature, 0.4).double().clamp(min=1e-6)
    p = w / w.sum(-1, keepdim=True)
    torch.testing.assert_close((p * (64 * p).log()).sum(-1), torch.full((2,), 1.2).double(), atol=1e-3, rtol=0)


def test_temperature_at_the_edge_of_the_target_kl():
    """Linear puts all weight on the best of four up to lambda = 1/4 of its lead; two that tie cannot pass log 2."""
    q, args = torch.tensor([[1.0, 0.0, 0.0, 0.0], [1.0, 1.0, 0.0, 0.0]]), dna.Args(target_kl=math.log(4) - 1e-4)
    lead, tie = dna.solve_temperature("linear", q, args).flatten().tolist()
    assert lead == pytest.approx(0.25, rel=1e-4)  # with weights clipped at 1e-4 the target would be out of reach
    assert tie == pytest.approx(1e-3 / 3**0.5)


@pytest.mark.parametrize("method", METHODS)
def test_a_given_temperature_is_in_deviations_of_the_rewards(method):
    q = 40 * torch.randn(2, 64, generator=torch.Generator().manual_seed(1)) + 5
    expected = 0.3 * np.std(q.double().numpy(), axis=-1, ddof=1, keepdims=True)
    np.testing.assert_allclose(dna.solve_temperature(method, q, dna.Args(temperature=0.3)), expected)


def test_authors_rule_against_its_definition():
    """clip(A, lower, 3); A^2 above 0 and clip(A, lower, 0) below; softmax(r / 0.1); softmax(A) - softmax(-A)."""
    r = torch.cat([torch.randn(126, generator=torch.Generator().manual_seed(1)), torch.tensor([8.0, 3.0])]).double()
    A = [(float(x) - float(r.mean())) / float(np.std(r.numpy(), ddof=1)) for x in r]
    total = {s: sum(math.exp(s * a) for a in A) for s in (1, -1)}
    total_r = sum(math.exp(float(x) / 0.1) for x in r)
    expected = {
        "wd1": [128 * (math.exp(a) / total[1] - math.exp(-a) / total[-1]) for a in A],
        "exp": [128 * math.exp(float(x) / 0.1) / total_r for x in r],
        "linear": [min(max(a, 0), 3) for a in A],
        "square": [a * a if a > 0 else 0 for a in A],
        "lin-neg": [min(max(a, -0.7), 3) for a in A],
        "sqr-neg": [a * a if a > 0 else max(a, -0.7) for a in A],
    }
    assert max(A) > 3 and min(A) < -0.7 and set(expected) == set(METHODS)
    for method, weights in expected.items():
        np.testing.assert_allclose(dna.weigh_as_authors(method, r, 0.7), weights, rtol=1e-6, atol=1e-12)


def test_authors_rule_has_the_greediness_of_its_original_and_is_what_finetune_takes(monkeypatch):
    """KL from uniform on Gaussian rewards, K = 128, of the authors' formulas: exp 4.3, linear 0.98, square 1.42."""
    r = torch.randn(200, 128, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    for method, original, slack in (("exp", 4.3, 0.1), ("linear", 0.98, 0.03), ("square", 1.42, 0.04)):
        p = torch.stack([dna.weigh_as_authors(method, row, 0.5) for row in r]) + 1e-12
        p = p / p.sum(-1, keepdim=True)
        assert abs(float((p * (128 * p).log()).sum(-1).mean()) - original) < slack, method

    p, reward = random_law(6), torch.randn(64, generator=torch.Generator().manual_seed(7))
    small = dict(rounds=2, num_particles=64, temperature=0.0, temperature_rule="authors")
    (authors, _), (ours, _) = (tune("lin-neg", p, reward, **small | s) for s in ({}, dict(temperature_rule="kl")))
    monkeypatch.setattr(dna, "weigh", lambda method, q, *_: dna.weigh_as_authors(method, q, 0.5))
    (same, _) = tune("lin-neg", p, reward, **small | dict(temperature_rule="kl"))
    assert torch.equal(authors.logits, same.logits) and not torch.equal(authors.logits, ours.logits)


def test_loss_clip_spares_letters_that_are_unlikely_already_and_positive_weights(monkeypatch):
    """Adam moves whatever has a gradient: with weights of -1 the letters of p > e^-1 alone, with 1 the sampled ones."""
    p, reward = random_law(8), torch.zeros(64)
    start = Table(p).logits.detach()
    unlikely = (start.softmax(-1).amax(-1) < math.exp(-1))[..., None]  # (125, 3, 1): all four letters are
    moved = {}
    for sign, clip in itertools.product((-1.0, 1.0), (1.0, math.inf)):
        monkeypatch.setattr(dna, "weigh", lambda method, q, *_, sign=sign: torch.full_like(q, sign))
        table, lowest = tune("lin-neg", p, reward, rounds=1, updates=1, loss_clip=clip)
        moved[sign, clip] = table.logits != start
        assert (lowest > -1 - 1e-6) == ((sign, clip) != (-1.0, math.inf))
    assert not (moved[-1.0, 1.0] & unlikely).any() and (moved[-1.0, 1.0] & ~unlikely).float().sum() > 50
    assert (moved[-1.0, math.inf] & unlikely).float().sum() > 50
    assert torch.equal(moved[1.0, 1.0], moved[1.0, math.inf]) and torch.equal(moved[1.0, 1.0], moved[-1.0, math.inf])
