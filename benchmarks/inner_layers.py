# Copyright 2026 The tocom-hf authors. Licensed under the Apache License, Version 2.0.
"""How far the restored feature maps of inner layers are from those without merging, on real images.

    apt-get download mate-backgrounds ukui-wallpapers gnome-backgrounds    # or any folder of photographs
    for package in *.deb; do dpkg --extract "$package" photographs; done
    python benchmarks/inner_layers.py --images photographs

Dense heads (Depth Anything, DPT) read four stages of a backbone. Weights are those of the checkpoint at every degree:
the table shows what merging alone costs, without plugins.
"""

import argparse
import random
from pathlib import Path

import torch
from PIL import Image
from sessions import Results, versions
from transformers import AutoConfig, AutoImageProcessor, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_BACKBONE_MAPPING

from tocom_hf import apply_tome
from tocom_hf.cost.flops import Example
from tocom_hf.merging.backbones import find_backbone


ENDINGS = (".jpg", ".jpeg", ".png", ".webp")
SMALLEST_FILE = 200_000  # bytes; pictures of fewer are icons and drawings
NOTES = [
    "*Stage*: |merged - dense| / |dense| over all positions and channels of the feature map, which is restored to the "
    "grid, the mean over images with its standard error. *cosine*: of each position of the last map, the mean.",
    "Random square crops of photographs, drawn with a fixed seed.",
]


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="facebook/dinov2-small", help="Hub id or folder of a backbone.")
    parser.add_argument("--images", type=Path, required=True, help="Folder of photographs, searched to any depth.")
    parser.add_argument("--crops", type=int, default=64)
    parser.add_argument("--r", type=int, nargs="+", default=[4, 8, 12, 16])
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "inner_layers")
    return parser.parse_args()


def crops_of(folder: Path, count: int, size: int) -> list[Image.Image]:
    """Random square parts of the photographs in a folder, of at least `size` pixels a side."""
    files = [path for path in sorted(folder.rglob("*")) if path.suffix.lower() in ENDINGS and not path.is_symlink()]
    files = [path for path in files if path.stat().st_size > SMALLEST_FILE]
    if not files:
        raise SystemExit(f"{folder} holds no photographs of more than {SMALLEST_FILE:,} bytes.")
    generator, crops = random.Random(0), []
    for index in range(count):
        with Image.open(files[index % len(files)]) as picture:
            image = picture.convert("RGB")
        image.thumbnail((1600, 1600))
        side = generator.randint(min(size, *image.size), min(image.size))
        left, top = (generator.randint(0, length - side) for length in image.size)
        crops.append(image.crop((left, top, left + side, top + side)).resize((size, size), Image.Resampling.BICUBIC))
    print(f"{count} crops of {len(files)} photographs")
    return crops


def load_backbone(name: str) -> tuple[PreTrainedModel, list[str]]:
    """A backbone that puts out four stages, and their names."""
    config = AutoConfig.from_pretrained(name)
    stages = [f"stage{config.num_hidden_layers * part // 4}" for part in (1, 2, 3, 4)]
    # not AutoBackbone, which takes no folder
    model_class = MODEL_FOR_BACKBONE_MAPPING[type(config)]
    return model_class.from_pretrained(name, out_features=stages).eval(), stages


@torch.no_grad()
def feature_maps(model: PreTrainedModel, pixel_values: torch.Tensor) -> list[torch.Tensor]:
    """The map of every stage, `(images, channels, rows, columns)`."""
    batches = [model(batch).feature_maps for batch in pixel_values.split(16)]
    return [torch.cat(maps) for maps in zip(*batches, strict=True)]


def relative_error(merged: torch.Tensor, dense: torch.Tensor) -> str:
    errors = (merged - dense).flatten(1).norm(dim=1) / dense.flatten(1).norm(dim=1)
    return f"{errors.mean().item():.3f} ± {errors.std().item() / len(errors) ** 0.5:.3f}"


def main() -> None:
    args = parse_args()
    model, stages = load_backbone(args.model)
    # the processor's own resizing has nothing left to do
    processor = AutoImageProcessor.from_pretrained(args.model)
    crops = crops_of(args.images, args.crops, processor.crop_size["height"])
    pixel_values = processor(crops, do_resize=False, return_tensors="pt")["pixel_values"]
    dense = feature_maps(model, pixel_values)
    example = Example.of(find_backbone(model), tuple(pixel_values.shape[2:]), 1)
    columns = {"r": "r", "tokens": "tokens behind the last layer", "gflops": "GFLOPs"}
    columns |= {stage: stage for stage in stages} | {"cosine": "cosine, last"}
    results = Results(
        args.output, f"Inner layers of {Path(args.model).name}, restored", columns,
        [f"{len(crops)} crops at {pixel_values.shape[2]} x {pixel_values.shape[3]} pixels, float32.", *NOTES],
        versions("torch", "transformers"), resume=False,
    )  # fmt: skip
    for degree in (0, *args.r):
        cost = example.count_at(degree)
        merged = feature_maps(apply_tome(model, degree), pixel_values)
        errors = {stage: relative_error(*maps) for stage, *maps in zip(stages, merged, dense, strict=True)}
        cosine = torch.cosine_similarity(merged[-1], dense[-1], dim=1).mean().item()
        row = {"r": degree, "tokens": cost.tokens[-1], "gflops": round(cost.flops / 1e9, 2)}
        results.add([row | errors | {"cosine": round(cosine, 4)}])


if __name__ == "__main__":
    main()
