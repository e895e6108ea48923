# /// script
# requires-python = ">=3.11"
# dependencies = [
#   "matplotlib==3.11.2",
#   "numpy==2.4.6",
#   "scipy==1.17.1",
#   "tensorboard==2.21.0",
#   "torch==2.13.0",
#   "tqdm==4.70.1",
#   "tyro==1.0.17",
#   "wandb==0.31.0",
# ]
# ///
"""Fine-tuning a discrete diffusion model of DNA with signed weights: SiMPO, section 5.3, Table 3.

Top to bottom: sequences with measured activity, simulated or from a file; the masked diffusion model with its ELBO and
its sampler; the reward oracles, one rewards and one only judges; the weights; fine-tuning; evaluation; the table.

    python dna_finetune.py                                                # a simulated assay, every method, on a CPU
    python dna_finetune.py --data promoters.csv.gz --target activity --split-column start --seeds 3

A round draws K sequences x_0 from the model p_old, weighs them by w = g((r(x_0) - nu) / lambda), mean w = 1 (9), (11),
and descends on E[w(x_0) ELBO-loss(x_0)], the masked-diffusion form of (7). What is learned tends to p_old(x_0) w(x_0).
"""

import copy
import csv
import functools
import gzip
import hashlib
import itertools
import json
import math
import os
import time
from array import array
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Literal

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

LETTERS, MASK = "ACGT", 4
METHODS = ("wd1", "exp", "linear", "square", "lin-neg", "sqr-neg")  # in the paper's order
COLOURS = {"pretrained": "#000000", "wd1": "#CC79A7", "exp": "#E69F00", "linear": "#0072B2", "square": "#009E73"}
COLOURS |= {"lin-neg": "#D55E00", "sqr-neg": "#56B4E9"}  # Okabe and Ito
BASELINES = ("pretrained", "wd1", "exp")
LABELS = {"exp": "exp (RL-D2)"}


@dataclass
class Args:
    # data
    data: str = ""
    """.csv or .csv.gz with a column seq (A, C, G, T, equal lengths) and numeric columns; empty: a simulated assay"""
    target: str = "activity"
    """column of --data to make high"""
    split_column: str = ""
    """numeric column, e.g. a genome position: the parts of the data are then contiguous in it; empty: random parts"""
    simulated_sequences: int = 16_000
    """sequences of the simulated assay"""
    simulated_length: int = 60
    """bases per simulated sequence"""
    pretrained: str = ""
    """diffusion model to start from: this script's or a Lightning checkpoint of Wang et al. (2024); empty: train it"""
    reward_oracle: str = ""
    """oracle that rewards: this script's, or a gReLU checkpoint (install gReLU for that); empty: train it"""
    eval_oracle: str = ""
    """oracle that only judges, likewise"""
    oracle_output: int = 0
    """which output of a gReLU oracle is the activity, counted from 0"""
    accessibility: str = ""
    """classifier of accessibility: a gReLU checkpoint, or a .csv[.gz] table with 0 and 1 to train one; empty: none"""
    accessibility_column: str = "hepg2"
    """column of 0 and 1 in the --accessibility table"""
    accessibility_output: int = 1
    """which output of a gReLU accessibility classifier counts"""

    # diffusion model; the paper's source has 128, 4 and steps 131_500, batch 512, lr 3e-4, EMA 0.9999
    width: int = 64
    """channels of the dilated convolutions"""
    stacks: int = 1
    """convolutions at each of the dilations 1, 1, 4, 16, 64"""
    pretrain_steps: int = 2_500
    """Adam steps of pretraining"""
    pretrain_batch: int = 64
    """sequences per step of pretraining"""
    pretrain_lr: float = 1e-3
    """learning rate of pretraining, falling to a tenth along a cosine"""
    ema: float = 0.999
    """decay of the averaged weights that are sampled from and fine-tuned"""
    sampling_steps: int = 128
    """T: steps of the ancestral sampler"""

    # reward oracles
    oracle_width: int = 64
    """channels of the oracles that are trained here"""
    oracle_epochs: int = 20
    """passes over the oracle's part of the data"""
    oracle_lr: float = 2e-3
    """learning rate of the oracles, falling to a tenth along a cosine"""

    # SiMPO: the same for every method; the paper's source has K = 512, 500 rounds of 1 update, lr 1e-4
    methods: tuple[Literal["wd1", "exp", "linear", "square", "lin-neg", "sqr-neg"], ...] = METHODS
    """weightings to fine-tune with"""
    epsilon: float = 0.5
    """epsilon of lin-neg and sqr-neg: the largest negative weight, the floor of (11) is -epsilon"""
    num_particles: int = 64
    """K: sequences that share one normaliser nu, drawn per round"""
    target_kl: float = 1.5
    """delta: KL of the weights from uniform, in nats; lambda is what reaches it, the fixed point of (30)"""
    temperature: float = 0.0
    """lambda in standard deviations of the K rewards; 0: chosen by --target-kl"""
    rounds: int = 25
    """improvements; each draws K sequences"""
    updates: int = 4
    """Adam steps per round, on the same sequences with new masks"""
    elbo_draws: int = 2
    """masked copies of each sequence per Adam step"""
    lr: float = 5e-4
    """learning rate of fine-tuning"""
    grad_norm: float = 10.0
    """gradients are scaled down to this norm"""
    kl_weight: float = 0.0
    """weight of the KL to the pretrained model, per token; 0 as in the paper"""
    samples_from: Literal["tuned", "pretrained"] = "tuned"
    """p_old: the model being tuned, refreshed every round, or the pretrained one throughout"""

    # evaluation and output
    eval_samples: int = 640
    """sequences drawn from each tuned model"""
    eval_elbo_draws: int = 16
    """masked copies per sequence for its log-likelihood under the pretrained model"""
    top_share: float = 0.01
    """share of the data, the most active, that 3-mers are compared with; the paper has 0.001 of 735,156"""
    seed: int = 1
    """seed of the data, the pretraining and the oracles, and first seed of the fine-tuning"""
    seeds: int = 1
    """fine-tuning runs per method, with seeds seed, seed + 1, ..."""
    device: str = "auto"
    """auto (a GPU if there is one), cpu, cuda, cuda:1, ..."""
    sampling_dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """precision in which sequences are drawn; auto takes bfloat16 where the machine computes in it natively"""
    track: bool = False
    """send everything to Weights & Biases too (offline if there is no account)"""
    wandb_project: str = "simpo"
    """Weights & Biases project"""


# ------------------------------------------------------------------------------------------------------------- data

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
    one_hot, length = F.one_hot(x, 4).float().transpose(1, 2), x.shape[1]  # (B, 4, L)
    bound = []
    for consensus, _, place, other_strand in FACTORS.values():
        motif = torch.tensor([[float(letter in IUPAC[code]) for code in consensus] for letter in LETTERS])  # (4, W)
        motif = torch.stack([motif, motif.flip(0, 1)]).to(x.device)  # A and T, C and G are complements: flips
        site = torch.exp(-2 * (len(consensus) - F.conv1d(one_hot, motif)))  # (B, 2, L - W + 1)
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
    """Markov background, poor in CpG, with planted sites: x (count, L) uint8, activity (count,)."""
    rng = np.random.default_rng(seed)
    kind = rng.choice(3, count, p=[0.35, 0.45, 0.2])  # rich in A and T, mixed, rich in C and G
    base = np.array([[0.34, 0.16, 0.16, 0.34], [0.29, 0.21, 0.21, 0.29], [0.21, 0.29, 0.29, 0.21]])
    step = np.repeat(base[:, None], 4, 1)  # (kind, before, next)
    step[:, 1, 2] *= np.array([0.2, 0.3, 0.7])  # CpG
    step[:, [0, 1, 2, 3], [0, 1, 2, 3]] *= 1.15  # runs
    step[:, 3, 0] *= 0.75  # TpA
    before = step.cumsum(-1) / step.sum(-1, keepdims=True)
    x = np.empty((count, length), np.uint8)
    x[:, 0] = rng.integers(4, size=count)
    for i in range(1, length):
        x[:, i] = (rng.random((count, 1)) > before[kind, x[:, i - 1], :3]).sum(-1)
    allowed = [[[LETTERS.index(c) for c in IUPAC[code]] for code in consensus] for consensus, *_ in FACTORS.values()]
    rows = np.repeat(np.arange(count), rng.poisson(2.0, count))
    for row, factor in zip(rows, rng.integers(len(FACTORS), size=len(rows)), strict=True):
        u, v, start = rng.random((3, len(allowed[factor])))
        site = np.array([letters[int(share * len(letters))] for letters, share in zip(allowed[factor], u, strict=True)])
        site = np.where(v < 0.06, (site + 1 + (50 * v).astype(int)) % 4, site)  # 6% mutated
        place = int(start[0] * (length - len(site) + 1))
        x[row, place : place + len(site)] = site if start[1] < 0.5 else 3 - site[::-1]
    activity = true_activity(torch.from_numpy(x).long()).numpy() + 0.3 * rng.standard_normal(count)
    return x, activity.astype(np.float32)


def read_table(path, columns, flag="--data"):
    """Sequences (N, L) uint8 and the named columns (N, columns) of a .csv[.gz], one row in memory at a time.

    Malformed rows are left out and reported; SystemExit with one line where the file is of no use.
    """
    code = bytes(LETTERS.find(chr(i).upper()) & 0xFF for i in range(256))  # 255: no letter
    tokens, values, bad, first_bad, length, first_line = bytearray(), array("f"), 0, "", None, None
    try:
        with (gzip.open if str(path).endswith(".gz") else open)(path, "rt", newline="") as file:
            rows = csv.reader(file)
            header = [name.strip() for name in next(rows, [])]
            for name in ("seq", *columns):
                if name not in header:
                    raise SystemExit(f"{flag} {path} has no column {name!r}; it has {', '.join(header) or 'none'}")
            places = [header.index(name) for name in columns]
            for row in rows:
                if not row:
                    continue
                try:
                    problem = f"{len(row)} fields, not {len(header)}" if len(row) != len(header) else ""
                    sequence = b"" if problem else row[header.index("seq")].strip().encode("ascii").translate(code)
                    if not problem and (not sequence or 255 in sequence):
                        problem = "a sequence with letters other than A, C, G, T" if sequence else "no sequence"
                    numbers = [] if problem else [float(row[place]) for place in places]
                    if not all(map(math.isfinite, numbers)):
                        problem = "a number that is not finite"
                except ValueError as error:  # a number, or letters outside of ASCII
                    problem = str(error)
                if problem:
                    bad, first_bad = bad + 1, first_bad or f"line {rows.line_num}: {problem}"
                    continue
                if length not in (None, len(sequence)):
                    lengths = f"line {first_line} has {length} letters, line {rows.line_num} has {len(sequence)}"
                    raise SystemExit(f"{flag} {path}: sequences must be equally long; {lengths}")
                length, first_line = len(sequence), first_line or rows.line_num
                tokens += sequence
                values.extend(numbers)
    except (OSError, EOFError, csv.Error, UnicodeDecodeError) as error:
        raise SystemExit(f"{flag} {path}: cannot read it: {error}") from None
    if not tokens:
        reason = f"the first malformed: {first_bad}" if bad else "it is empty"
        raise SystemExit(f"{flag} {path}: no row is left; {reason}")
    if bad:
        print(f"{path}: {bad} malformed rows left out, the first at {first_bad}")
    return np.frombuffer(tokens, np.uint8).reshape(-1, length), np.array(values, np.float32).reshape(-1, len(columns))


def split(count, position, seed):
    """Rows that train the rewarding oracle (45%), the judging one (45%), and nobody (10%); contiguous in position."""
    order = np.random.default_rng(seed).permutation(count) if position is None else np.argsort(position, kind="stable")
    return np.split(order, [int(0.45 * count), int(0.9 * count)])


def text(tokens):
    return "".join(LETTERS[i] for i in tokens)


# -------------------------------------------------------------------------------------------------- diffusion model


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

    def forward(self, x):  # (B, L) with MASK where masked -> (B, L, 4)
        h = F.relu(convolve(F.one_hot(x, 5).to(self.shifts.dtype), self.linear))
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
def log_likelihood(denoiser, x, draws, seed, batch=64):
    """ELBO of each sequence in nats, a lower bound of log p(x): (B, L) -> (B,)."""
    generator, bounds = torch.Generator(x.device).manual_seed(seed), []
    for part in x.split(max(1, batch * 16 // draws)):
        noisy, masked, factor = corrupt(part, draws, generator)
        log_p = denoiser(noisy.flatten(0, 1)).view(*noisy.shape, 4)
        bounds.append(-elbo_loss(log_p, part, masked, factor).mean(-1))
    return torch.cat(bounds)


@torch.no_grad()
def sample(denoiser, count, length, steps, generator, batch=64):
    """Ancestral sampling in `steps` steps from t = 1 to 0: (count, L).

    From t to s a position stays masked with probability s / t, whatever its letter will be: the step at which it leaves
    the mask is uniform, and known beforehand. The network runs only for the steps of a sequence in which some do.
    """
    parts = []
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


def pretrain(x, args, device, writer, unfinished=None):
    """Pretrains on x (N, L); returns what a stage keeps: the denoiser's averaged weights."""
    torch.manual_seed(args.seed)
    denoiser = Denoiser(args.width, args.stacks).to(device)
    average = copy.deepcopy(denoiser).requires_grad_(False)
    optimizer = torch.optim.Adam(denoiser.parameters(), lr=args.pretrain_lr)
    generator = torch.Generator(device).manual_seed(args.seed)
    parts = dict(denoiser=denoiser, average=average, optimizer=optimizer)
    steps = resumable(args.pretrain_steps, unfinished, generator, **parts)
    for step in (progress := tqdm(steps, desc="pretraining", total=args.pretrain_steps, dynamic_ncols=True)):
        rows = torch.randint(len(x), (args.pretrain_batch,), generator=generator, device=device)
        batch = x[rows].long()
        noisy, masked, factor = corrupt(batch, 1, generator)
        losses = elbo_loss(denoiser(noisy[:, 0])[:, None], batch, masked, factor)
        loss = losses.mean() / x.shape[1]
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
            writer.add_scalar("pretraining/nats_per_base", loss, step)
            progress.set_postfix(nats_per_base=f"{loss:.3f}", refresh=False)
    return dict(kind="denoiser", state=average.state_dict())


def cosine(share):
    return 0.1 + 0.45 * (1 + math.cos(math.pi * share))


# ---------------------------------------------------------------------------------------------------------- oracles


class Oracle(nn.Module):
    """A convolutional network that predicts a number from a sequence and knows places and strands."""

    def __init__(self, width, length):
        super().__init__()
        self.first, self.second = nn.Conv1d(4, width, 15), nn.Conv1d(width, width, 7)
        self.hidden, self.last = nn.Linear(width * math.ceil(length / 5), width), nn.Linear(width, 1)
        self.dropout = nn.Dropout(0.2)
        self.register_buffer("mean", torch.zeros(()))
        self.register_buffer("std", torch.ones(()))

    def forward(self, x):  # (B, L) -> (B,)
        h = F.relu(convolve(F.one_hot(x, 4).float(), self.first))
        h = F.relu(convolve(self.dropout(h), self.second)).transpose(1, 2)
        h = F.max_pool1d(h, 5, ceil_mode=True)
        h = F.relu(self.hidden(self.dropout(h.flatten(1))))
        return self.mean + self.std * self.last(self.dropout(h))[:, 0]


def train_oracle(name, x, y, args, device, writer, binary=False, unfinished=None):
    """Trains an oracle on x (N, L), y (N,) by squared error, or by cross-entropy if y is 0 or 1; returns its file."""
    torch.manual_seed(args.seed)
    oracle = Oracle(args.oracle_width, x.shape[1]).to(device)
    if not binary:
        oracle.mean.fill_(y.mean())
        oracle.std.fill_(y.std().clamp(min=1e-6))
    optimizer = torch.optim.Adam(oracle.parameters(), lr=args.oracle_lr, weight_decay=1e-5)
    generator, steps = torch.Generator(device).manual_seed(args.seed), math.ceil(len(x) / 128) * args.oracle_epochs
    to_do = resumable(steps, unfinished, generator, oracle=oracle, optimizer=optimizer)
    for step in (progress := tqdm(to_do, desc=name, total=steps, dynamic_ncols=True)):
        rows = torch.randint(len(x), (128,), generator=generator, device=device)
        output, y_rows = oracle(x[rows].long()), y[rows]
        squared = ((output - y_rows) / oracle.std).square().mean()
        loss = F.binary_cross_entropy_with_logits(output, y_rows) if binary else squared
        check_finite(f"{name}, step {step}", loss=loss)
        optimizer.param_groups[0]["lr"] = args.oracle_lr * cosine(step / steps)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 20 == 0:
            writer.add_scalar(f"{name}/loss", loss, step)
            progress.set_postfix(loss=f"{loss:.3f}", refresh=False)
    return dict(kind="oracle", length=x.shape[1], state=oracle.state_dict())


@torch.no_grad()
def predict(oracle, x):
    """The oracle's numbers for x (N, L) -> (N,)."""
    return torch.cat([oracle(part.long()) for part in x.split(512)])


# ------------------------------------------------------------------------------------------------------ reweighting


@torch.no_grad()
def reweight(q, temperature, power, epsilon):
    """Weights w = g((q - nu) / temperature) of K actions, with nu such that they average 1: (9), (11), appendix E.

    g(y) = y^power for y > 0 and max(y, -epsilon) below. q (..., K), temperature > 0, power > 0, epsilon >= 0;
    returns weights (..., K) and nu (..., 1) in q's dtype. No gradient flows through it.
    """
    K = q.shape[-1]
    q_max = q.double().amax(-1, keepdim=True)
    gap = (q_max - q.double()) / temperature  # (..., K) >= 0, so y = top - gap, where top = (q_max - nu) / temperature

    def g(y):
        return torch.where(y > 0, y.clamp(min=0) ** power, y.clamp(min=-epsilon))

    sorted_gap = gap.sort(-1).values
    k = torch.arange(1, K + 1, device=q.device, dtype=torch.float64)
    s1, s2 = sorted_gap.cumsum(-1), (sorted_gap**2).cumsum(-1)
    if power == 1:
        active = k * sorted_gap - s1 < K * (1 + epsilon)  # (25)
        top = (K + (K - k) * epsilon + s1) / k  # (24), with k of the K actions above the floor
        top = top.gather(-1, active.sum(-1, keepdim=True) - 1)
        weights = g(top - gap)
    elif power == 2 and epsilon == 0:
        active = s2 - 2 * sorted_gap * s1 + k * sorted_gap**2 < K  # (29)
        top = (s1 + (s1**2 - k * (s2 - K)).clamp(min=0).sqrt()) / k  # (28)
        top = top.gather(-1, active.sum(-1, keepdim=True) - 1)
        weights = g(top - gap)
    else:  # no closed form; the mean weight grows with the top one, which is in [1, K + (K - 1) epsilon]: bisect it
        low, high = torch.ones_like(q_max), torch.full_like(q_max, K + (K - 1) * epsilon)
        for _ in range(60):
            middle = (low + high) / 2
            too_high = g(middle ** (1 / power) - gap).mean(-1, keepdim=True) > 1
            low, high = torch.where(too_high, low, middle), torch.where(too_high, middle, high)
        top = low ** (1 / power)
        below, above = g(top - gap), g(high ** (1 / power) - gap)  # of neighbouring tops, yet apart for small powers
        share = (1 - below.mean(-1, keepdim=True)) / (above - below).mean(-1, keepdim=True).clamp(min=1e-300)
        weights = below.lerp(above, share.clamp(0, 1))
    return weights.to(q.dtype), (q_max - temperature * top).to(q.dtype)


@torch.no_grad()
def reweight_exp(q, temperature):
    """Weights w = exp((q - nu) / temperature) of K actions, with nu such that they average 1: (2), (5).

    q (..., K), temperature > 0; returns weights (..., K) and nu (..., 1) in q's dtype. No gradient flows through it.
    """
    K = q.shape[-1]
    q_max = q.double().amax(-1, keepdim=True)
    gap = (q_max - q.double()) / temperature  # (..., K) >= 0, so y = top - gap, where top = (q_max - nu) / temperature
    top = math.log(K) - torch.logsumexp(-gap, -1, keepdim=True)
    return (top - gap).exp().to(q.dtype), (q_max - temperature * top).to(q.dtype)


def weigh(method, q, temperature, epsilon):
    """Weights of K sequences by name: q (..., K) -> (..., K), of mean 1, but for wd1, whose mean is 0 (Example 3.4)."""
    if method == "exp":
        return reweight_exp(q, temperature)[0]
    if method == "wd1":  # K times softmax(A / lambda) - softmax(-A / lambda)
        return reweight_exp(q, temperature)[0] - reweight_exp(-q, temperature)[0]
    power, floor = {"linear": (1, 0.0), "square": (2, 0.0), "lin-neg": (1, epsilon), "sqr-neg": (2, epsilon)}[method]
    return reweight(q, temperature, power, floor)[0]


@torch.no_grad()
def solve_temperature(method, q, args):
    """lambda (..., 1) for which the KL of the weights from uniform is delta: where (30) comes to rest.

    As in appendix G the entropy is that of the clipped weights; for wd1, that of its first softmax.
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


# ------------------------------------------------------------------------------------------------------ fine-tuning


def finetune(
    pretrained, reward, method, length, args, seed, sampling_dtype=torch.float32, log=lambda *_: None, unfinished=None
):
    """The pretrained denoiser tuned by one method; reward maps x (B, L) to (B,). Returns its file."""
    device = next(pretrained.parameters()).device
    denoiser = copy.deepcopy(pretrained).requires_grad_(True)
    optimizer = torch.optim.Adam(denoiser.parameters(), lr=args.lr)
    generator = torch.Generator(device).manual_seed(seed)
    record = dict(lowest_loss=math.inf)
    for round in resumable(args.rounds, unfinished, generator, denoiser=denoiser, optimizer=optimizer, record=record):
        # K sequences from p_old, their rewards, their weights (9), (11).
        old = copy.deepcopy(denoiser if args.samples_from == "tuned" else pretrained).to(sampling_dtype)
        x = sample(old, args.num_particles, length, args.sampling_steps, generator, args.num_particles)  # (K, L)
        q = reward(x)  # (K,)
        check_finite(f"{method}, round {round}", reward=q)
        temperature = solve_temperature(method, q, args)
        weights = weigh(method, q, temperature, args.epsilon)

        # Weighted ELBO: the masked form of (7), per token.
        for _ in range(args.updates):
            noisy, masked, factor = corrupt(x, args.elbo_draws, generator)
            log_p = denoiser(noisy.flatten(0, 1)).view(*noisy.shape, 4)
            loss = (weights * elbo_loss(log_p, x, masked, factor).mean(-1)).mean() / length
            if args.kl_weight:
                with torch.no_grad():
                    log_prior = pretrained(noisy.flatten(0, 1)).view(*noisy.shape, 4)
                kl = (log_p.exp() * (log_p - log_prior)).sum(-1)  # (K, draws, L)
                loss = loss + args.kl_weight * (factor * masked * kl).sum(-1).mean() / length
            optimizer.zero_grad()
            loss.backward()
            norm = nn.utils.clip_grad_norm_(denoiser.parameters(), args.grad_norm)
            check_finite(f"{method}, round {round}", loss=loss, gradient=norm)
            optimizer.step()
            record["lowest_loss"] = min(record["lowest_loss"], loss.item())
        distinct = len(x.unique(dim=0)) / len(x)
        negative = weights.clamp(max=0).abs().mean()
        values = dict(loss=loss, reward=q.median(), temperature=temperature, negative_mass=negative, distinct=distinct)
        log(round, values)
    return dict(kind="denoiser", state=denoiser.state_dict()) | record


# ----------------------------------------------------------------------------------------- evaluation and its report


def kmers(x, k=3):
    """Frequencies of the 4^k words in x (N, L)."""
    index = sum(x[:, i : x.shape[1] - k + 1 + i].long() * 4**i for i in range(k))
    return torch.bincount(index.flatten(), minlength=4**k).double() / index.numel()


def correlation(a, b):
    return float(torch.corrcoef(torch.stack([a.double(), b.double()]))[0, 1])


def diversity(x):
    """Mean share of places where two of the sequences differ, and the share of distinct sequences."""
    n, counts = len(x), F.one_hot(x, 4).sum(0).double()  # (L, 4)
    same = (counts * (counts - 1)).sum(-1) / (n * (n - 1))
    return float(1 - same.mean()), len(x.unique(dim=0)) / n


def evaluate(denoiser, models, top, simulated, args, seed, sampling_dtype):
    """Sequences x (N, L) drawn from the denoiser and their row of the table."""
    generator = torch.Generator(top.device).manual_seed(10_000 + seed)
    sampler = copy.deepcopy(denoiser).to(sampling_dtype)
    x = sample(sampler, args.eval_samples, top.shape[1], args.sampling_steps, generator)
    opened = math.nan
    if "accessibility" in models:  # ours puts out logits, gReLU's probabilities
        threshold = 0 if isinstance(models["accessibility"], Oracle) else 0.5
        opened = (predict(models["accessibility"], x) > threshold).float().mean()
    row = dict(
        pred_activity=predict(models["eval_oracle"], x).median(),
        reward_oracle=predict(models["reward_oracle"], x).median(),
        true_activity=true_activity(x).median() if simulated else math.nan,
        kmer_correlation=correlation(kmers(x), kmers(top)),
        log_likelihood=log_likelihood(models["pretrained"], x, args.eval_elbo_draws, args.seed).median(),
        accessible=opened,
    )
    row["distance"], row["distinct"] = diversity(x)
    return dict(x=x, row={name: float(value) for name, value in row.items()})


def markov_nats(train, test, order=5):
    """Nats per base of test under a Markov model of this order, counted on train with a pseudocount of 1."""
    nats = 0.0
    for k in range(order + 1):  # the first places have shorter histories

        def words(x, k=k):
            last = x.shape[1] if k == order else k + 1
            return sum(x[:, i : last - k + i].long() * 4 ** (k - i) for i in range(k + 1)).flatten()

        counts = torch.bincount(words(train), minlength=4 ** (k + 1)).double().view(-1, 4) + 1
        nats -= (counts / counts.sum(-1, keepdim=True)).log().flatten()[words(test)].sum()
    return float(nats / test.numel())


def report_pretrained(denoiser, train, held_out, args, sampling_dtype):
    """What says that the pretrained model is good, on sequences that it has not seen."""
    generator = torch.Generator(train.device).manual_seed(args.seed)
    held_out = held_out[torch.randperm(len(held_out), generator=generator, device=held_out.device)[:1000]].long()
    sampler = copy.deepcopy(denoiser).to(sampling_dtype)
    x = sample(sampler, args.eval_samples, train.shape[1], args.sampling_steps, generator)
    gc, gc_held_out = (((y == 1) | (y == 2)).double().mean(-1) for y in (x, held_out))
    return dict(
        model_nats_per_base=float(-log_likelihood(denoiser, held_out, args.eval_elbo_draws, args.seed).mean())
        / x.shape[1],
        markov5_nats_per_base=markov_nats(train, held_out),
        kmer_correlation=correlation(kmers(x), kmers(held_out)),
        gc_mean=float(gc.mean()),
        gc_mean_held_out=float(gc_held_out.mean()),
        gc_std=float(gc.std()),
        gc_std_held_out=float(gc_held_out.std()),
    )


def site_effects(function, background):
    """Mean change of function where a site is put into background (N, L), 5 places and 2 strands: (factors * 10,)."""
    start_value, effects = function(background).mean(), []
    for consensus, *_ in FACTORS.values():
        site = torch.tensor([LETTERS.index(IUPAC[code][0]) for code in consensus], device=background.device)
        for word in (site, 3 - site.flip(0)):
            for share in (0.1, 0.3, 0.5, 0.7, 0.9):
                changed, start = background.clone(), int(share * (background.shape[1] - len(site)))
                changed[:, start : start + len(site)] = word
                effects.append(function(changed).mean() - start_value)
    return torch.stack(effects)


def report_oracle(oracle, held_out, y, simulated):
    """Correlation with measurements that it has not seen, and whether it has found the planted sites."""
    report = dict(held_out_correlation=correlation(predict(oracle, held_out), y))
    if simulated:
        report["true_correlation"] = correlation(predict(oracle, held_out), true_activity(held_out.long()))
        background = held_out[true_activity(held_out.long()) < 2][:100].long()
        truth, found = site_effects(true_activity, background), site_effects(lambda x: predict(oracle, x), background)
        report["site_effect_correlation"] = correlation(found, truth)
        for name, a, b in zip(FACTORS, found.view(-1, 10).mean(-1), truth.view(-1, 10).mean(-1), strict=True):
            report[f"{name}_effect"], report[f"{name}_true_effect"] = float(a), float(b)
    return report


COLUMNS = "pred_activity reward_oracle true_activity kmer_correlation log_likelihood distance distinct accessible"
COLUMNS = COLUMNS.split()
HEADERS = "Pred-Activity,rewarding,true,3-mer corr.,log-lik. (ELBO),distance,distinct,accessible".split(",")


def summarise(rows, run_dir):
    """The table as text and table.csv, differences with intervals, and score against likelihood as a plot."""
    methods = list(dict.fromkeys(row["method"] for row in rows))
    scores = {m: np.array([row["pred_activity"] for row in rows if row["method"] == m]) for m in methods}
    baselines = [m for m in methods if m in BASELINES]
    best = max(baselines, key=lambda m: scores[m].mean())
    columns = [i for i, name in enumerate(COLUMNS) if not math.isnan(rows[0][name])]
    lines = [["method", *(HEADERS[i] for i in columns), f"over {best}"]]
    table = []
    for method in methods:
        mine = [row for row in rows if row["method"] == method]
        entry, line = dict(method=method, seeds=len(mine)), [LABELS.get(method, method)]
        for i in columns:
            values = np.array([row[COLUMNS[i]] for row in mine])
            mean, std = values.mean(), values.std(ddof=1) if len(mine) > 1 else math.nan
            entry |= {COLUMNS[i]: mean, COLUMNS[i] + "_std": std}
            digits = dict(log_likelihood=1, distance=3, distinct=3).get(COLUMNS[i], 2)
            line.append(f"{mean:.{digits}f}" + (f" +- {std:.{digits}f}" if len(mine) > 1 else ""))
        entry["improvement_percent"] = 100 * (scores[method].mean() - scores[best].mean()) / abs(scores[best].mean())
        lines.append([*line, f"{entry['improvement_percent']:+.1f}%"])
        table.append(entry)
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    out = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]
    out.append("\nPred-Activity: median of the judging oracle; +-: standard deviation over seeds. Differences by seed:")
    for low, high in itertools.combinations([m for m in METHODS if m in methods], 2):
        difference = scores[high] - scores[low]
        line = f"{high} - {low}: {difference.mean():+.2f}"
        if len(difference) > 1:
            bounds = stats.t.interval(0.95, len(difference) - 1, difference.mean(), stats.sem(difference))
            line += ", 95% interval [{:+.2f}, {:+.2f}]".format(*bounds)
        out.append(line)
    (run_dir / "table.txt").write_text("\n".join(out) + "\n")
    write_csv(run_dir / "table.csv", table)
    write_csv(run_dir / "rows.csv", rows)

    figure, axes = plt.subplots(figsize=(6, 4.2), layout="constrained")
    for method in methods:
        likelihood = [row["log_likelihood"] for row in rows if row["method"] == method]
        axes.plot(likelihood, scores[method], "o", color=COLOURS[method], label=LABELS.get(method, method))
        axes.plot(np.mean(likelihood), scores[method].mean(), "+", color=COLOURS[method], markersize=16)
    axes.set(
        xlabel="log-likelihood under the pretrained model (ELBO, nats)", ylabel="Pred-Activity (+: mean of the seeds)"
    )
    axes.legend(fontsize=8)
    figure.savefig(run_dir / "score_likelihood.png", dpi=120)
    plt.close(figure)
    return "\n".join(out)


def write_csv(path, rows):
    with open(path, "w", newline="") as file:
        table = csv.DictWriter(file, rows[0])
        table.writeheader()
        for row in rows:
            table.writerow({k: f"{v:.5g}" if isinstance(v, float) else v for k, v in row.items()})


# ------------------------------------------------------------------------------------------------- stages and faults


def stage(name, settings, make, device):
    """What make(unfinished) returns, a dict, kept as runs/dna_stages/<name>-<hash of the settings>.pt.

    Made only if not there; unfinished is a path for what a long stage needs to go on after a kill.
    """
    key = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]
    path = Path("runs/dna_stages") / f"{name}-{key}.pt"
    if path.exists():
        try:
            content = torch.load(path, map_location=device, weights_only=True)
            print(f"{path} is there: not made again")
            return content, path.stem
        except Exception:
            print(f"{path} is damaged: made again")
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".unfinished")
    content = make(unfinished)
    write(path, content)
    unfinished.unlink(missing_ok=True)
    return content, path.stem


def write(path, content):
    """torch.save, aside and moved into place: a file of this name is always whole."""
    aside = path.with_suffix(f".{os.getpid()}")
    torch.save(content, aside)
    os.replace(aside, path)


KEEP_SECONDS = 10.0


def resumable(steps, path, generator, **parts):
    """The steps that are still to be done. Every ten seconds what decides the rest is kept in path, if there is one:
    parts, which have a state_dict or are dicts of numbers, and the generators. A killed stage then ends bit for bit
    as if it had not been killed, on a CPU."""
    first, kept_at = 0, time.time()
    state = {}
    if path and path.exists():
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
        except Exception:
            print(f"{path} is damaged: from the start")
    if state:
        for name, part in parts.items():
            part.update(state[name]) if isinstance(part, dict) else part.load_state_dict(state[name])
        generator.set_state(state["generator"])
        torch.set_rng_state(state["torch"])
        first = state["step"]
        print(f"{path}: going on from step {first} of {steps}")
    for step in range(first, steps):
        yield step
        if path and time.time() - kept_at >= KEEP_SECONDS:
            state = {name: dict(part) if isinstance(part, dict) else part.state_dict() for name, part in parts.items()}
            state |= dict(step=step + 1, generator=generator.get_state(), torch=torch.get_rng_state())
            write(path, state)
            kept_at = time.time()


class Inert(dict):
    """Stands for every class that a checkpoint names besides tensors and plain values: holds nothing, does nothing."""

    def __init__(self, *arguments):
        pass

    def __setstate__(self, state):
        pass


def load_file(flag, path, device):
    """A file of tensors and plain values; nothing in it is executed."""
    try:
        names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
        with torch.serialization.safe_globals([(Inert, name) for name in names]):
            content = torch.load(path, map_location=device, weights_only=True)
        if not isinstance(content, dict):
            raise ValueError(f"it holds a {type(content).__name__}")
        return content
    except Exception as error:
        raise SystemExit(f"{flag} {path}: not the file of a model: {str(error).splitlines()[0]}") from None


def load_denoiser(path, device):
    """This script's denoiser, or the one of Wang et al. (2024), with its averaged weights where the file has them."""
    content = load_file("--pretrained", path, device)
    try:
        state = content["state"] if content.get("kind") == "denoiser" else published_denoiser(content)
        denoiser = Denoiser(len(state["linear.weight"]), len(state["shifts"]) // 5).to(device)
        denoiser.load_state_dict(state)
    except (KeyError, ValueError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise SystemExit(f"--pretrained {path}: not a denoiser of the known forms: {reason}") from None
    return denoiser.requires_grad_(False)


def published_denoiser(content):
    """The state of our Denoiser from a Lightning checkpoint, or a plain state dict, of the DRAKES release."""
    tensors = content.get("state_dict", content).items()
    state = {name.removeprefix("backbone."): value for name, value in tensors if name.startswith("backbone.")}
    if "ema" in content:  # the averages are a list in the order of the parameters; the Fourier frequencies are none
        learned = [name for name in state if name != "time_embedder.0.W"]
        state |= zip(learned, content["ema"]["shadow_params"], strict=True)
    frequencies = len(state["time_embedder.0.W"])
    at_zero = torch.cat([torch.zeros(frequencies), torch.ones(frequencies)]).to(state["linear.weight"])  # sin 0, cos 0
    time = F.relu(F.linear(at_zero, state["time_embedder.1.weight"], state["time_embedder.1.bias"]))
    layers = range(sum(name.startswith("norms.") for name in state) // 2)
    shifts = [
        F.linear(time, state[f"time_layers.{i}.dense.weight"], state[f"time_layers.{i}.dense.bias"]) for i in layers
    ]
    ours = {name: value for name, value in state.items() if name.split(".")[0] in ("linear", "convs", "norms")}
    ours |= {"shifts": torch.stack(shifts)}
    ours |= {"hidden.weight": state["final_conv.0.weight"][..., 0], "hidden.bias": state["final_conv.0.bias"]}
    weight, bias = state["final_conv.2.weight"][:4, :, 0], state["final_conv.2.bias"][:4]  # the fifth is the mask
    return ours | {"logits.weight": weight, "logits.bias": bias}


def load_oracle(flag, path, length, output, device):
    """This script's oracle, or a gReLU checkpoint, as a function of x (B, L)."""
    content = load_file(flag, path, device)
    if content.get("kind") == "oracle":
        if content["length"] != length:
            raise SystemExit(f"{flag} {path}: is for {content['length']} bases, the data has {length}")
        oracle = Oracle(len(content["state"]["first.bias"]), length).to(device)
        oracle.load_state_dict(content["state"])
        return oracle.eval().requires_grad_(False)
    if "state_dict" not in content or "hyper_parameters" not in content:
        raise SystemExit(f"{flag} {path}: neither this script's oracle nor a gReLU checkpoint")
    try:
        from grelu.lightning import LightningModel
    except ImportError:
        raise SystemExit(f"{flag} {path}: a gReLU checkpoint needs the extra gReLU: pip install gReLU") from None
    settings = content["hyper_parameters"]
    model_params = dict(settings["model_params"])
    if model_params["model_type"] == "EnformerPretrainedModel":  # would download weights; the file brings them
        model_params["model_type"] = "EnformerModel"
    model = LightningModel(model_params=model_params, train_params=dict(settings["train_params"]) | {"logger": None})
    model.load_state_dict(content["state_dict"])
    model = model.to(device).eval().requires_grad_(False)
    return lambda x: model(F.one_hot(x, 4).float().transpose(1, 2)).flatten(1)[:, output]


def sha256(path):
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def check_finite(where, **quantities):
    """Raises SystemExit with one line for the first quantity that is not finite."""
    for name, value in quantities.items():
        if not torch.as_tensor(value).isfinite().all():
            advice = "a smaller --epsilon, --lr or --grad-norm may help"
            raise SystemExit(f"stopped at {where}: {name} is not finite; {advice}")


def check(args):
    """Raises SystemExit with one line for the first argument that makes no sense."""
    at_least_1 = """width stacks pretrain_steps pretrain_batch sampling_steps oracle_width oracle_epochs rounds updates
        elbo_draws eval_elbo_draws seeds"""
    above_0 = "pretrain_lr oracle_lr lr grad_norm"
    at_least_0 = "epsilon temperature kl_weight seed oracle_output accessibility_output"
    log_k = math.log(max(args.num_particles, 2))
    longest = max(len(consensus) for consensus, *_ in FACTORS.values())
    rules = [(name, getattr(args, name) >= 1, "at least 1") for name in at_least_1.split()]
    rules += [(name, 0 < getattr(args, name) < math.inf, "above 0 and finite") for name in above_0.split()]
    rules += [(name, 0 <= getattr(args, name) < math.inf, "at least 0 and finite") for name in at_least_0.split()]
    rules += [(name, getattr(args, name) >= 2, "at least 2") for name in ("num_particles", "eval_samples")]
    rules += [("target_kl", 0 < args.target_kl < log_k, f"above 0 and below log(num_particles) = {log_k:.2f}")]
    rules += [("ema", 0 <= args.ema < 1, "at least 0 and below 1"), ("top_share", 0 < args.top_share <= 1, "in (0, 1]")]
    rules += [("simulated_length", args.simulated_length >= longest, f"at least {longest}, the longest site")]
    rules += [("simulated_sequences", args.simulated_sequences >= 100, "at least 100")]
    rules += [("methods", 0 < len(set(args.methods)) == len(args.methods), "some methods, each once")]
    rules += [("split_column", args.data or not args.split_column, "empty without --data")]
    for name in ("data", "pretrained", "reward_oracle", "eval_oracle", "accessibility"):
        rules += [(name, not getattr(args, name) or Path(getattr(args, name)).is_file(), "a file that is there")]
    for name, fulfilled, rule in rules:
        if not fulfilled:
            raise SystemExit(f"--{name.replace('_', '-')} must be {rule}; got {getattr(args, name)}")


def pick_machine(args):
    """The device, and the precision in which sequences are drawn."""
    try:
        fastest = "cuda" if torch.cuda.is_available() else "cpu"
        device = torch.device(fastest if args.device == "auto" else args.device)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise SystemExit(f"--device {args.device}: {str(error).splitlines()[0]}") from None
    if args.sampling_dtype == "auto":
        if device.type == "cuda":
            has_bfloat16 = torch.cuda.is_bf16_supported(including_emulation=False)
        else:
            has_bfloat16 = torch.cpu.get_capabilities().get("avx512_bf16", False)
        return device, torch.bfloat16 if has_bfloat16 else torch.float32
    return device, getattr(torch, args.sampling_dtype)


if __name__ == "__main__":
    args = tyro.cli(Args, description=__doc__)
    check(args)
    device, sampling_dtype = pick_machine(args)

    # The data, and everything that is given as a file, before any work.
    simulated = not args.data
    if simulated:
        tokens, activity = simulate(args.simulated_sequences, args.simulated_length, args.seed)
        position, data_key = None, ["simulated", args.simulated_sequences, args.simulated_length, args.seed]
    else:
        tokens, values = read_table(args.data, [args.target, *([args.split_column] if args.split_column else [])])
        activity, position = values[:, 0], values[:, 1] if args.split_column else None
        if len(tokens) < 100:
            raise SystemExit(f"--data {args.data}: {len(tokens)} rows; at least 100 are needed")
        data_key = ["file", sha256(args.data), args.target, args.split_column, args.seed]
    length = tokens.shape[1]
    rewarding, judging, held_out = (torch.from_numpy(r).to(device) for r in split(len(tokens), position, args.seed))
    x, y = torch.from_numpy(tokens.copy()).to(device), torch.from_numpy(activity.copy()).to(device)  # (N, L), (N,)
    top = x[y.topk(max(2, round(args.top_share * len(y)))).indices]
    train = x[torch.cat([rewarding, judging])]
    models, tables = {}, dict(reward_oracle=(x[rewarding], y[rewarding]), eval_oracle=(x[judging], y[judging]))
    if args.pretrained:
        models["pretrained"] = load_denoiser(args.pretrained, device)
    if args.accessibility.endswith((".csv", ".csv.gz")):
        open_x, open_y = read_table(args.accessibility, [args.accessibility_column], "--accessibility")
        if open_x.shape[1] != length:
            raise SystemExit(f"--accessibility {args.accessibility}: {open_x.shape[1]} bases, the data has {length}")
        tables["accessibility"] = torch.from_numpy(open_x.copy()).to(device), torch.tensor(open_y[:, 0], device=device)
    outputs = dict(reward_oracle=args.oracle_output, eval_oracle=args.oracle_output)
    for name, output in (outputs | dict(accessibility=args.accessibility_output)).items():
        if getattr(args, name) and (name in outputs or name not in tables):
            models[name] = load_oracle(f"--{name.replace('_', '-')}", getattr(args, name), length, output, device)

    run_name = f"{Path(args.data).name.split('.')[0] or 'simulated'}__dna_finetune__{args.seed}"
    run_dir = Path("runs") / f"{run_name}__{datetime.now():%Y%m%d-%H%M%S-%f}"
    try:
        run_dir.mkdir(parents=True)
        (run_dir / "args.json").write_text(json.dumps(asdict(args), indent=2) + "\n")
    except OSError as error:
        raise SystemExit(f"cannot write to {run_dir}: {error.strerror}") from None
    if args.track:
        import wandb

        mode = os.environ.get("WANDB_MODE") or ("online" if wandb.login(prompt=False) else "offline")
        run = dict(project=args.wandb_project, name=run_dir.name, config=asdict(args), dir=run_dir, mode=mode)
        wandb.init(**run, sync_tensorboard=True)
    writer, started = SummaryWriter(run_dir), time.time()
    print(f"{run_dir} on {device}, sequences drawn in {sampling_dtype}: {len(x)} of {length} bases")

    # Stages that all methods and seeds share: the pretrained model on all but the held-out data, and the oracles.
    def settings(names):
        return {name: getattr(args, name) for name in names.split()}

    keys = {name: sha256(getattr(args, name)) for name in models}
    if "pretrained" not in models:
        made_of = [data_key, settings("width stacks pretrain_steps pretrain_batch pretrain_lr ema seed")]
        fit = functools.partial(pretrain, train, args, device, writer)
        state, keys["pretrained"] = stage("pretrained", made_of, fit, device)
        models["pretrained"] = Denoiser(args.width, args.stacks).to(device).requires_grad_(False)
        models["pretrained"].load_state_dict(state["state"])
    for name, (oracle_x, oracle_y) in tables.items():
        if name not in models:
            binary = name == "accessibility"
            source = [sha256(args.accessibility), args.accessibility_column] if binary else data_key
            made_of = [source, settings("oracle_width oracle_epochs oracle_lr seed")]
            fit = functools.partial(train_oracle, name, oracle_x, oracle_y, args, device, writer, binary)
            state, keys[name] = stage(name, made_of, fit, device)
            models[name] = Oracle(args.oracle_width, length).to(device).eval().requires_grad_(False)
            models[name].load_state_dict(state["state"])
    pretrained, reward_oracle = models["pretrained"], functools.partial(predict, models["reward_oracle"])
    measured_by = settings("sampling_steps eval_samples eval_elbo_draws seed") | {"dtype": str(sampling_dtype)}
    report = lambda _: report_pretrained(pretrained, train, x[held_out], args, sampling_dtype)  # noqa: E731
    quality = {"pretrained": stage("pretrained-report", [keys["pretrained"], data_key, measured_by], report, device)[0]}
    for name in ("reward_oracle", "eval_oracle"):
        quality[name] = report_oracle(models[name], x[held_out], y[held_out], simulated)
    for name, values in quality.items():
        print(f"{name}: " + ", ".join(f"{key} {value:.3f}" for key, value in values.items()))
    (run_dir / "quality.json").write_text(json.dumps(quality, indent=2) + "\n")

    # Fine-tuning and evaluation of every method with every seed.
    tuned_by = settings("num_particles target_kl temperature rounds updates elbo_draws lr grad_norm")
    tuned_by |= settings("kl_weight samples_from sampling_steps") | {"dtype": str(sampling_dtype)}
    random_x = torch.randint(4, (200, length), generator=torch.Generator().manual_seed(args.seed)).to(device)
    random_likelihood = float(log_likelihood(pretrained, random_x, args.eval_elbo_draws, args.seed).median())
    rows, total = [], args.rounds * len(args.methods) * args.seeds
    progress = tqdm(total=total, desc="fine-tuning", unit="round", dynamic_ncols=True)
    for seed, method in itertools.product(range(args.seed, args.seed + args.seeds), ("pretrained", *args.methods)):
        tag, denoiser, key, lowest = f"{method}-seed{seed}", copy.deepcopy(pretrained), keys["pretrained"], math.inf
        if method != "pretrained":

            def log(round, values, tag=tag):
                for name, value in values.items():
                    writer.add_scalar(f"{tag}/{name}", value, round)
                progress.update()
                progress.set_postfix_str(f"{tag} reward {values['reward']:.2f}", refresh=False)

            upstream, before = [keys["pretrained"], keys["reward_oracle"], args.oracle_output], progress.n
            made_of = [method, seed, args.epsilon if method.endswith("neg") else 0, upstream, tuned_by]
            rest = (length, args, seed, sampling_dtype, log)
            tune = functools.partial(finetune, pretrained, reward_oracle, method, *rest)
            state, key = stage("tuned", made_of, tune, device)
            progress.update(args.rounds - (progress.n - before))  # all of them, if they were there
            denoiser.load_state_dict(state["state"])
            lowest = state["lowest_loss"]
        outputs_used = [args.oracle_output, args.accessibility_output]
        made_of = [key, keys, data_key, seed, *outputs_used, args.top_share, measured_by]
        rest = (top, simulated, args, seed, sampling_dtype)
        result, _ = stage("evaluated", made_of, lambda _: evaluate(denoiser, models, *rest), device)  # noqa: B023
        row = dict(method=method, seed=seed) | result["row"] | dict(lowest_loss=lowest)
        rows.append(row)
        for name in COLUMNS:
            writer.add_scalar(f"evaluation/{method}/{name}", row[name], seed)
        fasta = (f">{tag}-{i + 1}\n{text(sequence)}\n" for i, sequence in enumerate(result["x"].tolist()))
        (run_dir / f"{tag}.fasta").write_text("".join(fasta))
        if row["log_likelihood"] < random_likelihood:
            note = f"less likely under the pretrained model than random ones ({random_likelihood:.0f} nats)"
            progress.write(f"warning: {tag} has collapsed, its sequences are {note}")
        if lowest < 0 and method != "wd1":
            progress.write(f"warning: the loss of {tag} fell to {lowest:.2f}: below 0 it has no bound (case II)")
        if row["distinct"] < 0.5:
            progress.write(f"warning: {tag} repeats itself: {row['distinct']:.0%} of its sequences are distinct")
    progress.close()
    print("\n" + summarise(rows, run_dir))
    files = "table.txt, table.csv, rows.csv, score_likelihood.png, quality.json, *.fasta"
    print(f"\n{time.time() - started:.0f} s; {run_dir}: {files}")
    writer.close()
