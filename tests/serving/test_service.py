# Copyright 2026 The tocom-hf authors. Licensed under the Apache License, Version 2.0.
"""The service answers for every image that it is sent: with its label, or with status 400."""

import io
import struct
import zlib

import numpy as np
import pytest
import torch
from helpers.models import make_model, make_plugins
from PIL import Image
from transformers import ViTImageProcessorPil

from tocom_hf import ArgumentError, TocomModel
from tocom_hf.serving.policy import DegreePolicy


pytest.importorskip("fastapi")
pytest.importorskip("prometheus_client")

GREY = ViTImageProcessorPil(size={"height": 32, "width": 32}, image_mean=[0.5], image_std=[0.5])
COLOUR = ViTImageProcessorPil(size={"height": 32, "width": 32})


def make_app(num_channels, processor):
    from tocom_hf.serving.service import create_app

    backbone = make_model(num_channels=num_channels)
    model = TocomModel.from_pretrained(backbone, plugins=make_plugins(backbone), source_r=0)
    return model, create_app(model, processor, DegreePolicy({0: 1.0}, 4, 100.0))


def encode(image, kind="PNG"):
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return buffer.getvalue()


BLACK = zlib.compress(bytes(4 * (1 + 3 * 4)))


def png_with(kind, content, size=(4, 4), pixels=BLACK):
    """A PNG image with one more chunk."""
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", *size, 8, 2, 0, 0, 0)), (kind, content)]
    chunks += [(b"IDAT", pixels), (b"IEND", b"")]
    parts = [struct.pack(">I", len(c)) + k + c + struct.pack(">I", zlib.crc32(k + c)) for k, c in chunks]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


REFUSED = {
    "long text": png_with(b"zTXt", b"key\0\0" + zlib.compress(bytes(2 * 2**20))),
    "long colour profile": png_with(b"iCCP", b"icc\0\0" + zlib.compress(bytes(2 * 2**20))),
    "short chunk": png_with(b"pHYs", b"\0"),
    "pixels without a stream": png_with(b"IDAT", b"no zlib stream"),
    "32-bit floating point": encode(Image.new("F", (8, 8), 0.5), "TIFF"),
    "32-bit whole numbers": encode(Image.new("I", (8, 8), 70000), "TIFF"),
}


@pytest.fixture(scope="module")
def client():
    from fastapi.testclient import TestClient

    _, app = make_app(3, COLOUR)
    with TestClient(app, raise_server_exceptions=False) as client:
        yield client


@pytest.mark.parametrize("name", REFUSED)
def test_an_image_that_pillow_refuses_is_answered_with_400(client, name):
    answer = client.post("/predict", content=REFUSED[name])
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"].startswith("The body is not an image that can be read: ")


@pytest.mark.parametrize(
    "error",
    [struct.error("short"), zlib.error("stream"), KeyError("tag"), IndexError(), Image.DecompressionBombError("big")],
)
def test_whatever_pillow_raises_is_answered_with_400(client, monkeypatch, error):
    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(Image, "open", fail)
    answer = client.post("/predict", content=b"image")
    assert answer.status_code == 400, answer.text
    assert (str(error) or type(error).__name__) in answer.json()["error"]


def test_a_bomb_is_answered_before_it_is_decoded(client):
    answer = client.post("/predict", content=png_with(b"tEXt", b"a\0b", size=(9000, 9000), pixels=b""))
    assert answer.status_code == 413


def test_a_model_of_one_channel_gets_grey_images():
    from fastapi.testclient import TestClient

    model, app = make_app(1, GREY)
    colours = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    with TestClient(app) as client:
        answer = client.post("/predict", content=encode(Image.fromarray(colours))).json()
    grey = np.rint(colours @ [0.299, 0.587, 0.114]) / 127.5 - 1
    with torch.no_grad():
        scores = model(pixel_values=torch.from_numpy(grey).float()[None, None]).logits.softmax(-1)[0]
    for row in answer["predictions"][0]:
        assert row["score"] == pytest.approx(scores[model.config.label2id[row["label"]]].item(), abs=0.03)


def test_classes_that_do_not_exclude_one_another_have_scores_of_their_own():
    from fastapi.testclient import TestClient

    model, app = make_app(3, COLOUR)
    model.config.problem_type = "multi_label_classification"
    with TestClient(app) as client:
        answer = client.post("/predict", content=encode(Image.new("RGB", (32, 32)))).json()
    with torch.no_grad():
        scores = model(pixel_values=torch.full((1, 3, 32, 32), -1.0)).logits.sigmoid()[0]
    for row in answer["predictions"][0]:
        assert row["score"] == pytest.approx(scores[model.config.label2id[row["label"]]].item(), abs=1e-4)


def test_a_processor_for_other_images_than_the_models_is_refused():
    for num_channels, processor in ((1, COLOUR), (3, GREY)):
        with pytest.raises(ArgumentError, match=rf"takes images of {num_channels} channel.*image_mean"):
            make_app(num_channels, processor)
