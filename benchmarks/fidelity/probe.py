# Copyright 2026 The tocom-hf authors. Licensed under the Apache License, Version 2.0.
"""How much merging changes what a backbone says about a task, before anything is trained.

    python benchmarks/fidelity/probe.py --model runs/study-b/base --data runs/study-b/data/digits --degrees 0 3 5

For every degree: the cosine distance of the class feature to degree 0, and the accuracy on validation images of a
linear probe (ridge regression on the class feature and the mean patch feature) that was fitted at degree 0, run at this
degree, and of one fitted at this degree. A task whose probe loses nothing is no judge of compensation.
"""

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch.utils.data import DataLoader
from transformers import AutoImageProcessor, AutoModel

from tocom_hf import apply_tome
from tocom_hf.data.images import with_pixel_values
from tocom_hf.data.tasks import load_labelled


RIDGE = 300.0  # weight of the squared norm


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", nargs="+", required=True, help="Folders with train.parquet and validation.parquet.")
    parser.add_argument("--degrees", type=int, nargs="+", default=[0, 3, 5])
    parser.add_argument("--mixed_precision", choices=["no", "fp16", "bf16"])
    return parser.parse_args()


@torch.no_grad()
def features(model, loader: DataLoader, accelerator: Accelerator) -> tuple[torch.Tensor, torch.Tensor]:
    """Class feature and mean patch feature, `(images, 2, hidden)`, and labels."""
    rows, labels = [], []
    for batch in loader:
        with accelerator.autocast():
            states = model(pixel_values=batch["pixel_values"].to(accelerator.device)).last_hidden_state.float().cpu()
        rows.append(torch.stack([states[:, 0], states[:, 1:].mean(dim=1)], dim=1))
        labels.append(batch["labels"])
    return torch.cat(rows), torch.cat(labels)


def fit(inputs: torch.Tensor, labels: torch.Tensor, classes: int, ridge: float = RIDGE) -> torch.nn.Linear:
    """A linear classifier of `(images, features)`, by ridge regression of the classes on the standardised features."""
    mean, std = inputs.mean(dim=0), inputs.std(dim=0) + 1e-6
    scaled = (inputs - mean) / std
    gram = scaled.T @ scaled + ridge * torch.eye(scaled.shape[1])
    weight = torch.linalg.solve(gram, scaled.T @ (F.one_hot(labels, classes).float() - 1 / classes))
    head = torch.nn.Linear(*weight.shape)
    head.weight.data = (weight / std[:, None]).T.contiguous()
    head.bias.data = -head.weight.data @ mean
    return head


def main() -> None:
    args = parse_args()
    accelerator = Accelerator(mixed_precision=args.mixed_precision)
    model = AutoModel.from_pretrained(args.model, dtype=torch.float32).eval().to(accelerator.device)
    processor = AutoImageProcessor.from_pretrained(args.model)
    degrees = sorted({0, *args.degrees})
    print("| task | r | cosine distance to r = 0 | probe fitted at 0 | probe fitted at r |")
    print("|---|---|---|---|---|")
    for folder in map(Path, args.data):
        found = {}
        for degree in degrees:
            apply_tome(model, degree)
            for split in ("train", "validation"):
                dataset, classes = load_labelled(str(folder), split)
                dataset = with_pixel_values(dataset, processor, label_column="label")
                found[degree, split] = features(model, DataLoader(dataset, batch_size=50), accelerator)
        probes = {r: fit(found[r, "train"][0].flatten(1), found[r, "train"][1], classes) for r in degrees}
        for degree in degrees:
            rows, labels = found[degree, "validation"]
            plain = found[0, "validation"][0]
            distance = 1 - F.cosine_similarity(rows[:, 0], plain[:, 0]).mean().item()
            right = [(probes[r](rows.flatten(1)).argmax(1) == labels).float().mean().item() for r in (0, degree)]
            print(f"| {folder.name} | {degree} | {distance:.3f} | {right[0]:.1%} | {right[1]:.1%} |", flush=True)


if __name__ == "__main__":
    main()
