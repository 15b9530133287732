# Copyright 2026 The tocom-hf authors. Licensed under the Apache License, Version 2.0.
"""What each part of merging costs in an eager pass: parts are left out one after the other, on the same weights.

    python benchmarks/eager_parts.py                       # ViT-S and ViT-B, one image, one and two threads

A variant that leaves a part out computes something else, at the same token counts. All of them take turns.
"""

import argparse
import contextlib
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import torch
from inference import SIZES, clone_of, count_flops, make_model, structured_images
from runtimes import drop_tokens
from sessions import Results, median_ratio, time_in_turn, torch_call, versions

from tocom_hf import apply_tome
from tocom_hf.merging import layers
from tocom_hf.merging.tokens import MergePlan, match_tokens


COLUMNS = {
    "model": "model", "threads": "threads", "variant": "variant", "speed": "speed over dense",
    "share": "of the FLOP ratio", "milliseconds": "ms", "rounds": "rounds",
}  # fmt: skip
NOTES = [
    "One image of 224 x 224 pixels, r = {r}, float32, eager. Speeds are medians of the ratios of each round.",
    "*Plans known*: which tokens merge is not computed, but remembered. *Plans known, nothing merged*: the first "
    "tokens are kept as they are, so no row is gathered or added. *Dropped*: no package either, layers lose tokens for "
    "nothing: what the matrix products of torch make of these token counts.",
]


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=SIZES, default=["s", "b"])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--r", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "eager_parts_cpu")
    return parser.parse_args()


class Remembered:
    """`match_tokens` that computes a plan once for each number of tokens."""

    def __init__(self) -> None:
        self.plans: dict[int, MergePlan] = {}

    def __call__(self, metric: torch.Tensor, r: int, *args, **kwargs) -> MergePlan:
        tokens = metric.shape[1]
        if tokens not in self.plans:
            self.plans[tokens] = match_tokens(metric, r, *args, **kwargs)
        return self.plans[tokens]


def keep_first(hidden_states: torch.Tensor, sizes: torch.Tensor | None, plan: MergePlan):
    """The first tokens, as many as merging would leave, of size 1: in place of `merge_tokens`."""
    left = plan.kept.shape[1]
    return hidden_states[:, :left], torch.ones(hidden_states.shape[0], left)


@contextlib.contextmanager
def replaced(**functions: Callable) -> Iterator[None]:
    """Other functions in place of those that merging layers call."""
    with contextlib.ExitStack() as stack:
        for name, function in functions.items():
            stack.enter_context(mock.patch.object(layers, name, function))
        yield


def variants(size: str, r: int) -> dict:
    """What to time, by name."""
    dense = make_model(size, 224)
    ours = torch_call(apply_tome(clone_of(dense, size, 224), r))
    without = torch_call(apply_tome(clone_of(dense, size, 224), r, proportional_attention=False))
    remembered = Remembered()

    def with_known_plans(pixel_values):
        with replaced(match_tokens=remembered):
            return ours(pixel_values)

    def with_nothing_merged(pixel_values):
        with replaced(match_tokens=remembered, merge_tokens=keep_first):
            return ours(pixel_values)

    return {
        "dense": torch_call(dense),
        "ours": ours,
        "without proportional attention": without,
        "plans known": with_known_plans,
        "plans known, nothing merged": with_nothing_merged,
        "dropped": torch_call(drop_tokens(clone_of(dense, size, 224), r)),
    }


def main() -> None:
    args = parse_args()
    notes = [note.format(r=args.r) for note in NOTES]
    packages = versions("torch", "transformers")
    results = Results(args.output, "What the parts of merging cost", COLUMNS, notes, packages, resume=False)
    pixel_values = structured_images(1, 224).numpy()
    for size in args.models:
        flops = [sum(count_flops(size, 224, degree).values()) for degree in (0, args.r)]
        calls = variants(size, args.r)
        for threads in args.threads:
            torch.set_num_threads(threads)
            times = time_in_turn(calls, pixel_values, args.rounds)
            for name in calls:
                speed = median_ratio(times, "dense", name)
                row = {"model": f"ViT-{size.upper()}/16", "threads": threads, "variant": name, "rounds": args.rounds}
                share = None if name == "dense" else round(speed * flops[1] / flops[0], 3)
                milliseconds = round(1000 * statistics.median(times[name]), 1)
                results.add([row | {"speed": round(speed, 3), "share": share, "milliseconds": milliseconds}])


if __name__ == "__main__":
    main()
