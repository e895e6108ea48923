"""dna_finetune.py: bad input gets one line before any work; kills, damage and divergence end in order."""

import ast
import gzip
import math
import re
import resource
import signal
import subprocess
import sys
import time
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from test_command_line import shell
from test_dna_data import write_table
from test_dna_finetuning import random_law, tune
from test_dna_runs import TINY, run_dna, stages  # noqa: F401

import dna_finetune as dna


def refuses(run_script, message, *flags):
    with pytest.raises(SystemExit) as error:
        run_script("dna_finetune", "--simulated-sequences", 100, *flags)
    assert isinstance(error.value.code, str) and message in error.value.code and "\n" not in error.value.code
    assert not Path("runs").exists()


BAD_TABLES = [
    (["seq,other", "ACGT,1"], "has no column 'activity'; it has seq, other"),
    (["sequence,activity", "ACGT,1"], "has no column 'seq'"),
    (["seq,activity", "ACGT,1", "ACGTA,1"], "equally long; line 3 has 5 letters, those before have 4"),
    (["seq,activity", "ACGN,1", "AC-T,1"], "no row is left; the first malformed: line 2: a sequence with letters"),
    (["seq,activity"], "no row is left; it is empty"),
    ([""], "has no column 'seq'"),
    (["seq,activity", "ACGT,1"], "1 rows; at least 100 are needed"),
]


@pytest.mark.parametrize("lines, message", BAD_TABLES)
def test_bad_table_gets_one_line(run_script, tmp_path, lines, message):
    refuses(run_script, message, "--data", write_table(tmp_path / "t.csv", lines))


BAD_FLAGS = [
    ("--epsilon -1", "--epsilon must be at least 0"),
    ("--epsilon nan", "--epsilon must be at least 0"),
    ("--lr 0", "--lr must be above 0"),
    ("--loss-clip 0", "--loss-clip must be above 0"),
    ("--rounds 0", "--rounds must be at least 1"),
    ("--seeds 0", "--seeds must be at least 1"),
    ("--seed 99999999999999999999999", "--seed must be from 0 to 2^32 - 1"),
    ("--num-particles 4 --target-kl 1.5", "--target-kl must be above 0 and below log(num_particles)"),
    ("--num-particles 1", "--num-particles must be at least 2"),
    ("--temperature-rule authors --temperature 1", "--temperature must be 0 with --temperature-rule authors"),
    ("--top-share 0", "--top-share must be above 0 and at most 1"),
    ("--ema 1", "--ema must be at least 0 and below 1"),
    ("--simulated-length 5", "--simulated-length must be at least 13"),
    ("--data nothing.csv", "--data must be a file that is there; got nothing.csv"),
    ("--pretrained nothing.pt", "--pretrained must be a file that is there"),
    ("--split-column start", "--split-column must be empty without --data"),
    ("--methods exp exp", "--methods must be some methods, each once"),
    ("--eval-samples 1", "--eval-samples must be at least 2"),
    ("--simulated-sequences 99", "--simulated-sequences must be at least 100"),
    ("--device nonsense", "--device nonsense"),
    ("--device meta", "--device meta"),
]


@pytest.mark.parametrize("flags, message", BAD_FLAGS)
def test_bad_flag_gets_one_line(run_script, flags, message):
    refuses(run_script, message, *flags.split())


@pytest.mark.parametrize("rule", [dict(temperature=1.0), dict(temperature_rule="authors")])
def test_a_target_kl_that_nothing_aims_at_may_be_too_large(rule):
    assert dna.Args(num_particles=4, target_kl=1.5, **rule).num_particles == 4


def test_longest_site_is_what_the_length_must_hold():
    assert max(len(consensus) for consensus, *_ in dna.FACTORS.values()) == 13


def test_files_that_are_no_model_or_no_table_get_one_line(run_script, tmp_path):
    broken = tmp_path / "broken.csv.gz"
    broken.write_bytes(b"no gzip")
    refuses(run_script, "cannot read it", "--data", broken)
    packed = bytearray(gzip.compress(b"seq,activity\n" + bytes(range(65, 91)) * 20, mtime=0))
    for at in range(10, len(packed)):  # after the header; zlib has an error of its own
        damaged = packed.copy()
        damaged[at] ^= 255
        broken.write_bytes(damaged)
        with pytest.raises(SystemExit, match="cannot read it|no row is left|has no column"):
            dna.read_table("--data", broken, ["activity"])
    refuses(run_script, "broken.csv.gz cannot be used", "--pretrained", broken)
    for content in ({"state": {}}, torch.zeros(3), dict(kind="denoiser", state={})):
        torch.save(content, tmp_path / "other.pt")
        refuses(run_script, "other.pt holds no oracle of this script", "--eval-oracle", tmp_path / "other.pt")
    refuses(run_script, "other.pt holds no denoiser of this script", "--pretrained", tmp_path / "other.pt")
    oracle, denoiser = dna.Oracle(4, 20), dna.Denoiser(4, 1).state_dict()
    widened = denoiser | {"linear.weight": torch.zeros(5, 5, 9)}  # as of an edited Denoiser
    wrong = [("denoiser", dict(state=widened)), ("denoiser", dict(state={"linear.weight": torch.zeros(4)}))]
    wrong += [("oracle", dict(state=oracle.state_dict())), ("oracle", dict(state={}, length=20))]
    for kind, content in wrong:
        torch.save(dict(kind=kind) | content, tmp_path / "other.pt")
        with pytest.raises(SystemExit, match=f"other.pt holds no {kind} of this script"):
            dna.load_model(kind, tmp_path / "other.pt", 20, "cpu")
    torch.save(dict(kind="oracle", length=20, state=oracle.state_dict()), tmp_path / "oracle.pt")
    refuses(run_script, "oracle.pt is for 20 bases, the data has 60", "--reward-oracle", tmp_path / "oracle.pt")
    flipped = bytearray((tmp_path / "oracle.pt").read_bytes())
    flipped[flipped.index(oracle.hidden.weight.detach().numpy().tobytes())] ^= 1
    (tmp_path / "oracle.pt").write_bytes(flipped)
    refuses(run_script, "oracle.pt cannot be used", "--reward-oracle", tmp_path / "oracle.pt", "--simulated-length", 20)
    table = write_table(tmp_path / "open.csv", ["seq,hepg2", "ACGT,1"])
    refuses(run_script, "4 bases, the data has 60", "--accessibility", table)
    table = write_table(tmp_path / "open.csv", ["seq,hepg2", f"{'ACGT' * 15},1", f"{'ACGT' * 15},-1"])
    refuses(run_script, "hepg2 must be 0 or 1", "--accessibility", table)


class Malicious:
    def __reduce__(self):
        return (Path.touch, (Path("executed-by-a-file"),))


def test_nothing_in_a_file_is_executed(run_script, tmp_path):
    torch.save(dict(kind="denoiser", state=Malicious()), tmp_path / "evil.pt")
    refuses(run_script, "evil.pt cannot be used", "--pretrained", tmp_path / "evil.pt")
    assert not Path("executed-by-a-file").exists()


def test_help_names_every_flag_and_says_what_it_is(tmp_path):
    result = shell("dna_finetune", "--help", cwd=tmp_path)
    assert result.returncode == 0 and "delta" in result.stdout and "lambda" in result.stdout
    for field in fields(dna.Args):
        flag = field.name.replace("_", "-")
        described = re.search(rf"--{flag}\b[^(]*[a-z:]{{2,}}[^(]* \(", result.stdout.replace("│", ""))
        assert described and len(described[0]) > len(flag) + 20, field.name


@pytest.mark.parametrize(
    "script", sorted(ROOT.glob("*.py")) + sorted(ROOT.glob("baselines/*.py")), ids=lambda path: path.stem
)
def test_requirements_hold_what_is_imported(script):
    nodes = list(ast.walk(ast.parse(script.read_text())))
    names = [name.name for node in nodes if isinstance(node, ast.Import) for name in node.names]
    names += [node.module for node in nodes if isinstance(node, ast.ImportFrom)]
    imported = {name.split(".")[0] for name in names}
    pinned = {re.split(r"[=\[]", line)[0] for line in (ROOT / "requirements.txt").read_text().splitlines()}
    assert "torch" in pinned and imported - set(sys.stdlib_module_names) <= pinned


def test_a_killed_stage_is_made_again_and_a_finished_one_is_not(run_dna, monkeypatch):  # noqa: F811
    flags, calls, die_at, step = ["--methods", "lin-neg", "--rounds", "6"], [], [], torch.optim.Adam.step

    def counting(self, *args, **kwargs):
        calls.append(None)
        if len(calls) in die_at:
            raise KeyboardInterrupt
        return step(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.Adam, "step", counting)
    made, _ = run_dna(*flags)
    assert len(calls) == 5 + 2 * 2 + 6  # pretraining, two oracles, rounds
    whole = stages()
    for call, finished in ((3, 0), (5 + 1, 1), (5 + 2 * 2 + 3, 4)):  # and pretrained itself is evaluated
        for path in Path("runs/dna_stages").iterdir():
            path.unlink()
        calls.clear()
        die_at[:] = [call]
        with pytest.raises(KeyboardInterrupt):
            run_dna(*flags)
        assert len(stages()) == finished and set(stages()) <= set(whole)
        again, out = run_dna(*flags)
        assert out.count("not made again") == finished and set(stages()) == set(whole)
        assert (again / "rows.csv").read_text() == (made / "rows.csv").read_text()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_with_its_exit_code_and_leaves_whole_files_only(tmp_path, number):
    flags = [*TINY, "--rounds", "100000", "--methods", "exp"]
    script = [sys.executable, ROOT / "dna_finetune.py", *flags]
    process = subprocess.Popen(script, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    while not list((tmp_path / "runs").glob("dna_stages/evaluated-*.pt")) and process.poll() is None:
        time.sleep(0.05)
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 128 + number and "Traceback" not in err
    files = sorted(path.name.split("-")[0] for path in (tmp_path / "runs/dna_stages").iterdir())
    assert files == ["eval_oracle", "evaluated", "pretrained", "reward_oracle"]
    assert all(dna.load(path) for path in (tmp_path / "runs/dna_stages").iterdir())


def test_damaged_stage_is_made_again(run_dna):  # noqa: F811
    made, _ = run_dna("--methods", "exp")
    damaged = next(Path("runs/dna_stages").glob("reward_oracle-*"))
    for content in (damaged.read_bytes()[:100], b"", b"x" + damaged.read_bytes()[1:]):
        damaged.write_bytes(content)
        again, out = run_dna("--methods", "exp")
        assert f"{damaged} cannot be used: " in out and ": made again" in out and dna.load(damaged)
        assert (again / "rows.csv").read_text() == (made / "rows.csv").read_text()


def test_full_disk_ends_with_one_line_and_leaves_no_half_file(run_dna):  # noqa: F811
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))  # the denoiser's file is larger
    try:
        with pytest.raises(SystemExit, match=r"pretrained-\w+.pt cannot be written, is there room\?") as error:
            run_dna("--width", "32")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "\n" not in error.value.code and not list(Path("runs/dna_stages").iterdir())


def test_a_file_where_the_stages_go_gets_one_line(run_dna):  # noqa: F811
    Path("runs").mkdir()
    Path("runs/dna_stages").touch()
    with pytest.raises(SystemExit, match=r"pretrained-\w+.pt cannot be written.*File exists") as error:
        run_dna()
    assert "\n" not in error.value.code


def test_loss_that_is_not_finite_stops_with_one_line(run_dna):  # noqa: F811
    message = r"stopped at lin-neg, round \d, --epsilon 0.7: (loss|gradient) not finite; for a loss, a smaller"
    with pytest.raises(SystemExit, match=message) as error:
        run_dna("--methods", "lin-neg", "--lr", "1e30", "--rounds", "5", "--updates", "3", "--epsilon", "0.7")
    assert "\n" not in error.value.code
    with pytest.raises(SystemExit, match="exp, round 0: reward not finite"):
        tune("exp", random_law(1), torch.full((64,), math.nan), num_particles=8)


def test_user_is_told_of_sequences_that_repeat_or_are_unlikely(run_dna, tmp_path):  # noqa: F811
    """A law that wants A where nothing is known and never beside another A: in one step it draws nothing but A."""
    denoiser = dna.Denoiser(4, 1).requires_grad_(False)
    for parameter in denoiser.parameters():
        parameter.zero_()
    denoiser.linear.weight[0, 0], denoiser.hidden.weight[0, 0] = 1.0, 1.0  # unit 0 counts the A within 4 places
    denoiser.logits.weight[0, 0], denoiser.logits.bias[0] = -20.0, 9.0
    dna.save(tmp_path / "shy.pt", dict(kind="denoiser", state=denoiser.state_dict()))
    for steps, warned in ((1, True), (16, False)):
        _, out = run_dna("--pretrained", tmp_path / "shy.pt", "--methods", "exp", "--sampling-steps", steps)
        assert ("warning: pretrained-seed1 has collapsed" in out) == warned
        assert ("warning: pretrained-seed1 repeats itself: 12% of its sequences are distinct" in out) == warned


def test_user_is_told_of_an_unbounded_loss(run_dna):  # noqa: F811
    flags = "--methods lin-neg --epsilon 30 --rounds 12 --updates 8 --lr 0.1".split()
    assert "warning: the loss of lin-neg-seed1 fell to" in run_dna(*flags)[1]
    assert "warning: the loss" not in run_dna(*flags, "--loss-clip", "5")[1]
