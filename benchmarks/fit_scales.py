# Copyright 2026 The tocom-hf authors. Licensed under the Apache License, Version 2.0.
"""Fitting scales with the teacher's outputs kept, against computing them anew in every step, in turn in one process.

python benchmarks/fit_scales.py
python benchmarks/fit_scales.py --max_steps 200 --images 256 --rounds 20
"""

import argparse
import statistics
import time
from pathlib import Path
from unittest import mock

import torch
from sessions import Results, versions
from transformers import AutoImageProcessor

from tocom_hf import PluginSet, TocomModel, fit_scales, load_images, with_pixel_values
from tocom_hf.scales import fitting


EXAMPLES = Path(__file__).parents[1] / "examples"
COLUMNS = {
    "images": "images", "max_steps": "steps", "batch_size": "batch", "anew_s": "anew, s", "kept_s": "kept, s",
    "speed": "kept over anew", "difference": "largest difference of a factor", "rounds": "rounds",
}  # fmt: skip
NOTES = [
    "Medians over rounds, in which both fit the same checkpoint by the same images, seed and steps. An image's outputs "
    "are computed when it is drawn first. The two differ by the rounding of other batches."
]


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", default=str(EXAMPLES / "digits" / "checkpoint"))
    parser.add_argument("--plugins", default=str(EXAMPLES.parent / "hub_cards" / "tocom-vit-mix"))
    parser.add_argument("--data", default=str(EXAMPLES / "digits" / "test.parquet"))
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--max_steps", type=int, default=100)
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "fit_scales_cpu")
    return parser.parse_args()


def compute_anew(self, indices: torch.Tensor, pixel_values: torch.Tensor) -> torch.Tensor:
    """In place of `_Teacher.outputs`: nothing is kept."""
    with torch.no_grad():
        return self.student(pixel_values)


def distance(one: PluginSet, other: PluginSet) -> float:
    """The largest difference of what two fitted sets add to a weight, over the largest of what one adds."""
    differences, sizes = [], []
    for index in range(one.config.min_r, one.config.max_r):
        for path, factors in one.adapter(index).items():
            differences.append((factors.lora_B - other.adapter(index)[path].lora_B).abs().max().item())
            sizes.append(factors.lora_B.abs().max().item())
    return max(differences) / max(sizes)


def main() -> None:
    args = parse_args()
    model = TocomModel.from_pretrained(args.checkpoint, plugins=args.plugins, source_r=0)
    processor = AutoImageProcessor.from_pretrained(args.checkpoint)
    images = with_pixel_values(load_images(args.data, split="test", max_samples=args.images), processor)
    images = [images[index] for index in range(len(images))]

    def fit() -> tuple[PluginSet, float]:
        start = time.perf_counter()
        fitted = fit_scales(model, images, max_steps=args.max_steps, batch_size=args.batch_size)
        return fitted, time.perf_counter() - start

    fit()
    anew, kept = [], []
    for _ in range(args.rounds):
        with mock.patch.object(fitting._Teacher, "outputs", compute_anew):
            slow, seconds = fit()
        anew.append(seconds)
        fast, seconds = fit()
        kept.append(seconds)
    results = Results(args.output, "Fitting scales", COLUMNS, NOTES, versions("torch", "transformers"), resume=False)
    results.add([{
        "images": len(images), "max_steps": args.max_steps, "batch_size": args.batch_size,
        "anew_s": round(statistics.median(anew), 2), "kept_s": round(statistics.median(kept), 2),
        "speed": round(statistics.median(a / b for a, b in zip(anew, kept, strict=True)), 3),
        "difference": float(f"{distance(slow, fast):.1e}"), "rounds": args.rounds,
    }])  # fmt: skip


if __name__ == "__main__":
    main()
