"""Without a flag, each script runs with the paper's settings, and the README's choices where the paper has none."""

import importlib
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import ROOT

PAPER = dict(  # the table of appendix F, section 4, and K and delta of section 6
    **dict(critic_lr=3e-4, policy_lr=3e-4, policy_lr_end=3e-5, hidden_dim=256, buffer_size=10**6, num_envs=5),
    **dict(total_timesteps=10**6, steps_per_update=5, eval_episodes=20, num_particles=32, target_kl=1.5),
)
AUTHORS = dict(  # what the paper leaves open, as in the authors' code at bae22f4
    **dict(batch_size=256, discount=0.99, tau=0.005, old_policy_interval=1000, particle_noise=0.2, error_clip=5.0),
    **dict(eval_draws=10),
)
OURS = dict(
    **dict(solver="dpm", temperature=0.0, temperature_lr=3e-3, learning_starts=5000),
    **dict(reward_landscape="native", landscape_c=3.0),
)
VARIANT = {"simpo_exp": {}, "simpo_power": dict(power=1.0), "simpo_neg": dict(power=1.0, epsilon=0.5)}
ORIGINALS = {  # of the baselines: the originals' settings, but for what the top of each script names
    "qvpo": dict(weights="adv", num_particles=64, kept_draws=1, uniform_actions=10, entropy_weight=0.02)
    | dict(entropy_weight_end=0.002, action_draws=4, max_grad_norm=2.0, eval_draws=32, solver="dpm"),
    "qsm": dict(temperature=0.1, q_scale=0.0, exploration_noise=0.1, eval_draws=10, solver="ddpm"),
    "sdac": dict(num_particles=500, temperature=0.05, eval_draws=10, solver="dpm"),
    "dipo": dict(action_steps=20, action_lr=0.03, action_grad_norm=0.1, write_back=True, max_grad_norm=2.0)
    | dict(eval_draws=1, solver="dpm"),
    "dacer": dict(alpha=3.0, alpha_lr=0.03, alpha_interval=1000, target_entropy=-0.9, entropy_draws=200)
    | dict(noise_scale=0.15, reward_scale=0.2, policy_delay=2, eval_draws=1, solver="dpm"),
    "dppo": dict(rollout_steps=1000, num_epochs=10, batch_size=5000, clip_range=0.1, max_kl=1.0, gae_lambda=0.95)
    | dict(denoising_discount=1.0, min_std=0.1, diffusion_steps=20, policy_lr=1e-4, critic_lr=1e-3),
}


@pytest.mark.parametrize("script", ORIGINALS)
def test_defaults_of_the_baselines(script):
    args = vars(importlib.import_module(f"baselines.{script}").Args())
    assert {name: args[name] for name in ORIGINALS[script]} == ORIGINALS[script]


@pytest.mark.parametrize("script", VARIANT)
def test_defaults(script):
    expected = PAPER | AUTHORS | OURS | VARIANT[script]
    args = importlib.import_module(script).Args()
    args.check()
    assert {name: vars(args)[name] for name in expected} == expected


@pytest.mark.parametrize("script", [*VARIANT, *(f"baselines.{name}" for name in ORIGINALS)])
def test_nothing_is_compiled_without_a_compiler_or_pythons_headers(script, tmp_path):
    fake = "import sysconfig, sys; sysconfig.get_path = lambda name: sys.argv[1]"
    code = f"{fake}; from {script} import Args; print(Args().compile)"

    def default(headers, compiler):
        command, environment = [sys.executable, "-c", code, headers], {"CXX": compiler, "PATH": ""}
        return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True).stdout.strip()

    (tmp_path / "Python.h").touch()
    compiler = shutil.which("true")
    assert default(tmp_path, compiler) == "True"
    assert default(tmp_path / "none", compiler) == default(tmp_path, "none") == "False"


@pytest.mark.parametrize("solver, steps", [("dpm", 8), ("ddpm", 20)])  # 20 are the paper's
def test_network_calls_of_a_draw(solver, steps, monkeypatch):
    args, calls = importlib.import_module("simpo_neg").Args(solver=solver), []
    policy = importlib.import_module("simpo_neg").DiffusionPolicy(3, 2, 8, solver, args.diffusion_steps)
    velocity = policy.velocity
    monkeypatch.setattr(policy, "velocity", lambda *inputs: calls.append(1) or velocity(*inputs))
    policy.sample(torch.zeros(4, 3), 5, torch.Generator())
    assert len(calls) == policy.steps == steps
