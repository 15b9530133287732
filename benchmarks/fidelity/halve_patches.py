# Copyright 2026 The tocom-hf authors. Licensed under the Apache License, Version 2.0.
"""A ViT with patches half as wide, and four times as many tokens, from one that is trained already.

    python benchmarks/fidelity/halve_patches.py --model examples/fashion_mnist/checkpoint \\
        --output_dir runs/197-tokens/start

makes 197 tokens of the 50 of the small ViT that the repository carries. The patch projection answers to a small patch
as it did to the same patch enlarged, position embeddings are interpolated, and all other weights stay. That is where
training goes on, far ahead of a random start: `examples/finetune.py` does it.
"""

import argparse

import torch
import torch.nn.functional as F
from transformers import AutoImageProcessor, ViTForImageClassification


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="Hub id or folder of a ViT with an even patch size.")
    parser.add_argument("--output_dir", required=True)
    return parser.parse_args()


def halve_patches(model: ViTForImageClassification) -> ViTForImageClassification:
    """A new model of the same kind whose patches are half as wide; `model` is left as it is.

    Raises:
        ValueError: If the patch size is odd.
    """
    config = model.config.to_dict()
    if config["patch_size"] % 2:
        raise ValueError(
            f"A patch of {config['patch_size']} pixels cannot be halved; use a ViT with an even patch size."
        )
    config["patch_size"] //= 2
    config.pop("tocom", None)  # degrees of another number of tokens
    finer = ViTForImageClassification(type(model.config).from_dict(config))
    state = model.state_dict()
    for name, weight in state.items():
        if name.endswith("patch_embeddings.projection.weight"):
            state[name] = patch_projection(weight)
        if name.endswith("position_embeddings"):
            state[name] = position_embeddings(weight)
    finer.load_state_dict(state)
    return finer


def patch_projection(weight: torch.Tensor) -> torch.Tensor:
    """Of `(hidden, channels, 2p, 2p)` to `(hidden, channels, p, p)`: w'·x is w·(x, bilinearly enlarged)."""
    side = weight.shape[-1] // 2
    pixels = torch.eye(side**2).reshape(-1, 1, side, side)
    enlarged = F.interpolate(pixels, scale_factor=2, mode="bilinear").flatten(1)
    return (weight.flatten(2) @ enlarged.T).reshape(*weight.shape[:2], side, side)


def position_embeddings(weight: torch.Tensor) -> torch.Tensor:
    """Of `(1, 1 + side², hidden)` to `(1, 1 + (2 side)², hidden)`; that of the class token stays."""
    side = round((weight.shape[1] - 1) ** 0.5)
    grid = weight[:, 1:].mT.unflatten(-1, (side, side))
    finer = F.interpolate(grid, scale_factor=2, mode="bicubic").flatten(2).mT
    return torch.cat([weight[:, :1], finer], dim=1)


def main() -> None:
    args = parse_args()
    halve_patches(ViTForImageClassification.from_pretrained(args.model)).save_pretrained(args.output_dir)
    AutoImageProcessor.from_pretrained(args.model).save_pretrained(args.output_dir)


if __name__ == "__main__":
    main()
