"""How good are the models of a dna_finetune.py run? Writes quality.json into the run's directory and prints it.

python benchmark/dna_quality.py runs/RUN            # where dna_finetune.py ran

The denoiser on data that it has not seen: its bound of the nats per base beside a Markov model of order 5, 3-mers and
GC of what it draws. The oracles: correlation with measurements that they have not seen, and on the simulated assay
with the truth, and whether they have found the planted sites.
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
import dna_finetune as dna  # noqa: E402


def markov_nats(train, test, order=5):
    """Nats per base of test under a Markov model of this order, counted on train with a pseudocount of 1."""

    def words(x, k):
        """The words of k + 1 letters in x (N, L) as numbers; shorter than order + 1 only at the start."""
        last = x.shape[1] if k == order else k + 1
        return sum(x[:, i : last - k + i].long() * 4 ** (k - i) for i in range(k + 1)).flatten()

    nats = 0.0
    for k in range(order + 1):  # letters before; the first places have fewer
        counts = torch.bincount(words(train, k), minlength=4 ** (k + 1)).double().view(-1, 4) + 1
        nats -= (counts / counts.sum(-1, keepdim=True)).log().flatten()[words(test, k)].sum()
    return float(nats / test.numel())


def site_effects(function, background):
    """Mean change of function where a site is put into background (N, L), 5 places and 2 strands: (factors, 10)."""
    start_value, effects = function(background).mean(), []
    for consensus, *_ in dna.FACTORS.values():
        site = torch.tensor([dna.LETTERS.index(dna.IUPAC[code][0]) for code in consensus], device=background.device)
        for word in (site, 3 - site.flip(0)):
            for share in (0.1, 0.3, 0.5, 0.7, 0.9):
                changed, start = background.clone(), int(share * (background.shape[1] - len(site)))
                changed[:, start : start + len(site)] = word
                effects.append(function(changed).mean() - start_value)
    return torch.stack(effects).view(len(dna.FACTORS), 10)


def correlation(a, b):
    return float(np.corrcoef(a.flatten().cpu(), b.flatten().cpu())[0, 1])


def denoiser_quality(denoiser, train, held_out, args):
    """On at most 1000 of the held-out sequences (N, L)."""
    generator = torch.Generator(train.device).manual_seed(args.seed)
    held_out = held_out[torch.randperm(len(held_out), generator=generator, device=held_out.device)[:1000]].long()
    length = train.shape[1]
    x = dna.sample(denoiser, args.eval_samples, length, args.sampling_steps, generator, args.sampling_dtype)
    bound = dna.log_likelihood(denoiser, held_out, args.eval_elbo_draws, args.seed)
    gc, gc_held_out = (((y == 1) | (y == 2)).double().mean(-1) for y in (x, held_out))
    return dict(
        model_nats_per_base=float(-bound.mean()) / length,
        markov5_nats_per_base=markov_nats(train, held_out),
        kmer_correlation=correlation(dna.kmers(x), dna.kmers(held_out)),
        gc_mean=float(gc.mean()),
        gc_mean_held_out=float(gc_held_out.mean()),
        gc_std=float(gc.std()),
        gc_std_held_out=float(gc_held_out.std()),
    )


def oracle_quality(oracle, held_out, y, simulated):
    """On held-out sequences (N, L) with measured activity y (N,)."""
    quality = dict(held_out_correlation=correlation(dna.predict(oracle, held_out), y))
    if simulated:
        true = dna.true_activity(held_out)
        quality["true_correlation"] = correlation(dna.predict(oracle, held_out), true)
        background = held_out[true < 2][:100]
        found = site_effects(lambda x: dna.predict(oracle, x), background)
        truth = site_effects(dna.true_activity, background)
        quality["site_effect_correlation"] = correlation(found, truth)
        for name, a, b in zip(dna.FACTORS, found.mean(-1), truth.mean(-1), strict=True):
            quality[f"{name}_effect"], quality[f"{name}_true_effect"] = float(a), float(b)
    return quality


if __name__ == "__main__":
    run_dir = Path(sys.argv[1] if len(sys.argv) == 2 else "")
    try:
        args = dna.Args(**json.loads((run_dir / "args.json").read_text()))
        files = json.loads((run_dir / "models.json").read_text())
    except (OSError, ValueError, TypeError) as error:
        raise SystemExit(f"give the directory of a dna_finetune.py run, from where it ran: {error}") from None
    x, y, (for_reward, for_eval, held_out), _ = dna.read_data(args)
    x, y, length = x.to(args.device), y.to(args.device), x.shape[1]
    denoiser = dna.load_model("denoiser", files["pretrained"], length, args.device)
    quality = dict(pretrained=denoiser_quality(denoiser, x[torch.cat([for_reward, for_eval])], x[held_out], args))
    for name in ("reward_oracle", "eval_oracle"):
        oracle = dna.load_model("oracle", files[name], length, args.device)
        quality[name] = oracle_quality(oracle, x[held_out], y[held_out], simulated=not args.data)
    (run_dir / "quality.json").write_text(json.dumps(quality, indent=2) + "\n")
    print(json.dumps(quality, indent=2))
