import os
import runpy
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"  # of the processes that tests start: with more, they wait on a busy machine


@pytest.fixture(autouse=True)
def restore_process_state():
    """Scripts run in this process, and bandit.py makes it flush denormal numbers: not for the tests after it."""
    yield
    torch.set_flush_denormal(False)


@pytest.fixture
def run_script(tmp_path, monkeypatch):
    """Runs `python SCRIPT.py FLAGS` in this process and an empty directory; returns the run's directory, if any.

    Raises the script's SystemExit when it refuses its flags.
    """
    monkeypatch.chdir(tmp_path)

    def run(script, *flags):
        before = set(Path("runs").glob("*"))
        monkeypatch.setattr(sys, "argv", [f"{script}.py", *map(str, flags)])
        runpy.run_path(str(ROOT / f"{script}.py"), run_name="__main__")
        made = set(Path("runs").glob("*")) - before
        return tmp_path / made.pop() if made else None

    yield run
    torch.compiler.set_stance("default")


# Flags that make a run small enough for a test: tiny networks, few particles, no compilation.
SMALL = "--no-compile --sampling-dtype float32 --hidden-dim 32 --num-particles 8 --target-kl 0.9 --diffusion-steps 5"
SMALL = [*SMALL.split(), "--batch-size", "32", "--eval-episodes", "5", "--eval-draws", "3", "--log-every", "100"]
