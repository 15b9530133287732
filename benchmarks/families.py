# Copyright 2026 The tocom-hf authors. Licensed under the Apache License, Version 2.0.
"""What merging saves over the supported families: tokens, GFLOPs and speed-up where half of the operations are left.

    python benchmarks/families.py --resume                       # a later run adds what is missing
    python benchmarks/families.py --models "VideoMAE-S" "ViViT-S" --shares 0.5 0.25 --resume

Weights are random and of the sizes of published checkpoints, because cost does not depend on them. Dense and merged
take turns, round by round, so that a change of the machine's speed hits both alike.
"""

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
import transformers as hf
from sessions import Results, versions

from tocom_hf.cost.flops import Example
from tocom_hf.cost.timing import measure_costs
from tocom_hf.merging.backbones import find_backbone


SMALL = {"hidden_size": 384, "num_attention_heads": 6, "intermediate_size": 1536}
SMALL_DINO = {"hidden_size": 384, "num_attention_heads": 6}
BASE = {"hidden_size": 768, "num_attention_heads": 12, "intermediate_size": 3072}
COLUMNS = {
    "model": "model", "type": "model type", "share": "of the operations", "input": "input", "tokens": "tokens",
    "gflops": "GFLOPs", "r": "r", "left": "tokens behind the last layer", "merged_gflops": "GFLOPs merged",
    "speedup_1": "speed-up, batch 1", "speedup_8": "speed-up, batch 8", "dense_ms": "dense, batch 1, ms",
    "rounds": "rounds",
}  # fmt: skip
NOTES = [
    "*r* is the smallest that leaves at most the share of the dense model's operations, or the most that all layers "
    "can merge, where a head takes much of them; every layer merges so many. "
    "Speed-ups are medians of the ratios of each round, eager, float32, restored where the family's heads read "
    "patches. Batch 8 is left out where one image takes more than 0.7 s.",
    "What stands behind the tower of a language model sees as many tokens as before, and is not counted here.",
]


def depth_anything() -> hf.PreTrainedModel:
    stages = {"out_features": ["stage3", "stage6", "stage9", "stage12"], "reshape_hidden_states": False}
    backbone = hf.Dinov2Config(**SMALL_DINO, image_size=518, patch_size=14, **stages)
    necks = {"neck_hidden_sizes": [48, 96, 192, 384], "fusion_hidden_size": 64, "reassemble_hidden_size": 384}
    return hf.DepthAnythingForDepthEstimation(hf.DepthAnythingConfig(backbone_config=backbone, patch_size=14, **necks))


def timm_small() -> hf.PreTrainedModel:
    return hf.TimmWrapperForImageClassification(hf.TimmWrapperConfig(architecture="deit_small_patch16_224"))


MODELS: dict[str, Callable[[], hf.PreTrainedModel]] = {
    "ViT-S/16": lambda: hf.ViTForImageClassification(hf.ViTConfig(**SMALL)),
    "DeiT-S/16, distilled": lambda: hf.DeiTForImageClassificationWithTeacher(hf.DeiTConfig(**SMALL)),
    "DINOv2-S/14": lambda: hf.Dinov2Model(hf.Dinov2Config(**SMALL_DINO, image_size=224, patch_size=14)),
    "DINOv3-S/16": lambda: hf.DINOv3ViTModel(hf.DINOv3ViTConfig(**SMALL, num_register_tokens=4)),
    "timm DeiT-S/16": timm_small,
    "CLIP-B/16": lambda: hf.CLIPVisionModel(hf.CLIPVisionConfig(patch_size=16)),
    "SigLIP-B/16": lambda: hf.SiglipVisionModel(hf.SiglipVisionConfig()),
    "ViTPose-S": lambda: hf.VitPoseBackbone(hf.VitPoseBackboneConfig(**SMALL_DINO)),
    "BLIP-B/16, 384 px": lambda: hf.BlipVisionModel(hf.BlipVisionConfig(image_size=384)),
    "Depth Anything-S": depth_anything,
    "SmolVLM's tower": lambda: hf.SmolVLMVisionTransformer(
        hf.SmolVLMVisionConfig(**BASE, image_size=512, patch_size=16)
    ),
    "AST": lambda: hf.ASTForAudioClassification(hf.ASTConfig()),
    "VideoMAE-S": lambda: hf.VideoMAEForVideoClassification(hf.VideoMAEConfig(**SMALL)),
    "ViViT-S": lambda: hf.VivitForVideoClassification(hf.VivitConfig(**SMALL)),
}


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--shares", type=float, nargs="+", default=[0.5], help="Of the operations, to be left.")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--resume", action="store_true", help="Add to the rows of --output; leave out what is there.")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "families_cpu")
    return parser.parse_args()


def degree_for(example: Example, share: float) -> int:
    """The smallest degree that leaves at most a share of the operations."""
    dense = example.count_at(0)
    low, high = 1, dense.tokens[0] // len(example.backbone.layers) + 1
    while low < high:
        middle = (low + high) // 2
        if example.count_at(middle).flops > share * dense.flops:
            low = middle + 1
        else:
            high = middle
    return low


def measure(name: str, share: float, rounds: int) -> dict:
    torch.manual_seed(0)
    backbone = find_backbone(MODELS[name]().eval())
    one = Example.of(backbone, None, 1)
    degree = degree_for(one, share)
    dense, merged = measure_costs(one, [0, degree], rounds=rounds)
    many = None
    if dense.latency_ms < 700:
        many = measure_costs(Example.of(backbone, None, 8), [0, degree], rounds=rounds)[1]
    return {
        "model": name, "type": backbone.module.config.model_type, "share": f"{share:.0%}",
        "input": " x ".join(map(str, one.batch.shape[1:])), "tokens": dense.tokens[0],
        "gflops": round(dense.gflops, 1), "r": degree, "left": merged.tokens[-1],
        "merged_gflops": round(merged.gflops, 1), "speedup_1": round(merged.speedup, 2),
        "speedup_8": None if many is None else round(many.speedup, 2), "dense_ms": round(dense.latency_ms),
        "rounds": rounds,
    }  # fmt: skip


def main() -> None:
    args = parse_args()
    packages = versions("torch", "transformers", "timm")
    results = Results(args.output, "Merging over families", COLUMNS, NOTES, packages, resume=args.resume)
    for share in args.shares:
        for name in args.models:
            if not results.has(model=name, share=f"{share:.0%}"):
                results.add([measure(name, share, args.rounds)])
    results.add([])  # the table is written anew, whatever was there


if __name__ == "__main__":
    main()
