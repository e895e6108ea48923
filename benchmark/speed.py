"""Milliseconds per update of simpo_neg.py and of its parts, beside what the machine's matrix products could do.

    python benchmark/speed.py --env-id HalfCheetah-v4
    python benchmark/speed.py --hidden-dim 64 --batch-size 64 --num-particles 8     # the frame of "a night on a laptop"

One thread: OMP_NUM_THREADS=1. The authors' JAX on the same machine: benchmark/jax_speed.py.
"""

import copy
import resource
import statistics
import sys
import time
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal

import gymnasium as gym
import torch
import tyro

sys.path.insert(0, str(Path(__file__).parent.parent))
import simpo_neg as simpo


@dataclass
class Args:
    env_id: str = "HalfCheetah-v4"  # sizes of observations and actions are taken from it
    num_particles: simpo.Count = 32  # K
    batch_size: simpo.Count = 256  # states per update
    hidden_dim: simpo.Count = 256  # units per hidden layer
    solver: Literal["dpm", "ddpm"] = "dpm"
    diffusion_steps: simpo.Natural = 0  # network calls of a draw; 0: 8 for dpm, 20 for ddpm
    device: str = "cpu"  # cpu or cuda
    policy_dtype: Literal["float32", "bfloat16"] = simpo.Args.policy_dtype
    repeats: int = 20  # timed calls of each part; the median is printed


def milliseconds(function, device, repeats):
    """Median over `repeats` calls, after two that compile and warm up."""
    times = []
    for _ in range(repeats + 2):
        start = time.perf_counter()
        function()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times[2:])


def measure(args, obs_dim, action_dim):
    """Milliseconds of each part of one update, and of its hidden layers' matrix products alone."""
    B, K, T, H = args.batch_size, args.num_particles, args.diffusion_steps, args.hidden_dim
    device, dtype = torch.device(args.device), getattr(torch, args.policy_dtype)
    generator = torch.Generator(device).manual_seed(0)

    def product(dtype):
        x, w = torch.randn(B * K, H, device=device, dtype=dtype), torch.randn(H, H, device=device, dtype=dtype)
        return milliseconds(lambda: x @ w, device, 50)

    torch.compiler.reset()
    policy = simpo.DiffusionPolicy(obs_dim, action_dim, H, args.solver, T, dtype).to(device)
    old_policy = copy.deepcopy(policy).requires_grad_(False)
    critic = simpo.Critic(obs_dim, action_dim, H).to(device)
    policy_optimizer = torch.optim.Adam(policy.parameters(), fused=True)
    critic_optimizer = torch.optim.Adam(critic.parameters(), fused=True)
    obs, target_q = torch.randn(B, obs_dim, device=device), torch.randn(2, B, device=device)
    particles = old_policy.sample(obs, K, generator)
    t, noise = torch.randint(T, (B, K), device=device), torch.randn(particles.shape, device=device)
    weights, temperature = torch.ones(B, K, device=device), torch.ones((), device=device)
    reweight = torch.compile(simpo.reweight, dynamic=False)

    @torch.no_grad()
    def values():
        block = max(1, 2048 // K) if device.type == "cpu" else B  # as in simpo_neg.py
        return torch.cat(list(map(critic, obs.split(block), particles.split(block))), dim=1).mean(0)

    def critic_step():
        loss = (critic(obs, particles[:, :1])[..., 0] - target_q).square().mean()
        critic_optimizer.zero_grad()
        loss.backward()
        critic_optimizer.step()

    def policy_step():
        loss = policy.loss(obs, particles, weights, t, noise, 5.0)
        policy_optimizer.zero_grad()
        loss.backward()
        policy_optimizer.step()

    q = values()
    # Products of the two hidden layers alone: T calls of a draw, forward and twice that backward, two critics.
    bound = (2 * T + 6) * product(dtype) + 4 * product(torch.float32)
    parts = {
        "action of the Bellman target": lambda: policy.sample(obs, 1, generator),
        "critic step": critic_step,
        "draw K actions": lambda: old_policy.sample(obs, K, generator),
        "values of the K actions": values,
        "weights": lambda: reweight(q, temperature, 1.0, 0.5),
        "policy step": policy_step,
    }
    return {name: milliseconds(part, device, args.repeats) for name, part in parts.items()}, bound


if __name__ == "__main__":
    args = tyro.cli(Args, description=__doc__)
    shared = {field.name: getattr(args, field.name) for field in fields(args)} | dict(target_kl=1e-9)
    known = {name: value for name, value in shared.items() if hasattr(simpo.Args, name)}
    simpo.Args(**known).check()  # bad values end it with one line
    if args.repeats < 1:
        raise SystemExit(f"--repeats must be at least 1; got {args.repeats}")
    args.diffusion_steps = args.diffusion_steps or {"dpm": 8, "ddpm": 20}[args.solver]
    try:
        torch.zeros((), device=args.device)
    except (RuntimeError, AssertionError) as error:
        raise SystemExit(f"--device {args.device}: {str(error).splitlines()[0]}") from None
    gym.logger.min_level = gym.logger.ERROR
    torch._inductor.config.cpp_wrapper = args.device == "cpu"  # as in simpo_neg.py
    envs = gym.vector.SyncVectorEnv([lambda: simpo.make_env(args)] * 5)
    obs_dim, action_dim = envs.single_observation_space.shape[0], envs.single_action_space.shape[0]
    print(
        f"{args.env_id}: {args.batch_size} states x {args.num_particles} actions x {args.diffusion_steps} calls "
        f"({args.solver}), {args.hidden_dim} units, {args.policy_dtype}, {torch.get_num_threads()} threads"
    )
    device = torch.device(args.device)
    buffer = simpo.ReplayBuffer(1_000_000, obs_dim, action_dim, device)
    buffer.rows.normal_()  # full, as at the end of a run
    policy = simpo.DiffusionPolicy(obs_dim, action_dim, args.hidden_dim, args.solver, args.diffusion_steps).to(device)
    generator, obs = torch.Generator(device).manual_seed(0), torch.tensor(envs.reset(seed=0)[0]).float().to(device)

    def act():
        envs.step(policy.sample(obs, 1, generator)[:, 0].cpu().numpy())

    acting = milliseconds(act, device, args.repeats)  # five environments at once, so the five steps of one update
    parts, bound = measure(args, obs_dim, action_dim)
    update = sum(parts.values())
    for name, value in {"5 environment steps": acting, **parts, "all parts": update}.items():
        print(f"{name:32s} {value:8.2f} ms")
    print(f"{'its hidden products alone':32s} {bound:8.2f} ms, measured on this machine just before")
    print(f"{'share of that peak':32s} {bound / update:8.0%}")
    print(f"{'environment steps':32s} {5e3 / (acting + update):8.1f} per second of training")
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2 ** (30 if sys.platform == "darwin" else 20)  # GiB
    print(f"{'peak memory':32s} {memory:8.2f} GiB, with a full buffer of 1M transitions", end="")
    print(f"; on the GPU {torch.cuda.max_memory_allocated() / 2**30:.2f} GiB" if device.type == "cuda" else "")
