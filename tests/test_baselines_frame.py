"""The baselines keep the frame of simpo_neg.py to the letter, and stop, go on and are evaluated as it is."""

import ast
import copy
import math
import re
import signal

import gymnasium as gym
import pytest
import torch
from conftest import ROOT
from small_envs import PointMass
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

SCRIPTS = [f"baselines/{name}" for name in ("qvpo", "qsm", "sdac", "dipo", "dacer")]
FRAME = "simpo_neg"
OWN_METHODS = {"Critic": {"dacer"}, "DiffusionPolicy.loss": {"qsm", "dacer"}}  # those with another or none
OWN_DEFAULTS = {"eval_draws": {"qvpo", "dipo", "dacer"}, "solver": {"qsm"}}

SMALL = "--no-compile --device cpu --policy-dtype float32 --hidden-dim 32 --diffusion-steps 5 --batch-size 32"
SMALL = [*SMALL.split(), *"--log-every 100 --eval-episodes 5 --eval-draws 1 --env-id small_envs:PointMass-v0".split()]
FAST = "--total-timesteps 1000 --learning-starts 200 --steps-per-update 2 --eval-every 1000 --discount 0.9 --tau 0.02"
FAST = [*SMALL, *FAST.split(), *"--policy-lr 2e-3 --policy-lr-end 2e-3 --critic-lr 2e-3".split()]


# Two updates whose random numbers a test can draw again and do the rest by hand.
HAND = "--env-id small_envs:TwoEnds-v0 --learning-starts 35 --total-timesteps 45 --eval-every 0 --tau 0.3"
HAND = [*SMALL, *HAND.split(), *"--policy-lr 0.1 --policy-lr-end 0.01 --critic-lr 0.02 --log-every 5".split()]


class ByHand:
    """The networks, optimisers and generator of a run with the flags HAND, where its first update begins."""

    def __init__(self, module, run_dir, solver="dpm", eps=1e-8):
        self.losses, self.logged = {}, EventAccumulator(str(run_dir)).Reload()
        self.result = torch.load(run_dir / "checkpoint.pt", weights_only=True)
        seed = self.result["args"]["seed"]
        torch.manual_seed(20_000 + seed)
        self.policy, self.critic = module.DiffusionPolicy(3, 2, 32, solver, 5), module.Critic(3, 2, 32)
        self.policy_target, self.critic_target = copy.deepcopy(self.policy), copy.deepcopy(self.critic)
        self.policy_adam = torch.optim.Adam(self.policy.parameters(), eps=eps)
        self.critic_adam = torch.optim.Adam(self.critic.parameters(), 0.02, eps=eps)
        self.generator = torch.Generator().manual_seed(seed)
        self.rows = self.result["rows"]
        terminated, truncated = (self.rows[:, 3 + i] > 0.4 for i in (0, 1))  # TwoEnds
        assert torch.equal(self.rows[:, -1], terminated.float()) and (truncated & ~terminated).any() and any(terminated)
        random_actions = [2 * torch.rand(5, 2, generator=self.generator) - 1 for _ in range(7)]
        torch.testing.assert_close(self.rows[:35, 6:8], torch.cat(random_actions))

    def act(self, global_step, choose):
        """The five actions of this step are those that choose(obs) draws."""
        self.now = global_step
        rows = self.rows[global_step - 5 : global_step]
        torch.testing.assert_close(rows[:, 6:8], choose(rows[:, :3]).detach(), rtol=1e-3, atol=1e-4)

    def batch(self):
        """32 of the transitions so far: obs, next_obs, action, reward, terminated, and their rows."""
        where = torch.randint(self.now, (32,), generator=self.generator)
        obs, next_obs, action, reward, terminated = self.rows[where].split([3, 3, 2, 1, 1], dim=1)
        return obs, next_obs, action, reward[:, 0], terminated[:, 0], where

    def randn(self, *shape):
        return torch.randn(*shape, generator=self.generator)

    def step(self, module, adam, loss, max_norm=torch.inf):
        self.losses["loss/critic" if module is self.critic else "loss/policy"] = loss.item()
        if module is self.policy:
            adam.param_groups[0]["lr"] = 0.1 - 0.09 * self.now / 45
        adam.zero_grad()
        loss.backward()
        norm = torch.cat([x.grad.flatten() for x in module.parameters() if x.grad is not None]).norm()
        assert norm > max_norm or max_norm == torch.inf
        for x in module.parameters():
            x.grad *= min(1, max_norm / norm)
        adam.step()

    def critic_step(self, obs, action, target, max_norm=torch.inf):
        first, second = self.critic(obs, action[:, None])[..., 0]
        loss = ((first - target) ** 2).mean() / 2 + ((second - target) ** 2).mean() / 2
        self.step(self.critic, self.critic_adam, loss, max_norm)

    def follow(self, target, online):
        for x, y in zip(target.state_dict().values(), online.state_dict().values(), strict=True):
            x.copy_(0.7 * x + 0.3 * y)

    def compare(self, *parts, policy_loss=True):
        """All that the run has in the end, and its last losses, which show more of the targets than Adam's steps."""
        for name, tolerance in [("loss/critic", 1e-5), ("loss/policy", 1e-3 if policy_loss else math.inf)]:
            assert self.logged.Scalars(name)[-1].value == pytest.approx(self.losses[name], rel=tolerance), name
        for part in parts:
            for name, x in getattr(self, part).state_dict().items():
                torch.testing.assert_close(
                    self.result[part][name], x, rtol=1e-3, atol=1e-4, msg=lambda m, n=f"{part} {name}": f"{n}: {m}"
                )


def read(script):
    return (ROOT / f"{script}.py").read_text()


def definitions(script):
    """Name -> text of the functions and classes; of DiffusionPolicy, of its methods."""
    text, found = read(script), {}
    for node in ast.parse(text).body:
        if isinstance(node, ast.ClassDef) and node.name == "DiffusionPolicy":
            found |= {f"DiffusionPolicy.{x.name}": ast.unparse(x) for x in node.body if isinstance(x, ast.FunctionDef)}
        elif isinstance(node, ast.ClassDef | ast.FunctionDef):
            start = min([node.lineno] + [decorator.lineno for decorator in node.decorator_list])
            found[node.name] = text.splitlines()[start - 1 : node.end_lineno]
    return found


def fields(script):
    """Name -> the line of Args without the default, and the default."""
    lines = re.findall(r"^    (\w+): (.*?) = (.*?)  # (.*)$", read(script), flags=re.M)
    return {name: ((kind, meaning), default) for name, kind, default, meaning in lines}


def main_blocks(script):
    """The parts of the main that have nothing to do with the algorithm, and what comes before Args."""
    between = [
        ("# What a flag's value must be", "@dataclass"),
        ("# Arguments. --resume", "# The machine."),
        ("# The machine.", "# Environments, networks"),
        ("obs_dim, action_dim = envs", "critic = Critic"),
        ("def reset(which)", "# Replay buffer."),
        ("generator.set_state(saved", "if not np.array_equal(obs, saved"),
        ("# The run's directory and logs.", "state = {name"),
        ("# Evaluate, when due", "# Act with"),
        ("next_obs, reward, terminated, truncated, infos", "buffer.add("),
        ("obs, done = next_obs", "# Critics:"),
        ("progress.update", "for name, value in {"),
        ('"speed/steps_per_second"', None),
    ]
    text = read(script)
    return [text[text.index(start) : text.index(end, text.index(start)) if end else None] for start, end in between]


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_frame_is_simpo_negs_to_the_letter(script):
    name = script.split("/")[1]
    frame, ours = definitions(FRAME), definitions(script)
    for block in frame.keys() - {"Args", "reweight", "kl"}:
        if name not in OWN_METHODS.get(block, ()):
            assert ours[block] == frame[block], block
    for here, there in zip(main_blocks(script), main_blocks(FRAME), strict=True):
        assert [line for line in here.splitlines() if "improved" not in line] == there.splitlines()  # that is DIPO's
    own = read(FRAME).split("    # SiMPO\n")[1].split("    # diffusion")[0]
    for field, (meaning, default) in fields(FRAME).items():
        if f"    {field}: " not in own:
            assert fields(script)[field][0] == meaning or name in OWN_DEFAULTS.get(field, ()), field
            assert fields(script)[field][1] == default or name in OWN_DEFAULTS.get(field, ()), field
    assert len(read(script).splitlines()) <= 560


class Interrupted(PointMass):
    """Asks the process to stop at the 400th step of all environments."""

    left = 400

    def step(self, action):
        Interrupted.left -= 1
        if Interrupted.left == 0:
            signal.raise_signal(signal.SIGTERM)
        return super().step(action)


gym.register("Interrupted-v0", Interrupted)


@pytest.mark.parametrize("script", SCRIPTS)
def test_resume_is_bit_for_bit_and_evaluate_agrees(run_in, capsys, script):
    flags = [*SMALL, "--env-id", "Interrupted-v0", *"--learning-starts 350 --total-timesteps 450".split()]
    flags += ["--alpha-interval", "3"] if "dacer" in script else []  # so that alpha's Adam has a state
    Interrupted.left = 10**9
    whole, code = run_in("whole", script, *flags)
    assert code is None
    Interrupted.left = 400
    stopped, code = run_in("stopped", script, *flags)
    assert code == 128 + signal.SIGTERM
    first, code = run_in("stopped", script, "--resume", stopped, "--no-compile")
    assert code is None and first == stopped
    expected, state = (torch.load(run / "checkpoint.pt", weights_only=True) for run in (whole, stopped))
    assert state["num_updates"] == 20 and expected.keys() == state.keys()
    for name in expected.keys() - {"script", "args", "seconds", "evaluations"}:
        torch.testing.assert_close(state[name], expected[name], rtol=0, atol=0)
    capsys.readouterr()
    _, code = run_in("stopped", script, "--evaluate", stopped)
    assert code is None and f"return {state['evaluations'][-1]['mean']:.1f} +- " in capsys.readouterr().out


@pytest.mark.parametrize("script", SCRIPTS)
def test_bad_flags_get_one_line(run_script, script):
    for flag, value in [("--discount", 1.5), ("--num-envs", 0), ("--env-id", "Nowhere-v0"), ("--diffusion-steps", 2)]:
        with pytest.raises(SystemExit) as end:
            run_script(script, "--solver", "dpm", "--total-timesteps", 1, "--eval-every", 0, flag, value)
        assert flag in end.value.code and len(end.value.code.splitlines()) == 1
    assert not list((ROOT / "runs").glob("*Nowhere*"))
