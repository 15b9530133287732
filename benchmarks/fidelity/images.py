# Copyright 2026 The tocom-hf authors. Licensed under the Apache License, Version 2.0.
"""The images of the study, made from what Debian packages bring: drawings, Fashion-MNIST and fonts.

    apt-get install tuxpaint-stamps-default openclipart-png dataset-fashion-mnist \
        fonts-dejavu-extra fonts-freefont-ttf fonts-urw-base35

Two things are made, both functions of a seed alone: unlabelled images to distil on (`distillation_images`), and
labelled tasks that share no picture with them (`TASKS`).
"""

import dataclasses
import functools
import gzip
import hashlib
import io
import math
import random
import struct
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path

import datasets
import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps, ImageStat


STAMPS = Path("/usr/share/tuxpaint/stamps")
CLIPART = Path("/usr/share/openclipart/png")
FASHION = Path("/usr/share/datasets/fashion-mnist")
FONTS = Path("/usr/share/fonts")
# top folders of openclipart that become the classes of the natural task; distillation never reads them
NATURAL = ("animals", "food", "geography", "office", "people", "plants", "recreation", "tools", "transportation")
FONT_PATTERNS = ("truetype/dejavu/*.ttf", "truetype/freefont/*.ttf", "opentype/urw-base35/*.otf")
NOT_LATIN = ("D050000L", "StandardSymbols", "Dingbats")
# Latin, Greek and Cyrillic letters, without those that are drawn as a 0, 1, 3 or 6
LIKE_DIGITS = {*map(ord, "OoIl"), 0x131, 0x17F, 0x399, 0x39F, 0x3BF, 0x417, 0x41E, 0x431, 0x437, 0x43E}
SCRIPTS = ((0x41, 0x7A), (0xC0, 0x17F), (0x391, 0x3C9), (0x410, 0x44F))
CODES = (code for first, last in SCRIPTS for code in range(first, last + 1) if code not in LIKE_DIGITS)
LETTERS = [chr(code) for code in CODES if chr(code).isalpha()]
SHAPES = ("circle", "square", "triangle", "bar", "ring")
MAX_AREA = 8_000_000  # pixels; a few posters take longer to decode than all the rest
CANVAS = 192  # pixels of drawings, and of the images to distil on where nothing else is asked for


@dataclasses.dataclass(frozen=True)
class Style:
    """What the images of a study look like.

    Attributes:
        background: Makes the canvas of a task, from its size in pixels.
        smooth: The same for the task that would drown in it.
        clutter: The canvas of a collage to distil on.
        colour: What to draw in on a canvas, so that it can be seen.
        cloth: What colour clothing has among the images to distil on.
        picture: A drawing with its transparency as it is laid on a canvas.
        clothing: Share of Fashion-MNIST among the images to distil on.
        marks: Share of letters and strokes among them.
        oversampling: Images of tasks are drawn so many times as large, and shrunk.
    """

    background: Callable[[int, random.Random], Image.Image]
    smooth: Callable[[int, random.Random], Image.Image]
    clutter: Callable[[int, random.Random], Image.Image]
    colour: Callable[[Image.Image, random.Random], tuple[int, int, int]]
    cloth: Callable[[random.Random], tuple[int, int, int]]
    picture: Callable[[Image.Image], Image.Image]
    clothing: float
    marks: float = 0.0
    oversampling: int = 1


def distillation_images(count: int, seed: int, style: Style, size: int = CANVAS) -> datasets.Dataset:
    """Collages of one to twelve drawings on clutter, Fashion-MNIST images, and letters and strokes.

    They are larger than what the model sees, because distillation looks at random parts of them.

    Args:
        count: Images to make.
        seed: Decides everything.
        style: What they look like.
        size: Their height and width in pixels.
    """
    held_out = {digest_of(path) for paths in natural_files().values() for path in paths}
    folders = [STAMPS, *sorted(path for path in CLIPART.iterdir() if path.is_dir() and path.name not in NATURAL)]
    files = list({digest_of(path): path for folder in folders for path in pictures_below(folder)}.items())
    files = [path for digest, path in files if digest not in held_out]
    fashion, _ = fashion_mnist()
    generator = random.Random(seed)

    def samples() -> Iterator[bytes]:
        # every picture is opened once, and used as often as the count asks for, beside some that came before it
        clothing, marks = round(style.clothing * count), round(style.marks * count)
        drawings, recent = count - clothing - marks, deque(maxlen=200)
        generator.shuffle(files)
        for index, path in enumerate(files):
            recent.append(style.picture(open_picture(path)))
            for _ in range(drawings * (index + 1) // len(files) - drawings * index // len(files)):
                canvas = style.clutter(size, generator)
                for other in generator.choices(recent, k=generator.randrange(12)):
                    paste(canvas, other, generator, smallest=0.1, largest=0.6)
                paste(canvas, recent[-1], generator, smallest=0.2)
                yield _jpeg(canvas)
        for _ in range(clothing):
            grey = Image.fromarray(fashion[generator.randrange(len(fashion))]).resize((size, size), Image.BICUBIC)
            canvas = style.clutter(size, generator)
            canvas.paste(style.cloth(generator), (0, 0), grey)
            yield _jpeg(canvas)
        for index in range(marks):
            canvas = style.clutter(size, generator)
            (_letters if index % 2 else _strokes)(canvas, style, generator)
            yield _jpeg(canvas)

    images = list(samples())
    generator.shuffle(images)
    return to_dataset(images)


def natural_files() -> dict[str, list[Path]]:
    """The pictures of the natural task by class, each content once."""
    seen: set[str] = set()
    files: dict[str, list[Path]] = {}
    for name in NATURAL:
        files[name] = []
        for path in pictures_below(CLIPART / name):
            digest = digest_of(path)
            if digest not in seen:
                seen.add(digest)
                files[name].append(path)
    return files


def natural(count: int, size: int, seed: int, style: Style) -> tuple[list[Image.Image], list[int], list[str]]:
    """Clip art of nine kinds of things. Every picture is used at most once."""
    generator = random.Random(seed)
    labelled = [(path, label) for label, paths in enumerate(natural_files().values()) for path in paths]
    generator.shuffle(labelled)
    if len(labelled) < count:
        raise ValueError(f"There are {len(labelled)} pictures of {', '.join(NATURAL)}, but {count} are asked for.")
    images = []
    for path, _ in labelled[:count]:
        canvas = style.background(size, generator)
        paste(canvas, style.picture(open_picture(path)), generator, smallest=0.6)
        images.append(canvas)
    return images, [label for _, label in labelled[:count]], list(NATURAL)


def digits(count: int, size: int, seed: int, style: Style) -> tuple[list[Image.Image], list[int], list[str]]:
    """A digit in a random font, tilted, sheared and shifted."""
    generator = random.Random(seed)
    fonts = font_files()
    images, labels = [], []
    for _ in range(count):
        labels.append(generator.randrange(10))
        font = ImageFont.truetype(fonts[generator.randrange(len(fonts))], round(size * generator.uniform(0.4, 0.65)))
        mask = Image.new("L", (size, size))
        ImageDraw.Draw(mask).text((size / 2, size / 2), str(labels[-1]), fill=255, font=font, anchor="mm")
        mask = mask.transform(mask.size, Image.AFFINE, affine(size, generator), Image.BICUBIC)
        canvas = style.background(size, generator)
        canvas.paste(style.colour(canvas, generator), (0, 0), mask)
        images.append(canvas)
    return images, labels, [str(digit) for digit in range(10)]


def count(count: int, size: int, seed: int, style: Style) -> tuple[list[Image.Image], list[int], list[str]]:
    """How many objects there are, one to eight: shapes of one colour and of several sizes that do not overlap."""
    generator = random.Random(seed)
    images, labels = [], []
    for _ in range(count):
        number = generator.randint(1, 8)
        canvas = style.smooth(size, generator)
        colour, draw, placed = style.colour(canvas, generator), ImageDraw.Draw(canvas), []
        while len(placed) < number:
            radius = size * generator.uniform(0.045, 0.09)
            x, y = (generator.uniform(radius + 1, size - radius - 1) for _ in range(2))
            if all(math.hypot(x - u, y - v) > radius + other + 2 for u, v, other in placed):
                placed.append((x, y, radius))
                _draw_shape(draw, generator.choice(SHAPES), (x, y, radius), generator.uniform(0, math.pi), colour)
        images.append(canvas)
        labels.append(number - 1)
    return images, labels, [str(number) for number in range(1, 9)]


def orientation(count: int, size: int, seed: int, style: Style) -> tuple[list[Image.Image], list[int], list[str]]:
    """Which of eight directions a bar has."""
    generator = random.Random(seed)
    images, labels = [], []
    for _ in range(count):
        canvas = style.background(size, generator)
        radius, angle = size * generator.uniform(0.14, 0.28), generator.uniform(0, math.pi)
        x, y = (generator.uniform(radius + 1, size - radius - 1) for _ in range(2))
        _draw_shape(ImageDraw.Draw(canvas), "bar", (x, y, radius), angle, style.colour(canvas, generator))
        images.append(canvas)
        labels.append(int(8 * angle / math.pi))
    return images, labels, [f"{22.5 * index:g} to {22.5 * (index + 1):g} degrees" for index in range(8)]


TASKS: dict[str, Callable[[int, int, int, Style], tuple[list[Image.Image], list[int], list[str]]]] = {
    "natural": natural,
    "digits": digits,
    "count": count,
    "orientation": orientation,
}


def write_task(name: str, folder: Path, sizes: dict[str, int], size: int, seed: int, style: Style) -> None:
    """Write one task as `train.parquet`, `validation.parquet` and `test.parquet`.

    Args:
        name: One of `TASKS`.
        folder: Where the files go; made if missing.
        sizes: Images of each split, which are cut from one sequence.
        size: Height and width in pixels.
        seed: Decides the images.
        style: What they look like.
    """
    images, labels, names = TASKS[name](sum(sizes.values()), size * style.oversampling, seed, style)
    images = [image.reduce(style.oversampling) for image in images]
    folder.mkdir(parents=True, exist_ok=True)
    start = 0
    for split, length in sizes.items():
        part = slice(start, start + length)
        dataset = to_dataset([to_png(image) for image in images[part]], labels[part], names)
        dataset.to_parquet(folder / f"{split}.parquet")
        start += length


def write_fashion_mnist(folder: Path) -> None:
    """Write Fashion-MNIST as `train.parquet` and `test.parquet`, to pre-train a backbone on."""
    folder.mkdir(parents=True, exist_ok=True)
    for split, prefix in (("train", "train"), ("test", "t10k")):
        images, labels = fashion_mnist(prefix)
        pictures = [to_png(Image.fromarray(image)) for image in images]
        names = [str(label) for label in range(10)]
        to_dataset(pictures, labels.tolist(), names).to_parquet(folder / f"{split}.parquet")


def pictures_below(folder: Path) -> list[Path]:
    """Pictures below a folder without links, without second copies and without posters, in a fixed order."""
    found = sorted(path for path in folder.rglob("*.png") if not path.is_symlink() and _area(path) <= MAX_AREA)
    return list({digest_of(path): path for path in reversed(found)}.values())[::-1]


def _area(path: Path) -> int:
    """Pixels of a PNG file, from its header."""
    width, height = struct.unpack(">II", path.read_bytes()[16:24])
    return width * height


def digest_of(path: Path) -> str:
    return hashlib.sha1(path.read_bytes()).hexdigest()


def fashion_mnist(prefix: str = "train") -> tuple[np.ndarray, np.ndarray]:
    """Images, uint8 `(n, 28, 28)`, and labels, uint8 `(n,)`, of the split "train" or "t10k"."""
    images = gzip.decompress((FASHION / f"{prefix}-images-idx3-ubyte.gz").read_bytes())
    labels = gzip.decompress((FASHION / f"{prefix}-labels-idx1-ubyte.gz").read_bytes())
    return np.frombuffer(images, np.uint8, offset=16).reshape(-1, 28, 28), np.frombuffer(labels, np.uint8, offset=8)


def open_picture(path: Path) -> Image.Image:
    """A drawing with its transparency, cut to what is drawn and shrunk to the canvas."""
    picture = Image.open(path).convert("RGBA")
    picture.thumbnail((CANVAS, CANVAS))
    return picture.crop(picture.getchannel("A").getbbox() or (0, 0, *picture.size))


def paste(
    canvas: Image.Image, picture: Image.Image, generator: random.Random, smallest: float, largest: float = 1.0
) -> None:
    """Lay a drawing on a canvas, at a random place and a random size of `smallest` to `largest` of what fits."""
    room = canvas.width * generator.uniform(smallest, largest) / max(picture.size)
    width, height = (max(1, round(side * room)) for side in picture.size)
    x, y = generator.randint(0, canvas.width - width), generator.randint(0, canvas.height - height)
    picture = picture.resize((width, height), Image.BICUBIC)
    canvas.paste(picture, (x, y), picture)


def _background(size: int, generator: random.Random) -> Image.Image:
    """A plain colour (one in four), or noise of a random coarseness between two colours with fine noise on top."""
    first, second = _colour(generator), _colour(generator)
    if generator.random() < 0.25:
        return Image.new("RGB", (size, size), first)
    values = np.random.default_rng(generator.getrandbits(32))
    cells = generator.choice((2, 4, 8, 16))
    coarse = Image.fromarray(values.integers(0, 256, (cells, cells), dtype=np.uint8)).resize(
        (size, size), Image.BICUBIC
    )
    blend = Image.composite(Image.new("RGB", (size, size), first), Image.new("RGB", (size, size), second), coarse)
    strength = generator.randint(3, 24)
    fine = values.integers(-strength, strength + 1, (size, size, 3), dtype=np.int16)
    return Image.fromarray(np.clip(np.asarray(blend) + fine, 0, 255).astype(np.uint8))


def _scribbles(size: int, generator: random.Random) -> Image.Image:
    """A background with forty short strokes of all colours, so that no two patches are alike."""
    canvas = _background(size, generator)
    draw = ImageDraw.Draw(canvas)
    for _ in range(40):
        x, y, angle = generator.uniform(0, size), generator.uniform(0, size), generator.uniform(0, 2 * math.pi)
        length = size * generator.uniform(0.05, 0.2)
        end = x + length * math.cos(angle), y + length * math.sin(angle)
        draw.line((x, y, *end), fill=_colour(generator), width=max(1, round(size * generator.uniform(0.005, 0.035))))
    return canvas


def _clutter(size: int, generator: random.Random) -> Image.Image:
    """A background, in two of three images with up to eighty lines, ellipses, boxes and polygons of all sizes."""
    canvas = _background(size, generator)
    draw = ImageDraw.Draw(canvas)
    largest = size * generator.choice((0.1, 0.2, 0.4))
    for _ in range(generator.choice((0, 1, 1)) * generator.randint(1, 80)):
        x, y = generator.uniform(0, size), generator.uniform(0, size)
        around = [
            (x + generator.uniform(-largest, largest), y + generator.uniform(-largest, largest)) for _ in range(3)
        ]
        points = [(x, y), *around]
        (left, right), (top, bottom) = (sorted(pair) for pair in zip(*points[:2], strict=True))
        width, colour = generator.randint(1, 7), _colour(generator)
        match generator.randrange(6):
            case 0:
                draw.ellipse((left, top, right, bottom), fill=colour)
            case 1:
                draw.rectangle((left, top, right, bottom), outline=colour, width=width)
            case 2:
                draw.polygon(points, fill=colour)
            case 3:
                draw.arc((left, top, right, bottom), 0, generator.randint(90, 360), fill=colour, width=width)
            case _:
                draw.line(points[: generator.randint(2, 4)], fill=colour, width=width)
    return canvas


def _colour(generator: random.Random) -> tuple[int, int, int]:
    return generator.randrange(256), generator.randrange(256), generator.randrange(256)


def _black(size: int, generator: random.Random) -> Image.Image:
    return Image.new("RGB", (size, size))


def _light(generator: random.Random) -> tuple[int, int, int]:
    return (generator.randint(128, 255),) * 3


def _light_picture(picture: Image.Image) -> Image.Image:
    """A drawing in grey, inverted where it is dark: what stands out against black."""
    grey, alpha = picture.convert("L"), picture.getchannel("A")
    if ImageStat.Stat(grey, alpha).sum[0] < 128 * ImageStat.Stat(grey, alpha).count[0]:
        grey = ImageOps.invert(grey)
    return Image.merge("RGBA", (grey, grey, grey, alpha))


def _contrasting(canvas: Image.Image, generator: random.Random) -> tuple[int, int, int]:
    """A random colour that every pixel of a blurred canvas differs from."""
    around = np.asarray(canvas.resize((12, 12), Image.BOX)).reshape(-1, 3).astype(float)
    best, distance = (0, 0, 0), -1.0
    for _ in range(12):
        colour = _colour(generator)
        nearest = float(np.linalg.norm(around - np.array(colour), axis=1).min())
        if nearest > distance:
            best, distance = colour, nearest
    return best


def _letters(canvas: Image.Image, style: Style, generator: random.Random) -> None:
    """One to twelve letters of three scripts, tilted. Never a digit: these are a task."""
    number = generator.choice((1, 1, 2, 3, 5, 8, 12))
    fonts, size = font_files(), canvas.width
    for _ in range(number):
        height = round(size * generator.uniform(0.3, 0.9) / number**0.35)
        font, letter = ImageFont.truetype(generator.choice(fonts), height), generator.choice(LETTERS)
        mask = Image.new("L", canvas.size)
        ImageDraw.Draw(mask).text((size / 2, size / 2), letter, fill=255, font=font, anchor="mm")
        reach = size * (0.1 if number == 1 else 0.45)
        shift = generator.uniform(-reach, reach), generator.uniform(-reach, reach)
        mask = mask.rotate(generator.uniform(-35, 35), Image.BICUBIC, translate=shift)
        canvas.paste(style.colour(canvas, generator), (0, 0), mask)


def _strokes(canvas: Image.Image, style: Style, generator: random.Random) -> None:
    """Up to forty lines, polygons, ellipses and arcs. Never a bar alone: its direction is a task."""
    draw, size = ImageDraw.Draw(canvas), canvas.width
    number = generator.choice((1, 1, 2, 4, 8, 16, 40))
    kinds = ("polygon", "ellipse", "arc") if number == 1 else ("polygon", "ellipse", "arc", "line", "line")
    for _ in range(number):
        colour, width = style.colour(canvas, generator), generator.randint(2, 24)
        points = [(generator.uniform(0, size), generator.uniform(0, size)) for _ in range(generator.randint(3, 5))]
        (left, right), (top, bottom) = (sorted(pair) for pair in zip(*points[:2], strict=True))
        match generator.choice(kinds):
            case "polygon":
                draw.polygon(points, fill=colour)
            case "ellipse":
                draw.ellipse((left, top, right, bottom), outline=colour, width=width)
            case "arc":
                draw.arc((left, top, right, bottom), 0, generator.randint(60, 360), fill=colour, width=width)
            case _:
                draw.line(points[: generator.randint(2, 4)], fill=colour, width=width, joint="curve")


@functools.cache
def font_files() -> list[Path]:
    fonts = sorted(path for pattern in FONT_PATTERNS for path in FONTS.glob(pattern))
    return [path for path in fonts if not path.stem.startswith(NOT_LATIN)]


def affine(size: int, generator: random.Random) -> tuple[float, ...]:
    """A rotation by up to 20 degrees, a shear and a shift, about the centre."""
    angle, shear = generator.uniform(-0.35, 0.35), generator.uniform(-0.25, 0.25)
    a, b = math.cos(angle), math.sin(angle) + shear
    d, e = -math.sin(angle), math.cos(angle)
    middle = size / 2
    x, y = (middle + generator.uniform(-0.12, 0.12) * size for _ in range(2))
    return a, b, middle - a * x - b * y, d, e, middle - d * x - e * y


def _draw_shape(draw: ImageDraw.ImageDraw, kind: str, place: tuple, angle: float, colour: tuple) -> None:
    x, y, radius = place
    box = (x - radius, y - radius, x + radius, y + radius)
    if kind == "circle":
        draw.ellipse(box, fill=colour)
    elif kind == "ring":
        draw.ellipse(box, outline=colour, width=max(2, round(radius * 0.4)))
    else:
        turns, stretch = {"square": (4, 1.0), "triangle": (3, 1.0), "bar": (4, 0.35)}[kind]
        corners = []
        for index in range(turns):
            turn = math.pi / turns + 2 * math.pi * index / turns
            u, v = radius * math.cos(turn), radius * math.sin(turn) * stretch
            corners.append(
                (x + u * math.cos(angle) - v * math.sin(angle), y + u * math.sin(angle) + v * math.cos(angle))
            )
        draw.polygon(corners, fill=colour)


def _jpeg(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.convert("RGB").save(buffer, "JPEG", quality=92)
    return buffer.getvalue()


def to_png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.convert("RGB").save(buffer, "PNG")
    return buffer.getvalue()


def to_dataset(
    images: list[bytes], labels: list[int] | None = None, names: list[str] | None = None
) -> datasets.Dataset:
    columns: dict[str, list] = {"image": [{"bytes": image, "path": None} for image in images]}
    features: dict = {"image": datasets.Image()}
    if labels is not None:
        columns["label"], features["label"] = labels, datasets.ClassLabel(names=names)
    return datasets.Dataset.from_dict(columns, features=datasets.Features(features))


STYLES = {
    # all colours on noise with short strokes
    "cluttered": Style(
        background=_scribbles, smooth=_background, clutter=_clutter, colour=_contrasting, cloth=_colour,
        picture=lambda picture: picture, clothing=0.1, marks=0.3,
    ),
    # as Fashion-MNIST: light grey on black
    "plain": Style(
        background=_black, smooth=_black, clutter=_black, colour=lambda canvas, generator: _light(generator),
        cloth=_light, picture=_light_picture, clothing=1 / 3, marks=1 / 3, oversampling=2,
    ),
}  # fmt: skip
# the same tasks, and less variety to distil on
STYLES["cluttered-no-marks"] = dataclasses.replace(STYLES["cluttered"], marks=0.0)
STYLES["plain-no-marks"] = dataclasses.replace(STYLES["plain"], clothing=0.5, marks=0.0)
# what the embedded plugin set is distilled on, beside Fashion-MNIST itself
STYLES["plain-no-clothing"] = dataclasses.replace(STYLES["plain"], clothing=0.0, marks=0.5)
