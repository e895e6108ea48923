"""baselines/drakes.py: its sampler, gradient, KL and tuning on enumerable spaces, its runs and bad input."""

import csv
import itertools
import re

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from scipy import stats
from test_baselines_dna_guidance import (
    COPIES,
    Reward,
    check_bad_models,
    check_copies,
    counts,
    generator,
    model_files,
    random_reward,
    refuses,
    table,
)
from test_dna_model import Table, law, random_law

import dna_finetune as dna
from baselines import drakes

TINY = "--updates 3 --batch 4 --gradient-steps 2 --device cpu --sampling-dtype float32".split()


class Pair(nn.Module):
    """A denoiser of length 2 in float64 with free logits for every x_t, linear in soft ones."""

    def __init__(self, seed):
        super().__init__()
        self.logits = nn.Parameter(torch.randn(5, 5, 2, 4, generator=generator(seed)).double())

    def forward(self, x):
        a, b = x.double().unbind(1)
        return torch.einsum("bi,bj,ijla->bla", a, b, self.logits).log_softmax(-1)


def test_the_frame_is_dna_finetunes_to_the_letter():
    check_copies("baselines/drakes", [name for name in COPIES if name != "cosine"] + ["sample", "evaluate", "save"])
    for name in ("LETTERS", "MASK", "FACTORS", "IUPAC", "COLUMNS"):
        assert getattr(drakes, name) == getattr(dna, name)


@pytest.mark.parametrize("gradient_steps, tau", [(0, 1.0), (2, 1e-4)])
def test_the_sampler_has_the_law_of_dna_finetunes(gradient_steps, tau):
    """Hard steps do, and soft ones as tau falls to 0."""
    p, n = random_law(3, 1.5), 20_000
    x, kl = drakes.rollout(table(p), None, n, 3, 3, gradient_steps, tau, 0.0, generator())
    assert kl.tolist() == n * [0] and x.shape == (n, 3, 4)
    observed = counts(x.argmax(-1))
    assert stats.chisquare(observed, n * law(Table(p), 3).numpy(), sum_check=False).pvalue > 1e-4
    theirs = counts(dna.sample(Table(p), n, 3, 3, generator(2), batch=n))
    both = torch.stack([observed, theirs])
    assert stats.chi2_contingency(both[:, both.sum(0) > 0]).pvalue > 1e-4
    assert stats.chisquare(observed, n * law(Table(p), 1).numpy(), sum_check=False).pvalue < 1e-6


@pytest.mark.parametrize("gradient_steps", [0, 1, 3, 9])
def test_the_last_steps_are_soft(gradient_steps):
    model, seen = Pair(1), []
    sampler = 50, 2, 4, gradient_steps, 1.0, 0.0, generator()
    x, _ = drakes.rollout(lambda x: seen.append(x) or model(x), None, *sampler)
    soft = [bool((x[..., :4] != x[..., :4].round()).any()) for x in (*seen[1:], x)]
    assert soft == [left <= gradient_steps for left in (4, 3, 2, 1)]


def test_a_soft_step_goes_as_far_as_a_place_is_masked():
    """x_s = x_t + x_t[MASK] (softmax((log q + Gumbel) / tau) - x_t), the noise drawn again."""
    model, seen, tau, noise = Pair(1).requires_grad_(False), [], 0.7, generator()
    x, _ = drakes.rollout(lambda x: seen.append(x) or model(x), None, 50, 2, 4, 4, tau, 0.0, generator())
    for left, x_t, x_s in zip((4, 3, 2, 1), seen, [*seen[1:], x], strict=True):
        q = torch.cat([model(x_t).exp() / left, torch.full((50, 2, 1), 1 - 1 / left)], -1)
        e = (q / torch.empty(50, 2, 5, dtype=torch.float64).exponential_(generator=noise)) ** (1 / tau)
        expected = torch.lerp(x_t.double(), e / e.sum(-1, keepdim=True), x_t[..., 4:].double())
        torch.testing.assert_close(x_s, expected[..., : x_s.shape[-1]])
    assert 0.1 < seen[2][..., 4].mean() < 0.9  # soft, indeed


def test_path_kl_counts_the_soft_share_that_is_masked():
    model, pretrained, seen = Pair(1).requires_grad_(False), Pair(2).requires_grad_(False), []
    sampler = 50, 2, 4, 2, 0.7, 1.0, generator()
    _, kl = drakes.rollout(lambda x: seen.append(x) or model(x), pretrained, *sampler)
    expected = 0
    for x, left in zip(seen, (4, 3, 2, 1), strict=True):
        divergence = F.kl_div(pretrained(x), model(x), reduction="none", log_target=True).sum(-1)
        expected = expected + (x[..., 4] * divergence).sum(-1) / left
    torch.testing.assert_close(kl, expected)


@pytest.mark.parametrize("steps, gradient_steps, kl_weight", [(3, 9, 0.0), (4, 1, 0.0), (3, 3, 0.5), (4, 2, 0.5)])
def test_gradient_is_that_of_finite_differences_with_the_noise_held_fixed(steps, gradient_steps, kl_weight):
    """The rewards are linear, so that the straight-through gradient is the true one of the soft letters."""
    denoiser, pretrained = Pair(1), Pair(2).requires_grad_(False)
    reward = torch.randn(2, 4, generator=generator(3)).double()

    def loss():
        sampler = steps, gradient_steps, 0.7, kl_weight, generator(4)
        x, kl = drakes.rollout(denoiser, pretrained, 16, 2, *sampler)
        return (kl_weight * kl - (x * reward).sum((1, 2))).mean(), x

    value, x = loss()
    (gradient,) = torch.autograd.grad(value, denoiser.logits)
    (through,) = torch.autograd.grad(-(drakes.straight_through(loss()[1]) * reward).sum() / 16, denoiser.logits)
    if not kl_weight:
        torch.testing.assert_close(through, gradient)
    assert (drakes.straight_through(x) - F.one_hot(x.argmax(-1), 4)).abs().max() < 1e-12 < (1 - x.amax(-1)).max()
    for seed in range(3):
        direction, h = torch.randn(5, 5, 2, 4, generator=generator(5 + seed)).double(), 1e-5
        with torch.no_grad():
            values = []
            for sign in (1, -2):
                denoiser.logits += sign * h * direction
                values.append(loss()[0].item())
            denoiser.logits += h * direction
        expected = (values[0] - values[1]) / (2 * h)
        assert abs(expected) > 1e-3 and (gradient * direction).sum().item() == pytest.approx(expected, rel=1e-4)


def test_path_kl_is_that_of_enumeration():
    """Two steps from the mask: both positions stay with probability 1 / 2, or are drawn."""
    denoiser, pretrained = Pair(1).requires_grad_(False), Pair(2).requires_grad_(False)

    def masked_kl(x):
        x = F.one_hot(torch.tensor([x]), 5)
        p, log_p, log_pre = denoiser(x).exp(), denoiser(x), pretrained(x)
        return (x[..., 4] * (p * (log_p - log_pre)).sum(-1)).sum().item()

    start = denoiser(F.one_hot(torch.tensor([[4, 4]]), 5)).exp()[0] / 2
    q = torch.cat([start, torch.full((2, 1), 0.5)], -1)  # (2, 5)
    states = itertools.product(range(5), repeat=2)
    expected = masked_kl((4, 4)) / 2 + sum(q[0, a].item() * q[1, b].item() * masked_kl((a, b)) for a, b in states)
    _, kl = drakes.rollout(denoiser, pretrained, 20_000, 2, 2, 0, 1.0, 1.0, generator())
    assert abs(kl.mean().item() - expected) < 4 * kl.std().item() / 20_000**0.5
    _, kl = drakes.rollout(denoiser, denoiser, 10, 2, 2, 2, 1.0, 1.0, generator())
    assert kl.abs().max() < 1e-12


def test_tuning_raises_the_reward_and_the_kl_holds_back():
    p, reward, mean = random_law(8), random_reward(9), {}
    for kl_weight in (0.0, 10.0):
        args = drakes.Args(updates=30, batch=32, batches=2, lr=0.05, kl_weight=kl_weight)
        tuned, curve = drakes.finetune(table(p), Reward(reward), 3, 4, 1, args)
        mean[kl_weight] = (law(tuned, 4) * reward).sum().item()
        assert [row["step"] for row in curve] == list(range(30)) and (curve[-1]["path_kl"] > 0) == (kl_weight > 0)
    start = (law(table(p), 4) * reward).sum().item()
    assert mean[0.0] > start + 0.7 and abs(mean[10.0] - start) < 0.3 * (mean[0.0] - start)


def test_the_oracle_sees_letters_and_gradients_are_of_one_update():
    def oracle(x):
        assert (x - x.round()).abs().max() < 1e-5 and x.requires_grad
        return reward(x)

    reward, p = Reward(random_reward(9)), random_law(8)
    _, curve = drakes.finetune(table(p), oracle, 3, 4, 1, drakes.Args(updates=10, batch=256, lr=1e-9))
    assert curve[9]["gradient_norm"] < 2 * curve[0]["gradient_norm"]


def test_batches_of_an_update_are_averaged():
    """The first step of Adam hides the size of a gradient, its norm in the curve does not."""
    p, reward, norm = random_law(8), random_reward(9), {}
    for batches in (1, 40):
        args = drakes.Args(updates=1, batch=32, batches=batches)
        norm[batches] = drakes.finetune(table(p), Reward(reward), 3, 4, 1, args)[1][0]["gradient_norm"]
    assert 0.3 < norm[40] / norm[1] < 1.5


def test_the_curve_is_of_all_batches(monkeypatch):
    """Kullback-Leibler divergences of 0 to 8 are put in the place of the paths', which are 0 in the first update."""
    p, reward, drawn, rollout = table(random_law(8)), Reward(random_reward(9)), [], drakes.rollout

    def watched(*args):
        x, kl = rollout(*args)
        drawn.append(x.detach())
        return x, kl + torch.arange(3.0) + 3 * (len(drawn) - 1)

    monkeypatch.setattr(drakes, "rollout", watched)
    row = drakes.finetune(p, reward, 3, 4, 1, drakes.Args(updates=1, batch=3, batches=3, kl_weight=0.5))[1][0]
    seeded, args = generator(), drakes.Args()
    x = [rollout(p, p, 3, 3, 4, args.gradient_steps, args.tau, 0.5, seeded)[0] for _ in range(3)]
    torch.testing.assert_close(torch.cat(drawn), torch.cat(x))  # of the generator of seed 1
    assert row["reward"] == pytest.approx(reward(torch.cat(x).argmax(-1)).median().item())
    assert row["path_kl"] == pytest.approx(4, abs=1e-6)


def test_the_gradient_is_cut_at_its_norm():
    """So small a gradient is below Adam's eps of 1e-8, which otherwise makes every step lr."""
    p = random_law(8)
    for grad_norm, low, high in ((1e-11, 0, 1e-3), (1.0, 0.99, 1.01)):
        args = drakes.Args(updates=1, batch=8, lr=1.0, grad_norm=grad_norm)
        tuned, _ = drakes.finetune(table(p), Reward(random_reward(9)), 3, 4, 1, args)
        assert low <= (tuned.logits - table(p).logits).abs().max() <= high


@pytest.mark.parametrize("method", ["drakes", "drakes-kl"])
def test_run_writes_a_row_and_a_model_per_seed_and_repeats_itself(run_script, tmp_path, method):
    """Seed 2 starts from the pretrained model, too, and nothing is tuned by the evaluation oracle: it says nan."""
    models = model_files(tmp_path / "here")
    judge = torch.load(models.parent / "eval_oracle.pt", weights_only=True)
    judge["state"]["mean"].fill_(torch.nan)
    torch.save(judge, models.parent / "eval_oracle.pt")
    kl_weight = 0.1 if method == "drakes-kl" else 0.0
    flags = [*TINY, "--seeds", 2, "--models", models, "--kl-weight", kl_weight]
    made = [run_script("baselines/drakes", *flags, folder="here") for _ in range(2)]
    tables = [[list(csv.DictReader(open(run / f"{name}.csv"))) for run in made] for name in ("rows", "curves")]
    for first, second in tables:
        for a, b in zip(first, second, strict=True):
            assert all(a[name] == b[name] for name in a if "seconds" not in name)
    rows, curves = tables[0][0], tables[1][0]
    assert [(row["method"], row["seed"]) for row in rows] == [(method, "1"), (method, "2")]
    assert [row["step"] for row in curves] == ["0", "1", "2"] * 2 and set(dna.COLUMNS) <= rows[0].keys()
    names = {f"{method}-seed{seed}.{kind}" for seed in (1, 2) for kind in ("pt", "fasta")}
    assert {path.name for path in made[0].iterdir()} == names | {"args.json", "rows.csv", "curves.csv", "table.txt"}
    tuned = dna.load_model("denoiser", made[0] / f"{method}-seed2.pt", 16, "cpu")
    x = dna.sample(tuned, 10, 16, 4, generator(10_002))
    fasta = (made[0] / f"{method}-seed2.fasta").read_text().split()
    assert fasta[1::2] == ["".join(dna.LETTERS[i] for i in sequence) for sequence in x.tolist()]
    start = dna.load_model("denoiser", models.parent / "pretrained.pt", 16, "cpu")
    assert all((a != b).any() for a, b in zip(tuned.parameters(), start.parameters(), strict=True) if a.dim() > 2)
    oracle = dna.load_model("oracle", models.parent / "reward_oracle.pt", 16, "cpu")
    args = drakes.Args(updates=3, batch=4, gradient_steps=2, kl_weight=kl_weight)
    again, _ = drakes.finetune(start, oracle, 16, 4, 2, args)
    assert all(torch.equal(a, b) for a, b in zip(tuned.parameters(), again.parameters(), strict=True))
    settings, files = drakes.read_run(models)
    x, y, _, _ = dna.read_data(settings)
    loaded = {
        name: dna.load_model("oracle" if "oracle" in name else "denoiser", files[name], 16, "cpu") for name in files
    }
    expected = dna.evaluate(tuned, loaded, x[y.argsort(descending=True)[:2]], 2, settings)["row"]  # 1% of 200
    for name in ("reward_oracle", "kmer_correlation", "log_likelihood"):
        assert float(rows[1][name]) == pytest.approx(expected[name], rel=1e-4), name


BAD_FLAGS = [
    ("--kl-weight -1", "--kl-weight must be at least 0"),
    ("--tau 0", "--tau must be above 0"),
    ("--lr nan", "--lr must be above 0"),
    ("--gradient-steps 0", "--gradient-steps must be at least 1"),
    ("--seed -1", "--seed must be from 0 to 2^32 - 1"),
    ("--models nothing.json", "--models must be a file that is there; got nothing.json"),
    ("", "--models: there is no run of dna_finetune.py in runs/"),
]


@pytest.mark.parametrize("flags, message", BAD_FLAGS)
def test_bad_flag_gets_one_line(run_script, flags, message):
    refuses(run_script, "baselines/drakes", message, *flags.split())


def test_files_that_are_no_models_get_one_line(run_script, tmp_path):
    check_bad_models(run_script, tmp_path, "baselines/drakes")


def test_a_loss_that_is_not_finite_stops_with_one_line():
    args = drakes.Args(updates=2, batch=4, lr=0.1)
    with pytest.raises(SystemExit, match=re.escape("stopped at update 0: loss not finite; try a smaller --lr")):
        drakes.finetune(table(random_law(1)), Reward(torch.full((64,), torch.nan)), 3, 2, 1, args)
