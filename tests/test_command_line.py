"""Every script as a user types it: --help, and one clear line for each kind of bad input, before any work."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

SCRIPTS = ["simpo_exp", "simpo_power", "simpo_neg"]

BAD = [
    ("--num-particles 0", "--num-particles must be at least 1"),
    ("--num-particles 4", "--target-kl must be above 0 and below log"),
    ("--target-kl 3.5", "--target-kl must be above 0 and below log"),
    ("--diffusion-steps 0", "--diffusion-steps must be at least 1"),
    ("--temperature 0", "--temperature must be above 0"),
    ("--temperature nan", "--temperature must be above 0"),
    ("--batch-size -1", "--batch-size must be at least 1"),
    ("--discount 1.1", "--discount must be from 0 to 1"),
    ("--eval-every -1", "--eval-every must be at least 0"),
    ("--seed -1", "--seed must be at least 0"),
    ("--env-id Nonsense-v0", "--env-id Nonsense-v0"),
    ("--env-id dm_control/cheetah-fly-v0", "--env-id dm_control/cheetah-fly-v0"),
    ("--env-id no_module:Nonsense-v0", "--env-id no_module:Nonsense-v0"),
    ("--env-id CartPole-v1", "must be continuous"),
    ("--env-id small_envs:DiscreteActions-v0", "must be continuous"),
    ("--env-id small_envs:DiscreteObservations-v0", "must be continuous"),
    ("--env-id small_envs:UnboundedActions-v0", "must be continuous"),
    ("--env-id Hopper-v4 --reward-landscape exp", "--env-id must be dm_control/cheetah-run-v0 or"),
    (
        "--env-id dm_control/cheetah-run-v0 --reward-landscape exp --landscape-c 800",
        "--landscape-c must be above 0 and",
    ),
    ("--device nonsense", "--device nonsense"),
    ("--evaluate runs/nothing", "--evaluate"),
]
BAD_POWER = [("--power 0", "--power must be above 0"), ("--power nan", "--power must be above 0")]
BAD_EPSILON = [("--epsilon -0.1", "--epsilon must be at least 0"), ("--epsilon inf", "--epsilon must be at least 0")]
CASES = [("simpo_exp", *case) for case in BAD]
CASES += [("simpo_power", *case) for case in BAD + BAD_POWER]
CASES += [("simpo_neg", *case) for case in BAD + BAD_POWER + BAD_EPSILON]


@pytest.mark.parametrize("script, flags, message", CASES)
def test_bad_input_gets_one_line(run_script, script, flags, message):
    with pytest.raises(SystemExit) as error:
        run_script(script, *flags.split())
    assert isinstance(error.value.code, str)  # printed to stderr, exit status 1
    assert message in error.value.code and "\n" not in error.value.code
    assert not Path("runs").exists()


def shell(script, *flags, cwd):
    return subprocess.run([sys.executable, ROOT / f"{script}.py", *flags], capture_output=True, text=True, cwd=cwd)


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_names_every_flag_and_symbol(script, tmp_path):
    result = shell(script, "--help", cwd=tmp_path)
    assert result.returncode == 0
    text = (ROOT / f"{script}.py").read_text().split("class Args:")[1].split("# ------")[0]
    fields = re.findall(r"^    (\w+): ", text, flags=re.M)
    assert len(fields) > 30
    for field in fields:
        assert f"--{field.replace('_', '-')}" in result.stdout, field
    assert "delta" in result.stdout and "lambda" in result.stdout


@pytest.mark.parametrize(
    "flags", ["--epsilon -1", "--env-id Nonsense-v0", "--reward-landscape steep", "--no-such-flag"]
)
def test_bad_input_in_a_shell(flags, tmp_path):
    result = shell("simpo_neg", *flags.split(), cwd=tmp_path)
    assert result.returncode != 0 and "Traceback" not in result.stderr
    assert flags.split()[0] in result.stderr + result.stdout
    assert not list(tmp_path.iterdir())


def test_model_of_another_script_or_a_damaged_one_is_refused(run_script):
    flags = "--env-id Pendulum-v1 --no-compile --total-timesteps 10 --hidden-dim 8 --eval-every 0".split()
    run_dir = run_script("simpo_exp", *flags)
    with pytest.raises(SystemExit, match="trained by simpo_exp.py"):
        run_script("simpo_neg", "--evaluate", run_dir)
    model = (run_dir / "model.pt").read_bytes()
    (run_dir / "model.pt").write_bytes(model[: len(model) // 2])
    with pytest.raises(SystemExit, match="no trained model"):
        run_script("simpo_exp", "--evaluate", run_dir)
