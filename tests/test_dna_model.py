"""dna_finetune.py: the masked diffusion model's loss, its likelihood and its sampler against enumeration."""

import itertools

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from scipy import stats

import dna_finetune as dna

ALL = torch.tensor(list(itertools.product(range(4), repeat=3)))  # (64, 3): every sequence of length 3
SUBSETS = [s for m in (1, 2, 3) for s in itertools.combinations(range(3), m)]


class Table(nn.Module):
    """A denoiser of length 3 with free logits for every x_t; it starts at the exact posterior of p (64,)."""

    def __init__(self, p):
        super().__init__()
        states = torch.tensor(list(itertools.product(range(5), repeat=3)))  # (125, 3)
        possible = ((states[:, None] == ALL) | (states[:, None] == dna.MASK)).all(-1) * p  # (125, 64)
        letters = F.one_hot(ALL, 4).double()  # (64, 3, 4)
        posterior = torch.einsum("sx,xla->sla", possible.double(), letters) / possible.sum(-1)[:, None, None]
        self.logits = nn.Parameter(posterior.clamp(min=1e-30).log().float())

    def forward(self, x):
        return self.logits[(x * torch.tensor([25, 5, 1])).sum(-1)].log_softmax(-1)


def random_law(seed, spread=1.0):
    return torch.softmax(spread * torch.randn(64, generator=torch.Generator().manual_seed(seed)), 0)


def log_p_of(denoiser, subset):
    """log p(x_i | x outside of the subset) for every sequence and i: (64, 3)."""
    noisy = ALL.clone()
    noisy[:, list(subset)] = dna.MASK
    return denoiser(noisy).gather(-1, ALL[..., None])[..., 0].detach().double()


def exact_elbo(denoiser):
    """The integral over t of E[sum of the masked log p] / t by quadrature over t and a sum over masks: (64,)."""
    t, w = np.polynomial.legendre.leggauss(8)
    t, w = (t + 1) / 2, w / 2
    total = torch.zeros(64, dtype=torch.float64)
    for subset in SUBSETS:
        m = len(subset)
        weight = (w * t**m * (1 - t) ** (3 - m) / t).sum()
        total += weight * log_p_of(denoiser, subset)[:, list(subset)].sum(-1)
    return total


def law(denoiser, steps):
    """The exact distribution of the ancestral sampler in so many steps, from the definition: (64,)."""
    p = torch.zeros(64, dtype=torch.float64)
    for leaves in itertools.product(range(steps), repeat=3):
        log_p = torch.zeros(64, dtype=torch.float64)
        for step in set(leaves):
            still_masked = [i for i in range(3) if leaves[i] >= step]
            now = [i for i in range(3) if leaves[i] == step]
            log_p += log_p_of(denoiser, still_masked)[:, now].sum(-1)
        p += log_p.exp() / steps**3
    return p


def index(x):
    return (x * torch.tensor([16, 4, 1])).sum(-1)


def total_variation(p, q):
    return 0.5 * (p.double() - q.double()).abs().sum().item()


def small_denoiser():
    torch.manual_seed(1)
    denoiser = dna.Denoiser(8, 1).requires_grad_(False)
    nn.init.normal_(denoiser.logits.weight, std=0.7)
    nn.init.normal_(denoiser.shifts)
    for conv in denoiser.convs:
        nn.init.normal_(conv.weight, std=0.5)  # so that what is seen elsewhere matters
    return denoiser


def test_elbo_equals_enumeration_over_masks_and_times():
    denoiser, generator = small_denoiser(), torch.Generator().manual_seed(1)
    estimates = []
    for _ in range(40):
        noisy, masked, factor = dna.corrupt(ALL, 50, generator)
        assert ((noisy == dna.MASK) == masked).all()
        estimates.append(-dna.elbo_loss(denoiser(noisy.flatten(0, 1)).view(64, 50, 3, 4), ALL, masked, factor))
    estimates = torch.cat(estimates, 1).double()  # (64, 2000)
    error = (estimates.mean(1) - exact_elbo(denoiser)) / (estimates.std(1) / 2000**0.5)
    assert error.abs().max() < 4  # in standard errors, which stratified masks make too large
    assert exact_elbo(denoiser).std() > 0.3  # not all alike


def test_copies_have_one_number_of_masks_from_each_stratum():
    x = torch.randint(4, (200, 8), generator=torch.Generator().manual_seed(1))
    noisy, masked, factor = dna.corrupt(x, 4, torch.Generator().manual_seed(2))
    m = masked.sum(-1)  # of 1 to 8: copy j has 2j + 1 or 2j + 2
    assert torch.equal((m - 1) // 2, torch.arange(4).expand(200, 4)) and len(m.unique()) == 8
    assert torch.equal(factor[..., 0], 8 / m) and torch.equal(noisy == dna.MASK, masked)


def test_elbo_of_the_exact_posterior_is_the_log_likelihood():
    p = random_law(2)
    torch.testing.assert_close(exact_elbo(Table(p)), p.double().log(), atol=1e-4, rtol=0)
    error = dna.log_likelihood(Table(p), ALL, 12_000, 1) - p.log()
    assert error.abs().max() < 0.06 and error.mean().abs() < 0.01


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_sampler_follows_its_law(steps):
    p, n = random_law(3, 1.5), 30_000
    table = Table(p)
    counts = torch.bincount(index(dna.sample(table, n, 3, steps, torch.Generator().manual_seed(steps), batch=n // 3)))
    assert stats.chisquare(counts, n * law(table, steps).numpy(), sum_check=False).pvalue > 1e-4
    other = law(table, 4 - steps if steps != 2 else 1).numpy()  # in other steps, another law
    assert stats.chisquare(counts, n * other, sum_check=False).pvalue < 1e-6


def test_sampling_in_bfloat16_draws_nearly_the_same_letters():
    denoiser = small_denoiser()
    generator = [torch.Generator().manual_seed(1) for _ in range(2)]
    one, other = (
        dna.sample(denoiser, 64, 20, 8, g, t) for g, t in zip(generator, ("float32", "bfloat16"), strict=True)
    )
    assert 0.95 < (one == other).double().mean() < 1 and other.max() < 4
    assert denoiser.shifts.dtype == torch.float32


def test_sampler_reproduces_a_known_distribution():
    p, n = random_law(4, 1.5), 30_000
    x = dna.sample(Table(p), n, 3, 2000, torch.Generator().manual_seed(1), batch=n)
    assert total_variation(torch.bincount(index(x), minlength=64) / n, p) < 0.03


class Uniform(nn.Module):
    """Every letter alike; keeps what it was shown."""

    seen = []

    def forward(self, x):
        self.seen.append(x)
        return torch.zeros(*x.shape, 4)


def test_positions_leave_the_mask_uniformly_over_the_steps_and_never_change_again():
    seen = Uniform.seen
    dna.sample(Uniform(), 200, 12, 16, torch.Generator().manual_seed(1), batch=200)
    assert len(seen) <= 12  # one call per step in which something leaves
    for before, after in itertools.pairwise(seen):
        assert (after[before != dna.MASK] == before[before != dna.MASK]).all()
    number_of_turns = torch.stack([(x == dna.MASK).any(-1) for x in seen]).sum(0).double().mean()
    assert abs(number_of_turns - 16 * (1 - (15 / 16) ** 12)) < 0.35


def test_convolution_without_padding_taps_is_the_convolution():
    torch.manual_seed(1)
    for length, dilation in itertools.product((1, 3, 20), (1, 4, 16, 64)):
        layer, h = nn.Conv1d(6, 5, 9), torch.randn(2, length, 6)
        full = F.conv1d(h.transpose(1, 2), layer.weight, layer.bias, padding=4 * dilation, dilation=dilation)
        torch.testing.assert_close(dna.convolve(h, layer, dilation), full.transpose(1, 2))


def test_denoiser_and_oracle_take_soft_one_hots_with_gradients():
    torch.manual_seed(2)
    for model, classes in ((small_denoiser(), 5), (dna.Oracle(8, 20).eval(), 4)):
        x = torch.randint(classes, (6, 20))
        one_hot = F.one_hot(x, classes).float().requires_grad_()
        torch.testing.assert_close(model(one_hot), model(x))
        (gradient,) = torch.autograd.grad(model(one_hot).sum(), one_hot)
        step = 0.02 * gradient / gradient.norm()  # a soft input: no letter any more
        change = model.double()((one_hot + step).double()).sum() - model((one_hot - step).double()).sum()
        torch.testing.assert_close(change.item(), 0.04 * gradient.norm().item(), rtol=0.02, atol=0)


def test_pretraining_learns_a_distribution():
    p = random_law(5, 2.0)
    x = ALL[torch.multinomial(p, 4000, replacement=True, generator=torch.Generator().manual_seed(1))]
    args = dna.Args(width=24, pretrain_steps=400, pretrain_batch=128, pretrain_lr=1e-2, ema=0.98)
    denoiser = dna.Denoiser(24, 1).requires_grad_(False)
    made = dna.pretrain(x.byte(), args)
    denoiser.load_state_dict(made["state"])
    assert made["curve"][0]["nats_per_base"] == pytest.approx(np.log(4), abs=0.4)  # per base, not per sequence
    assert total_variation(law(denoiser, 1), law(Table(p), 1)) < 0.1
    assert total_variation(exact_elbo(denoiser).exp(), p) < 0.2 < total_variation(law(Table(p), 1), p)


def test_pretraining_follows_its_learning_rate_its_average_and_its_gradients_bound(monkeypatch):
    rates, norms, weights, steps, step = [], [], [], 60, torch.optim.Adam.step

    def record(optimizer):
        parameters = optimizer.param_groups[0]["params"]
        rates.append(optimizer.param_groups[0]["lr"])
        norms.append(torch.cat([p.grad.flatten() for p in parameters]).norm().item())
        step(optimizer)
        weights.append(torch.cat([p.detach().flatten() for p in parameters]))

    monkeypatch.setattr(torch.optim.Adam, "step", record)
    for ema in (0.0, 0.5):
        args = dna.Args(width=8, pretrain_steps=steps, pretrain_batch=2, pretrain_lr=1e-2, ema=ema)
        state = dna.pretrain(ALL.byte(), args)["state"]
        averaged = torch.cat([state[name].flatten() for name, _ in dna.Denoiser(8, 1).named_parameters()])
        halves = [ema**k * (1 - ema) * weight for k, weight in enumerate(reversed(weights[-50:]))]
        torch.testing.assert_close(averaged, sum(halves))  # what 50 steps leave of the start is below rounding
    rising = np.arange(steps) / steps
    np.testing.assert_allclose(rates, 2 * [*(1e-2 * (0.55 + 0.45 * np.cos(np.pi * rising)))])
    assert max(norms) == pytest.approx(1, abs=1e-4)  # small batches go beyond it


def test_the_average_of_pretraining_forgets_its_start():
    """Adam's first step is lr for each parameter; the average takes 9 tenths of it, however slow it is later."""
    args = dna.Args(width=8, pretrain_steps=1, pretrain_batch=64, pretrain_lr=1e-2, ema=0.9999)
    torch.manual_seed(args.seed)
    start = dna.Denoiser(8, 1)
    moved = torch.cat(
        [(dna.pretrain(ALL.byte(), args)["state"][k] - x).flatten() for k, x in start.state_dict().items()]
    )
    assert moved.abs().max().item() == pytest.approx(0.009, rel=1e-3)


def test_an_oracle_does_not_depend_on_the_unit_of_the_activity():
    x, y = (
        torch.arange(200).view(-1, 1) // 4 ** torch.arange(20) % 4,
        torch.randn(200, generator=torch.Generator().manual_seed(1)),
    )
    args = dna.Args(oracle_width=8, oracle_epochs=2)
    one, other = (dna.train_oracle(x.byte(), scale * y, False, args)["curve"] for scale in (1, 100))
    assert [row["loss"] for row in one] == pytest.approx([row["loss"] for row in other], rel=1e-3)
