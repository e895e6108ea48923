"""Compiled is what eager is; bfloat16 changes draws and losses by no more than its rounding, and where it is chosen."""

import copy
import csv
import runpy

import pytest
import torch
from conftest import ROOT, SMALL
from test_weights import DEVICES

import simpo_neg

DTYPES = ["float32", "bfloat16"]


@torch._inductor.config.patch(cpp_wrapper=True)  # as the scripts have it on a CPU
@pytest.mark.parametrize("solver", ["dpm", "ddpm"])
def test_compiled_and_eager_agree(solver):
    torch.manual_seed(0)
    policy, critic = simpo_neg.DiffusionPolicy(3, 2, 16, solver, 4), simpo_neg.Critic(3, 2, 16)
    obs, action, noise = torch.randn(8, 3), torch.rand(8, 4, 2), torch.randn(8, 4, 2)
    weights, t = torch.randn(8, 4), torch.randint(4, (8, 4))
    results = []
    for stance in ("default", "force_eager"):
        torch.compiler.set_stance(stance)
        draws = policy.sample(obs, 4, torch.Generator().manual_seed(1))
        result = [draws]
        if solver == "dpm":  # the rest does not depend on it
            loss = policy.loss(obs, action, weights, t, noise, 5.0)
            gradients = torch.autograd.grad(loss, list(policy.parameters()))
            reweight = torch.compile(simpo_neg.reweight, dynamic=False)
            result += [loss, *gradients, critic(obs, action), *reweight(weights, torch.tensor(0.1), 1.0, 0.5)]
        results.append(result)
    for compiled, eager in zip(*results, strict=True):
        torch.testing.assert_close(compiled, eager, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("size", [0.0, 2000.0])
def test_bfloat16_draws_and_losses_follow_float32_ones(size):
    """Observations of 2,000 keep what tells them apart: bfloat16 would round them to multiples of 8."""
    torch.manual_seed(0)
    single, obs = simpo_neg.DiffusionPolicy(3, 2, 64, "dpm", 8), torch.randn(64, 3)
    first = single.layers[0]
    with torch.no_grad():
        first.weight[:, 2:5] *= 9  # so that the draws depend on the state
        single.layers[-1].weight *= 3
        first.bias -= size * first.weight[:, 2:5].sum(1)  # as a network that has learned to look at what differs
    half = copy.deepcopy(single)
    half.dtype = torch.bfloat16
    action, noise, weights = torch.rand(64, 4, 2), torch.randn(64, 4, 2), torch.randn(64, 4)
    t = torch.arange(256).view(64, 4) % 8
    draws, losses = [], []
    for policy, states in [(single, obs), (half, obs), (single, obs.roll(1, 0))]:
        draws.append(policy.sample(states + size, 32, torch.Generator().manual_seed(1)))
        losses.append(policy.loss(states + size, action, weights, t, noise, 5.0))
    assert draws[1].dtype == torch.float32 and losses[1].dtype == torch.float32
    assert 0 < (draws[0] - draws[1]).abs().mean() < 0.002 < 0.1 < (draws[0] - draws[2]).abs().mean()
    assert 0 < (losses[0] - losses[1]).abs() < 0.001 < 0.01 < (losses[0] - losses[2]).abs()


def test_policy_dtype_reaches_the_policy(run_script):
    flags = ["--env-id", "small_envs:PointMass-v0", *SMALL, *"--learning-starts 95 --total-timesteps 100".split()]
    files = [run_script("simpo_neg", *flags, "--policy-dtype", name) / "checkpoint.pt" for name in DTYPES]
    single, half = (torch.load(file, weights_only=True)["policy"] for file in files)
    assert any(not torch.equal(single[name], half[name]) for name in single)


@pytest.mark.parametrize("script", ["simpo_neg.py", "dna_finetune.py"])
@pytest.mark.parametrize(
    "cpu, dtype",
    [
        (dict(cpu_name="AMD EPYC 9R14", avx512_bf16=True, amx_bf16=False), "bfloat16"),
        (dict(cpu_name="AMD EPYC 7763", avx512_bf16=False, amx_bf16=False), "float32"),
        (dict(cpu_name="Intel Xeon", avx512_bf16=True, amx_bf16=False), "float32"),  # there bfloat16 is slower
        (dict(cpu_name="Intel Xeon", avx512_bf16=True, amx_bf16=True), "bfloat16"),
        (dict(cpu_name="Apple M4", bf16=True), "float32"),
    ],
)
def test_the_default_is_bfloat16_where_it_is_faster(monkeypatch, script, cpu, dtype):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: cpu)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    args = runpy.run_path(str(ROOT / script))["Args"]
    assert dtype == (args.policy_dtype if script == "simpo_neg.py" else args.sampling_dtype)


@pytest.mark.parametrize("device", DEVICES)
def test_a_run_of_default_precision_goes_on_and_is_evaluated_on_a_cpu(run_script, device):
    """Compiled on a GPU, where this is the only test of a whole run."""
    flags = "--env-id small_envs:PointMass-v0 --hidden-dim 32 --learning-starts 100 --eval-every 100 --eval-episodes 5"
    flags = [*flags.split(), "--device", device, "--compile" if device == "cuda" else "--no-compile"]
    run_dir = run_script("simpo_neg", *flags, "--total-timesteps", 200)
    run_script("simpo_neg", "--resume", run_dir.resolve(), "--total-timesteps", 300)
    with open(run_dir / "eval.csv") as file:
        assert [row["step"] for row in csv.DictReader(file)] == ["100", "200", "300"]
    with pytest.raises(SystemExit) as end:
        run_script("simpo_neg", "--evaluate", run_dir.resolve(), "--device", "cpu", "--policy-dtype", "float32")
    assert not end.value.code
