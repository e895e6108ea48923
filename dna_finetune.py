"""Fine-tuning a discrete diffusion model of DNA with signed weights: SiMPO (arXiv 2603.10250, now GeMPO), Table 3.

    python dna_finetune.py                                                # a simulated assay, every method, on a CPU
    python dna_finetune.py --data promoters.csv.gz --target activity --split-column start --seeds 3

Round k draws K sequences x_0 from the model p_old, weighs them by w = g((r(x_0) - nu) / lambda), mean w = 1 (9), (11),
and descends on E[w(x_0) ELBO-loss(x_0)], the masked-diffusion form of (7). The minimiser gives letter v the probability
E[w 1{x_0 = v}|x_t] / E[w|x_t] and draws p_old(x_0) w(x_0); if a numerator is below 0 there is none: see loss_clip.
Top to bottom: the masked diffusion model with its loss and its sampler; the weights; fine-tuning; then data, simulated
or from a file; pretraining and the two oracles, one for rewards and one to evaluate; the table; files; the run.
"""

import copy
import csv
import gzip
import hashlib
import itertools
import json
import math
import os
import re
import signal
import time
import zipfile
from dataclasses import asdict, dataclass, fields
from datetime import datetime
from pathlib import Path
from typing import Annotated, Literal, get_args

import matplotlib
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
import tyro
from scipy import stats
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

# What a flag's value must be is part of its type, and what it means is the comment beside it: --help shows that.
Count = Annotated[int, "at least 1", lambda n: n >= 1]
Several = Annotated[int, "at least 2", lambda n: n >= 2]
Sequences = Annotated[int, "at least 100", lambda n: n >= 100]
Length = Annotated[int, "at least 13, the longest site", lambda n: n >= 13]
Seed = Annotated[int, "from 0 to 2^32 - 1", lambda n: 0 <= n < 2**32]
Positive = Annotated[float, "above 0 and finite", lambda x: 0 < x < math.inf]
NonNegative = Annotated[float, "at least 0 and finite", lambda x: 0 <= x < math.inf]
Bound = Annotated[float, "above 0", lambda x: x > 0]
Share = Annotated[float, "above 0 and at most 1", lambda x: 0 < x <= 1]
Decay = Annotated[float, "at least 0 and below 1", lambda x: 0 <= x < 1]
File = Annotated[str, "a file that is there", lambda path: not path or Path(path).is_file()]
Method = Literal["wd1", "exp", "linear", "square", "lin-neg", "sqr-neg"]  # in the paper's order
Methods = Annotated[tuple[Method, ...], "some methods, each once", lambda names: 0 < len(set(names)) == len(names)]
CPU, GPU = torch.cpu.get_capabilities(), torch.cuda.is_available()  # Intel gains by bfloat16 only with AMX
BF16 = torch.cuda.is_bf16_supported(False) if GPU else CPU.get("avx512_bf16" if "AMD" in str(CPU) else "amx_bf16")
LETTERS, MASK = "ACGT", 4


@dataclass
class Args:
    # data
    data: File = ""  # .csv[.gz] with a column seq (A, C, G, T, equal lengths) and numbers; empty: a simulated assay
    target: str = "activity"  # column of --data to make high
    split_column: str = ""  # number in which parts are contiguous, e.g. position; copies may be in two; empty: random
    simulated_sequences: Sequences = 16_000  # sequences of the simulated assay
    simulated_length: Length = 60  # bases per simulated sequence
    pretrained: File = ""  # denoiser to start from, made by this script or benchmark/dna_convert.py; empty: train it
    reward_oracle: File = ""  # oracle that rewards, likewise
    eval_oracle: File = ""  # oracle that only judges, likewise
    accessibility: File = ""  # classifier of accessibility, likewise, or a .csv[.gz] to train one on; empty: none
    accessibility_column: str = "hepg2"  # column of 0 and 1 in the --accessibility table

    # diffusion model; Wang et al. 2024 (2410.13643) have 128, 4 and steps 131_500, batch 512, lr 3e-4, EMA 0.9999
    width: Count = 64  # channels of the dilated convolutions
    stacks: Count = 1  # convolutions at each of the dilations 1, 1, 4, 16, 64
    pretrain_steps: Count = 2_500  # Adam steps of pretraining
    pretrain_batch: Count = 64  # sequences per step of pretraining
    pretrain_lr: Positive = 1e-3  # learning rate of pretraining, falling to a tenth along a cosine
    ema: Decay = 0.999  # decay of the averaged weights that are sampled from and fine-tuned
    sampling_steps: Count = 128  # T: steps of the ancestral sampler

    # oracles
    oracle_width: Count = 64  # channels of the oracles that are trained here
    oracle_epochs: Count = 20  # rows drawn, in multiples of the oracle's part of the data
    oracle_lr: Positive = 2e-3  # learning rate of the oracles, falling to a tenth along a cosine

    # SiMPO: the same for every method; the authors' code has 500 rounds of 4 groups of K = 128, 1 update, lr 1e-4
    methods: Methods = get_args(Method)  # weightings to fine-tune with
    epsilon: NonNegative = 0.5  # no weight of lin-neg and sqr-neg is below -epsilon, the floor of (11)
    num_particles: Several = 64  # K: sequences that share one normaliser nu, drawn per round
    temperature_rule: Literal["kl", "authors"] = "kl"  # kl: (9), lambda at rest in (30); authors: weigh_as_authors
    target_kl: float = 1.5  # delta: KL of the weights from uniform, in nats, which lambda meets; rule kl
    temperature: NonNegative = 0.0  # lambda in standard deviations of the K rewards; 0: by --target-kl; rule kl
    rounds: Count = 25  # improvements of the policy; each draws K sequences
    updates: Count = 4  # Adam steps per round, on the same sequences with new masks
    elbo_draws: Count = 2  # masked copies of each sequence per Adam step
    lr: Positive = 5e-4  # learning rate of fine-tuning
    grad_norm: Positive = 10.0  # gradients are scaled down to this norm
    loss_clip: Bound = math.inf  # a letter's -log p, in nats, is cut here where the weight is negative: bounds the loss
    kl_weight: NonNegative = 0.0  # weight of the KL to the pretrained model, per token; 0 as in the paper
    samples_from: Literal["tuned", "pretrained"] = "tuned"  # p_old: the model as it is now, or as it was at first

    # evaluation, output, machine
    eval_samples: Several = 640  # sequences drawn from each tuned model
    eval_elbo_draws: Count = 16  # masked copies per sequence for its log-likelihood under the pretrained model
    top_share: Share = 0.01  # most active share of the data, whose 3-mers count; the paper has 0.001 of 735,156
    seed: Seed = 1  # seed of the data, the pretraining and the oracles, and first seed of the fine-tuning
    seeds: Count = 1  # fine-tuning runs per method, with seeds seed, seed + 1, ...
    device: str = "cuda" if GPU else "cpu"  # cpu, cuda, cuda:1, ...; cpu beside a GPU: with sampling in float32
    sampling_dtype: Literal["float32", "bfloat16"] = "bfloat16" if BF16 else "float32"  # precision of sampling
    track: bool = False  # send arguments and TensorBoard scalars to Weights & Biases, too
    wandb_project: str = "simpo"  # Weights & Biases project

    def __post_init__(self):
        """Raises SystemExit with one line for the first argument that makes no sense."""
        rules = {field.name: field.type.__metadata__ for field in fields(self) if hasattr(field.type, "__metadata__")}
        log_k = math.log(max(self.num_particles, 2))
        if self.temperature_rule == "authors":
            rules["temperature"] = "0 with --temperature-rule authors", lambda temperature: temperature == 0
        elif not self.temperature:
            rules["target_kl"] = f"above 0 and below log(num_particles) = {log_k:.2f}", lambda kl: 0 < kl < log_k
        rules["split_column"] = "empty without --data", lambda column: self.data or not column
        for name, (rule, holds) in rules.items():
            if not holds(getattr(self, name)):
                raise SystemExit(f"--{name.replace('_', '-')} must be {rule}; got {getattr(self, name)}")


def one_hot(x, classes):
    """Tokens x (B, L) as (B, L, classes); what has that form, soft or not, stays as it is."""
    return x if x.is_floating_point() else F.one_hot(x.long(), classes).float()


def convolve(h, layer, dilation=1):
    """nn.Conv1d on channels-last (B, L, C), same length, without the taps that see nothing but padding."""
    half = layer.kernel_size[0] // 2
    reach = min(half, (h.shape[1] - 1) // dilation)
    weight = layer.weight[:, :, None, half - reach : half + reach + 1]  # (C', C, 1, taps)
    h = h.transpose(1, 2)[:, :, None]  # (B, C, 1, L), memory as it was
    h = F.conv2d(h, weight, layer.bias, padding=(0, reach * dilation), dilation=(1, dilation))
    return h[:, :, 0].transpose(1, 2)


class Denoiser(nn.Module):
    """Dilated convolutions of Wang et al. (2024): log p(x_0 | x_t) at every position, whatever the time.

    Their time embedding sees time 0 always, so that it is one vector per layer: `shifts`.
    """

    def __init__(self, width, stacks):
        super().__init__()
        self.dilations = [d for d in (1, 1, 4, 16, 64) for _ in range(stacks)]
        self.linear = nn.Conv1d(5, width, 9)
        self.convs = nn.ModuleList(nn.Conv1d(width, width, 9) for _ in self.dilations)
        self.shifts = nn.Parameter(torch.zeros(len(self.dilations), width))
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in self.dilations)
        self.hidden, self.logits = nn.Linear(width, width), nn.Linear(width, 4)

    def forward(self, x):
        """x (B, L) with MASK where masked, or as one-hots (B, L, 5), soft or not -> log p (B, L, 4)."""
        h = F.relu(convolve(one_hot(x, 5).to(self.shifts.dtype), self.linear))
        for conv, norm, shift, dilation in zip(self.convs, self.norms, self.shifts, self.dilations, strict=True):
            h = h + F.relu(convolve(norm(h + shift), conv, dilation))
        return self.logits(F.relu(self.hidden(h))).float().log_softmax(-1)


def corrupt(x, draws, generator):
    """Masked copies of x (B, L): x_t (B, draws, L), masked (B, draws, L), factor (B, draws, 1) of their losses.

    The continuous-time ELBO of log-linear noise masks each position with probability t ~ U(0, 1) and weighs by 1 / t.
    Integrated over t, that is a number m of masks uniform in 1..L, placed at random, and the factor L / m: no small t.
    """
    B, L = x.shape
    strata = torch.arange(draws, device=x.device)  # one draw in each, so that the copies differ in noise
    stratum = torch.rand(B, 1, generator=generator, device=x.device) + strata  # (B, draws)
    m = (stratum / draws * L).long().clamp(max=L - 1) + 1
    noise = torch.rand(B, draws, L, generator=generator, device=x.device)
    masked = noise <= noise.sort(-1).values.gather(-1, m[..., None] - 1)
    return torch.where(masked, MASK, x[:, None]), masked, L / m[..., None]


def elbo_loss(log_p, x, masked, factor):
    """Minus the ELBO in nats, one estimate per copy: log_p (B, draws, L, 4), x (B, L) -> (B, draws)."""
    log_p_x = log_p.gather(-1, x[:, None, :, None].expand(*masked.shape, 1))[..., 0]
    return -(factor * masked * log_p_x).sum(-1)


@torch.no_grad()
def log_likelihood(denoiser, x, draws, seed):
    """ELBO of each sequence in nats, a lower bound of log p(x): (B, L) -> (B,)."""
    generator, bounds = torch.Generator(x.device).manual_seed(seed), []
    for part in x.split(max(1, 1024 // draws)):
        noisy, masked, factor = corrupt(part, draws, generator)
        log_p = denoiser(noisy.flatten(0, 1)).view(*noisy.shape, 4)
        bounds.append(-elbo_loss(log_p, part, masked, factor).mean(-1))
    return torch.cat(bounds)


@torch.no_grad()
def sample(denoiser, count, length, steps, generator, dtype="float32", batch=64):
    """Ancestral sampling in `steps` steps from t = 1 to 0: (count, L).

    From t to s a position stays masked with probability s / t, whatever its letter will be: the step at which it leaves
    the mask is uniform, and known beforehand. The network runs only for the steps of a sequence in which some do.
    """
    denoiser, parts = copy.deepcopy(denoiser).to(getattr(torch, dtype)), []
    for start in range(0, count, batch):
        shape, device = (min(batch, count - start), length), generator.device
        leaves = torch.randint(steps, shape, generator=generator, device=device)  # (B, L)
        gumbel = -torch.empty(*shape, 4, device=device).exponential_(generator=generator).log()
        sorted_leaves, order = leaves.sort(-1)
        rank = F.pad(sorted_leaves.diff(dim=-1).sign(), (1, 0)).cumsum(-1)  # equal steps share a rank
        turn = torch.empty_like(rank).scatter(-1, order, rank)
        x = torch.full(shape, MASK, device=device)
        for i in range(int(turn.max()) + 1):
            x = torch.where(turn == i, (denoiser(x) + gumbel).argmax(-1), x)
        parts.append(x)
    return torch.cat(parts)


@torch.no_grad()
def reweight(q, temperature, power, epsilon):
    """Weights w = g((q - nu) / temperature) of K actions, with nu such that they average 1: (9), (11), appendix E.

    g(y) = y^power for y > 0 and max(y, -epsilon) below. Finite q (..., K), power > 0, epsilon >= 0, temperature
    > 0, one or (..., 1); returns weights (..., K) and nu (..., 1) in q's dtype.
    For another g the branches do not hold: bisect y_max until g(y_max - gap), which rises in it, has mean 1.
    """
    K = q.shape[-1]
    q_max = q.double().amax(-1, keepdim=True)
    gap = (q_max - q.double()) / temperature  # (..., K) >= 0, so y = y_max - gap, y_max = (q_max - nu) / temperature

    def g(y):
        return y.clamp(min=0) ** power + y.clamp(-epsilon, 0)

    sorted_gap = gap.sort(-1).values
    k = torch.arange(1, K + 1, device=q.device, dtype=torch.float64)
    s1, s2 = sorted_gap.cumsum(-1), (sorted_gap**2).cumsum(-1)  # (24)-(29): q = -gap, S1 = -s1, nu = -y_max, sum w = K
    if power == 1:
        active = k * sorted_gap - s1 < K * (1 + epsilon)  # (25), with the floor
        y_max = (K + (K - k) * epsilon + s1) / k  # (24), if k actions are above the floor, for each k
    elif power == 2 and epsilon == 0:
        active = s2 - 2 * sorted_gap * s1 + k * sorted_gap**2 < K  # (29)
        y_max = (s1 + (s1**2 - k * (s2 - K)).clamp(min=0).sqrt()) / k  # (28)
    else:  # otherwise bisect the largest weight w_max = y_max^p, in [1, K + (K - 1) epsilon]
        low, high = torch.ones_like(q_max), torch.full_like(q_max, K + (K - 1) * epsilon)
        for _ in range(60):
            w_max = (low + high) / 2
            too_high = g(w_max ** (1 / power) - gap).mean(-1, keepdim=True) > 1
            low, high = torch.where(too_high, low, w_max), torch.where(too_high, w_max, high)
        y_max = low ** (1 / power)
        below, above = g(y_max - gap), g(high ** (1 / power) - gap)  # for a small p the last bit of w_max matters
        share = (1 - below.mean(-1, keepdim=True)) / (above - below).mean(-1, keepdim=True).clamp(min=1e-300)
        return below.lerp(above, share.clamp(0, 1)).to(q.dtype), (q_max - temperature * y_max).to(q.dtype)
    y_max = y_max.gather(-1, active.sum(-1, keepdim=True) - 1)  # active up to the right k, then no more
    return g(y_max - gap).to(q.dtype), (q_max - temperature * y_max).to(q.dtype)


def weigh(method, q, temperature, epsilon):
    """Weights of K sequences by name: q (..., K) -> (..., K), of mean 1, but for wd1, whose mean is 0 (Example 3.4)."""

    def softmax(q):  # (2), (5)
        return (q.shape[-1] * torch.softmax(q.double() / temperature, -1)).to(q.dtype)

    if method in ("exp", "wd1"):
        return softmax(q) if method == "exp" else softmax(q) - softmax(-q)
    floor = epsilon if method.endswith("neg") else 0.0
    return reweight(q, temperature, 1 if method.startswith("lin") else 2, floor)[0]


@torch.no_grad()
def solve_temperature(method, q, args):
    """lambda (..., 1) for which the KL of the weights from uniform is delta, where (30) comes to rest; or the flag's.

    Of the clipped weights (appendix G), for wd1 of its first softmax. Where ties keep the KL below delta, 1e-3 std(q).
    """
    spread = q.double().std(-1, keepdim=True).clamp(min=1e-9)
    if args.temperature:
        return args.temperature * spread
    low, high = 1e-3 * spread, 1e3 * spread  # the KL falls as lambda rises: bisect its logarithm
    for _ in range(40):
        middle = (low * high).sqrt()
        p = weigh("exp" if method == "wd1" else method, q.double(), middle, args.epsilon).clamp(min=1e-6)
        p = p / p.sum(-1, keepdim=True)
        too_greedy = math.log(q.shape[-1]) + (p * p.log()).sum(-1, keepdim=True) > args.target_kl
        low, high = torch.where(too_greedy, middle, low), torch.where(too_greedy, high, middle)
    return (low * high).sqrt()


def weigh_as_authors(method, q, epsilon):
    """Weights (K,) of Table 3 in the authors' code: nu is the mean of q (K,), lambda its deviation, or 0.1 for exp.

    Where theirs is a softmax, which sums to 1, this is K times that. The others are not normalised.
    """
    A = (q - q.mean()) / q.std().clamp(min=1e-9)
    if method in ("exp", "wd1"):
        return weigh("exp", q, 0.1, 0.0) if method == "exp" else weigh("wd1", A, 1.0, 0.0)
    lower = -epsilon if method.endswith("neg") else 0.0
    return A.clamp(lower, 3) if method.startswith("lin") else torch.where(A > 0, A**2, A.clamp(lower, 0))


def finetune(pretrained, oracle, length, method, seed, args, judges):
    """The pretrained denoiser tuned by one method for the oracle's activity -> the content of its file.

    The curve has one row per round; judges, functions of x (K, L) by name, are logged and influence nothing.
    """
    denoiser, curve, start = copy.deepcopy(pretrained).requires_grad_(True), [], time.time()
    optimizer = torch.optim.Adam(denoiser.parameters(), lr=args.lr)
    generator = torch.Generator(next(pretrained.parameters()).device).manual_seed(seed)
    for k in (progress := tqdm(range(args.rounds), desc=f"{method}-seed{seed}", unit="round", dynamic_ncols=True)):
        # K sequences from p_old, their rewards, their weights (9), (11).
        p_old, K = denoiser if args.samples_from == "tuned" else pretrained, args.num_particles
        x = sample(p_old, K, length, args.sampling_steps, generator, args.sampling_dtype, batch=K)  # (K, L)
        q = predict(oracle, x)  # (K,)
        where = f"{method}, round {k}" + f", --epsilon {args.epsilon:g}" * method.endswith("neg")
        check_finite(where, reward=q)
        if args.temperature_rule == "kl":
            weights = weigh(method, q, solve_temperature(method, q, args), args.epsilon)
        else:
            weights = weigh_as_authors(method, q, args.epsilon)

        # Weighted ELBO: the masked form of (7), per token.
        losses = []
        for _ in range(args.updates):
            noisy, masked, factor = corrupt(x, args.elbo_draws, generator)
            log_p = denoiser(noisy.flatten(0, 1)).view(*noisy.shape, 4)
            cut = torch.where(weights[:, None, None, None] < 0, log_p.clamp(min=-args.loss_clip), log_p)
            loss = (weights * elbo_loss(cut, x, masked, factor).mean(-1)).mean() / length
            if args.kl_weight:
                with torch.no_grad():
                    log_prior = pretrained(noisy.flatten(0, 1)).view(*noisy.shape, 4)
                kl = (log_p.exp() * (log_p - log_prior)).sum(-1)  # (K, draws, L)
                loss = loss + args.kl_weight * (factor * masked * kl).sum(-1).mean() / length
            optimizer.zero_grad()
            loss.backward()
            norm = nn.utils.clip_grad_norm_(denoiser.parameters(), args.grad_norm)
            check_finite(where, loss=loss, gradient=norm)
            optimizer.step()
            losses.append(loss.item())

        row = dict(step=k, seconds=time.time() - start, loss=losses[-1], lowest_loss=min(losses))
        row |= dict(reward=q.median().item(), distinct=len(x.unique(dim=0)) / len(x))
        row |= dict(largest_weight=weights.max().item(), negative_mass=weights.clamp(max=0).abs().mean().item())
        curve.append(row | {name: judge(x).median().item() for name, judge in judges.items()})
        progress.set_postfix(reward=f"{row['reward']:.2f}", refresh=False)
    return dict(kind="denoiser", state=denoiser.state_dict(), curve=curve)


def check_finite(where, **quantities):
    """Raises SystemExit with one line for the first quantity that is not finite."""
    for name, value in quantities.items():
        if not value.isfinite().all():
            raise SystemExit(f"stopped at {where}: {name} not finite; for a loss, a smaller learning rate may help")


# Liver transcription factors: consensus (IUPAC), strength, best place (share of the length), weight on the other strand
FACTORS = {
    "HNF1A": ("GTTAATNATTAAC", 1.2, 0.7, 1.0),
    "HNF4A": ("CAAAGTCCA", 1.0, 0.6, 0.4),
    "FOXA2": ("TRTTTACTTW", 0.7, 0.3, 0.6),
    "CEBPA": ("RTTGCGYAAY", 1.0, 0.5, 1.0),
    "HNF6": ("AAAATCAATAA", 0.7, 0.4, 0.6),
    "ZEB1": ("CAGGTG", -0.8, 0.5, 1.0),  # represses
}
IUPAC = {"A": "A", "C": "C", "G": "G", "T": "T", "R": "AG", "Y": "CT", "W": "AT", "N": "ACGT"}


def occupancy(x):
    """How much each factor is bound: exp(-2 mismatches) per site, times place and strand. x (B, L) -> (B, factors)."""
    letters, length = one_hot(x, 4).transpose(1, 2), x.shape[1]  # (B, 4, L)
    bound = []
    for consensus, _, place, other_strand in FACTORS.values():
        motif = torch.tensor([[float(letter in IUPAC[code]) for code in consensus] for letter in LETTERS])  # (4, W)
        motif = torch.stack([motif, motif.flip(0, 1)]).to(x.device)  # A and T, C and G are complements: flips
        site = torch.exp(-2 * (len(consensus) - F.conv1d(letters, motif)))  # (B, 2, L - W + 1)
        middle = (torch.arange(site.shape[-1], device=x.device) + len(consensus) / 2) / length
        near = 0.3 + 0.7 * torch.exp(-0.5 * ((middle - place) / 0.2) ** 2)
        strand = torch.tensor([[1.0], [other_strand]], device=x.device)
        bound.append(1 - torch.exp(-3 * (site * near * strand).sum((1, 2))))
    return torch.stack(bound, -1)


def true_activity(x):
    """The simulated assay without noise: saturating, with synergies and repression. (B, L) -> (B,)"""
    bound = dict(zip(FACTORS, occupancy(x).unbind(-1), strict=True))
    drive = sum(strength * bound[name] for name, (_, strength, _, _) in FACTORS.items() if strength > 0)
    drive = drive + 1.5 * bound["FOXA2"] * bound["HNF4A"] + 1.0 * bound["HNF1A"] * bound["CEBPA"]
    return 10 * drive**2 / (drive**2 + 2.5**2) * (1 + FACTORS["ZEB1"][1] * bound["ZEB1"])


def simulate(count, length, seed):
    """Markov background, poor in CpG, with planted sites: x (count, L) uint8 and activity (count,) with noise."""
    rng = np.random.default_rng(seed)
    kind = rng.choice(3, count, p=[0.35, 0.45, 0.2])  # rich in A and T, mixed, rich in C and G
    base = np.array([[0.34, 0.16, 0.16, 0.34], [0.29, 0.21, 0.21, 0.29], [0.21, 0.29, 0.29, 0.21]])
    step = np.repeat(base[:, None], 4, 1)  # (kind, before, next)
    step[:, 1, 2] *= np.array([0.2, 0.3, 0.7])  # CpG
    step[:, [0, 1, 2, 3], [0, 1, 2, 3]] *= 1.15  # runs
    step[:, 3, 0] *= 0.75  # TpA
    cumulative = step.cumsum(-1) / step.sum(-1, keepdims=True)
    x = np.empty((count, length), np.uint8)
    x[:, 0] = rng.integers(4, size=count)
    for i in range(1, length):
        x[:, i] = (rng.random((count, 1)) > cumulative[kind, x[:, i - 1], :3]).sum(-1)
    allowed = [[[LETTERS.index(c) for c in IUPAC[code]] for code in consensus] for consensus, *_ in FACTORS.values()]
    rows = np.repeat(np.arange(count), rng.poisson(2.0, count))
    for row, factor in zip(rows, rng.integers(len(FACTORS), size=len(rows)), strict=True):
        u, v, start = rng.random((3, len(allowed[factor])))  # start[0]: place, start[1]: strand
        site = np.array([letters[int(share * len(letters))] for letters, share in zip(allowed[factor], u, strict=True)])
        site = np.where(v < 0.06, (site + 1 + (50 * v).astype(int)) % 4, site)  # 6% mutated
        place = int(start[0] * (length - len(site) + 1))
        x[row, place : place + len(site)] = site if start[1] < 0.5 else 3 - site[::-1]
    x, noise = torch.from_numpy(x), torch.from_numpy(0.3 * rng.standard_normal(count))
    return x, (true_activity(x) + noise).float()


def read_table(flag, path, columns):
    """Sequences (N, L) uint8 and the named columns (N, columns), float64, of a .csv[.gz], one row in memory at a time.

    Malformed rows are left out and reported; SystemExit with one line where the file is of no use.
    """
    code = bytes.maketrans(b"ACGTacgt", bytes(2 * [0, 1, 2, 3]))
    tokens, values, bad, length = bytearray(), [], [], None
    try:
        with (gzip.open if str(path).endswith(".gz") else open)(path, "rt", newline="", encoding="utf-8-sig") as file:
            rows = csv.DictReader(file)
            rows.fieldnames = header = [name.strip() for name in rows.fieldnames or []]
            for name in ("seq", *columns):
                if name not in header:
                    raise SystemExit(f"{flag} {path} has no column {name!r}; it has {', '.join(header) or 'none'}")
            for row in rows:
                try:
                    if None in row or None in row.values():
                        raise ValueError(f"not {len(header)} fields")
                    sequence, numbers = row["seq"].strip(), [float(row[name]) for name in columns]
                    if not re.fullmatch("[ACGTacgt]+", sequence):
                        raise ValueError("a sequence with letters other than A, C, G, T, or with none")
                    if not all(abs(number) < 3e38 for number in numbers):
                        raise ValueError("a number that is not finite in float32")
                except ValueError as error:
                    bad.append(f"line {rows.line_num}: {error}")
                    continue
                if len(sequence) != (length := length or len(sequence)):
                    lengths = f"line {rows.line_num} has {len(sequence)} letters, those before have {length}"
                    raise SystemExit(f"{flag} {path}: sequences must be equally long; {lengths}")
                tokens += sequence.encode().translate(code)
                values.extend(numbers)
    except (OSError, EOFError, gzip.zlib.error, csv.Error, UnicodeDecodeError) as error:
        raise SystemExit(f"{flag} {path}: cannot read it: {error}") from None
    if not tokens:
        raise SystemExit(f"{flag} {path}: no row is left; {f'the first malformed: {bad[0]}' if bad else 'it is empty'}")
    if bad:
        print(f"{path}: {len(bad)} malformed rows left out, the first at {bad[0]}")
    x = torch.frombuffer(tokens, dtype=torch.uint8).view(-1, length)
    return x, torch.tensor(values, dtype=torch.float64).view(-1, len(columns))


def read_data(args):
    """Sequences (N, L) uint8, activity (N,), rows of the three parts, and the data's origin, of which keys are made.

    Parts: 45% train the reward oracle, 45% the evaluation one, 10% none; if random, copies are parted only at a cut.
    """
    if args.data:
        x, values = read_table("--data", args.data, [args.target, *filter(None, [args.split_column])])
        y, origin = values[:, 0].float(), ["file", sha256(args.data), args.target, args.split_column, args.seed]
        if len(x) < 100:
            raise SystemExit(f"--data {args.data}: {len(x)} rows; at least 100 are needed")
    else:
        x, y = simulate(args.simulated_sequences, args.simulated_length, args.seed)
        origin = ["simulated", args.simulated_sequences, args.simulated_length, args.seed]
    first, group = np.unique(x.numpy(), axis=0, return_index=True, return_inverse=True)[1:]
    order = np.random.default_rng(args.seed).permutation(len(x)).argsort()[first[group]].argsort(kind="stable")
    if args.split_column:
        order = values[:, 1].numpy().argsort(kind="stable")
    return x, y, torch.from_numpy(order).tensor_split([int(0.45 * len(x)), int(0.9 * len(x))]), origin


def cosine(share):
    return 0.1 + 0.45 * (1 + math.cos(math.pi * share))


def pretrain(x, args):
    """A denoiser trained on x (N, L) -> the content of its file: the averaged weights, and the loss every 20 steps."""
    torch.manual_seed(args.seed)
    denoiser, curve = Denoiser(args.width, args.stacks).to(x.device), []
    average = copy.deepcopy(denoiser).requires_grad_(False)
    optimizer = torch.optim.Adam(denoiser.parameters(), lr=args.pretrain_lr)
    generator = torch.Generator(x.device).manual_seed(args.seed)
    for step in (progress := tqdm(range(args.pretrain_steps), desc="pretraining", dynamic_ncols=True)):
        rows = torch.randint(len(x), (args.pretrain_batch,), generator=generator, device=x.device)
        batch = x[rows].long()
        noisy, masked, factor = corrupt(batch, 1, generator)
        loss = elbo_loss(denoiser(noisy[:, 0])[:, None], batch, masked, factor).mean() / x.shape[1]
        check_finite(f"pretraining, step {step}", loss=loss)
        optimizer.param_groups[0]["lr"] = args.pretrain_lr * cosine(step / args.pretrain_steps)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(denoiser.parameters(), 1.0)
        optimizer.step()
        decay = min(args.ema, (1 + step) / (10 + step))
        with torch.no_grad():
            for mean, parameter in zip(average.parameters(), denoiser.parameters(), strict=True):
                mean.lerp_(parameter, 1 - decay)
        if step % 20 == 0:
            curve.append(dict(step=step, nats_per_base=loss.item()))
            progress.set_postfix(nats_per_base=f"{loss:.3f}", refresh=False)
    return dict(kind="denoiser", state=average.state_dict(), curve=curve)


class Oracle(nn.Module):
    """A convolutional network that predicts a number from a sequence and knows places and strands."""

    def __init__(self, width, length):
        super().__init__()
        self.first, self.second = nn.Conv1d(4, width, 15), nn.Conv1d(width, width, 7)
        self.hidden, self.last = nn.Linear(width * math.ceil(length / 5), width), nn.Linear(width, 1)
        self.dropout = nn.Dropout(0.2)
        self.register_buffer("mean", torch.zeros(()))
        self.register_buffer("std", torch.ones(()))

    def forward(self, x):
        """x (B, L), or one-hots (B, L, 4), soft or not -> activity, or the logit of a classifier: (B,)."""
        h = F.relu(convolve(one_hot(x, 4), self.first))
        h = F.relu(convolve(self.dropout(h), self.second)).transpose(1, 2)
        h = F.max_pool1d(h, 5, ceil_mode=True)
        h = F.relu(self.hidden(self.dropout(h.flatten(1))))
        return self.mean + self.std * self.last(self.dropout(h))[:, 0]


def train_oracle(x, y, classifier, args):
    """An oracle trained on x (N, L), y (N,) by squared error, or as a classifier if y is 0 or 1; its file's content."""
    torch.manual_seed(args.seed)
    oracle, curve = Oracle(args.oracle_width, x.shape[1]).to(x.device), []
    if not classifier:
        oracle.mean.fill_(y.mean())
        oracle.std.fill_(y.std().clamp(min=1e-6))
    optimizer = torch.optim.Adam(oracle.parameters(), lr=args.oracle_lr, weight_decay=1e-5)
    generator, steps = torch.Generator(x.device).manual_seed(args.seed), math.ceil(len(x) / 128) * args.oracle_epochs
    for step in (progress := tqdm(range(steps), desc="oracle", dynamic_ncols=True)):
        rows = torch.randint(len(x), (128,), generator=generator, device=x.device)
        output = oracle(x[rows])
        squared = ((output - y[rows]) / oracle.std).square().mean()
        loss = F.binary_cross_entropy_with_logits(output, y[rows]) if classifier else squared
        check_finite(f"training an oracle, step {step}", loss=loss)
        optimizer.param_groups[0]["lr"] = args.oracle_lr * cosine(step / steps)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 20 == 0:
            curve.append(dict(step=step, loss=loss.item()))
            progress.set_postfix(loss=f"{loss:.3f}", refresh=False)
    return dict(kind="oracle", length=x.shape[1], state=oracle.state_dict(), curve=curve)


@torch.no_grad()
def predict(oracle, x):
    """The oracle's numbers for x (N, L) -> (N,)."""
    return torch.cat([oracle(part) for part in x.split(512)])


def kmers(x, k=3):
    """Frequencies of the 4^k words in x (N, L)."""
    index = sum(x[:, i : x.shape[1] - k + 1 + i].long() * 4**i for i in range(k))
    return torch.bincount(index.flatten(), minlength=4**k).double() / index.numel()


def evaluate(denoiser, models, top, seed, args):
    """Sequences x (N, L) drawn from the denoiser and their row of the table; top (M, L) are the data's most active."""
    generator = torch.Generator(top.device).manual_seed(10_000 + seed)
    x = sample(denoiser, args.eval_samples, top.shape[1], args.sampling_steps, generator, args.sampling_dtype)
    counts = F.one_hot(x, 4).sum(0).double()  # (L, 4)
    same = (counts * (counts - 1)).sum(-1) / (len(x) * (len(x) - 1))  # (L,): share of pairs with the same letter
    row = dict(
        pred_activity=predict(models["eval_oracle"], x).median(),
        reward_oracle=predict(models["reward_oracle"], x).median(),
        true_activity=math.nan if args.data else true_activity(x).median(),
        kmer_correlation=torch.corrcoef(torch.stack([kmers(x), kmers(top)]))[0, 1],
        log_likelihood=log_likelihood(models["pretrained"], x, args.eval_elbo_draws, args.seed).median(),
        distance=1 - same.mean(),
        distinct=len(x.unique(dim=0)) / len(x),
        accessible=(predict(models["accessibility"], x) > 0).double().mean() if "accessibility" in models else math.nan,
    )
    return dict(x=x, row={name: float(value) for name, value in row.items()})


COLUMNS = {  # of the table: heading, digits
    "pred_activity": ("Pred-Activity", 2),  # median of the evaluation oracle
    "reward_oracle": ("reward oracle", 2),
    "true_activity": ("true", 2),
    "kmer_correlation": ("3-mer corr.", 2),
    "log_likelihood": ("log-lik. (ELBO)", 1),
    "distance": ("distance", 3),  # mean share of places where two sequences differ
    "distinct": ("distinct", 3),
    "accessible": ("accessible", 2),
}
COLOURS = {"pretrained": "#000000", "wd1": "#CC79A7", "exp": "#E69F00", "linear": "#0072B2", "square": "#009E73"}
COLOURS |= {"lin-neg": "#D55E00", "sqr-neg": "#56B4E9"}  # Okabe and Ito
LABELS = {method: method for method in COLOURS} | {"exp": "exp (RL-D2)"}


def summarise(rows, curves, run_dir):
    """The table as text, with intervals of the differences, also in files; score against likelihood as a plot."""
    methods = list(dict.fromkeys(row["method"] for row in rows))
    mine = {method: [row for row in rows if row["method"] == method] for method in methods}
    scores = {method: np.array([row["pred_activity"] for row in mine[method]]) for method in methods}
    best = max([m for m in methods if m in ("pretrained", "wd1", "exp")], key=lambda m: scores[m].mean())  # baselines
    columns = {name: column for name, column in COLUMNS.items() if not math.isnan(rows[0][name])}
    lines = [["method", *(heading for heading, _ in columns.values()), f"over {best}"]]
    for method in methods:
        line, better = [LABELS[method]], (scores[method].mean() - scores[best].mean()) / abs(scores[best].mean())
        for name, (_, digits) in columns.items():
            values = np.array([row[name] for row in mine[method]])
            mean, std = values.mean(), values.std(ddof=1) if len(values) > 1 else math.nan
            line.append(f"{mean:.{digits}f}" + (f" +- {std:.{digits}f}" if len(values) > 1 else ""))
        lines.append([*line, f"{better:+.1%}"])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    out = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]
    out.append("\nPred-Activity: median of the evaluation oracle; +-: deviation over seeds. Differences by seed:")
    for low, high in itertools.combinations([m for m in get_args(Method) if m in methods], 2):
        line = f"{high} - {low}: {(scores[high] - scores[low]).mean():+.2f}"
        if len(scores[low]) > 1:
            interval = stats.ttest_rel(scores[high], scores[low]).confidence_interval(0.95)
            line += f", 95% interval [{interval.low:+.2f}, {interval.high:+.2f}]"
        out.append(line)
    (run_dir / "table.txt").write_text("\n".join(out) + "\n")
    for name, entries in {"rows.csv": rows, "curves.csv": curves}.items():
        with open(run_dir / name, "w", newline="") as file:
            writer = csv.DictWriter(file, entries[0])
            writer.writeheader()
            writer.writerows({k: f"{v:.5g}" if isinstance(v, float) else v for k, v in row.items()} for row in entries)

    figure, axes = plt.subplots(figsize=(6, 4.2), layout="constrained")
    for method in methods:
        likelihood = [row["log_likelihood"] for row in mine[method]]
        axes.plot(likelihood, scores[method], "o", color=COLOURS[method], label=LABELS[method])
        axes.plot(np.mean(likelihood), scores[method].mean(), "+", color=COLOURS[method], markersize=16)
    axes.set(xlabel="log-likelihood under the pretrained model (ELBO, nats)", ylabel="Pred-Activity (+: mean)")
    axes.legend(fontsize=8)
    figure.savefig(run_dir / "score_likelihood.png", dpi=120)
    plt.close(figure)
    return "\n".join(out)


def sha256(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def save(path, state):
    """torch.save, written aside and moved into place: a file of this name is always whole."""
    aside = path.with_suffix(f".{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(aside, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    except (OSError, RuntimeError) as error:
        raise SystemExit(f"{path} cannot be written, is there room? {str(error).splitlines()[0]}") from None
    finally:
        if aside.exists():
            aside.unlink()


def load(path):
    """What `save` wrote, executing nothing from it; SystemExit if it is missing or damaged."""
    try:
        if zipfile.ZipFile(path).testzip():  # torch.load does not look at the checksums that torch.save writes
            raise ValueError("a checksum is wrong")
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # what a damaged zip file can raise is not documented
        raise SystemExit(f"{path} cannot be used: {str(error).splitlines()[0]}") from None


def load_model(kind, path, length, device):
    """The denoiser or the oracle of a file of this script, frozen; SystemExit if it holds no such thing."""
    try:
        content = dict(load(path))
        state = content["state"] if content["kind"] == kind else {}
        if kind == "denoiser":
            model = Denoiser(len(state["linear.weight"]), len(state["shifts"]) // 5)
        elif (bases := content["length"]) != length:
            raise SystemExit(f"{path} is for {bases} bases, the data has {length}")
        else:
            model = Oracle(len(state["first.bias"]), length)
        model.load_state_dict(state)
    except (AttributeError, KeyError, RuntimeError, TypeError, ValueError):
        raise SystemExit(f"{path} holds no {kind} of this script; see benchmark/dna_convert.py") from None
    return model.to(device).eval().requires_grad_(False)


def stage(name, settings, make, /, **inputs):
    """The file runs/dna_stages/<name>-<hash of the settings and this script>.pt with what make(**inputs) returns.

    A finished stage is not made again, a killed one is.
    """
    settings = json.dumps([settings, sha256(__file__)], sort_keys=True)
    path = Path("runs/dna_stages") / f"{name}-{hashlib.sha256(settings.encode()).hexdigest()[:12]}.pt"
    if path.exists():
        try:
            load(path)
            print(f"{path} is there: not made again")
            return path
        except SystemExit as damage:
            print(f"{damage}: made again")
    save(path, make(**inputs))
    return path


if __name__ == "__main__":
    args = tyro.cli(Args, description=__doc__)
    for number in (signal.SIGINT, signal.SIGTERM):  # the finished stages are kept
        signal.signal(number, lambda number, _: os._exit(128 + number))
    try:
        device = torch.Generator(torch.zeros(1, device=args.device).double().device).device
    except Exception as error:  # which one depends on the device, and MPS has no doubles
        raise SystemExit(f"--device {args.device}: {str(error).splitlines()[0].split('. ')[0]}; use cpu") from None

    # The data, and the models that are given as files, before any work.
    x, y, (for_reward, for_eval, _), origin = read_data(args)
    top = x[y.topk(max(2, round(args.top_share * len(y)))).indices].to(device)
    length = x.shape[1]
    files = {name: getattr(args, name) for name in ("pretrained", "reward_oracle", "eval_oracle", "accessibility")}
    data = dict(reward_oracle=(x[for_reward], y[for_reward], origin), eval_oracle=(x[for_eval], y[for_eval], origin))
    if args.accessibility.endswith((".csv", ".csv.gz")):
        open_x, open_y = read_table("--accessibility", args.accessibility, [args.accessibility_column])
        if open_x.shape[1] != length:
            raise SystemExit(f"--accessibility {args.accessibility}: {open_x.shape[1]} bases, the data has {length}")
        if not ((open_y == 0) | (open_y == 1)).all():
            raise SystemExit(f"--accessibility {args.accessibility}: {args.accessibility_column} must be 0 or 1")
        data["accessibility"] = open_x, open_y[:, 0].float(), [sha256(args.accessibility), args.accessibility_column]
        files["accessibility"] = ""
    kinds = dict.fromkeys(files, "oracle") | {"pretrained": "denoiser"}
    for name in filter(files.get, files):
        load_model(kinds[name], files[name], length, device)

    # The run's directory and logs.
    run_name = f"{Path(args.data).name.split('.')[0] or 'simulated'}__dna_finetune__{args.seed}"
    run_dir, start = Path("runs") / f"{run_name}__{datetime.now():%Y%m%d-%H%M%S-%f}", time.time()
    try:
        run_dir.mkdir(parents=True)
        (run_dir / "args.json").write_text(json.dumps(asdict(args), indent=2) + "\n")
    except OSError as error:
        raise SystemExit(f"cannot write to {run_dir}: {error.strerror}") from None
    if args.track:
        import wandb

        run = dict(project=args.wandb_project, name=run_dir.name, config=asdict(args), dir=run_dir)
        try:
            wandb.init(**run, sync_tensorboard=True)
        except wandb.Error as error:
            raise SystemExit(f"--track: {error}; WANDB_MODE=offline records for a later wandb sync") from None
    writer = SummaryWriter(run_dir)
    print(f"{run_dir} on {device}, sequences drawn in {args.sampling_dtype}: {len(x)} of {length} bases")

    def flags(names):
        return {name: getattr(args, name) for name in names.split()}

    def log(tag, curve):
        for row in curve:
            for name in row.keys() - {"step"}:
                writer.add_scalar(f"{tag}/{name}", row[name], row["step"])

    # Stages that all methods and seeds share: the denoiser on all but the held-out data, and the oracles.
    if not files["pretrained"]:
        made_of = [origin, flags("width stacks pretrain_steps pretrain_batch pretrain_lr ema seed")]
        train = x[torch.cat([for_reward, for_eval])].to(device)
        files["pretrained"] = stage("pretrained", made_of, pretrain, x=train, args=args)
    for name, (oracle_x, oracle_y, oracle_origin) in data.items():
        if not files[name]:
            made_of = [oracle_origin, flags("oracle_width oracle_epochs oracle_lr seed")]
            inputs = dict(x=oracle_x.to(device), y=oracle_y.to(device), classifier=name == "accessibility", args=args)
            files[name] = stage(name, made_of, train_oracle, **inputs)
    files = {name: str(path) for name, path in files.items() if path}
    (run_dir / "models.json").write_text(json.dumps(files, indent=2) + "\n")
    models = {name: load_model(kinds[name], path, length, device) for name, path in files.items()}
    keys = {name: sha256(path) for name, path in files.items()}
    for name, path in files.items():
        log(name, load(path).get("curve", []))
    random_x = torch.randint(4, (200, length), generator=torch.Generator().manual_seed(args.seed)).to(device)
    random_likelihood = log_likelihood(models["pretrained"], random_x, args.eval_elbo_draws, args.seed).median()

    # Fine-tuning and evaluation of every method with every seed.
    names = "num_particles temperature_rule target_kl temperature rounds updates elbo_draws lr grad_norm loss_clip"
    tuned_by = flags(f"{names} kl_weight samples_from sampling_steps sampling_dtype")
    evaluated_by = flags("top_share sampling_steps eval_samples eval_elbo_draws seed sampling_dtype")
    judges = {} if args.data else dict(true_activity=true_activity)
    rows, curves = [], []
    for seed, method in itertools.product(range(args.seed, args.seed + args.seeds), ("pretrained", *args.methods)):
        tag, denoiser, key, curve = f"{method}-seed{seed}", models["pretrained"], keys["pretrained"], []
        if method != "pretrained":
            epsilon = args.epsilon if method.endswith("neg") else 0
            made_of = [method, epsilon, seed, keys["pretrained"], keys["reward_oracle"], list(judges), tuned_by]
            inputs = dict(pretrained=denoiser, oracle=models["reward_oracle"], length=length, judges=judges)
            path = stage("tuned", made_of, finetune, method=method, seed=seed, args=args, **inputs)
            denoiser, key, curve = load_model("denoiser", path, length, device), str(path), load(path)["curve"]
        made_of = [key, keys, origin, seed, evaluated_by]
        inputs = dict(denoiser=denoiser, models=models, top=top, seed=seed, args=args)
        result = load(stage("evaluated", made_of, evaluate, **inputs))
        lowest_loss = min([row["lowest_loss"] for row in curve], default=math.inf)
        rows.append(row := dict(method=method, seed=seed) | result["row"] | dict(lowest_loss=lowest_loss))
        log(tag, curve)
        curves += [dict(method=method, seed=seed) | row for row in curve]
        with open(run_dir / f"{tag}.fasta", "w") as file:
            for i, sequence in enumerate(result["x"].tolist(), 1):
                file.write(f">{tag}-{i}\n{''.join(LETTERS[token] for token in sequence)}\n")
        for name in COLUMNS:
            writer.add_scalar(f"evaluation/{method}/{name}", row[name], seed)
        if row["log_likelihood"] < random_likelihood:
            print(f"warning: {tag} has collapsed: less likely under the pretrained model than random sequences")
        if lowest_loss < 0 and method != "wd1" and args.loss_clip == math.inf:
            print(f"warning: the loss of {tag} fell to {lowest_loss:.2f}: below 0 it has no bound; see --loss-clip")
        if row["distinct"] < 0.5:
            print(f"warning: {tag} repeats itself: {row['distinct']:.0%} of its sequences are distinct")
    writer.close()
    print("\n" + summarise(rows, curves, run_dir))
    print(f"\n{time.time() - start:.0f} s; {run_dir}: table.txt, rows.csv, curves.csv, score_likelihood.png, *.fasta")
