"""benchmark/dna_convert.py and dna_quality.py: published files become ours, and what is said of models is right."""

import csv
import json
import math
import sys
import types
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from test_dna_data import text, write_table
from test_dna_runs import run_dna, run_file  # noqa: F401

import dna_finetune as dna
from benchmark import dna_convert, dna_quality


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
    content = dict(state_dict=state, ema=dict(decay=0.9999, shadow_params=shadow), hyper_parameters=instance)
    torch.save(content, tmp_path / "pretrained.ckpt")
    torch.save(state, tmp_path / "plain.ckpt")
    monkeypatch.delitem(sys.modules, "omegaconf_of_the_test")
    x = torch.randint(5, (4, 40))
    cases = ("pretrained.ckpt", True, average), ("pretrained.ckpt", False, published), ("plain.ckpt", False, published)
    for name, averaged, network in cases:
        dna_convert.denoiser(tmp_path / name, tmp_path / "ours.pt", averaged)
        loaded = dna.load_model("denoiser", tmp_path / "ours.pt", 40, "cpu")
        torch.testing.assert_close(loaded(x), network(x).detach(), atol=1e-4, rtol=1e-4)


class Malicious:
    def __reduce__(self):
        return (Path.touch, (Path("executed-by-a-checkpoint"),))


def test_other_files_get_one_line_and_execute_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"hyper_parameters": Malicious(), "state_dict": {}}, "evil.ckpt")
    Path("text.ckpt").write_text("no checkpoint")
    for name, message in {"evil.ckpt": "is no checkpoint", "text.ckpt": "is no checkpoint"}.items():
        with pytest.raises(SystemExit, match=f"{name} {message}") as error:
            dna_convert.denoiser(Path(name), Path("ours.pt"))
        assert "\n" not in error.value.code
    torch.save({f"backbone.{name}": value for name, value in Published().state_dict().items()}, "plain.ckpt")
    with pytest.raises(SystemExit, match="plain.ckpt holds no denoiser of a known form: 'ema'"):
        dna_convert.denoiser(Path("plain.ckpt"), Path("ours.pt"), averaged=True)
    assert not Path("executed-by-a-checkpoint").exists() and not Path("ours.pt").exists()
    torch.save({"state_dict": {}}, "denoiser.ckpt")
    for name, message in {
        "denoiser.ckpt": "is no gReLU checkpoint",
        grelu_file("oracle.ckpt"): "pip install gReLU",
    }.items():
        monkeypatch.setitem(sys.modules, "grelu", None)
        with pytest.raises(SystemExit, match=message):
            dna_convert.oracle(Path(name), Path("ours.pt"), write_table(tmp_path / "t.csv", ["seq,hepg2", "ACGT,1"]))
    with pytest.raises(SystemExit, match="is no run of dna_finetune.py"):
        dna_convert.judge(tmp_path, Path("oracle.ckpt"))


def grelu_file(path):
    """A checkpoint whose outputs are about 0.5 in the mean."""
    torch.manual_seed(2)
    conv = nn.Conv1d(4, 3, 5)
    conv.bias.data = 0.1 - conv.weight.data.sum((1, 2)) / 4
    settings = dict(model_params={"model_type": "EnformerPretrainedModel", "n_tasks": 3}, train_params={"loss": "MSE"})
    torch.save(dict(state_dict=conv.state_dict(), hyper_parameters=settings), path)
    return path


@pytest.fixture
def grelu(monkeypatch):
    """A module of gReLU's form, whose model is one convolution: settings in, one-hot (B, 4, L) to (B, tasks, 1)."""
    made = {}

    class LightningModel(nn.Conv1d):
        def __init__(self, model_params, train_params):
            made.update(model_params)
            super().__init__(4, model_params["n_tasks"], 5)

        def forward(self, x):
            return 5 * super().forward(x).mean(-1, keepdim=True)

    module = types.ModuleType("grelu.lightning")
    module.LightningModel = LightningModel
    monkeypatch.setitem(sys.modules, "grelu", types.ModuleType("grelu"))
    monkeypatch.setitem(sys.modules, "grelu.lightning", module)
    return made


def expected(path, x, output):
    state = torch.load(path)["state_dict"]
    return (
        5 * F.conv1d(F.one_hot(x.long(), 4).float().transpose(1, 2), state["weight"], state["bias"]).mean(-1)[:, output]
    )


def test_our_oracle_learns_a_grelu_oracle_without_a_download(tmp_path, grelu, capsys):
    path = grelu_file(tmp_path / "oracle.ckpt")
    x, _ = dna.simulate(1000, 20, 1)
    table = write_table(tmp_path / "t.csv", ["seq,hepg2", *(f"{text(s)},{i}" for i, s in enumerate(x))])
    for classifier in (False, True):
        dna_convert.oracle(path, tmp_path / "ours.pt", table, output=1, classifier=classifier, width=32, epochs=10)
        ours = dna.load_model("oracle", tmp_path / "ours.pt", 20, "cpu")
        new, _ = dna.simulate(300, 20, 2)
        y, y_ours = expected(path, new, 1), dna.predict(ours, new)
        assert np.corrcoef(y, y_ours)[0, 1] > 0.9
        if not classifier:
            assert (y - y_ours).std() < 0.4 * y.std()
    assert grelu["model_type"] == "EnformerModel"
    assert "100 unseen sequences: correlation with the gReLU oracle 0.9" in capsys.readouterr().out


def test_grelu_oracle_judges_the_sequences_of_a_run(tmp_path, grelu):
    x, _ = dna.simulate(80, 20, 3)
    path = grelu_file(tmp_path / "oracle.ckpt")
    for method, part in zip(("exp", "lin-neg"), x.split(40), strict=True):
        (tmp_path / f"{method}-seed3.fasta").write_text("".join(f">{method}\n{text(s)}\n" for s in part))
    dna_convert.judge(tmp_path, path, output=2)
    rows = list(csv.DictReader(open(tmp_path / "judged.csv")))
    assert [(row["method"], row["seed"]) for row in rows] == [("exp", "3"), ("lin-neg", "3")]
    for row, part in zip(rows, x.split(40), strict=True):
        assert float(row["median"]) == pytest.approx(expected(path, part, 2).median().item(), rel=1e-3)
        assert float(row["accessible"]) == (expected(path, part, 2) > 0.5).double().mean()


def test_markov_model_against_its_definition():
    rng = np.random.default_rng(2)
    train, test = (torch.tensor(rng.integers(4, size=(n, 7))) for n in (40, 5))
    seen, nats = [text(row) for row in train.tolist()], 0.0
    for s in (text(row) for row in test.tolist()):
        for i in range(7):
            k = min(i, 2)
            places = range(2, 7) if k == 2 else [i]  # shorter histories only at the start
            histories = [t[j - k : j + 1] for t in seen for j in places if t[j - k : j] == s[i - k : i]]
            nats -= math.log((histories.count(s[i - k : i + 1]) + 1) / (len(histories) + 4))
    assert dna_quality.markov_nats(train, test, 2) == pytest.approx(nats / 35)


def test_site_effects_and_correlations_of_the_truth_are_perfect():
    x, y = dna.simulate(2000, 60, 1)
    quality = dna_quality.oracle_quality(lambda x: 2 * dna.true_activity(x), x, y, simulated=True)
    assert quality["true_correlation"] == pytest.approx(1) and quality["site_effect_correlation"] == pytest.approx(1)
    assert quality["held_out_correlation"] > 0.8
    assert quality["HNF1A_effect"] == pytest.approx(2 * quality["HNF1A_true_effect"]) and quality["ZEB1_effect"] < 0
    background = torch.zeros(4, 60).long()
    found = dna_quality.site_effects(lambda x: (x[:, 4] == 2).double(), background)  # G at place 4, where 10% is
    assert found.sum() == 1 + 1 and found[list(dna.FACTORS).index("HNF1A"), 0] == 1  # GTTAA..., and one other


def test_quality_of_a_denoiser_that_is_the_law_of_the_data():
    """C and G with probability 0.4 each, A and T 0.1; its entropy is 1.194 nats per base."""
    law = torch.tensor([0.1, 0.4, 0.4, 0.1])
    denoiser = dna.Denoiser(4, 1).requires_grad_(False)
    denoiser.logits.weight.zero_(), denoiser.logits.bias.copy_(law.log())
    torch.manual_seed(1)
    train, held_out = (torch.multinomial(law, n * 20, replacement=True).view(n, 20) for n in (3000, 400))
    args = dna.Args(eval_samples=400, eval_elbo_draws=4, sampling_steps=20, sampling_dtype="float32")
    quality = dna_quality.denoiser_quality(denoiser, train, held_out, args)
    assert quality["model_nats_per_base"] == pytest.approx(-(law * law.log()).sum().item(), abs=0.02)
    assert quality["markov5_nats_per_base"] == dna_quality.markov_nats(train, held_out)
    gc_held_out = ((held_out == 1) | (held_out == 2)).double().mean(1)
    assert quality["gc_mean"] == pytest.approx(0.8, abs=0.02)
    assert quality["gc_std"] == pytest.approx(0.4 / 20**0.5, abs=0.01)
    assert quality["gc_mean_held_out"] == pytest.approx(gc_held_out.mean().item())
    assert quality["gc_std_held_out"] == pytest.approx(gc_held_out.std().item())
    assert quality["kmer_correlation"] > 0.98


def test_quality_of_a_run(run_dna, capsys):  # noqa: F811
    made, _ = run_dna("--methods", "exp")
    run_file("benchmark/dna_quality.py", made)
    quality = json.loads((made / "quality.json").read_text())
    assert json.loads(capsys.readouterr().out) == quality
    assert {"model_nats_per_base", "markov5_nats_per_base", "gc_mean"} <= set(quality["pretrained"])
    assert {"held_out_correlation", "site_effect_correlation"} <= set(quality["eval_oracle"])
    for flags in (["nothing"], [], [made / "rows.csv"]):
        with pytest.raises(SystemExit, match="give the directory of a dna_finetune.py run"):
            run_file("benchmark/dna_quality.py", *flags)


def test_scores_by_other_oracles(run_dna, tmp_path, capsys):  # noqa: F811
    """The run's own seed gives the run's own scores again, another seed others; no run: one line."""
    made, _ = run_dna("--methods", "exp")
    run_file("benchmark/dna_rescore.py", made, "--seeds", "1", "7", "--out", tmp_path / "out.csv")
    with open(tmp_path / "out.csv") as file:
        again = {(row["method"], row["oracle_seed"]): float(row["pred_activity"]) for row in csv.DictReader(file)}
    with open(made / "rows.csv") as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        own, other = (again[row["method"], seed] for seed in ("1", "7"))
        assert own == pytest.approx(float(row["pred_activity"]), abs=2e-3) and abs(own - other) > 1e-3
    (tmp_path / "other-seed1.fasta").write_text(">x\nACGT\n")
    wrong = [
        ("nothing", "nothing is no run of dna_finetune.py"),
        (made, tmp_path / "none", "none has no METHOD-seedN.fasta"),
    ]
    wrong += [
        (made, tmp_path, "other-seed1.fasta: its sequences are not of"),
        (made, "--out", "no/x", "an --out in a folder"),
    ]
    for *flags, why in wrong:
        with pytest.raises(SystemExit, match=why):
            run_file("benchmark/dna_rescore.py", *flags)


def test_the_joint_table_is_of_all_runs(tmp_path, monkeypatch):
    """Two rules of one method and a guided one; intervals by hand: t with 2 degrees of freedom at 97.5% is 4.3027."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [])
    names = "reward_oracle true_activity kmer_correlation log_likelihood distinct distance".split()

    def run(folder, settings, rows, curve=()):
        Path(folder).mkdir()
        Path(folder, "args.json").write_text(json.dumps(settings))
        if "models" not in settings:
            Path(folder, "models.json").write_text("{}")
        for name, table in (("rows.csv", rows), ("curves.csv", curve)):
            if table:
                lines = [",".join(table[0]), *(",".join(map(str, row.values())) for row in table)]
                Path(folder, name).write_text("\n".join(lines) + "\n")

    def row(method, seed, pred_activity, **others):
        return dict(method=method, seed=seed, pred_activity=pred_activity) | dict.fromkeys(names, 0.5) | others

    rows = [row("pretrained", 1, 0.25), *(row("exp", seed, x) for seed, x in [(1, 1.0), (2, 2.0), (3, 4.5)])]
    curve = [
        dict(method="exp", seed=s, step=k, seconds=s * k, reward=s * reward, true_activity=0)
        for s in (1, 2, 3)
        for k, reward in ((0, 1), (5, 3), (8, 1), (9, 2))  # after its best, 3, it falls by 2 to 1
    ]
    run("kl", dict(temperature_rule="kl", seeds=3), rows, curve)
    run("authors", dict(temperature_rule="authors"), [row("pretrained", 1, 0.25), row("exp", 1, 3.0)])
    of_kl = dict(models="kl/models.json")
    run("cg", of_kl, [row("cg", 1, 5.0, true_activity=math.nan, train_seconds=1, draw_seconds=7.4)])
    run_file("benchmark/dna_table.py", "kl", "authors", "cg", "--out", "table")
    table = {row["method"]: row for row in csv.DictReader(Path("table/table.csv").open())}
    assert list(table) == ["pretrained", "exp", "exp, authors", "cg"]
    half = 4.302653 * np.std([1, 2, 4.5], ddof=1) / math.sqrt(3)
    assert (
        table["exp"]["pred_activity"] == f"2.50 [{2.5 - half:.2f}, {2.5 + half:.2f}]"
        and table["exp"]["seeds"] == "1 2 3"
    )
    assert table["exp"]["train_seconds"].startswith("18 [") and table["cg"]["draw_seconds"] == "7"
    assert table["exp"]["largest_fall"].startswith("4.0 [") and table["cg"]["largest_fall"] == ""
    assert table["exp, authors"]["pred_activity"] == "3.00" and table["cg"]["true_activity"] == ""
    assert len(list(csv.DictReader(Path("table/rows.csv").open()))) == 6
    assert [float(row["reward"]) for row in csv.DictReader(Path("table/curves.csv").open())][4:8] == [2, 6, 2, 4]
    assert all(Path("table", name).stat().st_size > 5000 for name in ("score_likelihood.png", "rounds.png"))
    difference = {row["difference"]: row for row in csv.DictReader(Path("table/differences.csv").open())}
    assert len(difference) == 6 and difference["exp, authors minus exp"]["pred_activity"] == ""  # one seed in common

    settings = dict(temperature_rule="authors", loss_clip=5.0)
    run("clip", settings, [row("exp", seed, x) for seed, x in [(3, 4.0), (1, 2.5), (2, 2.5)]])
    run_file("benchmark/dna_table.py", "kl", "clip", "--out", "paired")
    assert [panel.get_xlabel() for panel in plt.gcf().axes] == ["round", "round"]
    difference = {row["difference"]: row for row in csv.DictReader(Path("paired/differences.csv").open())}
    half = 4.302653 / math.sqrt(3)  # the differences by seed are 1.5, 0.5 and -0.5
    expected = f"0.50 [{0.5 - half:.2f}, {0.5 + half:.2f}]"
    assert difference["exp, authors, clip 5 minus exp"]["pred_activity"] == expected
    drakes = [dict(method="drakes", seed=1, step=k, seconds=k, reward=1) for k in (0, 1)]
    run("drakes", of_kl, [row("drakes", 1, 1.0)], drakes)
    run_file("benchmark/dna_table.py", "kl", "drakes", "--out", "drawn")
    labels = [panel.get_xlabel() for panel in plt.gcf().axes]
    assert labels == ["round (DRAKES: update), square-root scale", "round"]  # its true activity is not drawn
    Path("no").mkdir()
    run("twice", {}, [row("cg", 1, 4.0)])
    run("other", {}, [row("cg", 1, 4.0)])
    Path("other/models.json").write_text('{"pretrained": "another"}')
    run("shorter", dict(sampling_steps=32), [row("cg", 1, 4.0)])
    run("target", dict(target="expression"), [row("cg", 1, 4.0)])
    run("killed", of_kl | dict(seeds=2), [row("cg", 1, 4.0)])
    for folders, why in [
        ("kl cg no", "no is no finished run"),
        ("kl cg twice", "twice: another run has cg, seed 1, too"),
        ("kl other", "other has other models than kl, or was judged otherwise"),
        ("kl shorter", "shorter has other models than kl, or was judged otherwise"),
        ("kl target", "target has other models than kl, or was judged otherwise"),
        ("kl killed", "killed is no finished run: seeds are missing"),
        ("", "give the directories of runs"),
    ]:
        with pytest.raises(SystemExit, match=why):
            run_file("benchmark/dna_table.py", *folders.split())
        assert not Path("runs").exists()
    with pytest.raises(SystemExit) as end:  # guidance alone has no rounds to draw
        run_file("benchmark/dna_table.py", "cg", "--out", "guided")
    assert end.value.code is None and not Path("guided/rounds.png").exists()
