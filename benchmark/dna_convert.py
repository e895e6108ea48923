"""The published models of Table 3 in the form that dna_finetune.py reads, and the published oracles as judges of a run.

    python benchmark/dna_convert.py denoiser pretrained.ckpt pretrained.pt
    python benchmark/dna_convert.py oracle reward_oracle_ft.ckpt reward_oracle.pt --data gosai_all.csv --column hepg2
    python benchmark/dna_convert.py judge runs/RUN reward_oracle_eval.ckpt

denoiser: a Lightning checkpoint, or a plain state dict, of Wang et al. (2024), tensor by tensor; what the network
computes is the same. With the weights that their release tunes and evaluates; --averaged: the averages that it keeps.
oracle: a gReLU checkpoint (pip install gReLU) is an Enformer of another size, so our Oracle learns its outputs on the
table's sequences and on mutated copies. It prints how well on sequences that it has not seen.
judge: the gReLU oracle itself on the sequences that a run has drawn: judged.csv in the run's directory.
"""

import csv
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import tyro
from tqdm import tqdm
from tyro.conf import Positional

sys.path.insert(0, str(Path(__file__).parent.parent))
import dna_finetune as dna  # noqa: E402


class Inert(dict):
    """Stands for every class that a checkpoint names besides tensors and plain values: holds nothing, does nothing."""

    def __init__(self, *arguments):
        pass

    def __setstate__(self, state):
        pass


def read(path):
    """The dict in a checkpoint; nothing in the file is executed. SystemExit if it is none."""
    try:
        names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
        with torch.serialization.safe_globals([(Inert, name) for name in names]):
            content = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(content, dict):
            raise ValueError(f"it holds a {type(content).__name__}")
        return content
    except Exception as error:
        raise SystemExit(f"{path} is no checkpoint: {str(error).splitlines()[0]}") from None


def published_denoiser(content, averaged):
    """The state of our Denoiser from that of the DRAKES release: 5 letters in and out, time embedding at time 0."""
    tensors = content.get("state_dict", content).items()
    state = {name.removeprefix("backbone."): value for name, value in tensors if name.startswith("backbone.")}
    if averaged:  # these are a list in the order of the parameters; the Fourier frequencies are none
        learned = [name for name in state if name != "time_embedder.0.W"]
        state |= zip(learned, content["ema"]["shadow_params"], strict=True)
    frequencies = len(state["time_embedder.0.W"])
    at_zero = torch.cat([torch.zeros(frequencies), torch.ones(frequencies)]).to(state["linear.weight"])  # sin 0, cos 0
    time = F.relu(F.linear(at_zero, state["time_embedder.1.weight"], state["time_embedder.1.bias"]))
    layers = [f"time_layers.{i}.dense" for i in range(sum(name.startswith("norms.") for name in state) // 2)]
    shifts = [F.linear(time, state[f"{layer}.weight"], state[f"{layer}.bias"]) for layer in layers]
    ours = {name: value for name, value in state.items() if name.split(".")[0] in ("linear", "convs", "norms")}
    ours |= {"shifts": torch.stack(shifts)}
    ours |= {"hidden.weight": state["final_conv.0.weight"][..., 0], "hidden.bias": state["final_conv.0.bias"]}
    weight, bias = state["final_conv.2.weight"][:4, :, 0], state["final_conv.2.bias"][:4]  # the fifth is the mask
    return ours | {"logits.weight": weight, "logits.bias": bias}


def grelu_oracle(path, output, device):
    """The oracle of a gReLU checkpoint as a function of x (B, L) to its output of this number (B,), counted from 0."""
    content = read(path)
    if "state_dict" not in content or "hyper_parameters" not in content:
        raise SystemExit(f"{path} is no gReLU checkpoint")
    try:
        from grelu.lightning import LightningModel
    except ImportError:
        raise SystemExit(f"{path}: a gReLU checkpoint needs gReLU: pip install gReLU") from None
    settings = content["hyper_parameters"]
    model_params = dict(settings["model_params"])
    if model_params["model_type"] == "EnformerPretrainedModel":  # would download weights; the file brings them
        model_params["model_type"] = "EnformerModel"
    model = LightningModel(model_params=model_params, train_params=dict(settings["train_params"]) | {"logger": None})
    model.load_state_dict(content["state_dict"])
    model = model.to(device).eval().requires_grad_(False)
    return lambda x: model(F.one_hot(x.long(), 4).float().transpose(1, 2)).flatten(1)[:, output]


def predict(oracle, x, device):
    """The oracle's numbers for x (N, L) -> (N,), on the CPU."""
    parts = tqdm(x.split(64), desc="gReLU", dynamic_ncols=True)
    return torch.cat([oracle(part.to(device)).cpu() for part in parts])


def denoiser(source: Positional[Path], target: Positional[Path], averaged: bool = False):
    """Our form of a published denoiser.

    Args:
        averaged: the averages of its weights over training.
    """
    try:
        state = published_denoiser(read(source), averaged)
        dna.Denoiser(len(state["linear.weight"]), len(state["shifts"]) // 5).load_state_dict(state)
    except (KeyError, ValueError, RuntimeError) as error:
        raise SystemExit(f"{source} holds no denoiser of a known form: {str(error).splitlines()[0]}") from None
    dna.save(target, dict(kind="denoiser", state=state))


def oracle(
    source: Positional[Path],
    target: Positional[Path],
    data: Path,
    column: str = "hepg2",
    output: int = 0,
    classifier: bool = False,
    width: int = 256,
    epochs: int = 20,
    seed: int = 1,
    device: str = dna.Args.device,
):
    """Our oracle that has learned a gReLU oracle's outputs.

    Args:
        data: .csv[.gz] with sequences, as for dna_finetune.py.
        column: measured values, only to report correlations with.
        output: which output of the gReLU oracle, counted from 0; 1 of binary_atac_cell_lines.ckpt is their ATAC-Acc.
        classifier: the gReLU oracle puts out probabilities; ours learns whether they are above a half.
        width: channels of our oracle.
        epochs: passes over the data.
        seed: of the mutations and the training.
        device: cpu, cuda, ...
    """
    teacher = grelu_oracle(source, output, device)
    x, measured = dna.read_table("--data", data, [column])
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(x), generator=generator)
    held_out, rows = order[: len(x) // 10], order[len(x) // 10 :]
    rates = 0.3 * torch.rand(len(rows), 1, generator=generator)  # up to 30% of a copy's letters are drawn anew
    mutated = torch.rand(x[rows].shape, generator=generator) < rates
    letters = torch.randint(4, mutated.shape, generator=generator, dtype=torch.uint8)
    train = torch.cat([x[rows], torch.where(mutated, letters, x[rows])])
    y, y_held_out = predict(teacher, train, device), predict(teacher, x[held_out], device)
    args = dna.Args(oracle_width=width, oracle_epochs=epochs, seed=seed, device=device)
    labels = (y > 0.5).float() if classifier else y
    content = dna.train_oracle(train.to(device), labels.to(device), classifier, args)
    dna.save(target, content)
    student = dna.predict(dna.load_model("oracle", target, x.shape[1], device), x[held_out].to(device)).cpu()
    for name, other in {"the gReLU oracle": y_held_out, f"the measured {column}": measured[held_out, 0]}.items():
        print(f"{len(held_out)} unseen sequences: correlation with {name} {np.corrcoef(student, other)[0, 1]:.3f}")
    if classifier:
        print(f"agreement with the gReLU oracle {((student > 0) == (y_held_out > 0.5)).double().mean():.3f}")


def judge(run: Positional[Path], source: Positional[Path], output: int = 0, device: str = dna.Args.device):
    """What a gReLU oracle says of the sequences of a run; accessible is the share above a half, for a classifier.

    Args:
        output: which output of the gReLU oracle, counted from 0.
        device: cpu, cuda, ...
    """
    paths = sorted(run.glob("*.fasta"))
    if not paths:
        raise SystemExit(f"{run} is no run of dna_finetune.py: it has no .fasta file")
    teacher = grelu_oracle(source, output, device)
    with open(run / "judged.csv", "w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["method", "seed", "median", "accessible"])
        for path in paths:
            sequences = [line for line in path.read_text().split() if not line.startswith(">")]
            x = torch.tensor([[dna.LETTERS.index(letter) for letter in sequence] for sequence in sequences])
            y = predict(teacher, x, device)
            table.writerow([*path.stem.split("-seed"), f"{y.median():.5g}", f"{(y > 0.5).double().mean():.5g}"])
    print((run / "judged.csv").read_text())


if __name__ == "__main__":
    tyro.extras.subcommand_cli_from_dict(dict(denoiser=denoiser, oracle=oracle, judge=judge), description=__doc__)
