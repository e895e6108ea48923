import itertools
import os
import runpy
import signal
import sys
import threading
from pathlib import Path

import pytest
import torch
from tensorboard.summary.writer import event_file_writer

ROOT = Path(__file__).parent.parent
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"  # of the processes that tests start: with more, they wait on a busy machine
torch.compiler.set_stance("force_eager")  # compiling takes longer than the tests; test_precision.py compares the two

# Flags that make a run small enough for a test: tiny networks, few particles, no compilation.
SMALL = "--no-compile --device cpu --policy-dtype float32 --hidden-dim 32 --num-particles 8 --target-kl 0.9"
SMALL = [
    *SMALL.split(),
    *"--diffusion-steps 5 --batch-size 32 --eval-episodes 5 --eval-draws 3 --log-every 100".split(),
]


@pytest.fixture(autouse=True)
def restore_process_state(monkeypatch):
    """Scripts run in this process and change what is global: not for the tests after it."""
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    monkeypatch.setattr(threading, "excepthook", threading.excepthook)
    monkeypatch.setenv("MUJOCO_GL", os.environ.get("MUJOCO_GL", "disable"))
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)
    torch.set_flush_denormal(False)
    torch.compiler.set_stance("force_eager")


@pytest.fixture
def run_script(tmp_path, monkeypatch):
    """Runs `python SCRIPT.py FLAGS` in this process, in an empty directory or the one of that name in tmp_path.

    Returns the directory of the run that it made, if any. Raises the script's SystemExit, and what stops it else.
    """
    numbers = itertools.count(1)

    def run(script, *flags, folder=None):
        folder = tmp_path / (folder or f"{next(numbers)}")
        folder.mkdir(exist_ok=True)
        monkeypatch.chdir(folder)
        before = set(Path("runs").glob("*"))
        monkeypatch.setattr(sys, "argv", [f"{script}.py", *map(str, flags)])
        runpy.run_path(str(ROOT / f"{script}.py"), run_name="__main__")
        made = set(Path("runs").glob("*")) - before
        return folder / made.pop() if made else None

    return run


@pytest.fixture
def run_in(run_script, tmp_path, monkeypatch):
    """Like run_script in the directory `folder`, however the script ends.

    Returns the directory of its only run and what the process would exit with: None, a number, or a line to print.
    """
    # TensorBoard reads files of one second in the order of their names, where 10 is before 9.
    monkeypatch.setattr(event_file_writer, "_global_uid", event_file_writer.AtomicCounter(0))

    def run(folder, script, *flags):
        try:
            code = run_script(script, *flags, folder=folder) and None
        except SystemExit as end:
            code = end.code
        except Exception as error:
            sys.excepthook(type(error), error, error.__traceback__)  # as the interpreter does
            code = 1
        (run_dir,) = (tmp_path / folder / "runs").iterdir()
        return run_dir, code

    return run
