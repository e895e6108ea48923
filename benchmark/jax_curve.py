"""Trains the authors' GeMPO (JAX) in this project's frame: same environments, widths, K, delta, updates, evaluation.

git clone https://github.com/typoverflow/flow-rl && git -C flow-rl checkout bae22f4
pip install jax==0.5.3 flax==0.10.5 orbax-checkpoint==0.11.23 distrax hydra-core gymnasium==1.1.1 imageio mujoco==3.3.0
python benchmark/jax_curve.py flow-rl --env-id HalfCheetah-v4 --seed 1    # the frame of benchmark/README.md
python benchmark/jax_curve.py flow-rl --hidden-dim 256 --batch-size 256 --num-particles 32 --target-kl 1.5 --updates 1

Install it in an environment of its own. For one thread, as in our runs, set
XLA_FLAGS="--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1". Theirs is left as it is but for sizes, K,
delta, floor and learning rate: 20 ddpm steps, ReLU critics, lambda from 1, state and time through small MLPs.
--predict velocity, --init pytorch and --particles clipped each take one more thing from simpo_neg.py (but flow-rl's
initialisation of that name draws biases from +- 1/sqrt(outputs), PyTorch's from +- 1/sqrt(inputs)). Here are
5 environments, 5,000 random steps, then UPDATES updates per 5 environment steps, and every 5,000 steps an evaluation:
10 episodes, the best of 10 draws. Writes OUT/gempo_jax/ENVIRONMENT/FLAGS/SEED, as sweep.py: stats.py and small_frame.py
take it, too. The same command goes on after a stop, from the last evaluation, with new episodes. upside_down in
eval.csv is the share of steps whose observation 1, HalfCheetah's root angle, has a negative cosine.
"""

import argparse
import csv
import inspect
import json
import pickle
import sys
import time
from pathlib import Path

import gymnasium as gym
import jax
import numpy as np

FRAME = {"flow_rl", "env_id", "seed", "total_timesteps", "out"}  # not in the folder's name as flags
MODELS = ["rng", "actor", "actor_target", "critic", "critic_target", "temp"]  # of their agent: all that it learns
parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("flow_rl")
defaults = dict(env_id="HalfCheetah-v4", seed=1, total_timesteps=50_000, num_particles=8, target_kl=0.7, hidden_dim=64)
defaults |= dict(batch_size=64, updates=5, reweight="linear", floor=-0.5, policy_lr=3e-4, out="runs/small")
choices = dict(predict=("noise", "velocity"), init=("orthogonal", "pytorch"), particles=("free", "clipped"))  # or ours
defaults |= {name: theirs for name, (theirs, _) in choices.items()}
for name, default in defaults.items():
    kind = dict(type=type(default), default=default, choices=choices.get(name))
    parser.add_argument("--" + name.replace("_", "-"), **kind)
args = parser.parse_args()
new = [f"{k.replace('_', '-')}={v}" for k, v in vars(args).items() if k not in FRAME and v != defaults[k]]
folder = Path(args.out, "gempo_jax", args.env_id, " ".join(new) or "none", str(args.seed))
if (folder / "finished").exists():
    raise SystemExit(f"{folder} is finished: delete it to train it again")
sys.path.insert(0, args.flow_rl)
from flowrl.module import initialization  # noqa: E402

if args.init == "pytorch":  # before the networks that have it as their default are defined
    initialization.default_kernel_init = initialization.pytorch_kernel_init
    initialization.default_bias_init = initialization.pytorch_bias_init
from flowrl.agent.online import dpmd, gempo  # noqa: E402
from flowrl.flow.continuous_ddpm import ContinuousDDPM, cosine_noise_schedule  # noqa: E402
from flowrl.types import Batch  # noqa: E402
from omegaconf import OmegaConf  # noqa: E402

if args.predict == "velocity":  # v = alpha eps - sigma a_0; its errors are clipped and averaged
    add_noise = ContinuousDDPM.add_noise

    def add_noise_v(self, rng, x0):
        rng, xt, t, eps = add_noise(self, rng, x0)
        alpha, sigma = self.noise_schedule_func(t)
        return rng, xt, t, (eps - sigma * xt) / alpha  # what the loss compares the network with

    class VelocityBackbone(dpmd.ContinuousDDPMBackbone):
        def __call__(self, x, time, condition=None, training=False):
            velocity = super().__call__(x, time, condition, training)
            alpha, sigma = cosine_noise_schedule(time)
            return velocity if training else sigma * x + alpha * velocity  # their sampler asks for the noise

    ContinuousDDPM.add_noise, dpmd.ContinuousDDPMBackbone = add_noise_v, VelocityBackbone

if args.particles == "clipped":  # to the actions' range, once they have noise
    noisy = "action_batch + noise * additive_noise"
    code = inspect.getsource(gempo)
    assert code.count(noisy) == 1
    exec(code.replace(noisy, f"jnp.clip({noisy}, -1, 1)"), vars(gempo))

gym.logger.min_level = gym.logger.ERROR
widths = [args.hidden_dim] * 3
algo = dict(num_particles=args.num_particles, target_kl=args.target_kl, reweight=args.reweight)
algo |= dict(negative_bound=args.floor, critic_hidden_dims=widths)
algo |= dict(diffusion=dict(lr=args.policy_lr, hidden_dims=widths))
config = OmegaConf.load(f"{args.flow_rl}/examples/online/config/mujoco/algo/gempo_linear.yaml")
config = OmegaConf.merge(config, {"task": "", "algo": algo})


def make():
    return gym.wrappers.RescaleAction(gym.make(args.env_id), -1.0, 1.0)


envs = gym.vector.SyncVectorEnv([make] * 5, autoreset_mode=gym.vector.AutoresetMode.SAME_STEP)
eval_envs = gym.vector.SyncVectorEnv([make] * 10)
obs_dim, action_dim = envs.single_observation_space.shape[0], envs.single_action_space.shape[0]
agent, rng = gempo.GeMPOAgent(obs_dim, action_dim, config.algo, seed=args.seed), np.random.default_rng(args.seed)
sizes = dict(obs=obs_dim, action=action_dim, reward=1, terminal=1, next_obs=obs_dim)
buffer = {name: np.zeros((args.total_timesteps + 5, size), np.float32) for name, size in sizes.items()}


def evaluate():
    obs, _ = eval_envs.reset(seed=args.seed + 10_000)
    returns, running, turned, steps = np.zeros(10), np.ones(10, bool), 0, 0
    while running.any():
        action, _ = agent.sample_actions(obs, deterministic=True, num_samples=10)
        obs, reward, terminated, truncated, _ = eval_envs.step(np.asarray(action))
        returns += reward * running
        turned, steps = turned + running[np.cos(obs[:, 1]) < 0].sum(), steps + running.sum()
        running &= ~(terminated | truncated)
    return map(float, (returns.mean(), returns.std(), turned / steps))


begin, rows, seconds = 0, [], 0.0  # where the last evaluation left it
if (folder / "state.pkl").exists():
    saved = pickle.loads((folder / "state.pkl").read_bytes())
    begin, rows, seconds, rng, agent._n_training_steps, leaves, filled = saved
    models = jax.tree.unflatten(jax.tree.structure([getattr(agent, name) for name in MODELS]), leaves)
    vars(agent).update(zip(MODELS, models, strict=True))
    for name, column in filled.items():
        buffer[name][:begin] = column
obs, _ = envs.reset(seed=args.seed + begin)
envs.action_space.seed(args.seed)
run_dir = folder / f"runs/{args.env_id}__gempo_jax__{args.seed}__run"
run_dir.mkdir(parents=True, exist_ok=True)
(run_dir / "args.json").write_text(json.dumps(vars(args), indent=2) + "\n")
start = time.time() - seconds
for step in range(begin, args.total_timesteps, 5):
    if step < 5000:
        action = envs.action_space.sample()
    else:
        action = np.asarray(agent.sample_actions(obs, deterministic=False, num_samples=1)[0])
    next_obs, reward, terminated, truncated, infos = envs.step(action)
    last_obs = next_obs.copy()
    for i in np.flatnonzero(terminated | truncated):
        last_obs[i] = infos["final_obs"][i]
    columns = dict(obs=obs, action=action, reward=reward[:, None], terminal=terminated[:, None], next_obs=last_obs)
    for name, column in columns.items():
        buffer[name][step : step + 5] = column
    obs = next_obs
    for _ in range(args.updates if step >= 5000 else 0):
        drawn = rng.integers(step + 5, size=args.batch_size)
        batch = {name: column[drawn] for name, column in buffer.items()}
        agent.train_step(Batch(**batch, next_action=None), step)
    if (step + 5) % 5000 == 0:
        mean, std, upside_down = evaluate()
        rows.append(dict(step=step + 5, mean=mean, std=std, seconds=time.time() - start, upside_down=upside_down))
        print(rows[-1], flush=True)
        with (run_dir / "eval.csv").open("w") as file:
            table = csv.DictWriter(file, rows[0])
            table.writeheader(), table.writerows(rows)
        leaves = jax.tree.map(np.asarray, jax.tree.leaves([getattr(agent, name) for name in MODELS]))
        filled = {name: column[: step + 5] for name, column in buffer.items()}
        state = step + 5, rows, time.time() - start, rng, agent._n_training_steps, leaves, filled
        (folder / "state.unfinished").write_bytes(pickle.dumps(state))
        (folder / "state.unfinished").replace(folder / "state.pkl")
(folder / "finished").touch()
