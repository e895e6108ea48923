"""Evaluation: the critics' favourite of some draws, all episodes whole, its files, --evaluate, and nothing else."""

import csv
import json
import runpy
import sys
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import ROOT, SMALL
from PIL import Image

import simpo_neg

FLAGS = ["--env-id", "small_envs:PointMass-v0", *SMALL, "--learning-starts", "100", "--total-timesteps", "400"]


def read_eval(run_dir):
    with open(run_dir / "eval.csv") as file:
        return [{k: x if k == "returns" else float(x) for k, x in row.items()} for row in csv.DictReader(file)]


def test_takes_the_draw_that_both_critics_like():
    """Draws are -1, 0 and 1; one twin knows that x + 0.4 a should be near 0, the other overestimates, most of all 1."""

    class Policy:
        def sample(self, obs, num_actions, generator):
            assert num_actions == 7  # eval_draws
            return torch.tensor([-1.0, 0.0, 1.0])[None, :, None].expand(len(obs), 3, 1)

    def critic(obs, action):
        knows = -((obs[:, None] + 0.4 * action) ** 2)[..., 0]
        return torch.stack([knows, 100.0 * (action[..., 0] == 1)])

    args = simpo_neg.Args(env_id="small_envs:PointMass-v0", device="cpu", eval_episodes=50, eval_draws=7)
    returns = simpo_neg.evaluate(Policy(), critic, args)
    # From |x| <= 1 the best of the three brings x to within 0.2 in at most two steps and keeps it there.
    assert returns.shape == (50,) and returns.min() > -(0.6**2) - 9 * 0.2**2 - 1e-6
    assert len(np.unique(returns)) == 50


def test_starts_and_draws_are_the_same_each_time_and_not_those_of_training():
    seen = []

    class Policy:
        def sample(self, obs, num_actions, generator):
            seen.append((obs, generator.initial_seed()))
            return torch.zeros(len(obs), 1, 1)

    args = simpo_neg.Args(env_id="small_envs:PointMass-v0", device="cpu", eval_episodes=3, eval_draws=1, seed=7)
    for _ in range(2):
        simpo_neg.evaluate(Policy(), lambda obs, action: torch.zeros(2, *action.shape[:2]), args)
        obs, seed = seen.pop(0)
        starts = [simpo_neg.make_env(args).reset(seed=10_007 + i)[0] for i in range(3)]
        assert np.array_equal(obs, np.stack(starts)) and seed == 10_007
        seen.clear()


def test_evaluation_is_in_the_native_reward(monkeypatch):
    """Of 1,000 steps of DM Control the first; the policy trains on another reward, which is larger."""
    make_env, kinds = simpo_neg.make_env, []

    def one_step(args, training=False, video_folder=None):
        kinds.append(training)
        return gym.wrappers.TimeLimit(make_env(args, training, video_folder), 1)

    monkeypatch.setattr(simpo_neg, "make_env", one_step)
    policy = simpo_neg.DiffusionPolicy(17, 6, 8, "dpm", 3)
    args = simpo_neg.Args(env_id="dm_control/cheetah-run-v0", device="cpu", reward_landscape="sqrt", eval_episodes=2)
    simpo_neg.evaluate(policy, simpo_neg.Critic(17, 6, 8), args)
    assert kinds == [False, False]


class NaNLater(gym.Wrapper):
    """Pays NaN after the first episode."""

    resets = 0

    def reset(self, **kwargs):
        self.resets += 1
        return super().reset(**kwargs)

    def step(self, action):
        obs, reward, *ends = super().step(action)
        return obs, reward if self.resets < 2 else np.nan, *ends


def test_only_the_first_episode_of_each_environment_counts(monkeypatch):
    """TwoStates pays 1 in its second and last step, however long the others run, whatever comes then."""
    make_env = simpo_neg.make_env
    monkeypatch.setattr(simpo_neg, "make_env", lambda *args, **kwargs: NaNLater(make_env(*args, **kwargs)))

    class Policy:
        def sample(self, obs, num_actions, generator):
            return torch.zeros(len(obs), 1, 1)

    args = simpo_neg.Args(env_id="small_envs:Terminal-v0", device="cpu", eval_episodes=3)
    assert simpo_neg.evaluate(Policy(), lambda obs, action: torch.zeros(2, 3, 1), args).tolist() == [1, 1, 1]
    args = simpo_neg.Args(env_id="small_envs:RandomLength-v0", device="cpu", eval_episodes=40)
    returns = simpo_neg.evaluate(Policy(), lambda obs, action: torch.zeros(2, 40, 1), args)
    assert set(returns) == set(range(1, 10))  # its return is its length


def test_evaluation_leaves_training_unchanged_and_seeds_decide(run_script):
    runs = [run_script("simpo_neg", *FLAGS, "--seed", seed, "--eval-every", n) for seed, n in [(1, 0), (1, 50), (2, 0)]]
    first, evaluated, other_seed = (torch.load(run / "checkpoint.pt", weights_only=True) for run in runs)
    for name in ("policy", "critic"):
        for key, value in first[name].items():
            assert torch.equal(value, evaluated[name][key]), key
        assert any(not torch.equal(value, other_seed[name][key]) for key, value in first[name].items())
    assert torch.equal(first["rows"], evaluated["rows"]) and torch.equal(first["generator"], evaluated["generator"])
    assert [row["step"] for row in read_eval(runs[1])] == list(range(50, 401, 50))
    assert not (runs[0] / "eval.csv").exists()


def test_files_and_evaluate_again(run_script, capsys):
    run_dir = run_script("simpo_neg", *FLAGS, "--eval-every", 150, "--old-policy-interval", 7)
    rows = read_eval(run_dir)
    assert [row["step"] for row in rows] == [150, 300, 400]  # and one at the end
    assert list(rows[0]) == ["step", "mean", "std", "seconds", "returns"]
    returns = np.array(rows[-1]["returns"].split(), float)
    assert len(returns) == 5 and rows[0]["seconds"] < rows[-1]["seconds"]
    assert [rows[-1]["mean"], rows[-1]["std"]] == pytest.approx([returns.mean(), returns.std()], abs=0.01)
    picture = np.asarray(Image.open(run_dir / "learning_curve.png"))
    assert picture.std() > 10  # not blank
    assert json.loads((run_dir / "args.json").read_text())["old_policy_interval"] == 7
    files = {path: path.read_bytes() for path in run_dir.iterdir()}
    capsys.readouterr()
    for flags, mean in [([], rows[-1]["mean"]), (["--eval-draws", "1", "--seed", "5"], None)]:
        with pytest.raises(SystemExit) as end:
            run_script("simpo_neg", "--evaluate", run_dir, *flags)
        out = capsys.readouterr().out
        assert not end.value.code and len(out.splitlines()) == 1 and "5 episodes" in out
        assert (f"return {rows[-1]['mean']:.1f} +- {rows[-1]['std']:.1f}" in out) == (mean is not None)
    assert files == {path: path.read_bytes() for path in run_dir.iterdir()}


def test_a_video_of_the_first_episode(run_script, monkeypatch):
    run_dir = run_script("simpo_neg", *FLAGS, "--total-timesteps", 10)
    with pytest.raises(SystemExit) as end:
        run_script("simpo_neg", "--evaluate", run_dir, "--capture-video")
    assert not end.value.code
    (video,) = (run_dir / "videos").glob("*.mp4")
    assert video.stat().st_size > 500
    monkeypatch.setitem(sys.modules, "moviepy", None)  # makes its import fail
    with pytest.raises(SystemExit, match="--env-id small_envs:PointMass-v0: MoviePy is not installed"):
        run_script("simpo_neg", "--evaluate", run_dir, "--capture-video")


def test_a_checkpoint_of_one_solver_draws_with_the_other(run_script, capsys):
    """The network is the same; --resume refuses it, because training goes on at other times."""
    run_dir = run_script("simpo_neg", *FLAGS, "--total-timesteps", 10)
    with pytest.raises(SystemExit) as end:
        run_script("simpo_neg", "--evaluate", run_dir, "--solver", "ddpm", "--diffusion-steps", 20)
    assert not end.value.code and "5 episodes" in capsys.readouterr().out


def test_what_is_published_evaluates_alike(run_script, monkeypatch, capsys):
    """benchmark/publish.py leaves the policy and the critics; its film, which needs a renderer, is left out here."""
    run_dir = run_script("simpo_neg", *FLAGS, "--eval-every", 400)
    monkeypatch.setattr(sys, "argv", ["publish.py", str(run_dir), "small", "--seconds", "0"])
    runpy.run_path(str(ROOT / "benchmark/publish.py"), run_name="__main__")
    published = Path("small").resolve()
    assert (published / "checkpoint.pt").stat().st_size < 0.7 * (run_dir / "checkpoint.pt").stat().st_size
    capsys.readouterr()
    with pytest.raises(SystemExit, match=f"{published} has no replay buffer"):
        run_script("simpo_neg", "--resume", published)
    with pytest.raises(SystemExit):
        run_script("simpo_neg", "--evaluate", published)
    assert f"return {read_eval(run_dir)[-1]['mean']:.1f} +- " in capsys.readouterr().out
