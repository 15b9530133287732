# Copyright 2026 The tocom-hf authors. Licensed under the Apache License, Version 2.0.
"""What a recipe, or attention without the bias of token sizes, costs in time: FLOPs do not show it.

    python benchmarks/recipe_speed.py --model facebook/dinov2-small --recipe recipe-dinov2-small/recipe.json

The model without merging, ToMe's rule, the recipe, and ToMe's rule without proportional attention take turns, round by
round, so that a change of the machine's speed hits all alike.
"""

import argparse
import statistics
from pathlib import Path

import numpy as np
import torch
from sessions import Call, Results, median_ratio, time_in_turn, versions
from transformers import AutoModel

from tocom_hf import MergeRecipe
from tocom_hf.cost.flops import Example
from tocom_hf.merging.backbones import Backbone, find_backbone
from tocom_hf.merging.patching import set_merging


COLUMNS = {
    "model": "model", "batch": "batch", "r": "r", "rule": "how tokens merge", "gflops": "GFLOPs",
    "flop_ratio": "GFLOPs, dense over merged", "speedup": "speed, merged over dense", "images_s": "images/s",
    "rounds": "rounds",
}  # fmt: skip
NOTES = [
    "Eager, float32. Speed is the median over the rounds of the ratio within each. Images/s are those of this machine "
    "and this run.",
]
DENSE = "dense"


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--image_size", type=int, default=224)
    parser.add_argument("--recipe", required=True, help="JSON file of `tocom find-recipe`.")
    parser.add_argument("--r", type=int, nargs="+", default=[8, 12, 16, 20])
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--resume", action="store_true", help="Add to the rows of --output; leave out what is there.")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "recipe_speed_cpu")
    return parser.parse_args()


def call_of(backbone: Backbone, r: int, settings: dict) -> Call:
    """A forward pass at a degree, as `apply_tome` with these settings would have it."""

    @torch.no_grad()
    def call(pixel_values: np.ndarray) -> np.ndarray:
        set_merging(backbone, r, **{"recipe": MergeRecipe(), "proportional_attention": True, **settings})
        return backbone.module(torch.from_numpy(pixel_values)).last_hidden_state.numpy()

    return call


def measure(backbone: Backbone, name: str, rules: dict[str, dict], batch_size: int, args) -> list[dict]:
    """The rows of one batch size."""
    example = Example.of(backbone, args.image_size, batch_size)
    variants = {(r, rule): call_of(backbone, r, settings) for r in args.r for rule, settings in rules.items()}
    calls = {DENSE: call_of(backbone, 0, {})}
    calls |= {f"{rule}, {r}": call for (r, rule), call in variants.items()}
    times = time_in_turn(calls, example.batch.numpy(), args.rounds)
    dense_gflops = example.count_at(0).flops / 1e9
    rows = []
    for r, rule in variants:
        set_merging(backbone, 0, recipe=rules[rule].get("recipe", MergeRecipe()))
        gflops = example.count_at(r).flops / 1e9
        own = times[f"{rule}, {r}"]
        rows.append({
            "model": name, "batch": batch_size, "r": r, "rule": rule, "gflops": round(gflops, 2),
            "flop_ratio": round(dense_gflops / gflops, 2),
            "speedup": round(median_ratio(times, DENSE, f"{rule}, {r}"), 3),
            "images_s": round(batch_size / statistics.median(own), 1), "rounds": len(own),
        })  # fmt: skip
    return rows


def main() -> None:
    args = parse_args()
    name = Path(args.model).name
    backbone = find_backbone(AutoModel.from_pretrained(args.model, dtype=torch.float32).eval())
    rules = {
        "ToMe's rule": {},
        "recipe": {"recipe": MergeRecipe.load(args.recipe)},
        "ToMe's rule, no proportional attention": {"proportional_attention": False},
    }
    packages = versions("torch", "transformers")
    results = Results(args.output, "What a recipe costs in time", COLUMNS, NOTES, packages, resume=args.resume)
    for batch_size in args.batch_sizes:
        if not results.has(model=name, batch=batch_size):
            results.add(measure(backbone, name, rules, batch_size, args))


if __name__ == "__main__":
    main()
