"""The classic baselines: the frame that they get, their evaluation beside simpo_neg.py's, and the files of a run."""

import csv
import json
import sys
from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import ROOT
from stable_baselines3.common.vec_env import DummyVecEnv

import simpo_neg

sys.path.append(str(ROOT / "benchmark"))
from classic import Args, evaluate, make_model

gym.logger.min_level = gym.logger.ERROR
SMALL = ["--env-id", "small_envs:PointMass-v0", "--hidden-dim", "16", "--batch-size", "16", "--eval-episodes", "3"]


def rule(obs):
    """Some way to act, (N, 1) -> (N, 1): half of the way to 0, as far as the action reaches."""
    return np.clip(-obs / 0.8, -1, 1).astype(np.float32)


@pytest.mark.parametrize("env_id", ["small_envs:PointMass-v0", "small_envs:RandomLength-v0"])
def test_evaluation_is_that_of_simpo(env_id):
    """Same starts, same ends, same returns, when both act by one rule."""
    policy = SimpleNamespace(sample=lambda obs, draws, generator: torch.tensor(rule(obs.numpy()))[:, None])
    critic = lambda obs, action: torch.zeros(2, *action.shape[:2])  # noqa: E731
    ours = simpo_neg.Args(env_id=env_id, seed=7, eval_episodes=6, eval_draws=1, device="cpu")
    returns = evaluate(rule, Args(env_id=env_id, seed=7, eval_episodes=6, device="cpu"))
    np.testing.assert_array_equal(returns, simpo_neg.evaluate(policy, critic, ours))
    assert len(set(returns)) > 2


@pytest.mark.parametrize("algo", ["sac", "td3"])
@pytest.mark.parametrize("steps_per_update, updates", [(5, 40), (1, 200), (10, 20)])
def test_updates_per_step_and_networks(algo, steps_per_update, updates):
    """After 100 random steps, 200 environment steps bring 200 / steps_per_update updates."""
    args = Args(algo=algo, env_id="small_envs:PointMass-v0", steps_per_update=steps_per_update, device="cpu")
    args.hidden_dim, args.batch_size, args.learning_starts = 8, 4, 100
    model = make_model(args, DummyVecEnv([lambda: simpo_neg.make_env(args, training=True)] * 5))
    model.learn(300)
    assert model._n_updates == updates
    layers = [layer for layer in model.critic.qf0 if isinstance(layer, torch.nn.Linear)]
    assert [layer.out_features for layer in layers] == [8, 8, 8, 1]
    assert any(isinstance(layer, torch.nn.Mish) for layer in model.critic.qf0)


def test_settings_are_those_of_the_frame():
    envs = DummyVecEnv([lambda: simpo_neg.make_env(simpo_neg.Args(env_id="small_envs:PointMass-v0"))] * 5)
    sac, td3, ppo = (make_model(Args(algo=algo, seed=7, device="cpu"), envs) for algo in ("sac", "td3", "ppo"))
    assert [x.seed for x in (sac, td3, ppo)] == [7, 7, 7]
    assert all((x.gamma, x.learning_rate, x.batch_size) == (0.99, 3e-4, 256) for x in (sac, td3, ppo))
    assert all((x.tau, x.learning_starts, x.buffer_size) == (0.005, 5_000, 1_000_000) for x in (sac, td3))
    assert td3.action_noise._sigma.tolist() == [0.1] and (ppo.n_steps, ppo.n_epochs) == (819, 10)


@pytest.mark.parametrize("algo", ["sac", "td3", "ppo", "random"])
def test_a_run_has_its_flags_and_its_evaluations(run_script, algo):
    flags = ["--algo", algo, "--total-timesteps", "250", "--learning-starts", "50", "--eval-every", "100"]
    run_dir = run_script("benchmark/classic", *SMALL, *flags)
    with open(run_dir / "eval.csv") as file:
        rows = list(csv.DictReader(file))
    assert [row["step"] for row in rows] == ["100", "200", "250"]
    for row in rows:
        returns = [float(x) for x in row["returns"].split()]
        assert len(returns) == 3 and np.mean(returns) == pytest.approx(float(row["mean"]), abs=0.01)
    assert json.loads((run_dir / "args.json").read_text())["algo"] == algo
    if algo == "random":  # from the whole range of actions
        args, rng = Args(env_id=SMALL[1], eval_episodes=3, device="cpu"), np.random.default_rng(1)
        expected = evaluate(lambda obs: rng.uniform(-1, 1, (3, 1)).astype(np.float32), args).mean()
        assert float(rows[0]["mean"]) == pytest.approx(expected, abs=1e-3)


def test_training_has_the_landscape_and_evaluation_has_not(run_script, monkeypatch):
    asked, make_env = [], simpo_neg.make_env
    monkeypatch.setattr(
        simpo_neg, "make_env", lambda args, training=False: asked.append(training) or make_env(args, training)
    )
    run_script("benchmark/classic", *SMALL, "--algo", "random", "--total-timesteps", "10")
    assert asked == [True] * 5 + [False] * 3  # environments of training, episodes of the evaluation


def test_sac_learns_the_point_mass(run_script):
    """Standing still returns -10/3; what acts well, above -1."""
    flags = ["--total-timesteps", "1500", "--learning-starts", "200", "--steps-per-update", "1", "--eval-every", "1500"]
    run_dir = run_script("benchmark/classic", *SMALL, *flags)
    with open(run_dir / "eval.csv") as file:
        (row,) = csv.DictReader(file)
    assert float(row["mean"]) > -1.0


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--batch-size", "0"], "--batch-size must be at least 1; got 0"),
        (["--landscape-c", "nan"], "--landscape-c must be above 0 and finite; got nan"),
        (["--steps-per-update", "3"], "--num-envs must be a multiple of --steps-per-update, or the other way round"),
        (["--reward-landscape", "exp"], "--reward-landscape is for --env-id dm_control/cheetah-run-v0 or"),
        (["--device", "cuda:99"], "--device cuda:99: "),
    ],
)
def test_bad_input_is_one_line(run_script, flags, message):
    with pytest.raises(SystemExit, match=message) as stopped:
        run_script("benchmark/classic", *SMALL, *flags)
    assert "\n" not in str(stopped.value)
