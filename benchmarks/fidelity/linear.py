# Copyright 2026 The tocom-hf authors. Licensed under the Apache License, Version 2.0.
"""Fit a linear head to a frozen backbone that merges `source_r` tokens in every layer, and save it as a checkpoint.

    python benchmarks/fidelity/linear.py --model runs/study-b/base --data runs/study-b/data/digits --source_r 5 \\
        --output_dir runs/study-b/checkpoints/linear-digits/r5-seed0

The checkpoint is an ordinary classifier of transformers, so that it is evaluated as all others are.
"""

import argparse

import torch
from accelerate import Accelerator
from probe import fit
from torch.utils.data import DataLoader
from transformers import AutoConfig, AutoImageProcessor, AutoModelForImageClassification

from tocom_hf import TocomModel, apply_tome
from tocom_hf.data.images import with_pixel_values
from tocom_hf.data.tasks import load_labelled


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True, help="Folder with train.parquet.")
    parser.add_argument("--source_r", type=int, required=True)
    parser.add_argument("--mixed_precision", choices=["no", "fp16", "bf16"])
    parser.add_argument("--output_dir", required=True)
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    accelerator = Accelerator(mixed_precision=args.mixed_precision)
    dataset, classes = load_labelled(args.data, "train")
    processor = AutoImageProcessor.from_pretrained(args.model)
    dataset = with_pixel_values(dataset, processor, label_column="label")
    config = AutoConfig.from_pretrained(args.model, num_labels=classes)
    config.__dict__.pop("tocom", None)  # the degree that the backbone was trained at; this run makes a new one
    model = AutoModelForImageClassification.from_pretrained(
        args.model, config=config, dtype=torch.float32, ignore_mismatched_sizes=True
    )
    model.eval().to(accelerator.device)
    apply_tome(model, args.source_r)
    rows, labels = [], []
    model.classifier.register_forward_pre_hook(lambda module, inputs: rows.append(inputs[0].float().cpu()))
    for batch in DataLoader(dataset, batch_size=50):
        with accelerator.autocast(), torch.no_grad():
            model(pixel_values=batch["pixel_values"].to(accelerator.device))
        labels.append(batch["labels"])
    model.classifier = fit(torch.cat(rows), torch.cat(labels), classes)
    TocomModel.from_pretrained(model, source_r=args.source_r).save_pretrained(args.output_dir)
    processor.save_pretrained(args.output_dir)


if __name__ == "__main__":
    main()
