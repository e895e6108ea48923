"""baselines/dna_guidance.py: its laws on an enumerable space, the frame of dna_finetune.py, its runs and bad input."""

import copy
import csv
import itertools
import json
import math
import re
from pathlib import Path

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from conftest import ROOT
from scipy import stats
from test_baselines_frame import definitions
from test_dna_model import ALL, Table, index, law, random_law, total_variation

import dna_finetune as dna
from baselines import dna_guidance as guidance

TINY = "--num-particles 4 --tuning-samples 8 --train-steps 3 --train-batch 8 --device cpu".split()
COPIES = """one_hot convolve Denoiser corrupt elbo_loss log_likelihood occupancy true_activity simulate read_table
    read_data cosine Oracle predict kmers sha256 load load_model""".split()


class SoftTable(Table):
    """Table that also takes one-hots, linear in each position's; no position sees itself."""

    def forward(self, x):
        if not x.is_floating_point():
            return super().forward(x)
        if not x.requires_grad and (x == x.round()).all():  # the same, but faster
            return super().forward(x.argmax(-1))
        x, log_p = x.to(self.logits.dtype), []
        for i in range(3):
            hidden = x.clone()
            hidden[:, i] = torch.eye(5)[guidance.MASK]
            a, b, c = hidden.unbind(1)
            log_p.append(torch.einsum("bi,bj,bk,ijka->ba", a, b, c, self.logits.view(5, 5, 5, 3, 4)[..., i, :]))
        return torch.stack(log_p, 1).log_softmax(-1)


class Reward(nn.Module):
    """Any function of x (B, 3), as the multilinear one of its 64 values."""

    def __init__(self, values):
        super().__init__()
        self.values = values.view(4, 4, 4)

    def forward(self, x):
        a, b, c = guidance.one_hot(x, 4).to(self.values.dtype).unbind(1)
        return torch.einsum("bi,bj,bk,ijk->b", a, b, c, self.values)


def table(p):
    return SoftTable(p).requires_grad_(False)


def random_reward(seed, spread=1.0):
    return spread * torch.randn(64, generator=torch.Generator().manual_seed(seed))


def counts(x):
    return torch.bincount(index(x), minlength=64)


def generator(seed=1):
    return torch.Generator().manual_seed(seed)


def check_copies(script, names):
    """What a script shares with dna_finetune.py is equal to the letter."""
    ours, frame = definitions(script), definitions("dna_finetune")
    assert all(ours[name] == frame[name] for name in names), [n for n in names if ours[n] != frame[n]]
    assert ours.keys() & frame.keys() - set(names) <= {"Args", "evaluate", "check_finite", "finetune"}
    text, of_frame = ((ROOT / f"{path}.py").read_text() for path in (script, "dna_finetune"))
    types = re.findall(r"^\w+ = Annotated\[.*$", text, flags=re.M)
    own = ("NonNegatives", "Positives")
    assert {line for line in types if not line.startswith(own)} <= set(of_frame.splitlines())
    measures = [t[t.index("    counts = F.one_hot") : t.index("name, value in row.items()")] for t in (text, of_frame)]
    assert measures[0].split("    return")[0] == measures[1].split("    return")[0]
    assert len(text.splitlines()) <= 560


def test_the_frame_is_dna_finetunes_to_the_letter():
    check_copies("baselines/dna_guidance", COPIES)
    for name in ("LETTERS", "MASK", "FACTORS", "IUPAC", "COLUMNS"):
        assert getattr(guidance, name) == getattr(dna, name)


@pytest.mark.parametrize("steps", [1, 3])
def test_without_guidance_the_stepwise_sampler_has_the_law_of_dna_finetunes(steps):
    p, n = random_law(3, 1.5), 30_000
    ours = counts(guidance.draw(table(p), None, n, 3, steps, generator()))
    theirs = counts(dna.sample(Table(p), n, 3, steps, generator(2), batch=n))
    assert stats.chisquare(ours, n * law(Table(p), steps).numpy(), sum_check=False).pvalue > 1e-4
    assert stats.chi2_contingency(torch.stack([ours, theirs])[:, ours + theirs > 0]).pvalue > 1e-4
    other = law(Table(p), 4 - steps).numpy()
    assert stats.chisquare(ours, n * other, sum_check=False).pvalue < 1e-6


@pytest.mark.parametrize("gamma", [None, 1.0])
def test_smc_and_tds_draw_from_p_exp_r_over_alpha(gamma):
    """Whatever the proposal. A weight without its ratio, or without the ratio's normaliser, draws from another law."""
    p, reward, n, alpha = random_law(3), random_reward(5), 40_000, 0.7
    x = guidance.draw(table(p), Reward(reward), n, 3, 3, generator(), gamma=gamma, alpha=alpha)
    base = law(Table(p), 3)
    target = base * (reward / alpha).exp()
    target /= target.sum()
    assert total_variation(counts(x) / n, target) < 0.04 < 0.3 < total_variation(base, target)


def test_smc_asks_the_oracle_for_the_likeliest_letters():
    p, reward, states, seen = table(random_law(3)), Reward(random_reward(5)), [], []
    sampler = 50, 3, 3, generator()
    guidance.draw(lambda x: states.append(x) or p(x), lambda x: seen.append(x) or reward(x), *sampler, alpha=1.0)
    for x, letters in zip(states, seen, strict=True):
        x_t = x.argmax(-1)
        assert torch.equal(letters, torch.where(x_t == guidance.MASK, p(x).argmax(-1), x_t))


@pytest.mark.parametrize("steps", [1, 4])
def test_cg_with_a_linear_reward_shifts_independent_letters_by_exp_gamma_r(steps):
    """g_v - g_MASK is then r_v - E_p[r]: the odds change by exp(gamma (r_v - r_u)), in however many steps."""
    p = torch.softmax(torch.randn(3, 4, generator=generator(7)), -1)
    r, gamma, n = torch.randn(3, 4, generator=generator(8)), 1.5, 30_000
    joint = p[0][ALL[:, 0]] * p[1][ALL[:, 1]] * p[2][ALL[:, 2]]
    reward = Reward(sum(r[i][ALL[:, i]] for i in range(3)))
    x = guidance.draw(table(joint), reward, n, 3, steps, generator(), gamma=gamma)
    tilted = joint * (gamma * reward.values.flatten()).exp()
    observed = counts(x)
    assert stats.chisquare(observed, n * (tilted / tilted.sum()).double().numpy(), sum_check=False).pvalue > 1e-4
    assert total_variation(observed / n, joint) > 0.3


def law_by_differences(denoiser, reward, gamma, x, left):
    """log q' (B, 3, 5): slopes of r(f(x)) where a little of one letter takes the place of the mask; gamma 0: log q."""
    h, hot = 1e-4, F.one_hot(x, 5).double()

    def value(x):
        return reward(x[..., :4] + x[..., 4:] * denoiser(x).exp())

    log_q = torch.cat([denoiser(hot) - math.log(left), torch.full((len(x), 3, 1), 1 - 1 / left).log()], -1)
    for i, v in itertools.product(range(3), range(4)):
        change = torch.zeros(3, 5, dtype=torch.float64)
        change[i, v], change[i, guidance.MASK] = h, -h
        log_q[:, i, v] += gamma * (value(hot + change) - value(hot - change)) / (2 * h)
    return log_q.log_softmax(-1)


def test_cg_has_the_law_of_finite_differences_of_the_reward_and_of_enumeration():
    p, gamma, n, mask = random_law(3, 1.5).double(), 1.5, 30_000, guidance.MASK
    denoiser, reward = table(p).double(), Reward(random_reward(5).double())
    states = torch.tensor(list(itertools.product(range(5), repeat=3)))  # (125, 3)
    starts = torch.full((1, 3), mask), states
    (first,), second = (
        law_by_differences(denoiser, reward, gamma, x, left).exp() for x, left in zip(starts, (2, 1), strict=True)
    )
    p_state = first[torch.arange(3), states].prod(-1)
    stayed, same = states[:, None] == mask, states[:, None] == ALL  # (125, 1 or 64, 3)
    drawn = torch.stack([second[:, i][:, ALL[:, i]] for i in range(3)], -1)  # (125, 64, 3)
    expected = p_state @ torch.where(stayed, drawn, same.double()).prod(-1)
    x = guidance.draw(denoiser, reward, n, 3, 2, generator(), gamma=gamma)
    assert stats.chisquare(counts(x), n * expected.numpy(), sum_check=False).pvalue > 1e-4
    assert total_variation(expected, law(Table(p), 2)) > 0.2


def test_tds_weighs_each_particle_by_its_own_masked_places(monkeypatch):
    """exp((r(x0^(x_s)) - r(x0^(x_t))) / alpha) prod over the masks of x_t of q(x_s) / q'(x_s), x_t after resampling."""
    gamma, alpha, states, rows, weights = 1.5, 0.7, [], [torch.arange(40)], []
    denoiser, reward, draw = table(random_law(3, 1.5)).double(), Reward(random_reward(5).double()), torch.multinomial
    monkeypatch.setattr(guidance, "check_finite", lambda _, weight=None, law=None: weights.append(weight))
    monkeypatch.setattr(torch, "multinomial", lambda *a, **k: rows.append(draw(*a, **k)) or rows[-1])

    def seen(x):
        return states.append(x.argmax(-1)) or denoiser(x)

    guidance.draw(seen, reward, 40, 3, 3, generator(), gamma=gamma, alpha=alpha)
    weights = [weight for weight in weights if weight is not None]
    for left, before, x_t, x_s, weight in zip((3, 2, 1), rows[:-1], states[:-1], states[1:], weights, strict=True):
        x_t = x_t[before]
        gain = [reward(torch.where(x == guidance.MASK, denoiser(x).argmax(-1), x)) for x in (x_s, x_t)]
        log_q, log_guided = (law_by_differences(denoiser, reward, g, x_t, left) for g in (0.0, gamma))
        ratio = (log_q - log_guided).gather(-1, x_s[..., None])[..., 0]
        expected = (gain[0] - gain[1]) / alpha + torch.where(x_t == guidance.MASK, ratio, 0.0).sum(-1)
        torch.testing.assert_close(weight, expected, atol=1e-5, rtol=1e-5)


def conditional_model():
    torch.manual_seed(1)
    pretrained = guidance.Denoiser(8, 1).requires_grad_(False)
    nn.init.normal_(pretrained.logits.weight, std=0.7)
    model = guidance.ConditionalDenoiser(pretrained).requires_grad_(False)
    x = torch.randint(5, (6, 3), generator=generator())
    for label in range(3):  # before training no class is seen
        torch.testing.assert_close(model(x, torch.full((6,), label)), pretrained(x))
    nn.init.normal_(model.classes)
    return model, x


def test_cfg_with_w_0_is_the_conditional_model_and_with_w_extrapolates():
    model, x = conditional_model()
    log_p = [model(x, torch.full((6,), label)) for label in range(3)]
    mixed = model(x, torch.tensor([0, 1, 2, 0, 1, 2]))
    for row, label in enumerate([0, 1, 2, 0, 1, 2]):
        torch.testing.assert_close(mixed[row], log_p[label][row])
    torch.testing.assert_close(model.guided(x, 0.0), log_p[1])
    assert (log_p[1] - log_p[2]).abs().max() > 0.1 < (log_p[1] - log_p[0]).abs().max()
    p = (log_p[1].exp() / log_p[2].exp()) ** 2 * log_p[1].exp()
    torch.testing.assert_close(model.guided(x, 2.0).exp(), p / p.sum(-1, keepdim=True), rtol=1e-4, atol=1e-5)
    n = 20_000
    x = guidance.draw(lambda x: model.guided(x, 0.0), None, n, 3, 3, generator())
    expected = law(lambda x: model(x, torch.ones(len(x), dtype=torch.long)), 3)
    assert stats.chisquare(counts(x), n * expected.numpy(), sum_check=False).pvalue > 1e-4


def test_conditional_model_learns_its_classes(monkeypatch):
    """Sequences that begin with A are active: class 1 must begin with A, class 0 must not, no class as in the data.

    A tenth of the sequences is shown without a class.
    """
    labels, forward = [], guidance.ConditionalDenoiser.forward
    monkeypatch.setattr(
        guidance.ConditionalDenoiser, "forward", lambda self, x, label: labels.append(label) or forward(self, x, label)
    )
    torch.manual_seed(3)
    x = torch.randint(4, (2000, 3))
    y = (x[:, 0] == 0).float()
    args = guidance.Args(class_share=y.mean().item(), train_steps=150, train_lr=1e-2)
    pretrained = guidance.Denoiser(16, 1).requires_grad_(False)
    before = copy.deepcopy(pretrained.state_dict())
    model = guidance.train_conditional(pretrained, x.byte(), y, args)
    assert all(torch.equal(before[name], value) for name, value in pretrained.state_dict().items())
    assert (torch.cat(labels) == 2).float().mean().item() == pytest.approx(0.1, abs=0.01)
    p = model(torch.full((3, 3), guidance.MASK), torch.tensor([0, 1, 2])).exp()[:, 0, 0]
    assert p[0] < 0.03 and p[1] > 0.9 and abs(p[2] - y.mean()) < 0.12


def test_learning_rates_fall_to_a_tenth_along_a_cosine_and_gradients_of_denoisers_are_cut(monkeypatch):
    """At share s of the steps lr (1 + 9 cos^2(pi s / 2)) / 10; a gradient of norm 1 at most."""
    seen, step = [], torch.optim.Adam.step

    def watched(self):
        group = self.param_groups[0]
        norm = sum((p.grad**2).sum().item() for p in group["params"] if p.grad is not None) ** 0.5
        seen.append((group["lr"], norm, group["weight_decay"]))
        step(self)

    monkeypatch.setattr(torch.optim.Adam, "step", watched)

    def large(log_p, x, masked, factor, elbo_loss=dna.elbo_loss):
        assert torch.equal(factor[..., 0] * masked.sum(-1), torch.full(masked.shape[:2], 3.0))  # L / m, of length 3
        return 1e4 * elbo_loss(log_p, x, masked, factor)

    for script in (dna, guidance):
        monkeypatch.setattr(script, "elbo_loss", large)
    dropouts, forward = [], torch.nn.Dropout.forward
    monkeypatch.setattr(torch.nn.Dropout, "forward", lambda self, x: dropouts.append(self.training) or forward(self, x))
    y, start = torch.arange(64.0), guidance.Denoiser(4, 1).requires_grad_(False)
    args = dna.Args(width=4, pretrain_steps=40, pretrain_lr=0.01, oracle_width=4, oracle_epochs=40, oracle_lr=0.02)
    dna.pretrain(ALL.byte(), args)
    dna.train_oracle(ALL.byte(), y, False, args)
    assert dropouts == 40 * 3 * [True]
    guidance.train_conditional(start, ALL.byte(), y, guidance.Args(train_steps=40, train_lr=0.03))
    rates, norms, decays = zip(*seen, strict=True)
    assert decays == 40 * (0,) + 40 * (1e-5,) + 40 * (0,)
    shape = [(1 + 9 * math.cos(math.pi * k / 80) ** 2) / 10 for k in range(40)]
    assert rates == pytest.approx([lr * share for lr in (0.01, 0.02, 0.03) for share in shape])
    assert norms[:40] + norms[80:] == pytest.approx([1] * 80, rel=1e-3)


def model_files(folder, length=16):
    """A run of dna_finetune.py as its files: untrained models, models.json and args.json; the path of models.json."""
    torch.manual_seed(4)
    run = folder / "runs/simulated__dna_finetune__1__now"
    run.mkdir(parents=True)
    oracles = {name: dna.Oracle(4, length).state_dict() for name in ("reward_oracle", "eval_oracle")}
    for name, state in oracles.items():
        torch.save(dict(kind="oracle", length=length, state=state), run / f"{name}.pt")
    torch.save(dict(kind="denoiser", state=dna.Denoiser(4, 1).state_dict()), run / "pretrained.pt")
    names = ("pretrained", *oracles)
    (run / "models.json").write_text(json.dumps({name: str(run / f"{name}.pt") for name in names}))
    settings = dict(simulated_sequences=200, simulated_length=16, sampling_steps=4, eval_samples=10, eval_elbo_draws=2)
    settings = dna.asdict(dna.Args(**settings, sampling_dtype="float32", width=4))
    (run / "args.json").write_text(json.dumps(settings))
    return run / "models.json"


def test_row_is_that_of_dna_finetune():
    args = dna.Args(simulated_sequences=200, simulated_length=16, eval_samples=10, sampling_steps=4, eval_elbo_draws=2)
    args.sampling_dtype = "float32"
    x, y = dna.simulate(200, 16, 1)
    models = {name: dna.Oracle(4, 16).eval().requires_grad_(False) for name in ("reward_oracle", "eval_oracle")}
    models["pretrained"] = dna.Denoiser(4, 1).requires_grad_(False)
    theirs = dna.evaluate(models["pretrained"], models, x[:5], 1, args)
    assert str(guidance.evaluate(theirs["x"], models, x[:5], args)) == str(theirs["row"])


GRIDS = dict(cg=["gamma"], smc=["alpha"], tds=["gamma", "alpha"], cfg=["w"])


@pytest.mark.parametrize("method", GRIDS)
def test_run_tunes_by_the_reward_oracle_and_writes_a_row_per_seed(run_script, tmp_path, method):
    folder = model_files(tmp_path / "here").parent
    judge = torch.load(folder / "eval_oracle.pt", weights_only=True)
    judge["state"]["mean"].fill_(math.nan)  # who tunes or guides by it stops
    torch.save(judge, folder / "eval_oracle.pt")
    grid = [word for name in GRIDS[method] for word in (f"--{name}", 0.001, 1000)]  # the models are hardly trained
    flags = ["--method", method, *TINY, "--seeds", 2, *grid]
    made = [run_script("baselines/dna_guidance", *flags, folder="here") for _ in range(2)]
    rows, tuning = (list(csv.DictReader(open(made[0] / f"{name}.csv"))) for name in ("rows", "tuning"))
    assert len(tuning) == 2 ** len(GRIDS[method]) and len({tuple(row.values())[:-3] for row in tuning}) == len(tuning)
    best = max(tuning, key=lambda row: float(row["reward_oracle"]))
    assert [row["seed"] for row in rows] == ["1", "2"] and {row["method"] for row in rows} == {method}
    assert all(row[name] == best[name] for row in rows for name in GRIDS[method])
    assert rows[0]["reward_oracle"] != rows[1]["reward_oracle"] and set(dna.COLUMNS) <= rows[0].keys()
    settings, files = guidance.read_run(folder / "models.json")
    kinds = dict.fromkeys(files, "oracle") | dict(pretrained="denoiser")
    models = {name: dna.load_model(kinds[name], files[name], 16, "cpu") for name in files}
    assert len({row["reward_oracle"] for row in tuning}) > 1

    def drawn_with(row, batches, seed):
        pair, guide = (models["pretrained"], models["reward_oracle"]), {x: float(row[x]) for x in GRIDS[method]}
        return torch.cat([guidance.draw(*pair, 4, 16, 4, seed, **guide) for _ in range(batches)])

    for row in tuning if method != "cfg" else ():  # 8 sequences in two batches of 4
        median = dna.predict(models["reward_oracle"], drawn_with(row, 2, generator(20_001))).median().item()
        assert float(row["reward_oracle"]) == pytest.approx(median, rel=1e-4)
    again = list(csv.DictReader(open(made[1] / "rows.csv")))
    for first, second in zip(rows, again, strict=True):
        assert {k: v for k, v in first.items() if "seconds" not in k} == {
            k: v for k, v in second.items() if "seconds" not in k
        }
    fasta = (made[0] / f"{method}-seed2.fasta").read_text().split()
    assert len(fasta) == 20 and all(re.fullmatch("[ACGT]{16}", line) for line in fasta[1::2])
    drawn = torch.tensor([[dna.LETTERS.index(letter) for letter in line] for line in fasta[1::2]])
    assert method == "cfg" or torch.equal(drawn, drawn_with(best, 3, generator(10_002))[:10])
    x, y, _, _ = dna.read_data(settings)
    expected = guidance.evaluate(drawn, models, x[y.argsort(descending=True)[:2]], settings)  # 1% of 200
    for name in ("reward_oracle", "kmer_correlation", "log_likelihood"):
        assert float(rows[1][name]) == pytest.approx(expected[name], rel=1e-4), name
    assert {path.name for path in made[0].iterdir()} == {"args.json", "rows.csv", "table.txt", "tuning.csv"} | {
        f"{method}-seed{seed}.fasta" for seed in (1, 2)
    }


def test_cfg_learns_from_the_reward_oracles_part_only(run_script, tmp_path, monkeypatch):
    args, seen, topk = model_files(tmp_path / "here").parent / "args.json", [], torch.Tensor.topk
    monkeypatch.setattr(torch.Tensor, "topk", lambda y, *count: seen.append(y) or topk(y, *count))
    run_script("baselines/dna_guidance", "--method", "cfg", *TINY, folder="here")
    _, y, (for_reward, _, _), _ = guidance.read_data(dna.Args(**json.loads(args.read_text())))
    assert len(seen) == 2 and torch.equal(seen[0], y) and torch.equal(seen[1], y[for_reward])


BAD_FLAGS = [
    ("--gamma -1", "--gamma must be at least 0"),
    ("--gamma 1 nan", "--gamma must be at least 0"),
    ("--alpha 0", "--alpha must be above 0"),
    ("--w inf", "--w must be at least 0"),
    ("--num-particles 1", "--num-particles must be at least 2"),
    ("--class-share 0", "--class-share must be above 0"),
    ("--seed 4294967296", "--seed must be from 0 to 2^32 - 1"),
    ("--models nothing.json", "--models must be a file that is there; got nothing.json"),
    ("--device nonsense", "--device nonsense"),
    ("", "--models: there is no run of dna_finetune.py in runs/"),
]


def refuses(run_script, script, message, *flags):
    with pytest.raises(SystemExit) as error:
        run_script(script, *flags)
    assert isinstance(error.value.code, str) and message in error.value.code and "\n" not in error.value.code
    assert not Path("runs").exists()


@pytest.mark.parametrize("flags, message", BAD_FLAGS)
def test_bad_flag_gets_one_line(run_script, flags, message):
    refuses(run_script, "baselines/dna_guidance", message, *flags.split())


def check_bad_models(run_script, tmp_path, script):
    """What is no models.json, no model, or of another length gets one line before any work."""
    models = model_files(tmp_path / "theirs")
    content = json.loads(models.read_text())
    oracle, denoiser = content["reward_oracle"], content["pretrained"]
    other = json.loads(model_files(tmp_path / "longer", 20).read_text())["reward_oracle"]
    for change, message in [
        (dict(reward_oracle=denoiser), "pretrained.pt holds no oracle"),
        (dict(pretrained=oracle), "reward_oracle.pt holds no denoiser"),
        (dict(eval_oracle=str(models)), "models.json cannot be used"),
        (dict(eval_oracle="nothing.pt"), "nothing.pt cannot be used"),
        (dict(reward_oracle=other), "reward_oracle.pt is for 20 bases, the data has 16"),
    ]:
        models.write_text(json.dumps(content | change))
        refuses(run_script, script, message, "--models", models)
    for text, message in [("{}", "no eval_oracle, pretrained, reward_oracle"), ("[]", "is not models.json"), ("", "")]:
        models.write_text(text)
        refuses(run_script, script, f"{models} is not models.json of a run of dna_finetune.py", "--models", models)
        refuses(run_script, script, message, "--models", models)
    models.write_text(json.dumps(content))
    (models.parent / "args.json").unlink()
    refuses(run_script, script, "args.json", "--models", models)


def test_files_that_are_no_models_get_one_line(run_script, tmp_path):
    check_bad_models(run_script, tmp_path, "baselines/dna_guidance")


@pytest.mark.parametrize("settings", [dict(gamma=1e38), dict(alpha=1e-300), dict(gamma=1e38, alpha=1.0)])
def test_a_law_that_is_not_finite_stops_with_one_line(settings):
    p, reward = random_law(3), Reward(random_reward(5, 100.0))
    with pytest.raises(SystemExit, match="not finite"):
        guidance.draw(table(p), reward, 4, 3, 2, generator(), **settings)
    assert set(guidance.draw(table(p), reward, 4, 3, 2, generator(), gamma=1.0).unique().tolist()) <= {0, 1, 2, 3}
