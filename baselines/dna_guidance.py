"""Guidance of a discrete diffusion model of DNA while it draws, nothing fine-tuned: CG, SMC, TDS and CFG of Table 3.

    python dna_finetune.py                              # the pretrained model and the oracles
    python baselines/dna_guidance.py --method tds       # on the newest of its runs, or --models runs/<run>/models.json

From t to s = t - 1/T a masked letter becomes v with probability q(v) = p_theta(v | x_t) (t - s) / t, or stays MASK with
q(MASK) = s / t. r is the reward oracle, f(x_t) the letters of x_t, p_theta where it is masked, x0^ = argmax f and g
the gradient of r(f(x_t)) with respect to the one-hot x_t:

    cg   q'(v) ~ q(v) exp(gamma (g_v - g_MASK))                                   Nisonoff et al. 2024, 2406.01572
    smc  resamples K sequences by exp((r(x0^(x_s)) - r(x0^(x_t))) / alpha)        Wu et al. 2023, 2306.17775
    tds  draws as cg, resamples by the weight of smc times q(x_s) / q'(x_s)       likewise
    cfg  log p = (1 + w) log p(. | x_t, class 1) - w log p(. | x_t)               Ho and Salimans 2022, 2207.12598

With many particles smc and tds draw from p_theta(x_0) exp(r(x_0) / alpha) / Z; of K = 64, resampled at every step, few
differ. Of the given gamma, alpha and w those with the reward oracle's highest median are taken: tuning.csv.

Departures from the DRAKES release (Wang et al. 2024, 2410.13643): its f has log p_theta where ours has p_theta, and is
constant at letters, so that its g is only what the network makes of x_t, not what the oracle makes of the letter, too;
its g is of the batch's mean; its q' in the weight of tds has no normaliser, nor has its law of cfg. Its class 1 is
above a threshold, ours a share of the reward oracle's data; our network starts as the pretrained one. Its settings are
gamma 3e5 (cg) and 1,000 (tds), alpha 0.5 and w 10, not tuned, and 131,500 steps of 512 for cfg; ours are for a CPU.
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
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Literal

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
import tyro
from tqdm import tqdm

# What a flag's value must be is part of its type, and what it means is the comment beside it: --help shows that.
Count = Annotated[int, "at least 1", lambda n: n >= 1]
Several = Annotated[int, "at least 2", lambda n: n >= 2]
Seed = Annotated[int, "from 0 to 2^32 - 1", lambda n: 0 <= n < 2**32]
Positive = Annotated[float, "above 0 and finite", lambda x: 0 < x < math.inf]
Share = Annotated[float, "above 0 and at most 1", lambda x: 0 < x <= 1]
File = Annotated[str, "a file that is there", lambda path: not path or Path(path).is_file()]
NonNegatives = Annotated[tuple[float, ...], "at least 0, finite", lambda xs: xs and all(0 <= x < math.inf for x in xs)]
Positives = Annotated[tuple[float, ...], "above 0, finite", lambda xs: xs and all(0 < x < math.inf for x in xs)]
GPU = torch.cuda.is_available()
LETTERS, MASK = "ACGT", 4


@dataclass
class Args:
    method: Literal["cg", "smc", "tds", "cfg"] = "cg"  # how the pretrained model is guided
    models: File = ""  # models.json of a run of dna_finetune.py, args.json beside it; empty: of the newest in runs/

    # guidance; several values: the best by the reward oracle is taken
    gamma: NonNegatives = (3, 10, 30, 100)  # gamma of cg and tds, per unit of reward
    alpha: Positives = (0.01, 0.03, 0.1, 0.3)  # alpha of smc and tds, temperature in units of reward
    w: NonNegatives = (1, 3, 10, 30)  # w of cfg; 0: the conditional model
    num_particles: Several = 64  # K: sequences that are drawn, and resampled, side by side
    tuning_samples: Several = 128  # sequences that are drawn to judge one setting

    # conditional model of cfg
    class_share: Share = 0.1  # most active share of the reward oracle's part of the data, class 1
    train_steps: Count = 2_500  # Adam steps
    train_batch: Count = 64  # sequences per step
    train_lr: Positive = 1e-3  # learning rate, falling to a tenth along a cosine

    # output and machine; data, T, number and measures of the sequences are those of the --models run; all in float32
    seed: Seed = 1  # seed of the training and the tuning, and first seed of the draws
    seeds: Count = 1  # evaluations, with seeds seed, seed + 1, ...
    device: str = "cuda" if GPU else "cpu"  # cpu, cuda, cuda:1, ...

    def __post_init__(self):
        """Raises SystemExit with one line for the first argument that makes no sense."""
        rules = {field.name: field.type.__metadata__ for field in fields(self) if hasattr(field.type, "__metadata__")}
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


@torch.no_grad()
def draw(denoiser, oracle, count, length, steps, generator, gamma=None, alpha=None):
    """Stepwise ancestral sampling, guided by gamma (cg), alpha (smc), both (tds) or neither: (count, L).

    With alpha the sequences are the particles of one population: their law is right in the limit of many.
    """
    x, before, log_ratio = torch.full((count, length), MASK, device=generator.device), 0.0, 0.0
    for left in range(steps, -1, -1):  # t = left / steps
        hot = one_hot(x, 5).requires_grad_(gamma is not None)  # (B, L, 5)
        with torch.set_grad_enabled(gamma is not None):
            log_p = denoiser(hot)  # (B, L, 4)
            f = hot[..., :4] + hot[..., 4:] * log_p.exp()  # its gradient goes through p_theta, too
            slope = torch.zeros_like(hot)
            if gamma is not None and left:
                (gradient,) = torch.autograd.grad(oracle(f).sum(), hot)
                slope = gamma * gradient  # - g_MASK, the same for all five states, is lost in the softmax
        if alpha is not None:
            reward = oracle(f.argmax(-1))  # r(x0^(x_t)), (B,)
            if left < steps:
                log_weight = ((reward - before) / alpha + log_ratio).double()
                check_finite(f"alpha = {alpha:g}", weight=log_weight)
                rows = torch.multinomial(log_weight.softmax(0), count, replacement=True, generator=generator)
                x, log_p, slope, reward = x[rows], log_p[rows], slope[rows], reward[rows]
            before = reward
        if not left:
            return x
        stay = torch.full_like(log_p[..., :1], 1 - 1 / left)  # s / t
        log_q = torch.cat([log_p - math.log(left), stay.log()], -1)  # (B, L, 5)
        log_guided = (log_q + slope).log_softmax(-1)
        check_finite(f"{left} steps before the end, gamma = {gamma}", law=log_guided.exp())
        gumbel = -torch.empty_like(log_q).exponential_(generator=generator).log()
        x_s = (log_guided + gumbel).argmax(-1)
        ratio = (log_q - log_guided).gather(-1, x_s[..., None])[..., 0]  # nan for MASK in the last step, never drawn
        log_ratio = (ratio * (x == MASK)).sum(-1)
        x = torch.where(x == MASK, x_s, x)


class ConditionalDenoiser(nn.Module):
    """The pretrained network with a vector per layer for class 0, class 1 or none, number 2, added to what it sees."""

    def __init__(self, pretrained):
        super().__init__()
        self.denoiser = copy.deepcopy(pretrained).requires_grad_(True)
        self.classes = nn.Parameter(torch.zeros(3, *pretrained.shifts.shape))

    def forward(self, x, label):
        """x (B, L) or (B, L, 5), label (B,) in 0..2 -> log p (B, L, 4)."""
        shifts = self.denoiser.shifts + self.classes[label]  # (B, layers, C)
        return torch.func.functional_call(self.denoiser, {"shifts": shifts.transpose(0, 1)[:, :, None]}, x)

    def guided(self, x, w):
        """log p of cfg, normalised: (1 + w) log p(class 1) - w log p(no class), x (B, L) or (B, L, 5) -> (B, L, 4)."""
        label = torch.tensor([1, 2], device=x.device).repeat_interleave(len(x))
        log_p, log_p_none = self(torch.cat([x, x]), label).chunk(2)
        log_p = ((1 + w) * log_p - w * log_p_none).log_softmax(-1)
        check_finite(f"w = {w:g}", law=log_p)
        return log_p


def train_conditional(pretrained, x, y, args):
    """ConditionalDenoiser trained on x (N, L) with the pretraining loss; class 1 are the highest y (N,)."""
    denoiser, best = ConditionalDenoiser(pretrained), y.topk(max(1, round(args.class_share * len(y)))).indices
    label = torch.zeros(len(x), dtype=torch.long, device=x.device).index_fill(0, best, 1)
    optimizer = torch.optim.Adam(denoiser.parameters(), lr=args.train_lr)
    generator = torch.Generator(x.device).manual_seed(args.seed)
    for step in (progress := tqdm(range(args.train_steps), desc="conditional model", dynamic_ncols=True)):
        rows = torch.randint(len(x), (args.train_batch,), generator=generator, device=x.device)
        hidden = torch.rand(len(rows), generator=generator, device=x.device) < 0.1  # have no class, as in the release
        noisy, masked, factor = corrupt(x[rows].long(), 1, generator)
        log_p = denoiser(noisy[:, 0], torch.where(hidden, 2, label[rows]))[:, None]
        loss = elbo_loss(log_p, x[rows].long(), masked, factor).mean() / x.shape[1]
        check_finite(f"--train-lr {args.train_lr}, step {step}", loss=loss)
        optimizer.param_groups[0]["lr"] = args.train_lr * cosine(step / args.train_steps)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(denoiser.parameters(), 1.0)
        optimizer.step()
        if step % 20 == 0:
            progress.set_postfix(nats_per_base=f"{loss:.3f}", refresh=False)
    return denoiser.requires_grad_(False)


def cosine(share):
    return 0.1 + 0.45 * (1 + math.cos(math.pi * share))


def check_finite(where, **quantities):
    """Raises SystemExit with one line for the first quantity that is not finite."""
    for name, value in quantities.items():
        if not value.isfinite().all():
            raise SystemExit(f"stopped at {where}: {name} not finite")


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


@torch.no_grad()
def predict(oracle, x):
    """The oracle's numbers for x (N, L) -> (N,)."""
    return torch.cat([oracle(part) for part in x.split(512)])


def kmers(x, k=3):
    """Frequencies of the 4^k words in x (N, L)."""
    index = sum(x[:, i : x.shape[1] - k + 1 + i].long() * 4**i for i in range(k))
    return torch.bincount(index.flatten(), minlength=4**k).double() / index.numel()


def evaluate(x, models, top, args):
    """The row of the table of sequences x (N, L); top (M, L) are the data's most active, args those of dna_finetune."""
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
    return {name: float(value) for name, value in row.items()}


def write_csv(path, rows):
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows({k: f"{v:.5g}" if isinstance(v, float) else v for k, v in row.items()} for row in rows)


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


def sha256(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


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


def read_run(path):
    """Arguments of the run of dna_finetune.py that wrote models.json, and its models' files; SystemExit if wrong."""
    try:
        args, files = (json.loads(file.read_text()) for file in (Path(path).parent / "args.json", Path(path)))
        if missing := {"pretrained", "reward_oracle", "eval_oracle"} - files.keys():
            raise ValueError(f"no {', '.join(sorted(missing))}")
        return SimpleNamespace(**args), files
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise SystemExit(f"--models {path} is not models.json of a run of dna_finetune.py: {error}") from None


if __name__ == "__main__":
    args = tyro.cli(Args, description=__doc__)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, _: os._exit(128 + number))
    try:
        device = torch.Generator(torch.zeros(1, device=args.device).double().device).device
    except Exception as error:  # which one depends on the device, and MPS has no doubles
        raise SystemExit(f"--device {args.device}: {str(error).splitlines()[0].split('. ')[0]}; use cpu") from None

    # The run of dna_finetune.py: its data and its models.
    newest = max(Path("runs").glob("*__dna_finetune__*/models.json"), key=lambda path: path.stat().st_mtime, default="")
    if not (args.models or newest):
        raise SystemExit("--models: there is no run of dna_finetune.py in runs/; make one, or name its models.json")
    args.models = args.models or str(newest)
    run, files = read_run(args.models)
    x, y, (for_reward, _, _), _ = read_data(run)
    length, steps = x.shape[1], run.sampling_steps
    top = x[y.topk(max(2, round(run.top_share * len(y)))).indices].to(device)
    kinds = dict.fromkeys(files, "oracle") | {"pretrained": "denoiser"}
    models = {name: load_model(kinds[name], path, length, device) for name, path in files.items()}

    run_name = f"{Path(run.data).name.split('.')[0] or 'simulated'}__dna_guidance_{args.method}__{args.seed}"
    run_dir = Path("runs") / f"{run_name}__{datetime.now():%Y%m%d-%H%M%S-%f}"
    try:
        run_dir.mkdir(parents=True)
        (run_dir / "args.json").write_text(json.dumps(asdict(args), indent=2) + "\n")
    except OSError as error:
        raise SystemExit(f"cannot write to {run_dir}: {error.strerror}") from None
    print(f"{run_dir} on {device}: {args.method} of the models of {args.models}, {length} bases, {steps} steps")

    start = time.time()
    if args.method == "cfg":
        conditional = train_conditional(models["pretrained"], *(z[for_reward].to(device) for z in (x, y)), args)
    train_seconds = time.time() - start

    def draw_with(setting, count, seed):
        """count sequences (count, L) in batches of K, and the seconds it took."""
        generator, start, K = torch.Generator(device).manual_seed(seed), time.time(), args.num_particles
        denoiser, oracle, guide = models["pretrained"], models["reward_oracle"], setting
        if args.method == "cfg":
            denoiser, guide = partial(conditional.guided, **setting), {}
        parts = [draw(denoiser, oracle, K, length, steps, generator, **guide) for _ in range(0, count, K)]
        return torch.cat(parts)[:count], time.time() - start

    # Tuning on the reward oracle only: one draw per setting, the highest median is taken.
    names, tuning = dict(cg=["gamma"], smc=["alpha"], tds=["gamma", "alpha"], cfg=["w"])[args.method], []
    for values in tqdm(list(itertools.product(*(getattr(args, name) for name in names))), desc="tuning"):
        setting = dict(zip(names, map(float, values), strict=True))
        drawn, seconds = draw_with(setting, args.tuning_samples, 20_000 + args.seed)
        median, distinct = predict(models["reward_oracle"], drawn).median(), len(drawn.unique(dim=0)) / len(drawn)
        tuning.append(setting | dict(reward_oracle=float(median), distinct=distinct, seconds=seconds))
    write_csv(run_dir / "tuning.csv", tuning)
    setting = {name: max(tuning, key=lambda row: row["reward_oracle"])[name] for name in names}
    print("\n".join(", ".join(f"{name} {value:.4g}" for name, value in row.items()) for row in tuning))

    # Evaluation as in dna_finetune.py.
    rows = []
    for seed in tqdm(range(args.seed, args.seed + args.seeds), desc="evaluation"):
        drawn, seconds = draw_with(setting, run.eval_samples, 10_000 + seed)
        row = dict(method=args.method, seed=seed) | evaluate(drawn, models, top, run)
        rows.append(row | setting | dict(train_seconds=train_seconds, draw_seconds=seconds))
        with open(run_dir / f"{args.method}-seed{seed}.fasta", "w") as file:
            for i, sequence in enumerate(drawn.tolist(), 1):
                file.write(f">{args.method}-seed{seed}-{i}\n{''.join(LETTERS[token] for token in sequence)}\n")
        write_csv(run_dir / "rows.csv", rows)
    table = [f"{args.method}, {', '.join(f'{name} = {value:g}' for name, value in setting.items())}, by seed:"]
    for name, (heading, digits) in COLUMNS.items():
        table.append(f"{heading:16}" + "".join(f"{row[name]:10.{digits}f}" for row in rows))
    (run_dir / "table.txt").write_text("\n".join(table) + "\n")
    print("\n" + "\n".join(table) + f"\n\n{run_dir}: rows.csv, table.txt, tuning.csv, *.fasta")
