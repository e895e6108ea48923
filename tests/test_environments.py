"""Environments: the landscapes of appendix F.2 in training only, actions within bounds, episodes that differ."""

from pathlib import Path
from types import SimpleNamespace

import gymnasium as gym
import mujoco
import numpy as np
import pytest
import small_envs
import torch
from conftest import SMALL

import simpo_neg


@pytest.mark.parametrize("task, target, speed", [("cheetah", 10, "speed"), ("walker", 8, "horizontal_velocity")])
def test_reward_landscapes(task, target, speed):
    """From flat to steep, on the real tasks; evaluation is in the native reward."""
    expected = {
        "sqrt": lambda z: z**0.5,
        "linear": lambda z: z,
        "square": lambda z: z * z,
        "exp": lambda z: (np.exp(3 * z) - 1) / (np.exp(3) - 1),
    }
    env_id = f"dm_control/{task}-run-v0"
    native = simpo_neg.make_env(simpo_neg.Args(env_id=env_id), training=True)
    for landscape, shape in expected.items():
        args = simpo_neg.Args(env_id=env_id, reward_landscape=landscape)
        shaped, evaluated = simpo_neg.make_env(args, training=True), simpo_neg.make_env(args)
        first, *others = (env.reset(seed=0)[0] for env in (native, shaped, evaluated))
        assert all(np.array_equal(first, other) for other in others)
        rewards = []
        for _ in range(30):
            action = np.ones(native.action_space.shape, np.float32)
            rewards.append([env.step(action)[1] for env in (native, shaped, evaluated)])
            z = np.clip(getattr(shaped.unwrapped._env.physics, speed)() / target, 0, 1)
            assert rewards[-1][1] == pytest.approx(shape(z))
        rewards = np.array(rewards)
        assert rewards[:, 1].max() > 0 and np.array_equal(rewards[:, 0], rewards[:, 2])
        assert landscape == "linear" or not np.allclose(rewards[:, 1], rewards[:, 0])


def test_a_very_steep_landscape_is_still_from_0_to_1():
    args = simpo_neg.Args(env_id="dm_control/cheetah-run-v0", reward_landscape="exp", landscape_c=800)
    speeds = [-1.0, 0.0, 9.9, 10.0, 20.0]
    rewards = [simpo_neg.shaped_reward(SimpleNamespace(speed=lambda u=u: u), args) for u in speeds]
    assert rewards == pytest.approx([0, 0, np.exp(-8), 1, 1])


def test_actions_respect_the_bounds_of_the_environment():
    """[-1, 1] is mapped to the whole range, Humanoid's being 0.4."""
    env = simpo_neg.make_env(simpo_neg.Args(env_id="Humanoid-v4"), training=True)
    assert env.action_space.low.min() == -1 and env.action_space.high.max() == 1
    env.reset(seed=0)
    env.step(np.ones(17, np.float32))
    np.testing.assert_allclose(env.unwrapped.data.ctrl, 0.4)


def test_actions_at_the_bounds_are_within_them_to_the_last_bit():
    env = simpo_neg.make_env(simpo_neg.Args(env_id="small_envs:UnevenBounds-v0"))
    env.reset(seed=0)
    for action in np.linspace(-1, 1, 1001, dtype=np.float32):
        env.step(np.array([action]))  # asserts that they are


def test_observations_of_other_spaces_are_flattened():
    env = simpo_neg.make_env(simpo_neg.Args(env_id="small_envs:DiscreteObservations-v0"))
    for action in (1.0, -1.0):
        env.reset(seed=0)
        for _ in range(4):
            obs, *_ = env.step(np.array([action], np.float32))
        assert obs.tolist() == [action < 0, action > 0]  # one-hot


def test_every_episode_has_its_own_seed(run_script, monkeypatch):
    """Of the run's seed, the environment and the episode's number: all starts differ, and the same run has the same."""
    starts, reset = [], small_envs.PointMass.reset

    def recorded(self, **kwargs):
        result = reset(self, **kwargs)
        starts[-1].append(float(result[0][0]))
        return result

    monkeypatch.setattr(small_envs.PointMass, "reset", recorded)
    flags = ["--env-id", "small_envs:PointMass-v0", *SMALL, "--total-timesteps", 150, "--eval-every", 0]
    states = []
    for seed in (1, 1, 2):
        starts.append([])
        run_dir = run_script("simpo_neg", *flags, "--seed", seed)
        states.append(torch.load(run_dir / "checkpoint.pt", weights_only=True))
    assert starts[0] == starts[1] and len(set(starts[0] + starts[2])) == 2 * (5 + 15)  # 3 episodes of 10 steps and one
    obs, next_obs = states[0]["rows"][:, 0], states[0]["rows"][:, 1]
    ends = torch.arange(150).view(3, 10, 5)[:, -1]  # rows of the last steps, of 3 episodes of 5 environments
    within = torch.ones(150, dtype=bool).index_fill(0, ends.flatten(), False)
    assert torch.equal(next_obs[:-5][within[:-5]], obs[5:][within[:-5]])  # what follows within an episode
    assert not torch.isclose(next_obs[ends[:-1]], obs[ends[:-1] + 5]).any()  # the true last observation, then a start


@pytest.mark.parametrize(
    "env_id, follows", [("HalfCheetah-v4", True), ("dm_control/cheetah-run-v0", True), ("Reacher-v4", False)]
)
def test_videos_follow_in_real_time(env_id, follows, tmp_path):
    """Left alone, Gymnasium films HalfCheetah, and shimmy every task, by a camera that stays, shimmy at 10 frames/s."""
    env = simpo_neg.make_env(simpo_neg.Args(env_id=env_id), video_folder=str(tmp_path))
    frames, env = env.get_wrapper_attr("frames_per_sec"), env.unwrapped
    dt = env._env.control_timestep() if env_id.startswith("dm_control/") else env.dt
    assert frames * dt == pytest.approx(1)
    if env_id.startswith("dm_control/"):
        camera, model = env.render_kwargs["camera_id"], env._env.physics.model
    else:
        camera, model = env.mujoco_renderer.camera_id, env.model
    assert (camera >= 0 and model.cam_mode[camera] == mujoco.mjtCamLight.mjCAMLIGHT_TRACKCOM) == follows


def test_the_version_that_an_id_leaves_open_is_said_and_nothing_else(run_script, monkeypatch, recwarn):
    monkeypatch.setattr(gym.logger, "min_level", gym.logger.WARN)
    for env_id in ("HalfCheetah", "HalfCheetah-v4"):  # the paper's is outdated: that is known
        run_script("simpo_neg", "--env-id", env_id, *SMALL, "--total-timesteps", 5, "--eval-every", 0)
    said = {str(warning.message) for warning in recwarn if "WARN" in str(warning.message)}
    assert len(said) == 1 and "HalfCheetah-v5" in said.pop()


def test_mujoco_warns_of_what_matters_and_writes_no_log(recwarn):
    env = simpo_neg.make_env(simpo_neg.Args(env_id="HalfCheetah-v4"))
    assert not [warning for warning in recwarn if "deprecated" in str(warning.message)]
    env.reset(seed=0)
    env.unwrapped.data.qvel[:] = np.nan
    with pytest.warns(UserWarning, match="simulation is unstable"):
        env.step(env.action_space.sample())
    assert not Path("MUJOCO_LOG.TXT").exists()
