"""dna_finetune.py: the ELBO, the sampler and the tuned optimum against enumeration; data, files, stages and faults."""

import csv
import gzip
import inspect
import itertools
import json
import math
import re
import sys
import time
import types
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from conftest import ROOT
from scipy import stats
from test_command_line import shell

import dna_finetune as dna
import simpo_exp
import simpo_neg

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
        index = (x * torch.tensor([25, 5, 1])).sum(-1)
        return self.logits[index].log_softmax(-1)


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


def total_variation(p, q):
    return 0.5 * (p.double() - q.double()).abs().sum().item()


def counts(x):
    return torch.bincount((x * torch.tensor([16, 4, 1])).sum(-1), minlength=64)


def small_denoiser(seed=1, width=8):
    torch.manual_seed(seed)
    denoiser = dna.Denoiser(width, 1).requires_grad_(False)
    nn.init.normal_(denoiser.logits.weight, std=0.7)
    nn.init.normal_(denoiser.shifts)
    return denoiser


# ---------------------------------------------------------------------------------------------- diffusion model


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


def test_elbo_of_the_exact_posterior_is_the_log_likelihood():
    p = random_law(2)
    torch.testing.assert_close(exact_elbo(Table(p)), p.double().log(), atol=1e-4, rtol=0)
    torch.testing.assert_close(dna.log_likelihood(Table(p), ALL, 3000, 1), p.log(), atol=0.06, rtol=0)


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_sampler_follows_its_law(steps):
    p, n = random_law(3, 1.5), 30_000
    table = Table(p)
    x = dna.sample(table, n, 3, steps, torch.Generator().manual_seed(steps), batch=n)
    expected = n * law(table, steps).numpy()
    assert stats.chisquare(counts(x), expected, sum_check=False).pvalue > 1e-4
    other = n * law(table, 4 - steps if steps != 2 else 1).numpy()  # in other steps, another law
    assert stats.chisquare(counts(x), other, sum_check=False).pvalue < 1e-6


def test_sampler_reproduces_a_known_distribution():
    p, n = random_law(4, 1.5), 30_000
    x = dna.sample(Table(p), n, 3, 2000, torch.Generator().manual_seed(1), batch=n)
    assert total_variation(counts(x) / n, p) < 0.03


def test_positions_leave_the_mask_uniformly_over_the_steps_and_never_change_again():
    seen = []

    def denoiser(x):
        seen.append(x)
        return torch.zeros(*x.shape, 4)

    dna.sample(denoiser, 200, 12, 16, torch.Generator().manual_seed(1), batch=200)
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


def test_pretraining_learns_a_distribution(tmp_path, monkeypatch):
    p = random_law(5, 2.0)
    x = ALL[torch.multinomial(p, 4000, replacement=True, generator=torch.Generator().manual_seed(1))]
    args = dna.Args(width=24, pretrain_steps=400, pretrain_batch=128, pretrain_lr=1e-2, ema=0.98)
    denoiser = dna.Denoiser(24, 1).requires_grad_(False)
    denoiser.load_state_dict(dna.pretrain(x.byte(), args, torch.device("cpu"), dna.SummaryWriter(tmp_path))["state"])
    assert total_variation(law(denoiser, 1), law(Table(p), 1)) < 0.1
    assert total_variation(exact_elbo(denoiser).exp(), p) < 0.2 < total_variation(law(Table(p), 1), p)


# ---------------------------------------------------------------------------------------------------- fine-tuning


def tune(method, p, reward, **settings):
    args = dna.Args(
        num_particles=512, rounds=120, updates=4, lr=0.02, sampling_steps=200, temperature=0.7, elbo_draws=1
    )
    args = dna.Args(**vars(args) | dict(samples_from="pretrained") | settings)
    table = Table(p).requires_grad_(False)
    made = dna.finetune(table, lambda x: reward[(x * torch.tensor([16, 4, 1])).sum(-1)], method, 3, args, 1)
    table.load_state_dict(made["state"])
    return table, made["lowest_loss"]


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
    others = [m for m in ("exp", "linear", "square") if m != method]
    for other in others:
        assert total_variation(fitted, closed_form(other, p, reward)) > total_variation(fitted, target)


def test_on_policy_rounds_repeat_the_reweighting_and_a_kl_term_holds_back():
    p, reward = random_law(8), torch.randn(64, generator=torch.Generator().manual_seed(9))
    mean = {}
    for name, settings in dict(once={}, again=dict(samples_from="tuned"), held=dict(kl_weight=5.0)).items():
        tuned, _ = tune("linear", p, reward, rounds=40, num_particles=128, **settings)
        fitted = law(tuned, 3)
        mean[name] = (fitted * reward).sum().item()
    start = (p * reward).sum().item()
    assert mean["again"] > mean["once"] + 0.3 > start + 0.6
    assert start - 0.1 < mean["held"] < start + 0.5 * (mean["once"] - start)


def test_negative_weights_push_below_what_positive_ones_reach():
    p, reward = random_law(8), torch.randn(64, generator=torch.Generator().manual_seed(9))
    worst = reward.argsort()[:20]
    linear, _ = tune("linear", p, reward, rounds=30, num_particles=128, temperature=3.0)
    negative, _ = tune("lin-neg", p, reward, rounds=30, num_particles=128, temperature=0.7)
    assert law(negative, 3)[worst].sum() < 0.7 * law(linear, 3)[worst].sum()


def test_reweight_equals_the_rl_scripts_to_the_letter():
    assert inspect.getsource(dna.reweight) == inspect.getsource(simpo_neg.reweight)
    assert inspect.getsource(dna.reweight_exp).replace("reweight_exp(", "reweight(") == inspect.getsource(
        simpo_exp.reweight
    )


def test_weights_by_name():
    q = torch.randn(3, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    K = 32
    np.testing.assert_allclose(dna.weigh("exp", q, 0.4, 9.0), K * torch.softmax(q / 0.4, -1))
    wd1 = K * (torch.softmax(q / 0.4, -1) - torch.softmax(-q / 0.4, -1))
    np.testing.assert_allclose(dna.weigh("wd1", q, 0.4, 9.0), wd1, atol=1e-12)
    for method, lowest in {"linear": 0, "square": 0, "lin-neg": -0.3, "sqr-neg": -0.3}.items():
        w = dna.weigh(method, q, 0.4, 0.3)
        np.testing.assert_allclose(w.mean(-1), 1)
        assert w.min() == lowest
    y = ((q - simpo_neg.reweight(q, 0.4, 2, 0.3)[1]) / 0.4).numpy()
    np.testing.assert_allclose(dna.weigh("sqr-neg", q, 0.4, 0.3), np.where(y > 0, y**2, np.maximum(y, -0.3)), atol=1e-9)


@pytest.mark.parametrize("method", dna.METHODS)
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e4])
def test_temperature_reaches_the_target_kl(method, scale):
    q = scale * torch.randn(2, 64, generator=torch.Generator().manual_seed(1)) + 5 * scale
    args = dna.Args(target_kl=1.2, epsilon=0.4)
    temperature = dna.solve_temperature(method, q, args)
    w = dna.weigh("exp" if method == "wd1" else method, q, temperature, 0.4).double().clamp(min=1e-6)
    p = w / w.sum(-1, keepdim=True)
    torch.testing.assert_close((p * (64 * p).log()).sum(-1), torch.full((2,), 1.2).double(), atol=1e-3, rtol=0)


# --------------------------------------------------------------------------------------------------- simulated data


def test_simulated_activity_knows_sites_places_strands_synergy_and_repression():
    rng = np.random.default_rng(1)
    background = torch.tensor(rng.integers(4, size=(200, 60)))

    def activity(*sites):
        x = background.clone()
        for name, start, forward in sites:
            word = "".join(dna.IUPAC[code][0] for code in dna.FACTORS[name][0])
            word = word if forward else word[::-1].translate(str.maketrans("ACGT", "TGCA"))
            x[:, start : start + len(word)] = torch.tensor([dna.LETTERS.index(letter) for letter in word])
        return dna.true_activity(x).mean()

    here, away = ("HNF4A", 32, True), ("HNF4A", 0, True)
    assert activity(here) > activity() + 0.4
    assert activity(here) > activity(("HNF4A", 32, False)) + 0.1  # strand
    assert activity(here) > activity(away) + 0.1  # place
    foxa = ("FOXA2", 13, True)
    assert activity(here, foxa) - activity() > 1.5 * (activity(here) + activity(foxa) - 2 * activity())  # synergy
    assert activity(here, foxa, ("ZEB1", 25, True)) < 0.6 * activity(here, foxa)  # repression
    assert (
        activity(*((name, s, True) for name, s in zip(dna.FACTORS, (47, 34, 1, 24, 12), strict=False))) < 10
    )  # saturation


def test_sites_are_bound_on_both_strands():
    x = torch.zeros(3, 60).long()  # AAA...
    for row, word in enumerate(("TGTTTACTTA", "TAAGTAAACA", "ATTCATTTGT")):  # FOXA2, on the other strand, backwards
        x[row, 13:23] = torch.tensor([dna.LETTERS.index(letter) for letter in word])
    forward, other, backwards = dna.occupancy(x)[:, list(dna.FACTORS).index("FOXA2")]
    assert forward > other > 0.5 > 0.3 > backwards


def test_simulated_data_is_reproducible_and_has_sites():
    x, y = dna.simulate(400, 40, 3)
    again, _ = dna.simulate(400, 40, 3)
    other, _ = dna.simulate(400, 40, 4)
    assert (x == again).all() and (x != other).any() and x.shape == (400, 40) and x.max() == 3
    bound = dna.occupancy(torch.from_numpy(x).long())
    assert ((bound > 0.3).double().mean(0) > 0.05).all()
    assert np.corrcoef(y, dna.true_activity(torch.from_numpy(x).long()))[0, 1] > 0.8
    cpg = ((x[:, :-1] == 1) & (x[:, 1:] == 2)).mean() / ((x == 1).mean() * (x == 2).mean())
    assert cpg < 0.7


def test_parts_of_the_data_are_disjoint_and_contiguous_in_a_position():
    parts = dna.split(1000, None, 1)
    assert [len(p) for p in parts] == [450, 450, 100] and len(np.unique(np.concatenate(parts))) == 1000
    position = np.random.default_rng(1).permutation(1000)
    a, b, c = (position[p] for p in dna.split(1000, position, 1))
    assert a.max() < b.min() and b.max() < c.min()


# -------------------------------------------------------------------------------------------------------- measures


def test_measures_against_their_definitions():
    x = torch.tensor(np.random.default_rng(1).integers(4, size=(30, 9)))
    strings = [dna.text(row) for row in x.tolist()]
    words = [s[i : i + 3] for s in strings for i in range(7)]
    frequencies = dna.kmers(x)
    for word in ("ACG", "TTA", "CCC"):
        index = sum(dna.LETTERS.index(letter) * 4**i for i, letter in enumerate(word))
        assert frequencies[index] == pytest.approx(words.count(word) / len(words))
    pairs = [sum(a != b for a, b in zip(s, t, strict=True)) / 9 for s, t in itertools.combinations(strings, 2)]
    distance, distinct = dna.diversity(torch.cat([x[:20], x[:10]]))
    assert distinct == pytest.approx(len(set(strings[:20])) / 30)
    assert dna.diversity(x)[0] == pytest.approx(np.mean(pairs))


def test_markov_model_against_its_definition():
    rng = np.random.default_rng(2)
    train, test = (torch.tensor(rng.integers(4, size=(n, 7))) for n in (40, 5))
    seen, nats = [dna.text(row) for row in train.tolist()], 0.0
    for s in (dna.text(row) for row in test.tolist()):
        for i in range(7):
            k = min(i, 2)
            places = range(2, 7) if k == 2 else [i]  # shorter histories only at the start
            histories = [t[j - k : j + 1] for t in seen for j in places if t[j - k : j] == s[i - k : i]]
            nats -= math.log((histories.count(s[i - k : i + 1]) + 1) / (len(histories) + 4))
    assert dna.markov_nats(train, test, 2) == pytest.approx(nats / 35)


def test_differences_are_paired_by_seed(tmp_path):
    scores = {"pretrained": (0, 0, 0), "exp": (1, 5, 3), "linear": (2, 7, 7)}  # differences 1, 2, 4
    others = dict.fromkeys(dna.COLUMNS, 0.5)
    rows = [dict(others, method=m, seed=i, pred_activity=q) for m in scores for i, q in enumerate(scores[m])]
    half = 4.302653 * math.sqrt(7 / 9)  # Student's t of 2 degrees of freedom; standard error of 1, 2, 4
    expected = f"linear - exp: +2.33, 95% interval [{7 / 3 - half:+.2f}, {7 / 3 + half:+.2f}]"
    assert dna.summarise(rows, tmp_path).splitlines()[-1] == expected


# ------------------------------------------------------------------------------------------------ input and refusals


def table(path, lines):
    (gzip.open if path.suffix == ".gz" else open)(path, "wt").write("\n".join(lines) + "\n")
    return path


def test_malformed_rows_are_left_out_and_reported(tmp_path, capsys):
    rows = ["name,seq,activity", "a,ACGT,1.5", "b,ACGN,2", "c,acgg,x", "d,CCCC,nan", "e,TTTT", "f,,1", "g,ttga,-2", ""]
    for path in (tmp_path / "t.csv", tmp_path / "t.csv.gz"):
        x, y = dna.read_table(table(path, rows), ["activity"])
        assert x.tolist() == [[0, 1, 2, 3], [3, 3, 2, 0]] and y.tolist() == [[1.5], [-2.0]]
        assert (
            "5 malformed rows left out, the first at line 3: a sequence with letters other" in capsys.readouterr().out
        )


def test_table_of_the_papers_form(tmp_path):
    rows = ["seq,hepg2,k562,sknsh"] + [f"{'ACGT' * 50},{i},0.5,-1" for i in range(3)]
    x, y = dna.read_table(table(tmp_path / "gosai_all.csv", rows), ["hepg2", "sknsh"])
    assert x.shape == (3, 200) and y.tolist() == [[0, -1], [1, -1], [2, -1]]


BAD_TABLES = [
    (["seq,other", "ACGT,1"], "has no column 'activity'; it has seq, other"),
    (["sequence,activity", "ACGT,1"], "has no column 'seq'"),
    (["seq,activity", "ACGT,1", "ACGTA,1"], "equally long; line 2 has 4 letters, line 3 has 5"),
    (["seq,activity", "ACGN,1", "AC-T,1"], "no row is left; the first malformed: line 2: a sequence with letters"),
    (["seq,activity"], "no row is left; it is empty"),
    ([""], "has no column 'seq'"),
    (["seq,activity", "ACGT,1"], "1 rows; at least 100 are needed"),
]


@pytest.mark.parametrize("lines, message", BAD_TABLES)
def test_bad_table_gets_one_line(run_script, tmp_path, lines, message):
    path = table(tmp_path / "t.csv", lines)
    refuses(run_script, message, "--data", path)


def refuses(run_script, message, *flags):
    with pytest.raises(SystemExit) as error:
        run_script("dna_finetune", "--simulated-sequences", 100, *flags)
    assert isinstance(error.value.code, str) and message in error.value.code and "\n" not in error.value.code
    assert not Path("runs").exists()


BAD_FLAGS = [
    ("--epsilon -1", "--epsilon must be at least 0"),
    ("--epsilon nan", "--epsilon must be at least 0"),
    ("--lr 0", "--lr must be above 0"),
    ("--rounds 0", "--rounds must be at least 1"),
    ("--seeds 0", "--seeds must be at least 1"),
    ("--num-particles 4 --target-kl 1.5", "--target-kl must be above 0 and below log(num_particles)"),
    ("--num-particles 1", "--num-particles must be at least 2"),
    ("--top-share 0", "--top-share must be in (0, 1]"),
    ("--ema 1", "--ema must be"),
    ("--simulated-length 5", "--simulated-length must be at least 13"),
    ("--data nothing.csv", "--data must be a file that is there; got nothing.csv"),
    ("--pretrained nothing.pt", "--pretrained must be a file that is there"),
    ("--split-column start", "--split-column must be empty without --data"),
    ("--methods exp exp", "--methods must be some methods, each once"),
    ("--device nonsense", "--device nonsense"),
]


@pytest.mark.parametrize("flags, message", BAD_FLAGS)
def test_bad_flag_gets_one_line(run_script, flags, message):
    refuses(run_script, message, *flags.split())


def test_unreadable_files_get_one_line(run_script, tmp_path):
    broken = tmp_path / "broken.csv.gz"
    broken.write_bytes(b"no gzip")
    refuses(run_script, "cannot read it", "--data", broken)
    refuses(run_script, "not the file of a model", "--pretrained", broken)
    torch.save({"state": {}}, tmp_path / "other.pt")
    refuses(run_script, "not a denoiser of the known forms", "--pretrained", tmp_path / "other.pt")
    refuses(run_script, "neither this script's oracle nor a gReLU", "--eval-oracle", tmp_path / "other.pt")
    state = dna.Oracle(4, 20).state_dict()
    torch.save(dict(kind="oracle", length=20, state=state), tmp_path / "oracle.pt")
    refuses(run_script, "is for 20 bases, the data has 60", "--reward-oracle", tmp_path / "oracle.pt")


def test_help_names_every_flag(tmp_path):
    result = shell("dna_finetune", "--help", cwd=tmp_path)
    assert result.returncode == 0 and "delta" in result.stdout and "lambda" in result.stdout
    for field in fields(dna.Args):
        assert f"--{field.name.replace('_', '-')}" in result.stdout, field.name


def test_inline_metadata_equals_requirements():
    block = re.search(r"^# /// script\n(.*?)^# ///$", (ROOT / "dna_finetune.py").read_text(), flags=re.M | re.S)[1]
    pins = re.findall(r'"(\S+==\S+)"', block)
    required = (ROOT / "requirements.txt").read_text().splitlines()
    assert pins and set(pins) <= set(required)
    imported = set(re.findall(r"^(?:import|from) (\w+)", (ROOT / "dna_finetune.py").read_text(), flags=re.M))
    names = {pin.split("==")[0] for pin in pins}
    assert imported - set(sys.stdlib_module_names) | {"tensorboard", "wandb"} == names


# ---------------------------------------------------------------------------------------------------- files of others


class Published(nn.Module):
    """The network as the DRAKES release stores it: 5 letters in and out, with a time embedding; stacks = 2."""

    def __init__(self, width=8, stacks=2):
        super().__init__()
        self.linear = nn.Conv1d(5, width, 9, padding=4)
        fourier = nn.Module()
        fourier.W = nn.Parameter(30 * torch.randn(width // 2), requires_grad=False)
        self.time_embedder = nn.Sequential(fourier, nn.Linear(width, width))
        d = [dilation for dilation in (1, 1, 4, 16, 64) for _ in range(stacks)]
        self.convs = nn.ModuleList(nn.Conv1d(width, width, 9, dilation=n, padding=4 * n) for n in d)
        self.time_layers = nn.ModuleList(nn.ModuleDict(dict(dense=nn.Linear(width, width))) for _ in d)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in d)
        self.final_conv = nn.Sequential(nn.Conv1d(width, width, 1), nn.ReLU(), nn.Conv1d(width, 5, 1))

    def forward(self, x):
        angle = torch.zeros(len(x), 1) * self.time_embedder[0].W * 2 * math.pi  # time 0
        time = F.relu(self.time_embedder[1](torch.cat([angle.sin(), angle.cos()], -1)))
        feat = F.relu(self.linear(F.one_hot(x, 5).float().transpose(1, 2)))
        for conv, layer, norm in zip(self.convs, self.time_layers, self.norms, strict=True):
            h = norm((feat + layer["dense"](time)[:, :, None]).transpose(1, 2)).transpose(1, 2)
            feat = feat + F.relu(conv(h))
        logits = self.final_conv(feat).transpose(1, 2)
        logits[..., 4] = -1e6
        return logits.log_softmax(-1)[..., :4]


def test_published_checkpoint_with_averaged_weights(tmp_path, monkeypatch):
    torch.manual_seed(1)
    published, average = Published(), Published()
    average.time_embedder[0].W = published.time_embedder[0].W
    config = types.ModuleType("omegaconf_of_the_test")  # a class that is not there when the file is read
    config.DictConfig = type("DictConfig", (), dict(__module__="omegaconf_of_the_test"))
    monkeypatch.setitem(sys.modules, "omegaconf_of_the_test", config)
    instance = config.DictConfig()
    instance.content = {"lr": 1}
    shadow = [p.detach() for p in average.parameters() if p.requires_grad]
    state = {f"backbone.{name}": value for name, value in published.state_dict().items()}
    torch.save(
        dict(state_dict=state, ema=dict(decay=0.9999, shadow_params=shadow), hyper_parameters=instance),
        tmp_path / "pretrained.ckpt",
    )
    torch.save(state, tmp_path / "plain.ckpt")
    monkeypatch.delitem(sys.modules, "omegaconf_of_the_test")
    x = torch.randint(5, (4, 40))
    for path, network in ((tmp_path / "pretrained.ckpt", average), (tmp_path / "plain.ckpt", published)):
        loaded = dna.load_denoiser(path, torch.device("cpu"))
        torch.testing.assert_close(loaded(x), network(x).detach(), atol=1e-4, rtol=1e-4)


class Malicious:
    def __reduce__(self):
        return (Path.touch, (Path("/tmp/executed-by-a-checkpoint"),))


def test_nothing_in_a_checkpoint_is_executed(tmp_path):
    torch.save({"hyper_parameters": Malicious(), "state_dict": {}}, tmp_path / "evil.ckpt")
    with pytest.raises(SystemExit, match="--pretrained"):
        dna.load_denoiser(tmp_path / "evil.ckpt", torch.device("cpu"))
    assert not Path("/tmp/executed-by-a-checkpoint").exists()


def grelu_file(path):
    torch.manual_seed(2)
    settings = dict(model_params={"model_type": "EnformerPretrainedModel", "n_tasks": 3}, train_params={"loss": "MSE"})
    torch.save(dict(state_dict=nn.Conv1d(4, 3, 5).state_dict(), hyper_parameters=settings), path)
    return path


def test_grelu_oracle_without_grelu_names_the_extra(run_script, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "grelu", None)
    refuses(run_script, "pip install gReLU", "--eval-oracle", grelu_file(tmp_path / "oracle.ckpt"))


def test_grelu_oracle_is_built_without_a_download_and_predicts(tmp_path, monkeypatch):
    made = {}

    class LightningModel(nn.Conv1d):  # the form of gReLU's: settings in, one-hot (B, 4, L) to (B, tasks, 1)
        def __init__(self, model_params, train_params):
            made.update(model_params)
            super().__init__(4, model_params["n_tasks"], 5)

        def forward(self, x):
            return super().forward(x).mean(-1, keepdim=True)

    module = types.ModuleType("grelu.lightning")
    module.LightningModel = LightningModel
    monkeypatch.setitem(sys.modules, "grelu", types.ModuleType("grelu"))
    monkeypatch.setitem(sys.modules, "grelu.lightning", module)
    path = grelu_file(tmp_path / "oracle.ckpt")
    oracle = dna.load_oracle("--eval-oracle", path, 20, 1, torch.device("cpu"))
    x = torch.randint(4, (6, 20), generator=torch.Generator().manual_seed(1))
    state = torch.load(path)["state_dict"]
    expected = F.conv1d(F.one_hot(x, 4).float().transpose(1, 2), state["weight"], state["bias"]).mean(-1)[:, 1]
    torch.testing.assert_close(dna.predict(oracle, x), expected)
    assert made["model_type"] == "EnformerModel"


# -------------------------------------------------------------------------------------------------------- whole runs

TINY = """--simulated-sequences 300 --simulated-length 16 --width 8 --pretrain-steps 5 --pretrain-batch 8
    --oracle-width 8 --oracle-epochs 1 --rounds 2 --updates 1 --num-particles 8 --target-kl 0.9 --eval-samples 8
    --eval-elbo-draws 4 --sampling-steps 8 --sampling-dtype float32""".split()


@pytest.fixture
def run_dna(run_script, tmp_path, capsys):
    def run(*flags):
        before = set(Path("runs").glob("*__dna_finetune__*"))
        run_script("dna_finetune", *TINY, *flags)
        (made,) = set(Path("runs").glob("*__dna_finetune__*")) - before
        return made, capsys.readouterr().out

    return run


def stages():
    return {path.name: path.stat().st_mtime_ns for path in Path("runs/dna_stages").iterdir()}


def test_run_makes_what_it_promises_and_repeats_itself(run_dna):
    made, out = run_dna("--seeds", "2")
    files = "args.json table.txt table.csv rows.csv score_likelihood.png quality.json"
    for name in files.split():
        assert (made / name).stat().st_size > 0
    assert list(made.glob("events.*"))
    rows = list(csv.DictReader(open(made / "rows.csv")))
    assert [row["method"] for row in rows] == 2 * ["pretrained", *dna.METHODS]
    for method in ("pretrained", *dna.METHODS):
        assert f"\n{dna.LABELS.get(method, method)} " in out
        lines = (made / f"{method}-seed2.fasta").read_text().split()
        assert len(lines) == 16 and lines[0] == f">{method}-seed2-1" and re.fullmatch("[ACGT]{16}", lines[1])
    assert "sqr-neg - exp: " in out and "95% interval" in out
    quality = json.loads((made / "quality.json").read_text())
    assert {"model_nats_per_base", "markov5_nats_per_base", "gc_mean"} <= set(quality["pretrained"])
    assert {"held_out_correlation", "site_effect_correlation"} <= set(quality["eval_oracle"])

    for path in Path("runs/dna_stages").iterdir():
        path.unlink()
    again, _ = run_dna("--seeds", "2")
    assert (again / "rows.csv").read_text() == (made / "rows.csv").read_text()
    other, _ = run_dna("--seed", "2", "--methods", "exp")
    assert (other / "rows.csv").read_text() not in (made / "rows.csv").read_text()


def test_a_killed_stage_goes_on_bit_for_bit(run_dna, monkeypatch):
    """The process dies in an Adam step of every kind of stage; its last whole step makes the next run end the same."""
    flags = ["--methods", "lin-neg", "--rounds", "6", "--oracle-epochs", "3"]
    calls, step = [], torch.optim.Adam.step
    clock = itertools.count(0, 100)  # every look at the clock is 100 seconds later: kept after every step
    monkeypatch.setattr(time, "time", lambda: float(next(clock)))

    def counting(self, *args, **kwargs):
        calls.append(None)
        if len(calls) in die_at:
            raise KeyboardInterrupt
        return step(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.Adam, "step", counting)
    die_at = []
    made, _ = run_dna(*flags)
    assert len(calls) == 5 + 2 * 6 + 6  # pretraining, two oracles, rounds
    for call in (3, 5 + 4, 5 + 2 * 6 + 3):
        die_at[:] = [call]
        for path in Path("runs/dna_stages").iterdir():
            path.unlink()
        calls.clear()
        with pytest.raises(KeyboardInterrupt):
            run_dna(*flags)
        again, out = run_dna(*flags)
        assert "unfinished: going on from step " in out
        assert (again / "rows.csv").read_text() == (made / "rows.csv").read_text()


def test_stages_are_skipped_and_remade(run_dna):
    run_dna("--methods", "exp", "lin-neg")
    first = stages()
    assert len(first) == 1 + 1 + 2 + 2 + 3  # pretrained and its report, oracles, tuned, evaluated
    _, out = run_dna("--methods", "exp", "lin-neg")
    assert stages() == first and out.count("not made again") == 9
    run_dna("--methods", "exp", "lin-neg", "--epsilon", "0.1")  # concerns lin-neg only
    new = sorted(name.split("-")[0] for name in set(stages()) - set(first))
    assert new == ["evaluated", "tuned"]
    before = stages()
    run_dna("--methods", "exp", "--pretrain-lr", "0.01")
    assert {name.split("-")[0] for name in set(stages()) - set(before)} == {"pretrained", "tuned", "evaluated"}
    damaged = next(Path("runs/dna_stages").glob("reward_oracle-*"))
    damaged.write_bytes(damaged.read_bytes()[:100])
    _, out = run_dna("--methods", "exp")
    assert "is damaged: made again" in out and damaged.stat().st_size > 1000


def test_run_on_a_table_with_a_classifier_and_own_files(run_dna, tmp_path):
    x, y = dna.simulate(200, 20, 1)
    rows = [f"{dna.text(s)},{a:.3f},{i},{int(a > 0.5)}" for i, (s, a) in enumerate(zip(x, y, strict=True))]
    path = table(tmp_path / "assay.csv.gz", ["seq,act,start,open", *rows])
    data = ("--data", path, "--target", "act", "--split-column", "start", "--methods", "exp")
    made, _ = run_dna(*data, "--accessibility", path, "--accessibility-column", "open")
    row = list(csv.DictReader(open(made / "rows.csv")))[-1]
    assert 0 <= float(row["accessible"]) <= 1 and row["true_activity"] == "nan" and made.name.startswith("assay__")
    own = {
        name: next(Path("runs/dna_stages").glob(f"{name}-*[0-9a-f].pt")) for name in ("reward_oracle", "eval_oracle")
    }
    model = next(p for p in Path("runs/dna_stages").glob("pretrained-*") if "report" not in p.name)
    flags = ("--pretrained", model, "--reward-oracle", own["reward_oracle"], "--eval-oracle", own["eval_oracle"])
    again, _ = run_dna(*data, *flags)
    row_again = list(csv.DictReader(open(again / "rows.csv")))[-1]
    assert row_again["pred_activity"] == row["pred_activity"]


def test_loss_that_is_not_finite_stops_with_one_line(run_dna):
    with pytest.raises(SystemExit, match=r"stopped at lin-neg, round \d: (loss|gradient) is not finite") as error:
        run_dna("--methods", "lin-neg", "--lr", "1e30", "--rounds", "5", "--updates", "3")
    assert "\n" not in error.value.code and "--epsilon" in error.value.code
    p = random_law(1)
    with pytest.raises(SystemExit, match="exp, round 0: reward is not finite"):
        tune("exp", p, torch.full((64,), math.nan), num_particles=8)


def test_user_is_told_of_an_unbounded_loss(run_dna):
    _, out = run_dna(*"--methods lin-neg --epsilon 30 --rounds 12 --updates 8 --lr 0.1".split())
    assert "warning: the loss of lin-neg-seed1 fell to" in out
