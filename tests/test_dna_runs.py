"""dna_finetune.py as a whole: what a run makes, that it repeats itself, and which stages are made again."""

import csv
import itertools
import json
import math
import re
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import tyro
from conftest import ROOT
from test_dna_data import text, write_table

import dna_finetune as dna

TINY = """--simulated-sequences 300 --simulated-length 16 --width 8 --pretrain-steps 5 --pretrain-batch 8
    --oracle-width 8 --oracle-epochs 1 --rounds 2 --updates 1 --num-particles 8 --target-kl 0.9 --eval-samples 8
    --eval-elbo-draws 4 --sampling-steps 8 --sampling-dtype float32""".split()
METHODS = dna.get_args(dna.Method)


def run_file(script, *flags):
    """Runs a script of ours in this process, where it is."""
    sys.argv = [script, *map(str, flags)]
    runpy.run_path(str(ROOT / script), run_name="__main__")


@pytest.fixture
def run_dna(tmp_path, monkeypatch, capsys):
    """Runs dna_finetune.py with TINY and these flags in tmp_path; returns the run's directory and what was printed."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [])

    def run(*flags):
        before = set(Path("runs").glob("*__dna_finetune__*"))
        run_file("dna_finetune.py", *TINY, *flags)
        (made,) = set(Path("runs").glob("*__dna_finetune__*")) - before
        return made, capsys.readouterr().out

    return run


def stages():
    return {path.name: path.stat().st_mtime_ns for path in Path("runs/dna_stages").iterdir()}


def kinds(names):
    return sorted(name.split("-")[0] for name in names)


def test_run_makes_what_it_promises_and_repeats_itself(run_dna, tmp_path):
    made, out = run_dna("--seeds", "2")
    for name in "args.json models.json table.txt rows.csv curves.csv score_likelihood.png".split():
        assert (made / name).stat().st_size > 0
    assert list(made.glob("events.*")) and [path.name for path in tmp_path.iterdir()] == ["runs"]
    rows = list(csv.DictReader(open(made / "rows.csv")))
    assert [row["method"] for row in rows] == 2 * ["pretrained", *METHODS]
    curves = list(csv.DictReader(open(made / "curves.csv")))
    assert [(r["method"], r["seed"], r["step"]) for r in curves[:3]] == [
        ("wd1", "1", "0"),
        ("wd1", "1", "1"),
        ("exp", "1", "0"),
    ]
    losses = [{r["loss"] for r in curves if r["seed"] == seed} for seed in "12"]
    assert losses[0].isdisjoint(losses[1])  # each seed is tuned, not the first one twice
    assert len(curves) == 2 * 6 * 2 and all(0 <= float(row["true_activity"]) < 10 for row in curves)
    for method in ("pretrained", *METHODS):
        assert f"\n{dna.LABELS[method]} " in out
        lines = (made / f"{method}-seed2.fasta").read_text().split()
        assert len(lines) == 16 and lines[0] == f">{method}-seed2-1" and re.fullmatch("[ACGT]{16}", lines[1])
    drawn = [(made / f"pretrained-seed{seed}.fasta").read_text().split()[1::2] for seed in (1, 2)]
    assert drawn[0] != drawn[1] and "sqr-neg - exp: " in out and "95% interval" in out

    files = json.loads((made / "models.json").read_text())
    oracle = dna.load_model("oracle", files["eval_oracle"], 16, "cpu")
    assert not oracle.training and not any(p.requires_grad for p in oracle.parameters())  # no dropout
    for path in Path("runs/dna_stages").iterdir():
        path.unlink()
    again, _ = run_dna("--seeds", "2")
    assert (again / "rows.csv").read_text() == (made / "rows.csv").read_text()
    other, _ = run_dna("--seed", "2", "--methods", "exp")  # its data and models are not those of seed 1's runs
    for row in csv.DictReader(open(other / "rows.csv")):
        same = next(r for r in rows if (r["method"], r["seed"]) == (row["method"], row["seed"]))
        assert all(row[name] != same[name] for name in ("pred_activity", "true_activity", "reward_oracle"))


def test_data_parts_and_models_hang_on_the_seed():
    def made(seed):
        args = dna.Args(seed=seed, simulated_sequences=200, simulated_length=16, width=4, pretrain_steps=1, ema=0.0)
        args.oracle_width, args.oracle_epochs = 4, 1
        x, y, parts, _ = dna.read_data(args)
        ours = [x, y, parts[0], parts[2]]
        x = torch.zeros(200, 16).byte()  # whatever the seed
        ours.append(dna.pretrain(x, args)["state"]["logits.weight"])
        return [*ours, dna.train_oracle(x, torch.arange(200.0), False, args)["state"]["last.weight"]]

    for i, (one, other) in enumerate(zip(made(1), made(2), strict=True)):
        assert not torch.equal(one, other), i


def test_stages_are_skipped_and_made_again(run_dna):
    flags = ("--methods", "exp", "lin-neg")
    run_dna(*flags)
    first = stages()
    assert kinds(first) == kinds(3 * ["evaluated"] + ["eval_oracle", "pretrained", "reward_oracle"] + 2 * ["tuned"])
    _, out = run_dna(*flags)
    assert stages() == first and out.count("not made again") == 8
    run_dna(*flags, "--epsilon", "0.1")  # concerns lin-neg only
    assert kinds(set(stages()) - set(first)) == ["evaluated", "tuned"]
    before = stages()
    run_dna(*flags, "--temperature-rule", "authors")
    assert kinds(set(stages()) - set(before)) == ["evaluated", "evaluated", "tuned", "tuned"]
    before = stages()
    run_dna("--methods", "exp", "--pretrain-lr", "0.01")
    assert set(kinds(set(stages()) - set(before))) == {"pretrained", "tuned", "evaluated"}


def test_every_flag_that_a_stage_reads_is_in_its_key(run_dna, monkeypatch):
    """But for epsilon, whose value is, and data, whose hash is."""
    read, keys, kept, cli, dumps, save = set(), [], [], tyro.cli, json.dumps, torch.save

    def watched(kind, **kwargs):
        args = cli(kind, **kwargs)
        look = {"__getattribute__": lambda self, name: read.add(name) or object.__getattribute__(self, name)}
        args.__class__ = type("Watched", (kind,), look)
        return args

    def remember(content, **kwargs):  # of which a stage makes its key, before its work
        read.clear()
        keys.append(dumps(content, **kwargs))
        return keys[-1]

    def check(content, file):
        missing = {name for name in vars(dna.Args()).keys() & read if f'"{name}"' not in keys[-1]}
        assert missing <= {"epsilon", "data"}
        kept.append(len(read))
        save(content, file)

    for module, name, by in ((tyro, "cli", watched), (json, "dumps", remember), (torch, "save", check)):
        monkeypatch.setattr(module, name, by)
    run_dna("--methods", "lin-neg")
    assert len(kept) == 6 and min(kept) > 3


def test_a_run_uses_its_data_as_promised(run_dna):
    """Who learns from which rows; what the 3-mers are compared with; that who only judges rewards nobody."""
    flags = ("--methods", "exp", "--top-share", "0.1")
    made, _ = run_dna(*flags)
    args = dna.Args(**json.loads((made / "args.json").read_text()))
    x, y, (for_reward, for_eval, _), _ = dna.read_data(args)
    files = {name: dna.load(path) for name, path in json.loads((made / "models.json").read_text()).items()}
    assert files["reward_oracle"]["state"]["mean"] == y[for_reward].mean() != y[for_eval].mean()
    assert files["eval_oracle"]["state"]["mean"] == y[for_eval].mean()
    again = dna.pretrain(x[torch.cat([for_reward, for_eval])], args)["state"]
    assert all(torch.equal(again[name], value) for name, value in files["pretrained"]["state"].items())
    row = next(csv.DictReader(open(made / "rows.csv")))
    groups = (made / "pretrained-seed1.fasta").read_text().split()[1::2], [text(s) for s in x[(-y).argsort()[:30]]]
    words = ["".join(word) for word in itertools.product("ACGT", repeat=3)]
    counts = [[sum(s[i : i + 3] == word for s in group for i in range(14)) for word in words] for group in groups]
    assert float(row["kmer_correlation"]) == pytest.approx(np.corrcoef(*counts)[0, 1], abs=1e-4)

    files["eval_oracle"]["state"]["mean"].fill_(math.nan)  # who is rewarded by it stops
    torch.save(files["eval_oracle"], "judge.pt")
    made, _ = run_dna(*flags, "--eval-oracle", "judge.pt", "--lr", "0.01")  # so that it is tuned anew
    rows = list(csv.DictReader(open(made / "rows.csv")))
    assert {row["pred_activity"] for row in rows} == {"nan"} and "nan" not in {row["reward_oracle"] for row in rows}


def test_run_on_a_table_with_a_classifier_and_own_files(run_dna, tmp_path):
    x, y = dna.simulate(200, 20, 1)
    rows = [f"{text(s)},{a:.3f},{i},{int(a > 0.5)}" for i, (s, a) in enumerate(zip(x, y, strict=True))]
    path = write_table(tmp_path / "assay.csv.gz", ["seq,act,start,open", *rows])
    data = ("--data", path, "--target", "act", "--split-column", "start", "--methods", "exp")
    made, _ = run_dna(*data, "--accessibility", path, "--accessibility-column", "open")
    row = list(csv.DictReader(open(made / "rows.csv")))[-1]
    assert 0 <= float(row["accessible"]) <= 1 and row["true_activity"] == "nan" and made.name.startswith("assay__")
    models = {p.name.split("-")[0]: p for p in Path("runs/dna_stages").iterdir()}
    names = ("pretrained", "reward_oracle", "eval_oracle", "accessibility")
    flags = [word for name in names for word in (f"--{name.replace('_', '-')}", models[name])]
    again, out = run_dna(*data, *flags)
    assert (again / "rows.csv").read_text() == (made / "rows.csv").read_text()
    assert out.count("not made again") == 3  # the same models, so tuned and evaluated are there


def test_classifier_learns_zeros_and_ones():
    x, _ = dna.simulate(1000, 16, 1)
    y = (x[:, 3] == 2).float()
    args = dna.Args(oracle_width=16, oracle_epochs=20, oracle_lr=1e-2)
    torch.manual_seed(1)
    oracle = dna.Oracle(16, 16)
    oracle.load_state_dict(dna.train_oracle(x, y, True, args)["state"])
    assert ((dna.predict(oracle.eval(), x) > 0) == (y > 0)).double().mean() > 0.95
