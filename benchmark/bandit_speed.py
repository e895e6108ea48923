"""How much faster bandit.py trains its trials as one batch than one by one: python benchmark/bandit_speed.py

Figure 2's trials (4 methods x 30 seeds) for 2 rounds; one by one is measured on every tenth trial and scaled up.
"""

import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
import torch

import bandit

args = bandit.Args(rounds=2)
torch.set_num_threads(1)
torch.set_flush_denormal(True)
trials = bandit.trials_for(bandit.ESCAPE, bandit.METHODS, args)
ratios = []
for repetition in range(4):
    start = time.perf_counter()
    for trial in trials[::10]:
        bandit.train([trial], args)
    one_by_one = 10 * (time.perf_counter() - start)
    start = time.perf_counter()
    bandit.train(trials, args)
    together = time.perf_counter() - start
    if repetition:  # the first one warms up
        ratios.append(one_by_one / together)
        print(f"one by one {one_by_one:.1f} s, together {together:.1f} s, ratio {ratios[-1]:.1f}")
print(f"{len(trials)} trials, one thread: {sorted(ratios)[1]:.1f} times faster together (median)")
