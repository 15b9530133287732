# Copyright 2026 The tocom-hf authors. Licensed under the Apache License, Version 2.0.
"""Labelled images of a wider mix to pre-train a small backbone on: clothing, letters, shapes and drawings.

Light grey on black, 28 px, as the images of the tasks in `images.py` are. Pictures of the natural task are not among
them, nor digits, nor bars alone; but one Cyrillic letter (be) looks like a 6, and some drawings show numerals.
"""

import dataclasses
import math
import multiprocessing
import random
from pathlib import Path

import datasets
import numpy as np
from images import (
    CLIPART,
    NATURAL,
    STAMPS,
    STYLES,
    affine,
    digest_of,
    fashion_mnist,
    font_files,
    natural_files,
    open_picture,
    paste,
    pictures_below,
    to_dataset,
    to_png,
)
from PIL import Image, ImageDraw, ImageFont


SIZE = 28  # pixels
CANVAS = 112  # images are drawn so large, and shrunk
STYLE = STYLES["plain"]
CHUNK = 500  # images that share a generator
CLOTHING = 55_000  # training images of Fashion-MNIST; the others are for validation
# of three scripts, without letters that look alike in two of them
ALPHABET = "ABCDEFGHJKLMNPQRSTUVWXYZabdefghijmnqrtyΓΔΘΛΞΠΣΦΨΩαβγδεζηθλμξπφψωБГДЖИЛЦЧШЩЪЫЭЮЯбдж"  # noqa: RUF001
# an arc opens away from one of four sides; a zigzag has so many strokes; dots do not overlap
SHAPES = (
    *("triangle", "quadrangle", "pentagon", "ellipse", "ring", "arc 0", "arc 1", "arc 2", "arc 3", "cross", "star"),
    *("zigzag 2", "zigzag 3", "dots 2", "dots 3", "dots 4"),
)


@dataclasses.dataclass(frozen=True)
class Group:
    """Images of one kind.

    Attributes:
        images: uint8 `(n, 28, 28)`.
        labels: int64 `(n,)`.
        names: What the labels stand for.
    """

    images: np.ndarray
    labels: np.ndarray
    names: list[str]


def make_mix(letters: int = 80_000, shapes: int = 40_000, variants: int = 16) -> dict[str, Group]:
    """The whole mix, the same on every machine that has the same pictures and fonts.

    Args:
        letters: Images of letters; a multiple of 500.
        shapes: Images of shapes; a multiple of 500.
        variants: Images of each drawing, which is a class of its own.
    """
    held_out = {digest_of(path) for paths in natural_files().values() for path in paths}
    folders = [STAMPS, *sorted(path for path in CLIPART.iterdir() if path.is_dir() and path.name not in NATURAL)]
    files = list({digest_of(path): path for folder in folders for path in pictures_below(folder)}.items())
    drawings = [path for digest, path in files if digest not in held_out]
    images, labels = fashion_mnist()
    mix = {"clothing": Group(images[:CLOTHING], labels[:CLOTHING].astype(np.int64), list(map(str, range(10))))}
    with multiprocessing.Pool() as pool:
        for name, seed, count, names in (("letter", 10_000, letters, ALPHABET), ("shape", 20_000, shapes, SHAPES)):
            chunks = pool.starmap(_chunk, [(name, seed + index) for index in range(count // CHUNK)])
            mix[name] = Group(*(np.concatenate(parts) for parts in zip(*chunks, strict=True)), list(names))
        varied = pool.starmap(_variants, [(path, i, variants) for i, path in enumerate(drawings)], chunksize=50)
    names = [str(path) for path in drawings]
    mix["drawing"] = Group(np.concatenate(varied), np.repeat(np.arange(len(drawings)), variants), names)
    return mix


def distillation_images(count: int, seed: int) -> datasets.Dataset:
    """Images that a backbone was pre-trained on, without labels, as many of every group.

    Args:
        count: Images to draw, at least one of each group and at most as many as the smallest one has of each.
        seed: Decides which, and their order.
    """
    generator = np.random.default_rng(seed)
    groups = list(make_mix().values())
    drawn = [
        group.images[generator.choice(len(group.images), size=count // len(groups), replace=False)] for group in groups
    ]
    return to_dataset([to_png(Image.fromarray(image)) for image in generator.permutation(np.concatenate(drawn))])


def letter(generator: random.Random) -> tuple[Image.Image, int]:
    """A letter in a random font, tilted, sheared and shifted."""
    label = generator.randrange(len(ALPHABET))
    font = ImageFont.truetype(generator.choice(font_files()), round(CANVAS * generator.uniform(0.35, 0.85)))
    mask = Image.new("L", (CANVAS, CANVAS))
    middle = CANVAS / 2, CANVAS / 2
    ImageDraw.Draw(mask).text(middle, ALPHABET[label], fill=255, font=font, anchor="mm")
    mask = mask.transform(mask.size, Image.AFFINE, affine(CANVAS, generator), Image.BICUBIC)
    canvas = STYLE.background(CANVAS, generator)
    canvas.paste(STYLE.colour(canvas, generator), (0, 0), mask)
    return canvas, label


def shape(generator: random.Random) -> tuple[Image.Image, int]:
    """One of `SHAPES`, of any size, at any place and, but for arcs and ellipses, in any direction."""
    label = generator.randrange(len(SHAPES))
    kind, _, number = SHAPES[label].partition(" ")
    canvas = STYLE.background(CANVAS, generator)
    draw, colour, width = ImageDraw.Draw(canvas), STYLE.colour(canvas, generator), generator.randint(4, 12)
    radius = CANVAS * generator.uniform(0.15, 0.4)
    x, y = (generator.uniform(radius + 1, CANVAS - radius - 1) for _ in range(2))
    angle = generator.uniform(0, 2 * math.pi)
    cos, sin = math.cos(angle), math.sin(angle)
    match kind:
        case "triangle" | "quadrangle" | "pentagon":
            corners, points = 3 + SHAPES.index(kind), []
            for index in range(corners):
                place = [
                    middle
                    + radius
                    * generator.uniform(0.75, 1)
                    * turn(angle + 2 * math.pi * (index + generator.uniform(-0.15, 0.15)) / corners)
                    for middle, turn in ((x, math.cos), (y, math.sin))
                ]
                points.append(tuple(place))
            if generator.random() < 0.5:
                draw.polygon(points, fill=colour)
            else:
                draw.line([*points, points[0]], fill=colour, width=width, joint="curve")
        case "ellipse" | "ring":
            height = radius * generator.uniform(0.7, 1)
            box = x - radius, y - height, x + radius, y + height
            draw.ellipse(box, **({"fill": colour} if kind == "ellipse" else {"outline": colour, "width": width}))
        case "arc":
            middle, half = 90 * int(number) + generator.uniform(-40, 40), generator.uniform(70, 140)
            box = x - radius, y - radius, x + radius, y + radius
            draw.arc(box, middle - half, middle + half, fill=colour, width=width)
        case "cross":
            for u, v in ((cos, sin), (-sin, cos)):
                ends = x - radius * u, y - radius * v, x + radius * u, y + radius * v
                draw.line(ends, fill=colour, width=width)
        case "star":
            reaches = [radius if index % 2 else radius * 0.4 for index in range(10)]
            turns = [angle + math.pi * index / 5 for index in range(10)]
            points = [(x + r * math.cos(t), y + r * math.sin(t)) for r, t in zip(reaches, turns, strict=True)]
            draw.polygon(points, fill=colour)
        case "zigzag":
            points, strokes = [], int(number)
            for index in range(strokes + 1):
                along, across = radius * (2 * index / strokes - 1), radius * (0.5 if index % 2 else -0.5)
                points.append((x + along * cos - across * sin, y + along * sin + across * cos))
            draw.line(points, fill=colour, width=width, joint="curve")
        case "dots":
            placed: list[tuple[float, float, float]] = []
            while len(placed) < int(number):
                radius = CANVAS * generator.uniform(0.07, 0.13)
                x, y = (generator.uniform(radius + 1, CANVAS - radius - 1) for _ in range(2))
                if all(math.hypot(x - u, y - v) > radius + other + 6 for u, v, other in placed):
                    placed.append((x, y, radius))
                    draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=colour)
    return canvas, label


def _chunk(name: str, seed: int) -> tuple[np.ndarray, np.ndarray]:
    generator = random.Random(seed)
    make = {"letter": letter, "shape": shape}[name]
    images, labels = zip(*(make(generator) for _ in range(CHUNK)), strict=True)
    return np.stack([_shrunk(image) for image in images]), np.array(labels)


def _variants(path: Path, label: int, count: int) -> np.ndarray:
    """A drawing, turned a little, mirrored or not, of any size and at any place."""
    generator = random.Random(7919 * label + 1)
    picture, images = STYLE.picture(open_picture(path)), []
    for _ in range(count):
        turned = picture.rotate(generator.uniform(-20, 20), Image.BICUBIC, expand=True)
        if generator.random() < 0.5:
            turned = turned.transpose(Image.FLIP_LEFT_RIGHT)
        canvas = STYLE.background(CANVAS, generator)
        paste(canvas, turned, generator, smallest=0.5)
        images.append(_shrunk(canvas))
    return np.stack(images)


def _shrunk(canvas: Image.Image) -> np.ndarray:
    return np.asarray(canvas.reduce(CANVAS // SIZE).convert("L"))
