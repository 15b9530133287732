# Copyright 2026 The tocom-hf authors. Licensed under the Apache License, Version 2.0.
"""What merging saves on clips: tokens, GFLOPs and speed-up of a VideoMAE (1,568 tokens) and of a ViViT (3,137).

    python benchmarks/video.py --threads 2

Weights are random and of the size ViT-S, because cost does not depend on them. The degrees are those that leave a half
and a quarter of the tokens behind the last layer, and those that leave a half and a quarter of the operations. All
degrees of a model take turns, round by round, so that a change of the machine's speed hits all alike.
"""

import argparse

import torch
from transformers import (
    PreTrainedModel,
    VideoMAEConfig,
    VideoMAEForVideoClassification,
    VivitConfig,
    VivitForVideoClassification,
)

from tocom_hf.cost.flops import Example
from tocom_hf.cost.timing import measure_costs
from tocom_hf.devices import describe_device
from tocom_hf.merging.backbones import find_backbone


SMALL = {"hidden_size": 384, "num_attention_heads": 6, "intermediate_size": 1536, "num_labels": 400}
MODELS = {
    "VideoMAE-S": (VideoMAEForVideoClassification, VideoMAEConfig),
    "ViViT-S": (VivitForVideoClassification, VivitConfig),
}


def make_model(name: str) -> PreTrainedModel:
    model_class, config_class = MODELS[name]
    torch.manual_seed(0)
    return model_class(config_class(**SMALL)).eval()


def degree_for_tokens(example: Example, share: float) -> int:
    """The degree that leaves a share of the tokens behind the last layer."""
    tokens = example.count_at(0).tokens[0]
    return round((1 - share) * tokens / len(example.backbone.layers))


def degree_for_flops(example: Example, share: float) -> int:
    """The smallest degree that leaves at most a share of the operations."""
    dense = example.count_at(0)
    allowed = share * dense.flops
    low, high = 0, dense.tokens[0] // 2
    while low < high:
        middle = (low + high) // 2
        if example.count_at(middle).flops > allowed:
            low = middle + 1
        else:
            high = middle
    return low


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--batch_size", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--threads", type=int, help="Default: torch's.")
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    print(f"{describe_device(device)}, float32, batch {args.batch_size}, median of {args.rounds} rounds\n")
    print("| model | what is left | r | tokens behind the last layer | GFLOPs | latency (ms) | speed-up |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for name in args.models:
        example = Example.of(find_backbone(make_model(name).to(device)), None, args.batch_size)
        degrees = {0: "all"}
        for share, text in ((0.5, "half"), (0.25, "a quarter")):
            degrees.setdefault(degree_for_tokens(example, share), f"{text} of the tokens")
            degrees.setdefault(degree_for_flops(example, share), f"{text} of the operations")
        for cost in measure_costs(example, sorted(degrees), rounds=args.rounds):
            print(
                f"| {name} | {degrees[cost.target_r]} | {cost.target_r} | {cost.tokens[-1]:,} | {cost.gflops:.1f} | "
                f"{cost.latency_ms:.0f} | {cost.speedup:.2f} |"
            )


if __name__ == "__main__":
    main()
