# Copyright 2026 The tocom-hf authors. Licensed under the Apache License, Version 2.0.
"""Whatever Pillow raises about an image, the user is told in one line which image it is."""

import io
import struct
import zlib

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader
from transformers import ViTImageProcessorPil

from tocom_hf import DatasetError, UnreadableImageError, with_pixel_values
from tocom_hf.cli import visualize
from tocom_hf.data.images import TrainingImages


PROCESSOR = ViTImageProcessorPil(size={"height": 4, "width": 4})


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """PyTorch waits five seconds for each process of a loader that has failed."""
    monkeypatch.setattr("torch.utils.data._utils.MP_STATUS_CHECK_INTERVAL", 0.1)


def chunk(kind, content):
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(*chunks, size=(4, 4), pixels=None):
    """A PNG image with more chunks in front of its pixels."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", *size, 8, 2, 0, 0, 0))
    data = zlib.compress(bytes(size[1] * (1 + 3 * size[0]))) if pixels is None else pixels
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(chunks) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def cut_off():
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 40, 3), dtype=np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()[:-1000]


def jpeg(**settings):
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4)).save(buffer, "JPEG", **settings)
    return buffer.getvalue()


DAMAGED = {
    "long text": png(chunk(b"zTXt", b"key\0\0" + zlib.compress(bytes(2 * 2**20)))),
    "long colour profile": png(chunk(b"iCCP", b"icc\0\0" + zlib.compress(bytes(2 * 2**20)))),
    "bomb": png(size=(20000, 20000), pixels=b""),
    "bad pixels": png(pixels=b"no zlib stream"),
    "bad chunk": png(chunk(b"pHYs", b"\0")),
    "cut off": cut_off(),
    "empty": b"",
    "text": b"no image at all",
    "header alone": png()[:20],
}


@pytest.fixture(params=DAMAGED)
def damaged(request, tmp_path):
    """The path of an image that cannot be read."""
    path = tmp_path / "damaged.png"
    path.write_bytes(DAMAGED[request.param])
    return path


def as_files(*paths):
    return datasets.Dataset.from_dict({"image": [str(path) for path in paths]}).cast_column("image", datasets.Image())


def assert_one_clear_line(error, path):
    assert isinstance(error, DatasetError)
    assert f"The image {path}" in str(error)
    assert "cannot be read: " in str(error)
    assert "Repair it or take it out of the data." in str(error)
    assert "\n" not in str(error)


def test_with_pixel_values_and_views_name_the_file(damaged):
    images = as_files(damaged)
    for read in (
        lambda: with_pixel_values(images, PROCESSOR)[0],
        lambda: TrainingImages(images, PROCESSOR)[0],
        lambda: TrainingImages(images, PROCESSOR).view(0, np.random.default_rng(0)),
    ):
        with pytest.raises(UnreadableImageError) as caught:
            read()
        assert_one_clear_line(caught.value, damaged)


def test_visualize_names_the_file(damaged):
    arguments = ["--model_name_or_path", "x", "--images", str(damaged)]
    with pytest.raises(DatasetError) as caught:
        visualize.read_images(visualize.parse_args(arguments), 3)
    assert_one_clear_line(caught.value, damaged)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_worker_processes_say_no_more_than_that(tmp_path, num_workers):
    path = tmp_path / "damaged.png"
    path.write_bytes(DAMAGED["long text"])
    processed = with_pixel_values(as_files(path), PROCESSOR)
    with pytest.raises(UnreadableImageError) as caught:
        list(DataLoader(processed, num_workers=num_workers))
    assert_one_clear_line(caught.value, path)


def test_the_message_of_a_worker_is_the_last_of_a_chain():
    """As torch._utils.ExceptionWrapper writes it."""
    text = (
        "Caught DatasetError in DataLoader worker process 0.\nOriginal Traceback (most recent call last):\n"
        '  File "a.py", line 1, in f\nValueError: too long\n\nThe above exception was the direct cause of the '
        'following exception:\n\nTraceback (most recent call last):\n  File "b.py", line 2, in g\n'
        "tocom_hf.errors.DatasetError: The image a.png cannot be read: too long. Repair it.\n"
    )
    assert str(DatasetError(text)) == "The image a.png cannot be read: too long. Repair it."


def test_what_the_operating_system_refuses_is_no_damage(tmp_path):
    """A file that is not there, or a disk that fails, may be there at the next try."""
    with pytest.raises(DatasetError, match=r"gone\.png in the column 'image' cannot be read: .*No such file") as caught:
        with_pixel_values(as_files(tmp_path / "gone.png"), PROCESSOR)[0]
    assert not isinstance(caught.value, UnreadableImageError)


def test_all_doors_turn_photographs_upright(tmp_path):
    """Orientation 6: what the camera stored on its side is to be turned by 90 degrees."""
    exif = Image.Exif()
    exif[0x0112] = 6
    stored = Image.new("RGB", (8, 8), "red")
    stored.paste("blue", (0, 4, 8, 8))  # the lower half, which is the left one when it stands upright
    path = tmp_path / "photograph.png"
    stored.save(path, exif=exif)
    images = as_files(path)
    upright = visualize.read_images(visualize.parse_args(["--model_name_or_path", "x", "--images", str(path)]), 3)[0]
    assert upright.getpixel((1, 6)) == (0, 0, 255)
    assert upright.getpixel((6, 1)) == (255, 0, 0)
    same_size = ViTImageProcessorPil(size={"height": 8, "width": 8})
    expected = torch.from_numpy(np.array(upright)).permute(2, 0, 1)
    assert torch.equal(TrainingImages(images, same_size)[0]["pixel_values"], expected)
    processed = with_pixel_values(images, same_size)[0]["pixel_values"]
    torch.testing.assert_close(processed, expected / 127.5 - 1)
