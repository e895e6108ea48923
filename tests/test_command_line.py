"""Every RL script as a user types it: --help, and one clear line for each kind of bad input, before any work."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

SCRIPTS = ["simpo_exp", "simpo_power", "simpo_neg"]
BASELINES = [f"baselines/{name}" for name in ("qvpo", "qsm", "sdac", "dipo", "dacer", "dppo")]
PENDULUM = "--env-id Pendulum-v1 --no-compile --total-timesteps 10 --hidden-dim 8 --eval-every 0".split()

BAD = [
    ("--num-particles 1", "--num-particles must be at least 2; got 1"),
    ("--num-particles 4", "--target-kl must be above 0 and below log(num_particles) = 1.39; got 1.5"),
    ("--target-kl 3.5", "--target-kl must be above 0 and below log(num_particles) = 3.47"),
    ("--target-kl nan", "--target-kl must be above 0 and below log(num_particles) = 3.47"),
    ("--diffusion-steps -1", "--diffusion-steps must be at least"),
    ("--diffusion-steps 2", "--diffusion-steps must be at least 3 for --solver dpm"),
    ("--solver ddpm --diffusion-steps -1", "--diffusion-steps must be at least 0"),
    ("--temperature -1", "--temperature must be at least 0"),
    ("--temperature nan", "--temperature must be at least 0"),
    ("--policy-lr 0", "--policy-lr must be above 0 and finite"),
    ("--batch-size -1", "--batch-size must be at least 1"),
    ("--discount 1.1", "--discount must be from 0 to 1"),
    ("--eval-every -1", "--eval-every must be at least 0"),
    ("--seed -1", "--seed must be from 0 to 2^31 - 1"),
    ("--seed 2147483648", "--seed must be from 0 to 2^31 - 1"),
    ("--capture-video", "--capture-video must be used with --evaluate"),
    ("--env-id Nonsense-v0", "--env-id Nonsense-v0"),
    ("--env-id dm_control/cheetah-fly-v0", "--env-id dm_control/cheetah-fly-v0"),
    ("--env-id no_module:Nonsense-v0", "--env-id no_module:Nonsense-v0"),
    ("--env-id CartPole-v1", "needs Box spaces"),
    ("--env-id small_envs:DiscreteActions-v0", "needs Box spaces"),
    ("--env-id small_envs:SequenceObservations-v0", "needs Box spaces"),
    ("--env-id small_envs:FlatActions-v0", "needs Box spaces, bounded 1-D actions, low < high"),
    ("--env-id small_envs:UnboundedActions-v0", "needs Box spaces"),
    ("--env-id small_envs:ManyUnboundedActions-v0", "needs Box spaces, bounded 1-D actions"),
    ("--env-id small_envs:MatrixActions-v0", "needs Box spaces, bounded 1-D actions"),
    ("--env-id small_envs:IntegerActions-v0", "needs Box spaces, bounded 1-D actions"),
    ("--env-id :x", "--env-id :x: Empty module name"),
    ("--env-id Hopper-v4 --reward-landscape exp", "--env-id must be dm_control/cheetah-run-v0 or"),
    ("--device nonsense", "--device nonsense"),
    ("--device meta", "--device meta"),
    ("--evaluate runs/nothing", "runs/nothing/checkpoint.pt cannot be used"),
    ("--resume runs/nothing", "runs/nothing/checkpoint.pt cannot be used"),
]
BAD_POWER = [("--power 0", "--power must be above 0"), ("--power nan", "--power must be above 0")]
BAD_EPSILON = [("--epsilon -0.1", "--epsilon must be at least 0"), ("--epsilon inf", "--epsilon must be at least 0")]
CASES = [("simpo_neg", *case) for case in BAD + BAD_POWER + BAD_EPSILON]
CASES += [("simpo_power", *case) for case in BAD_POWER]
BAD_KEPT = "--kept-draws must be from 1 to num_particles = 64; got "
CASES += [(f"baselines/{name}", "--num-particles 1", "--num-particles must be at least 2") for name in ("qvpo", "sdac")]
CASES += [("baselines/dppo", "--batch-size 1", "--batch-size must be at least 2")]
CASES += [("baselines/qvpo", f"--kept-draws {n}", f"{BAD_KEPT}{n}") for n in (0, 65)]


@pytest.mark.parametrize("script, flags, message", CASES)
def test_bad_input_gets_one_line(run_script, script, flags, message):
    with pytest.raises(SystemExit) as error:
        run_script(script, *flags.split())
    assert isinstance(error.value.code, str)  # printed to stderr, exit status 1
    assert message in error.value.code and "\n" not in error.value.code
    assert not Path("runs").exists()


@pytest.mark.parametrize("flags", ["--solver euler", "--reward-landscape steep", "--num-envs x", "--no-such-flag"])
def test_what_the_parser_refuses(run_script, capsys, flags):
    with pytest.raises(SystemExit) as error:
        run_script("simpo_neg", *flags.split())
    text = capsys.readouterr()
    assert error.value.code not in (0, None) and flags.split()[0] in text.out + text.err
    assert not Path("runs").exists()


@pytest.mark.parametrize("script", SCRIPTS + BASELINES)
def test_help_names_every_flag_and_symbol(run_script, capsys, monkeypatch, script):
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit) as end:
        run_script(script, "--help")
    assert end.value.code == 0
    shown = capsys.readouterr().out
    text = (ROOT / f"{script}.py").read_text()
    fields = re.findall(r"^    (\w+): .* = .*  # (.*)$", text.split("class Args:")[1].split("def ")[0], flags=re.M)
    assert len(fields) > (35 if script in SCRIPTS else 25)
    for field, comment in fields:
        assert f"--{field.replace('_', '-')}" in shown, field
        assert comment.split()[0] in shown, comment
    assert script in BASELINES or ("delta" in shown and "lambda" in shown)
    assert ("--power" in shown) == (script in ("simpo_power", "simpo_neg"))
    assert ("--epsilon" in shown) == (script == "simpo_neg")


def shell(script, *flags, cwd):
    return subprocess.run([sys.executable, ROOT / f"{script}.py", *flags], capture_output=True, text=True, cwd=cwd)


def test_bad_input_in_a_shell(tmp_path):
    result = shell("simpo_neg", "--env-id", "Nonsense-v0", cwd=tmp_path)
    assert result.returncode == 1 and result.stdout == ""
    assert len(result.stderr.splitlines()) == 1 and "--env-id Nonsense-v0" in result.stderr
    assert not list(tmp_path.iterdir())


def test_checkpoints_that_do_not_fit_are_refused(run_script):
    run_dir = run_script("simpo_exp", *PENDULUM)
    with pytest.raises(SystemExit, match="made by simpo_exp.py"):
        run_script("simpo_neg", "--evaluate", run_dir)
    for flags in (["--hidden-dim", "16"], ["--env-id", "Hopper-v4"]):
        with pytest.raises(SystemExit, match=f"with other {flags[0][2:].replace('-', '_')}"):
            run_script("simpo_exp", "--evaluate", run_dir, *flags)
