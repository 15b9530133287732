# Copyright 2026 The tocom-hf authors. Licensed under the Apache License, Version 2.0.
"""Images to distil a general backbone on: random parts of photographs, alone and under drawings, and collages.

    apt-get install gnome-backgrounds ukui-wallpapers mate-backgrounds lomiri-wallpapers plasma-workspace-wallpapers
    python benchmarks/fidelity/photographs.py --count 12000 --output runs/study-c/data/distil.parquet

The other half are the collages of `images.py`, which names the packages that these need.
"""

import argparse
import io
import random
from pathlib import Path

import datasets
from images import (
    CLIPART,
    NATURAL,
    STAMPS,
    STYLES,
    digest_of,
    distillation_images,
    natural_files,
    open_picture,
    paste,
    pictures_below,
    to_dataset,
)
from PIL import Image


FOLDERS = (Path("/usr/share/backgrounds"), Path("/usr/share/wallpapers"))
ENDINGS = (".jpg", ".jpeg", ".png", ".webp")
SMALLEST = 600  # pixels of the shorter side; smaller ones are previews
LARGEST = 1600  # the longer side that photographs are shrunk to, so that they fit into memory
SIZE = 256  # height and width of an image: a little more than the model sees, for random parts of it


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=12000, help="Images to make, half of them with photographs.")
    parser.add_argument("--seed", type=int, default=36)
    parser.add_argument("--output", type=Path, required=True, help="A parquet file.")
    return parser.parse_args()


def photographs() -> list[Image.Image]:
    """All photographs and wallpapers, each content once, in a fixed order."""
    paths = sorted(path for folder in FOLDERS for path in folder.rglob("*") if path.suffix.lower() in ENDINGS)
    found: dict[str, Image.Image] = {}
    for path in paths:
        with Image.open(path) as image:
            if min(image.size) < SMALLEST or path.is_symlink():
                continue
            image.draft("RGB", (LARGEST, LARGEST))
            picture = image.convert("RGB")
        picture.thumbnail((LARGEST, LARGEST))
        found.setdefault(digest_of(path), picture)
    return list(found.values())


def parts_of_photographs(count: int, seed: int) -> list[bytes]:
    """Random parts of photographs as JPEG files; on one of two lie one to four drawings."""
    generator = random.Random(seed)
    pictures = photographs()
    held_out = {digest_of(path) for paths in natural_files().values() for path in paths}
    folders = [STAMPS, *sorted(path for path in CLIPART.iterdir() if path.is_dir() and path.name not in NATURAL)]
    drawings = [path for folder in folders for path in pictures_below(folder) if digest_of(path) not in held_out]
    images = []
    for _ in range(count):
        canvas = _part(generator.choice(pictures), generator)
        for path in generator.sample(drawings, k=generator.choice((0, 0, 0, 1, 2, 4))):
            paste(canvas, open_picture(path), generator, smallest=0.2, largest=0.8)
        images.append(_jpeg(canvas))
    return images


def _part(picture: Image.Image, generator: random.Random) -> Image.Image:
    """A square part of a photograph, a sixth to all of its shorter side wide, mirrored or not."""
    shorter = min(picture.size)
    side = round(shorter * generator.uniform(1 / 6, 1))
    left, top = (generator.randint(0, length - side) for length in picture.size)
    part = picture.resize((SIZE, SIZE), Image.Resampling.BICUBIC, (left, top, left + side, top + side))
    return part.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if generator.random() < 0.5 else part


def _jpeg(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=92)
    return buffer.getvalue()


def main() -> None:
    args = parse_args()
    half = args.count // 2
    images = parts_of_photographs(args.count - half, args.seed)
    collages = distillation_images(half, args.seed, STYLES["cluttered"], SIZE)
    images += [sample["bytes"] for sample in collages.cast_column("image", datasets.Image(decode=False))["image"]]
    random.Random(args.seed).shuffle(images)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    part = args.output.with_suffix(".part")
    to_dataset(images).to_parquet(part)
    part.rename(args.output)
    print(f"{len(images)} images written to {args.output}")


if __name__ == "__main__":
    main()
