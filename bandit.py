# /// script
# requires-python = ">=3.11"
# dependencies = ["torch==2.13.0", "numpy==2.4.6", "matplotlib==3.11.2", "tyro==1.0.17", "tqdm==4.70.1"]
# ///
"""The one-dimensional experiments of SiMPO (section 5.1, Figures 1 to 3), and a map of where their claims hold (Figure 4).

A single state, an action a in R, a known reward r(a) with two optima, and a flow policy that is improved in rounds:

    draw K actions a_0 from the old policy, weigh them by w = g((r(a_0) - nu) / lambda), nu such that mean w = 1  (5) (9)
        Exp: g = exp(y)    Linear: max(y, 0)    Square: max(y, 0)^2    Lin. Neg.: max(y, -epsilon)     (2) (6) (11)
    fit  E_{a_0, t, eps} w (v_theta(a_t, t) - v_t(a_t|a_0))^2,   a_t = alpha_t a_0 + sigma_t eps                  (7)
    whose minimiser is  v* = E[w v_t(a_t|a_0) | a_t] / E[w | a_t]  where E[w | a_t] > 0 (case I)                  (8)
    with density  p*_t(x) = int p_t(x|a_0) w(a_0) pi_old(a_0) da_0 / Z;  in case II, E[w | a_t] < 0, v is repelled   (10)
    tune lambda by the dual step (30) towards KL(w / K || uniform) = delta

    python bandit.py                    # all four figures, their numbers as CSV and a table of regrets, in runs/bandit
    python bandit.py --figure 2 --seeds 100 --epsilon 1

All trials (methods, seeds, settings) are one batch of small networks. Each draws from the stream of its own seed, so that its
result does not depend on what runs beside it, and methods are compared on common random numbers.
"""

import contextlib
import csv
import io
import math
import re
from dataclasses import dataclass, replace
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
LABELS = {
    "distance": "distance of the optima (units of $a$)",
    "height": "lesser / greater reward",
    "width": "width of the optima (units of $a$)",
    "target_kl": r"target KL $\delta$ (nats)",
    "error_clip": "error clip",
}


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
    """cpu, cuda, cuda:1, ...; the noise is drawn on the CPU everywhere"""

    # SiMPO, the same for every method
    epsilon: float = 0.25
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
    """standard deviation of the Gaussian added to the K actions, in units of action; regrets are measured without it"""
    error_clip: float = 1000.0
    """clip of the squared velocity error in (7), in units of (pi/2)^2: how far case II may push; the paper names none"""

    # flow and optimisation
    rounds: int = 80
    """policy improvements; the old policy is refreshed at each"""
    updates: int = 60
    """Adam steps on (7) per round"""
    lr: float = 3e-3
    """learning rate of the policy at the start; falls linearly to a tenth"""
    hidden_dim: int = 32
    """units of each of the 2 hidden layers"""
    diffusion_steps: int = 20
    """steps of the sampler"""
    action_bound: float = 3.0
    """predicted a_0 are held in [-bound, bound] by the sampler, in units of action"""
    batch_trials: int = 120
    """trials that train together as one batch; changes the speed, not the results"""


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


ESCAPE = (
    Trial()
)  # figures 1, 2, 4: from the lesser optimum, with about 1% of the mass where the reward exceeds the lesser's
BROAD = Trial(distance=3.0, height=0.8, width=0.8, start=0.0, start_std=1.0)  # figure 3, top
SHARP = replace(BROAD, width=0.15)  # figure 3, bottom


def column(trials, name, device="cpu"):
    return torch.tensor([[getattr(trial, name)] for trial in trials], device=device)  # (R, 1)


def reward(action, distance, height, width):
    """Two bumps: the lesser optimum (height) at -distance/2, the greater, a* with r(a*) = 1, at +distance/2."""
    lesser = height * torch.exp(-0.5 * ((action + distance / 2) / width) ** 2)
    greater = torch.exp(-0.5 * ((action - distance / 2) / width) ** 2)
    return torch.maximum(lesser, greater)


def simple_regret(r):
    """r(a*) - E_{a ~ pi}[r(a)] from the rewards r (..., N) of N draws of the policy."""
    return 1 - r.mean(-1)


@torch.no_grad()
def reweight(q, temperature, method, epsilon=0.0):
    """Weights w = g((q - nu) / temperature) of K actions, with nu such that they average 1: (9), (11), appendix E.

    q (..., K); temperature > 0, epsilon >= 0 numbers or (..., 1); returns weights (..., K) and nu (..., 1) in q's dtype.
    """
    K = q.shape[-1]
    q_max = q.double().amax(-1, keepdim=True)
    gap = (
        q_max - q.double()
    ) / temperature  # (..., K) >= 0, so that y = top - gap with top = (q_max - nu) / temperature
    if method == "Exp":
        top = -torch.exp(-gap).mean(-1, keepdim=True).log()  # nu = lambda log E[exp(Q / lambda)]
        return torch.exp(top - gap).to(q.dtype), (q_max - temperature * top).to(q.dtype)
    sorted_gap = gap.sort(-1).values
    k = torch.arange(1, K + 1, device=q.device)
    s1, s2 = sorted_gap.cumsum(-1), (sorted_gap**2).cumsum(-1)
    if method == "Square":
        active = s2 - 2 * sorted_gap * s1 + k * sorted_gap**2 < K  # (29)
        top = (s1 + (s1**2 - k * (s2 - K)).clamp(min=0).sqrt()) / k  # (28)
    else:
        active = k * sorted_gap - s1 < K * (1 + epsilon)  # (25)
        top = (K + (K - k) * epsilon + s1) / k  # (24), with k of the K actions above the floor
    top = top.gather(-1, active.sum(-1, keepdim=True) - 1)
    y = top - gap
    weights = y.clamp(min=0) ** 2 if method == "Square" else torch.where(y > -epsilon, y, 0.0 * y - epsilon)
    return weights.to(q.dtype), (q_max - temperature * top).to(q.dtype)


class Policies:
    """R flow policies in one batch: v_theta = (8) of the start N(mean, std^2) in closed form + a small network.

    The network's last layer starts at 0, so every policy starts exactly at its Gaussian. Velocities are in units of pi/2: with
    alpha = cos(pi t/2) and sigma = sin(pi t/2) the target alpha' a_0 + sigma' eps is alpha eps - sigma a_0.
    """

    def __init__(self, mean, std, generators, rows, hidden_dim):
        self.mean, self.std = mean, std  # (R, 1)
        layers = [
            (1 + 8, 1.0 / 2),
            (hidden_dim, math.sqrt(2 / hidden_dim)),
            (hidden_dim, 0.0),
        ]  # inputs: a_t, time features
        self.parameters = []
        for i, (fan_in, scale) in enumerate(layers):
            shape = (fan_in, hidden_dim if i < 2 else 1)
            weight = torch.stack([scale * torch.randn(shape, generator=g) for g in generators])
            bias = torch.stack([(i == 0) * torch.randn(1, shape[1], generator=g) for g in generators])
            if i == 0:
                weight[:, 0] *= 2
            self.parameters += [
                p[rows].to(mean.device).requires_grad_() for p in (weight, bias)
            ]  # (R, in, out), (R, 1, out)

    @staticmethod
    def time_features(t):
        angle = t[..., None] * math.pi * torch.tensor([0.5, 1.0, 2.0, 3.0], device=t.device)
        return torch.cat([angle.sin(), angle.cos()], -1)  # (..., 8)

    def velocity(self, noisy_action, t, features):
        """v_theta(a_t, t) in units of pi/2: noisy_action (R, N), t (R, N) or (), features (R, N, 8) -> (R, N)."""
        alpha, sigma = torch.cos(torch.pi / 2 * t), torch.sin(torch.pi / 2 * t)
        slope = alpha * sigma * (1 - self.std**2) / (alpha**2 * self.std**2 + sigma**2)
        start = slope * (noisy_action - alpha * self.mean) - sigma * self.mean  # (8) with w = 1 for a Gaussian
        w1, b1, w2, b2, w3, b3 = self.parameters
        h = torch.baddbmm(b1, torch.cat([noisy_action[..., None], features], -1), w1).relu()  # (R, N, H)
        h = torch.baddbmm(b2, h, w2).relu()
        return start + torch.baddbmm(b3, h, w3)[..., 0]

    def loss(self, action, weights, t, features, noise, error_clip):
        """Weighted velocity matching (7) per policy: all (R, N), features (R, N, 8), error_clip (R, 1) -> (R,)."""
        alpha, sigma = torch.cos(torch.pi / 2 * t), torch.sin(torch.pi / 2 * t)
        error = self.velocity(alpha * action + sigma * noise, t, features) - (alpha * noise - sigma * action)
        return (weights * torch.minimum(error.square(), error_clip)).mean(-1)

    @torch.no_grad()
    def sample(self, noise, bound):
        """Ancestral sampling from t = 1 to 0: noise (R, T + 1, N) -> actions (R, N)."""
        steps = noise.shape[1] - 1
        x = noise[:, steps]
        for i in range(steps, 0, -1):
            t, s = i / steps, (i - 1) / steps
            alpha, sigma = math.cos(math.pi / 2 * t), math.sin(math.pi / 2 * t)
            alpha_s, sigma_s = math.cos(math.pi / 2 * s), math.sin(math.pi / 2 * s)
            time = torch.tensor(t, device=x.device)
            velocity = self.velocity(x, time, self.time_features(time).expand(*x.shape, 8))
            action = (alpha * x - sigma * velocity).clamp(-bound, bound)  # predicted a_0
            spread = sigma_s / sigma * math.sqrt(max(sigma**2 - (alpha / alpha_s * sigma_s) ** 2, 0))
            direction = math.sqrt(max(sigma_s**2 - spread**2, 0)) / sigma
            x = alpha_s * action + direction * (x - alpha * action) + spread * noise[:, i - 1]
        return x


def train(trials, args, progress=None):
    """Trains all trials: regret (R, rounds + 1), draws of the policy at start, middle and end (R, 3, N)."""
    chunks = [trials[i : i + args.batch_trials] for i in range(0, len(trials), args.batch_trials)]
    regret, draws = zip(*(train_together(chunk, args, progress) for chunk in chunks), strict=True)
    return torch.cat(regret), torch.cat(draws)


def train_together(trials, args, progress=None):
    R, K, N, T = len(trials), args.num_particles, args.groups * args.num_particles, args.diffusion_steps
    seeds = sorted({trial.seed for trial in trials})
    rows = torch.tensor([seeds.index(trial.seed) for trial in trials])  # (R,)
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    def draw(function, *shape):
        return torch.stack([function(*shape, generator=g) for g in generators]).to(args.device)  # (seeds, *shape)

    distance, height, width, start, start_std, epsilon, target_kl, error_clip = (
        column(trials, name, args.device)
        for name in "distance height width start start_std epsilon target_kl error_clip".split()
    )
    method_rows = {m: torch.tensor([i for i, trial in enumerate(trials) if trial.method == m]) for m in METHODS}
    policies = Policies(start * distance / 2, start_std, generators, rows, args.hidden_dim)
    rows = rows.to(args.device)
    optimizer = torch.optim.Adam(policies.parameters, lr=args.lr, fused=True)
    log_temperature = torch.full((R, 1, 1), math.log(args.temperature), dtype=torch.float64, device=args.device)
    regret, draws = [], []
    for round in range(args.rounds + 1):
        # The policy of the last round is the old policy of this one; its draws measure the regret.
        action = policies.sample(draw(torch.randn, T + 1, N)[rows], args.action_bound)  # (R, N)
        regret.append(simple_regret(reward(action, distance, height, width)))
        if round in (0, args.rounds // 2, args.rounds):
            draws.append(action)
        if round == args.rounds:
            break

        # Weights (9): groups of K actions, each with its own nu.
        action = action + args.particle_noise * draw(torch.randn, N)[rows]
        q = reward(action, distance, height, width).view(R, args.groups, K)
        weights = torch.empty_like(q)
        for method, i in method_rows.items():
            if len(i):
                weights[i], _ = reweight(q[i], log_temperature[i].exp(), method, epsilon[i, None].double())

        # Temperature: dual step (30) in log lambda, with the entropy of the clipped and renormalised weights.
        p = weights.double().clamp(min=1e-6)
        p = p / p.sum(-1, keepdim=True)
        kl = math.log(K) + (p * p.log()).sum(-1).mean(-1, keepdim=True)  # (R, 1)
        log_temperature -= args.temperature_lr * (target_kl - kl)[..., None]
        log_temperature.clamp_(min=math.log(args.min_temperature))

        # Policy: weighted velocity matching (7).
        t, noise = draw(torch.rand, args.updates, N), draw(torch.randn, args.updates, N)  # (seeds, updates, N)
        features = policies.time_features(t)
        for group in optimizer.param_groups:
            group["lr"] = args.lr * (1 - 0.9 * round / args.rounds)
        for u in range(args.updates):
            loss = policies.loss(action, weights.view(R, N), t[rows, u], features[rows, u], noise[rows, u], error_clip)
            optimizer.zero_grad()
            loss.sum().backward()
            optimizer.step()
        if progress is not None:
            progress.update(R)
    return torch.stack(regret, 1).cpu(), torch.stack(draws, 1).cpu()


# ------------------------------------------------------------------------------------------------- statistics and files


def mean_interval(x):
    """Mean over the trials, axis 0, and its 95% percentile bootstrap interval: (3, ...)."""
    x = np.asarray(x, dtype=np.float64)
    picks = np.random.default_rng(0).multinomial(len(x), np.full(len(x), 1 / len(x)), size=2000) / len(x)
    return np.stack([x.mean(0), *np.quantile(np.tensordot(picks, x, 1), [0.025, 0.975], axis=0)])


def share_interval(reached):
    """Share of trials and its 95% Wilson interval: (3,)."""
    n, p, z = len(reached), float(np.mean(reached)), 1.96
    centre, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return np.array([p, (centre - half) / (1 + z * z / n), (centre + half) / (1 + z * z / n)])


def reached(regret, trials):
    """Whether the last 10 rounds earn more than the lesser optimum could: the greater optimum is reached. (R,) bool."""
    return (regret[:, -10:].mean(1) < 1 - column(trials, "height")[:, 0]).numpy()


def save_csv(path, header, rows):
    with open(path, "w", newline="") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(header)
        table.writerows([f"{x:.4g}" if isinstance(x, float) else x for x in row] for row in rows)


def save_figure(figure, path):
    figure.savefig(path, dpi=150, metadata={"Software": None})
    plt.close(figure)
    tqdm.write(f"wrote {path}")


def base_trial(base, args):
    return replace(base, target_kl=args.target_kl, error_clip=args.error_clip)


def trials_for(base, methods, num_seeds, args, epsilon=None):
    """num_seeds trials of each method from the same starts; epsilon belongs to Lin. Neg. alone."""
    epsilon = args.epsilon if epsilon is None else epsilon
    return [
        replace(base, method=method, seed=args.seed + i, epsilon=epsilon if method == "Lin. Neg." else 0.0)
        for method in methods
        for i in range(num_seeds)
    ]


def summary_rows(name, setting, trials, regret, methods):
    """One row per method: regret of the last 10 rounds, of all rounds, share that reached the greater optimum."""
    rows = []
    for method in methods:
        i = [n for n, trial in enumerate(trials) if trial.method == method]
        arrived = reached(regret[i], [trials[n] for n in i])
        final, overall = mean_interval(regret[i, -10:].mean(1)), mean_interval(regret[i].mean(1))
        numbers = [float(x) for x in (*final, *overall, *share_interval(arrived))]
        rows.append([name, setting, method, trials[i[0]].epsilon, len(i), int(arrived.sum()), *numbers])
    return rows


SUMMARY = ["figure", "setting", "method", "epsilon", "trials", "reached"]
SUMMARY += [f"{x}{y}" for x in ("final_regret", "mean_regret", "reached_share") for y in ("", "_low", "_high")]


def print_table(rows):
    print(f"\n{'setting':22} {'method':10} {'final regret [95%]':>22} {'mean regret [95%]':>22} {'reached':>8}")
    for _, setting, method, _, n, count, *x in rows:
        final, overall = (f"{x[i]:.3f} [{x[i + 1]:.3f}, {x[i + 2]:.3f}]" for i in (0, 3))
        print(f"{setting:22} {method:10} {final:>22} {overall:>22} {count:>4}/{n}")


# ---------------------------------------------------------------------------------------------------------- figures


def closed_form(x, t, grid, mass, weights):
    """(8) by quadrature over a_0, in units of pi/2: x (X,), grid, mass = pi_old(a_0) da_0 and weights (A,).

    Returns v* (X,), E[w | a_t] (X,) and the unnormalised density of the path (10), int p_t(x|a_0) w pi_old da_0 (X,).
    """
    alpha, sigma = math.cos(math.pi / 2 * t), math.sin(math.pi / 2 * t)
    noise = (x[:, None] - alpha * grid) / sigma  # (X, A)
    kernel = torch.exp(-0.5 * noise**2) / (sigma * math.sqrt(2 * math.pi)) * mass  # p_t(x|a_0) pi_old(a_0) da_0
    velocity = alpha * noise - sigma * grid
    signed = (kernel * weights).sum(1)
    return (kernel * weights * velocity).sum(1) / signed, signed / kernel.sum(1), signed


def fit(weigh, args, progress=None, updates=3000, batch=1024):
    """Fits (7) to the old policy N(0, 1), one policy per w(a) in `weigh`: policies, parameters at some updates."""
    R, generator = len(weigh), torch.Generator().manual_seed(args.seed)
    policies = Policies(torch.zeros(R, 1), torch.ones(R, 1), [generator], [0] * R, 64)
    optimizer = torch.optim.Adam(policies.parameters, lr=args.lr, fused=True)
    snapshots, saved_at = [], set(np.geomspace(1, updates, 40).astype(int) - 1)
    for u in range(updates):
        action, noise = torch.randn(2, batch, generator=generator)  # (B,), the same for all policies
        t = torch.rand(batch, generator=generator).expand(R, batch)
        weights = torch.stack([w(action) for w in weigh])  # (R, B)
        for group in optimizer.param_groups:
            group["lr"] = args.lr * (1 - u / updates)
        features, clip = policies.time_features(t), torch.tensor(args.error_clip)
        loss = policies.loss(action.expand(R, batch), weights, t, features, noise, clip)
        optimizer.zero_grad()
        loss.sum().backward()
        optimizer.step()
        if u in saved_at:
            snapshots.append((u, [p.detach().clone() for p in policies.parameters]))
        if progress is not None:
            progress.update()
    return policies, snapshots


def figure_1(args, progress):
    """Geometry of section 3.4: the signed measure, the closed form (8) against the learned velocity, case II."""
    grid = torch.linspace(-4, 4, 1601, dtype=torch.float64)
    step, temperature, setting = (grid[1] - grid[0]).item(), 0.1, (ESCAPE.distance, ESCAPE.height, ESCAPE.width)
    pi_old = torch.exp(-0.5 * grid**2) / math.sqrt(2 * math.pi)
    # nu in the limit of many particles: 4096 equally likely actions of the old policy N(0, 1).
    quantiles = torch.special.ndtri((torch.arange(4096, dtype=torch.float64) + 0.5) / 4096)
    _, nu = reweight(reward(quantiles, *setting), temperature, "Lin. Neg.", args.epsilon)

    def signed(action):
        return ((reward(action, *setting) - nu.item()) / temperature).clamp(min=-args.epsilon)

    names = ["signed target", "positive part"]
    policies, snapshots = fit([signed, lambda action: signed(action).clamp(min=0)], args, progress)
    noise = torch.randn(2, 101, 20_000, generator=torch.Generator().manual_seed(args.seed))
    w, rows = signed(grid), []
    positive = w.clamp(min=0) * pi_old

    def record(panel, series, x, y):
        rows.extend([panel, series, float(a), float(b)] for a, b in zip(x, y, strict=True))
        return x, y

    figure, axes = plt.subplots(2, 2, figsize=(11, 7.5), layout="constrained")
    ax = axes[0, 0]
    ax.fill_between(grid, w * pi_old, 0, where=w < 0, color="grey", alpha=0.4, label="negative part")
    ax.plot(
        *record("a", "old policy", grid[::10], pi_old[::10]),
        color="grey",
        linestyle="--",
        label=r"old policy $\pi_{old}$",
    )
    ax.plot(
        *record("a", "signed target", grid[::10], (w * pi_old)[::10]),
        color="black",
        label=r"signed target $w\,\pi_{old}$",
    )
    positive = positive / (positive.sum() * step)
    ax.plot(
        *record("a", "positive part", grid[::10], positive[::10]),
        color=COLOURS["Linear"],
        label="positive part, normalised",
    )
    for name, x, colour in zip(names, policies.sample(noise, args.action_bound), ("#D55E00", "#56B4E9"), strict=True):
        density, edges = np.histogram(x, bins=100, range=(-4, 4), density=True)
        record("a", f"generated from {name}", (edges[1:] + edges[:-1]) / 2, density)
        ax.stairs(density, edges, color=colour, label=f"generated, fitted to the {name}")
    ax.set(
        xlabel="action $a$",
        ylabel="density",
        xlim=(-3, 3),
        title=f"(a) target and generated density, $\\epsilon$ = {args.epsilon:g}",
    )

    x = torch.linspace(-3, 3, 301, dtype=torch.float64)
    errors = {}
    for ax, letter, t in ((axes[0, 1], "b", 0.6), (axes[1, 0], "c", 0.2)):
        best, expected_w, _ = closed_form(x, t, grid, pi_old * step, w)
        case_1, time = expected_w > 0, torch.full((2, len(x)), t)
        history = []
        for _, policies.parameters in snapshots:
            with torch.no_grad():
                history.append(policies.velocity(x.float().expand(2, -1), time, policies.time_features(time))[0])
        inside = x.abs() < 2.5  # where a_t has mass
        for case, mask in (("case I", case_1 & inside), ("case II", ~case_1 & inside)):
            if mask.any():
                errors[f"{case}, t = {t}"] = [(v - best)[mask].abs().median().item() for v in history]
        ax.fill_between(
            x,
            0,
            1,
            where=~case_1,
            transform=ax.get_xaxis_transform(),
            color="grey",
            alpha=0.25,
            linewidth=0,
            label="case II: $E[w\\,|\\,a_t] < 0$",
        )
        ax.plot(*record(letter, "closed form", x, best.where(case_1, math.nan)), color="black", label="closed form (8)")
        ax.plot(
            *record(letter, "learned", x, history[-1]), color="#D55E00", linestyle="--", label=r"learned $v_\theta$"
        )
        record(letter, "E[w|a_t]", x, expected_w)
        ax.set(
            xlabel="noisy action $a_t$",
            ylabel=r"velocity / ($\pi$/2)",
            ylim=(-6, 6),
            title=f"({letter}) velocity at t = {t}",
        )
    ax = axes[1, 1]
    updates = [u + 1 for u, _ in snapshots]
    for (name, error), style in zip(errors.items(), ("-", "--", ":", "-."), strict=False):
        ax.plot(
            *record("d", name, updates, error),
            color="#D55E00" if "case II" in name else "black",
            linestyle=style,
            label=name,
        )
    ax.set(
        xlabel="update",
        ylabel=r"median $|v_\theta - v^*|$ / ($\pi$/2)",
        xscale="log",
        yscale="log",
        title="(d) distance from (8) while training",
    )
    for ax in axes.flat:
        ax.legend(fontsize=8)
    save_figure(figure, args.save_dir / "figure1.png")
    save_csv(args.save_dir / "figure1.csv", ["panel", "series", "x", "y"], rows)
    return []


def plot_regret(ax, method, regret, args, trial_lines=True):
    """Every trial thin, mean and 95% interval thick."""
    rounds, (mean, low, high) = np.arange(args.rounds + 1), mean_interval(regret)
    if trial_lines:
        ax.plot(rounds, regret.T, color=COLOURS[method], linewidth=0.4, alpha=0.35)
    ax.fill_between(rounds, low, high, color=COLOURS[method], alpha=0.3, linewidth=0)
    ax.plot(rounds, mean, color=COLOURS[method], linewidth=2, label=method)
    ax.set(xlabel="round", ylabel="simple regret", ylim=(0, None))


def plot_reward(ax, base, title):
    a = torch.linspace(-3, 3, 601)
    start = torch.exp(-0.5 * ((a - base.start * base.distance / 2) / base.start_std) ** 2)
    ax.plot(a, reward(a, base.distance, base.height, base.width), color="black", label="reward $r(a)$")
    ax.fill_between(a, 0, start, color="grey", alpha=0.3, linewidth=0, label="policy at the start (scaled)")
    ax.set(xlabel="action $a$", ylabel="reward", ylim=(0, 1.4), title=title)
    ax.legend(fontsize=8, loc="upper left")


def save_regret(path, named):
    """One row per trial and round, from [(setting, trials, regret)]."""
    rows = [
        [name, trial.method, trial.seed, k, r]
        for name, trials, regret in named
        for trial, row in zip(trials, regret.tolist(), strict=True)
        for k, r in enumerate(row)
    ]
    save_csv(path, ["setting", "method", "seed", "round", "regret"], rows)


def figure_2(args, progress):
    """Escape from the lesser optimum: curves of every trial, the reward, histograms of the policy."""
    trials = trials_for(base_trial(ESCAPE, args), METHODS, args.seeds, args)
    progress.total = len(trials) * args.rounds
    regret, draws = train(trials, args, progress)
    figure, axes = plt.subplots(2, 5, figsize=(15, 6), layout="constrained")
    plot_reward(axes[0, 0], ESCAPE, "reward and start")
    histograms, bins = [], np.linspace(-args.action_bound, args.action_bound, 61)
    for m, method in enumerate(METHODS):
        i, (top, ax) = slice(m * args.seeds, (m + 1) * args.seeds), axes[:, m + 1]
        plot_regret(top, method, regret[i].numpy(), args)
        plot_regret(axes[1, 0], method, regret[i].numpy(), args, trial_lines=False)
        top.axhline(1 - ESCAPE.height, color="black", linewidth=0.8, linestyle=":")
        floor = f" ($\\epsilon$ = {args.epsilon:g})" if method == "Lin. Neg." else ""
        top.set(title=f"{method}{floor}: {reached(regret[i], trials[i]).sum()} of {args.seeds}", ylim=(0, 1.05))
        styles = {"start": dict(color="grey", fill=True, alpha=0.4), "middle": dict(color="black", linestyle=":")}
        for k, stage in enumerate(("start", "middle", "end")):
            share = np.histogram(draws[i, k], bins)[0] / draws[i, k].numel()
            ax.stairs(share, bins, label=stage, **styles.get(stage, dict(color=COLOURS[method], linewidth=1.5)))
            histograms += [[method, stage, x, y] for x, y in zip((bins[1:] + bins[:-1]) / 2, share, strict=True)]
        ax.set_yscale("symlog", linthresh=0.01)
        ax.set(xlabel="action $a$", ylabel="share of draws, all trials", ylim=(0, 1), title="policy")
        ax.legend(fontsize=8, loc="upper right")
    axes[1, 0].set(ylim=(0, 1.05), title="means and 95% intervals")
    axes[1, 0].legend(fontsize=8, loc="upper right", ncols=2)
    save_figure(figure, args.save_dir / "figure2.png")
    save_regret(args.save_dir / "figure2.csv", [("escape", trials, regret)])
    save_csv(args.save_dir / "figure2_histograms.csv", ["method", "stage", "action", "share"], histograms)
    return summary_rows("2", "escape", trials, regret, METHODS)


def sweep(base, settings, methods, args, progress):
    """Trains sweep_seeds trials per method and setting, all together: [(setting, trials, regret)] per setting."""
    groups = [trials_for(replace(base, **setting), methods, args.sweep_seeds, args) for setting in settings]
    regret, _ = train([trial for group in groups for trial in group], args, progress)
    return list(zip(settings, groups, regret.split([len(group) for group in groups]), strict=True))


def figure_3(args, progress):
    """Broad optima (top) and sharp ones (bottom) from a Gaussian between them; sweeps of width and target KL."""
    methods = METHODS[:3]
    sweeps = {"width": (0.7, 0.85, 1.0, 1.2, 1.4), "target_kl": (0.5, 1.0, 1.5, 2.0), "height": (0.6, 0.8, 0.9)}
    per_setting = 3 * (args.seeds + args.sweep_seeds * sum(map(len, sweeps.values())))
    progress.total = 2 * per_setting * args.rounds
    figure, axes = plt.subplots(2, 5, figsize=(16, 6), layout="constrained")
    summary, named = [], []
    for row, (name, base) in zip(
        axes, {"broad": base_trial(BROAD, args), "sharp": base_trial(SHARP, args)}.items(), strict=True
    ):
        trials = trials_for(base, methods, args.seeds, args)
        regret, _ = train(trials, args, progress)
        named.append((name, trials, regret))
        summary += summary_rows("3", name, trials, regret, methods)
        plot_reward(row[0], base, f"{name} optima")
        for m, method in enumerate(methods):
            plot_regret(row[1], method, regret[m * args.seeds : (m + 1) * args.seeds].numpy(), args)
        row[1].legend(fontsize=8)
        for ax, (field, values) in zip(row[2:], sweeps.items(), strict=True):
            scale = base.width if field == "width" else 1.0
            settings = [{field: round(scale * value, 4)} for value in values]
            rows = []
            for setting, group, r in sweep(base, settings, methods, args, progress):
                rows.append(summary_rows("3", f"{name}, {field} = {setting[field]:g}", group, r, methods))
            summary += [line for lines in rows for line in lines]
            for m, method in enumerate(methods):
                mean, low, high = np.array([lines[m][9:12] for lines in rows]).T
                x = [setting[field] * (1 + 0.02 * (m - 1)) for setting in settings]
                ax.errorbar(
                    x, mean, [mean - low, high - mean], color=COLOURS[method], marker="o", markersize=3, label=method
                )
            ax.set(xlabel=LABELS[field], ylabel="regret, mean over rounds", ylim=(0, None))
    save_figure(figure, args.save_dir / "figure3.png")
    save_regret(args.save_dir / "figure3.csv", named)
    return summary


def figure_4(args, progress):
    """In what share of trials the greater optimum is reached, over distance and epsilon, and over the other settings."""
    base = base_trial(ESCAPE, args)
    epsilons, distances = (0.1, 0.2, 0.3, 0.5, 1.0), (1.2, 1.6, 2.0, 2.4, 2.8)
    sweeps = {
        "height": (0.3, 0.7, 0.9),
        "width": (0.2, 0.4),
        "target_kl": (0.5, 1.0, 2.0),
        "error_clip": (5.0, 100.0, 1e4),
    }
    per_row = args.sweep_seeds * (3 + len(epsilons))
    progress.total = args.rounds * (len(distances) * per_row + 4 * args.sweep_seeds * sum(map(len, sweeps.values())))
    columns = [(method, None) for method in METHODS[:3]] + [("Lin. Neg.", epsilon) for epsilon in epsilons]
    trials = [
        trial
        for distance in distances
        for method, epsilon in columns
        for trial in trials_for(replace(base, distance=distance), [method], args.sweep_seeds, args, epsilon)
    ]
    regret, _ = train(trials, args, progress)
    share, summary = np.empty((len(distances), len(columns))), []
    for cell, (i, j) in enumerate(np.ndindex(share.shape)):
        part = slice(cell * args.sweep_seeds, (cell + 1) * args.sweep_seeds)
        lines = summary_rows("4", f"distance = {distances[i]:g}", trials[part], regret[part], [columns[j][0]])
        summary += lines
        share[i, j] = lines[0][12]
    figure = plt.figure(figsize=(15, 4.2), layout="constrained")
    axes = figure.subplots(1, 5, width_ratios=[2.4, 1, 1, 1, 1])
    image = axes[0].imshow(share, cmap="cividis", vmin=0, vmax=1, aspect="auto", origin="lower")
    for i, j in np.ndindex(share.shape):
        axes[0].text(
            j, i, f"{share[i, j]:.2f}", ha="center", va="center", color="white" if share[i, j] < 0.5 else "black"
        )
    labels = [method if epsilon is None else f"{epsilon:g}" for method, epsilon in columns]
    axes[0].set_xticks(range(len(columns)), labels)
    axes[0].set_yticks(range(len(distances)), distances)
    axes[0].set(xlabel=r"method; the numbers are $\epsilon$ of Lin. Neg.", ylabel=LABELS["distance"])
    figure.colorbar(image, ax=axes[0], label="share of trials that reach the greater optimum")
    for ax, (field, values) in zip(axes[1:], sweeps.items(), strict=True):
        lines = [
            line
            for setting, group, r in sweep(base, [{field: value} for value in values], METHODS, args, progress)
            for line in summary_rows("4", f"{field} = {setting[field]:g}", group, r, METHODS)
        ]
        summary += lines
        for m, method in enumerate(METHODS):
            mean, low, high = np.array([line[12:15] for line in lines[m :: len(METHODS)]]).T
            x = np.array(values) * (1 + 0.03 * (m - 1.5))
            error = np.maximum([mean - low, high - mean], 0)
            ax.errorbar(x, mean, error, color=COLOURS[method], marker="o", markersize=4, linewidth=1, label=method)
        ax.set(xlabel=LABELS[field], ylabel="share that reach it", ylim=(-0.05, 1.05))
    axes[1].legend(fontsize=8)
    axes[4].set_xscale("log")
    save_figure(figure, args.save_dir / "figure4.png")
    return summary


FIGURES = {"1": figure_1, "2": figure_2, "3": figure_3, "4": figure_4}


def check(args):
    """Raises SystemExit with one line for the first argument that makes no sense."""
    counts = "seeds sweep_seeds num_particles groups rounds updates hidden_dim diffusion_steps batch_trials"
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
            f"--device {args.device}: {str(error).splitlines()[0]}; use cpu, or cuda where there is a GPU"
        ) from None
    try:
        args.save_dir.mkdir(parents=True, exist_ok=True)
        (args.save_dir / "summary.csv").touch()
    except OSError as error:
        raise SystemExit(
            f"--save-dir {args.save_dir}: cannot write there ({error.strerror}); name a folder you can write to"
        ) from None


def parse():
    """The arguments; what tyro has to say about a wrong flag goes to stderr as one line."""
    message = io.StringIO()
    try:
        with contextlib.redirect_stderr(message):
            return tyro.cli(Args, description=__doc__)
    except SystemExit as stop:
        if stop.code:
            text = re.sub(r"[^\x20-\x7e]+", " ", re.sub(r"\x1b\[[0-9;]*m", "", message.getvalue()))
            raise SystemExit(re.sub(r"\s+", " ", text).strip()) from None
        raise


if __name__ == "__main__":
    args = parse()
    check(args)
    torch.set_flush_denormal(True)  # weights of Exp underflow; denormal numbers are slow
    summary = []
    for name in FIGURES if args.figure == "all" else [args.figure]:
        with tqdm(desc=f"figure {name}", unit="round") as progress:
            summary += FIGURES[name](args, progress)
    if summary:
        save_csv(args.save_dir / "summary.csv", SUMMARY, summary)
        print_table(summary)
