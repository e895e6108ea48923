"""dna_finetune.py: the simulated assay, tables from files, the parts of the data, and the measures of the result."""

import csv
import gzip
import itertools
import math
from pathlib import Path

import numpy as np
import pytest
import torch

import dna_finetune as dna


def write_table(path, lines):
    (gzip.open if path.suffix == ".gz" else open)(path, "wt").write("\n".join(lines) + "\n")
    return path


def text(tokens):
    return "".join(dna.LETTERS[i] for i in tokens)


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
    assert activity(*((name, s, True) for name, s in zip(dna.FACTORS, (47, 34, 1, 24, 12), strict=False))) < 10


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
    assert ((dna.occupancy(x) > 0.3).double().mean(0) > 0.05).all()
    assert np.corrcoef(y, dna.true_activity(x))[0, 1] > 0.8
    c, g = (x == 1).double(), (x == 2).double()
    cpg = (c[:, :-1] * g[:, 1:]).mean() / (c.mean() * g.mean())
    assert cpg < 0.7


def test_parts_of_the_data_are_disjoint_and_contiguous_in_a_position(tmp_path):
    _, _, parts, _ = dna.read_data(dna.Args(simulated_sequences=1000, simulated_length=13))
    assert [len(p) for p in parts] == [450, 450, 100] and len(torch.cat(parts).unique()) == 1000
    position = np.random.default_rng(1).permutation(1000)
    lines = ["seq,activity,start", *(f"ACGT,{p},{158_000_000 + p}" for p in position)]  # float32 rounds these to 16
    args = dna.Args(data=str(write_table(tmp_path / "t.csv", lines)), split_column="start")
    _, activity, parts, _ = dna.read_data(args)
    assert [sorted(activity[p].tolist()) for p in parts] == [[*range(450)], [*range(450, 900)], [*range(900, 1000)]]


def test_copies_of_a_sequence_are_in_one_part(tmp_path):
    """Whatever they measure; random parts that do not know of copies would have half of them in two."""
    rng = np.random.default_rng(1)
    sequences = np.unique(rng.integers(4, size=(400, 12)), axis=0)
    copies = rng.permutation(np.repeat(np.arange(len(sequences)), rng.integers(1, 5, len(sequences))))
    lines = ["seq,activity", *(f"{''.join(dna.LETTERS[i] for i in sequences[c])},{rng.random()}" for c in copies)]
    _, _, parts, _ = dna.read_data(dna.Args(data=str(write_table(tmp_path / "t.csv", lines))))
    assert sorted(torch.cat(parts).tolist()) == list(range(len(copies)))
    first, second, third = (set(copies[part]) for part in parts)
    assert len(first & second) <= 1 and len(second & third) <= 1 and not first & third
    assert [len(part) / len(copies) for part in parts] == pytest.approx([0.45, 0.45, 0.1], abs=0.01)


def test_malformed_rows_are_left_out_and_reported(tmp_path, capsys):
    rows = ["name,seq,activity", "a,ACGT,1.5", "b,ACGN,2", "c,acgg,x", "d,CCCC,nan", "e,TTTT", "f,,1", "g,ttga,-2"]
    for path in (tmp_path / "t.csv", tmp_path / "t.csv.gz"):
        x, y = dna.read_table(
            "--data", write_table(path, [*rows, "h,ACGT,1,1", "", "\u00e9,AC\u00e9T,1"]), ["activity"]
        )
        assert x.tolist() == [[0, 1, 2, 3], [3, 3, 2, 0]] and y.tolist() == [[1.5], [-2.0]]
        first = "line 3: a sequence with letters other than A, C, G, T, or with none"
        assert f"7 malformed rows left out, the first at {first}\n" in capsys.readouterr().out


@pytest.mark.parametrize("mark, name", [("", "gosai_all.csv"), ("\ufeff", "excel.csv"), ("\ufeff", "excel.csv.gz")])
def test_table_of_the_papers_form_with_or_without_a_byte_order_mark(tmp_path, mark, name):
    rows = [f"{mark}seq, hepg2,k562,sknsh"] + [f"{'ACGT' * 50},{i},0.5,-1" for i in range(3)]
    x, y = dna.read_table("--data", write_table(tmp_path / name, rows), ["hepg2", "sknsh"])
    assert x.shape == (3, 200) and y.tolist() == [[0, -1], [1, -1], [2, -1]]


class Constant(torch.nn.Module):
    """Draws the letters of this pattern, whatever it is shown."""

    def __init__(self, pattern):
        super().__init__()
        self.log_p = torch.where(torch.nn.functional.one_hot(pattern, 4) > 0, 0.0, -1e3)

    def forward(self, x):
        return self.log_p.expand(*x.shape, 4)


def test_row_of_the_table_against_definitions():
    x = torch.tensor(np.random.default_rng(1).integers(4, size=(30, 9)))
    strings = [text(row) for row in x.tolist()]
    words = [s[i : i + 3] for s in strings for i in range(7)]
    for word in ("ACG", "TTA", "CCC"):
        index = sum(dna.LETTERS.index(letter) * 4**i for i, letter in enumerate(word))
        assert dna.kmers(x)[index] == pytest.approx(words.count(word) / len(words))

    oracles = dict(eval_oracle=lambda x: x.sum(-1).double(), reward_oracle=lambda x: -x[:, 0].double())
    torch.manual_seed(1)
    models = oracles | dict(pretrained=dna.Denoiser(4, 1), accessibility=lambda x: x[:, 1].double() - 1)
    args = dna.Args(eval_samples=40, sampling_dtype="float32", simulated_length=13)
    result = dna.evaluate(dna.Denoiser(4, 1), models, torch.randint(4, (30, 13)), 1, args)
    x, row = result["x"], result["row"]
    strings = [text(s) for s in x.tolist()]
    pairs = [sum(a != b for a, b in zip(s, t, strict=True)) / 13 for s, t in itertools.combinations(strings, 2)]
    assert row["distance"] == pytest.approx(np.mean(pairs)) and row["distinct"] == len(set(strings)) / 40
    assert row["pred_activity"] == x.sum(-1).sort().values[19] and row["reward_oracle"] == -x[:, 0].sort().values[20]
    assert row["accessible"] == pytest.approx((x[:, 1] > 1).double().mean().item())
    bound = dna.log_likelihood(models["pretrained"], x, args.eval_elbo_draws, 1)  # whole sequences, in nats
    assert row["log_likelihood"] == pytest.approx(bound.sort().values[19].item())
    assert row["true_activity"] == pytest.approx(dna.true_activity(x).sort().values[19].item())

    same = dna.evaluate(Constant(torch.arange(13) % 4), oracles | models, x, 1, args)["row"]
    assert same["distance"] == 0 and same["distinct"] == 1 / 40 and same["log_likelihood"] < 0


def test_differences_are_paired_by_seed(tmp_path):
    scores = {"pretrained": (0, 0, 0), "exp": (1, 5, 3), "linear": (2, 7, 7)}  # differences 1, 2, 4
    others = dict.fromkeys(dna.COLUMNS, 0.5)
    rows = [dict(others, method=m, seed=i, pred_activity=q) for m in scores for i, q in enumerate(scores[m])]
    half = 4.302653 * math.sqrt(7 / 9)  # Student's t of 2 degrees of freedom; standard error of 1, 2, 4
    lines = dna.summarise(rows, [dict(method="exp", seed=1, step=0)], tmp_path).splitlines()
    assert lines[-1] == f"linear - exp: +2.33, 95% interval [{7 / 3 - half:+.2f}, {7 / 3 + half:+.2f}]"
    assert lines[3].startswith("linear       5.33 +- 2.89 ") and lines[3].endswith(" +77.8%") and "over exp" in lines[0]
    assert [row["pred_activity"] for row in csv.DictReader(open(tmp_path / "rows.csv"))][-3:] == ["2", "7", "7"]
    assert Path(tmp_path / "score_likelihood.png").stat().st_size > 0
