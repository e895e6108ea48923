"""DRAKES: a discrete diffusion model of DNA, tuned by backpropagation from the oracle through the sampler; Table 3.

    python dna_finetune.py                              # the pretrained model and the oracles
    python baselines/drakes.py                          # on the newest of its runs, or --models runs/<run>/models.json
    python baselines/drakes.py --kl-weight 0.001        # DRAKES-KL

Paper: Wang et al. 2024, arXiv 2410.13643. In the last --gradient-steps of the T steps x is soft, (L, 5), and has a
gradient; it goes from t to s = t - 1/T by

    q = p_theta(. | x_t) (t - s) / t for the letters, s / t for MASK
    x_s = c x_t + (1 - c) softmax((log q + Gumbel) / tau),   c = 1 - x_t[MASK], what has left the mask already

The oracle r sees the argmax of x_0, its gradient passes straight through to x_0 (straight-through estimator):

    minimise -E[r(x_0)] + kl_weight E[path KL],
    path KL = sum over steps of (t - s) / t sum over positions of x_t[MASK] KL(p_theta(. | x_t) || p_pre(. | x_t))

SiMPO calls kl_weight 0 DRAKES and all else DRAKES-KL. Departures from the release: the KL has the weight x_t[MASK]
(t - s) / t, there letter v's term has (1 - x_t[MASK]) x_t[v] / t, only where MASK still is the largest share of a soft
place, so that kl_weight is on another scale; there p_theta is that letter where it is the largest share; the defaults
are for a CPU. The release has 4 batches of 32 an update, up to 1,000 updates, lr 1e-4, T = 128.
"""

import copy
import csv
import gzip
import hashlib
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
Seed = Annotated[int, "from 0 to 2^32 - 1", lambda n: 0 <= n < 2**32]
Positive = Annotated[float, "above 0 and finite", lambda x: 0 < x < math.inf]
NonNegative = Annotated[float, "at least 0 and finite", lambda x: 0 <= x < math.inf]
File = Annotated[str, "a file that is there", lambda path: not path or Path(path).is_file()]
CPU, GPU = torch.cpu.get_capabilities(), torch.cuda.is_available()  # Intel gains by bfloat16 only with AMX
BF16 = torch.cuda.is_bf16_supported(False) if GPU else CPU.get("avx512_bf16" if "AMD" in str(CPU) else "amx_bf16")
LETTERS, MASK = "ACGT", 4


@dataclass
class Args:
    models: File = ""  # models.json of a run of dna_finetune.py, args.json beside it; empty: of the newest in runs/

    # DRAKES
    updates: Count = 100  # Adam steps
    batch: Count = 32  # sequences drawn at once
    batches: Count = 1  # batches per Adam step, whose gradients are averaged
    lr: Positive = 5e-4  # learning rate
    grad_norm: Positive = 1.0  # gradients are scaled down to this norm
    gradient_steps: Count = 50  # last steps of the sampler, which have a gradient; all of them, if there are fewer
    tau: Positive = 1.0  # tau: temperature of the Gumbel softmax
    kl_weight: NonNegative = 0.0  # weight of the path's KL to the pretrained model; release: 0.001, on another scale

    # output and machine; data, T, number and measures (not precision) of the sequences are those of the --models run
    seed: Seed = 1  # first seed of the fine-tuning and of the draws
    seeds: Count = 1  # runs, with seeds seed, seed + 1, ...
    device: str = "cuda" if GPU else "cpu"  # cpu, cuda, cuda:1, ...; cpu beside a GPU: with sampling in float32
    sampling_dtype: Literal["float32", "bfloat16"] = "bfloat16" if BF16 else "float32"  # precision of evaluation

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


def rollout(denoiser, pretrained, count, length, steps, gradient_steps, tau, kl_weight, generator):
    """Sampling whose last steps are soft: letters x_0 (count, L, 4), with gradient, and the path's KL (count,).

    Without kl_weight no KL is computed; with it, p_theta has a gradient in the first steps, too, their x_t have none.
    """
    x = F.one_hot(torch.full((count, length), MASK, device=generator.device), 5).float()  # (B, L, 5)
    path_kl = torch.zeros(count, device=x.device)
    for left in range(steps, 0, -1):  # t = left / steps, so that (t - s) / t = 1 / left
        soft = left <= gradient_steps
        with torch.set_grad_enabled(soft or kl_weight > 0):
            log_p = denoiser(x)  # (B, L, 4)
            if kl_weight:
                kl = (log_p.exp() * (log_p - pretrained(x))).sum(-1)  # (B, L)
                path_kl = path_kl + (x[..., MASK] * kl).sum(-1) / left
        with torch.set_grad_enabled(soft):
            stay = torch.full_like(log_p[..., :1], 1 - 1 / left)  # s / t
            log_q = torch.cat([log_p - math.log(left), stay.log()], -1)  # (B, L, 5)
            perturbed = log_q - torch.empty_like(log_q).exponential_(generator=generator).log()
            x_s = (perturbed / tau).softmax(-1) if soft else F.one_hot(perturbed.argmax(-1), 5).to(log_q.dtype)
            c = 1 - x[..., MASK:]
            x = c * x + (1 - c) * x_s
    return x[..., :4], path_kl


def straight_through(x):
    """One-hot of the largest of x (..., 4), with the gradient of x itself."""
    return F.one_hot(x.argmax(-1), 4) + x - x.detach()


def finetune(pretrained, oracle, length, steps, seed, args):
    """The pretrained denoiser tuned for the oracle's activity, and the curve, one row per update."""
    denoiser, curve, start = copy.deepcopy(pretrained).requires_grad_(True), [], time.time()
    optimizer = torch.optim.Adam(denoiser.parameters(), lr=args.lr)
    generator = torch.Generator(next(pretrained.parameters()).device).manual_seed(seed)
    for step in (progress := tqdm(range(args.updates), desc=f"drakes-seed{seed}", unit="update", dynamic_ncols=True)):
        optimizer.zero_grad()
        rewards, kls = [], []
        for _ in range(args.batches):
            sampler = steps, args.gradient_steps, args.tau, args.kl_weight, generator
            x, kl = rollout(denoiser, pretrained, args.batch, length, *sampler)
            reward = oracle(straight_through(x))  # (B,)
            loss = (args.kl_weight * kl - reward).mean() / args.batches
            loss.backward()
            rewards.append(reward.detach())
            kls.append(kl.detach())
        norm = nn.utils.clip_grad_norm_(denoiser.parameters(), args.grad_norm)
        for name, value in dict(loss=loss, gradient=norm).items():
            if not value.isfinite():
                raise SystemExit(f"stopped at update {step}: {name} not finite; try a smaller --lr")
        optimizer.step()
        row = dict(step=step, seconds=time.time() - start, reward=torch.cat(rewards).median().item())
        path_kl = torch.cat(kls).mean().item() if args.kl_weight else math.nan
        curve.append(row | dict(path_kl=path_kl, gradient_norm=norm.item()))
        progress.set_postfix(reward=f"{row['reward']:.2f}", refresh=False)
    return denoiser.requires_grad_(False), curve


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
    run.sampling_dtype = args.sampling_dtype
    x, y, _, _ = read_data(run)
    length, steps = x.shape[1], run.sampling_steps
    top = x[y.topk(max(2, round(run.top_share * len(y)))).indices].to(device)
    kinds = dict.fromkeys(files, "oracle") | {"pretrained": "denoiser"}
    models = {name: load_model(kinds[name], path, length, device) for name, path in files.items()}

    method = "drakes-kl" if args.kl_weight else "drakes"
    run_name = f"{Path(run.data).name.split('.')[0] or 'simulated'}__{method}__{args.seed}"
    run_dir = Path("runs") / f"{run_name}__{datetime.now():%Y%m%d-%H%M%S-%f}"
    try:
        run_dir.mkdir(parents=True)
        (run_dir / "args.json").write_text(json.dumps(asdict(args), indent=2) + "\n")
    except OSError as error:
        raise SystemExit(f"cannot write to {run_dir}: {error.strerror}") from None
    print(f"{run_dir} on {device}: {method} of the models of {args.models}, {length} bases, {steps} steps")

    # Fine-tuning and evaluation, the latter as in dna_finetune.py.
    rows, curves = [], []
    for seed in range(args.seed, args.seed + args.seeds):
        tag, start = f"{method}-seed{seed}", time.time()
        denoiser, curve = finetune(models["pretrained"], models["reward_oracle"], length, steps, seed, args)
        train_seconds, start = time.time() - start, time.time()
        save(run_dir / f"{tag}.pt", dict(kind="denoiser", state=denoiser.state_dict(), curve=curve))
        result = evaluate(denoiser, models, top, seed, run)
        row = dict(method=method, seed=seed) | result["row"]
        rows.append(row | dict(train_seconds=train_seconds, eval_seconds=time.time() - start))
        curves += [dict(method=method, seed=seed) | row for row in curve]
        with open(run_dir / f"{tag}.fasta", "w") as file:
            for i, sequence in enumerate(result["x"].tolist(), 1):
                file.write(f">{tag}-{i}\n{''.join(LETTERS[token] for token in sequence)}\n")
        write_csv(run_dir / "rows.csv", rows)
        write_csv(run_dir / "curves.csv", curves)
    table = [f"{method} with kl_weight = {args.kl_weight:g}, by seed:"]
    for name, (heading, digits) in COLUMNS.items():
        table.append(f"{heading:16}" + "".join(f"{row[name]:10.{digits}f}" for row in rows))
    (run_dir / "table.txt").write_text("\n".join(table) + "\n")
    print("\n" + "\n".join(table) + f"\n\n{run_dir}: rows.csv, curves.csv, table.txt, {tag}.pt, *.fasta")
