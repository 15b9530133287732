# Copyright 2026 The tocom-hf authors. Licensed under the Apache License, Version 2.0.
"""Paint merged tokens over images: a row for each image, with the image and its groups at several r.

python examples/visualize.py --output groups.png
"""

import argparse
from pathlib import Path

import torch
from PIL import Image, ImageOps
from transformers import AutoImageProcessor, AutoModel

from tocom_hf import apply_tome, trace_tokens
from tocom_hf.data.images import load_images, to_rgb
from tocom_hf.merging.architectures import find_backbone
from tocom_hf.visualization import paint_groups, tile


EMBEDDED = Path(__file__).parent / "fashion_mnist"


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_name_or_path", default=str(EMBEDDED / "checkpoint"))
    parser.add_argument("--images", type=Path, nargs="*", help="Image files; by default the first of the data set.")
    parser.add_argument("--dataset_name", default=str(EMBEDDED / "test.parquet"))
    parser.add_argument("--dataset_split", default="test")
    parser.add_argument("--num_images", type=int, default=5)
    parser.add_argument("--r", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--layer", type=int, default=-1, help="Show the groups after this layer.")
    parser.add_argument("--size", type=int, default=168, help="Height of one picture in pixels.")
    parser.add_argument("--output", type=Path, default=Path("groups.png"))
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    model = AutoModel.from_pretrained(args.model_name_or_path).eval()
    processor = AutoImageProcessor.from_pretrained(args.model_name_or_path)
    if args.images:
        images = [to_rgb(ImageOps.exif_transpose(Image.open(path))) for path in args.images]
    else:
        images = load_images(args.dataset_name, split=args.dataset_split, max_samples=args.num_images)["image"][:]
        images = [to_rgb(image) for image in images]
    pixel_values = processor(images, return_tensors="pt")["pixel_values"]
    backbone = find_backbone(model).module  # of CLIP the vision part
    patch = backbone.config.patch_size
    grid = (pixel_values.shape[2] // patch, pixel_values.shape[3] // patch)
    # what the model sees: resized and cropped, brought back to [0, 255]
    low, high = pixel_values.amin((1, 2, 3), keepdim=True), pixel_values.amax((1, 2, 3), keepdim=True)
    seen = ((pixel_values - low) / (high - low).clamp(min=1e-6) * 255).byte().permute(0, 2, 3, 1).numpy()
    shown = [Image.fromarray(image) for image in seen]
    size = (grid[1] * (args.size // grid[0]), grid[0] * (args.size // grid[0]))
    rows = [[image.resize(size)] for image in shown]
    for r in args.r:
        with torch.no_grad(), trace_tokens(apply_tome(model, r)) as trace:
            backbone(pixel_values)
        for row, image, positions in zip(rows, shown, trace.positions[args.layer][:, trace.protected :], strict=True):
            row.append(paint_groups(image, positions, grid, size=args.size))
    tile(rows).save(args.output)
    print(f"{args.output}: a row for each of {len(rows)} images; the image, then r = {', '.join(map(str, args.r))}")


if __name__ == "__main__":
    main()
