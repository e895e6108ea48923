"""The three scripts are one text but for Args, reweight and its call; each carries the dependencies it needs."""

import re
import tomllib

import pytest
from conftest import ROOT

SCRIPTS = ["simpo_exp", "simpo_power", "simpo_neg"]


def shared_blocks(script):
    """The script without its docstring, the fields and checks of power and epsilon, and reweight with its call."""
    text = (ROOT / f"{script}.py").read_text()
    text, cuts = re.subn(r'\n"""SiMPO.*?\n"""\n', "\n", text, count=1, flags=re.S)
    assert cuts == 1
    text = re.sub(r'    (power|epsilon): float = .*\n    """.*"""\n', "", text)
    text, cuts = re.subn(r"@torch.no_grad\(\)\ndef reweight.*?(?=# ---)", "", text, flags=re.S)
    assert cuts == 1
    text, cuts = re.subn(r"reweight\(particle_q, temperature(, args.power)?(, args.epsilon)?\)", "", text)
    assert cuts == 1
    return text.replace('above_0 = "power ', 'above_0 = "').replace('at_least_0 = "epsilon ', 'at_least_0 = "')


@pytest.mark.parametrize("script", SCRIPTS[:2])
def test_shared_blocks_are_equal_to_the_letter(script):
    assert shared_blocks(script).splitlines() == shared_blocks("simpo_neg").splitlines()


@pytest.mark.parametrize("script", SCRIPTS)
def test_inline_metadata_equals_requirements(script):
    block = re.search(r"^# /// script\n(.*?)^# ///$", (ROOT / f"{script}.py").read_text(), flags=re.M | re.S)[1]
    metadata = tomllib.loads(re.sub(r"^# ?", "", block, flags=re.M))
    requirements = (ROOT / "requirements.txt").read_text().split("# What the tests")[0]
    pinned = [line for line in requirements.splitlines() if "==" in line]
    assert metadata["dependencies"] == pinned
    assert metadata["requires-python"] == ">=3.11"
