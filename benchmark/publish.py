"""What a run has learned, small enough to commit, and a film of it: models/NAME for `--evaluate models/NAME`.

    python benchmark/publish.py runs/RUN models/HalfCheetah-v4

Keeps of the checkpoint what evaluation needs: policy, critics and arguments, in float32 and not compiled, so that
it runs anywhere at once; returns differ by rounding. eval.csv and learning_curve.png go along.
policy.gif shows the start of an episode, acting as in evaluation, in real time, from the camera `track`, which most of
Gymnasium's MuJoCo models have; for others --seconds 0.
"""

import importlib
import math
import os
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import gymnasium as gym
import mujoco
import torch
import tyro
from PIL import Image

sys.path.insert(0, str(Path(__file__).parent.parent))


@dataclass
class Args:
    run: tyro.conf.Positional[Path]  # runs/<run_name> of simpo_exp.py, simpo_power.py or simpo_neg.py
    out: tyro.conf.Positional[Path]  # folder to write
    seconds: float = 6.0  # length of the film; 0: none
    width: int = 320  # pixels of the film
    height: int = 180


def film(state, args):
    """The pictures of the first steps of one episode, and the milliseconds between them."""
    script = importlib.import_module(state["script"])
    settings = script.Args(**state["args"] | dict(device="cpu"))
    torch.compiler.set_stance("force_eager")
    mujoco.set_mju_user_warning(lambda text: None)  # no MUJOCO_LOG.TXT
    size = dict(width=args.width, height=args.height)
    os.environ.setdefault("MUJOCO_GL", {"linux": "egl"}.get(sys.platform, "glfw"))
    try:
        env = gym.make(settings.env_id, render_mode="rgb_array", camera_name="track", **size)
    except (TypeError, gym.error.Error) as error:
        raise SystemExit(f"{settings.env_id} cannot be filmed, --seconds 0: {str(error).splitlines()[0]}") from None
    dims = env.observation_space.shape[0], env.action_space.shape[0], settings.hidden_dim
    dtype = getattr(torch, settings.policy_dtype)
    policy = script.DiffusionPolicy(*dims, settings.solver, settings.diffusion_steps, dtype)
    critic, generator = script.Critic(*dims), torch.Generator().manual_seed(settings.seed)
    policy.load_state_dict(state["policy"])
    critic.load_state_dict(state["critic"])
    env, pictures = gym.wrappers.RescaleAction(env, -1.0, 1.0), []
    obs, _ = env.reset(seed=settings.seed)
    for _ in range(math.ceil(args.seconds / env.unwrapped.dt)):
        states = torch.as_tensor(obs, dtype=torch.float32)[None]
        actions = policy.sample(states, settings.eval_draws, generator)
        with torch.no_grad():
            best = critic(states, actions).amin(0).argmax(-1)
        obs, _, terminated, truncated, _ = env.step(actions[0, best[0]].numpy())
        pictures.append(Image.fromarray(env.render()))
        if terminated or truncated:
            break
    return pictures, 1000 * env.unwrapped.dt


if __name__ == "__main__":
    args = tyro.cli(Args, description=__doc__)
    try:
        state = torch.load(args.run / "checkpoint.pt", map_location="cpu", mmap=True, weights_only=True)
    except (OSError, RuntimeError) as error:
        raise SystemExit(f"{args.run}/checkpoint.pt cannot be used: {str(error).splitlines()[0]}") from None
    if not state["script"].startswith("simpo_"):
        raise SystemExit(f"{args.run} is of {state['script']}.py; give a run of simpo_*.py")
    if args.out.resolve() == args.run.resolve():
        raise SystemExit(f"{args.out} is the run itself; choose another folder")
    pictures, duration = film(state, args) if args.seconds else ([], 0)
    args.out.mkdir(parents=True, exist_ok=True)
    kept = {name: state[name] for name in ("script", "args", "global_step")}
    kept["args"] = kept["args"] | dict(device="cpu", policy_dtype="float32", compile=False)  # runs anywhere, at once
    kept |= {name: {key: x.clone() for key, x in state[name].items()} for name in ("policy", "critic")}
    torch.save(kept, args.out / "checkpoint.pt")
    for name in ("eval.csv", "learning_curve.png"):
        shutil.copy(args.run / name, args.out / name)
    if pictures:
        pictures = [picture.quantize(64) for picture in pictures]
        pictures[0].save(args.out / "policy.gif", save_all=True, append_images=pictures[1:], duration=duration, loop=0)
    for path in sorted(args.out.iterdir()):
        print(f"{path}: {path.stat().st_size / 1e6:.2f} MB")
