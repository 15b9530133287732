# Copyright 2026 The tocom-hf authors. Licensed under the Apache License, Version 2.0.
"""Activation memory of a training step, merged over dense: the bytes that autograd keeps for the backward pass.

python benchmarks/memory.py --models b --r 4 8 12 16
"""

import argparse
import datetime
from pathlib import Path

import torch
from inference import SIZES, make_model

from tocom_hf import apply_tome


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=SIZES, default=["b"])
    parser.add_argument("--r", type=int, nargs="+", default=[4, 8, 12, 16])
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "memory.md")
    return parser.parse_args()


def saved_bytes(size: str, r: int, batch_size: int) -> int:
    """Bytes of all tensors that a forward pass saves for its backward pass, weights left out, each storage once."""
    model = make_model(size, 224).train()
    if r:
        apply_tome(model, r)
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    storages: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            storages[storage.data_ptr()] = storage  # held, so that its address is not used again
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(pixel_values=torch.randn(batch_size, 3, 224, 224), labels=torch.zeros(batch_size, dtype=torch.long))
    return sum(storage.nbytes() for storage in storages.values())


def main() -> None:
    args = parse_args()
    lines = [
        f"# Activation memory of a training step, {datetime.date.today().isoformat()}",
        "",
        f"Saved for backward, float32, 224 px, batch {args.batch_size}; torch {torch.__version__}. The figure does not "
        "depend on the machine.",
        "",
        "| model | r | MiB | over dense |",
        "|---|---|---|---|",
    ]
    for size in args.models:
        dense = saved_bytes(size, 0, args.batch_size)
        for r in (0, *args.r):
            merged = saved_bytes(size, r, args.batch_size)
            lines.append(f"| ViT-{size.upper()}/16 | {r} | {merged / 2**20:.0f} | {merged / dense:.3f} |")
            print(lines[-1], flush=True)
    args.output.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
