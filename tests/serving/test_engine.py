# Copyright 2026 The tocom-hf authors. Licensed under the Apache License, Version 2.0.
"""An engine answers as the model itself does at any degree, with PyTorch and from an export; what may be a batch."""

import json

import numpy as np
import pytest
import torch
from helpers.exports import make_tocom_model
from PIL import Image
from transformers import ViTImageProcessorPil

from tocom_hf import ArgumentError, DegreeError, TocomError, TocomModel, UnsupportedInputError, export


pytest.importorskip("pydantic")

from tocom_hf.serving.engine import Engine, Job, batches_of
from tocom_hf.serving.settings import ModelSettings


DEGREES = [0, 4]
SLOW = pytest.mark.slow
# to export and to open the graphs takes long
KINDS = ["checkpoint", pytest.param("exported", marks=SLOW)]
PROCESSOR = ViTImageProcessorPil(size={"height": 32, "width": 32})


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A checkpoint with its plugins and its processor."""
    folder = tmp_path_factory.mktemp("checkpoint")
    make_tocom_model(source_r=2).save_pretrained(folder)
    PROCESSOR.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def exported(checkpoint, tmp_path_factory):
    folder = tmp_path_factory.mktemp("exported") / "folder"
    export(TocomModel.from_pretrained(checkpoint), folder, format="torch", degrees=DEGREES, processor=PROCESSOR)
    return folder


def load(name, tmp_path, **settings):
    arguments = {"model_name_or_path": str(name), "calibration_seconds": 0, "max_batch_size": 2, **settings}
    return Engine(ModelSettings(**arguments), tmp_path / "calibration.json")


def images(count=3, side=40):
    pixels = np.random.default_rng(0).integers(0, 256, (count, side, side, 3), dtype=np.uint8)
    return [Image.fromarray(image) for image in pixels]


def expected(checkpoint, degree):
    """Labels, best first, and scores of each image, by transformers and TocomModel alone."""
    model = TocomModel.from_pretrained(checkpoint, target_r=degree)
    with torch.no_grad():
        scores = model(**PROCESSOR(images(), return_tensors="pt")).logits.softmax(-1)
    order = scores.argsort(-1, descending=True)
    names = model.config.id2label
    return [[(names[i], row[i].item()) for i in best.tolist()] for row, best in zip(scores, order, strict=True)]


@pytest.mark.parametrize("kind", KINDS)
def test_it_answers_as_the_model_does_at_every_degree(kind, checkpoint, request, tmp_path):
    engine = load(request.getfixturevalue(kind), tmp_path, degrees=DEGREES)
    assert engine.policy.degrees[0] == 0
    prepared = engine.backend.prepare(images())
    assert prepared.shape == (3, 3, 32, 32)
    for degree in (0, 4, 0):
        answers = engine.run([prepared[:1], prepared[1:]], degree)
        for answer, wanted in zip(answers, expected(checkpoint, degree), strict=True):
            assert [row["label"] for row in answer] == [label for label, _ in wanted]
            assert [row["score"] for row in answer] == pytest.approx([score for _, score in wanted], abs=2e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_a_size_that_the_model_does_not_take_is_the_images_fault(kind, request, tmp_path):
    engine = load(request.getfixturevalue(kind), tmp_path)
    with pytest.raises(UnsupportedInputError):
        engine.run([np.zeros((1, 3, 20, 20), np.float32)], 0)


@pytest.mark.parametrize("kind", KINDS)
def test_no_more_labels_are_given_than_there_are(kind, request, tmp_path):
    engine = load(request.getfixturevalue(kind), tmp_path, top_k=50)
    (answer,) = engine.run([engine.backend.prepare(images(1))], 0)
    assert len(answer) == 5


@pytest.mark.parametrize(
    ("kind", "settings", "error", "message"),
    [
        ("checkpoint", {"degrees": [0, 40]}, DegreeError, "target_r=40 is outside"),
        ("checkpoint", {"device": "abacus"}, ArgumentError, "The device 'abacus' cannot be used"),
        pytest.param("exported", {"degrees": [0, 3]}, DegreeError, r"The degrees \[3\] were not exported", marks=SLOW),
        pytest.param(
            "exported", {"plugins": "set"}, ArgumentError, "An export has its plugins in its files", marks=SLOW
        ),
        pytest.param("exported", {"device": "abacus"}, ArgumentError, "The device 'abacus' cannot be used", marks=SLOW),
    ],
)
def test_what_cannot_run_is_found_before_it_serves(kind, settings, error, message, request, tmp_path):
    with pytest.raises(error, match=message):
        load(request.getfixturevalue(kind), tmp_path, **settings)


def test_a_model_without_plugins_is_refused(tmp_path):
    make_tocom_model().save_pretrained(tmp_path / "model")
    config = tmp_path / "model" / "config.json"
    content = json.loads(config.read_text())
    del content["tocom"]
    config.write_text(json.dumps(content))
    with pytest.raises(TocomError, match="Pass plugins="):
        load(tmp_path / "model", tmp_path, source_r=0)


def test_a_checkpoint_without_a_processor_is_refused(tmp_path):
    make_tocom_model().save_pretrained(tmp_path / "model")
    with pytest.raises(ArgumentError, match="The image processor of"):
        load(tmp_path / "model", tmp_path)


def test_the_next_model_of_the_shape_is_not_measured_again(checkpoint, tmp_path, monkeypatch):
    from tocom_hf.cost import calibration

    load(checkpoint, tmp_path, degrees=DEGREES)
    monkeypatch.setattr(calibration, "measure_costs", lambda *args, **kwargs: pytest.fail("measured"))
    assert load(checkpoint, tmp_path, degrees=[4], latency_ms=50).policy.degrees == [4]


def jobs_of(*sizes):
    """Jobs of two engines that take three images at once, from `(engine, images, side)`."""
    limits = ModelSettings(model_name_or_path="model", max_batch_size=3)
    engines = [Engine.__new__(Engine), Engine.__new__(Engine)]
    for engine in engines:
        engine.settings = limits
    return [Job(engines[which], np.zeros((count, 3, side, side))) for which, count, side in sizes]


@pytest.mark.parametrize(
    ("sizes", "batches"),
    [
        ([(0, 1, 8), (0, 2, 8), (0, 1, 8)], [2, 1]),
        ([(0, 1, 8), (0, 1, 9), (0, 1, 9)], [1, 2]),
        ([(0, 1, 8), (1, 1, 8), (1, 1, 8)], [1, 2]),
        ([(0, 5, 8), (0, 1, 8)], [1, 1]),
        ([(0, 1, 8)] * 7, [3, 3, 1]),
    ],
)
def test_a_batch_is_of_one_engine_and_one_size_and_within_the_limit(sizes, batches):
    jobs = jobs_of(*sizes)
    found = list(batches_of(jobs))
    assert [len(batch) for batch in found] == batches
    assert [job for batch in found for job in batch] == jobs
