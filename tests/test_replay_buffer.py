"""The replay buffer holds the last transitions and no others, and gives them back as they came, uniformly."""

import numpy as np
import torch

import simpo_neg


def test_replay_buffer_past_its_capacity():
    buffer = simpo_neg.ReplayBuffer(capacity=7, obs_dim=1, action_dim=1, device="cpu")
    generator = torch.Generator().manual_seed(0)
    for first in range(0, 24, 3):
        rows = np.arange(first, first + 3)
        buffer.add(rows[:, None], rows[:, None] + 0.5, rows[:, None] / 100, -rows, rows % 2 == 0)
        obs, next_obs, action, reward, terminated = buffer.sample(1000, generator)
        held = range(max(0, first + 3 - 7), first + 3)  # the last 7
        counts = np.array([(obs == i).sum().item() for i in held])
        assert counts.sum() == 1000 and (abs(counts * len(held) / 1000 - 1) < 0.4).all()
        assert torch.equal(next_obs, obs + 0.5) and torch.allclose(action, obs / 100)
        assert torch.equal(reward, -obs[:, 0]) and torch.equal(terminated, (obs[:, 0] % 2 == 0).float())
