"""Milliseconds per update of simpo_neg.py and of its parts, beside what the machine's matrix products could do.

python benchmark/speed.py --env-id HalfCheetah-v4
"""

import copy
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import gymnasium as gym
import torch
import tyro

sys.path.insert(0, str(Path(__file__).parent.parent))
import simpo_neg as simpo


@dataclass
class Args:
    env_id: str = "HalfCheetah-v4"
    """sizes of observations and actions are taken from it"""
    num_particles: int = 32
    """K"""
    batch_size: int = 256
    """states per update"""
    diffusion_steps: int = 20
    """denoising steps"""
    device: str = "cpu"
    """cpu or cuda"""
    sampling_dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """precision of the network while actions are drawn"""
    repeats: int = 10
    """timed calls of each part; the median is printed"""


def milliseconds(function, device, repeats):
    """Median over `repeats` calls, after two that compile and warm up."""
    times = []
    for _ in range(repeats + 2):
        start = time.perf_counter()
        function()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(1e3 * (time.perf_counter() - start))
    return sorted(times[2:])[repeats // 2]


if __name__ == "__main__":
    args = tyro.cli(Args, description=__doc__)
    gym.logger.min_level = gym.logger.ERROR
    device, dtype = torch.device(args.device), getattr(torch, args.sampling_dtype)
    env = simpo.make_env(args.env_id)
    S, A, B, K, T, H = (
        env.observation_space.shape[0],
        env.action_space.shape[0],
        args.batch_size,
        args.num_particles,
        args.diffusion_steps,
        256,
    )
    rows, generator = B * K, torch.Generator(device).manual_seed(0)
    print(
        f"{args.env_id}: {B} states x {K} actions x {T} steps, {args.sampling_dtype}, {torch.get_num_threads()} threads"
    )

    def product(dtype):
        x, w = torch.randn(rows, H, device=device, dtype=dtype), torch.randn(H, H, device=device, dtype=dtype)
        return milliseconds(lambda: x @ w, device, 50)

    policy = simpo.DiffusionPolicy(S, A, H, T).to(device)
    old_policy = copy.deepcopy(policy).requires_grad_(False)
    critic = simpo.Critic(S, A, H).to(device)
    policy_optimizer = torch.optim.Adam(policy.parameters(), fused=True)
    critic_optimizer = torch.optim.Adam(critic.parameters(), fused=True)
    obs, target_q = torch.randn(B, S, device=device), torch.randn(2, B, device=device)
    particles = old_policy.sample(obs, K, generator, dtype)
    t = torch.randint(T, (B, K), device=device)
    noise = torch.randn(particles.shape, device=device)
    weights = torch.ones(B, K, device=device)

    @torch.no_grad()
    def values():
        return critic(obs, particles).mean(0)

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

    parts = {
        "act in 5 environments": lambda: policy.sample(obs[:5], 1, generator, dtype),
        "action of the Bellman target": lambda: policy.sample(obs, 1, generator, dtype),
        "critic step": critic_step,
        "draw K actions": lambda: old_policy.sample(obs, K, generator, dtype),
        "values of the K actions": values,
        "weights": lambda: simpo.reweight(values(), 1.0, 1.0, 0.5),
        "policy step": policy_step,
    }
    measured = {name: milliseconds(part, device, args.repeats) for name, part in parts.items()}
    measured["weights"] -= measured["values of the K actions"]
    for name, value in measured.items():
        print(f"{name:32s} {value:8.1f} ms")
    print(f"{'one update':32s} {sum(measured.values()):8.1f} ms")
    # Products of the two hidden layers alone: T steps of sampling; forward and twice that backward; two critics.
    single, sampling = product(torch.float32), product(dtype)
    bound = 2 * T * sampling + 6 * single + 4 * single
    print(f"{'its 256 x 256 products alone':32s} {bound:8.1f} ms, measured now on this machine")
