"""The one-dimensional experiments of SiMPO, section 5.1: Figures 1 to 3.

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

All trials (methods x seeds) train together as one batch of small networks. Each draws from the stream of its own
seed: it does not depend on what runs beside it, and methods are compared on common random numbers.
"""

import csv
import math
import os
import signal
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, get_type_hints

import matplotlib
import numpy as np
import torch
import tyro
from scipy.stats import binomtest, bootstrap
from tqdm import tqdm

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

# What a flag's value must be is part of its type, and what it means is the comment beside it: --help shows that.
Figure = Annotated[str, "1, 2, 3 or all", ("1", "2", "3", "all").__contains__]
Solver = Annotated[str, "dpm or ddpm", ("dpm", "ddpm").__contains__]
Count = Annotated[int, "at least 1", lambda n: n >= 1]
Several = Annotated[int, "at least 2", lambda n: n >= 2]
Seed = Annotated[int, "from 0 to 2^32 - 1", lambda n: 0 <= n < 2**32]
Positive = Annotated[float, "above 0 and finite", lambda x: 0 < x < math.inf]
NonNegative = Annotated[float, "at least 0 and finite", lambda x: 0 <= x < math.inf]


@dataclass
class Args:
    figure: Figure = "all"  # 1 (geometry of signed measures), 2 (escape), 3 (broad and sharp optima) or all
    seeds: Several = 30  # trials per method in figures 2 and 3
    seed: Seed = 1  # first seed; trial i uses seed + i
    save_dir: Path = Path("runs/bandit")  # folder for the PNG and CSV files

    # SiMPO: the same for every method, but for epsilon
    epsilon: NonNegative = 0.3  # epsilon: no weight of Lin. Neg. is below -epsilon, the floor of (11)
    num_particles: Several = 32  # K: actions that share one normaliser nu
    groups: Count = 2  # groups of K actions drawn from the old policy per round
    target_kl: float = 1.5  # delta: target KL of the weights from uniform, in nats, in (30); must stay below log K
    temperature: Positive = 0.1  # lambda at the start, in units of reward (0 to 1); (30) tunes it, but in figure 1
    temperature_lr: Positive = 0.2  # step of log lambda per round, along the gradient of (30) divided by lambda
    min_temperature: Positive = 1e-4  # lower bound of lambda, in units of reward
    particle_noise: NonNegative = 0.2  # std of the Gaussian added to the K actions (paper: none), not in the regrets
    error_clip: Positive = 300.0  # limit of a squared error of (7) over (pi/2)^2: how far case II pushes; paper: none

    # flow and optimisation
    rounds: Count = 80  # policy improvements; the old policy is refreshed at each
    updates: Count = 60  # Adam steps on (7) per round
    lr: Positive = 3e-3  # learning rate of the policies at the start; falls linearly to a tenth, in figure 1 to 0
    hidden_dim: Count = 32  # units of each of the 2 hidden layers; 64 in figure 1
    solver: Solver = "dpm"  # dpm: DPM-Solver++(2M), all noise in a_1; ddpm: ancestral steps, for which 20 is usual
    diffusion_steps: Count = 8  # T: steps of the solver, and the times t_i that (7) is trained on
    action_bound: Positive = 3.0  # predicted a_0 are held in [-bound, bound] by the solver, in units of action
    fit_updates: Count = 3000  # Adam steps on (7) in figure 1

    def __post_init__(self):
        """Raises SystemExit with one line for the first argument that makes no sense."""
        hints = get_type_hints(Args, include_extras=True)
        rules = {name: hint.__metadata__ for name, hint in hints.items() if hasattr(hint, "__metadata__")}
        log_k = math.log(max(self.num_particles, 1))
        rules["target_kl"] = f"above 0 and below log(num_particles) = {log_k:.2f}", lambda kl: 0 < kl < log_k
        if self.solver == "dpm":
            rules["diffusion_steps"] = "at least 3 with --solver dpm", lambda n: n >= 3
        for name, (rule, holds) in rules.items():
            if not holds(getattr(self, name)):
                raise SystemExit(f"--{name.replace('_', '-')} must be {rule}; got {getattr(self, name)}")


# --------------------------------------------------------------------------------------------------------- the task


@dataclass(frozen=True)
class Trial:
    """One run of one method on one reward, from the Gaussian N(start * distance / 2, start_std^2)."""

    method: str = "Linear"
    seed: int = 1
    epsilon: float = 0.0
    distance: float = 2.0
    height: float = 0.5
    width: float = 0.3
    start: float = -1.0
    start_std: float = 0.8


ESCAPE = Trial()  # figure 2: on the local optimum; 2% of the mass where the reward exceeds the local one's
BROAD = Trial(distance=3.0, height=0.8, width=0.8, start=0.0, start_std=1.0)  # figure 3, top: between the optima
SHARP = replace(BROAD, width=0.15)  # figure 3, bottom
POWER = {"Exp": math.inf, "Linear": 1, "Square": 2, "Lin. Neg.": 1}  # p of each method; inf stands for exp
METHODS = list(POWER)


def reward(action, distance, height, width):
    """Two bumps: the local optimum (height) at -distance/2, the global one, a* with r(a*) = 1, at distance/2."""
    local = height * torch.exp(-0.5 * ((action + distance / 2) / width) ** 2)
    best = torch.exp(-0.5 * ((action - distance / 2) / width) ** 2)
    return torch.maximum(local, best)


# ------------------------------------------------------------------------------------------------------ reweighting


@torch.no_grad()
def reweight(q, temperature, power, epsilon=0.0):
    """Weights w = g((q - nu) / temperature) of K actions, nu such that they average 1: (9), (11), appendix E.

    g(y) = max(y, -epsilon) for power 1; max(y, 0)^2 for 2; exp(y) for math.inf; no others.
    q (..., K); temperature > 0, epsilon >= 0 numbers or (..., 1); returns weights (..., K), nu (..., 1) in q's dtype.
    """
    K = q.shape[-1]
    q_max = q.double().amax(-1, keepdim=True)
    gap = (q_max - q.double()) / temperature  # (..., K) >= 0: y = y_max - gap with y_max = (q_max - nu) / temperature
    sorted_gap = gap.sort(-1).values
    k = torch.arange(1, K + 1, dtype=torch.float64)
    s1, s2 = sorted_gap.cumsum(-1), (sorted_gap**2).cumsum(-1)
    if power == 1:
        active = k * sorted_gap - s1 < K * (1 + epsilon)  # (25)
        y_max = (K + (K - k) * epsilon + s1) / k  # (24), with k of the K actions above the floor
        y_max = y_max.gather(-1, active.sum(-1, keepdim=True) - 1)
        weights = (y_max - gap).clamp(min=-epsilon)
    elif power == 2:
        active = s2 - 2 * sorted_gap * s1 + k * sorted_gap**2 < K  # (29)
        y_max = (s1 + (s1**2 - k * (s2 - K)).clamp(min=0).sqrt()) / k  # (28)
        y_max = y_max.gather(-1, active.sum(-1, keepdim=True) - 1)
        weights = (y_max - gap).clamp(min=0) ** 2
    elif power == math.inf:
        y_max = -torch.exp(-gap).mean(-1, keepdim=True).log()  # nu = lambda log E[exp(Q / lambda)]
        weights = torch.exp(y_max - gap)
    return weights.to(q.dtype), (q_max - temperature * y_max).to(q.dtype)


def dual_step(log_temperature, weights, target_kl, lr):
    """One step on (30) in log lambda, its gradient divided by lambda; the entropy is that of the clipped weights.

    log_temperature (R, 1, 1), weights (R, groups, K) -> (R, 1, 1).
    """
    p = weights.double().clamp(min=1e-6)
    p = p / p.sum(-1, keepdim=True)
    kl = math.log(p.shape[-1]) + (p * p.log()).sum(-1).mean(-1)[:, None, None]  # log K - H
    return log_temperature - lr * (target_kl - kl)


# --------------------------------------------------------------------------------------------------------- policies


def noise_schedule(solver, steps):
    """Times t_1 < ... < t_T = 1 and what takes a_t from t = t_i to u = t_{i-1}, t_0 = 0: (T, 7); row i has t_{i+1}.

    Columns: t, alpha_t, sigma_t, from_t, from_0, extrapolate and std of
        a_u = from_t a_t + from_0 (a_0^ + extrapolate (a_0^ - a_0^ of the step before)) + std z,  z ~ N(0, 1).
    dpm: DPM-Solver++(2M) (Lu et al. 2022) on t_i = (i/T)^2; of first order in its first two and its last step.
    ddpm: ancestral steps on t_i = i/T with the variance of a_t given a_u as in the authors' code, not the posterior's.
    """
    t = (torch.arange(steps + 1, dtype=torch.float64) / steps) ** (2 if solver == "dpm" else 1)
    alpha, sigma = torch.cos(torch.pi / 2 * t), torch.sin(torch.pi / 2 * t)
    alpha[-1] = 0  # rounding leaves 6e-17
    alpha_u, sigma_u, t, alpha, sigma = alpha[:-1], sigma[:-1], t[1:], alpha[1:], sigma[1:]
    extrapolate, std = torch.zeros(2, steps, dtype=torch.float64)
    if solver == "dpm":
        h = torch.log(alpha_u / sigma_u) - torch.log(alpha / sigma)  # infinite in the first and in the last step
        from_t = sigma_u / sigma
        from_0 = alpha_u - alpha * from_t  # -alpha_u (e^-h - 1)
        extrapolate[1:-1] = h[1:-1] / (2 * h[2:])
    else:
        variance = sigma**2 - (alpha / alpha_u * sigma_u) ** 2  # beta: of a_t given a_u
        from_t, from_0 = alpha / alpha_u * sigma_u**2 / sigma**2, alpha_u * variance / sigma**2
        std[1:] = variance[1:].sqrt()  # no noise in the last step
    return torch.stack([t, alpha, sigma, from_t, from_0, extrapolate, std], dim=1)


class Policies:
    """R flow policies in one batch: v_theta = (8) of the Gaussian start, in closed form, + a small network.

    The network's last layer starts at 0, so every policy starts exactly at its Gaussian. Velocities are in units of
    pi/2: on the schedule alpha = cos(pi t/2), sigma = sin(pi t/2), alpha' a_0 + sigma' eps is alpha eps - sigma a_0.
    """

    def __init__(self, mean, std, generators, stream, hidden_dim, schedule):
        """mean and std of the starts (R, 1); stream (R,): which of the generators initialises each network."""
        self.mean, self.std, self.schedule = mean, std, schedule.float()
        angle = schedule[:, :1] * torch.pi * torch.tensor([0.5, 1.0, 2.0, 3.0])
        self.time_features = torch.cat([angle.sin(), angle.cos()], 1).float()  # (T, 8)
        self.parameters = []
        layers = [(9, hidden_dim, 0.5, 1.0), (hidden_dim, hidden_dim, math.sqrt(2 / hidden_dim), 0.0)]
        for fan_in, fan_out, weight_scale, bias_scale in layers:
            weight = torch.stack([weight_scale * torch.randn(fan_in, fan_out, generator=g) for g in generators])
            bias = torch.stack([bias_scale * torch.randn(1, fan_out, generator=g) for g in generators])
            self.parameters += [weight[stream], bias[stream]]  # (R, in, out), (R, 1, out)
        self.parameters.append(torch.zeros(len(stream), hidden_dim, 1))
        self.parameters = [p.requires_grad_() for p in self.parameters]

    def velocity(self, noisy_action, i):
        """v_theta(a_t, t) in units of pi/2 at t = t_{i+1}: noisy_action (R, N), row i of the schedule (R, N) or ()."""
        alpha, sigma = self.schedule[i, 1], self.schedule[i, 2]
        slope = alpha * sigma * (1 - self.std**2) / (alpha**2 * self.std**2 + sigma**2)
        gaussian = slope * (noisy_action - alpha * self.mean) - sigma * self.mean  # (8) with w = 1 for a Gaussian
        w1, b1, w2, b2, w3 = self.parameters
        features = self.time_features[i].expand(*noisy_action.shape, 8)
        h = torch.baddbmm(b1, torch.cat([2 * noisy_action[..., None], features], -1), w1).relu()  # (R, N, H)
        h = torch.baddbmm(b2, h, w2).relu()
        return gaussian + torch.bmm(h, w3)[..., 0]

    def loss(self, action, weights, i, noise, error_clip):
        """Weighted velocity matching (7), one per policy: action, weights, time index and noise (R, N) -> (R,)."""
        alpha, sigma = self.schedule[i, 1], self.schedule[i, 2]
        error = self.velocity(alpha * action + sigma * noise, i) - (alpha * noise - sigma * action)
        return (weights * error.square().clamp(max=error_clip)).mean(-1)

    @torch.no_grad()
    def sample(self, noise, bound):
        """Solves the flow from t = 1 to 0: noise (R, T, N), row i > 0 is z of step i, row 0 a_1 -> actions (R, N)."""
        noisy_action, action = noise[:, 0], 0.0
        for i in reversed(range(len(self.schedule))):
            _, alpha, sigma, from_t, from_0, extrapolate, std = self.schedule[i].tolist()
            before = action
            action = (alpha * noisy_action - sigma * self.velocity(noisy_action, i)).clamp(-bound, bound)  # a_0^
            extrapolated = action + extrapolate * (action - before)
            noisy_action = from_t * noisy_action + from_0 * extrapolated + std * noise[:, i]  # std is 0 in step 0
        return noisy_action


# --------------------------------------------------------------------------------------------------------- training


def train(trials, args, name=""):
    """Algorithm 1 in one state, all trials at once (two or more: BLAS rounds a batch of one in another way).

    R = methods * seeds; returns the regret (methods, seeds, rounds + 1) and draws (methods, seeds, rounds + 1, N).
    """
    R, K, N, T = len(trials), args.num_particles, args.groups * args.num_particles, args.diffusion_steps
    seeds = sorted({trial.seed for trial in trials})
    stream = torch.tensor([seeds.index(trial.seed) for trial in trials])  # (R,)
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    def per_seed(function, *arguments):
        return torch.stack([function(*arguments, generator=g) for g in generators])  # (seeds, *shape)

    names = "distance height width start start_std epsilon".split()
    columns = torch.tensor([[getattr(trial, name) for trial in trials] for name in names])
    distance, height, width, start, start_std, epsilon = columns[..., None]  # each (R, 1)
    power = torch.tensor([POWER[trial.method] for trial in trials])
    schedule = noise_schedule(args.solver, T)
    policies = Policies(start * distance / 2, start_std, generators, stream, args.hidden_dim, schedule)
    optimizer = torch.optim.Adam(policies.parameters, lr=args.lr, fused=True)
    log_temperature = torch.full((R, 1, 1), math.log(args.temperature), dtype=torch.float64)
    regret, draws = [], []
    for k in tqdm(range(args.rounds + 1), desc=name, unit="round", dynamic_ncols=True):
        # The policy of the last round is the old policy pi_k of this one; its draws measure its simple regret.
        action = policies.sample(per_seed(torch.randn, T, N)[stream], args.action_bound)  # (R, N)
        regret.append(1 - reward(action, distance, height, width).double().mean(-1))  # r(a*) - E_{a ~ pi_k}[r(a)]
        draws.append(action)
        if k == args.rounds:
            break

        # Weights (9) of groups of K actions, each with its own nu; then the temperature (30).
        action = action + args.particle_noise * per_seed(torch.randn, N)[stream]
        q = reward(action, distance, height, width).view(R, args.groups, K)
        weights = torch.empty_like(q)
        for p in power.unique().tolist():
            its = (power == p).nonzero()[:, 0]  # trials with this power
            weights[its], _ = reweight(q[its], log_temperature[its].exp(), p, epsilon[its, None].double())
        log_temperature = dual_step(log_temperature, weights, args.target_kl, args.temperature_lr)
        log_temperature = log_temperature.clamp(min=math.log(args.min_temperature))

        # Policy: weighted velocity matching (7) on the times that are sampled; i and noise are (seeds, updates, N).
        i, noise = per_seed(torch.randint, T, (args.updates, N)), per_seed(torch.randn, args.updates, N)
        optimizer.param_groups[0]["lr"] = args.lr * (1 - 0.9 * k / args.rounds)
        for u in range(args.updates):
            loss = policies.loss(action, weights.view(R, N), i[stream, u], noise[stream, u], args.error_clip)
            optimizer.zero_grad()
            loss.sum().backward()
            optimizer.step()
    regret, draws = torch.stack(regret, 1).numpy(), torch.stack(draws, 1).numpy()
    return regret.reshape(-1, len(seeds), args.rounds + 1), draws.reshape(-1, len(seeds), args.rounds + 1, N)


def fit(weigh, args, batch=1024):
    """Fits (7) to the old policy N(0, 1), one policy per w(a) in `weigh`: policies, [(update, parameters), ...]."""
    R, generator = len(weigh), torch.Generator().manual_seed(args.seed)
    schedule = noise_schedule(args.solver, args.diffusion_steps)
    policies = Policies(torch.zeros(R, 1), torch.ones(R, 1), [generator], [0] * R, 64, schedule)
    optimizer = torch.optim.Adam(policies.parameters, lr=args.lr, fused=True)
    snapshots, saved_at = [], set(np.geomspace(1, args.fit_updates, 40).astype(int))
    for u in tqdm(range(1, args.fit_updates + 1), desc="figure 1", unit="update", dynamic_ncols=True):
        action, noise = torch.randn(2, batch, generator=generator)  # (B,), common to all policies
        i = torch.randint(args.diffusion_steps, (batch,), generator=generator)
        optimizer.param_groups[0]["lr"] = args.lr * (1 - u / (args.fit_updates + 1))
        weights = torch.stack([w(action) for w in weigh])
        loss = policies.loss(action.expand(R, -1), weights, i, noise, args.error_clip)
        optimizer.zero_grad()
        loss.sum().backward()
        optimizer.step()
        if u in saved_at:
            snapshots.append((u, [p.detach().clone() for p in policies.parameters]))
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


def trials_for(base, methods, args):
    """args.seeds trials of each method from the same starts."""
    return [
        replace(base, method=method, seed=args.seed + i, epsilon=args.epsilon if method == "Lin. Neg." else 0.0)
        for method in methods
        for i in range(args.seeds)
    ]


def mean_interval(x):
    """Mean over the trials (axis 0) and its 95% interval, a percentile bootstrap: (3, ...)."""
    interval = bootstrap((x,), np.mean, n_resamples=2000, method="percentile", rng=0).confidence_interval
    return np.stack([x.mean(0), interval.low, interval.high])


def share_interval(count, trials):
    """Share of trials and its 95% Wilson interval: (3,)."""
    result = binomtest(count, trials)
    return np.array([result.statistic, *result.proportion_ci(method="wilson")])


def summarise(setting, trials, regret):
    """One dict per method with 95% intervals, from trials on one reward and their regret (methods, seeds, rounds + 1).

    final: regret of the last 10 rounds; mean: over all rounds; minus_square: mean less Square's on the same seeds.
    reached: trials whose final regret is less than the local optimum's; trapped: those within 0.03 of it.
    """
    firsts, rows, local = trials[:: regret.shape[1]], [], 1 - trials[0].height
    final, mean = regret[..., -10:].mean(-1), regret.mean(-1)  # (methods, seeds)
    square = mean[[trial.method for trial in firsts].index("Square")]
    for trial, x, y in zip(firsts, final, mean, strict=True):
        row = dict(setting=setting, method=trial.method, epsilon=trial.epsilon, trials=len(x))
        row |= dict(reached=int((x < local).sum()), trapped=int((np.abs(x - local) < 0.03).sum()))
        intervals = dict(final=mean_interval(x), mean=mean_interval(y), minus_square=mean_interval(y - square))
        intervals["share"] = share_interval(row["reached"], len(x))
        for name, (middle, low, high) in intervals.items():
            row |= {name: middle, f"{name}_low": low, f"{name}_high": high}
        rows.append(row)
    return rows


def print_table(rows):
    columns = {"final": "final regret", "mean": "mean over rounds", "minus_square": "mean minus Square's"}
    heads = "".join(f"{head + ' [95%]':>28}" for head in columns.values())
    print(f"\n{'setting':10} {'method':10}{heads} reached trapped of")
    for row in rows:
        cells = "".join(f"{row[x]:8.4f} [{row[x + '_low']:7.4f}, {row[x + '_high']:7.4f}]" for x in columns)
        print(f"{row['setting']:10} {row['method']:10}{cells} {row['reached']:7} {row['trapped']:7} {row['trials']:2}")


def save_csv(path, rows):
    with open(path, "w", newline="") as file:
        table = csv.DictWriter(file, rows[0], lineterminator="\n")
        table.writeheader()
        table.writerows({k: f"{x:.4g}" if isinstance(x, float) else x for k, x in row.items()} for row in rows)


def save(args, name, figure, rows):
    """NAME.png, and the numbers behind it as NAME.csv from dicts with equal keys."""
    figure.savefig(args.save_dir / f"{name}.png", dpi=130)
    plt.close(figure)
    save_csv(args.save_dir / f"{name}.csv", rows)


# ---------------------------------------------------------------------------------------------------------- figures

COLOURS = {"Exp": "#E69F00", "Linear": "#0072B2", "Square": "#009E73", "Lin. Neg.": "#D55E00"}  # Okabe and Ito


def figure_1(args):
    """Geometry of section 3.4: the signed measure, the closed form (8) against the learned velocity, case II."""
    setting = ESCAPE.distance, ESCAPE.height, ESCAPE.width
    grid = torch.linspace(-5, 5, 2001, dtype=torch.float64)
    pi_old = torch.exp(-0.5 * grid**2) / math.sqrt(2 * math.pi)
    mass = pi_old * (grid[1] - grid[0])
    # nu in the limit of many particles: 4096 equally likely actions of the old policy.
    quantiles = torch.special.ndtri((torch.arange(4096, dtype=torch.float64) + 0.5) / 4096)
    nu = reweight(reward(quantiles, *setting), args.temperature, POWER["Lin. Neg."], args.epsilon)[1].item()

    def signed(action):
        return ((reward(action, *setting) - nu) / args.temperature).clamp(min=-args.epsilon)

    def positive(action):
        return signed(action).clamp(min=0)

    policies, snapshots = fit([signed, positive], args)
    noise = torch.randn(2, args.diffusion_steps, 20_000, generator=torch.Generator().manual_seed(args.seed))
    draws = policies.sample(noise, args.action_bound)  # (2, N)
    figure, axes = plt.subplot_mosaic("ab;cd", figsize=(11, 7.5), layout="constrained")
    rows = []

    def curve(panel, x, y, label, **style):
        axes[panel].plot(x, y, label=label, **style)
        rows.extend(dict(panel=panel, series=label, x=float(a), y=float(b)) for a, b in zip(x, y, strict=True))

    w, positive_part = signed(grid), positive(grid) * pi_old
    curve("a", grid[::5], pi_old[::5], r"old policy $\pi_{old}$", color="grey", linestyle="--")
    curve("a", grid[::5], (w * pi_old)[::5], r"signed target $w\,\pi_{old}$", color="black")
    positive_part /= (positive(grid) * mass).sum()
    curve("a", grid[::5], positive_part[::5], "positive part of the target, normalised", color="#0072B2")
    for x, label, colour in zip(draws, ("signed target", "positive part"), ("#D55E00", "#56B4E9"), strict=True):
        density, edges = np.histogram(x, bins=100, range=(-4, 4), density=True)
        middles = (edges[1:] + edges[:-1]) / 2
        curve("a", middles, density, f"generated, fitted to the {label}", color=colour, drawstyle="steps-mid")
    axes["a"].fill_between(grid, w * pi_old, 0, where=w < 0, color="grey", alpha=0.4, label="negative part")
    axes["a"].set(xlabel="action $a$", ylabel="density", xlim=(-2.5, 2.5))
    axes["a"].set_title(f"(a) target and generated density, $\\epsilon$ = {args.epsilon:g}")

    x = torch.linspace(-2.5, 2.5, 501, dtype=torch.float64)
    for panel, near, line in (("b", 0.56, "-"), ("c", 0.25, "--")):  # two of dpm's 8 times
        i = (policies.schedule[:, 0] - near).abs().argmin()
        t, learned = policies.schedule[i, 0].item(), []
        for _, parameters in snapshots:
            policies.parameters = parameters
            with torch.no_grad():
                learned.append(policies.velocity(x.float().expand(2, -1), i)[0])
        best, expected_w = closed_form(x, t, grid, mass, w)
        case_1 = expected_w > 0
        for case, mask, colour in (("case I", case_1, "black"), ("case II", ~case_1, "#D55E00")):
            if mask.any():
                error = [(v - best)[mask].abs().median().item() for v in learned]
                curve("d", [u for u, _ in snapshots], error, f"{case}, t = {t:.2f}", color=colour, linestyle=line)
        curve(panel, x, best.where(case_1, math.nan), "closed form (8)", color="black")
        curve(panel, x, learned[-1], r"learned $v_\theta$", color="#D55E00", linestyle="--")
        shade = dict(transform=axes[panel].get_xaxis_transform(), color="grey", alpha=0.3, linewidth=0)
        axes[panel].fill_between(x, 0, 1, where=~case_1, label="case II: $E[w\\,|\\,a_t] < 0$, if any", **shade)
        axes[panel].set(xlabel="noisy action $a_t$", ylabel=r"velocity / ($\pi$/2)", ylim=(-6, 6))
        axes[panel].set_title(f"({panel}) t = {t:.2f}")
    axes["d"].set(xlabel="update", ylabel=r"median $|v_\theta - v^*|$ / ($\pi$/2)", xscale="log", yscale="log")
    axes["d"].set_title("(d) distance from (8) while training")
    for ax in axes.values():
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
    style = "--" if method == "Square" else "-"  # Exp's mean is often the same
    ax.plot(rounds, mean, style, color=COLOURS[method], linewidth=2, label=method)
    ax.set(xlabel="round", ylabel="simple regret (reward)", ylim=(0, 1.05))


def regret_rows(setting, trials, regret):
    return [
        dict(setting=setting, method=trial.method, seed=trial.seed, round=k, regret=r)
        for trial, row in zip(trials, regret.reshape(len(trials), -1).tolist(), strict=True)
        for k, r in enumerate(row)
    ]


def figure_2(args):
    """Escape from the local optimum: the reward, curves of every trial, histograms of the policy."""
    trials = trials_for(ESCAPE, METHODS, args)
    regret, draws = train(trials, args, "figure 2")
    summary = summarise("escape", trials, regret)
    figure, axes = plt.subplots(2, 5, figsize=(15, 6), layout="constrained")
    plot_reward(axes[0, 0], ESCAPE, "reward and start")
    histograms, bins = [], np.linspace(*np.float32([-args.action_bound, args.action_bound]).astype(float), 61)
    middles = (bins[1:] + bins[:-1]) / 2
    first, middle = dict(color="grey", fill=True, alpha=0.4), dict(color="black", linestyle=":")
    for m, method in enumerate(METHODS):
        top, bottom = axes[:, m + 1]
        plot_regret(top, method, regret[m])
        plot_regret(axes[1, 0], method, regret[m], trial_lines=False)
        top.axhline(1 - ESCAPE.height, color="black", linewidth=0.8, linestyle=":")
        top.set_title(f"{method}: {summary[m]['reached']}/{args.seeds} below line")
        end = dict(color=COLOURS[method], linewidth=1.5)
        stages = ("start", 0, first), ("middle", args.rounds // 2, middle), ("end", args.rounds, end)
        for stage, k, style in stages:
            share = np.histogram(draws[m, :, k], bins)[0] / draws[m, :, k].size
            bottom.stairs(share, bins, label=stage, **style)
            histograms += [dict(method=method, stage=stage, x=x, share=y) for x, y in zip(middles, share, strict=True)]
        bottom.set_yscale("symlog", linthresh=0.01)
        bottom.set(xlabel="action $a$", ylabel="share of draws, all trials", ylim=(0, 1), title="policy")
        bottom.legend(fontsize=8, loc="upper center", ncols=3, columnspacing=1)
    axes[1, 0].set_title("means and 95% intervals")
    axes[1, 0].legend(fontsize=8, loc="upper right", ncols=2)
    save(args, "figure2", figure, regret_rows("escape", trials, regret))
    save_csv(args.save_dir / "figure2_histograms.csv", histograms)
    return summary


def figure_3(args):
    """Broad optima (top) and sharp ones (bottom) from a Gaussian between them; regret, and that minus Square's."""
    figure, axes = plt.subplots(2, 3, figsize=(14, 7), layout="constrained")
    curves, summary = [], []
    for (left, middle, right), (name, base) in zip(axes, (("broad", BROAD), ("sharp", SHARP)), strict=True):
        trials = trials_for(base, METHODS[:3], args)
        regret, _ = train(trials, args, f"figure 3, {name}")
        curves += regret_rows(name, trials, regret)
        summary += summarise(name, trials, regret)
        plot_reward(left, base, f"{name} optima")
        for m, method in enumerate(METHODS[:3]):
            plot_regret(middle, method, regret[m], trial_lines=base is SHARP)  # on broad ones all look the same
            plot_regret(right, method, regret[m] - regret[2], trial_lines=False)
        middle.set(yscale="log", ylim=(1e-4, 1), title="mean" + ", and every trial" * (base is SHARP))
        middle.legend(fontsize=8)
        right.set_yscale("symlog", linthresh=1e-3)  # linear within
        right.set(ylim=(-0.3, 0.3), title="minus Square's (linear within 0.001)", ylabel="simple regret minus Square's")
    save(args, "figure3", figure, curves)
    return summary


FIGURES = {"1": figure_1, "2": figure_2, "3": figure_3}


def prepare(args):
    """One thread, the folder for the results, and 128 + signal as exit code; SystemExit if the folder is no good."""
    torch.set_num_threads(1)  # the networks are too small to share among threads
    torch.set_flush_denormal(True)  # weights of Exp underflow, and denormal numbers are slow
    for number in (signal.SIGINT, signal.SIGTERM):  # at once: SystemExit is lost where a library catches everything
        signal.signal(number, lambda number, _: os._exit(128 + number))
    try:
        args.save_dir.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=args.save_dir).close()
    except OSError as error:
        raise SystemExit(f"--save-dir {args.save_dir}: cannot write there ({error.strerror}); name another") from None


if __name__ == "__main__":
    args = tyro.cli(Args, description=__doc__)
    prepare(args)
    summary = []
    for name in FIGURES if args.figure == "all" else [args.figure]:
        summary += [dict(figure=name) | row for row in FIGURES[name](args)]
    if summary:
        print_table(summary)
        save_csv(args.save_dir / "summary.csv", summary)
    print(f"\nfigures and CSV files: {args.save_dir}")
