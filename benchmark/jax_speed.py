"""Milliseconds per update of the authors' JAX, to stand beside benchmark/speed.py on the same machine.

git clone https://github.com/typoverflow/flow-rl && git -C flow-rl checkout bae22f4
pip install jax==0.5.3 flax==0.10.5 orbax-checkpoint==0.11.23 distrax hydra-core    # an environment of its own
python benchmark/jax_speed.py flow-rl 17 6      # HalfCheetah-v4: sizes of its observations and actions
python benchmark/jax_speed.py flow-rl 376 17    # Humanoid-v4

Their gempo_linear.yaml with K = 32 and a floor of -0.5, all else as it is: so critics of 2 x 256 ReLU. Random batches.
"""

import statistics
import sys
import time

import jax
import numpy as np
from omegaconf import OmegaConf

if len(sys.argv) != 4:
    raise SystemExit("usage: python benchmark/jax_speed.py FLOW_RL_FOLDER OBSERVATION_SIZE ACTION_SIZE")
folder, obs_dim, action_dim = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
sys.path.insert(0, folder)
from flowrl.agent.online.gempo import GeMPOAgent  # noqa: E402
from flowrl.types import Batch  # noqa: E402

config = OmegaConf.load(f"{folder}/examples/online/config/mujoco/algo/gempo_linear.yaml")
config = OmegaConf.merge(config, {"task": "", "algo": {"num_particles": 32, "negative_bound": -0.5}})
agent = GeMPOAgent(obs_dim, action_dim, config.algo, seed=0)
rng, times = np.random.default_rng(0), []
sizes = dict(obs=obs_dim, action=action_dim, reward=1, terminal=1, next_obs=obs_dim, next_action=action_dim)
for step in range(10):
    batch = Batch(**{name: rng.standard_normal((256, size)).astype(np.float32) for name, size in sizes.items()})
    start = time.perf_counter()
    jax.block_until_ready(agent.train_step(batch, step))
    times.append(1e3 * (time.perf_counter() - start))
print(f"{statistics.median(times[2:]):.0f} ms, median of 8 (the first two compile and warm up)")
