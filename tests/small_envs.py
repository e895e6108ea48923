"""Small environments with known answers; the scripts take them as --env-id small_envs:NAME."""

import gymnasium as gym
import numpy as np


class PointMass(gym.Env):
    """Drive x to 0: x' = x + a, |a| <= 0.4, reward -x'^2, 10 steps. Standing still returns -10/3 on average."""

    observation_space = gym.spaces.Box(-np.inf, np.inf, (1,))
    action_space = gym.spaces.Box(-0.4, 0.4, (1,))
    metadata = {"render_modes": ["rgb_array"], "render_fps": 10}

    def __init__(self, render_mode=None):
        self.render_mode = render_mode

    def render(self):
        return np.full((32, 32, 3), int(np.clip(100 * abs(self.x), 0, 255)), np.uint8)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.x, self.steps = self.np_random.uniform(-1, 1), 0
        return np.array([self.x], np.float32), {}

    def step(self, action):
        assert self.action_space.contains(np.asarray(action, np.float32)), action
        self.x, self.steps = self.x + float(action[0]), self.steps + 1
        return np.array([self.x], np.float32), -(self.x**2), False, self.steps == 10, {}


class TwoStates(gym.Env):
    """State 0 leads to state 1 with reward 0; state 1 stays, with reward 1; the episode ends after 2 steps.

    With discount g: Q(1) = 1/(1 - g), Q(0) = g/(1 - g) if the end is a time limit; Q(1) = 1, Q(0) = g if terminal.
    """

    observation_space = gym.spaces.Box(-1, 1, (1,))
    action_space = gym.spaces.Box(-1, 1, (1,))

    def __init__(self, terminal):
        self.terminal = terminal

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.state = 0
        return np.zeros(1, np.float32), {}

    def step(self, action):
        reward, end = float(self.state), self.state == 1
        self.state = 1
        return np.ones(1, np.float32), reward, end and self.terminal, end and not self.terminal, {}


class RandomLength(TwoStates):
    """Pays 1 in each step, and ends after 1 to 9 of them."""

    def __init__(self):
        pass

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.left = self.np_random.integers(1, 10)
        return np.zeros(1, np.float32), {}

    def step(self, action):
        self.left -= 1
        return np.zeros(1, np.float32), 1.0, self.left == 0, False, {}


class TwoEnds(gym.Env):
    """Three coordinates pushed by two actions; an end is terminal if x_0 > 0.4, a time limit if x_1 > 0.4, or both."""

    observation_space = gym.spaces.Box(-np.inf, np.inf, (3,))
    action_space = gym.spaces.Box(-1, 1, (2,))

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.x = self.np_random.uniform(-0.4, 0.4, 3).astype(np.float32)
        return self.x, {}

    def step(self, action):
        self.x = (0.9 * self.x + 0.4 * np.array([action[0], action[1], action[0] - action[1]])).astype(np.float32)
        return self.x, 10.0 * float(self.x[2] - action[1]), self.x[0] > 0.4, self.x[1] > 0.4, {}


class DiscreteActions(PointMass):
    action_space = gym.spaces.Discrete(2)


class DiscreteObservations(PointMass):
    """Shows only the sign of x."""

    observation_space = gym.spaces.Discrete(2)

    def reset(self, **options):
        return int(super().reset(**options)[0][0] > 0), {}

    def step(self, action):
        obs, *rest = super().step(action)
        return int(obs[0] > 0), *rest


class SequenceObservations(PointMass):
    observation_space = gym.spaces.Dict(a=gym.spaces.Sequence(gym.spaces.Discrete(3)))


class UnboundedActions(PointMass):
    action_space = gym.spaces.Box(-np.inf, np.inf, (1,))


class ManyUnboundedActions(PointMass):
    """Its observations and actions print as more than one line."""

    observation_space = gym.spaces.Box(-np.linspace(1, 2, 30, dtype=np.float32), np.inf)
    action_space = gym.spaces.Box(-np.linspace(1, 2, 30, dtype=np.float32), np.inf)


class MatrixActions(PointMass):
    action_space = gym.spaces.Box(-1, 1, (2, 2))


class FlatActions(PointMass):
    action_space = gym.spaces.Box(np.array([-1, 0.5], np.float32), np.array([1, 0.5], np.float32))


class IntegerActions(PointMass):
    action_space = gym.spaces.Box(-3, 5, (1,), np.int32)


class UnevenBounds(PointMass):
    """Bounds that rescaling in float32 misses by a rounding."""

    action_space = gym.spaces.Box(0.2, 0.7, (1,))


for name, entry, kwargs in [
    ("PointMass-v0", PointMass, {}),
    ("TimeLimit-v0", TwoStates, {"terminal": False}),
    ("Terminal-v0", TwoStates, {"terminal": True}),
    ("RandomLength-v0", RandomLength, {}),
    ("TwoEnds-v0", TwoEnds, {}),
    ("DiscreteActions-v0", DiscreteActions, {}),
    ("DiscreteObservations-v0", DiscreteObservations, {}),
    ("SequenceObservations-v0", SequenceObservations, {}),
    ("FlatActions-v0", FlatActions, {}),
    ("UnboundedActions-v0", UnboundedActions, {}),
    ("ManyUnboundedActions-v0", ManyUnboundedActions, {}),
    ("MatrixActions-v0", MatrixActions, {}),
    ("IntegerActions-v0", IntegerActions, {}),
    ("UnevenBounds-v0", UnevenBounds, {}),
]:
    gym.register(name, entry, kwargs=kwargs)
