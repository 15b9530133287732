# Copyright 2026 The tocom-hf authors. Licensed under the Apache License, Version 2.0.
"""Accuracy is measured of classifiers only, and whatever else is refused before a forward pass."""

import pytest
import torch
import transformers as hf
from helpers.families import FAMILIES, SIMILAR, ast
from helpers.models import make_model, make_plugins

from tocom_hf import TocomModel, UnsupportedModelError, evaluate_degrees
from tocom_hf.evaluation.grid import evaluate_checkpoint


class ViTOfAUser(hf.ViTForImageClassification):
    """A class of a user, of whatever name."""


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: make_model(num_labels=1), "is a regression with one output .* with model.at"),
        (lambda: make_model(problem_type="regression"), "is a regression with 5 outputs"),
        (lambda: make_model(problem_type="multi_label_classification"), "several labels an image .* 'single_label"),
        (lambda: make_model(hf.ViTModel), "is a ViTModel, which classifies no images. Fine-tune it first"),
        (lambda: hf.ASTForAudioClassification(ast()), "is a ASTForAudioClassification, which classifies no images"),
    ],
)
def test_models_without_an_accuracy_are_refused(make, message, monkeypatch):
    model = TocomModel.from_pretrained(make(), source_r=0)
    monkeypatch.setattr(type(model), "forward", lambda *_, **__: pytest.fail("ran"))
    with pytest.raises(UnsupportedModelError, match=message):
        evaluate_degrees(model, [], [0])
    with pytest.raises(UnsupportedModelError, match=message):
        evaluate_checkpoint(model, "it", [0], [], None)


@pytest.mark.parametrize("model_class", [ViTOfAUser, hf.DeiTForImageClassificationWithTeacher])
def test_classifiers_are_evaluated(model_class, pixel_values):
    model = TocomModel.from_pretrained(make_model(model_class, num_labels=5), source_r=0)
    samples = [{"pixel_values": image, "labels": 0} for image in pixel_values]
    (run,) = evaluate_checkpoint(model, "it", [0], samples, None)
    assert run.plain.tolist() == (model(pixel_values=pixel_values).logits.argmax(-1) == 0).tolist()


@pytest.mark.parametrize("family", [family for family in [*FAMILIES, *SIMILAR] if family.clips], ids=str)
def test_classifiers_of_clips_are_evaluated(family):
    (clips,) = family.inputs(batch=3).values()
    model = family.make(layers=2)
    model = TocomModel.from_pretrained(model, plugins=make_plugins(model), source_r=0)
    with model.plain_at(4), torch.no_grad():
        answers = model(**{family.clips: clips}).logits.argmax(-1)
    samples = [{"pixel_values": clip, "labels": int(answers[0])} for clip in clips]
    (run,) = evaluate_checkpoint(model, "it", [4], samples, None)
    assert run.plain.tolist() == (answers == answers[0]).tolist()
    (result,) = evaluate_degrees(model, samples, [4])
    assert result.accuracy_plain == run.plain.double().mean()
