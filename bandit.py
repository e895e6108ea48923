# /// script
# requires-python = ">=3.11"
# dependencies = ["torch==2.13.0", "numpy==2.4.6", "matplotlib==3.11.2", "tyro==1.0.17", "tqdm==4.70.1"]
# ///
"""The one-dimensional experiments of SiMPO, section 5.1 (Figures 1 to 3), and where their claims hold (our Figure 4).

A single state, an action a in R, a known reward r(a) with two optima, and flow policies that improve in rounds:

    draw K actions a_0 from the old policy, weigh them by w = g((r(a_0) - nu) / lambda), nu such that mean w = 1    (9)
        Exp: g = exp(y), Linear: max(y, 0), Square: max(y, 0)^2, Lin. Neg.: max(y, -epsilon)           (2), (6), (11)
    fit  E_{a_0, t, eps}[w (v_theta(a_t, t) - v_t(a_t|a_0))^2],  a_t = alpha_t a_0 + sigma_t eps                  (7)
        case I,  E[w | a_t] > 0:  the minimiser is v* = E[w v_t(a_t|a_0) | a_t] / E[w | a_t]                      (8)
                 and generates p*_t(x) = int p_t(x|a_0) w(a_0) pi_old(a_0) da_0 / Z                              (10)
        case II, E[w | a_t] < 0:  there is none, the gradient pushes v_theta away from (8)
    one step of lambda so that KL(w / K || uniform) tends to delta                                               (30)

    python bandit.py                    # all figures, their numbers as CSV and a table of regrets, in runs/bandit
    python bandit.py --figure 2 --seeds 100 --epsilon 1

All trials (methods x seeds x settings) train together as one batch of small networks. Each draws from the stream of
its own seed: it does not depend on what runs beside it, and methods are compared on common random numbers.
"""

import contextlib
import csv
import io
import math
import os
import re
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path

import matplotlib
import numpy as np
import torch
import tyro
from tqdm import tqdm

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

COLOURS = {"Exp": "#E69F00", "Linear": "#0072B2", "Square": "#009E73", "Lin. Neg.": "#D55E00"}  # Okabe and Ito
METHODS = list(COLOURS)


@dataclass
class Args:
    figure: str = "all"
    """1 (geometry of signed measures), 2 (escape), 3 (broad and sharp optima), 4 (where escape succeeds) or all"""
    seeds: int = 30
    """trials per method in figures 2 and 3"""
    sweep_seeds: int = 12
    """trials per method and setting in the sweeps of figures 3 and 4"""
    seed: int = 1
    """first seed; trial i uses seed + i"""
    save_dir: Path = Path("runs/bandit")
    """folder for the PNG and CSV files"""
    device: str = "cpu"
    """cpu, cuda, cuda:1, ...; noise is drawn on the CPU everywhere"""

    # SiMPO: the same for every method, but for epsilon
    epsilon: float = 0.3
    """epsilon of Lin. Neg.: the largest negative weight, the floor of (11) is -epsilon"""
    num_particles: int = 32
    """K: actions that share one normaliser nu"""
    groups: int = 2
    """groups of K actions drawn from the old policy per round"""
    target_kl: float = 1.5
    """delta: target KL of the weights from uniform, in nats, in (30); must stay below log K"""
    temperature: float = 0.1
    """lambda at the start, in units of reward; (30) tunes it from there"""
    temperature_lr: float = 0.2
    """step of log lambda per round, along the gradient of (30) divided by lambda"""
    min_temperature: float = 1e-4
    """lower bound of lambda, in units of reward"""
    particle_noise: float = 0.2
    """standard deviation of the Gaussian added to the K actions, in units of action; regrets are measured without"""
    error_clip: float = 1000.0
    """clip of the squared velocity error in (7), in units of (pi/2)^2: how far case II can push; none in the paper"""

    # flow and optimisation
    rounds: int = 80
    """policy improvements; the old policy is refreshed at each"""
    updates: int = 60
    """Adam steps on (7) per round"""
    lr: float = 3e-3
    """learning rate of the policies at the start; falls linearly to a tenth"""
    hidden_dim: int = 32
    """units of each of the 2 hidden layers"""
    diffusion_steps: int = 20
    """T: steps of the sampler"""
    action_bound: float = 3.0
    """predicted a_0 are held in [-bound, bound] by the sampler, in units of action"""
    fit_updates: int = 3000
    """Adam steps on (7) in figure 1"""
    batch_trials: int = 120
    """trials that train together; changes the speed, not the results"""


@dataclass(frozen=True)
class Trial:
    """One run of one method on one reward, from the Gaussian N(start * distance / 2, start_std^2)."""

    method: str = "Linear"
    seed: int = 1
    epsilon: float = 0.0
    target_kl: float = 1.5
    error_clip: float = 1000.0
    distance: float = 2.0
    height: float = 0.5
    width: float = 0.3
    start: float = -1.0
    start_std: float = 0.8


ESCAPE = Trial()  # figures 2 and 4: on the lesser optimum; 2% of the mass where the reward exceeds the lesser's
BROAD = Trial(distance=3.0, height=0.8, width=0.8, start=0.0, start_std=1.0)  # figure 3, top: between the optima
SHARP = replace(BROAD, width=0.15)  # figure 3, bottom


def reward(action, distance, height, width):
    """Two bumps: the lesser optimum (height) at -distance/2, the greater, a* with r(a*) = 1, at distance/2."""
    lesser = height * torch.exp(-0.5 * ((action + distance / 2) / width) ** 2)
    greater = torch.exp(-0.5 * ((action - distance / 2) / width) ** 2)
    return torch.maximum(lesser, greater)


def simple_regret(r):
    """r(a*) - E_{a ~ pi}[r(a)] from the rewards r (..., N) of N draws of the policy."""
    return 1 - r.double().mean(-1)


# ------------------------------------------------------------------------------------------------------ reweighting


@torch.no_grad()
def reweight(q, temperature, method, epsilon=0.0):
    """Weights w = g((q - nu) / temperature) of K actions, nu such that they average 1: (9), (11), appendix E.

    q (..., K); temperature > 0, epsilon >= 0 numbers or (..., 1); returns weights (..., K), nu (..., 1) in q's dtype.
    """
    K = q.shape[-1]
    q_max = q.double().amax(-1, keepdim=True)
    gap = (q_max - q.double()) / temperature  # (..., K) >= 0: y = top - gap with top = (q_max - nu) / temperature
    sorted_gap = gap.sort(-1).values
    k = torch.arange(1, K + 1, dtype=torch.float64, device=q.device)
    s1, s2 = sorted_gap.cumsum(-1), (sorted_gap**2).cumsum(-1)
    if method == "Exp":
        top = -torch.exp(-gap).mean(-1, keepdim=True).log()  # nu = lambda log E[exp(Q / lambda)]
        weights = torch.exp(top - gap)
    elif method == "Square":
        active = s2 - 2 * sorted_gap * s1 + k * sorted_gap**2 < K  # (29)
        top = (s1 + (s1**2 - k * (s2 - K)).clamp(min=0).sqrt()) / k  # (28)
        top = top.gather(-1, active.sum(-1, keepdim=True) - 1)
        weights = (top - gap).clamp(min=0) ** 2
    else:
        floor = epsilon if method == "Lin. Neg." else 0.0
        active = k * sorted_gap - s1 < K * (1 + floor)  # (25)
        top = (K + (K - k) * floor + s1) / k  # (24), with k of the K actions above the floor
        top = top.gather(-1, active.sum(-1, keepdim=True) - 1)
        weights = torch.maximum(top - gap, -torch.as_tensor(floor, dtype=gap.dtype, device=gap.device))
    return weights.to(q.dtype), (q_max - temperature * top).to(q.dtype)


def dual_step(log_temperature, weights, target_kl, lr):
    """One step on (30) in log lambda, its gradient divided by lambda; the entropy is that of the clipped weights.

    log_temperature (R, 1, 1), weights (R, groups, K), target_kl (R, 1) -> (R, 1, 1).
    """
    p = weights.double().clamp(min=1e-6)
    p = p / p.sum(-1, keepdim=True)
    kl = math.log(p.shape[-1]) + (p * p.log()).sum(-1).mean(-1, keepdim=True)  # (R, 1): log K - H
    return log_temperature - lr * (target_kl - kl)[..., None]


# --------------------------------------------------------------------------------------------------------- policies


class Policies:
    """R flow policies in one batch: v_theta = (8) of the Gaussian start, in closed form, + a small network.

    The network's last layer starts at 0, so every policy starts exactly at its Gaussian. Velocities are in units of
    pi/2: on the schedule alpha = cos(pi t/2), sigma = sin(pi t/2), alpha' a_0 + sigma' eps is alpha eps - sigma a_0.
    """

    def __init__(self, mean, std, generators, rows, hidden_dim):
        """mean and std of the starts (R, 1); rows (R,): which of the generators initialises each network."""
        self.mean, self.std = mean, std
        self.parameters = []
        layers = [(9, hidden_dim, 0.5, 1.0), (hidden_dim, hidden_dim, math.sqrt(2 / hidden_dim), 0.0)]
        for fan_in, fan_out, weight_scale, bias_scale in layers:
            weight = torch.stack([weight_scale * torch.randn(fan_in, fan_out, generator=g) for g in generators])
            bias = torch.stack([bias_scale * torch.randn(1, fan_out, generator=g) for g in generators])
            self.parameters += [weight[rows], bias[rows]]  # (R, in, out), (R, 1, out)
        self.parameters.append(torch.zeros(len(rows), hidden_dim, 1))
        self.parameters = [p.to(mean.device).requires_grad_() for p in self.parameters]

    @staticmethod
    def time_features(t):
        angle = t[..., None] * math.pi * torch.tensor([0.5, 1.0, 2.0, 3.0], device=t.device)
        return torch.cat([angle.sin(), angle.cos()], -1)  # (..., 8)

    def velocity(self, noisy_action, t, features):
        """v_theta(a_t, t) in units of pi/2: noisy_action (R, N), t (R, N) or (), features (R, N, 8) -> (R, N)."""
        alpha, sigma = torch.cos(torch.pi / 2 * t), torch.sin(torch.pi / 2 * t)
        slope = alpha * sigma * (1 - self.std**2) / (alpha**2 * self.std**2 + sigma**2)
        start = slope * (noisy_action - alpha * self.mean) - sigma * self.mean  # (8) with w = 1 for a Gaussian
        w1, b1, w2, b2, w3 = self.parameters
        h = torch.baddbmm(b1, torch.cat([2 * noisy_action[..., None], features], -1), w1).relu()  # (R, N, H)
        h = torch.baddbmm(b2, h, w2).relu()
        return start + torch.bmm(h, w3)[..., 0]

    def loss(self, action, weights, t, features, noise, error_clip):
        """Weighted velocity matching (7), one per policy: all (R, N), features (R, N, 8), error_clip (R, 1) -> (R,)."""
        alpha, sigma = torch.cos(torch.pi / 2 * t), torch.sin(torch.pi / 2 * t)
        error = self.velocity(alpha * action + sigma * noise, t, features) - (alpha * noise - sigma * action)
        return (weights * torch.minimum(error.square(), error_clip)).mean(-1)

    @torch.no_grad()
    def sample(self, noise, bound):
        """Ancestral sampling in T steps from t = 1 to 0: noise (R, T + 1, N) -> actions (R, N)."""
        T = noise.shape[1] - 1
        x = noise[:, T]
        for i in range(T, 0, -1):
            alpha, sigma = math.cos(math.pi / 2 * i / T), math.sin(math.pi / 2 * i / T)
            alpha_s, sigma_s = math.cos(math.pi / 2 * (i - 1) / T), math.sin(math.pi / 2 * (i - 1) / T)
            t = torch.tensor(i / T, device=x.device)
            velocity = self.velocity(x, t, self.time_features(t).expand(*x.shape, 8))
            action = (alpha * x - sigma * velocity).clamp(-bound, bound)  # predicted a_0
            spread = sigma_s / sigma * math.sqrt(max(sigma**2 - (alpha / alpha_s * sigma_s) ** 2, 0))
            direction = math.sqrt(max(sigma_s**2 - spread**2, 0)) / sigma
            x = alpha_s * action + direction * (x - alpha * action) + spread * noise[:, i - 1]
        return x


# --------------------------------------------------------------------------------------------------------- training


def train(trials, args, progress=None):
    """Trains all trials: regret (R, rounds + 1), draws of the policy at start, middle and end (R, 3, N)."""
    chunks = [trials[i : i + args.batch_trials] for i in range(0, len(trials), args.batch_trials)]
    if len(chunks[-1]) == 1:
        chunks[-1] = chunks[-1] * 2  # a batch of one takes another path through BLAS, which rounds differently
    regret, draws = zip(*(train_batch(chunk, args, progress) for chunk in chunks), strict=True)
    return torch.cat(regret)[: len(trials)], torch.cat(draws)[: len(trials)]


def train_batch(trials, args, progress):
    R, K, N, T = len(trials), args.num_particles, args.groups * args.num_particles, args.diffusion_steps
    seeds = sorted({trial.seed for trial in trials})
    rows = torch.tensor([seeds.index(trial.seed) for trial in trials])  # (R,)
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    def draw(function, *shape):
        return torch.stack([function(*shape, generator=g) for g in generators]).to(args.device)  # (seeds, *shape)

    names = "distance height width start start_std epsilon target_kl error_clip".split()
    columns = torch.tensor([[getattr(trial, name) for trial in trials] for name in names], device=args.device)
    distance, height, width, start, start_std, epsilon, target_kl, error_clip = columns[..., None]  # each (R, 1)
    method_rows = {m: [i for i, trial in enumerate(trials) if trial.method == m] for m in METHODS}
    policies = Policies(start * distance / 2, start_std, generators, rows, args.hidden_dim)
    optimizer = torch.optim.Adam(policies.parameters, lr=args.lr, fused=True)
    log_temperature = torch.full((R, 1, 1), math.log(args.temperature), dtype=torch.float64, device=args.device)
    rows = rows.to(args.device)
    regret, draws = [], []
    for round in range(args.rounds + 1):
        # The policy of the last round is the old policy of this one; its draws measure the regret.
        action = policies.sample(draw(torch.randn, T + 1, N)[rows], args.action_bound)  # (R, N)
        regret.append(simple_regret(reward(action, distance, height, width)))
        if round in (0, args.rounds // 2, args.rounds):
            draws.append(action)
        if round == args.rounds:
            break

        # Weights (9) of groups of K actions, each with its own nu; then the temperature (30).
        action = action + args.particle_noise * draw(torch.randn, N)[rows]
        q = reward(action, distance, height, width).view(R, args.groups, K)
        weights = torch.empty_like(q)
        for method, i in method_rows.items():
            if i:
                weights[i], _ = reweight(q[i], log_temperature[i].exp(), method, epsilon[i, None].double())
        log_temperature = dual_step(log_temperature, weights, target_kl, args.temperature_lr)
        log_temperature = log_temperature.clamp(min=math.log(args.min_temperature))

        # Policy: weighted velocity matching (7).
        t, noise = draw(torch.rand, args.updates, N), draw(torch.randn, args.updates, N)  # (seeds, updates, N)
        features = policies.time_features(t)
        optimizer.param_groups[0]["lr"] = args.lr * (1 - 0.9 * round / args.rounds)
        for u in range(args.updates):
            loss = policies.loss(action, weights.view(R, N), t[rows, u], features[rows, u], noise[rows, u], error_clip)
            optimizer.zero_grad()
            loss.sum().backward()
            optimizer.step()
        if progress is not None:
            progress.update(R)
    return torch.stack(regret, 1).cpu(), torch.stack(draws, 1).cpu()


def fit(weigh, args, progress=None, batch=1024):
    """Fits (7) to the old policy N(0, 1), one policy per w(a) in `weigh`: policies, [(update, parameters), ...]."""
    R, generator = len(weigh), torch.Generator().manual_seed(args.seed)
    policies = Policies(torch.zeros(R, 1), torch.ones(R, 1), [generator], [0] * R, 64)
    optimizer = torch.optim.Adam(policies.parameters, lr=args.lr, fused=True)
    snapshots, saved_at = [], set(np.geomspace(1, args.fit_updates, 40).astype(int))
    for u in range(1, args.fit_updates + 1):
        action, noise = torch.randn(2, batch, generator=generator)  # (B,), common to all policies
        t = torch.rand(batch, generator=generator)
        weights, features = torch.stack([w(action) for w in weigh]), policies.time_features(t).expand(R, -1, -1)
        optimizer.param_groups[0]["lr"] = args.lr * (1 - u / (args.fit_updates + 1))
        loss = policies.loss(action.expand(R, -1), weights, t, features, noise, torch.tensor(args.error_clip))
        optimizer.zero_grad()
        loss.sum().backward()
        optimizer.step()
        if u in saved_at:
            snapshots.append((u, [p.detach().clone() for p in policies.parameters]))
        if progress is not None:
            progress.update()
    return policies, snapshots


def closed_form(x, t, grid, mass, weights):
    """(8) in units of pi/2 and E[w | a_t] at a_t = x (X,), by quadrature over a_0 = grid, mass = pi_old da_0 (A,)."""
    alpha, sigma = math.cos(math.pi / 2 * t), math.sin(math.pi / 2 * t)
    noise = (x[:, None] - alpha * grid) / sigma  # (X, A)
    posterior = torch.exp(-0.5 * noise**2) * mass
    posterior = posterior / posterior.sum(1, keepdim=True)  # of a_0 given a_t
    expected_w = (posterior * weights).sum(1)
    return (posterior * weights * (alpha * noise - sigma * grid)).sum(1) / expected_w, expected_w


# ----------------------------------------------------------------------------------------------- results as numbers


def trials_for(base, methods, num_seeds, args, epsilon=None):
    """num_seeds trials of each method from the same starts; epsilon is Lin. Neg.'s alone."""
    epsilon = {"Lin. Neg.": args.epsilon if epsilon is None else epsilon}
    return [
        replace(base, method=method, seed=args.seed + i, epsilon=epsilon.get(method, 0.0))
        for method in methods
        for i in range(num_seeds)
    ]


def mean_interval(x):
    """Mean over the trials (axis 0) and its 95% interval, a percentile bootstrap: (3, ...)."""
    x = np.asarray(x, dtype=np.float64)
    picks = np.random.default_rng(0).multinomial(len(x), np.full(len(x), 1 / len(x)), size=2000) / len(x)
    return np.stack([x.mean(0), *np.quantile(np.tensordot(picks, x, 1), [0.025, 0.975], axis=0)])


def share_interval(success):
    """Share of trials and its 95% Wilson interval: (3,)."""
    n, p, z = len(success), float(np.mean(success)), 1.96
    centre, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return np.array([p, (centre - half) / (1 + z * z / n), (centre + half) / (1 + z * z / n)])


def reached(regret, trials):
    """Whether a trial's last 10 rounds earn more than the lesser optimum could give: (R,) bool."""
    return (regret[:, -10:].mean(1) < 1 - torch.tensor([trial.height for trial in trials])).numpy()


def trapped(regret, trials):
    """Whether a trial's last 10 rounds earn what the lesser optimum gives, to within 0.03: (R,) bool."""
    lesser = 1 - torch.tensor([trial.height for trial in trials])
    return ((regret[:, -10:].mean(1) - lesser).abs() < 0.03).numpy()


def summarise(setting, trials, regret):
    """One dict per method and epsilon, with 95% intervals: regret of the last 10 rounds, mean regret over all rounds,
    the latter minus Square's on the same seeds; how many reached the greater optimum or are trapped at the lesser."""
    rows, square = [], [n for n, trial in enumerate(trials) if trial.method == "Square"]
    for method, epsilon in dict.fromkeys((trial.method, trial.epsilon) for trial in trials):
        i = [n for n, trial in enumerate(trials) if (trial.method, trial.epsilon) == (method, epsilon)]
        mine = [trials[n] for n in i]
        arrived, stuck = reached(regret[i], mine), trapped(regret[i], mine)
        row = dict(setting=setting, method=method, epsilon=epsilon, trials=len(i))
        row |= dict(reached=int(arrived.sum()), trapped=int(stuck.sum()))
        for name, interval in (
            ("final", mean_interval(regret[i, -10:].mean(1))),
            ("mean", mean_interval(regret[i].mean(1))),
            ("minus_square", mean_interval(regret[i].mean(1) - regret[square].mean(1)) if square else [math.nan] * 3),
            ("share", share_interval(arrived)),
        ):
            row |= {name: float(interval[0]), f"{name}_low": float(interval[1]), f"{name}_high": float(interval[2])}
        rows.append(row)
    return rows


def print_table(rows):
    names = {"final": "final regret", "mean": "mean over rounds", "minus_square": "mean minus Square's"}
    print(f"\n{'setting':24} {'method':13}", *(f"{name + ' [95%]':>26}" for name in names.values()), " reached trapped")
    for row in rows:
        method = row["method"] + (f" {row['epsilon']:g}" if row["epsilon"] else "")
        cells = (f"{row[x]:.3f} [{row[x + '_low']:.3f}, {row[x + '_high']:.3f}]" for x in names)
        print(
            f"{row['setting']:24} {method:13}",
            *(f"{x:>26}" for x in cells),
            f"{row['reached']:>4}/{row['trials']} {row['trapped']:>4}/{row['trials']}",
        )


def save(args, name, figure, rows):
    """figureN.png, and the numbers behind it as figureN.csv from dicts with equal keys."""
    figure.savefig(args.save_dir / f"{name}.png", dpi=130)
    plt.close(figure)
    save_csv(args.save_dir / f"{name}.csv", rows)


def save_csv(path, rows):
    with open(path, "w", newline="") as file:
        table = csv.DictWriter(file, rows[0], lineterminator="\n")
        table.writeheader()
        table.writerows({k: f"{x:.4g}" if isinstance(x, float) else x for k, x in row.items()} for row in rows)


def points(x, y, **labels):
    return [labels | dict(x=float(a), y=float(b)) for a, b in zip(x, y, strict=True)]


# ---------------------------------------------------------------------------------------------------------- figures


def figure_1(args, progress):
    """Geometry of section 3.4: the signed measure, the closed form (8) against the learned velocity, case II."""
    progress.total = args.fit_updates
    setting, temperature = (ESCAPE.distance, ESCAPE.height, ESCAPE.width), args.temperature
    grid = torch.linspace(-5, 5, 2001, dtype=torch.float64)
    pi_old = torch.exp(-0.5 * grid**2) / math.sqrt(2 * math.pi)
    mass = pi_old * (grid[1] - grid[0])
    # nu in the limit of many particles: 4096 equally likely actions of the old policy.
    quantiles = torch.special.ndtri((torch.arange(4096, dtype=torch.float64) + 0.5) / 4096)
    nu = reweight(reward(quantiles, *setting), temperature, "Lin. Neg.", args.epsilon)[1].item()

    def signed(action):
        return ((reward(action, *setting) - nu) / temperature).clamp(min=-args.epsilon)

    def positive(action):
        return signed(action).clamp(min=0)

    policies, snapshots = fit([signed, positive], args, progress)
    noise = torch.randn(2, 101, 20_000, generator=torch.Generator().manual_seed(args.seed))
    draws = policies.sample(noise, args.action_bound)  # (2, N)
    w, rows = signed(grid), []
    figure, axes = plt.subplots(2, 2, figsize=(11, 7.5), layout="constrained")
    ax = axes[0, 0]
    for label, y, colour, style in (
        (r"old policy $\pi_{old}$", pi_old, "grey", "--"),
        (r"signed target $w\,\pi_{old}$", w * pi_old, "black", "-"),
        ("its positive part, normalised", positive(grid) * pi_old / (positive(grid) * mass).sum(), "#0072B2", "-"),
    ):
        ax.plot(grid, y, color=colour, linestyle=style, label=label)
        rows += points(grid[::10], y[::10], panel="a", series=label)
    ax.fill_between(grid, w * pi_old, 0, where=w < 0, color="grey", alpha=0.4, label="its negative part")
    for label, x, colour in zip(("signed target", "positive part"), draws, ("#D55E00", "#56B4E9"), strict=True):
        density, edges = np.histogram(x, bins=100, range=(-4, 4), density=True)
        ax.stairs(density, edges, color=colour, label=f"generated, fitted to the {label}")
        rows += points((edges[1:] + edges[:-1]) / 2, density, panel="a", series=f"generated, fitted to the {label}")
    ax.set(xlabel="action $a$", ylabel="density", xlim=(-2.5, 2.5))
    ax.set_title(f"(a) target and generated density, $\\epsilon$ = {args.epsilon:g}")

    x, errors = torch.linspace(-2.5, 2.5, 501, dtype=torch.float64), {}
    for ax, panel, t in ((axes[0, 1], "b", 0.6), (axes[1, 0], "c", 0.25)):
        best, expected_w = closed_form(x, t, grid, mass, w)
        case_1, time = expected_w > 0, torch.full((2, len(x)), t)
        learned = []
        for _, policies.parameters in snapshots:
            with torch.no_grad():
                learned.append(policies.velocity(x.float().expand(2, -1), time, policies.time_features(time))[0])
        for case, mask in (("case I", case_1), ("case II", ~case_1)):
            if mask.any():
                errors[f"{case}, t = {t}"] = [(v - best)[mask].abs().median().item() for v in learned]
        shade = dict(transform=ax.get_xaxis_transform(), color="grey", alpha=0.3, linewidth=0)
        ax.fill_between(x, 0, 1, where=~case_1, label="" if case_1.all() else "case II: $E[w\\,|\\,a_t] < 0$", **shade)
        ax.plot(x, best.where(case_1, math.nan), color="black", label="closed form (8)")
        ax.plot(x, learned[-1], color="#D55E00", linestyle="--", label=r"learned $v_\theta$")
        for series, y in (("closed form", best), ("learned", learned[-1]), ("E[w|a_t]", expected_w)):
            rows += points(x[::5], y[::5], panel=panel, series=series)
        ax.set(xlabel="noisy action $a_t$", ylabel=r"velocity / ($\pi$/2)", ylim=(-6, 6), title=f"({panel}) t = {t}")
    ax, updates = axes[1, 1], [u for u, _ in snapshots]
    for name, error in errors.items():
        style = dict(color="#D55E00" if "II" in name else "black", linestyle="-" if "0.6" in name else "--")
        ax.plot(updates, error, label=name, **style)
        rows += points(updates, error, panel="d", series=name)
    ax.set(xlabel="update", ylabel=r"median $|v_\theta - v^*|$ / ($\pi$/2)", xscale="log", yscale="log")
    ax.set_title("(d) distance from (8) while training")
    for ax in axes.flat:
        ax.legend(fontsize=8)
    save(args, "figure1", figure, rows)
    return []


def plot_reward(ax, base, title):
    a = torch.linspace(-3, 3, 601)
    start = torch.exp(-0.5 * ((a - base.start * base.distance / 2) / base.start_std) ** 2)
    ax.plot(a, reward(a, base.distance, base.height, base.width), color="black", label="reward $r(a)$")
    ax.fill_between(a, 0, start, color="grey", alpha=0.3, linewidth=0, label="policy at the start (scaled)")
    ax.set(xlabel="action $a$", ylabel="reward", ylim=(0, 1.4), title=title)
    ax.legend(fontsize=8, loc="upper left")


def plot_regret(ax, method, regret, trial_lines=True):
    """Every trial thin, mean and 95% interval thick."""
    rounds, (mean, low, high) = np.arange(regret.shape[1]), mean_interval(regret)
    if trial_lines:
        ax.plot(rounds, regret.T, color=COLOURS[method], linewidth=0.4, alpha=0.4)
    ax.fill_between(rounds, low, high, color=COLOURS[method], alpha=0.3, linewidth=0)
    ax.plot(rounds, mean, color=COLOURS[method], linewidth=2, label=method)
    ax.set(xlabel="round", ylabel="simple regret (reward)", ylim=(0, 1.05))


def regret_rows(setting, trials, regret):
    return [
        dict(setting=setting, method=trial.method, seed=trial.seed, round=k, regret=r)
        for trial, row in zip(trials, regret.tolist(), strict=True)
        for k, r in enumerate(row)
    ]


def figure_2(args, progress):
    """Escape from the lesser optimum: the reward, curves of every trial, histograms of the policy."""
    trials = trials_for(with_args(ESCAPE, args), METHODS, args.seeds, args)
    progress.total = len(trials) * args.rounds
    regret, draws = train(trials, args, progress)
    figure, axes = plt.subplots(2, 5, figsize=(15, 6), layout="constrained")
    plot_reward(axes[0, 0], ESCAPE, "reward and start")
    histograms, bins = [], np.linspace(-args.action_bound, args.action_bound, 61)
    styles = {"start": dict(color="grey", fill=True, alpha=0.4), "middle": dict(color="black", linestyle=":")}
    for m, method in enumerate(METHODS):
        i, (top, bottom) = slice(m * args.seeds, (m + 1) * args.seeds), axes[:, m + 1]
        plot_regret(top, method, regret[i].numpy())
        plot_regret(axes[1, 0], method, regret[i].numpy(), trial_lines=False)
        top.axhline(1 - ESCAPE.height, color="black", linewidth=0.8, linestyle=":")
        top.set_title(f"{method}: {reached(regret[i], trials[i]).sum()} of {args.seeds} reach $a^*$")
        for k, stage in enumerate(("start", "middle", "end")):
            share = np.histogram(draws[i, k], bins)[0] / draws[i, k].numel()
            bottom.stairs(share, bins, label=stage, **styles.get(stage, dict(color=COLOURS[method], linewidth=1.5)))
            histograms += points((bins[1:] + bins[:-1]) / 2, share, method=method, stage=stage)
        bottom.set_yscale("symlog", linthresh=0.01)
        bottom.set(xlabel="action $a$", ylabel="share of draws, all trials", ylim=(0, 8), title="policy")
        bottom.legend(fontsize=8, loc="upper center", ncols=3)
    axes[1, 0].set_title(f"means and 95% intervals, $\\epsilon$ = {args.epsilon:g}")
    axes[1, 0].legend(fontsize=8, loc="upper right", ncols=2)
    save(args, "figure2", figure, regret_rows("escape", trials, regret))
    save_csv(args.save_dir / "figure2_histograms.csv", histograms)
    return summarise("escape", trials, regret)


LABELS = {
    "distance": "distance of the optima (action)",
    "height": "lesser / greater reward",
    "width": "width of the optima (action)",
    "target_kl": r"target KL $\delta$ (nats)",
    "error_clip": "error clip",
}


def with_args(base, args):
    return replace(base, target_kl=args.target_kl, error_clip=args.error_clip)


def plot_sweeps(axes, name, base, sweeps, methods, quantity, args, progress):
    """One panel per swept field, quantity ("mean" regret or "share") with its interval; returns the summaries."""
    settings = [(field, value) for field, values in sweeps.items() for value in values]
    groups = [trials_for(replace(base, **{f: v}), methods, args.sweep_seeds, args) for f, v in settings]
    regret, _ = train([trial for group in groups for trial in group], args, progress)
    parts = regret.split(len(groups[0]))
    rows = [
        row
        for (field, value), group, part in zip(settings, groups, parts, strict=True)
        for row in summarise(f"{name}{field} = {value:g}", group, part)
    ]
    for ax, (field, values) in zip(axes, sweeps.items(), strict=True):
        for m, method in enumerate(methods):
            mine = [r for r in rows if r["method"] == method and r["setting"].startswith(f"{name}{field} =")]
            y, low, high = (np.array([r[quantity + end] for r in mine]) for end in ("", "_low", "_high"))
            x = np.array(values) * (1 + 0.02 * (m - 1))  # side by side
            style = dict(color=COLOURS[method], marker="o", markersize=4, linewidth=1.2, capsize=2)
            ax.errorbar(x, y, np.maximum([y - low, high - y], 0), label=method, **style)
        ax.set_xlabel(LABELS[field])
    return rows


def figure_3(args, progress):
    """Broad optima (top) and sharp ones (bottom) from a Gaussian between them, and sweeps around both."""
    methods, factors = METHODS[:3], (0.6, 0.8, 1.0, 1.25, 1.6)
    sweeps = {"width": factors, "target_kl": (0.5, 1.0, 1.5, 2.0), "height": (0.6, 0.8, 0.95)}
    per_row = 3 * (args.seeds + args.sweep_seeds * sum(map(len, sweeps.values())))
    progress.total = 2 * per_row * args.rounds
    figure, axes = plt.subplots(2, 5, figsize=(15, 6), layout="constrained")
    curves, summary = [], []
    for row, (name, base) in zip(axes, (("broad", BROAD), ("sharp", SHARP)), strict=True):
        base = with_args(base, args)
        trials = trials_for(base, methods, args.seeds, args)
        regret, _ = train(trials, args, progress)
        curves += regret_rows(name, trials, regret)
        summary += summarise(name, trials, regret)
        plot_reward(row[0], base, f"{name} optima")
        for m, method in enumerate(methods):
            plot_regret(row[1], method, regret[m * args.seeds : (m + 1) * args.seeds].numpy())
        row[1].set(yscale="log", ylim=(1e-4, 1))
        row[1].legend(fontsize=8)
        sweeps["width"] = [round(factor * base.width, 3) for factor in factors]
        summary += plot_sweeps(row[2:], f"{name}, ", base, sweeps, methods, "mean", args, progress)
        for ax in row[2:]:
            ax.set(ylabel="regret, mean over rounds", ylim=(0, None))
    save(args, "figure3", figure, curves)
    save_csv(args.save_dir / "figure3_sweeps.csv", summary)
    return summary


def figure_4(args, progress):
    """In what share of trials the greater optimum is reached: over distance and epsilon, and other settings."""
    base, distances, epsilons = with_args(ESCAPE, args), (1.2, 1.6, 2.0, 2.4, 2.8), (0.1, 0.2, 0.3, 0.5, 1.0)
    sweeps = {"height": (0.3, 0.5, 0.7, 0.9), "width": (0.2, 0.3, 0.4), "target_kl": (0.5, 1.0, 1.5, 2.0)}
    sweeps["error_clip"] = (5.0, 100.0, 1e3, 1e4)
    columns = [(method, None) for method in METHODS[:3]] + [("Lin. Neg.", epsilon) for epsilon in epsilons]
    cells, settings = len(distances) * len(columns), sum(map(len, sweeps.values()))
    progress.total = args.rounds * args.sweep_seeds * (cells + len(METHODS) * settings)
    trials = [
        trial
        for distance in distances
        for method, epsilon in columns
        for trial in trials_for(replace(base, distance=distance), [method], args.sweep_seeds, args, epsilon)
    ]
    regret, _ = train(trials, args, progress)
    summary, per_row = [], len(columns) * args.sweep_seeds
    for i, distance in enumerate(distances):
        part = slice(i * per_row, (i + 1) * per_row)
        summary += summarise(f"distance = {distance:g}", trials[part], regret[part])
    figure, axes = plt.subplots(1, 5, figsize=(16, 3.8), layout="constrained", width_ratios=[2.6, 1, 1, 1, 1])
    share = np.array([row["share"] for row in summary]).reshape(len(distances), len(columns))
    image = axes[0].imshow(share, cmap="cividis", vmin=0, vmax=1, aspect="auto", origin="lower")
    for i, j in np.ndindex(share.shape):
        colour = "white" if share[i, j] < 0.5 else "black"
        axes[0].text(j, i, f"{share[i, j]:.2f}", ha="center", va="center", color=colour, fontsize=9)
    labels = [method if epsilon is None else f"{epsilon:g}" for method, epsilon in columns]
    axes[0].set_xticks(range(len(columns)), labels)
    axes[0].set_yticks(range(len(distances)), distances)
    axes[0].set(xlabel=r"method; numbers: Lin. Neg. with this $\epsilon$", ylabel=LABELS["distance"])
    figure.colorbar(image, ax=axes[0], label="share of trials that reach $a^*$")
    summary += plot_sweeps(axes[1:], "", base, sweeps, METHODS, "share", args, progress)
    for ax in axes[1:]:
        ax.set(ylabel="share that reach $a^*$", ylim=(-0.05, 1.05))
    axes[4].set_xscale("log")
    axes[1].legend(fontsize=8)
    save(args, "figure4", figure, summary)
    return summary


FIGURES = {"1": figure_1, "2": figure_2, "3": figure_3, "4": figure_4}


# ----------------------------------------------------------------------------------------------------- command line


def check(args):
    """Raises SystemExit with one line for the first argument that makes no sense."""
    counts = "seeds sweep_seeds num_particles groups rounds updates hidden_dim diffusion_steps fit_updates batch_trials"
    rules = [(name, getattr(args, name) >= 1, "at least 1") for name in counts.split()]
    for name in "temperature temperature_lr min_temperature error_clip lr action_bound".split():
        rules.append((name, 0 < getattr(args, name) < math.inf, "above 0 and finite"))
    for name in "epsilon particle_noise seed".split():
        rules.append((name, 0 <= getattr(args, name) < math.inf, "at least 0 and finite"))
    most = math.log(max(args.num_particles, 1))
    rules.append(("target_kl", 0 < args.target_kl < most, f"above 0 and below log(num_particles) = {most:.2f}"))
    rules.append(("figure", args.figure in (*FIGURES, "all"), f"one of {', '.join(FIGURES)}, all"))
    for name, fulfilled, rule in rules:
        if not fulfilled:
            raise SystemExit(f"--{name.replace('_', '-')} must be {rule}; got {getattr(args, name)}")
    try:
        torch.zeros(1, device=args.device)
    except (RuntimeError, AssertionError) as error:
        raise SystemExit(
            f"--device {args.device}: {str(error).splitlines()[0]}; use cpu or a GPU that is there"
        ) from None
    try:
        args.save_dir.mkdir(parents=True, exist_ok=True)
        if not os.access(args.save_dir, os.W_OK):
            raise PermissionError(13, "Permission denied")
    except OSError as error:
        raise SystemExit(f"--save-dir {args.save_dir}: cannot write there ({error.strerror}); name another") from None


def parse():
    """The arguments; what tyro has to say about a wrong flag becomes one line."""
    message = io.StringIO()
    try:
        with contextlib.redirect_stderr(message):
            return tyro.cli(Args, description=__doc__)
    except SystemExit as stop:
        if stop.code:
            text = re.sub(r"\x1b\[[0-9;]*m|[^\x20-\x7e]+|-{3,}", " ", message.getvalue())
            raise SystemExit(re.sub(r"\s+", " ", text).strip()) from None
        raise


def run_figure(name, args):
    """Makes one figure in its own process, on one thread: the networks are too small to share among threads."""
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)  # weights of Exp underflow, and denormal numbers are slow
    with tqdm(desc=f"figure {name}", position=int(name) - 1, dynamic_ncols=True) as progress:
        return [dict(figure=name) | row for row in FIGURES[name](args, progress)]


if __name__ == "__main__":
    args = parse()
    check(args)
    if args.figure == "all":
        with ProcessPoolExecutor(min(len(FIGURES), os.cpu_count()), get_context("spawn")) as pool:
            longest_first = {name: pool.submit(run_figure, name, args) for name in reversed(FIGURES)}
        summary = [row for name in FIGURES for row in longest_first[name].result()]
    else:
        summary = run_figure(args.figure, args)
    if summary:
        print_table(summary)
        save_csv(args.save_dir / "summary.csv", summary)
    print(f"\nfigures and CSV files: {args.save_dir}")
